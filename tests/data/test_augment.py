"""Every operation of the multi-crop augmentation is applied with its probability, to the crops that it is meant for."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dinov2.data.augment import IMPLEMENTATIONS, DataAugmentationDINO
from dinov2.data.crop_params import NEUTRAL_FACTORS, CropParam, CropParams, possible_reduction
from dinov2.data.images import open_image

SIZE = 8
DRAWS = 400
NOTHING: dict[str, Any] = {
    "flip_probability": 0.0,
    "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probabilities": (0.0, 0.0, 0.0),
    "solarize_probability": 0.0,
    "aspect_ratio": (1.0, 1.0),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}


def color_image(width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def augmentation_of_whole_images(**changes: Any) -> DataAugmentationDINO:
    """Crops that are the image itself, changed by nothing but what `changes` switches on."""
    return DataAugmentationDINO((1.0, 1.0), (1.0, 1.0), 1, SIZE, SIZE, **(NOTHING | changes))


def test_shapes_and_counts() -> None:
    crops = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 28, 14)(color_image(40, 30))
    assert [crop.shape for crop in crops.global_crops] == [(3, 28, 28)] * 2
    assert [crop.shape for crop in crops.local_crops] == [(3, 14, 14)] * 3
    assert {crop.dtype for crop in (*crops.global_crops, *crops.local_crops)} == {torch.float32}
    assert DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 28, 14)(color_image()).local_crops == ()


def test_crops_follow_from_torchs_seed_and_differ_from_each_other() -> None:
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 16)
    image = color_image(40, 30)

    def draw(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        crops = augmentation(image)
        return [*crops.global_crops, *crops.local_crops]

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_without_operations_only_the_crop_is_left() -> None:
    pixels = torch.from_numpy(np.array(color_image())).permute(2, 0, 1) / 255
    crops = augmentation_of_whole_images()(color_image())
    assert all(torch.equal(crop, pixels) for crop in (*crops.global_crops, *crops.local_crops))


@pytest.mark.parametrize(
    "operation, expected",
    [
        ({"flip_probability": 0.5}, (0.5, 0.5, 0.5)),
        ({"color_jitter_probability": 0.8}, (0.8, 0.8, 0.8)),
        ({"grayscale_probability": 0.2}, (0.2, 0.2, 0.2)),
        ({"blur_probabilities": (0.0, 0.9, 0.5), "blur_sigma": (1.0, 2.0)}, (0.0, 0.9, 0.5)),
        ({"blur_probabilities": (1.0, 0.1, 0.5), "blur_sigma": (1.0, 2.0)}, (1.0, 0.1, 0.5)),
        ({"solarize_probability": 0.2}, (0.0, 0.2, 0.0)),
    ],
)
def test_operations_happen_with_their_probability(operation: dict[str, Any], expected: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    augmentation, image = augmentation_of_whole_images(**operation), color_image()
    unchanged = augmentation_of_whole_images()(image).global_crops[0]
    changed = []
    for _ in range(DRAWS):
        crops = augmentation(image)
        changed.append([not torch.equal(crop, unchanged) for crop in (*crops.global_crops, *crops.local_crops)])
    shares = np.mean(changed, axis=0)
    for share, p in zip(shares, expected, strict=True):
        assert abs(share - p) <= 4 * (p * (1 - p) / DRAWS) ** 0.5, (operation, shares)


def test_defaults_are_the_probabilities_in_effect_in_the_release() -> None:
    """Blur 0 / 0.9 / 0.5, solarize in the second global crop only."""
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 1)
    params = [augmentation.sampler.draw(40, 30, np.random.default_rng(seed)) for seed in range(2000)]
    blurred = np.mean([param.sigma > 0 for param in params], axis=0)
    solarized = np.mean([param.solarize for param in params], axis=0)
    assert blurred == pytest.approx([0.0, 0.9, 0.5], abs=0.04)
    assert solarized == pytest.approx([0.0, 0.2, 0.0], abs=0.04)
    assert (blurred == 0).tolist() == [True, False, False] and (solarized == 0).tolist() == [True, False, True]


# ---- the fast implementation against the operations of torchvision on PIL images ----


def photo(width: int = 160, height: int = 120) -> Image.Image:
    """Smooth colors, edges and a little noise; bright and dark enough to be clipped."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = [np.sin(6 * x + 2 * y), np.cos(9 * x * y), np.sign(np.sin(14 * (x - y)))]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(128 + 110 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))


def levels(implementation: str, image: Image.Image, param: CropParam, side: int) -> np.ndarray:
    (crop,) = IMPLEMENTATIONS[implementation](np.array(image), [(param, side)])
    assert crop.shape == (1, 3, side, side) and crop.dtype == torch.float32
    return crop[0].numpy()


def unchanged(box: tuple[int, int, int, int]) -> CropParam:
    return CropParam(box, False, (0, 1, 2, 3), NEUTRAL_FACTORS, False, 0.0, False)


