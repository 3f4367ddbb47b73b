"""The launcher of training and evaluation: submits to SLURM, or runs in one or several processes on this machine.

A task is a function of the parsed arguments, named `module:function`. Each process of a job calls it and determines its
rank itself (`dinov2.distributed`).
"""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dinov2 import config, distributed
from dinov2.log import log_of_job, run_command, setup_logging
from dinov2.run.failures import error_message, read_failures
from dinov2.run.slurm import submit
from dinov2.run.submission import (
    LaunchError,
    check_counts,
    num_local_processes,
    parse,
    per_slurm_node,
    uses_slurm,
    warn_of_flags_without_effect,
)
from dinov2.run.task import Task

logger = logging.getLogger(__name__)

AFTER_INTERRUPT = "the same command again continues a training"

# Signals forwarded to the processes; a training then ends with a checkpoint of the current step.
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)


def _check_config(args: argparse.Namespace, num_processes: int) -> list[str]:
    config.load(args.config_file, args.opts)
    return []


def launch(
    function: str,
    get_args_parser: Callable[..., argparse.ArgumentParser],
    name: str,
    argv: Sequence[str] | None = None,
    check: Callable[[argparse.Namespace, int], list[str]] = _check_config,
) -> int:
    """Parse the command line of a launcher and run or submit the task; returns the exit status.

    Args:
        function: `module:function`, called with the parsed arguments of the task.
        get_args_parser: Builds the parser of the task; called with `add_help=False`.
        name: Name of the job in the queue, such as `dinov2:train`.
        argv: Command line without the program; None: that of the process.
        check: (arguments of the task, number of processes) -> warnings; may raise a ConfigError. Called first, as the
            task checks again after hours in the queue; by default it loads the configuration.
    """
    args, submission = parse(get_args_parser, argv)
    task = Task(function, args)
    dry_run = getattr(args, "dry_run", False)
    setup_logging()
    if distributed.detect_process().world_size > 1:  # torchrun or srun has started the processes already
        return run_command(partial(run_here, task), after_interrupt=AFTER_INTERRUPT)
    if submission.ngpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is initialized
    try:
        check_counts(submission)
        on_slurm = uses_slurm(submission)
        if on_slurm:
            num_processes = submission.nodes * per_slurm_node(submission)[1]
        else:
            num_processes = num_local_processes(submission, torch.cuda.device_count())
            warn_of_flags_without_effect(submission)
        planned = submission.nodes * num_processes if dry_run and not on_slurm else num_processes
        warnings = check(args, planned)
        if on_slurm and not dry_run:
            for warning in warnings:
                logger.warning("%s", warning)
            return submit(task, submission, name)
    except (config.ConfigError, FileNotFoundError, LaunchError) as error:
        sys.stderr.write(f"error: {error}\n")  # without the usage, which is long
        raise SystemExit(2) from error
    if dry_run:
        task.args.world_size = planned  # number of processes of the planned run
        return run_command(partial(run_here, task), after_interrupt=AFTER_INTERRUPT)
    return run_command(partial(run_local, task, num_processes), after_interrupt=AFTER_INTERRUPT)


def run_here(task: Task) -> int | None:
    """Call the task in this process, which may be one of several that torchrun or srun started."""
    job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    task = task.with_output_dir(job_id or time.strftime("%Y%m%d-%H%M%S"))
    return task.load()(task.args)


def run_local(task: Task, num_processes: int) -> int | None:
    """Call the task in one or several processes on this machine; returns the exit status."""
    task = task.with_output_dir(time.strftime("%Y%m%d-%H%M%S"))
    logger.info("running here with %d process(es), output in %s", num_processes, task.args.output_dir)
    if num_processes == 1:
        return task.load()(task.args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the processes share the cores
    # Failures are reported more clearly below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            # Ignored signals, such as SIGHUP under nohup, stay ignored.
            signals_to_handle=",".join(s.name for s in _FORWARDED if signal.getsignal(s) != signal.SIG_IGN),
        )
        try:
            results = elastic_launch(settings, _process)(task, Path(folder))
        except SignalException as stop:
            return _stopped_by(stop.sigval)
        except ChildFailedError as error:
            rank, ended = error.get_first_failure()
            if ended.exitcode - 128 in _FORWARDED:  # a process received it, and all agreed to stop
                return _stopped_by(signal.Signals(ended.exitcode - 128))
            text = _error_message(rank, ended.exitcode, num_processes, Path(folder), task)
            logger.error("%s", text, extra={"last_words": text})
            return 1
    return max(results.values())


def _process(task: Task, folder: Path) -> int:
    """Entry point of each of several processes."""
    multiprocessing.set_start_method(None, force=True)  # torch's elastic launch sets `spawn`, which is slow for loaders
    os.setpgrp()  # Ctrl-C is then forwarded by the launcher alone, once
    rank = int(os.environ["RANK"])
    try:
        return task.call_as(rank, int(os.environ["WORLD_SIZE"]), failure_file=folder / f"{rank}.json")
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception:  # reported by the launcher
        raise SystemExit(1) from None


def _stopped_by(signum: signal.Signals) -> int:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    logger.warning("stopped by %s; %s", signum.name, AFTER_INTERRUPT)
    return 128 + signum


def _error_message(rank: int, exitcode: int, world_size: int, folder: Path, task: Task) -> str:
    """Describe the failure of a launch whose process `rank` ended first."""
    found = read_failures(folder.glob("*.json"))
    if rank in {failure.rank for failure in found} or (found and not found[0].lost_peer):
        return error_message(found)
    reason = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
    hint = ", perhaps for lack of memory" if exitcode == -signal.SIGKILL else ""
    return f"error: process {rank} of {world_size} {reason}{hint}; log: {log_of_job(task.args.output_dir, rank)}"
