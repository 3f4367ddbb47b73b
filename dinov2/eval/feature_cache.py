"""Features on disk: extracted once, used again by every evaluation that would compute the same ones.

A file holds the features and labels of one data set. Its name has a digest of all they depend on: weights, backbone,
image sizes and normalisation, precision, and the images' names and labels. That the *content* of an image has changed
under the same name is not noticed.
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
from dinov2.data.base import ImageDataset
from dinov2.files import replacing

logger = logging.getLogger(__name__)

Features = tuple[Tensor, Tensor]
"""Features (n, ...) float32 and labels (n, ...) int64."""


class FeatureCache:
    """Where features are kept, and what those of a model and its images depend on."""

    def __init__(self, directory: Path | None = None, facts: Mapping[str, Any] | None = None) -> None:
        """Nothing is read or written yet.

        Args:
            directory: of the files; None keeps nothing.
            facts: that tell one model, and one way of preparing images, from another; JSON.
        """
        self.directory, self.facts = directory, facts or {}
        self.seconds = 0.0  # spent on getting features
        self.files: dict[str, str] = {}  # path -> "read", or "written" if there was none

    def get(self, kind: str, dataset: ImageDataset, extract: Callable[[], Features]) -> Features:
        """The features of a data set from their file, else by `extract`, which all processes then call.

        Args:
            kind: which features of the model.
            dataset: whose images.
            extract: computes them.
        """
        started = time.monotonic()
        features = extract() if self.directory is None else self._get(self.directory, kind, dataset, extract)
        self.seconds += time.monotonic() - started
        return features

    def _get(self, directory: Path, kind: str, dataset: ImageDataset, extract: Callable[[], Features]) -> Features:
        facts = {**self.facts, "features": kind, "dataset": type(dataset).__name__, "images": _digest_of(dataset)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        path = directory / f"{kind}-{type(dataset).__name__}-{digest[:16]}.pth"
        found = _read(path) if path.exists() else None
        if all(distributed.all_gather_object(found is not None)) and found is not None:
            logger.info("features of %d images: from %s", len(dataset), path)
            self.files.setdefault(str(path), "read")
            return found
        features, labels = extract()
        if distributed.is_main():
            content = {"features": features.cpu(), "labels": labels.cpu(), "of": json.dumps(facts)}
            if _write(path, content):
                self.files[str(path)] = "written"
        return features, labels


def _digest_of(dataset: ImageDataset) -> str:
    """Tells data sets with other images, another order or other labels apart."""
    digest = hashlib.sha256()
    targets = dataset.get_targets()
    for index in range(len(dataset)):
        digest.update(f"{dataset.describe(index)}\n".encode())
    if targets is not None:
        digest.update(str(targets.shape).encode() + targets.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Features | None:
    """What a file holds; None, and a warning, if it cannot be used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        features, labels = content["features"], content["labels"]
        if len(features) != len(labels):
            raise ValueError(f"{len(features)} features and {len(labels)} labels")
    except Exception as error:  # a damaged file raises nearly anything
        logger.warning("cannot use the features in %s, they are computed again: %s", path, error)
        return None
    return features, labels


def _write(path: Path, content: dict[str, Any]) -> bool:
    """Whether that was possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # a full disk is no reason to lose the evaluation
        logger.warning("cannot keep the features: %s", error)
        return False
    logger.info("features kept in %s (%.0f MB)", path, path.stat().st_size / 1e6)
    return True
