"""Measurements of the teacher's features on fixed images, throughout a run.

A measurement takes some tens of forward passes, every `health.period` steps. Images are read once, before training.

Shapes: n images, N patches each, D feature width.
"""

import logging
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.analysis.feature_statistics import leave_one_out_accuracy, patch_similarity, rank_me
from dinov2.analysis.shifts import finer_tokens
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import ImageOptions, in_colors
from dinov2.files import atomic_write, numbered_path, read_array
from dinov2.train.monitor.dense_images import read_dense_images
from dinov2.train.monitor.probe_images import (
    LabeledImages,
    NoLabels,
    ProbeImages,
    balanced_positions,
    contradicting,
    empty_pixels,
    evenly_spread,
    informative,
    labeled_dataset,
    no_labels_error,
    read_pixels,
)
from dinov2.train.monitor.starting_point import StartingPoint, read_start
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch

logger = logging.getLogger(__name__)

NUM_SHOWN = 8  # images whose patch tokens are saved for the report
FINE_GRID = 14  # minimal side of the grid of these tokens; a coarser one shows no objects
MAX_PATCHES = 1024  # of which the effective rank is measured

Features = dict[str, Tensor]


class Probe:
    """Fixed images of a run, labeled ones if there are any, and measurements of the teacher's features of them.

    All processes must call the methods together. A ValueError if `health.knn_dataset` has no labels that k-NN can use,
    or `health.dense_dataset` no images with usable class maps; an OSError if too many consecutive images cannot be
    read.
    """

    def __init__(self, cfg: Config, model: SSLMetaArch, dataset: ImageDataset) -> None:
        self.cfg = cfg
        self.model = model
        positions = np.arange(len(dataset))
        self.images = self._read(dataset, evenly_spread(positions, max(cfg.health.probe_images, 2)))
        self.shown = self._read(dataset, evenly_spread(positions, NUM_SHOWN))
        self.num_distinct = len(set(self.images.digests))
        self.digest = sha256(b"".join(self.images.digests)).digest()
        folder = Path(cfg.train.output_dir) / "health"
        self.start = distributed.from_main(lambda: read_start(folder, self.digest))  # None: of random weights
        self.labeled: LabeledImages | None = None
        try:
            self.labeled = self._labeled(*labeled_dataset(cfg, dataset))
            knn = self.labeled.describe()
        except NoLabels as error:
            knn = f"none, {error}"
        logger.info("health: %d fixed images; k-NN: %s", len(self.images.positions), knn)
        self.dense = read_dense_images(cfg, dataset)
        if self.dense is not None:
            logger.info("health: k-NN of patches: %s", self.dense.describe())

    @property
    def has_labels(self) -> bool:
        """Whether anything is measured by labels, of images or of pixels."""
        return self.labeled is not None or self.dense is not None

    def _labeled(self, dataset: ImageDataset, targets: np.ndarray) -> LabeledImages:
        """Read images of some classes; NoLabels or a ValueError without two classes of two images each."""
        num_classes = len(np.unique(targets[targets >= 0]))
        images = self._read(dataset, balanced_positions(targets, self.cfg.health.knn_images))
        targets = targets[images.positions]
        rows = informative(images, targets)
        if wrong := contradicting(images.digests, targets):
            twins = [row for row in wrong if images.digests[row] == images.digests[wrong[0]]]
            names = (f"{dataset.describe(int(images.positions[row]))} (class {targets[row]})" for row in twins[:3])
            logger.warning(
                "health: %d of %d images for k-NN are identical to one of another class and are left out, such as %s",
                *(len(wrong), len(targets), " and ".join(names)),
            )
        classes, labels = np.unique(targets[rows], return_inverse=True)
        if len(classes) < 2:
            reason = (
                f"only {len(classes)} of {len(set(targets))} classes have two usable images, of {len(targets)} read"
            )
            raise no_labels_error(self.cfg, reason)
        return LabeledImages(images, torch.from_numpy(rows), torch.from_numpy(labels), num_classes)

    def _read(self, dataset: ImageDataset, positions: np.ndarray) -> ProbeImages:
        """Read this process's share of the images at some positions; unreadable ones are replaced by the next."""
        side = self.cfg.crops.global_crops_size
        local = np.array_split(positions, distributed.world_size())[distributed.rank()]
        pixels, found = empty_pixels(len(local), self.cfg), []
        for row, position in enumerate(local.tolist()):
            pixels[row], position = read_pixels(dataset, position, side)
            found.append((position, sha256(pixels[row].numpy().tobytes()).digest()))
        everywhere = [each for share in distributed.all_gather_object(found) for each in share]
        positions_read = torch.tensor([position for position, _ in everywhere], dtype=torch.int64)
        return ProbeImages(pixels, positions_read, [digest for _, digest in everywhere])

    def _features(self, images: ProbeImages, function: Callable[[Tensor], Features] | None = None) -> Features:
        """Compute features of some images by name, (n, ..., D), on all processes; by default all of the teacher."""
        function = function or self.model.teacher_features
        share = math.ceil(len(images.positions) / distributed.world_size())
        # All processes call the teacher equally often, with batches of one size: if compiled, that of training.
        in_training = NUM_GLOBAL_CROPS * self.cfg.train.batch_size_per_gpu
        at_once = in_training if self.cfg.train.compile else min(in_training, share)
        mean = torch.tensor(self.cfg.augmentation.mean).view(-1, 1, 1)
        std = torch.tensor(self.cfg.augmentation.std).view(-1, 1, 1)
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, share, at_once):
            pixels = images.pixels[first : first + at_once]
            crops = torch.zeros(at_once, *pixels.shape[1:])
            crops[: len(pixels)] = (pixels / 255 - mean) / std
            for name, value in function(crops.to(distributed.device())).items():
                parts.setdefault(name, []).append(value[: len(pixels)])
        return {name: distributed.all_gather_varied(torch.cat(values)) for name, values in parts.items()}

    def _of_many(self, images: ProbeImages, name: str, *, frozen_teacher: bool) -> Tensor:
        """Compute features of one name only: all of many images would need too much memory."""
        function = self.model.frozen_teacher_features if frozen_teacher else self.model.teacher_features
        return self._features(images, lambda crops: {name: function(crops)[name]})[name]

    def _fine_tokens(self, crops: Tensor) -> Features:
        """`tokens`: patch tokens on a grid of at least `FINE_GRID` cells a side, if shifted inputs allow it."""
        patch_size = self.cfg.student.patch_size
        side = crops.shape[-1] // patch_size
        divisors = [n for n in range(1, patch_size + 1) if patch_size % n == 0]

        def tokens_of(shifted: Tensor) -> Tensor:
            return self.model.teacher_features(shifted)["x_norm_patchtokens"].unflatten(1, (side, side))

        shifts = next((n for n in divisors if n * side >= FINE_GRID), patch_size)
        return {"tokens": finer_tokens(tokens_of, crops, patch_size=patch_size, shifts=shifts)}

    def measure(self, *, is_start: bool = False) -> dict[str, float]:
        """Measure the features of the fixed images by name; lengths of tokens are those before the last norm.

        With `is_start` they are kept, and later ones compared with them.
        """
        features = self._features(self.images)
        patches, before_norm = features["x_norm_patchtokens"], features["x_prenorm"].norm(dim=-1)
        patch_norms = before_norm[:, -patches.shape[1] :]  # after class token and registers
        cls, flat = features["x_norm_clstoken"], patches.flatten(0, 1)
        some = flat[:: math.ceil(len(flat) / MAX_PATCHES)]
        if is_start:
            self.start = StartingPoint(cls.cpu(), some.cpu(), self.digest)
        drift = self.start.drift(cls, some) if self.start else {}
        return drift | {
            "probe_images": float(len(self.images.positions)),
            "probe_distinct_images": float(self.num_distinct),
            "probe_cls_rank_me": rank_me(cls),
            "probe_patch_rank_me": rank_me(some),
            "probe_patch_similarity": patch_similarity(patches),
            "probe_cls_norm": before_norm[:, 0].mean().item(),
            "probe_patch_norm": patch_norms.mean().item(),
            "probe_patch_norm_max": patch_norms.amax(dim=1).mean().item(),
        }

    def measure_by_labels(self) -> dict[str, float]:
        """Measure what needs labels: `knn` and `patch_knn`."""
        return self.knn() | self.patch_knn()

    def measure_frozen_teacher(self) -> dict[str, float]:
        """Measure the same of the frozen teacher of a distillation; empty for runs without one, and without labels."""
        if not self.model.has_frozen_teacher:
            return {}
        measured = self.knn(frozen_teacher=True) | self.patch_knn(frozen_teacher=True)
        names = ("knn", "patch_knn_miou", "patch_knn_error")  # the others are those of the run's own teacher
        return {f"frozen_teacher_{name}": measured[name] for name in names if name in measured}

    def patch_knn(self, *, frozen_teacher: bool = False) -> dict[str, float]:
        """Measure the mean IoU of segmentation by k-NN of patch tokens, %, and its error; empty without class maps."""
        if self.dense is None:
            return {}
        images = (self.dense.bank.images, self.dense.queries.images)
        bank, queries = (self._of_many(each, "x_norm_patchtokens", frozen_teacher=frozen_teacher) for each in images)
        return self.dense.scores(bank, queries)

    def knn(self, *, frozen_teacher: bool = False) -> dict[str, float]:
        """Measure the leave-one-out k-NN accuracy of class tokens, and that of guessing, %; empty without labels."""
        if self.labeled is None:
            return {}
        images, rows, labels, _ = self.labeled
        features = self._of_many(images, "x_norm_clstoken", frozen_teacher=frozen_teacher).cpu()
        accuracy = leave_one_out_accuracy(features[rows], labels)
        return {"knn": 100 * accuracy, "knn_chance": self.labeled.chance, "knn_images": float(len(rows))}

    def save_patch_features(self, folder: Path, step: int) -> None:
        """Save patch tokens of this step for the report; an error, such as a full disk, is only logged.

        Files: `patch_tokens_<step>.npy`, (n, h, w, D) float16, and `images.npz` with `images` (n, 3, G, G) uint8.
        """
        tokens = self._features(self.shown, self._fine_tokens)["tokens"]
        pixels = distributed.all_gather_varied(self.shown.pixels.to(distributed.device()))
        if not distributed.is_main():
            return
        try:
            shown = ImageOptions(**vars(self.cfg.images)).shown
            images = in_colors(pixels.cpu().numpy().transpose(0, 2, 3, 1), shown).transpose(0, 3, 1, 2)
            _archive_features_of_other_images(folder, images)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / "images.npz") as file:
                np.savez_compressed(file, images=images)
            with atomic_write(folder / f"patch_tokens_{step:07d}.npy") as file:
                np.save(file, tokens.half().cpu().numpy())
        except OSError as error:
            logger.warning("cannot save features of step %d in %s: %s", step, folder, error)


def _archive_features_of_other_images(folder: Path, images: np.ndarray) -> None:
    """Archive a folder with features of other images, as after a change of the dataset."""
    try:
        same = np.array_equal(read_array(folder / "images.npz", "images"), images)
    except FileNotFoundError:
        return
    except ValueError as error:
        logger.warning("%s; it is replaced", error)
        return
    if not same:
        archive = folder.rename(numbered_path(folder.with_name(f"{folder.name}.earlier")))
        logger.warning("the probe images have changed: the earlier content of %s is now in %s", folder, archive)
