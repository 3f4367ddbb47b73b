"""Feature maps: patches are in place, attention is that of the model, similarity is the cosine."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dinov2.analysis.pca import pca_colors
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.extract.preprocessing import input_size
from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.visualization import feature_maps

PATCH = 3


def tiny_vit(**options: object) -> DinoVisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return build_model("vit_small", **sizes | options).eval()


def object_on_background(left: int, top: int) -> Tensor:
    """(3, 24, 24): a pattern of 4 x 4 patches with its corner at patch (left, top), on gray."""
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(3, 24, 24)
    side = 4 * PATCH
    pattern = torch.randn(3, side, side, generator=generator)
    image[:, top * PATCH : top * PATCH + side, left * PATCH : left * PATCH + side] = pattern
    return image


def gradient(width: int, height: int) -> Image.Image:
    red, green = Image.linear_gradient("L").resize((width, height)), Image.radial_gradient("L").resize((width, height))
    return Image.merge("RGB", (red, green, red.rotate(180)))


# --- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shorter_side", "expected"),
    [
        ((640, 480), 448, (602, 448)),  # 597.3 is nearest to 43 patches of 14
        ((480, 640), 448, (448, 602)),
        ((28, 28), None, (28, 28)),
        ((30, 40), None, (28, 42)),
        ((1000, 3), 14, (4662, 14)),
        ((5, 5), None, (14, 14)),
    ],
)
def test_images_keep_their_proportions_up_to_half_a_patch(
    size: tuple[int, int], shorter_side: int | None, expected: tuple[int, int]
) -> None:
    assert input_size(size, shorter_side, 14) == expected


def test_changes_of_sizes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        feature_maps.log_sizes([((30, 40), (28, 42))] * 3 + [((28, 28), (28, 28))], 14)
        feature_maps.log_sizes([((28, 28), (28, 28))], 14)
    assert caplog.messages == ["resized to multiples of the patch (14 pixels): 30 x 40 to 28 x 42"]


# --- Patch tokens ----------------------------------------------------------------------------------------------------


def test_shifted_views_of_one_object_get_matching_colors() -> None:
    views = torch.stack([object_on_background(0, 1), object_on_background(3, 4)])
    colors = pca_colors(feature_maps.patch_tokens(tiny_vit(), views))
    one, other = colors[0, 1:5, 0:4], colors[1, 4:8, 3:7]
    assert (one - other).abs().mean() < 0.1 * one.flatten(0, 1).std(dim=0).mean()


def test_patches_are_in_place_and_registers_are_not_drawn() -> None:
    model = tiny_vit(num_register_tokens=4)
    images = torch.randn(3, 3, 12, 18)
    tokens = feature_maps.patch_tokens(model, images, batch_size=2)
    with torch.no_grad():
        expected = model.forward_features(images)["x_norm_patchtokens"]
    assert tokens.shape == (3, 4, 6, 32)
    torch.testing.assert_close(tokens.flatten(1, 2), expected)


def test_shifts_put_more_tokens_between_the_plain_ones() -> None:
    model, images = tiny_vit(), torch.randn(2, 3, 24, 24)
    finer = feature_maps.patch_tokens(model, images, shifts=3)
    assert finer.shape == (2, 24, 24, 32)
    torch.testing.assert_close(finer[:, 1::3, 1::3], feature_maps.patch_tokens(model, images))


def test_a_shifted_token_is_where_the_patch_is_that_it_saw() -> None:
    model = tiny_vit()
    image = torch.zeros(1, 3, 24, 24)
    image[..., 10, 13] = 50.0
    tokens = [feature_maps.patch_tokens(model, part, shifts=3) for part in (image, 0 * image)]
    change = (tokens[0] - tokens[1])[0].norm(dim=-1)
    rows, columns = (change > 0.5 * change.max()).nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 11, 12, 14)


def test_shifts_that_do_not_divide_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="shifts = 2 must divide the patch size 3"):
        feature_maps.patch_tokens(tiny_vit(), torch.zeros(1, 3, 24, 24), shifts=2)


def test_images_of_different_sizes_give_what_each_gives_alone() -> None:
    backbone = FrozenBackbone(tiny_vit(), "tiny")
    images = [gradient(24, 24), gradient(30, 12), gradient(12, 30), gradient(12, 30), gradient(24, 24)]
    together = feature_maps.image_tokens(backbone, images)
    assert [grid.shape[:2] for grid in together] == [(8, 8), (4, 10), (10, 4), (10, 4), (8, 8)]
    for image, tokens in zip(images, together, strict=True):
        torch.testing.assert_close(tokens, feature_maps.image_tokens(backbone, [image])[0])


# --- Attention -------------------------------------------------------------------------------------------------------


def naive_attention(attention: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, H, N, N) and output (B, N, D) of an attention layer, head by head."""
    width = x.shape[-1] // attention.num_heads
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    weights, outputs = [], []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights.append((query[..., part] @ key[..., part].mT / width**0.5).softmax(dim=-1))
        outputs.append(weights[-1] @ value[..., part])
    return torch.stack(weights, dim=1), attention.proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("registers", [0, 3])
