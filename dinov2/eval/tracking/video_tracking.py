"""Tracks the objects of the first frame of a video with a frozen backbone.

Shapes: T frames of (H, W) pixels, resized to h x w patches; D feature width; M masks, of which the first is the
background.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.data.images import AnyImage, ImageOptions, open_image, read_image_file
from dinov2.data.transforms import ToNormalizedTensor
from dinov2.data.videos import VOID, AnnotatedVideo, read_labels
from dinov2.data.workers import SupervisedLoader
from dinov2.eval.features import autocast, require_finite
from dinov2.eval.tracking.propagation import (
    PropagationSettings,
    Propagator,
    frame_size,
    patch_probabilities,
    pixel_probabilities,
)
from dinov2.models.vision_transformer import DinoVisionTransformer


@dataclass(frozen=True)
class FrameOptions:
    """How frames are prepared for the backbone."""

    short_side: int  # pixels, see `frame_size`
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_options: ImageOptions
    batch_size: int = 4
    num_workers: int = 0


class Frames(Dataset[Tensor]):
    """The frames of a video, resized (bicubic) and normalized: (3, height, width) float32 each."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], options: FrameOptions) -> None:
        self.paths, self.size, self.options = paths, size, options
        self.normalize = ToNormalizedTensor(options.mean, options.std)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = read_frame(self.paths[index], self.options.image_options)
        return self.normalize(image.resize(self.size[::-1], Image.Resampling.BICUBIC))


def read_frame(path: Path, options: ImageOptions) -> AnyImage:
    """Read a frame, RGB; an error names the file."""
    try:
        return open_image(read_image_file(path, options), options).load()
    except Exception as error:
        raise ValueError(f"cannot read the frame {path}: {error}") from error


def read_annotations(video: AnnotatedVideo, options: ImageOptions) -> np.ndarray:
    """The label maps of a video: (T, H, W) uint8.

    Raises:
        ValueError: The maps or the first frame differ in size, or the first map has no object.
    """
    maps = [read_labels(path) for path in video.annotations]
    width, height = read_frame(video.frames[0], options).size
    for path, labels in zip(video.annotations, maps, strict=True):
        if labels.shape != (height, width):
            raise ValueError(
                f"{path} has {labels.shape[1]} x {labels.shape[0]} pixels, the first frame {width} x {height}"
            )
    if not objects_of(maps[0]):
        raise ValueError(f"{video.annotations[0]} has no object to track")
    return np.stack(maps)


def objects_of(labels: np.ndarray) -> list[int]:
    """The labels of the objects in a label map, in increasing order."""
    return [label for label in np.unique(labels).tolist() if label not in (0, VOID)]


def track(
    model: DinoVisionTransformer,
    video: AnnotatedVideo,
    first: np.ndarray,
    options: FrameOptions,
    settings: PropagationSettings,
    autocast_dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Predict the label maps of a video (T, H, W) uint8 from that of its first frame (H, W), which stays as it is.

    Only objects of the first frame are predicted; its unscored pixels count as background.
    """
    height, width = first.shape
    size = frame_size(height, width, options.short_side, model.patch_size)
    objects = objects_of(first)
    compact = np.zeros(256, np.int64)  # label -> number of its mask
    compact[objects] = np.arange(1, len(objects) + 1)
    labels = np.array([0, *objects], np.uint8)
    grid = (size[0] // model.patch_size, size[1] // model.patch_size)
    propagator: Propagator | None = None
    predictions = [np.where(first == VOID, 0, first).astype(np.uint8)]
    for features in _features(model, video, size, options, autocast_dtype):
        if propagator is None:
            masks = torch.from_numpy(compact[first]).to(features.device)
            propagator = Propagator(features, patch_probabilities(masks, grid, len(labels)), settings)
            continue
        probs = pixel_probabilities(propagator.step(features), (height, width), settings)
        predictions.append(labels[probs.argmax(dim=0).cpu().numpy()])
    return np.stack(predictions)


@torch.inference_mode()
def _features(
    model: DinoVisionTransformer,
    video: AnnotatedVideo,
    size: tuple[int, int],
    options: FrameOptions,
    autocast_dtype: torch.dtype,
) -> Iterator[Tensor]:
    """The normalized patch features (h, w, D) float32 of each frame."""
    loader = SupervisedLoader(
        Frames(video.frames, size, options), batch_size=options.batch_size, num_workers=options.num_workers
    )
    start = 0
    for images in loader:
        with autocast(autocast_dtype):
            layers = model.get_intermediate_layers(images.to(distributed.device()), 1, reshape=True)
        maps = cast(Tensor, layers[0]).float().permute(0, 2, 3, 1)
        names = [str(path) for path in video.frames[start : start + len(images)]]
        require_finite(maps, names.__getitem__, model)
        start += len(images)
        yield from functional.normalize(maps, dim=-1)
