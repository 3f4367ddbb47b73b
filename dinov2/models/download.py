"""Download weights to the cache of torch.hub: atomically, and resumed after an interruption.

A download is written to a hidden file beside its final path and renamed when it is complete. The hidden name depends on
the tag, date and length that the server reports, so that the beginning of another version is never resumed. Of several
processes that need the same file, one downloads it and the others wait; without file locks they write the same bytes
to the same positions, which is harmless. (`torch.hub.download_url_to_file` neither resumes, nor locks, nor times out.)
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
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import torch

from dinov2.models.published import WEIGHTS_URL_VARIABLE

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0  # timeout of a connection that receives nothing, in seconds
ATTEMPTS = 5  # number of attempts in a row without progress
PAUSE_S = 1.0  # seconds before the second attempt; doubled before each further one
MIN_BYTES, WINDOW_S = 60 * 1024, 60.0
"""Fewer bytes in so many seconds, or in an interrupted attempt, do not count as progress."""
MAX_UNKNOWN_BYTES = 16 << 30  # largest accepted file, in bytes, if the server does not report its length

_CHUNK_BYTES = 1 << 18
_PUBLISHED_NAME = re.compile(
    r"dinov2_vit[sblg]14(_reg4)?_(pretrain|linear4?_head)\.pth"
    r"|dinov2_vit[sblg]14_((nyu|kitti)_(linear4?|dpt)|(ade20k|voc2012)_(linear|ms))_head\.pth"
)
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


class _InterruptedError(Exception):
    """A download was interrupted; another attempt may succeed."""

    def __init__(self, reason: object, num_bytes: int = 0) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.num_bytes = num_bytes  # new on disk since the last attempt


def cache_path(url: str) -> Path:
    """The path of a URL in the cache; names other than the published ones get a hash of the URL as prefix."""
    name = Path(unquote(urlparse(url).path)).name
    if not _PUBLISHED_NAME.fullmatch(name):
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def download(url: str) -> Path:
    """Download the file of a URL unless it is in the cache; returns its path.

    A FileNotFoundError if the server has none, a ConnectionError with alternatives if it cannot be reached or always
    interrupts, a ValueError if the file is not one of weights.
    """
    target = cache_path(url)
    failures = 0
    while not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(url, target)
        except _InterruptedError as error:
            failures = 1 if error.num_bytes >= MIN_BYTES else failures + 1
            if failures == ATTEMPTS:
                raise ConnectionError(_advice(url, target, error)) from error
            logger.warning("the download of %s was interrupted (%s); trying again", url, error)
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
    """Make one attempt; returns without the file if another process was downloading it, which may have failed."""
    with _open(url) as response:
        text = response.headers["Content-Length"] or ""
        length = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
        version = f"{response.headers['ETag']} {response.headers['Last-Modified']} {length}"
        partial = target.with_name(f".{target.name}.{hashlib.sha256(version.encode()).hexdigest()[:8]}.partial")
        partial.touch()
        with partial.open("r+b", buffering=0) as file:
            if not _lock(file, wait=False):
                response.close()
                logger.info("another process is downloading %s: waiting for it", url)
                _lock(file, wait=True)
                return
            if target.is_file():  # since a moment ago: the partial file is new and empty
                partial.unlink(missing_ok=True)
                return
            try:
                _receive(url, response, file, length)
            except BaseException:
                if length is None or not os.fstat(file.fileno()).st_size:  # nothing that can be resumed
                    partial.unlink(missing_ok=True)
                raise
            if os.name == "nt":  # open files cannot be renamed there
                file.close()
            try:
                _check_content(url, partial)
                partial.replace(target)
            except FileNotFoundError:
                if not target.is_file():  # otherwise another process without lock was first
                    raise


def _open(url: str, start: int = 0) -> Any:
    """Request a file, or the rest of it from byte `start` on."""
    headers = {"User-Agent": "dinov2"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        if error.code in _RETRIED:
            raise _InterruptedError(error) from error
        if error.code in (404, 410):
            raise FileNotFoundError(f"no weights at {url}: the server answered {error.code} {error.reason}") from error
        raise ConnectionError(f"the server answered {error.code} {_reason(error)}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError for malformed addresses
        if start:  # it could be reached a moment ago
            raise _InterruptedError(_reason(error)) from error
        raise ConnectionError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The message of an error in one line, or its type if that is not text: a server may have sent any bytes."""
    text = " ".join(str(getattr(error, "reason", error)).split())
    return text if text and text.isprintable() else type(error).__name__


