"""What a training run left in its output folder, as far as it has come: whatever is missing is empty, and noted."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dinov2 import config
from dinov2.config import Config, ConfigError
from dinov2.files import read_array, read_json, read_regular_file
from dinov2.log import readable_records
from dinov2.report.state import State, read_state
from dinov2.train.environment import ENVIRONMENT_FILE, read_environment
from dinov2.train.monitor.alarms import Alarm, find_alarms
from dinov2.train.monitor.best_teacher import Rating, read_rating

logger = logging.getLogger(__name__)

T = TypeVar("T")
Record = dict[str, float]

CONFIG_FILE, METRICS_FILE = "config.yaml", "training_metrics.json"
_TEACHER = "teacher_checkpoint.pth"
# Parts of results files that are steps on the way, not results.
_NOT_RESULTS = {"val", "history", "sweep"}


class Measurement(NamedTuple):
    """One number of an evaluation."""

    evaluation: str  # "knn", ...
    teacher: int | None  # the iteration of the weights; None if they are not a teacher of the run
    data: str  # "trained on X, tested on Y", as far as the file says
    name: str  # "full, k = 10, top-1"
    value: float  # percent, but for hyperparameters


@dataclass(frozen=True)
class Run:
    """A run, read."""

    name: str  # short, differs from those of the other runs on the page
    tag: str  # A, B, ...; empty if it is the only run on the page
    config: Config | None
    config_text: str  # as in the file
    records: Sequence[Record]  # one for each logged step, by iteration; finite numbers only
    alarms: Sequence[Alarm]
    sessions: Sequence[Mapping[str, Any]]  # environment.json
    measurements: Sequence[Measurement]
    best: Rating | None  # of the teacher that eval/best points to
    images: np.ndarray | None  # (n, 3, H, W) uint8, of the probe
    tokens: Mapping[int, Path]  # step -> file with the probe's patch tokens (n, h, w, D)
    state: State  # whether it goes on, or how it ended
    notes: Sequence[str]  # what could not be read

    @property
    def title(self) -> str:
        """The name, with its tag."""
        return f"{self.tag}: {self.name}" if self.tag else self.name

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run."""
        return None if (cfg := self.config) is None else cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH

    @property
    def steps_done(self) -> int:
        """Steps up to the last logged one."""
        return int(self.records[-1]["iteration"]) + 1 if self.records else 0

    @property
    def finished(self) -> bool:
        """Whether the last step has been logged."""
        return self.total_steps is not None and self.steps_done >= self.total_steps

    @property
    def seconds(self) -> float:
        """Time of all steps, from the average step time at each logged one."""
        steps = np.diff([-1, *(record["iteration"] for record in self.records)])
        return float(sum(n * record.get("iter_time", 0.0) for n, record in zip(steps, self.records, strict=True)))

    def running(self) -> bool:
        """Whether a process has the folder; if that cannot be told, whether a next line can still be expected."""
        if self.finished or self.state.occupied is not None:
            return not self.finished and bool(self.state.occupied)
        if self.state.silent is None or not self.records:
            return False
        steps = self.config.train.log_period if self.config else 10
        return self.state.silent < 300 + 10 * steps * self.records[-1].get("iter_time", 0.0)

    @property
    def data_sets(self) -> list[tuple[int, str]]:
        """(first step, name) of each dataset that was trained on, as far as the sessions say; alike ones are one."""
        found: list[tuple[int, str]] = []
        for each in self.sessions:
            first = int(each.get("first_step", 0))
            found = [known for known in found if known[0] < first]  # steps that were done again
            if each.get("data") and (not found or found[-1][1] != each["data"]):
                found.append((first, str(each["data"])))
        return found

    @property
    def data_since(self) -> int:
        """The first step on the last dataset; 0 if there was but one."""
        return self.data_sets[-1][0] if len(self.data_sets) > 1 else 0

    def comparable(self, key: str) -> list[tuple[float, float]]:
        """As `series`, of the last dataset alone, but for k-NN on images that are not those trained on."""
        apart = key == "knn" and self.config is not None and bool(self.config.health.knn_dataset)
        return [point for point in self.series(key) if apart or point[0] >= self.data_since]

    def when(self, step: float) -> str:
        """At which step, and whether the network had learned anything then."""
        pretrained = self.config is not None and bool(self.config.MODEL.WEIGHTS)
        return f"step {step:,.0f}{'' if step else ', as it began' if pretrained else ', untrained'}"

    @property
    def patch_features(self) -> dict[int, Path]:
        """The `tokens` of the images of the last dataset."""
        return {step: path for step, path in self.tokens.items() if step >= self.data_since}

    def is_late(self, step: float) -> bool:
        """Whether what was measured at a step says how the run is at its end."""
        return 0 < step >= 0.9 * (self.steps_done - 1)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of the lines that have this value."""
        return [(record["iteration"], record[key]) for record in self.records if key in record]

    def global_batch(self, step: float) -> int | None:
        """Images of a step; without an environment file, those of one process."""
        if self.config is None:
            return None
        former = [each for each in self.sessions if each.get("first_step", 0) <= step]
        processes = former[-1].get("processes", 1) if former else 1
        return self.config.train.batch_size_per_gpu * self.config.train.accumulate_steps * processes


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs.

    Raises:
        FileNotFoundError: a folder is none that a training wrote, naming what was looked for.
    """
    names = short_names(folders)
    tags = [ascii_uppercase[index] if index < 26 else str(index + 1) for index in range(len(folders))]
    if len(folders) == 1:
        tags = [""]
    return [read_run(*each) for each in zip(folders, names, tags, strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(each[-1:]) for each in parts]  # one folder given twice


def read_run(folder: Path, name: str, tag: str = "") -> Run:
    """Read one run, finished or not.

    Raises:
        FileNotFoundError: the folder is none that a training wrote, naming what was looked for.
    """
    metrics = folder / METRICS_FILE
    if not metrics.exists() and not (folder / CONFIG_FILE).exists():
        what = "there is no such folder" if not folder.is_dir() else f"it has neither {CONFIG_FILE} nor {METRICS_FILE}"
        raise FileNotFoundError(f"{folder} is not the output folder of a training: {what}")
    notes: list[str] = []
    cfg, text = read_config(folder / CONFIG_FILE, notes)
    records = read_records(metrics, notes)
    return Run(
        name=name,
        tag=tag,
        config=cfg,
        config_text=text,
        records=records,
        alarms=find_alarms(records),
        sessions=_or_noted(lambda: read_environment(folder / ENVIRONMENT_FILE), [], notes),
        measurements=read_measurements(folder, notes),
        best=_or_noted(lambda: _rating(folder / "eval" / "best" / "health.json"), None, notes),
        images=read_images(folder / "health" / "images.npz", notes),
        tokens=find_tokens(folder / "health"),
        state=read_state(folder, metrics, notes),
        notes=[note.replace(f"{folder}/", "") for note in notes],
    )


def read_config(path: Path, notes: list[str]) -> tuple[Config | None, str]:
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
        return None, text
    except ConfigError as error:
        problem = str(error).replace(str(path), path.name)
        notes.append(f"{CONFIG_FILE} is not one that this version understands: {problem}")
        return None, text


def read_records(path: Path, notes: list[str]) -> list[Record]:
    """The lines of a metrics file, the later of two about one iteration; values that are not finite are left out."""
    if not path.exists():
        notes.append(f"There is no {METRICS_FILE} yet.")
        return []
    found, unreadable = readable_records(path)
    records = {record["iteration"]: record for record in found}
    if not records:
        notes.append(f"{METRICS_FILE} has no line yet.")
    if unreadable:
        notes.append(f"{unreadable} line(s) of {METRICS_FILE} could not be read; a line that is being written is one.")
    return [records[iteration] for iteration in sorted(records)]


def read_measurements(folder: Path, notes: list[str]) -> list[Measurement]:
    """The numbers of all results files in the folder, the earliest teacher first."""
    patterns = ("knn.json", "results_eval_*.json", "*/results_eval_*.json", "eval/**/results_eval_*.json")
    paths = {
        os.path.realpath(path): path for pattern in patterns for path in folder.glob(pattern)
    }  # eval/best is a link
    found: list[Measurement] = []
    for path in sorted(paths.values()):
        try:
            found += measurements_of(read_json(path))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError) as error:
            notes.append(f"{path.relative_to(folder)} could not be read: {error!r}")
    return sorted(found, key=lambda each: (each.evaluation, -1 if each.teacher is None else each.teacher))


