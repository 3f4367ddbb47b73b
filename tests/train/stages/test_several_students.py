"""Several students of one teacher in one job: each is the run that it would be alone."""

import argparse
import math
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import (
    CONFIG_FILE,
    ROOT,
    assert_same_end,
    checkpoints,
    descendants,
    metrics,
    run_script,
    run_train,
    start_script,
    tensors,
)
from torch import Tensor

from dinov2 import config
from dinov2.config import ConfigError
from dinov2.report.read_run import read_run
from dinov2.train.checkpoint_files.folder import find_checkpoint
from dinov2.train.preflight.flops import step_flops
from dinov2.train.preflight.memory import estimate
from dinov2.train.stages.choice import build_arch
from dinov2.train.stages.several_students import PlannedRun, describe_shares, planned_runs, resume_together
from dinov2.train.stages.shared_teacher import Division, plan_exchange
from dinov2.train.start.source_runs import weights_of_run

SMALL, WIDE = "drop_path_rate: 0.0", "drop_path_rate: 0.0, qkv_bias: false"


def write_recipes(folder: Path, *students: str, batch: int = 12) -> Path:
    """Recipes `small` and `wide`, and one with these students."""
    text = (ROOT / CONFIG_FILE).read_text()
    (folder / "small.yaml").write_text(text.replace("drop_path_rate: 0.3", SMALL))
    (folder / "wide.yaml").write_text(
        text.replace("drop_path_rate: 0.3", WIDE).replace("embed_dim: 32", "embed_dim: 40")
    )
    listed = ", ".join(str(folder / student) for student in students)
    path = folder / "students.yaml"
    path.write_text(f"distillation: {{students: [{listed}], global_batch_size: {batch}}}\n")
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher")
    run_train(output, "student.embed_dim=48", "student.depth=3", "optim.epochs=1")
    return output


def parsed(file: Path, *words: str) -> argparse.Namespace:
    return argparse.Namespace(config_file=str(file), output_dir="/out", opts=list(words))


