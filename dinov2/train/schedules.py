"""Schedules of the hyperparameters that change during a run."""

import math
from typing import NamedTuple

import numpy as np

from dinov2.config import Config


class CosineScheduler:
    """`freeze_iters` zeros, a linear warm-up to `base_value`, then a half cosine toward `final_value`.

    A float64 array of `total_iters` values; larger indices give `final_value`, which the cosine itself does not quite
    reach. The warm-up starts at `start_warmup_value` and includes both ends, so `base_value` appears twice. A
    ValueError if zeros and warm-up are longer than the schedule.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ) -> None:
        cosine_iters = total_iters - warmup_iters - freeze_iters
        if cosine_iters < 0:
            raise ValueError(
                f"a schedule of {total_iters} iterations is shorter than its warm-up ({warmup_iters}) "
                f"and frozen start ({freeze_iters}) together"
            )
        phase = np.pi * np.arange(cosine_iters) / max(cosine_iters, 1)
        self.final_value = final_value
        self.schedule = np.concatenate(
            [
                np.zeros(freeze_iters),
                np.linspace(start_warmup_value, base_value, warmup_iters),
                final_value + 0.5 * (base_value - final_value) * (1 + np.cos(phase)),
            ]
        )

    def __getitem__(self, iteration: int) -> float:
        return float(self.schedule[iteration]) if iteration < len(self.schedule) else float(self.final_value)


class StepValues(NamedTuple):
    """Scheduled values of one step: `wd` is the weight decay, `momentum` that of the teacher."""

    lr: float
    wd: float
    momentum: float
    teacher_temp: float
    last_layer_lr: float
    backbone_lr: float  # of what optim.freeze_backbone_steps freezes


class Schedules(NamedTuple):
    """The six schedules of a run."""

    lr: CosineScheduler
    wd: CosineScheduler
    momentum: CosineScheduler
    teacher_temp: CosineScheduler
    last_layer_lr: CosineScheduler
    backbone_lr: CosineScheduler

    def at(self, step: int) -> StepValues:
        """Returns all values at optimizer step `step`, counted from 0."""
        return StepValues(*(schedule[step] for schedule in self))


def build_schedules(cfg: Config, lr: float) -> Schedules:
    """Build the schedules of a config, with the peak learning rate `lr` (see `scale_lr`)."""
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    total = cfg.optim.epochs * epoch
    warmup = cfg.optim.warmup_epochs * epoch
    temp, temp_warmup = cfg.teacher.teacher_temp, cfg.teacher.warmup_teacher_temp_epochs * epoch
    last_layer_lr = CosineScheduler(lr, cfg.optim.min_lr, total, warmup)
    last_layer_lr.schedule[: cfg.optim.freeze_last_layer_epochs * epoch] = 0
    backbone_lr = CosineScheduler(lr, cfg.optim.min_lr, total, warmup)
    backbone_lr.schedule *= backbone_ramp(total, cfg.optim.freeze_backbone_steps, cfg.optim.backbone_warmup_steps)
    return Schedules(
        lr=CosineScheduler(lr, cfg.optim.min_lr, total, warmup),
        wd=CosineScheduler(cfg.optim.weight_decay, cfg.optim.weight_decay_end, total),
        momentum=CosineScheduler(cfg.teacher.momentum_teacher, cfg.teacher.final_momentum_teacher, total),
        teacher_temp=CosineScheduler(temp, temp, temp_warmup, temp_warmup, cfg.teacher.warmup_teacher_temp),
        last_layer_lr=last_layer_lr,
        backbone_lr=backbone_lr,
    )


def backbone_ramp(total: int, frozen: int, warmup: int) -> np.ndarray:
    """Factors (total,) of the backbone's rate: `frozen` zeros, then a linear rise to 1 in `warmup` steps."""
    return np.clip((np.arange(total) - frozen + 1) / (warmup + 1), 0.0, 1.0)


