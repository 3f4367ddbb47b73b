"""Sliding windows: apply a model to overlapping windows of an image and average its maps.

Legend: B images of (H, W) pixels, C channels of the maps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.models.dense.padding import Size

MapModel = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> maps (B, C, H, W) of the same size, such as a `Segmenter` or a `Depther`."""


class Window(NamedTuple):
    """A window of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, images: Tensor) -> Tensor:
        """The window of images (..., H, W), a view."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


def as_pair(value: int | Size, name: str) -> Size:
    """(height, width), from such a pair or from the side of a square; a ValueError unless both are at least 1."""
    height, width = (value, value) if isinstance(value, int) else value
    if not min(height, width) >= 1:
        raise ValueError(f"{name} must be at least 1 pixel, not {value}")
    return height, width


def sliding_windows(
    size: Size, *, window: int | Size, stride: int | Size, squares_if_smaller: bool = False
) -> list[Window]:
    """The windows that cover an image, row by row; all have the same size.

    Windows start at multiples of the stride. The last one of a row or column, which would reach beyond the image, is
    moved back to end with it. Along a side shorter than the window, windows have the length of that side.

    Args:
        size: (height, width) of the image in pixels.
        window, stride: (height, width) in pixels, or one number for both. The stride must not exceed the window.
        squares_if_smaller: The rule of DINOv3 for an image that is smaller than the window in both directions: windows
            are squares of its shorter side. Without it there is one window, the image. (A stride of more than this side
            leaves pixels of long images without a window in DINOv3; here it is reduced to the side.)
    """
    height, width = size
    (window_height, window_width), (down, right) = as_pair(window, "window"), as_pair(stride, "stride")
    if down > window_height or right > window_width:
        raise ValueError(
            f"with a stride of {(down, right)}, windows of {(window_height, window_width)} leave pixels without any"
        )
    if squares_if_smaller and height < window_height and width < window_width:
        side = window_height = window_width = min(height, width)
        down, right = min(down, side), min(right, side)
    tops, lefts = _starts(height, window_height, down), _starts(width, window_width, right)
    sides = (min(height, window_height), min(width, window_width))
    return [Window(top, left, *sides) for top in tops for left in lefts]


def _starts(side: int, window: int, stride: int) -> list[int]:
    if side <= window:
        return [0]
    count = -(-(side - window) // stride) + 1
    return [min(index * stride, side - window) for index in range(count)]


def slide(
    model: MapModel,
    images: Tensor,
    *,
    window: int | Size,
    stride: int | Size,
    squares_if_smaller: bool = False,
    windows_at_once: int = 1,
) -> Tensor:
    """Maps (B, C, H, W) of images (B, 3, H, W): the mean of those of the windows that contain a pixel.

    Args:
        model: Applied to windows (B, 3, h, w) of the images, which it maps to (B, C, h, w).
        images: Images of one size.
        window, stride, squares_if_smaller: See `sliding_windows`.
        windows_at_once: Number of windows in a batch of the model. A larger one is faster on a GPU and needs memory.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
    if windows_at_once < 1:
        raise ValueError(f"windows_at_once must be at least 1, not {windows_at_once}")
    height, width = images.shape[-2:]
    windows = sliding_windows((height, width), window=window, stride=stride, squares_if_smaller=squares_if_smaller)
    total: Tensor | None = None
    for first in range(0, len(windows), windows_at_once):
        group = windows[first : first + windows_at_once]
        maps = model(torch.cat([place.of(images) for place in group]))
        _check_maps(maps, len(images) * len(group), group[0])
        if total is None:
            dtype = torch.promote_types(maps.dtype, torch.float32)
            total = maps.new_zeros((len(images), maps.shape[1], height, width), dtype=dtype)
        for place, part in zip(group, maps.split(len(images)), strict=True):
            place.of(total).add_(part)
    assert total is not None, "an image has at least one window"
    return total.div_(visits((height, width), windows).to(total))  # in place: it is large for many classes


def visits(size: Size, windows: list[Window]) -> Tensor:
    """The number of windows that contain each pixel, (H, W) int64."""
    counts = torch.zeros(size, dtype=torch.int64)
    for place in windows:
        place.of(counts).add_(1)
    return counts


def _check_maps(maps: Tensor, count: int, window: Window) -> None:
    expected = f"({count}, C, {window.height}, {window.width})"
    if maps.ndim != 4 or (len(maps), *maps.shape[-2:]) != (count, window.height, window.width):
        raise ValueError(f"the model must map a window to maps of its size, {expected}, not {tuple(maps.shape)}")
