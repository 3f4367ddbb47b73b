"""Data loading that fails with a sentence: workers that are killed or hang, and errors of a dataset's own code.

torch's loader ends a process whose worker was killed by an error in the middle of whatever the process is doing, such
as writing a checkpoint, and waits for ever for a worker that hangs. Here all of that is a `LoadingError` where a batch
is asked for, which names the images that were being read, the usual causes, and what to change.
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
from typing import Any, NamedTuple, NoReturn

from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from dinov2.data.images import BadImageError

DEFAULT_TIMEOUT = 1200.0
"""Seconds after which a batch is not waited for any longer: fewer than other processes wait for this one."""

FIRST_CHECK, CHECK_PERIOD = 5.0, 1.0  # seconds that a batch is waited for before it is asked why, and between two times
SECOND_TRY = 10.0  # seconds after which a wait is ended once more, should a destructor have swallowed the error
LAST_SECONDS = 60  # that a worker stays after SIGTERM, so that the process can save what it has
MAX_NAMED = 4  # images in a message
IDLE = -1  # in place of the sample that a worker is reading

FEWER = "fewer workers (train.num_workers, --num-workers)"
NO_MEMORY = (
    f"The usual cause is that memory ran out: use {FEWER}, a smaller batch (train.batch_size_per_gpu, --batch-size) or "
    "smaller images, or ask the scheduler or container for more memory"
)
NO_SHARED_MEMORY = (
    "The usual cause is that /dev/shm, through which workers hand over their batches, is full; containers give it "
    f"64 MB: start them with more shared memory (docker run --shm-size=16g), or use {FEWER}; 0 needs none"
)
CRASHED = (
    "A library crashed, perhaps on this image: move the image away, or find the library with train.num_workers=0 and "
    "`python -X faulthandler`"
)
ENDED = "The scheduler, a person or another program ended it"
ADVICE: dict[int, str] = {
    signal.SIGKILL: NO_MEMORY,
    signal.SIGBUS: NO_SHARED_MEMORY,
    **dict.fromkeys((signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE), CRASHED),
}
"""Of the signals that kill a worker, what they usually mean; of others, `ENDED`."""


class LoadingError(OSError):
    """Images cannot be loaded; the message is a sentence for the person who started the command."""


# --- In a worker -----------------------------------------------------------------------------------------------------


def outlive_signals(worker_id: int) -> None:
    """Let the main process alone react to signals that schedulers, or Ctrl-C, send to all processes of a job.

    A worker ends with its parent; SIGTERM, by which the parent would end a stuck worker, leaves it `LAST_SECONDS`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))


class _Note(NamedTuple):
    """Where this process notes which sample it is reading."""

    table: Any  # of int64, shared by the workers of a loader and its main process
    row: int


_note: _Note | None = None


def note_sample(index: int) -> None:
    """Let the main process know which sample is being read, for its messages; `IDLE` when none is."""
    if _note is not None:
        _note.table[_note.row] = index


def _begin_worker(worker_id: int, table: Any) -> None:
    global _note
    _note = _Note(table, worker_id)
    outlive_signals(worker_id)


class _Failure(NamedTuple):
    """An error on its way from a worker, in place of a sample or a batch."""

    message: str
    trace: str
    is_value_error: bool = False

    def throw(self) -> NoReturn:
        kind = ValueError if self.is_value_error else LoadingError
        raise kind(self.message) from _TraceOfWorker(self.trace)


class _TraceOfWorker(Exception):
    """The traceback of an error, as text; for the log file."""


class _Reporting(Dataset[Any]):
    """A dataset that gives a `_Failure` where it would raise an error."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        index = getattr(key, "sample", key)
        note_sample(index)
        try:
            return self.dataset[key]
        except (BadImageError, LoadingError) as error:  # which name the image
            return _Failure(str(error), traceback.format_exc())
        except Exception as error:
            advice = f". {NO_MEMORY}" if isinstance(error, MemoryError) else ""
            message = f"cannot load {sample_in_words(self.dataset, index)}: {_in_words(error)}{advice}"
            return _Failure(message, traceback.format_exc())
        finally:
            note_sample(IDLE)


class _ReportingCollate:
    """A collate function that passes a `_Failure` on, and gives one where it would raise an error."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        if failures := [sample for sample in samples if isinstance(sample, _Failure)]:
            return failures[0]
        try:
            return self.collate(samples)
        except ValueError as error:
            return _Failure(str(error), traceback.format_exc(), is_value_error=True)
        except Exception as error:
            message = f"cannot put {len(samples)} images into a batch: {_in_words(error)}"
            if isinstance(error, MemoryError):
                message += f". {NO_MEMORY}"
            elif "shared memory" in message or "No space left" in message:
                message += f". {NO_SHARED_MEMORY}"
            return _Failure(message, traceback.format_exc())


