"""Files of features: one or several per shard, and how to read a folder of them.

The safetensors format is written here, in a few lines, so that arrays need not be concatenated in memory, the bytes
depend on nothing but the features and settings, and no package is needed.

Shapes: n images, L blocks, h x w patches of an image, D feature dimension; without L for one block.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.eval.extract.extraction import Shard
from dinov2.eval.extract.tokens import ARRAY_NAMES, TokenChoice
from dinov2.files import atomic_write, read_array, read_json

METADATA_FILE, NAMES_FILE = "metadata.json", "names.jsonl"
_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


class ImageFeatures(NamedTuple):
    """Features of images; None for tokens that were not chosen."""

    names: list[str]
    labels: list[Any]  # class index, list of them or None, per image
    grids: Tensor  # (n, 2) int64, rows and columns of patches of each image
    class_token: Tensor | None = None  # (n, D), (n, L, D)
    patch_tokens: Tensor | list[Tensor] | None = None  # (n, h, w, D), (n, L, h, w, D); a list of whole images
    mean_patch_token: Tensor | None = None  # (n, D), (n, L, D)


class ShardArray(NamedTuple):
    """An array of a shard, in parts along its first dimension."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Sequence[np.ndarray]


def arrays_of_shard(
    shard: Shard, choice: TokenChoice, width: int, grid: tuple[int, int] | None
) -> dict[str, ShardArray]:
    """The arrays of a shard by name; `grids` (n, 2) is one of them if the number of patches varies (`grid` is None)."""
    arrays = {}
    for kind in choice.kinds:
        parts = shard.arrays[kind]
        length = sum(map(len, parts))
        dtype = np.dtype(choice.dtype)
        arrays[ARRAY_NAMES[kind]] = ShardArray((length, *choice.shape(kind, width, grid)), dtype, parts)
    if grid is None and "patch" in choice.kinds:
        grids = np.array([row.grid for row in shard.rows], np.int64).reshape(-1, 2)
        arrays["grids"] = ShardArray(grids.shape, grids.dtype, [grids])
    return arrays


def shard_files(number: int, names: Sequence[str], file_format: str) -> dict[str, list[str]]:
    """The files of a shard, and the names of the arrays in each."""
    if file_format == "safetensors":
        return {f"features_{number:05d}.safetensors": list(names)}
    return {f"features_{number:05d}.{name}.npy": [name] for name in names}


def write_arrays(path: Path, arrays: Mapping[str, ShardArray], metadata: Mapping[str, str]) -> str:
    """Write a file, atomically; its suffix decides the format. Returns its SHA-256."""
    with atomic_write(path) as file:
        hashing = _HashingFile(file)
        if path.suffix == ".npy":
            [array] = arrays.values()
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            np.lib.format.write_array_header_1_0(hashing, header)
        else:
            hashing.write(_safetensors_header(arrays, metadata))
        for array in arrays.values():
            for part in array.parts:
                hashing.write(np.ascontiguousarray(part).tobytes())
        return hashing.digest.hexdigest()


class _HashingFile:
    """A file opened for writing, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)


def _safetensors_header(arrays: Mapping[str, ShardArray], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file whose arrays follow in order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, array in arrays.items():
        end = position + math.prod(array.shape) * array.dtype.itemsize
        kind = _SAFETENSORS_TYPES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


# --- Reading ---------------------------------------------------------------------------------------------------------


def load_features(folder: str | Path) -> ImageFeatures:
    """Read all features in a folder of `python -m dinov2.eval.extract` into memory.

    Raises:
        FileNotFoundError, ValueError: There are none, the extraction is not finished, or a file is damaged.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    lines = [json.loads(line) for line in (folder / NAMES_FILE).read_text(encoding="utf-8").splitlines()]
    arrays: dict[str, list[np.ndarray]] = {}
    for shard in metadata["shards"]:
        for name in shard["files"]:
            for key, array in _read_arrays(folder / name).items():
                arrays.setdefault(key, []).append(array)
    rows = [(line["name"], line.get("label"), line["grid"]) for line in lines]
    return gather_features(rows, {name: parts for name, parts in arrays.items() if name != "grids"})


def read_metadata(folder: Path) -> Any:
    """Read what is recorded about the features in a folder; errors as of `load_features`."""
    if not (folder / METADATA_FILE).is_file():
        raise FileNotFoundError(f"no features in {folder}: it has no {METADATA_FILE}")
    metadata = read_json(folder / METADATA_FILE)
    if not metadata["complete"]:
        raise ValueError(f"the extraction to {folder} is not finished: run the same command again")
    return metadata


def map_array(path: Path, name: str) -> np.ndarray:
    """Map an array in a file, not empty, into memory, read-only; one that is damaged or lacks it is a `ValueError`."""
    types = {kind: np.dtype(kind_name) for kind_name, kind in _SAFETENSORS_TYPES.items()}
    try:
        if path.suffix == ".npy":
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(start - 8))[name]
        offset = start + entry["data_offsets"][0]
        return np.memmap(path, types[entry["dtype"]], "r", offset, tuple(entry["shape"]))
    except (ValueError, KeyError, TypeError, OverflowError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def gather_features(
    rows: Sequence[tuple[str, Any, Sequence[int]]], arrays: Mapping[str, Sequence[np.ndarray]]
) -> ImageFeatures:
    """Concatenate the parts of arrays, by name, for rows of name, label and grid."""
    grids = torch.tensor([list(grid) for _, _, grid in rows], dtype=torch.int64).reshape(-1, 2)
    tensors: dict[str, Any] = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in arrays.items()}
    patches = tensors.get("patch_tokens")
    if patches is not None and patches.ndim < 4:  # (patches of all images, D) or (..., L, D)
        each = patches.split(grids.prod(dim=1).tolist())
        tensors["patch_tokens"] = [
            tokens.movedim(0, -2).unflatten(-2, tuple(grid)) for tokens, grid in zip(each, grids.tolist(), strict=True)
        ]
    return ImageFeatures([name for name, _, _ in rows], [label for _, label, _ in rows], grids, **tensors)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; a damaged one is a `ValueError`."""
    if path.suffix == ".npy":
        return {path.name.split(".")[1]: read_array(path)}
    content = path.read_bytes()
    return dict(_safetensors_arrays(content, path))


def _safetensors_arrays(content: bytes, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    types = {kind: np.dtype(name) for name, kind in _SAFETENSORS_TYPES.items()}
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                values = np.frombuffer(
                    bytearray(memoryview(content)[start + first : start + end]), types[entry["dtype"]]
                )
                yield name, values.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
