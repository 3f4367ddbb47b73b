"""The list of images under a folder: compact in memory and cached between runs."""

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.images import kind_of_file
from dinov2.data.images.formats import begins_as_image
from dinov2.files import atomic_write

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg",
    ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
ANY_SUFFIX = ""
# Changes of a folder within this time before it is read may not change its modification time.
SETTLED_NS = 2 * 10**9
_FORMAT = "2"  # version of the cached list; part of its name
_MAX_VISITS = 1000  # visits of one folder through links
_REPORT_SECONDS = 30.0  # between log lines while a large folder is listed
_MOST_KINDS, _MOST_NAMES = 12, 8  # kinds of other files, and names of other folders, in a message


@dataclass(eq=False)
class PathTable:
    """A read-only sequence of paths in two flat arrays, which worker processes share, unlike millions of `str`."""

    data: np.ndarray  # (bytes of all paths,) uint8: the concatenated paths, encoded as in the file system
    ends: np.ndarray  # (number of paths,) int64: end of each path in `data`

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
        """Hash all paths in order: 16 hexadecimal digits. A gigabyte of paths takes about a second."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.ends).data, digest_size=8)
        digest.update(np.ascontiguousarray(self.data).data)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class FileList(NamedTuple):
    """The files under a folder."""

    images: PathTable  # relative to the folder, with "/" between the parts, sorted
    others: dict[str, int]  # kind of ignored files, such as ".txt" or "named pipe" -> number

    def notes(self, root: Path) -> list[str]:
        count = sum(self.others.values())
        return [f"{root}: ignored {count:,} other file(s): {_summary(self.others)}"] if count else []


def list_images(root: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> FileList:
    """List all images under a folder, at any depth and through links; hidden files and folders are ignored.

    Only regular files and links to them are listed. A broken link is listed too, as an unreadable image. The list is
    cached in the user's cache folder; the cache is valid until a folder under `root` changes. No images are an OSError.

    Args:
        suffixes: How the names of images end, in lower case; with `ANY_SUFFIX` among them also those of any name whose
            first bytes are those of an image.
    """
    cache = _cache_path(root, suffixes)
    files = _load(cache, root)
    if files is not None:
        logger.info("%d images under %s, as listed in %s", len(files.images), root, cache)
        return files

    start_ns = time.time_ns()
    names, folders, folder_times, others = _scan(root, suffixes)
    if not names:
        raise FileNotFoundError(
            f"no images under {root}: searched {len(folders)} folder(s) with {sum(others.values())} file(s)"
            f" for {_wanted(suffixes)}{_found_instead(others)}"
        )
    files = FileList(PathTable.of(sorted(names)), others)
    logger.info("%d images under %s, found in %.1f s", len(names), root, (time.time_ns() - start_ns) / 1e9)
    if max(folder_times) < start_ns - SETTLED_NS:
        _store(cache, files, PathTable.of(folders), folder_times)
    return files


def _wanted(suffixes: tuple[str, ...]) -> str:
    by_content = " or begin as an image" if ANY_SUFFIX in suffixes else ""
    return f"names that end in {', '.join(filter(None, suffixes))}{by_content}"


def check_folder(folder: Path, *, given_as: str = "root") -> None:
    """Raise an OSError if a path, the value of the key `given_as`, is no readable folder; it names a remedy."""
    if folder.is_dir():
        if not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError(f"{given_as}={folder} is a folder without read permission")
        return
    if folder.exists():
        raise NotADirectoryError(f"{given_as}={folder} is {_describe_file(folder)}")
    if set("*?[") & set(str(folder)):
        raise FileNotFoundError(
            f"no folder {_shown(folder)}: patterns are not expanded in {given_as}= of this dataset, but in that of "
            "ImageFolder"
        )
    missing = next(path for path in (folder, *folder.parents) if path.parent.is_dir())
    raise FileNotFoundError(f"no folder {_shown(folder)}; {_folders_beside(missing)}")


def _shown(path: Path) -> str:
    """A path, in quotes if it has unprintable characters or parts that begin or end with spaces."""
    is_plain = str(path).isprintable() and all(part == part.strip() for part in path.parts)
    return str(path) if is_plain else repr(str(path))


_UNPACK, _EXPORT = "unpack it and give the folder", "export its images to a folder"
_FILE_KINDS = {
    ".tar": "a tar archive: write Tar:files=... (ImageNet-22k, with one tar per class, is ImageNet22k)",
    **dict.fromkeys((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"), f"a compressed tar archive: {_UNPACK}"),
    ".zip": "a zip archive: write Zip:files=...",
    ".7z": f"a 7z archive: {_UNPACK}",
    ".rar": f"a rar archive: {_UNPACK}",
    ".txt": "a text file: if it lists images, write ImageList:file=...",
    **dict.fromkeys((".csv", ".tsv"), "a table: if it lists images, write ImageList:file=..."),
    ".parquet": "a Parquet file: write Parquet:files=...",
    ".arrow": f"an Arrow file: {_EXPORT}",
    ".tfrecord": f"a TFRecord file: {_EXPORT}",
    **dict.fromkeys((".h5", ".hdf5"), f"an HDF5 file: {_EXPORT}"),
    ".mdb": f"an LMDB database: {_EXPORT}",
    ".npz": "a NumPy archive: if these are images, write ImageFolder:root=...:suffixes=.npz",
    ".npy": "a NumPy array: if these are images, write ImageFolder:root=...:suffixes=.npy",
    "without suffix": "if they are images, add :suffixes=any, by which the content of files decides",
    **dict.fromkeys(IMAGE_SUFFIXES, "a single image: give its folder"),
}
_CONTENT_KINDS = {b"PK\x03\x04": _FILE_KINDS[".zip"], b"\x1f\x8b": _FILE_KINDS[".tgz"]}


def _describe_file(path: Path) -> str:
    if not path.is_file():
        return f"{kind_of_file(path.stat().st_mode)}, not a folder"
    kind = next((kind for suffix, kind in _FILE_KINDS.items() if path.name.lower().endswith(suffix)), None)
    if kind is None:
        with path.open("rb") as file:
            start = file.read(262)
        kind = next((what for begin, what in _CONTENT_KINDS.items() if start.startswith(begin)), None)
        if start[257:262] == b"ustar":
            kind = _FILE_KINDS[".tar"]
    return f"a file, not a folder{'' if kind is None else f': {kind}'}"


def _folders_beside(missing: Path) -> str:
    """The folders where a missing one was expected, the most similar name first."""
    folder = missing.parent
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    likely = get_close_matches(missing.name, names, n=1)
    hint = f"did you mean {_shown(folder / likely[0])}? " if likely else ""
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return f"{hint}folders in {folder}: {', '.join(names[:_MOST_NAMES]) or 'none'}{more}"


def _summary(others: Mapping[str, int]) -> str:
    """Number of files by kind, the most frequent kinds first."""
    kinds = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    more = [f"{sum(count for _, count in kinds[_MOST_KINDS:]):,} of other kinds"] if len(kinds) > _MOST_KINDS else []
    return ", ".join([f"{count:,} {kind}" for kind, count in kinds[:_MOST_KINDS]] + more)


def _found_instead(others: Mapping[str, int]) -> str:
    """What was found instead of images, with a remedy for the most frequent kind."""
    if not others:
        return ""
    most = max(others, key=lambda kind: others[kind])
    return f"; found {_summary(others)}{f' ({_FILE_KINDS[most]})' if most in _FILE_KINDS else ''}"


def _scan(root: Path, suffixes: tuple[str, ...]) -> tuple[list[str], list[str], list[int], dict[str, int]]:
    """List images, folders, their modification times, and the number of other files by kind."""
    names: list[str] = []
    folders: list[str] = []
    folder_times: list[int] = []
    others: Counter[str] = Counter()
    visits: Counter[tuple[int, int]] = Counter()
    next_report = time.monotonic() + _REPORT_SECONDS
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # a folder, the identities of its parents
    while pending:
        folder, above = pending.pop()
        status = os.stat(root / folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue  # a link to a parent
        visits[identity] += 1
        if visits[identity] > _MAX_VISITS:
            raise OSError(
                f"links under {root} lead to one folder more than {_MAX_VISITS:,} times, such as {root / folder}"
            )
        if time.monotonic() > next_report:
            logger.info("listing %s: %d images in %d folders so far", root, len(names), len(folders))
            next_report += _REPORT_SECONDS
        folders.append(folder)
        folder_times.append(status.st_mtime_ns)
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                kind = _kind_of(entry)
                if kind == _FOLDER:
                    pending.append((f"{folder}{entry.name}/", (*above, identity)))
                elif kind != _FILE:
                    others[kind] += 1
                elif _is_image(entry, suffixes):
                    names.append(folder + entry.name)
                else:
                    others[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1
    return names, folders, folder_times, dict(others)


def _is_image(entry: os.DirEntry[str], suffixes: tuple[str, ...]) -> bool:
    """Whether a file is an image by its name or, if any name will do, by its content."""
    if entry.name.lower().endswith(tuple(filter(None, suffixes))):
        return True
    if ANY_SUFFIX not in suffixes:
        return False
    try:
        with open(entry.path, "rb") as file:
            return begins_as_image(file.read(16))
    except OSError:
        return True  # an unreadable one


_FOLDER, _FILE = "folder", "file"


def _kind_of(entry: os.DirEntry[str]) -> str:
    """What an entry of a folder is; a link that leads nowhere is a file. Only links need another access to the disk."""
    try:
        if entry.is_dir():
            return _FOLDER
        if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            return _FILE
        return kind_of_file(entry.stat().st_mode)
    except OSError:  # a link to itself, or into a folder that may not be searched
        return _FILE


def _cache_path(root: Path, suffixes: tuple[str, ...]) -> Path:
    key = hashlib.sha256(os.fsencode(os.path.realpath(root)) + " ".join((_FORMAT, *suffixes)).encode())
    return cache_folder("file_lists") / f"{key.hexdigest()[:32]}.npz"


def cache_folder(name: str) -> Path:
    """A folder of that name in the user's cache folder; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "dinov2", name)


