"""Transforms give torchvision's pixels, with the given probabilities."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dinov2.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    GaussianBlur,
    MaybeToTensor,
    ToNormalizedTensor,
    make_classification_eval_transform,
    make_classification_train_transform,
    make_normalize_transform,
)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_blur_probability_is_that_of_blurring(p: float) -> None:
    torch.manual_seed(0)
    image, blur = random_image(8, 8), GaussianBlur(p=p, radius_min=1.0, radius_max=2.0)
    share = np.mean([not np.array_equal(np.asarray(blur(image)), np.asarray(image)) for _ in range(500)])
    assert abs(share - p) <= 4 * (p * (1 - p) / 500) ** 0.5


def test_normalized_tensor_is_to_tensor_and_normalize_to_the_bit() -> None:
    image = random_image(13, 7)
    ours = ToNormalizedTensor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(image)
    assert ours.shape == (3, 7, 13) and ours.is_contiguous()
    assert torch.equal(ours, make_normalize_transform()(transforms.ToTensor()(image)))


def test_maybe_to_tensor_leaves_tensors_alone() -> None:
    tensor = torch.randn(3, 4, 4)
    assert MaybeToTensor()(tensor) is tensor
    assert torch.equal(MaybeToTensor()(random_image(4, 4)), transforms.ToTensor()(random_image(4, 4)))


@pytest.mark.parametrize("width, height", [(100, 60), (60, 100)])
def test_eval_transform_is_the_middle_of_the_resized_image(width: int, height: int) -> None:
    image = random_image(width, height)
    tensor = make_classification_eval_transform(resize_size=30, crop_size=20)(image)
    resized = image.resize((50, 30) if width > height else (30, 50), Image.Resampling.BICUBIC)
    left, top = (resized.width - 20) // 2, (resized.height - 20) // 2
    middle = resized.crop((left, top, left + 20, top + 20))
    assert torch.equal(tensor, make_normalize_transform()(transforms.ToTensor()(middle)))


def test_eval_transform_defaults_to_256_and_224() -> None:
    assert make_classification_eval_transform()(random_image(300, 280)).shape == (3, 224, 224)
    assert make_classification_eval_transform().transforms[1].size == 256


def test_train_transform_leaves_out_a_flip_of_probability_0() -> None:
    with_flip = make_classification_train_transform(crop_size=16)
    without = make_classification_train_transform(crop_size=16, hflip_prob=0)
    assert with_flip(random_image(30, 20)).shape == without(random_image(30, 20)).shape == (3, 16, 16)
    assert any(isinstance(step, transforms.RandomHorizontalFlip) for step in with_flip.transforms)
    assert not any(isinstance(step, transforms.RandomHorizontalFlip) for step in without.transforms)
