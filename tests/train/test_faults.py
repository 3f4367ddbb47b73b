"""What goes wrong on real machines: a run is killed, the disk is full, losses are not finite, images are broken."""

import itertools
import logging
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    all_in,
    assert_same_end,
    checkpoints,
    command_train,
    killed_after,
    metrics,
    random_batch,
    run_train,
    start_train,
    state,
    tensors,
    tiny_model,
    write_images,
)
from torch import nn

from dinov2.files import folder_lock
from dinov2.log import setup_logging
from dinov2.train import train
from dinov2.train.guards import BadImageGuard, NonFiniteGuard
from dinov2.train.optim import build_optimizer
from dinov2.train.ssl_meta_arch import Losses, SSLMetaArch
from dinov2.train.train import clip_and_step

LAST = 7
LARGE = "dino.head_n_prototypes=4000"  # a checkpoint of 2 MB, which takes a while to write


# --- Killed ----------------------------------------------------------------------------------------------------------


def kill_when(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """SIGKILL as soon as the condition holds, which must be before the process ends by itself."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "killed, not ended"


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    folder = killed / "checkpoints"
    run_train(straight, LARGE)

    moments: list[tuple[str, Callable[[], object]]] = [
        ("while it writes its first checkpoint", lambda: list(folder.glob("*.unfinished/*"))),
        ("while it trains", lambda: len((killed / "training_metrics.json").read_text().splitlines()) >= 3),
        (
            "while it writes another one",
            lambda: checkpoints(killed) and list(folder.glob("*05.unfinished/__0_0.distcp")),
        ),
    ]
    for _, moment in moments:
        kill_when(start_train(killed, LARGE), moment)
    assert list(folder.glob("*.unfinished")), "the last kill came in the middle of a write"
    result = command_train(killed, LARGE)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout and "finished iteration 3" in result.stdout
    assert_same_end(killed, straight, LAST)
    assert checkpoints(killed) == [3, 5, 7], "and nothing unfinished"


# --- Disk full -------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(mount_point: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of a given size; yields a function that gives it another size."""
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(mount_point)], check=True)
    finally:
        setup_logging()  # closes the log file there
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_a_full_disk_is_named_and_with_more_space_the_run_continues(tmp_path: Path) -> None:
    run_train(tmp_path / "straight", LARGE)
    with small_disk(tmp_path / "disk", "3m") as resize:  # holds one checkpoint
        out = tmp_path / "disk" / "out"
        message = (
            r"could not write the checkpoint of iteration 3 to .*model_0000003: .*No space left on device.*"
            r"Last complete checkpoint: .*model_0000001\. Run the same command again"
        )
        for _ in range(2):  # the second time there is no more space than before
            with pytest.raises(OSError, match=message):
                run_train(out, LARGE)
            assert checkpoints(out) == [1], "what was written of the other one is gone"
        resize("64m")
        run_train(out, LARGE)
        assert_same_end(out, tmp_path / "straight", LAST)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing more bytes than that to a file fails in here."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_does_not_fit_is_named_also_without_one_before(tmp_path: Path) -> None:
    message = r"iteration 1 to .*model_0000001: .*File too large.*Last complete checkpoint: none"
    with files_up_to(100_000), pytest.raises(OSError, match=message):
        run_train(tmp_path, "evaluation.eval_period_iterations=0")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    run_train(tmp_path / "straight")
    run_train(tmp_path)
    assert_same_end(tmp_path, tmp_path / "straight", LAST)


def test_a_teacher_that_cannot_be_written_is_named_and_leaves_no_half_file(tmp_path: Path) -> None:
    settings = ["evaluation.eval_period_iterations=1", "train.checkpoint_period=8"]
    with (
        files_up_to(100_000),
        pytest.raises(OSError, match=r"could not write the teacher to .*training_0/teacher_check.*File too large"),
    ):
        run_train(tmp_path, *settings)
    assert list((tmp_path / "eval" / "training_0").iterdir()) == []


