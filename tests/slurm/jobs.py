"""Jobs of the launchers: submitted, followed and disturbed as by a user."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cluster import Cluster
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = "tests/train/tiny.yaml"
NUM_STEPS = 24
RECIPE = (
    *("optim.epochs=12", "train.OFFICIAL_EPOCH_LENGTH=2", "student.depth=4"),
    *("train.checkpoint_period=1000", "evaluation.eval_period_iterations=1000"),  # none but the last, and on signals
)
TRAIN = "dinov2/run/train/train.py"


def launch(cluster: Cluster, script: str, *words: str) -> str:
    """Run a launcher and return its output."""
    env = {name: value for name, value in cluster.env.items() if not name.startswith("PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, script, *words],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


class Job:
    """A job on CPU nodes that a launcher has submitted.

    Args:
        output_dir: may have the published `%j` in it.
        words: of the command line, after the flags common to these tests.
    """

    def __init__(self, cluster: Cluster, script: str, output_dir: Path, *words: str) -> None:
        self.cluster = cluster
        self.output = launch(cluster, script, "--ngpus", "0", "--output-dir", str(output_dir), *words)
        (self.id,) = re.findall(r"submitted job (\d+)", self.output)
        self.folder = Path(str(output_dir).replace("%j", self.id))

    # --- Following it ---

    @property
    def facts(self) -> dict[str, str]:
        return self.cluster.job(self.id)

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts["Restarts"])

    @property
    def steps(self) -> int:
        """Steps in the metrics file."""
        return len(metrics(self.folder))

    @property
    def stderr(self) -> str:
        return (self.folder / f"{self.id}_0_log.err").read_text()

    @property
    def log(self) -> str:
        path = self.folder / "logs" / "log.txt"
        return path.read_text() if path.exists() else ""

    def wait_for_state(self, *states: str, seconds: float = 90) -> None:
        self.cluster.wait_for(lambda: self.state in states, f"job {self.id} to be {states}", seconds)

    def wait_for_step(self, number: int) -> None:
        def reached() -> bool:
            assert self.state not in ("FAILED", "CANCELLED", "TIMEOUT"), self.stderr
            return self.steps >= number

        self.cluster.wait_for(reached, f"step {number} of job {self.id}", seconds=90)

    def finish(self) -> None:
        """Wait until it has done what it was to do."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for_state(*ended, seconds=180)
        time.sleep(5)  # a job that is being requeued has an end, too, for a moment
        self.wait_for_state(*ended, seconds=180)
        assert self.state == "COMPLETED", f"{self.facts}\n{self.stderr}\n{self.cluster.log(self.id)}"

    # --- Disturbing it ---

    def tasks(self, **variables: str) -> set[int]:
        """Its processes: not those of its script."""
        return self.cluster.processes(SLURM_JOB_ID=self.id, SLURM_STEP_ID="0", **variables)

    def freeze(self) -> None:
        """Make its steps take until Slurm sends a signal, which wakes the processes: the machine may be fast."""
        for pid in self.tasks():
            os.kill(pid, signal.SIGSTOP)


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of the metrics file without the times."""
    path = folder / "training_metrics.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    times = ("iter_time", "data_time", "data_wait")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def teacher_path(folder: Path) -> Path:
    return folder / "eval" / f"training_{NUM_STEPS - 1}" / "teacher_checkpoint.pth"


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs are alike to the last bit: all that was logged, and the teacher at the end."""
    assert len(metrics(one)) == NUM_STEPS
    assert metrics(one) == metrics(other)
    first, second = (_teacher(folder) for folder in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def _teacher(folder: Path) -> dict[str, Tensor]:
    content: dict[str, Any] = torch.load(teacher_path(folder), weights_only=True)
    return content["teacher"]
