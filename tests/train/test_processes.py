"""Several processes, and one that accumulates, compute the same; runs continue on another number of processes."""

import itertools
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from archive_files import write_tar
from tiny import (
    CENTERING,
    CONFIG_FILE,
    SEPARATE_HEADS,
    all_in,
    checkpoints,
    children,
    descendants,
    killed_after,
    metrics,
    run_script,
    run_train,
    start_script,
    tensors,
    write_images,
)

from dinov2.train.checkpoint_files.state import read_state

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 12  # micro-batches of 2 images, for 1, 2 or 3 processes to share
STEPS = 50
COMMON = [
    *("train.batch_size_per_gpu=2", f"optim.epochs={STEPS // 2}", "train.checkpoint_period=1000"),
    *("train.checkpoint_keep=100", "evaluation.eval_period_iterations=0"),
]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
SCHEDULES = [  # that do not depend on the number of epochs, so that a run may be made longer
    *("optim.warmup_epochs=0", "optim.min_lr=0.002", "optim.weight_decay_end=0.04"),
    *("teacher.final_momentum_teacher=0.9", "teacher.warmup_teacher_temp_epochs=1"),
]


def sharded(strategy: str) -> list[str]:
    places = itertools.product(("student", "teacher"), ("backbone", "dino_head", "ibot_head"))
    return [f"compute_precision.{side}.{module}.sharding_strategy={strategy}" for side, module in places]


def train_on(num_processes: int, output_dir: Path, *words: str) -> str:
    """Train on several processes of this machine, or in this one; what was printed."""
    words = (*COMMON, *words)
    if num_processes == 1:
        run_train(output_dir, *words)
        return ""
    result = run_script(
        *(*TORCHRUN, f"--nproc-per-node={num_processes}"),
        *("dinov2/train/train.py", "--config-file", str(CONFIG_FILE), "--output-dir", str(output_dir), *words),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{num_processes} process(es)" in result.stdout
    return result.stdout + result.stderr


def workers(run: subprocess.Popen[str]) -> list[int]:
    """The training processes that torchrun has started, by rank."""
    return sorted(pid for pid in children(run.pid) if "train.py" in Path(f"/proc/{pid}/cmdline").read_text())


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def start_two(output_dir: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A training on two processes, and no trace of it afterwards."""
    words = ("--config-file", str(CONFIG_FILE), "--output-dir", str(output_dir), *COMMON, *words)
    run = start_script(*TORCHRUN, "--nproc-per-node=2", "dinov2/train/train.py", *words)
    try:
        yield run
    finally:
        for pid in [*descendants(run.pid), run.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.communicate()


def accumulate(num_processes: int) -> str:
    return f"train.accumulate_steps={GLOBAL_BATCH // 2 // num_processes}"


def largest_difference(a: Path, b: Path, step: int = STEPS - 1) -> float:
    """Of weights, centers and moments: norm of the difference / norm; without key biases, which do not matter."""
    first, second = tensors(a, step), tensors(b, step)
    assert first.keys() == second.keys()
    differences = []
    for name, value in first.items():
        other = second[name]
        if name.endswith("qkv.bias") or ".qkv.bias." in name:
            value, other = (torch.cat(t.chunk(3)[::2]) if t.ndim else t for t in (value, other))
        differences.append(float((value - other).norm() / other.norm().clamp(min=1e-6)))
    return max(differences)


def assert_same_losses(a: Path, b: Path, rel: float, ends: Sequence[int] = ()) -> None:
    """All that two runs logged is the same, but for the probe of the steps at which `a` ended to go on later."""
    assert len(metrics(a)) == len(metrics(b)) == STEPS
    for ours, reference in zip(metrics(a), metrics(b), strict=True):
        if ours["iteration"] in ends:
            ours = {name: value for name, value in ours.items() if not name.startswith(("probe_", "knn"))}
        # The information of targets is a difference of two entropies up to ln 16 = 2.8: one float32 step is 2.4e-7.
        names = {name for name in reference if name.endswith("_target_information")}
        assert {name: ours.pop(name) for name in names} == pytest.approx(
            {name: reference.pop(name) for name in names}, rel=rel, abs=2e-6
        )
        assert ours == pytest.approx(reference, rel=rel, abs=1e-7)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that accumulates three micro-batches."""
    output_dir = tmp_path_factory.mktemp("one")
    train_on(1, output_dir, accumulate(1))
    return output_dir


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_compute_what_one_does_that_accumulates(
    num_processes: int, one: Path, tmp_path: Path
) -> None:
    train_on(num_processes, tmp_path, accumulate(num_processes))
    assert_same_losses(tmp_path, one, rel=1e-4)
    assert largest_difference(tmp_path, one) < 1e-4


def test_so_they_do_with_centering_and_separate_heads(tmp_path: Path) -> None:
    for num_processes in (1, 3):
        train_on(num_processes, tmp_path / str(num_processes), accumulate(num_processes), CENTERING, *SEPARATE_HEADS)
    assert_same_losses(tmp_path / "3", tmp_path / "1", rel=1e-3)
    assert largest_difference(tmp_path / "3", tmp_path / "1") < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        sharded("NO_SHARD"),
        [*sharded("FULL_SHARD"), "train.activation_checkpointing=full"],
        [*sharded("FULL_SHARD"), "train.activation_checkpointing=selective", "student.block_chunks=1"],
    ],
    ids=["NO_SHARD", "FULL_SHARD full checkpointing", "FULL_SHARD in one unit"],
)
def test_no_strategy_changes_the_numbers(settings: list[str], one: Path, tmp_path: Path) -> None:
    train_on(2, tmp_path, accumulate(2), *settings)
    assert_same_losses(tmp_path, one, rel=1e-4)
    assert largest_difference(tmp_path, one) < 1e-4


