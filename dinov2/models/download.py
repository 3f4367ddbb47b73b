"""Weights from a server into the cache of torch.hub: whole or absent, and continued where a connection broke.

A download is written to a hidden file beside its place and renamed when it is complete. What the server says of the
file (its tag, its date, its length) is part of the hidden name, so that what is left of another version is never
continued. Several processes may want the same file: one receives it and the others wait; where the file system cannot
keep them apart they write the same bytes to the same places, which does no harm.
"""

import errno
import hashlib
import http.client
import importlib
import logging
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import torch

from dinov2.models.published import WEIGHTS_URL_VARIABLE

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""A server that is silent for so long is given up, or asked again for the rest."""
ATTEMPTS = 5
"""How often in a row a download may break off without having got any further."""
PAUSE_S = 1.0
"""Before the second attempt; twice as long before each further one."""
MIN_BYTES, WINDOW_S = 60 * 1024, 60.0
"""Fewer bytes in so many seconds, or in an attempt that breaks off, are no progress."""
MAX_UNKNOWN_BYTES = 16 << 30
"""Where the server does not say how long a file is, more is not accepted, nor more than fits."""

_CHUNK_BYTES = 1 << 18
_PUBLISHED_NAME = re.compile(r"dinov2_vit[sblg]14(_reg4)?_(pretrain|linear4?_head)\.pth")
_ASK_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class _BrokenOffError(Exception):
    """A download ended early; another attempt may get further."""

    def __init__(self, reason: object, num_bytes: int = 0) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.num_bytes = num_bytes  # by how much more is on disk than before


def cache_path(url: str) -> Path:
    """Where the file of a URL is, or will be: under its own name if that is a published one, which tells them apart."""
    name = Path(unquote(urlparse(url).path)).name
    if not _PUBLISHED_NAME.fullmatch(name):
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def download(url: str) -> Path:
    """The local file of a URL, fetched if it is not in the cache yet.

    Raises:
        FileNotFoundError: if the server has no such file.
        ConnectionError: if the server cannot be reached, or breaks off again and again; says what to do.
        OSError: if the file cannot be written.
        ValueError: if what the server sends are no weights.
    """
    target = cache_path(url)
    failures = 0
    while not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(url, target)
        except _BrokenOffError as error:
            failures = 1 if error.num_bytes >= MIN_BYTES else failures + 1
            if failures == ATTEMPTS:
                raise ConnectionError(_advice(url, target, error)) from error
            logger.warning("the download of %s broke off (%s); trying again", url, error)
            time.sleep(PAUSE_S * 2 ** (failures - 1))
        except ConnectionError as error:
            raise ConnectionError(_advice(url, target, error)) from error
    return target


def _advice(url: str, target: Path, reason: object) -> str:
    lines = [f"cannot download {url}: {reason}", f"  by hand: put the file at {target}"]
    if _PUBLISHED_NAME.fullmatch(target.name):
        folder = Path(urlparse(url).path).parent.name
        variable = f"the environment variable {WEIGHTS_URL_VARIABLE}"
        lines.append(f"  or set {variable} to the URL of a mirror, or to a folder that holds {folder}/{target.name}")
    return "\n".join(lines)


def _fetch(url: str, target: Path) -> None:
    """One attempt; ends without the file if another process was at it, which may have broken off."""
    with _open(url) as response:
        length = _length(response)
        version = f"{response.headers['ETag']} {response.headers['Last-Modified']} {length}"
        partial = target.with_name(f".{target.name}.{hashlib.sha256(version.encode()).hexdigest()[:8]}.partial")
        partial.touch()
        with partial.open("r+b", buffering=0) as file:
            if not _lock(file, wait=False):
                response.close()
                logger.info("another process is downloading %s: waiting for it", url)
                _lock(file, wait=True)
                return
            if target.is_file():  # since a moment ago: what was opened is new and empty
                partial.unlink(missing_ok=True)
                return
            try:
                _receive(url, response, file, length)
            except BaseException:
                if length is None or not os.fstat(file.fileno()).st_size:  # there is nothing to continue
                    partial.unlink(missing_ok=True)
                raise
            if os.name == "nt":  # files cannot be renamed there while they are open
                file.close()
            try:
                _check_content(url, partial)
                partial.replace(target)
            except FileNotFoundError:
                if not target.is_file():  # else another process, not to be kept apart, was first
                    raise


def _length(response: Any) -> int | None:
    """How many bytes a response has, None if its server does not say."""
    text = response.headers["Content-Length"] or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _open(url: str, start: int = 0) -> Any:
    """Ask for a file, or for the rest of it from byte `start`."""
    headers = {"User-Agent": "dinov2"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        if error.code in _ASK_AGAIN:
            raise _BrokenOffError(error) from error
        if error.code in (404, 410):
            raise FileNotFoundError(f"no weights at {url}: the server says {error.code} {error.reason}") from error
        raise ConnectionError(f"the server says {error.code} {_in_words(error)}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # the latter of addresses that are none
        if start:  # it could be reached a moment ago
            raise _BrokenOffError(_in_words(error)) from error
        raise ConnectionError(_in_words(error)) from error


def _in_words(error: Exception) -> str:
    """What an error says in one line, or its kind if that is not text: a server may have sent anything."""
    text = " ".join(str(getattr(error, "reason", error)).split())
    return text if text and text.isprintable() else type(error).__name__


def _receive(url: str, response: Any, file: FileIO, length: int | None) -> None:
    """Write the body of a response, or what is still missing of it, into a file that may hold its beginning."""
    before = position = file.seek(0, os.SEEK_END)
    if length is None or before > length:
        position = 0
    elif 0 < before < length:
        response.close()
        try:
            response = _open(url, start=before)
        except ConnectionError:  # it refuses to continue
            file.truncate(0)
            raise
        if response.status != 206 or not str(response.headers["Content-Range"]).startswith(f"bytes {before}-"):
            position = 0  # a server that cannot continue: from the start
    folder = Path(file.name).parent
    most = _most_bytes(url, folder, length, position)
    logger.info("downloading %s to %s, from byte %d of %s", url, folder, position, length or "?")
    file.seek(position)
    window_start, window_position = time.monotonic(), position
    with response, _progress(Path(urlparse(url).path).name, position, length) as report:
        while position < most:
            try:
                chunk = response.read1(min(_CHUNK_BYTES, most - position))
                if not chunk and length:
                    raise ConnectionError(f"connection closed after {position:,} of {length:,} bytes")
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenOffError(error, max(position - before, 0)) from error
            if not chunk:  # the end, where the server does not say how long the file is
                break
            _write(file, chunk)
            position += len(chunk)
            report(position)
            if (now := time.monotonic()) - window_start >= WINDOW_S and position < most:
                if position - window_position < MIN_BYTES:
                    raise _BrokenOffError(f"only {position - window_position} bytes in {now - window_start:.0f} s")
                window_start, window_position = now, position
        else:
            if length is None:
                raise ValueError(
                    f"{url} cannot be used: its server does not say how long it is, and {most / 1e6:,.1f} MB did not "
                    f"hold all of it; at most {MAX_UNKNOWN_BYTES / 1e6:,.0f} MB and nine tenths of the free space are "
                    f"accepted"
                )
    file.truncate(position)
    os.fsync(file.fileno())


def _most_bytes(url: str, folder: Path, length: int | None, position: int) -> int:
    """How long a file may become: as long as its server says, or else a share of what there is space for.

    Raises:
        OSError: if there is no space for it.
    """
    free = shutil.disk_usage(folder).free
    if length is None:
        return min(MAX_UNKNOWN_BYTES, free * 9 // 10)
    if length - position > free:
        space = f"{(length - position) / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        raise OSError(errno.ENOSPC, f"not enough space for {url} ({space})", str(folder))
    return length


def _write(file: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:  # what the system says of a full disk does not name the file
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(file.name)) from error


def _lock(file: FileIO, *, wait: bool) -> bool:
    """Keep other processes from this file until it is closed; False if another has it and we are not to wait."""
    try:
        fcntl = importlib.import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # other systems, some network file systems: together then, see the top
        pass
    return True


def _check_content(url: str, path: Path) -> None:
    """Remove what cannot be weights.

    Raises:
        ValueError: saying what it looks like instead.
    """
    with path.open("rb") as file:
        head = file.read(60)
    if head.startswith(b"PK"):
        problem = "" if zipfile.is_zipfile(path) else "it is truncated: its server holds only a part of it"
    elif head.startswith(b"\x80") or head[8:9] == b"{":  # a pickle, or safetensors
        problem = ""
    elif not head:
        problem = "it is empty"
    else:
        text = head.decode("ascii", errors="replace").replace("\n", " ")
        shown = repr(text) if text.isprintable() and "\ufffd" not in text else f"the bytes {head[:8].hex(' ')}"
        problem = f"it is no weights but begins with {shown}"
    if problem:
        path.unlink()
        raise ValueError(f"{url} cannot be used: {problem}")


@contextmanager
def _progress(name: str, start: int, length: int | None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how far a download is; elsewhere nothing."""
    begin, next_time = time.monotonic(), 0.0

    def report(position: int) -> None:
        nonlocal next_time
        now = time.monotonic()
        if sys.stderr.isatty() and (now >= next_time or position == length):
            next_time = now + 0.2
            share = f"{position / length:4.0%} of {length / 1e6:,.0f} MB" if length else f"{position / 1e6:,.0f} MB"
            speed = (position - start) / 1e6 / max(now - begin, 1e-3)
            sys.stderr.write(f"\r{name}: {share}, {speed:,.1f} MB/s ")
            sys.stderr.flush()

    try:
        yield report
    finally:
        if next_time:  # something was shown
            sys.stderr.write("\n")
