"""Read the index of a checkpoint folder, `.metadata`, without running code in it.

`torch.distributed.checkpoint` writes it as a pickle, which may call any function. Here it can only fill inert records
(`_Record`); the objects that torch needs are built from their validated fields. Checkpoints contain tensors only:
torch reads entries of other kinds with an unrestricted pickle, so they are refused.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dinov2.train.checkpoint_files.folder import ADVICE, METADATA_FILE, read_checked

_FILE = re.compile(r"\w+\.distcp")


class _Record:
    """Replaces a class while unpickling, and stores the state in the pickle.

    Because of `__setstate__`, a pickle can set no other attribute, neither of a record nor of its class.
    """

    def __init__(self, *args: object) -> None:
        """Ignore the arguments in the pickle (paths, memory layouts)."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = [
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    (_METADATA, "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("builtins", "getattr"),  # used by Python before 3.11.4 for members of enumerations; a record ignores it
]
"""All names in a `.metadata`, besides torch.Size and dtypes."""

_RECORDS = {(module, name): type(name, (_Record,), {}) for module, name in _CLASSES}


class _RefusedError(ValueError):
    """The pickle asks for something that does not belong in an index."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        raise _RefusedError(f"it asks for {module}.{name}, which could run code and does not belong in a checkpoint")


def read_metadata(folder: str | Path) -> Metadata:
    """Read `.metadata` of a checkpoint folder, and check that its files are complete and contain tensors only.

    A FileNotFoundError if one is missing, a ValueError if one is damaged.
    """
    path = Path(folder) / METADATA_FILE
    content = read_checked(Path(folder), METADATA_FILE)
    try:
        fields = _fields(_Unpickler(io.BytesIO(content)).load(), "Metadata")
        tensors = {name: _tensor(name, record) for name, record in fields["state_dict_metadata"].items()}
        stored = dict(_stored(index, info) for index, info in fields["storage_data"].items())
        _check_all_stored(tensors, stored)
    except _RefusedError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except OSError:
        raise
    except Exception as error:  # on bytes it does not expect pickle fails in many ways
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {ADVICE}") from error
    _check_files(Path(folder), stored)
    return Metadata({**tensors}, {name: (name,) for name in tensors}, stored, version=fields.get("version"))


def _fields(record: Any, kind: str) -> dict[str, Any]:
    """The fields of the dataclass that a record replaces."""
    if type(record).__name__ != kind or not isinstance(record, _Record) or not isinstance(record.state, dict):
        raise ValueError(f"a {type(record).__name__} instead of a {kind}")
    return record.state


def _size(value: object) -> torch.Size:
    if not isinstance(value, torch.Size) or min(value, default=0) < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _tensor(name: str, record: object) -> TensorStorageMetadata:
    if type(record).__name__ == "BytesStorageMetadata":
        raise _RefusedError(f"{name} is not a tensor but a pickled object, which could run code")
    fields = _fields(record, "TensorStorageMetadata")
    size, dtype = _size(fields["size"]), fields["properties"].state[0]
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} has the dtype {dtype!r}")
    chunks = []
    for chunk in (_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]):
        chunks.append(ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])))
        ends = [offset + length for offset, length in zip(chunks[-1].offsets, chunks[-1].sizes, strict=True)]
        if any(end > length for end, length in zip(ends, size, strict=True)):
            raise ValueError(f"a chunk of {name} is outside of the tensor")
    if sum({chunk.offsets: math.prod(chunk.sizes) for chunk in chunks}.values()) != math.prod(size):
        raise ValueError(f"the chunks of {name} do not cover the tensor")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _stored(index: object, info: object) -> tuple[MetadataIndex, _StorageInfo]:
    """A chunk of a tensor, and the position of its bytes."""
    chunk, position = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    file, offset, length = position["relative_path"], position["offset"], position["length"]
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise _RefusedError(f"it refers to {file!r}, which is not a file of a checkpoint folder")
    if position.get("transform_descriptors"):
        raise _RefusedError(f"{file} is written with {position['transform_descriptors']}, which is not supported")
    if not (isinstance(offset, int) and isinstance(length, int) and offset >= 0 and length >= 0):
        raise ValueError(f"{length} bytes at {offset} of {file}")
    return MetadataIndex(chunk["fqn"], _size(chunk["offset"])), _StorageInfo(file, offset, length)


def _check_all_stored(tensors: dict[str, TensorStorageMetadata], stored: dict[MetadataIndex, _StorageInfo]) -> None:
    """Check that every chunk of a tensor is stored, in at least as many bytes as it has."""
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            num_bytes = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            if stored[MetadataIndex(name, chunk.offsets)].length < num_bytes:
                raise ValueError(f"too few bytes for {name}")


def _check_files(folder: Path, stored: dict[MetadataIndex, _StorageInfo]) -> None:
    """Check that the files exist and have their full length."""
    ends: dict[str, int] = {}
    for info in stored.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete; {ADVICE}")
        if path.stat().st_size < end:
            raise ValueError(f"{path} is truncated, {path.stat().st_size:,} of {end:,} bytes are there: {ADVICE}")
