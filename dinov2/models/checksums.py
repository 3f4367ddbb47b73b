"""Damage that readers do not notice: the checksums in files of weights are compared with what is in them.

Files of `torch.save` are zip archives with a CRC-32 of each member, which `torch.load` does not look at. The format of
safetensors has none: files of ours carry a CRC-32 of the whole file in their metadata, which other readers pass over.
"""

import logging
import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

CHECKSUM_KEY = "crc32"
"""The entry with the checksum in the metadata of a safetensors file."""
NO_CHECKSUM = "0" * 8
"""What stands in its place until the file is written, and while the checksum is calculated; hexadecimal digits."""

_ENTRY = re.compile(rb'"%s":"([0-9a-f]{8})"' % CHECKSUM_KEY.encode())
_CHUNK_BYTES = 1 << 22


def check_zip(file: str | Path | BinaryIO) -> None:
    """Read a zip archive, such as a file of `torch.save` or an `.npz`, and compare every checksum in it.

    It takes less than a second per gigabyte besides the reading, and a few megabytes of memory.

    Args:
        file: a path, or an open file that can be searched.

    Raises:
        OSError: if it cannot be read.
        ValueError: if anything in it is damaged; names the member.
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
    except Exception as error:  # on bytes that it does not expect zipfile fails in many ways
        raise ValueError(f"{name} in it is damaged ({error or type(error).__name__})") from error


def check_safetensors(path: Path) -> None:
    """Compare the checksum in a safetensors file of ours with its content; log that others have none.

    Raises:
        OSError: if it cannot be read.
        ValueError: if anything in it is damaged.
    """
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
    """Fill in the checksum of a safetensors file that is to be written.

    Args:
        content: the file, with {CHECKSUM_KEY: NO_CHECKSUM} in its metadata.

    Returns:
        The parts to write one after the other; no copy is made of the tensors.
    """
    entry = _ENTRY.search(content, 0, 8 + int.from_bytes(content[:8], "little"))
    assert entry is not None and entry[1].decode() == NO_CHECKSUM, "a place for the checksum"
    return [content[: entry.start(1)], b"%08x" % zlib.crc32(content), memoryview(content)[entry.end(1) :]]
