"""KoLeo regularizer: spreads the features of a batch (Sablayrolles et al., arXiv 1806.03198)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KoLeoLoss(nn.Module):
    """Minus the mean log distance of each normalized feature to its nearest neighbor in the batch."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Compute the loss, (B, D) -> scalar; zero for fewer than two rows, which have no neighbors.

        Always in float32: in half precision `eps` is rounded to 0 and equal rows give infinity.
        """
        if len(student_output) < 2:
            return student_output.sum() * 0.0
        with torch.autocast(student_output.device.type, enabled=False):
            features = F.normalize(student_output.float(), eps=eps, dim=-1)
            neighbors = features[_nearest(features.detach())]
            distances = F.pairwise_distance(features, neighbors, p=2.0, eps=eps)
            return -torch.log(distances + eps).mean()


def _nearest(features: Tensor) -> Tensor:
    """Index of the most similar other row: (B, D) normalized -> (B,)."""
    similarity = features @ features.T
    return similarity.fill_diagonal_(-torch.inf).argmax(dim=1)
