"""LayerScale (Touvron et al., arXiv 2103.17239): a learned gain per channel on each residual."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply the last dimension, of size `dim`, by `gamma`, which starts at `init_values`."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma
