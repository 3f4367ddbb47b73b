"""Data loading that fails does so with a sentence: workers killed, stopped or hanging, and a dataset's own errors."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dinov2.data import workers
from dinov2.data.images import BadImageError
from dinov2.data.workers import LoadingError, SupervisedLoader

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


class Acting(Dataset[int]):
    """Twenty numbers; on the way to sample 5 something is done."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index == 5:
            self.act()
        return index

    def describe(self, index: int) -> str:
        return f"/data/{index}.jpg"


def read(act: Callable[[], object], num_workers: int = 2, **settings: Any) -> list[list[int]]:
    loader = SupervisedLoader(Acting(act), batch_size=2, num_workers=num_workers, **settings)
    return [batch.tolist() for batch in loader]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits are checked at once, and leave neither an alarm nor a handler behind."""
    gc.collect()  # loaders of other tests, whose destructors would swallow the error of a wait
    monkeypatch.setattr(workers, "FIRST_CHECK", 0.1)
    monkeypatch.setattr(workers, "CHECK_PERIOD", 0.1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a plain DataLoader of another test leaves its handler
    alarm = signal.getsignal(signal.SIGALRM)
    yield
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGCHLD)) == (alarm, signal.SIG_DFL)
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0.0, "that of pytest-timeout is not periodic"


def kill_itself(signum: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), signum)


def hang() -> None:
    """Like reading from a FIFO without a writer: in a system call, which goes on after a signal."""
    os.read(os.pipe()[0], 1)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_without_faults_it_is_a_data_loader(num_workers: int) -> None:
    assert read(lambda: None, num_workers) == [[2 * i, 2 * i + 1] for i in range(10)]


def test_more_workers_than_cores_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    settings = {"num_workers": 4 * (os.cpu_count() or 1), "batch_size": 1}
    DataLoader(Acting(lambda: None), **settings)  # type: ignore[arg-type]
    assert "This DataLoader will create" in str(recwarn.pop(UserWarning).message), "torch still warns"
    loader = SupervisedLoader(Acting(lambda: None), **settings)
    iter(loader).close()  # type: ignore[attr-defined]
    assert not [each for each in recwarn if each.category is UserWarning]


@pytest.mark.parametrize(
    ("signum", "cause"),
    [
        (signal.SIGKILL, "too little memory"),
        (signal.SIGBUS, "--shm-size"),
        (signal.SIGSEGV, "A library crashed"),
        (signal.SIGUSR1, "or another program ended it"),
        (signal.SIGRTMIN + 6, "or another program ended it"),
    ],
)
def test_a_killed_worker_is_named_with_the_image_the_cause_and_what_to_change(signum: int, cause: str) -> None:
    name = signal.Signals(signum).name if signum < signal.SIGRTMIN else f"signal {signum}"
    with pytest.raises(
        LoadingError, match=rf"^data-loading worker \d .*killed by {name} while it read sample 5 \(/data/5.jpg\)"
    ) as caught:
        read(kill_itself(signum))
    assert cause in str(caught.value) and "\n" not in str(caught.value)


def test_a_worker_that_ends_by_itself_is_an_error() -> None:
    with pytest.raises(LoadingError, match=r"worker 0 .* exited with status 3 while it read sample 5"):
        read(lambda: os._exit(3), num_workers=1)


def test_a_worker_that_dies_while_the_process_does_other_things_is_an_error_of_the_next_batch() -> None:
    batches = iter(SupervisedLoader(Acting(lambda: None), batch_size=1, num_workers=1, prefetch_factor=1))
    next(batches)
    multiprocessing.active_children()[0].kill()
    time.sleep(0.2)
    with pytest.raises(LoadingError, match="killed by SIGKILL"):
        list(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_hang_ends_after_the_patience_and_names_the_image(num_workers: int) -> None:
    with pytest.raises(
        LoadingError, match=r"no batch of images arrived for some.key=0\.3 seconds.*sample 5 \(/data/5.jp"
    ):
        read(hang, num_workers, patience=0.3, patience_key="some.key")
    deadline = time.monotonic() + 5
    while multiprocessing.active_children():
        assert time.monotonic() < deadline, "the worker that hangs is killed"
        time.sleep(0.01)


def test_a_stopped_worker_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadingError, match=r"process \d+, stopped\)"):
        read(kill_itself(signal.SIGSTOP), num_workers=1, patience=0.5)


def test_code_that_survives_every_exception_does_not_survive_the_end_of_patience() -> None:
    def stubborn() -> None:
        while True:
            try:
                hang()
            except Exception:
                continue

    with pytest.raises(LoadingError, match="this process is reading sample 5"):
        read(stubborn, num_workers=0, patience=0.3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_whoever_waits_may_end_it(num_workers: int) -> None:
    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    with pytest.raises(Enough):
        read(hang, num_workers, while_waiting=enough)


def test_a_slow_batch_is_waited_for() -> None:
    assert len(read(lambda: time.sleep(0.5), num_workers=0)) == len(read(lambda: time.sleep(0.5), 1, patience=0)) == 10


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("x"), r"cannot load sample 5 \(/data/5.jpg\): KeyError: 'x'"),
        (ValueError("math domain"), r"cannot load sample 5 \(/data/5.jpg\): ValueError: math domain"),
        (MemoryError(), r"cannot load sample 5 \(/data/5.jpg\): MemoryError\. .*too little memory.*num_workers"),
        (BadImageError("cannot read x: it is empty", "x"), "cannot read x: it is empty"),
        (ZeroDivisionError("line 1\n\nline 2\n"), r"cannot load sample 5 \(.*: ZeroDivisionError: line 2"),
    ],
)
def test_errors_of_a_dataset_name_the_sample_in_one_line(error: Exception, message: str, num_workers: int) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(LoadingError, match=f"^{message}") as caught:
        read(fail, num_workers)
    assert "\n" not in str(caught.value)
    assert "in fail" in str(caught.value.__cause__), "the traceback is kept, for the log file"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_a_collate_function_are_distinguished(num_workers: int) -> None:
    def refuse(samples: list[int]) -> None:
        raise ValueError("not one can be read")

    def fail(samples: list[int]) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch>: No space left on device (28)")

    with pytest.raises(ValueError, match=r"^not one can be read$"):
        read(lambda: None, num_workers, collate_fn=refuse)
    with pytest.raises(LoadingError, match=r"cannot collate 2 images to a batch.*/dev/shm"):
        read(lambda: None, num_workers, collate_fn=fail)


def test_outside_of_the_main_thread_batches_come_too() -> None:
    found: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: found.extend([read(lambda: None, 0), read(lambda: None, 1)]))
    thread.start()
    thread.join()
    assert found[0] == found[1] and len(found[0]) == 10


def test_workers_that_stay_serve_several_epochs() -> None:
    loader = SupervisedLoader(Acting(lambda: None), batch_size=5, num_workers=1, persistent_workers=True)
    first, second = ([batch.tolist() for batch in loader] for _ in range(2))
    assert first == second
    loader.workers[0].kill()
    with pytest.raises(LoadingError, match="killed by SIGKILL"):
        [torch.as_tensor(batch) for batch in loader]


def test_the_handler_of_a_plain_loader_raises_no_errors_afterwards() -> None:
    assert sum(len(batch) for batch in DataLoader(range(8), batch_size=4, num_workers=1)) == 8  # type: ignore[arg-type]
    with pytest.raises(LoadingError, match="killed by SIGKILL"):
        read(kill_itself(signal.SIGKILL))
    time.sleep(0.1)  # a handler that raises does so here


def test_an_error_that_a_destructor_swallowed_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECOND_TRY", 0.1)
    calls = []

    def swallow_the_first() -> None:
        with suppress(BaseException):
            time.sleep(5)
        calls.append(time.monotonic())
        time.sleep(60)

    with pytest.raises(LoadingError, match="no batch of images arrived"):
        read(swallow_the_first, num_workers=0, patience=0.2)
    assert len(calls) == 1
