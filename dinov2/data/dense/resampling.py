"""Resizing of images and maps, whole or only a window of the result.

Pixels are centered at half-integer coordinates. Images are resampled bilinearly and rounded to 8 bits, maps take the
value at floor(output index x input size / output size), so that no class or depth is made up between two others.
Without antialiasing, as in OpenCV, a reduced image samples few of its pixels; the published dense evaluations do this.

Legend: h, w size of the input; H, W size of the output.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "Window":
        """All of an image of ``size`` (height, width)."""
        return cls(0, 0, *size)


def resized_image(
    pixels: np.ndarray, size: tuple[int, int], window: Window | None = None, *, antialias: bool = False
) -> Tensor:
    """Resize an image to ``size`` (H, W), and return a window of the result.

    Args:
        pixels: (h, w, 3) uint8, or levels of bands (h, w, C) float32.
        size: (H, W).
        window: Part of the result; None: all of it.
        antialias: Whether to resize with antialiasing.

    Returns:
        Levels from 0 to 255 (C, window.height, window.width) float32, integers if those of the image are.
    """
    window = window or Window.whole(size)
    if antialias and size != pixels.shape[:2]:
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        resized = interpolate(image, size, mode="bilinear", antialias=True)[0]
        top, left, height, width = window
        return resized[:, top : top + height, left : left + width].float().contiguous()
    rows = _neighbors(pixels.shape[0], size[0], window.top, window.height)
    columns = _neighbors(pixels.shape[1], size[1], window.left, window.width)
    source = pixels[rows.first[0] : rows.last[-1] + 1, columns.first[0] : columns.last[-1] + 1]
    image = torch.from_numpy(np.ascontiguousarray(source.transpose(2, 0, 1), np.float32))
    image = _interpolated(_interpolated(image, rows, 1), columns, 2)
    return image.round_() if pixels.dtype == np.uint8 else image


class _Neighbors(NamedTuple):
    """The two input pixels around each output pixel, along one side."""

    first: np.ndarray  # (n,) int64
    last: np.ndarray  # (n,) int64
    weight: np.ndarray  # (n,) float32 of the last


def _neighbors(input_size: int, output_size: int, start: int, length: int) -> _Neighbors:
    position = (np.arange(start, start + length) + 0.5) * (input_size / output_size) - 0.5
    position = position.clip(0, input_size - 1)
    first = np.floor(position).astype(np.int64)
    return _Neighbors(first, np.minimum(first + 1, input_size - 1), (position - first).astype(np.float32))


def _interpolated(image: Tensor, neighbors: _Neighbors, dim: int) -> Tensor:
    """Interpolate along a dimension of an image that begins at the first of the neighbors."""
    if not neighbors.weight.any():
        return image.index_select(dim, torch.from_numpy(neighbors.first - neighbors.first[0]))
    start = neighbors.first[0]
    first, last = (image.index_select(dim, torch.from_numpy(i - start)) for i in (neighbors.first, neighbors.last))
    weight = torch.from_numpy(neighbors.weight)
    return first.lerp_(last, weight[:, None] if dim == 1 else weight)


def resized_map(values: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Resize a map, (h, w), to ``size`` (H, W) by nearest neighbors, and return a window of the result."""
    window = window or Window.whole(size)
    rows = np.arange(window.top, window.top + window.height) * values.shape[0] // size[0]
    columns = np.arange(window.left, window.left + window.width) * values.shape[1] // size[1]
    return values[rows[:, None], columns]


def size_for_short_side(size: tuple[int, int], short_side: int, *, long_side: int | None = None) -> tuple[int, int]:
    """The size (height, width) that keeps the ratio of ``size`` and has a given short side.

    With ``long_side``, an image whose long side would exceed it is made smaller, so that both limits hold.
    """
    factor = short_side / min(size)
    if long_side is not None:
        factor = min(factor, long_side / max(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width
