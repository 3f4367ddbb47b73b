"""Stochastic depth (Huang et al., arXiv 1603.09382) by masking residuals."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, zero samples with probability `drop_prob` in [0, 1), and scale the others to keep the mean."""

    def __init__(self, drop_prob: float | None = 0.0) -> None:
        super().__init__()
        drop_prob = drop_prob or 0.0
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"the rate of stochastic depth must be at least 0 and below 1, not {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * (mask / keep_prob)
