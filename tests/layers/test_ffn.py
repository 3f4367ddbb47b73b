"""Feed-forward networks: the published sizes and names, and what they compute."""

import pytest
import torch
from torch import nn

from dinov2.layers import Mlp, SwiGLUFFN, SwiGLUFFNFused


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_has_the_published_hidden_sizes(width: int, hidden: int) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in SwiGLUFFN(width, 4 * width).state_dict().items()}
    assert shapes == {
        "w12.weight": (2 * hidden, width),
        "w12.bias": (2 * hidden,),
        "w3.weight": (width, hidden),
        "w3.bias": (width,),
    }


def test_swiglu_gates_the_second_half_with_the_first() -> None:
    ffn = SwiGLUFFN(6, 24).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    packed = x @ ffn.w12.weight.T + ffn.w12.bias
    gate, value = packed[..., :16], packed[..., 16:]
    expected = (gate / (1 + torch.exp(-gate)) * value) @ ffn.w3.weight.T + ffn.w3.bias
    torch.testing.assert_close(ffn(x), expected)


def test_the_fused_name_is_the_same_network() -> None:
    assert SwiGLUFFNFused is SwiGLUFFN


def test_mlp_uses_the_exact_gelu() -> None:
    mlp = Mlp(6, 24).double()
    x = 2 * torch.randn(5, 6, dtype=torch.float64)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_mlp_drops_only_while_training() -> None:
    mlp, x = Mlp(6, 24, drop=0.5), torch.randn(50, 6)
    share = (mlp(x) == 0).float().mean()
    assert 0.3 < share < 0.7
    assert not (mlp.eval()(x) == 0).any()


@pytest.mark.parametrize("layer", [Mlp, SwiGLUFFN])
def test_biases_can_be_left_out(layer: type[Mlp] | type[SwiGLUFFN]) -> None:
    assert all(name.endswith("weight") for name in layer(6, 24, bias=False).state_dict())


@pytest.mark.parametrize("layer", [Mlp, SwiGLUFFN])
def test_output_width_can_differ(layer: type[Mlp] | type[SwiGLUFFN]) -> None:
    assert layer(6, 24, out_features=5)(torch.randn(2, 6)).shape == (2, 5)


def test_swiglu_takes_the_published_arguments_that_change_nothing() -> None:
    ffn = SwiGLUFFN(6, 24, 5, nn.GELU, 0.0, False)
    assert ffn.w3.out_features == 5 and ffn.w12.bias is None
    with pytest.raises(ValueError, match="the gate of SwiGLU is a SiLU, not act_layer=<class .*ReLU'>; use mlp"):
        SwiGLUFFN(6, act_layer=nn.ReLU)
    with pytest.raises(ValueError, match=r"SwiGLU has no dropout, but drop=0\.1; use mlp"):
        SwiGLUFFN(6, drop=0.1)


def test_mlp_takes_the_activation() -> None:
    ffn, x = Mlp(6, 8, act_layer=nn.Tanh), torch.randn(3, 6)
    assert torch.equal(ffn(x), ffn.fc2(ffn.fc1(x).tanh()))
