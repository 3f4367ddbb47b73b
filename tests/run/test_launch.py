"""The launcher: flags in any order, where a task runs, several processes on one machine, submitit's job."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import submitit

from dinov2.run import partition
from dinov2.run.launch import launch
from dinov2.run.partition import Limits
from dinov2.run.slurm import Job, executor_parameters, signal_delay
from dinov2.run.submission import (
    LaunchError,
    Submission,
    check_counts,
    num_local_processes,
    per_slurm_node,
    uses_slurm,
    warn_of_flags_without_effect,
)
from dinov2.run.task import Task
from dinov2.run.train import train

ROOT = Path(__file__).resolve().parents[2]

DEFAULT = Submission(
    launcher="auto",
    ngpus=None,
    tasks_per_node=None,
    nodes=1,
    timeout=None,
    partition=None,
    account=None,
    qos=None,
    constraint=None,
    use_volta32=False,
    mem=None,
    cpus_per_task=None,
    comment="",
    exclude="",
    setup=[],
)

# A task that writes one file per process with its rank and arguments.
TASK = """
import argparse, json, os, signal, sys, time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.append(os.environ["CLONE"])

import torch
from dinov2 import distributed
from dinov2.log import setup_logging
from dinov2.run.launch import launch


def get_args_parser(add_help=True):
    parser = argparse.ArgumentParser(add_help=add_help)
    parser.add_argument("--config-file")
    parser.add_argument("--output-dir", default="")
    parser.add_argument("--rank-1", choices=("runs out of paper", "has a bug", "is killed", "leaves"))
    parser.add_argument("--no-resume", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("opts", nargs="*")
    return parser


def main(args):
    with distributed.session() as place:
        out = Path(args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        setup_logging(out, distributed.rank())
        if distributed.rank() == 1:
            fate(args.rank_1)
        total = distributed.all_reduce_sum(torch.tensor(distributed.rank() + 1)).item()
        facts = {"world_size": place.world_size, "total": total, "args": vars(args)}
        facts["hidden GPUs"] = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        (out / f"rank{distributed.rank()}.json").write_text(json.dumps(facts))


def fate(what):
    if what == "runs out of paper":
        raise OSError("no paper in tray 2")
    if what == "has a bug":
        raise KeyError("tray 2")
    if what == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leaves":
        time.sleep(0.5)
        sys.exit(3)


if __name__ == "__main__":
    sys.exit(launch("task_script:main", get_args_parser, "task_script"))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "task_script.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(TASK))
    return path


def environment() -> dict[str, str]:
    """As on a machine without SLURM, GPU, or an installed package."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTHONPATH", "DINOV2_"))}
    return kept | {"CLONE": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": "/nowhere"}


def run(script: Path, *words: str, **more_environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), "--config-file", "train/vitl16_short", *words],
        cwd=script.parent,
        env=environment() | more_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def make_task_parser(add_help: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=add_help)
    parser.add_argument("--config-file")
    parser.add_argument("opts", nargs="*")
    return parser


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_flags_and_overrides_in_any_order_run_one_process_here(script: Path, tmp_path: Path) -> None:
    result = run(script, "optim.epochs=20", "--gpus", "4", "--output-dir", "../out", "train.seed=1", "--no-resume")
    assert result.returncode == 0, result.stderr
    facts = read(tmp_path / "out" / "rank0.json")
    assert facts["world_size"] == 1
    assert facts["args"] == {
        "config_file": "train/vitl16_short",
        "output_dir": str(tmp_path / "out"),
        "rank_1": None,
        "no_resume": True,
        "dry_run": False,
        "opts": ["optim.epochs=20", "train.seed=1"],
    }, "the task gets its own arguments and none of the launcher's"
    assert "--ngpus 4, but this machine has 0: running 1 process(es)" in result.stdout


def test_several_processes_on_one_machine(script: Path, tmp_path: Path) -> None:
    words = ["train.dataset_path=/set #1: 'a' \"b\"\t\n ", "tracking.wandb_name=%j $x `y` \\", "student.arch=null"]
    result = run(script, "--launcher", "local", "--ngpus", "2", "--output-dir", "../out/%j", *words)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert "%j" not in folder.name
    facts = [read(folder / f"rank{rank}.json") for rank in (0, 1)]
    assert [fact["total"] for fact in facts] == [3, 3]
    assert [fact["args"]["opts"] for fact in facts] == [words, words], "overrides arrive as they were written"


def test_settings_that_cannot_train_are_refused_before_they_wait_in_a_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        train.main(["--config-file", "train/quickstart", "--launcher", "slurm", "dino.head_n_prototypes=1"])
    assert "error: dino.head_n_prototypes = 1" in capsys.readouterr().err
    assert not (tmp_path / "called").exists()


def test_a_refusal_by_sbatch_is_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SystemExit, match="2"):
        train.main(["--config-file", "train/quickstart", "--launcher", "slurm", "--output-dir", str(tmp_path / "out")])
    errors = capfd.readouterr().err
    assert errors.count("sbatch: error: invalid account") == 1
    assert "requested 1 node(s), on each 8 GPU(s)" in errors
    assert not (tmp_path / "out").exists()


def test_a_dry_run_runs_here_and_knows_how_many_processes_there_would_be(script: Path, tmp_path: Path) -> None:
    result = run(script, "--launcher", "local", "--ngpus", "3", "--dry-run", "--output-dir", "../out")
    assert result.returncode == 0, result.stderr
    facts = read(tmp_path / "out" / "rank0.json")
    assert (facts["world_size"], facts["args"]["world_size"]) == (1, 3)


def test_under_torchrun_the_processes_that_exist_are_used(script: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        + ["--config-file", "train/vitl16_short", "--nodes", "4", "--output-dir", str(tmp_path / "out")],
        cwd=script.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert [read(tmp_path / "out" / f"rank{rank}.json")["total"] for rank in (0, 1)] == [3, 3]


def test_without_gpus_any_number_of_processes_and_no_gpu_is_seen(script: Path, tmp_path: Path) -> None:
    result = run(script, "--ngpus", "0", "--tasks-per-node", "2", "--output-dir", "../out", CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        facts = read(tmp_path / "out" / f"rank{rank}.json")
        assert (facts["world_size"], facts["hidden GPUs"]) == (2, True)


@pytest.mark.parametrize(
    ("fate", "last_line"),
    [
        ("runs out of paper", r"error: no paper in tray 2 \(process 1 of 2 on .*; log: LOG\)"),
        ("has a bug", r"error: KeyError: 'tray 2' \(process 1 of 2 on .*; log: LOG\)"),
        ("is killed", r"error: process 1 of 2 was killed by SIGKILL, perhaps for lack of memory; log: LOG"),
        ("leaves", r"error: process 1 of 2 ended with status 3; log: LOG"),
    ],
)
def test_a_failing_process_ends_the_launch_which_reports_it_once(
    script: Path, tmp_path: Path, fate: str, last_line: str
) -> None:
    out, started = tmp_path / "out", time.monotonic()
    result = run(script, "--launcher", "local", "--ngpus", "2", "--output-dir", str(out), "--rank-1", fate)
    assert result.returncode == 1
    assert time.monotonic() - started < 60
    assert re.fullmatch(last_line.replace("LOG", f"{out}/logs/log.txt.rank1"), result.stderr.splitlines()[-1])
    tracebacks = (result.stdout + result.stderr).count("Traceback (most recent call last)")
    assert tracebacks == (1 if fate == "has a bug" else 0), "only a bug needs one"
    if fate in ("runs out of paper", "has a bug"):
        assert "in fate" in (out / "logs" / "log.txt.rank1").read_text(), "the log has all tracebacks"


def test_without_an_output_folder_the_root_is_configurable(script: Path, tmp_path: Path) -> None:
    assert run(script, DINOV2_OUTPUT_ROOT=str(tmp_path / "deep" / "root")).returncode == 0
    assert run(script).returncode == 0
    assert len(list((tmp_path / "deep" / "root").glob("2*/rank0.json"))) == 1
    assert len(list((script.parent / "experiments").glob("2*/rank0.json"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "4"], "--nodes 4 needs SLURM.*torchrun"),
        (["--launcher", "slurm"], "--launcher slurm: sbatch and srun are not on PATH"),
        (["optim.epochs"], "'optim.epochs' has no '='"),
        (["optim.epoch=1"], "optim.epoch.*optim.epochs"),
        (["--config-file", "train/vitl61"], "train/vitl61.*train/vitl16_short"),
        (["--partitoin", "x"], "unrecognized arguments: --partitoin"),
    ],
)
def test_wrong_commands_are_usage_errors_with_a_remedy(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as exit_info:
        launch("task_script:main", make_task_parser, "task_script", ["--config-file", "train/vitl16_short", *words])
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("launcher", "ngpus", "tasks", "num_gpus", "expected"),
    [
        ("auto", None, None, 0, 1),
        ("auto", None, None, 3, 3),
        ("auto", None, None, 16, 8),
        ("auto", 2, None, 4, 2),
        ("auto", 8, None, 3, 3),
        ("auto", 8, None, 0, 1),
        ("auto", None, 2, 0, 2),
        ("auto", None, 2, 4, 2),
        ("auto", 0, None, 4, 1),
        ("auto", 0, 6, 4, 6),
        ("local", None, None, 4, 4),
        ("local", 2, None, 0, 2),
        ("local", 2, 2, 4, 2),
        ("local", 0, None, 4, 1),
    ],
)
def test_number_of_local_processes(
    launcher: Any, ngpus: int | None, tasks: int | None, num_gpus: int, expected: int
) -> None:
    submission = dataclasses.replace(DEFAULT, launcher=launcher, ngpus=ngpus, tasks_per_node=tasks)
    assert num_local_processes(submission, num_gpus) == expected


def test_more_processes_than_gpus_are_an_error_when_requested_explicitly() -> None:
    with pytest.raises(LaunchError, match="--ngpus 8: this machine has 3"):
        num_local_processes(dataclasses.replace(DEFAULT, launcher="local", ngpus=8), 3)
    with pytest.raises(LaunchError, match="--tasks-per-node 4: this machine has 3.*--ngpus 0"):
        num_local_processes(dataclasses.replace(DEFAULT, tasks_per_node=4), 3)


@pytest.mark.parametrize(
    ("ngpus", "tasks", "expected"),
    [(None, None, (8, 8)), (4, None, (4, 4)), (4, 4, (4, 4)), (None, 2, (2, 2)), (0, None, (0, 1)), (0, 3, (0, 3))],
)
def test_gpus_and_processes_on_a_slurm_node(ngpus: int | None, tasks: int | None, expected: tuple[int, int]) -> None:
    assert per_slurm_node(dataclasses.replace(DEFAULT, ngpus=ngpus, tasks_per_node=tasks)) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ngpus": 4, "tasks_per_node": 2}, "--tasks-per-node 2 contradicts --ngpus 4.*one process per GPU.*--ngpus 0"),
        ({"ngpus": -1}, "--ngpus -1: must be at least 0"),
        ({"tasks_per_node": 0}, "--tasks-per-node 0: must be at least 1"),
        ({"nodes": 0}, "--nodes 0"),
        ({"timeout": 0}, "--timeout 0"),
        ({"cpus_per_task": 0}, "--cpus-per-task 0"),
    ],
)
def test_numbers_that_make_no_sense_are_named(values: dict[str, int], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        check_counts(dataclasses.replace(DEFAULT, **values))


def test_slurm_is_used_when_it_is_there_and_not_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not uses_slurm(DEFAULT)
    for name in ("sbatch", "srun"):
        (tmp_path / name).touch(0o755)
    assert uses_slurm(DEFAULT)
    assert not uses_slurm(dataclasses.replace(DEFAULT, launcher="local"))


def parameters(**values: Any) -> dict[str, Any]:
    return executor_parameters(dataclasses.replace(DEFAULT, **values), "dinov2:train", "/out/%j")


def test_executor_parameters_are_the_published_ones_without_anyones_partition() -> None:
    set_parameters = {key: value for key, value in parameters().items() if value}
    assert set_parameters.pop("slurm_setup") == [f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"]
    assert set_parameters.pop("slurm_teardown")[-1] == "exit $status"
    assert set_parameters == {
        "name": "dinov2:train",
        "nodes": 1,
        "gpus_per_node": 8,
        "tasks_per_node": 8,
        "cpus_per_task": 10,
        "timeout_min": 2800,
        "slurm_signal_delay_s": 120,
        "slurm_additional_parameters": {"requeue": True},
        "slurm_srun_args": ["--kill-on-bad-exit=1", "--cpus-per-task=10"],
    }
    asked = parameters(use_volta32=True, constraint="ib", mem="64GB", partition="p")
    assert (asked["slurm_constraint"], asked["slurm_mem"]) == ("ib&volta32gb", "64GB")


def test_nodes_without_gpus_and_set_up_lines_in_their_order() -> None:
    asked = parameters(ngpus=0, tasks_per_node=2, setup=["module load x", "export A=b"])
    assert (asked["gpus_per_node"], asked["tasks_per_node"]) == (None, 2)
    assert asked["slurm_setup"][:3] == ["module load x", "export A=b", "export CUDA_VISIBLE_DEVICES="]
    assert asked["slurm_setup"][3].startswith("export PYTHONPATH=")


def test_the_signal_leaves_time_for_a_checkpoint_and_a_short_job_time_to_work() -> None:
    """Slurm may send it a minute early."""
    assert [signal_delay(minutes) for minutes in (1, 2, 3, 12, 2800)] == [10, 20, 30, 120, 120]


def test_submitit_accepts_the_executor_parameters(tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="local")  # checks the names for all clusters
    executor.update_parameters(**parameters(partition="p", mem="1GB"))


@pytest.mark.parametrize(
    ("asked_for", "expected"),
    [
        (None, Limits(minutes=4 * 60, cpus=16)),
        ("long", Limits(minutes=3 * 24 * 60 + 90, cpus=64)),
        ("free", Limits(minutes=None, cpus=4)),
        ("long,short", Limits(minutes=30, cpus=8)),
        ("unheard-of", Limits()),
    ],
)
def test_the_limits_of_a_partition_are_read_from_sinfo(
    asked_for: str | None, expected: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["usual*|4:00:00|16+", "long|3-01:30:00|64", "short|30:00|8", "free|infinite|4"]
    (tmp_path / "sinfo").write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert partition.limits(asked_for) == expected


def test_defaults_are_the_published_values_within_the_limits() -> None:
    small = Limits(minutes=60, cpus=12)
    eight = dataclasses.replace(DEFAULT, timeout=90, cpus_per_task=3)
    assert (partition.timeout(DEFAULT, small), partition.cpus_per_task(DEFAULT, small)) == (60, 1)
    assert (partition.timeout(DEFAULT, Limits()), partition.cpus_per_task(DEFAULT, Limits())) == (2800, 10)
    assert (partition.timeout(eight, small), partition.cpus_per_task(eight, small)) == (90, 3)


def test_the_output_folder_is_absolute_and_knows_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = Task("task_script:main", argparse.Namespace(output_dir="runs/%j/x"))
    assert task.with_output_dir("42").args.output_dir == str(tmp_path / "runs/42/x")
    assert task.with_output_dir(None).args.output_dir == str(tmp_path / "runs/%j/x")
    assert task.args.output_dir == "runs/%j/x", "the arguments handed in stay as they are"
    assert list(tmp_path.iterdir()) == [], "no folder named %j is made"


def test_a_requeued_job_resumes_even_after_no_resume() -> None:
    job = Job(Task("task_script:main", argparse.Namespace(output_dir="x", no_resume=True)))
    again = pickle.loads(pickle.dumps(job)).checkpoint().function
    assert isinstance(again, Job)
    assert again.task == Task("task_script:main", argparse.Namespace(output_dir="x", no_resume=False))
    assert job.task.args.no_resume, "the running job is not changed"


def test_a_job_of_two_tasks_through_submitit_is_one_group_and_resumes_when_restarted(
    script: Path, tmp_path: Path
) -> None:
    """submitit's own executor for one machine: the tasks find each other, and `%j` is the job's id."""
    submit = f"""
    import argparse, sys, submitit
    sys.path.append({str(ROOT)!r})
    from dinov2.run.slurm import Job
    from dinov2.run.task import Task
    executor = submitit.AutoExecutor({str(tmp_path / "jobs" / "%j")!r}, cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=2)
    args = argparse.Namespace(output_dir={str(tmp_path / "jobs" / "%j")!r}, rank_1=None, no_resume=True)
    job = executor.submit(Job(Task("task_script:main", args)))
    assert job.results() == [0, 0]
    sys.stdout.write(job.job_id)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(submit)],
        env=environment()
        | {"PYTHONPATH": f"{ROOT}:{script.parent}", "PATH": os.environ["PATH"], "SLURM_RESTART_COUNT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    facts = [read(tmp_path / "jobs" / result.stdout / f"rank{rank}.json") for rank in (0, 1)]
    assert [each["total"] for each in facts] == [3, 3]
    assert not any(each["args"]["no_resume"] for each in facts)


def test_what_is_for_slurm_only_is_named_when_it_runs_here(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_flags_without_effect(dataclasses.replace(DEFAULT, partition="gpu", timeout=5))
    assert caplog.messages == ["--timeout, --partition: for SLURM only, no effect here"]
