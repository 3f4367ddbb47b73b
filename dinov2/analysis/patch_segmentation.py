"""Segmentation of images by the labels of similar patches: features and labels of patches, votes, and mean IoU.

The protocol is that of CAPI (arXiv 2502.08769). `dinov2.eval.dense.patch_probes` evaluates a model with it, and
`dinov2.train.monitor` measures a teacher.

Shapes: n images of N patches each, M patches of all images, m queries, P pixels of a patch, D feature width, C classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.analysis.nearest_neighbors import search_with_torch

IGNORED = -1  # label of pixels that are not scored
PATCH_BATCH = 4096  # patches at once
VOTES = 2**23  # labels of neighbors in memory at once


class Patches(NamedTuple):
    """Features and labels of patches."""

    features: Tensor  # (M, D) float32
    labels: Tensor  # (M, P) integers

    def __add__(self, other: "Patches") -> "Patches":  # type: ignore[override]
        return Patches(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


class Standardizer(NamedTuple):
    """Mean and standard deviation of each feature, (D,) float64; deviations of 0 are replaced by 1."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Standardizer":
        """The statistics of (M, D) features, computed in chunks in float64."""
        total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        squares = torch.zeros_like(total)
        for chunk in features.split(PATCH_BATCH):
            total += chunk.double().sum(dim=0)
        mean = total / len(features)
        for chunk in features.split(PATCH_BATCH):
            squares += ((chunk.double() - mean) ** 2).sum(dim=0)
        deviation = (squares / len(features)).sqrt()
        negligible = deviation <= 10 * torch.finfo(torch.float64).eps * mean.abs()
        return cls(mean, torch.where(negligible, torch.ones_like(deviation), deviation))

    def __call__(self, features: Tensor) -> Tensor:
        """Standardize (..., D) features; the result is float32."""
        result = torch.empty(features.shape, dtype=torch.float32, device=features.device)
        for part, chunk in zip(result.split(PATCH_BATCH), features.split(PATCH_BATCH), strict=True):
            part.copy_((chunk.double() - self.mean) / self.deviation)
        return result


