"""Masks: recorded ones are reproduced to the patch, and the promises of count and shape hold for any settings."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2.data.masking import MaskingGenerator, published_max_num_patches


def test_masks_of_a_4_by_4_grid_are_the_recorded_ones() -> None:
    """Recorded from the reference: three masks each of 0, 1, 3, 4, 5 and 8 patches; a hex digit is a row of 4."""
    generator, rng = MaskingGenerator(4, max_num_patches=8.0), random.Random(0)
    masks = [generator(target, rng=rng) for target in (0, 1, 3, 4, 5, 8) for _ in range(3)]
    rows = " ".join(np.packbits(mask).tobytes().hex() for mask in masks)
    assert rows == "0000 0000 0000 0400 0200 0000 2220 0e00 0222 4700 800e f000 0cc4 cc20 22e0 0bb3 6333 4ee4"


@pytest.mark.parametrize(
    "side, patch_size, seed, targets, digest",
    [
        (224, 14, 7, (0, 1, 3, 5, 25, 64, 94, 128), "ef5c8d7b970306744eef84a99ca296ab3e82afd4693a9a94f069c6c3fa7ec5ef"),
        (224, 16, 1, (0, 1, 3, 5, 19, 49, 72, 98), "7ee93c47f23596cab3bc637518700f9fc01b5f7fe740b44f9300abf550f287f7"),
    ],
)
def test_masks_of_real_grids_are_the_recorded_ones(
    side: int, patch_size: int, seed: int, targets: tuple[int, ...], digest: str
) -> None:
    """Recorded from the reference: three masks of each target; SHA-256 of their bits."""
    generator = MaskingGenerator(side // patch_size, max_num_patches=published_max_num_patches(side, patch_size))
    rng = random.Random(seed)
    masks = np.stack([generator(target, rng=rng) for target in targets for _ in range(3)])
    assert hashlib.sha256(np.packbits(masks).tobytes()).hexdigest() == digest


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    share=st.floats(0, 1),
    smallest=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_a_mask_never_has_more_patches_than_requested(
    height: int, width: int, share: float, smallest: int, seed: int
) -> None:
    target = int(share * height * width)
    mask = MaskingGenerator((height, width), min_num_patches=smallest)(target, rng=random.Random(seed))
    assert mask.shape == (height, width) and mask.dtype == bool
    assert mask.sum() <= target


def test_masks_come_from_the_generator_given_and_from_nothing_else() -> None:
    masking = MaskingGenerator(14)
    first = masking(60, rng=random.Random(3))
    assert np.array_equal(first, masking(60, rng=random.Random(3)))
    assert not np.array_equal(first, masking(60, rng=random.Random(4)))


@pytest.mark.parametrize(
    "side, patch_size, expected", [(224, 16, 98.0), (224, 14, 128.0), (518, 14, 666.0), (56, 14, 8.0)]
)
def test_published_limit_of_a_rectangle(side: int, patch_size: int, expected: float) -> None:
    assert published_max_num_patches(side, patch_size) == expected


def test_without_a_limit_it_is_half_of_the_grid() -> None:
    assert MaskingGenerator(37).max_num_patches == 684
    assert MaskingGenerator(37, num_masking_patches=100).max_num_patches == 100
    assert MaskingGenerator(37, num_masking_patches=100, max_num_patches=50).max_num_patches == 50


def test_the_generator_can_be_printed_and_knows_its_grid() -> None:
    assert "14 x 10" in repr(MaskingGenerator((14, 10)))
    assert MaskingGenerator((14, 10)).get_shape() == (14, 10)
