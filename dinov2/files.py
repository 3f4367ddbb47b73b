"""Files that are whole or absent, and folders that one process has to itself."""

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

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY, _ABANDONED_S = ".*.unfinished", 24 * 3600.0


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A new file for writing bytes, which takes the place of `path` only when it is whole and on disk.

    Readers see the old file or the new one, and nothing is left behind when writing fails. What a killed process leaves
    is removed by `remove_leftovers`.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with temporary.open("w+b") as file:  # to one that is also read numpy writes by `write`, whose errors say why
            _locked(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # What the system says of a full disk does not name the file, and torch.save says something else.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, f"cannot write: {cause.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, subfolders: Iterable[str] = ()) -> None:
    """Remove the files that `atomic_write` was writing when its process was killed.

    A process holds a lock on such a file for as long as it lives, on whatever machine. On a file system without locks
    a file counts as left over when nobody has written to it for a day.

    Args:
        folder: where to look, not below it.
        subfolders: names of folders in it, where to look at any depth.
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
                logger.info("removed %s, which a killed process had not finished", path)
        except OSError as error:
            logger.warning("cannot remove %s, which a killed process may have left: %s", path, error)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Errors about a full disk in here name `path`, unless they name a file already, which the system does not do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_regular_file(path: Path) -> bytes:
    """The content of a file that is none of the special ones, of which some are never read to their end.

    Raises:
        OSError: naming the file, if it cannot be read.
        ValueError: naming it, if it is a folder, a pipe or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """The content of a JSON file, of any type.

    Raises:
        OSError: naming the file, if it cannot be read.
        ValueError: naming the file, if it is not JSON or not a regular file.
    """
    content = read_regular_file(path)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text, of any type.

    Raises:
        ValueError: if it is not JSON; also if it is nested so deeply that Python gives up.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_array(path: Path, name: str | None = None) -> np.ndarray:
    """The array in an `.npy` file, or one of those in an `.npz` file.

    Args:
        path: of the file.
        name: of the array in an `.npz` file; None: it is an `.npy` file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    content = io.BytesIO(read_regular_file(path))
    try:
        array = np.load(content, allow_pickle=False)
        return array if name is None else array[name]
    except Exception as error:  # on bytes that it does not expect numpy fails in many ways
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


# --- Folders of one process ------------------------------------------------------------------------------------------


@contextmanager
def folder_lock(folder: Path, patience: float = 20.0) -> Iterator[None]:
    """Keep a folder to this process: others that ask for it meanwhile, on any machine that sees it, are refused.

    The lock ends with the process, however that ends, but some network file systems keep it for a machine that has
    crashed: a SLURM job that was requeued for that is let in. File systems without locks are not guarded.

    Args:
        folder: exists; a file `.lock` in it says who has it.
        patience: seconds to wait for another process, which may be about to end.

    Raises:
        BlockingIOError: naming the other process, if it does not give the folder free.
        OSError: naming the lock file, if it cannot be written.
    """
    path, job = folder / ".lock", f"SLURM job {os.environ.get('SLURM_JOB_ID', '(none)')}"
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file: delete it", str(path))
    with path.open("a+b", buffering=0) as lock:
        deadline = time.monotonic() + patience
        while not _locked(lock.fileno()):
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip()
            if holder.endswith(job) and "SLURM_JOB_ID" in os.environ:
                break
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    f"{folder} is in use by another run: {holder} (if that has ended, delete {path} and try again)"
                )
            time.sleep(0.2)
        with naming_full_disk(path):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, {job}\n".encode())
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process keeps a folder to itself by `folder_lock`. Not to be asked by that process: it would let go.

    Args:
        folder: nothing in it is changed, and read permission is enough.

    Raises:
        OSError: if that cannot be told: the file system has no locks, or the lock may not be read.
    """
    try:
        return _is_locked(folder / ".lock")
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_locked(path: Path) -> bool:
    """Whether another process has locked a file.

    Raises:
        OSError: if that cannot be told: there is no such regular file, its file system has no locks, or it may not be
            read.
    """
    if not path.is_file():  # to open a pipe waits for whoever writes to it
        raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return True
            raise
    return False


def _locked(file: int) -> bool:
    """Whether this process has the lock now. Unlike `flock` it is not shared with processes started from this one."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks
        return True
    return True
