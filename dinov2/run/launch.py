"""One launcher for training and evaluation: submit to SLURM, start processes on this machine, or just run.

A task is a function that takes the parsed arguments, named as `module:function`. Every process of a job calls it and
finds its place by itself (`dinov2.distributed`).
"""

import argparse
import copy
import dataclasses
import importlib
import logging
import os
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dinov2 import config, distributed
from dinov2.log import run_command, setup_logging

logger = logging.getLogger(__name__)

PUBLISHED_GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Submission:
    """Where and with what a task runs; the submission flags."""

    launcher: Literal["auto", "slurm", "local"]
    ngpus: int | None
    nodes: int
    timeout: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    use_volta32: bool
    mem: str | None
    cpus_per_task: int
    comment: str
    exclude: str


def launch(
    task: str,
    get_args_parser: Callable[..., argparse.ArgumentParser],
    name: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Read the command line of a launcher and do what it says; the exit status.

    Args:
        task: `module:function`, called with the parsed arguments of the task.
        get_args_parser: makes the task's own parser; called with `add_help=False`.
        name: of the job in the queue, such as `dinov2:train`.
        argv: the command line without the program; None takes it from the process.
    """
    parser = _make_parser(get_args_parser(add_help=False))
    args = parser.parse_intermixed_args(argv)
    names = {field.name for field in dataclasses.fields(Submission)}
    submission = Submission(**{key: value for key, value in vars(args).items() if key in names})
    task_args = argparse.Namespace(**{key: value for key, value in vars(args).items() if key not in names})
    setup_logging()
    if distributed.where_am_i().world_size > 1:  # torchrun or srun has started the processes already
        return run_command(lambda: run_here(task, task_args))
    try:
        config.load(args.config_file, args.opts)  # an error now is better than one after hours in the queue
        slurm = uses_slurm(submission)
        per_node = num_slurm_tasks(submission) if slurm else num_local_processes(submission, torch.cuda.device_count())
        if slurm and not getattr(args, "dry_run", False):
            return submit(task, task_args, submission, name)
    except (config.ConfigError, FileNotFoundError, LaunchError) as error:
        parser.error(str(error))
    if getattr(args, "dry_run", False):
        task_args.world_size = submission.nodes * per_node  # what it is to reckon with
        return run_command(lambda: run_here(task, task_args))
    return run_command(lambda: run_local(task, task_args, per_node))


class LaunchError(ValueError):
    """The task cannot be launched as asked; the message says what to do."""


def _make_parser(task_parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=task_parser.description, parents=[task_parser], allow_abbrev=False)
    group = parser.add_argument_group("launching", "all but the first two flags are for SLURM only")
    add = group.add_argument
    add("--launcher", choices=("auto", "slurm", "local"), default="auto", help="auto: SLURM where there is one")
    add(
        "--ngpus",
        "--gpus",
        "--gpus-per-node",
        type=int,
        help=f"processes per node, one per GPU; 0: one process without a GPU (default: {PUBLISHED_GPUS_PER_NODE} on "
        "SLURM, else all GPUs of this machine)",
    )
    add("--nodes", "--nnodes", type=int, default=1, help="nodes")
    add("--timeout", type=int, default=2800, help="minutes until the job is stopped and requeued")
    add("--partition", help="partition (default: the cluster's)")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--constraint", help="features that the nodes must have")
    add("--use-volta32", action="store_true", help="add the constraint volta32gb")
    add("--mem", help="memory per node, such as 480GB, 0 for all (default: the cluster's)")
    add("--cpus-per-task", type=int, default=10, help="CPUs per process, one per data loader worker")
    add("--comment", default="", help="comment for the job")
    add("--exclude", default="", help="nodes to avoid")
    return parser


# --- Where to run ----------------------------------------------------------------------------------------------------


def uses_slurm(submission: Submission) -> bool:
    """Whether the task is to be submitted.

    Raises:
        LaunchError: if it is, but there is no SLURM here.
    """
    found = shutil.which("sbatch") is not None and shutil.which("srun") is not None
    if submission.launcher == "slurm" and not found:
        raise LaunchError("--launcher slurm: sbatch and srun are not on PATH; submit from a login node of the cluster")
    return found and submission.launcher != "local"


def num_slurm_tasks(submission: Submission) -> int:
    """How many processes to start on each node of a SLURM job: one per GPU."""
    return max(PUBLISHED_GPUS_PER_NODE if submission.ngpus is None else submission.ngpus, 1)


def num_local_processes(submission: Submission, num_gpus: int) -> int:
    """How many processes to start on this machine, which has `num_gpus` GPUs.

    `--launcher local --ngpus N` means exactly N, also on a machine without a GPU; otherwise one per GPU, at most as
    many as asked for.

    Raises:
        LaunchError: if more nodes, or more GPUs by `--launcher local`, are asked for than there are.
    """
    if submission.nodes > 1:
        raise LaunchError(
            f"--nodes {submission.nodes} needs SLURM, but --launcher is local or sbatch and srun are not on PATH: "
            "submit from a login node of a cluster, or start the task itself with torchrun on every node, or leave out "
            "--nodes to run on this machine alone"
        )
    asked = PUBLISHED_GPUS_PER_NODE if submission.ngpus is None else submission.ngpus
    if submission.launcher == "local" and submission.ngpus is not None:
        if 0 < num_gpus < asked:
            raise LaunchError(f"--ngpus {asked}: this machine has {num_gpus}")
        return max(asked, 1)
    number = max(min(asked, num_gpus), 1)
    if submission.ngpus not in (None, number):
        logger.warning("--ngpus %d, but this machine has %d: running %d process(es)", asked, num_gpus, number)
    return number


def default_output_dir() -> str:
    """Where a task without `--output-dir` writes: below DINOV2_OUTPUT_ROOT, or else below ./experiments."""
    return f"{os.environ.get('DINOV2_OUTPUT_ROOT', 'experiments')}/%j"


def with_output_dir(args: argparse.Namespace, job_id: str | None) -> argparse.Namespace:
    """A copy of the arguments with an absolute output folder, and the job id in the place of `%j` if it is known."""
    args = copy.deepcopy(args)
    args.output_dir = os.path.abspath(args.output_dir or default_output_dir())
    if job_id is not None:
        args.output_dir = args.output_dir.replace("%j", job_id)
    return args


# --- On this machine -------------------------------------------------------------------------------------------------


def run_here(task: str, args: argparse.Namespace) -> int:
    """Call the task in this process, which may be one of several that torchrun or srun started."""
    job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return call(task, with_output_dir(args, job_id or time.strftime("%Y%m%d-%H%M%S")))


def run_local(task: str, args: argparse.Namespace, num_processes: int) -> int:
    """Call the task in this process, or in several processes on this machine."""
    args = with_output_dir(args, time.strftime("%Y%m%d-%H%M%S"))
    logger.info("running here with %d process(es), output in %s", num_processes, args.output_dir)
    if num_processes == 1:
        return call(task, args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the processes share the cores
    with tempfile.TemporaryDirectory() as log_dir:  # only for the traceback of a process that fails
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
        )
        try:
            results = elastic_launch(settings, call)(task, args)
        except ChildFailedError as error:
            logger.error("%s", error)
            return 1
    return max(results.values())


def call(task: str, args: argparse.Namespace) -> int:
    """Import the task and call it; its result if that is an exit status, else 0."""
    module, _, function = task.partition(":")
    return getattr(importlib.import_module(module), function)(args) or 0


# --- On SLURM --------------------------------------------------------------------------------------------------------


class Job:
    """What a SLURM job runs, in every process: a task and its arguments, as submitit pickles them."""

    def __init__(self, task: str, args: argparse.Namespace) -> None:
        self.task = task
        self.args = args

    def __call__(self) -> int:
        import submitit

        environment = submitit.JobEnvironment()
        args = with_output_dir(self.args, environment.job_id)
        setup_logging(rank=environment.global_rank)
        logger.info("%d tasks, this is rank %d: %s", environment.num_tasks, environment.global_rank, args)
        return call(self.task, args)

    def checkpoint(self) -> Any:
        """Called by submitit before the job is requeued: the next time it resumes, whatever the first command said."""
        import submitit

        args = copy.deepcopy(self.args)
        if hasattr(args, "no_resume"):
            args.no_resume = False
        return submitit.helpers.DelayedSubmission(Job(self.task, args))


def executor_parameters(submission: Submission, name: str) -> dict[str, Any]:
    """The parameters of submitit's executor; None means: as the cluster decides."""
    tasks = num_slurm_tasks(submission)
    constraints = [submission.constraint, "volta32gb" if submission.use_volta32 else None]
    clone = Path(__file__).resolve().parents[2]
    # Not installed: the job must find the package where this process found it.
    setup = [f"export PYTHONPATH={shlex.quote(str(clone))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    return {
        "name": name,
        "nodes": submission.nodes,
        "gpus_per_node": None if submission.ngpus == 0 else tasks,
        "tasks_per_node": tasks,
        "cpus_per_task": submission.cpus_per_task,
        "timeout_min": submission.timeout,
        "slurm_mem": submission.mem,
        "slurm_partition": submission.partition,
        "slurm_account": submission.account,
        "slurm_qos": submission.qos,
        "slurm_constraint": "&".join(filter(None, constraints)) or None,
        "slurm_comment": submission.comment or None,
        "slurm_exclude": submission.exclude or None,
        "slurm_signal_delay_s": 120,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # a process that fails takes the others down at once
        "slurm_setup": setup if (clone / "setup.py").exists() else None,
    }


def submit(task: str, args: argparse.Namespace, submission: Submission, name: str) -> int:
    """Put the task into SLURM's queue and say where to look."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    args = with_output_dir(args, job_id=None)
    executor = submitit.AutoExecutor(folder=args.output_dir, cluster="slurm", slurm_max_num_timeout=30)
    executor.update_parameters(**executor_parameters(submission, name))
    try:
        job = executor.submit(Job(task, args))
    except (FailedJobError, FailedSubmissionError) as error:
        raise LaunchError(f"sbatch refused the job: {error}") from error
    logger.info("submitted job %s (%s)", job.job_id, name)
    logger.info("output: %s", args.output_dir.replace("%j", job.job_id))
    logger.info("follow: tail -F %s %s", job.paths.stdout, job.paths.stderr)
    logger.info("state:  squeue -j %s    cancel: scancel %s", job.job_id, job.job_id)
    return 0
