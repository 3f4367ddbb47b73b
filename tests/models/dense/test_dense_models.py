"""Segmenters and depth estimators: padding, resizing, clamping, gradients, and the published methods."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from dinov2.models.dense import (
    Depther,
    DPTDepthHead,
    LinearDepthHead,
    SegmentationHead,
    Segmenter,
    predict_depth,
    slide,
)
from dinov2.models.vision_transformer import DinoVisionTransformer

PATCH = 4
SIZE = (11, 14)  # padded to 12 x 16: one row below, one column on each side


@pytest.fixture
def backbone() -> DinoVisionTransformer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2, "num_register_tokens": 2}
    return DinoVisionTransformer(img_size=16, patch_size=PATCH, pos_embed_std=0.5, init_std=0.3, **settings).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def segmenter_of(backbone: DinoVisionTransformer, **options: Any) -> Segmenter:
    return Segmenter(backbone, SegmentationHead(32, 5), blocks=(1, 3), norm=True, **options).eval()


def depther_of(backbone: DinoVisionTransformer, **options: Any) -> Depther:
    head = LinearDepthHead(128, min_depth=1, max_depth=9)
    nn.init.normal_(head.conv_depth.weight)
    return Depther(backbone, head, blocks=range(4), norm=False, **options).eval()


class Coordinates(nn.Module):
    """A head whose maps are the row and the column of each token, in patches."""

    min_depth, max_depth = -100.0, 100.0

    def forward(self, layers: Any) -> Tensor:
        height, width = layers[0][0].shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([rows, columns]).float().expand(len(layers[0][0]), -1, -1, -1)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_features_are_those_of_the_blocks_of_the_padded_image(
    backbone: DinoVisionTransformer, images: Tensor, norm: bool
) -> None:
    model = Segmenter(backbone, nn.Identity(), blocks=(1, 3), norm=norm)
    tokens = backbone.prepare_tokens_with_masks(pad(images, (1, 1, 0, 1)))
    expected = []
    for index, block in enumerate(backbone.blocks):
        tokens = block(tokens)
        if index in (1, 3):
            expected.append(backbone.norm(tokens) if norm else tokens)
    for (patches, class_token), output in zip(model.features(images), expected, strict=True):
        assert patches.shape == (2, 16, 3, 4)
        torch.testing.assert_close(class_token, output[:, 0])
        torch.testing.assert_close(patches.flatten(2).transpose(1, 2), output[:, 3:])


@torch.no_grad()
def test_by_default_the_padding_is_squeezed_into_the_image_as_published(
    backbone: DinoVisionTransformer, images: Tensor
) -> None:
    model = segmenter_of(backbone)
    on_grid = model.decode_head(model.features(images))
    expected = interpolate(on_grid, size=SIZE, mode="bilinear", align_corners=False)
    assert torch.equal(model(images), expected)
    other = interpolate(on_grid, size=(30, 20), mode="bilinear", align_corners=False)
    assert torch.equal(model(images, (30, 20)), other)


@torch.no_grad()
def test_cut_padding_puts_every_pixel_on_its_patch(backbone: DinoVisionTransformer, images: Tensor) -> None:
    """The center of a patch has the coordinates of its token exactly, unlike when the padding is squeezed."""
    cut = Segmenter(backbone, Coordinates(), blocks=(3,), norm=True, cut_padding=True)(images)
    squeezed = Segmenter(backbone, Coordinates(), blocks=(3,), norm=True)(images)
    assert cut.shape == squeezed.shape == (2, 2, *SIZE)
    # Pixels 1 and 2 of a patch of 4 lie at -1/8 and +1/8 from its center. One column of padding is on the left.
    assert cut[0, 0, [5, 6], 0].tolist() == pytest.approx([1 - 1 / 8, 1 + 1 / 8])
    assert cut[0, 1, 0, [4, 5]].tolist() == pytest.approx([1 - 1 / 8, 1 + 1 / 8])
    assert (squeezed - cut).abs().max() > 0.1


@torch.no_grad()
def test_both_ways_agree_where_nothing_is_padded(backbone: DinoVisionTransformer) -> None:
    images = torch.randn(1, 3, 8, 12)
    one, two = segmenter_of(backbone), segmenter_of(backbone, cut_padding=True)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(images), two(images))


@torch.no_grad()
def test_depth_is_clamped_to_the_range_of_the_head_before_it_is_resized(
    backbone: DinoVisionTransformer, images: Tensor
) -> None:
    head = DPTDepthHead(16, channels=8, min_depth=0.5, max_depth=0.8)
    head.conv_depth.head[4].weight.fill_(3)  # the features before it are positive
    model = Depther(backbone, head, blocks=range(4), norm=False)
    raw = head(model.features(images))
    assert raw.max() > 0.8
    expected = interpolate(raw.clamp(0.5, 0.8), size=SIZE, mode="bilinear", align_corners=False)
    assert torch.equal(model(images), expected)
    assert torch.equal(model.encode_decode(images, rescale=False), raw.clamp(0.5, 0.8))


def test_gradients_reach_a_backbone_that_needs_them(backbone: DinoVisionTransformer, images: Tensor) -> None:
    for model in (segmenter_of(backbone), depther_of(backbone)):
        model.zero_grad()
        model(images).square().mean().backward()
        assert backbone.patch_embed.proj.weight.grad.abs().sum() > 0
        assert model.decode_head.state_dict(keep_vars=True)[next(iter(model.decode_head.state_dict()))].grad is not None


def test_a_frozen_backbone_gets_no_gradient_and_stays_in_evaluation_mode(
    backbone: DinoVisionTransformer, images: Tensor
) -> None:
    model = segmenter_of(backbone).train()
    assert backbone.training
    backbone.requires_grad_(False)
    model.train()
    assert not backbone.training
    assert model.decode_head.training
    model(images).mean().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert model.decode_head.conv_seg.weight.grad is not None


def test_parameters_have_the_published_prefixes(backbone: DinoVisionTransformer) -> None:
    names = {name.partition(".")[0] for name in depther_of(backbone).state_dict()}
    assert names == {"backbone", "decode_head"}


# --- The published methods of depth estimators -----------------------------------------------------------------------


@torch.no_grad()
def test_published_methods_agree_with_the_call(backbone: DinoVisionTransformer, images: Tensor) -> None:
    model = depther_of(backbone)
    depth = model(images)
    assert depth.shape == (2, 1, *SIZE)
    assert torch.equal(model.whole_inference(images, img_meta=None, rescale=True), depth)
    assert torch.equal(model.encode_decode(images), depth)
    assert torch.equal(model.inference(images), depth)
    assert torch.equal(model.whole_inference(images, None, True, (20, 30)), model(images, (20, 30)))
    arrays = model.simple_test(images)
    assert len(arrays) == 2
    assert torch.equal(torch.from_numpy(arrays[1]), depth[1])


@torch.no_grad()
def test_flipped_images_are_flipped_back(backbone: DinoVisionTransformer, images: Tensor) -> None:
    model = depther_of(backbone)
    flips = [{"flip": True, "flip_direction": "horizontal"}] * 2
    assert torch.equal(model.inference(images.flip(-1), flips), model(images.flip(-1)).flip(-1))
    upright = [{"flip": True, "flip_direction": "vertical"}] * 2
    assert torch.equal(model.inference(images.flip(-2), upright), model(images.flip(-2)).flip(-2))
    averaged = model.aug_test([images, images.flip(-1)], [None, flips])
    expected = predict_depth(model, images, mirror=True)
    assert torch.equal(torch.stack([torch.from_numpy(depth) for depth in averaged]), expected)
    with pytest.raises(ValueError, match="flipped one way"):
        model.inference(images, [{"flip": True}, {"flip": False}])
    with pytest.raises(ValueError, match="2 versions of the images with 1 img_metas"):
        model.aug_test([images, images], [None])


@torch.no_grad()
def test_sliding_windows_need_no_arguments(backbone: DinoVisionTransformer, images: Tensor) -> None:
    model = depther_of(backbone)
    expected = slide(model, images, window=11, stride=7)  # the shorter side, and two thirds of it
    assert torch.equal(model.inference(images, mode="slide"), expected)
    given = model.inference(images, None, True, mode="slide", stride=(5, 6), crop_size=(8, 9))
    assert torch.equal(given, slide(model, images, window=(8, 9), stride=(5, 6)))
    assert not torch.equal(given, expected)


def test_wrong_requests_are_named(backbone: DinoVisionTransformer, images: Tensor) -> None:
    model = depther_of(backbone)
    with pytest.raises(ValueError, match="unknown mode of inference 'tiles'; known: whole, slide"):
        model.inference(images, mode="tiles")
    with pytest.raises(ValueError, match="mode='whole' has no stride"):
        model.inference(images, stride=4)
    with pytest.raises(ValueError, match="mode='slide' has no size"):
        model.inference(images, mode="slide", size=(4, 4))
    with pytest.raises(ValueError, match="rescale must be true"):
        model.slide_inference(images, rescale=False)
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\) floats, not \(3, 11, 14\)"):
        model(images[0])
    with pytest.raises(ValueError, match="torch.uint8"):
        model(images.to(torch.uint8))
    for blocks in ((3, 1), (1, 1), (0, 4), (-1,), ()):
        with pytest.raises(ValueError, match="increasing indices from 0 to 3"):
            Segmenter(backbone, nn.Identity(), blocks=blocks, norm=True)
