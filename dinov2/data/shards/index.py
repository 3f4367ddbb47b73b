"""The images in an archive: where they are and what label each has; listed once and cached between runs."""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.datasets.file_list import IMAGE_SUFFIXES, SETTLED_NS, PathTable, cache_folder, stored_paths
from dinov2.data.shards.archives import LISTERS, ArchiveError, Member, read_member
from dinov2.files import atomic_write

logger = logging.getLogger(__name__)

_FORMAT = "1"  # version of the cached index; part of its name
_LABEL_BYTES = 2**20  # limit of a file with a label
_THREADS = 16  # archives that are listed at once
_REPORT_SECONDS = 30.0  # between log lines while many archives are listed


class Selection(NamedTuple):
    """What of the files of a sample is its image and its label."""

    image: str = ""  # what follows the key and a dot, such as "jpg" or "left.png"; "": whatever is an image
    label: str = ""  # "cls", "txt", or "json:KEY"; "": "cls" where there is one


class ShardIndex(NamedTuple):
    """The images in an archive, in its order."""

    size: int  # of the archive in bytes, when it was listed
    mtime_ns: int
    names: PathTable
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int64
    deflated: np.ndarray  # (N,) bool
    labels: PathTable  # text of each; "" without one
    notes: list[str]


def index_archives(paths: Sequence[Path], kind: str, selection: Selection) -> list[ShardIndex]:
    """List the images in archives, several at once; those that were listed before and have not changed are not read.

    Raises:
        OSError, ValueError: An archive cannot be read, is damaged, or has samples that the selection does not fit.
    """
    indices, next_report, started = [], time.monotonic() + _REPORT_SECONDS, time.monotonic()
    with ThreadPoolExecutor(min(_THREADS, len(paths))) as threads:
        for index in threads.map(lambda path: _cached(path, kind, selection), paths):
            indices.append(index)
            if time.monotonic() > next_report:
                logger.info("listed %d of %d archives", len(indices), len(paths))
                next_report += _REPORT_SECONDS
    count = sum(len(index.names) for index in indices)
    logger.info("%d images in %d archives, listed in %.1f s", count, len(paths), time.monotonic() - started)
    return indices


