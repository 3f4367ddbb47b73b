"""Smoothed meters, and the loop over batches that prints them.

Meters take floats or 0-d tensors. Tensors are kept until a number is needed, so that logging every step makes neither
the host wait for the GPU nor processes wait for each other. Then all of them are averaged over the processes, if
requested, and fetched together.
"""

import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dinov2.metrics_file import append_json

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
