"""The crops that the device cuts from whole images are those of the workers."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2.data import device_augment
from dinov2.data.augment import DataAugmentationDINO
from dinov2.data.collate import Batch
from dinov2.data.device_augment import DeviceAugmentation, make_crops, pack_raw_batch

LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # crops keep their levels
EMPTY = Batch(*[torch.empty(0)] * 5, upperbound=0)
SIZES = [(60, 45), (31, 80), (7, 5), (64, 64), (1, 1)]


def images(sizes: list[tuple[int, int]] = SIZES) -> list[Image.Image]:
    """Smooth colors with noise, each of its own."""
    made = []
    for seed, (width, height) in enumerate(sizes):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))
        made.append(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))
    return made


def both(augmentation: DataAugmentationDINO, images: list[Image.Image], seed: int = 0) -> tuple[list[Tensor], Batch]:
    """Crops of the workers, (C) x (B, 3, S, S), and those that `cut` makes of the same draws."""
    torch.manual_seed(seed)
    made = [augmentation(image) for image in images]
    crops = [torch.stack(crop) for crop in zip(*([*m.global_crops, *m.local_crops] for m in made), strict=True)]
    torch.manual_seed(seed)
    put_off = DeviceAugmentation(augmentation)
    return crops, make_crops(
        pack_raw_batch([put_off(image) for image in images], EMPTY, put_off.crop_format(torch.float32))
    )


def differences(augmentation: DataAugmentationDINO, images: list[Image.Image]) -> Tensor:
    crops, batch = both(augmentation, images)
    assert batch.global_crops.shape == torch.cat(crops[:2]).shape
    assert batch.local_crops.shape == torch.cat(crops[2:]).shape
    return torch.cat(
        [(batch.global_crops - torch.cat(crops[:2])).flatten(), (batch.local_crops - torch.cat(crops[2:])).flatten()]
    ).abs()


def test_geometry_is_the_same_within_a_level() -> None:
    nothing: dict[str, Any] = {
        "color_jitter_probability": 0.0,
        "grayscale_probability": 0.0,
        "blur_probabilities": (0.0, 0.0, 0.0),
        "solarize_probability": 0.0,
    }
    off = differences(DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 4, 28, 12, **nothing, **LEVELS), images())
    assert off.max() <= 1 and off.mean() < 0.05


@pytest.mark.parametrize(
    "operation",
    [
        {"color_jitter": (0.4, 0.0, 0.0, 0.0)},
        {"color_jitter": (0.0, 0.4, 0.0, 0.0)},
        {"color_jitter": (0.0, 0.0, 0.2, 0.0)},
        {"color_jitter": (0.0, 0.0, 0.0, 0.5)},
        {"color_jitter": (0.4, 0.4, 0.2, 0.1)},
        {"grayscale_probability": 0.5},
        {"blur_probabilities": (0.5, 0.5, 0.5)},
        {"solarize_probability": 0.5},
    ],
)
def test_each_color_operation_is_the_same(operation: dict[str, Any]) -> None:
    """Crops are the images themselves, so that nothing but the operation can differ."""
    nothing: dict[str, Any] = {
        "color_jitter": (0.0, 0.0, 0.0, 0.0),
        "color_jitter_probability": 0.8,
        "grayscale_probability": 0.0,
        "blur_probabilities": (0.0, 0.0, 0.0),
        "solarize_probability": 0.0,
        "aspect_ratio": (1.0, 1.0),
    }
    augmentation = DataAugmentationDINO((1.0, 1.0), (1.0, 1.0), 3, 20, 20, **(nothing | operation), **LEVELS)
    off = differences(augmentation, images([(20, 20)] * 6))
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3  # a sum in another order, rounded the other way


def test_everything_together_differs_by_rounding_only() -> None:
    off = differences(DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 4, 28, 12, **LEVELS), images())
    assert off.mean() < 0.1 and (off > 3).float().mean() < 1e-3


def test_parts_of_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 28, 12)
    _, whole = both(augmentation, images())
    monkeypatch.setattr(device_augment, "_PART_SIDES", 130)
    assert list(device_augment._parts(np.array(SIZES))) == [(0, 1), (1, 2), (2, 4), (4, 5)]
    _, parts = both(augmentation, images())
    assert torch.allclose(whole.global_crops, parts.global_crops, atol=0.05)
    assert torch.allclose(whole.local_crops, parts.local_crops, atol=0.05)


def test_no_local_crops_and_another_dtype() -> None:
    put_off = DeviceAugmentation(DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 28, 12))
    batch = make_crops(
        pack_raw_batch([put_off(image) for image in images()], EMPTY, put_off.crop_format(torch.bfloat16))
    )
    assert batch.global_crops.shape == (10, 3, 28, 28) and batch.local_crops.shape == (0, 3, 28, 28)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.bfloat16


@pytest.mark.gpu
def test_a_gpu_makes_the_same_crops() -> None:
    put_off = DeviceAugmentation(DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 4, 28, 12, **LEVELS))
    packed = pack_raw_batch([put_off(image) for image in images()], EMPTY, put_off.crop_format(torch.float32))
    here = make_crops(packed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # the host waits for nothing
    try:
        there = make_crops(packed._replace(pixels=packed.pixels.pin_memory().to("cuda", non_blocking=True)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    off = (there.global_crops.cpu() - here.global_crops).abs()
    assert off.mean() < 0.1 and (off > 3).float().mean() < 1e-3
