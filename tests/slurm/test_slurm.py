"""The launchers on a real Slurm: whatever stops a training, it goes on where it was and ends as if nothing had been.

Jobs that mostly wait are started first and checked last.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import CONFIG_FILE, NUM_STEPS, RECIPE, ROOT, TRAIN, Job, assert_same_run, metrics, teacher_path

from dinov2.data import make_dataset

pytestmark = pytest.mark.slurm

FOUR = ("--nodes", "2", "--tasks-per-node", "2", "--cpus-per-task", "1", "--config-file", CONFIG_FILE)
TWO = ("--nodes", "2", "--cpus-per-task", "1", "--config-file", CONFIG_FILE)
TWO_ON_ONE = ("--tasks-per-node", "2", "--cpus-per-task", "1", "--config-file", CONFIG_FILE)
EVALUATIONS = {
    "knn": ("--nb_knn", "1", "5", "--batch-size", "8"),
    "log_regression": ("--max-train-iters", "5", "--batch-size", "8"),
    "linear": ("--epochs", "1", "--epoch-length", "4", "--batch-size", "4", "--learning-rates", "0.1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path) -> Job:
    """The published command, to its end: two nodes with two processes each."""
    job = Job(cluster, TRAIN, folder / "undisturbed" / "%j", *FOUR, *RECIPE)
    job.finish()
    return job


@pytest.fixture(scope="module")
def slow(cluster: Cluster, folder: Path, undisturbed: Job) -> Job:
    """Started early: two processes on one node that will not be ready within their time limit of a minute."""
    others = ",".join(cluster.nodes[:2])
    job = Job(cluster, TRAIN, folder / "slow", *TWO_ON_ONE, "--timeout", "1", "--exclude", others, *RECIPE)
    job.wait_for_step(2)
    job.freeze()
    return job


@pytest.fixture(scope="module")
def bereft(cluster: Cluster, folder: Path, slow: Job) -> Iterator[Job]:
    """Started early: two processes on two nodes, one of which is lost. Its command has --no-resume."""
    others = ",".join([*cluster.nodes[:2], slow.facts["NodeList"]])
    words = (*TWO, "--exclude", others, "--no-resume", *RECIPE, "train.checkpoint_period=4")
    job = Job(cluster, TRAIN, folder / "bereft", *words)
    job.wait_for_step(6)
    node = next(node for node in cluster.nodes if job.tasks(SLURMD_NODENAME=node, SLURM_PROCID="1"))
    cluster.kill_node(node)
    yield job
    cluster.start_node(node)


def local_run(folder: Path) -> Path:
    """The same training in two processes without Slurm, once."""
    output_dir = folder / "local"
    if not output_dir.exists():
        words = ("--launcher", "local", "--ngpus", "0", "--tasks-per-node", "2", "--config-file", CONFIG_FILE)
        command = [sys.executable, TRAIN, *words, "--output-dir", str(output_dir), *RECIPE]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=300)
    return output_dir


def starts(job: Job) -> list[int]:
    """The steps that had been done whenever the training started or went on."""
    return [int(text) for text in re.findall(rf"(\d+) of {NUM_STEPS} steps are done", job.log)]


def has_usr2(pid: int, signals: str) -> bool:
    """Whether SIGUSR2 is one of the blocked (`SigBlk`) or pending (`ShdPnd`) signals of a process."""
    (mask,) = re.findall(rf"^{signals}:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1)


def last_line(job: Job) -> str:
    return job.stderr.rstrip().splitlines()[-1]


# --- It runs ---------------------------------------------------------------------------------------------------------


def test_the_published_command_trains_on_two_nodes_with_two_processes_each(undisturbed: Job) -> None:
    folder = undisturbed.folder
    assert {"checkpoints", "config.yaml", "eval", "logs", "training_metrics.json"} <= set(os.listdir(folder))
    assert [line["iteration"] for line in metrics(folder)] == list(range(NUM_STEPS))
    assert os.listdir(folder / "checkpoints") == [f"model_{NUM_STEPS - 1:07d}"]
    assert teacher_path(folder).exists()
    assert sorted(os.listdir(folder / "logs")) == ["log.txt", "log.txt.rank1", "log.txt.rank2", "log.txt.rank3"]
    assert "4 process(es), device cpu" in undisturbed.log


def test_the_launcher_says_where_to_look_and_asks_for_no_gpu(undisturbed: Job) -> None:
    for line in (
        f"output: {undisturbed.folder}",
        f"logs:   {undisturbed.folder}/logs/log.txt",
        f"tail -F {undisturbed.folder}/{undisturbed.id}_0_log.out",
        f"squeue -j {undisturbed.id}",
        f"scancel {undisturbed.id}",
    ):
        assert line in undisturbed.output
    assert "gpu" not in undisturbed.facts["TRES"]
    assert undisturbed.facts["TimeLimit"] == "01:00:00", "the partition's, as the published 2800 minutes are more"


# --- It is stopped and goes on ---------------------------------------------------------------------------------------


def test_preempted_requeued_and_canceled_a_training_continues_exactly(
    undisturbed: Job, slow: Job, bereft: Job, cluster: Cluster, folder: Path
) -> None:
    """Only the signals' checkpoints can explain it: there is no periodic one."""
    nodes, others = cluster.nodes[:2], ",".join(cluster.nodes[2:])
    words = (*FOUR, "--exclude", others, "--setup", "export SET_UP=yes", *RECIPE, "train.num_workers=1")

    def preempt() -> None:
        cluster.run(
            *("sbatch", "--partition", "high", "--nodelist", ",".join(nodes), "--exclusive", "--nodes", "2"),
            *("--time", "1", "--output", "/dev/null", "--wrap", "sleep 1"),
        )

    def preempt_by_sigterm() -> None:
        cluster.preempt_with(warning=False)
        preempt()

    job = Job(cluster, TRAIN, folder / "disturbed", *words)
    disturbances: list[Callable[[], object]] = [
        preempt,
        preempt_by_sigterm,
        lambda: cluster.run("scontrol", "requeue", job.id),
        lambda: cluster.run("scancel", job.id),
    ]
    stopped_after = [0]
    for count, disturb in enumerate(disturbances, start=1):
        job.wait_for_step(stopped_after[-1] + 2)
        assert len(job.tasks(SET_UP="yes", SLURM_PROCID="3")) >= 1, "--setup reaches all processes"
        job.freeze()
        disturb()
        cluster.wait_for(lambda: job.state != "RUNNING", "the job to be stopped", seconds=60)
        cluster.wait_for(lambda: not job.tasks(), "its processes to end", seconds=30)
        stopped_after.append(job.steps)
        assert job.restarts == min(count, 3)
    job.wait_for_state("CANCELLED")
    assert starts(job) == stopped_after[:-1], "no step was lost or repeated"

    again = Job(cluster, TRAIN, job.folder, *words)  # the folder of a canceled job is as good as any
    again.finish()
    assert starts(again) == stopped_after
    assert_same_run(again.folder, undisturbed.folder)


