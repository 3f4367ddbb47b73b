"""From teacher scores to target probabilities: centred softmax or Sinkhorn-Knopp.

Both keep the targets from collapsing onto few prototypes. Centering subtracts a running mean of the scores;
Sinkhorn-Knopp (arXiv 2006.09882) solves for an assignment of the batch that uses all prototypes equally.

Legend: R rows of this process (class or masked patch tokens), K prototypes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def softmax_centering(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Softmax of the centred scores in float32: (R, K), center broadcastable -> (R, K), rows sum to 1."""
    return F.softmax((scores.float() - center) / temperature, dim=-1)


def sinkhorn_knopp(scores: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Balanced assignment of the rows of all processes to the prototypes: (R, K) -> (R, K), rows sum to 1."""
    return sinkhorn_knopp_in_pieces([scores], temperature, n_iterations)[0]


@torch.no_grad()
def sinkhorn_knopp_in_pieces(pieces: Sequence[Tensor], temperature: float, n_iterations: int = 3) -> list[Tensor]:
    """One balanced assignment of the rows of all micro-batches and processes: scores (R_i, K) each -> (R_i, K) each.

    Alternates, in float32, between giving every prototype the same total and every row the same total; the
    published constants (1 / K, 1 / rows) cancel and are left out. Each prototype's greatest score is subtracted first:
    the first division cancels it, and `exp` cannot overflow. Scores more than 87 below it are raised to that, so that
    no row sums to zero. Pieces may have different numbers of rows, even none.
    """
    assignments = [scores.float() / temperature for scores in pieces]
    greatest = all_reduce_max(torch.stack([_column_max(scores) for scores in assignments]).amax(dim=0))
    assignments = [scores.sub_(greatest).clamp_(min=-87.0).exp_() for scores in assignments]
    for _ in range(n_iterations):
        columns = all_reduce_sum(torch.stack([assignment.sum(dim=0) for assignment in assignments]).sum(dim=0))
        for assignment in assignments:
            assignment /= columns
            assignment /= assignment.sum(dim=1, keepdim=True)
    return assignments


def _column_max(scores: Tensor) -> Tensor:
    """(R, K) -> (K,); minus infinity if there is no row."""
    return scores.amax(dim=0) if len(scores) else scores.new_full(scores.shape[1:], -torch.inf)


def soft_cross_entropy(scores: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row in float32: student scores (R, K), targets (R, K) -> (R,)."""
    return F.cross_entropy(scores.float() / temperature, probabilities, reduction="none")


@torch.no_grad()
def updated_center(center: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """Move the running mean towards the mean of a batch, unless that is not finite (it would never recover)."""
    moved = center * momentum + batch_mean * (1 - momentum)
    return torch.where(batch_mean.isfinite().all(), moved, center)
