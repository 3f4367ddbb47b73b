"""Logging: log lines on the console and in files, smoothed meters, metrics as JSON lines.

Meters take floats or 0-d tensors. Tensors are kept until a number is needed, so that logging every step makes neither
the host wait for the GPU nor processes wait for each other. Then all of them are averaged over the processes, if
requested, and fetched together.
"""

import errno
import io
import json
import logging
import math
import os
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dinov2.files import atomic_write, parse_json, read_regular_file

logger = logging.getLogger(__name__)

T = TypeVar("T")


# --- Log lines -------------------------------------------------------------------------------------------------------

# I20230417 17:55:51 1234 dinov2.train.train train.py:233] message
_FORMAT = "%(levelname).1s%(asctime)s %(process)d %(name)s %(filename)s:%(lineno)s] %(message)s"
_DATE_FORMAT = "%Y%m%d %H:%M:%S"
_LINE = re.compile(r"([A-Z])\d{8} [\d:]+ \d+ \S+ \S+\] (.*)")  # level and message of such a line
_LAST_BYTES = 1 << 16  # of a log file, in which `last_error` searches
_INTERRUPTED = "interrupted"
_UNPRINTABLE = "backslashreplace"  # for file names, which may contain any bytes


USER_ERRORS = (ValueError, OSError, FloatingPointError)
"""Errors caused by the user: a config, a file, a value, a full disk. They need no traceback; others are bugs.

So are those with a true attribute `caused_by_user`, which code must not catch like the others.
"""


