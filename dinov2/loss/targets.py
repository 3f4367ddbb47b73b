"""From teacher scores to target probabilities: centred softmax or Sinkhorn-Knopp.

Both keep the targets from collapsing onto few prototypes. Centering subtracts a running mean of the scores;
Sinkhorn-Knopp (arXiv 2006.09882) solves for an assignment of the batch that uses all prototypes equally.

Legend: R rows of this process (class or masked patch tokens), K prototypes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def softmax_centering(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Softmax of the centred scores in float32: (R, K), center broadcastable -> (R, K), rows sum to 1."""
    return F.softmax((scores.float() - center) / temperature, dim=-1)


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Balanced assignment of the rows of all processes to the prototypes: (R, K) -> (R, K), rows sum to 1.

    Alternates, in float32, between giving every prototype the same total and every row the same total; the
    published constants (1 / K, 1 / rows) cancel and are left out. Each prototype's greatest score is subtracted first:
    the first division cancels it, and `exp` cannot overflow. Scores more than 87 below it are raised to that, so that
    no row sums to zero. Processes may hold different numbers of rows, even none.
    """
    scores = scores.float() / temperature
    mine = scores.amax(dim=0, keepdim=True) if len(scores) else scores.new_full((1, scores.shape[1]), -torch.inf)
    assignment = (scores - all_reduce_max(mine)).clamp_(min=-87.0).exp_()
    for _ in range(n_iterations):
        assignment /= all_reduce_sum(assignment.sum(dim=0, keepdim=True))
        assignment /= assignment.sum(dim=1, keepdim=True)
    return assignment


def soft_cross_entropy(scores: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row in float32: student scores (R, K), targets (R, K) -> (R,)."""
    return F.cross_entropy(scores.float() / temperature, probabilities, reduction="none")


@torch.no_grad()
def updated_center(center: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """Move the running mean towards the mean of a batch, unless that is not finite (it would never recover)."""
    moved = center * momentum + batch_mean * (1 - momentum)
    return torch.where(batch_mean.isfinite().all(), moved, center)
