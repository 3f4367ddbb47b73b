"""Gram anchoring: the term against a naive loop, its crops, its schedule and refreshes, and resuming at them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    CONFIG_FILE,
    assert_same_end,
    killed_after,
    random_batch,
    run_script,
    run_train,
    tensors,
    tiny_config,
)
from torch.nn.functional import interpolate

from dinov2.config import ConfigError
from dinov2.data import DataAugmentationDINO, make_dataset
from dinov2.data.collate import Batch
from dinov2.data.loader import to_device
from dinov2.train.preflight.flops import step_flops
from dinov2.train.stages.choice import build_arch
from dinov2.train.stages.gram_anchoring import GramAnchoringArch, is_refresh_due
from dinov2.train.training_run import build_loader

GRAM = ["gram.loss_weight=2", "student.drop_path_rate=0"]


def batch_with_gram_crops(**options: Any) -> Batch:
    batch = random_batch(**options)
    generator = torch.Generator().manual_seed(9)
    return batch._replace(gram_crops=torch.randn(len(batch.global_crops), 3, 56, 56, generator=generator))


def test_the_term_and_its_gradient_are_those_of_a_naive_loop() -> None:
    torch.manual_seed(0)
    model = build_arch(tiny_config(*GRAM))
    assert isinstance(model, GramAnchoringArch)
    with torch.no_grad():
        for param in model.gram_teacher.parameters():
            param.mul_(1.1)
    batch = batch_with_gram_crops()
    targets = model.targets([batch], teacher_temp=0.05)[0]
    model.begin_step(5)
    losses, predictions = model(batch, targets)
    student, anchor = (copy.deepcopy(networks["backbone"]).double() for networks in (model.student, model.gram_teacher))
    losses.terms["gram_loss"].backward()

    ours = student(batch.global_crops.double(), masks=batch.masks, is_training=True)["x_norm_patchtokens"]
    with torch.no_grad():
        theirs = anchor(batch.gram_crops.double(), is_training=True)["x_norm_patchtokens"]
    maps = interpolate(theirs.mT.unflatten(2, (8, 8)), size=(4, 4), mode="bicubic").flatten(2).mT
    total = torch.zeros((), dtype=torch.float64)
    for crop in range(len(ours)):
        for i in range(16):
            for j in range(16):
                mine, its = (torch.cosine_similarity(x[crop, i], x[crop, j], dim=0) for x in (ours, maps))
                total = total + (mine - its) ** 2 / (len(ours) * 16 * 16)
    assert losses.terms["gram_loss"].item() == pytest.approx(2 * total.item(), rel=1e-4)
    (2 * total).backward()
    for (name, param), naive in zip(model.student["backbone"].named_parameters(), student.parameters(), strict=True):
        if naive.grad is not None:
            assert param.grad is not None, name
            torch.testing.assert_close(param.grad.double(), naive.grad, atol=1e-6, rtol=1e-3)

    plain = build_arch(tiny_config("student.drop_path_rate=0"))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("gram_teacher.")})
    without, _ = plain(batch, targets)
    assert without.terms.keys() == losses.terms.keys() - {"gram_loss"}
    for name, value in without.terms.items():
        torch.testing.assert_close(value, losses.terms[name])
    assert losses.total.item() == pytest.approx(sum(value.item() for value in losses.terms.values()))


def test_the_crops_are_those_of_the_student_without_changed_colors() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    smooth = np.array(Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC))
    augmentation = DataAugmentationDINO(
        (0.3, 1.0), (0.1, 0.3), 2, 28, 14, gram_crops_size=56, mean=(0, 0, 0), std=(1 / 255,) * 3
    )
    torch.manual_seed(3)
    found, params = augmentation.draw(Image.fromarray(smooth))
    crops = augmentation.apply(found, params)
    assert [len(each) for each in crops] == [2, 2, 2]
    for crop, param in zip(crops.gram_crops, params.rows()[:2], strict=True):
        top, left, height, width = param.box
        expected = Image.fromarray(found).crop((left, top, left + width, top + height))
        expected = expected.resize((56, 56), Image.Resampling.BICUBIC)
        if param.flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = np.abs(crop.numpy().transpose(1, 2, 0) - np.asarray(expected))
        assert difference.max() <= 2


def test_the_device_makes_the_same_crops() -> None:
    batches = []
    for place in ("cpu", "device"):
        cfg = tiny_config(*GRAM, f"train.augment_on={place}")
        dataset = make_dataset(dataset_str=cfg.train.dataset_path)
        batches.append(next(to_device(build_loader(cfg, dataset, 0), torch.device("cpu"))))
    assert batches[0].gram_crops is not None and batches[0].gram_crops.shape == (8, 3, 56, 56)
    difference = (batches[0].gram_crops - batches[1].gram_crops).abs() * 0.225 * 255  # in levels
    assert difference.max() <= 3.1 and difference.mean() < 0.2


def test_weight_and_refreshes_follow_their_settings() -> None:
    words = ["gram.start_step=4", "gram.rise_steps=3", "gram.teacher_step=2", "gram.refresh_period=2"]
    cfg = tiny_config(*GRAM, *words, "gram.max_refreshes=2", "optim.epochs=8")
    assert [step for step in range(16) if is_refresh_due(cfg, step)] == [2, 4, 6]
    model = build_arch(cfg)
    assert isinstance(model, GramAnchoringArch)
    weights = []
    for step in range(9):
        model.begin_step(step)
        weights.append(model.gram_weight)
    assert weights == pytest.approx([0, 0, 0, 0, 0, 1, 2, 2, 2])


def test_a_run_killed_at_a_refresh_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*GRAM, "gram.start_step=1", "gram.refresh_period=2", "health.period=0"]
    run_train(tmp_path / "whole", *words)
    with killed_after(4, monkeypatch):  # after the copy before step 4; the checkpoint is that of step 3
        run_train(tmp_path / "killed", *words)
    run_train(tmp_path / "killed", *words)
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 7)


def test_an_earlier_run_as_anchor_and_as_start(tmp_path: Path) -> None:
    run_train(tmp_path / "first", "optim.epochs=2")
    words = [f"gram.teacher={tmp_path / 'first'}:1", f"init_from={tmp_path / 'first'}", *GRAM]
    run_train(tmp_path / "second", *words)
    first, second = tensors(tmp_path / "first", 1), tensors(tmp_path / "second", 7)
    anchor = {name: value for name, value in second.items() if name.startswith("model.gram_teacher.")}
    assert anchor
    for name, value in anchor.items():
        assert torch.equal(value, first[name.replace("gram_teacher", "teacher")])
    run_train(tmp_path / "third", f"init_from={tmp_path / 'second'}", "optim.epochs=1")  # the anchor is left behind
    assert not any("gram" in name for name in tensors(tmp_path / "third", 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gram.start_step=7", "gram.rise_steps=2"], "gram.start_step = 7 . gram.rise_steps = 2 is more than 8 steps"),
        (["gram.teacher_step=3"], "gram.teacher_step = 3 is after gram.start_step = 0: there is no Gram teacher"),
        (["gram.teacher=x", "gram.refresh_period=2"], "gram.refresh_period = 2 is for copies of this run's teacher"),
        (["gram.teacher=x", "gram.loss_weight=0"], "gram.teacher = x has no effect with gram.loss_weight = 0"),
        (["init_from_optimizer=true"], "init_from_optimizer = true needs init_from"),
        (["distillation.teacher=x"], "gram.loss_weight = 2.0 and distillation.teacher exclude one another"),
    ],
)
def test_contradictions_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(*GRAM, *words)


def test_an_anchor_of_another_shape_is_named(tmp_path: Path) -> None:
    run_train(tmp_path / "first", "optim.epochs=1", "student.embed_dim=48")
    with pytest.raises(ValueError, match="gram.teacher: .*first"):
        run_train(tmp_path / "second", f"gram.teacher={tmp_path / 'first'}", *GRAM)


def test_the_plan_counts_the_larger_crops() -> None:
    flops = [step_flops(cfg, build_arch(cfg)) for cfg in (tiny_config(GRAM[1]), tiny_config(*GRAM))]
    assert flops[1].teacher.linear > 4 * flops[0].teacher.linear and flops[1].student.linear == flops[0].student.linear


@pytest.mark.slow
def test_two_processes_anchor_as_one_that_accumulates(tmp_path: Path) -> None:
    words = [*GRAM, "gram.refresh_period=2", "dino.koleo_loss_weight=0", "ibot.loss_weight=0"]
    run_train(tmp_path / "one", *words, "train.accumulate_steps=2")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "dinov2/train/train.py"]
    result = run_script(*launcher, "--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path / "two"), *words)
    assert result.returncode == 0, result.stderr
    one, two = tensors(tmp_path / "one", 7), tensors(tmp_path / "two", 7)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3)


def test_local_crops_may_count_less() -> None:
    torch.manual_seed(0)
    full, half = build_arch(tiny_config(GRAM[1])), build_arch(tiny_config(GRAM[1], "dino.local_crops_loss_weight=0.5"))
    half.load_state_dict(full.state_dict())
    batch = random_batch()
    one, other = (model(batch, full.targets([batch], 0.05)[0])[0] for model in (full, half))
    assert other.terms["dino_local_crops_loss"].item() == pytest.approx(one.terms["dino_local_crops_loss"].item() / 2)
    assert other.terms["dino_global_crops_loss"].item() == pytest.approx(one.terms["dino_global_crops_loss"].item())


def test_the_anchor_and_its_stage_stay_the_same_when_resuming(tmp_path: Path) -> None:
    run_train(tmp_path / "first", "optim.epochs=2")
    words = [f"init_from={tmp_path / 'first'}", GRAM[1], "optim.epochs=2"]
    anchored = [*words, GRAM[0], f"gram.teacher={tmp_path / 'first'}:1"]
    run_train(tmp_path / "out", *anchored)
    for changed, message in (
        (
            [*anchored[:-1], f"gram.teacher={tmp_path / 'first'}:3"],
            "trained with gram.teacher = .*first:1, not .*first:3",
        ),
        (words, "trained with gram.loss_weight = 2.0, not 0.0, and cannot go on with that"),
    ):
        with pytest.raises(ValueError, match=message):
            run_train(tmp_path / "out", *changed, "optim.epochs=3")
    with pytest.raises(ValueError, match="trained with gram.loss_weight = 0.0, not 2.0"):
        run_train(tmp_path / "first", *anchored, "optim.epochs=3")


def test_an_anchor_of_other_heads_or_pixels_is_refused(tmp_path: Path) -> None:
    run_train(tmp_path / "first", "optim.epochs=1")
    for setting, message in (
        ("student.num_heads=4", "has student.num_heads = 2, but this run has 4: another network"),
        ("augmentation.mean=[0.1,0.1,0.1]", "has augmentation.mean = .*: both see the same normalized pixels"),
    ):
        with pytest.raises(ValueError, match=f"gram.teacher: .*{message}"):
            run_train(tmp_path / "second", f"gram.teacher={tmp_path / 'first'}", *GRAM, setting)


def test_copies_of_the_teacher_are_logged_and_planned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run_train(tmp_path, *GRAM, "gram.start_step=1", "gram.teacher_step=1", "gram.refresh_period=2", "optim.epochs=2")
    assert "Gram anchoring: weight 2 from step 1; anchor: the teacher of this run before step 1, 3" in caplog.text
    found = [text for text in caplog.messages if "the Gram teacher is the teacher of this run now" in text]
    assert [text.split(":")[0] for text in found] == ["step 1", "step 3"]