# --- It fails --------------------------------------------------------------------------------------------------------


def test_an_error_of_a_person_ends_the_job_and_is_its_last_line(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, TRAIN, folder / "wrong", *TWO, "train.dataset_path=ImageFolder:root=/nowhere")
    job.wait_for_state("FAILED", seconds=60)
    where = rf"\(process . of 2 on 127.*; log: {job.folder}/logs/log.txt.*\)"
    expected = rf"error: no folder /nowhere; folders in /: .* {where}"
    assert re.fullmatch(expected, last_line(job))
    assert job.facts["ExitCode"] == "1:0"


def test_a_signal_at_the_start_is_not_lost_and_a_killed_process_ends_the_job(cluster: Cluster, folder: Path) -> None:
    cluster.run("scontrol", "update", "PartitionName=low", "State=DOWN")  # nothing starts before the test does
    try:
        job = Job(cluster, TRAIN, folder / "killed", *TWO, *RECIPE)
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "State=UP")
    early: set[int] = set()

    def both_are_early() -> bool:
        """Stops each process before it handles signals."""
        for pid in job.tasks() - early:
            if has_usr2(pid, "SigBlk"):
                os.kill(pid, signal.SIGSTOP)
                early.add(pid)
        return len(early) == 2

    cluster.wait_for(both_are_early, "its processes", seconds=60)
    cluster.run("scancel", "--signal", "USR2", job.id)
    cluster.wait_for(lambda: all(has_usr2(pid, "ShdPnd") for pid in early), "the signal to be pending", seconds=60)
    for pid in early:
        assert has_usr2(pid, "SigBlk")
        os.kill(pid, signal.SIGCONT)
    cluster.wait_for(lambda: job.restarts == 1, "the job to be requeued", seconds=60)
    job.wait_for_step(1)
    started = time.monotonic()
    (rank_1,) = job.tasks(SLURM_PROCID="1")
    os.kill(rank_1, signal.SIGKILL)
    job.wait_for_state("FAILED", seconds=60)
    assert time.monotonic() - started < 60
    assert "error: process 1 of 2 ended without an error: killed" in last_line(job)
    assert f"log: {job.folder}/logs/log.txt.rank1" in last_line(job)


# --- What was started early ------------------------------------------------------------------------------------------


def test_at_the_time_limit_a_training_is_requeued_and_continues_exactly(slow: Job, folder: Path) -> None:
    reference = local_run(folder)
    slow.finish()
    assert slow.restarts >= 1
    assert starts(slow)[0] == 0 < starts(slow)[-1], "at a slow start a warning may come before the training does"
    assert_same_run(slow.folder, reference)


def test_when_a_node_is_lost_the_job_goes_on_with_another_one_from_the_last_checkpoint(
    bereft: Job, folder: Path
) -> None:
    reference = local_run(folder)
    bereft.finish()
    assert bereft.restarts == 1
    assert starts(bereft)[1] in (4, 8), "a periodic checkpoint, not the beginning"
    assert "Node failure" in bereft.stderr
    assert_same_run(bereft.folder, reference)


# --- Its teacher is evaluated ----------------------------------------------------------------------------------------


def write_photographs(folder: Path, number: int) -> str:
    """The dataset string of a folder of so many photographs, each in the folder of its class."""
    dataset = make_dataset(dataset_str="FashionMNIST:split=VAL")
    for index in range(number):
        image, target = dataset[index]
        path = folder / str(target) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return f"ImageFolder:root={folder}"


def test_the_three_evaluation_launchers_run_on_two_nodes(undisturbed: Job, cluster: Cluster, folder: Path) -> None:
    dataset = write_photographs(folder / "photographs", 40)
    jobs = [
        Job(
            cluster,
            f"dinov2/run/eval/{name}.py",
            folder / name,
            *("--nodes", "2", "--cpus-per-task", "1", "--config-file", str(undisturbed.folder / "config.yaml")),
            *("--pretrained-weights", str(teacher_path(undisturbed.folder)), "--num-workers", "0"),
            *("--train-dataset", dataset, "--val-dataset", dataset, *words),
        )
        for name, words in EVALUATIONS.items()
    ]
    for job in jobs:
        job.finish()
        (results,) = job.folder.glob("results_eval_*.json")
        assert "top-1" in results.read_text()
        assert (job.folder / "logs" / "log.txt.rank1").exists()
