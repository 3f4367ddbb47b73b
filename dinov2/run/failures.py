"""Failures of the processes of a job: each one that fails writes a record, and the job reports the original error.

When one process fails, the others lose their connection to it and fail as well. The first failure of another kind is
reported. A process that is killed writes no record.

    python -m dinov2.run.failures RECORDS...      # reports on standard error what these files contain, and removes them
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
from dinov2.log import USER_ERRORS, current_log, log_of_job

_LOST_PEER = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|gloo|nccl", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Failure:
    """The failure of one process. Errors caused by the user (`USER_ERRORS`) have no traceback."""

    time: float  # seconds since the epoch
    rank: int
    world_size: int
    host: str
    message: str
    trace: str
    lost_peer: bool
    output_dir: str
    log: str

    @classmethod
    def of(cls, error: Exception, rank: int, world_size: int, output_dir: str) -> "Failure":
        """Build the record of an error in this process."""
        is_user_error = isinstance(error, USER_ERRORS)
        return cls(
            time=time.time(),
            rank=rank,
            world_size=world_size,
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            message=str(error) if is_user_error else f"{type(error).__name__}: {error}",
            trace="" if is_user_error else "".join(traceback.format_exception(error)),
            lost_peer=_is_lost_peer(error),
            output_dir=output_dir,
            log=str(current_log() or log_of_job(output_dir, rank)),
        )

    def write(self, path: Path) -> None:
        """Write the record; errors of writing are ignored."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(json.dumps(dataclasses.asdict(self)).encode())
        except OSError:
            pass


def read_failures(paths: Iterable[Path]) -> list[Failure]:
    """Read the failures of the processes of a job, causes before consequences."""
    failures = [Failure(**json.loads(path.read_text())) for path in paths]
    return sorted(failures, key=lambda failure: (failure.lost_peer, failure.time))


def error_message(failures: Sequence[Failure]) -> str:
    """Describe why a job failed: a traceback unless the user caused it, then one line."""
    first = failures[0]
    silent = sorted(set(range(first.world_size)) - {failure.rank for failure in failures})
    if first.lost_peer and silent:
        return (
            f"error: process {', '.join(map(str, silent))} of {first.world_size} ended without an error: killed, for "
            f"instance for lack of memory, or its node was lost; log: {log_of_job(first.output_dir, silent[0])}"
        )
    where = f"process {first.rank} of {first.world_size} on {first.host}; log: {first.log}"
    return f"{first.trace}error: {first.message} ({where})"


def _is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is about the connection to another process."""
    while error is not None:
        if isinstance(error, DistError) or _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(records: Sequence[str]) -> int:
    """Report the failure of a job and remove its records; returns the exit status, 1 without records."""
    found = [path for path in map(Path, records) if path.exists()]
    if not found:
        return 1
    sys.stderr.write(error_message(read_failures(found)) + "\n")
    for path in found:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
