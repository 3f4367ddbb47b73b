"""Which of several processes failed, and why: each that fails leaves a note, and the last words of the job tell one.

When one process fails, the others lose their connection to it and fail as well. Told is the first failure that is not
of that kind. A process that is killed leaves no note.

    python -m dinov2.run.failures NOTES...        # tells on standard error what is in these files, and removes them
"""

import dataclasses
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.distributed import DistError

from dinov2.files import atomic_write
from dinov2.log import USER_ERRORS, log_path

_LOST_PEER = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|gloo|nccl", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Failure:
    """How one process failed. An error of a person (`USER_ERRORS`) needs no traceback."""

    time: float  # seconds since the epoch
    rank: int
    world_size: int
    host: str
    message: str
    trace: str
    lost_peer: bool
    output_dir: str

    @classmethod
    def of(cls, error: Exception, rank: int, world_size: int, output_dir: str) -> "Failure":
        """How this process failed, told from its error."""
        users = isinstance(error, USER_ERRORS)
        return cls(
            time=time.time(),
            rank=rank,
            world_size=world_size,
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            message=str(error) if users else f"{type(error).__name__}: {error}",
            trace="" if users else "".join(traceback.format_exception(error)),
            lost_peer=_is_lost_peer(error),
            output_dir=output_dir,
        )

    def leave(self, note: Path) -> None:
        """Write the note; that it cannot be written is no reason for another error."""
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(note) as file:
                file.write(json.dumps(dataclasses.asdict(self)).encode())
        except OSError:
            pass

    @classmethod
    def read(cls, note: Path) -> "Failure":
        return cls(**json.loads(note.read_text()))


def read_notes(notes: Iterable[Path]) -> list[Failure]:
    """The failures that the processes of a job have left, those that explain the others first."""
    failures = [Failure.read(note) for note in notes]
    return sorted(failures, key=lambda failure: (failure.lost_peer, failure.time))


def last_words(failures: Sequence[Failure]) -> str:
    """Why a job failed: the traceback, if it is needed, then one line."""
    first = failures[0]
    silent = sorted(set(range(first.world_size)) - {failure.rank for failure in failures})
    if first.lost_peer and silent:
        return (
            f"error: process {', '.join(map(str, silent))} of {first.world_size} ended without a word: killed, for "
            f"instance for lack of memory, or its node was lost; log: {log_path(first.output_dir, silent[0])}"
        )
    log = log_path(first.output_dir, first.rank)
    where = f"process {first.rank} of {first.world_size} on {first.host}; log: {log}"
    return f"{first.trace}error: {first.message} ({where})"


def _is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is about the connection to another process."""
    while error is not None:
        if isinstance(error, DistError) or _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(notes: Sequence[str]) -> int:
    """Tell the last words and remove the notes; the exit status, 1 if there are none."""
    found = [path for path in map(Path, notes) if path.exists()]
    if not found:
        return 1
    sys.stderr.write(last_words(read_notes(found)) + "\n")
    for path in found:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
