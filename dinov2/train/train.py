"""Training of DINOv2, from the command line to the last checkpoint. The loop is `do_train`.

    python dinov2/train/train.py --config-file dinov2/configs/train/vitl16_short.yaml --output-dir OUT \\
        train.dataset_path=ImageFolder:root=/my/images

The same command resumes the run exactly. `--dry-run` checks everything without training.
"""

import argparse
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.flags.train import get_args_parser

if __name__ == "__main__":
    ARGS = get_args_parser().parse_intermixed_args()  # before the imports that take seconds

import numpy as np
import torch
from torch import nn

from dinov2 import config, distributed
from dinov2.config import Config
from dinov2.data.collate import Batch
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loader import to_device
from dinov2.data.randomness import seed_for
from dinov2.files import folder_lock, naming_full_disk
from dinov2.log import run_command, setup_logging
from dinov2.meters import MetricLogger
from dinov2.metrics_file import read_records
from dinov2.train.checkpoint_files.folder import latest_checkpoint
from dinov2.train.checkpoint_files.state import read_state
from dinov2.train.guards import BadImageGuard, NonFiniteGuard
from dinov2.train.interruption import Interruption
from dinov2.train.monitor.alarms import AlarmMonitor
from dinov2.train.monitor.best_teacher import best_rating, rate_teacher
from dinov2.train.monitor.conclusion import conclude
from dinov2.train.monitor.target_stats import HealthPanel, TargetStats
from dinov2.train.network_files import load_training_weights, save_teacher
from dinov2.train.optim import clip_gradients, ema_update, set_hyperparameters, step_unless
from dinov2.train.preflight.checks import check_device, check_images, check_settings
from dinov2.train.preflight.dry_run import dry_run_all
from dinov2.train.preflight.plan import check_length, check_sources
from dinov2.train.schedules import StepValues, build_schedules, global_batch_size, is_due, num_steps
from dinov2.train.ssl_meta_arch import Losses, SSLMetaArch, mean_losses
from dinov2.train.stages.choice import build_arch
from dinov2.train.stages.several_students import own_run, planned_runs, resume_together
from dinov2.train.start.baseline import measure_baseline
from dinov2.train.start.source_runs import check_source_runs, pinned
from dinov2.train.training_run import (
    METRICS_FILE,
    build_loader,
    open_dataset,
    open_run_trackers,
    start_or_resume,
)

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    """Run the command, in a single process or as one of several."""
    planned: int | None = getattr(args, "world_size", None)  # set by the launcher, which starts the processes
    job_size, resume = planned or distributed.detect_process().world_size, not args.no_resume
    runs = planned_runs(args, job_size)
    if args.dry_run:
        dry_run_all(runs, job_size, resume=resume)
        return
    with distributed.session(), ExitStack() as stack:
        run = own_run(runs)
        cfg, output_dir = run.cfg, run.output_dir
        stack.enter_context(naming_full_disk(output_dir))
        output_dir.mkdir(parents=True, exist_ok=True)
        setup_logging(output_dir, distributed.rank(), name=output_dir.name if len(runs) > 1 else "")
        seed_everything(cfg.train.seed)
        torch.set_float32_matmul_precision("high")  # TF32 where supported, as published
        logger.info("%d process(es), device %s, output %s", distributed.world_size(), distributed.device(), output_dir)
        if not args.eval_only:
            for warning in [*check_settings(cfg, distributed.world_size()), *check_device(cfg)]:
                logger.warning("%s", warning)
        check_source_runs(cfg, resume=resume)
        cfg = pinned(cfg, resume=resume)
        cfg, dataset = open_dataset(cfg, resume=resume)  # before the model, to report mistakes early
        warnings = check_images(cfg, dataset)
        if not args.eval_only:
            warnings += check_length(cfg, len(dataset), distributed.world_size())
            warnings += check_sources(cfg, dataset, distributed.world_size())
        for warning in warnings:
            logger.warning("%s", warning)
        model = build_arch(cfg, among_students=len(runs) > 1).to(distributed.device())
        with distributed.on_main(folder_lock(output_dir)):
            if args.eval_only:
                dump_teacher_only(cfg, model, resume=resume)
            else:
                do_train(cfg, model, dataset, resume=resume and resume_together(runs))


