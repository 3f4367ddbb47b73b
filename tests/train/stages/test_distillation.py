"""Distillation: the objective, what is frozen, resuming, and what does not fit."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from tiny import (
    CONFIG_FILE,
    assert_same_end,
    killed_after,
    metrics,
    random_batch,
    run_script,
    run_train,
    tensors,
    tiny_config,
)
from torch import Tensor

from dinov2 import config
from dinov2.config import ConfigError
from dinov2.models.weights import read_state_dict
from dinov2.train.preflight.flops import step_flops
from dinov2.train.preflight.memory import masked_patches_per_image
from dinov2.train.stages.choice import build_arch
from dinov2.train.stages.distillation import DistillationArch

LARGER = ["student.embed_dim=48", "student.depth=3", "dino.head_hidden_dim=40", "optim.epochs=1"]
NONE = "student.drop_path_rate=0"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a larger network."""
    output = tmp_path_factory.mktemp("larger")
    run_train(output, *LARGER)
    return output


def distilled(source: Path, *words: str) -> DistillationArch:
    torch.manual_seed(0)
    model = build_arch(tiny_config(NONE, f"distillation.teacher={source}", *words))
    assert isinstance(model, DistillationArch)
    model.load_frozen()
    return model


def cross_entropy(targets: Tensor, scores: Tensor) -> Tensor:
    return -(targets * torch.log_softmax(scores / 0.1, dim=-1)).sum(-1)


@pytest.mark.parametrize("words", [[], ["train.centering=centering"]], ids=["sinkhorn", "centering"])
def test_the_objective_is_that_of_pretraining_without_masks(source: Path, words: list[str]) -> None:
    model = distilled(source, *words)
    batch, center = random_batch(num_images=3, num_local=2), model.ibot_patch_loss.center.clone().flatten()
    targets = model.targets([batch], teacher_temp=0.05)[0]
    assert targets.patch is not None and targets.patch.shape == (6 * 16, 16)
    frozen, student = model.target_networks, copy.deepcopy(model.student).double()
    if words:
        with torch.no_grad():
            features = frozen["backbone"](batch.global_crops, is_training=True)
            scores = frozen["dino_head"](features["x_norm_patchtokens"].flatten(0, 1))
        torch.testing.assert_close(targets.patch, torch.softmax((scores - center) / 0.05, dim=-1))

    losses, _ = model(batch, targets)
    losses.terms["ibot_loss"].backward()
    features = student["backbone"](batch.global_crops.double(), is_training=True)  # nothing is masked
    total = torch.zeros((), dtype=torch.float64)
    for crop in range(6):
        for patch in range(16):
            score = student["dino_head"](features["x_norm_patchtokens"][crop, patch][None])[0]
            total = total + cross_entropy(targets.patch[16 * crop + patch].double(), score) / (6 * 16)
    assert losses.terms["ibot_loss"].item() == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    for (name, param), (_, naive) in zip(model.student.named_parameters(), student.named_parameters(), strict=True):
        if naive.grad is not None:
            assert param.grad is not None, name
            torch.testing.assert_close(param.grad.double(), naive.grad, atol=1e-6, rtol=1e-4)


def test_class_tokens_follow_the_frozen_teacher_of_the_other_crop(source: Path) -> None:
    model = distilled(source, "train.centering=centering")
    batch = random_batch()
    center = model.dino_loss.center.clone()
    targets = model.targets([batch], teacher_temp=0.05)[0]
    frozen = model.target_networks
    with torch.no_grad():
        scores = frozen["dino_head"](frozen["backbone"](batch.global_crops, is_training=True)["x_norm_clstoken"])
    expected = torch.softmax((scores - center) / 0.05, dim=-1).unflatten(0, (2, 4)).flip(0)
    torch.testing.assert_close(targets.cls, expected)


def test_only_the_student_and_its_average_change(source: Path, tmp_path: Path) -> None:
    run_train(tmp_path, f"distillation.teacher={source}", NONE)
    weights = read_state_dict(tmp_path / "eval" / "training_7" / "teacher_checkpoint.pth")
    assert weights["backbone.cls_token"].shape[-1] == 32, "the result is the average of the small student"
    stored = tensors(tmp_path, 7)
    assert {tuple(value.shape) for name, value in stored.items() if name.endswith("backbone.cls_token")} == {(1, 1, 32)}
    first, last = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    assert {"dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "koleo_loss"} <= first.keys()
    assert last["total_loss"] < first["total_loss"]
    larger = tensors(source, 1)
    model = distilled(source)
    for name, value in model.target_networks.state_dict().items():
        assert torch.equal(value, larger[f"model.teacher.{name}"])
    assert torch.equal(model.dino_loss.center, larger["model.dino_loss.center"])


def test_a_killed_distillation_resumes_exactly(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"distillation.teacher={source}", NONE, "train.centering=centering"]
    run_train(tmp_path / "whole", *words)
    with killed_after(3, monkeypatch):
        run_train(tmp_path / "killed", *words)
    run_train(tmp_path / "killed", *words)
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 7)


