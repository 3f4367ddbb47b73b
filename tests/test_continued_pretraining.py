"""The script that compares continuing from weights with training anew: what it trains on, reads and prints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.data import make_dataset
from scripts.continued_pretraining import HALVES, RUNS, as_table, read_run, write_half

ROOT = Path(__file__).resolve().parents[1]


def test_images_for_knn_are_none_that_runs_are_trained_on(tmp_path: Path) -> None:
    counts = {half: write_half(tmp_path / half, list(classes), 5) for half, classes in HALVES.items()}
    assert set(map(str, counts.values())) == {"{'train': 15, 'knn': 35}"}, "5 of each of 5 classes and 2 splits"
    seen: dict[bytes, str] = {}
    for half, classes in HALVES.items():
        for name in ("train", "knn"):
            dataset = make_dataset(dataset_str=f"ImageList:file={tmp_path / half / name}.tsv")
            assert set(dataset.get_targets()) == set(classes)
            for index in range(len(dataset)):
                pixels = np.array(dataset.get_image(index)).tobytes()
                assert seen.setdefault(pixels, f"{half} {name}") == f"{half} {name}"
    assert len(seen) == 100
    with Image.open(next(tmp_path.glob("other/VAL/sandal/*.png"))) as image:
        assert (image.size, image.mode) == ((28, 28), "L")


def write_run(folder: Path, accuracies: dict[int, float], best: str) -> None:
    """The metrics of a run of 40 steps from weights whose k-NN accuracies are these, by iteration."""
    records = [
        {"iteration": step, "lr": 1e-3, "knn": knn, "knn_chance": 25.0, "knn_images": 1000.0}
        | {"drift_cls_cosine": 0.5, "probe_cls_rank_me": 10.0, "probe_patch_similarity": 0.1}
        for step, knn in accuracies.items()
    ]
    (folder / "eval" / best).mkdir(parents=True)
    (folder / "eval" / "best").symlink_to(best)
    (folder / "training_metrics.json").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_is_read_with_its_dip_and_the_step_of_its_alarm(tmp_path: Path) -> None:
    write_run(tmp_path, {-1: 90.0, 0: 90.0, 3: 84.0, 9: 85.0, 19: 80.0, 39: 82.0}, "start")
    found = read_run(tmp_path, 40)
    assert found["knn"] == {0: 90.0, 1: 90.0, 4: 84.0, 10: 85.0, 20: 80.0, 40: 82.0}
    assert found["dip"] == 6.0, "in the first quarter"
    assert found["alarms"] == {"worse than the starting model": 20}, "raised by steps 4, 10 and 20"
    assert found["best"] == "start" and "did not help" in found["conclusion"]
    write_run(tmp_path / "random", {0: 50.0, 3: 51.0, 9: 52.0, 19: 53.0, 39: 54.0}, "training_39")
    found = read_run(tmp_path / "random", 40)
    assert (found["knn"][0], found["dip"], found["alarms"]) == (50.0, 0.0, {})
    assert found["conclusion"] == "", "it did not start from weights"


def test_the_table_has_the_mean_and_the_range_of_the_seeds() -> None:
    def result(knn: float) -> dict[str, Any]:
        accuracies = {0: knn, 2: knn, 5: knn, 10: knn, 20: knn + 1}
        return {"free": {"knn": accuracies, "dip": 0.5, "alarms": {"collapse": round(knn)}, "best": "training_19"}}

    row = as_table({"0": result(80.0), "1": result(81.0)}, ["free"], 20).splitlines()[2]
    start, end = "80.5 [80.0, 81.0]", "81.5 [81.0, 82.0]"
    cells = [start] * 4 + [end, "0.5 [0.5, 0.5]", "collapse (80, 81)", "`training_19`"]
    assert row == f"| weights, no frozen phase | {' | '.join(cells)} |"


@pytest.mark.slow
def test_all_runs_in_a_tiny_size(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/continued_pretraining.py", "--out", str(tmp_path), "--steps=20", "--small"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    assert (record["images"], record["steps"]) == ({"train": 60, "knn": 140}, 20)
    runs = record["seeds"]["0"]
    assert runs.keys() == {"source", *RUNS}
    for name in RUNS:
        assert list(map(int, runs[name]["knn"])) == list(range(21)), "at the start and after every step"
        assert runs[name]["knn_images"] == 140
    assert len({runs[name]["knn"]["0"] for name in RUNS[1:]}) == 1, "they have the same start"
    assert [name for name in RUNS if not runs[name]["conclusion"]] == ["random"], "it does not start from weights"
    table = (tmp_path / "results.md").read_text()
    assert result.stdout.endswith(table) and len(table.splitlines()) == 2 + len(RUNS)
    configs = {name: (tmp_path / "seed_0" / name / "config.yaml").read_text() for name in RUNS}
    assert "freeze_backbone_steps: 2" in configs["frozen"] and "freeze_backbone_steps: 0" in configs["free"]
    rates = {name: float(text.partition("base_lr: ")[2].split()[0]) for name, text in configs.items()}
    assert [round(rates[name] / rates["random"]) for name in RUNS] == [1, 1, 1, 4, 4, 20]
