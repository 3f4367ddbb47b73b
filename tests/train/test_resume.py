"""Exact resume: a run that was interrupted anywhere ends as if it had not been, to the last bit."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CENTERING,
    SEPARATE_HEADS,
    Killed,
    all_in,
    assert_same_end,
    checkpoints,
    killed_after,
    metrics,
    run_train,
    tensors,
    tiny_model,
    without_privileges,
    write_images,
)

from dinov2 import config
from dinov2.metrics_file import truncate_metrics
from dinov2.train.checkpoint import _LastingStager
from dinov2.train.environment import ENVIRONMENT_FILE, read_environment

LAST = 7  # of tiny.yaml: 8 steps, a checkpoint after every second one


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("straight")
    run_train(output_dir)
    return output_dir


# --- Interrupted runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5])  # before the first checkpoint, just after one, between two
def test_an_interrupted_run_ends_as_the_undisturbed_one(
    num_steps: int, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(num_steps, monkeypatch):
        run_train(tmp_path)
    assert checkpoints(tmp_path) == list(range(1, num_steps, 2))
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, LAST)
    dumps = [torch.load(out / "eval/training_7/teacher_checkpoint.pth")["teacher"] for out in (tmp_path, straight)]
    assert all(torch.equal(dumps[0][name], dumps[1][name]) for name in dumps[1])


@pytest.mark.parametrize(
    "settings",
    [
        [CENTERING, *SEPARATE_HEADS],
        [*all_in("bf16"), "crops.local_crops_number=0"],
        all_in("fp16"),
        ["train.sampler=SHARDED_INFINITE", "train.batch_size_per_gpu=7", "student.num_register_tokens=2"],
        ["train.sampler=EPOCH", "dino.loss_weight=0", "train.log_period=3", "optim.freeze_last_layer_epochs=3"],
    ],
    ids=["centering", "bf16", "fp16", "sharded", "epochs"],
)
def test_so_it_does_with_other_settings(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_train(tmp_path / "straight", *settings)
    with killed_after(5, monkeypatch):
        run_train(tmp_path / "resumed", *settings)
    run_train(tmp_path / "resumed", *settings)
    assert_same_end(tmp_path / "resumed", tmp_path / "straight", LAST)


def test_the_number_of_workers_does_not_matter_and_may_change(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(3, monkeypatch):
        run_train(tmp_path, "train.num_workers=2")
    with killed_after(2, monkeypatch):  # of the second start
        run_train(tmp_path, "train.num_workers=1")
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, LAST)


def test_lines_of_lost_steps_and_torn_lines_leave_the_metrics(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(5, monkeypatch):
        run_train(tmp_path)
    path = tmp_path / "training_metrics.json"
    assert [line["iteration"] for line in metrics(tmp_path)] == [0, 1, 2, 3, 4], "of which the checkpoint knows 3"
    with path.open("a") as file:
        file.write('{"iteration": 5, "iter_ti')
    run_train(tmp_path)
    assert metrics(tmp_path) == metrics(straight)


def test_what_an_interrupted_write_left_is_ignored_and_removed(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(3, monkeypatch):
        run_train(tmp_path)
    unfinished = tmp_path / "checkpoints" / "model_0000003.unfinished"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half a checkpoint")
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, LAST)
    assert checkpoints(tmp_path) == [3, 5, 7]


def test_a_checkpoint_gets_its_name_when_it_is_whole(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name.startswith("model_"):
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", killed)
        run_train(tmp_path)
    assert checkpoints(tmp_path) == []
    (unfinished,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(path.name for path in unfinished.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "checksums.json",
        "state.json",
    ]
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, LAST)


def test_copies_of_tensors_reuse_their_memory_also_when_torch_closes_the_stager_after_each_checkpoint() -> None:
    stager, weight = _LastingStager(), torch.nn.Parameter(torch.arange(4.0))
    first = stager.stage({"weight": weight})["weight"]
    stager._state_dict_stager.close()  # as torch 2.11 does after each use; its own raises KeyError after that
    weight.data += 1
    second = stager.stage({"weight": weight})["weight"]
    assert torch.equal(second, weight) and second.data_ptr() == first.data_ptr() != weight.data_ptr()


# --- Finished runs, new runs -----------------------------------------------------------------------------------------


def contents(output_dir: Path) -> dict[Path, bytes]:
    """All files but the log."""
    files = (path for path in output_dir.rglob("*") if path.is_file() and path.parent.name != "logs")
    return {path: path.read_bytes() for path in files}


def test_a_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    run_train(tmp_path)
    before = contents(tmp_path)
    run_train(tmp_path)
    assert contents(tmp_path) == before


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=2")
    run_train(tmp_path)
    assert [line["iteration"] for line in metrics(tmp_path)] == list(range(8))
    assert checkpoints(tmp_path)[-1] == LAST


def test_no_resume_starts_anew_and_neither_continues_nor_loses_the_former_run(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train(tmp_path, "train.seed=1")
    former = contents(tmp_path / "checkpoints")
    with killed_after(3, monkeypatch):
        run_train(tmp_path, "--no-resume")
    run_train(tmp_path)  # as a requeued job does: from the checkpoint of the new run, not from the later, former one
    assert_same_end(tmp_path, straight, LAST)
    archive_run = tmp_path / "earlier.1" / "checkpoints"
    assert list(contents(archive_run).values()) == list(former.values())
    run_train(tmp_path, "--no-resume", "optim.epochs=1")
    assert checkpoints(tmp_path) == [1] and (tmp_path / "earlier.2" / "checkpoints").is_dir()


def test_a_mistake_in_the_data_set_harms_no_run_not_even_with_no_resume(tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=1")
    before = contents(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder /nowhere"):
        run_train(tmp_path, "--no-resume", "train.dataset_path=ImageFolder:root=/nowhere")
    assert contents(tmp_path) == before


def test_no_resume_in_a_new_folder_sets_nothing_aside(straight: Path, tmp_path: Path) -> None:
    run_train(tmp_path, "--no-resume")
    assert_same_end(tmp_path, straight, LAST)
    assert not list(tmp_path.glob("checkpoints.*"))


# --- Retention -------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_those_at_multiples_stay_also_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["optim.epochs=9", "train.checkpoint_keep=2", "train.checkpoint_keep_every=6"]
    with killed_after(10, monkeypatch):
        run_train(tmp_path, *settings)
    assert checkpoints(tmp_path) == [5, 7, 9]
    run_train(tmp_path, *settings)
    assert checkpoints(tmp_path) == [5, 11, 15, 17]


def test_the_last_step_has_a_checkpoint_whatever_the_period(tmp_path: Path) -> None:
    run_train(tmp_path, "train.checkpoint_period=5")
    assert checkpoints(tmp_path) == [4, LAST]
    run_train(tmp_path / "default", "train.checkpoint_period=null")
    assert checkpoints(tmp_path / "default") == [5, LAST], "3 epochs of 2 steps"


# --- Checkpoints that cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("student.depth=3", "blocks.2"),
        ("student.depth=1", "tensors that this model does not have"),
        ("student.embed_dim=64", "Size mismatch"),
        ("student.num_register_tokens=1", "register_tokens"),
        ("dino.head_n_prototypes=17", "Size mismatch"),
        ("ibot.separate_head=true", "ibot"),
    ],
)
def test_another_architecture_is_a_clear_error_and_harms_nothing(
    change: str, reason: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(5, monkeypatch):
        run_train(tmp_path)
    before = contents(tmp_path)
    key, _, value = change.partition("=")
    named = f"--no-resume.* Settings there -> here: {key}: \\S+ -> {value.capitalize()}$"
    with pytest.raises(ValueError, match=f"(?s)cannot resume from .*model_0000003: .*{reason}.*{named}"):
        run_train(tmp_path, change)
    assert contents(tmp_path) == before, "the config of the run is still on record"
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, LAST)


def test_separate_heads_cannot_be_given_up(tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=1", *SEPARATE_HEADS)
    with pytest.raises(ValueError, match="tensors that this model does not have, such as .*ibot_head"):
        run_train(tmp_path)


def test_settings_that_change_no_tensor_may_change(tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=1")
    run_train(
        tmp_path, *all_in("fp16"), "optim.base_lr=0.001", "student.drop_path_rate=0.1", "train.batch_size_per_gpu=3"
    )
    assert config.load(tmp_path / "config.yaml").optim.base_lr == 0.001
    assert checkpoints(tmp_path)[-1] == LAST
    run_train(tmp_path, "optim.epochs=5")


def test_initial_weights_of_a_run_that_resumes_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    run_train(source, "optim.epochs=1")
    run_train(tmp_path / "own", "optim.epochs=1", f"init_from={source}")
    caplog.clear()
    run_train(tmp_path / "own", "optim.epochs=2", f"init_from={source}")
    assert not any("has no effect" in message for message in caplog.messages), "the run began from these"
    run_train(source, "optim.epochs=2", f"init_from={tmp_path / 'own'}", "init_from_optimizer=true")
    (warning,) = (message for message in caplog.messages if "has no effect" in message)
    assert warning.startswith(f"init_from={tmp_path / 'own'} has no effect") and "--no-resume" in warning
    assert config.load(source / "config.yaml").init_from == "", "the record has the weights that it began with"
    run_train(tmp_path / "own", "optim.epochs=3")
    assert config.load(tmp_path / "own" / "config.yaml").init_from == str(source)
    changed = [each["changed_settings"] for each in read_environment(tmp_path / "own" / ENVIRONMENT_FILE)]
    assert changed == [None, "optim.epochs: 1 -> 2", "optim.epochs: 2 -> 3"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1))


@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("file", ["state.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_a_clear_error(file: str, damage: Any, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "model_0000007" / file)
    with pytest.raises(
        ValueError, match="(?s)cannot resume from .*model_0000007: .*delete .*to continue from model_000000[35]"
    ):
        run_train(tmp_path)


def test_a_state_without_an_entry_is_damaged_too(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "model_0000007" / "state.json"
    state = json.loads(path.read_text())
    del state["scaler"]
    path.write_text(json.dumps(state))
    path.with_name("checksums.json").unlink()
    with pytest.raises(ValueError, match="cannot resume from .*model_0000007: .*lacks scaler"):
        run_train(tmp_path)


def test_when_it_is_deleted_the_run_continues_from_the_one_before(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(straight / "training_metrics.json", tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "model_0000007")
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, LAST)


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """No user may read a file or folder in here, not even root."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with without_privileges():
            yield
    finally:
        path.chmod(mode)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/model_0000005", "checkpoints/model_0000005/state.json"])
