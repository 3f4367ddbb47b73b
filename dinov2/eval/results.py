"""Results of an evaluation: one JSON file with metrics, settings and weights."""

import argparse
import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch

import dinov2
from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.feature_cache import FeatureCache
from dinov2.files import atomic_write
from dinov2.models.download import cache_path
from dinov2.models.published import weights_url_or_path
from dinov2.models.weight_files import files_in, known_names

logger = logging.getLogger(__name__)


def archive_results(path: Path) -> None:
    """Rename the results of an earlier run, on rank 0, so that a failed evaluation leaves no results."""
    if distributed.is_main() and path.exists():
        path.replace(path.with_name(f"{path.name}.previous"))


def write_results(
    path: Path,
    *,
    evaluation: str,
    metrics: Mapping[str, Any],
    args: argparse.Namespace,
    unit: str = "percent",
    **facts: Any,
) -> None:
    """Write the results on rank 0: metrics in a unit, settings, and `facts` (see `run_facts`).

    A warning if `equal_images` (see `report_equal_images`) are all images that were tested on.
    """
    if not distributed.is_main():
        return
    record = {
        "evaluation": evaluation,
        "unit": unit,
        "metrics": metrics,
        **facts,
        "weights": weights_fingerprint(args.pretrained_weights),
        "settings": vars(args),
        "command": shlex.join(sys.argv),
        "world_size": distributed.world_size(),
        "device": str(distributed.device()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"dinov2": dinov2.__version__, "torch": str(torch.__version__)},
    }
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")
    name = record["settings"].get("val_dataset")
    counts = facts.get("equal_images", {}).get(name, {"compared": 0, "equal": 0})
    if counts["equal"] == counts["compared"] > 0:
        text = "all %s of %s are training images: k-NN finds each image itself, and a classifier has seen it"
        logger.warning(text, counted(counts["equal"], "image"), name)
    logger.info("results: %s", path)


def weights_fingerprint(path_or_url: str | None) -> dict[str, str] | None:
    """Source, as given, and SHA-256 of a file of weights, or of those read in a folder; None for random weights."""
    if path_or_url is None:
        return None
    source = weights_url_or_path(path_or_url)
    url = urlparse(source)
    if url.scheme in ("http", "https"):
        path = cache_path(source)
    else:
        path = Path(url2pathname(url.path) if url.scheme == "file" else source)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}{known_names(path_or_url)}")
    digest = hashlib.sha256()
    for part in files_in(path) if path.is_dir() else [path]:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return {"path": path_or_url, "sha256": digest.hexdigest()}


def run_facts(sets: Mapping[str, ImageDataset], cache: FeatureCache, started: float) -> dict[str, Any]:
    """Entries of a results file about datasets, feature files and the time since `started`, by `time.monotonic()`."""
    return {
        "sets": {name: set_facts(dataset) for name, dataset in sets.items()},
        "feature_files": cache.files,
        "seconds": {"features": round(cache.seconds, 2), "rest": round(time.monotonic() - started - cache.seconds, 2)},
    }


def set_facts(dataset: ImageDataset) -> dict[str, int]:
    """Number of labeled images, and of distinct classes among them; of all images for a dataset without labels."""
    targets = dataset.get_targets()
    if targets is None:
        return {"images": len(dataset)}
    labeled = targets >= 0
    images = labeled.any(axis=1) if targets.ndim > 1 else labeled
    return {"images": int(images.sum()), "classes": len(np.unique(targets[labeled]))}


def described_set(dataset: ImageDataset) -> str:
    """ "21 images of 3 classes"."""
    facts = set_facts(dataset)
    return f"{counted(facts['images'], 'image')} of {counted(facts['classes'], 'class', 'classes')}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def as_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a title and aligned columns, accuracies in percent; lists (one accuracy per class) as their mean."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            value = float(np.mean(value))
        return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = [list(headings), *([cell(value) for value in row] for row in rows)]
    columns = []
    for texts, values in zip(zip(*lines, strict=True), zip(*rows, strict=True), strict=True):
        width = max(map(len, texts))
        words = all(isinstance(value, str) for value in values)
        columns.append([text.ljust(width) if words else text.rjust(width) for text in texts])
    return "\n".join([title, *("  ".join(["", *line]).rstrip() for line in zip(*columns, strict=True))])
