"""Running a task as a SLURM job, by submitit: what is asked for, what its processes do, how it goes on when stopped.

A job is stopped and goes on in three ways. On SIGUSR2 (its time limit, or a preemption that warns by the job's
`--signal`) submitit requeues it; a training has then written a checkpoint. On SIGTERM (a preemption that does not) a
training writes one as well and leaves, and the job is requeued here. `scontrol requeue` and the failure of a node
requeue it by themselves.
"""

import copy
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from dinov2.log import log_path, setup_logging
from dinov2.run import partition
from dinov2.run.partition import UNKNOWN, Limits
from dinov2.run.submission import LaunchError, Submission, per_slurm_node
from dinov2.run.task import Task

logger = logging.getLogger(__name__)

MAX_SIGNAL_DELAY = 120  # seconds before the time limit at which the job is told to stop
MAX_TIMEOUTS = 30

_SIGNALS = {signal.SIGUSR2, signal.SIGTERM}
# Runs Python with these signals held back until submitit is ready for them: they would end the process, and the job
# would have failed instead of being requeued.
_HOLD_SIGNALS = (
    "import os, signal, sys; "
    f"signal.pthread_sigmask(signal.SIG_BLOCK, {sorted(map(int, _SIGNALS))}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Job:
    """What a SLURM job runs, in every process: a task, as submitit pickles it."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self) -> int:
        import submitit

        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        logging.getLogger("submitit").handlers.clear()  # ours are enough
        place = submitit.JobEnvironment()
        task = (self.task if restarts() == 0 else resuming(self.task)).with_output_dir(place.job_id)
        setup_logging(rank=place.global_rank)
        logger.info("%d tasks, this is rank %d: %s", place.num_tasks, place.global_rank, task.args)
        note = Path(place.paths.folder) / f"{place.job_id}_{place.global_rank}_failure.json"
        signal.signal(signal.SIGTERM, partial(_on_sigterm, place.job_id))
        status = task.call_as(place.global_rank, place.num_tasks, note)
        for signum in _SIGNALS:  # Python forgets its handlers while it ends, and a finished job would have failed
            signal.signal(signum, signal.SIG_IGN)
        return status

    def checkpoint(self) -> Any:
        """Called by submitit before it requeues the job."""
        import submitit

        return submitit.helpers.DelayedSubmission(Job(resuming(self.task)))


def restarts() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def resuming(task: Task) -> Task:
    """The same task, which now continues what it did before, whatever the first command said."""
    args = copy.deepcopy(task.args)
    if hasattr(args, "no_resume"):
        args.no_resume = False
    return Task(task.function, args)


def _on_sigterm(job_id: str, signum: int, frame: FrameType | None) -> None:
    """Requeue the job if a training hands the signal on, without a frame, after its checkpoint.

    From the system the signal has other meanings as well: that another process has failed, for instance.
    """
    if frame is None:
        requeue(job_id)


def requeue(job_id: str) -> None:
    """Put this job back into the queue, unless it has been cancelled or requeued, which also sends SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another one may follow at once: not for the commands below
    try:
        squeue = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"]
        state = subprocess.run(squeue, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
        if state == "RUNNING":
            subprocess.run(["scontrol", "requeue", job_id], check=True, capture_output=True, text=True, timeout=60)
            logger.info("requeued job %s", job_id)
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("could not requeue job %s: %s; submit it again to continue", job_id, error)


def signal_delay(timeout: int) -> int:
    """Seconds before the time limit of so many minutes at which a job is told to stop.

    SLURM looks at the clock every half minute and sends the signal up to a minute early: of a short job little would
    be left.
    """
    return min(MAX_SIGNAL_DELAY, 10 * timeout)


def executor_parameters(
    submission: Submission, name: str, output_dir: str, permitted: Limits = UNKNOWN
) -> dict[str, Any]:
    """The parameters of submitit's executor; None means: as the cluster decides."""
    ngpus, tasks = per_slurm_node(submission)
    timeout, cpus_per_task = partition.timeout(submission, permitted), partition.cpus_per_task(submission, permitted)
    constraints = [submission.constraint, "volta32gb" if submission.use_volta32 else None]
    return {
        "name": name,
        "nodes": submission.nodes,
        "gpus_per_node": ngpus or None,
        "tasks_per_node": tasks,
        "cpus_per_task": cpus_per_task,
        "timeout_min": timeout,
        "slurm_mem": submission.mem,
        "slurm_partition": submission.partition,
        "slurm_account": submission.account,
        "slurm_qos": submission.qos,
        "slurm_constraint": "&".join(filter(None, constraints)) or None,
        "slurm_comment": submission.comment or None,
        "slurm_exclude": submission.exclude or None,
        "slurm_signal_delay_s": signal_delay(timeout),
        "slurm_additional_parameters": {"requeue": True},  # also where the cluster's default is not to
        # A process that fails takes the others down at once. srun does not inherit the number of CPUs.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}"],
        "slurm_setup": [*submission.setup, *_environment(ngpus)],
        "slurm_teardown": _last_words(output_dir),
    }


def _environment(ngpus: int) -> list[str]:
    """Lines of the job's script that make its processes find the package, and no GPU that they did not ask for."""
    clone = Path(__file__).resolve().parents[2]
    lines = [] if ngpus else ["export CUDA_VISIBLE_DEVICES="]
    if (clone / "setup.py").exists():  # not installed: it must be found where this process found it
        lines.append(f"export PYTHONPATH={shlex.quote(str(clone))}${{PYTHONPATH:+:$PYTHONPATH}}")
    return lines


def _last_words(output_dir: str) -> list[str]:
    """Lines at the end of the job's script that say why it failed."""
    folder = "${SLURM_JOB_ID}".join(shlex.quote(part) if part else "" for part in output_dir.split("%j"))
    notes = f"{folder}/${{SLURM_JOB_ID}}_*_failure.json"
    return [
        "status=$?",
        f"if [ $status -ne 0 ]; then {shlex.quote(sys.executable)} -m dinov2.run.failures {notes} && status=1; fi",
        "exit $status",
    ]


def _what_was_asked(submission: Submission, permitted: Limits) -> str:
    """The request that sbatch did not take, and what to do."""
    ngpus, tasks = per_slurm_node(submission)
    cpus = partition.cpus_per_task(submission, permitted)
    return (
        f"asked for {submission.nodes} node(s), on each {ngpus} GPU(s) and {tasks} process(es) with {cpus} CPU(s); "
        "--ngpus, --tasks-per-node and --cpus-per-task change that (--ngpus 0: no GPUs), --launcher local runs here"
    )


def submit(task: Task, submission: Submission, name: str) -> int:
    """Put the task into SLURM's queue and say where to look; the exit status.

    Raises:
        LaunchError: If SLURM does not take it.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    task = task.with_output_dir(job_id=None)
    output_dir = task.args.output_dir
    made = not Path(output_dir).exists()
    executor = submitit.AutoExecutor(
        folder=output_dir,
        cluster="slurm",
        slurm_max_num_timeout=MAX_TIMEOUTS,
        slurm_python=f"{shlex.quote(sys.executable)} -c {shlex.quote(_HOLD_SIGNALS)}",
    )
    permitted = partition.limits(submission.partition)
    executor.update_parameters(**executor_parameters(submission, name, output_dir, permitted))
    try:
        job = executor.submit(Job(task))
    except (FailedJobError, FailedSubmissionError) as error:
        if made:  # with what was to be submitted
            shutil.rmtree(output_dir, ignore_errors=True)
        raise LaunchError(f"sbatch refused the job: {error}\n{_what_was_asked(submission, permitted)}") from error
    folder = output_dir.replace("%j", job.job_id)
    logger.info("submitted job %s (%s)", job.job_id, name)
    logger.info("output: %s", folder)
    logger.info("logs:   %s of rank 0, and of the others %s.rank1, ...", log_path(folder), log_path(folder))
    logger.info("        %s/%s_*_log.out and .err: all that process * says", folder, job.job_id)
    logger.info("follow: tail -F %s %s", job.paths.stdout, job.paths.stderr)
    logger.info("state:  squeue -j %s    cancel: scancel %s", job.job_id, job.job_id)
    return 0