def to_patches(features: Tensor, label_maps: Tensor, grid: tuple[int, int]) -> Patches:
    """Bring patch features (n, N, D) and label maps (n, H, W) together, patch by patch and row by row.

    Args:
        features: Patches in rows of the grid.
        label_maps: Labels of the pixels; height and width must be multiples of those of the grid.
        grid: Number of patches (in height, in width), with product N.

    Raises:
        ValueError: The shapes do not fit together.
    """
    (height, width), (num_images, num_patches, _) = label_maps.shape[-2:], features.shape
    fits = len(label_maps) == num_images and grid[0] * grid[1] == num_patches
    if not fits or height % grid[0] or width % grid[1]:
        raise ValueError(
            f"features {tuple(features.shape)} and label maps {tuple(label_maps.shape)} do not fit a grid of "
            f"{grid[0]} x {grid[1]} patches"
        )
    tiles = label_maps.unflatten(2, (grid[1], width // grid[1])).unflatten(1, (grid[0], height // grid[0]))
    return Patches(features.flatten(0, 1), tiles.transpose(2, 3).flatten(3).flatten(0, 2))


def to_label_maps(labels: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Inverse of `to_patches`: labels (M, P) of patches of `patch` (height, width) pixels -> label maps (n, H, W)."""
    tiles = labels.unflatten(1, patch).unflatten(0, (-1, *grid))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def most_frequent(labels: Tensor) -> Tensor:
    """The most frequent value of each row, the smallest one in a tie: (..., P) integers -> (...)."""
    ordered = labels.sort(dim=-1).values
    position = torch.arange(labels.shape[-1], device=labels.device).expand(ordered.shape)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    start = torch.where(is_first, position, torch.zeros_like(position)).cummax(dim=-1).values
    last = (position - start).argmax(dim=-1, keepdim=True)  # argmax gives the first maximum: the smallest label
    return ordered.gather(-1, last)[..., 0]


def labeled_patches(train: Patches, ignored: Sequence[int] = (IGNORED,)) -> tuple[Patches, Tensor]:
    """The patches whose most frequent label is not ignored, and this label of each; a `ValueError` without any."""
    modes = torch.cat([most_frequent(part) for part in train.labels.split(PATCH_BATCH)])
    kept = ~torch.isin(modes, torch.tensor(ignored, dtype=modes.dtype, device=modes.device))
    if not kept.any():
        raise ValueError(f"none of the {len(modes)} training patches has a label that is not ignored")
    return Patches(train.features[kept], train.labels[kept]), modes[kept]


def vote(labels: Tensor, neighbors: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """Each pixel gets the most frequent label at its place in the k nearest patches.

    Args:
        labels: Labels (M, P) of the patches that are searched.
        neighbors: Their numbers (m, K), the nearest first.
        ks: Numbers of neighbors that vote, at most K.

    Returns:
        Predicted labels (m, P) by k.
    """
    at_once = max(VOTES // (neighbors.shape[1] * labels.shape[1]), 1)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in neighbors.split(at_once):
        votes = labels[part].transpose(1, 2)  # (m, P, K)
        for k, predictions in found.items():
            predictions.append(most_frequent(votes[..., :k]))
    return {k: torch.cat(predictions) for k, predictions in found.items()}


def knn_labels(bank: Patches, queries: Tensor, k: int) -> Tensor:
    """Predict labels (m, P) of queries (m, D) by the k nearest patches of the bank, or all if there are fewer.

    Features are standardized on the bank and compared by their cosine. Patches of the bank without a label do not vote.
    """
    standardize = Standardizer.of(bank.features)
    bank, _ = labeled_patches(bank)
    rows, unit = (functional.normalize(standardize(features), dim=1) for features in (bank.features, queries))
    k = min(k, len(rows))
    return vote(bank.labels, search_with_torch(unit, rows, k)[1], [k])[k]


def areas_by_image(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count the labeled pixels of each image by class.

    As published, a predicted `IGNORED` is one more class, which no pixel is labeled as.

    Args:
        predictions: Predicted classes (n, P), P here being all pixels of an image.
        labels: True classes (n, P).
        num_classes: C.

    Returns:
        (n, 3, C + 1) int64: pixels that are predicted and labeled as a class, predicted as it, labeled as it.
    """
    predictions, labels = predictions.long(), labels.long()
    predictions = torch.where(predictions == IGNORED, num_classes, predictions)
    scored, count = labels != IGNORED, num_classes + 1
    first = count * torch.arange(len(labels), device=labels.device)[:, None]

    def counts(values: Tensor, counted: Tensor) -> Tensor:
        return torch.bincount((first + values)[counted], minlength=len(labels) * count).view(-1, count)

    hits = scored & (predictions == labels)
    return torch.stack([counts(labels, hits), counts(predictions, scored), counts(labels, scored)], dim=1)


class MeanIoU(NamedTuple):
    """Mean of the classes' intersections over unions, and its standard error; fractions."""

    value: float
    error: float


def mean_iou(areas: Tensor) -> MeanIoU:
    """Mean IoU over the classes that are predicted or labeled, of n > 1 images: areas (n, 3, C) -> fractions.

    Pixels of all images are counted before any ratio is formed. The standard error is that of another draw of n images
    (infinitesimal jackknife: the squared influences of the images on the mean are summed).
    """
    hits, predicted, labeled = areas.double().unbind(dim=1)
    union = predicted + labeled - hits
    present = union.sum(dim=0) > 0
    hits, union = hits[:, present], union[:, present]
    total = union.sum(dim=0)
    iou = hits.sum(dim=0) / total
    influence = ((hits - iou * union) / total).mean(dim=1)  # of each image; the sum is 0
    count = len(areas)
    return MeanIoU(iou.mean().item(), math.sqrt(count / (count - 1) * influence.square().sum().item()))
