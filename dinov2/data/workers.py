"""A data loader with clear errors: for workers that are killed or hang, and for errors in the code of a dataset.

When a worker is killed, torch's loader raises an error at any point of the main process, such as while it writes a
checkpoint; it waits forever for a worker that hangs. Here both raise a `LoadingError` where a batch is requested, which
names the images that were being read, the usual causes, and what to change.
"""

import errno
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from dinov2.data.images import BadImageError

DEFAULT_TIMEOUT = 1200.0
"""Seconds to wait for a batch: fewer than the other processes wait for this one."""

FIRST_CHECK, CHECK_PERIOD = 5.0, 1.0  # seconds of waiting before the first check, and between two checks
SECOND_TRY = 10.0  # seconds until the error is raised again, in case a destructor swallowed it
LAST_SECONDS = 60  # seconds a worker lives on after SIGTERM, while the main process saves a checkpoint
MAX_NAMED = 4  # images or workers named in a message
IDLE = -1  # sample index of a worker that reads none

FEWER = "fewer workers (train.num_workers, --num-workers)"
NO_MEMORY = (
    f"The usual cause is too little memory: use {FEWER}, a smaller batch (train.batch_size_per_gpu, --batch-size) or "
    "smaller images, or ask the scheduler or container for more memory"
)
NO_SHARED_MEMORY = (
    "The usual cause is that /dev/shm, through which workers hand over their batches, is full; in containers it has "
    f"64 MB: start them with more shared memory (docker run --shm-size=16g), or use {FEWER}; 0 needs none"
)
CRASHED = (
    "A library crashed, perhaps on this image: move the image away, or find the library with train.num_workers=0 and "
    "`python -X faulthandler`"
)
ENDED = "The scheduler, a user or another program ended it"
# Usual causes of the signals that kill a worker; `ENDED` for the others.
ADVICE: dict[int, str] = {
    signal.SIGKILL: NO_MEMORY,
    signal.SIGBUS: NO_SHARED_MEMORY,
    **dict.fromkeys((signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE), CRASHED),
}


class LoadingError(OSError):
    """Images cannot be loaded; the message is meant for the user."""


# --- In a worker -----------------------------------------------------------------------------------------------------


def outlive_signals(worker_id: int) -> None:
    """Ignore the signals that schedulers, or Ctrl-C, send to all processes of a job; the main process handles them.

    A worker ends with its parent. SIGTERM, by which the parent ends a stuck worker, ends it after `LAST_SECONDS`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))


# The sample that each worker is reading, as an int64 table shared with the main process, and the row of this process.
_slot: tuple[Any, int] | None = None


def note_sample(index: int) -> None:
    """Record the sample that is being read, for messages of the main process; `IDLE` for none."""
    if _slot is not None:
        table, row = _slot
        table[row] = index


def _begin_worker(worker_id: int, table: Any) -> None:
    global _slot
    _slot = (table, worker_id)
    outlive_signals(worker_id)


class _Failure(NamedTuple):
    """An error of a worker, returned in place of a sample or a batch."""

    message: str
    trace: str
    kind: type[Exception] = LoadingError


class _TraceOfWorker(Exception):
    """The traceback of a worker's error, as text for the log file."""


