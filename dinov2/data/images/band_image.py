"""An image of any number of bands, with the methods of PIL images that this package uses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

_MODES = {
    Image.Resampling.NEAREST: "nearest-exact",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}


class BandImage:
    """Levels (height, width, C) float32 from 0 to 255, not rounded; `numpy.asarray` of it is that array.

    Args:
        levels: The array.
        shown: Positions of the bands that are shown as red, green and blue, or of one that is shown in gray; by default
            of the first three, or of the first if there are fewer.
    """

    def __init__(self, levels: np.ndarray, shown: Sequence[int] | None = None) -> None:
        if levels.ndim != 3 or levels.dtype != np.float32:
            raise ValueError(f"levels are (height, width, bands) float32, not {levels.dtype} of shape {levels.shape}")
        self.levels = levels
        self.shown = tuple(shown or (range(3) if levels.shape[2] >= 3 else range(1)))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.levels.shape[1], self.levels.shape[0]

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.levels, dtype=dtype) if copy or dtype is not None else self.levels

    def tensor(self) -> Tensor:
        """The image as a new tensor (C, height, width) float32 in [0, 1]."""
        return torch.from_numpy(self.levels).permute(2, 0, 1) / 255

    def convert(self, mode: str) -> Image.Image:
        """The shown bands as a PIL image of 8 bits."""
        levels = np.rint(self.levels[..., list(self.shown)]).astype(np.uint8)
        return Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0]).convert(mode)

    def resize(self, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC) -> "BandImage":
        """Resize to (width, height), with antialiasing as PIL does."""
        mode = _MODES[resample]
        antialias = {} if resample is Image.Resampling.NEAREST else {"antialias": True}
        resized = interpolate(self._batch(), size[::-1], mode=mode, **antialias)
        return self._like(resized.clamp_(0, 255))

    def crop(self, box: tuple[int, int, int, int]) -> "BandImage":
        """The part between (left, top, right, bottom), inside the image."""
        left, top, right, bottom = box
        return BandImage(np.ascontiguousarray(self.levels[top:bottom, left:right]), self.shown)

    def reduce(self, factor: int) -> "BandImage":
        """Average squares of `factor` x `factor` pixels; those at the right and the bottom may be smaller."""
        return self._like(avg_pool2d(self._batch(), factor, ceil_mode=True, count_include_pad=False))

    def copy(self) -> "BandImage":
        return BandImage(self.levels.copy(), self.shown)

    def _batch(self) -> Tensor:
        return torch.from_numpy(self.levels).permute(2, 0, 1)[None]

    def _like(self, batch: Tensor) -> "BandImage":
        return BandImage(np.ascontiguousarray(batch[0].permute(1, 2, 0).numpy()), self.shown)


AnyImage = Image.Image | BandImage
"""An 8-bit RGB image, or one of other bands."""


def in_colors(pixels: np.ndarray, shown: Sequence[int] | None = None) -> np.ndarray:
    """Pixels (..., height, width, 3) uint8, or levels of bands, as they are shown: (..., height, width, 3) uint8."""
    if pixels.dtype == np.uint8:
        return pixels
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    colors = np.stack([np.asarray(BandImage(levels, shown).convert("RGB")) for levels in flat])
    return colors.reshape(*pixels.shape[:-1], 3)
