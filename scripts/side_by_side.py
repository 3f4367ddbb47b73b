"""Timing several sides in one run, for benchmarks on machines that do other things too.

Every round runs each side once, each time beginning with another one, so that a disturbance hits all alike; what to
quote is the ratio of two sides in the same round, its median over the rounds and between what it lies. On a CPU that is
busy with other programs even that scatters; the time that the process itself was at work then says more.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """Of every round, by side."""

    wall: dict[str, list[float]]
    work: dict[str, list[float]]  # of all CPUs for this process, waiting in a loop for another thread included


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> Seconds:
    """Time each side in each round, after a round of warm-up."""
    names = list(sides)
    seconds = Seconds({name: [] for name in names}, {name: [] for name in names})
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started, worked = time.perf_counter(), time.process_time()
            sides[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds.wall[name].append(time.perf_counter() - started)
                seconds.work[name].append(time.process_time() - worked)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """[median, least, most] of above / below, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> list[float]:
    """[median, least, most]."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def hardware(device: torch.device) -> dict[str, Any]:
    """On what, for the record."""
    cpu = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
