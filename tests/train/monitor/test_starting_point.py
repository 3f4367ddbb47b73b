"""A run from weights is compared with its starting model: first row, drift, alarm, best teacher, conclusion."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import killed_after, metrics, run_train

from dinov2.files import read_array
from dinov2.report.read_run import read_run
from dinov2.train.monitor.alarms import Alarm, find_alarms
from dinov2.train.monitor.best_teacher import Rating, rate_teacher, read_rating
from dinov2.train.monitor.conclusion import conclude, standard_error
from dinov2.train.monitor.starting_point import START, StartingPoint, read_start

STANDSTILL = ["optim.base_lr=0", "optim.min_lr=0", "teacher.momentum_teacher=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("trained")
    run_train(output_dir)
    return output_dir


def from_weights(trained: Path) -> str:
    return f"student.pretrained_weights={trained / 'eval' / 'best'}"


# --- First row -------------------------------------------------------------------------------------------------------


def test_the_first_row_is_the_starting_model(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, from_weights(trained), *STANDSTILL)
    first, *others = metrics(tmp_path)
    assert first["iteration"] == START and [record["iteration"] for record in others] == list(range(8))
    measured = [record for record in others if "knn" in record]
    assert len(measured) == 3
    for record in measured:  # nothing was learned
        for name in ("knn", "probe_cls_rank_me", "probe_patch_rank_me", "probe_patch_similarity"):
            assert record[name] == first[name], name
        for name in ("drift_cls_cka", "drift_patch_cka", "drift_cls_cosine", "drift_patch_cosine"):
            assert record[name] == pytest.approx(1, abs=1e-6), name
    weights = [torch.load(tmp_path / "eval" / name / "teacher_checkpoint.pth")["teacher"] for name in ("start", "best")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if name.startswith("backbone."))


def test_what_is_learned_is_drift(trained: Path, tmp_path: Path) -> None:
    run_train(tmp_path, from_weights(trained), "optim.base_lr=0.02")
    first, *_, last = (record for record in metrics(tmp_path) if "drift_cls_cka" in record)
    assert first["drift_patch_cosine"] == pytest.approx(1, abs=1e-6) and last["drift_patch_cosine"] < 0.999


def test_a_run_from_random_weights_has_no_start(trained: Path) -> None:
    assert metrics(trained)[0]["iteration"] == 0
    assert not (trained / "eval" / "start").exists() and not list((trained / "health").glob("start*"))
    assert all("drift_cls_cka" not in record for record in metrics(trained))


@pytest.mark.parametrize("num_steps", [1, 5])  # before and after the first checkpoint
def test_the_start_survives_a_kill(
    num_steps: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train(tmp_path / "straight", from_weights(trained))
    with killed_after(num_steps, monkeypatch):
        run_train(tmp_path / "resumed", from_weights(trained))
    run_train(tmp_path / "resumed", from_weights(trained))
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")


def test_a_new_run_in_the_folder_forgets_the_start_of_the_earlier_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(1, monkeypatch):
        run_train(tmp_path, from_weights(trained))
    run_train(tmp_path)  # there was no checkpoint to resume from
    assert [record["iteration"] for record in metrics(tmp_path)] == list(range(8))
    assert not (tmp_path / "eval" / "start").exists()


def test_damaged_features_or_other_images_end_the_comparison_and_not_the_run(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = StartingPoint(torch.randn(5, 3), torch.randn(9, 3), b"digest")
    start.save(tmp_path)
    assert torch.equal(read_start(tmp_path, b"digest").patch, start.patch)
    assert read_start(tmp_path, b"another") is None
    (tmp_path / "start_features.npz").write_bytes(b"\0" * 99)
    assert read_start(tmp_path, b"digest") is None
    assert read_start(tmp_path / "nowhere", b"digest") is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_features_that_cannot_be_saved_do_not_stop_a_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "start_features.npz")

    monkeypatch.setattr(StartingPoint, "save", full)
    run_train(tmp_path, from_weights(trained))
    assert "No space left on device" in caplog.text and "not be compared with its start" in caplog.text
    assert sum("drift_cls_cka" in record for record in metrics(tmp_path)) > 2, "of this session it is"


def test_features_that_are_rotated_have_drifted_in_direction_alone() -> None:
    cls = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    drift = StartingPoint(cls, cls, b"").drift(cls @ rotation, cls * torch.linspace(0.1, 9, 64)[:, None])
    assert drift["drift_cls_cka"] == pytest.approx(1, abs=1e-5) and abs(drift["drift_cls_cosine"]) < 0.5
    assert drift["drift_patch_cosine"] == pytest.approx(1, abs=1e-5) and drift["drift_patch_cka"] < 0.95


# --- Alarm -----------------------------------------------------------------------------------------------------------


def records_of(knn: list[float], rank: float = 40.0) -> list[dict[str, float]]:
    """A start with 70 %, and a measurement every 20 steps."""
    shared = {"knn_chance": 12.0, "knn_images": 1000.0, "drift_cls_cosine": 1.0, "probe_images": 64.0}
    values = [(START, 70.0, 40.0), *((20 * index, value, rank) for index, value in enumerate(knn, 1))]
    return [
        {"iteration": step, "knn": value, "probe_cls_rank_me": of_rank, **shared} for step, value, of_rank in values
    ]


def alarms_of(records: list[dict[str, float]]) -> list[Alarm]:
    return [alarm for alarm in find_alarms(records) if alarm.kind == "worse than the starting model"]


def test_falling_below_the_start_without_recovery_is_an_alarm() -> None:
    (alarm,) = alarms_of(records_of([69, 66, 65, 64, 66]))
    assert (alarm.first, alarm.last, alarm.over) == (40, 100, False)
    assert alarm.finding == "the k-NN accuracy is 66.0 %, that of the starting model 70.0 %"
    assert "eval/start" in alarm.advice


def test_a_dip_and_a_difference_within_the_error_are_none() -> None:
    assert alarms_of(records_of([66, 66, 69, 72])) == []
    assert alarms_of(records_of([67.5] * 9)) == [], "twice the standard error of 1,000 images is 2.9 points"


def test_an_alarm_is_over_once_the_run_is_back() -> None:
    (alarm,) = alarms_of(records_of([60, 61, 62, 63, 70]))
    assert alarm.over and alarm.last == 80


def test_without_labels_the_rank_is_compared() -> None:
    records = [{k: v for k, v in each.items() if not k.startswith("knn")} for each in records_of([0] * 4, rank=20.0)]
    (alarm,) = alarms_of(records)
    assert alarm.finding == "the effective rank of the class tokens (RankMe) is 20.0, that of the starting model 40.0"


def test_a_run_without_a_start_cannot_be_below_it() -> None:
    assert alarms_of(records_of([10] * 9)[1:]) == []


# --- Best teacher ----------------------------------------------------------------------------------------------------


def test_a_worse_teacher_is_never_preferred_to_the_start(tmp_path: Path) -> None:
    def rate(name: str, iteration: int, value: float) -> str:
        (tmp_path / name).mkdir()
        rate_teacher(tmp_path / name, iteration, {"knn": value, "knn_chance": 10.0})
        return (tmp_path / "best").readlink().name

    assert rate("start", START, 70.0) == "start"
    assert rate("training_99", 99, 69.9) == "start"
    assert rate("training_149", 149, 70.0) == "start", "of equal ones the start"
    assert rate("training_199", 199, 70.1) == "training_199"
    assert rate("training_299", 299, 60.0) == "training_199"
    assert read_rating(tmp_path / "best" / "health.json") == Rating(199, "knn", 70.1)


# --- Conclusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knn", "best", "text"),
    [
        (
            [75, 80],
            Rating(40, "knn", 80.0),
            "Continuing helped: 70.0 -> 80.0 % by k-NN on 1,000 images, each classified by the others (+10.0 points, "
            "standard error 1.9). Use eval/best, the teacher of step 40.",
        ),
        ([71], Rating(20, "knn", 71.0), "It is not clear that continuing helped: 70.0 -> 71.0 %"),
        (
            [66, 65],
            Rating(START, "knn", 70.0),
            "Continuing did not help: no saved teacher is better than the starting model, 70.0 -> 65.0 % of the last "
            "one by k-NN on 1,000 images, each classified by the others (-5.0 points, standard error 2.1). Use "
            "eval/start, the starting model.",
        ),
        ([69], None, "No difference that matters was measured: no saved teacher is better than the starting model"),
        ([], None, "Whether continuing helped is not known yet"),
    ],
)
def test_the_conclusion_has_the_evidence_and_the_file(knn: list[float], best: Rating | None, text: str) -> None:
    assert conclude(records_of(knn), best).startswith(text)


def test_without_labels_the_conclusion_says_so() -> None:
    records: list[Mapping[str, float]] = [
        {"iteration": START, "probe_cls_rank_me": 20.0, "probe_patch_similarity": 0.2},
        {"iteration": 99, "probe_cls_rank_me": 31.4, "probe_patch_similarity": 0.25, "drift_cls_cka": 0.87},
    ]
    text = conclude(records, Rating(99, "probe_cls_rank_me", 31.4))
    assert text.startswith("Whether continuing helped was not measured, as there are no labels (health.knn_dataset)")
    assert "effective rank 20 -> 31.4, similarity of patches 0.2 -> 0.25" in text and "(CKA) 0.87" in text
    assert conclude(records[1:], None) == "", "a run from random weights"


def test_k_nn_that_guessing_reaches_is_no_evidence() -> None:
    records = [record | {"knn": 11.0, "probe_patch_similarity": 0.2} for record in records_of([11])]
    text = conclude(records, None)
    assert text.startswith(
        "Whether continuing helped was not measured, as k-NN of the starting model is not better than"
    )


def test_the_standard_error_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    differences = 100 * (rng.binomial(500, 0.8, 20_000) - rng.binomial(500, 0.7, 20_000)) / 500
    assert standard_error(70.0, 80.0, 500) == pytest.approx(differences.std(), rel=0.02)


def test_console_and_report_end_with_the_conclusion(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run_train(tmp_path, from_weights(trained), "health.knn_dataset=none")
    assert caplog.messages[-1].startswith("Whether continuing helped was not measured")
    run = read_run(tmp_path, "run")
    assert run.start is not None and run.step_text(START) == f"the start, {trained / 'eval' / 'best'}"
    digest = read_array(tmp_path / "health" / "start_features.npz", "digest")
    assert digest.shape == (32,)
    assert json.loads((tmp_path / "training_metrics.json").read_text().splitlines()[0])["iteration"] == -1
