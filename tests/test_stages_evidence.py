"""The script that measures later stages at a small size: what it trains, and what it reads and prints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinov2 import config
from dinov2.config import Config
from dinov2.metrics_file import read_records
from dinov2.train import train
from scripts import stages_evidence as evidence

TINY = [
    *("student.embed_dim=16", "student.num_heads=1", "student.depth=1", "train.batch_size_per_gpu=8"),
    *("dino.head_n_prototypes=16", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8", "train.num_workers=0"),
    *("health.probe_images=8", "health.knn_images=32", "health.dense_images=16", "crops.local_crops_number=1"),
]
STEPS = 4


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the results of all stages in a tiny size; the commands of training are run in this process."""

    def run_here(words: list[str]) -> None:
        train.main(train.get_args_parser().parse_intermixed_args(words))

    folder = tmp_path_factory.mktemp("stages")
    lengths = [f"--steps={STEPS}", f"--first-steps={STEPS}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "run_training", run_here)
        patch.setattr(evidence, "PERIODS", 2)
        for stage in evidence.STAGES:
            evidence.main([stage, "--out", str(folder), "--seeds", "1", *lengths, *TINY])
    yield folder


def config_of(folder: Path) -> Config:
    return config.load(folder / "config.yaml")


def results_of(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / f"{stage}.json").read_text())["results"]


def measured(run: Path) -> list[dict[str, float]]:
    """The records with measurements by labels: before or after the first step, and after the last."""
    return [record for record in read_records(run / "training_metrics.json") if "knn" in record]


def differences(one: Path, other: Path) -> list[str]:
    return evidence.changed_settings(config_of(one), config_of(other))


def test_students_differ_in_their_teacher_alone(out: Path) -> None:
    assert differences(out / "alone_1", out / "distilled_1") == ["distillation.teacher"]
    assert config_of(out / "distilled_1").distillation.teacher == f"{out / 'first'}:{STEPS - 1}"
    results = results_of(out, "distillation")
    untrained, alone, distilled = (
        results[f"student, {name}"]["1"] for name in ("untrained", "without a teacher", "distilled")
    )
    assert (untrained["iteration"], alone["iteration"], distilled["iteration"]) == (0, STEPS - 1, STEPS - 1)
    for row, run in ((alone, "alone_1"), (distilled, "distilled_1")):
        assert row["patch_knn_miou"] == pytest.approx(measured(out / run)[-1]["patch_knn_miou"], abs=1e-3)
    assert results["teacher"] == results_of(out, "gram")["earlier model"]


def test_the_control_is_the_earlier_model_at_twice_the_resolution_before_the_first_step(out: Path) -> None:
    results = results_of(out, "resolution")
    control = results["earlier model, 56 pixels (the control)"]["0"]
    assert (control["iteration"], control["drift_patch_cosine"]) == (-1, 1)
    [first, second] = [config_of(out / f"side_{side}_1") for side in (28, 56)]
    assert first.init_from == second.init_from == str(out / "first")
    assert (second.crops.global_crops_size, second.crops.local_crops_size) == (56, 28)
    assert ":size=56:" in second.train.dataset_path and ":size=56:" in second.health.dense_dataset
    further = results["trained further at 56 pixels"]["1"]
    assert further["iteration"] == STEPS - 1 and further["drift_patch_cosine"] < 1


def test_the_gram_loss_is_what_continued_runs_differ_in(out: Path) -> None:
    assert differences(out / "no_gram_0.006_1", out / "gram_0.006_1") == ["gram.loss_weight", "gram.teacher"]
    [without, with_loss] = [
        read_records(out / f"{run}_0.006_1" / "training_metrics.json") for run in ("no_gram", "gram")
    ]
    assert not any("gram_loss" in record for record in without)
    assert all(record["gram_loss"] > 0 for record in with_loss if record["iteration"] > 0)
    assert not any("ibot_loss" in record for record in without + with_loss)


def test_the_first_run_is_that_of_all_stages(out: Path) -> None:
    records = read_records(out / "first" / "training_metrics.json")
    assert [record["iteration"] for record in records] == list(range(STEPS)), "trained once, read three times"


def test_a_run_of_another_length_is_not_taken_for_that_of_the_command(out: Path) -> None:
    words = ["gram", "--out", str(out), "--steps=20", "--first-steps=40", *TINY]
    with pytest.raises(SystemExit, match=r"first is a run with other train.checkpoint_period, optim.epochs"):
        evidence.main(words)


def test_the_table_has_the_mean_and_the_range_of_the_seeds() -> None:
    results = {
        "earlier": {"0": {"knn": 50.0, "patch_knn_miou": 20.0}},
        "with": {
            "1": {"knn": 60.04, "patch_knn_miou": 21.0, "drift_patch_cka": 0.5},
            "2": {"knn": 61.0, "patch_knn_miou": 25.0, "drift_patch_cka": 0.75},
        },
    }
    assert evidence.as_table(results).splitlines() == [
        "| model | k-NN, % | mIoU, % | patches: CKA with the start |",
        "| --- | --- | --- | --- |",
        "| earlier | 50.0 | 20.0 |  |",
        "| with | 60.5 [60.0, 61.0] | 23.0 [21.0, 25.0] | 0.62 [0.50, 0.75] |",
    ]


def test_wrong_words_are_reported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--steps 30 is not a multiple of 20"):
        evidence.main(["gram", "--out", str(tmp_path), "--steps=30"])
    with pytest.raises(RuntimeError, match="unrecognized arguments: --nope"):
        evidence.run_training(["--config-file", "train/quickstart", "--nope"])
