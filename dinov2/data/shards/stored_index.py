"""What was found in a file that holds images, kept in the user's cache folder until the file changes."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from dinov2.data.datasets.file_list import PathTable, cache_folder, stored_paths
from dinov2.data.shards.storage import DataFile, Version
from dinov2.files import atomic_write

logger = logging.getLogger(__name__)

_FORMAT = "3"  # version of the stored index; part of its name


class Index(Protocol):
    """A named tuple of tables and arrays, and of other values that JSON has."""

    @property
    def version(self) -> Version:
        """Version of the file that was read."""

    def _asdict(self) -> dict[str, Any]: ...


AnyIndex = TypeVar("AnyIndex", bound=Index)


def stored_or_made(
    file: DataFile, kind: type[AnyIndex], words: tuple[str, ...], make: Callable[[DataFile, Version], AnyIndex]
) -> AnyIndex:
    """The stored index of a file if it has not changed, else a new one, which is stored.

    Args:
        kind: Class of the index; it is made by its fields `PathTable`, `np.ndarray` and others.
        words: What the index depends on besides the file.
        make: Makes an index of this version of the file.
    """
    version = file.version()
    key = hashlib.sha256(os.fsencode(file.identity) + b"\0" + " ".join((_FORMAT, *words)).encode())
    path = cache_folder("shards") / f"{key.hexdigest()[:32]}.npz"
    index = _load(path, kind)
    if index is not None and index.version == version:
        return index
    index = make(file, version)
    if file.is_settled(version):
        _store(path, index)
    return index


def _load(path: Path, kind: type[AnyIndex]) -> AnyIndex | None:
    """The stored index if there is one and it is consistent."""
    try:
        with path.open("rb") as file, np.load(file) as stored:
            values = {name: _restored(stored, name, each) for name, each in kind.__annotations__.items()}
            return kind(**values)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file raises nearly anything
        logger.info("the index in %s is damaged and is rebuilt: %s", path, error)
        return None


def _restored(stored: Any, name: str, kind: type) -> Any:
    if kind is PathTable:
        return stored_paths(stored, name)
    if kind is np.ndarray:
        return stored[name]
    value = json.loads(str(stored[name]))
    return Version(*value) if kind is Version else value


def _store(path: Path, index: Index) -> None:
    arrays: dict[str, Any] = {}
    for name, value in index._asdict().items():
        if isinstance(value, PathTable):
            arrays |= {f"{name}_data": value.data, f"{name}_ends": value.ends}
        else:
            arrays[name] = value if isinstance(value, np.ndarray) else np.array(json.dumps(value))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.info("the index is not cached for the next run: %s", error)
