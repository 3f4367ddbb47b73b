"""Feed-forward networks of the transformer blocks."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Linear, activation, Linear; parameters `fc1` and `fc2`.

    Args:
        in_features: Width D of the tokens.
        hidden_features: Width of the hidden layer; None: D.
        out_features: Width of the result; None: D.
        act_layer: Builds the activation.
        drop: Dropout rate after each layer, in [0, 1].
        bias: Whether both layers have a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFN(nn.Module):
    """SiLU-gated network (Shazeer, arXiv 2002.05202); `w12` packs the gate and the value, `w3` projects back.

    The hidden width is reduced to two thirds, rounded up to a multiple of 8, to keep the parameter count of an `Mlp`.
    As published, `act_layer` is ignored.

    Args:
        in_features: Width D of the tokens.
        hidden_features: Width of the hidden layer before the reduction; None: D.
        out_features: Width of the result; None: D.
        act_layer: None, `nn.SiLU`, or the default of `Block`, `nn.GELU`; a ValueError for others.
        drop: Must be 0, otherwise a ValueError: there is no dropout.
        bias: Whether both layers have a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if act_layer not in (None, nn.GELU, nn.SiLU):
            raise ValueError(f"the gate of SwiGLU is a SiLU, not act_layer={act_layer}; use mlp for another")
        if drop:
            raise ValueError(f"SwiGLU has no dropout, but drop={drop}; use mlp for dropout")
        hidden_features = hidden_features or in_features
        hidden_features = (int(hidden_features * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


SwiGLUFFNFused = SwiGLUFFN  # published name of the variant with a fused kernel, which xFormers has removed
