"""The runs of a command: one, or one for each of several students of a distillation in one job.

Each student is a run as any other, with its recipe, output folder, checkpoints and report, on its share of the
processes. They have the same images in each step, so that the teacher runs once for each (`shared_teacher`). They stop
at the same step, and resume from the newest step of which each has a checkpoint.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dinov2 import config, distributed
from dinov2.config import SHARDED_OVER, Config, ConfigError
from dinov2.train.checkpoint_files.folder import UNFINISHED, complete_checkpoints
from dinov2.train.schedules import global_batch_size, scale_lr
from dinov2.train.training_run import METRICS_FILE

logger = logging.getLogger(__name__)

_EQUAL = (
    *("crops.", "augmentation.", "images.", "student.patch_size:", "train.dataset_path:", "train.seed:"),
    *("train.sampler:", "train.augment_on:", "train.OFFICIAL_EPOCH_LENGTH:", "train.checkpoint_period:"),
    *("optim.epochs:", "compute_precision.teacher."),
    "compute_precision.student.backbone.mixed_precision.param_dtype:",
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


def resume_together(runs: Sequence[PlannedRun]) -> bool:
    """Make all runs resume from the same step; returns False if they have to start anew, and so has a run without any.

    A checkpoint that others do not have, as they were stopped while they wrote theirs, is set aside: it is deleted when
    the next one is complete. Errors as `newest_common_step`.
    """
    with distributed.whole_job():
        return distributed.from_main(lambda: _set_newer_aside([run.output_dir for run in runs]))


def newest_common_step(folders: Sequence[Path]) -> int | None:
    """The newest step of which all runs have a checkpoint; None if they have to start anew.

    A ValueError if that would lose more than one checkpoint of a run, or all of them: these of others are missing.
    """
    found = [list(complete_checkpoints(folder / "checkpoints")) for folder in folders]
    common = set(found[0]).intersection(*found[1:])
    newest = max(common, default=None)
    newer = [[step for step in steps if newest is None or step > newest] for steps in found]
    stopped_at_first = len({tuple(steps) for steps in found if steps}) == 1 and all(
        steps or (folder / METRICS_FILE).exists() for folder, steps in zip(folders, found, strict=True)
    )
    if max(map(len, newer)) > 1 or (any(newer) and newest is None and not stopped_at_first):
        listed = "; ".join(
            f"{folder} has {', '.join(map(str, steps)) or 'none'}" for folder, steps in zip(folders, found, strict=True)
        )
        raise ValueError(
            f"students resume from the newest step of which all have a checkpoint, but {listed}: restore what is "
            "missing, or move newer checkpoints away, or start all of them anew with --no-resume, which archives these"
        )
    return newest


def _set_newer_aside(folders: Sequence[Path]) -> bool:
    newest = newest_common_step(folders)
    found = [complete_checkpoints(folder / "checkpoints") for folder in folders]
    if newest is None:
        if any(found):
            logger.warning("students were stopped before each had its first checkpoint: all start anew")
        return not any(found)
    for path in (path for steps in found for step, path in steps.items() if step > newest):
        logger.warning("not all students have a checkpoint of this step, they resume before it: %s", path)
        path.rename(path.with_suffix(UNFINISHED))
    return True


def describe_shares(runs: Sequence[PlannedRun], step_flops: Sequence[float]) -> str:
    """Text on how long students wait for each other, from the FLOPs of a step of one process; empty for one run."""
    if len(runs) == 1:
        return ""
    work = [flops * run.num_processes for flops, run in zip(step_flops, runs, strict=True)]
    parts = [
        f"{run.output_dir.name} {flops / max(step_flops):.0%}" for flops, run in zip(step_flops, runs, strict=True)
    ]
    even = [each / min(work) for each in work]
    multiple = next((n for n in range(1, 9) if all(abs(round(n * x) / (n * x) - 1) < 0.1 for x in even)), 8)
    shares = " : ".join(str(round(multiple * each)) for each in even)
    return f"\nprocesses are busy, relative to the slowest student: {', '.join(parts)}; about even shares: {shares}\n"


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
    alone = replace(cfg.distillation, students=(), global_batch_size=0)  # so the recorded config is of a run like any
    return replace(cfg, distillation=alone, train=replace(cfg.train, batch_size_per_gpu=total // parts))


def _problems(runs: Sequence[PlannedRun], recipes: Sequence[str]) -> Iterator[str]:
    names = [run.output_dir.name for run in runs]
    if len(set(names)) < len(names):
        yield f"distillation.students: the output folders would have equal names: {', '.join(names)}"
    first = runs[0]
    for recipe, run in zip(recipes, runs, strict=True):
        differences = [each for each in config.differences(first.cfg, run.cfg) if each.startswith(_EQUAL)]
        if differences:
            yield f"{recipe} differs from {recipes[0]} in what students must share: {'; '.join(differences)}"
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
