"""Running a task as a SLURM job by submitit: its resources, its processes, and how it is requeued.

A job is stopped and continued in three ways. On SIGUSR2 (its time limit, or a preemption that warns by the job's
`--signal`) submitit requeues it, after a training has written a checkpoint. On SIGTERM (a preemption without warning) a
training writes a checkpoint too and exits, and the job is requeued here. `scontrol requeue` and node failures requeue
it by themselves.
"""

import copy
import io
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
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

MAX_SIGNAL_DELAY = 120  # seconds before the time limit at which the job gets a signal
MAX_TIMEOUTS = 30

_SIGNALS = {signal.SIGUSR2, signal.SIGTERM}
# Runs Python with these signals blocked until submitit handles them. Otherwise they would end the process, and the job
# would fail instead of being requeued.
_HOLD_SIGNALS = (
    "import os, signal, sys; "
    f"signal.pthread_sigmask(signal.SIG_BLOCK, {sorted(map(int, _SIGNALS))}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Job:
    """The callable that each process of a SLURM job runs: a task, pickled by submitit."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self) -> int:
        import submitit

        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        logging.getLogger("submitit").handlers.clear()  # replaced by those of the package
        job = submitit.JobEnvironment()
        restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0  # by SLURM
        task = (resuming(self.task) if restarted else self.task).with_output_dir(job.job_id)
        setup_logging(rank=job.global_rank)
        logger.info("%d tasks, this is rank %d: %s", job.num_tasks, job.global_rank, task.args)
        failure_file = Path(job.paths.folder) / f"{job.job_id}_{job.global_rank}_failure.json"
        signal.signal(signal.SIGTERM, partial(_on_sigterm, job.job_id))
        status = task.call_as(job.global_rank, job.num_tasks, failure_file)
        for signum in _SIGNALS:  # Python resets its handlers at exit, and a finished job would fail
            signal.signal(signum, signal.SIG_IGN)
        return status

    def checkpoint(self) -> Any:
        """Called by submitit before it requeues the job."""
        import submitit

        return submitit.helpers.DelayedSubmission(Job(resuming(self.task)))


def resuming(task: Task) -> Task:
    """Returns the task with resuming enabled."""
    args = copy.deepcopy(task.args)
    if hasattr(args, "no_resume"):
        args.no_resume = False
    return Task(task.function, args)


def _on_sigterm(job_id: str, signum: int, frame: FrameType | None) -> None:
    """Requeue the job if a training forwards the signal, without a frame, after its checkpoint."""
    if frame is None:  # from the system it may have other reasons, such as the failure of another process
        requeue(job_id)


def requeue(job_id: str) -> None:
    """Requeue this job, unless it was canceled or requeued already, which also sends SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the commands below
    try:
        squeue = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"]
        state = subprocess.run(squeue, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
        if state == "RUNNING":
            subprocess.run(["scontrol", "requeue", job_id], check=True, capture_output=True, text=True, timeout=60)
            logger.info("requeued job %s", job_id)
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("could not requeue job %s: %s; submit it again to continue", job_id, error)


def signal_delay(timeout: int) -> int:
    """Seconds before a time limit (in minutes) at which a job gets a signal.

    SLURM checks times every half minute and sends signals up to a minute early, so short jobs get a shorter delay.
    """
    return min(MAX_SIGNAL_DELAY, 10 * timeout)


def executor_parameters(
    submission: Submission, name: str, output_dir: str, permitted: Limits = UNKNOWN
) -> dict[str, Any]:
    """Build the parameters of submitit's executor; None means the default of the cluster."""
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
        "slurm_additional_parameters": {"requeue": True},  # even if the cluster does not by default
        # A failed process ends the others immediately. srun does not inherit the number of CPUs.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}"],
        "slurm_setup": [*submission.setup, *_environment(ngpus)],
        "slurm_teardown": _report_failure(output_dir),
    }


def _environment(ngpus: int) -> list[str]:
    """Lines of the job script that make the package importable, and hide GPUs that were not requested."""
    clone = Path(__file__).resolve().parents[2]
    lines = [] if ngpus else ["export CUDA_VISIBLE_DEVICES="]
    if (clone / "setup.py").exists():  # not installed: import it from the same folder
        lines.append(f"export PYTHONPATH={shlex.quote(str(clone))}${{PYTHONPATH:+:$PYTHONPATH}}")
    return lines


def _report_failure(output_dir: str) -> list[str]:
    """Lines at the end of the job script that report its failure."""
    folder = "${SLURM_JOB_ID}".join(shlex.quote(part) if part else "" for part in output_dir.split("%j"))
    records = f"{folder}/${{SLURM_JOB_ID}}_*_failure.json"
    return [
        "status=$?",
        f"if [ $status -ne 0 ]; then {shlex.quote(sys.executable)} -m dinov2.run.failures {records} && status=1; fi",
        "exit $status",
    ]


def _describe_request(submission: Submission, permitted: Limits) -> str:
    """Describe a request that sbatch refused, and how to change it."""
    ngpus, tasks = per_slurm_node(submission)
    cpus = partition.cpus_per_task(submission, permitted)
    return (
        f"requested {submission.nodes} node(s), on each {ngpus} GPU(s) and {tasks} process(es) with {cpus} CPU(s); "
        "--ngpus, --tasks-per-node and --cpus-per-task change that (--ngpus 0: no GPUs), --launcher local runs here"
    )


def submit(task: Task, submission: Submission, name: str) -> int:
    """Submit the task to SLURM and log its paths and commands; returns the exit status. A refusal is a LaunchError."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    task = task.with_output_dir(job_id=None)
    output_dir = task.args.output_dir
    is_new = not Path(output_dir).exists()
    executor = submitit.AutoExecutor(
        folder=output_dir,
        cluster="slurm",
        slurm_max_num_timeout=MAX_TIMEOUTS,
        slurm_python=f"{shlex.quote(sys.executable)} -c {shlex.quote(_HOLD_SIGNALS)}",
    )
    permitted = partition.limits(submission.partition)
    executor.update_parameters(**executor_parameters(submission, name, output_dir, permitted))
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it then raises
            job = executor.submit(Job(task))
    except (FailedJobError, FailedSubmissionError) as error:
        if is_new:  # contains only files of the refused submission
            shutil.rmtree(output_dir, ignore_errors=True)
        raise LaunchError(f"sbatch refused the job: {error}\n{_describe_request(submission, permitted)}") from error
    folder = output_dir.replace("%j", job.job_id)
    logger.info("submitted job %s (%s)", job.job_id, name)
    logger.info("output: %s", folder)
    logger.info("logs:   %s of rank 0, and of the others %s.rank1, ...", log_path(folder), log_path(folder))
    logger.info("        %s/%s_*_log.out and .err: all output of process *", folder, job.job_id)
    logger.info("follow: tail -F %s %s", job.paths.stdout, job.paths.stderr)
    logger.info("state:  squeue -j %s    cancel: scancel %s", job.job_id, job.job_id)
    return 0