class _ShortLine(logging.Formatter):
    """`17:55:51 message`, with the level if it is above INFO, and the name of the run if there are several."""

    def __init__(self, name: str = "") -> None:
        super().__init__("%(asctime)s " + (f"{name}: " if name else "").replace("%", "%%") + "%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        shown = copy(record)
        if hasattr(record, "in_short"):
            shown.msg, shown.args = record.in_short, ()
        if record.levelno > logging.INFO:
            shown.msg, shown.args = f"{record.levelname} {shown.getMessage()}", ()
        return super().format(shown)


class _Console(logging.Handler):
    """Lines on standard output, above the progress bar, in the form `in_short` of their record if it has one.

    The `last_words` of a record, which end a command, go to standard error; records with `only_in_file` are omitted.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # In one piece, as several processes may share the console.
            if hasattr(record, "last_words"):
                tqdm.write(f"{record.last_words}\n", file=sys.stderr, end="")
            elif not hasattr(record, "only_in_file"):
                tqdm.write(f"{self.format(record)}\n", file=sys.stdout, end="")
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that never stops a run: if it cannot be written (a full disk), this is reported once."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - name of logging
        if not self.failed:
            self.failed = True
            logger.warning("cannot write the log file %s: %s; lines are lost", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # buffered lines do not fit on the disk
            sys.stderr.write(f"cannot write the end of the log file {self.baseFilename}: {error}\n")


def log_path(output_dir: str | Path, rank: int = 0) -> Path:
    """Log file of a process: `output_dir/logs/log.txt`, or `output_dir` itself if it ends in `.txt` or `.log`."""
    path = Path(output_dir)
    if path.suffix not in (".txt", ".log"):
        path = path / "logs" / "log.txt"
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


def log_of_job(output_dir: str | Path, rank: int) -> Path:
    """Where to look for the log of a process of a job; with several students they are in the folders of these."""
    path = log_path(output_dir, rank)
    of_students = Path(output_dir) / "*" / "logs"
    return of_students if not path.exists() and any(Path(output_dir).glob("*/logs/log.txt")) else path


def current_log() -> Path | None:
    """The log file of this process, if it has one."""
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, _LogFile)]
    return Path(files[0].baseFilename) if files else None


def setup_logging(
    output_dir: str | Path | None = None, rank: int = 0, level: int = logging.INFO, *, name: str = ""
) -> None:
    """Send all log lines and warnings to the console and, if an output folder is given, to a file in it.

    The console shows rank 0, and errors of the other ranks, with the name of the run, if any. Lines are appended to
    `log_path(output_dir, rank)`. Another call replaces the former one.
    """
    handlers: list[logging.Handler] = [_Console(level if rank == 0 else max(level, logging.ERROR))]
    if output_dir is not None:
        path = log_path(output_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_fifo():  # opening it would wait for a reader
            raise OSError(errno.EINVAL, "a pipe cannot be the log file", str(path))
        handlers.append(_LogFile(path, encoding="utf-8", errors=_UNPRINTABLE))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, (_Console, _LogFile))]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        in_file = isinstance(handler, _LogFile)
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT) if in_file else _ShortLine(name))
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


def run_command(command: Callable[[], int | None], *, after_interrupt: str = "") -> int:
    """Run a command of the user and return its exit status, 0 for None.

    `USER_ERRORS` are reported in one line, with the traceback in the log file only, and status 1. Other errors are bugs
    and raised. Ctrl-C is reported in one line too, with the hint `after_interrupt`, and status 130.
    """
    setup_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_UNPRINTABLE, line_buffering=True)  # a pipe or file gets each line at once
    try:
        return command() or 0
    except KeyboardInterrupt:
        text = _INTERRUPTED + (f"; {after_interrupt}" if after_interrupt else "")
        logger.error("%s", text, extra={"last_words": f"error: {text}"})
        return 130
    except Exception as error:
        if not isinstance(error, USER_ERRORS) and not getattr(error, "caused_by_user", False):
            raise
        logger.error("%s", error, exc_info=True, extra={"last_words": f"error: {error}"})
        return 1


def last_error(log: Path) -> str:
    """The error that the last line of a log file (`log_path`, need not exist) reports; "" if it reports none.

    A critical line has the exception that ends its traceback. An interruption by the user is not an error.
    """
    if not log.is_file():
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for index in reversed(range(len(lines))):
        if (match := _LINE.match(lines[index])) is None:
            continue
        level, message = match.groups()
        if level not in "EC" or message.startswith(_INTERRUPTED):
            return ""
        traceback = [line for line in lines[index + 1 :] if line.strip()]
        return traceback[-1] if level == "C" and traceback else message
    return ""


# --- Meters ----------------------------------------------------------------------------------------------------------


class SmoothedValue:
    """A series of numbers: its last `window_size` values, and the count and total of all values.

    Args:
        window_size: Number of values for the median, the average and the maximum.
        fmt: Format of the text; may use median, avg, global_avg, max and value.
        mean_over_processes: Function that averages tensors before they become numbers; all processes must then read
            numbers at the same time.
    """

    def __init__(
        self,
        window_size: int = 20,
        fmt: str = "{median:.4f} ({global_avg:.4f})",
        mean_over_processes: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.fmt = fmt
        self.mean_over_processes = mean_over_processes
        self._window: deque[float] = deque(maxlen=window_size)
        self._count = 0
        self._total = 0.0
        self._pending: list[tuple[float | Tensor, int, bool]] = []  # number, times, only_finite

    def update(self, value: float | Tensor, num: int = 1, *, only_finite: bool = False) -> None:
        """Add a number or one-element tensor, `num` times in the total; with `only_finite` only if it is finite."""
        number = value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
        self._pending.append((number, num, only_finite))

    @property
    def window(self) -> Sequence[float]:
        """The last values, oldest first."""
        _settle([self])
        return list(self._window)

    @property
    def count(self) -> int:
        _settle([self])
        return self._count

    @property
    def total(self) -> float:
        _settle([self])
        return self._total

    @property
    def median(self) -> float:
        """The median of the window, the lower one of two; NaN if the window has a NaN."""
        window = self.window or [0.0]
        return math.nan if any(map(math.isnan, window)) else statistics.median_low(window)

    @property
    def avg(self) -> float:
        return sum(self.window) / max(len(self._window), 1)

    @property
    def global_avg(self) -> float:
        return self.total / max(self._count, 1)

    @property
    def max(self) -> float:
        return max(self.window, default=0.0)

    @property
    def value(self) -> float:
        """The last value."""
        return self.window[-1] if self.window else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"window": self.window, "count": self.count, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pending.clear()
        self._window = deque(state["window"], maxlen=self._window.maxlen)
        self._count, self._total = state["count"], state["total"]

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


def _settle(meters: Iterable[SmoothedValue]) -> None:
    """Convert the pending tensors of some meters to numbers, with one wait for the device and the other processes."""
    meters = list(meters)
    waiting: dict[tuple[Any, torch.device], list[Tensor]] = {}
    for meter in meters:
        for number, _, _ in meter._pending:
            if isinstance(number, Tensor):
                waiting.setdefault((meter.mean_over_processes, number.device), []).append(number)
    fetched: dict[int, float] = {}
    for (mean, _), tensors in waiting.items():
        values = torch.stack([tensor.double() for tensor in tensors])
        fetched |= zip(map(id, tensors), (mean(values) if mean else values).tolist(), strict=True)
    for meter in meters:
        for number, times, only_finite in meter._pending:
            value = fetched[id(number)] if isinstance(number, Tensor) else number
            if only_finite and not math.isfinite(value):
                continue
            meter._window.append(value)
            meter._count += times
            meter._total += value * times
        meter._pending.clear()


@dataclass
class _Loop:
    """The state of one call of `MetricLogger.log_every`."""

    header: str
    iterations: range
    batch_size: int | None
    iter_time: SmoothedValue = field(default_factory=SmoothedValue)
    data_time: SmoothedValue = field(default_factory=SmoothedValue)
    started: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> tuple[float, float]:
        """Seconds since the start, in total and per finished iteration."""
        seconds = time.perf_counter() - self.started
        return seconds, seconds / max(self.iter_time.count, 1)


_FOUR_DIGITS = "{median:.4g} ({global_avg:.4g})"  # learning rates are far below 1e-4


class MetricLogger:
    """Named meters, and a loop over batches that prints them.

    Args:
        delimiter: Separator of the parts of a printed line.
        output_file: File to which each printed line is appended as a JSON object.
        is_main: Whether this process writes the file, shows the progress bar, and passes records to `listeners`.
        mean_over_processes: See `SmoothedValue`; all processes must then print together.
        hidden: Meters that are not shown on the console.
        scheduled: Meters of which the console shows the last value instead of the median.
    """

    def __init__(
        self,
        delimiter: str = "\t",
        output_file: str | Path | None = None,
        *,
        is_main: bool = True,
        mean_over_processes: Callable[[Tensor], Tensor] | None = None,
        hidden: Sequence[str] = (),
        scheduled: Sequence[str] = (),
    ) -> None:
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter
        self.output_file = Path(output_file) if output_file is not None and is_main else None
        self.is_main = is_main
        self.mean_over_processes = mean_over_processes
        self.hidden, self.scheduled = hidden, scheduled
        self.listeners: list[Callable[[Mapping[str, float]], object]] = []
        self._notes: dict[str, float] = {}
        self._line_is_due = False
        self._end: Callable[[], None] | None = None

    def update(self, *, only_finite: bool = False, **values: float | Tensor) -> None:
        """Add a number or one-element tensor to each named meter, created on first use (`SmoothedValue.update`)."""
        for name, value in values.items():
            self.meters.setdefault(name, self._meter()).update(value, only_finite=only_finite)

    def note(self, **values: float) -> None:
        """Add finite numbers, the same on all processes, to the record of this iteration, which is then printed."""
        self._notes |= {name: value for name, value in values.items() if math.isfinite(value)}

    def line_is_due(self) -> bool:
        """Whether the current iteration of `log_every` is printed regardless of notes."""
        return self._line_is_due

    def _meter(self) -> SmoothedValue:
        return SmoothedValue(fmt=_FOUR_DIGITS, mean_over_processes=self.mean_over_processes)

    def __getattr__(self, name: str) -> SmoothedValue:
        if name != "meters" and name in self.meters:
            return self.meters[name]
        raise AttributeError(f"{type(self).__name__} has neither an attribute nor a meter {name!r}")

    def __str__(self) -> str:
        _settle(self.meters.values())
        return self.delimiter.join(f"{name}: {meter if meter.count else 'none'}" for name, meter in self.meters.items())

    def state_dict(self) -> dict[str, Any]:
        """State of the meters, with which a resumed run prints the lines of an uninterrupted one."""
        _settle(self.meters.values())
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.meters = {name: self._meter() for name in state}
        for name, meter in self.meters.items():
            meter.load_state_dict(state[name])

    def log_every(
        self,
        iterable: Iterable[T],
        print_freq: int,
        header: str = "",
        n_iterations: int | None = None,
        start_iteration: int = 0,
        *,
        batch_size: int | None = None,
    ) -> Iterator[T]:
        """Yield items, and print the meters after every `print_freq`-th and after the last one.

        Args:
            iterable: Batches, beginning with that of `start_iteration`; unused if that is not below `n_iterations`.
            header: Beginning of each line.
            n_iterations: Index of the end, not counted from `start_iteration`; default: length of the iterable.
            batch_size: Images per iteration over all processes, for printing images per second.
        """
        stop = len(iterable) if n_iterations is None else n_iterations  # type: ignore[arg-type]
        loop = _Loop(header, range(start_iteration, stop), batch_size)
        if not loop.iterations:
            return
        source = iter(iterable)
        show_bar = self.is_main and sys.stderr.isatty()
        with tqdm(total=stop, initial=start_iteration, desc=header, disable=not show_bar, dynamic_ncols=True) as bar:
            for index in loop.iterations:
                asked = time.perf_counter()
                try:
                    item = next(source)
                except StopIteration:
                    break
                self._end = partial(self._end_iteration, loop, index, asked, time.perf_counter())
                self._line_is_due = index % print_freq == 0 or index == loop.iterations[-1]
                yield item
                self.end_iteration()
                bar.update()
        seconds, per_iteration = loop.elapsed()
        logger.info("%s Total time: %s (%.6f s / it)", header, _clock(seconds), per_iteration)

    def end_iteration(self) -> None:
        """End the current iteration and print its line if due, before the caller finishes its work on it.

        To be called before a checkpoint is written, so that printed lines and saved meters are consistent, and the time
        of the checkpoint does not count as time of the step.
        """
        if self._end is not None:
            end, self._end = self._end, None
            end()

    def _end_iteration(self, loop: _Loop, index: int, asked: float, received: float) -> None:
        loop.data_time.update(received - asked)
        loop.iter_time.update(time.perf_counter() - asked)
        notes, self._notes = self._notes, {}
        if not (self._line_is_due or notes):
            return
        line, short = self._lines(loop, index)
        logger.info("%s", line, extra={"in_short": short})
        if not self.is_main:
            return
        medians = {name: meter.median for name, meter in self.meters.items() if meter.count}
        times = {"iter_time": loop.iter_time.avg, "data_time": loop.data_time.avg}
        data_wait = {"data_wait": times["data_time"] / times["iter_time"]}
        record = {"iteration": index, **times, **medians, **data_wait, **notes}
        if self.output_file is not None:
            append_json(self.output_file, record)
        for listener in self.listeners:
            listener(record)

    def _lines(self, loop: _Loop, index: int) -> tuple[str, str]:
        """The line for the log file, and that for the console: numbers with short names, speed, remaining time."""
        stop, iter_time, data_time = loop.iterations.stop, loop.iter_time.avg, loop.data_time.avg
        number, wait = f"{index:{len(str(stop))}d}/{stop}", f"{data_time / iter_time:.0%}"
        left = _clock(loop.elapsed()[1] * (loop.iterations[-1] - index))
        parts = [f"{loop.header} [{number}]", f"eta: {left}", *([str(self)] if self.meters else [])]
        parts += [f"time: {iter_time:.6f}", f"data: {data_time:.6f}"]
        facts = []
        if loop.batch_size is not None:
            parts.append(f"images/s: {loop.batch_size / iter_time:.1f}")
            facts.append(f"{loop.batch_size / iter_time:.4g} images/s")
        parts.append(f"data wait: {wait}")
        if torch.cuda.is_available():
            parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
        shown = {name: meter for name, meter in self.meters.items() if meter.count and name not in self.hidden}
        numbers = {name: meter.value if name in self.scheduled else meter.median for name, meter in shown.items()}
        values = [f"{name.removesuffix('_loss')} {number:.4g}" for name, number in numbers.items()]
        facts += [f"data wait {wait}", f"{left} left"]
        short = [f"{loop.header} {number}", "  ".join(values), "  ".join(facts)]
        return self.delimiter.join(parts).strip(), " | ".join(filter(None, short))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


# --- Metrics files: one JSON object per line -------------------------------------------------------------------------


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a file of JSON lines."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot write the metrics: {error.strerror}", str(path)) from error


def read_records(path: str | Path) -> list[dict[str, float]]:
    """The finite numbers of each intact line of a metrics file, with a warning of others; none without a file."""
    records, num_damaged = readable_records(path)
    if num_damaged:
        logger.warning("%s: %d truncated or damaged line(s) are omitted", path, num_damaged)
    return records


def readable_records(path: str | Path) -> tuple[list[dict[str, float]], int]:
    """As `read_records`, but returns the number of skipped lines instead of logging a warning."""
    records = [_record(line) for line in _lines(Path(path))]
    return [record for record in records if record is not None], records.count(None)


def truncate_metrics(path: str | Path, before_iteration: int) -> None:
    """Remove iterations from `before_iteration` on and damaged lines from a metrics file, if it exists, atomically."""
    path = Path(path)
    lines = _lines(path)
    records = [_record(line) for line in lines]
    kept = [
        line
        for line, record in zip(lines, records, strict=True)
        if record is not None and record["iteration"] < before_iteration
    ]
    if kept == lines:
        return
    if damaged := records.count(None):
        logger.warning("%s: %d truncated or damaged line(s) are removed", path, damaged)
    if later := len(lines) - len(kept) - damaged:
        logger.info("%s: %d of %d lines are removed, their iterations will be repeated", path, later, len(lines))
    with atomic_write(path) as file:
        file.write("".join(kept).encode())


def _lines(path: Path) -> list[str]:
    """The lines of a file with their line ends; none if there is no file."""
    try:
        return read_regular_file(path).decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []


def _record(line: str) -> dict[str, float] | None:
    """The finite numbers in a line of a metrics file by name; None if it is incomplete or damaged.

    Iterations are steps from 0, or -1 before the first one.
    """
    if not line.endswith("\n"):
        return None
    try:
        values = parse_json(line)
        numbers = {name: float(value) for name, value in values.items() if type(value) in (int, float)}
        iteration = numbers["iteration"]
    except (ValueError, KeyError, AttributeError, OverflowError):
        return None
    if len(numbers) < len(values) or not iteration.is_integer() or iteration < -1:
        return None
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
