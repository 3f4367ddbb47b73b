"""Runs made to fail on purpose raise the right alarm while they run, a healthy one none; all on real images."""

import time
from pathlib import Path
from typing import Any

import pytest
from tiny import run_train

from dinov2.data.datasets.fashion_mnist import FashionMNIST
from dinov2.loss import DINOLoss, iBOTPatchLoss
from dinov2.metrics_file import read_records
from dinov2.train.monitor.alarms import find_alarms

SETTINGS = [
    *("optim.epochs=60", "optim.warmup_epochs=5", "optim.base_lr=0.002", "train.batch_size_per_gpu=16"),
    *("dino.head_n_prototypes=32", "teacher.momentum_teacher=0.95", "teacher.warmup_teacher_temp_epochs=0"),
    *("student.drop_path_rate=0", "student.layerscale=null", "student.init_std=0.06", "student.pos_embed_std=1"),
    *("student.embed_dim=128", "student.num_heads=4", "student.depth=3", "crops.local_crops_number=1"),
    *("teacher.teacher_temp=0.04", "train.log_period=2", "train.checkpoint_period=1000", "health.period=5"),
    *("health.probe_images=64", "evaluation.eval_period_iterations=0"),
]


def alarms_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, *words: str) -> set[str]:
    """The kinds of alarms that a run has raised, which are those in its metrics file."""
    with caplog.at_level("WARNING", "dinov2.train.monitor.alarms"):
        run_train(tmp_path, *SETTINGS, *words)
    raised = {record.args[0] for record in caplog.records if record.name == "dinov2.train.monitor.alarms"}  # type: ignore[index]
    assert raised == {alarm.kind for alarm in find_alarms(read_records(tmp_path / "training_metrics.json"))}
    return raised  # type: ignore[return-value]


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_a_healthy_run_raises_none(centering: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert alarms_of(tmp_path, caplog, f"train.centering={centering}") == set()


def test_without_centering_targets_collapse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loss in (DINOLoss, iBOTPatchLoss):
        monkeypatch.setattr(loss, "update_center", lambda *_: None)
    assert alarms_of(tmp_path, caplog, "train.centering=centering") == {"collapse"}


def test_a_learning_rate_times_100_diverges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "divergence" in alarms_of(tmp_path, caplog, "optim.base_lr=0.2")


def test_one_image_over_and_over_is_a_collapse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FashionMNIST.open_image
    monkeypatch.setattr(FashionMNIST, "open_image", lambda self, _: original(self, 7))
    assert alarms_of(tmp_path, caplog) == {"collapse"}


def test_a_slow_loader_starves_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FashionMNIST.open_image

    def slow(self: FashionMNIST, index: int) -> Any:
        time.sleep(0.006)
        return original(self, index)

    monkeypatch.setattr(FashionMNIST, "open_image", slow)
    assert alarms_of(tmp_path, caplog) == {"data bottleneck"}
