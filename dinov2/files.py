"""Files that are whole or absent, and folders that one process has to itself."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file for writing bytes, which takes the place of `path` only when it is whole and on disk.

    Readers see the old file or the new one, and nothing is left behind when writing fails.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        # What the system says of a full disk does not name the file.
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def occupying(folder: Path, patience: float = 20.0) -> Iterator[None]:
    """Keep a folder to this process: others that ask for it meanwhile, on any machine that sees it, are refused.

    The lock ends with the process, however that ends, but some network file systems keep it for a machine that has
    crashed: a SLURM job that was requeued for that is let in. File systems without locks are not guarded.

    Args:
        folder: exists; a file `.lock` in it says who has it.
        patience: seconds to wait for another process, which may be about to end.

    Raises:
        BlockingIOError: naming the other process, if it does not give the folder free.
    """
    path, job = folder / ".lock", f"SLURM job {os.environ.get('SLURM_JOB_ID', '(none)')}"
    with path.open("a+") as lock:
        deadline = time.monotonic() + patience
        while not _locked(lock.fileno()):
            lock.seek(0)
            holder = lock.read().strip()
            if holder.endswith(job) and "SLURM_JOB_ID" in os.environ:
                break
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    f"{folder} is in use by another run: {holder} (if that has ended, delete {path} and try again)"
                )
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, {job}\n")
        lock.flush()
        yield


def is_occupied(folder: Path) -> bool:
    """Whether a process keeps a folder to itself by `occupying`. Not to be asked by that process: it would let go.

    Args:
        folder: nothing in it is changed, and read permission is enough.

    Raises:
        OSError: if that cannot be told: the file system has no locks, or the lock may not be read.
    """
    try:
        lock = (folder / ".lock").open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
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
