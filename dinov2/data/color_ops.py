"""The color operations of the augmentation on float32 crops, on any device.

Crops are float32 levels from 0 to 255. As in Pillow they are clamped after each operation, rounded down after a blend
and rounded to the nearest level at the end. In between, gray values, hues and blurred values are not rounded.

Legend: n crops of one size S; factors and shifts are numbers, or tensors (n, 1, 1, 1) with one value per crop.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinov2.data.crop_params import BRIGHTNESS, CONTRAST, HUE, NEUTRAL_FACTORS, CropParam

_GRAY = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # Pillow's weights of red, green and blue
_NEGLIGIBLE = 1e-4  # a pixel of smaller weight cannot change a level

BLUR_RADIUS = 4  # the kernel has 9 pixels
SMALLEST_BLURRED = BLUR_RADIUS + 1  # minimum side in pixels, so that borders can be mirrored


def jitter_colors(crop: Tensor, param: CropParam) -> Tensor:
    """Apply the color operations of ``param`` to one crop (1, 3, S, S), which is overwritten."""
    for operation in param.order:
        factor = param.factors[operation]
        if factor == NEUTRAL_FACTORS[operation]:
            continue
        if operation == HUE:
            crop = shift_hue(crop, torch.tensor(hue_centers(factor)).view(1, 3, 1, 1))
        elif operation == BRIGHTNESS:
            crop = _levels(crop.mul_(factor), factor)
        else:
            base = gray_of(crop.mean((2, 3), keepdim=True) if operation == CONTRAST else crop)
            crop = blend(crop, base, factor)
    if param.gray:
        crop = gray_of(crop)  # one channel until the end
    if param.sigma > 0:
        crop = blur(crop, [weight for weight in blur_weights(param.sigma) if weight > _NEGLIGIBLE])
    crop = crop.round_()
    if param.solarize:
        crop = solarize(crop)
    return crop.repeat(1, 3, 1, 1) if param.gray else crop


def jitter_bands(crop: Tensor, param: CropParam) -> Tensor:
    """The operations that are valid for any bands on one crop (1, C, S, S), which is overwritten.

    Brightness and contrast of each band change by factors of its own, in the order drawn; gray values, saturation and
    hue are not defined. Then follow blur and solarizing. Nothing is rounded.
    """
    factors = torch.tensor(param.factors, dtype=torch.float32)[:, None, :, None, None]  # (2, 1, C, 1, 1)
    if not torch.all(factors == 1):
        crop = change_bands(crop, factors, torch.tensor(is_contrast_first(param.order)))
    if param.sigma > 0:
        crop = blur(crop, [weight for weight in blur_weights(param.sigma) if weight > _NEGLIGIBLE])
    return solarize(crop) if param.solarize else crop


def is_contrast_first(order: Sequence[int]) -> bool:
    """Whether contrast comes before brightness in the order of the operations."""
    return list(order).index(CONTRAST) < list(order).index(BRIGHTNESS)


def change_bands(crops: Tensor, factors: Tensor, contrast_first: Tensor) -> Tensor:
    """Change brightness and contrast of each band of crops (n, C, S, S).

    Args:
        crops: Levels.
        factors: (2, n, C, 1, 1), of brightness and of contrast, which is about the mean of the band.
        contrast_first: Whether contrast comes first, bool that can be broadcast to the crops.
    """
    brightness, contrast = factors
    for is_contrast in (contrast_first, ~contrast_first):
        mean = crops.mean((2, 3), keepdim=True)
        factor = torch.where(is_contrast, contrast, brightness)
        crops = (crops * factor).add_(torch.where(is_contrast, mean * (1 - contrast), 0.0)).clamp_(0, 255)
    return crops


def gray_of(crops: Tensor) -> Tensor:
    """Luminance as in Pillow: (n, 3, S, S) -> (n, 1, S, S)."""
    red, green, blue = crops.split(1, 1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def blend(crops: Tensor, base: Tensor, factor: float | Tensor) -> Tensor:
    """Interpolate from ``base`` (factor 0) to the crops (factor 1) or extrapolate beyond; clamped, in place.

    Brightness is a blend with black, contrast with the mean of the gray crop, saturation with the gray crop.
    """
    return _levels(crops.lerp_(base, 1 - factor), factor)


def shift_hue(crops: Tensor, centers: Tensor) -> Tensor:
    """Rotate the hue of crops (n, 3, S, S), given the hues (n, 3, 1, 1) of red, green and blue from `hue_centers`.

    With chroma = maximum - minimum of the channels, the distance of a hue from red, in sixths of a turn, is
    2 + (green + blue - red - maximum) / chroma, with positive sign on green's side. Conversely, a channel is
    chroma * clamp(2 - distance of the hue from the channel's, 0, 1) above the minimum.
    """
    red, green, blue = crops.split(1, 1)
    maximum = torch.maximum(torch.maximum(red, green), blue)
    minimum = torch.minimum(torch.minimum(red, green), blue)
    chroma = maximum - minimum
    hue = (green + blue).sub_(red).sub_(maximum).div_(chroma.clamp(min=1e-6)).add_(2)
    hue.copysign_(green - blue)
    # 2 - distance = | |difference| - 3 | - 1, for a difference of two hues in [-3, 3]
    return (hue - centers).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(minimum)


def hue_centers(factor: float) -> list[float]:
    """Hues of the channels for a hue factor (shift in turns), in sixths of a turn, in [-3, 3].

    As in torchvision for PIL images, whose hue has 256 steps: 255 times the factor, truncated.
    """
    shift = 6 * math.trunc(255 * factor) / 256
    return [(center - shift + 3) % 6 - 3 for center in (0, 2, 4)]


def blur(crops: Tensor, weights: Sequence[float] | Sequence[Tensor]) -> Tensor:
    """Blur crops (n, C, S, S) with a separable symmetric kernel; borders are mirrored.

    The weights are those from the center outwards: numbers, or (n, 1, 1, 1) tensors.
    """
    radius = len(weights) - 1
    for dim, border in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        size = crops.shape[dim]
        padded = pad(crops, border, mode="reflect")
        crops = padded.narrow(dim, radius, size) * weights[0]
        for offset in range(1, radius + 1):
            for start in (radius - offset, radius + offset):
                neighbor, weight = padded.narrow(dim, start, size), weights[offset]
                if isinstance(weight, Tensor):
                    crops.addcmul_(neighbor, weight)
                else:
                    crops.add_(neighbor, alpha=weight)  # several times faster on a CPU
    return crops


def blur_weights(sigma: float) -> list[float]:
    """The BLUR_RADIUS + 1 weights for `blur` of a Gaussian of standard deviation ``sigma`` in pixels."""
    half = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(BLUR_RADIUS + 1)]
    total = 2 * sum(half) - half[0]
    return [weight / total for weight in half]


def solarize(crops: Tensor) -> Tensor:
    """Invert levels of 128 and above."""
    return torch.minimum(crops, 255 - crops)


def _levels(blended: Tensor, factor: float | Tensor) -> Tensor:
    """Clamp and round down as Pillow does, in place."""
    in_range = isinstance(factor, float) and factor <= 1  # an interpolation needs no clamping
    return (blended if in_range else blended.clamp_(0, 255)).floor_()
