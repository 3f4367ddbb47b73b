"""Images in Parquet files as a dataset whose samples are read in any order."""

import hashlib
import logging
import struct
from collections.abc import Iterator
from functools import partial
from os import pread
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinov2.data.datasets.base import DataSourceError
from dinov2.data.shards.archives import ArchiveError, read_member
from dinov2.data.shards.dataset import joined
from dinov2.data.shards.index import several_at_once
from dinov2.data.shards.labels import labels_of
from dinov2.data.shards.local_cache import data_cache
from dinov2.data.shards.names import expand
from dinov2.data.shards.parquet_file import OFFSET_BYTES, ParquetIndex, import_parquet, index_parquet, write_group
from dinov2.data.shards.sharded import ShardedDataset
from dinov2.data.shards.storage import DataFile, Version
from dinov2.data.shards.stored_index import stored_or_made

logger = logging.getLogger(__name__)

_PLACE = struct.Struct("<2q")  # where an image in the copy of a row group begins and ends


class ParquetFiles(ShardedDataset):
    """The images in a column of Parquet files, in the order of the files and of their rows.

    The column holds image files as bytes, or a struct with them, as the library `datasets` of Hugging Face writes it,
    whose class labels are used. The images of a row group are copied to the data cache when one of them is read; the
    row groups are the shards. A file that changes after it was listed is an error when it is read again.

    Args:
        files: Files, with ranges `{000..123}`, globs and commas, or their folder.
        image: The column of the images; needed where there are several.
        label: The column of class indices or names; default: `label`, or the only one of class labels.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    def __init__(self, *, files: str, image: str = "", label: str = "", **transforms: Any) -> None:
        super().__init__(**transforms)
        import_parquet()
        self.root = Path()
        self._files = expand(files, ".parquet")
        self._indices = _index(self._files, image, label)
        self._keys = [  # of copies
            f"{file.identity} {index.version} {index.column}"
            for file, index in zip(self._files, self._indices, strict=True)
        ]
        self._cache = data_cache()
        self._cache.remove_leftovers()
        self._images = joined([index.paths for index in self._indices])
        self._file_ends = np.cumsum([len(index.paths) for index in self._indices])
        self._group_ends = np.cumsum(np.concatenate([index.group_rows for index in self._indices]))
        counts = [len(index.group_rows) for index in self._indices]
        self._file_of_group = np.repeat(np.arange(len(counts)), counts)
        self._first_groups = np.cumsum([0, *counts])
        self._notes = [note for index in self._indices for note in index.notes]
        self._find_labels(label)

    @property
    def shard_sizes(self) -> list[int]:
        """The number of rows in each row group."""
        sizes: list[int] = np.diff(self._group_ends, prepend=0).tolist()
        return sizes

    @property
    def copied_bytes(self) -> list[int]:
        return [self._copy_bytes(group) for group in range(len(self._group_ends))]

    def describe(self, index: int) -> str:
        file = int(np.searchsorted(self._file_ends, index, side="right"))
        row = index - (self._file_ends[file - 1] if file else 0)
        path = self._images[index]
        return f"{self._files[file]}: row {row}{path and f', {path}'}"

    def fingerprint(self) -> str:
        names = [str(file).rpartition("/")[2] for file in self._files]
        digest = hashlib.blake2b(f"{names} {self.shard_sizes}".encode(), digest_size=8)
        digest.update(self._images.fingerprint().encode())
        return digest.hexdigest()

    def image_files(self) -> Iterator[str]:
        counts = np.diff(self._file_ends, prepend=0)
        return (str(file) for file, count in zip(self._files, counts, strict=True) for _ in range(count))

    def notes_on_files(self) -> list[str]:
        return self._notes

    def get_image_data(self, index: int) -> bytes:
        """Returns the image file of a sample.

        Raises:
            DataSourceError: Its file is not the one that was listed, or is damaged.
            OSError: The row has no image, or a too large one.
        """
        group = int(np.searchsorted(self._group_ends, index, side="right"))
        row = index - int(self._group_ends[group - 1] if group else 0)
        file = self._file_of_group[group]
        key = f"{self._keys[file]} {group - self._first_groups[file]}"
        with self._cache.opened(key, self._copy_bytes(group), partial(self._write, group)) as copy:
            start, end = _PLACE.unpack(pread(copy.fileno(), _PLACE.size, OFFSET_BYTES * row))
            if start == end:
                raise OSError("the row has no image in it")
            return read_member(copy.fileno(), start, end - start, False, max_bytes=self.image_options.max_bytes)

    def _copy_bytes(self, group: int) -> int:
        """Size of the copy of a row group, about."""
        file = self._file_of_group[group]
        index, number = self._indices[file], group - self._first_groups[file]
        return int(index.group_bytes[number] + OFFSET_BYTES * (index.group_rows[number] + 1))

    def _write(self, group: int, copy: BinaryIO) -> int:
        file = int(self._file_of_group[group])
        self._files[file].check(self._indices[file].version)
        try:
            size = write_group(self._files[file], group - int(self._first_groups[file]), self._indices[file], copy)
        except ArchiveError as error:
            raise DataSourceError(str(error)) from error
        self._files[file].check(self._indices[file].version)
        return size

    def _find_labels(self, key: str) -> None:
        """Set classes and targets."""
        texts = [text for index in self._indices for text in index.labels]
        known = [index.classes for index in self._indices]
        first = self._indices[0]
        for file, index in zip(self._files, self._indices, strict=True):
            for kind, name, other in (("images", index.column, first.column), ("labels", index.label, first.label)):
                if name != other:
                    raise ValueError(
                        f"{file} has its {kind} in column {name or 'none'}, but {self._files[0]} in {other or 'none'}: "
                        f"choose one that all have, :{kind[:-1]}=COLUMN"
                    )
        for file, classes in zip(self._files, known, strict=True):
            if classes != known[0]:
                raise ValueError(f"{file} has other class names than {self._files[0]}")
        if key and not any(texts):
            raise ValueError(f"label={key}: no row has one, such as {self.describe(0)}")
        self.classes, self._targets, notes = labels_of(texts, self.describe, known[0])
        self._notes += notes
        number = "no labels" if self._targets is None else f"{len(set(texts)):,} classes in column {first.label}"
        if not first.label:
            number += f" (columns: {first.columns}; choose one with :label=COLUMN)"
        column = first.column.removesuffix(".bytes")
        logger.info("%d images of column %s in %d row group(s): %s", len(self), column, len(self._group_ends), number)


def _index(files: list[DataFile], image: str, label: str) -> list[ParquetIndex]:
    """Index files, or find their stored indices."""

    def make(file: DataFile, version: Version) -> ParquetIndex:
        return index_parquet(file, version, image, label)

    return several_at_once(lambda file: stored_or_made(file, ParquetIndex, ("Parquet", image, label), make), files)