def seed_everything(seed: int) -> None:
    """Seed all generators alike on all processes; whatever must differ between them is seeded where it is drawn."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


# --- The loop --------------------------------------------------------------------------------------------------------


def do_train(cfg: Config, model: SSLMetaArch, dataset: ImageDataset, *, resume: bool) -> None:
    """Train until the last step of the schedule, from the latest checkpoint if there is one and `resume`."""
    output_dir, last_step = Path(cfg.train.output_dir), num_steps(cfg) - 1
    run = start_or_resume(cfg, model, dataset, resume=resume)
    optimizer, scaler, metrics, checkpointer = run.optimizer, run.scaler, run.metrics, run.checkpointer
    schedules = build_schedules(cfg, cfg.optim.lr)
    panel = HealthPanel(cfg, model, dataset, last_step=last_step)
    if run.from_weights:
        measure_baseline(cfg, model, panel, output_dir / METRICS_FILE)
    alarms = AlarmMonitor(read_records(output_dir / METRICS_FILE))
    nonfinite, bad_images = NonFiniteGuard(cfg.train.max_nonfinite_steps), BadImageGuard(cfg.train.max_bad_image_share)
    interruption = Interruption(partial(run.save, wait=True))
    loader = build_loader(cfg, dataset, run.images_seen, while_waiting=interruption.check_wait)
    loading = closing(to_device(loader, distributed.device()))  # ends the worker processes after the loop
    tracking = open_run_trackers(cfg, first_step=run.step + 1)
    checkpoint_due = False  # checkpoints are postponed while steps are skipped
    with tracking as trackers, loading as micro_batches, checkpointer, interruption:
        metrics.listeners = [alarms.update, *(trackers or [])]
        for step, batches in log_steps(cfg, metrics, micro_batches, first_step=run.step + 1):
            now = schedules.at(step)
            set_hyperparameters(optimizer, now)
            model.begin_step(step)
            stats = panel.target_stats(step, line_is_due=metrics.line_is_due())
            losses = forward_backward(model, batches, now.teacher_temp, scaler, stats, seed=cfg.train.seed, step=step)
            norms = clip_and_step(losses, model.student, optimizer, scaler, cfg.optim.clip_grad, nonfinite)
            ema_update(model.teacher, model.student, now.momentum)
            run.step, run.images_seen = step, run.images_seen + run.setup.global_batch
            nonfinite.report(scaler, all_steps=step == last_step)
            bad_images.check(batches)
            measured = panel.measure(step, stats, norms)
            log_step(metrics, cfg, now, losses, measured)
            if is_due(step, cfg.evaluation.eval_period_iterations, last_step):
                save_rated_teacher(model, output_dir / "eval" / f"training_{step}", step, measured, cfg.health.best_by)
            stopping = interruption.requested()
            checkpoint_due = checkpoint_due or checkpointer.is_due(step)
            # While steps are skipped, older checkpoints are worth more.
            if stopping or (checkpoint_due and (step == last_step or nonfinite.is_over())):
                checkpoint_due = False
                run.save(wait=stopping)
            checkpointer.finish(wait=False)
            if stopping:
                interruption.leave()
    summary = alarms.summary() if panel.probe else "health was not measured"
    logger.info("finished: %s; report of the run: python -m dinov2.report %s", summary, output_dir)
    if conclusion := conclude(read_records(output_dir / METRICS_FILE), best_rating(output_dir)):
        logger.info("%s", conclusion)


def forward_backward(
    model: SSLMetaArch,
    batches: Sequence[Batch],
    teacher_temp: float,
    scaler: torch.amp.GradScaler,
    stats: TargetStats | None = None,
    *,
    seed: int,
    step: int,
) -> Losses:
    """Compute the losses of a step, without their graph, and their gradient, both averaged over its micro-batches.

    The targets of all micro-batches are computed jointly. Each micro-batch is then treated like the batch of a process
    of its own. Targets and predictions are added to `stats` if they are measured in this step.
    """
    model.student.zero_grad(set_to_none=True)
    parts = []
    for index, (batch, targets) in enumerate(zip(batches, model.targets(batches, teacher_temp), strict=True)):
        virtual_rank = index * distributed.world_size() + distributed.rank()
        torch.manual_seed(seed_for(seed, f"drop path of rank {virtual_rank}", step))
        losses, predictions = model(batch, targets)
        if stats is not None:
            stats.add(targets, predictions)
        scaler.scale(losses.total / len(batches)).backward()
        parts.append(losses.detach())
    return mean_losses(parts)


def clip_and_step(
    losses: Losses,
    student: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_norm: float | None,
    guard: NonFiniteGuard,
) -> dict[str, torch.Tensor]:
    """Clip each sub-module's gradient, step unless something is not finite, and return the norms before clipping."""
    scaler.unscale_(optimizer)
    norms = clip_gradients(student, max_norm)
    step_unless(guard.refused(losses.terms, norms), optimizer)
    scaler.update()
    return norms


