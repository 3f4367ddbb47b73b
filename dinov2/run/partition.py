"""Limits of SLURM partitions, which bound the defaults of a job."""

import dataclasses
import logging
import subprocess

from dinov2.run.submission import PUBLISHED_CPUS_PER_TASK, PUBLISHED_TIMEOUT, Submission, per_slurm_node

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Time limit of a job in minutes, and CPUs of the smallest node; None: unlimited or unknown."""

    minutes: int | None = None
    cpus: int | None = None


UNKNOWN = Limits()


def limits(partition: str | None) -> Limits:
    """Query the limits of a partition (default: the cluster's), or the tightest ones of several (comma-separated)."""
    command = ["sinfo", "--noheader", "--format", "%P|%l|%c"]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("cannot query the limits of the partition: %s", error)
        return UNKNOWN
    rows = [row for row in (line.split("|") for line in output.splitlines()) if _is_requested(row[0], partition)]
    minutes = [number for row in rows if (number := _minutes(row[1])) is not None]
    cpus = [number for row in rows if (number := _number(row[2])) is not None]
    return Limits(min(minutes, default=None), min(cpus, default=None))


def timeout(submission: Submission, permitted: Limits) -> int:
    """Time limit to request, in minutes."""
    if submission.timeout is None:
        return min(PUBLISHED_TIMEOUT, permitted.minutes or PUBLISHED_TIMEOUT)
    if permitted.minutes is not None and submission.timeout > permitted.minutes:
        logger.warning(
            "--timeout %d: the partition permits %d minutes, so the job may wait forever",
            *(submission.timeout, permitted.minutes),
        )
    return submission.timeout


def cpus_per_task(submission: Submission, permitted: Limits) -> int:
    """CPUs to request per process."""
    if submission.cpus_per_task is not None:
        return submission.cpus_per_task
    _, tasks = per_slurm_node(submission)
    return max(1, min(PUBLISHED_CPUS_PER_TASK, (permitted.cpus or tasks * PUBLISHED_CPUS_PER_TASK) // tasks))


def _is_requested(name: str, partition: str | None) -> bool:
    """Whether a line of sinfo, which marks the default partition by a star, is about the requested partition."""
    return name.endswith("*") if partition is None else name.rstrip("*") in partition.split(",")


def _minutes(text: str) -> int | None:
    """Parse `[days-]hours:minutes:seconds` or `minutes:seconds`; None for `infinite` or `n/a`."""
    days, _, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        hours, minutes = (parts[0], parts[1]) if len(parts) == 3 else (0, parts[0])
        return int(days or 0) * 24 * 60 + hours * 60 + minutes
    except ValueError:
        return None


def _number(text: str) -> int | None:
    """Parse `64`, or `64+` for nodes that differ."""
    digits = text.rstrip("+")
    return int(digits) if digits.isdigit() else None
