"""Detect damaged files of weights by their checksums, which their usual readers ignore.

Files of `torch.save` are zip archives with a CRC-32 of each member, which `torch.load` does not verify. The safetensors
format has no checksums: files written by this package have a CRC-32 of the file in their metadata, which other readers
ignore.
"""

import logging
import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

CHECKSUM_KEY = "crc32"  # metadata key of the checksum in a safetensors file
NO_CHECKSUM = "0" * 8  # placeholder for which the checksum is calculated, in hexadecimal digits

_ENTRY = re.compile(rb'"%s":"([0-9a-f]{8})"' % CHECKSUM_KEY.encode())
_CHUNK_BYTES = 1 << 22


def check_zip(file: str | Path | BinaryIO) -> None:
    """Verify the checksums of a zip archive, such as a file of `torch.save`; a ValueError names the damaged member.

    Needs less than a second per gigabyte in addition to reading it, and a few megabytes of memory.
    """
    name = "the table of contents"
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = member.filename
                with archive.open(member) as content:
                    while content.read(_CHUNK_BYTES):
                        pass
    except OSError:
        raise
    except Exception as error:  # on unexpected bytes zipfile raises various errors
        raise ValueError(f"{name} in it is damaged ({error or type(error).__name__})") from error


def check_safetensors(path: Path) -> None:
    """Verify the checksum of a safetensors file, a ValueError if it differs; logs if it has none."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), path.stat().st_size))
        entry = _ENTRY.search(header)
        if entry is None:
            logger.info("%s has no checksum: damage to its numbers is not detected", path)
            return
        found = zlib.crc32(length + header[: entry.start(1)] + NO_CHECKSUM.encode() + header[entry.end(1) :])
        while chunk := file.read(_CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
    if found != int(entry[1], 16):
        raise ValueError(f"its checksum is {found:08x}, and was {entry[1].decode()} when it was written")


def with_checksum(content: bytes) -> list[bytes | memoryview]:
    """Insert the checksum into the content of a safetensors file with `{CHECKSUM_KEY: NO_CHECKSUM}` in its metadata.

    Returns the parts to write one after the other; tensors are not copied.
    """
    entry = _ENTRY.search(content, 0, 8 + int.from_bytes(content[:8], "little"))
    assert entry is not None and entry[1].decode() == NO_CHECKSUM, "the metadata has a placeholder"
    return [content[: entry.start(1)], b"%08x" % zlib.crc32(content), memoryview(content)[entry.end(1) :]]
