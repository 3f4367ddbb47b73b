"""KoLeo against its definition in float64, and where it would go wrong: equal rows, single rows, half precision."""

import math

import pytest
import torch
from torch import Tensor

from dinov2.loss import KoLeoLoss


def features_of(rows: int, dim: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def naive(features: Tensor, eps: float = 1e-8) -> Tensor:
    rows = [row / max(row.norm(), eps) for row in features.double()]
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        similarities = torch.stack([row.detach() @ rows[j].detach() for j in others])
        nearest = rows[others[int(similarities.argmax())]]
        total = total - torch.log((row - nearest + eps).norm() + eps) / len(rows)
    return total


@pytest.mark.parametrize(("rows", "dim"), [(2, 8), (5, 8), (30, 3), (7, 384)])
def test_value_and_gradient_are_those_of_the_definition(rows: int, dim: int) -> None:
    features = (3 * features_of(rows, dim)).requires_grad_()
    loss, expected = KoLeoLoss()(features), naive(features)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0], rtol=1e-4, atol=1e-5)


def test_the_gradient_pushes_both_members_of_a_pair_apart() -> None:
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.1]]).requires_grad_()
    (gradient,) = torch.autograd.grad(KoLeoLoss()(features), features)
    assert gradient[0, 1] > 0 > gradient[1, 1], "a step against the gradient turns them away from each other"


def test_opposite_rows_are_each_others_neighbors() -> None:
    """No other row is as far away as this, and none is nearer: a row must still not be taken for its own neighbor."""
    row = features_of(1, dim=5)
    assert KoLeoLoss()(torch.cat([row, -row])).item() == pytest.approx(-math.log(2))


def test_equal_rows_give_finite_values_and_gradients() -> None:
    features = features_of(3)[[0, 1, 1, 2, 2, 2]].requires_grad_()
    loss = KoLeoLoss()(features)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite() and gradient.isfinite().all()
    assert loss.item() == pytest.approx(naive(features.detach()).item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_have_no_loss_and_no_gradient(rows: int, dtype: torch.dtype) -> None:
    features = features_of(rows).to(dtype).requires_grad_()
    loss = KoLeoLoss()(features)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, features)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_single(dtype: torch.dtype) -> None:
    """In half precision the epsilon would be 0 and equal rows infinitely bad."""
    features = features_of(4)[[0, 1, 2, 2]].to(dtype).requires_grad_()
    loss = KoLeoLoss()(features)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert torch.equal(loss, KoLeoLoss()(features.float()))
    assert torch.autograd.grad(loss, features)[0].dtype == dtype


def test_autocast_does_not_reach_in() -> None:
    """With so many rows so close, similarities in bfloat16 would find other neighbors."""
    features = features_of(200, dim=3)
    expected = KoLeoLoss()(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(KoLeoLoss()(features), expected)


def test_a_zero_row_is_finite() -> None:
    features = features_of(4)
    features[1] = 0
    features.requires_grad_()
    loss = KoLeoLoss()(features)
    assert loss.isfinite() and torch.autograd.grad(loss, features)[0].isfinite().all()


def test_the_length_of_the_features_does_not_matter() -> None:
    features = features_of(6)
    scales = torch.linspace(0.1, 10, 6)[:, None]
    torch.testing.assert_close(KoLeoLoss()(features * scales), KoLeoLoss()(features))
