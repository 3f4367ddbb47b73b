"""The same images through the teacher again and again: are its features getting better, worse, or all alike?

A look costs some tens of forward passes, every `health.period` steps. Images are read once, before the run starts.

Shapes: n images, N patches each, D width.
"""

import itertools
import logging
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dinov2 import distributed
from dinov2.analysis.features import leave_one_out_accuracy, patch_similarity, rank_me
from dinov2.analysis.shifts import finer_tokens
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.data.base import ImageDataset
from dinov2.data.images import BadImageError
from dinov2.files import replacing
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch

logger = logging.getLogger(__name__)

PICTURED = 8  # images whose patch tokens are kept,
FINE_GRID = 14  # on a grid of at least so many cells a side: fewer show nothing
MAX_PATCHES = 1024  # whose rank is measured
MIN_PER_CLASS = 16  # images; of more classes than that allows only some are taken
TRIES = 20  # images in a row that may be unreadable


Features = dict[str, Tensor]


class _Images(NamedTuple):
    """Images that the processes share out among themselves."""

    pixels: Tensor  # (share, 3, G, G) uint8, of this process
    positions: Tensor  # (n,) int64, in the data set, of all processes


class Probe:
    """Fixed images of the run, labelled ones if there are any, and what the teacher makes of them.

    All processes must call the methods together.

    Args:
        cfg: of the run; `health` says how many images, of which data set, and how often they are looked at.
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
        self.pictured = self._read(dataset, _spread(positions, PICTURED))
        mine = [sha256(pixels.numpy()).digest() for pixels in self.images.pixels]
        self.num_distinct = len({digest for share in distributed.all_gather_object(mine) for digest in share})
        self.labelled: tuple[_Images, Tensor] | None = None
        if (found := labelled_dataset(cfg, dataset)) is not None:
            labelled, targets = found
            images = self._read(labelled, _of_some_classes(targets, cfg.health.knn_images))
            classes, labels = np.unique(targets[images.positions], return_inverse=True)
            self.labelled = images, torch.from_numpy(labels)
        logger.info("health: %d fixed images; k-NN: %s", len(self.images.positions), _knn_in_words(self.labelled))

    def _read(self, dataset: ImageDataset, positions: np.ndarray) -> _Images:
        """This process's share of the images at some positions; for unreadable ones those that follow."""
        side = self.cfg.crops.global_crops_size
        resize = v2.Resize(side, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        to_pixels = v2.Compose([resize, v2.CenterCrop(side), v2.PILToTensor()])
        mine = np.array_split(positions, distributed.world_size())[distributed.rank()]
        pixels, found = torch.empty(len(mine), 3, side, side, dtype=torch.uint8), []
        for row, position in enumerate(mine.tolist()):
            image, where = _first_readable(dataset, position)
            pixels[row] = to_pixels(image)
            found.append(where)
        return _Images(pixels, torch.tensor(sum(distributed.all_gather_object(found), []), dtype=torch.int64))

    def _features(self, images: _Images, function: Callable[[Tensor], Features] | None = None) -> Features:
        """The teacher's features of some images in order, on all processes, `x_norm_clstoken` and so on: (n, ..., D).

        All processes run it as often, on as many images, as in training if that is compiled: zeros fill them up.

        Args:
            images: to look at.
            function: batch of normalised images -> what is wanted of them.
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

        `probe_distinct_images`: how many of the images differ. `probe_cls_rank_me`, `probe_patch_rank_me`: effective
        ranks. `probe_patch_similarity`: mean cosine of two patches of an image. `probe_cls_norm`, `probe_patch_norm`,
        `probe_patch_norm_max`: lengths of tokens before the final norm: means, and the mean over images of the largest.
        """
        features = self._features(self.images)
        patches, before_norm = features["x_norm_patchtokens"], features["x_prenorm"].norm(dim=-1)
        patch_norms = before_norm[:, -patches.shape[1] :]  # after class token and registers
        flat = patches.flatten(0, 1)
        return {
            "probe_distinct_images": float(self.num_distinct),
            "probe_cls_rank_me": rank_me(features["x_norm_clstoken"]),
            "probe_patch_rank_me": rank_me(flat[:: math.ceil(len(flat) / MAX_PATCHES)]),
            "probe_patch_similarity": patch_similarity(patches),
            "probe_cls_norm": before_norm[:, 0].mean().item(),
            "probe_patch_norm": patch_norms.mean().item(),
            "probe_patch_norm_max": patch_norms.amax(dim=1).mean().item(),
        }

    def knn(self) -> dict[str, float]:
        """`knn`, the leave-one-out accuracy of class tokens in percent; empty without labels."""
        if self.labelled is None:
            return {}
        images, labels = self.labelled
        features = self._features(images, self._class_tokens)["x_norm_clstoken"].cpu()
        return {"knn": 100 * leave_one_out_accuracy(features, labels)}

    def save_pictured(self, folder: Path, step: int) -> None:
        """Keep what pictures of the features at this step need: `patch_tokens_<step>.npy` (n, h, w, D) float16.

        And the images they are of: `images.npz` with `images` (n, 3, G, G) uint8. A full disk is said, no more.
        """
        tokens = self._features(self.pictured, self._fine_tokens)["tokens"]
        pixels = distributed.all_gather_varied(self.pictured.pixels.to(distributed.device()))
        if not distributed.is_main():
            return
        try:
            images = pixels.cpu().numpy()
            _set_aside_pictures_of_others(folder, images)
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "images.npz") as file:
                np.savez_compressed(file, images=images)
            with replacing(folder / f"patch_tokens_{step:07d}.npy") as file:
                np.save(file, tokens.half().cpu().numpy())
        except OSError as error:
            logger.warning("cannot keep features of step %d for pictures in %s: %s", step, folder, error)


