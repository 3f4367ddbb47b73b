"""Dry run: checks everything that could fail later, and prints the plan of the run, without training."""

import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dinov2 import config, distributed
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import BadImageError
from dinov2.trackers import check_trackers
from dinov2.train.checkpoint_files.folder import latest_checkpoint
from dinov2.train.checkpoint_files.state import read_state
from dinov2.train.monitor.dense_images import read_dense_images
from dinov2.train.monitor.probe_images import NoLabels, balanced_positions, labeled_dataset
from dinov2.train.optim import get_params_groups_with_decay
from dinov2.train.preflight.checks import check_device, check_images, check_settings
from dinov2.train.preflight.flops import H200_FLOPS, product_speed, step_flops
from dinov2.train.preflight.memory import estimate
from dinov2.train.preflight.plan import (
    advise_few_images,
    check_length,
    check_sources,
    describe_length,
    describe_sources,
)
from dinov2.train.schedules import checkpoint_period, describe_schedules, global_batch_size, num_due
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stages.choice import build_arch
from dinov2.train.stages.several_students import PlannedRun, describe_shares, newest_common_step
from dinov2.train.start.initial_weights import load_initial_weights, network_changes
from dinov2.train.start.source_runs import check_source_runs, pinned
from dinov2.train.start.step_zero import check_step_zero
from dinov2.train.training_run import changed_settings, check_length_so_far, check_same_stage, open_dataset

PROCESSES_PER_MACHINE = 8  # assumed if the processes are not started yet

IMAGES_TRIED = 20  # number of images that are read to check the dataset


def dry_run_all(runs: Sequence[PlannedRun], job_size: int, *, resume: bool = True) -> None:
    """Check all that the runs of a job need, with the error that it would have failed with, and print their plans."""
    if resume and len(runs) > 1:
        newest_common_step([run.output_dir for run in runs])
    costs = []
    for run in runs:
        settings = config.to_yaml(run.cfg)
        if len(runs) > 1:
            changes = "\n".join(config.differences(runs[0].cfg, run.cfg))
            title = f"--- {run.output_dir.name}: {run.num_processes} of {job_size} processes ---"
            settings = f"\n{title}\n\n" + (settings if run is runs[0] else f"other settings:\n{changes}\n")
        costs.append(dry_run(run.cfg, run.num_processes, job_size=job_size, resume=resume, settings=settings))
    sys.stdout.write(describe_shares(runs, costs))


def dry_run(cfg: Config, world_size: int, *, job_size: int, resume: bool, settings: str) -> float:
    """Check all that a run needs, and print its settings and plan.

    `job_size` is the number of processes of all students together. Returns the FLOPs of a step of one process.
    """
    findings = [*check_settings(cfg, world_size), *check_device(cfg)]
    _check_writable(Path(cfg.train.output_dir))
    check_source_runs(cfg, resume=resume)
    cfg = pinned(cfg, resume=resume)
    cfg, dataset = open_dataset(cfg, resume=resume)
    unreadable = _check_readable(dataset, cfg.train.max_bad_image_share)
    knn, dense = _knn(cfg, dataset), _dense(cfg, dataset)
    check_trackers(tensorboard=cfg.tracking.tensorboard, wandb_project=cfg.tracking.wandb_project)
    latest = latest_checkpoint(Path(cfg.train.output_dir) / "checkpoints") if resume else None
    with torch.device("cpu" if latest is None and config.sources_of(cfg) else "meta"):
        model = build_arch(cfg, among_students=job_size > world_size)
    model.load_frozen(resuming=latest is not None)
    changes = [] if latest is None else changed_settings(Path(cfg.train.output_dir) / "config.yaml", cfg)
    start = _start(latest, cfg, model, changes)
    if changes:
        findings.append(f"resuming with other settings than before: {'; '.join(changes)}")
    if latest is None and (loaded := load_initial_weights(model, cfg)) is not None:
        start["step 0"] = check_step_zero(model, cfg, dataset, loaded)
    flops = step_flops(cfg, model, share_of_job=world_size / job_size).total
    plan = start | model.stage_facts() | _plan(cfg, model, len(dataset), world_size, job_size, flops)
    plan |= describe_sources(cfg, dataset, world_size)
    if latest is None:  # a run that has begun keeps its length
        plan |= describe_length(cfg, len(dataset), world_size)
    health = f"every {cfg.health.period} steps" if cfg.health.period else "not measured (health.period=0)"
    plan |= {"health": health, "k-NN while training": knn, "k-NN of patches while training": dense}
    lines = [f"{name:32} {value}" for name, value in plan.items()]
    if (batch := global_batch_size(cfg, world_size)) > len(dataset):
        lines += [
            "",
            f"note: a step takes {batch:,} images, but the dataset has {len(dataset):,}: images repeat within a step",
        ]
    findings += [*check_images(cfg, dataset), *check_length(cfg, len(dataset), world_size)]
    findings += check_sources(cfg, dataset, world_size)
    known = {path for path, _ in dataset.survey().unreadable}
    notes = [f"{'warning' if level > logging.INFO else 'note'}: {note}" for level, note in dataset.notes()]
    notes += [f"note: {error}" for error in unreadable if error.path not in known]
    notes += advise_few_images(cfg, dataset) if latest is None else []
    lines += ["", *notes] if notes else []
    lines += ["", *(f"warning: {warning}" for warning in findings)] if findings else []
    but = f" but for {len(findings)} warning(s)" if findings else ""
    text = "\n".join([settings, *lines, "", f"dry run: everything is in order{but}, nothing was trained"])
    sys.stdout.write(text + "\n")
    return flops


