"""A file is whole or not there; a folder is somebody's or free."""

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from dinov2.files import atomic_write, is_locked, remove_leftovers


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_write(path) as file:
        file.write(b"half of it")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "new"


WRITER = """
import sys
from pathlib import Path
from dinov2.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    print("here", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write(bytes(300_000)),
        lambda file: np.save(file, np.zeros(300_000)),
        lambda file: np.savez(file, x=np.zeros(300_000)),
        lambda file: torch.save(torch.zeros(300_000), file),
    ],
    ids=["bytes", "npy", "npz", "torch"],
)
def test_whoever_writes_a_file_that_does_not_fit_the_error_names_it_and_the_reason(
    write: Callable[[BinaryIO], object], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"cannot write: File too large: .*/x'$"),
            atomic_write(tmp_path / "x") as file,
        ):
            write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_was_writing_is_removed_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "knn" / "features.pth"
    path.parent.mkdir(parents=True)
    (tmp_path / "images" / "a").mkdir(parents=True)
    foreign = tmp_path / "images" / "a" / ".b.1.unfinished"  # the folder may hold other things, too
    foreign.touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], **pipes) as writer:  # type: ignore[call-overload]
        assert writer.stdout.readline() == b"here\n"
        remove_leftovers(tmp_path, ["eval", "health"])
        assert [file.suffix for file in path.parent.iterdir()] == [".unfinished"]
        writer.kill()
    remove_leftovers(tmp_path, ["eval", "health"])
    assert list(path.parent.iterdir()) == [] and foreign.exists()


def test_without_locks_only_what_is_old_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    old, new = tmp_path / ".a.1.unfinished", tmp_path / ".b.1.unfinished"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


HOLDER = """
import sys
from pathlib import Path
from dinov2.files import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("here", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_occupied_as_long_as_the_process_lives(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and not list(tmp_path.iterdir()) and not is_locked(tmp_path / "nowhere")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == b"here\n"
        (tmp_path / ".lock").chmod(0o444)
        before = (tmp_path / ".lock").read_text()
        assert is_locked(tmp_path) and is_locked(tmp_path)
        holder.kill()
    assert not is_locked(tmp_path) and [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert (tmp_path / ".lock").read_text() == before


def test_without_locks_the_state_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="No locks"):
        is_locked(tmp_path)
