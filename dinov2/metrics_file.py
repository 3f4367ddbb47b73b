"""Files of metrics: a JSON object per line, each with its iteration. A crash can only tear the last one."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.files import atomic_write, parse_json, read_regular_file

logger = logging.getLogger(__name__)


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
