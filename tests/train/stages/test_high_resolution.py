"""The high-resolution stage: an earlier run at larger crops, its control, and the chain up to the last stage."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny import assert_same_end, killed_after, run_train, tensors

from dinov2.models.weights import read_state_dict

LARGER_CROPS = ["crops.global_crops_size=56", "crops.local_crops_size=28", "student.drop_path_rate=0"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    run_train(output, "student.drop_path_rate=0", "optim.epochs=2", "train.centering=centering")
    return output


def test_it_starts_with_the_features_of_the_earlier_model_which_is_its_control(
    pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_train(tmp_path, f"init_from={pretrained}", *LARGER_CROPS)
    [found] = [text for text in caplog.messages if text.startswith("step 0: ")]
    assert found.startswith("step 0: features of 8 images differ by up to ")
    assert float(found.split("up to ")[1].split()[0]) < 1e-4
    first = json.loads((tmp_path / "training_metrics.json").read_text().splitlines()[0])
    assert first["iteration"] == -1 and first["drift_patch_cosine"] == pytest.approx(1) and first["knn"] > 0
    control = read_state_dict(tmp_path / "eval" / "start" / "teacher_checkpoint.pth")
    earlier = tensors(pretrained, 3)
    for name, value in control.items():
        if name != "backbone.pos_embed":
            assert torch.equal(value, earlier[f"model.teacher.{name}"])
    assert control["backbone.pos_embed"].shape == (1, 1 + 64, 32)


def test_a_killed_stage_resumes_exactly(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"init_from={pretrained}", *LARGER_CROPS, "train.centering=centering", "optim.epochs=2"]
    run_train(tmp_path / "whole", *words)
    for step in (0, 2):
        with killed_after(step, monkeypatch):
            run_train(tmp_path / "killed", *words)
    run_train(tmp_path / "killed", *words)
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 3)


def test_from_pretraining_over_distillation_to_high_resolution(pretrained: Path, tmp_path: Path) -> None:
    small = ["student.embed_dim=16", "student.drop_path_rate=0", "optim.epochs=1"]
    run_train(tmp_path / "small", *small, f"distillation.teacher={pretrained}")
    run_train(tmp_path / "large", *small, *LARGER_CROPS, f"init_from={tmp_path / 'small'}")
    stored = tensors(tmp_path / "large", 1)
    assert stored["model.teacher.backbone.pos_embed"].shape == (1, 65, 16)
    assert "model.frozen_digest" not in stored, "what belongs to distillation alone stays behind"


def test_the_optimizer_may_continue_where_shapes_are_the_same(
    pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    words = [f"init_from={pretrained}", *LARGER_CROPS, "optim.epochs=1", "optim.base_lr=0", "init_from_optimizer=true"]
    run_train(tmp_path / "with", *words, "optim.adamw_beta1=0.5")
    before, after = tensors(pretrained, 3), tensors(tmp_path / "with", 1)
    counts = {name: value.item() for name, value in after.items() if name.endswith(".step")}
    assert counts.pop("optimizer.student.backbone.pos_embed.step") == 2, "two steps of its own"
    assert set(counts.values()) == {6.0}, "and four of the earlier run"
    [found] = [text for text in caplog.messages if text.startswith("the optimizer continues")]
    assert f"for {len(counts)} of {len(counts) + 1} parameters" in found
    assert len(before) == len(after)
    (tmp_path / "exported" / "eval" / "best").mkdir(parents=True)
    teacher = pretrained / "eval" / "training_3" / "teacher_checkpoint.pth"
    (tmp_path / "exported" / "eval" / "best" / teacher.name).write_bytes(teacher.read_bytes())
    with pytest.raises(ValueError, match="has no checkpoints, so the state of its optimizer is lost"):
        run_train(tmp_path / "without", f"init_from={tmp_path / 'exported'}", "init_from_optimizer=true")


def test_another_number_of_heads_is_not_the_same_network(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="init_from: .* has student.num_heads = 2, but this run has 4: another network"
    ):
        run_train(tmp_path, f"init_from={pretrained}", *LARGER_CROPS, "student.num_heads=4")
