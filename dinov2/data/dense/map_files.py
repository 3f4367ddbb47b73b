"""The files of maps: class indices, colors of classes, and depths, read as they are stored.

Legend: H, W height and width of a map. Errors are of any type, and name the problem but not the file.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov2.data.dense.pairing import named
from dinov2.data.images.formats import open_header
from dinov2.data.images.limits import check_header, check_pixels

NUMPY_MAGIC = b"\x93NUMPY"
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # of Pillow: one integer per pixel
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")  # more than 8 bits
_COLOR_MODES = ("1", "L", "P", "RGB", "RGBA")
_GRAY_STEPS = {"L;2": 85, "L;4": 17}  # raw modes that Pillow scales to 0..255, and the difference of adjacent levels
_UNKNOWN = -2  # in a label table: a value that may not occur
_MOST_NAMED = 6  # wrong values or colors in a message
MAX_VALUE = 2**16 - 1  # of a label in a file
MAX_CLASS = 2**15 - 1  # of a class index


class BadMapError(ValueError):
    """A sample of a dataset has no usable map; names the sample and the file, the cause is chained."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def read_indices(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Read an image file of one integer per pixel: gray levels, or the indices of a palette; (H, W) int32.

    Raises:
        ValueError: The file has colors or is compressed with loss, so that its pixels are not class indices.
    """
    image = _opened(data, max_pixels)
    if image.mode not in _INDEX_MODES:
        raise ValueError(_advice_on_colors(image))
    step = _GRAY_STEPS.get(_raw_mode(image), 1)
    return np.asarray(image).astype(np.int32) // step


def read_colors(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Read an image file of 8 bits per channel as colors, those of the palette if it has one; (H, W, 3) uint8."""
    image = _opened(data, max_pixels)
    if image.mode not in _COLOR_MODES:
        raise ValueError(f"it has mode {image.mode}; a map of colors has 8 bits per channel (RGB)")
    return np.asarray(image.convert("RGB"))


def read_depths(data: bytes, *, scale: float, max_pixels: int, float_scale: float = 1.0) -> np.ndarray:
    """Read depths in meters, 0 where there is no measurement: (H, W) float32.

    Integers of more than 8 bits are divided by ``scale``, floating-point values (`.npy`, or a TIFF file) by
    ``float_scale``; of these, values that are not finite are no measurements.

    Raises:
        ValueError: The file has 8 bits, several channels, or negative depths.
    """
    if data.startswith(NUMPY_MAGIC):
        stored = _numpy_depths(data, max_pixels)
    else:
        image = _opened(data, max_pixels)
        if image.mode not in (*_DEEP_MODES, "F"):
            bits = "8 bits" if image.mode in ("L", "P", "1") else "several channels"
            raise ValueError(
                f"it has {bits} (mode {image.mode}), perhaps a visualization; depths need one channel of 16 bits, or "
                "meters in a .npy file"
            )
        stored = np.asarray(image)
    if stored.dtype.kind == "f":
        depths = (np.where(np.isfinite(stored), stored, 0) / float_scale).astype(np.float32)
    else:
        depths = (stored / scale).astype(np.float32)
    if count := int((depths < 0).sum()):
        raise ValueError(f"{count:,} of {depths.size:,} depths are negative, down to {depths.min():.6g} m")
    return depths


def _numpy_depths(data: bytes, max_pixels: int) -> np.ndarray:
    stored = np.load(io.BytesIO(data), allow_pickle=False)
    if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[2]):
        stored = stored.squeeze(0 if stored.shape[0] == 1 else 2)
    if stored.ndim != 2 or stored.dtype.kind != "f":
        raise ValueError(f"the array is {stored.dtype} of shape {stored.shape}; expected (H, W) floats, in meters")
    check_pixels((stored.shape[1], stored.shape[0]), max_pixels)
    return stored


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image file and check its size; pixels are decoded later."""
    check_header(data)
    image = open_header(data)
    check_pixels(image.size, max_pixels)
    if image.format == "JPEG":
        raise ValueError("it is a JPEG file, whose lossy compression changes values; a map needs PNG or TIFF")
    return image


def _raw_mode(image: Image.Image) -> str:
    """The layout of stored pixels, of which `Image.mode` is the decoded form."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _advice_on_colors(image: Image.Image) -> str:
    channels = "channels" if len(image.getbands()) > 1 else "channel"
    found = f"it has {len(image.getbands())} {channels} (mode {image.mode}), a map of class indices has one integer"
    if image.mode in ("RGB", "RGBA"):
        red, green, blue = np.moveaxis(np.asarray(image)[..., :3], 2, 0)
        if (red == green).all() and (red == blue).all():
            return f"{found}; red, green and blue are equal: save one of them (mode L)"
        return f"{found}; if colors stand for classes, SegmentationFolder reads them with colors=FILE"
    return found


