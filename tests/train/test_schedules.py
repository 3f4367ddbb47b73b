"""Schedules have the published values at every step that the release's own numbers are known for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from dinov2 import config
from dinov2.train.schedules import CosineScheduler, Schedules, build_schedules, scale_lr


@pytest.fixture(scope="module")
def published() -> Schedules:
    """vitl16_short on 32 GPUs: 100 epochs of 1250 steps, 10 of warm-up, 32 images per GPU."""
    cfg = config.load("train/vitl16_short")
    assert cfg.train.batch_size_per_gpu == 64
    return build_schedules(cfg, scale_lr(cfg.optim.base_lr, cfg.optim.scaling_rule, 32 * 64))


@pytest.mark.parametrize(
    ("name", "step", "value"),
    [
        ("lr", 0, 0.0),
        ("lr", 1, 4.52585e-7),
        ("lr", 12499, 0.00565685),
        ("lr", 12500, 0.00565685),
        ("lr", 62500, 0.00331999),
        ("lr", 124999, 1.0000011e-6),
        ("lr", 125000, 1e-6),
        ("wd", 0, 0.04),
        ("wd", 62500, 0.22),
        ("wd", 124999, 0.39999999994),
        ("momentum", 0, 0.992),
        ("momentum", 62500, 0.996),
        ("momentum", 125000, 1.0),
        ("teacher_temp", 0, 0.04),
        ("teacher_temp", 18750, 0.0550004),
        ("teacher_temp", 37499, 0.07),
        ("teacher_temp", 37500, 0.07),
        ("teacher_temp", 124999, 0.07),
        ("last_layer_lr", 1249, 0.0),
        ("last_layer_lr", 1250, 1250 * 4.52585e-7),
        ("last_layer_lr", 62500, 0.00331999),
    ],
)
def test_published_values(published: Schedules, name: str, step: int, value: float) -> None:
    assert getattr(published.at(step), name) == pytest.approx(value, rel=2e-6, abs=0)


def test_the_last_layer_follows_the_learning_rate_once_it_is_free(published: Schedules) -> None:
    assert (published.last_layer_lr.schedule[:1250] == 0).all()
    assert (published.last_layer_lr.schedule[1250:] == published.lr.schedule[1250:]).all()
    assert published.lr.schedule[1249] > 0, "freezing one does not freeze the other"


def test_freezing_warming_up_and_cooling_down() -> None:
    schedule = CosineScheduler(1.0, 0.2, total_iters=9, warmup_iters=3, start_warmup_value=0.5, freeze_iters=2)
    cosine = [0.2 + 0.4 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert [schedule[i] for i in range(11)] == pytest.approx([0, 0, 0.5, 0.75, 1.0, *cosine, 0.2, 0.2])


@given(
    ends=st.tuples(st.floats(0, 10), st.floats(0, 10)),
    lengths=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)),
)
def test_a_schedule_has_the_requested_length_and_then_keeps_its_final_value(
    ends: tuple[float, float], lengths: tuple[int, int, int]
) -> None:
    total = sum(lengths)
    schedule = CosineScheduler(*ends, total, warmup_iters=lengths[0], freeze_iters=lengths[1])
    assert schedule.schedule.shape == (total,) and schedule.schedule.dtype == np.float64
    assert schedule[total] == schedule[total + 1000] == ends[1]
    assert schedule.schedule.max(initial=0) <= max(ends) + 1e-12


def test_a_warm_up_longer_than_the_run_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"10 iterations .* warm-up \(8\) .* frozen start \(3\)"):
        CosineScheduler(1.0, 0.0, 10, warmup_iters=8, freeze_iters=3)
    with pytest.raises(config.ConfigError, match="optim.warmup_epochs = 9 is longer than optim.epochs = 4"):
        tiny_config("optim.warmup_epochs=9")


def test_the_teacher_temperature_may_warm_up_longer_than_the_run_or_not_at_all() -> None:
    longer = build_schedules(tiny_config("teacher.warmup_teacher_temp_epochs=100"), lr=1.0)
    assert longer.at(7).teacher_temp == pytest.approx(0.04 + 0.03 * 7 / 199)
    none = build_schedules(tiny_config("teacher.warmup_teacher_temp_epochs=0"), lr=1.0)
    assert none.at(0).teacher_temp == 0.07


@pytest.mark.parametrize(
    ("base_lr", "rule", "global_batch", "lr"),
    [
        (0.004, "sqrt_wrt_1024", 2048, 0.00565685),  # vitl16_short
        (2e-4, "sqrt_wrt_1024", 3072, 3.4641e-4),  # vitl14 and vitg14 on 96 and 128 GPUs
        (0.004, "sqrt_wrt_1024", 1024, 0.004),
        (0.001, "linear_wrt_256", 1024, 0.004),
        (0.001, "linear_wrt_1024", 256, 0.00025),
        (0.001, "none", 7, 0.001),
    ],
)
def test_learning_rate_for_a_batch_size(base_lr: float, rule: str, global_batch: int, lr: float) -> None:
    assert scale_lr(base_lr, rule, global_batch) == pytest.approx(lr, rel=2e-6)


def test_an_unknown_rule_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'cubic'; known: sqrt_wrt_1024, linear_wrt_256, linear_wrt_1024, none"):
        scale_lr(0.1, "cubic", 1024)
