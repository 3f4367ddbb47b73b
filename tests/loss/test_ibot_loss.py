"""The patch-level loss, packed and dense, against its definition in float64."""

import pytest
import torch
from torch import Tensor

from dinov2.loss import iBOTPatchLoss

CROPS, PATCHES, PROTOTYPES = 4, 6, 7


@pytest.fixture
def masks() -> Tensor:
    """Four crops with 3, 0, 1 and all 6 patches masked."""
    masks = torch.zeros(CROPS, PATCHES, dtype=torch.bool)
    masks[0, [0, 2, 5]] = masks[2, 4] = masks[3] = True
    return masks


def scores_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, PROTOTYPES, generator=torch.Generator().manual_seed(seed))


def targets_of(*shape: int) -> Tensor:
    return (5 * scores_of(*shape, seed=1)).softmax(dim=-1)


def naive(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float = 0.1) -> Tensor:
    """(B, N, K) scores and targets: mean over all crops of the mean over their masked patches, 0 for crops without."""
    total = torch.zeros((), dtype=torch.float64)
    for crop in range(len(masks)):
        masked = masks[crop].nonzero().flatten().tolist()
        for patch in masked:
            scores, target = student[crop, patch].double() / temperature, teacher[crop, patch].double()
            cross_entropy = -(target * (scores - torch.log(torch.exp(scores).sum()))).sum()
            total = total + cross_entropy / len(masked) / len(masks)
    return total


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_masked_loss_is_its_definition(masks: Tensor, temperature: float) -> None:
    student, teacher = scores_of(CROPS, PATCHES), targets_of(CROPS, PATCHES)
    loss = iBOTPatchLoss(PROTOTYPES, student_temp=temperature).forward_masked(student[masks], teacher[masks], masks)
    torch.testing.assert_close(loss.double(), naive(student, teacher, masks, temperature), rtol=1e-5, atol=1e-6)


def test_the_dense_loss_is_its_definition(masks: Tensor) -> None:
    student, teacher = scores_of(CROPS, PATCHES), targets_of(CROPS, PATCHES)
    loss = iBOTPatchLoss(PROTOTYPES)(student, teacher, masks)
    torch.testing.assert_close(loss.double(), naive(student, teacher, masks), rtol=1e-5, atol=1e-6)


def test_gradients_of_both_forms_are_those_of_the_definition(masks: Tensor) -> None:
    student, teacher = scores_of(CROPS, PATCHES).requires_grad_(), targets_of(CROPS, PATCHES)
    loss = iBOTPatchLoss(PROTOTYPES)
    (expected,) = torch.autograd.grad(naive(student, teacher, masks), student)
    for value in (loss(student, teacher, masks), loss.forward_masked(student[masks], teacher[masks], masks)):
        (gradient,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert not gradient[~masks].any()


def test_weights_are_one_over_the_masked_patches_of_the_crop(masks: Tensor) -> None:
    student, teacher = scores_of(10), targets_of(10)
    loss = iBOTPatchLoss(PROTOTYPES)
    weights = torch.tensor([1 / 3] * 3 + [1.0] + [1 / 6] * 6)
    implied = loss.forward_masked(student, teacher, masks)
    torch.testing.assert_close(loss.forward_masked(student, teacher, masks, masks_weight=weights), implied)
    torch.testing.assert_close(loss.forward_masked(student, teacher, masks, masks_weight=2 * weights), 2 * implied)


def test_padding_beyond_the_masked_patches_does_not_count(masks: Tensor) -> None:
    student, teacher, weights = scores_of(10), targets_of(10), torch.rand(10)
    loss = iBOTPatchLoss(PROTOTYPES)
    expected = loss.forward_masked(student, teacher, masks, masks_weight=weights)
    garbage = torch.full((3, PROTOTYPES), torch.nan)
    padded = torch.cat([student, garbage]).requires_grad_()
    value = loss.forward_masked(
        padded,
        torch.cat([teacher, garbage]),
        masks,
        n_masked_patches=10,
        masks_weight=torch.cat([weights, garbage[:, 0]]),
    )
    assert torch.equal(value, expected)
    (gradient,) = torch.autograd.grad(value, padded)
    assert gradient[:10].isfinite().all() and not gradient[10:].any()


@pytest.mark.parametrize("n_masked_patches", [None, 0])
def test_without_masked_patches_the_loss_and_its_gradient_are_zero(n_masked_patches: int | None) -> None:
    student, nothing = scores_of(0).requires_grad_(), torch.zeros(CROPS, PATCHES, dtype=torch.bool)
    loss = iBOTPatchLoss(PROTOTYPES).forward_masked(student, targets_of(0), nothing, n_masked_patches=n_masked_patches)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, PROTOTYPES)
    dense = scores_of(CROPS, PATCHES).requires_grad_()
    loss = iBOTPatchLoss(PROTOTYPES)(dense, targets_of(CROPS, PATCHES), nothing)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, dense)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_computed_in_single(masks: Tensor, dtype: torch.dtype) -> None:
    student, teacher = (20 * scores_of(10)).to(dtype), targets_of(10)
    loss = iBOTPatchLoss(PROTOTYPES).forward_masked(student, teacher, masks)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, iBOTPatchLoss(PROTOTYPES).forward_masked(student.float(), teacher, masks))