def _receive(url: str, response: Any, file: FileIO, length: int | None) -> None:
    """Write the body of a response to a file; if the file has the beginning already, request only the rest."""
    before = file.seek(0, os.SEEK_END)
    position = before if length is not None and before <= length else 0
    if 0 < position < (length or 0):
        response.close()
        try:
            response = _open(url, start=before)
        except ConnectionError:  # the server refuses to resume
            file.truncate(0)
            raise
        if response.status != 206 or not str(response.headers["Content-Range"]).startswith(f"bytes {before}-"):
            position = 0  # the server cannot resume
    limit = _size_limit(url, Path(file.name).parent, length, position)
    logger.info("downloading %s to %s, from byte %d of %s", url, Path(file.name).parent, position, length or "?")
    file.seek(position)
    with response:
        position = _copy(url, response, file, before, position, limit, length)
    file.truncate(position)
    os.fsync(file.fileno())


def _copy(url: str, response: Any, file: FileIO, before: int, position: int, limit: int, length: int | None) -> int:
    """Copy a response from `position` on to its end, or until there are `limit` bytes; returns the final position."""
    window_start, window_position = time.monotonic(), position
    shown = {"desc": Path(urlparse(url).path).name, "initial": position, "total": length, "unit": "B"}
    # tqdm if it is installed, or a simple stand-in
    with torch.hub.tqdm(**shown, unit_scale=True, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
        while position < limit:
            try:
                chunk = response.read1(min(_CHUNK_BYTES, limit - position))
                if not chunk and length:
                    raise ConnectionError(f"connection closed after {position:,} of {length:,} bytes")
            except (OSError, http.client.HTTPException) as error:
                raise _InterruptedError(error, max(position - before, 0)) from error
            if not chunk:  # the end of a response of unknown length
                return position
            _write(file, chunk)
            position += len(chunk)
            bar.update(len(chunk))
            if (now := time.monotonic()) - window_start >= WINDOW_S and position < limit:
                if position - window_position < MIN_BYTES:
                    raise _InterruptedError(f"only {position - window_position} bytes in {now - window_start:.0f} s")
                window_start, window_position = now, position
    if length is None:
        raise ValueError(
            f"{url} cannot be used: the server does not report its length, and it is larger than "
            f"{limit / 1e6:,.1f} MB; the limits are {MAX_UNKNOWN_BYTES / 1e6:,.0f} MB and nine tenths of the free space"
        )
    return position


def _size_limit(url: str, folder: Path, length: int | None, position: int) -> int:
    """The largest accepted size in bytes: that reported by the server, or else a share of the free space."""
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
    except OSError as error:  # the message of the system about a full disk does not name the file
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(file.name)) from error


def _lock(file: FileIO, *, wait: bool) -> bool:
    """Lock a file against other processes until it is closed; False if another one holds the lock."""
    try:
        fcntl = importlib.import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # other systems, some network file systems: without lock, see the top
        pass
    return True


def _check_content(url: str, path: Path) -> None:
    """Remove a file that is not one of weights, with a ValueError that describes it."""
    with path.open("rb") as file:
        head = file.read(60)
    if head.startswith(b"PK"):
        problem = "" if zipfile.is_zipfile(path) else "it is truncated on the server"
    elif head.startswith(b"\x80") or head[8:9] == b"{":  # a pickle, or safetensors
        problem = ""
    elif not head:
        problem = "it is empty"
    else:
        text = head.decode("ascii", errors="replace").replace("\n", " ")
        shown = repr(text) if text.isprintable() and "\ufffd" not in text else f"the bytes {head[:8].hex(' ')}"
        problem = f"it is not a file of weights but begins with {shown}"
    if problem:
        path.unlink()
        raise ValueError(f"{url} cannot be used: {problem}")
