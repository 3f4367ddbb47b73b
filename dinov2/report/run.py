"""A training run as its output folder describes it: records, alarms, sessions, results, and what follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.config import Config, sources_of
from dinov2.report.results import Result
from dinov2.train.monitor.alarms import Alarm
from dinov2.train.monitor.best_teacher import Rating
from dinov2.train.monitor.starting_point import START

Record = Mapping[str, float]
Points = list[tuple[float, float]]


class State(NamedTuple):
    """Whether a run is still going, and how it ended."""

    locked: bool | None  # whether a process holds the lock of the folder; None: the file system has no locks
    idle_seconds: float | None  # since the last record was written
    error: str = ""  # that ended the run
    checkpoint: int | None = None  # last finished step of the latest one


@dataclass(frozen=True)
class Run:
    """The content of the output folder of a run."""

    name: str  # short, unique on the page
    tag: str  # A, B, ...; empty if it is the only run on the page
    config: Config | None  # None: there is none that this version understands
    config_text: str
    records: Sequence[Record]  # one for each logged step, by iteration; finite values only
    alarms: Sequence[Alarm]
    sessions: Sequence[Mapping[str, Any]]  # in `environment.json`, the oldest first
    results: Sequence[Result]
    best: Rating | None  # of the teacher that `eval/best` links to
    images: np.ndarray | None  # (n, 3, H, W) uint8, of the probe
    tokens: Mapping[int, Path]  # step -> file with the probe's patch tokens (n, h, w, D)
    state: State
    notes: Sequence[str]  # what could not be read

    @property
    def title(self) -> str:
        return f"{self.tag}: {self.name}" if self.tag else self.name

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole schedule."""
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
        """Time of all steps, from the average step time of each record."""
        steps = np.diff([-1, *(record["iteration"] for record in self.records)])
        return float(sum(n * record.get("iter_time", 0.0) for n, record in zip(steps, self.records, strict=True)))

    def running(self) -> bool:
        """Whether a process holds the lock of the folder; without locks, whether the last record is recent."""
        if self.finished or self.state.locked is not None:
            return not self.finished and bool(self.state.locked)
        if self.state.idle_seconds is None or not self.records:
            return False
        period = self.config.train.log_period if self.config else 10
        return self.state.idle_seconds < 300 + 10 * period * self.records[-1].get("iter_time", 0.0)

    @property
    def datasets(self) -> list[tuple[int, str]]:
        """(first step, name) of each dataset, as recorded in the sessions; consecutive equal ones are one."""
        found: list[tuple[int, str]] = []
        for each in self.sessions:
            first = int(each.get("first_step", 0))
            found = [known for known in found if known[0] < first]  # later steps are repeated by this session
            if each.get("data") and (not found or found[-1][1] != each["data"]):
                found.append((first, str(each["data"])))
        return found

    @property
    def dataset_start(self) -> int:
        """First step on the last dataset; 0 if there was only one."""
        return self.datasets[-1][0] if len(self.datasets) > 1 else 0

    @property
    def start(self) -> Record | None:
        """The record of the model that the run started from; None if it began with random weights."""
        return next((record for record in self.records if record["iteration"] == START), None)

    def series(self, name: str) -> Points:
        """(step, value) of the records that have a metric."""
        return [(record["iteration"], record[name]) for record in self.records if name in record]

    def value_at(self, name: str, step: float) -> float | None:
        """The value of a metric at a step, if it was recorded."""
        return next((value for found, value in self.series(name) if found == step), None)

    def comparable(self, name: str) -> Points:
        """As `series`, on the last dataset only; all of it for k-NN on a dataset of its own."""
        own_dataset = self.config is not None and bool(self.config.health.knn_dataset)
        measured = name.removeprefix("frozen_teacher_")
        independent = measured == "patch_knn_miou" or (measured == "knn" and own_dataset)
        return [point for point in self.series(name) if independent or point[0] >= (self.dataset_start or START)]

    @property
    def comparable_tokens(self) -> dict[int, Path]:
        """The `tokens` of images of the last dataset."""
        return {step: path for step, path in self.tokens.items() if step >= self.dataset_start}

    def step_text(self, step: float) -> str:
        """ "step 20", "step 0, untrained", or "the start, SOURCE" of a run from weights."""
        source = "" if self.config is None else next(iter(sources_of(self.config).values()), "")
        if step == START:
            return f"the start, {source or 'initial weights'}"
        return f"step {step:,.0f}{'' if step else ', initial weights' if source else ', untrained'}"

    def is_late(self, step: float) -> bool:
        """Whether a measurement at a step describes the end of the run."""
        return 0 < step >= 0.9 * (self.steps_done - 1)

    def global_batch(self, step: float) -> int | None:
        """Images of a step over all processes; without an environment file, of one process."""
        if self.config is None:
            return None
        earlier = [each for each in self.sessions if each.get("first_step", 0) <= step]
        processes = earlier[-1].get("processes", 1) if earlier else 1
        return self.config.train.batch_size_per_gpu * self.config.train.accumulate_steps * processes
