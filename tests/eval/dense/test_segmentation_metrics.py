"""Pixel counts are those of a loop over pixels; scores are ratios of counts of the whole set."""

import math

import pytest
import torch
from torch import Tensor

from dinov2.eval.dense.segmentation_metrics import Areas, as_percent, count_areas, segmentation_scores


def random_maps(seed: int, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(num_classes - 1, (2, 9, 7), generator=generator)
    labels = torch.randint(-1, num_classes, (2, 9, 7), generator=generator)
    return predictions, labels


def counts_by_loop(predictions: Tensor, labels: Tensor, num_classes: int, ignored: int) -> dict[str, list[int]]:
    counts = {name: [0] * num_classes for name in ("intersection", "union", "predicted", "labeled")}
    for p, g in zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if g == ignored:
            continue
        counts["predicted"][p] += 1
        counts["labeled"][g] += 1
        for c in {p, g}:
            counts["union"][c] += 1
        counts["intersection"][g] += p == g
    return counts


@pytest.mark.parametrize("ignored", [-1, 255])
def test_counts_are_those_of_a_loop(ignored: int) -> None:
    predictions, labels = random_maps(seed=0)
    labels = torch.where(labels == -1, ignored, labels)
    areas = count_areas(predictions, labels, 5, ignored=ignored)
    for name, counts in counts_by_loop(predictions, labels, 5, ignored).items():
        assert getattr(areas, name).tolist() == counts
        assert getattr(areas, name).dtype == torch.int64


def test_counts_add_up_to_those_of_all_images_and_scores_are_not_means_over_images() -> None:
    images = [random_maps(seed) for seed in range(3)]
    total = Areas.zeros(5)
    for predictions, labels in images:
        total = total + count_areas(predictions, labels, 5)
    together = count_areas(*(torch.cat(maps) for maps in zip(*images, strict=True)), 5)
    assert torch.equal(total.intersection, together.intersection) and torch.equal(total.union, together.union)
    assert segmentation_scores(total).mIoU == segmentation_scores(together).mIoU
    means = [segmentation_scores(count_areas(*maps, 5)).mIoU for maps in images]
    assert abs(segmentation_scores(total).mIoU - sum(means) / 3) > 1e-4
    assert torch.equal(total.summed_over_processes().union, total.union), "one process"


def test_scores_of_a_small_example_by_hand() -> None:
    # Classes 0 to 4: right once and wrong once, always wrong, predicted but never labeled, right, absent.
    labels = torch.tensor([[0, 0, 1, 3, -1]])
    predictions = torch.tensor([[0, 2, 0, 3, 4]])
    scores = segmentation_scores(count_areas(predictions, labels, 5))
    assert scores.iou_per_class[:4].tolist() == [1 / 3, 0, 0, 1] and math.isnan(scores.iou_per_class[4])
    assert scores.mIoU == pytest.approx((1 / 3 + 0 + 0 + 1) / 4)
    assert scores.aAcc == 2 / 4
    assert scores.mAcc == scores.recall == pytest.approx((1 / 2 + 0 + 1) / 3), "class 2 is never labeled"
    assert scores.dice == pytest.approx((2 / 4 + 0 + 0 + 1) / 4)
    assert scores.precision == pytest.approx((1 / 2 + 0 + 1) / 3), "class 1 is never predicted"
    # As published: precision and recall of class 1 are nan and 0, of class 2 0 and nan; neither counts.
    assert scores.fscore == pytest.approx((2 * 0.25 / 1 + 1) / 2)
    found = as_percent(scores)
    assert found["mIoU"] == pytest.approx(100 / 3) and found["iou_per_class"][4] is None


def test_the_f_score_of_a_class_without_a_hit_is_left_out() -> None:
    scores = segmentation_scores(count_areas(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2]), 3))
    assert scores.fscore == 1.0 and scores.dice == pytest.approx(1 / 3)


def test_a_set_without_labels_has_no_scores() -> None:
    labels = torch.full((4, 4), -1)
    areas = count_areas(torch.zeros_like(labels), labels, 3)
    assert areas.predicted.sum() == 0
    with pytest.raises(ValueError, match="no pixel has a label that is not ignored"):
        segmentation_scores(areas)


def test_classes_beyond_the_known_ones_and_other_shapes_are_named() -> None:
    maps = torch.tensor([[0, 3]]), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="predictions from 0 to 3; known: 0 to 2$"):
        count_areas(*maps, 3)
    with pytest.raises(ValueError, match="labels from 0 to 255; known: 0 to 2, and -1 for ignored pixels"):
        count_areas(torch.tensor([0, 1]), torch.tensor([0, 255]), 3)
    with pytest.raises(ValueError, match=r"of shape \(1, 2\) for labels of \(2,\)"):
        count_areas(maps[0], maps[1][0], 4)
    with pytest.raises(ValueError, match=r"must be integers, got torch.float32"):
        count_areas(maps[0].float(), maps[1], 4)
