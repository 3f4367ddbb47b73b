"""The same images through the teacher again and again: are its features getting better, worse, or all alike?

A look costs some tens of forward passes, every `health.period` steps. Images are read once, before the run starts.

Shapes: n images, N patches each, D width.
"""

import logging
import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dinov2 import distributed
from dinov2.analysis.feature_statistics import leave_one_out_accuracy, patch_similarity, rank_me
from dinov2.analysis.shifts import finer_tokens
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import BadImageError
from dinov2.files import atomic_write, numbered_path, read_array
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch

logger = logging.getLogger(__name__)

IMAGED = 8  # images whose patch tokens are kept,
FINE_GRID = 14  # on a grid of at least so many cells a side: fewer show nothing
MAX_PATCHES = 1024  # whose rank is measured
MIN_PER_CLASS = 16  # images; of more classes than that allows only some are taken
TRIES = 20  # images in a row that may be unreadable


Features = dict[str, Tensor]


class _Images(NamedTuple):
    """Images that the processes share out among themselves."""

    pixels: Tensor  # (share, 3, G, G) uint8, of this process
    positions: Tensor  # (n,) int64, in the dataset, of all processes
    digests: list[bytes]  # of the pixels of all n images; equal ones are the same image


class LabeledImages(NamedTuple):
    """Images for k-NN, those left out that would say nothing."""

    images: _Images
    rows: Tensor  # (m,) int64, which of the images
    labels: Tensor  # (m,) int64, from 0, each at least twice

    @property
    def chance(self) -> float:
        """Percent that guessing reaches in one of 40 cases: the share of the largest class and two standard errors."""
        share = float(self.labels.bincount().max()) / len(self.labels)
        return min(100 * (share + 2 * math.sqrt(share * (1 - share) / len(self.labels))), 100.0)


