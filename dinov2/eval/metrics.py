"""Classification metrics, accumulated over batches and processes.

Shapes: B samples, C classes. All results are fractions in 0..1.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.flags.evaluation import MetricType as MetricType

DEFAULT_KS = (1, 5)

Accuracies = dict[str, Any]  # {"top-1": fraction or a list with one per class, ...}


class AccuracyAveraging(Enum):
    """How accuracies are averaged over classes."""

    MICRO = "micro"  # samples have equal weights
    MACRO = "macro"  # classes have equal weights; those without samples count as 0 (as in torchmetrics 0.10)
    NONE = "none"  # no averaging: one accuracy per class


_AVERAGING = {  # of accuracies with one label per image
    MetricType.MEAN_ACCURACY: AccuracyAveraging.MICRO,
    MetricType.MEAN_PER_CLASS_ACCURACY: AccuracyAveraging.MACRO,
    MetricType.PER_CLASS_ACCURACY: AccuracyAveraging.NONE,
}


class _Counts:
    """Numbers of correct and of all samples: those of this process, until `compute` sums them over processes."""

    def __init__(self, num_classes: int, top_k: int, shape: tuple[int, ...], *, sync_on_compute: bool = True) -> None:
        self.num_classes, self.top_k, self.sync_on_compute = num_classes, top_k, sync_on_compute
        self.correct, self.total = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))

    def to(self, device: torch.device) -> Self:
        """Move the counts to the device of the scores."""
        self.correct, self.total = self.correct.to(device), self.total.to(device)
        return self

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Numbers of correct and of all samples, float64."""
        if self.sync_on_compute:
            return distributed.all_reduce_sum(self.correct).double(), distributed.all_reduce_sum(self.total).double()
        return self.correct.double(), self.total.double()


class TopKAccuracy(_Counts):
    """Fraction of samples whose label is among their `top_k` highest scores."""

    def __init__(self, num_classes: int, top_k: int, averaging: AccuracyAveraging, **kwargs: Any) -> None:
        super().__init__(num_classes, top_k, (num_classes,), **kwargs)
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
        correct, total = self._sums()
        if self.averaging is AccuracyAveraging.MICRO:
            return correct.sum() / total.sum()
        per_class = correct / total.clamp(min=1)
        return per_class if self.averaging is AccuracyAveraging.NONE else per_class.mean()


class ImageNetReaLAccuracy(_Counts):
    """Fraction of samples with a valid label among their `top_k` highest scores (Beyer et al. 2020, arXiv 2006.07159).

    Samples without any valid label are ignored.
    """

    def __init__(self, num_classes: int, top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(num_classes, top_k, (), **kwargs)

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
        correct, total = self._sums()
        return correct / total


class AccuracyCollection(dict[str, TopKAccuracy | ImageNetReaLAccuracy]):
    """Accuracies by name, `top-1`, `top-5` and so on, of the same samples."""

    def to(self, device: torch.device) -> Self:
        """Move the counts to the device of the scores."""
        for metric in self.values():
            metric.to(device)
        return self

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add a batch: scores (B, C) and labels (B,), or (B, L) for ImageNet-ReaL."""
        for metric in self.values():
            metric.update(preds, target)

    def compute(self) -> dict[str, Tensor]:
        """The accuracies of all samples so far, of all processes."""
        return {name: metric.compute() for name, metric in self.items()}


def build_metric(
    metric_type: MetricType, *, num_classes: int, ks: Sequence[int] | None = None, sync_on_compute: bool = True
) -> AccuracyCollection:
    """Build the metrics `top-k` for each k, whose `compute()` gives {"top-1": ..., "top-5": ...}.

    Args:
        metric_type: Type of accuracy.
        num_classes: C, the width of the scores.
        ks: Values of k; None means (1, 5). Those above `num_classes` are ignored.
        sync_on_compute: Whether to sum over processes; off if they evaluate different models.
    """
    ks = [k for k in ks or DEFAULT_KS if k <= num_classes]

    def metric(k: int) -> TopKAccuracy | ImageNetReaLAccuracy:
        if metric_type is MetricType.IMAGENET_REAL_ACCURACY:
            return ImageNetReaLAccuracy(num_classes, k, sync_on_compute=sync_on_compute)
        return TopKAccuracy(num_classes, k, _AVERAGING[metric_type], sync_on_compute=sync_on_compute)

    return AccuracyCollection({f"top-{k}": metric(k) for k in ks})


def top_1(accuracies: Accuracies) -> float:
    """Top-1 accuracy in percent, or its mean if there is one per class."""
    return 100 * float(np.mean(accuracies["top-1"]))


def percent(accuracies: Accuracies) -> Accuracies:
    """Convert accuracies to percent; other entries are unchanged."""
    return {key: (100 * np.asarray(v)).tolist() if key.startswith("top-") else v for key, v in accuracies.items()}
