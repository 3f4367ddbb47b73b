"""TIFF files: their header, read without a library, and samples that Pillow does not support.

Shapes: H, W height and width; S samples per pixel: bands and alpha.
"""

import io
import logging
import math
import struct
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.images.orientation import upright

_MAX_ENTRIES = 4096  # tags of a page; files from microscopes have dozens
_MAX_TAG_BYTES = 2**26
_MAX_STRIPS = 100_000  # strips or tiles; an image of 50,000 rows has at most 50,000 strips

_SIZE_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}

_COMPRESSION = {
    1: "no", 2: "CCITT", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 6: "JPEG (old)", 7: "JPEG", 8: "Deflate",
    32773: "PackBits", 32946: "Deflate", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC",
    34925: "LZMA", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL",
}  # fmt: skip
_KIND = {1: "u", 2: "i", 3: "f", 4: "u"}  # type of the samples by their format; 4: unspecified
_KIND_NAME = {"u": "unsigned integers", "i": "signed integers", "f": "floating-point numbers", "c": "complex numbers"}


class TiffHeader(NamedTuple):
    """The header of the first page of a TIFF file."""

    size: tuple[int, int]  # stored (width, height) in pixels
    bits: int  # maximum per sample
    samples: int  # per pixel
    kind: str  # type of the samples as a NumPy kind: "u", "i", "f" or "c"
    photometric: int  # color model; 0: white is 0; 1: black is 0; 2: RGB; 3: palette; others as in the specification
    extra: tuple[int, ...]  # meaning of the samples after the colors; 0: unspecified; 1 and 2: alpha
    compression: int  # number of the scheme
    orientation: int  # as in EXIF
    nodata: float | None  # value of pixels without data, as written by GDAL
    has_more_pages: bool

    @property
    def alpha(self) -> int | None:
        """Index of the alpha sample; None without alpha."""
        first = self.samples - len(self.extra)
        return next((first + i for i, meaning in enumerate(self.extra) if meaning in (1, 2)), None)

    @property
    def num_bands(self) -> int:
        """Samples per pixel, not counting alpha."""
        return self.samples - (self.alpha is not None)

    @property
    def is_deep(self) -> bool:
        """Whether samples are not unsigned integers of up to 8 bits."""
        return self.bits > 8 or self.kind != "u"

    def __str__(self) -> str:
        how = _COMPRESSION.get(self.compression, f"number {self.compression}")
        kind = _KIND_NAME.get(self.kind, "numbers of unknown type")
        return f"a TIFF of {self.samples} band(s) x {self.bits} bits, {kind}, {how} compression"


