"""Running a task on this machine: in this process, or in several that are started and watched."""

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

# What is passed on to the processes, which a training ends with a checkpoint of the current step.
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)


def run_here(task: Task) -> int:
    """Call the task in this process, which may be one of several that torchrun or srun started."""
    job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return task.with_output_dir(job_id or time.strftime("%Y%m%d-%H%M%S")).call()


def run_local(task: Task, num_processes: int) -> int:
    """Call the task in this process, or in several processes on this machine; the exit status."""
    task = task.with_output_dir(time.strftime("%Y%m%d-%H%M%S"))
    logger.info("running here with %d process(es), output in %s", num_processes, task.args.output_dir)
    if num_processes == 1:
        return task.call()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the processes share the cores
    # What it says of a failure is said better below.
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
            # What is ignored, such as SIGHUP under nohup, stays so.
            signals_to_handle=",".join(s.name for s in _PASSED_ON if signal.getsignal(s) != signal.SIG_IGN),
        )
        try:
            results = elastic_launch(settings, _process)(task, Path(folder))
        except SignalException as stop:
            return _stopped_by(stop.sigval)
        except ChildFailedError as error:
            rank, ended = error.get_first_failure()
            if ended.exitcode - 128 in _PASSED_ON:  # one of the processes got it, and all have agreed to stop
                return _stopped_by(signal.Signals(ended.exitcode - 128))
            text = _why(rank, ended.exitcode, num_processes, Path(folder), task)
            logger.error("%s", text, extra={"last_words": text})
            return 1
    return max(results.values())


def _process(task: Task, folder: Path) -> int:
    """What each of several processes does."""
    multiprocessing.set_start_method(None, force=True)  # torch's elastic launch makes it `spawn`, slow for loaders
    os.setpgrp()  # Ctrl-C in a terminal then comes from the launcher alone, and once
    rank = int(os.environ["RANK"])
    try:
        return task.call_as(rank, int(os.environ["WORLD_SIZE"]), note=folder / f"{rank}.json")
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception:  # the launcher tells which
        raise SystemExit(1) from None


def _stopped_by(signum: signal.Signals) -> int:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    logger.warning("stopped by %s; the same command again continues a training", signum.name)
    return 128 + signum


def _why(rank: int, exitcode: int, world_size: int, folder: Path, task: Task) -> str:
    """The last words of a launch of which process `rank` was found to have ended first."""
    notes = failures.read_notes(folder.glob("*.json"))
    noted = {failure.rank for failure in notes}
    if rank in noted or (notes and not notes[0].lost_peer):
        return failures.last_words(notes)
    reason = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
    hint = ", perhaps for lack of memory" if exitcode == -signal.SIGKILL else ""
    return f"error: process {rank} of {world_size} {reason}{hint}; log: {log_path(task.args.output_dir, rank)}"