def labelled_dataset(cfg: Config, dataset: ImageDataset) -> tuple[ImageDataset, np.ndarray] | None:
    """The data set for k-NN and its labels: what `health.knn_dataset` names, else the one trained on, if it has some.

    Raises:
        ValueError: naming the key, if a data set that was asked for cannot be had or has no such labels.
    """
    named = cfg.health.knn_dataset
    if cfg.health.period == 0 or cfg.health.knn_period == 0 or named == "none":
        return None
    if named:
        try:
            dataset = make_dataset(dataset_str=named, image_options=dataset.image_options)
        except (ValueError, OSError) as error:
            raise ValueError(f"health.knn_dataset={named!r}: {error}") from error
    targets = dataset.get_targets()
    if targets is not None and targets.ndim == 1 and len(np.unique(targets[targets >= 0])) > 1:
        return dataset, targets
    if named:
        raise ValueError(
            f"health.knn_dataset={named!r} needs labels of two classes at least, one for an image, which it does not "
            "have; none switches k-NN off"
        )
    return None


def _knn_in_words(labelled: tuple[_Images, Tensor] | None) -> str:
    if labelled is None:
        return "none, for want of labels or as health.knn_... says"
    return f"{len(labelled[1])} images of {int(labelled[1].max()) + 1} classes, each classified by the others"


def _spread(positions: np.ndarray, count: int) -> np.ndarray:
    """So many of the positions, evenly spread; all if there are no more."""
    count = min(count, len(positions))
    return positions[np.arange(count) * len(positions) // max(count, 1)]


def _of_some_classes(targets: np.ndarray, count: int) -> np.ndarray:
    """Positions of about `count` images: as many of each class, of as many classes as get `MIN_PER_CLASS`."""
    classes = np.unique(targets[targets >= 0])
    classes = _spread(classes, max(count // MIN_PER_CLASS, 2))
    return np.concatenate([_spread(np.flatnonzero(targets == each), count // len(classes)) for each in classes])


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


def _set_aside_pictures_of_others(folder: Path, images: np.ndarray) -> None:
    """Move a folder with features of other images away: the run has been given other data."""
    try:
        with (folder / "images.npz").open("rb") as opened, np.load(opened) as former:
            same = np.array_equal(former["images"], images)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # there are none, or they are damaged
        return
    if not same:
        names = (folder.with_name(f"{folder.name}.earlier.{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        folder.rename(aside)
        logger.warning(
            "the images that are looked at are others than before: what was in %s is now in %s", folder, aside
        )
