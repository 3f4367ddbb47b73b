"""A folder of limited size on a local disk with copies of data that is slow to read, for all processes of a machine."""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dinov2.data.datasets.base import DataSourceError
from dinov2.data.datasets.file_list import cache_folder
from dinov2.files import atomic_write, remove_leftovers

FOLDER_VARIABLE, LIMIT_VARIABLE = "DINOV2_DATA_CACHE", "DINOV2_DATA_CACHE_GB"
DEFAULT_GB = 100.0
_RESERVE = 10**9  # bytes of the disk that are left free
_RECENT_NS = 10 * 10**9  # a copy that was used within this time counts as just used
_ENTRY = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class LocalCache:
    """Copies by key; the least recently used ones make room for new ones.

    A copy is complete or absent. While one process makes it, others wait for it. One that is removed while it is read
    can still be read to the end. While several are made at the same time, these may exceed the limit together.
    """

    folder: Path
    limit: int  # bytes

    @contextmanager
    def opened(self, key: str, size: int, write: Callable[[BinaryIO], int]) -> Iterator[BinaryIO]:
        """A copy, open for reading.

        Args:
            key: Text that differs for different data.
            size: Expected size of the copy in bytes, for which room is made.
            write: Makes the copy that is not there; returns its size in bytes.

        Raises:
            DataSourceError: The copy does not fit in the cache or on its disk.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        descriptor = _open(f"{self.folder}/{name}")
        if descriptor is None:
            descriptor = self._make(self.folder / name, size, write)
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def remove_leftovers(self) -> None:
        """Remove what killed processes left; while no thread of this process makes a copy."""
        if self.folder.is_dir():
            remove_leftovers(self.folder)

    def _make(self, path: Path, size: int, write: Callable[[BinaryIO], int]) -> int:
        if size > self.limit:
            raise DataSourceError(
                f"{size / 1e9:.3g} GB do not fit in the data cache of {self.limit / 1e9:.3g} GB ({LIMIT_VARIABLE})"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f".lock-{path.name[:2]}"):
                if (descriptor := _open(path)) is not None:  # another process made it in the meantime
                    return descriptor
                with atomic_write(path) as file:
                    with _locked(self.folder / ".lock"):
                        self._make_room(size)
                        file.truncate(size)
                    file.truncate(write(file))
                    file.seek(0)
                    descriptor = os.dup(file.fileno())  # it may be removed as soon as it has its name
                with _locked(self.folder / ".lock"):  # others were made meanwhile, or it is larger than expected
                    self._make_room(0)
                return descriptor
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith(str(self.folder)):
                raise
            raise DataSourceError(
                f"the data cache in {self.folder} cannot be written: {error.strerror}; {FOLDER_VARIABLE}=FOLDER moves "
                f"it, {LIMIT_VARIABLE}=GIGABYTES limits it (now {self.limit / 1e9:.3g})"
            ) from error

    def _make_room(self, size: int) -> None:
        """Remove the least recently used copies until there is room for so many bytes more."""
        stats = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # finished or removed in the meantime
                stats.append((path.stat(), path))
        excess = max(
            sum(status.st_size for status, _ in stats) + size - self.limit,
            size + _RESERVE - shutil.disk_usage(self.folder).free,
        )
        for status, path in sorted(stats, key=lambda entry: entry[0].st_mtime_ns):
            if excess <= 0:
                return
            if _ENTRY.fullmatch(path.name):
                path.unlink(missing_ok=True)
                excess -= status.st_size


def data_cache() -> LocalCache:
    """The cache that the environment variables set; a ValueError if the limit is no positive number."""
    text = os.environ.get(LIMIT_VARIABLE, "") or str(DEFAULT_GB)
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = 0.0
    if not 0 < limit < 2**63:
        raise ValueError(f"{LIMIT_VARIABLE} must be a number of gigabytes above 0, got {text!r}")
    folder = os.environ.get(FOLDER_VARIABLE, "")
    return LocalCache(Path(folder).expanduser() if folder else cache_folder("data"), int(limit))


def _open(path: str | Path) -> int | None:
    """Open a copy, and mark it as used; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_mtime_ns < time.time_ns() - _RECENT_NS:
        with suppress(OSError):  # a folder of another user, whose copies may be read
            os.utime(descriptor)
    return descriptor


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock that excludes other processes and threads; on a file system without locks it does not."""
    with path.open("ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
