"""Patch-level loss: at masked positions the student predicts the teacher's patch tokens (iBOT, arXiv 2111.07832)."""

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_sum
from dinov2.loss.targets import sinkhorn_knopp, soft_cross_entropy, softmax_centering, updated_center


class iBOTPatchLoss(nn.Module):  # noqa: N801  (the published name)
    """Cross-entropy between teacher targets and student scores at masked patches, over `patch_out_dim` prototypes.

    Legend: B crops of N patches, M masked patches of all crops of this process, K prototypes.
    The buffer `center` (1, 1, K) is the running mean of teacher scores, used and updated only with centering.
    """

    center: Tensor

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, 1, patch_out_dim))

    def softmax_center_teacher(self, teacher_patch_tokens: Tensor, teacher_temp: float) -> Tensor:
        """Compute targets from teacher scores, both (..., M, K), with the center of the previous batches."""
        center = self.center if teacher_patch_tokens.ndim == 3 else self.center[0]
        return softmax_centering(teacher_patch_tokens, center, teacher_temp)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, *, n_iterations: int = 3) -> Tensor:
        """Compute targets from the teacher scores of masked patches, (M, K) -> (M, K), balanced over all processes."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    @torch.no_grad()
    def update_center(self, *teacher_patch_tokens: Tensor) -> None:
        """Update the center by the mean over processes and micro-batches of their mean scores, as published.

        Takes scores (..., M, K) per micro-batch. Those without masked patches are ignored; if all are, the center stays
        unchanged.
        """
        means = [
            scores.flatten(0, -2).mean(dim=0, dtype=torch.float32) for scores in teacher_patch_tokens if scores.numel()
        ]
        total = torch.stack([torch.zeros_like(self.center.flatten()), *means]).sum(dim=0)
        num_means = all_reduce_sum(total.new_full((), len(means)))
        batch_mean = all_reduce_sum(total) / num_means  # not finite if there is none: the center stays unchanged
        self.center.copy_(updated_center(self.center, batch_mean.view_as(self.center), self.center_momentum))

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """Dense form, scores and targets (B, N, K), masks (B, N): mean over crops of the mean over masked patches."""
        mask = student_masks_flat.float()
        loss = soft_cross_entropy(
            student_patch_tokens.flatten(0, 1), teacher_patch_tokens.flatten(0, 1), self.student_temp
        )
        per_crop = (loss.view_as(mask) * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1.0)
        return per_crop.mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Masked form: mean over **all** B crops of the mean over the masked patches of a crop, 0 without any.

        Args:
            student_patch_tokens_masked: Scores (M, K), masked patches in the order of the flattened mask.
            teacher_patch_tokens_masked: Targets (M, K).
            student_masks_flat: Masks (B, N) bool.
            n_masked_patches: M, if the two inputs are padded beyond it.
            masks_weight: Weights (M,), 1 / (masked patches of the crop); computed from the masks if None.
        """
        if masks_weight is None:
            per_crop = student_masks_flat.sum(dim=-1, keepdim=True).clamp(min=1)
            masks_weight = (1.0 / per_crop).expand_as(student_masks_flat)[student_masks_flat]
        scores, targets = student_patch_tokens_masked, teacher_patch_tokens_masked
        if n_masked_patches is not None:  # not by [:None], whose gradient first fills a matrix with zeros
            scores, targets = scores[:n_masked_patches], targets[:n_masked_patches]
        loss = soft_cross_entropy(scores, targets, self.student_temp)
        return (loss * masks_weight[:n_masked_patches]).sum() / len(student_masks_flat)
