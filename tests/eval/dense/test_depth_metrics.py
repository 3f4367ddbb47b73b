"""Depth metrics are those of a loop over pixels in float64, and are averaged over images rather than pooled."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.eval.dense.depth_metrics import (
    DepthMetrics,
    align_least_squares,
    clamp_depth,
    crop_rectangle,
    depth_metrics,
    mean_over_images,
    valid_pixels,
)
from dinov2.models.dense.averaging import predict_depth
from dinov2.models.dense.layers import resize


def random_depths(seed: int, height: int = 12, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = 8 * torch.rand(1, 1, height, width, generator=generator) + 0.5
    prediction = target * torch.exp(0.3 * torch.randn(target.shape, generator=generator))
    return prediction, target, torch.rand(target.shape, generator=generator) < 0.7


def by_loop(prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, float]:
    pairs = [(p, g) for p, g, v in zip(*(t.flatten().tolist() for t in (prediction, target, valid))) if v]  # noqa: B905
    count, logs = len(pairs), [math.log(p) - math.log(g) for p, g in pairs]
    mean_log = sum(logs) / count
    return {
        **{f"a{k}": sum(max(p / g, g / p) < 1.25**k for p, g in pairs) / count for k in (1, 2, 3)},
        "abs_rel": sum(abs(p - g) / g for p, g in pairs) / count,
        "sq_rel": sum((p - g) ** 2 / g for p, g in pairs) / count,
        "rmse": math.sqrt(sum((p - g) ** 2 for p, g in pairs) / count),
        "rmse_log": math.sqrt(sum(d * d for d in logs) / count),
        "log_10": sum(abs(math.log10(p) - math.log10(g)) for p, g in pairs) / count,
        "silog": 100 * math.sqrt(sum((d - mean_log) ** 2 for d in logs) / count),
        "mae": sum(abs(p - g) for p, g in pairs) / count,
    }


def test_metrics_are_those_of_a_loop() -> None:
    image = random_depths(seed=0)
    expected = by_loop(*image)
    assert depth_metrics(*image)._asdict() == pytest.approx(expected, rel=1e-9)
    assert set(expected) == set(DepthMetrics._fields)


def test_means_are_over_images_without_those_without_valid_pixels() -> None:
    images = [random_depths(0), random_depths(1, height=30)]
    empty = (*random_depths(2)[:2], torch.zeros(1, 1, 12, 16, dtype=torch.bool))
    per_image = [depth_metrics(*image) for image in [*images, empty]]
    assert all(math.isnan(value) for value in per_image[2])
    mean = mean_over_images(per_image)
    assert mean.rmse == pytest.approx((per_image[0].rmse + per_image[1].rmse) / 2)
    pooled = depth_metrics(*(torch.cat([t.flatten() for t in parts]) for parts in zip(*images, strict=True)))
    assert abs(pooled.rmse - mean.rmse) > 1e-3
    published = depth_metrics(*empty, published_silog=True)
    assert published.silog == 0 and math.isnan(published.rmse)
    with pytest.raises(ValueError, match="none of 1 images has a pixel with a valid depth"):
        mean_over_images([published])


@pytest.mark.parametrize(
    ("crop", "size", "expected"),
    [
        ("full", (480, 640), [0, 480, 0, 640]),
        ("nyu_eigen", (480, 640), [45, 471, 41, 601]),
        ("kitti_garg", (352, 1216), [143, 349, 43, 1172]),
        ("kitti_eigen", (375, 1242), [124, 342, 44, 1197]),
    ],
)
def test_crops_are_the_published_rectangles(crop: str, size: tuple[int, int], expected: list[int]) -> None:
    rows, columns = crop_rectangle(crop, *size)
    assert [rows.start, rows.stop, columns.start, columns.stop] == expected
    valid = valid_pixels(torch.ones(1, *size), min_depth=0.001, max_depth=10, crop=crop)
    top, bottom, left, right = expected
    assert valid.sum() == (bottom - top) * (right - left) and valid[0, top, left] and valid[0, bottom - 1, right - 1]


def test_the_ends_of_the_range_are_not_valid() -> None:
    target = torch.tensor([[0.0, 0.001, 0.002, 9.99, 10.0]])
    valid = valid_pixels(target, min_depth=0.001, max_depth=10)
    assert valid.tolist() == [[False, False, True, True, False]]
    with pytest.raises(ValueError, match="min_depth < max_depth, got 10 and 1"):
        valid_pixels(target, min_depth=10, max_depth=1)
    with pytest.raises(ValueError, match="unknown crop 'eigen'; known: full, nyu_eigen, kitti_garg, kitti_eigen"):
        valid_pixels(target, min_depth=0.1, max_depth=1, crop="eigen")


def test_alignment_recovers_scale_and_shift_and_leaves_empty_images() -> None:
    _, target, valid = random_depths(seed=3)
    prediction = torch.where(valid, (target - 1.5) / 0.4, torch.full_like(target, 1e4))
    aligned = align_least_squares(torch.cat([prediction] * 2), torch.cat([target] * 2), torch.cat([valid, valid < 0]))
    torch.testing.assert_close(aligned[:1][valid], target[valid], rtol=1e-5, atol=1e-5)
    assert torch.equal(aligned[1:], prediction)
    constant = align_least_squares(torch.ones_like(target), target, valid)
    torch.testing.assert_close(constant, target[valid].mean().expand_as(target))


def test_a_mirrored_prediction_is_flipped_back() -> None:
    prediction = torch.rand(1, 1, 3, 4)
    assert torch.equal(predict_depth(lambda images: images, prediction, mirror=True), prediction)
    assert torch.equal(resize(prediction, (3, 4)), prediction) and resize(prediction, (6, 9)).shape == (1, 1, 6, 9)


def test_depths_out_of_range_are_limited_and_impossible_ones_named() -> None:
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, -1.0, 3.0, 99.0]])
    limited = clamp_depth(values, min_depth=0.5, max_depth=10)
    assert limited.tolist() == [[0.5, 10.0, 0.5, 0.5, 3.0, 10.0]]
    everywhere = torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="predicted depths on valid pixels must be positive"):
        depth_metrics(values, limited, everywhere)
    with pytest.raises(ValueError, match="true depths on valid pixels must be positive"):
        depth_metrics(limited, torch.zeros(1, 6), everywhere)
    shapes: Any = (limited, limited[:, :3], everywhere)
    with pytest.raises(ValueError, match=r"different shapes: \(1, 6\), \(1, 3\), \(1, 6\)"):
        depth_metrics(*shapes)
