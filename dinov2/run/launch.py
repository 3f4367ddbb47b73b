"""The launcher of training and evaluation: submits to SLURM, or runs in one or several processes on this machine.

A task is a function of the parsed arguments, named `module:function`. Each process of a job calls it and determines its
rank itself (`dinov2.distributed`).
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence

import torch

from dinov2 import config, distributed
from dinov2.log import run_command, setup_logging
from dinov2.run.local import run_here, run_local
from dinov2.run.slurm import submit
from dinov2.run.submission import (
    LaunchError,
    Submission,
    check_counts,
    make_parser,
    num_local_processes,
    per_slurm_node,
    uses_slurm,
    warn_of_flags_without_effect,
)
from dinov2.run.task import Task

logger = logging.getLogger(__name__)

AFTER_INTERRUPT = "the same command again continues a training"


def launch(
    function: str,
    get_args_parser: Callable[..., argparse.ArgumentParser],
    name: str,
    argv: Sequence[str] | None = None,
    check: Callable[[config.Config, int], list[str]] = lambda cfg, world_size: [],
) -> int:
    """Parse the command line of a launcher and run or submit the task; returns the exit status.

    Args:
        function: Task, called with its parsed arguments.
        get_args_parser: Builds the parser of the task; called with `add_help=False`.
        name: Name of the job in the queue, such as `dinov2:train`.
        argv: Command line without the program; None: that of the process.
        check: (config, number of processes) -> warnings; may raise a ConfigError. Called before a job is queued; the
            task itself checks again.
    """
    parser = make_parser(get_args_parser(add_help=False))
    args = parser.parse_intermixed_args(argv)
    names = {field.name for field in dataclasses.fields(Submission)}
    submission = Submission(**{key: value for key, value in vars(args).items() if key in names})
    task = Task(function, argparse.Namespace(**{key: value for key, value in vars(args).items() if key not in names}))
    dry_run = getattr(args, "dry_run", False)
    setup_logging()
    if distributed.detect_process().world_size > 1:  # torchrun or srun has started the processes already
        return run_command(lambda: run_here(task), after_interrupt=AFTER_INTERRUPT)
    if submission.ngpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is initialized
    try:
        cfg = config.load(args.config_file, args.opts)  # errors now rather than after hours in the queue
        check_counts(submission)
        if not uses_slurm(submission):
            num_processes = num_local_processes(submission, torch.cuda.device_count())
            warn_of_flags_without_effect(submission)
        elif dry_run:
            num_processes = per_slurm_node(submission)[1]
        else:
            for warning in check(cfg, submission.nodes * per_slurm_node(submission)[1]):
                logger.warning("%s", warning)
            return submit(task, submission, name)
    except (config.ConfigError, FileNotFoundError, LaunchError) as error:
        sys.stderr.write(f"error: {error}\n")  # without the usage, which is long
        raise SystemExit(2) from error
    if dry_run:
        task.args.world_size = submission.nodes * num_processes  # number of processes of the planned run
        return run_command(lambda: run_here(task), after_interrupt=AFTER_INTERRUPT)
    return run_command(lambda: run_local(task, num_processes), after_interrupt=AFTER_INTERRUPT)