def log_steps(
    cfg: Config, metrics: MetricLogger, micro_batches: Iterable[Batch], *, first_step: int
) -> Iterator[tuple[int, tuple[Batch, ...]]]:
    """Iterate over the remaining steps and their micro-batches, and log progress."""
    steps = enumerate(zip(*[iter(micro_batches)] * cfg.train.accumulate_steps, strict=False), first_step)
    batch_size = global_batch_size(cfg, distributed.world_size())
    return metrics.log_every(steps, cfg.train.log_period, "Training", num_steps(cfg), first_step, batch_size=batch_size)


def log_step(
    metrics: MetricLogger, cfg: Config, values: StepValues, losses: Losses, measured: Mapping[str, float]
) -> None:
    """Log the numbers of a step: schedules, losses (as optimized, or as the release displays them), measurements."""
    terms = losses.published if cfg.train.log_published_losses else losses.terms
    metrics.update(lr=values.lr, wd=values.wd, mom=values.momentum, last_layer_lr=values.last_layer_lr)
    metrics.update(current_batch_size=float(cfg.train.batch_size_per_gpu))
    metrics.update(total_loss=torch.stack(list(terms.values())).sum(), **terms, only_finite=True)
    metrics.update(teacher_temp=values.teacher_temp, backbone_lr=values.backbone_lr)
    metrics.note(**measured)
    metrics.end_iteration()


# --- Teachers for evaluation ---------------------------------------------------------------------------------------


def save_rated_teacher(
    model: SSLMetaArch, folder: Path, step: int, measured: Mapping[str, float], best_by: str
) -> None:
    """Write the teacher after a step to `folder`, and mark it if it is the best one so far by `best_by`."""
    save_teacher(model.teacher, folder / "teacher_checkpoint.pth")
    if distributed.is_main():
        rate_teacher(folder, step, measured, best_by)


def dump_teacher_only(cfg: Config, model: SSLMetaArch, *, resume: bool) -> None:
    """Write the teacher of the latest checkpoint if `resume`, or of MODEL.WEIGHTS, as `eval/manual_<iteration>`."""
    output_dir = Path(cfg.train.output_dir)
    folder = distributed.from_main(lambda: latest_checkpoint(output_dir / "checkpoints")) if resume else None
    source = folder or cfg.MODEL.WEIGHTS
    if not source:
        raise FileNotFoundError(
            f"--eval-only found no checkpoint in {output_dir / 'checkpoints'} and MODEL.WEIGHTS is empty"
        )
    load_training_weights(model, source)
    if distributed.is_main() and not (output_dir / "config.yaml").exists():
        config.save(cfg, output_dir / "config.yaml")  # needed by evaluations of the teacher
    iteration = read_state(folder)["iteration"] + 1 if folder else 0
    save_teacher(model.teacher, output_dir / "eval" / f"manual_{iteration}" / "teacher_checkpoint.pth")


if __name__ == "__main__":
    hint = "the same command again continues the training"
    sys.exit(run_command(lambda: main(ARGS), after_interrupt=hint))
