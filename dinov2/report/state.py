"""Whether a run goes on, and if not, what it ended with."""

import logging
import re
import time
from pathlib import Path
from typing import NamedTuple

from dinov2.files import is_locked
from dinov2.log import log_path
from dinov2.train.checkpoint_folder import complete_checkpoints

logger = logging.getLogger(__name__)

_LINE = re.compile(r"([A-Z])\d{8} [\d:]+ \d+ \S+ \S+\] (.*)")  # of the log; a traceback has others
_END = 1 << 16  # bytes of a log that are looked at


class State(NamedTuple):
    """What the folder of a run says beside its numbers."""

    occupied: bool | None  # whether a process has it; None: its file system does not tell
    silent: float | None  # seconds since the last line of numbers
    error: str = ""  # with which it ended, if it did
    checkpoint: int | None = None  # the last finished step of the latest one


def read_state(folder: Path, metrics: Path, notes: list[str]) -> State:
    """Look at lock, log and checkpoints of a run, and at its file of numbers; what cannot be read is noted."""
    try:
        occupied = is_locked(folder)
    except OSError as error:
        logger.info("whether %s is in use cannot be told: %s", folder, error)
        occupied = None
    try:
        checkpoint = max(complete_checkpoints(folder / "checkpoints"), default=None)
    except OSError as error:
        notes.append(f"Its checkpoints could not be listed: {error}")
        checkpoint = None
    return State(
        occupied=occupied,
        silent=time.time() - metrics.stat().st_mtime if metrics.exists() else None,
        error=last_error(log_path(folder)),
        checkpoint=checkpoint,
    )


def last_error(log: Path) -> str:
    """The message of the last line of a log if it is an error, of a critical one what its traceback ends with.

    Empty if it is none: a run that somebody interrupts says so, as an error, and has nothing wrong.
    """
    if not log.is_file():
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _END))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    found = next(((line, match) for line in reversed(lines) if (match := _LINE.match(line))), None)
    if found is None or found[1][1] not in "EC" or found[1][2].startswith("interrupted"):
        return ""
    traceback = [line for line in lines[lines.index(found[0]) + 1 :] if line.strip()]
    return traceback[-1] if found[1][1] == "C" and traceback else found[1][2]
