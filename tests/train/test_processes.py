"""Several processes, and one that accumulates, compute the same; runs continue on another number of processes."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from tiny import CENTERING, CONFIG_FILE, SEPARATE_HEADS, all_in, checkpoints, metrics, run_script, run_train, tensors

from dinov2.train.checkpoint import read_state

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 6  # micro-batches of 2 images: 6 processes could share it
STEPS = 50
COMMON = [
    *("train.batch_size_per_gpu=2", f"optim.epochs={STEPS // 2}", "train.checkpoint_period=1000"),
    *("train.checkpoint_keep=100", "evaluation.eval_period_iterations=0"),
]


def train_on(num_processes: int, output_dir: Path, *words: str) -> str:
    """Train on several processes of this machine, or in this one; what was printed."""
    words = (*COMMON, *words)
    if num_processes == 1:
        run_train(output_dir, *words)
        return ""
    result = run_script(
        *("-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", "--standalone"),
        *("dinov2/train/train.py", "--config-file", str(CONFIG_FILE), "--output-dir", str(output_dir), *words),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{num_processes} process(es)" in result.stdout
    return result.stdout + result.stderr


def accumulate(num_processes: int) -> str:
    return f"train.accumulate_steps={GLOBAL_BATCH // 2 // num_processes}"


def largest_difference(a: Path, b: Path, step: int = STEPS - 1) -> float:
    """Over all weights, centres and moments: norm of the difference / norm; the key biases, which do not matter, apart."""
    first, second = tensors(a, step), tensors(b, step)
    assert first.keys() == second.keys()
    differences = []
    for name, value in first.items():
        other = second[name]
        if name.endswith("qkv.bias") or ".qkv.bias." in name:
            value, other = (torch.cat(t.chunk(3)[::2]) if t.ndim else t for t in (value, other))
        differences.append(float((value - other).norm() / other.norm().clamp(min=1e-6)))
    return max(differences)


def assert_same_losses(a: Path, b: Path, rel: float) -> None:
    assert len(metrics(a)) == len(metrics(b)) == STEPS
    for ours, reference in zip(metrics(a), metrics(b), strict=True):
        assert ours == pytest.approx(reference, rel=rel, abs=1e-7)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that accumulates three micro-batches."""
    output_dir = tmp_path_factory.mktemp("one")
    train_on(1, output_dir, accumulate(1))
    return output_dir


def test_three_processes_compute_what_one_does_that_accumulates(one: Path, tmp_path: Path) -> None:
    train_on(3, tmp_path, accumulate(3))
    assert_same_losses(tmp_path, one, rel=1e-3)
    assert largest_difference(tmp_path, one) < 1e-2
