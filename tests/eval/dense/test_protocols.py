"""The protocols have the published numbers, and say where a command line departs from them."""

import argparse
import math
from dataclasses import replace

import pytest

from dinov2.eval.dense.protocols import DEPTH, DEPTH_DATA, SEGMENTATION, adapted, describe, with_flags
from dinov2.flags.dense import DEPTH_PROTOCOLS, SEGMENTATION_PROTOCOLS


def flags(**changed: float | None) -> argparse.Namespace:
    names = ("iterations", "batch_size", "learning_rate", "eval_period_iterations")
    return argparse.Namespace(**dict.fromkeys(names) | changed)


def test_the_command_line_offers_all_protocols() -> None:
    assert (*SEGMENTATION, "capi") == SEGMENTATION_PROTOCOLS
    assert tuple(DEPTH) == DEPTH_PROTOCOLS


def test_segmentation_has_the_published_schedule() -> None:
    training = SEGMENTATION["dinov2"].training
    assert training.lr_factor(0) == pytest.approx(1e-6)
    # The warm-up multiplies a rate that falls from the first iteration on.
    assert training.lr_factor(750) == pytest.approx((1e-6 + (1 - 1e-6) * 0.5) * (1 - 750 / 40_000))
    assert training.lr_factor(1500) == pytest.approx(1 - 1500 / 40_000)
    assert training.lr_factor(40_000) == 0
    later = SEGMENTATION["dinov3"].training
    assert later.lr_factor(1500) == 1
    assert later.lr_factor(1500 + 38_500 // 2) == pytest.approx(0.5)
    assert later.lr_factor(40_000) == pytest.approx(0)


def test_depth_has_the_published_schedule_of_rate_and_momentum() -> None:
    training = DEPTH["dinov2"].training
    assert training.lr_factor(0) == pytest.approx(1e-3)
    half = 0.5 * (1 + math.cos(math.pi / 3))
    assert training.lr_factor(12_800) == pytest.approx(1e-8 + (1 - 1e-8) * half)
    assert training.lr_factor(38_400) == pytest.approx(1e-8)
    assert training.first_beta(0) == pytest.approx(0.95)
    assert training.first_beta(round(0.3 * 38_400)) == pytest.approx(0.85)
    assert training.first_beta(38_400) == pytest.approx(0.95)
    betas = [training.first_beta(step) for step in range(0, 38_400, 100)]
    assert min(betas) >= 0.85 and max(betas) <= 0.95
    assert SEGMENTATION["dinov2"].training.first_beta(7) == 0.9


def test_ranges_of_depth_are_those_of_the_datasets() -> None:
    assert {name: (data.max_depth, data.mask) for name, data in DEPTH_DATA.items()} == {
        "NYUv2": (10.0, "nyu_eigen"),
        "KITTIDepth": (80.0, "kitti_garg"),
        "SUNRGBD": (10.0, "none"),
    }


def test_dinov3_keeps_the_number_of_tokens_and_dinov2_the_pixels() -> None:
    small = adapted(SEGMENTATION["dinov3"], 14)
    assert (small.crop_size, small.short_side, small.stride) == (448, 448, 298)
    assert adapted(SEGMENTATION["dinov3"], 16) == SEGMENTATION["dinov3"]
    assert adapted(SEGMENTATION["dinov2"], 14).crop_size == 512


def test_changes_stand_beside_the_name() -> None:
    published = SEGMENTATION["dinov2"]
    assert describe(published, published) == "dinov2"
    changed = with_flags(published.scaled(256), flags(iterations=4000, batch_size=2, learning_rate=0.01), 4)
    assert describe(changed, published) == (
        "dinov2 with crop_size=256, iterations=4000, learning_rate=0.01, batch_size=8"
    )
    assert (changed.short_side, changed.stride, changed.training.warmup, changed.eval_period) == (256, 170, 150, 1000)
    assert with_flags(published, flags(eval_period_iterations=7), 1) == replace(published, eval_period=7)
