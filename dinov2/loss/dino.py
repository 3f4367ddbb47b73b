"""Image-level loss: the student's class tokens predict the teacher's (DINO, arXiv 2104.14294)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_sum
from dinov2.loss.targets import sinkhorn_knopp, soft_cross_entropy, softmax_centering, updated_center


class DINOLoss(nn.Module):
    """Cross-entropy between teacher targets and student scores over `out_dim` prototypes.

    The buffer `center` (1, K) is the running mean of teacher scores, used and updated only with centering.
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Compute targets from teacher scores, (R, K) -> (R, K), with the center of the previous batches."""
        return softmax_centering(teacher_output, self.center, teacher_temp)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, *, n_iterations: int = 3) -> Tensor:
        """Compute targets from teacher scores, (R, K) -> (R, K), balanced over all processes."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    @torch.no_grad()
    def update_center(self, *teacher_outputs: Tensor) -> None:
        """Update the center by the mean of scores (R, K) of micro-batches and processes, after the targets."""
        sums = [scores.sum(dim=0, keepdim=True, dtype=torch.float32) for scores in teacher_outputs]
        total = torch.stack(sums).sum(dim=0)
        rows = total.new_full((), sum(map(len, teacher_outputs)))
        total, rows = all_reduce_sum(total), all_reduce_sum(rows)
        self.center.copy_(updated_center(self.center, total / rows, self.center_momentum))

    def forward(self, student_output_list: Sequence[Tensor], teacher_probs_list: Sequence[Tensor]) -> Tensor:
        """Sum the mean cross-entropy over all pairs of a student view and a teacher view, each (R, K).

        Several student views may come as one tensor (V * R, K). Teacher views are summed first, because the
        cross-entropy is linear in its targets.
        """
        targets = torch.stack(tuple(teacher_probs_list)).sum(dim=0)
        sums = [soft_cross_entropy(scores, targets, self.student_temp).sum() for scores in student_output_list]
        return torch.stack(sums).sum() / len(targets)
