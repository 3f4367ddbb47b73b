"""The color operations of the augmentation on float32 crops, on any device.

Crops are levels from 0 to 255 in float32. Like Pillow's they are clamped after each operation, rounded down after a
blend and to the nearest level in the end. In between, gray values, hues and what is blurred are not rounded.

Legend: n crops of one size S; factors and shifts are numbers, or tensors (n, 1, 1, 1) with one for each crop.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinov2.data.crop_params import BRIGHTNESS, CONTRAST, HUE, NEUTRAL_FACTORS, View

_GRAY = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # Pillow's shares of red, green and blue
_NEGLIGIBLE = 1e-4  # weight of a pixel that cannot change a level

BLUR_RADIUS = 4
"""The kernel has 9 pixels."""
SMALLEST_BLURRED = BLUR_RADIUS + 1
"""Pixels that a side must have at least, for its ends to be mirrored."""


def jitter_colors(crop: Tensor, view: View) -> Tensor:
    """Everything that ``view`` does to the colors of one crop (1, 3, S, S); the crop itself is lost."""
    for operation in view.order:
        factor = view.factors[operation]
        if factor == NEUTRAL_FACTORS[operation]:
            continue
        if operation == HUE:
            crop = turn_hue(crop, torch.tensor(hue_centers(factor)).view(1, 3, 1, 1))
        elif operation == BRIGHTNESS:
            crop = _levels(crop.mul_(factor), factor)
        else:
            base = gray_of(crop.mean((2, 3), keepdim=True) if operation == CONTRAST else crop)
            crop = blend(crop, base, factor)
    if view.gray:
        crop = gray_of(crop)  # one channel until the end
    if view.sigma > 0:
        crop = blur(crop, [weight for weight in blur_weights(view.sigma) if weight > _NEGLIGIBLE])
    crop = crop.round_()
    if view.solarize:
        crop = solarize(crop)
    return crop.repeat(1, 3, 1, 1) if view.gray else crop


def gray_of(crops: Tensor) -> Tensor:
    """(n, 3, S, S) -> (n, 1, S, S)."""
    red, green, blue = crops.split(1, 1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def blend(crops: Tensor, base: Tensor, factor: float | Tensor) -> Tensor:
    """``base`` where factor = 0, the crops where it is 1, and beyond; clamped. In place.

    Brightness is a blend with black, contrast with the mean of the gray crop, saturation with the gray crop.
    """
    return _levels(crops.lerp_(base, 1 - factor), factor)


def turn_hue(crops: Tensor, centers: Tensor) -> Tensor:
    """Moves red, green and blue to other hues, and every color of crops (n, 3, S, S) with them.

    With chroma = greatest - least of the channels, the distance of a hue from red, in sixths of a turn, is
    2 + (green + blue - red - greatest) / chroma; it is counted positive on green's side. The other way, a channel lies
    chroma * clamp(2 - distance of the hue from the channel's, 0, 1) above the least.

    Args:
        crops: as always.
        centers: (n, 3, 1, 1), the hues of the channels, see `hue_centers`.
    """
    red, green, blue = crops.split(1, 1)
    greatest = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = greatest - least
    hue = (green + blue).sub_(red).sub_(greatest).div_(chroma.clamp(min=1e-6)).add_(2)
    hue.copysign_(green - blue)
    # 2 - distance = | |difference| - 3 | - 1, for a difference of two hues in [-3, 3]
    return (hue - centers).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(least)


def hue_centers(factor: float) -> list[float]:
    """The hues that red, green and blue have before they are turned by a hue factor, in sixths of a turn, in [-3, 3].

    As torchvision turns PIL images, whose hue has 256 steps: by 255 times the factor, without the fraction.
    """
    shift = 6 * math.trunc(255 * factor) / 256
    return [(center - shift + 3) % 6 - 3 for center in (0, 2, 4)]


def blur(crops: Tensor, weights: Sequence[float] | Sequence[Tensor]) -> Tensor:
    """Blur of crops (n, C, S, S), mirrored at the borders, with a symmetric kernel in both directions.

    Args:
        crops: of at least `SMALLEST_BLURRED` pixels.
        weights: of a pixel and of those at its sides, nearest first: numbers, or (n, 1, 1, 1) tensors.
    """
    radius = len(weights) - 1
    for dim, border in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        size = crops.shape[dim]
        padded = pad(crops, border, mode="reflect")
        crops = padded.narrow(dim, radius, size) * weights[0]
        for offset in range(1, radius + 1):
            for start in (radius - offset, radius + offset):
                _add_scaled(crops, padded.narrow(dim, start, size), weights[offset])
    return crops


def blur_weights(sigma: float) -> list[float]:
    """Weights for `blur` of a Gaussian with this standard deviation, BLUR_RADIUS + 1 of them."""
    half = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(BLUR_RADIUS + 1)]
    total = 2 * sum(half) - half[0]
    return [weight / total for weight in half]


def solarize(crops: Tensor) -> Tensor:
    """Inverts levels of 128 and more."""
    return torch.minimum(crops, 255 - crops)


def _levels(blended: Tensor, factor: float | Tensor) -> Tensor:
    """In place: clamped, and rounded down as by Pillow."""
    between = isinstance(factor, float) and factor <= 1  # then what was blended stays in range
    return (blended if between else blended.clamp_(0, 255)).floor_()


def _add_scaled(x: Tensor, other: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        x.addcmul_(other, factor)
    else:
        x.add_(other, alpha=factor)  # several times faster on a CPU
