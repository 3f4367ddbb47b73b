"""Results of an evaluation: one JSON file that says what was measured, how, on which weights."""

import argparse
import hashlib
import json
import logging
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

import dinov2
from dinov2 import distributed
from dinov2.files import replacing

logger = logging.getLogger(__name__)


def write_results(path: Path, *, evaluation: str, metrics: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write the results on rank 0, in place of those of an earlier run.

    Args:
        path: the JSON file.
        evaluation: which one.
        metrics: what was measured; accuracies in percent.
        args: the command line, from which all settings are recorded.
    """
    if not distributed.is_main():
        return
    record = {
        "evaluation": evaluation,
        "unit": "percent",
        "metrics": metrics,
        "weights": weights_fingerprint(args.pretrained_weights),
        "settings": vars(args),
        "command": shlex.join(sys.argv),
        "world_size": distributed.world_size(),
        "device": str(distributed.device()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"dinov2": dinov2.__version__, "torch": str(torch.__version__)},
    }
    with replacing(path) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")
    logger.info("results: %s", path)


def weights_fingerprint(path_or_url: str | None) -> dict[str, str] | None:
    """Where weights came from and the SHA-256 of the file (in the cache, for a URL); None for random weights."""
    if path_or_url is None:
        return None
    url = urlparse(path_or_url)
    if url.scheme in ("http", "https"):
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url.path).name
    else:
        path = Path(path_or_url.removeprefix("file://"))
    with path.open("rb") as file:
        return {"path": path_or_url, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
