"""A video beside the principal components of its patch features, frame by frame, in memory that does not grow.

The model sees each frame once. Its tokens wait in a temporary file beside the output, as float16, until those of all
frames have given one basis and one range of colors: nothing flickers, and the PCA is that of all frames.

Shapes: n frames, h x w patches of a frame, D feature width.
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
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dinov2 import distributed
from dinov2.analysis.pca import fit_foreground, fit_pca_colormap
from dinov2.eval.features import require_finite
from dinov2.files import atomic_write
from dinov2.visualization.feature_maps import input_size, log_sizes, patch_tokens
from dinov2.visualization.frozen_backbone import FrozenBackbone
from dinov2.visualization.video import Video, writing_video

logger = logging.getLogger(__name__)

T = TypeVar("T")

FRAMES_AT_ONCE = 16
CLIP = 0.005  # share of the patches whose colors may be cut off at either end: one odd patch does not gray the others
SMALLEST_SHOWN = 320  # pixels of the shorter side of the written frames, which those of small models are enlarged to


class TokenStore:
    """Patch tokens of frames in a temporary file, to be used in a `with` statement; iterated over in batches.

    The file has no name: it vanishes with the process, however that ends.

    Args:
        folder: where the file lies.
        shape: (h, w, D) of a frame.
        expected: frames that are about to come, 0 if that is not known.

    Raises:
        OSError: naming the folder, if the disk has not enough room.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], expected: int = 0) -> None:
        self.folder, self.shape, self.count = folder, shape, 0
        self._bytes = 2 * shape[0] * shape[1] * shape[2]
        if expected * self._bytes > shutil.disk_usage(folder).free:
            raise self._no_room(expected)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed on exit

    def __enter__(self) -> "TokenStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self.count

    def add(self, tokens: Tensor) -> None:
        """Append the tokens (n, h, w, D) of frames."""
        data = memoryview(tokens.half().numpy().tobytes())
        try:
            self._file.seek(self.count * self._bytes)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise self._no_room(self.count + len(tokens)) from error
            raise
        self.count += len(tokens)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches (n, h, w, D) float16 on this process's device."""
        for start in range(0, self.count, FRAMES_AT_ONCE):
            tokens = torch.empty(min(FRAMES_AT_ONCE, self.count - start), *self.shape, dtype=torch.float16)
            data = tokens.numpy().data.cast("B")
            self._file.seek(start * self._bytes)
            while data:
                data = data[self._file.readinto(data) :]
            yield tokens.to(distributed.device())

    def save(self, path: Path) -> None:
        """Write all tokens as a .npy file, (frames, h, w, D) float16."""
        header = {"descr": "<f2", "fortran_order": False, "shape": (self.count, *self.shape)}
        with atomic_write(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for tokens in self:
                file.write(tokens.cpu().numpy().tobytes())

    def _no_room(self, frames: int) -> OSError:
        needed, free = frames * self._bytes / 2**30, shutil.disk_usage(self.folder).free / 2**30
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
    """Write the frames of a video with their principal components at their right.

    Args:
        output: the video to write, .mp4 or .gif, in a folder that exists.
        shorter_side: of the frames that the model sees, in pixels; None: as they are.
        every: only the first of so many frames, at a rate so many times lower.
        shifts: see `feature_maps.patch_tokens`.
        foreground: color what stands out, the rest is black.
        smooth: blend the colors of neighboring patches.
        tokens_file: where the tokens are kept, if they are.

    Returns:
        How many frames.
    """
    patch_size = backbone.model.patch_size
    size = input_size(video.size, shorter_side, patch_size)
    log_sizes([(video.size, size)], patch_size)
    grid = (size[1] // patch_size * shifts, size[0] // patch_size * shifts)
    expected = -(-video.expected_frames() // every)
    with TokenStore(output.parent, (*grid, backbone.model.embed_dim), expected) as store:
        _fill(store, backbone, video.arrays(size, every=every), shifts, expected)
        colormap = fit_pca_colormap(store, fit_foreground(store) if foreground else None, clip=CLIP)
        factor = -(-SMALLEST_SHOWN // min(size))
        width, height = size[0] * factor // 2 * 2, size[1] * factor // 2 * 2
        with writing_video(output, video.rate / every) as write:
            for frames, tokens in zip(_batches(video.arrays((width, height), every=every)), store, strict=True):
                panels = _enlarged(colormap(tokens), height, width, smooth=smooth)
                for frame, panel in zip(frames, panels, strict=True):
                    write(np.concatenate([frame, panel], axis=1))
        if tokens_file is not None:
            store.save(tokens_file)
        return len(store)


def _fill(
    store: TokenStore, backbone: FrozenBackbone, frames: Iterator[np.ndarray], shifts: int, expected: int
) -> None:
    """Show the model all frames and keep their tokens."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    started = time.perf_counter()
    with tqdm(total=expected or None, desc="features", disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(frames):
            images = (torch.from_numpy(batch).permute(0, 3, 1, 2).float().contiguous() / 255 - mean) / std
            tokens = patch_tokens(backbone.model, images, shifts=shifts, autocast_dtype=backbone.autocast_dtype)
            require_finite(tokens.half(), f"frame {{}} after the first {len(store)}".format, backbone.model)
            store.add(tokens)
            bar.update(len(batch))
    speed = len(store) / (time.perf_counter() - started)
    logger.info("%d frames, %d x %d patches each: %.1f frames/s", len(store), *store.shape[:2], speed)


def _batches(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames stacked, (n, height, width, 3); the next ones are read while these are worked on."""
    stacks = iter(lambda: list(islice(frames, FRAMES_AT_ONCE)), [])
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(next, stacks, None)
        while (stack := coming.result()) is not None:
            coming = reader.submit(next, stacks, None)
            yield np.stack(stack)


def _enlarged(colors: Tensor, height: int, width: int, *, smooth: bool) -> np.ndarray:
    """Colors (n, h, w, 3) in [0, 1] -> (n, height, width, 3) uint8."""
    mode = "bilinear" if smooth else "nearest-exact"
    pixels = functional.interpolate(colors.permute(0, 3, 1, 2), (height, width), mode=mode)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
