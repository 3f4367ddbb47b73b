"""The images of the probe: which ones are taken, and which labeled ones k-NN can use."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.config import Config, channels_of
from dinov2.data import make_dataset
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import AnyImage, BadImageError
from dinov2.data.transforms import BandsToTensor

logger = logging.getLogger(__name__)

MIN_PER_CLASS = 16  # images; with more classes than that allows only some of them are taken
MAX_TRIES = 20  # consecutive images that may be unreadable


class ProbeImages(NamedTuple):
    """Images that are divided among the processes; equal `digests` of pixels are the same image."""

    pixels: Tensor  # (n_local, C, G, G) uint8, or float32 levels of bands, the images of this process
    positions: Tensor  # (n,) int64, indices in the dataset of the images of all processes
    digests: list[bytes]  # SHA-256 of the pixels of all n images


class LabeledImages(NamedTuple):
    """Images for k-NN: all that were read, and the usable ones among them."""

    images: ProbeImages
    rows: Tensor  # (m,) int64, indices of the usable ones
    labels: Tensor  # (m,) int64, from 0, each at least twice
    num_classes: int  # of the dataset

    @property
    def chance(self) -> float:
        """Accuracy in percent that guessing exceeds in one of 40 cases: the largest class and two standard errors."""
        share = float(self.labels.bincount().max()) / len(self.labels)
        return min(100 * (share + 2 * math.sqrt(share * (1 - share) / len(self.labels))), 100.0)

    def describe(self) -> str:
        """A text for the log: the number of images and classes."""
        count, total = len(self.labels), len(self.images.positions)
        left_out = f" ({total - count} more were left out)" if total > count else ""
        used = int(self.labels.max()) + 1
        enough = f" (health.knn_images={MIN_PER_CLASS * self.num_classes} for all)"
        classes = f"{used} classes" if used == self.num_classes else f"{used} of {self.num_classes} classes{enough}"
        return f"{count} images of {classes}, each classified by the others{left_out}"


class NoLabels(ValueError):
    """There is no k-NN during training; the message is the reason."""


def labeled_dataset(cfg: Config, dataset: ImageDataset) -> tuple[ImageDataset, np.ndarray]:
    """The dataset for k-NN, `health.knn_dataset` or the training dataset, and its labels (n,), negative where missing.

    NoLabels if k-NN is switched off or the training dataset has none that it can use, a ValueError if
    `health.knn_dataset` cannot be opened or has none.
    """
    name = cfg.health.knn_dataset
    if cfg.health.period == 0 or cfg.health.knn_period == 0 or name == "none":
        raise NoLabels("switched off by health.period, health.knn_period or health.knn_dataset")
    if name:
        try:
            dataset = make_dataset(dataset_str=name, image_options=dataset.image_options)
        except (ValueError, OSError) as error:
            raise ValueError(f"health.knn_dataset={name!r}: {error}") from error
    targets = dataset.get_targets()
    if targets is None or targets.ndim > 1:
        raise no_labels_error(cfg, "the images have no labels, or several each (see health.knn_dataset)")
    counts = np.unique(targets[targets >= 0], return_counts=True)[1]
    if (usable := int((counts > 1).sum())) < 2:
        raise no_labels_error(
            cfg, f"labels of two classes with two images each are needed; {usable} of {len(counts)} have two"
        )
    return dataset, targets


def no_labels_error(cfg: Config, reason: str) -> ValueError:
    """The error to raise: only a dataset that the user has requested must have usable labels."""
    name = cfg.health.knn_dataset
    return ValueError(f"health.knn_dataset={name!r}: {reason}; none switches k-NN off") if name else NoLabels(reason)


def contradicting(digests: Sequence[bytes], targets: np.ndarray) -> list[int]:
    """Indices of the images that are identical to one of another class, (n,) each."""
    classes: dict[bytes, set[int]] = {}
    for digest, target in zip(digests, targets.tolist(), strict=True):
        classes.setdefault(digest, set()).add(target)
    return [row for row, digest in enumerate(digests) if len(classes[digest]) > 1]


def informative(images: ProbeImages, targets: np.ndarray) -> np.ndarray:
    """Indices of the images that k-NN can use: those with a unique class that another image of the set has as well.

    An image that is in the set twice, because one before it could not be read, counts once.
    """
    once = np.unique(images.positions.numpy(), return_index=True)[1]
    rows = np.setdiff1d(once[targets[once] >= 0], contradicting(images.digests, targets))
    classes, counts = np.unique(targets[rows], return_counts=True)
    return rows[np.isin(targets[rows], classes[counts > 1])]


def evenly_spread(positions: np.ndarray, count: int) -> np.ndarray:
    """`count` of the positions, evenly spread; all if there are no more."""
    count = min(count, len(positions))
    return positions[np.arange(count) * len(positions) // max(count, 1)]


def balanced_positions(targets: np.ndarray, count: int) -> np.ndarray:
    """Positions of about `count` images, the same number of each class, at least `MIN_PER_CLASS` if possible.

    Classes of one image are left out; of every other class that is used at least two images are taken.
    """
    classes, counts = np.unique(targets[targets >= 0], return_counts=True)
    classes = evenly_spread(classes[counts > 1], max(count // MIN_PER_CLASS, 2))
    of_each = max(count // len(classes), 2)
    return np.concatenate([evenly_spread(np.flatnonzero(targets == each), of_each) for each in classes])


def read_pixels(dataset: ImageDataset, position: int, side: int) -> tuple[Tensor, int]:
    """Pixels of the `first_readable` image, resized and center-cropped, and its position.

    They are (3, side, side) uint8, or float32 levels (C, side, side) of bands.
    """
    from torchvision.transforms import v2

    image, position = first_readable(dataset, position)
    resize = v2.Resize(side, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    cropped: Any = v2.Compose([BandsToTensor(), resize, v2.CenterCrop(side)])(image)
    if not isinstance(cropped, Tensor):
        return v2.functional.pil_to_tensor(cropped), position
    return cropped.clamp_(0, 1).mul_(255), position


def empty_pixels(count: int, cfg: Config) -> Tensor:
    """An uninitialized tensor for the pixels of some images, as `read_pixels` returns them."""
    side, channels = cfg.crops.global_crops_size, channels_of(cfg)
    return torch.empty(count, channels, side, side, dtype=torch.uint8 if channels == 3 else torch.float32)


def first_readable(dataset: ImageDataset, position: int) -> tuple[AnyImage, int]:
    """The image at a position, or the first readable one after it, and its position; an OSError after `MAX_TRIES`."""
    last = ""
    for tried in range(MAX_TRIES):
        index = (position + tried) % len(dataset)
        try:
            return dataset.get_image(index), index
        except BadImageError as error:
            logger.warning("health: %s; the next one is used", error)
            last = str(error)
    raise OSError(f"{MAX_TRIES} images in a row cannot be read: {last}")
