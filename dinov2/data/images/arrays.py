"""Images in NumPy's files, NPY and NPZ: their header, and their pixels."""

import io
import math
import zipfile
from typing import IO

import numpy as np

_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"


def is_array(data: bytes) -> bool:
    """Whether a file begins like NPY, or like NPZ, which is a zip archive."""
    return data.startswith((_NPY, _ZIP))


def read_array_shape(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array, from its header; a ValueError if it cannot be an image."""
    with _opened(data) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.kind not in "uif":
        raise ValueError(f"an array of {dtype}; images have integers or floating-point numbers")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of shape {shape}; images are (height, width), with bands as third or first axis")
    return shape, dtype


def read_pixels_of_array(data: bytes, axis: str) -> np.ndarray:
    """The pixels (H, W, bands); `axis` as in `bands_are_first`."""
    shape, dtype = read_array_shape(data)
    with _opened(data) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.nbytes != math.prod(shape) * dtype.itemsize:
        raise ValueError("its pixels are truncated")
    if len(shape) == 2:
        return array[..., None]
    return np.moveaxis(array, 0, -1) if bands_are_first(shape, axis) else array


def bands_are_first(shape: tuple[int, ...], axis: str) -> bool:
    """Whether the first of the axes of an array is that of the bands, and not the last.

    Args:
        shape: Of the array.
        axis: "first", "last", or "auto": if two neighboring axes are equally long, these are height and width; else the
            bands are the shorter one of the first and the last axis.
    """
    if len(shape) != 3 or axis != "auto":
        return len(shape) == 3 and axis == "first"
    first, middle, last = shape
    if (first == middle) != (middle == last):
        return middle == last
    return first < last


def _opened(data: bytes) -> IO[bytes]:
    """The NPY file, which may be the only one in an NPZ file, or that of the name `image`."""
    if data.startswith(_NPY):
        return io.BytesIO(data)
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise ValueError(f"a zip archive, or an NPZ file, that is damaged: {error}") from error
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    if not names:
        raise ValueError(f"a zip archive without arrays of NumPy; it has {', '.join(archive.namelist()[:4])}")
    if len(names) > 1 and "image.npy" not in names:
        found = ", ".join(name.removesuffix(".npy") for name in names[:8])
        raise ValueError(f"an NPZ file of {len(names)} arrays, none of them named image: {found}")
    return archive.open(names[0] if len(names) == 1 else "image.npy")