def test_attention_is_that_of_the_last_block(registers: int) -> None:
    model, images = tiny_vit(num_register_tokens=registers), torch.randn(2, 3, 12, 18)
    last, seen = model.blocks[-1].attn, {}
    hook = last.register_forward_hook(lambda _, inputs, output: seen.update(input=inputs[0], output=output))
    with torch.no_grad():
        model(images)
        hook.remove()
        weights, output = naive_attention(last, seen["input"])
    torch.testing.assert_close(output, seen["output"])  # the loop above computes what the model does
    drawn = feature_maps.class_attention(model, images)
    assert drawn.shape == (2, 2, 4, 6)
    torch.testing.assert_close(drawn.flatten(2), weights[:, :, 0, 1 + registers :])
    assert (drawn.sum(dim=(2, 3)) < 1).all()


def test_attention_leaves_no_hook() -> None:
    model = tiny_vit()
    feature_maps.class_attention(model, torch.randn(1, 3, 12, 12))
    with pytest.raises(ValueError, match="not a multiple"):
        feature_maps.class_attention(model, torch.randn(1, 3, 13, 12))
    assert not model.blocks[-1].attn.qkv._forward_hooks


# --- Similarities ----------------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine_to_the_chosen_patch() -> None:
    tokens = [torch.randn(4, 5, 8), torch.randn(2, 3, 8)]
    own, other = feature_maps.similarity_maps(tokens, 0, (2, 1))
    assert own.shape == (4, 5) and other.shape == (2, 3)
    torch.testing.assert_close(own[2, 1], torch.tensor(1.0))
    torch.testing.assert_close(other[1, 2], functional.cosine_similarity(tokens[0][2, 1], tokens[1][1, 2], dim=0))


@pytest.mark.parametrize(
    ("point", "cell"),
    [
        ("0,0", (0, 0)),
        ("79,39", (3, 7)),
        ("35,12", (1, 3)),
        ("1,1", (0, 0)),
        ("0.5,0.5", (2, 4)),
        ("1.0,1.0", (3, 7)),
        ("0.0,0.9", (3, 0)),
    ],
)
def test_points_in_pixels_or_fractions_are_found_in_the_grid(point: str, cell: tuple[int, int]) -> None:
    assert feature_maps.cell_at(feature_maps.parse_point(point, (80, 40)), (4, 8)) == cell


@pytest.mark.parametrize("point", ["80,0", "0,40", "-1,3", "1.5,0.5", "-0.1,0.5", "35.0,12.0"])
def test_points_outside_are_refused(point: str) -> None:
    with pytest.raises(ValueError, match=f"the point {point} is outside the image of 80 x 40 pixels"):
        feature_maps.parse_point(point, (80, 40))


@pytest.mark.parametrize("point", ["middle", "3", "1,2,3", "x,y", "", "0.5,30", "1,0.5", "nan,nan", "1e1,2"])
def test_what_is_no_point_is_refused(point: str) -> None:
    with pytest.raises(ValueError, match="a point is x,y in pixels"):
        feature_maps.parse_point(point, (80, 40))