def measurements_of(results: Mapping[str, Any]) -> list[Measurement]:
    """The numbers of a results file (see `dinov2.eval.results`)."""
    settings = results.get("settings") or {}
    data = [
        f"{verb} {settings[key]}"
        for verb, key in (("trained on", "train_dataset"), ("tested on", "val_dataset"))
        if settings.get(key)
    ]
    weights = (results.get("weights") or {}).get("path") or ""
    folder = Path(weights).parent.name.removeprefix("training_")
    teacher = int(folder) if weights.endswith(_TEACHER) and folder.isdecimal() else None
    evaluation = str(results["evaluation"])
    return [
        Measurement(evaluation, teacher, ", ".join(data), name, value)
        for name, value in _numbers(results["metrics"], evaluation)
    ]


def _numbers(metrics: Any, evaluation: str, prefix: tuple[str, ...] = ()) -> list[tuple[str, float]]:
    """Numbers in nested mappings, named by the keys on the way; of a list of numbers the mean."""
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
        if key not in _NOT_RESULTS:
            word = f"k = {key}" if evaluation == "knn" and key.isdigit() else key.replace("_", " ")
            found += _numbers(value, evaluation, (*prefix, word))
    return found


def _or_noted(read: Callable[[], T], otherwise: T, notes: list[str]) -> T:
    """What a function reads; if that fails, why is noted and something else given."""
    try:
        return read()
    except (OSError, ValueError) as error:
        notes.append(f"A file could not be read: {error}")
        return otherwise


def _rating(path: Path) -> Rating | None:
    """How the teacher that `eval/best` points to was rated, if there is one."""
    return read_rating(path) if path.exists() else None


def read_images(path: Path, notes: list[str]) -> np.ndarray | None:
    """The images of the probe, (n, 3, H, W) uint8, if they were kept."""
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


def find_tokens(folder: Path) -> dict[int, Path]:
    """Files of patch tokens by step, the earliest first."""
    steps = ((path.stem.removeprefix("patch_tokens_"), path) for path in folder.glob("patch_tokens_*.npy"))
    return dict(sorted((int(step), path) for step, path in steps if step.isdecimal()))
