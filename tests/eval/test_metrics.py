"""Accuracies are those of plain counting, however the samples come in batches."""

import pytest
import torch
from torch import Tensor

from dinov2.eval.metrics import ImageNetReaLAccuracy, MetricType, build_metric

NUM_CLASSES = 7


def scores_and_labels(absent: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores (60, 7) that are right more often than by chance, and labels (60,), one class of which may be missing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(NUM_CLASSES, (60,), generator=generator)
    if absent is not None:
        labels[labels == absent] = (absent + 1) % NUM_CLASSES
    scores = torch.randn(60, NUM_CLASSES, generator=generator)
    scores[torch.arange(60), labels] += 1.0
    return scores, labels


def count(scores: Tensor, labels: Tensor, k: int) -> list[list[bool]]:
    """For each class, whether each of its samples is right."""
    hits: list[list[bool]] = [[] for _ in range(NUM_CLASSES)]
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        best = sorted(range(NUM_CLASSES), key=lambda c: -row[c])[:k]
        hits[label].append(label in best)
    return hits


def evaluate(metric_type: MetricType, scores: Tensor, labels: Tensor, batch: int, **options: object) -> dict:
    metric = build_metric(metric_type, num_classes=NUM_CLASSES, **options)
    for batch_scores, batch_labels in zip(scores.split(batch), labels.split(batch), strict=True):
        metric.update(batch_scores, batch_labels)
    return {name: value.tolist() for name, value in metric.compute().items()}


@pytest.mark.parametrize("batch", [1, 17, 60])
@pytest.mark.parametrize("absent", [None, 2])
def test_accuracies_are_those_of_counting(absent: int | None, batch: int) -> None:
    scores, labels = scores_and_labels(absent)
    for metric_type in (
        MetricType.MEAN_ACCURACY,
        MetricType.MEAN_PER_CLASS_ACCURACY,
        MetricType.PER_CLASS_ACCURACY,
    ):
        result = evaluate(metric_type, scores, labels, batch, ks=(1, 3))
        assert list(result) == ["top-1", "top-3"]
        for k in (1, 3):
            hits = count(scores, labels, k)
            per_class = [sum(h) / len(h) if h else 0.0 for h in hits]  # an absent class counts as 0
            expected = {
                MetricType.MEAN_ACCURACY: sum(map(sum, hits)) / len(labels),
                MetricType.MEAN_PER_CLASS_ACCURACY: sum(per_class) / NUM_CLASSES,
                MetricType.PER_CLASS_ACCURACY: per_class,
            }[metric_type]
            assert result[f"top-{k}"] == pytest.approx(expected)


def test_a_perfect_first_batch_does_not_tie_top_5_to_top_1() -> None:
    perfect = torch.eye(NUM_CLASSES)
    second_best = torch.eye(NUM_CLASSES).roll(1, dims=1) + 0.5 * torch.eye(NUM_CLASSES)
    labels = torch.arange(NUM_CLASSES).repeat(2)
    result = evaluate(MetricType.MEAN_PER_CLASS_ACCURACY, torch.cat([perfect, second_best]), labels, NUM_CLASSES)
    assert result == {"top-1": 0.5, "top-5": 1.0}


def test_ks_above_the_number_of_classes_are_left_out() -> None:
    metric = build_metric(MetricType.MEAN_ACCURACY, num_classes=3)
    metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
    assert metric.compute() == {"top-1": pytest.approx(2 / 3)}


def test_real_accuracy_is_that_of_counting_and_leaves_its_targets_alone() -> None:
    scores, _ = scores_and_labels()
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, NUM_CLASSES, (60, 3), generator=generator)
    labels[::7] = -1  # no valid label: left out
    given = labels.clone()
    result = evaluate(MetricType.IMAGENET_REAL_ACCURACY, scores, labels, 17)
    for k in (1, 5):
        hits = []
        for row, valid in zip(scores.tolist(), given.tolist(), strict=True):
            if set(valid) != {-1}:
                best = sorted(range(NUM_CLASSES), key=lambda c: -row[c])[:k]
                hits.append(any(c in valid for c in best))
        assert 0 < len(hits) < 60
        assert result[f"top-{k}"] == pytest.approx(sum(hits) / len(hits))
    assert torch.equal(labels, given)


def test_targets_of_the_wrong_kind_are_named() -> None:
    metric = build_metric(MetricType.MEAN_ACCURACY, num_classes=3)
    with pytest.raises(ValueError, match="labels from 0 to 3 for 3 classes"):
        metric.update(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"one label per image, got targets of shape \(2, 2\)"):
        metric.update(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="list of labels per image"):
        ImageNetReaLAccuracy(3).update(torch.zeros(2, 3), torch.tensor([0, 1]))
