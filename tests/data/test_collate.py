"""A batch holds the crops crop by crop, and masks that are the recorded ones and keep their bounds."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast, draw_masks
from dinov2.data.masking import MaskingGenerator, published_max_num_patches

# Recorded from the reference for seed 7: 4 images of 70 x 70, patches of 14, half of the crops masked.
RECORDED_MASKS = """
##...####...##...##.#....
.........................
.........................
.........................
...............####.####.
.####....................
....................###..
.........................
"""


def samples(num_images: int, num_local: int = 3) -> list[MultiCrop]:
    """Crop c of image i is filled with 10 * i + c."""
    return [
        MultiCrop(
            (torch.full((3, 4, 4), 10.0 * i), torch.full((3, 4, 4), 10.0 * i + 1)),
            tuple(torch.full((3, 2, 2), 10.0 * i + c) for c in range(num_local)),
        )
        for i in range(num_images)
    ]


def collate(crops: list[MultiCrop], grid: int = 5, seed: int = 7, **changes: Any) -> Batch:
    settings: dict[str, Any] = {
        "mask_ratio_tuple": (0.1, 0.5),
        "mask_probability": 0.5,
        "dtype": torch.float32,
        "n_tokens": grid**2,
        "mask_generator": MaskingGenerator(grid, max_num_patches=published_max_num_patches(14 * grid, 14)),
        "rng": random.Random(seed),
    }
    return collate_data_and_cast(crops, **(settings | changes))


def test_masks_are_the_recorded_ones() -> None:
    batch = collate(samples(4))
    rows = ["".join(".#"[patch] for patch in mask) for mask in batch.masks.tolist()]
    assert rows == RECORDED_MASKS.split()
    assert batch.upperbound == 34


def test_rows_are_crop_major() -> None:
    batch = collate(samples(4))
    assert batch.global_crops.shape == (8, 3, 4, 4) and batch.local_crops.shape == (12, 3, 2, 2)
    assert batch.global_crops[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 1, 11, 21, 31]
    assert batch.local_crops[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 1, 11, 21, 31, 2, 12, 22, 32]


def test_index_and_weight_follow_from_the_masks() -> None:
    batch = collate(samples(4))
    rows = batch.masks.tolist()
    masked = [(row, patch) for row, mask in enumerate(rows) for patch, on in enumerate(mask) if on]
    assert batch.mask_index.tolist() == [row * 25 + patch for row, patch in masked]
    assert batch.mask_weight.tolist() == pytest.approx([1 / sum(rows[row]) for row, _ in masked])
    assert batch.mask_index.dtype == torch.int64 and batch.mask_weight.dtype == torch.float32
    assert batch.mask_weight.sum().item() == pytest.approx(4.0)  # as many as there are masked crops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_crops_are_cast_and_weights_are_not(dtype: torch.dtype) -> None:
    batch = collate(samples(2), dtype=dtype)
    assert batch.global_crops.dtype == batch.local_crops.dtype == dtype
    assert batch.mask_weight.dtype == torch.float32


def test_no_local_crops_give_an_empty_tensor() -> None:
    batch = collate(samples(2, num_local=0))
    assert batch.local_crops.shape[:2] == (0, 3)
    assert batch.global_crops.shape == (4, 3, 4, 4)


def test_probability_0_masks_nothing() -> None:
    batch = collate(samples(3), mask_probability=0.0)
    assert not batch.masks.any() and batch.masks.shape == (6, 25)
    assert batch.mask_index.shape == batch.mask_weight.shape == (0,)
    assert batch.upperbound == 0


@pytest.mark.parametrize(
    "num_crops, probability, grid, expected",
    [(8, 0.5, 14, 273), (128, 0.5, 14, 3771), (64, 0.5, 16, 2496), (24, 0.5, 16, 967), (16, 0.5, 14, 507)],
)
def test_upper_bound_of_known_settings(num_crops: int, probability: float, grid: int, expected: int) -> None:
    masks, upperbound = draw_masks(
        num_crops,
        (0.1, 0.5),
        probability,
        n_tokens=grid**2,
        mask_generator=MaskingGenerator(grid),
        rng=random.Random(0),
    )
    assert upperbound == expected
    assert masks.any(-1).sum() == int(num_crops * probability)


@given(
    num_crops=st.integers(1, 20),
    ratios=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)).map(sorted),
    probability=st.floats(0, 1),
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    seed=st.integers(0, 2**32),
)
def test_masked_patches_stay_under_the_bound_which_does_not_depend_on_chance(
    num_crops: int, ratios: list[float], probability: float, height: int, width: int, seed: int
) -> None:
    def draw(seed: int) -> tuple[torch.Tensor, int]:
        return draw_masks(
            num_crops,
            (ratios[0], ratios[1]),
            probability,
            n_tokens=height * width,
            mask_generator=MaskingGenerator((height, width)),
            rng=random.Random(seed),
        )

    masks, upperbound = draw(seed)
    assert masks.shape == (num_crops, height * width)
    assert masks.sum() <= upperbound == draw(seed + 1)[1]
    assert masks.any(-1).sum() <= int(num_crops * probability)
