"""The files in an archive and where their bytes are, so that each can be read without the others."""

import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

_BLOCK, _CHUNK = 512, 2**20  # bytes, of a tar archive, and to read at once
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip archive: signature, lengths of its name and extra field
_ENCRYPTED = 1  # a flag in a zip archive
_METHODS = {zipfile.ZIP_STORED: False, zipfile.ZIP_DEFLATED: True}


class ArchiveError(ValueError):
    """An archive is damaged, truncated, or of a kind that cannot be read at any position."""


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int  # of its bytes in the archive
    size: int  # in the archive
    is_deflated: bool = False


class Listing(NamedTuple):
    """The regular files in an archive, in its order."""

    members: list[Member]
    notes: list[str]  # what is odd about it


def list_tar(file: BinaryIO, path: str) -> Listing:
    """List a tar archive (POSIX, GNU, pax; not compressed) by its headers, without reading its files.

    Links are listed as the files in the archive that they lead to. Errors and notes name `path`.

    Raises:
        ArchiveError: It is compressed, damaged or truncated; says after how many files.
    """
    members: list[Member] = []
    links: dict[str, str] = {}
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # they would take a kilobyte each
                if entry.islnk():  # a second name of a file
                    links[entry.name] = entry.linkname
                elif entry.issym():
                    links[entry.name] = posixpath.join(posixpath.dirname(entry.name), entry.linkname)
                elif entry.isreg() and not entry.issparse():
                    members.append(Member(entry.name, entry.offset_data, entry.size))
                    if entry.offset_data + entry.size > size:
                        raise tarfile.ReadError(f"{entry.name} ends beyond the end of the file")
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ArchiveError(_why_no_tar(file, path, len(members), str(error))) from error
    notes = _check_end(file, path, end, len(members))
    return Listing(members + _follow(path, links, members, notes), notes)


def _follow(path: str, links: Mapping[str, str], members: Sequence[Member], notes: list[str]) -> list[Member]:
    """Links as files; those that lead out of the archive are noted."""
    files = {posixpath.normpath(member.name): member for member in members} if links else {}
    found = [
        files[target]._replace(name=name)
        for name, link in links.items()
        if (target := posixpath.normpath(link)) in files
    ]
    if len(found) < len(links):
        notes.append(f"{path}: {len(links) - len(found)} of {len(links)} link(s) lead to no file in the archive")
    return found


def _check_end(file: BinaryIO, path: str, end: int, count: int) -> list[str]:
    """Check that there are only zeros where tarfile stopped, which a damaged header makes it do in silence."""
    file.seek(end)
    if not (block := file.read(_BLOCK)):
        return [f"{path}: no mark at its end after {count} files: was it copied completely?"]
    while block and not any(block):
        block = file.read(_CHUNK)
    if block:
        raise ArchiveError(
            f"{path} goes on after its end or after a damaged header, after {count} files; several archives in one "
            "file are joined by tar --concatenate"
        )
    return []


def _why_no_tar(file: BinaryIO, path: str, count: int, reason: str) -> str:
    file.seek(0)
    start = file.read(6)
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if start.startswith(magic):
            return f"{path} is compressed ({name}), so that its files cannot be read one by one: decompress it first"
    if start.startswith(b"PK"):
        return f"{path} is a zip archive: write Zip:files=..."
    return f"{path} is no tar archive, or is damaged or truncated after {count} files: {reason}"


def list_zip(file: BinaryIO, path: str) -> Listing:
    """List a zip archive; errors as `list_tar`. Files may be stored or deflated, not encrypted."""
    members = []
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16):
                    continue
                if entry.compress_type not in _METHODS or entry.flag_bits & _ENCRYPTED:
                    kind = "encrypted" if entry.flag_bits & _ENCRYPTED else f"of compression {entry.compress_type}"
                    raise ArchiveError(f"{path}: {entry.filename} is {kind}; files must be stored or deflated")
                file.seek(entry.header_offset)
                signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
                if signature != b"PK\x03\x04":
                    raise zipfile.BadZipFile(f"no file at byte {entry.header_offset} for {entry.filename}")
                deflated = _METHODS[entry.compress_type]
                members.append(Member(entry.filename, offset, entry.compress_size, deflated))
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:  # the last: a later version of the format
        raise ArchiveError(f"{path} is no zip archive, or is damaged or truncated: {error}") from error
    return Listing(members, [])


LISTERS: dict[str, Callable[[BinaryIO, str], Listing]] = {"Tar": list_tar, "Zip": list_zip}


def read_member(descriptor: int, offset: int, size: int, is_deflated: bool, max_bytes: int) -> bytes:
    """Read a file in an archive by an open descriptor; an OSError if it is above a limit or not there."""
    if size > max_bytes:
        raise OSError(f"{size:,} bytes, limit {max_bytes:,} (images.max_file_size)")
    data = b"".join(_pieces(descriptor, offset, size))
    if len(data) < size:
        raise OSError(f"{size - len(data):,} of {size:,} bytes are missing at the end of the archive")
    if not is_deflated:
        return data
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = decompressor.decompress(data, max_bytes)
    except zlib.error as error:
        raise OSError(f"its compressed bytes are damaged: {error}") from error
    if not decompressor.eof:
        raise OSError(f"more than {max_bytes:,} bytes (images.max_file_size), or its compressed bytes are cut off")
    return data


def _pieces(descriptor: int, offset: int, size: int) -> Iterator[bytes]:
    """The bytes, as many at once as the system returns."""
    while size and (piece := os.pread(descriptor, size, offset)):
        yield piece
        offset, size = offset + len(piece), size - len(piece)
