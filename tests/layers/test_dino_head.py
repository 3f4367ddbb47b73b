"""The projection head: published names and sizes, weight normalization, and half precision."""

import pytest
import torch
from torch import nn

from dinov2.layers import DINOHead
from dinov2.layers.dino_head import WeightNormLinear

LAST = ["last_layer.weight_g", "last_layer.weight_v"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"nlayers": 3}, [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]),
        ({"nlayers": 2}, [f"mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]),
        ({"nlayers": 1}, ["mlp.weight", "mlp.bias"]),
        ({"nlayers": 0}, ["mlp.weight", "mlp.bias"]),
        ({"nlayers": 3, "mlp_bias": False}, ["mlp.0.weight", "mlp.2.weight", "mlp.4.weight"]),
    ],
)
def test_names_are_the_published_ones(options: dict[str, int], names: list[str]) -> None:
    head = DINOHead(6, 20, hidden_dim=10, bottleneck_dim=4, **options)
    assert list(head.state_dict()) == names + LAST
    assert [tuple(head.state_dict()[name].shape) for name in LAST] == [(20, 1), (20, 4)]


@pytest.mark.parametrize(
    ("prototypes", "bottleneck", "parameters"),
    [(65536, 256, 23_662_848), (131072, 384, 57_545_088), (131072, 256, 40_505_600)],
)
def test_sizes_are_the_published_ones(prototypes: int, bottleneck: int, parameters: int) -> None:
    with torch.device("meta"):
        head = DINOHead(1024, prototypes, bottleneck_dim=bottleneck)
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters
    assert all(parameter.requires_grad for parameter in head.parameters()), "the gains are trained too"


def test_the_layers_in_order() -> None:
    kinds = [type(layer).__name__ for layer in DINOHead(6, 20, hidden_dim=10, bottleneck_dim=4).mlp]
    assert kinds == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    with_bn = DINOHead(6, 20, use_bn=True, hidden_dim=10, bottleneck_dim=4)
    kinds = [type(layer).__name__ for layer in with_bn.mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]
    with_bn(torch.randn(7, 6)).sum().backward()
    assert with_bn.mlp[1].num_batches_tracked == 1


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_scores_are_cosines_times_gains(nlayers: int) -> None:
    head = DINOHead(6, 20, nlayers=nlayers, hidden_dim=10, bottleneck_dim=4).double()
    nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    cosines = torch.cosine_similarity(head.mlp(x)[:, :, None], head.last_layer.weight_v, dim=-1)
    torch.testing.assert_close(head(x), cosines * head.last_layer.weight_g[:, 0])


def test_weight_norm_has_the_values_and_gradients_of_pytorchs() -> None:
    ours = WeightNormLinear(4, 20).double()
    nn.init.uniform_(ours.weight_g, 0.5, 2.0)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(4, 20, bias=False).double(), dim=0)
    parametrization = theirs.parametrizations.weight
    with torch.no_grad():
        parametrization.original0.copy_(ours.weight_g)
        parametrization.original1.copy_(ours.weight_v)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(7, 20, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    our_gradients = torch.autograd.grad(ours(x), [x, ours.weight_g, ours.weight_v], cotangent)
    leaves = [x, parametrization.original0, parametrization.original1]
    for our_gradient, expected in zip(our_gradients, torch.autograd.grad(theirs(x), leaves, cotangent), strict=True):
        torch.testing.assert_close(our_gradient, expected)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    head = DINOHead(64, 500, hidden_dim=128, bottleneck_dim=64)
    for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    direction = head.last_layer.weight_v.detach()
    assert direction.abs().max() <= 1 / 8
    assert direction.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02), "uniform, not normal"
    assert (head.last_layer.weight_g == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_features_give_zero_scores_in_every_precision(dtype: torch.dtype) -> None:
    """In float16 the usual epsilon of 1e-12 would be 0, and the scores not numbers."""
    head = DINOHead(6, 20, hidden_dim=10, bottleneck_dim=4).to(dtype)
    scores = head(torch.zeros(3, 6, dtype=dtype))
    assert scores.dtype == dtype and not scores.any()


def test_the_epsilon_of_half_precision_does_not_reach_single_precision() -> None:
    head = DINOHead(4, 20, nlayers=1, bottleneck_dim=4)
    nn.init.eye_(head.mlp.weight)
    x = torch.randn(3, 4)
    torch.testing.assert_close(head(x * 1e-8), head(x))
