"""Running a task on this machine, in this process or in several."""

import logging
import multiprocessing
import os
import signal
import tempfile
import time
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dinov2.log import log_path
from dinov2.run import failures
from dinov2.run.task import Task

logger = logging.getLogger(__name__)

# Signals forwarded to the processes; a training then ends with a checkpoint of the current step.
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)


def run_here(task: Task) -> int:
    """Call the task in this process, which may be one of several that torchrun or srun started."""
    job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return task.with_output_dir(job_id or time.strftime("%Y%m%d-%H%M%S")).call()


def run_local(task: Task, num_processes: int) -> int:
    """Call the task in one or several processes on this machine; returns the exit status."""
    task = task.with_output_dir(time.strftime("%Y%m%d-%H%M%S"))
    logger.info("running here with %d process(es), output in %s", num_processes, task.args.output_dir)
    if num_processes == 1:
        return task.call()
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
    logger.warning("stopped by %s; the same command again continues a training", signum.name)
    return 128 + signum


def _error_message(rank: int, exitcode: int, world_size: int, folder: Path, task: Task) -> str:
    """Describe the failure of a launch whose process `rank` ended first."""
    found = failures.read_failures(folder.glob("*.json"))
    if rank in {failure.rank for failure in found} or (found and not found[0].lost_peer):
        return failures.error_message(found)
    reason = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
    hint = ", perhaps for lack of memory" if exitcode == -signal.SIGKILL else ""
    return f"error: process {rank} of {world_size} {reason}{hint}; log: {log_path(task.args.output_dir, rank)}"
