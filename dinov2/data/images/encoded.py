"""An image whose pixels are decoded on request, and the errors of reading images."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from dinov2.data.images.formats import UnknownFormatError

if TYPE_CHECKING:
    from dinov2.data.images.band_image import AnyImage


class ImageDecodeError(ValueError):
    """The bytes are not a usable image: truncated, corrupt, of an unsupported format, or too large."""


class BadImageError(RuntimeError):
    """A sample of a dataset has no usable image (missing, unreadable or undecodable file)."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path  # from `describe(index)` of the dataset


class EncodedImage:
    """An image of known size whose pixels are decoded on request, optionally at a reduced scale."""

    is_deep = False  # whether it has more than 8 bits per sample, which are mapped to a range

    def __init__(self, image: "AnyImage") -> None:
        """Wrap an upright image, RGB or of any bands."""
        self._image = image
        self.size = image.size  # (width, height), upright

    def load(self, reduction: int = 1) -> "AnyImage":
        """Decode to mode RGB or to bands, with sides divided by ``reduction`` (1, 2, 4 or 8) and rounded up.

        Raises:
            ImageDecodeError: The data are truncated or corrupt; so for all methods that decode.
        """
        return self._image if reduction == 1 else self._image.reduce(reduction)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """Decode to a new array, (height, width, 3) uint8, or (height, width, C) float32 levels of other bands."""
        return np.array(self.load(reduction))


@contextmanager
def decoding(data: bytes) -> Iterator[None]:
    """Turn all errors of Pillow into an ImageDecodeError, and silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken metadata once per image
            yield
    except UnknownFormatError as error:
        raise ImageDecodeError(f"{len(data)} bytes {error}") from error
    except Exception as error:  # damaged files make Pillow raise errors of any type: SyntaxError, OverflowError, ...
        is_short = isinstance(error.__cause__ or error, struct.error)  # its message is about buffers and offsets
        reason = "they end within the header, or it is damaged" if is_short else error
        raise ImageDecodeError(f"cannot decode {len(data)} bytes: {reason}") from error
