"""Train DINOv2: from the command line to the last checkpoint. The loop is `do_train`.

    python dinov2/train/train.py --config-file dinov2/configs/train/vitl16_short.yaml --output-dir OUT \\
        train.dataset_path=ImageFolder:root=/my/images

The same command again resumes the run, exactly. `--dry-run` checks everything and trains nothing.
"""

import argparse
import logging
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import nn

from dinov2 import config, distributed
from dinov2.config import DTYPES, Config
from dinov2.data import DataAugmentationDINO, MaskingGenerator
from dinov2.data.collate import Batch
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.device_augment import RawBatch
from dinov2.data.loader import SamplerType, make_train_loader, to_device
from dinov2.data.masking import published_max_num_patches
from dinov2.data.randomness import seed_for
from dinov2.files import folder_lock, naming_full_disk, remove_leftovers
from dinov2.log import MetricLogger, read_records, run_command, setup_logging, truncate_metrics
from dinov2.trackers import open_trackers
from dinov2.train.checkpoint import (
    OUTPUTS,
    Checkpointer,
    archive_run,
    has_lost_checkpoints,
    latest_checkpoint,
    load_initial_weights,
    load_training_weights,
    save_teacher,
)
from dinov2.train.checkpoint_state import Setup, read_state
from dinov2.train.environment import keep_freed_memory, record_environment
from dinov2.train.guards import BadImageGuard, NonFiniteGuard
from dinov2.train.interruption import Interruption
from dinov2.train.monitor.alarms import AlarmMonitor
from dinov2.train.monitor.best_teacher import rate_teacher
from dinov2.train.monitor.target_stats import HealthPanel, TargetStats
from dinov2.train.optim import build_optimizer, clip_gradients, ema_update, set_hyperparameters, step_unless
from dinov2.train.parallel import parallelize
from dinov2.train.preflight.checks import check_settings
from dinov2.train.preflight.dry_run import dry_run
from dinov2.train.schedules import build_schedules, global_batch_size, is_due, scale_lr
from dinov2.train.ssl_meta_arch import Losses, SSLMetaArch, mean_losses
from dinov2.train.training_data import open_dataset

