"""Features in folders of `python -m dinov2.eval.extract`, read from their files when they are needed.

In memory are the names, some 50 bytes an image, the labels, and the rows in use: millions of images are no problem.

Shapes: n images, D feature dimension.
"""

import json
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.datasets.file_list import PathTable
from dinov2.eval.extract.files import NAMES_FILE, map_array, read_metadata, shard_files
from dinov2.eval.extract.tokens import ARRAY_NAMES

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20  # of float32 rows that are in use at once
_SAME = ("preprocessing", "layers", "final_norm")  # settings that comparable features have in common


class Shard(NamedTuple):
    """A file with the features of consecutive images."""

    path: Path
    num_images: int


class FeatureTable:
    """The class or mean patch tokens in one or several folders, as rows of unit length.

    Args:
        folders: At least one; of several, images are in the order of the folders, and labels are left out, because
            their meanings may differ.
        tokens: `class` or `mean`.

    Raises:
        FileNotFoundError, ValueError: A folder has no such features, or the folders have features of different models.
    """

    def __init__(self, folders: Sequence[Path], tokens: str = "class") -> None:
        self.folders, self.array_name = list(folders), ARRAY_NAMES[tokens]
        self.metadata = [read_metadata(folder) for folder in folders]
        for folder, metadata in zip(folders, self.metadata, strict=True):
            _check_tokens(folder, metadata["settings"], tokens)
            _check_same(folders[0], self.metadata[0]["settings"], folder, metadata["settings"])
        self.shards = [
            shard
            for folder, metadata in zip(folders, self.metadata, strict=True)
            for shard in _shards_of(folder, metadata, self.array_name)
        ]
        self.ends = np.cumsum([shard.num_images for shard in self.shards], dtype=np.int64)
        self.names, labels = read_names([folder / NAMES_FILE for folder in folders])
        if len(self) == 0 or len(self.names) != len(self):
            text = f"{len(self.names)} names of {len(self)} features"
            raise ValueError(f"{', '.join(map(str, folders))}: {text}; there must be as many, and at least one")
        self.labels = labels if len(folders) == 1 else None
        self.width = int(self._map(0).shape[1])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def chunk_rows(self) -> int:
        return max(1, CHUNK_BYTES // (4 * self.width))

    def chunks(self, index: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Start and rows (chunk, D) of consecutive chunks: of all rows, or of those of an index."""
        for start in range(0, len(self) if index is None else len(index), self.chunk_rows):
            stop = start + self.chunk_rows
            yield start, self.take(np.arange(start, min(stop, len(self))) if index is None else index[start:stop])

    def take(self, index: np.ndarray) -> np.ndarray:
        """Rows (k, D) float32 of unit length; a `ValueError` for features that are not finite, or zero."""
        found = np.empty((len(index), self.width), np.float32)
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        bounds = np.searchsorted(ordered, np.concatenate([[0], self.ends]))
        for number in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[number], bounds[number + 1])
            first = int(self.ends[number]) - self.shards[number].num_images
            found[order[part]] = self._map(int(number))[ordered[part] - first]
        lengths = np.sqrt(np.einsum("nd,nd->n", found, found, dtype=np.float64))
        if (bad := ~np.isfinite(lengths) | (lengths == 0)).any():
            kind = "zero" if lengths[bad][0] == 0 else "not finite"
            raise ValueError(f"the features of {self.names[int(index[bad][0])]} are {kind}: extract them again")
        found /= lengths[:, None].astype(np.float32)
        return found

    def locate(self, row: int) -> tuple[int, int]:
        """Number of the folder of a row, and position in what the features there were extracted from."""
        ends = np.cumsum([metadata["images"] for metadata in self.metadata])
        number = int(np.searchsorted(ends, row, side="right"))
        row -= int(ends[number - 1]) if number else 0
        for omitted in sorted(each["image_index"] for each in self.metadata[number]["unreadable"]):
            row += omitted <= row
        return number, row

    def _map(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        values = map_array(shard.path, self.array_name)
        if values.ndim != 2 or len(values) != shard.num_images:
            shape = " x ".join(map(str, values.shape))
            raise ValueError(f"{shard.path} is damaged: {shape} features of {shard.num_images} images")
        return values


def check_comparable(first: FeatureTable, second: FeatureTable) -> None:
    """Raise a `ValueError` if the features of two tables are not of the same model and preprocessing."""
    for folder, metadata in zip(second.folders, second.metadata, strict=True):
        _check_same(first.folders[0], first.metadata[0]["settings"], folder, metadata["settings"])
    if first.width != second.width:
        raise ValueError(f"features of {first.width} and {second.width} dimensions cannot be compared")


def read_names(files: Sequence[Path]) -> tuple[PathTable, np.ndarray | None]:
    """Names and class indices (n,) int64 of all images; None if one has no label, or several."""
    data, ends, labels = bytearray(), array("q"), array("q")
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                data += os.fsencode(row["name"])
                ends.append(len(data))
                if isinstance(label := row.get("label"), int):
                    labels.append(label)
    if 0 < len(labels) < len(ends):
        logger.warning("%d of %d images have no label: labels are not used", len(ends) - len(labels), len(ends))
    table = PathTable(np.frombuffer(data, np.uint8), np.frombuffer(ends, np.int64))
    return table, np.frombuffer(labels, np.int64) if len(labels) == len(ends) else None


def _shards_of(folder: Path, metadata: Mapping[str, Any], name: str) -> Iterator[Shard]:
    for number, shard in enumerate(metadata["shards"]):
        files = shard_files(number, [name], metadata["settings"]["format"])
        if shard["images"]:
            yield Shard(folder / next(iter(files)), shard["images"])


def _check_tokens(folder: Path, settings: Mapping[str, Any], tokens: str) -> None:
    if tokens not in settings["tokens"]:
        raise ValueError(
            f"{folder} has {' and '.join(settings['tokens'])} tokens, not {tokens}: give --tokens, or extract them"
        )
    if len(settings["layers"]) > 1:
        layers = ", ".join(map(str, settings["layers"]))
        raise ValueError(f"{folder} has features of the blocks {layers}: extract those of one, --layers 1")


def _check_same(first: Path, there: Mapping[str, Any], second: Path, here: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names a setting, if two folders have features that cannot be compared."""
    before, after = _facts(there), _facts(here)
    for key in before | after:
        if before.get(key) != after.get(key):
            raise ValueError(
                f"features of {first} and {second} cannot be compared: {key} {before.get(key)} there, {after.get(key)} "
                "here; extract both in the same way"
            )


def _facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides whether features can be compared."""
    model = {f"model.{key}": value for key, value in settings["model"].items() if key not in ("name", "weights")}
    weights = {f"weights.{key}": value for key, value in settings["model"]["weights"].items() if key != "source"}
    return weights | model | {key: settings[key] for key in _SAME}