@pytest.mark.parametrize("strategy", ["HYBRID_SHARD", "HYBRID_SHARD_ZERO2"])
def test_nor_does_sharding_within_machines(strategy: str, tmp_path: Path) -> None:
    """Four processes that believe to be on two machines."""
    train_on(1, tmp_path / "one", "train.accumulate_steps=4", "optim.epochs=5")
    port = str(20000 + os.getpid() % 20000)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    words = ["--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path / "four"), *COMMON, "optim.epochs=5"]
    processes = [
        start_script(
            *("dinov2/train/train.py", *words, *sharded(strategy)),
            environment=place | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
        )
        for rank in range(4)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert largest_difference(tmp_path / "four", tmp_path / "one", step=9) < 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision_trains_on_two_processes_and_resumes(dtype: str, tmp_path: Path) -> None:
    settings = [*all_in(dtype), f"compute_precision.student.backbone.mixed_precision.reduce_dtype={dtype}"]
    output = train_on(2, tmp_path, *settings, "optim.epochs=10")
    assert (dtype == "fp16") == ("skipped by the gradient scaler" in output), "as it starts at 65536"
    train_on(2, tmp_path, *settings)
    losses = [line["total_loss"] for line in metrics(tmp_path)]
    assert len(losses) == STEPS and all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_a_run_continues_on_another_number_of_processes(one: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 3 processes with one global batch: the samples go on in their order and the losses are the same."""
    for num_processes, epochs in ((2, 5), (1, 15), (3, STEPS // 2)):
        train_on(num_processes, tmp_path, accumulate(num_processes), *SCHEDULES, f"optim.epochs={epochs}")
    train_on(1, tmp_path / "straight", accumulate(1), *SCHEDULES)
    assert checkpoints(tmp_path) == [9, 29, STEPS - 1]
    assert_same_losses(tmp_path, tmp_path / "straight", rel=1e-4, ends=(9, 29))
    assert largest_difference(tmp_path, tmp_path / "straight") < 1e-4


def test_from_weights_with_a_frozen_backbone_two_processes_compute_what_one_does(one: Path, tmp_path: Path) -> None:
    words = [f"init_from={one}", "optim.epochs=15", "optim.freeze_backbone_steps=10", "health.period=5"]
    for num_processes in (1, 2):
        output_dir = tmp_path / str(num_processes)
        train_on(num_processes, output_dir, accumulate(num_processes), *words, "optim.backbone_warmup_steps=10")
    assert largest_difference(tmp_path / "2", tmp_path / "1", step=29) < 1e-4
    rows, others = (metrics(tmp_path / name) for name in ("1", "2"))
    assert [row["iteration"] for row in others] == [row["iteration"] for row in rows] == list(range(-1, 30))
    assert sum("drift_patch_cka" in row for row in rows) > 3
    for name in ("total_loss", "knn", "probe_cls_rank_me", "drift_cls_cka", "drift_patch_cosine"):
        values = [[row[name] for row in each if name in row] for each in (rows, others)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name


def test_it_continues_where_the_images_stopped_also_if_the_global_batch_changes(tmp_path: Path) -> None:
    seen = 0
    for num_processes, epochs in ((2, 5), (1, 6), (3, 8)):
        output = train_on(num_processes, tmp_path, f"optim.epochs={epochs}")
        state = read_state(tmp_path / "checkpoints" / f"model_{2 * epochs - 1:07d}")
        seen += {2: 10, 1: 2, 3: 4}[num_processes] * 2 * num_processes
        assert state["images_seen"] == seen
    assert "resuming with other settings" in output


def test_twenty_kills_of_a_random_process_change_nothing(tmp_path: Path) -> None:
    settings = ["optim.epochs=150", "train.checkpoint_period=3", "train.checkpoint_keep=2", "train.num_workers=1"]
    train_on(2, tmp_path / "straight", *settings)
    killed, rng, kills = tmp_path / "killed", random.Random(0), 0
    while kills < 20:
        reached = max(checkpoints(killed), default=-1)
        with start_two(killed, *settings) as run:
            wait_until(lambda: run.poll() is not None or len(workers(run)) == 2)
            if kills % 4:  # the others die while they start
                wait_until(
                    lambda before=reached: run.poll() is not None or max(checkpoints(killed), default=-1) > before
                )
            time.sleep(rng.uniform(0, 0.5))
            if run.poll() is None and len(alive := workers(run)) == 2:
                os.kill(rng.choice(alive), signal.SIGKILL)
                kills += 1
            run.communicate(timeout=60)
            assert run.returncode != 0, "killed before its end"
    train_on(2, killed, *settings)
    assert metrics(killed) == metrics(tmp_path / "straight")
    first, second = tensors(killed, 299), tensors(tmp_path / "straight", 299)
    assert all(torch.equal(first[name], second[name]) for name in second)


def mixture_of_shards(folder: Path) -> str:
    """A dataset string: two thirds of the samples from tar archives, one third from row groups of a Parquet file."""
    files = [path.read_bytes() for path in sorted(write_images(folder / "images", 40).iterdir())]
    for shard in range(6):
        write_tar(folder / f"{shard}.tar", [(f"{shard}-{i}.png", files[4 * shard + i]) for i in range(4)])
    pq.write_table(pa.table({"image": files[24:]}), folder / "a.parquet", row_group_size=3)
    sources = [f"Tar:files={folder}/{{0..5}}.tar", f"Parquet:files={folder}/a.parquet"]
    lines = [f"- dataset: {source}\n  weight: {2 - number}\n" for number, source in enumerate(sources)]
    (folder / "mix.yaml").write_text("".join(lines))
    return f"train.dataset_path=Mix:file={folder}/mix.yaml"


def test_a_mixture_of_shards_goes_on_after_kills_on_other_numbers_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 processes, killed, 1, killed, 3: the samples are those of a run that nothing happened to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["train.sampler=SHARD_ORDER", "train.checkpoint_period=3", "health.period=0", "train.num_workers=1"]
    words += [*SCHEDULES, mixture_of_shards(tmp_path)]
    killed = tmp_path / "killed"
    with start_two(killed, accumulate(2), *words) as run:
        wait_until(lambda: run.poll() is not None or max(checkpoints(killed), default=-1) >= 8)
        os.kill(workers(run)[1], signal.SIGKILL)
        run.communicate(timeout=60)
    reached = max(checkpoints(killed))
    assert 8 <= reached < STEPS - 10, "killed before its end"
    with killed_after(7, monkeypatch):
        train_on(1, killed, accumulate(1), *words)
    assert reached < max(checkpoints(killed)) < STEPS - 1
    train_on(3, killed, accumulate(3), *words)
    train_on(1, tmp_path / "straight", accumulate(1), *words)
    assert_same_losses(killed, tmp_path / "straight", rel=1e-4)
    assert largest_difference(killed, tmp_path / "straight") < 1e-4


def test_a_process_that_is_killed_takes_the_others_down_within_a_minute(tmp_path: Path) -> None:
    with start_two(tmp_path, "train.checkpoint_period=2", "optim.epochs=100000") as run:
        wait_until(lambda: len(checkpoints(tmp_path)) > 0)
        started = time.monotonic()
        os.kill(workers(run)[1], signal.SIGKILL)
        run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - started < 60


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(signum: int, tmp_path: Path) -> None:
    """Also with loader processes, which get it too when a scheduler sends it to everything it has started."""
    with start_two(tmp_path, "train.num_workers=1", "optim.epochs=100000") as run:
        wait_until(lambda: (tmp_path / "training_metrics.json").exists() and len(metrics(tmp_path)) > 2)
        one_of_them = workers(run)[1]
        for pid in [one_of_them, *children(one_of_them)]:
            os.kill(pid, signum)
        output, errors = run.communicate(timeout=60)
    (iteration,) = checkpoints(tmp_path)
    assert [line["iteration"] for line in metrics(tmp_path)] == list(range(iteration + 1)), output + errors
    train_on(1, tmp_path, f"optim.epochs={iteration // 2 + 2}")
    assert metrics(tmp_path)[-1]["iteration"] == 2 * (iteration // 2 + 2) - 1
