"""Random color changes of the dense trainings, on float32 images of levels from 0 to 255.

Legend: H, W height and width of an image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.data.color_ops import shift_hue

_HUES = 180  # steps of a turn, of OpenCV's hue in 8 bits


@dataclass(frozen=True)
class PhotometricDistortion:
    """The distortion of colors in segmentation, each operation with probability 0.5.

    The order is brightness, contrast, saturation, hue, or, with probability 0.5, contrast at the end. As in the
    published pipeline, which works in 8 bits, levels are clamped and rounded down after brightness and contrast. Its
    conversions to and from HSV in 8 bits are replaced by float32 arithmetic, followed by rounding to the nearest level:
    levels differ by a few units.

    Attributes:
        brightness: Maximum number of levels that are added or subtracted.
        contrast: Range of the factor of all levels.
        saturation: Range of the factor of the saturation in HSV.
        hue: Maximum shift of the hue, in steps of which a turn has 180; integers from -hue to hue - 1 are drawn.
    """

    brightness: float = 32
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __post_init__(self) -> None:
        check_range("contrast", self.contrast)
        check_range("saturation", self.saturation)
        if not 0 <= self.brightness <= 255 or not 0 <= self.hue <= _HUES // 2:
            raise ValueError(
                f"brightness must be from 0 to 255 and hue from 0 to {_HUES // 2}, got {self.brightness} and {self.hue}"
            )

    def __call__(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Distort an image (3, H, W) of integral levels, which is overwritten; the result is integral too.

        Of images of other bands (C, H, W) brightness and contrast are changed only, and levels are not rounded.
        """
        brightness, contrast, saturation, hue, contrast_is_last = (generator.random(5) < 0.5).tolist()
        beta = generator.uniform(-self.brightness, self.brightness)
        contrast_factor, saturation_factor = generator.uniform(*self.contrast), generator.uniform(*self.saturation)
        steps = int(generator.integers(-self.hue, self.hue)) if self.hue else 0
        if len(image) != 3:
            image = image.add_(beta if brightness else 0.0).clamp_(0, 255)
            return image.mul_(contrast_factor if contrast else 1.0).clamp_(0, 255)
        if brightness:
            image = image.add_(beta).clamp_(0, 255).floor_()
        if contrast and not contrast_is_last:
            image = image.mul_(contrast_factor).clamp_(0, 255).floor_()
        if saturation:
            image = scale_saturation(image, saturation_factor).round_()
        if hue:
            centers = [(center - 6 * steps / _HUES + 3) % 6 - 3 for center in (0, 2, 4)]
            image = shift_hue(image[None], torch.tensor(centers).view(1, 3, 1, 1))[0].round_()
        if contrast and contrast_is_last:
            image = image.mul_(contrast_factor).clamp_(0, 255).floor_()
        return image


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation in HSV, at most to 1: (3, H, W) -> (3, H, W).

    The saturation is (maximum - minimum) / maximum of the channels. The maximum and the hue stay.
    """
    maximum, minimum = image.amax(0), image.amin(0)
    chroma = (maximum - minimum).clamp_(min=1e-6)
    ratio = (maximum / chroma).clamp_(max=factor)
    return maximum - (maximum - image) * ratio


@dataclass(frozen=True)
class DepthColors:
    """The change of colors in depth estimation: gamma, brightness, and a factor of each channel.

    Attributes:
        probability: Probability that colors are changed at all.
        gamma: Range of the exponent of levels, which are scaled to [0, 1] for it.
        brightness: Range of the factor of all levels.
        color: Range of the factor of each channel.
    """

    probability: float = 0.5
    gamma: tuple[float, float] = (0.9, 1.1)
    brightness: tuple[float, float] = (0.75, 1.25)
    color: tuple[float, float] = (0.9, 1.1)

    def __post_init__(self) -> None:
        check_probability("probability", self.probability)
        for name in ("gamma", "brightness", "color"):
            check_range(name, getattr(self, name))

    def __call__(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Change the colors of an image (3, H, W) of levels; the result is clamped to 0..255, not rounded."""
        chance = generator.random()
        gamma, brightness = generator.uniform(*self.gamma), generator.uniform(*self.brightness)
        factors = torch.from_numpy(brightness * generator.uniform(*self.color, size=3)).float()
        if chance >= self.probability:
            return image
        return (image / 255).pow_(gamma).mul_(255 * factors[:, None, None]).clamp_(0, 255)


def check_range(name: str, values: tuple[float, float]) -> None:
    """Raise a ValueError unless values are a range of positive numbers (low, high)."""
    if len(values) != 2 or not 0 < values[0] <= values[1] < float("inf"):
        raise ValueError(f"{name} must be a range of positive numbers (low, high), got {values}")


def check_probability(name: str, value: float) -> None:
    """Raise a ValueError unless a value is a probability."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
