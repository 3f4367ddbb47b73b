"""Every operation of the multi-crop augmentation happens as often as it should, in the views where it should."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.augment import DataAugmentationDINO

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


def colour_image(width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def whole_image_views(**changes: Any) -> DataAugmentationDINO:
    """Crops that are the image itself, changed by nothing but what `changes` switches on."""
    return DataAugmentationDINO((1.0, 1.0), (1.0, 1.0), 1, SIZE, SIZE, **(NOTHING | changes))


def test_shapes_and_counts() -> None:
    crops = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 28, 14)(colour_image(40, 30))
    assert [crop.shape for crop in crops.global_crops] == [(3, 28, 28)] * 2
    assert [crop.shape for crop in crops.local_crops] == [(3, 14, 14)] * 3
    assert {crop.dtype for crop in (*crops.global_crops, *crops.local_crops)} == {torch.float32}
    assert DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 28, 14)(colour_image()).local_crops == ()


def test_crops_follow_from_torchs_seed_and_differ_from_each_other() -> None:
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 16)
    image = colour_image(40, 30)

    def draw(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        crops = augmentation(image)
        return [*crops.global_crops, *crops.local_crops]

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_without_operations_only_the_crop_is_left() -> None:
    pixels = torch.from_numpy(np.array(colour_image())).permute(2, 0, 1) / 255
    crops = whole_image_views()(colour_image())
    assert all(torch.equal(crop, pixels) for crop in (*crops.global_crops, *crops.local_crops))
    assert len(whole_image_views().global_view_2.transforms) == 2  # crop and tensor: nothing is drawn in vain


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
    augmentation, image = whole_image_views(**operation), colour_image()
    unchanged = whole_image_views()(image).global_crops[0]
    changed = []
    for _ in range(DRAWS):
        crops = augmentation(image)
        changed.append([not torch.equal(crop, unchanged) for crop in (*crops.global_crops, *crops.local_crops)])
    shares = np.mean(changed, axis=0)
    for share, p in zip(shares, expected, strict=True):
        assert abs(share - p) <= 4 * (p * (1 - p) / DRAWS) ** 0.5, (operation, shares)


def test_defaults_are_the_probabilities_in_effect_in_the_release() -> None:
    """Blur 0 / 0.9 / 0.5, solarize in the second view only: seen in what each view is made of."""
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8)
    blur = {
        name: [step.p for step in view.transforms if type(step).__name__ == "GaussianBlur"]
        for name, view in (
            ("global 1", augmentation.global_view_1),
            ("global 2", augmentation.global_view_2),
            ("local", augmentation.local_view),
        )
    }
    assert blur == {"global 1": [], "global 2": [0.9], "local": [0.5]}
    names = [type(step).__name__ for step in augmentation.global_view_2.transforms]
    assert names == [
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "RandomApply",
        "RandomGrayscale",
        "GaussianBlur",
        "RandomSolarize",
        "ToNormalizedTensor",
    ]
