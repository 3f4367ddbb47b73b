"""TIFF files, which hold anything: their header without a library, and the samples that Pillow does not read.

Shapes: H, W height and width; S samples per pixel, that is bands and alpha.
"""

import io
import logging
import math
import struct
from typing import NamedTuple

import numpy as np

_MAX_ENTRIES = 4096  # tags of a page; files of microscopes have some dozens
_MAX_TAG_BYTES = 2**26
_MAX_STRIPS = 100_000  # strips or tiles; an image of 50,000 rows has as many strips at most

_SIZE_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}

_COMPRESSION = {
    1: "no", 2: "CCITT", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 6: "JPEG (old)", 7: "JPEG", 8: "Deflate",
    32773: "PackBits", 32946: "Deflate", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC",
    34925: "LZMA", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL",
}  # fmt: skip
_KIND = {1: "u", 2: "i", 3: "f", 4: "u"}  # of the samples, by their format; 4: not said
_KIND_NAME = {"u": "unsigned integers", "i": "signed integers", "f": "floating-point numbers", "c": "complex numbers"}


class TiffHeader(NamedTuple):
    """What the first page of a TIFF file says of itself.

    Attributes:
        size: Stored (width, height) in pixels.
        bits: Largest number of bits of a sample.
        samples: Samples per pixel.
        kind: Type of the samples as a letter of NumPy: "u", "i", "f" or "c".
        photometric: 0: white is 0; 1: black is 0; 2: RGB; 3: palette; others see the TIFF specification.
        extra: What the samples after the colors mean: 0 not said, 1 and 2 alpha.
        compression: Number of the compression scheme.
        orientation: As in EXIF.
        nodata: Value of pixels without data, as GDAL writes it.
        has_more_pages: Whether another page follows.
    """

    size: tuple[int, int]
    bits: int
    samples: int
    kind: str
    photometric: int
    extra: tuple[int, ...]
    compression: int
    orientation: int
    nodata: float | None
    has_more_pages: bool

    @property
    def alpha(self) -> int | None:
        """Position of the alpha sample, None without one."""
        first = self.samples - len(self.extra)
        return next((first + i for i, meaning in enumerate(self.extra) if meaning in (1, 2)), None)

    @property
    def num_bands(self) -> int:
        """Samples per pixel without alpha."""
        return self.samples - (self.alpha is not None)

    @property
    def is_deep(self) -> bool:
        """Whether samples are anything else than unsigned integers of up to 8 bits."""
        return self.bits > 8 or self.kind != "u"

    def __str__(self) -> str:
        how = _COMPRESSION.get(self.compression, f"number {self.compression}")
        kind = _KIND_NAME.get(self.kind, "numbers of unknown type")
        return f"a TIFF of {self.samples} band(s) x {self.bits} bits, {kind}, {how} compression"


def is_tiff(data: bytes) -> bool:
    """Whether the bytes begin as a TIFF or BigTIFF file."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_tiff_header(data: bytes) -> TiffHeader:
    """Reads the tags of the first page, and refuses those that would eat memory or time in a library.

    Raises:
        ValueError: Tags are missing, cut off or absurd.
    """
    order, is_big = "<" if data[:2] == b"II" else ">", data[2 if data[:2] == b"II" else 3] == 43
    try:
        tags, following = _read_tags(data, order, is_big)
    except struct.error as error:
        raise ValueError(f"a TIFF whose tags are cut off or damaged: {error}") from error
    if 256 not in tags or 257 not in tags:
        raise ValueError("a TIFF without width and height")
    samples = tags.get(277, (1,))[0]
    kinds, photometric = tags.get(339, (1,)), tags.get(262, (1,))[0]
    extra = tags.get(338, ())
    return TiffHeader(
        size=(tags[256][0], tags[257][0]),
        bits=max(tags.get(258, (1,))),
        samples=samples,
        kind=_KIND.get(max(kinds), "c"),
        photometric=photometric,
        extra=extra[:samples],
        compression=tags.get(259, (1,))[0],
        orientation=tags.get(274, (1,))[0],
        nodata=_nodata(tags.get(42113, ())),
        has_more_pages=following != 0,
    )


def _read_tags(data: bytes, order: str, is_big: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """Integer tags of the first page that matter here, and where the next page begins (0: there is none)."""
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


def read_stored(data: bytes, header: TiffHeader) -> np.ndarray:
    """Reads the first page with `tifffile`, which knows all numbers of bands and bits, but not all compressions.

    Returns:
        The samples as they are stored, (H, W, S).

    Raises:
        ValueError: The file is damaged, or its compression or layout needs what is not there.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its remarks on broken metadata, once per image
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        samples, axes = page.asarray(), page.axes
    if axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"its axes are {axes}, not rows, columns and samples")
    samples = samples[..., None] if axes == "YX" else samples
    samples = np.moveaxis(samples, 0, -1) if axes == "SYX" else samples
    if math.prod(samples.shape) != math.prod(header.size) * header.samples:
        raise ValueError(f"its samples are {samples.shape}")
    return samples
