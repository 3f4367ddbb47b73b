"""Chosen bands of image files: any number of them, of any type of pixels.

The bands of a file are its samples per pixel as they are stored, also alpha, counted from 0.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dinov2.data.images.arrays import bands_are_first, read_array_shape, read_pixels_of_array
from dinov2.data.images.band_image import AnyImage, BandImage
from dinov2.data.images.deep_pixels import Samples, check_bytes
from dinov2.data.images.encoded import EncodedImage, decoding
from dinov2.data.images.limits import check_pixels
from dinov2.data.images.options import ImageOptions, range_of_each
from dinov2.data.images.value_range import ValueRange, measure_range, to_8_bit, to_levels

_FEW = 16  # pixels; a side of a page is at most so long, and there are more pages, if these are taken for rows


class StoredBands(Protocol):
    """A file all of whose bands can be decoded."""

    size: tuple[int, int]  # (width, height), upright
    is_deep: bool  # whether samples are other than 8-bit unsigned integers

    @property
    def has_more_frames(self) -> bool: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def lost_bits(self) -> int: ...

    @property
    def white_is_zero(self) -> bool: ...

    def all_bands(self) -> np.ndarray:
        """Returns (height, width, bands) of any real type, upright; NaN where there is no data."""


class ArrayFile:
    """An NPY or NPZ file of which only the header has been read; errors are of any type."""

    has_more_frames, lost_bits, white_is_zero, num_pages = False, 0, False, 1

    def __init__(self, data: bytes, options: ImageOptions) -> None:
        shape, dtype = read_array_shape(data)
        self.layout = "" if len(shape) == 2 else f"arrays of shape {shape}"
        if len(shape) == 2:
            shape = (*shape, 1)
        self._data, self._axis = data, options.bands_axis
        height, width, bands = (*shape[1:], shape[0]) if bands_are_first(shape, self._axis) else shape
        check_pixels((width, height), options.max_pixels)
        check_bytes((width, height), bands, 8 * dtype.itemsize, len(data), options.max_pixels)
        self.size, self.is_deep = (width, height), dtype != np.uint8
        if self.layout:
            self.layout += f" are read as {bands} band(s) of {width} x {height} pixels (width x height)"

    def all_bands(self) -> np.ndarray:
        return read_pixels_of_array(self._data, self._axis)


class BandFile(EncodedImage):
    """The bands `ImageOptions.bands` of an image file.

    Three bands become an 8-bit RGB image; another number becomes a `BandImage`, whose levels are not rounded. 8-bit
    values are levels already; others are mapped by the value range of their band. Without chosen bands, those of an
    array are used like those of any other file: the first three, or one, in gray.

    Args:
        file: The file, opened.
        options: Options of reading it; datasets set their value range before it is decoded.
        data: Its content.
    """

    num_dropped_bands, has_alpha = 0, False

    def __init__(self, file: StoredBands, options: ImageOptions, data: bytes) -> None:
        self.options, self.size, self.is_deep = options, file.size, file.is_deep
        self.lost_bits = file.lost_bits
        self.has_more_frames = file.has_more_frames and options.pages != "bands"
        self.layout = getattr(file, "layout", "")  # how an array is read, for messages
        self._file, self._data = file, data

    def _chosen(self) -> np.ndarray:
        self._check_pages()
        stored = self._file.all_bands()
        count, bands = stored.shape[2], self.options.bands
        if bands is None:
            return stored[..., : 3 if count >= 3 else 1]
        if max(bands) >= count:
            hint = ""
            if self.has_more_frames:
                width, height = self.size
                pages = f"{self._file.num_pages} pages of {width} x {height} pixels (width x height)"
                hint = f"; it has {pages}: if these are its bands, set images.pages=bands"
            raise ValueError(f"it has {count} band(s), 0 to {count - 1}, but images.bands = {list(bands)}{hint}")
        chosen = stored[..., list(bands)]
        if (nodata := self.options.nodata) is not None and (empty := chosen == nodata).any():
            chosen = np.where(empty, np.nan, chosen)
        return chosen

    def _check_pages(self) -> None:
        """Raise a ValueError for pages that are rows of an image: what tifffile makes of (height, width, bands)."""
        if self._file.has_more_frames and min(self.size) <= _FEW < (count := self._file.num_pages):
            width, height = self.size
            raise ValueError(
                f"its {count} pages of {width} x {height} pixels (width x height) look like the rows of an image that "
                "was written as (height, width, bands): write it with tifffile.imwrite(..., "
                "photometric='minisblack', planarconfig='contig')"
            )

    def samples(self) -> Samples:
        """Decode the chosen bands as they are stored."""
        with decoding(self._data):
            return Samples(self._chosen(), None, is_upright=True)

    def load(self, reduction: int = 1) -> AnyImage:
        with decoding(self._data):
            values = self._chosen()
            to_level = to_8_bit if self.options.channels == 3 else to_levels
            bands = zip(np.moveaxis(values, 2, 0), self._ranges(values), strict=True)
            levels = np.stack([to_level(band, value_range) for band, value_range in bands], axis=2)
            if self._file.white_is_zero:
                levels = 255 - levels
            if self.options.channels == 3:
                image: Any = Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0]).convert("RGB")
            else:
                image = BandImage(levels, self.options.shown)
            return image if reduction == 1 else image.reduce(reduction)

    def _ranges(self, values: np.ndarray) -> Sequence[ValueRange]:
        """The range of each band, measured on this image alone if there is none."""
        count, own = values.shape[2], self.options.bands is not None
        if not self.is_deep:
            return [(0.0, 255.0)] * count
        if self.options.value_range is not None:
            return range_of_each(self.options.value_range, count)
        parts = np.moveaxis(values, 2, 0) if own else [values] * count
        return [measure_range([part]) or (0.0, 1.0) for part in parts]

    def is_transparent(self) -> bool:
        return False