@pytest.mark.parametrize("file", ["config.yaml", "training_metrics.json"])
def test_other_files_that_cannot_be_written_are_named_and_the_run_continues(file: str, tmp_path: Path) -> None:
    run_train(tmp_path / "straight")
    size = {"config.yaml": 1000, "training_metrics.json": 5000}[file]  # of 3500 and 20,000 bytes
    settings = ["train.checkpoint_period=100", "evaluation.eval_period_iterations=0", "optim.epochs=20"]
    with files_up_to(size), pytest.raises(OSError, match=f"cannot write.*: File too large: .*{file}"):
        run_train(tmp_path, *settings)
    run_train(tmp_path)
    assert_same_end(tmp_path, tmp_path / "straight", LAST)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_an_exit_status_for_the_user(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    result = command_train(tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: could not write the checkpoint of iteration 1 to ")
    assert "Traceback" in (tmp_path / "logs" / "log.txt").read_text(), "for whoever has to find out more"


# --- Not finite ------------------------------------------------------------------------------------------------------

BLINDING = "augmentation.std=[1.0e-44,1.0e-44,1.0e-44]"  # pixels become infinite
NAN = float("nan")


def test_losses_that_are_not_finite_stop_the_run_and_harm_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train(tmp_path / "straight")
    with killed_after(4, monkeypatch):
        run_train(tmp_path, "train.checkpoint_period=4")
    before = tensors(tmp_path, 3)
    with pytest.raises(
        FloatingPointError, match=r"^3 steps in a row were not finite \(loss dino_local_crops_loss, .*lr"
    ):
        run_train(tmp_path, BLINDING, "train.checkpoint_period=4")
    assert checkpoints(tmp_path) == [3]
    assert all(torch.equal(value, before[name]) for name, value in tensors(tmp_path, 3).items())
    run_train(tmp_path)
    assert_same_end(tmp_path, tmp_path / "straight", LAST)


def test_refused_steps_push_no_checkpoint_out_and_are_no_losses_of_zero(tmp_path: Path) -> None:
    settings = ["train.checkpoint_period=1", "train.log_period=1", "train.max_nonfinite_steps=8"]
    with pytest.raises(FloatingPointError, match="8 steps in a row"):
        run_train(tmp_path, *settings, BLINDING, "optim.epochs=20", "evaluation.eval_period_iterations=0")
    assert checkpoints(tmp_path) == [0], "from before the first refusal was known"
    lines = metrics(tmp_path)
    assert len(lines) == 8 and not any("total_loss" in line for line in lines)


def test_a_checkpoint_that_is_due_among_refused_steps_comes_with_the_next_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = SSLMetaArch.losses
    num_steps = itertools.count()

    def losses(self: SSLMetaArch, *args: Any) -> Losses:
        found = genuine(self, *args)
        factor = NAN if next(num_steps) in (2, 3) else 1.0
        return Losses(found.total * factor, {name: value * factor for name, value in found.terms.items()}, {})

    monkeypatch.setattr(SSLMetaArch, "losses", losses)
    run_train(tmp_path, "train.checkpoint_period=4", "train.checkpoint_keep=9", "optim.epochs=4")
    assert checkpoints(tmp_path) == [5, 7], "due after step 3; that step 4 was good is known after step 5"


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_refused_steps_leave_student_moments_and_centers_as_they_are(
    centering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2.train.training_run.check_step_zero", lambda *_: "")  # which refuses blind networks
    settings = ["optim.epochs=2", f"train.centering={centering}"]
    run_train(tmp_path / "good", *settings)
    weights = tmp_path / "good" / "checkpoints" / "model_0000003"
    run_train(tmp_path / "bad", *settings, f"MODEL.WEIGHTS={weights}", BLINDING, "train.max_nonfinite_steps=5")
    good, bad = tensors(tmp_path / "good", 3), tensors(tmp_path / "bad", 3)
    moments = [name for name in bad if name.startswith("optimizer.")]
    assert moments and not any(bad[name].any() for name in moments), "not even the count of steps"
    averaged = {name for name in good if name.startswith("model.teacher.")}  # the teacher goes on following the student
    assert [name for name in good.keys() - moments - averaged if not torch.equal(bad[name], good[name])] == []
    for name in averaged:
        student = good[name.replace("teacher", "student")]
        assert ((bad[name] - student).abs() <= (good[name] - student).abs() + 1e-6).all()


@pytest.fixture
def student() -> nn.ModuleDict:
    return tiny_model().student


def take_step(student: nn.ModuleDict, total: torch.Tensor, guard: NonFiniteGuard, scale: float | None = None) -> bool:
    """The part of a training step that the losses lead to; whether it moved any weight."""
    before = snapshot(student)
    optimizer = build_optimizer(student, betas=(0.9, 0.99), lr_decay_rate=1.0, patch_embed_lr_mult=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    terms = {"koleo_loss": torch.ones(()), "ibot_loss": total}
    student.zero_grad()
    scaler.scale(total).backward()
    clip_and_step(Losses(total, terms, terms).detach(), student, optimizer, scaler, 3.0, guard)
    guard.report(scaler, all_steps=True)
    return not torch.equal(snapshot(student), before)


def snapshot(student: nn.ModuleDict) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in student.parameters()]).clone()


def sum_of(student: nn.ModuleDict) -> torch.Tensor:
    return torch.stack([param.sum() for param in student.parameters()]).sum()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_bad_loss_moves_no_weight_and_is_named(
    value: float, student: nn.ModuleDict, caplog: pytest.LogCaptureFixture
) -> None:
    assert not take_step(student, sum_of(student) * 0 + value, NonFiniteGuard(3))
    assert caplog.messages == ["step skipped, not finite: loss ibot_loss (1 in a row)"]


def test_a_bad_gradient_of_a_good_loss_moves_no_weight_and_is_named(
    student: nn.ModuleDict, caplog: pytest.LogCaptureFixture
) -> None:
    total = (student["dino_head"].last_layer.weight_v.sum() * 0).sqrt() + sum_of(student)  # the slope of a root at 0
    assert total.isfinite()
    assert not take_step(student, total, NonFiniteGuard(3))
    assert caplog.messages == ["step skipped, not finite: gradient of dino_head (1 in a row)"]


def test_only_steps_in_a_row_count(student: nn.ModuleDict) -> None:
    guard = NonFiniteGuard(3)
    for _ in range(3):
        for value in (NAN, NAN, 0.0):
            assert take_step(student, sum_of(student) + value, guard) == (value == 0.0)
    take_step(student, sum_of(student) + NAN, guard)
    take_step(student, sum_of(student) + NAN, guard)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .*\(loss ibot_loss\).*train.max_nonfinite_steps=3"):
        take_step(student, sum_of(student) + NAN, guard)


def test_an_overflow_of_the_gradient_scaler_does_not_count_unless_it_has_no_scale_left(student: nn.ModuleDict) -> None:
    def overflow() -> torch.Tensor:
        return (student["dino_head"].last_layer.weight_v.sum() * 0).sqrt()

    guard = NonFiniteGuard(2)
    for _ in range(5):
        assert not take_step(student, overflow(), guard, scale=1024.0)
    assert not take_step(student, overflow(), guard, scale=1.0)
    with pytest.raises(FloatingPointError, match="gradient of dino_head"):
        take_step(student, overflow(), guard, scale=0.5)
    assert take_step(student, sum_of(student), NonFiniteGuard(2), scale=1024.0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_on_the_cpu(dtype: str, tmp_path: Path) -> None:
    settings = ["optim.epochs=8", "train.batch_size_per_gpu=8", *all_in(dtype)]
    run_train(tmp_path, *settings)
    losses = [line["total_loss"] for line in metrics(tmp_path)]
    assert all(loss > 0 for loss in losses) and min(losses[8:]) < losses[0]
    scaler = state(tmp_path, 15)["scaler"]
    assert (scaler == {}) if dtype == "bf16" else (1 < scaler["scale"] <= 65536)
    final = tensors(tmp_path, 15)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in final.values())
    start = tiny_model(*settings).state_dict()  # with the seed of the run
    assert any(not torch.equal(final[f"model.{name}"], value) for name, value in start.items())


# --- Broken images ---------------------------------------------------------------------------------------------------

FOLDER = ["crops.local_crops_number=0", "train.batch_size_per_gpu=20", "optim.epochs=6", "train.checkpoint_period=20"]


def images(folder: Path, num_broken: int) -> str:
    """40 images of which some are broken, as a dataset string."""
    for path in sorted(write_images(folder, 40).iterdir())[:num_broken]:
        path.write_bytes(path.read_bytes()[:60])
    return f"train.dataset_path=ImageFolder:root={folder}"


def test_a_few_broken_images_are_replaced_named_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = images(tmp_path / "images", num_broken=1)
    with caplog.at_level(logging.WARNING, "dinov2"):
        run_train(tmp_path / "out", dataset, *FOLDER, "train.max_bad_image_share=0.1")
    assert checkpoints(tmp_path / "out") == [11]
    warnings = [message for message in caplog.messages if message.startswith("unreadable image")]
    assert len(warnings) == 1, "though it came up in every second of 12 batches"
    assert warnings[0].startswith("unreadable image replaced by another (1 of ")
    assert f"drawn): {tmp_path / 'images' / '000.png'}: " in warnings[0] and "decode" in warnings[0]


def test_files_that_are_no_images_are_announced_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = images(tmp_path / "images", num_broken=0)
    (tmp_path / "images" / "notes.png").write_text("no image")
    run_train(tmp_path / "out", dataset, *FOLDER, "train.max_bad_image_share=0.01", "optim.epochs=1")
    [warning] = [message for message in caplog.messages if "once the share of such" in message]
    assert warning.startswith("1 of ") and warning.endswith("is above train.max_bad_image_share=0.01")


def test_too_many_broken_images_stop_the_run(tmp_path: Path) -> None:
    dataset = images(tmp_path / "images", num_broken=6)
    message = r"\d+ of the first \d+ images drawn \([1-6] different\) could not be read, more than train.max_bad_image_"
    with pytest.raises(OSError, match=message):
        run_train(tmp_path / "out", dataset, *FOLDER, "train.max_bad_image_share=0.1")


def test_nothing_but_broken_images_is_an_error_at_once(tmp_path: Path) -> None:
    dataset = images(tmp_path / "images", num_broken=40)
    with pytest.raises(OSError, match=r"20 images in a row cannot be read: .*\.png"):
        run_train(tmp_path / "out", dataset, *FOLDER)


def test_a_share_means_nothing_before_some_images_are_seen() -> None:
    guard = BadImageGuard(0.01)
    batch = random_batch(num_images=4)
    guard.check([batch._replace(bad_images=("a.png: truncated", "b.png: truncated"))])
    for _ in range(48):
        guard.check([batch])
    with pytest.raises(OSError, match=r"3 of the first 203 images .*the last one was c.png: truncated"):
        guard.check([batch._replace(bad_images=("c.png: truncated",))])


def test_masses_of_broken_images_are_named_up_to_a_limit_and_then_counted(caplog: pytest.LogCaptureFixture) -> None:
    guard = BadImageGuard(1.0)
    batch = random_batch(num_images=4)
    for number in range(1000):
        guard.check([batch._replace(bad_images=(f"{number}.png: 0 bytes", "always.png: 0 bytes"))])
    one_by_one = [message for message in caplog.messages if "latest" not in message]
    assert len(one_by_one) == guard.MAX_LINES and sum("always.png" in message for message in one_by_one) == 1
    assert 3 <= len(caplog.messages) - len(one_by_one) <= 8
    assert "(1600 of 4800 drawn)" in caplog.messages[-1] and "799.png: 0 bytes" in caplog.messages[-1]


# --- Two runs in one folder ------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_until_the_other_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "folder_lock", partial(folder_lock, patience=0.3))
    with start_train(tmp_path, "optim.epochs=100000", "train.checkpoint_period=2", "train.num_workers=1") as other:
        while not checkpoints(tmp_path):
            assert other.poll() is None, other.communicate()
            time.sleep(0.01)
        with pytest.raises(OSError, match=rf"{tmp_path} is in use by another run: process {other.pid} on "):
            run_train(tmp_path)
        assert sum(f"in use by process {other.pid} on " in message for message in caplog.messages) == 1, "waiting"
        with monkeypatch.context() as patch:  # a job that was requeued is let in: its former lock may have outlived it
            patch.setenv("SLURM_JOB_ID", "7")
            (tmp_path / ".lock").write_text("process 1 on a crashed machine, SLURM job 7\n")
            with folder_lock(tmp_path, patience=0.3):
                pass
        other.kill()
        other.communicate()
    run_train(tmp_path, f"optim.epochs={checkpoints(tmp_path)[-1] // 2 + 2}")