def _start(latest: Path | None, cfg: Config, model: SSLMetaArch, changes: Sequence[str]) -> dict[str, str]:
    """Starting point of the run; checks the checkpoint that it resumes from, except the values of its tensors.

    `changes` are the settings that differ from those of the run so far.
    """
    if latest is None:
        return {"starts from": next(iter(config.sources_of(cfg).values()), "random weights")}
    from dinov2.train.checkpoint_files.tensors import read_shapes, read_tensors

    check_same_stage(Path(cfg.train.output_dir) / "config.yaml", cfg)
    step = read_state(latest)["iteration"] + 1
    check_length_so_far(step, cfg)
    stored = read_shapes(latest)
    for name, value in model.state_dict().items():
        if (found := stored.get(f"model.{name}")) is None or found.shape != value.shape:
            shape = "none" if found is None else tuple(found.shape)
            changed = network_changes(changes)
            raise ValueError(
                f"cannot resume from {latest}: {name} is {tuple(value.shape)} here, {shape} there. If the config of "
                "the run was changed, change it back or use --no-resume or another --output-dir"
                + (f". Settings there -> here: {'; '.join(changed)}" if changed else "")
            )
    if "frozen_digest" in model.state_dict():
        digest = read_tensors(latest, "model.frozen_digest")["model.frozen_digest"]
        model.load_state_dict({"frozen_digest": digest}, strict=False, assign=True)
        model.check_frozen()
    return {"starts from": f"step {step:,}: resumes {latest}"}


def _knn(cfg: Config, dataset: ImageDataset) -> str:
    try:
        _, targets = labeled_dataset(cfg, dataset)
    except NoLabels as error:
        return f"none, {error}"
    num_images = len(balanced_positions(targets, cfg.health.knn_images))
    return f"{num_images} images of {cfg.health.knn_dataset or cfg.train.dataset_path}, {_when(cfg)}"


def _dense(cfg: Config, dataset: ImageDataset) -> str:
    dense = read_dense_images(cfg, dataset)
    return "none (health.dense_dataset)" if dense is None else f"{dense.describe()}, {_when(cfg)}"


def _when(cfg: Config) -> str:
    """How often labels are used."""
    period = cfg.health.knn_period
    return "with every teacher checkpoint" if period is None else f"every {period} steps"


