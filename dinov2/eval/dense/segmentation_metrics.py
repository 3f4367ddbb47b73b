"""Scores of semantic segmentation from pixel counts, which are summed over a whole dataset before any ratio is formed.

Shapes: B images, (H, W) pixels, C classes. Scores are fractions; nan stands for 0/0.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.data.dense.base import IGNORED


@dataclass(frozen=True)
class Areas:
    """Pixel counts per class, each (C,) int64, without ignored pixels."""

    intersection: Tensor  # predicted and labeled as the class
    predicted: Tensor
    labeled: Tensor

    @classmethod
    def zeros(cls, num_classes: int, device: torch.device | None = None) -> "Areas":
        """The counts of no image."""
        return cls(*(torch.zeros(num_classes, dtype=torch.int64, device=device) for _ in fields(cls)))

    def __add__(self, other: "Areas") -> "Areas":
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Areas(*(mine + theirs for mine, theirs in pairs))

    @property
    def union(self) -> Tensor:
        """Pixels that are predicted or labeled as the class."""
        return self.predicted + self.labeled - self.intersection

    def summed_over_processes(self) -> "Areas":
        """The counts of the images of all processes; every process must call it."""
        counts = torch.stack([getattr(self, field.name) for field in fields(self)])
        return Areas(*distributed.all_reduce_sum(counts))


class SegmentationScores(NamedTuple):
    """Means over classes, of which those that are nan are left out, and the scores of each class, (C,) float64."""

    mIoU: float  # noqa: N815  (the published names)
    mAcc: float  # noqa: N815
    aAcc: float  # noqa: N815  (correct pixels of all labeled ones)
    dice: float
    fscore: float
    precision: float
    recall: float
    iou_per_class: Tensor
    acc_per_class: Tensor
    dice_per_class: Tensor
    fscore_per_class: Tensor
    precision_per_class: Tensor


def count_areas(predictions: Tensor, labels: Tensor, num_classes: int, *, ignored: int = IGNORED) -> Areas:
    """Count the pixels of one or several images.

    Args:
        predictions: Class of each pixel, (..., H, W) integers in 0..C-1 where the label is not ignored.
        labels: True class of each pixel, of the same shape, in 0..C-1 or `ignored`.
        num_classes: C.
        ignored: Label of pixels that are not counted.

    Raises:
        ValueError: The shapes differ, values are not integers, or a class is not in 0..C-1.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions of shape {tuple(predictions.shape)} for labels of {tuple(labels.shape)}")
    scored = labels != ignored
    predictions, labels = predictions[scored], labels[scored]
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.is_floating_point():
            raise ValueError(f"{name} must be integers, got {values.dtype}")
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(
                f"{name} from {int(values.min())} to {int(values.max())}; known: 0 to {num_classes - 1}"
                + (f", and {ignored} for ignored pixels" if name == "labels" else "")
            )
    hits = labels[predictions == labels]
    return Areas(*(torch.bincount(values.long(), minlength=num_classes) for values in (hits, predictions, labels)))


def segmentation_scores(areas: Areas) -> SegmentationScores:
    """Compute the scores of a dataset.

    As published, the F-score of a class whose precision and recall are both 0 is nan, so that it is left out of the
    mean, which raises it. A class that is predicted but never labeled has an IoU of 0, one that is neither has none.

    Raises:
        ValueError: No pixel is labeled.
    """
    hits, predicted, labeled = (t.double().cpu() for t in (areas.intersection, areas.predicted, areas.labeled))
    if not labeled.sum():
        raise ValueError("no pixel has a label that is not ignored: there is nothing to score")
    iou, acc, precision = hits / (predicted + labeled - hits), hits / labeled, hits / predicted
    dice = 2 * hits / (predicted + labeled)
    fscore = 2 * precision * acc / (precision + acc)
    means = [per_class.nanmean().item() for per_class in (iou, acc, dice, fscore, precision)]
    return SegmentationScores(
        mIoU=means[0],
        mAcc=means[1],
        aAcc=(hits.sum() / labeled.sum()).item(),
        dice=means[2],
        fscore=means[3],
        precision=means[4],
        recall=means[1],
        iou_per_class=iou,
        acc_per_class=acc,
        dice_per_class=dice,
        fscore_per_class=fscore,
        precision_per_class=precision,
    )


def as_percent(scores: SegmentationScores) -> dict[str, float | None | list[float | None]]:
    """The means and `iou_per_class` in percent for a results file, in which None stands for nan."""

    def percent(value: float) -> float | None:
        return None if math.isnan(value) else 100 * value

    means = {name: percent(value) for name, value in scores._asdict().items() if isinstance(value, float)}
    return {**means, "iou_per_class": [percent(value) for value in scores.iou_per_class.tolist()]}
