"""Classification metrics, accumulated over batches and processes.

Shapes: B samples, C classes. All results are fractions in 0..1. Counts are torchmetrics states, which `compute()` sums
over the ranks of a process group.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

DEFAULT_KS = (1, 5)

Accuracies = dict[str, Any]  # {"top-1": fraction or a list with one per class, ...}


class AccuracyAveraging(Enum):
    """How accuracies are averaged over classes."""

    MICRO = "micro"  # samples have equal weights
    MACRO = "macro"  # classes have equal weights; those without samples count as 0 (as in torchmetrics 0.10)
    NONE = "none"  # no averaging: one accuracy per class


class MetricType(Enum):
    """The metrics of the command line."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    IMAGENET_REAL_ACCURACY = "imagenet_real_accuracy"


_AVERAGING = {  # of accuracies with one label per image
    MetricType.MEAN_ACCURACY: AccuracyAveraging.MICRO,
    MetricType.MEAN_PER_CLASS_ACCURACY: AccuracyAveraging.MACRO,
    MetricType.PER_CLASS_ACCURACY: AccuracyAveraging.NONE,
}


class _Counts(Metric):
    """Numbers of correct and of all samples."""

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, num_classes: int, top_k: int, initial: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.top_k = num_classes, top_k
        self.add_state("correct", initial, dist_reduce_fx="sum")
        self.add_state("total", initial.clone(), dist_reduce_fx="sum")


class TopKAccuracy(_Counts):
    """Fraction of samples whose label is among their `top_k` highest scores."""

    def __init__(self, num_classes: int, top_k: int, averaging: AccuracyAveraging, **kwargs: Any) -> None:
        super().__init__(num_classes, top_k, torch.zeros(num_classes, dtype=torch.int64), **kwargs)
        self.averaging = averaging

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: scores (B, C), labels (B,) int64."""
        if target.ndim != 1:
            raise ValueError(f"accuracy needs one label per image, got targets of shape {tuple(target.shape)}")
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < self.num_classes:
            raise ValueError(f"labels from {int(target.min())} to {int(target.max())} for {self.num_classes} classes")
        hit = (preds.topk(self.top_k, dim=1).indices == target[:, None]).any(dim=1)
        self.correct += torch.bincount(target[hit], minlength=self.num_classes)
        self.total += torch.bincount(target, minlength=self.num_classes)

    def compute(self) -> Tensor:
        """The accuracy, () or (C,) float64."""
        correct, total = self.correct.double(), self.total.double()
        if self.averaging is AccuracyAveraging.MICRO:
            return correct.sum() / total.sum()
        per_class = correct / total.clamp(min=1)
        return per_class if self.averaging is AccuracyAveraging.NONE else per_class.mean()


class ImageNetReaLAccuracy(_Counts):
    """Fraction of samples with a valid label among their `top_k` highest scores (Beyer et al. 2020, arXiv 2006.07159).

    Samples without any valid label are ignored.
    """

    def __init__(self, num_classes: int, top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(num_classes, top_k, torch.tensor(0), **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: scores (B, C), label lists (B, L) int64 padded with -1."""
        if target.ndim != 2:
            raise ValueError(
                "imagenet_real_accuracy needs a list of labels per image, padded with -1, "
                f"got targets of shape {tuple(target.shape)}"
            )
        top = preds.topk(self.top_k, dim=1).indices
        hit = (top[:, :, None] == target[:, None, :]).any(dim=2).any(dim=1)  # no prediction equals the padding -1
        self.correct += hit.sum()
        self.total += (target >= 0).any(dim=1).sum()

    def compute(self) -> Tensor:
        """The accuracy, () float64."""
        return self.correct.double() / self.total


def build_metric(
    metric_type: MetricType, *, num_classes: int, ks: Sequence[int] | None = None, sync_on_compute: bool = True
) -> MetricCollection:
    """Build the metrics `top-k` for each k: a collection whose `compute()` gives {"top-1": ..., "top-5": ...}.

    Args:
        metric_type: Type of accuracy.
        num_classes: C, the width of the scores.
        ks: Values of k; None means (1, 5). Those above `num_classes` are ignored.
        sync_on_compute: Whether to sum over processes; off if they evaluate different models.
    """
    ks = [k for k in ks or DEFAULT_KS if k <= num_classes]

    def metric(k: int) -> Metric:
        if metric_type is MetricType.IMAGENET_REAL_ACCURACY:
            return ImageNetReaLAccuracy(num_classes, k, sync_on_compute=sync_on_compute)
        return TopKAccuracy(num_classes, k, _AVERAGING[metric_type], sync_on_compute=sync_on_compute)

    # With compute groups, top-5 would share the counts of top-1 if the two agree on the first batch.
    return MetricCollection({f"top-{k}": metric(k) for k in ks}, compute_groups=False)


def top_1(accuracies: Accuracies) -> float:
    """Top-1 accuracy in percent, or its mean if there is one per class."""
    return 100 * float(np.mean(accuracies["top-1"]))


def percent(accuracies: Accuracies) -> Accuracies:
    """Convert accuracies to percent; other entries are unchanged."""
    return {key: (100 * np.asarray(v)).tolist() if key.startswith("top-") else v for key, v in accuracies.items()}
