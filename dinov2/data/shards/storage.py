"""Files that images are read from: local ones, and remote ones by fsspec, of which there are local copies."""

import errno
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dinov2.data.datasets.base import ChangedDataError, DataSourceError
from dinov2.data.datasets.file_list import SETTLED_NS
from dinov2.data.shards.archives import ArchiveError
from dinov2.data.shards.local_cache import data_cache
from dinov2.files import FULL

logger = logging.getLogger(__name__)

_WAITS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)  # seconds before each further attempt
_BLOCK = 16 * 2**20  # bytes that are requested at once
# What fsspec's file systems say about the content of a file, by which a change is noticed; whichever are there.
_CONTENT_KEYS = (
    *("ETag", "etag", "Content-MD5", "md5Hash", "generation", "blob_id", "mtime", "created"),
    *("LastModified", "Last-Modified", "last_modified"),
)
_LASTING = {400, 401, 403, 404, 405, 410, 451}  # HTTP statuses that another attempt does not change


Result = TypeVar("Result")


class Version(NamedTuple):
    """What tells one content of a file from another."""

    size: int  # bytes
    tag: str  # of a local file its modification time in nanoseconds


class DataFile(ABC):
    """A file, by its path or URL."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Text that no other file has."""

    @abstractmethod
    def version(self) -> Version: ...

    @abstractmethod
    def is_settled(self, version: Version) -> bool:
        """Whether a change from now on is sure to change the version."""

    @abstractmethod
    def opened(self, version: Version) -> AbstractContextManager[BinaryIO]:
        """The file on this machine, open for reading: a copy of a remote one."""

    @abstractmethod
    def ranges(self) -> AbstractContextManager[BinaryIO]:
        """The file itself, open for reading: of a remote one only what is read is transferred."""

    def attempt(self, call: Callable[[], Result]) -> Result:
        """Call a function that reads the file, some times if that fails and the file is remote."""
        return call()

    def check(self, version: Version) -> None:
        """Raise a `ChangedDataError` if the file has another version."""
        try:
            found = self.version()
        except FileNotFoundError as error:
            raise ChangedDataError(gone(self)) from error
        if found != version:
            raise ChangedDataError(changed(self))


def gone(file: DataFile) -> str:
    return f"{file} is gone since its files were listed"


def changed(file: DataFile) -> str:
    return f"{file} has changed since its files were listed: start again"


@dataclass(frozen=True)
class LocalFile(DataFile):
    """A file of this machine."""

    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def identity(self) -> str:
        return os.path.realpath(self.path)

    def version(self) -> Version:
        return version_of(os.stat(self.path))

    def is_settled(self, version: Version) -> bool:
        return int(version.tag) < time.time_ns() - SETTLED_NS

    def opened(self, version: Version) -> AbstractContextManager[BinaryIO]:
        return open(self.path, "rb")

    def ranges(self) -> AbstractContextManager[BinaryIO]:
        return open(self.path, "rb")


def version_of(status: os.stat_result) -> Version:
    """The version of a local file."""
    return Version(status.st_size, str(status.st_mtime_ns))


@dataclass(frozen=True)
class RemoteFile(DataFile):
    """A file behind a URL that fsspec knows. A failed request is repeated some times, with longer and longer waits.

    Access keys and the like are set as fsspec and its file systems document it. Methods raise a FileNotFoundError or a
    `DataSourceError` that names the URL.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def identity(self) -> str:
        return self.url

    def version(self) -> Version:
        def ask() -> Version:
            files, path = file_system(self.url)
            files.invalidate_cache()
            info = files.info(path)
            if info.get("type") == "directory" or info.get("size") is None:
                raise DataSourceError(f"{self.url} is no file, or its server does not report a size")
            return Version(info["size"], " ".join(str(info[key]) for key in _CONTENT_KEYS if info.get(key)))

        return self.attempt(ask)

    def attempt(self, call: Callable[[], Result]) -> Result:
        return attempt(self.url, call)

    def is_settled(self, version: Version) -> bool:
        return True

    @contextmanager
    def opened(self, version: Version) -> Iterator[BinaryIO]:
        key, download = f"{self.url} {version}", partial(self._download, version)
        with data_cache().opened(key, version.size, download) as file:
            yield file

    @contextmanager
    def ranges(self) -> Iterator[BinaryIO]:
        files, path = file_system(self.url)
        with files.open(path, "rb", block_size=_BLOCK, cache_type="none") as file:
            yield file

    def _download(self, version: Version, file: BinaryIO) -> int:
        logger.info("downloading %s, %.3g MB", self.url, version.size / 1e6)
        try:
            self.attempt(partial(self._copy_rest, version.size, file))
        except FileNotFoundError as error:
            raise ChangedDataError(gone(self)) from error
        self.check(version)  # was it replaced before or meanwhile?
        return version.size

    def _copy_rest(self, size: int, file: BinaryIO) -> None:
        """Copy what follows the present position, so that a second attempt goes on where the first one ended."""
        files, path = file_system(self.url)
        try:
            with files.open(path, "rb", block_size=_BLOCK, cache_type="none") as source:
                source.seek(file.tell())
                while file.tell() < size and (block := source.read(min(_BLOCK, size - file.tell()))):
                    file.write(block)
        except ValueError:  # from a server without ranges of bytes; other ones come again
            file.seek(0)
            with files.open(path, "rb", block_size=0) as source:
                shutil.copyfileobj(source, file, _BLOCK)
        if (arrived := file.tell()) != size:
            file.seek(min(arrived, size))
            raise OSError(f"{arrived:,} of {size:,} bytes arrived")


def file_system(url: str) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the path there; an ImportError names what to install."""
    try:
        import fsspec
        import fsspec.asyn
    except ImportError as error:
        raise ImportError(f"{url} needs fsspec: pip install fsspec") from error
    thread = fsspec.asyn.iothread[0]
    if thread is not None and not thread.is_alive():  # in a forked worker, where older versions would wait for it
        fsspec.asyn.reset_lock()
    try:
        files, path = fsspec.core.url_to_fs(url)  # anew in each process: connections do not survive a fork
    except ImportError as error:
        raise ImportError(f"{url} needs a package of fsspec: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    return files, path


def attempt(url: str, call: Callable[[], Result]) -> Result:
    """Call a function that reads from a URL, some times if that fails.

    Raises:
        FileNotFoundError: There is no such file.
        DataSourceError: It failed every time, or for a lasting reason.
    """
    for number, wait in enumerate((*_WAITS, 0.0), start=1):
        try:
            return call()
        except (DataSourceError, ArchiveError, ImportError):
            raise
        except Exception as error:  # clients raise nearly anything
            status = _status(error)
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if status in (404, 410) or (isinstance(error, FileNotFoundError) and error.__cause__ is None):
                raise FileNotFoundError(errno.ENOENT, "no such file", url) from error
            if "range requests" in str(error):
                raise DataSourceError(
                    f"{url}: the server gives no parts of files (range requests), which Parquet needs: download it"
                ) from error
            cause = error.__cause__ or error  # clients call a server that is gone a missing file
            reason = f"{type(cause).__name__}: {cause}"
            if wait == 0 or status in _LASTING or isinstance(error, PermissionError):
                raise DataSourceError(f"{url} cannot be read, attempt {number}: {reason}") from error
            logger.warning("%s cannot be read, next attempt in %g s: %s", url, wait, reason)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, or of its cause; None without one."""
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    return status if isinstance(status, int) else None
