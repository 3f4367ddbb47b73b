"""Pad images symmetrically to whole patches, as the published dense heads expect it."""

from torch import Tensor, nn
from torch.nn.functional import pad

Size = tuple[int, int]
"""(height, width) in pixels, or in tokens."""


def center_pad(images: Tensor, multiple: int) -> Tensor:
    """Pad (..., H, W) with zeros to the next multiples of `multiple` pixels; an odd pixel goes below, or to the right.

    Zeros are the mean color of normalized images. An image whose sides are multiples is returned as it is.
    """
    (top, bottom), (left, right) = (margins(side, multiple) for side in images.shape[-2:])
    return pad(images, (left, right, top, bottom)) if top + bottom + left + right else images


def center_cut(maps: Tensor, size: Size, multiple: int) -> Tensor:
    """The inverse of `center_pad`: cut the padding of an image of `size` off maps (..., H, W) of the padded image."""
    padded = padded_size(size, multiple)
    if tuple(maps.shape[-2:]) != padded:
        raise ValueError(f"maps of {tuple(maps.shape[-2:])} are not of an image of {size}, padded to {padded}")
    (top, _), (left, _) = (margins(side, multiple) for side in size)
    return maps[..., top : top + size[0], left : left + size[1]]


def padded_size(size: Size, multiple: int) -> Size:
    """(height, width) of an image after `center_pad`."""
    height, width = (side + sum(margins(side, multiple)) for side in size)
    return height, width


def margins(side: int, multiple: int) -> tuple[int, int]:
    """Numbers of zeros before and after a side of `side` pixels."""
    if multiple < 1:
        raise ValueError(f"images are padded to a multiple of at least 1 pixel, not {multiple}")
    missing = -side % multiple
    return missing // 2, missing - missing // 2


class CenterPadding(nn.Module):
    """`center_pad` as a module, the published interface."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """Images (..., H, W) -> padded images (..., H', W')."""
        return center_pad(x, self.multiple)
