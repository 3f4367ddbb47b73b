"""Symmetric zero padding to whole patches, and its inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2.models.dense.padding import CenterPadding, center_cut, center_pad, padded_size

SIDES = st.integers(1, 60)


def test_an_odd_zero_goes_below_and_to_the_right() -> None:
    padded = center_pad(torch.ones(1, 1, 2, 3), 5)
    expected = torch.zeros(5, 5)
    expected[1:3, 1:4] = 1  # 3 missing rows: one above, two below; 2 missing columns: one on each side
    assert torch.equal(padded[0, 0], expected)


@given(height=SIDES, width=SIDES, multiple=st.integers(1, 16))
def test_padding_is_symmetric_minimal_and_can_be_cut_off(height: int, width: int, multiple: int) -> None:
    images = torch.rand(2, 1, height, width) + 1
    padded = center_pad(images, multiple)
    assert tuple(padded.shape[-2:]) == padded_size((height, width), multiple)
    for side, grown in zip((height, width), padded.shape[-2:], strict=True):
        assert grown % multiple == 0
        assert 0 <= grown - side < multiple
    assert torch.equal(center_cut(padded, (height, width), multiple), images)
    assert padded.sum() == pytest.approx(images.sum().item(), rel=1e-5)


def test_whole_patches_are_returned_as_they_are() -> None:
    images = torch.rand(1, 3, 28, 42)
    assert center_pad(images, 14) is images
    assert torch.equal(CenterPadding(14)(images[..., :27]), center_pad(images[..., :27], 14))


def test_gradients_pass_through_the_padding() -> None:
    images = torch.rand(1, 1, 3, 3, requires_grad=True)
    (center_pad(images, 5) * 2).sum().backward()
    assert torch.equal(images.grad, torch.full_like(images, 2))


def test_impossible_requests_are_named() -> None:
    with pytest.raises(ValueError, match="a multiple of at least 1 pixel, not 0"):
        center_pad(torch.zeros(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match=r"maps of \(5, 5\) are not of an image of \(6, 2\), padded to \(10, 5\)"):
        center_cut(torch.zeros(1, 1, 5, 5), (6, 2), 5)
