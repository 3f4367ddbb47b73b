"""The quickstart: one command leaves everything in one folder; errors of its parts name their cause."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts.quickstart_report import latest_teacher

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "train.OFFICIAL_EPOCH_LENGTH=3",
    "train.batch_size_per_gpu=8",
    "student.depth=1",
    "evaluation.eval_period_iterations=3",
)


def quickstart(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"VENV": sys.prefix}, capture_output=True, text=True)


@pytest.mark.slow
def test_quickstart_leaves_everything_in_one_folder_and_runs_twice(tmp_path: Path) -> None:
    for _ in range(2):
        run = quickstart("out", *TINY, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        lines = run.stdout.splitlines()
        assert lines[-1] == str(tmp_path / "out")
        metrics = tmp_path / "out" / "training_metrics.json"
        iterations = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
        assert iterations == [0, 2]  # the second run added nothing
    out = tmp_path / "out"
    assert (out / "config.yaml").is_file()
    assert latest_teacher(out) == out / "eval" / "training_2" / "teacher_checkpoint.pth"
    with Image.open(out / "pca.png") as image:
        assert min(image.size) > 400 and len(image.getcolors(image.width * image.height)) > 100
    accuracies = json.loads((out / "knn.json").read_text())["metrics"]
    assert list(accuracies) == ["raw pixels", "untrained", "trained", "dinov2_fashion"]
    assert accuracies["untrained"]["10"] < 30 < accuracies["raw pixels"]["10"] < 50 < accuracies["dinov2_fashion"]["10"]
    patches = json.loads((out / "results_eval_patches.json").read_text())["metrics"]
    assert list(patches) == list(accuracies) and patches["untrained"] < 20 < 30 < patches["dinov2_fashion"]
    assert (out / "knn.md").read_text() in run.stdout
    report = (out / "report.html").read_text()
    assert "Quickstart" in report and "raw pixels" in report


@pytest.mark.slow
def test_quickstart_stops_with_what_is_wrong(tmp_path: Path) -> None:
    run = quickstart(str(tmp_path / "out"), "optim.epoch=1")
    assert run.returncode != 0
    assert "optim.epochs" in run.stderr and "quickstart stopped" in run.stderr
    assert not (tmp_path / "out" / "knn.md").exists()


def test_the_latest_teacher_is_that_of_the_most_steps(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did the training finish"):
        latest_teacher(tmp_path)
    for step in (99, 999, 1099):
        path = tmp_path / "eval" / f"training_{step}" / "teacher_checkpoint.pth"
        path.parent.mkdir(parents=True)
        path.touch()
    assert latest_teacher(tmp_path) == path
