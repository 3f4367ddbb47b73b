"""Atomic writes, reading of untrusted files, and locks of folders."""

import errno
import fcntl
import io
import itertools
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk."""
_TEMPORARY, _ABANDONED_S = ".*.unfinished", 24 * 3600.0


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing bytes that replaces `path` when it is complete and on disk.

    Readers see the old file or the new one, and a failed write, an OSError that names `path`, leaves nothing.
    `remove_leftovers` removes what a killed process leaves.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with temporary.open("w+b") as file:  # for a readable file numpy uses `write`, whose errors have a reason
            _locked(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # The message of the system about a full disk does not name the file, and torch.save raises another error.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, f"cannot write: {cause.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, subfolders: Iterable[str] = ()) -> None:
    """Remove the temporary files that `atomic_write` of killed processes left in a folder, or deep in some subfolders.

    A living process on any machine holds a lock on such a file. On a file system without locks, a file is removed when
    it was not written to for a day.
    """
    below = (path for name in subfolders for path in (folder / name).rglob(_TEMPORARY))
    for path in itertools.chain(folder.glob(_TEMPORARY), below):
        try:
            try:
                abandoned = not _is_locked(path)
            except OSError:
                abandoned = time.time() - path.stat().st_mtime > _ABANDONED_S
            if abandoned and path.is_file():
                path.unlink()
                logger.info("removed %s, left by a killed process", path)
        except OSError as error:
            logger.warning("cannot remove %s, left by a killed process: %s", path, error)


def numbered_path(path: Path) -> Path:
    """The first of `path`.1, `path`.2, ... that does not exist: where to archive earlier files."""
    return next(free for number in itertools.count(1) if not (free := path.with_name(f"{path.name}.{number}")).exists())


def runs_below(folder: Path) -> str:
    """A hint for messages about a folder that is no run but holds some: ``; it holds the runs a, b``, or nothing."""
    names = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    return f"; it holds the runs {', '.join(names)}: give one of them, such as {folder / names[0]}" if names else ""


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Add `path` to errors about a full disk that name no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_regular_file(path: Path) -> bytes:
    """Read a file; a folder, pipe or device, reading which may never end, is a ValueError that names it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Read a JSON file; anything else is a ValueError that names the file."""
    content = read_regular_file(path)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text; a ValueError also if it exceeds the recursion limit of Python."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_array(path: Path, name: str | None = None) -> np.ndarray:
    """Read an `.npy` file, or the array `name` of an `.npz` file; a damaged one is a ValueError."""
    content = io.BytesIO(read_regular_file(path))
    try:
        array = np.load(content, allow_pickle=False)
        return array if name is None else array[name]
    except Exception as error:  # on bytes that it does not expect numpy fails in many ways
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


# --- Locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def folder_lock(folder: Path, patience: float = 20.0) -> Iterator[None]:
    """Lock an existing folder for this process, against other processes on any machine that shares it.

    The lock is released when the process ends for any reason, but some network file systems keep that of a crashed
    machine: a SLURM job that was requeued after that may take it over. File systems without locks are not protected.
    The file `.lock` names the process that holds the lock, as do a log line and the BlockingIOError after `patience`
    seconds.
    """
    path, job = folder / ".lock", f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file: delete it", str(path))
    with path.open("a+b", buffering=0) as lock:
        deadline, waits = time.monotonic() + patience, False
        while not _locked(lock.fileno()):
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip()
            if job and holder.endswith(job):
                break
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    f"{folder} is in use by another run: {holder}. Use another folder, or stop that run first (if that "
                    f"machine has crashed, delete {path} and try again)"
                )
            if not waits:
                logger.info("%s is in use by %s: waiting up to %.0f s for its end", folder, holder, patience)
                waits = True
            time.sleep(0.2)
        with naming_full_disk(path):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n".encode())
        yield


def is_locked(folder: Path) -> bool:
    """Whether another process holds the `folder_lock` of a folder. In the process that holds it, this releases it.

    Read permission is enough. An OSError if the file system has no locks.
    """
    try:
        return _is_locked(folder / ".lock")
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_locked(path: Path) -> bool:
    """Whether another process has locked a file; an OSError if it is not a regular one or has no locks."""
    if not path.is_file():  # opening a pipe waits for a writer
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return True
            raise
    return False


def _locked(file: int) -> bool:
    """Try to lock a file, and return whether that worked. Unlike with `flock`, child processes do not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks
        return True
    return True


MESSAGE_LENGTH = 600  # characters of an error


def root_cause(error: BaseException) -> str:
    """The message of the root cause in a chain of errors, with its type unless it is a ValueError or OSError."""
    error = first_cause(error)
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return f"{kind}{shortened(error)}".strip().rstrip(".")


def first_cause(error: BaseException) -> BaseException:
    """The root cause in a chain of errors: the last ValueError or OSError, or else the first error."""
    while (earlier := error.__cause__ or error.__context__) and not isinstance(error, (ValueError, OSError)):
        error = earlier
    return error


def shortened(error: BaseException) -> str:
    """The message of an error, truncated to `MESSAGE_LENGTH` characters."""
    text = str(error)
    return text if len(text) < MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]} ..."
