"""The frozen teacher of a distillation is measured once, beside the student, and shown as its reference."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny import CONFIG_FILE, killed_after, metrics, run_script, run_train, tiny_config

from dinov2.analysis.feature_statistics import leave_one_out_accuracy
from dinov2.data import make_dataset
from dinov2.report.curves import panels_by_group
from dinov2.report.page import page
from dinov2.report.read_run import read_run
from dinov2.report.verdict import conclusion
from dinov2.train.monitor.alarms import find_alarms
from dinov2.train.monitor.best_teacher import Rating
from dinov2.train.monitor.conclusion import conclude
from dinov2.train.monitor.probe import Probe
from dinov2.train.stages.choice import build_arch

DENSE = ["health.dense_dataset=FashionScenes:split=VAL:length=40:background=black", "health.dense_images=18"]
LARGER = ["student.embed_dim=48", "student.depth=3", "dino.head_hidden_dim=40", "optim.epochs=1"]
NONE = "student.drop_path_rate=0"
FROZEN = ("frozen_teacher_knn", "frozen_teacher_patch_knn_miou", "frozen_teacher_patch_knn_error")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a larger network."""
    output = tmp_path_factory.mktemp("larger")
    run_train(output, *LARGER, *DENSE)
    return output


@pytest.fixture(scope="module")
def student(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("student")
    run_train(output, f"distillation.teacher={source}", NONE, *DENSE)
    return output


def test_its_values_are_those_of_its_own_run(source: Path, student: Path) -> None:
    own, (first, *others) = metrics(source)[-1], metrics(student)
    assert first["iteration"] == 0
    assert {name: first[name] for name in FROZEN} == {
        name: pytest.approx(own[name.removeprefix("frozen_teacher_")], abs=1e-4) for name in FROZEN
    }
    assert not any(name in record for record in others for name in FROZEN), "measured once"
    assert not (student / "eval" / "start").exists() and not list((student / "health").glob("start*"))
    assert "drift_cls_cka" not in first


def test_a_resumed_run_keeps_them(source: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"distillation.teacher={source}", NONE, *DENSE]
    with killed_after(3, monkeypatch):
        run_train(tmp_path, *words)
    run_train(tmp_path, *words)
    assert metrics(tmp_path) == metrics(student)


def test_with_other_patches_it_sees_images_of_its_own_size(source: Path, tmp_path: Path) -> None:
    cfg = tiny_config(f"distillation.teacher={source}", NONE, "student.patch_size=14", f"train.output_dir={tmp_path}")
    model = build_arch(cfg)
    model.load_frozen()
    probe = Probe(cfg, model.eval(), make_dataset(dataset_str=cfg.train.dataset_path))
    assert probe.labeled is not None
    images, rows, labels, _ = probe.labeled
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.augmentation.mean, cfg.augmentation.std))
    crops = torch.nn.functional.interpolate(
        (images.pixels / 255 - mean) / std, (14, 14), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        tokens = model.target_networks["backbone"](crops, is_training=True)["x_norm_clstoken"]
    assert probe.measure_frozen_teacher() == {"frozen_teacher_knn": 100 * leave_one_out_accuracy(tokens[rows], labels)}
    assert model.frozen_teacher_features(torch.zeros(1, 3, 28, 28))["x_norm_patchtokens"].shape == (1, 4, 48)


def test_without_labels_or_without_a_frozen_teacher_nothing_is_measured(source: Path, tmp_path: Path) -> None:
    run_train(tmp_path, f"distillation.teacher={source}", NONE, "health.knn_dataset=none", "optim.epochs=1")
    for folder in (tmp_path, source):
        assert not any("frozen" in name for record in metrics(folder) for name in record)
        assert "frozen teacher" not in page([read_run(folder, "run")])


@pytest.mark.slow
def test_two_processes_measure_the_same(source: Path, tmp_path: Path) -> None:
    words = [f"distillation.teacher={source}", NONE, "optim.epochs=1", *DENSE]
    run_train(tmp_path / "one", *words, "train.accumulate_steps=2")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "dinov2/train/train.py"]
    flags = ["--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path / "two"), *words]
    result = run_script(*launcher, *flags)
    assert result.returncode == 0, result.stderr
    one, two = (metrics(tmp_path / name)[0] for name in ("one", "two"))
    assert {name: two[name] for name in FROZEN} == {name: pytest.approx(one[name], abs=0.1) for name in FROZEN}


# --- Report ----------------------------------------------------------------------------------------------------------


def test_the_report_shows_it_as_a_line_a_row_and_a_sentence(student: Path) -> None:
    run, (first, *_) = read_run(student, "run"), metrics(student)
    panels = {panel.title: panel for panel in panels_by_group([run])["features"]}
    for title, name in (("k-NN accuracy", FROZEN[0]), ("k-NN of patches, mIoU", FROZEN[1])):
        assert panels[title].legend == [("teacher", 0), ("frozen teacher", 1)]
        assert panels[title].chart.lines[1][0].points == [(0, first[name]), (7, first[name])]
        cell = f"<td>{first[name]:.1f}\N{NO-BREAK SPACE}%</td>"
        assert f'<tr><th scope="row">frozen teacher</th>{cell * 3}</tr>' in page([run]).replace("\n", "")
    assert conclusion(run).startswith("At step ") and "that of the frozen teacher" in conclusion(run)
    assert not find_alarms(run.records)


def records(*knn: float) -> list[Mapping[str, float]]:
    """A distillation whose frozen teacher is right for 90 of 100 images."""
    found = [{"iteration": 10.0 * index, "knn": value, "knn_images": 1000.0} for index, value in enumerate(knn)]
    return [found[0] | {"frozen_teacher_knn": 90.0}, *found[1:]]


def test_the_conclusion_compares_the_best_teacher_or_the_last() -> None:
    text = "k-NN {} %, that of the frozen teacher 90.0 % ({} points, standard error {})."
    last, best = text.format("75.0", "-15.0", "1.7"), text.format("80.0", "-10.0", "1.6")
    assert conclude(records(50, 80, 75), None) == f"At step 20: {last}"
    assert conclude(records(50, 80, 75), Rating(10, "knn", 80.0)) == f"At step 10: {best}"


def test_the_conclusion_has_dense_features_with_their_error() -> None:
    dense = [{"patch_knn_miou": value, "patch_knn_error": 3.0} for value in (20, 36)]
    frozen = {"frozen_teacher_patch_knn_miou": 40.0, "frozen_teacher_patch_knn_error": 4.0}
    found = [record | more for record, more in zip(records(50, 80), (dense[0] | frozen, dense[1]), strict=True)]
    assert conclude(found, None) == (
        "At step 10: k-NN 80.0 %, that of the frozen teacher 90.0 % (-10.0 points, standard error 1.6); mean IoU of "
        "k-NN of patches 36.0 %, that of the frozen teacher 40.0 % (-4.0 points, standard error 5.0)."
    )


def test_a_distillation_from_weights_has_both_sentences() -> None:
    start = {"iteration": -1.0, "knn": 40.0, "knn_images": 1000.0, "probe_cls_rank_me": 3.0}
    more = [dict(record, probe_cls_rank_me=3.0) for record in records(50, 80)]
    found = conclude([start, *more], Rating(10, "knn", 80.0))
    assert found.startswith("Continuing helped: 40.0 -> 80.0 %") and "frozen teacher 90.0 % (-10.0 points" in found
