"""Pixels of more than 8 bits, or with bands that Pillow does not support: read from files and mapped to RGB."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov2.data.images.formats import is_cut_to_8_bits, is_deep, open_header, read_16_bits
from dinov2.data.images.limits import check_pixels
from dinov2.data.images.tiff import TiffHeader, read_stored
from dinov2.data.images.value_range import ValueRange, measure_range, to_8_bit

_MAX_BYTES_PER_PIXEL = 8  # decoded, of all samples; bounds the memory together with the limit on pixels


class Samples(NamedTuple):
    """Pixels as stored; they may still need rotation."""

    values: np.ndarray  # (H, W, 1) or (H, W, 3), any real type; NaN where there is no data
    alpha: np.ndarray | None  # (H, W), integers of the full range of their type or fractions from 0 to 1
    is_upright: bool = False  # whether the orientation in the file has been applied

    @property
    def opaque(self) -> float:
        if self.alpha is None or self.alpha.dtype.kind == "f":
            return 1.0
        return float(np.iinfo(self.alpha.dtype).max)

    @property
    def is_transparent(self) -> bool:
        return self.alpha is not None and float(self.alpha.min()) < self.opaque


def check_usable(tiff: TiffHeader) -> None:
    """Raise a ValueError for samples that are neither grayscale nor RGB."""
    if tiff.kind == "c" or tiff.photometric not in (0, 1, 2):
        raise ValueError(f"{tiff}, color model {tiff.photometric}, which cannot be used; convert it to gray or RGB")


def read_samples(data: bytes, tiff: TiffHeader | None, max_pixels: int) -> Samples:
    """Read the first band of an image file, or the first three, and its alpha; see `all_samples`."""
    stored, is_upright = all_samples(data, tiff, max_pixels)
    if tiff is None:
        num_bands = stored.shape[2] - (stored.shape[2] in (2, 4))
        alpha = num_bands if num_bands < stored.shape[2] else None
    else:
        num_bands, alpha = tiff.num_bands, tiff.alpha
    bands = np.delete(stored, alpha, axis=2) if alpha is not None and alpha < min(num_bands, 3) else stored
    values = bands[..., : 3 if num_bands >= 3 else 1]
    return Samples(values, None if alpha is None else stored[..., alpha], is_upright)


def all_samples(
    data: bytes, tiff: TiffHeader | None, max_pixels: int, all_pages: bool = False
) -> tuple[np.ndarray, bool]:
    """Read all samples of an image file, (H, W, S), and whether they are upright; errors are of any type.

    Files other than TIFF have 16 bits (PNG, PPM) or one band. With `all_pages` the samples of the pages of a TIFF file
    follow each other.
    """
    if tiff is not None:
        return _read_tiff(data, tiff, max_pixels, all_pages)
    stored = _read_by_pillow(data, None)
    assert stored is not None, "Pillow reads all layouts of other formats"
    return stored, False


def map_to_rgb(samples: Samples, tiff: TiffHeader | None, value_range: ValueRange | None) -> Image.Image:
    """Map samples to an image in mode RGB, or RGBA if there is alpha.

    Without a ``value_range``, the range is measured on these values alone, see `RangeMeasurement`.
    """
    if tiff is not None and not tiff.is_deep:
        value_range = (0.0, float(2**tiff.bits - 1))
    levels = to_8_bit(samples.values, value_range or measure_range([samples.values]) or (0.0, 1.0))
    if tiff is not None and tiff.photometric == 0:  # white is 0
        levels = 255 - levels
    image = Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0]).convert("RGB")
    if samples.alpha is not None:
        image.putalpha(Image.fromarray(to_8_bit(samples.alpha, (0.0, samples.opaque))))
    return image


def check_bytes(size: tuple[int, int], samples: int, bits: int, stored_bytes: int, max_pixels: int) -> None:
    """Raise a ValueError for an image of many samples that would take much more memory than its file has bytes."""
    if samples * bits > 8 * max(_MAX_BYTES_PER_PIXEL, stored_bytes // max(math.prod(size), 1)):
        check_pixels((size[0] * samples, size[1]), max_pixels)


def _read_tiff(data: bytes, tiff: TiffHeader, max_pixels: int, all_pages: bool) -> tuple[np.ndarray, bool]:
    """Read all samples of a TIFF file, (H, W, S), and whether their orientation has been applied."""
    check_bytes(tiff.size, tiff.samples, tiff.bits, len(data), max_pixels)
    is_upright = False
    try:
        stored = read_stored(data, tiff, all_pages)
    except Exception as error:
        found = None if all_pages else _read_by_pillow(data, tiff)
        if found is None:
            raise ValueError(
                f"{tiff}, which cannot be read ({error}); convert it to Deflate or no compression, for instance "
                "with gdal_translate -co COMPRESS=DEFLATE"
            ) from error
        stored, is_upright = found, True
    if tiff.nodata is not None and (tiff.kind != "u" or tiff.nodata > 0):
        empty = stored == tiff.nodata
        if empty.any():
            stored = np.where(empty, np.nan, stored)
    return stored, is_upright


def _read_by_pillow(data: bytes, tiff: TiffHeader | None) -> np.ndarray | None:
    """Read all samples by Pillow, (H, W, S), None if it does not support them; those of TIFF files are upright."""
    try:
        image = open_header(data)
    except Exception:
        if tiff is None:
            raise
        return None
    if is_cut_to_8_bits(image):
        return read_16_bits(image, open_header(data))
    if not is_deep(image):
        return None
    stored = np.asarray(image)[..., None]
    # Pillow has signed integers of 32 bits only.
    return stored.view(np.uint32) if tiff is not None and (tiff.kind, tiff.bits) == ("u", 32) else stored
