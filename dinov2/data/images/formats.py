"""The supported image formats, which are detected by content."""

import importlib
import io
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

# Format -> the module of Pillow that reads it. None of them starts another program, unlike that of EPS.
FORMATS = {
    "JPEG": "Jpeg", "PNG": "Png", "WEBP": "WebP", "TIFF": "Tiff", "BMP": "Bmp", "GIF": "Gif", "PPM": "Ppm",
    "JPEG2000": "Jpeg2K", "AVIF": "Avif",
}  # fmt: skip

# First bytes of other files that are often found among images -> their kind.
_OTHERS = {
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"<": "HTML or XML, such as the page of a failed download",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed by gzip",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "HDF5",
    b"\0\0\1\0": "an icon",
    b"SIMPLE": "FITS",
    b"version https://git-lfs": "a pointer of Git LFS: run git lfs pull",
}


class UnknownFormatError(ValueError):
    """A file of an unsupported format; the message names its kind."""


@cache
def _openers() -> list[tuple[Callable[[bytes], bool | str], Callable[..., Any]]]:
    """For each format that this Pillow supports: a test of the first bytes, and what opens the file."""
    for name in FORMATS.values():
        with suppress(ImportError):  # AVIF needs Pillow 11.3
            importlib.import_module(f"PIL.{name}ImagePlugin")
    found = [Image.OPEN[name] for name in FORMATS if name in Image.OPEN]
    return [(accept, factory) for factory, accept in found if accept is not None]


def open_header(data: bytes) -> Image.Image:
    """Open an image file of a format in `FORMATS`, detected by its content, without decoding its pixels.

    Raises:
        UnknownFormatError: The file has another format.
        Exception: Of any type, for a damaged file.
    """
    # Not Image.open, whose limit on pixels cannot be set per image.
    prefix = data[:16]
    for accept, factory in _openers():
        accepted = accept(prefix)
        if isinstance(accepted, str):
            raise UnknownFormatError(accepted)
        if accepted:
            return factory(io.BytesIO(data), "")
    known = ", ".join(name for name in FORMATS if name in Image.OPEN)
    raise UnknownFormatError(f"in no supported image format ({known}); {_describe(data)}")


def begins_as_image(data: bytes) -> bool:
    """Whether the first bytes of a file, 16 or more, are those of a format in `FORMATS`, or of NumPy's NPY."""
    return data.startswith(b"\x93NUMPY") or any(accept(data[:16]) for accept, _ in _openers())


def _describe(data: bytes) -> str:
    if not data:
        return "the file is empty"
    if not data.strip(b"\0"):
        return "it has only zero bytes"
    if data[128:132] == b"DICM":
        return "it is DICOM: convert it to PNG or TIFF of 16 bits"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "it is HEIC: convert it to JPEG"
    if data[257:262] == b"ustar":
        return "it is a tar archive: unpack it"
    start = data[:64].lstrip()
    name = next((name for begin, name in _OTHERS.items() if start.lower().startswith(begin.lower())), None)
    return f"it begins with {data[:8]!r}" if name is None else f"it is {name}"


# --- Samples of more than 8 bits ---


def is_cut_to_8_bits(image: Image.Image) -> bool:
    """Whether Pillow keeps only the upper 8 of 16 bits of an opened image."""
    if image.format == "PPM":
        return _ppm_maximum(image) > 255 and not is_deep(image)
    return image.format in ("PNG", "TIFF") and ";16" in _raw_mode(image) and not is_deep(image)


def bits_of_jpeg2000(data: bytes) -> int:
    """Bits of the first sample, from the header of a JPEG 2000 file; 8 for other files."""
    if data[:4] != b"\xff\x4f\xff\x51" and data[4:8] != b"jP  ":
        return 8
    start = data.find(b"\xff\x4f\xff\x51")
    return (data[start + 42] & 127) + 1 if 0 <= start < len(data) - 42 else 8


def is_deep(image: Image.Image) -> bool:
    """Whether Pillow reads the image, which then has one band, in more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def read_16_bits(image: Image.Image, again: Image.Image) -> np.ndarray | None:
    """Read all 16 bits of an image with several samples per pixel, of which Pillow keeps 8: decodes each half in turn.

    The image must be opened twice, but not loaded. The samples are (H, W, S) uint16; None for an unsupported layout.
    """
    if image.format == "PPM":
        return _read_ppm(image)
    mode, _, order = _raw_mode(image).partition(";16")
    if mode == "LA":  # read two samples of 16 bits as four of 8
        _set_raw_mode(image, "RGBA")
        halves = np.asarray(image).astype(np.uint16)
        return halves[..., 0::2] << 8 | halves[..., 1::2]
    if mode not in ("RGB", "RGBX", "RGBA") or order not in ("L", "B", "N"):
        return None
    swapped = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}[order]
    _set_raw_mode(again, f"{mode};16{swapped}")
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)


def _ppm_maximum(image: Any) -> int:
    """Maximum value in the header of a PNM file; 1 if there is none."""
    arguments = image.tile[0][3]
    return int(arguments[-1]) if isinstance(arguments, tuple) else 1


def _read_ppm(image: Any) -> np.ndarray:
    """Read a PPM file, (H, W, 3) uint16, scaled so that white is 65535 as in grayscale images of Pillow."""
    decoder, _, offset, _ = image.tile[0]
    shape, white = (image.height, image.width, 3), _ppm_maximum(image)
    file = image.fp
    file.seek(offset)
    if decoder == "ppm_plain":
        lines = (line.partition(b"#")[0] for line in file)
        values = np.array(b" ".join(lines).split()[: math.prod(shape)], np.uint16)
    else:
        values = np.frombuffer(file.read(2 * math.prod(shape)), ">u2")
    if values.size < math.prod(shape):
        raise ValueError(f"its pixels are truncated: {values.size:,} of {math.prod(shape):,} samples")
    return np.minimum(np.rint(values * (65535 / white)), 65535).astype(np.uint16).reshape(shape)


def _raw_mode(image: Image.Image) -> str:
    """The raw mode of Pillow's decoder: the layout of stored samples."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0]) if isinstance(arguments, tuple) and arguments else str(arguments)


def _set_raw_mode(image: Image.Image, raw_mode: str) -> None:
    def changed(tile: Any) -> Any:
        arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
        return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)

    image.tile = [changed(tile) for tile in image.tile]  # type: ignore[attr-defined]