# --- Values of files to class indices --------------------------------------------------------------------------------


def label_lookup(classes: Mapping[int, int]) -> np.ndarray:
    """Table from the value in a file to the class index, (largest value + 1,) int16, from the allowed ones."""
    if not classes or min(classes) < 0 or max(classes) > MAX_VALUE or max(classes.values()) > MAX_CLASS:
        raise ValueError(
            f"labels of files must be from 0 to {MAX_VALUE:,} and class indices from 0 to {MAX_CLASS:,}, got "
            f"{dict(sorted(classes.items())[:_MOST_NAMED])} ..."
        )
    table = np.full(max(classes) + 1, _UNKNOWN, np.int16)
    table[list(classes.keys())] = list(classes.values())
    return table


def to_classes(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map the integers of a file to class indices by a `label_lookup`: (H, W) -> (H, W) int16.

    Raises:
        ValueError: Names the values that are not in the table, the number of their pixels, and what is allowed.
    """
    inside = (values >= 0) & (values < len(table))
    labels = table[values] if inside.all() else np.where(inside, table[np.where(inside, values, 0)], _UNKNOWN)
    if (labels == _UNKNOWN).any():
        wrong, counts = np.unique(values[labels == _UNKNOWN], return_counts=True)
        wrong_values = [f"{value} ({count:,} pixels)" for value, count in zip(wrong, counts, strict=True)]
        allowed = _ranges(np.flatnonzero(table != _UNKNOWN).tolist())
        listed = named(wrong_values, most=_MOST_NAMED)
        ignored = _ranges(np.flatnonzero(table == -1).tolist())
        allowed += f" ({ignored}: ignored)" if ignored else ""
        raise ValueError(f"{counts.sum():,} pixels have values of no class: {listed}; allowed: {allowed}")
    return labels.astype(np.int16, copy=False)


def _ranges(values: Sequence[int]) -> str:
    """Sorted integers as text, such as "0 to 20, 255"."""
    starts = [value for i, value in enumerate(values) if i == 0 or values[i - 1] != value - 1]
    ends = [value for i, value in enumerate(values) if i == len(values) - 1 or values[i + 1] != value + 1]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


class ColorTable(NamedTuple):
    """The colors of classes, sorted by their codes 65536 red + 256 green + blue."""

    codes: np.ndarray  # (n,) int32, ascending
    labels: np.ndarray  # (n,) int16: class index of each

    @classmethod
    def of(cls, colors: Mapping[tuple[int, int, int], int]) -> "ColorTable":
        codes = np.array([red << 16 | green << 8 | blue for red, green, blue in colors], np.int32)
        order = codes.argsort()
        return cls(codes[order], np.array(list(colors.values()), np.int16)[order])

    def to_classes(self, pixels: np.ndarray) -> np.ndarray:
        """Map colors, (H, W, 3) uint8, to class indices, (H, W) int16; other colors are a ValueError."""
        wide = pixels.astype(np.int32)
        codes = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
        position = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        unknown = self.codes[position] != codes
        if unknown.any():
            wrong, counts = np.unique(codes[unknown], return_counts=True)
            triples = [f"{code >> 16} {code >> 8 & 255} {code & 255}" for code in wrong.tolist()]
            wrong_values = [f"{triple} ({count:,} pixels)" for triple, count in zip(triples, counts, strict=True)]
            listed = named(wrong_values, most=_MOST_NAMED)
            raise ValueError(f"{counts.sum():,} pixels have colors (red green blue) of no class: {listed}")
        return self.labels[position]
