"""A backbone that starts from weights is frozen while new heads learn, then its learning rate rises to theirs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assert_same_end, killed_after, metrics, run_train, tensors, tiny_config

from dinov2.train.schedules import backbone_ramp, build_schedules

LAST = 7  # of tiny.yaml: 8 steps, a checkpoint after every second one
FROZEN = ["optim.freeze_backbone_steps=3", "optim.backbone_warmup_steps=3", "train.checkpoint_period=1"]


def test_the_ramp_begins_after_the_frozen_steps_and_ends_at_one() -> None:
    assert backbone_ramp(9, 3, 3).tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert backbone_ramp(4, 2, 0).tolist() == [0, 0, 1, 1]
    assert backbone_ramp(3, 0, 1).tolist() == [0.5, 1, 1]
    assert backbone_ramp(3, 0, 0).tolist() == [1, 1, 1], "by default the rate is that of the release"
    assert backbone_ramp(3, 9, 9).tolist() == [0, 0, 0]


def test_the_rate_of_the_backbone_is_that_of_the_heads_times_the_ramp() -> None:
    schedules = build_schedules(tiny_config(*FROZEN), 0.5)
    ramp = np.array([0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert schedules.backbone_lr.schedule == pytest.approx(schedules.lr.schedule * ramp)
    assert schedules.last_layer_lr[0] == schedules.lr[0], "the heads are not affected"


def changed(output_dir: Path, first: int, second: int) -> set[str]:
    """Names of the student's tensors that differ between two checkpoints of a run."""
    before, after = (tensors(output_dir, step) for step in (first, second))
    return {name for name in before if name.startswith("model.student.") and not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("choice", "learning"),
    [
        ("none", set()),
        ("patch_embed", {"patch_embed.proj.weight", "patch_embed.proj.bias"}),
        ("patch_embed_and_registers", {"patch_embed.proj.weight", "patch_embed.proj.bias", "register_tokens"}),
    ],
)
def test_only_heads_and_the_chosen_parts_learn_while_the_backbone_is_frozen(
    choice: str, learning: set[str], tmp_path: Path
) -> None:
    settings = [*FROZEN, "train.checkpoint_keep=9", "student.num_register_tokens=2", "optim.warmup_epochs=0"]
    run_train(tmp_path, *settings, f"optim.freeze_backbone_except={choice}")
    frozen, free = changed(tmp_path, 0, 2), changed(tmp_path, 2, 3)
    assert {name.removeprefix("model.student.backbone.") for name in frozen if ".backbone." in name} == learning
    assert any(".dino_head." in name for name in frozen)
    assert len([name for name in free if ".backbone." in name]) > 20, "the first step after them moves everything"
    rates = [record["backbone_lr"] for record in metrics(tmp_path)]
    assert rates[0] == 0, "a median of steps, as for the other rates"


@pytest.mark.parametrize("num_steps", [2, 3, 4, 6])  # inside the frozen steps, at their end, in the ramp, at its end
def test_a_run_resumes_exactly_inside_and_at_the_borders_of_both(
    num_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train(tmp_path / "straight", *FROZEN)
    with killed_after(num_steps, monkeypatch):
        run_train(tmp_path / "resumed", *FROZEN)
    run_train(tmp_path / "resumed", *FROZEN)
    assert_same_end(tmp_path / "resumed", tmp_path / "straight", LAST)
