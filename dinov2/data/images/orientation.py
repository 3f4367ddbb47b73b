"""The EXIF orientation of images, and turning them upright."""

import numpy as np
from PIL import ExifTags, Image

# EXIF orientation -> the transposition that turns the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations of images that are stored rotated by 90 degrees
_MAX_EXIF_BYTES = 2**16 - 1  # bytes searched for the orientation: the maximum of a JPEG file


def to_upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """Turn an image upright that was stored with an orientation."""
    # Not ImageOps.exif_transpose: it copies upright images and rewrites the EXIF block of the others, which fails on
    # the malformed blocks that are common in images from the web.
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """The same for an array (height, width, bands)."""
    if orientation not in UPRIGHT:
        return pixels
    position = np.arange(pixels.shape[0] * pixels.shape[1], dtype=np.int32).reshape(pixels.shape[:2])
    return pixels.reshape(-1, pixels.shape[2])[np.asarray(to_upright(Image.fromarray(position), orientation))]


def read_orientation(image: Image.Image) -> int | None:
    """The orientation in the EXIF block of an opened image; None if there is none, or it is damaged."""
    try:
        block = image.info.get("exif")
        if block is not None and len(block) > _MAX_EXIF_BYTES:  # tags that all refer to one large value fill the memory
            exif = Image.Exif()
            exif.load(block[:_MAX_EXIF_BYTES])
            return exif.get(ExifTags.Base.Orientation)
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None  # an unreadable EXIF block has no orientation
