"""Depth losses are those of loops in float64; the warm-up depends on the step alone; the published slip is kept."""

import math

import pytest
import torch
from torch import Tensor

from dinov2.eval.dense.depth_losses import (
    LOSSES,
    gradient_log_loss,
    gradient_loss,
    l1_loss,
    labeled_pixels,
    published_gradient_loss,
    sig_loss,
    weighted_depth_loss,
)


def random_batch(batch: int, height: int = 17, width: int = 22) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    prediction, target = (5 * torch.rand(batch, 1, height, width, generator=generator) + 0.1 for _ in range(2))
    target[torch.rand(target.shape, generator=generator) < 0.2] = 0.0
    return prediction.double(), target.double(), labeled_pixels(target)


def gradient_by_loop(prediction: Tensor, target: Tensor, mask: Tensor, log: bool) -> float:
    def value(depth: float) -> float:
        return math.log(depth + 1e-3) if log else depth

    total, batch = 0.0, len(prediction)
    for scale in (1, 2, 4, 6):
        count, differences = 0, 0.0
        for b in range(batch):
            p, g, m = (t[b, 0, ::scale, ::scale] for t in (prediction, target, mask))
            for i in range(p.shape[0]):
                for j in range(p.shape[1]):
                    count += int(m[i, j])
                    for k, n in ((i + 2, j), (i, j + 2)):
                        if k < p.shape[0] and n < p.shape[1] and m[i, j] and m[k, n]:
                            here, there = (value(float(p[at])) - value(float(g[at])) for at in ((i, j), (k, n)))
                            differences += abs(here - there)
        total += differences / count
    return total


@pytest.mark.parametrize(("loss", "log"), [(gradient_log_loss, True), (gradient_loss, False)])
def test_gradient_losses_are_those_of_a_loop(loss: object, log: bool) -> None:
    batch = random_batch(2)
    assert float(loss(*batch)) == pytest.approx(gradient_by_loop(*batch, log), rel=1e-9)


def test_the_published_gradient_loss_is_zero_for_two_images_and_compares_images_if_there_are_more() -> None:
    for count in (1, 2):
        assert float(published_gradient_loss(*random_batch(count))) == 0.0
    prediction, target, mask = random_batch(3)
    difference = torch.log(prediction + 1e-3) - torch.log(target + 1e-3)
    both = mask[0] & mask[2]
    expected = (difference[0] - difference[2]).abs()[both].sum() / mask.sum()
    assert float(published_gradient_loss(prediction, target, mask)) == pytest.approx(float(expected))


def test_sig_loss_is_that_of_a_loop_and_warms_up_by_the_step() -> None:
    prediction, target, mask = random_batch(2)
    pairs = zip(prediction[mask].tolist(), target[mask].tolist(), strict=True)
    d = [math.log(p + 1e-3) - math.log(g + 1e-3) for p, g in pairs]
    mean = sum(d) / len(d)
    variance = sum((x - mean) ** 2 for x in d) / (len(d) - 1)
    full, warm = math.sqrt(variance + 0.15 * mean**2), math.sqrt(0.15 * mean**2)
    found = {step: float(sig_loss(prediction, target, mask, step=step)) for step in (0, 99, 100, 5000)}
    assert found == pytest.approx({0: warm, 99: warm, 100: full, 5000: full})
    assert float(sig_loss(prediction, target, mask, step=0, warm_up_steps=0)) == pytest.approx(full)


@pytest.mark.parametrize("name", LOSSES)
def test_unlabeled_pixels_get_no_gradient_and_a_batch_without_labels_is_no_nan(name: str) -> None:
    prediction, target, mask = random_batch(3)
    for labeled in (mask, torch.zeros_like(mask)):
        leaf = prediction.clone().requires_grad_()
        loss = weighted_depth_loss({name: 1.0}, leaf, target, labeled, step=1000)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[~labeled].any()
        assert bool(gradient.any()) == bool(labeled.any())


def test_a_perfect_prediction_has_finite_gradients() -> None:
    _, target, mask = random_batch(1)
    leaf = target.clone().requires_grad_()
    loss = sig_loss(leaf, target, mask, step=1000)
    assert loss < 1e-6 and torch.autograd.grad(loss, leaf)[0].isfinite().all()


def test_losses_are_summed_by_weight() -> None:
    batch = random_batch(3)
    expected = sig_loss(*batch, step=7) + 0.5 * gradient_log_loss(*batch) + 2 * l1_loss(*batch)
    weights = {"sig": 1.0, "gradient_log": 0.5, "l1": 2.0}
    torch.testing.assert_close(weighted_depth_loss(weights, *batch, step=7), expected)
    prediction, target, mask = batch
    assert float(l1_loss(*batch)) == pytest.approx(float((prediction - target)[mask].abs().mean()))
    with pytest.raises(ValueError, match=r"unknown loss \['silog'\]; known: sig, gradient_log"):
        weighted_depth_loss({"silog": 1.0}, *batch, step=0)


def test_the_limit_of_depth_is_optional_and_inclusive() -> None:
    target = torch.tensor([0.0, 1.0, 10.0, 10.5])
    assert labeled_pixels(target).tolist() == [False, True, True, True]
    assert labeled_pixels(target, 10.0).tolist() == [False, True, True, False]
