"""The image-level loss against its definition, term by term in float64."""

import pytest
import torch
from torch import Tensor

from dinov2.loss import DINOLoss


def scores_of(rows: int, seed: int, prototypes: int = 7) -> Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed))


def targets_of(rows: int, seed: int) -> Tensor:
    return (5 * scores_of(rows, seed)).softmax(dim=1)


def naive(student: list[Tensor], teacher: list[Tensor], temperature: float) -> Tensor:
    """All pairs, none left out and no average over pairs; rows averaged."""
    total = torch.zeros((), dtype=torch.float64)
    for scores in student:
        for targets in teacher:
            for row, target in zip(scores.double(), targets.double(), strict=True):
                log_sum = torch.log(torch.exp(row / temperature).sum())
                total = total - (target * (row / temperature - log_sum)).sum() / len(scores)
    return total


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize(("num_student", "num_teacher"), [(1, 1), (8, 2), (2, 2), (1, 3)])
def test_the_loss_sums_over_all_pairs(num_student: int, num_teacher: int, temperature: float) -> None:
    student = [scores_of(5, seed) for seed in range(num_student)]
    teacher = [targets_of(5, 100 + seed) for seed in range(num_teacher)]
    loss = DINOLoss(7, student_temp=temperature)(student, teacher)
    torch.testing.assert_close(loss.double(), naive(student, teacher, temperature), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_definition() -> None:
    student = [scores_of(5, seed).requires_grad_() for seed in range(3)]
    teacher = [targets_of(5, 100), targets_of(5, 101)]
    ours = torch.autograd.grad(DINOLoss(7)(student, teacher), student)
    expected = torch.autograd.grad(naive(student, teacher, 0.1), student)
    for gradient, expected_gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_views_may_come_as_chunks_of_one_tensor_or_in_one_tensor() -> None:
    student, teacher = scores_of(20, 0), targets_of(10, 1)
    expected = naive(list(student.chunk(4)), list(teacher.chunk(2)), 0.1)
    for views in (student.chunk(4), [student], student.split([5, 15])):
        loss = DINOLoss(7)(views, teacher.chunk(2))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_views_in_one_tensor_have_the_gradients_of_single_ones() -> None:
    student, teacher = scores_of(20, 0).requires_grad_(), targets_of(5, 1)
    [joint] = torch.autograd.grad(DINOLoss(7)([student], [teacher]), student)
    [single] = torch.autograd.grad(DINOLoss(7)(student.chunk(4), [teacher]), student)
    torch.testing.assert_close(joint, single, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_computed_in_single(dtype: torch.dtype) -> None:
    student, teacher = (20 * scores_of(5, 0)).to(dtype), targets_of(5, 1)
    loss = DINOLoss(7)([student], [teacher])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, DINOLoss(7)([student.float()], [teacher]))


def test_untrained_scores_cost_about_the_logarithm_of_the_prototypes() -> None:
    loss = DINOLoss(4096)([torch.zeros(5, 4096)], [scores_of(5, 1, prototypes=4096).softmax(dim=1)])
    assert loss.item() == pytest.approx(8.317766)


def test_a_student_that_agrees_pays_the_entropy_of_the_targets() -> None:
    teacher = targets_of(5, 1)
    entropy = -(teacher * teacher.log()).sum(dim=1).mean()
    torch.testing.assert_close(DINOLoss(7)([0.1 * teacher.log()], [teacher]), entropy)
