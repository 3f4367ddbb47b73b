"""What is carried over to a backbone with other patches, channels or registers gives features as close as possible."""

import logging

import pytest
import torch
from torch.nn import functional as F

from dinov2.models import build_model
from dinov2.models.carry_over import approximations
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_state


def vit(
    patch_size: int = 4, grid: int = 4, registers: int = 0, *, seed: int = 0, width: int = 32
) -> DinoVisionTransformer:  # noqa: E501
    torch.manual_seed(seed)
    model = build_model(
        "vit_small",
        embed_dim=width,
        depth=2,
        num_heads=2,
        patch_size=patch_size,
        img_size=grid * patch_size,
        num_register_tokens=registers,
        init_values=1.0,
    )
    return model.eval().requires_grad_(False)


def test_larger_patches_give_the_same_features_of_enlarged_patches(caplog: pytest.LogCaptureFixture) -> None:
    source, model = vit(4), load_state(vit(7, seed=1), vit(4).state_dict(), "SOURCE", carry_over=True)
    patches = torch.randn(6, 3, 4, 4)
    enlarged = F.interpolate(patches, size=(7, 7), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.patch_embed(enlarged), source.patch_embed(patches), rtol=1e-5, atol=1e-5)
    assert "patches of SOURCE have 4 x 4 pixels, this model's 7 x 7" in caplog.text
    assert approximations(source.state_dict(), model) == ["patch size 4 -> 7"]


def test_smaller_patches_give_the_nearest_features_in_the_mean_square() -> None:
    source = vit(7)
    model = load_state(vit(4, seed=1), source.state_dict(), "SOURCE", carry_over=True)
    patches = torch.randn(4000, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    reduced = F.interpolate(patches, size=(4, 4), mode="bilinear", antialias=True)
    bias = source.patch_embed.proj.bias
    wanted = source.patch_embed(patches)[:, 0] - bias
    # No other weights would be closer: the error over all directions of pixels has no component along them.
    directions = torch.eye(147).view(-1, 3, 7, 7)
    resized = F.interpolate(directions, size=(4, 4), mode="bilinear", antialias=True)
    residual = source.patch_embed(directions)[:, 0] - model.patch_embed(resized)[:, 0]
    torch.testing.assert_close(resized.flatten(1).T @ residual, torch.zeros(48, 32), rtol=0, atol=1e-5)
    assert (model.patch_embed(reduced)[:, 0] - bias - wanted).square().mean() < wanted.square().mean()


def test_new_registers_stay_initial_and_known_ones_are_kept() -> None:
    source, model = vit(registers=1), vit(registers=3, seed=1)
    initial = model.register_tokens.clone()
    load_state(model, source.state_dict(), "SOURCE", carry_over=True)
    assert torch.equal(model.register_tokens[:, :1], source.register_tokens)
    assert torch.equal(model.register_tokens[:, 1:], initial[:, 1:])
    assert approximations(source.state_dict(), model) == ["registers 1 -> 3"]


def test_everything_at_once_and_nothing_to_do() -> None:
    source, model = vit(4, grid=5), vit(7, grid=3, registers=2, seed=1)
    load_state(model, source.state_dict(), "SOURCE", carry_over=True)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert approximations(source.state_dict(), model) == ["patch size 4 -> 7", "registers 0 -> 2"]
    assert approximations(source.state_dict(), vit(4, grid=3)) == [], "positions are resampled, as for other images"


@pytest.mark.parametrize(
    ("source", "model", "name"),
    [
        ({"registers": 4}, {"registers": 2}, "register_tokens (file (1, 4, 32), model (1, 2, 32))"),
        ({"registers": 4}, {}, "unknown (1): register_tokens"),
        ({"width": 48}, {}, "patch_embed.proj.weight (file (48, 3, 4, 4), model (32, 3, 4, 4))"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(source: dict[str, int], model: dict[str, int], name: str) -> None:
    untouched = vit(**model, seed=1)
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_state(untouched, vit(**source).state_dict(), "SOURCE", carry_over=True)
    assert name in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in untouched.state_dict().items())


def test_patches_and_registers_are_carried_over_only_on_request(caplog: pytest.LogCaptureFixture) -> None:
    for model in (vit(7), vit(registers=2)):
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="do not fit this backbone"):
            load_state(model, vit(4).state_dict(), "SOURCE")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"grid": 7}, {"patch_size": 7}])
def test_weights_in_half_precision_are_not_rounded_again(dtype: torch.dtype, settings: dict[str, int]) -> None:
    state = {name: value.to(dtype) for name, value in vit().state_dict().items()}
    model = load_state(vit(**settings, seed=1), state, "SOURCE", carry_over=True)
    exact = {name: value.float() for name, value in state.items()}
    wanted = load_state(vit(**settings, seed=1), exact, "SOURCE", carry_over=True)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())
