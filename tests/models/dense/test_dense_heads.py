"""Segmentation and depth heads against loops over pixels in double precision, and values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.models.dense import DPTDepthHead, Layer, LinearDepthHead, SegmentationHead, last_blocks, spread_blocks
from dinov2.models.dense.linear_depth_head import depth_bins, expected_depth


def random_layers(count: int, width: int = 3, grid: tuple[int, int] = (2, 3), batch: int = 2) -> list[Layer]:
    shape = (batch, width, *grid)
    return [
        (torch.randn(shape, dtype=torch.float64), torch.randn(shape[:2], dtype=torch.float64)) for _ in range(count)
    ]


def randomize(head: torch.nn.Module) -> None:
    """Random values of all parameters and statistics, in double precision."""
    head.double()
    for name, value in head.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value))


# --- Segmentation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("use_class_token", [False, True])
def test_segmentation_logits_are_an_affine_map_of_each_token(use_class_token: bool) -> None:
    layers = random_layers(2)
    head = SegmentationHead(12 if use_class_token else 6, 4, use_class_token=use_class_token).eval()
    randomize(head)
    logits = head(layers)
    assert logits.shape == (2, 4, 2, 3)
    bn, conv = head.bn, head.conv_seg
    for image in range(2):
        for row in range(2):
            for column in range(3):
                token: list[Tensor] = []
                for patches, class_token in layers:
                    token.append(patches[image, :, row, column])
                    token += [class_token[image]] if use_class_token else []
                centered = (torch.cat(token) - bn.running_mean) / (bn.running_var + 1e-5).sqrt()
                expected = conv.weight[:, :, 0, 0] @ (centered * bn.weight + bn.bias) + conv.bias
                torch.testing.assert_close(logits[image, :, row, column], expected, rtol=1e-12, atol=1e-12)


def test_segmentation_head_has_the_released_names_and_the_published_start() -> None:
    head = SegmentationHead(512, 150, dropout=0.1)
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert set(head.state_dict()) == {f"bn.{name}" for name in names} | {"conv_seg.weight", "conv_seg.bias"}
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not head.conv_seg.bias.any()


def test_dropout_drops_whole_channels_and_only_in_training() -> None:
    torch.manual_seed(0)
    head = SegmentationHead(40, 2, dropout=0.5)
    seen = []
    head.bn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layers = [(torch.ones(1, 40, 3, 3), torch.ones(1, 40))]
    head(layers)
    head.eval()(layers)
    values = seen[0][0].flatten(1)
    assert ((values == 0).all(1) | (values == 2).all(1)).all()
    assert 0 < (values == 0).sum() < values.numel()
    assert torch.equal(seen[1], layers[0][0])


def test_layers_that_do_not_fit_are_named() -> None:
    layers = random_layers(2)
    with pytest.raises(ValueError, match="expects 3 channels, not 2 layers of width 3, 3 without class tokens"):
        SegmentationHead(3, 4)(layers)
    with pytest.raises(ValueError, match="expects 6 channels, not 2 layers of width 3, 3 with class tokens"):
        LinearDepthHead(6)(layers)
    with pytest.raises(ValueError, match=r"reads 4 layers of width 16, not of widths \[3, 3\]"):
        DPTDepthHead(16, channels=4)(layers)
    with pytest.raises(ValueError, match="no layers are given"):
        SegmentationHead(3, 4)([])
    with pytest.raises(ValueError, match="needs channels and classes, not 3 and 0"):
        SegmentationHead(3, 0)


# --- Linear depth ----------------------------------------------------------------------------------------------------


def test_bins_by_hand() -> None:
    assert depth_bins(1, 9, 5).tolist() == [1, 3, 5, 7, 9]
    torch.testing.assert_close(depth_bins(1, 16, 5, "log"), torch.tensor([1.0, 2, 4, 8, 16]))
    bins = LinearDepthHead(2).bins()
    assert len(bins) == 256
    assert bins[[0, -1]].tolist() == pytest.approx([0.001, 80])


def test_expectation_by_hand() -> None:
    logits = torch.tensor([-5.0, 0.3, 0.5]).reshape(1, 3, 1, 1)
    bins = torch.tensor([1.0, 2, 4])
    # weights .1, .4, .6, of 1.1 in all
    assert expected_depth(logits, bins).item() == pytest.approx((0.1 + 0.8 + 2.4) / 1.1)
    exponentials = [math.exp(-5), math.exp(0.3), math.exp(0.5)]
    softmax = (exponentials[0] + 2 * exponentials[1] + 4 * exponentials[2]) / sum(exponentials)
    assert expected_depth(logits, bins, "softmax").item() == pytest.approx(softmax)
    sigmoids = [1 / (1 + math.exp(-value)) for value in (-5, 0.3, 0.5)]
    sigmoid = (sigmoids[0] + 2 * sigmoids[1] + 4 * sigmoids[2]) / sum(sigmoids)
    assert expected_depth(logits, bins, "sigmoid").item() == pytest.approx(sigmoid)
    assert expected_depth(torch.full((1, 3, 1, 1), -1.0), bins).item() == pytest.approx(7 / 3)  # all negative


def naive_depth(head: LinearDepthHead, layers: list[Layer]) -> Tensor:
    """As the release: every layer with its class token is upsampled, then convolved pixel by pixel."""
    parts = []
    for patches, class_token in layers:
        tokens = torch.cat([patches, class_token[:, :, None, None].expand_as(patches)], dim=1)
        parts.append(interpolate(tokens, scale_factor=4, mode="bilinear", align_corners=False))
    features = torch.cat(parts, dim=1)
    bins = [head.min_depth + (head.max_depth - head.min_depth) * index / 255 for index in range(256)]
    out = torch.zeros(features.shape[0], 1, *features.shape[2:], dtype=torch.float64)
    for image in range(out.shape[0]):
        for row in range(out.shape[2]):
            for column in range(out.shape[3]):
                pixel = features[image, :, row, column]
                logits = (head.conv_depth.weight[:, :, 0, 0] @ pixel + head.conv_depth.bias).tolist()
                weights = [max(logit, 0) + 0.1 for logit in logits]
                depth = sum(weight * depth for weight, depth in zip(weights, bins, strict=True)) / sum(weights)
                out[image, 0, row, column] = depth
    return out


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
def test_linear_depth_is_that_of_upsampled_features(count: int) -> None:
    layers = random_layers(count)
    head = LinearDepthHead(6 * count, max_depth=10)
    randomize(head)
    torch.testing.assert_close(head(layers), naive_depth(head, layers), rtol=1e-11, atol=1e-11)


def test_linear_depth_stays_in_the_range_of_the_bins() -> None:
    head = LinearDepthHead(6, min_depth=2, max_depth=3)
    torch.nn.init.normal_(head.conv_depth.weight, std=100)
    depth = head([(torch.randn(2, 3, 4, 4) * 100, torch.randn(2, 3))])
    assert depth.shape == (2, 1, 16, 16)
    assert 2 <= depth.min() < depth.max() <= 3


@torch.no_grad()
def test_the_head_of_dinov3_has_batch_norm_and_no_class_token() -> None:
    layers = random_layers(1)
    head = LinearDepthHead(3, use_class_token=False, upsample=1, batch_norm=True, num_bins=8, max_depth=10).eval()
    randomize(head)
    centered = (layers[0][0] - head.bn.running_mean[:, None, None]) / (head.bn.running_var + 1e-5).sqrt()[:, None, None]
    normalized = centered * head.bn.weight[:, None, None] + head.bn.bias[:, None, None]
    logits = torch.einsum("kc,bchw->bkhw", head.conv_depth.weight[:, :, 0, 0], normalized)
    expected = expected_depth(logits + head.conv_depth.bias[:, None, None], head.bins(logits))
    torch.testing.assert_close(head(layers), expected)
    assert head(layers).shape == (2, 1, 2, 3)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: LinearDepthHead(64, max_depth=10), lambda: DPTDepthHead(8, channels=8)])
def test_autocast_changes_depth_only_by_rounding(make: type) -> None:
    torch.manual_seed(0)
    head = make()
    layers = [(torch.randn(1, 8, 4, 4), torch.randn(1, 8)) for _ in range(4)]
    exact = head(layers)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(layers)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_wrong_options_are_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown norm 'max' .*; known: linear, softmax, sigmoid"):
        LinearDepthHead(2, norm="max")
    with pytest.raises(ValueError, match="unknown spacing 'SID' .*; known: uniform, log"):
        LinearDepthHead(2, spacing="SID")
    with pytest.raises(ValueError, match="0 < min < max in meters, not 10 to 1"):
        LinearDepthHead(2, min_depth=10, max_depth=1)
    with pytest.raises(ValueError, match="not 0 to 10"):
        DPTDepthHead(16, min_depth=0, max_depth=10)
    with pytest.raises(ValueError, match="num_bins=1"):
        LinearDepthHead(2, num_bins=1)
    with pytest.raises(ValueError, match="unknown readout 'sum' of a DPT head; known: project, add, ignore"):
        DPTDepthHead(16, readout="sum")
    with pytest.raises(ValueError, match=r"needs 4 maps, and channels: not \(0, 1, 2, 4\)"):
        DPTDepthHead(4)


# --- DPT -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dpt_depth_has_four_resolutions_and_a_lower_limit() -> None:
    torch.manual_seed(0)
    head = DPTDepthHead(16, channels=8, min_depth=0.5, max_depth=1)
    layers = random_layers(4, width=16, grid=(3, 5))
    head.double()
    maps = head.maps(layers)
    assert [tuple(image.shape[1:]) for image in maps] == [(8, 12, 20), (8, 6, 10), (8, 3, 5), (8, 2, 3)]
    head.conv_depth.head[4].bias.fill_(-100)  # the regression is negative everywhere
    assert torch.equal(head(layers), torch.full((2, 1, 64, 96), 0.5, dtype=torch.float64))
    head.conv_depth.head[4].bias.fill_(100)
    assert head(layers).min() > 1, "the head does not clamp"


@torch.no_grad()
def test_readouts_use_the_class_token_or_not() -> None:
    layers = random_layers(4, width=16)
    other = [(patches, class_token + 1) for patches, class_token in layers]
    for readout, used in (("project", True), ("add", True), ("ignore", False)):
        head = DPTDepthHead(16, channels=8, readout=readout).double()
        one, two = head.reassemble_blocks(layers), head.reassemble_blocks(other)
        assert all(torch.equal(a, b) != used for a, b in zip(one, two, strict=True)), readout
    added = [(patches + class_token[:, :, None, None], class_token) for patches, class_token in layers]
    head = DPTDepthHead(16, channels=8, readout="add").double()
    ignoring = DPTDepthHead(16, channels=8, readout="ignore").double()
    ignoring.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(layers), ignoring(added))


def test_every_parameter_of_a_dpt_head_gets_a_gradient() -> None:
    torch.manual_seed(0)
    head = DPTDepthHead(16, channels=8).double()
    head.conv_depth.head[4].bias.data.fill_(5)  # positive depth
    head(random_layers(4, width=16)).sum().backward()
    assert [name for name, value in head.named_parameters() if value.grad is None or not value.grad.any()] == []


# --- Blocks ----------------------------------------------------------------------------------------------------------


def test_published_blocks() -> None:
    assert spread_blocks(12) == (2, 5, 8, 11)
    assert spread_blocks(24) == (4, 11, 17, 23)
    assert spread_blocks(40) == (9, 19, 29, 39)
    assert last_blocks(12, 4) == (8, 9, 10, 11)
    assert last_blocks(12, 1) == (11,)
    with pytest.raises(ValueError, match="four blocks are needed, the backbone has 3"):
        spread_blocks(3)
    with pytest.raises(ValueError, match="5 last blocks requested of a backbone with 4"):
        last_blocks(4, 5)