def _cached(path: Path, kind: str, selection: Selection) -> ShardIndex:
    cache, status = _cache_path(path, kind, selection), path.stat()
    index = _load(cache)
    if index is not None and (index.size, index.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return index
    index = _list(path, kind, selection)
    if status.st_mtime_ns < time.time_ns() - SETTLED_NS:
        _store(cache, index)
    return index


# --- Samples ---------------------------------------------------------------------------------------------------------


def _list(path: Path, kind: str, selection: Selection) -> ShardIndex:
    status = path.stat()
    listing = LISTERS[kind](path)
    files: dict[str, Member] = {}
    for member in listing.members:
        files[member.name.removeprefix("./")] = member  # of several with one name the last, as when unpacking
    notes = list(listing.notes)
    if len(files) < len(listing.members):
        again = Counter(member.name for member in listing.members).most_common(1)[0][0]
        notes.append(
            f"{path}: {len(listing.members) - len(files)} file(s) have the name of an earlier one, such as {again}: "
            "the last one counts, as when unpacking"
        )
    chosen = {name: member for name, member in files.items() if _is_image(name, selection.image)}
    if not chosen:
        kinds = Counter(_split(name)[1] or "without suffix" for name in files).most_common(6)
        held = ", ".join(f"{count} {kind}" for kind, count in kinds) or "nothing"
        raise ArchiveError(f"no images {f'*.{selection.image} ' if selection.image else ''}in {path}; it holds: {held}")
    _check_one_each(path, chosen, {_split(name)[0] for name in files if name not in chosen})
    labels = _read_labels(path, files, chosen, selection.label)
    return ShardIndex(
        *(status.st_size, status.st_mtime_ns, PathTable.of(chosen)),
        np.array([member.offset for member in chosen.values()], np.int64),
        np.array([member.size for member in chosen.values()], np.int64),
        np.array([member.is_deflated for member in chosen.values()], bool),
        *(PathTable.of(labels), notes),
    )


def _split(name: str) -> tuple[str, str]:
    """The key of the sample of a file, up to the first dot of its last part, and what follows."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _is_image(name: str, image: str) -> bool:
    if name.rpartition("/")[2].startswith("."):
        return False
    return _split(name)[1] == image.lower() if image else name.lower().endswith(IMAGE_SUFFIXES)


def _check_one_each(path: Path, images: Mapping[str, Member], samples: Set[str]) -> None:
    """Raise an error for one of the samples, which have other files too, with several images: which one is meant?"""
    keys: dict[str, str] = {}
    for name in images:
        key, extension = _split(name)
        if key not in samples:
            continue
        if key in keys:
            raise ArchiveError(
                f"{path}: sample {key} has several images, {_split(keys[key])[1]} and {extension}: choose one with "
                f":image={extension}"
            )
        keys[key] = name


def _read_labels(path: Path, files: Mapping[str, Member], images: Mapping[str, Member], label: str) -> Iterator[str]:
    """The text of the label of each image, "" without one."""
    extension, _, entry = (label or "cls").partition(":")
    by_key = {_split(name)[0]: member for name, member in files.items() if _split(name)[1] == extension}
    with path.open("rb") as file:
        for name in images:
            member = by_key.get(_split(name)[0])
            if member is None:
                yield ""
                continue
            text = read_member(file.fileno(), *member[1:], max_bytes=_LABEL_BYTES).decode("utf-8", "replace").strip()
            yield _entry_of(path, name, text, entry) if entry else text


def _entry_of(path: Path, name: str, text: str, key: str) -> str:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ArchiveError(f"{path}: the JSON of {name} is malformed: {error}") from error
    if not isinstance(content, dict):
        raise ArchiveError(f"{path}: the JSON of {name} is no object with keys")
    value = content.get(key)
    if isinstance(value, dict | list):
        raise ArchiveError(f"{path}: {key} in the JSON of {name} is no class: {str(value)[:80]}")
    return "" if value is None else str(value)


# --- Cache -----------------------------------------------------------------------------------------------------------


def _cache_path(path: Path, kind: str, selection: Selection) -> Path:
    key = " ".join((_FORMAT, kind, *selection, *IMAGE_SUFFIXES)).encode()
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path)) + b"\0" + key)
    return cache_folder("shards") / f"{digest.hexdigest()[:32]}.npz"


def _load(cache: Path) -> ShardIndex | None:
    """The stored index if there is one and it is consistent."""
    try:
        with cache.open("rb") as file, np.load(file) as stored:
            names, labels = stored_paths(stored, "names"), stored_paths(stored, "labels")
            arrays = [stored[name] for name in ("offsets", "sizes", "deflated")]
            if {len(array) for array in (*arrays, labels)} != {len(names)}:
                return None
            size, mtime_ns = map(int, stored["status"])
            offsets, sizes, deflated = arrays
            notes = json.loads(str(stored["notes"]))
            return ShardIndex(size, mtime_ns, names, offsets, sizes, deflated, labels, notes)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file raises nearly anything
        logger.info("the index in %s is damaged and is rebuilt: %s", cache, error)
        return None


def _store(cache: Path, index: ShardIndex) -> None:
    arrays: dict[str, Any] = {name: getattr(index, name) for name in ("offsets", "sizes", "deflated")}
    for name in ("names", "labels"):
        table: PathTable = getattr(index, name)
        arrays |= {f"{name}_data": table.data, f"{name}_ends": table.ends}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as file:
            status = np.array([index.size, index.mtime_ns], np.int64)
            np.savez(file, status=status, notes=np.array(json.dumps(index.notes)), **arrays)
    except OSError as error:
        logger.info("the index is not cached for the next run: %s", error)
