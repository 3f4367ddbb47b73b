"""Bytes of an image file -> an upright 8-bit RGB picture, whatever the file holds; and pixels -> a file."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

# EXIF orientation -> the transposition that turns the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations of pictures that are stored lying on their side


class ImageDecodeError(ValueError):
    """The bytes are not a picture: truncated, corrupt, of unknown format, or absurdly large."""


class BadImageError(RuntimeError):
    """A sample of a data set has no usable picture (missing, unreadable or undecodable file).

    Attributes:
        path: where the picture was read from, as `describe(index)` of the data set says.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class Picture:
    """A picture of known size whose pixels come when they are asked for, smaller if that will do.

    Attributes:
        size: (width, height), upright.
    """

    def __init__(self, image: Image.Image) -> None:
        """Of an upright RGB image."""
        self._image = image
        self.size = image.size

    def load(self, reduction: int = 1) -> Image.Image:
        """The picture in mode RGB, its sides divided by ``reduction`` (1, 2, 4 or 8) and rounded up.

        Raises:
            ImageDecodeError: truncated or corrupt data.
        """
        return self._image if reduction == 1 else self._image.reduce(reduction)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """The same as an array, (height, width, 3) uint8, for the caller to keep."""
        return np.array(self.load(reduction))


class _JpegPicture(Picture):
    """A JPEG file of which only the header is read; it can be decoded at a smaller scale, in a fraction of the time."""

    def __init__(self, data: bytes, opened: Image.Image) -> None:
        self._data = data
        self._opened: Image.Image | None = opened  # until it is decoded, which can be done once
        self._plain = opened.mode == "RGB" and _orientation(opened) not in _UPRIGHT
        width, height = opened.size
        self.size = (height, width) if _orientation(opened) in _SIDEWAYS else (width, height)

    def load(self, reduction: int = 1) -> Image.Image:
        with _decoding(self._data):
            image, self._opened = self._opened or Image.open(io.BytesIO(self._data)), None
            if reduction > 1:
                image.draft(None, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
            image.load()
            return _to_rgb(_turn_upright(image))

    def pixels(self, reduction: int = 1) -> np.ndarray:
        fast = _decode_at_once(self._data) if self._plain and reduction == 1 else None
        return super().pixels(reduction) if fast is None else fast


def _decode_at_once(data: bytes) -> np.ndarray | None:
    """The same pixels as Pillow's, without the way over an image of Pillow, a third faster; None where that fails.

    By torchvision, which means to drop its decoder: then, as for all that it cannot read, Pillow decodes or complains.
    """
    with warnings.catch_warnings(), suppress(ImportError, AttributeError, RuntimeError):
        warnings.simplefilter("ignore")
        from torchvision.io import decode_jpeg

        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    return None


def open_picture(data: bytes) -> Picture:
    """Opens an image file of any format and mode that Pillow reads as an upright RGB picture.

    Only of JPEG files is the decoding put off; they make up most data sets and can be decoded at a smaller scale.

    - Turned by its EXIF orientation. The published code ignores it: on pictures with such a tag, training and
      evaluation differ from the published behaviour.
    - Transparency is dropped, not composited on a background: the colours under it show, as in the published code.
    - 16-bit grey keeps its upper 8 bits; wider integers and floats are scaled by their own range. A plain conversion
      would clip them to white.
    - The first frame of an animation.

    Args:
        data: content of the file.

    Raises:
        ImageDecodeError: truncated, corrupt or unknown data, or more pixels than Pillow's decompression bomb limit.
    """
    with _decoding(data):
        image = Image.open(io.BytesIO(data))
        if isinstance(image, JpegImageFile):
            return _JpegPicture(data, image)
        image.load()  # before the orientation: TIFF is turned while it loads
        return Picture(_to_rgb(_turn_upright(image)))


def decode_image(data: bytes) -> Image.Image:
    """The picture of an image file, upright and in mode RGB; see `open_picture`."""
    return open_picture(data).load()


@contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Makes one error of all that Pillow raises, and no noise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on broken metadata and the like: once per picture
            yield
    except UnidentifiedImageError as error:
        raise ImageDecodeError(f"{len(data)} bytes in no image format that Pillow knows") from error
    except Exception as error:  # broken files make Pillow raise nearly anything: SyntaxError, struct.error, ...
        raise ImageDecodeError(f"cannot decode {len(data)} bytes: {error}") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of a picture, (H, W) or (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _turn_upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose, which copies upright pictures and rewrites the EXIF block of the others: it fails
    # on the malformed blocks that are common in photographs from the web.
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None  # an unreadable EXIF block says nothing about the picture


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    return image.convert("RGB")


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, (H, W) uint16, int32 or float32, -> (H, W) uint8."""
    if np.issubdtype(pixels.dtype, np.integer) and pixels.min() >= 0 and pixels.max() < 2**16:
        return (pixels >> 8).astype(np.uint8)
    values = pixels.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = values[finite].min(), values[finite].max()
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return ((values - low) * (255 / max(high - low, np.finfo(np.float64).tiny))).round().astype(np.uint8)
