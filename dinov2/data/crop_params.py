"""The random parameters of the crops of an image, drawn before any pixel is processed.

So the same parameters can be applied by several implementations, in a worker process or later on the device, and an
image can be decoded at a smaller scale when its crops allow it.

Legend: C crops of an image, 2 global ones and the local ones; n crops in general.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Operations of the color jitter: values in `CropParams.order`, columns of `CropParams.factors`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL_FACTORS = (1.0, 1.0, 1.0, 0.0)  # leave the image unchanged
_ATTEMPTS = 10  # to find a box that fits, as in torchvision


class CropParam(NamedTuple):
    """The parameters of one crop: a row of `CropParams`, as plain Python numbers."""

    box: tuple[int, int, int, int]
    flip: bool
    order: tuple[int, int, int, int]
    factors: Any  # four numbers, or two lists
    gray: bool
    sigma: float
    solarize: bool


class CropParams(NamedTuple):
    """The parameters of n crops, in the order in which the operations are applied."""

    boxes: np.ndarray  # (n, 4) int64: top, left, height, width in pixels of the upright image
    flip: np.ndarray  # (n,) bool
    order: np.ndarray  # (n, 4) int64: the operations of the color jitter, first to last
    # (n, 4) float64 of brightness, contrast, saturation, and the shift of hue in turns; for images of bands
    # (n, 2, C) of the brightness and the contrast of each
    factors: np.ndarray
    gray: np.ndarray  # (n,) bool
    sigma: np.ndarray  # (n,) float64: blur in pixels, 0 = none
    solarize: np.ndarray  # (n,) bool

    def take(self, which: slice | np.ndarray) -> "CropParams":
        return CropParams(*(values[which] for values in self))

    def without_colors(self) -> "CropParams":
        """The same boxes and flips with unchanged colors."""
        of_bands = self.factors.ndim == 3
        neutral = np.ones_like(self.factors) if of_bands else np.tile(NEUTRAL_FACTORS, (len(self.flip), 1))
        off = np.zeros_like(self.flip)
        return self._replace(factors=neutral, gray=off, sigma=np.zeros_like(self.sigma), solarize=off)

    def rows(self) -> list[CropParam]:
        return [CropParam(*row) for row in zip(*(values.tolist() for values in self), strict=True)]

    def reduced(self, reduction: int, width: int, height: int) -> "CropParams":
        """Scale the boxes to an image that is ``reduction`` times smaller, ``width`` x ``height`` pixels."""
        edges = np.rint(np.stack([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]]) / reduction)
        first, last = np.minimum(edges, (height, width)).astype(np.int64)
        return self._replace(boxes=np.concatenate([first, last - first], 1))


def possible_reduction(params: CropParams, sides: Sequence[int]) -> int:
    """The largest reduction of an image (1, 2, 4 or 8) at which each box is still twice as large as its crop.

    Crops are then still downsampled by at least 2, and rounding a box to pixels of the reduced image shifts it by at
    most a quarter of a pixel of the crop.
    """
    room = (params.boxes[:, 2:] / (2 * np.array(sides)[:, None])).min()
    return max(reduction for reduction in (1, 2, 4, 8) if reduction <= max(room, 1))


def stack_crop_params(parts: Sequence[CropParams]) -> CropParams:
    return CropParams(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class CropParamSampler:
    """Draws the parameters of the C crops of an image, each of which has its own settings.

    Args:
        scale: (C, 2) range of the area, as a fraction of the image.
        aspect_ratio: Range of width / height, drawn log-uniformly.
        flip, jitter, gray: Probabilities of the horizontal flip, the color jitter and the conversion to grayscale.
        color_jitter: Strengths of brightness, contrast, saturation and hue.
        blur, solarize: (C,) probabilities of blurring and of inverting bright pixels.
        blur_sigma: Range of the blur's standard deviation in pixels.
        num_bands: Number of bands whose brightness and contrast are drawn separately; None for RGB images.
    """

    def __init__(
        self,
        *,
        scale: Sequence[Sequence[float]],
        aspect_ratio: Sequence[float],
        flip: float,
        color_jitter: Sequence[float],
        jitter: float,
        gray: float,
        blur: Sequence[float],
        blur_sigma: Sequence[float],
        solarize: Sequence[float],
        num_bands: int | None = None,
    ) -> None:
        self.num_bands = num_bands
        self.scale = np.array(scale, np.float64)
        self.aspect_ratio = (float(aspect_ratio[0]), float(aspect_ratio[1]))
        self.probabilities = np.array([[flip, jitter, gray, b, s] for b, s in zip(blur, solarize, strict=True)])
        *strengths, hue = color_jitter
        self.factor_low = np.array([max(0.0, 1 - s) for s in strengths] + [-hue])
        self.factor_high = np.array([1 + s for s in strengths] + [hue])
        self.blur_sigma = (float(blur_sigma[0]), float(blur_sigma[1]))

    def draw(self, width: int, height: int, rng: np.random.Generator) -> CropParams:
        """Draw the parameters for an image of ``width`` x ``height`` pixels; uses a fixed number of random numbers."""
        numbers = rng.random((len(self.scale), 2 * _ATTEMPTS + 16))
        areas, aspects, chances, corner, order, factors, sigma = np.split(
            numbers, np.cumsum([_ATTEMPTS, _ATTEMPTS, 5, 2, 4, 4]), axis=1
        )
        flip, jitter, gray, blur, solarize = (chances < self.probabilities).T
        low, high = self.blur_sigma
        return CropParams(
            boxes=self._boxes(width, height, areas, aspects, corner),
            flip=flip,
            order=order.argsort(axis=1),
            factors=self._factors(jitter, factors) if self.num_bands is None else self._factors_of_bands(jitter, rng),
            gray=gray,
            sigma=np.where(blur, low + (high - low) * sigma[:, 0], 0.0),
            solarize=solarize,
        )

    def _factors(self, jitter: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        factors = self.factor_low + (self.factor_high - self.factor_low) * numbers
        return np.where(jitter[:, None], factors, NEUTRAL_FACTORS)

    def _factors_of_bands(self, jitter: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Brightness and contrast of each band, (C, 2, number of bands)."""
        low, high = self.factor_low[: CONTRAST + 1, None], self.factor_high[: CONTRAST + 1, None]
        factors = low + (high - low) * rng.random((len(self.scale), 2, self.num_bands or 0))
        return np.where(jitter[:, None, None], factors, 1.0)

    def _boxes(self, width: int, height: int, areas: np.ndarray, aspects: np.ndarray, corner: np.ndarray) -> np.ndarray:
        """Boxes as in torchvision's RandomResizedCrop, from numbers in [0, 1): (C, attempts) twice, and (C, 2)."""
        area = width * height * (self.scale[:, :1] + np.diff(self.scale) * areas)
        log_low, log_high = np.log(self.aspect_ratio)
        aspect = np.exp(log_low + (log_high - log_low) * aspects)
        widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
        rows, first = np.arange(len(fits)), fits.argmax(axis=1)
        sizes = np.stack([heights[rows, first], widths[rows, first]], axis=1)
        corners = np.floor(corner * ((height, width) - sizes + 1))
        failed = ~fits[rows, first]
        if failed.any():
            sizes[failed] = self._largest_in_range(width, height)
            corners[failed] = ((height, width) - sizes[failed]) // 2
        return np.concatenate([corners, sizes], axis=1).astype(np.int64)

    def _largest_in_range(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the whole image, cropped to the nearest aspect ratio in range."""
        lowest, highest = self.aspect_ratio
        return min(height, max(1, round(width / lowest))), min(width, max(1, round(height * highest)))
