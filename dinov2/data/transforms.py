"""Image transforms: blur, conversion to tensors, and the two pipelines of image classification.

Shapes: PIL images are RGB; images of other bands are `BandImage`; tensors are float32 (C, H, W), of C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.images import AnyImage, BandImage

if TYPE_CHECKING:  # its import takes seconds, so it is imported where it is used
    from torchvision.transforms import Compose, InterpolationMode, Normalize

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)

BLUR_KERNEL = [9, 9]  # pixels


@dataclass(kw_only=True, eq=False)
class GaussianBlur:
    """Blurs a PIL image with probability ``p``: kernel of 9 pixels, sigma uniform in [radius_min, radius_max].

    ``p`` is the probability of blurring. (The released code blurs with probability 1 - p.)
    """

    p: float = 0.5
    radius_min: float = 0.1
    radius_max: float = 2.0

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(1).item() >= self.p:
            return image
        sigma = torch.empty(1).uniform_(self.radius_min, self.radius_max).item()
        from torchvision.transforms import functional

        return functional.gaussian_blur(image, BLUR_KERNEL, [sigma, sigma])


class ToNormalizedTensor:
    """Image -> float32 (C, H, W), scaled to [0, 1] and normalized: ToTensor and Normalize in one, same numbers."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, image: AnyImage | np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        tensor = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return tensor.div_(255).sub_(self.mean).div_(self.std)


class BandsToTensor:
    """A `BandImage` as tensor, on which torchvision's operations work; others are left as they are."""

    def __call__(self, image: Any) -> Any:
        return image.tensor() if isinstance(image, BandImage) else image


class MaybeToTensor:
    """torchvision's ToTensor, but tensors are left as they are."""

    def __call__(self, image: Image.Image | np.ndarray | Tensor) -> Tensor:
        from torchvision.transforms import functional

        return image if isinstance(image, Tensor) else functional.to_tensor(image)


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> "Normalize":
    """Normalization of float tensors (C, H, W) in [0, 1]."""
    from torchvision.transforms import Normalize

    return Normalize(mean=mean, std=std)


def make_classification_train_transform(
    *,
    crop_size: int = 224,
    interpolation: "InterpolationMode | None" = None,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> "Compose":
    """Random crop and flip, as in linear evaluation, bicubic by default: image -> (C, crop_size, crop_size)."""
    from torchvision import transforms

    interpolation = interpolation or transforms.InterpolationMode.BICUBIC
    steps: list[Callable[[Any], Any]] = [
        BandsToTensor(),
        transforms.RandomResizedCrop(crop_size, interpolation=interpolation),
    ]
    if hflip_prob > 0:
        steps.append(transforms.RandomHorizontalFlip(hflip_prob))
    return transforms.Compose([*steps, MaybeToTensor(), make_normalize_transform(mean, std)])


def make_classification_eval_transform(
    *,
    resize_size: int = 256,
    interpolation: "InterpolationMode | None" = None,
    crop_size: int = 224,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> "Compose":
    """Shorter side to ``resize_size``, center crop, bicubic by default: image -> (C, crop_size, crop_size)."""
    from torchvision import transforms

    interpolation = interpolation or transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            BandsToTensor(),
            transforms.Resize(resize_size, interpolation=interpolation),
            transforms.CenterCrop(crop_size),
            MaybeToTensor(),
            make_normalize_transform(mean, std),
        ]
    )