HUE_STEP = 8  # levels: Pillow's hue has 256 steps, of 6 levels of the steepest channel, and it rounds saturation too
OPERATIONS: dict[str, tuple[dict[str, Any], int]] = {  # parameters, tolerance in levels
    "nothing": ({}, 0),
    "flip": ({"flip": True}, 0),
    "darker": ({"factors": (0.6, 1.0, 1.0, 0.0)}, 1),
    "brighter": ({"factors": (1.4, 1.0, 1.0, 0.0)}, 1),
    "less contrast": ({"factors": (1.0, 0.6, 1.0, 0.0)}, 1),
    "more contrast": ({"factors": (1.0, 1.4, 1.0, 0.0)}, 1),
    "paler": ({"factors": (1.0, 1.0, 0.8, 0.0)}, 1),
    "richer": ({"factors": (1.0, 1.0, 1.2, 0.0)}, 1),
    "hue forwards": ({"factors": (1.0, 1.0, 1.0, 0.1)}, HUE_STEP),
    "hue backwards": ({"factors": (1.0, 1.0, 1.0, -0.07)}, HUE_STEP),
    "opposite hue": ({"factors": (1.0, 1.0, 1.0, 0.5)}, HUE_STEP),
    "gray": ({"gray": True}, 1),
    "little blur": ({"sigma": 0.4}, 1),
    "much blur": ({"sigma": 2.0}, 1),
    "gray blur": ({"gray": True, "sigma": 1.2}, 1),
    "solarize": ({"solarize": True}, 0),
    "jitter": ({"order": (2, 0, 1, 3), "factors": (1.3, 0.7, 1.1, 0.0)}, 3),
    "another order": ({"order": (1, 2, 0, 3), "factors": (1.3, 0.7, 1.1, 0.0)}, 3),
    "everything": (
        {"flip": True, "order": (3, 1, 0, 2), "factors": (0.8, 1.2, 1.1, 0.05), "sigma": 1.3, "solarize": True},
        HUE_STEP,
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_that_of_torchvision_but_for_rounding(operation: str) -> None:
    changes, allowed = OPERATIONS[operation]
    image = photo(48, 48)
    param = unchanged((0, 0, 48, 48))._replace(**changes)
    difference = np.abs(levels("tensor", image, param, 48) - levels("pil", image, param, 48))
    assert difference.max() <= allowed
    assert difference.mean() <= (0.25 if allowed < HUE_STEP else 0.8)


@pytest.mark.parametrize("box, side", [((5, 9, 100, 110), 28), ((20, 30, 40, 30), 56), ((0, 0, 120, 160), 42)])
def test_resampling_is_pillows_within_a_level(box: tuple[int, int, int, int], side: int) -> None:
    difference = np.abs(levels("tensor", photo(), unchanged(box), side) - levels("pil", photo(), unchanged(box), side))
    assert difference.max() <= 1 and difference.mean() < 0.1


def test_whole_augmentations_differ_by_rounding_only() -> None:
    settings: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    crops = []
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(0)
        augmentation = DataAugmentationDINO(
            (0.32, 1.0), (0.05, 0.32), 4, 56, 28, **settings, implementation=implementation
        )
        made = [augmentation(photo()) for _ in range(20)]
        crops.append([torch.cat([crop.flatten() for crop in (*m.global_crops, *m.local_crops)]) for m in made])
    difference = (torch.stack(crops[0]) - torch.stack(crops[1])).abs()
    assert difference.mean() < 0.6
    assert difference.max() <= 2 * HUE_STEP


@pytest.mark.parametrize("size", [(1, 1), (300, 4), (3, 200), (7, 5)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_image_is_too_small_or_too_long(size: tuple[int, int], implementation: str) -> None:
    torch.manual_seed(0)
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 10, 5, implementation=implementation)
    for _ in range(5):
        crops = augmentation(color_image(*size))
        assert all(torch.isfinite(crop).all() for crop in (*crops.global_crops, *crops.local_crops))


def test_what_cannot_be_done_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown implementation 'pillow'; known: tensor, pil"):
        DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, implementation="pillow")
    with pytest.raises(ValueError, match="crops of 4 pixels cannot be blurred"):
        DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 10, 4)
    DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 10, 4, blur_probabilities=(0.0, 0.9, 0.0))


# ---- decoding at a smaller scale ----


def test_a_smaller_decoding_gives_the_same_crops() -> None:
    """Boxes stay where they are: the crops differ far less than from boxes that are off by one of the crop's pixels."""
    file = io.BytesIO()
    photo(1203, 909).filter(ImageFilter.GaussianBlur(3)).save(file, "JPEG", quality=95, subsampling=0)
    image = open_image(file.getvalue())
    views = CropParams(*(np.array([value]) for value in unchanged((103, 57, 700, 900))))
    side = 56
    reduction = possible_reduction(views, [side])
    assert reduction == 4
    whole = levels("tensor", image.load(), views.rows()[0], side)
    smaller = image.load(reduction)
    assert smaller.size == (301, 228)
    reduced = levels("tensor", smaller, views.reduced(reduction, *smaller.size).rows()[0], side)
    shifted = levels("tensor", image.load(), unchanged((103, 57 + 900 // side, 700, 900)), side)
    assert np.abs(reduced - whole).mean() < 0.3 * np.abs(shifted - whole).mean()


@pytest.mark.parametrize(
    "box, sides, expected",
    [
        ((448, 448), 224, 1),
        ((896, 900), 224, 2),
        ((895, 5000), 224, 1),
        ((5000, 3700), 224, 8),
        ((1, 1), 224, 1),
    ],
)
def test_every_box_stays_twice_its_crop(box: tuple[int, int], sides: int, expected: int) -> None:
    views = CropParams(*(np.array([value, value]) for value in unchanged((0, 0, *box))))
    assert possible_reduction(views, [sides, 1]) == expected


def test_reduced_boxes_stay_inside_the_image() -> None:
    sampler = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 6).sampler
    for seed in range(50):
        views = sampler.draw(1001, 707, np.random.default_rng(seed)).reduced(4, 251, 177)
        top, left, height, width = views.boxes.T
        assert (views.boxes >= 0).all() and (top + height <= 177).all() and (left + width <= 251).all()
