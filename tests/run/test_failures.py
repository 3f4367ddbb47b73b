"""The last words of a job are about the process that failed first for a reason of its own."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dinov2.run.failures import Failure, error_message, read_failures

ROOT = Path(__file__).resolve().parents[2]
GLOO = "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:671"
OWN = Failure(
    time=5.0,
    rank=2,
    world_size=4,
    host="n1",
    message="no folder /x",
    trace="",
    lost_peer=False,
    output_dir="/out",
    log="/out/logs/log.txt.rank2",
)
LOST = [
    dataclasses.replace(OWN, time=time, rank=rank, message=GLOO, trace="Traceback", lost_peer=True, log=f"log {rank}")
    for rank, time in ((0, 4.0), (1, 3.0))
]


def write(folder: Path, *failures: Failure) -> list[Path]:
    paths = [folder / f"7_{failure.rank}_failure.json" for failure in failures]
    for path, failure in zip(paths, failures, strict=True):
        failure.write(path)
    return paths


def test_the_original_error_is_reported(tmp_path: Path) -> None:
    later = dataclasses.replace(OWN, time=6.0, rank=3)
    words = error_message(read_failures(write(tmp_path, *LOST, later, OWN)))
    assert words == "error: no folder /x (process 2 of 4 on n1; log: /out/logs/log.txt.rank2)"


def test_processes_without_a_record_were_killed(tmp_path: Path) -> None:
    words = error_message(read_failures(write(tmp_path, *LOST)))
    assert words.startswith("error: process 2, 3 of 4 ended without an error: killed")
    assert words.endswith("log: /out/logs/log.txt.rank2")


def test_if_all_lost_a_connection_the_first_is_reported_with_its_traceback(tmp_path: Path) -> None:
    both = [dataclasses.replace(failure, world_size=2) for failure in LOST]
    words = error_message(read_failures(write(tmp_path, *both)))
    assert words == f"Tracebackerror: {GLOO} (process 1 of 2 on n1; log: log 1)"


def fail(error: Exception, cause: Exception | None = None) -> Failure:
    try:
        raise error from cause
    except Exception as caught:
        return Failure.of(caught, 1, 2, "/out")


@pytest.mark.parametrize(
    ("failure", "message", "has_trace", "lost_peer"),
    [
        (fail(OSError("disk full")), "disk full", False, False),
        (fail(KeyError("bug")), "KeyError: 'bug'", True, False),
        (fail(RuntimeError(GLOO)), f"RuntimeError: {GLOO}", True, True),
        (fail(dist.DistBackendError("aborted")), "DistBackendError: aborted", True, True),
        (fail(OSError("no checkpoint"), RuntimeError(GLOO)), "no checkpoint", False, True),
    ],
)
def test_the_record_of_an_error(failure: Failure, message: str, has_trace: bool, lost_peer: bool) -> None:
    assert (failure.message, failure.lost_peer) == (message, lost_peer)
    assert ("Traceback (most recent call last)" in failure.trace) == has_trace


def test_a_note_that_cannot_be_written_is_no_second_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    OWN.write(tmp_path / "file" / "note.json")


def test_the_end_of_a_job_script_reports_and_removes_the_records(tmp_path: Path) -> None:
    notes = write(tmp_path, *LOST, OWN)
    command = [sys.executable, "-m", "dinov2.run.failures", *map(str, notes)]
    first, second = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60) for _ in range(2))
    assert (first.returncode, first.stdout) == (0, "")
    assert first.stderr.startswith("error: no folder /x (process 2 of 4")
    assert not any(note.exists() for note in notes)
    assert (second.returncode, second.stderr) == (1, ""), "nothing to report"