def _in_words(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def sample_in_words(dataset: Any, index: int) -> str:
    """`sample 7 (/data/x.jpg)`, as far as the dataset, or one that it wraps, can describe it."""
    while not hasattr(dataset, "describe") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    with suppress(Exception):
        return f"sample {index} ({dataset.describe(index)})"
    return f"sample {index}"


# --- In the main process ---------------------------------------------------------------------------------------------


class _Abandoned(BaseException):
    """Gets out of whatever a batch is waited for in; code that survives every `Exception` must not catch it."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__()
        self.reason = reason


class SupervisedLoader(DataLoader[Any]):
    """A DataLoader whose failures are a `LoadingError`, where a batch is asked for.

    Signals interrupt the wait in the main thread only; elsewhere nothing but the death of a worker is noticed.

    Args:
        dataset: map-style; keys are indices, or have the index as `sample`.
        num_workers: processes that load; 0 loads in this one.
        collate_fn: list of samples -> batch; None is torch's.
        patience: seconds to wait for a batch; 0 waits for ever.
        patience_key: what the user changes it by, for the message.
        while_waiting: called every second of a wait of some seconds; may raise what ends it.
        settings: further ones of DataLoader.
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
            collate_fn=_ReportingCollate(collate_fn or default_collate),
            worker_init_fn=partial(_begin_worker, table=self.table),
            **settings,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Starts the workers at once; they end with the iterator."""
        others = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "") == signal_handling.__name__:  # of a plain DataLoader before
            handler = signal.SIG_DFL
        if not self.persistent_workers:
            self.workers = []
        try:
            with self._waiting():
                batches = super().__iter__()
        finally:
            if _in_main_thread():  # without torch's, which raises an error whatever the process is doing
                signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        if started := [process for process in multiprocessing.active_children() if process not in others]:
            self.workers = sorted(started, key=lambda process: (len(process.name), process.name))  # which counts
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
                    batch.throw()
                yield batch
        except GeneratorExit:  # closed, or left behind
            raise
        except BaseException:
            self._kill_workers()
            raise
        finally:
            del batches  # in good order, if it is not part of a traceback
            if not self.persistent_workers:
                self._kill_workers()  # those that are stuck

    def _kill_workers(self) -> None:
        for worker in self.workers:
            if worker.is_alive():
                worker.kill()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """What goes wrong in here is said in a sentence, and does not last for ever."""
        global _note
        if self.num_workers == 0:
            _note = _Note(self.table, 0)
        try:
            with _alarm(self._checks(), min(FIRST_CHECK, self.patience or FIRST_CHECK)):
                yield
        except _Abandoned as abandoned:
            raise abandoned.reason from None
        except LoadingError:
            raise
        except (RuntimeError, OSError, EOFError) as error:  # of torch's loader; those of the dataset are a _Failure
            dead = self._death(missed=True)
            advice = f". {NO_MEMORY}" if getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN) else ""
            raise LoadingError(dead or f"loading the images failed: {_in_words(error)}{advice}") from error

    def _checks(self) -> Callable[[], None]:
        started = time.monotonic()

        def check() -> None:
            if self.while_waiting is not None:
                self.while_waiting()
            if dead := self._death():
                raise LoadingError(dead)
            if 0 < self.patience <= time.monotonic() - started:
                raise LoadingError(self._hang())

        return check

    def _hang(self) -> str:
        """What to say of a batch that does not come."""
        key = f"{self.patience_key}=" if self.patience_key else ""
        reading = [(place, index) for place, index in enumerate(self.table) if index != IDLE]
        named = "; ".join(
            f"{self._name(place)} is reading {self._sample(index)}" for place, index in reading[:MAX_NAMED]
        )
        stopped = ", ".join(self._name(place) for place in range(min(len(self.workers), MAX_NAMED)))
        return (
            f"no batch of images came for {key}{self.patience:g} seconds: "
            f"{named or f'no image is being read ({stopped})'}. The usual causes are a network drive that does not "
            f"answer, a stopped process, and images that take very long to decode: look at the files that are named, "
            f"try another drive or {FEWER}"
            + (f", or raise {self.patience_key} (0 waits for ever)" if self.patience_key else "")
        )

    def _death(self, *, missed: bool = False) -> str:
        """What to say of a worker that has ended, if any has; within a second, and also in good order, if `missed`."""
        deadline = time.monotonic() + missed
        while not (dead := [each for each in self.workers if not each.is_alive() and (missed or each.exitcode)]):
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.01)
        worker, status = dead[0], dead[0].exitcode or 0
        place = self.workers.index(worker)
        index = self.table[place]
        reading = f" while it read {self._sample(index)}" if index != IDLE else ""
        if status >= 0:
            return (
                f"{self._name(place)} ended by itself with status {status}{reading}: the dataset's code must not exit"
            )
        names = {each.value: each.name for each in signal.Signals}  # which not all signals have
        names[signal.SIGALRM] = f"SIGTERM, {LAST_SECONDS} seconds after it came"  # see `outlive_signals`
        killer = names.get(-status, f"signal {-status}")
        return f"{self._name(place)} was killed by {killer}{reading}. {ADVICE.get(-status, ENDED)}"

    def _name(self, place: int) -> str:
        if not self.workers:
            return "this process"
        pid = self.workers[place].pid
        return f"data-loading worker {place} (process {pid}{_state_of(pid)})"

    def _sample(self, index: int) -> str:
        return sample_in_words(self.dataset, index)


def _state_of(pid: int | None) -> str:
    """What a process does, after a comma, where the system tells: `, disk sleep`."""
    with suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text().partition("State:")[2]
        return f", {status.split('(')[1].split(')')[0]}"
    return ""


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _alarm(check: Callable[[], None], first: float) -> Iterator[None]:
    """Calls `check` after `first` seconds and then every `CHECK_PERIOD`; what it raises arrives as `_Abandoned`."""
    if not _in_main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        try:
            check()
        except BaseException as reason:
            signal.setitimer(signal.ITIMER_REAL, SECOND_TRY, CHECK_PERIOD)
            raise _Abandoned(reason) from None

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, first, CHECK_PERIOD)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
