"""Images with class maps whose patches are segmented by those of others, throughout a run.

Shapes: n images of N patches each, global crops of G x G pixels, C classes.
"""

from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2 import distributed
from dinov2.analysis.patch_segmentation import IGNORED, areas_by_image, knn_labels, mean_iou, to_label_maps, to_patches
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.dense.base import SEGMENTATION, DenseDataset
from dinov2.data.dense.map_files import BadMapError
from dinov2.data.dense.opening import open_dense
from dinov2.data.dense.resampling import resized_map
from dinov2.data.images import BadImageError
from dinov2.train.monitor.probe_images import ProbeImages, empty_pixels, evenly_spread

NUM_NEIGHBORS = 10
MIN_IMAGES = 16


class MappedImages(NamedTuple):
    """Images that are divided among the processes, and the maps of all of them."""

    images: ProbeImages
    maps: Tensor  # (n, G, G) int16


class DenseImages(NamedTuple):
    """Images for segmentation by k-NN: of the patches of the bank, for those of the queries."""

    bank: MappedImages
    queries: MappedImages
    num_classes: int  # of the dataset
    chance: float  # mean IoU in percent, see `_chance`

    def scores(self, bank: Tensor, queries: Tensor) -> dict[str, float]:
        """Score patch tokens (n, N, D) of all images of the bank and of the queries; all processes must call it.

        Each process segments its share of the queries. The mean IoU is NaN if any token is not finite.
        """
        count = len(queries)
        value = error = float("nan")
        if bank.isfinite().all() and queries.isfinite().all():
            mine = torch.from_numpy(np.array_split(np.arange(count), distributed.world_size())[distributed.rank()])
            areas = self._areas(bank, queries[mine.to(queries.device)], self.queries.maps[mine].to(queries.device))
            value, error = mean_iou(distributed.all_gather_varied(areas))
        return {
            "patch_knn_miou": 100 * value,
            "patch_knn_error": 100 * error,
            "patch_knn_chance": self.chance,
            "patch_knn_images": float(count),
        }

    def _areas(self, bank: Tensor, queries: Tensor, maps: Tensor) -> Tensor:
        """Segment some queries with these maps, and count the pixels of each image: (n, 3, C + 1)."""
        side = round(bank.shape[1] ** 0.5)
        grid, patch = (side, side), (maps.shape[1] // side, maps.shape[2] // side)
        known = to_patches(bank, self.bank.maps.to(bank.device), grid)
        found = to_label_maps(knn_labels(known, queries.flatten(0, 1), NUM_NEIGHBORS), grid, patch)
        return areas_by_image(found.flatten(1), maps.flatten(1), self.num_classes)

    def describe(self) -> str:
        """A text for the log and the dry run: numbers of images and classes."""
        known, asked = (int((each.maps.unique() != IGNORED).sum()) for each in (self.bank, self.queries))
        return (
            f"{len(self.queries.maps)} images of {asked} classes by the patches of {len(self.bank.maps)} of {known} "
            f"classes, mean IoU by guessing up to {self.chance:.1f} %"
        )


def read_dense_images(cfg: Config, dataset: ImageDataset) -> DenseImages | None:
    """Read the images and maps of `health.dense_dataset`, with the image options of the training dataset.

    None if there is none, or nothing is measured. All processes must call it.

    Raises:
        ValueError: The dataset cannot be opened, has no class maps, is too small or has one class only, or one of the
            images or maps cannot be read. The message names the key.
    """
    name, health = cfg.health.dense_dataset, cfg.health
    if not name or health.period == 0 or health.knn_period == 0:
        return None
    try:
        found = open_dense(name, SEGMENTATION, dataset.image_options)
        if len(found) < MIN_IMAGES:
            raise ValueError(f"{len(found)} images are too few; at least {MIN_IMAGES} are needed")
        positions = evenly_spread(np.arange(len(found)), health.dense_images)
        bank, queries = (_read(found, part, cfg) for part in (positions[::2], positions[1::2]))
        for title, maps in (("bank", bank.maps), ("queries", queries.maps)):
            if (count := int((maps.unique() != IGNORED).sum())) < 2:
                raise ValueError(f"the {len(maps)} images of the {title} have {count} class(es); two are needed")
    except (BadImageError, BadMapError, ValueError, OSError) as error:
        raise ValueError(f"health.dense_dataset={name!r}: {error}") from error
    return DenseImages(bank, queries, found.num_classes, _chance(bank.maps, queries.maps, found.num_classes))


def _read(dataset: DenseDataset, positions: np.ndarray, cfg: Config) -> MappedImages:
    """Read this process's share of the images at some positions, and exchange maps; squeezed to squares."""
    local = np.array_split(positions, distributed.world_size())[distributed.rank()]
    side = cfg.crops.global_crops_size
    pixels, found = empty_pixels(len(local), cfg), []
    for row, position in enumerate(local.tolist()):
        image, values = dataset.get_sample(position)
        squeezed = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
        pixels[row] = torch.from_numpy(squeezed).permute(2, 0, 1)
        found.append((resized_map(values, (side, side)), sha256(squeezed.tobytes()).digest()))
    maps, digests = zip(*(each for share in distributed.all_gather_object(found) for each in share), strict=True)
    return MappedImages(
        ProbeImages(pixels, torch.from_numpy(positions), list(digests)), torch.from_numpy(np.stack(maps))
    )


def _chance(bank: Tensor, queries: Tensor, num_classes: int) -> float:
    """Mean IoU in percent that guessing exceeds in one of 40 cases: the better of two guesses and two standard errors.

    They are the most frequent class of the bank for all pixels, and random classes with the frequencies of the bank.
    """
    labels = queries.flatten(1)
    shares = bank[bank != IGNORED].long().bincount(minlength=num_classes + 1).double()
    shares /= shares.sum()
    constant = areas_by_image(shares.argmax().expand_as(labels), labels, num_classes)
    _, predicted, labeled = constant.double().unbind(dim=1)
    random = torch.stack([shares * labeled, shares * predicted.sum(dim=1, keepdim=True), labeled], dim=1)  # expected
    value, error = max(mean_iou(constant), mean_iou(random))
    return min(100 * (value + 2 * error), 100.0)
