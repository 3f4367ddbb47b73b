"""Reads the output folder of a training run, finished or not; missing parts are empty, and noted."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TypeVar

import numpy as np

from dinov2 import config
from dinov2.config import Config, ConfigError
from dinov2.files import is_locked, read_array, read_regular_file, runs_below
from dinov2.log import last_error, log_path
from dinov2.metrics_file import readable_records
from dinov2.report.results import read_results
from dinov2.report.run import Run, State
from dinov2.train.checkpoint_files.folder import complete_checkpoints
from dinov2.train.environment import ENVIRONMENT_FILE, read_environment
from dinov2.train.monitor.alarms import find_alarms
from dinov2.train.monitor.best_teacher import read_rating

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG_FILE, METRICS_FILE = "config.yaml", "training_metrics.json"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, see `read_run`."""
    numbers = range(27, len(folders) + 1)
    tags = [*ascii_uppercase, *map(str, numbers)][: len(folders)] if len(folders) > 1 else [""]
    return [read_run(*each) for each in zip(folders, short_names(folders), tags, strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to distinguish them."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(each[-1:]) for each in parts]  # the same folder twice


def read_run(folder: Path, name: str, tag: str = "") -> Run:
    """Read one run, finished or not; a `FileNotFoundError` if the folder is not the output folder of a training."""
    metrics = folder / METRICS_FILE
    if not metrics.exists() and not (folder / CONFIG_FILE).exists():
        what = "there is no such folder" if not folder.is_dir() else f"it has neither {CONFIG_FILE} nor {METRICS_FILE}"
        raise FileNotFoundError(f"{folder} is not the output folder of a training: {what}{runs_below(folder)}")
    notes: list[str] = []
    rating = folder / "eval" / "best" / "health.json"
    cfg, text = _read_config(folder / CONFIG_FILE, notes)
    records = _read_metrics(metrics, notes)
    return Run(
        name=name,
        tag=tag,
        config=cfg,
        config_text=text,
        records=records,
        alarms=find_alarms(records),
        sessions=_or_noted(lambda: read_environment(folder / ENVIRONMENT_FILE), [], notes),
        results=read_results(folder, notes),
        best=_or_noted(lambda: read_rating(rating) if rating.exists() else None, None, notes),
        images=read_images(folder / "health" / "images.npz", notes),
        tokens=_find_tokens(folder / "health"),
        state=_read_state(folder, metrics, notes),
        notes=[note.replace(f"{folder}/", "") for note in notes],
    )


def _read_config(path: Path, notes: list[str]) -> tuple[Config | None, str]:
    """The configuration, if this version understands it, and the text of its file."""
    if not path.exists():
        notes.append(f"There is no {CONFIG_FILE}.")
        return None, ""
    text = ""
    try:
        text = read_regular_file(path).decode(errors="replace")
        return config.load(path), text
    except OSError as error:
        notes.append(f"{CONFIG_FILE} could not be read: {error}")
    except ConfigError as error:
        problem = str(error).replace(str(path), path.name)
        notes.append(f"{CONFIG_FILE} is not a configuration of this version: {problem}")
    return None, text


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The records of a metrics file by iteration, the later of two of one iteration."""
    if not path.exists():
        notes.append(f"There is no {METRICS_FILE} yet.")
        return []
    found, num_damaged = readable_records(path)
    records = {record["iteration"]: record for record in found}
    if not records:
        notes.append(f"{METRICS_FILE} has no line yet.")
    if num_damaged:
        notes.append(f"{num_damaged} line(s) of {METRICS_FILE} could not be read; one may be incomplete yet.")
    return [records[iteration] for iteration in sorted(records)]


def _read_state(folder: Path, metrics: Path, notes: list[str]) -> State:
    """The state of a run from its lock, its log, its checkpoints and the age of its metrics file."""
    try:
        locked = is_locked(folder)
    except OSError as error:
        logger.info("cannot determine whether %s is in use: %s", folder, error)
        locked = None
    problem = "Its checkpoints could not be listed"
    checkpoints = folder / "checkpoints"
    checkpoint = _or_noted(lambda: max(complete_checkpoints(checkpoints), default=None), None, notes, problem)
    return State(
        locked=locked,
        idle_seconds=time.time() - metrics.stat().st_mtime if metrics.exists() else None,
        error=last_error(log_path(folder)),
        checkpoint=checkpoint,
    )


def _or_noted(read: Callable[[], T], otherwise: T, notes: list[str], problem: str = "A file could not be read") -> T:
    """The result of a function; if it fails, a default, and the reason is noted."""
    try:
        return read()
    except (OSError, ValueError) as error:
        notes.append(f"{problem}: {error}")
        return otherwise


def read_images(path: Path, notes: list[str]) -> np.ndarray | None:
    """The images of the probe, (n, 3, H, W) uint8; None if there are none, or, with a note, if the file is damaged."""
    if not path.exists():
        return None
    try:
        images = read_array(path, "images")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape) < 1:
            raise ValueError(f"expected images (n, 3, H, W) of bytes, got {images.dtype} {images.shape}")
        return images
    except (OSError, ValueError) as error:
        notes.append(f"health/{path.name} could not be read: {error}")
        return None


def _find_tokens(folder: Path) -> dict[int, Path]:
    """Files of patch tokens by step, the earliest first."""
    steps = ((path.stem.removeprefix("patch_tokens_"), path) for path in folder.glob("patch_tokens_*.npy"))
    return dict(sorted((int(step), path) for step, path in steps if step.isdecimal()))
