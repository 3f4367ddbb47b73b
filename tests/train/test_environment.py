"""The environment of a run is recorded at every start."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.train import environment
from dinov2.train.environment import ENVIRONMENT_FILE, read_environment, record_environment, reproducing_command

ROOT = Path(__file__).resolve().parents[2]


def test_every_start_adds_a_session_and_a_new_run_forgets_those_of_a_former_one(tmp_path: Path) -> None:
    record_environment(tmp_path)
    record_environment(tmp_path, 40, data="ImageFolder:root=a")
    record_environment(tmp_path, 90, data="ImageFolder:root=b")
    sessions = read_environment(tmp_path / ENVIRONMENT_FILE)
    assert [each["data"] for each in sessions] == [None, "ImageFolder:root=a", "ImageFolder:root=b"]
    assert [each["first_step"] for each in read_environment(tmp_path / ENVIRONMENT_FILE)] == [0, 40, 90]
    record_environment(tmp_path)
    assert [each["first_step"] for each in read_environment(tmp_path / ENVIRONMENT_FILE)] == [0]
    assert [path.name for path in tmp_path.iterdir()] == [ENVIRONMENT_FILE]


def test_a_session_records_how_to_reproduce_the_run(tmp_path: Path) -> None:
    record_environment(tmp_path)
    text = (tmp_path / ENVIRONMENT_FILE).read_text()
    (facts,) = json.loads(text)["sessions"]
    assert facts["processes"] == 1 and facts["cores"] >= 1 and facts["threads"] == 1
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["device"] and facts["torch"]
    assert str(ROOT) not in text and os.uname().nodename not in text


def test_a_damaged_file_is_warned_of_kept_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for damage in ("", "{", "[]", '{"sessions": [1]}', '{"sessions": null}', '{"sessions": [{"first_step": -1}]}'):
        (tmp_path / ENVIRONMENT_FILE).write_text(damage)
        with caplog.at_level(logging.WARNING):
            record_environment(tmp_path, 10)
        assert ENVIRONMENT_FILE in caplog.text
        assert (tmp_path / "environment.damaged.json").read_text() == damage
        assert [each["first_step"] for each in read_environment(tmp_path / ENVIRONMENT_FILE)] == [10]


def test_the_command_runs_from_the_top_folder_of_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    script, flags = "dinov2/train/train.py", ["--config-file", "train/quickstart", "train.dataset_path=a b"]
    monkeypatch.chdir(ROOT / "dinov2" / "train")
    for program in ("train.py", str(ROOT / script)):
        assert shlex.split(reproducing_command([program, *flags]) or "") == ["python", script, *flags]
    assert reproducing_command(["/somewhere/bin/dinov2-train", *flags]) == shlex.join(["dinov2-train", *flags])
    assert reproducing_command(["/lib/submitit/core/_submit.py", "/folder/of/jobs"]) is None


def test_the_commit_is_recorded_in_a_clone_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", "-C", tmp_path, *names, *words], check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(environment, "_CLONE", tmp_path)
    assert environment._commit() == {"commit": None, "changed_files": None}  # no repository
    git("init", "--quiet")
    (tmp_path / "a.txt").write_text("a")
    git("add", ".")
    git("commit", "--quiet", "--message", "a")
    assert environment._commit() == {"commit": git("rev-parse", "HEAD").strip(), "changed_files": 0}
    (tmp_path / "a.txt").write_text("b")
    assert environment._commit()["changed_files"] == 1
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(environment, "_CLONE", tmp_path / "site")  # installed within another repository
    assert environment._commit()["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert environment._commit()["commit"] is None  # no git
