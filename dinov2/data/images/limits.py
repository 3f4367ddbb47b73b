"""Limits that reject image files which would take minutes or all memory, before a library decodes them.

Libraries read the parts of a header one by one, some of them in Python, and all scans of a JPEG. A few megabytes,
malicious or from a broken program, can thus block a run. The limits are far above those of real files.
"""

import struct
from collections.abc import Callable, Iterator

_MAX_PARTS = 10_000  # parts of the header of a JPEG or GIF file
_MAX_CHUNKS = 200_000  # chunks of a PNG file; those of pixels have 8 KiB or more
_MAX_SCANS = 100  # scans of a JPEG file; progressive files have about ten
_MAX_SCANNED_PIXELS = 4 * 10**9  # pixels of all scans together, each of which covers the whole image
_MAX_SLOW_BYTES = 2**25  # bytes in formats that Pillow decodes in Python, at about half a second per megabyte


def check_header(data: bytes) -> None:
    """Raise a ValueError for a file whose header has too many parts."""
    for begin, check in _CHECKS.items():
        if data.startswith(begin):
            check(data)


def check_pixels(size: tuple[int, int], limit: int) -> None:
    """Raise a ValueError for an image, (width, height), of more pixels than ``limit``."""
    if (pixels := size[0] * size[1]) > limit:
        raise ValueError(f"{pixels:,} pixels ({size[0]} x {size[1]}), limit {limit:,} (images.max_pixels)")


def check_jpeg_scans(data: bytes, size: tuple[int, int]) -> None:
    """Raise a ValueError for a JPEG file with so many scans that decoding it would take minutes."""
    scans = data.count(b"\xff\xda")  # includes those of a thumbnail; compressed pixels never contain these bytes
    if scans > _MAX_SCANS or scans * size[0] * size[1] > _MAX_SCANNED_PIXELS:
        raise ValueError(f"a JPEG of {size[0]} x {size[1]} pixels in {scans:,} scans, which would take too long")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Type of each chunk of a PNG file and offset of its content."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, position + 8
        position += length + 12


def _check_jpeg(data: bytes) -> None:
    position = 2
    for _ in range(_MAX_PARTS):
        if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] == 0xDA:
            return  # the first scan, or an error that the decoder reports
        is_padding = data[position + 1] == 0xFF
        position += 1 if is_padding else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise ValueError(f"a JPEG with more than {_MAX_PARTS:,} segments before its pixels")


def _check_png(data: bytes) -> None:
    for number, _ in enumerate(png_chunks(data)):
        if number > _MAX_CHUNKS:
            raise ValueError(f"a PNG of more than {_MAX_CHUNKS:,} chunks")


def _check_gif(data: bytes) -> None:
    if len(data) < 13:
        return
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    for _ in range(_MAX_PARTS):
        if position + 2 > len(data) or data[position] != 0x21:
            return  # the first frame
        position += 2
        while position < len(data) and data[position]:
            position += data[position] + 1
            if position > _MAX_PARTS * 256:
                raise ValueError("a GIF with megabytes of comments before its pixels")
        position += 1
    raise ValueError(f"a GIF with more than {_MAX_PARTS:,} blocks before its pixels")


def _check_bmp(data: bytes) -> None:
    if len(data) > _MAX_SLOW_BYTES and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise ValueError(f"a run-length coded BMP of more than {_MAX_SLOW_BYTES >> 20} MiB, which would take too long")


def _check_plain_pnm(data: bytes) -> None:
    if len(data) > _MAX_SLOW_BYTES:
        raise ValueError(f"a PNM in plain text of more than {_MAX_SLOW_BYTES >> 20} MiB, which would take too long")


_CHECKS: dict[bytes, Callable[[bytes], None]] = {
    b"\xff\xd8": _check_jpeg,
    b"\x89PNG\r\n\x1a\n": _check_png,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
    **dict.fromkeys((b"P1", b"P2", b"P3"), _check_plain_pnm),
}
