"""Results of evaluations in the output folder of a run (see `dinov2.eval.results`), as a list of numbers."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.files import read_json

_PATTERNS = ("knn.json", "results_eval_*.json", "*/results_eval_*.json", "eval/**/results_eval_*.json")
_TEACHER = "teacher_checkpoint.pth"
_INTERMEDIATE = {"val", "history", "sweep"}  # parts of results files that are not final results


class Result(NamedTuple):
    """One number of an evaluation."""

    evaluation: str  # such as "knn"
    teacher: int | None  # iteration of the weights; None if they are not a teacher of the run
    data: str  # "trained on X, tested on Y", as far as the file has them
    name: str  # such as "full, k = 10, top-1"
    value: float  # in percent; hyperparameters as they are


def read_results(folder: Path, notes: list[str]) -> list[Result]:
    """Read all results files of a run, the earliest teacher first; files that cannot be read are added to `notes`."""
    paths = {os.path.realpath(path): path for pattern in _PATTERNS for path in folder.glob(pattern)}  # best is a link
    found: list[Result] = []
    for path in sorted(paths.values()):
        try:
            found += _results_of(read_json(path))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError) as error:
            notes.append(f"{path.relative_to(folder)} could not be read: {error!r}")
    return sorted(found, key=lambda each: (each.evaluation, -1 if each.teacher is None else each.teacher))


def _results_of(content: Mapping[str, Any]) -> list[Result]:
    settings = content.get("settings") or {}
    verbs = {"train_dataset": "trained on", "val_dataset": "tested on", "dataset": "tested on"}
    data = ", ".join(f"{verb} {settings[key]}" for key, verb in verbs.items() if settings.get(key))
    weights = (content.get("weights") or {}).get("path") or ""
    folder = Path(weights).parent.name.removeprefix("training_")
    teacher = int(folder) if weights.endswith(_TEACHER) and folder.isdecimal() else None
    evaluation = str(content["evaluation"])
    return [Result(evaluation, teacher, data, *each) for each in _numbers(content["metrics"], evaluation)]


def _numbers(metrics: Any, evaluation: str, prefix: tuple[str, ...] = ()) -> list[tuple[str, float]]:
    """Numbers in nested mappings, named by their keys; the mean of a list of numbers."""
    if isinstance(metrics, bool | str | None):
        return []
    if isinstance(metrics, int | float):
        return [(", ".join(prefix), float(metrics))] if math.isfinite(metrics) else []
    if isinstance(metrics, list) and metrics and all(isinstance(value, int | float) for value in metrics):
        return [(", ".join((*prefix, "mean")), float(np.mean(metrics)))]
    if isinstance(metrics, list):
        metrics = {str(each.get("dataset", index)): each for index, each in enumerate(metrics)}
    found = []
    for key, value in metrics.items():
        if key not in _INTERMEDIATE:
            name = f"k = {key}" if evaluation == "knn" and key.isdigit() else key.replace("_", " ")
            found += _numbers(value, evaluation, (*prefix, name))
    return found
