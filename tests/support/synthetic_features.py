"""Folders of features without a model and images, in the format of `python -m dinov2.eval.extract`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.eval.extract.files import METADATA_FILE, NAMES_FILE, ShardArray, shard_files, write_arrays


def write_features(
    folder: Path,
    rows: np.ndarray,
    names: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    *,
    shard_size: int = 7,
    file_format: str = "safetensors",
    unreadable: Sequence[int] = (),
    **settings: Any,
) -> Path:
    """Write class tokens (n, D), with names, labels, and the indices of images that could not be read."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"image {row}" for row in range(len(rows))]
    shards = []
    for start in range(0, len(rows), shard_size):
        part = rows[start : start + shard_size]
        arrays = {"class_token": ShardArray(part.shape, part.dtype, [part])}
        files = shard_files(len(shards), list(arrays), file_format)
        shards.append({"images": len(part), "files": {name: write_arrays(folder / name, arrays, {}) for name in files}})
    lines = [
        {"name": name, "grid": [1, 1]} | ({} if labels is None or labels[row] is None else {"label": labels[row]})
        for row, name in enumerate(names)
    ]
    (folder / NAMES_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    all_settings: dict[str, Any] = {
        "model": {"name": "tiny", "weights": {"source": "a", "sha256": "0"}, "embed_dim": rows.shape[1]},
        **{"images": ["nowhere"], "num_images": len(rows) + len(unreadable), "image_options": [{}]},
        **{"preprocessing": {"crop_size": 28}, "tokens": ["class"], "layers": [2], "final_norm": True},
        **{"format": file_format, **settings},
    }
    metadata: Mapping[str, Any] = {
        **{"format": 1, "settings": all_settings, "complete": True, "images": len(rows)},
        **{"unreadable": [{"image_index": index} for index in unreadable], "shards": shards},
    }
    (folder / METADATA_FILE).write_text(json.dumps(metadata))
    return folder


def unit_rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Random rows (count, width) float32 of unit length."""
    rows = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def near(rows: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """Rows of unit length at an exact cosine to some rows of unit length."""
    other = unit_rows(*rows.shape, seed)
    other -= np.einsum("nd,nd->n", other, rows)[:, None] * rows
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return (cosine * rows + np.sqrt(1 - cosine**2) * other).astype(np.float32)