def _check_readable(dataset: ImageDataset, max_bad_share: float) -> list[BadImageError]:
    """Read some images, evenly spaced; returns the errors, of which one, or the tolerated fraction, is accepted."""
    sample = range(0, len(dataset), max(len(dataset) // IMAGES_TRIED, 1))[:IMAGES_TRIED]
    broken = []
    for index in sample:
        try:
            dataset[index]
        except BadImageError as error:
            broken.append(error)
    if len(broken) > max(min(1, len(sample) - 1), max_bad_share * len(sample)):
        raise OSError(f"{len(broken)} of {len(sample)} images tried cannot be read; the first: {broken[0]}")
    return broken


def _check_writable(folder: Path) -> None:
    """Check write access to the folder, or to its nearest existing parent."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the output folder {folder}: {error}") from error


def _plan(
    cfg: Config, model: SSLMetaArch, num_images: int, world_size: int, job_size: int, flops: float
) -> dict[str, str]:
    """The plan of the run: name -> value with its unit."""
    batch = global_batch_size(cfg, world_size)
    accumulated = f" x {cfg.train.accumulate_steps} micro-batches" if cfg.train.accumulate_steps > 1 else ""
    steps = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    parameters = {name: _num_parameters(module) for name, module in model.student.items()}
    return {
        "dataset": f"{cfg.train.dataset_path}, {num_images:,} images",
        "global batch": f"{batch:,} images ({cfg.train.batch_size_per_gpu} x {world_size} processes{accumulated})",
        "peak learning rate": f"{cfg.optim.lr:.6g} (base_lr {cfg.optim.base_lr:g}, {cfg.optim.scaling_rule})",
        "highest rates of the backbone": _rates_of_backbone(cfg, model),
        "optimizer steps": f"{steps:,} ({cfg.optim.epochs} nominal epochs of {cfg.train.OFFICIAL_EPOCH_LENGTH:,})",
        "learning-rate warm-up": f"{cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH:,} steps",
        **describe_schedules(cfg, cfg.optim.lr),
        "checkpoints": _how_often(checkpoint_period(cfg), steps),
        "teacher checkpoints": _how_often(cfg.evaluation.eval_period_iterations, steps),
        "images seen": f"{steps * batch:,}, the dataset {steps * batch / num_images:.1f} times",
        **{f"parameters of {name}": f"{count:,}" for name, count in parameters.items()},
        **_compute(cfg, flops, steps, world_size),
        **_costs(cfg, model, world_size, job_size),
    }


def _rates_of_backbone(cfg: Config, model: SSLMetaArch) -> str:
    """The highest learning rates of the patch embedding and of the first and last block, which optimizers apply."""
    groups = get_params_groups_with_decay(
        model.student_backbone, cfg.optim.layerwise_decay, cfg.optim.patch_embed_lr_mult
    )
    peak, last_block = cfg.optim.lr, model.student_backbone.n_blocks - 1
    names = {"patch_embed.": "patch embedding", "blocks.0.": "first block", f"blocks.{last_block}.": "last block"}
    rates = {
        text: peak * next(group["lr_multiplier"] for group in groups if group["name"].startswith(name))
        for name, text in names.items()
    }
    return ", ".join(f"{text} {rate:.3g}" for text, rate in rates.items())


def _how_often(period: int, steps: int) -> str:
    """Describe an output that is written every `period` steps and at the end of a run of `steps`."""
    return f"{num_due(period, steps):,}: every {period:,} steps and after the last one" if period > 0 else "none"


def _compute(cfg: Config, flops: float, steps: int, world_size: int) -> dict[str, str]:
    """FLOPs by image, step and run, and the least time of a step, on a machine without a GPU also here."""
    of_image, of_run = flops * world_size / global_batch_size(cfg, world_size), flops * steps * world_size
    floor = f"{_duration(flops / H200_FLOPS)} at {_flop(H200_FLOPS)}/s (an H200 in half precision)"
    if not torch.cuda.is_available():
        dtype = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
        speed = product_speed(config.DTYPES[dtype], torch.device("cpu"), side=256, repeats=1)  # in well below a second
        floor += f", about {_duration(flops / speed)} at {_flop(speed)}/s (this CPU in {dtype})"
    return {
        "compute": f"{_flop(of_image)} per image, {_flop(flops)} per step and process, {_flop(of_run)} in all",
        "a step takes at least": floor,
    }


def _flop(number: float) -> str:
    """Format floating-point operations with three digits."""
    rounded = float(f"{number:.3g}")
    exponent = min(max(int(math.log10(rounded)) // 3, 1), 7)
    return f"{rounded / 10 ** (3 * exponent):.3g} {'kMGTPEZ'[exponent - 1]}FLOP"


def _duration(seconds: float) -> str:
    """Format a time of microseconds to days with three digits."""
    unit, length = next((u for u in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= u[1]), ("ms", 1e-3))
    return f"{seconds / length:.3g} {unit}"


def _costs(cfg: Config, model: SSLMetaArch, world_size: int, job_size: int) -> dict[str, str]:
    """Estimated memory and communication of a process."""
    here = distributed.detect_process()
    per_machine = here.local_world_size if here.world_size == job_size else min(PROCESSES_PER_MACHINE, job_size)
    costs = estimate(cfg, model, world_size, per_machine, job_size)
    memory = (
        f"{_gib(costs.memory)} (weights, gradients and AdamW {_gib(costs.state)}, gathered weights and gradients "
        f"{_gib(costs.gathered + costs.reducing)}, activations {_gib(costs.activations)})"
    )
    if job_size == 1:
        return {"memory per process, estimated": memory}
    modules = cfg.compute_precision.student
    strategies = [f"{name} {getattr(modules, name).sharding_strategy}" for name in model.student]
    sent = f"{_gib(costs.sent)} by a process, {_gib(costs.sent_by_machine)} by a machine of {per_machine} to others"
    return {"sharding": ", ".join(strategies), "memory per process, estimated": memory, "sent in a step": sent}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _num_parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
