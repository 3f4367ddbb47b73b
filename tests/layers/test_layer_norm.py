"""Norms and gains in half precision: the dtype is kept, and only rounding changes."""

import pytest
import torch
from torch import nn

from dinov2.layers import LayerScale
from dinov2.layers.layer_norm import LayerNorm


def pair(**options: bool) -> tuple[nn.LayerNorm, LayerNorm]:
    torch.manual_seed(0)
    theirs, ours = nn.LayerNorm(64, eps=1e-6, **options), LayerNorm(64, eps=1e-6, **options)
    for param in theirs.parameters():
        nn.init.normal_(param, mean=1.0, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_is_normalized_as_by_torch(autocast: bool) -> None:
    theirs, ours = pair()
    x = torch.randn(10, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_differs_by_rounding(dtype: torch.dtype, options: dict[str, bool]) -> None:
    theirs, ours = pair(**options)
    x = (3 * torch.randn(10, 64) + 20).to(dtype)
    ours_x, their_x = x.clone().requires_grad_(), x.float().requires_grad_()
    with torch.autocast("cpu", dtype):
        result = ours(ours_x)
    expected = theirs(their_x)
    assert result.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.float(), expected, rtol=rounding, atol=2 * rounding)
    gradient = torch.randn_like(expected)
    (result * gradient.to(dtype)).sum().backward()
    (expected * gradient).sum().backward()
    assert ours_x.grad is not None and their_x.grad is not None
    torch.testing.assert_close(ours_x.grad.float(), their_x.grad, rtol=4 * rounding, atol=4 * rounding)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=8 * rounding, atol=32 * rounding)


def test_gains_keep_half_precision_in_training_only() -> None:
    scale, x = LayerScale(64, init_values=torch.linspace(1e-5, 1, 64)), torch.randn(10, 64, dtype=torch.bfloat16)
    assert scale(x).dtype == torch.bfloat16 and scale.eval()(x).dtype == torch.float32
    torch.testing.assert_close(scale.train()(x).float(), scale.eval()(x), rtol=0.01, atol=0)
