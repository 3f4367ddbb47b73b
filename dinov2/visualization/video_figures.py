"""Videos of the principal components of patch features, beside the frames. Memory use does not grow with the length.

The tokens are kept in a temporary file beside the output, in float16, until those of all frames have been fitted: all
frames share one basis and one color range, so that the colors do not flicker.

Shapes: n frames, h x w patches of a frame, D feature dimension.
"""

import errno
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dinov2 import distributed
from dinov2.analysis.pca import fit_foreground, fit_pca_colormap
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.extract.preprocessing import input_size
from dinov2.eval.extract.video import Video
from dinov2.eval.features import require_finite
from dinov2.eval.results import counted
from dinov2.files import atomic_write
from dinov2.visualization.feature_maps import log_sizes, patch_tokens
from dinov2.visualization.video import writing_video

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # frames
CLIP = 0.005  # share of the patches whose colors are clipped at either end, so that outliers do not set the range
MIN_OUTPUT_SIDE = 320  # shorter side of the written frames in pixels, reached by an integer factor


class TokenStore:
    """Patch tokens (h, w, D) of frames in a temporary file; to be used in a `with` statement.

    The file has no name: it disappears with the process, however that ends.

    Args:
        folder: Where the file is.
        shape: (h, w, D).
        expected: Number of frames, 0 if unknown; an `OSError` if there is no space for them.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], expected: int = 0) -> None:
        self.folder, self.shape, self.count = folder, shape, 0
        self._frame_bytes = 2 * shape[0] * shape[1] * shape[2]
        if expected * self._frame_bytes > shutil.disk_usage(folder).free:
            raise self._disk_full(expected)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed on exit

    def __enter__(self) -> "TokenStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, tokens: Tensor) -> None:
        """Append the tokens (n, h, w, D) of frames."""
        try:
            self._file.seek(self.count * self._frame_bytes)
            self._file.write(tokens.half().numpy().tobytes())
            self._file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise self._disk_full(self.count + len(tokens)) from error
        self.count += len(tokens)

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over batches (n, h, w, D) float16 on the device of this process."""
        for start in range(0, self.count, BATCH_SIZE):
            tokens = torch.empty(min(BATCH_SIZE, self.count - start), *self.shape, dtype=torch.float16)
            self._file.seek(start * self._frame_bytes)
            self._file.readinto(tokens.numpy().data.cast("B"))
            yield tokens.to(distributed.device())

    def save(self, path: Path) -> None:
        """Write all tokens as a .npy file, (n, h, w, D) float16."""
        header = {"descr": "<f2", "fortran_order": False, "shape": (self.count, *self.shape)}
        with atomic_write(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for tokens in self:
                file.write(tokens.cpu().numpy().tobytes())

    def _disk_full(self, frames: int) -> OSError:
        needed, free = frames * self._frame_bytes / 2**30, shutil.disk_usage(self.folder).free / 2**30
        return OSError(
            errno.ENOSPC,
            f"the features of {frames} frames need {needed:.1f} GiB until the video is written, and {free:.1f} GiB are "
            "free; a smaller --size, or fewer frames with --every, need less",
            str(self.folder),
        )


def draw_video(
    backbone: FrozenBackbone,
    video: Video,
    output: Path,
    *,
    shorter_side: int | None,
    every: int = 1,
    shifts: int = 1,
    foreground: bool = False,
    smooth: bool = False,
    tokens_file: Path | None = None,
) -> int:
    """Write the frames of a video with their principal components at their right; returns their number.

    Args:
        backbone: The model.
        video: The video to read.
        output: The video to write, .mp4 or .gif, in an existing folder.
        shorter_side: Of the model inputs in pixels; None keeps the size of the frames.
        every: Step between frames; the rate of the output is lower by this factor.
        shifts, foreground, smooth: See `figures.pca_sheet`.
        tokens_file: A .npy file to write the tokens to.
    """
    patch_size = backbone.model.patch_size
    size = input_size(video.size, shorter_side, patch_size)
    log_sizes([(video.size, size)], patch_size)
    grid = (size[1] // patch_size * shifts, size[0] // patch_size * shifts)
    expected = -(-video.expected_frames // every)
    with TokenStore(output.parent, (*grid, backbone.model.embed_dim), expected) as store:
        _extract(store, backbone, video.arrays(size, every=every), shifts, expected)
        colormap = fit_pca_colormap(store, fit_foreground(store) if foreground else None, clip=CLIP)
        factor = -(-MIN_OUTPUT_SIDE // min(size))
        width, height = (side * factor // 2 * 2 for side in size)
        with writing_video(output, video.rate / every) as write:
            for frames, tokens in zip(_batches(video.arrays((width, height), every=every)), store, strict=True):
                maps = _enlarge(colormap(tokens), height, width, smooth=smooth)
                for pair in zip(frames, maps, strict=True):
                    write(np.concatenate(pair, axis=1))
        if tokens_file is not None:
            store.save(tokens_file)
        return store.count


def _extract(
    store: TokenStore, backbone: FrozenBackbone, frames: Iterator[np.ndarray], shifts: int, expected: int
) -> None:
    """Run the model on all frames and store their tokens."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    start = time.perf_counter()
    with tqdm(total=expected or None, desc="features", disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(frames):
            images = (torch.from_numpy(batch).permute(0, 3, 1, 2).float().contiguous() / 255 - mean) / std
            tokens = patch_tokens(backbone.model, images, shifts=shifts, autocast_dtype=backbone.autocast_dtype)
            require_finite(tokens.half(), f"frame {{}} after the first {store.count}".format, backbone.model)
            store.add(tokens)
            bar.update(len(batch))
    speed = store.count / (time.perf_counter() - start)
    frame_count = counted(store.count, "frame")
    logger.info("%s, %d x %d patches each: %.1f frames/s", frame_count, *store.shape[:2], speed)


def _batches(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Batches (n, height, width, 3) of frames. A thread decodes the next batch while this one is processed."""
    batches = iter(lambda: list(islice(frames, BATCH_SIZE)), [])
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = reader.submit(next, batches, None)
            yield np.stack(batch)


def _enlarge(colors: Tensor, height: int, width: int, *, smooth: bool) -> np.ndarray:
    """Resize color maps (n, h, w, 3) in [0, 1] to images (n, height, width, 3) uint8."""
    mode = "bilinear" if smooth else "nearest-exact"
    pixels = functional.interpolate(colors.permute(0, 3, 1, 2), (height, width), mode=mode)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