class Probe:
    """Fixed images of the run, labeled ones if there are any, and what the teacher makes of them.

    All processes must call the methods together.

    Args:
        cfg: of the run; `health` says how many images, of which dataset, and how often they are looked at.
        model: whose teacher it is.
        dataset: that is trained on.

    Raises:
        ValueError: if `health.knn_dataset` has no labels that k-NN could use.
        OSError: if one image after the other cannot be read.
    """

    def __init__(self, cfg: Config, model: SSLMetaArch, dataset: ImageDataset) -> None:
        self.cfg = cfg
        self.model = model
        positions = np.arange(len(dataset))
        self.images = self._read(dataset, _spread(positions, max(cfg.health.probe_images, 2)))
        self.patch_features = self._read(dataset, _spread(positions, IMAGED))
        self.num_distinct = len(set(self.images.digests))
        self.labeled: LabeledImages | None = None
        try:
            self.labeled = self._labeled(*labeled_dataset(cfg, dataset))
            knn = _knn_in_words(self.labeled)
        except NoLabels as error:
            knn = f"none, {error}"
        logger.info("health: %d fixed images; k-NN: %s", len(self.images.positions), knn)

    def _labeled(self, dataset: ImageDataset, targets: np.ndarray) -> LabeledImages:
        """Images of some classes.

        Raises:
            NoLabels, ValueError: if there are no two classes with two images each, see `labeled_dataset`.
        """
        images = self._read(dataset, _of_some_classes(targets, self.cfg.health.knn_images))
        targets = targets[images.positions]
        rows = _informative(images, targets)
        if wrong := _contradicting(images.digests, targets):
            twins = [row for row in wrong if images.digests[row] == images.digests[wrong[0]]]
            named = (f"{dataset.describe(int(images.positions[row]))} (class {targets[row]})" for row in twins[:3])
            logger.warning(
                "health: %d of %d images for k-NN are identical to one of another class, and left out; such as %s",
                *(len(wrong), len(targets), " and ".join(named)),
            )
        classes, labels = np.unique(targets[rows], return_inverse=True)
        if len(classes) < 2:
            why = (
                f"only {len(classes)} of {len(set(targets))} classes have two images left, of {len(targets)} looked at"
            )
            raise _no_labels(self.cfg, why)
        return LabeledImages(images, torch.from_numpy(rows), torch.from_numpy(labels))

    def _read(self, dataset: ImageDataset, positions: np.ndarray) -> _Images:
        """This process's share of the images at some positions; for unreadable ones those that follow."""
        side = self.cfg.crops.global_crops_size
        resize = v2.Resize(side, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        to_pixels = v2.Compose([resize, v2.CenterCrop(side), v2.PILToTensor()])
        mine = np.array_split(positions, distributed.world_size())[distributed.rank()]
        pixels, found = torch.empty(len(mine), 3, side, side, dtype=torch.uint8), []
        for row, position in enumerate(mine.tolist()):
            image, position = _first_readable(dataset, position)
            pixels[row] = to_pixels(image)
            found.append((position, sha256(pixels[row].numpy().tobytes()).digest()))
        of_all = [each for share in distributed.all_gather_object(found) for each in share]
        positions_read = torch.tensor([position for position, _ in of_all], dtype=torch.int64)
        return _Images(pixels, positions_read, [digest for _, digest in of_all])

    def _features(self, images: _Images, function: Callable[[Tensor], Features] | None = None) -> Features:
        """The teacher's features of some images in order, on all processes, `x_norm_clstoken` and so on: (n, ..., D).

        All processes run it as often, on as many images, as in training if that is compiled: zeros fill them up.

        Args:
            images: to look at.
            function: batch of normalized images -> what is wanted of them.
        """
        function = function or self.model.teacher_features
        share = math.ceil(len(images.positions) / distributed.world_size())
        in_training = NUM_GLOBAL_CROPS * self.cfg.train.batch_size_per_gpu
        at_once = in_training if self.cfg.train.compile else min(in_training, share)
        mean = torch.tensor(self.cfg.augmentation.mean).view(3, 1, 1)
        std = torch.tensor(self.cfg.augmentation.std).view(3, 1, 1)
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, share, at_once):
            pixels = images.pixels[first : first + at_once]
            crops = torch.zeros(at_once, *pixels.shape[1:])
            crops[: len(pixels)] = (pixels / 255 - mean) / std
            for name, value in function(crops.to(distributed.device())).items():
                parts.setdefault(name, []).append(value[: len(pixels)])
        return {name: distributed.all_gather_varied(torch.cat(values)) for name, values in parts.items()}

    def _class_tokens(self, crops: Tensor) -> Features:
        """`x_norm_clstoken` alone: patch tokens of all images would fill the memory."""
        return {"x_norm_clstoken": self.model.teacher_features(crops)["x_norm_clstoken"]}

    def _fine_tokens(self, crops: Tensor) -> Features:
        """`tokens`: patch tokens on a grid of at least `FINE_GRID` cells a side, if shifted views can give it."""
        patch_size = self.cfg.student.patch_size
        side = crops.shape[-1] // patch_size
        divisors = [n for n in range(1, patch_size + 1) if patch_size % n == 0]

        def tokens_of(view: Tensor) -> Tensor:
            return self.model.teacher_features(view)["x_norm_patchtokens"].unflatten(1, (side, side))

        shifts = next((n for n in divisors if n * side >= FINE_GRID), patch_size)
        return {"tokens": finer_tokens(tokens_of, crops, patch_size=patch_size, shifts=shifts)}

    def look(self) -> dict[str, float]:
        """The state of the features, by name.

        `probe_images`: how many images these are of; `probe_distinct_images`: how many of them differ.
        `probe_cls_rank_me`, `probe_patch_rank_me`: effective ranks. `probe_patch_similarity`: mean cosine of two
        patches of an image. `probe_cls_norm`, `probe_patch_norm`, `probe_patch_norm_max`: lengths of tokens before the
        final norm: means, and the mean over images of the largest.
        """
        features = self._features(self.images)
        patches, before_norm = features["x_norm_patchtokens"], features["x_prenorm"].norm(dim=-1)
        patch_norms = before_norm[:, -patches.shape[1] :]  # after class token and registers
        flat = patches.flatten(0, 1)
        return {
            "probe_images": float(len(self.images.positions)),
            "probe_distinct_images": float(self.num_distinct),
            "probe_cls_rank_me": rank_me(features["x_norm_clstoken"]),
            "probe_patch_rank_me": rank_me(flat[:: math.ceil(len(flat) / MAX_PATCHES)]),
            "probe_patch_similarity": patch_similarity(patches),
            "probe_cls_norm": before_norm[:, 0].mean().item(),
            "probe_patch_norm": patch_norms.mean().item(),
            "probe_patch_norm_max": patch_norms.amax(dim=1).mean().item(),
        }

    def knn(self) -> dict[str, float]:
        """`knn`, the leave-one-out accuracy of class tokens in percent, and `knn_chance`, up to which it says nothing.

        Empty without labels.
        """
        if self.labeled is None:
            return {}
        images, rows, labels = self.labeled
        features = self._features(images, self._class_tokens)["x_norm_clstoken"].cpu()
        accuracy = leave_one_out_accuracy(features[rows], labels)
        return {"knn": 100 * accuracy, "knn_chance": self.labeled.chance}

    def save_patch_features(self, folder: Path, step: int) -> None:
        """Keep what images of the features at this step need: `patch_tokens_<step>.npy` (n, h, w, D) float16.

        And the images they are of: `images.npz` with `images` (n, 3, G, G) uint8. A full disk is said, no more.
        """
        tokens = self._features(self.patch_features, self._fine_tokens)["tokens"]
        pixels = distributed.all_gather_varied(self.patch_features.pixels.to(distributed.device()))
        if not distributed.is_main():
            return
        try:
            images = pixels.cpu().numpy()
            _archive_features_of_other_images(folder, images)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / "images.npz") as file:
                np.savez_compressed(file, images=images)
            with atomic_write(folder / f"patch_tokens_{step:07d}.npy") as file:
                np.save(file, tokens.half().cpu().numpy())
        except OSError as error:
            logger.warning("cannot keep features of step %d for images in %s: %s", step, folder, error)


