"""A signal ends a run after the step, with a checkpoint; checkpoints are written while training goes on."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import assert_same_end, checkpoints, metrics, run_train

from dinov2 import distributed
from dinov2.data import workers
from dinov2.data.datasets.fashion_mnist import FashionMNIST
from dinov2.train import interruption, train
from dinov2.train.interruption import SIGNALS, Interruption

RARELY = "train.checkpoint_period=1000"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("straight")
    run_train(output_dir)
    return output_dir


@contextmanager
def signalled_in(step: int, signum: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> Iterator[None]:
    """The run in here gets a signal in the middle of a step."""
    clip_and_step, calls = train.clip_and_step, itertools.count()

    def shoot(*args: Any) -> bool:
        if next(calls) == step:
            for _ in range(times):
                signal.raise_signal(signum)
        return clip_and_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_and_step", shoot)
        yield


@pytest.mark.parametrize(
    ("signum", "error"),
    [(signal.SIGTERM, SystemExit), (signal.SIGUSR2, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_costs_nothing(
    signum: int, error: type[BaseException], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with signalled_in(3, signum, monkeypatch), pytest.raises(error) as stop:
        run_train(tmp_path, RARELY)
    if error is SystemExit:
        assert stop.value.code == 128 + signum
    assert checkpoints(tmp_path) == [3], "of the step in which it came, though none was due"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, 7)


def test_who_handled_the_signal_before_gets_it_when_all_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So submitit requeues a job, and its handler ends the process."""

    def requeue(signum: int, frame: object) -> None:
        assert signum == signal.SIGUSR2 and checkpoints(tmp_path) == [2]
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with signalled_in(2, signal.SIGUSR2, monkeypatch), pytest.raises(SystemExit) as stop:
            run_train(tmp_path, RARELY)
        assert stop.value.code == -1
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "REPEATS", 0.0)
    with signalled_in(1, signal.SIGINT, monkeypatch, times=2), pytest.raises(KeyboardInterrupt):
        run_train(tmp_path, RARELY)
    assert checkpoints(tmp_path) == [] and len(metrics(tmp_path)) == 1


def test_one_that_comes_twice_at_once_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with signalled_in(1, signal.SIGINT, monkeypatch, times=2), pytest.raises(KeyboardInterrupt):
        run_train(tmp_path, RARELY)
    assert checkpoints(tmp_path) == [1]


@contextmanager
def images_that_stop_coming(after: int, signum: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading hangs from an image on, as on a network drive that does not answer; then comes a signal."""
    original, count = FashionMNIST.open_image, itertools.count()

    def hang(self: FashionMNIST, index: int) -> Any:
        if next(count) >= after:
            threading.Timer(0.3, os.kill, (os.getpid(), signum)).start()
            os.read(os.pipe()[0], 1)
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(FashionMNIST, "open_image", hang)
        patch.setattr(interruption, "GRACE", 0.2)
        patch.setattr(workers, "FIRST_CHECK", 0.2)
        patch.setattr(workers, "CHECK_PERIOD", 0.1)
        yield


NO_PROBE = "health.period=0"


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_no_images_come_ends_the_run_with_a_checkpoint(
    signum: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train(tmp_path / "straight", NO_PROBE)
    with images_that_stop_coming(3 * 4 + 1, signum, monkeypatch), pytest.raises(error):
        run_train(tmp_path / "run", NO_PROBE, RARELY)
    assert checkpoints(tmp_path / "run") == [2], "of the last finished step"
    run_train(tmp_path / "run", NO_PROBE)
    assert_same_end(tmp_path / "run", tmp_path / "straight", 7)


@pytest.mark.parametrize("num_images", [1, 2 * 4 + 1])
def test_a_signal_while_no_images_come_writes_no_checkpoint_twice(
    num_images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with images_that_stop_coming(num_images, signal.SIGTERM, monkeypatch), pytest.raises(SystemExit) as stop:
        run_train(tmp_path, NO_PROBE)
    assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == ([1] if num_images > 8 else [])


def test_missing_images_end_the_run_with_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        r"no batch of images arrived for train.data_timeout=1 seconds: this process is reading sample \d+ \(Fashion"
    )
    with (
        images_that_stop_coming(9, signal.SIGURG, monkeypatch),
        pytest.raises(OSError, match=message),
    ):
        run_train(tmp_path, NO_PROBE, "train.data_timeout=1")
    assert checkpoints(tmp_path) == [1]


def test_nothing_is_requested_without_a_signal() -> None:
    with Interruption() as stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    all_reduce_max = distributed.all_reduce_max

    def signalled_meanwhile(value: torch.Tensor) -> torch.Tensor:
        agreed = all_reduce_max(value)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR2)
        return agreed

    monkeypatch.setattr(distributed, "all_reduce_max", signalled_meanwhile)
    with Interruption() as stop:
        assert not stop.requested(), "the others do not know yet"
        assert stop.requested()


def test_ctrl_c_that_another_process_got_first_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interruption() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "all_reduce_max", lambda value: torch.tensor(int(signal.SIGINT)))
            assert stop.requested()
        signal.raise_signal(signal.SIGINT)  # here it comes later, while the checkpoint is being written


def test_training_continues_while_a_checkpoint_is_written_which_appears_when_complete(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_is_slow, seen_while_writing = threading.Event(), []
    write_data, clip_and_step = dcp.FileSystemWriter.write_data, train.clip_and_step

    def slowly(*args: Any) -> Any:
        assert disk_is_slow.wait(60)
        return write_data(*args)

    def spy(*args: Any) -> bool:
        if (tmp_path / "checkpoints").exists():
            seen_while_writing.append(checkpoints(tmp_path))
            if len(seen_while_writing) == 2:
                disk_is_slow.set()
        return clip_and_step(*args)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", slowly)
    monkeypatch.setattr(train, "clip_and_step", spy)
    run_train(tmp_path)
    assert seen_while_writing[:2] == [[], []], "two more steps were taken meanwhile"
    assert_same_end(tmp_path, straight, 7)
    (tmp_path / "checkpoints" / "model_0000007").rename(tmp_path / "last")
    monkeypatch.undo()
    run_train(tmp_path)
    assert_same_end(tmp_path, straight, 7)


def test_a_disk_that_fills_up_during_training_stops_the_run_with_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data, calls = dcp.FileSystemWriter.write_data, itertools.count()

    def full(*args: Any) -> Any:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return write_data(*args)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(
        OSError, match=r"checkpoint of iteration 3 .*No space left.*complete checkpoint: .*model_0000001"
    ):
        run_train(tmp_path)
    assert checkpoints(tmp_path) == [1] and not list(tmp_path.glob("checkpoints/*.unfinished"))
