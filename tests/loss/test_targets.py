"""Teacher targets: centered softmax and Sinkhorn-Knopp, against the published formulas written as loops in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dinov2.loss import DINOLoss, iBOTPatchLoss
from dinov2.loss.targets import sinkhorn_knopp, softmax_centering


def scores_of(rows: int, prototypes: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed))


def naive_sinkhorn(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """Entry by entry, in the published order: everything sums to 1; prototypes to 1/K; rows to 1/R; rows to 1."""
    num_rows, num_prototypes = scores.shape
    q = [[math.exp(score / temperature) for score in row] for row in scores.double().tolist()]
    total = sum(map(sum, q))
    q = [[entry / total for entry in row] for row in q]
    for _ in range(iterations):
        sums = [sum(row[k] for row in q) for k in range(num_prototypes)]
        q = [[entry / sums[k] / num_prototypes for k, entry in enumerate(row)] for row in q]
        q = [[entry / sum(row) / num_rows for entry in row] for row in q]
    return torch.tensor(q, dtype=torch.float64) * num_rows


# --- Sinkhorn-Knopp --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
@pytest.mark.parametrize(("rows", "prototypes"), [(6, 10), (10, 4), (1, 5), (5, 1)])
def test_sinkhorn_is_the_published_one(rows: int, prototypes: int, temperature: float, iterations: int) -> None:
    scores = scores_of(rows, prototypes, scale=0.5)
    targets = sinkhorn_knopp(scores, temperature, iterations)
    torch.testing.assert_close(targets.double(), naive_sinkhorn(scores, temperature, iterations), rtol=2e-5, atol=1e-7)


def test_both_losses_use_three_iterations() -> None:
    scores, expected = scores_of(6, 10), sinkhorn_knopp(scores_of(6, 10), 0.07, 3)
    assert torch.equal(DINOLoss(10).sinkhorn_knopp_teacher(scores, 0.07), expected)
    assert torch.equal(iBOTPatchLoss(10).sinkhorn_knopp_teacher(scores, 0.07), expected)
    assert not torch.allclose(DINOLoss(10).sinkhorn_knopp_teacher(scores, 0.07, n_iterations=1), expected)


def test_a_published_count_of_masked_patches_is_not_taken_for_iterations() -> None:
    with pytest.raises(TypeError, match="positional"):
        iBOTPatchLoss(10).sinkhorn_knopp_teacher(scores_of(6, 10), 0.07, torch.tensor([6]))


@given(
    rows=st.integers(1, 12),
    prototypes=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e6, 1e30]),
    temperature=st.sampled_from([0.04, 1.0]),
    seed=st.integers(0, 1000),
)
def test_targets_are_probabilities_however_large_the_scores(
    rows: int, prototypes: int, scale: float, temperature: float, seed: int
) -> None:
    targets = sinkhorn_knopp(scores_of(rows, prototypes, scale, seed), temperature)
    assert targets.isfinite().all() and (targets >= 0).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(rows))


@pytest.mark.parametrize(
    ("rows", "prototypes"), [(900, 8192), pytest.param(900, 65536, marks=pytest.mark.slow)], ids=str
)
def test_targets_are_as_close_to_double_precision_as_the_published_order_of_operations(
    rows: int, prototypes: int
) -> None:
    """By sums of many numbers, whose errors would otherwise add up. Measured at 65,536: 2.5e-7, formerly 1.3e-5."""

    def published(scores: Tensor) -> Tensor:
        q = torch.exp(scores / 0.05)
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(dim=0, keepdim=True) * prototypes
            q /= q.sum(dim=1, keepdim=True) * rows
        return q * rows

    scores = scores_of(rows, prototypes, scale=0.3)
    exact = published(scores.double())
    error, error_of_published = (
        float((targets.double() - exact).norm() / exact.norm())
        for targets in (sinkhorn_knopp(scores, 0.05), published(scores))
    )
    assert error < 1.5 * error_of_published and error < 5e-7
    assert (sinkhorn_knopp(scores, 0.05).double().sum(dim=1) - 1).abs().max() < 5e-7
    assert published(30 * scores).isnan().any() and sinkhorn_knopp(30 * scores, 0.05).isfinite().all()


@pytest.mark.parametrize("depth", [60.0, 75.0, 87.0])
def test_a_row_far_below_all_others_keeps_its_precision(depth: float) -> None:
    """One row among many, just above the underflow of float32."""
    scores = 0.5 * scores_of(400, 16)
    scores[7] -= depth - 4
    expected = scores.double()
    for _ in range(3):
        expected = expected - expected.logsumexp(dim=0, keepdim=True)
        expected = expected - expected.logsumexp(dim=1, keepdim=True)
    torch.testing.assert_close(sinkhorn_knopp(scores, 1.0).double(), expected.exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gain", [1.0, 3.0, 10.0])
def test_large_gains_with_unused_prototypes_lose_no_precision(gain: float) -> None:
    """Half of the prototypes score far below the others everywhere: balancing must still distinguish their scores."""
    scores = scores_of(16, 64, scale=0.2)
    scores[:, :32] -= 1.0
    expected = gain * scores.double() / 0.04
    for _ in range(3):
        expected = expected - expected.logsumexp(dim=0, keepdim=True)
        expected = expected - expected.logsumexp(dim=1, keepdim=True)
    torch.testing.assert_close(sinkhorn_knopp(gain * scores, 0.04).double(), expected.exp(), rtol=1e-3, atol=1e-5)


def test_a_prototype_far_below_all_others_gives_no_nan() -> None:
    scores = scores_of(6, 4)
    scores[:, 2] = -1e4
    scores[3] = -1e5
    targets = sinkhorn_knopp(scores, 0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_many_iterations_use_all_prototypes_equally() -> None:
    targets = sinkhorn_knopp(scores_of(12, 4), 0.5, n_iterations=200)
    torch.testing.assert_close(targets.sum(dim=0), torch.full((4,), 3.0), rtol=1e-4, atol=0)


def test_three_iterations_balance_much_better_than_softmax() -> None:
    scores = scores_of(64, 8) + torch.linspace(0, 3, 8)
    use = sinkhorn_knopp(scores, 0.5).sum(dim=0)
    softmax_use = (scores / 0.5).softmax(dim=1).sum(dim=0)
    assert use.max() / use.min() < 1.5 < 50 < softmax_use.max() / softmax_use.min()


def test_a_common_shift_of_the_scores_does_not_matter() -> None:
    scores = scores_of(6, 10)
    torch.testing.assert_close(sinkhorn_knopp(scores + 500, 0.07), sinkhorn_knopp(scores, 0.07), rtol=5e-3, atol=1e-4)


def test_no_rows_give_no_targets() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.07).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_give_single_precision_targets(dtype: torch.dtype) -> None:
    scores = scores_of(6, 10, scale=3.0).to(dtype)
    targets = sinkhorn_knopp(scores, 0.04)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, sinkhorn_knopp(scores.float(), 0.04))


def test_scores_stay_and_get_no_gradient() -> None:
    scores = scores_of(6, 10).requires_grad_()
    before = scores.detach().clone()
    for targets in (sinkhorn_knopp(scores, 0.07), softmax_centering(scores, torch.zeros(10), 0.07)):
        assert not targets.requires_grad
    assert torch.equal(scores.detach(), before)


# --- Centering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_centering_is_the_softmax_of_centered_scores(temperature: float) -> None:
    scores, center = scores_of(6, 10), scores_of(1, 10, seed=1)
    expected = torch.zeros(6, 10, dtype=torch.float64)
    for row in range(6):
        exponents = [math.exp((scores[row, k] - center[0, k]).item() / temperature) for k in range(10)]
        expected[row] = torch.tensor([exponent / sum(exponents) for exponent in exponents])
    targets = softmax_centering(scores, center, temperature)
    torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-7)


def test_centering_of_half_precision_scores_is_computed_in_single() -> None:
    scores, center = (60 * scores_of(6, 10)).half(), scores_of(1, 10, seed=1)
    targets = softmax_centering(scores, center, 0.04)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, softmax_centering(scores.float(), center, 0.04))


def test_each_loss_centers_with_its_own_center() -> None:
    scores = scores_of(6, 10)
    dino, ibot = DINOLoss(10), iBOTPatchLoss(10)
    dino.center.copy_(scores_of(1, 10, seed=1))
    ibot.center.copy_(scores_of(1, 10, seed=2))
    expected = softmax_centering(scores, dino.center[0], 0.07)
    assert torch.equal(dino.softmax_center_teacher(scores, 0.07), expected)
    expected = softmax_centering(scores, ibot.center[0, 0], 0.07)
    assert torch.equal(ibot.softmax_center_teacher(scores, 0.07), expected)
    assert torch.equal(ibot.softmax_center_teacher(scores[None], 0.07), expected[None])


@pytest.mark.parametrize("loss", [DINOLoss(10), iBOTPatchLoss(10)], ids=["dino", "ibot"])
def test_the_center_is_a_running_mean_of_scores(loss: DINOLoss | iBOTPatchLoss) -> None:
    expected = torch.zeros(10, dtype=torch.float64)
    for step in range(4):
        scores = scores_of(3 + step, 10, seed=step)
        loss.update_center(scores[None] if step % 2 and isinstance(loss, iBOTPatchLoss) else scores)
        expected = 0.9 * expected + 0.1 * scores.double().mean(dim=0)
    torch.testing.assert_close(loss.center.flatten().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [DINOLoss, iBOTPatchLoss])
def test_the_momentum_of_the_center_can_be_chosen(kind: type[DINOLoss] | type[iBOTPatchLoss]) -> None:
    loss = kind(10, center_momentum=0.25)
    loss.update_center(torch.ones(3, 10))
    assert (loss.center == 0.75).all()


@pytest.mark.parametrize("kind", [DINOLoss, iBOTPatchLoss])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_does_not_move_the_center(
    kind: type[DINOLoss] | type[iBOTPatchLoss], poison: float
) -> None:
    loss = kind(10)
    loss.update_center(scores_of(3, 10))
    before = loss.center.clone()
    bad = scores_of(3, 10)
    bad[1, 4] = poison
    loss.update_center(bad)
    assert torch.equal(loss.center, before)
    loss.update_center(torch.zeros(3, 10))
    torch.testing.assert_close(loss.center, 0.9 * before)


@pytest.mark.parametrize("kind", [DINOLoss, iBOTPatchLoss])
def test_a_batch_without_rows_does_not_move_the_center(kind: type[DINOLoss] | type[iBOTPatchLoss]) -> None:
    loss = kind(10)
    loss.update_center(scores_of(3, 10))
    before = loss.center.clone()
    loss.update_center(torch.zeros(0, 10))
    assert torch.equal(loss.center, before)


def test_centers_are_buffers_of_the_published_shapes() -> None:
    assert [(name, tuple(value.shape)) for name, value in DINOLoss(10).state_dict().items()] == [("center", (1, 10))]
    ibot = iBOTPatchLoss(10).state_dict()
    assert [(name, tuple(value.shape)) for name, value in ibot.items()] == [("center", (1, 1, 10))]
    assert not ibot["center"].any() and ibot["center"].dtype == torch.float32