class NoLabels(ValueError):
    """There is no k-NN while training, for the reason that the message gives."""


def labeled_dataset(cfg: Config, dataset: ImageDataset) -> tuple[ImageDataset, np.ndarray]:
    """The dataset for k-NN and its labels: what `health.knn_dataset` names, else the one trained on.

    Raises:
        NoLabels: if it is switched off, or the dataset trained on has no labels of which k-NN could make something.
        ValueError: naming the key, if a dataset that was asked for cannot be had or has no such labels.
    """
    named = cfg.health.knn_dataset
    if cfg.health.period == 0 or cfg.health.knn_period == 0 or named == "none":
        raise NoLabels("switched off by health.period, health.knn_period or health.knn_dataset")
    if named:
        try:
            dataset = make_dataset(dataset_str=named, image_options=dataset.image_options)
        except (ValueError, OSError) as error:
            raise ValueError(f"health.knn_dataset={named!r}: {error}") from error
    targets = dataset.get_targets()
    if targets is None or targets.ndim > 1:
        raise _no_labels(cfg, "there are no labels, one for an image")
    counts = np.unique(targets[targets >= 0], return_counts=True)[1]
    if (usable := int((counts > 1).sum())) < 2:
        raise _no_labels(
            cfg, f"labels of two classes with two images each are needed; {usable} of {len(counts)} have two"
        )
    return dataset, targets


def _no_labels(cfg: Config, why: str) -> ValueError:
    named = cfg.health.knn_dataset
    return ValueError(f"health.knn_dataset={named!r}: {why}; none switches k-NN off") if named else NoLabels(why)


def _knn_in_words(labeled: LabeledImages) -> str:
    count, images = len(labeled.labels), len(labeled.images.positions)
    left_out = f" ({images - count} more were left out)" if images > count else ""
    return f"{count} images of {int(labeled.labels.max()) + 1} classes, each classified by the others{left_out}"


def _contradicting(digests: Sequence[bytes], targets: np.ndarray) -> list[int]:
    """Which images are identical to one of another class, (n,) each."""
    classes: dict[bytes, set[int]] = {}
    for digest, target in zip(digests, targets.tolist(), strict=True):
        classes.setdefault(digest, set()).add(target)
    return [row for row, digest in enumerate(digests) if len(classes[digest]) > 1]


def _informative(images: _Images, targets: np.ndarray) -> np.ndarray:
    """Which images k-NN can say something of: those with one class that some other image among them has as well.

    An image that stands there twice, because one before it could not be read, counts once.
    """
    once = np.unique(images.positions.numpy(), return_index=True)[1]
    rows = np.setdiff1d(once[targets[once] >= 0], _contradicting(images.digests, targets))
    classes, counts = np.unique(targets[rows], return_counts=True)
    return rows[np.isin(targets[rows], classes[counts > 1])]


def _spread(positions: np.ndarray, count: int) -> np.ndarray:
    """So many of the positions, evenly spread; all if there are no more."""
    count = min(count, len(positions))
    return positions[np.arange(count) * len(positions) // max(count, 1)]


def _of_some_classes(targets: np.ndarray, count: int) -> np.ndarray:
    """Positions of about `count` images: as many of each class, of as many classes as get `MIN_PER_CLASS`.

    Classes of one image are left out, and of the others two are taken at least.
    """
    classes, counts = np.unique(targets[targets >= 0], return_counts=True)
    classes = _spread(classes[counts > 1], max(count // MIN_PER_CLASS, 2))
    of_each = max(count // len(classes), 2)
    return np.concatenate([_spread(np.flatnonzero(targets == each), of_each) for each in classes])


def _first_readable(dataset: ImageDataset, position: int) -> tuple[Image.Image, int]:
    """The image at the position, or the first after it that can be read, and where that was.

    Raises:
        OSError: if `TRIES` images in a row cannot.
    """
    last = ""
    for tried in range(TRIES):
        index = (position + tried) % len(dataset)
        try:
            return dataset.get_image(index), index
        except BadImageError as error:
            logger.warning("health: %s; the next one is taken", error)
            last = str(error)
    raise OSError(f"{TRIES} images in a row cannot be read: {last}")


def _archive_features_of_other_images(folder: Path, images: np.ndarray) -> None:
    """Move a folder with features of other images away: the run has been given other data."""
    try:
        same = np.array_equal(read_array(folder / "images.npz", "images"), images)
    except FileNotFoundError:
        return
    except ValueError as error:
        logger.warning("%s; it is replaced", error)
        return
    if not same:
        archive = folder.rename(numbered_path(folder.with_name(f"{folder.name}.earlier")))
        logger.warning(
            "the images that are looked at are others than before: what was in %s is now in %s", folder, archive
        )