def test_another_teacher_is_refused_when_resuming(source: Path, tmp_path: Path) -> None:
    run_train(tmp_path / "other", *LARGER, "train.seed=1")
    run_train(tmp_path / "out", f"distillation.teacher={source}", NONE, "optim.epochs=2")
    with pytest.raises(ValueError, match="holds other weights than those that the run has begun with"):
        run_train(tmp_path / "out", f"distillation.teacher={tmp_path / 'other'}", NONE)


def test_a_student_of_larger_patches(source: Path) -> None:
    model = distilled(source, "student.patch_size=14")
    batch = random_batch()
    targets = model.targets([batch._replace(masks=batch.masks[:, :4])], teacher_temp=0.05)[0]
    assert targets.patch is not None and targets.patch.shape == (8 * 4, 16)


def test_an_exported_teacher_without_checkpoints(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "eval").mkdir(parents=True)
    (output / "config.yaml").write_text((source / "config.yaml").read_text())
    (output / "eval" / "best").symlink_to(source / "eval" / "training_1")
    ours, theirs = distilled(output).target_networks.state_dict(), distilled(source).target_networks.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dino.head_n_prototypes=8"], "has dino.head_n_prototypes = 16, but this run has 8: the student predicts the"),
        (["ibot.separate_head=true"], "has ibot.separate_head = False, but this run has True: each head"),
        (["augmentation.mean=[0.5,0.5,0.5]"], "has augmentation.mean = .*: both see the same normalized pixels"),
        (["images.bands=[0,1]"], r"has images.bands = None, but this run has \(0, 1\): both see the same channels"),
    ],
)
def test_what_does_not_fit_is_named(source: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distilled(source, *words)


def test_missing_teachers_are_named(tmp_path: Path) -> None:
    for name, message in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path, "neither checkpoints nor eval/best"),
    ):
        with pytest.raises(FileNotFoundError, match=f"distillation.teacher: .*{message}"):
            distilled(name)


def test_the_plan_counts_all_patches_and_the_larger_teacher(source: Path) -> None:
    cfg = tiny_config(NONE, f"distillation.teacher={source}")
    assert masked_patches_per_image(cfg) == 2 * 16
    distillation, pretraining = (step_flops(cfg, build_arch(each)) for each in (cfg, tiny_config(NONE)))
    assert distillation.teacher.linear > 2 * pretraining.teacher.linear
    assert distillation.student.linear == pretraining.student.linear
    with pytest.raises(ConfigError, match="unknown key 'distillation.teachers'"):
        config.load(None, ["distillation.teachers=x"])


@pytest.mark.slow
def test_two_processes_distill_as_one_that_accumulates(source: Path, tmp_path: Path) -> None:
    words = [f"distillation.teacher={source}", NONE, "dino.koleo_loss_weight=0"]
    run_train(tmp_path / "one", *words, "train.accumulate_steps=2")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "dinov2/train/train.py"]
    flags = ["--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path / "two"), *words]
    result = run_script(*launcher, *flags)
    assert result.returncode == 0, result.stderr
    one, two = tensors(tmp_path / "one", 7), tensors(tmp_path / "two", 7)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3)


def test_the_step_of_the_teacher_is_recorded_and_kept(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    teacher = tmp_path / "teacher"
    shutil.copytree(source, teacher)
    run_train(tmp_path / "out", f"distillation.teacher={teacher}", NONE, "optim.epochs=1")
    assert config.load(tmp_path / "out" / "config.yaml").distillation.teacher == f"{teacher}:1"
    assert f"distills: {teacher}/checkpoints/model_0000001: backbone of " in caplog.text
    run_train(teacher, *LARGER[:-1], "optim.epochs=2")  # it goes on
    run_train(tmp_path / "out", f"distillation.teacher={teacher}", NONE, "optim.epochs=2")
    assert config.load(tmp_path / "out" / "config.yaml").distillation.teacher == f"{teacher}:1"
    with pytest.raises(ValueError, match="trained with distillation.teacher = .*teacher:1, not '', and cannot go on"):
        run_train(tmp_path / "out", NONE, "optim.epochs=3")


def test_names_that_are_no_runs_get_an_answer(source: Path, tmp_path: Path) -> None:
    file = next((source / "eval").glob("*/teacher_checkpoint.pth"))
    for name, message in (
        ("dinov2_vitg14", "it is a backbone without heads, see docs/stages.md"),
        ("TEACHER_RUN", "the recipe leaves it to you"),
        (str(file), "it is a file; give the folder that --output-dir named"),
    ):
        with pytest.raises(FileNotFoundError, match=f"distillation.teacher: .*{message}"):
            run_train(tmp_path, f"distillation.teacher={name}", NONE)
