"""The runs of a command: one, or one for each of several students of a distillation in one job.

Each student is a run as any other, with its recipe, output folder, checkpoints and report, on its share of the
processes. They have the same images in each step, so that the teacher runs once for each (`shared_teacher`). They stop
at the same step, and resume from the newest step of which each has a checkpoint.
"""

import argparse
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dinov2 import config, distributed
from dinov2.config import SHARDED_OVER, Config, ConfigError
from dinov2.train.checkpoint_folder import complete_checkpoints
from dinov2.train.schedules import global_batch_size, scale_lr

logger = logging.getLogger(__name__)

_EQUAL = (
    *("crops", "augmentation", "images", "student.patch_size", "distillation"),
    *("train.dataset_path", "train.seed", "train.sampler", "train.augment_on", "train.OFFICIAL_EPOCH_LENGTH"),
    *("train.checkpoint_period", "optim.epochs", "compute_precision.teacher"),
    "compute_precision.student.backbone.mixed_precision.param_dtype",
)
"""Settings that students share: those of images and of the teacher, and when there are checkpoints."""


class PlannedRun(NamedTuple):
    """A run of a command, with its output folder and the learning rate of its global batch size in the config."""

    cfg: Config
    num_processes: int

    @property
    def output_dir(self) -> Path:
        return Path(self.cfg.train.output_dir)


def planned_runs(args: argparse.Namespace, num_processes: int) -> list[PlannedRun]:
    """The runs of a parsed command line on so many processes, by default one with all of them.

    Raises:
        ConfigError, FileNotFoundError: As `dinov2.config.load`; or students do not fit together or the processes.
    """
    students = config.load_students(args.config_file, args.opts)
    if not students:
        cfg = config.load(args.config_file, args.opts)
        return [_planned(cfg, Path(args.output_dir or cfg.train.output_dir), num_processes)]
    named = [_recipe_and_share(text) for text in students]
    total = sum(share for _, share in named)
    if num_processes % total:
        raise ConfigError(
            f"distillation.students have {total} shares, into which {num_processes} process(es) cannot be divided: "
            f"start {total} or a multiple, or change the shares ({', '.join(students)})"
        )
    runs = []
    for recipe, share in named:
        each = config.load(args.config_file, args.opts, recipe=recipe)
        processes = num_processes // total * share
        output_dir = Path(args.output_dir or each.train.output_dir) / Path(recipe).stem
        runs.append(_planned(_with_batch_size(each, recipe, processes), output_dir, processes))
    if problems := list(_problems(runs, [recipe for recipe, _ in named])):
        raise ConfigError("\n".join(problems))
    return runs


def own_run(runs: Sequence[PlannedRun]) -> PlannedRun:
    """The run that this process takes part in; its group of processes is then that of `dinov2.distributed`."""
    return runs[distributed.split([run.num_processes for run in runs])]


def resume_together(runs: Sequence[PlannedRun]) -> None:
    """Make all runs continue from the same step; a ValueError if too many checkpoints of one of them are missing."""
    with distributed.whole_job():
        distributed.from_main(lambda: align_checkpoints([run.output_dir for run in runs]))


def align_checkpoints(folders: Sequence[Path]) -> None:
    """Delete a checkpoint that others do not have, as they were stopped while they wrote it: the steps are repeated.

    A ValueError if a run has more than one of these, which are lost in the others.
    """
    found = [complete_checkpoints(folder / "checkpoints") for folder in folders]
    common = set(found[0]).intersection(*found[1:])
    newer = [[step for step in steps if step > max(common, default=-1)] for steps in found]
    for folder, steps in zip(folders, newer, strict=True):
        if len(steps) > 1:
            others = ", ".join(other.name for other, theirs in zip(folders, newer, strict=True) if not theirs)
            raise ValueError(
                f"{folder} has checkpoints of the steps {', '.join(map(str, steps))}, but of {others} they are missing "
                "or lost: restore them, or delete these, or start anew with --no-resume"
            )
    for steps, paths in zip(newer, found, strict=True):
        for step in steps:
            logger.warning("not all students have a checkpoint of step %d: %s is deleted", step, paths[step])
            shutil.rmtree(paths[step])


def describe_shares(runs: Sequence[PlannedRun], step_flops: Sequence[float]) -> str:
    """Text on how long students wait for each other, from the FLOPs of a step of one process; empty for one run."""
    if len(runs) == 1:
        return ""
    work = [flops * run.num_processes for flops, run in zip(step_flops, runs, strict=True)]
    parts = [
        f"{run.output_dir.name} {flops / max(step_flops):.0%}" for flops, run in zip(step_flops, runs, strict=True)
    ]
    even = " : ".join(f"{each / min(work):.2g}" for each in work)
    return f"\nprocesses are busy, relative to the slowest student: {', '.join(parts)}; even shares: {even}\n"


def _planned(cfg: Config, output_dir: Path, num_processes: int) -> PlannedRun:
    lr = scale_lr(cfg.optim.base_lr, cfg.optim.scaling_rule, global_batch_size(cfg, num_processes))
    train = replace(cfg.train, output_dir=str(output_dir.resolve()))
    return PlannedRun(replace(cfg, optim=replace(cfg.optim, lr=lr), train=train), num_processes)


def _recipe_and_share(text: str) -> tuple[str, int]:
    recipe, _, share = text.rpartition(":")
    if not recipe:
        return text, 1
    if not share.isdecimal() or int(share) == 0:
        raise ConfigError(f"distillation.students: {text!r} is not RECIPE:SHARE, such as train/vits14_distilled:2")
    return recipe, int(share)


def _with_batch_size(cfg: Config, recipe: str, num_processes: int) -> Config:
    total, parts = cfg.distillation.global_batch_size, num_processes * cfg.train.accumulate_steps
    if total % parts:
        raise ConfigError(
            f"distillation.global_batch_size = {total} cannot be divided by the {num_processes} process(es) of {recipe}"
            + (f" x train.accumulate_steps = {cfg.train.accumulate_steps}" if cfg.train.accumulate_steps > 1 else "")
        )
    return replace(cfg, train=replace(cfg.train, batch_size_per_gpu=total // parts))


def _problems(runs: Sequence[PlannedRun], recipes: Sequence[str]) -> Iterator[str]:
    names = [run.output_dir.name for run in runs]
    if len(set(names)) < len(names):
        yield f"distillation.students: the output folders would have equal names: {', '.join(names)}"
    first = runs[0]
    for recipe, run in zip(recipes, runs, strict=True):
        for key in _EQUAL:
            ours, theirs = attrgetter(key)(run.cfg), attrgetter(key)(first.cfg)
            if ours != theirs:
                yield (
                    f"students must have the same {key}: {recipe} has {ours}, {recipes[0]} {theirs} (a value in "
                    "--config-file or on the command line is for all)"
                )
        for name in ("backbone", "dino_head", "ibot_head"):
            strategy = getattr(run.cfg.compute_precision.student, name).sharding_strategy
            if SHARDED_OVER[strategy] != "all processes":
                yield (
                    f"{recipe}: compute_precision.student.{name}.sharding_strategy = {strategy} is not for several "
                    "students: SHARD_GRAD_OP or FULL_SHARD"
                )
    if first.cfg.train.sampler not in ("GLOBAL_ORDER", "SHARD_ORDER"):
        yield f"train.sampler = {first.cfg.train.sampler}: students have the same images by GLOBAL_ORDER or SHARD_ORDER"
    if min(run.cfg.train.checkpoint_keep for run in runs) < 2:
        yield "train.checkpoint_keep = 1: several students need 2, as one may be stopped before its newest is complete"
