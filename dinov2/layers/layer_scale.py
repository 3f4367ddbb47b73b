"""LayerScale (Touvron et al., arXiv 2103.17239): a learned gain per channel on each residual."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply the last dimension by a learned gain `gamma` (D,).

    Args:
        dim: Number of channels D.
        init_values: Initial gain of all channels, or of each (D,).
        inplace: Multiply the input itself.
    """

    def __init__(self, dim: int, init_values: float | Tensor = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.gamma.copy_(torch.as_tensor(self.init_values))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D). In training the gain has the dtype of the input, as in sharded training."""
        gamma = self.gamma.to(x.dtype) if self.training else self.gamma
        return x.mul_(gamma) if self.inplace else x * gamma
