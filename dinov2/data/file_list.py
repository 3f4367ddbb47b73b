"""The images under a folder: found quickly, stored compactly, remembered between runs."""

import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dinov2.files import replacing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
# What changes a folder within this time of reading it may not show in the folder's time of change.
SETTLED_NS = 2 * 10**9


class PathTable:
    """A read-only sequence of paths in two flat arrays; of millions of `str`, every worker process would get a copy.

    Args:
        data: (bytes of all paths,) uint8, the paths end to end, encoded as for the file system.
        ends: (number of paths,) int64, where each path ends.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathTable":
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index > 0 else 0
        return os.fsdecode(self.data[start : self.ends[index]].tobytes())

    def fingerprint(self) -> str:
        """A hash of all paths in their order: 16 hexadecimal digits. A gigabyte of paths takes about a second."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.ends).data, digest_size=8)
        digest.update(np.ascontiguousarray(self.data).data)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def list_images(root: Path) -> PathTable:
    """Finds all images under a folder, at any depth and through links; hidden files and folders are passed over.

    The list is kept in the user's cache folder, where it is valid as long as no folder under `root` has changed.

    Args:
        root: the folder.

    Returns:
        Paths relative to `root` with "/" between the parts, sorted.

    Raises:
        FileNotFoundError: there is no image, or no such folder.
    """
    cache = _cache_path(root)
    files = _load(cache, root)
    if files is not None:
        logger.info("%d images under %s, as listed in %s", len(files), root, cache)
        return files

    start_ns = time.time_ns()
    names, folders, folder_times, num_others = _scan(root)
    if not names:
        raise FileNotFoundError(
            f"no images under {root}: looked into {len(folders)} folder(s) with {num_others} file(s) "
            f"for names that end in {', '.join(IMAGE_SUFFIXES)}"
        )
    files = PathTable.of(sorted(names))
    logger.info("%d images under %s, found in %.1f s", len(files), root, (time.time_ns() - start_ns) / 1e9)
    if max(folder_times) < start_ns - SETTLED_NS:
        _store(cache, files, PathTable.of(folders), folder_times)
    return files


def _scan(root: Path) -> tuple[list[str], list[str], list[int], int]:
    """Images, folders with their times of change, and the number of other files under a folder."""
    names: list[str] = []
    folders: list[str] = []
    folder_times: list[int] = []
    num_others = 0
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # a folder, the identities of those above it
    while pending:
        folder, above = pending.pop()
        status = os.stat(root / folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue  # a link that leads back up
        folders.append(folder)
        folder_times.append(status.st_mtime_ns)
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((f"{folder}{entry.name}/", (*above, identity)))
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    names.append(folder + entry.name)
                else:
                    num_others += 1
    return names, folders, folder_times, num_others


def _cache_path(root: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(os.fsencode(os.path.realpath(root)) + " ".join(IMAGE_SUFFIXES).encode())
    return Path(base, "dinov2", "file_lists", f"{key.hexdigest()[:32]}.npz")


def _load(cache: Path, root: Path) -> PathTable | None:
    """The stored list if there is one and no folder has changed."""
    try:
        with cache.open("rb") as file, np.load(file) as stored:
            folders = PathTable(stored["folder_data"], stored["folder_ends"])
            for folder, folder_time in zip(folders, stored["folder_times"], strict=True):
                if os.stat(root / folder).st_mtime_ns != folder_time:
                    return None
            return PathTable(stored["file_data"], stored["file_ends"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # none, or a broken one
        return None


def _store(cache: Path, files: PathTable, folders: PathTable, folder_times: Sequence[int]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as file:
            np.savez(
                file,
                file_data=files.data,
                file_ends=files.ends,
                folder_data=folders.data,
                folder_ends=folders.ends,
                folder_times=np.array(folder_times, np.int64),
            )
    except OSError as error:
        logger.info("the list of images is not kept for the next run: %s", error)