def _load(cache: Path, root: Path) -> FileList | None:
    """The stored list if there is one, it is consistent and no folder has changed."""
    try:
        with cache.open("rb") as file, np.load(file) as stored:
            folders = stored_paths(stored, "folder")
            times = stored["folder_times"]
            if times.shape != (len(folders),):
                return None
            for folder, folder_time in zip(folders, times, strict=True):
                if os.stat(root / folder).st_mtime_ns != folder_time:
                    return None
            images = stored_paths(stored, "file")
            others = dict(zip(stored_paths(stored, "kind"), map(int, stored["kind_counts"]), strict=True))
            return FileList(images, others) if len(images) else None
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file raises nearly anything
        logger.info("the list of images in %s is damaged and is rebuilt: %s", cache, error)
        return None


def stored_paths(stored: Mapping[str, np.ndarray], name: str) -> PathTable:
    """The table that was stored as the arrays `<name>_data` and `<name>_ends`; a ValueError if they do not fit."""
    data, ends = stored[f"{name}_data"], stored[f"{name}_ends"]
    if data.dtype != np.uint8 or ends.dtype != np.int64 or data.ndim != 1 or ends.ndim != 1:
        raise ValueError(f"{name}: wrong types")
    if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != len(data):
        raise ValueError(f"{name}: wrong positions")
    return PathTable(data, ends)


def _store(cache: Path, files: FileList, folders: PathTable, folder_times: Sequence[int]) -> None:
    tables: dict[str, Any] = {}
    for name, table in (("file", files.images), ("folder", folders), ("kind", PathTable.of(files.others))):
        tables |= {f"{name}_data": table.data, f"{name}_ends": table.ends}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as file:
            np.savez(
                file,
                **tables,
                folder_times=np.array(folder_times, np.int64),
                kind_counts=np.array(list(files.others.values()), np.int64),
            )
    except OSError as error:
        logger.info("the list of images is not cached for the next run: %s", error)
