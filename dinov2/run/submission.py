"""The flags of the launchers, and the number of processes that they mean."""

import argparse
import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Literal

from dinov2.flags import CommandParser

logger = logging.getLogger(__name__)

PUBLISHED_GPUS_PER_NODE = 8
PUBLISHED_CPUS_PER_TASK = 10
PUBLISHED_TIMEOUT = 2800  # minutes


_SLURM_ONLY = (
    *("timeout", "partition", "account", "qos", "constraint", "use_volta32"),
    *("mem", "cpus_per_task", "comment", "exclude", "setup"),
)


class LaunchError(ValueError):
    """The task cannot be launched; the message states the remedy."""


@dataclasses.dataclass(frozen=True)
class Submission:
    """The launching flags: where a task runs and with which resources."""

    launcher: Literal["auto", "slurm", "local"]
    ngpus: int | None
    tasks_per_node: int | None
    nodes: int
    timeout: int | None
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    use_volta32: bool
    mem: str | None
    cpus_per_task: int | None
    comment: str
    exclude: str
    setup: list[str]


def make_parser(task_parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Build a parser of the flags of a task and of `Submission`."""
    parser = CommandParser(description=task_parser.description, parents=[task_parser])
    group = parser.add_argument_group("launching", "all but the first three flags are for SLURM only")
    add = group.add_argument
    add("--launcher", choices=("auto", "slurm", "local"), default="auto", help="auto: SLURM if available")
    add(
        "--ngpus",
        "--gpus",
        "--gpus-per-node",
        type=int,
        help="GPUs per node, with one process each; 0: run on CPUs and request no GPUs (default: "
        f"--tasks-per-node if given, else {PUBLISHED_GPUS_PER_NODE} on SLURM and all GPUs of this machine without)",
    )
    add(
        "--tasks-per-node",
        type=int,
        help="processes per node: as many as GPUs, or any number with --ngpus 0 (default: one per GPU; 1 without)",
    )
    add("--nodes", "--nnodes", type=int, default=1, help="nodes")
    add(
        "--timeout",
        type=int,
        help="minutes until the job is stopped, requeued and continued "
        f"(default: {PUBLISHED_TIMEOUT}, or the partition's limit)",
    )
    add("--partition", help="partition (default: the cluster's)")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--constraint", help="features that the nodes must have")
    add("--use-volta32", action="store_true", help="add the constraint volta32gb")
    add("--mem", help="memory per node, such as 480GB, 0 for all (default: the cluster's)")
    add(
        "--cpus-per-task",
        type=int,
        help="CPUs per process, one per data loader worker "
        f"(default: {PUBLISHED_CPUS_PER_TASK}, or the CPUs of a node divided by its processes)",
    )
    add("--comment", default="", help="comment for the job")
    add("--exclude", default="", help="nodes to avoid")
    add(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line that the job runs before its processes start, such as 'module load cuda'; all processes "
        "inherit its environment (may be repeated)",
    )
    return parser


def parse(
    get_args_parser: Callable[..., argparse.ArgumentParser], argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Submission]:
    """Parse the command line of a launcher (None: that of the process) into the arguments of its task and the rest."""
    args = make_parser(get_args_parser(add_help=False)).parse_intermixed_args(argv)
    return args, Submission(**{field.name: vars(args).pop(field.name) for field in dataclasses.fields(Submission)})


def uses_slurm(submission: Submission) -> bool:
    """Whether to submit the task to SLURM; a LaunchError if it is requested but not available."""
    found = shutil.which("sbatch") is not None and shutil.which("srun") is not None
    if submission.launcher == "slurm" and not found:
        raise LaunchError("--launcher slurm: sbatch and srun are not on PATH; submit from a login node of the cluster")
    return found and submission.launcher != "local"


def check_counts(submission: Submission) -> None:
    """Check the numbers of nodes, processes and so on; a LaunchError names flags out of range or in contradiction."""
    least = {"ngpus": 0, "tasks_per_node": 1, "nodes": 1, "timeout": 1, "cpus_per_task": 1}
    for name, lower in least.items():
        value = getattr(submission, name)
        if value is not None and value < lower:
            raise LaunchError(f"--{name.replace('_', '-')} {value}: must be at least {lower}")
    if submission.ngpus and submission.tasks_per_node not in (None, submission.ngpus):
        raise LaunchError(
            f"--tasks-per-node {submission.tasks_per_node} contradicts --ngpus {submission.ngpus}: there is one "
            "process per GPU; omit one of them, or use --ngpus 0 to run on CPUs"
        )


def warn_of_flags_without_effect(submission: Submission) -> None:
    """Warn of SLURM flags when the task runs on this machine."""
    given = [f"--{name.replace('_', '-')}" for name in _SLURM_ONLY if getattr(submission, name)]
    if given:
        logger.warning("%s: for SLURM only, no effect here", ", ".join(given))


def per_slurm_node(submission: Submission) -> tuple[int, int]:
    """Numbers of GPUs to request and processes to start on each node of a SLURM job."""
    ngpus = submission.ngpus
    if ngpus is None:
        ngpus = submission.tasks_per_node or PUBLISHED_GPUS_PER_NODE
    return ngpus, ngpus or submission.tasks_per_node or 1


def num_local_processes(submission: Submission, num_gpus: int) -> int:
    """Number of processes to start on this machine, which has `num_gpus` GPUs.

    `--launcher local --ngpus N` and `--tasks-per-node N` mean exactly N, also on a machine without GPUs; otherwise
    there is one process per GPU, up to the requested number. A LaunchError for several nodes, or if explicitly more
    processes than GPUs are requested.
    """
    if submission.nodes > 1:
        raise LaunchError(
            f"--nodes {submission.nodes} needs SLURM, but --launcher is local or sbatch and srun are not on PATH: "
            "submit from a login node of a cluster, or start the task itself with torchrun on every node, or omit "
            "--nodes to run on this machine alone"
        )
    if submission.ngpus == 0:
        return submission.tasks_per_node or 1
    if submission.tasks_per_node is not None or (submission.launcher == "local" and submission.ngpus is not None):
        exactly = submission.tasks_per_node or submission.ngpus or 1
        if num_gpus == 0:
            logger.warning("no GPU here: running %d process(es) on the CPU, as with --ngpus 0", exactly)
        if 0 < num_gpus < exactly:
            flag = "--tasks-per-node" if submission.ngpus is None else "--ngpus"
            raise LaunchError(f"{flag} {exactly}: this machine has {num_gpus} GPU(s); --ngpus 0 runs on the CPU")
        return exactly
    asked = PUBLISHED_GPUS_PER_NODE if submission.ngpus is None else submission.ngpus
    number = max(min(asked, num_gpus), 1)
    if submission.ngpus not in (None, number):
        logger.warning("--ngpus %d, but this machine has %d: running %d process(es)", asked, num_gpus, number)
    return number