logger = logging.getLogger(__name__)


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """The published flags, and --dry-run."""
    parser = argparse.ArgumentParser("DINOv2 training", add_help=add_help, allow_abbrev=False)
    parser.add_argument(
        "--config-file", required=True, help="YAML file, or the name of a packaged one such as train/vitl16_short"
    )
    parser.add_argument("--no-resume", action="store_true", help="start anew even if the output folder has checkpoints")
    parser.add_argument("--eval-only", action="store_true", help="write the teacher of the latest checkpoint and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check config, data and weights, print the plan, and exit"
    )
    parser.add_argument(
        "--output-dir", "--output_dir", default="", help="where everything is written (default: the current folder)"
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides, such as optim.epochs=10")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what the parsed arguments ask for, in this process or as one of several."""
    cfg = config.load(args.config_file, args.opts)
    output_dir = Path(args.output_dir or cfg.train.output_dir).resolve()
    if args.dry_run:
        planned: int | None = getattr(args, "world_size", None)  # by the launcher, which starts the processes
        world_size = planned or distributed.detect_process().world_size
        dry_run(with_run_values(cfg, output_dir, world_size), world_size, resume=not args.no_resume)
        return
    with distributed.session(), naming_full_disk(output_dir):
        cfg = with_run_values(cfg, output_dir, distributed.world_size())
        output_dir.mkdir(parents=True, exist_ok=True)
        setup_logging(output_dir, distributed.rank())
        seed_everything(cfg.train.seed)
        torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it, as published
        logger.info("%d process(es), device %s, output %s", distributed.world_size(), distributed.device(), output_dir)
        if distributed.device().type == "cpu":
            keep_freed_memory()
            if uses_fp16(cfg):
                logger.warning("fp16 is slower than fp32 on a CPU: consider fp32 or bf16 in compute_precision")
        if not args.eval_only:
            for warning in check_settings(cfg, distributed.world_size()):
                logger.warning("%s", warning)
        cfg, dataset = open_dataset(cfg, resume=not args.no_resume)  # before the model: mistakes show at once
        model = SSLMetaArch(cfg).to(distributed.device())
        with distributed.on_main(folder_lock(output_dir)):
            if args.eval_only:
                dump_teacher_only(cfg, model, resume=not args.no_resume)
            else:
                do_train(cfg, model, dataset, resume=not args.no_resume)


def with_run_values(cfg: Config, output_dir: Path, world_size: int) -> Config:
    """The config with what only the run knows: its output folder and the learning rate for its global batch."""
    lr = scale_lr(cfg.optim.base_lr, cfg.optim.scaling_rule, global_batch_size(cfg, world_size))
    return replace(
        cfg,
        optim=replace(cfg.optim, lr=lr),
        train=replace(cfg.train, output_dir=str(output_dir)),
    )


def seed_everything(seed: int) -> None:
    """Seed all generators alike on all processes; what must differ between them is seeded where it is drawn."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def do_train(cfg: Config, model: SSLMetaArch, dataset: ImageDataset, *, resume: bool) -> None:
    """Train until the last step of the schedule, from the latest checkpoint if there is one and `resume`."""
    device = distributed.device()
    output_dir = Path(cfg.train.output_dir)
    if distributed.is_main():
        remove_leftovers(output_dir, OUTPUTS)
    epoch_length, total_steps = cfg.train.OFFICIAL_EPOCH_LENGTH, cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    latest = distributed.from_main(lambda: latest_checkpoint(output_dir / "checkpoints")) if resume else None
    checkpoint_period = cfg.train.checkpoint_period or 3 * epoch_length
    if latest is None:
        load_initial_weights(model, cfg)
        if not resume or distributed.from_main(lambda: has_lost_checkpoints(output_dir, checkpoint_period)):
            archive_run(output_dir)
    model.train()
    parallelize(
        model.student,
        model.teacher,
        cfg.compute_precision,
        block_chunks=cfg.student.block_chunks,
        activation_checkpointing=cfg.train.activation_checkpointing,
        compile_blocks=cfg.train.compile,
    )
    optimizer = build_optimizer(
        model.student,
        betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2),
        lr_decay_rate=cfg.optim.layerwise_decay,
        patch_embed_lr_mult=cfg.optim.patch_embed_lr_mult,
    )
    schedules = build_schedules(cfg, cfg.optim.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=uses_fp16(cfg))
    checkpointer = Checkpointer(
        output_dir / "checkpoints",
        model,
        optimizer,
        scaler,
        period=checkpoint_period,
        last_step=total_steps - 1,
        keep=cfg.train.checkpoint_keep,
        keep_every=cfg.train.checkpoint_keep_every,
    )
    metrics = MetricLogger(
        "  ",
        output_dir / "training_metrics.json",
        is_main=distributed.is_main(),
        mean_over_processes=distributed.all_reduce_mean,
        hidden=("wd", "mom", "last_layer_lr", "current_batch_size", "teacher_temp"),
    )
    global_batch = global_batch_size(cfg, distributed.world_size())
    setup = Setup(distributed.world_size(), global_batch, len(dataset), dataset.fingerprint())
    start, images_seen = resume_run(cfg, latest, checkpointer, metrics, setup)
    if distributed.is_main() and start < total_steps:
        record_environment(output_dir, start, data=cfg.train.dataset_path)
    panel = HealthPanel(cfg, model, dataset, last_step=total_steps - 1)
    bell = AlarmMonitor(read_records(output_dir / "training_metrics.json"))
    nonfinite, bad_images = NonFiniteGuard(cfg.train.max_nonfinite_steps), BadImageGuard(cfg.train.max_bad_image_share)

    due = False  # whether a checkpoint is, put off while steps are refused
    logger.info("%d of %d steps are done; %d images each", start, total_steps, global_batch)
    step = start - 1  # the last finished one

    def save(*, wait: bool) -> None:
        progress = {"images_seen": images_seen, "metrics": metrics.state_dict()}
        checkpointer.save(step, progress | setup._asdict())
        checkpointer.finish(wait=wait)

    interruption = Interruption(partial(save, wait=True))
    loader = build_loader(cfg, dataset, images_seen, while_waiting=interruption.check_wait)
    loading = closing(to_device(loader, device))  # its processes end with the loop
    tracking = distributed.on_main(
        open_trackers(**asdict(cfg.tracking), output_dir=output_dir, start=start, config=config.to_dict(cfg))
    )
    with tracking as trackers, loading as micro_batches, checkpointer, interruption:
        metrics.listeners = [bell.update, *(trackers or [])]
        steps = enumerate(zip(*[micro_batches] * cfg.train.accumulate_steps, strict=False), start)
        for step, batches in metrics.log_every(
            steps, cfg.train.log_period, "Training", total_steps, start, batch_size=global_batch
        ):
            now = schedules.at(step)
            set_hyperparameters(optimizer, now)
            watch = panel.target_stats(step, line_is_due=metrics.line_is_due())
            losses = forward_backward(model, batches, now.teacher_temp, scaler, watch, seed=cfg.train.seed, step=step)
            norms = clip_and_step(losses, model.student, optimizer, scaler, cfg.optim.clip_grad, nonfinite)
            ema_update(model.teacher, model.student, now.momentum)
            nonfinite.tell(scaler, all_steps=step == total_steps - 1)
            bad_images.check(batches)
            images_seen += global_batch
            metrics.update(lr=now.lr, wd=now.wd, mom=now.momentum, last_layer_lr=now.last_layer_lr)
            metrics.update(current_batch_size=float(cfg.train.batch_size_per_gpu))
            metrics.update(**displayed(losses, cfg), only_finite=True)
            metrics.update(teacher_temp=now.teacher_temp)
            measured = panel.measure(step, watch, norms)
            metrics.note(**measured)
            metrics.end_iteration()
            if is_due(step, cfg.evaluation.eval_period_iterations, last_step=total_steps - 1):
                folder = output_dir / "eval" / f"training_{step}"
                save_teacher(model.teacher, folder / "teacher_checkpoint.pth")
                if distributed.is_main():
                    rate_teacher(folder, step, measured, cfg.health.best_by)
            stopping = interruption.requested()
            due = due or checkpointer.is_due(step)
            healthy = nonfinite.in_a_row == 0 or step == total_steps - 1  # else older checkpoints are worth more
            if stopping or (due and healthy):
                due = False
                save(wait=stopping)
            checkpointer.finish(wait=False)
            if stopping:
                interruption.leave()
    watched = bell.summary() if panel.probe else "health was not measured"
    logger.info("finished: %s; the run on a page: python -m dinov2.report %s", watched, output_dir)


def forward_backward(
    model: SSLMetaArch,
    batches: Sequence[Batch],
    teacher_temp: float,
    scaler: torch.amp.GradScaler,
    watch: TargetStats | None = None,
    *,
    seed: int,
    step: int,
) -> Losses:
    """The losses of a step, averaged over its micro-batches, and their gradient; `watch` sees the targets.

    The targets of all micro-batches are made together. Each is then treated as that of a process of its own.
    """
    model.student.zero_grad(set_to_none=True)
    losses = []
    for micro, (batch, targets) in enumerate(zip(batches, model.targets(batches, teacher_temp), strict=True)):
        place = micro * distributed.world_size() + distributed.rank()
        torch.manual_seed(seed_for(seed, f"drop path of rank {place}", step))
        predictions = model.predictions(batch)
        part = model.losses(batch, targets, predictions)
        if watch is not None:
            watch.add(targets, predictions)
        scaler.scale(part.total / len(batches)).backward()
        losses.append(part.detach())
    return mean_losses(losses)


def clip_and_step(
    losses: Losses,
    student: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_norm: float | None,
    guard: NonFiniteGuard,
) -> dict[str, torch.Tensor]:
    """Clipping per sub-module, optimizer step; it changes nothing if a loss or a gradient is not finite.

    Returns:
        The norms of the gradient before clipping, by sub-module.
    """
    scaler.unscale_(optimizer)
    norms = clip_gradients(student, max_norm)
    step_unless(guard.refused(losses.terms, norms), optimizer)
    scaler.update()
    return norms


def resume_run(
    cfg: Config, latest: Path | None, checkpointer: Checkpointer, metrics: MetricLogger, setup: Setup
) -> tuple[int, int]:
    """Restore the latest checkpoint, if there is one; the first step to do and the images seen before it.

    What is not as it was before is logged as a warning. Config and metrics on disk are replaced only once that has
    worked.
    """
    config_file = Path(cfg.train.output_dir) / "config.yaml"
    start = images_seen = 0
    if latest is not None:
        state = checkpointer.load(latest, needed=("images_seen", "metrics"))
        for title, changed in (
            ("with other settings than before", changed_settings(config_file, cfg)),
            ("on other data or processes than before", setup.changes_since(state)),
        ):
            if changed:
                logger.warning("resuming %s: %s", title, "; ".join(changed))
        metrics.load_state_dict(state["metrics"])
        start, images_seen = state["iteration"] + 1, state["images_seen"]
    if distributed.is_main():
        config.save(cfg, config_file)
        truncate_metrics(config_file.with_name("training_metrics.json"), start)
    return start, images_seen


def changed_settings(former: Path, cfg: Config) -> list[str]:
    """The settings that differ from those in a run's config file; none, with a warning, if that cannot be understood.

    Returns:
        Texts such as "optim.epochs: 2 -> 4".
    """
    if not former.exists():
        return []
    try:
        return config.differences(config.load(former), cfg)
    except (ValueError, OSError) as error:
        logger.warning("which settings have changed cannot be told, %s is replaced: %s", former, error)
        return []


def build_loader(
    cfg: Config, dataset: ImageDataset, images_seen: int, while_waiting: Callable[[], object] | None = None
) -> Iterable[Batch] | Iterable[RawBatch]:
    """Endless micro-batches of this process, continuing where `images_seen` have been used by all; for `to_device`."""
    crops, patch_size = cfg.crops, cfg.student.patch_size
    augmentation = DataAugmentationDINO(
        crops.global_crops_scale,
        crops.local_crops_scale,
        crops.local_crops_number,
        crops.global_crops_size,
        crops.local_crops_size,
        **asdict(cfg.augmentation),
    )
    side = crops.global_crops_size // patch_size
    return make_train_loader(
        dataset,
        augmentation=augmentation,
        batch_size=cfg.train.batch_size_per_gpu,
        num_workers=cfg.train.num_workers,
        augment_on=cfg.train.augment_on,
        sampler=SamplerType[cfg.train.sampler],
        seed=cfg.train.seed,
        start_position=images_seen,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        patience=cfg.train.data_timeout,
        while_waiting=while_waiting,
        mask_generator=MaskingGenerator(
            (side, side), max_num_patches=published_max_num_patches(crops.global_crops_size, patch_size)
        ),
        mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
        mask_probability=cfg.ibot.mask_sample_probability if cfg.ibot.loss_weight > 0 else 0.0,
        dtype=DTYPES[cfg.compute_precision.student.backbone.mixed_precision.param_dtype],
    )


def displayed(losses: Losses, cfg: Config) -> dict[str, torch.Tensor]:
    """The losses as logged: the optimized terms and their sum, or what the release shows."""
    terms = losses.published if cfg.train.log_published_losses else losses.terms
    return {"total_loss": torch.stack(list(terms.values())).sum(), **terms}


def dump_teacher_only(cfg: Config, model: SSLMetaArch, *, resume: bool) -> None:
    """Write the teacher of the latest checkpoint if `resume`, or of MODEL.WEIGHTS, as `eval/manual_<iteration>`.

    Raises:
        FileNotFoundError: if there is neither, rather than writing random weights.
    """
    output_dir = Path(cfg.train.output_dir)
    folder = distributed.from_main(lambda: latest_checkpoint(output_dir / "checkpoints")) if resume else None
    source = folder or cfg.MODEL.WEIGHTS
    if not source:
        raise FileNotFoundError(
            f"--eval-only found no checkpoint in {output_dir / 'checkpoints'} and MODEL.WEIGHTS is empty"
        )
    load_training_weights(model, source)
    if distributed.is_main() and not (output_dir / "config.yaml").exists():
        config.save(cfg, output_dir / "config.yaml")  # which an evaluation of the teacher needs
    iteration = read_state(folder)["iteration"] + 1 if folder else 0
    save_teacher(model.teacher, output_dir / "eval" / f"manual_{iteration}" / "teacher_checkpoint.pth")


def uses_fp16(cfg: Config) -> bool:
    """Whether gradients need scaling: only fp16 has so small a range."""
    student = cfg.compute_precision.student
    dtypes = {module.mixed_precision.param_dtype for module in (student.backbone, student.dino_head, student.ibot_head)}
    return cfg.compute_precision.grad_scaler and "fp16" in dtypes


if __name__ == "__main__":
    words = "the same command again continues the training"
    sys.exit(run_command(lambda: main(get_args_parser().parse_intermixed_args()), after_interrupt=words))
