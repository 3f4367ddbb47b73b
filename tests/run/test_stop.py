"""A training in several processes that a launcher started stops, with a checkpoint, when the launcher gets a signal."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 60
COMMAND = [
    *(sys.executable, "dinov2/run/train/train.py", "--launcher", "local", "--ngpus", "0", "--tasks-per-node", "2"),
    *("--config-file", "tests/train/tiny.yaml", "optim.epochs=30"),
    *("train.checkpoint_period=1000", "evaluation.eval_period_iterations=1000"),
]


def start(output_dir: Path) -> subprocess.Popen[str]:
    """The command as from a terminal: its processes are in a group of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONPATH")}
    return subprocess.Popen(
        [*COMMAND, "--output-dir", str(output_dir)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def num_steps(output_dir: Path) -> int:
    path = output_dir / "training_metrics.json"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "signum"),
    [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM), (os.kill, signal.SIGUSR2)],
    ids=["Ctrl-C in a terminal", "SIGTERM", "SIGUSR2"],
)
def test_a_signal_to_the_launcher_stops_all_processes_with_a_checkpoint(
    send: Callable[[int, int], None], signum: signal.Signals, tmp_path: Path
) -> None:
    with start(tmp_path) as process:
        deadline = time.monotonic() + 60
        while num_steps(tmp_path) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        send(process.pid, signum)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, stderr
    assert "Traceback" not in stderr
    done = num_steps(tmp_path)
    assert done < NUM_STEPS
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"model_{done - 1:07d}"]

    with start(tmp_path) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert re.findall(rf"(\d+) of {NUM_STEPS} steps are done", log) == ["0", str(done)], "nothing is repeated"