def test_a_run_that_cannot_read_its_checkpoint_folder_stops_and_changes_nothing(
    place: str, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoints/model_0000007")
    before = contents(tmp_path / "out")
    with pytest.raises(OSError, match=f"(?s)Permission denied: .*{place}"), unreadable(tmp_path / "out" / place):
        run_train(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_folder_of_checkpoints_on_a_disk_that_is_away_stops_the_run(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "out")
    (tmp_path / "out" / "checkpoints").rename(tmp_path / "disk")
    (tmp_path / "out" / "checkpoints").symlink_to(tmp_path / "away")
    with pytest.raises(OSError, match="a broken link: .*/out/checkpoints"):
        run_train(tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(straight)


def test_a_run_that_lost_its_checkpoints_begins_anew_and_keeps_its_metrics(
    straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()  # as where a disk is mounted at other times
    run_train(tmp_path, "optim.epochs=1")
    assert "there is no checkpoint in" in caplog.text and "go to step 7" in caplog.text
    kept = (tmp_path / "earlier.1" / "training_metrics.json").read_text()
    assert kept == (straight / "training_metrics.json").read_text()
    assert [line["iteration"] for line in metrics(tmp_path)] == [0, 1]


@pytest.mark.parametrize("what", ["finished", "teachers"])
def test_a_run_shorter_than_two_periods_that_lost_its_checkpoints_is_kept_too(what: str, tmp_path: Path) -> None:
    """Its last step, or its teachers, show that it had one; the period of the new command does not count."""
    run_train(tmp_path, "optim.epochs=2", "train.checkpoint_period=100")
    shutil.rmtree(tmp_path / "checkpoints")
    if what == "teachers":
        truncate_metrics(tmp_path / "training_metrics.json", 2)
    else:
        shutil.rmtree(tmp_path / "eval")
    before = contents(tmp_path / "eval") if what == "teachers" else {}
    run_train(tmp_path, "optim.epochs=1", "train.checkpoint_period=100")
    kept = contents(tmp_path / "earlier.1" / "eval") if what == "teachers" else {}
    assert list(kept.values()) == list(before.values())
    assert (tmp_path / "earlier.1" / "training_metrics.json").is_file()


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_not_set_aside(tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=2")
    for folder in ("checkpoints", "eval"):
        shutil.rmtree(tmp_path / folder)
    truncate_metrics(tmp_path / "training_metrics.json", 2)
    run_train(tmp_path, "optim.epochs=1")
    assert not list(tmp_path.glob("earlier.*"))


def test_a_shorter_length_than_what_is_done_changes_nothing(tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=2")
    before = contents(tmp_path)
    for words in ((), ("--dry-run",)):
        with pytest.raises(ValueError, match="has 4 steps already, more than the 2 of optim.epochs = 1 and"):
            run_train(tmp_path, "optim.epochs=1", *words)
    assert contents(tmp_path) == before


# --- What changed ----------------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture, start: str) -> list[str]:
    return [message for message in caplog.messages if message.startswith(start)]


def test_other_data_and_another_batch_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = f"train.dataset_path=ImageFolder:root={write_images(tmp_path / 'images', 6)}"
    run_train(tmp_path / "out", folder, "optim.epochs=2")
    run_train(tmp_path / "out", folder, "optim.epochs=3")
    warning = "resuming on other data or processes than before: "
    assert warnings_of(caplog, warning) == [], "the same images"
    (tmp_path / "images" / "000.png").rename(tmp_path / "images" / "1000.png")
    run_train(tmp_path / "out", folder, "optim.epochs=4")
    (message,) = warnings_of(caplog, warning)
    assert "hash of the names of its images" in message and "images of the dataset" not in message
    shutil.copy(tmp_path / "images" / "001.png", tmp_path / "images" / "more.png")
    run_train(tmp_path / "out", folder, "optim.epochs=5", "train.batch_size_per_gpu=3")
    message = warnings_of(caplog, warning)[-1]
    assert "images of a step: 4 -> 3; images of the dataset: 6 -> 7; hash of the names of its images" in message


def test_initial_weights_are_not_needed_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "backbone.pth"
    torch.save(tiny_model(seed=3).student["backbone"].state_dict(), weights)
    settings = (f"student.pretrained_weights={weights}", f"MODEL.WEIGHTS={tmp_path / 'whole'}")
    run_train(tmp_path / "whole", "optim.epochs=1")
    settings = (settings[0], f"MODEL.WEIGHTS={tmp_path / 'whole' / 'checkpoints' / 'model_0000001'}")
    run_train(tmp_path / "out", "optim.epochs=2", *settings)
    weights.unlink()
    shutil.rmtree(tmp_path / "whole")
    run_train(tmp_path / "out", "--dry-run", *settings)
    assert f"step 4: resumes {tmp_path / 'out/checkpoints/model_0000003'}" in capsys.readouterr().out
    run_train(tmp_path / "out", *settings)
    assert checkpoints(tmp_path / "out")[-1] == LAST
    with pytest.raises(FileNotFoundError, match="no weights at"):
        run_train(tmp_path / "out", "--no-resume", *settings)
    assert checkpoints(tmp_path / "out")[-1] == LAST, "a mistake sets nothing aside"


def test_what_killed_processes_were_writing_is_removed(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    for name in ("eval/training_3/.teacher_checkpoint.pth", "health/.images.npz", ".environment.json"):
        (tmp_path / f"{name}.4194300.unfinished").write_bytes(b"half of it")
    run_train(tmp_path)
    assert list(tmp_path.rglob("*.unfinished")) == []


# --- What a checkpoint is --------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_networks_centers_and_moments(straight: Path) -> None:
    names = set(tensors(straight, LAST))
    roots = {name.partition(".")[0] for name in names}
    assert roots == {"model", "optimizer"}
    assert {"model.dino_loss.center", "model.teacher.backbone.norm.weight"} < names
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert {f"optimizer.student.backbone.norm.weight.{moment}" for moment in moments} < names
    assert not any(name.startswith("optimizer.teacher") for name in names)
    assert tensors(straight, LAST)["optimizer.student.backbone.norm.weight.step"] == 8


def test_the_teacher_dump_has_the_published_layout(straight: Path) -> None:
    content = torch.load(straight / "eval" / "training_7" / "teacher_checkpoint.pth", weights_only=True)
    assert list(content) == ["teacher"]
    final = tensors(straight, LAST)
    assert {f"model.teacher.{name}" for name in content["teacher"]} == {
        name for name in final if name.startswith("model.teacher.")
    }
    for name, value in content["teacher"].items():
        assert value.device.type == "cpu" and torch.equal(value, final[f"model.teacher.{name}"])
    assert sorted(path.name for path in (straight / "eval").glob("training_*")) == ["training_3", "training_7"]


def test_the_metrics_have_the_published_keys(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "training_metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(8))
    losses = ["dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"]
    rates = ["lr", "wd", "mom", "last_layer_lr", "current_batch_size"]
    published = ["iteration", "iter_time", "data_time", *rates, "total_loss", *losses]
    assert list(lines[-1])[: len(published)] == published, "and ours after them"


def test_writing_a_checkpoint_does_not_warn_of_missing_process_groups(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run_train(tmp_path, "optim.epochs=1")
        run_train(tmp_path)
    about_settings = ("dinov2.train.train", "dinov2.train.training_run")  # short run; other settings than before
    assert [r.getMessage() for r in caplog.records if r.name not in about_settings] == []


def test_a_run_shorter_than_the_period_ends_with_its_teacher(tmp_path: Path) -> None:
    run_train(tmp_path, "evaluation.eval_period_iterations=1000")
    assert [path.parent.name for path in tmp_path.glob("eval/training_*/*.pth")] == [f"training_{LAST}"]


def test_resuming_with_other_settings_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_train(tmp_path, "optim.epochs=2")
    run_train(tmp_path, "optim.min_lr=1e-5")
    messages = [message for message in caplog.messages if message.startswith("resuming with other settings")]
    assert len(messages) == 1 and "optim.epochs: 2 -> 4" in messages[0] and "optim.min_lr: " in messages[0]