def is_tiff(data: bytes) -> bool:
    """Whether the first bytes are those of a TIFF or BigTIFF file."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_tiff_header(data: bytes) -> TiffHeader:
    """Read the tags of the first page; those that are missing or damaged, or take a library too long, are errors."""
    order, is_big = "<" if data[:2] == b"II" else ">", data[2 if data[:2] == b"II" else 3] == 43
    try:
        tags, following = _read_tags(data, order, is_big)
    except struct.error as error:
        raise ValueError(f"a TIFF whose tags are truncated or damaged: {error}") from error
    if 256 not in tags or 257 not in tags:
        raise ValueError("a TIFF without width and height")
    samples = tags.get(277, (1,))[0]
    return TiffHeader(
        size=(tags[256][0], tags[257][0]),
        bits=max(tags.get(258, (1,))),
        samples=samples,
        kind=_KIND.get(max(tags.get(339, (1,))), "c"),
        photometric=tags.get(262, (1,))[0],
        extra=tags.get(338, ())[:samples],
        compression=tags.get(259, (1,))[0],
        orientation=tags.get(274, (1,))[0],
        nodata=_nodata(tags.get(42113, ())),
        has_more_pages=following != 0,
    )


def _read_tags(data: bytes, order: str, is_big: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """Read the relevant integer tags of the first page, and the offset of the next page (0: none)."""
    start = struct.unpack_from(f"{order}Q", data, 8)[0] if is_big else struct.unpack_from(f"{order}I", data, 4)[0]
    count_format, entry_format, offset_format = ("Q", "HHQ", "Q") if is_big else ("H", "HHI", "I")
    (num_entries,) = struct.unpack_from(order + count_format, data, start)
    if num_entries > _MAX_ENTRIES:
        raise ValueError(f"a TIFF of {num_entries:,} tags")
    position = start + struct.calcsize(order + count_format)
    inline = struct.calcsize(order + offset_format)
    step = struct.calcsize(order + entry_format) + inline
    tags: dict[int, tuple[int, ...]] = {}
    total = 0
    for entry in range(position, position + num_entries * step, step):
        tag, kind, count = struct.unpack_from(order + entry_format, data, entry)
        size = _SIZE_OF_TYPE.get(kind, 1) * count
        total += size
        if total > _MAX_TAG_BYTES or size > len(data):
            raise ValueError(f"a TIFF whose tags claim {total:,} bytes")
        if tag in (273, 324) and count > _MAX_STRIPS:
            raise ValueError(f"a TIFF of {count:,} strips or tiles, limit {_MAX_STRIPS:,}")
        where = entry + step - inline
        if size > inline:
            (where,) = struct.unpack_from(order + offset_format, data, where)
        if tag == 42113:
            tags[tag] = tuple(data[where : where + min(count, 64)])
        elif kind in _INTEGERS and tag in (256, 257, 258, 259, 262, 274, 277, 338, 339):
            tags[tag] = struct.unpack_from(f"{order}{min(count, 1024)}{_INTEGERS[kind]}", data, where) or (0,)
    (following,) = struct.unpack_from(order + offset_format, data, position + num_entries * step)
    return tags, following


def _nodata(text: tuple[int, ...]) -> float | None:
    try:
        return float(bytes(text).split(b"\0")[0])
    except ValueError:
        return None


def read_stored(data: bytes, header: TiffHeader, all_pages: bool = False) -> np.ndarray:
    """Read the samples (H, W, S) of the first page with `tifffile`, or those of all pages one after the other.

    It supports all numbers of bands and bits, but not all compressions; its errors are of any type.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs broken metadata once per image
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if not all_pages:
            return _samples_of(file.pages[0], header)
        shapes = Counter((page.shape, page.dtype) for page in file.pages)
        if len(shapes) > 1:
            found = ", ".join(f"{count} of {dtype} {shape}" for (shape, dtype), count in shapes.items())
            raise ValueError(f"its pages cannot be bands of one image, as they differ: {found}")
        return np.concatenate([_samples_of(page, header) for page in file.pages], axis=2)


def _samples_of(page: Any, header: TiffHeader) -> np.ndarray:
    samples, axes = page.asarray(), page.axes
    if axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"its axes are {axes}, not rows, columns and samples")
    if axes == "YX":
        samples = samples[..., None]
    elif axes == "SYX":
        samples = np.moveaxis(samples, 0, -1)
    if math.prod(samples.shape) != math.prod(header.size) * header.samples:
        raise ValueError(f"its samples have shape {samples.shape}")
    return np.asarray(samples)


def count_pages(data: bytes) -> int:
    """The number of pages of a TIFF file, without the reduced versions of an image that some programs add."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return len(_whole_pages(file)) or 1


def _whole_pages(file: Any) -> list[Any]:
    return [page for page in (each.aspage() for each in file.pages) if not page.is_reduced]


def read_page(data: bytes, number: int) -> np.ndarray:
    """The pixels (H, W, bands) of a page, counted as `count_pages` does, upright and with black as 0."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = _whole_pages(file)[number]
        samples = page.asarray()
        if page.axes not in ("YX", "YXS", "SYX"):
            raise ValueError(f"the axes of its page {number} are {page.axes}, not rows, columns and samples")
        samples = samples[..., None] if page.axes == "YX" else samples
        samples = np.moveaxis(samples, 0, -1) if page.axes == "SYX" else samples
        if page.photometric == 0 and samples.dtype.kind == "u":
            samples = np.iinfo(samples.dtype).max - samples
        orientation = page.tags.get(274)
    return upright(samples, None if orientation is None else int(orientation.value))
