"""A job that gets SIGTERM requeues itself, unless it has been requeued or canceled already."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.run.slurm import _on_sigterm


@pytest.fixture(autouse=True)
def handler_restored() -> Iterator[None]:
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that records calls of scontrol; squeue answers with the environment's STATE."""
    for name, line in (("squeue", "echo $STATE"), ("scontrol", f"echo $* >> {tmp_path}/calls")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "calls"


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
def test_only_a_job_that_runs_is_requeued(
    state: str, requeued: bool, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE", state)
    _on_sigterm("42", signal.SIGTERM, None)
    assert calls.exists() == requeued
    if requeued:
        assert calls.read_text() == "requeue 42\n"


def test_a_signal_of_the_system_requeues_nothing(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come because another process has failed: such a job would fail again and again."""
    monkeypatch.setenv("STATE", "RUNNING")
    _on_sigterm("42", signal.SIGTERM, sys._getframe())
    assert not calls.exists()


def test_without_an_answer_the_job_just_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _on_sigterm("42", signal.SIGTERM, None)
