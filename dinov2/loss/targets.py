"""Target probabilities from teacher scores, by centered softmax or Sinkhorn-Knopp.

Both prevent a collapse of the targets to few prototypes. Centering subtracts a running mean of the scores;
Sinkhorn-Knopp (arXiv 2006.09882) computes an assignment of the batch that uses all prototypes equally.

Legend: R rows of this process (class or masked patch tokens), K prototypes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2.distributed import all_reduce_max, all_reduce_sum

LARGEST_PIECE = 2**27  # scores that are processed at once, except on a CPU


@torch.no_grad()
def softmax_centering(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Softmax of the centered scores in float32: (R, K), broadcastable center -> (R, K), rows sum to 1."""
    targets = torch.empty_like(scores, dtype=torch.float32)
    for rows in _pieces(scores):
        torch.softmax((scores[rows] - center).div_(temperature), dim=-1, out=targets[rows])
    return targets


def sinkhorn_knopp(scores: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Balanced assignment of the rows of all processes to the prototypes: (R, K) -> (R, K), rows sum to 1."""
    return sinkhorn_knopp_in_pieces([scores], temperature, n_iterations)[0]


@torch.no_grad()
def sinkhorn_knopp_in_pieces(pieces: Sequence[Tensor], temperature: float, n_iterations: int = 3) -> list[Tensor]:
    """One balanced assignment of the rows of all micro-batches and processes: scores (R_i, K) each -> (R_i, K) each.

    Alternately normalizes the totals of prototypes and of rows, in float32 and in place, in the published order; the
    published constants (1 / K, 1 / rows) cancel and are omitted. Totals are sums, whose rounding errors do not grow
    with K like those of matrix products: at 900 x 65,536 the targets are as close to float64 as the published ones. The
    maximum score of each prototype is subtracted first: the first division cancels it, and `exp` cannot overflow.
    Scores more than 87 below it are clamped, so that no row sums to zero. Pieces may differ in their number of rows,
    which may be 0.
    """
    assignments = [scores.float() / temperature for scores in pieces]
    maximum = all_reduce_max(torch.stack([_column_max(scores) for scores in assignments]).amax(dim=0))
    assignments = [scores.sub_(maximum).clamp_(min=-87.0).exp_() for scores in assignments]
    for _ in range(n_iterations):
        totals = all_reduce_sum(torch.stack([assignment.sum(dim=0) for assignment in assignments]).sum(dim=0))
        totals *= 2.0**-60  # arbitrary, as rows are normalized next; keeps exp(-87) within float32
        for assignment in assignments:
            assignment.div_(totals)
            assignment.div_(assignment.sum(dim=1, keepdim=True))
    return assignments


def _column_max(scores: Tensor) -> Tensor:
    """Maximum of each column, (R, K) -> (K,); minus infinity without rows."""
    return scores.amax(dim=0) if len(scores) else scores.new_full(scores.shape[1:], -torch.inf)


def soft_cross_entropy(scores: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row in float32: student scores (V * R, K) of V views, targets (R, K) of each -> (V * R,).

    Targets are constants with any sum. Neither the softmax nor float32 scores are kept in memory.
    """
    by_view = scores.unflatten(0, (len(scores) // max(len(probabilities), 1), len(probabilities)))
    losses: Tensor = _SoftCrossEntropy.apply(by_view, probabilities, temperature)
    return losses.flatten()


class _SoftCrossEntropy(torch.autograd.Function):
    """-t . log softmax(z) for each row, with z = scores / temperature; its gradient is sum(t) softmax(z) - t.

    Rows are processed in pieces that fit in the cache of a CPU; the gradient recomputes the softmax.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
        losses = scores.new_empty(scores.shape[:2], dtype=torch.float32)
        for rows in _pieces(scores.transpose(0, 1)):
            logarithms = torch.log_softmax(scores[:, rows].float() / temperature, dim=-1)
            torch.sum(logarithms.mul_(probabilities[rows]), dim=-1, out=losses[:, rows])
        ctx.save_for_backward(scores, probabilities)
        ctx.temperature = temperature
        return losses.neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        scores, probabilities = ctx.saved_tensors
        upstream = upstream[..., None] / ctx.temperature
        gradient = torch.empty_like(scores)
        for rows in _pieces(scores.transpose(0, 1)):
            targets = probabilities[rows]
            softmax = torch.softmax(scores[:, rows].float() / ctx.temperature, dim=-1)
            difference = softmax.mul_(targets.sum(dim=-1, keepdim=True)).sub_(targets)
            torch.mul(difference, upstream[:, rows], out=gradient[:, rows])
        return gradient, None, None


def _pieces(scores: Tensor) -> list[slice]:
    """Slices of rows of scores (R, ...) that fit in the cache of a CPU; on other devices they only bound the memory."""
    size = max((2**19 if scores.is_cpu else LARGEST_PIECE) // max(scores[0:1].numel(), 1), 1)
    return [slice(first, first + size) for first in range(0, len(scores), size)]


@torch.no_grad()
def updated_center(center: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """Update the running mean by the mean of a batch, unless that is not finite (it would never recover)."""
    moved = center * momentum + batch_mean * (1 - momentum)
    return torch.where(batch_mean.isfinite().all(), moved, center)