class _Reporting(Dataset[Any]):
    """A dataset that returns a `_Failure` where it would raise an error."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        index = getattr(key, "sample", key)
        note_sample(index)
        try:
            return self.dataset[key]
        except (BadImageError, LoadingError) as error:  # these name the image
            return _Failure(str(error), traceback.format_exc())
        except Exception as error:
            advice = f". {NO_MEMORY}" if isinstance(error, MemoryError) else ""
            message = f"cannot load {describe_sample(self.dataset, index)}: {_one_line(error)}{advice}"
            return _Failure(message, traceback.format_exc())
        finally:
            note_sample(IDLE)


def _collate_or_fail(samples: list[Any], *, collate: Callable[[list[Any]], Any]) -> Any:
    """Collate samples, but pass a `_Failure` on, and return one where an error would be raised."""
    if failures := [sample for sample in samples if isinstance(sample, _Failure)]:
        return failures[0]
    try:
        return collate(samples)
    except ValueError as error:
        return _Failure(str(error), traceback.format_exc(), ValueError)
    except Exception as error:
        message = f"cannot collate {len(samples)} images to a batch: {_one_line(error)}"
        if isinstance(error, MemoryError):
            message += f". {NO_MEMORY}"
        elif "shared memory" in message or "No space left" in message:
            message += f". {NO_SHARED_MEMORY}"
        return _Failure(message, traceback.format_exc())


def _one_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def describe_sample(dataset: Any, index: int) -> str:
    """Describe a sample, such as `sample 7 (/data/x.jpg)`, as far as the dataset or one that it wraps can."""
    while not hasattr(dataset, "describe") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    with suppress(Exception):
        return f"sample {index} ({dataset.describe(index)})"
    return f"sample {index}"


# --- In the main process ---------------------------------------------------------------------------------------------


class _Abandoned(BaseException):
    """Raised to end a wait for a batch; no `Exception`, because code in between must not catch it."""

    def __init__(self, reason: BaseException) -> None:
        self.reason = reason


class SupervisedLoader(DataLoader[Any]):
    """A DataLoader whose failures raise a `LoadingError` where a batch is requested; other arguments are torch's.

    Waits can be interrupted in the main thread only; in other threads only the death of a worker is detected.

    Args:
        dataset: Map-style dataset; its keys are indices, or have the index as attribute `sample`.
        patience: Seconds to wait for a batch; 0 waits forever.
        patience_key: Config key of `patience`, for the error message.
        while_waiting: Called every second of a wait of several seconds; may raise an exception to end it.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        patience: float = DEFAULT_TIMEOUT,
        patience_key: str = "",
        while_waiting: Callable[[], object] | None = None,
        **settings: Any,
    ) -> None:
        self.patience = patience
        self.patience_key = patience_key
        self.while_waiting = while_waiting
        self.workers: list[BaseProcess] = []
        self.table = multiprocessing.RawArray("q", [IDLE] * max(num_workers, 1))
        super().__init__(
            _Reporting(dataset),
            num_workers=num_workers,
            collate_fn=partial(_collate_or_fail, collate=collate_fn or default_collate),
            worker_init_fn=partial(_begin_worker, table=self.table),
            **settings,
        )

    def check_worker_number_rationality(self) -> None:
        """Without torch's warning about more workers than cores: they often wait for files, and the number is set."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start the workers immediately; they end with the iterator."""
        others = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "") == signal_handling.__name__:  # left by a plain DataLoader
            handler = signal.SIG_DFL
        if not self.persistent_workers:
            self.workers = []
        try:
            with self._waiting():
                batches = super().__iter__()
        finally:
            if _in_main_thread():  # not torch's, which raises errors at any point of the process
                signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        if started := [process for process in multiprocessing.active_children() if process not in others]:
            started.sort(key=lambda process: (len(process.name), process.name))  # names end in a counter
            self.workers = started
        return self._supervised(batches)

    def _supervised(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            while True:
                with self._waiting():
                    try:
                        batch = next(batches)
                    except StopIteration:
                        break
                if isinstance(batch, _Failure):
                    raise batch.kind(batch.message) from _TraceOfWorker(batch.trace)
                yield batch
        except GeneratorExit:  # closed, or garbage-collected
            raise
        except BaseException:
            self._kill_workers()
            raise
        finally:
            del batches  # shuts the workers down, unless a traceback refers to it
            if not self.persistent_workers:
                self._kill_workers()  # stuck ones

    def _kill_workers(self) -> None:
        for worker in self.workers:
            if worker.is_alive():
                worker.kill()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Turn errors of the loader into a `LoadingError`, and limit the time of the wait."""
        global _slot
        started = time.monotonic()

        def check() -> None:
            if self.while_waiting is not None:
                self.while_waiting()
            if dead := self._death():
                raise LoadingError(dead)
            if 0 < self.patience <= time.monotonic() - started:
                raise LoadingError(self._hang())

        if self.num_workers == 0:
            _slot = (self.table, 0)
        try:
            with _alarm(check, min(FIRST_CHECK, self.patience or FIRST_CHECK)):
                yield
        except _Abandoned as abandoned:
            raise abandoned.reason from None
        except LoadingError:
            raise
        except (RuntimeError, OSError, EOFError) as error:  # from torch's loader; errors of the dataset are a _Failure
            dead = self._death(missed=True)
            advice = f". {NO_MEMORY}" if getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN) else ""
            raise LoadingError(dead or f"loading images failed: {_one_line(error)}{advice}") from error

    def _hang(self) -> str:
        """The message for a batch that does not arrive."""
        key, raise_it = self.patience_key, f", or raise {self.patience_key} (0 waits forever)"
        reading = [
            f"{self._name(worker)} is reading {describe_sample(self.dataset, index)}"
            for worker, index in enumerate(self.table)
            if index != IDLE
        ]
        named = "; ".join(reading[:MAX_NAMED])
        stopped = ", ".join(self._name(worker) for worker in range(min(len(self.workers), MAX_NAMED)))
        return (
            f"no batch of images arrived for {key and f'{key}='}{self.patience:g} seconds: "
            f"{named or f'no image is being read ({stopped})'}. The usual causes are a network drive that does not "
            f"answer, a stopped process, and images that take very long to decode: check the files that are named, "
            f"try another drive or {FEWER}{key and raise_it}"
        )

    def _death(self, *, missed: bool = False) -> str:
        """The message for a worker that has died, if any; with `missed` also one that exited, after up to 1 s."""
        deadline = time.monotonic() + missed
        while not (dead := [each for each in self.workers if not each.is_alive() and (missed or each.exitcode)]):
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.01)
        worker, status = dead[0], dead[0].exitcode or 0
        number = self.workers.index(worker)
        index = self.table[number]
        reading = f" while it read {describe_sample(self.dataset, index)}" if index != IDLE else ""
        if status >= 0:
            return f"{self._name(number)} exited with status {status}{reading}: the dataset's code must not exit"
        names = {each.value: each.name for each in signal.Signals}  # not all signals have a name
        names[signal.SIGALRM] = f"SIGTERM, {LAST_SECONDS} seconds after it came"  # see `outlive_signals`
        killer = names.get(-status, f"signal {-status}")
        return f"{self._name(number)} was killed by {killer}{reading}. {ADVICE.get(-status, ENDED)}"

    def _name(self, number: int) -> str:
        if not self.workers:
            return "this process"
        pid = self.workers[number].pid
        return f"data-loading worker {number} (process {pid}{_state_of(pid)})"


def _state_of(pid: int | None) -> str:
    """State of a process after a comma, where the system reports it: `, disk sleep`."""
    with suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text().partition("State:")[2]
        return f", {status.split('(')[1].split(')')[0]}"
    return ""


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _alarm(check: Callable[[], None], first: float) -> Iterator[None]:
    """Call `check` after `first` seconds and then every `CHECK_PERIOD`; its exceptions are raised as `_Abandoned`."""
    if not _in_main_thread():
        yield
        return

    def on_alarm(*_: Any) -> None:
        try:
            check()
        except BaseException as reason:
            signal.setitimer(signal.ITIMER_REAL, SECOND_TRY, CHECK_PERIOD)
            raise _Abandoned(reason) from None

    handler = signal.signal(signal.SIGALRM, on_alarm)
    timer = signal.setitimer(signal.ITIMER_REAL, first, CHECK_PERIOD)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
