"""Timing of several implementations in one run, for benchmarks on machines with other load.

Each round runs every side once, in rotating order, so that disturbances affect all sides alike. The figure to quote is
the ratio of two sides in the same round: its median, minimum and maximum over the rounds. On a busy CPU the process
time is more reliable than the wall time.
"""

import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """Seconds of every round, by side."""

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


def cpu_seconds(command: list[str]) -> tuple[float, str]:
    """CPU seconds of a command with its children, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ... failed:\n{result.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stdout


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """[median, least, most] of above / below, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> list[float]:
    """[median, least, most]."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def hardware(device: torch.device) -> dict[str, Any]:
    """Describe the hardware, for the record."""
    cpu = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
