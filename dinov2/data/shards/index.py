"""The images in an archive: where they are and what label each has; listed once and cached between runs."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from dinov2.data.datasets.file_list import IMAGE_SUFFIXES, PathTable
from dinov2.data.shards.archives import LISTERS, ArchiveError, Member, read_member
from dinov2.data.shards.storage import DataFile, Version
from dinov2.data.shards.stored_index import stored_or_made

logger = logging.getLogger(__name__)

_LABEL_BYTES = 2**20  # limit of a file with a label
_THREADS = 16  # archives that are listed at once
_REPORT_SECONDS = 30.0  # between log lines while many archives are listed


class Selection(NamedTuple):
    """What of the files of a sample is its image and its label."""

    image: str = ""  # what follows the key and a dot, such as "jpg" or "left.png"; "": whatever is an image
    label: str = ""  # "cls", "txt", or "json:KEY"; "": "cls" where there is one


class ShardIndex(NamedTuple):
    """The images in an archive, in its order."""

    version: Version  # of the archive that was listed
    names: PathTable
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int64
    deflated: np.ndarray  # (N,) bool
    labels: PathTable  # text of each; "" without one
    notes: list[str]


Indexed = TypeVar("Indexed")


def index_archives(files: Sequence[DataFile], kind: str, selection: Selection) -> list[ShardIndex]:
    """List the images in archives; those that were listed before and have not changed are not read.

    Raises:
        OSError, ValueError: An archive cannot be read, is damaged, or has samples that the selection does not fit.
    """
    words = (kind, *selection, *IMAGE_SUFFIXES)

    def make(file: DataFile, version: Version) -> ShardIndex:
        with file.opened(version) as content:
            return _list(content, str(file), version, kind, selection)

    started = time.monotonic()
    indices = several_at_once(lambda file: stored_or_made(file, ShardIndex, words, make), files)
    count = sum(len(index.names) for index in indices)
    logger.info("%d images in %d archives, listed in %.1f s", count, len(files), time.monotonic() - started)
    return indices


def several_at_once(index: Callable[[DataFile], Indexed], files: Sequence[DataFile]) -> list[Indexed]:
    """Index files by several threads, with a log line from time to time."""
    indices, next_report = [], time.monotonic() + _REPORT_SECONDS
    with ThreadPoolExecutor(min(_THREADS, len(files))) as threads:
        pending = [threads.submit(index, file) for file in files]
        try:
            for future in pending:
                indices.append(future.result())
                if time.monotonic() > next_report:
                    logger.info("listed %d of %d archives", len(indices), len(files))
                    next_report += _REPORT_SECONDS
        finally:
            threads.shutdown(cancel_futures=True)
    return indices


# --- Samples ---------------------------------------------------------------------------------------------------------


def _list(file: BinaryIO, path: str, version: Version, kind: str, selection: Selection) -> ShardIndex:
    listing = LISTERS[kind](file, path)
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
    labels = _read_labels(file, path, files, chosen, selection.label)
    return ShardIndex(
        *(version, PathTable.of(chosen)),
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


def _check_one_each(path: str, images: Mapping[str, Member], samples: Set[str]) -> None:
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


def _read_labels(
    file: BinaryIO, path: str, files: Mapping[str, Member], images: Mapping[str, Member], label: str
) -> Iterator[str]:
    """The text of the label of each image, "" without one."""
    extension, _, entry = (label or "cls").partition(":")
    by_key = {_split(name)[0]: member for name, member in files.items() if _split(name)[1] == extension}
    for name in images:
        member = by_key.get(_split(name)[0])
        if member is None:
            yield ""
            continue
        text = read_member(file.fileno(), *member[1:], max_bytes=_LABEL_BYTES).decode("utf-8", "replace").strip()
        yield _entry_of(path, name, text, entry) if entry else text


def _entry_of(path: str, name: str, text: str, key: str) -> str:
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
