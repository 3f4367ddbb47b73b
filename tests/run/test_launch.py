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
from pathlib import Path
from typing import Any

import pytest
import submitit

from dinov2.run.launch import (
    Job,
    LaunchError,
    Submission,
    executor_parameters,
    launch,
    num_local_processes,
    uses_slurm,
    with_output_dir,
)

ROOT = Path(__file__).resolve().parents[2]

DEFAULT = Submission(
    launcher="auto",
    ngpus=None,
    nodes=1,
    timeout=2800,
    partition=None,
    account=None,
    qos=None,
    constraint=None,
    use_volta32=False,
    mem=None,
    cpus_per_task=10,
    comment="",
    exclude="",
)

# A task that says who it is: one file per process, holding what it was given.
TASK = """
import argparse, json, os, sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.append(os.environ["CLONE"])

import torch
from dinov2 import distributed
from dinov2.run.launch import launch


def get_args_parser(add_help=True):
    parser = argparse.ArgumentParser(add_help=add_help)
    parser.add_argument("--config-file")
    parser.add_argument("--output-dir", default="")
    parser.add_argument("--fail-on-rank", type=int)
    parser.add_argument("--no-resume", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("opts", nargs="*")
    return parser


def main(args):
    with distributed.session() as place:
        if distributed.rank() == args.fail_on_rank:
            raise OSError("rank %d ran out of paper" % args.fail_on_rank)
        total = distributed.all_reduce_sum(torch.tensor(distributed.rank() + 1)).item()
        out = Path(args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        facts = {"world_size": place.world_size, "total": total, "args": vars(args)}
        (out / f"rank{distributed.rank()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(launch("tell:main", get_args_parser, "tell"))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "tell.py"
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
        "fail_on_rank": None,
        "no_resume": True,
        "dry_run": False,
        "opts": ["optim.epochs=20", "train.seed=1"],
    }, "the task gets its own arguments and none of the launcher's"
    assert "--ngpus 4, but this machine has 0: running 1 process(es)" in result.stdout


def test_several_processes_on_one_machine(script: Path, tmp_path: Path) -> None:
    result = run(script, "--launcher", "local", "--ngpus", "2", "--output-dir", "../out/%j")
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert "%j" not in folder.name
    assert [read(folder / f"rank{rank}.json")["total"] for rank in (0, 1)] == [3, 3]


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


def test_a_failing_process_ends_the_launch_with_its_traceback(script: Path) -> None:
    result = run(script, "--launcher", "local", "--ngpus", "2", "--fail-on-rank", "1")
    assert result.returncode == 1
    assert "rank 1 ran out of paper" in result.stdout[-3000:]


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
def test_wrong_commands_are_usage_errors_that_say_what_to_do(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as exit_info:
        launch("tell:main", make_task_parser, "tell", ["--config-file", "train/vitl16_short", *words])
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("launcher", "ngpus", "num_gpus", "expected"),
    [
        ("auto", None, 0, 1),
        ("auto", None, 3, 3),
        ("auto", None, 16, 8),
        ("auto", 2, 4, 2),
        ("auto", 8, 3, 3),
        ("auto", 8, 0, 1),
        ("local", None, 4, 4),
        ("local", 2, 0, 2),
        ("local", 0, 4, 1),
    ],
)
def test_number_of_local_processes(launcher: str, ngpus: int | None, num_gpus: int, expected: int) -> None:
    submission = dataclasses.replace(DEFAULT, launcher=launcher, ngpus=ngpus)
    assert num_local_processes(submission, num_gpus) == expected


def test_more_gpus_than_there_are_is_an_error_when_asked_for_explicitly() -> None:
    with pytest.raises(LaunchError, match="--ngpus 8: this machine has 3"):
        num_local_processes(dataclasses.replace(DEFAULT, launcher="local", ngpus=8), 3)


def test_slurm_is_used_when_it_is_there_and_not_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not uses_slurm(DEFAULT)
    for name in ("sbatch", "srun"):
        (tmp_path / name).touch(0o755)
    assert uses_slurm(DEFAULT)
    assert not uses_slurm(dataclasses.replace(DEFAULT, launcher="local"))


def test_executor_parameters_are_the_published_ones_without_anyones_partition() -> None:
    set_parameters = {key: value for key, value in executor_parameters(DEFAULT, "dinov2:train").items() if value}
    assert set_parameters.pop("slurm_setup") == [f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"]
    assert set_parameters == {
        "name": "dinov2:train",
        "nodes": 1,
        "gpus_per_node": 8,
        "tasks_per_node": 8,
        "cpus_per_task": 10,
        "timeout_min": 2800,
        "slurm_signal_delay_s": 120,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
    }
    asked = dataclasses.replace(DEFAULT, ngpus=0, use_volta32=True, constraint="ib", mem="64GB", partition="p")
    parameters = executor_parameters(asked, "x")
    assert (parameters["gpus_per_node"], parameters["tasks_per_node"]) == (None, 1)
    assert (parameters["slurm_constraint"], parameters["slurm_mem"]) == ("ib&volta32gb", "64GB")


def test_submitit_accepts_the_executor_parameters(tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="local")  # checks the names for all clusters
    executor.update_parameters(**executor_parameters(dataclasses.replace(DEFAULT, partition="p", mem="1GB"), "x"))


def test_the_output_folder_is_absolute_and_knows_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(output_dir="runs/%j/x")
    assert with_output_dir(args, "42").output_dir == str(tmp_path / "runs/42/x")
    assert with_output_dir(args, None).output_dir == str(tmp_path / "runs/%j/x")
    assert args.output_dir == "runs/%j/x", "the arguments handed in stay as they are"
    assert list(tmp_path.iterdir()) == [], "no folder named %j is made"


def test_a_requeued_job_resumes_even_if_the_first_was_told_not_to(tmp_path: Path) -> None:
    job = Job("tell:main", argparse.Namespace(output_dir="x", no_resume=True))
    again = pickle.loads(pickle.dumps(job)).checkpoint().function
    assert isinstance(again, Job)
    assert again.args == argparse.Namespace(output_dir="x", no_resume=False)
    assert job.args.no_resume, "the running job is not changed"


def test_a_job_of_two_tasks_through_submitit_is_one_group(script: Path, tmp_path: Path) -> None:
    """submitit's own executor for one machine: the tasks find each other, and `%j` is the job's id."""
    submit = f"""
    import argparse, sys, submitit
    sys.path.append({str(ROOT)!r})
    from dinov2.run.launch import Job
    executor = submitit.AutoExecutor({str(tmp_path / "jobs" / "%j")!r}, cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=2)
    args = argparse.Namespace(output_dir={str(tmp_path / "jobs" / "%j")!r}, fail_on_rank=None)
    job = executor.submit(Job("tell:main", args))
    assert job.results() == [0, 0]
    sys.stdout.write(job.job_id)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(submit)],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{script.parent}", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "jobs" / result.stdout
    assert [read(folder / f"rank{rank}.json")["total"] for rank in (0, 1)] == [3, 3]