# --- Who computes what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_every_image_is_computed_once_and_reaches_the_process_of_each_student_that_has_it(seed: int) -> None:
    rng = random.Random(seed)
    shapes = [(rng.choice([1, 2, 3, 4]), rng.choice([1, 2])) for _ in range(rng.choice([1, 2, 3]))]
    batch = math.lcm(*(n * k for n, k in shapes)) * rng.choice([1, 2, 5])
    divisions = [Division(n, k, batch // (n * k)) for n, k in shapes]
    places = [(d, process) for d in divisions for process in range(d.num_processes)]
    # The images of a process, in the order of its micro-batches, by the rule of the loader.
    images = [
        [
            (m * d.num_processes + process) * d.batch_size + row
            for m in range(d.accumulate_steps)
            for row in range(d.batch_size)
        ]
        for d, process in places
    ]
    plans = [plan_exchange(divisions, rank) for rank in range(len(places))]
    sent: list[list[Tensor]] = []
    for plan, mine in zip(plans, images, strict=True):
        tokens = torch.tensor(mine)[plan.computed]  # the "token" of an image is its number
        assert len(tokens) == len(plans[0].computed), "equally many forward passes"
        sent.append(list(tokens[plan.outgoing].split(plan.sent)))
    for rank, (plan, mine) in enumerate(zip(plans, images, strict=True)):
        arrived = torch.cat([each[rank] for each in sent])
        assert [len(each[rank]) for each in sent] == plan.received
        assert arrived[plan.order].tolist() == mine
    most = len(plans[0].computed)
    assert math.ceil(batch / len(places)) <= most <= math.ceil(batch / len(places)) + 1, "the work is even"


def test_students_with_other_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different numbers of images in a step: \[4, 6\]"):
        plan_exchange([Division(1, 1, 4), Division(2, 1, 3)], 0)


# --- Runs ------------------------------------------------------------------------------------------------------------


def train_students(number: int, recipe: Path, output: Path, *words: str) -> str:
    with start_students(number, recipe, output, *words) as job:
        stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 0, stdout + stderr
    return stdout


def test_a_student_is_the_run_that_it_would_be_alone(teacher: Path, tmp_path: Path) -> None:
    words = [f"distillation.teacher={teacher}", "optim.epochs=2", "optim.warmup_epochs=1", "train.centering=centering"]
    recipe = write_recipes(tmp_path, "small.yaml", "wide.yaml", batch=4)
    printed = train_students(2, recipe, tmp_path / "out", *words)
    assert "small: " in printed and "wide: " in printed
    for name in ("small", "wide"):
        alone = ["--config-file", str(tmp_path / f"{name}.yaml"), "--output-dir", str(tmp_path / name)]
        assert run_script("dinov2/train/train.py", *alone, *words).returncode == 0
        one, other = tensors(tmp_path / "out" / name, 3), tensors(tmp_path / name, 3)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        ours, theirs = metrics(tmp_path / "out" / name), metrics(tmp_path / name)
        del theirs[0]["frozen_teacher_knn"]  # which the processes of one student cannot measure
        assert ours == theirs


def start_students(number: int, recipe: Path, output: Path, *words: str) -> subprocess.Popen[str]:
    return start_script(
        *("dinov2/run/train/train.py", "--launcher", "local", "--ngpus", "0", "--tasks-per-node", str(number)),
        *("--config-file", str(recipe), "--output-dir", str(output), *words),
    )


def wait_for_checkpoints(output: Path, step: int) -> None:
    """Wait until each student has the checkpoint of a step."""
    deadline = time.monotonic() + 200
    while not all(step in checkpoints(output / name) for name in ("small", "wide")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_job_resumes_exactly_also_where_one_student_lacks_the_newest_checkpoint(
    teacher: Path, tmp_path: Path
) -> None:
    words = [f"distillation.teacher={teacher}", "optim.epochs=20", "optim.warmup_epochs=1", "train.checkpoint_keep=50"]
    words.append("compute_precision.teacher.backbone.sharding_strategy=FULL_SHARD")
    recipe = write_recipes(tmp_path, "small.yaml:1", "wide.yaml:2")
    train_students(3, recipe, tmp_path / "whole", *words)
    with start_students(3, recipe, tmp_path / "out", *words) as job:
        wait_for_checkpoints(tmp_path / "out", 9)
        for pid in (job.pid, *descendants(job.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    newest = checkpoints(tmp_path / "out" / "wide")[-1]
    shutil.rmtree(tmp_path / "out" / "wide" / "checkpoints" / f"model_{newest:07d}")
    printed = train_students(3, recipe, tmp_path / "out", *words)
    assert "not all students have a checkpoint of this step, they resume before it" in printed
    for name in ("small", "wide"):
        assert_same_end(tmp_path / "out" / name, tmp_path / "whole" / name, 39)


@pytest.mark.slow
def test_a_signal_to_one_student_stops_all_and_they_go_on_with_other_shares(teacher: Path, tmp_path: Path) -> None:
    words = [
        f"distillation.teacher={teacher}",
        "optim.epochs=20",
        "optim.warmup_epochs=1",
        "train.checkpoint_period=500",
        "dino.koleo_loss_weight=0",  # it compares the images of a process
    ]
    recipe = write_recipes(tmp_path, "small.yaml:1", "wide.yaml:2")
    train_students(3, recipe, tmp_path / "whole", *words)
    with start_students(3, recipe, tmp_path / "out", *words) as job:
        deadline = time.monotonic() + 200
        metrics_file = tmp_path / "out" / "wide" / "training_metrics.json"
        while not metrics_file.exists() or len(metrics_file.read_text().splitlines()) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks = [pid for pid in descendants(job.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(max(ranks), signal.SIGTERM)
        job.communicate(timeout=200)
    stopped = checkpoints(tmp_path / "out" / "small")
    assert len(stopped) == 1 and stopped == checkpoints(tmp_path / "out" / "wide")
    again = write_recipes(tmp_path, "small.yaml:1", "wide.yaml:1")
    train_students(2, again, tmp_path / "out", *words)
    for name in ("small", "wide"):
        one, other = metrics(tmp_path / "out" / name), metrics(tmp_path / "whole" / name)
        assert [line["iteration"] for line in one] == list(range(40))
        for ours, theirs in zip(one, other, strict=True):
            assert ours["total_loss"] == pytest.approx(theirs["total_loss"], rel=1e-4)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def write_checkpoints(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / "checkpoints" / f"model_{step:07d}").mkdir(parents=True)
    return folder


def runs_in(*folders: Path) -> list[PlannedRun]:
    cfgs = [config.load(CONFIG_FILE, [f"train.output_dir={folder}"]) for folder in folders]
    return [PlannedRun(cfg, 1) for cfg in cfgs]


def test_a_checkpoint_that_not_all_have_is_set_aside(tmp_path: Path) -> None:
    one, other = write_checkpoints(tmp_path / "a", 1, 3, 5), write_checkpoints(tmp_path / "b", 1, 3)
    assert resume_together(runs_in(one, other))
    assert checkpoints(one) == checkpoints(other) == [1, 3]
    assert (one / "checkpoints" / "model_0000005.unfinished").is_dir(), "deleted by the next one that is complete"


def test_students_that_were_stopped_at_their_first_checkpoint_start_anew(tmp_path: Path) -> None:
    first, none = write_checkpoints(tmp_path / "c", 1), tmp_path / "d"
    none.mkdir()
    (none / "training_metrics.json").write_text("{}\n")
    assert not resume_together(runs_in(first, none))
    assert checkpoints(first) == [1], "which archives it"
    assert resume_together(runs_in(tmp_path / "new", tmp_path / "newer")), "nothing is there"


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1, 3, 5], [1], "a has 1, 3, 5; .*b has 1: restore what is missing, or move newer"),
        ([39], [], "a has 39; .*b has none"),  # the folder was moved, or a student is new
        ([3], [5], "a has 3; .*b has 5"),
    ],
)
def test_lost_checkpoints_of_a_student_are_an_error(
    ours: list[int], theirs: list[int], message: str, tmp_path: Path
) -> None:
    one, other = write_checkpoints(tmp_path / "a", *ours), write_checkpoints(tmp_path / "b", *theirs)
    with pytest.raises(ValueError, match=message):
        resume_together(runs_in(one, other))
    assert (checkpoints(one), checkpoints(other)) == (ours, theirs)


# --- The plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("students", "words", "message"),
    [
        (
            ["small.yaml:1", "wide.yaml:3"],
            [],
            r"have 4 shares, into which 6 process\(es\) cannot be divided: start 4 or",
        ),
        (["small.yaml:1", "wide.yaml:x"], [], r"wide.yaml:x' is not RECIPE:SHARE"),
        (["small.yaml", "small.yaml"], [], "the output folders would have equal names: small, small"),
        (
            ["small.yaml", "wide.yaml"],
            ["student.depth=3"],
            "student.depth: several students have it from the recipes of each",
        ),
        (
            ["small.yaml", "wide.yaml"],
            ["train.batch_size_per_gpu=3"],
            "train.batch_size_per_gpu: it follows from distillation.global_batch_size",
        ),
        (["small.yaml", "wide.yaml"], ["distillation.global_batch_size=7"], r"= 7 cannot be divided by the 3 process"),
        (
            ["small.yaml", "wide.yaml"],
            ["distillation.global_batch_size=0"],
            "several students need the number of images",
        ),
        (["small.yaml", "wide.yaml"], ["distillation.teacher="], "need distillation.teacher"),
        (["small.yaml", "wide.yaml"], ["train.sampler=EPOCH"], "have the same images by GLOBAL_ORDER or SHARD_ORDER"),
        (["small.yaml", "wide.yaml"], ["train.checkpoint_keep=1"], "several students need 2"),
        (
            ["small.yaml", "other.yaml"],
            [],
            "other.yaml differs .* in what students must share: train.seed: 0 -> 5",
        ),
        (["small.yaml", "none.yaml"], [], "no configuration file"),
    ],
)
def test_students_that_do_not_fit(students: list[str], words: list[str], message: str, tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, *students)
    (tmp_path / "other.yaml").write_text((tmp_path / "small.yaml").read_text().replace("train:", "train:\n  seed: 5"))
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        planned_runs(parsed(recipe, "distillation.teacher=/t", *words), 6)


def test_a_batch_without_students_is_refused() -> None:
    with pytest.raises(ConfigError, match="distillation.global_batch_size = 8 is for distillation.students only"):
        config.load(CONFIG_FILE, ["distillation.global_batch_size=8"])


def test_processes_and_images_are_divided(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, "small.yaml:1", "wide.yaml:2")
    runs = planned_runs(parsed(recipe, "distillation.teacher=/t", "optim.scaling_rule=linear_wrt_256"), 6)
    assert [(run.num_processes, run.cfg.train.batch_size_per_gpu) for run in runs] == [(2, 6), (4, 3)]
    assert [run.output_dir for run in runs] == [Path("/out/small"), Path("/out/wide")]
    assert [run.cfg.student.embed_dim for run in runs] == [32, 40]
    assert {run.cfg.distillation for run in runs} == {config.Distillation("/t", (), 0)}, "it runs alone, too"
    assert {run.cfg.optim.lr for run in runs} == {0.002 * 12 / 256}


def test_the_plan_counts_the_teacher_once_for_all_students(teacher: Path, tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, "small.yaml:1", "wide.yaml:2")
    run, _ = planned_runs(parsed(recipe, f"distillation.teacher={teacher}"), 3)
    shared, cfg = build_arch(run.cfg, among_students=True), run.cfg
    alone = build_arch(config.load(tmp_path / "small.yaml", [f"distillation.teacher={teacher}"]))
    whole, third = step_flops(cfg, alone).teacher, step_flops(cfg, shared, share_of_job=1 / 3).teacher
    assert third.heads == whole.heads
    assert third.linear == pytest.approx(whole.linear / 3) and third.attention == pytest.approx(whole.attention / 3)
    backbone = sum(param.numel() for param in shared.target_networks["backbone"].parameters())
    saved = estimate(cfg, alone, 1, 1).state - estimate(cfg, shared, 1, 3, 3).state
    assert saved == pytest.approx(4 * backbone * 2 / 3, rel=0.05), "two thirds of it are with the other processes"


def test_the_dry_run_compares_the_students(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipes(tmp_path, "small.yaml:1", "wide.yaml:2")
    runs = planned_runs(parsed(recipe, f"distillation.teacher={teacher}"), 3)
    assert describe_shares(runs, [10.0, 8.0]) == (
        "\nprocesses are busy, relative to the slowest student: small 100%, wide 80%; about even shares: 2 : 3\n"
    )
    result = run_script(
        *("dinov2/run/train/train.py", "--launcher", "local", "--ngpus", "0", "--tasks-per-node", "3", "--dry-run"),
        *("--config-file", str(recipe), "--output-dir", str(tmp_path / "out"), f"distillation.teacher={teacher}"),
    )
    assert result.returncode == 0, result.stderr
    assert "12 images (12 x 1 processes)" in result.stdout and "12 images (6 x 2 processes)" in result.stdout
    assert "--- wide: 2 of 3 processes ---" in result.stdout and "student.embed_dim: 32 -> 40" in result.stdout
    assert "about even shares: " in result.stdout


def test_the_folder_of_the_job_is_no_run_and_its_runs_are_named(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    config.save(config.load(CONFIG_FILE), tmp_path / "small" / "config.yaml")
    for read in (
        lambda: read_run(tmp_path, "run"),
        lambda: weights_of_run(str(tmp_path)),
        lambda: find_checkpoint(tmp_path),
    ):
        with pytest.raises(FileNotFoundError, match=f"; it holds the runs small: give one .* such as {tmp_path}/small"):
            read()
