"""Images in tar shards or zip files as a dataset whose samples are read in any order."""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ChangedDataError
from dinov2.data.datasets.file_list import PathTable
from dinov2.data.shards.archives import read_member
from dinov2.data.shards.index import Selection, index_archives
from dinov2.data.shards.labels import labels_of
from dinov2.data.shards.local_cache import data_cache
from dinov2.data.shards.names import expand
from dinov2.data.shards.sharded import ShardedDataset
from dinov2.data.shards.storage import RemoteFile, changed, gone, version_of

logger = logging.getLogger(__name__)

_OPEN_FILES = 64  # archives that a process keeps open


class Shards(ShardedDataset):
    """The images in archives, in the order of the archives and of the files in them.

    A sample is an image, and the files with the same name up to its first dot, as WebDataset writes them. Its label is
    an integer in its file `.cls`, or what `label` selects; without such files, the folders in the archives are the
    classes, from the first level on which there are several. The list of the files in an archive is made once and
    cached; an archive that changes afterwards, while it is used, is an error. Of remote archives copies are read, which
    are in the data cache.

    Args:
        kind: "Tar" or "Zip".
        files: Archives, with ranges `{000..123}`, globs and commas, or their folder.
        image: What follows the dot in the names of images, such as "jpg"; needed where samples have several.
        label: "cls", "txt" (a class name), or "json:KEY" (a class name or index).
        transforms, transform, target_transform: See `ImageDataset`.
    """

    def __init__(self, kind: str, *, files: str, image: str = "", label: str = "", **transforms: Any) -> None:
        super().__init__(**transforms)
        if label.partition(":")[0] not in ("", "cls", "txt", "json") or label == "json":
            raise ValueError(f"label must be cls, txt or json:KEY, got {label!r}")
        self.root = Path()
        self._files = expand(files, f".{kind.lower()}")
        if any(isinstance(file, RemoteFile) for file in self._files):
            data_cache().remove_leftovers()
        indices = index_archives(self._files, kind, Selection(image, label))
        self._versions = [index.version for index in indices]
        self._notes = [note for index in indices for note in index.notes]
        self._archives = np.repeat(np.arange(len(indices), dtype=np.int32), [len(index.names) for index in indices])
        self._images = joined([index.names for index in indices])
        self._offsets, self._sizes, self._deflated = (
            np.concatenate([getattr(index, name) for index in indices]) for name in ("offsets", "sizes", "deflated")
        )
        self._find_labels(joined([index.labels for index in indices]), label)
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # of open archives, least recently used first

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": OrderedDict()}  # a spawned worker opens its own

    @property
    def shard_sizes(self) -> list[int]:
        """The number of samples in each archive."""
        sizes: list[int] = np.bincount(self._archives, minlength=len(self._files)).tolist()
        return sizes

    @property
    def copied_bytes(self) -> list[int]:
        if not any(isinstance(file, RemoteFile) for file in self._files):
            return []
        pairs = zip(self._files, self._versions, strict=True)
        return [version.size if isinstance(file, RemoteFile) else 0 for file, version in pairs]

    def describe(self, index: int) -> str:
        return f"{self._files[self._archives[index]]}: {self._images[index]}"

    def fingerprint(self) -> str:
        return self._images.fingerprint()

    def image_files(self) -> Iterator[str]:
        return (str(self._files[archive]) for archive in self._archives)

    def notes_on_files(self) -> list[str]:
        return self._notes

    def get_image_data(self, index: int) -> bytes:
        """Returns the image file of a sample; a `DataSourceError` if its archive cannot be read or is another one."""
        archive = int(self._archives[index])
        place = int(self._offsets[index]), int(self._sizes[index]), bool(self._deflated[index])
        if isinstance(file := self._files[archive], RemoteFile):
            with file.opened(self._versions[archive]) as copy:
                return read_member(copy.fileno(), *place, max_bytes=self.image_options.max_bytes)
        descriptor = self._open(archive)
        if version_of(os.fstat(descriptor)) != self._versions[archive]:
            raise ChangedDataError(changed(file))
        return read_member(descriptor, *place, max_bytes=self.image_options.max_bytes)

    def _open(self, archive: int) -> int:
        if archive in self._descriptors:
            self._descriptors.move_to_end(archive)
        else:
            try:
                self._descriptors[archive] = os.open(self._files[archive].identity, os.O_RDONLY)
            except FileNotFoundError as error:
                raise ChangedDataError(gone(self._files[archive])) from error
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[archive]

    def _find_labels(self, texts: PathTable, key: str) -> None:
        """Set classes and targets from the labels of the samples, or else, without a key, from their folders."""
        labels = list(texts)
        if not any(labels):
            if key:
                raise ValueError(f"label={key}: no sample has it, such as {self.describe(0)}")
            labels = _folders(self._images) or labels
        self.classes, self._targets, notes = labels_of(labels, self.describe)
        self._notes += notes
        number = "no labels" if self._targets is None else f"{len(set(labels)):,} classes"
        logger.info("%d archives: %s", len(self._files), number)


def joined(tables: list[PathTable]) -> PathTable:
    """Several tables as one."""
    starts = np.cumsum([0, *(len(table.data) for table in tables)])
    ends = [table.ends + start for table, start in zip(tables, starts, strict=False)]
    return PathTable(np.concatenate([table.data for table in tables]), np.concatenate(ends))


def _folders(names: PathTable) -> list[str]:
    """The folder of each image on the first level on which there are several; empty if some are in none."""
    parts = [name.split("/") for name in names]
    level = 0
    while True:
        if any(len(each) < level + 2 for each in parts):
            return []
        if len({each[level] for each in parts}) > 1:
            return [each[level] for each in parts]
        level += 1
