"""Sheets of features: what is drawn is what was computed, for any number of images and heads."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from dinov2.analysis.pca import pca_colors
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.models import build_model
from dinov2.visualization.feature_maps import image_attention, image_tokens
from dinov2.visualization.figures import attention_sheet, neighbors_sheet, pca_sheet, similarity_sheet
from dinov2.visualization.inputs import LoadedImage


def backbone(num_heads: int = 2) -> FrozenBackbone:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 6 * num_heads, "depth": 1, "init_std": 0.3}
    return FrozenBackbone(build_model("vit_small", num_heads=num_heads, **sizes).eval(), "tiny")


def images(count: int, width: int = 32, height: int = 32) -> list[LoadedImage]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
    return [LoadedImage(f"{number}.png", f"{number}.png", image) for number, image in enumerate(images)]


@pytest.mark.parametrize("count", [1, 5, 13, 25])
def test_components_of_any_number_of_images_are_those_of_all_patches(count: int) -> None:
    drawn = pca_sheet(backbone(), images(count), shorter_side=None)
    tokens = torch.stack(image_tokens(backbone(), [image.image for image in images(count)]))
    expected = pca_colors(tokens)
    np.testing.assert_allclose(np.stack(drawn.arrays["colors"]), expected.numpy(), atol=1e-5)
    on_sheet = {tuple(color) for _, color in drawn.sheet.getcolors(10**7)}
    wanted = {tuple(color) for color in (expected * 255).round().flatten(0, 2).int().tolist()}
    assert len(wanted - on_sheet) <= 0.02 * len(wanted)


@pytest.mark.parametrize(("num_heads", "lines"), [(2, 1), (6, 1), (7, 2), (13, 3)])
def test_every_head_has_a_cell_and_lines_hold_six(num_heads: int, lines: int) -> None:
    drawn = attention_sheet(backbone(num_heads), images(1), shorter_side=32)
    (attention,) = image_attention(backbone(num_heads), [images(1)[0].image])
    np.testing.assert_allclose(drawn.arrays["attention"][0], attention.numpy(), atol=1e-6)
    assert drawn.sheet.height // 180 == lines


def test_similarity_is_to_the_patch_at_the_point_and_drawn_in_a_row_each() -> None:
    drawn = similarity_sheet(backbone(), images(2), ["12,12", "0.9,0.1"], shorter_side=None)
    one, other = image_tokens(backbone(), [image.image for image in images(2)])
    own, others = drawn.arrays["similarity"]
    assert own.shape == others.shape == (2, 4, 4)
    assert own[0, 1, 1] == pytest.approx(1) and own[1, 0, 3] == pytest.approx(1)
    np.testing.assert_allclose(others[1], functional.cosine_similarity(other, one[0, 3], dim=-1), atol=1e-5)
    assert drawn.sheet.height > 2 * 400


def test_many_neighbors_take_more_lines_and_not_more_width() -> None:
    query, *others = images(36)
    ten, many = (neighbors_sheet("tiny", [(query, [(other, 0.5) for other in others[:k]])]) for k in (10, 35))
    assert many.width == ten.width < 2000
    assert many.height > ten.height + 3 * 160
