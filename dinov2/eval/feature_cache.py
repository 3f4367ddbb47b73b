"""A cache of features on disk, shared by all evaluations that need the same ones.

A file contains the features and labels of one dataset, and a description of everything they depend on: weights,
backbone, image sizes and normalization, precision, labels, and the names, sizes and modification times of the image
files. Its name contains a digest of the description. A file is used only if the description and the checksums match.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.file_identity import image_identity
from dinov2.files import atomic_write
from dinov2.models.weights import read_file

logger = logging.getLogger(__name__)

Features = tuple[Tensor, Tensor]
"""Features (n, ...) float32 and labels (n, ...) int64."""


class FeatureCache:
    """Reads and writes the features of one model.

    Args:
        directory: Folder of the files; None disables the cache.
        facts: Description of the model and of the preprocessing of images, as JSON.
    """

    def __init__(self, directory: Path | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.directory, self.facts = directory, facts or {}
        self.seconds = 0.0  # spent on reading or extracting features
        self.files: dict[str, str] = {}  # path -> "read" or "written"

    def get(self, kind: str, dataset: ImageDataset, extract: Callable[[], Features]) -> Features:
        """Read the features of a dataset, of a kind such as "class_token", or `extract` them in all processes."""
        started = time.monotonic()
        features = self._get(kind, dataset, extract)
        self.seconds += time.monotonic() - started
        return features

    def _get(self, kind: str, dataset: ImageDataset, extract: Callable[[], Features]) -> Features:
        if self.directory is None:
            return extract()
        facts = {
            **self.facts,
            "features": kind,
            "dataset": type(dataset).__name__,
            "images": image_identity(dataset),
            "image options": dataset.image_options.facts(),
        }
        described = json.dumps(facts, sort_keys=True)
        digest = hashlib.sha256(described.encode()).hexdigest()
        path = self.directory / f"{kind}-{type(dataset).__name__}-{digest[:16]}.pth"
        found = _read(path, described, dataset) if path.exists() else None
        if all(distributed.all_gather_object(found is not None)) and found is not None:
            logger.info("features of %d images: from %s", len(found[0]), path)
            if num_bad := len(dataset) - len(found[0]):
                logger.warning("%d of %d images could not be read and are omitted", num_bad, len(dataset))
            self.files.setdefault(str(path), "read")
            return found
        features, labels = extract()
        if distributed.is_main() and _write(path, features, labels, described):
            self.files[str(path)] = "written"
        return features, labels


def _read(path: Path, described: str, dataset: ImageDataset) -> Features | None:
    """Read a file; None, with a warning, if it is damaged or has other content."""
    try:
        content: Any = read_file(path)
        features, labels = content["features"], content["labels"]
        if content["of"] != described:
            raise ValueError("its content is of other images, weights or settings than its name")
        _check(features, labels, dataset)
    except Exception as error:  # damaged files raise errors of any type
        logger.warning("cannot use the features in %s, recomputing them: %s", path, error)
        return None
    return features, labels


def _check(features: Tensor, labels: Tensor, dataset: ImageDataset) -> None:
    """Raise a `ValueError` if features and labels do not match the dataset."""
    if features.dtype != torch.float32 or labels.dtype != torch.int64 or features.ndim < 2:
        raise ValueError(f"{features.dtype} {tuple(features.shape)} features and {labels.dtype} labels")
    if not 0 < len(features) == len(labels) <= len(dataset):
        raise ValueError(f"{len(features)} features and {len(labels)} labels of {len(dataset)} images")
    targets = dataset.get_targets()
    if targets is not None and len(labels) == len(dataset) and not torch.equal(labels, torch.from_numpy(targets)):
        raise ValueError("the labels differ from those of the dataset")
    if not features.isfinite().all():
        raise ValueError("features are not finite")


def _write(path: Path, features: Tensor, labels: Tensor, described: str) -> bool:
    """Write a file; returns whether that succeeded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save({"features": features.cpu(), "labels": labels.cpu(), "of": described}, file)
    except (OSError, RuntimeError) as error:  # the evaluation continues, for example on a full disk
        logger.warning("cannot cache the features: %s", error)
        return False
    logger.info("features cached in %s (%.0f MB)", path, path.stat().st_size / 1e6)
    return True
