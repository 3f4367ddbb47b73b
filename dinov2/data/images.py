"""Bytes of an image file -> an upright 8-bit RGB picture, whatever the file holds; and pixels -> a file."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

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


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image file of any format and mode that Pillow reads into an upright RGB picture.

    - Turned by its EXIF orientation. The published code ignores it: on pictures with such a tag, training and
      evaluation differ from the published behaviour.
    - Transparency is dropped, not composited on a background: the colours under it show, as in the published code.
    - 16-bit grey keeps its upper 8 bits; wider integers and floats are scaled by their own range. A plain conversion
      would clip them to white.
    - The first frame of an animation.

    Args:
        data: content of the file.

    Returns:
        A picture in mode RGB.

    Raises:
        ImageDecodeError: truncated, corrupt or unknown data, or more pixels than Pillow's decompression bomb limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on broken metadata and the like: once per picture
            image = Image.open(io.BytesIO(data))
            image.load()  # before the orientation: TIFF is turned while it loads
            return _to_rgb(_turn_upright(image))
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
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return image  # an unreadable EXIF block says nothing about the picture
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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
