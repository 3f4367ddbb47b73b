"""The model that a run starts from, frozen, as the reference of all that is measured later.

Its features of the probe images are kept in `OUT/health/start_features.npz`, its metrics are the record of iteration
`START` in `training_metrics.json`, and it is the teacher `OUT/eval/start`.
"""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.analysis.feature_statistics import linear_cka
from dinov2.files import atomic_write, read_array

logger = logging.getLogger(__name__)

START = -1
"""The iteration of the starting model: before the first step, which has number 0."""

START_FOLDER = "start"
"""Name of its folder in `OUT/eval`."""

FEATURES_FILE = "start_features.npz"


class StartingPoint(NamedTuple):
    """Features of the starting model; `digest` identifies the images."""

    cls: Tensor  # (n, D) class tokens
    patch: Tensor  # (m, D) some of their patch tokens
    digest: bytes

    def drift(self, cls: Tensor, patch: Tensor) -> dict[str, float]:
        """Compare features of the same images by another model with those of the start, by name of the metric."""
        values = {}
        for kind, then, now in (("cls", self.cls, cls.cpu()), ("patch", self.patch, patch.cpu())):
            values[f"drift_{kind}_cka"] = linear_cka(now, then)
            values[f"drift_{kind}_cosine"] = F.cosine_similarity(now, then, dim=1).mean().item()
        return values

    def save(self, folder: Path) -> None:
        """Write the features to a run's folder `health`."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / FEATURES_FILE) as file:
            digest = np.frombuffer(self.digest, dtype=np.uint8)
            np.savez(file, cls=self.cls.numpy(), patch=self.patch.numpy(), digest=digest)


def forget_start(output_dir: Path) -> None:
    """Remove the features and the teacher of an earlier starting model, which a run that begins anew does not have."""
    (output_dir / "health" / FEATURES_FILE).unlink(missing_ok=True)
    shutil.rmtree(output_dir / "eval" / START_FOLDER, ignore_errors=True)


def read_start(folder: Path, digest: bytes) -> StartingPoint | None:
    """Read the features of the starting model on some images; None, if need be with a warning, if there are none."""
    path = folder / FEATURES_FILE
    if not path.exists():
        return None
    try:
        start = StartingPoint(
            torch.from_numpy(read_array(path, "cls")),
            torch.from_numpy(read_array(path, "patch")),
            read_array(path, "digest").tobytes(),
        )
    except (OSError, ValueError) as error:
        logger.warning("%s; the run is no longer compared with its start", error)
        return None
    if start.digest != digest:
        logger.warning("the probe images have changed: the run is no longer compared with its start")
        return None
    return start
