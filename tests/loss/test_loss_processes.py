"""Two processes compute what one computes on the joined batch: targets, centers, losses and gradients."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.targets import sinkhorn_knopp

Results = dict[str, Any]

PROTOTYPES = 10
ROWS = {"equal": (5, 5), "unequal": (3, 7), "first empty": (0, 6), "second empty": (6, 0), "both empty": (0, 0)}
STEPS = 3
CROPS, PATCHES = 4, 6


def shares(kind: str, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The scores of process 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (scale * torch.randn(rows, PROTOTYPES, generator=generator) for rows in ROWS[kind])
    return first, second


def masks() -> tuple[Tensor, Tensor]:
    """Other masks, and other numbers of them, in each process."""
    both = torch.rand(2 * CROPS, PATCHES, generator=torch.Generator().manual_seed(5)) < 0.4
    both[0] = False
    return both[:CROPS], both[CROPS:]


def run_process(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: Results = {}
    for kind in ROWS:
        results[f"sinkhorn {kind}"] = sinkhorn_knopp(shares(kind)[rank], 0.07)
        results[f"dino center {kind}"] = center_after(DINOLoss, lambda step, kind=kind: shares(kind, seed=step)[rank])
        results[f"ibot center {kind}"] = center_after(
            iBOTPatchLoss, lambda step, kind=kind: shares(kind, seed=step)[rank]
        )
    results["sinkhorn huge"] = sinkhorn_knopp(shares("unequal")[rank] + 1e4 * rank, 0.07)
    poisoned = shares("equal")[rank] + (torch.nan if rank else 0.0)
    results["dino center poisoned"] = center_after(DINOLoss, lambda step: poisoned)
    results["ibot center poisoned"] = center_after(iBOTPatchLoss, lambda step: poisoned)
    results["dino"] = dino_step(shares("equal", seed=1)[rank], shares("equal", seed=2)[rank])
    mask = masks()[rank]
    results["ibot"] = ibot_step(patch_scores(1)[rank][mask], patch_scores(2)[rank][mask], mask)
    results["koleo"] = KoLeoLoss()(shares("unequal")[rank])
    torch.save(results, f"{folder}/results{rank}.pth")
    dist.destroy_process_group()


def center_after(kind: type[DINOLoss] | type[iBOTPatchLoss], scores: Callable[[int], Tensor]) -> Tensor:
    loss = kind(PROTOTYPES)
    for step in range(STEPS):
        loss.update_center(scores(step))
    return loss.center.flatten()


def patch_scores(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2 * CROPS, PATCHES, PROTOTYPES, generator=generator)
    return both[:CROPS], both[CROPS:]


def dino_step(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    loss_fn, student = DINOLoss(PROTOTYPES), student.clone().requires_grad_()
    loss = loss_fn([student], [loss_fn.sinkhorn_knopp_teacher(teacher, 0.07)])
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def ibot_step(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    loss_fn, student = iBOTPatchLoss(PROTOTYPES), student.clone().requires_grad_()
    loss = loss_fn.forward_masked(student, loss_fn.sinkhorn_knopp_teacher(teacher, 0.07), mask)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of the two processes found."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"results{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("kind", ROWS)
def test_sinkhorn_balances_over_all_processes(results: list[Results], kind: str) -> None:
    ours = [result[f"sinkhorn {kind}"] for result in results]
    assert [len(targets) for targets in ours] == list(ROWS[kind])
    torch.testing.assert_close(torch.cat(ours), sinkhorn_knopp(torch.cat(shares(kind)), 0.07))
    if kind in ("equal", "unequal"):
        alone = torch.cat([sinkhorn_knopp(share, 0.07) for share in shares(kind)])
        assert not torch.allclose(torch.cat(ours), alone, atol=1e-2), "the processes did talk"


def test_sinkhorn_is_finite_when_one_process_has_much_larger_scores(results: list[Results]) -> None:
    for result in results:
        targets = result["sinkhorn huge"]
        assert targets.isfinite().all()
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)))


@pytest.mark.parametrize("kind", ROWS)
def test_the_image_center_is_that_of_the_joined_batch(results: list[Results], kind: str) -> None:
    expected = center_after(DINOLoss, lambda step: torch.cat(shares(kind, seed=step)))
    for result in results:
        torch.testing.assert_close(result[f"dino center {kind}"], expected)
    assert expected.any() == (kind != "both empty")


@pytest.mark.parametrize("kind", ROWS)
def test_the_patch_center_follows_the_mean_of_the_means(results: list[Results], kind: str) -> None:
    """As published: processes count the same, whatever their number of masked patches; one without does not count."""
    expected = torch.zeros(PROTOTYPES)
    for step in range(STEPS):
        means = [share.mean(dim=0) for share in shares(kind, seed=step) if len(share)]
        expected = 0.9 * expected + 0.1 * torch.stack(means).mean(dim=0) if means else expected
    for result in results:
        torch.testing.assert_close(result[f"ibot center {kind}"], expected)


@pytest.mark.parametrize("loss", ["dino", "ibot"])
def test_bad_scores_in_one_process_leave_the_center_alone_in_both(results: list[Results], loss: str) -> None:
    for result in results:
        assert not result[f"{loss} center poisoned"].any()


def test_the_image_loss_is_the_mean_over_processes(results: list[Results]) -> None:
    """And the gradient of the joined batch is the mean of the gradients, as averaging them assumes."""
    loss, gradient = dino_step(torch.cat(shares("equal", seed=1)), torch.cat(shares("equal", seed=2)))
    ours = [result["dino"] for result in results]
    torch.testing.assert_close(torch.stack([value for value, _ in ours]).mean(), loss)
    torch.testing.assert_close(torch.cat([part for _, part in ours]) / 2, gradient)


def test_the_patch_loss_is_the_mean_over_processes_with_unequal_masks(results: list[Results]) -> None:
    first, second = masks()
    assert first.sum() != second.sum()
    mask = torch.cat([first, second])
    student, teacher = (torch.cat(patch_scores(seed))[mask] for seed in (1, 2))
    loss, gradient = ibot_step(student, teacher, mask)
    ours = [result["ibot"] for result in results]
    torch.testing.assert_close(torch.stack([value for value, _ in ours]).mean(), loss)
    torch.testing.assert_close(torch.cat([part for _, part in ours]) / 2, gradient)


def test_koleo_compares_within_its_own_process_only(results: list[Results]) -> None:
    for result, share in zip(results, shares("unequal"), strict=True):
        assert torch.equal(result["koleo"], KoLeoLoss()(share))
