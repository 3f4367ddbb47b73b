"""Projection head from features to prototype scores (DINO, arXiv 2104.14294), used for class and patch tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalization, then scores against prototypes.

    Args:
        in_dim: Width D of the features.
        out_dim: Number of prototypes K.
        use_bn: Normalize the hidden layers over the batch; the input must then be (B, D).
        nlayers: Number of linear layers of the MLP, at least 1, with GELU between them.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width of the bottleneck.
        mlp_bias: Whether the layers of the MLP have a bias.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, max(nlayers, 1), use_bn=use_bn, bias=mlp_bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return self.last_layer(x)


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose row k is `weight_g[k] * weight_v[k] / |weight_v[k]|` (arXiv 1602.07868).

    The gains start at 1 and are trained. It replaces PyTorch's legacy weight norm, whose parameter names the published
    checkpoints use, but which is deprecated.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight_v.shape[1])
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.ones_(self.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        """(..., bottleneck) -> (..., K)."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, dim=0))  # operator of nn.utils.weight_norm


def _mlp(in_dim: int, hidden_dim: int, out_dim: int, nlayers: int, *, use_bn: bool, bias: bool) -> nn.Module:
    widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [out_dim]
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        linear = nn.Linear(fan_in, fan_out, bias=bias)
        if not linear.weight.is_meta:  # for which PyTorch 2.11 imports its compiler
            nn.init.trunc_normal_(linear.weight, std=0.02)
        if bias:
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if index < nlayers - 1:
            layers += [nn.BatchNorm1d(fan_out), nn.GELU()] if use_bn else [nn.GELU()]
    return layers[0] if nlayers == 1 else nn.Sequential(*layers)