def describe_schedules(cfg: Config, lr: float) -> dict[str, str]:
    """Describe the values that the schedules reach within the run, by name; steps are counted from 0."""
    schedules, last = build_schedules(cfg, lr), cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH - 1
    start, end = schedules.at(0), schedules.at(last)
    peak = int(schedules.lr.schedule.argmax())
    warm = cfg.teacher.warmup_teacher_temp_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH - 1
    if warm > last:
        temperature = (
            f"{start.teacher_temp:.4g} to {end.teacher_temp:.4g}; {cfg.teacher.teacher_temp:.4g} is not reached"
        )
    elif warm > 0:
        temperature = f"{start.teacher_temp:.4g} to {cfg.teacher.teacher_temp:.4g} at step {warm:,}, then constant"
    else:
        temperature = f"{cfg.teacher.teacher_temp:.4g}"
    frozen = min(cfg.optim.freeze_last_layer_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH, last + 1)
    highest = f"{schedules.lr[peak]:.4g} at step {peak:,}, " if peak else ""
    learns = "never learns" if frozen > last else f"learns from step {frozen:,}"
    return {
        "learning rate": f"{start.lr:.4g} at step 0, {highest}{end.lr:.4g} at step {last:,}",
        "weight decay": f"{start.wd:.4g} to {end.wd:.4g}",
        "teacher momentum": f"{start.momentum:.6g} to {end.momentum:.6g}",
        "teacher temperature": temperature,
        "last layer of the heads": learns,
        **_describe_frozen_backbone(cfg, schedules, last),
    }


def _describe_frozen_backbone(cfg: Config, schedules: Schedules, last: int) -> dict[str, str]:
    """When the backbone learns, if it does not from the start."""
    frozen, warmup = cfg.optim.freeze_backbone_steps, cfg.optim.backbone_warmup_steps
    if not (frozen or warmup):
        return {}
    if frozen > last:
        return {"backbone": "never learns"}
    rates = schedules.backbone_lr.schedule[: last + 1]
    peak = int(rates.argmax())
    kept = {"none": "", "patch_embed": " but for its patch embedding"}
    but = kept.get(cfg.optim.freeze_backbone_except, " but for its patch embedding and registers") if frozen else ""
    text = f"learns from step {frozen:,}{f' (frozen before{but})' if frozen else ''}"
    if warmup:
        text += f", at the rate of the heads from step {frozen + warmup:,}"
    return {"backbone": f"{text}; highest {rates[peak]:.4g} at step {peak:,}"}


def checkpoint_period(cfg: Config) -> int:
    """Number of steps between two checkpoints."""
    return cfg.train.checkpoint_period or 3 * cfg.train.OFFICIAL_EPOCH_LENGTH


def num_steps(cfg: Config) -> int:
    """Optimizer steps of a whole run."""
    return cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH


def global_batch_size(cfg: Config, world_size: int) -> int:
    """Images per optimizer step over all processes and micro-batches."""
    return cfg.train.batch_size_per_gpu * cfg.train.accumulate_steps * world_size


def scale_lr(base_lr: float, rule: str, global_batch: int) -> float:
    """Scale the peak learning rate to `global_batch` images per step."""
    factors = {
        "sqrt_wrt_1024": math.sqrt(global_batch / 1024),
        "linear_wrt_256": global_batch / 256,
        "linear_wrt_1024": global_batch / 1024,
        "none": 1.0,
    }
    if rule not in factors:
        raise ValueError(f"unknown optim.scaling_rule {rule!r}; known: {', '.join(factors)}")
    return base_lr * factors[rule]


def is_due(step: int, period: int, last_step: int) -> bool:
    """Whether an action done every `period` steps and after `last_step` follows `step`; never for period <= 0."""
    return period > 0 and ((step + 1) % period == 0 or step == last_step)


def num_due(period: int, steps: int) -> int:
    """Number of steps for which `is_due` in a run of `steps`."""
    return math.ceil(steps / period) if period > 0 else 0
