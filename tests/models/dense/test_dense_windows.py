"""Sliding windows and test-time averaging against loops over pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinov2.models.dense import predict_depth, predict_probabilities, resize, slide, sliding_windows
from dinov2.models.dense.sliding_window import Window, visits

SIDES = st.integers(1, 40)


def two_maps(images: Tensor) -> Tensor:
    """Maps that depend on the position in the window and on its mean, so that each window has its own."""
    rows = torch.arange(images.shape[-2], dtype=images.dtype)[:, None]
    first = images[:, :1] * (rows + 1)
    return torch.cat([first, first.square() + images.mean(dim=(1, 2, 3), keepdim=True)], dim=1)


def naive_slide(images: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """One image after the other, windows by a loop over their top left corners, sums by a loop over pixels."""
    count, _, height, width = images.shape
    tall, wide = min(window[0], height), min(window[1], width)
    out = torch.zeros(count, 2, height, width, dtype=torch.float64)
    for image in range(count):
        number = torch.zeros(height, width, dtype=torch.float64)
        tops, lefts = [0], [0]
        while tops[-1] + tall < height:
            tops.append(min(tops[-1] + stride[0], height - tall))
        while lefts[-1] + wide < width:
            lefts.append(min(lefts[-1] + stride[1], width - wide))
        for top in tops:
            for left in lefts:
                maps = two_maps(images[image : image + 1, :, top : top + tall, left : left + wide])[0]
                for row in range(tall):
                    for column in range(wide):
                        out[image, :, top + row, left + column] += maps[:, row, column]
                        number[top + row, left + column] += 1
        out[image] /= number
    return out


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((11, 17), (5, 6), (3, 4)),
        ((11, 17), (5, 6), (5, 6)),  # without overlap, but for the last ones
        ((4, 17), (5, 6), (3, 4)),  # lower than the window
        ((4, 5), (6, 6), (3, 4)),  # smaller in both directions
        ((10, 12), (5, 6), (5, 6)),
        ((6, 6), (6, 6), (4, 4)),
    ],
)
def test_maps_are_the_mean_over_windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = naive_slide(images, window, stride)
    for at_once in (1, 3):
        ours = slide(two_maps, images, window=window, stride=stride, windows_at_once=at_once)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=50)
@given(height=SIDES, width=SIDES, window=st.integers(1, 20), part=st.floats(0, 1), squares=st.booleans())
def test_windows_cover_every_pixel_and_stay_inside(
    height: int, width: int, window: int, part: float, squares: bool
) -> None:
    stride = max(1, round(part * window))
    windows = sliding_windows((height, width), window=window, stride=stride, squares_if_smaller=squares)
    assert len(set(windows)) == len(windows)
    assert visits((height, width), windows).min() >= 1
    for place in windows:
        assert 0 <= place.top <= height - place.height
        assert 0 <= place.left <= width - place.width


def test_windows_by_hand() -> None:
    assert sliding_windows((512, 700), window=512, stride=341) == [Window(0, 0, 512, 512), Window(0, 188, 512, 512)]
    assert sliding_windows((512, 512), window=512, stride=341) == [Window(0, 0, 512, 512)]
    assert sliding_windows((3, 4), window=5, stride=5) == [Window(0, 0, 3, 4)]
    squares = sliding_windows((3, 4), window=5, stride=5, squares_if_smaller=True)
    assert squares == [Window(0, 0, 3, 3), Window(0, 1, 3, 3)]
    squares = sliding_windows((8, 2), window=9, stride=5, squares_if_smaller=True)  # the stride would leave gaps
    assert squares == [Window(top, 0, 2, 2) for top in (0, 2, 4, 6)]


def test_wrong_windows_and_maps_are_named() -> None:
    images = torch.zeros(1, 3, 9, 9)
    with pytest.raises(ValueError, match=r"with a stride of \(4, 4\), windows of \(3, 3\) leave pixels without any"):
        slide(two_maps, images, window=3, stride=4)
    with pytest.raises(ValueError, match="stride must be at least 1 pixel, not 0"):
        slide(two_maps, images, window=3, stride=0)
    with pytest.raises(ValueError, match=r"to maps of its size, \(1, C, 4, 4\), not \(1, 2, 2, 2\)"):
        slide(lambda x: two_maps(x)[..., :2, :2], images, window=4, stride=3)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(3, 9, 9\)"):
        slide(two_maps, images[0], window=4, stride=3)
    with pytest.raises(ValueError, match="windows_at_once must be at least 1, not 0"):
        slide(two_maps, images, window=4, stride=3, windows_at_once=0)


def test_half_precision_maps_are_summed_in_single_precision() -> None:
    def model(images: Tensor) -> Tensor:
        return torch.full_like(images[:, :1], 1 + 2**-7, dtype=torch.bfloat16)

    out = slide(model, torch.zeros(1, 3, 1, 64), window=(1, 33), stride=1)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full((1, 1, 1, 64), 1 + 2**-7))


def test_probabilities_are_the_mean_over_scales_and_mirror_images() -> None:
    images = [torch.randn(2, 3, 8, 10, dtype=torch.float64), torch.randn(2, 3, 12, 15, dtype=torch.float64)]
    size = (9, 13)
    parts = []
    for scaled in images:
        parts.append(resize(two_maps(scaled), size).softmax(1))
        mirrored = resize(two_maps(scaled.flip(3)), size).softmax(1)
        parts.append(torch.stack([mirrored[..., 12 - column] for column in range(13)], dim=-1))
    both = predict_probabilities(two_maps, images, size, mirror=True)
    torch.testing.assert_close(both, sum(parts) / 4, rtol=1e-12, atol=1e-12)
    one = predict_probabilities(two_maps, images[:1], size)
    torch.testing.assert_close(one, parts[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(both.sum(1), torch.ones(2, 9, 13, dtype=torch.float64))
    with pytest.raises(ValueError, match="no images to predict"):
        predict_probabilities(two_maps, [], size)


def test_depth_of_mirror_images_is_mirrored_back() -> None:
    def model(images: Tensor) -> Tensor:
        return images[:, :1] * torch.arange(4.0)

    images = torch.tensor([5.0, 6.0, 7.0, 8.0]).expand(1, 3, 1, 4)
    assert predict_depth(model, images).flatten().tolist() == [0, 6, 14, 24]
    # mirrored: [8, 7, 6, 5] * [0, 1, 2, 3] = [0, 7, 12, 15], and back [15, 12, 7, 0]
    assert predict_depth(model, images, mirror=True).flatten().tolist() == [7.5, 9, 10.5, 12]
