"""Patch embedding: every patch through one linear map, row by row, for any multiple of the patch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dinov2.layers import PatchEmbed


def test_patches_go_through_one_linear_map_row_by_row() -> None:
    embed = PatchEmbed(img_size=8, patch_size=2, in_chans=3, embed_dim=5).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    weight = embed.proj.weight.flatten(1)
    patches = [x[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(0, 4, 2) for j in range(0, 6, 2)]
    expected = torch.stack([patch @ weight.T + embed.proj.bias for patch in patches], dim=1)
    torch.testing.assert_close(embed(x), expected)


def test_the_grid_can_be_kept() -> None:
    embed = PatchEmbed(patch_size=2, embed_dim=5)
    grid = PatchEmbed(patch_size=2, embed_dim=5, flatten_embedding=False)
    grid.load_state_dict(embed.state_dict())
    x = torch.randn(2, 3, 4, 6)
    assert grid(x).shape == (2, 2, 3, 5)
    assert torch.equal(grid(x).flatten(1, 2), embed(x))


def test_norm_acts_on_each_patch() -> None:
    embed = PatchEmbed(patch_size=2, embed_dim=5, norm_layer=nn.LayerNorm)
    torch.testing.assert_close(embed(torch.randn(2, 3, 4, 6)).mean(dim=-1), torch.zeros(2, 6), atol=1e-5, rtol=0)


def test_patches_need_not_be_square() -> None:
    embed = PatchEmbed(img_size=(8, 9), patch_size=(2, 3), embed_dim=5)
    assert embed.patches_resolution == (4, 3)
    assert embed(torch.randn(1, 3, 8, 9)).shape == (1, 12, 5)


def test_published_attributes() -> None:
    embed = PatchEmbed(img_size=(28, 42), patch_size=14, embed_dim=5)
    assert (embed.img_size, embed.patch_size) == ((28, 42), (14, 14))
    assert (embed.patches_resolution, embed.num_patches) == ((2, 3), 6)


@pytest.mark.parametrize(("height", "width", "side"), [(15, 28, "height 15"), (28, 29, "width 29")])
def test_a_side_that_is_no_multiple_is_named(height: int, width: int, side: str) -> None:
    with pytest.raises(ValueError, match=f"{side} is not a multiple of patch .* 14"):
        PatchEmbed(patch_size=14)(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 28, 28), r"not \(3, 28, 28\); one image needs a batch dimension: image.unsqueeze\(0\)"),
        (torch.zeros(28, 28), r"images are \(B, 3, H, W\), not \(28, 28\)$"),
        (torch.zeros(1, 2, 3, 28, 28), r"images are \(B, 3, H, W\), not \(1, 2, 3, 28, 28\)$"),
        (torch.zeros(2, 1, 28, 28), r"images \(2, 1, 28, 28\) have 1 channels, but this model takes 3: "),
        (torch.zeros(2, 28, 28, 3), r"images \(2, 28, 28, 3\) have 28 channels, but this model takes 3: "),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), "floating-point numbers after normalization, not torch.uint8"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.int64), "floating-point numbers after normalization, not torch.int64"),
        (np.zeros((2, 3, 28, 28), dtype=np.float32), r"images are a tensor \(B, 3, H, W\), not ndarray"),
        ([torch.zeros(3, 28, 28)], r"images are a tensor \(B, 3, H, W\), not list"),
    ],
)
def test_invalid_images_are_rejected_with_a_clear_error(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchEmbed(img_size=28, patch_size=14, embed_dim=8)(images)


@pytest.mark.parametrize("proj", [nn.Conv2d(4, 5, 14, 14), nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 5, 14, 14))])
def test_a_projection_of_other_channels_can_be_put_in_place(proj: nn.Module) -> None:
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=5)
    embed.proj = proj
    assert embed(torch.zeros(2, 4, 28, 28)).shape == (2, 4, 5)


def test_the_channels_of_a_projection_put_in_place_are_named() -> None:
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=5)
    embed.proj = nn.Conv2d(4, 5, 14, 14)
    with pytest.raises(ValueError, match="have 3 channels, but this model takes 4"):
        embed(torch.zeros(2, 3, 28, 28))
