#!/usr/bin/env python
"""Time of a whole training step, phase by phase, against a plain version of the same step in one run; prints JSON.

The plain version is the simplest implementation: eager, two forward passes of the backbone and three of the head,
residuals masked instead of skipped, a cross-entropy per pair of crops, Sinkhorn-Knopp that rewrites its matrix, AdamW
and the moving average parameter by parameter. Both start from the same weights and must agree on the first loss (unless
drop path is on, which they draw differently). Steps of both sides alternate, so that disturbances affect both alike;
the figure to quote is the ratio, not the seconds.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python scripts/bench_step.py --batch-size 4
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python scripts/bench_step.py --batch-size 16 --precision bf16
    python scripts/bench_step.py --config-file train/vitl16_short --batch-size 64 --precision bf16 --no-plain
    python scripts/bench_step.py --batch-size 16 train.dataset_path=ImageFolder:root=/my/images --with-data
    python scripts/bench_step.py --no-plain --teacher-arch vit_base   # a step of distillation
    python scripts/bench_step.py --no-plain gram.loss_weight=2        # with Gram anchoring
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2 import config
from dinov2.allocation import keep_freed_memory
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast
from dinov2.data.loader import to_device
from dinov2.data.masking import MaskingGenerator, published_max_num_patches
from dinov2.layers import block
from dinov2.loss import DINOLoss, iBOTPatchLoss
from dinov2.models.weights import TEACHER_FILE
from dinov2.train.guards import NonFiniteGuard
from dinov2.train.optim import (
    build_optimizer,
    ema_update,
    fuse_params_groups,
    get_params_groups_with_decay,
    set_hyperparameters,
)
from dinov2.train.parallel import parallelize
from dinov2.train.preflight.flops import product_speed, step_flops
from dinov2.train.preflight.memory import estimate
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import Losses, Predictions, SSLMetaArch, Targets
from dinov2.train.stages.choice import build_arch
from dinov2.train.train import clip_and_step
from dinov2.train.training_run import build_loader, uses_fp16
from scripts.side_by_side import alternate, hardware, ratios, spread

NOW = StepValues(lr=1e-4, wd=0.04, momentum=0.99, teacher_temp=0.07, last_layer_lr=1e-4, backbone_lr=1e-4)
PHASES = ("data", "teacher", "student forward", "losses", "backward", "optimizer", "moving average")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", help="recipe to time; default: 2 x 224 + 8 x 98 crops, no stochastic depth")
    parser.add_argument("--arch", help="student.arch; default vit_small without --config-file")
    parser.add_argument("--patch-size", type=int, help="student.patch_size; default 14 without --config-file")
    parser.add_argument("--batch-size", type=int, help="train.batch_size_per_gpu; default 4 without --config-file")
    parser.add_argument("--drop-path", type=float, help="student.drop_path_rate; default 0 without --config-file")
    parser.add_argument("--precision", choices=sorted(config.DTYPES), default="fp32", help="of our side")
    parser.add_argument("--plain-precision", choices=sorted(config.DTYPES), default="fp32", help="of the plain side")
    parser.add_argument("--attention", default="auto", help="student.attention_backend of our side")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of our side")
    parser.add_argument("--teacher-arch", help="student.arch of the untrained run to distill from; default: none")
    parser.add_argument("--no-plain", action="store_true", help="time our side only")
    parser.add_argument("--keep-memory", action="store_true", help="on a CPU keep freed memory, as training does")
    parser.add_argument("--with-data", action="store_true", help="load train.dataset_path instead of repeating a batch")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side, after two to warm up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides of both sides")
    return parser


def make_config(args: argparse.Namespace, precision: str) -> Config:
    """Load the recipe at one precision."""
    alone = args.config_file is None  # the defaults of the published figures
    values = {
        "student.arch": args.arch or (alone and "vit_small"),
        "student.patch_size": args.patch_size or (alone and 14),
        "student.drop_path_rate": args.drop_path if args.drop_path is not None else 0.0 if alone else False,
        "train.batch_size_per_gpu": args.batch_size or (alone and 4),
        "crops.local_crops_size": alone and (98 if (args.patch_size or 14) == 14 else 96),
    }
    if args.teacher_arch:
        values |= {"distillation.teacher": untrained_run(args)}
    modules = [f"{side}.{name}" for side in ("student", "teacher") for name in ("backbone", "dino_head", "ibot_head")]
    return config.load(
        args.config_file,
        [f"{key}={value}" for key, value in values.items() if value is not False]
        + [f"compute_precision.{module}.mixed_precision.param_dtype={precision}" for module in modules]
        + args.opts,
    )


def untrained_run(args: argparse.Namespace) -> Path:
    """The output folder of a run with the network `args.teacher_arch`, but without weights: only sizes count here."""
    folder = Path(tempfile.mkdtemp())
    (folder / "eval" / "best").mkdir(parents=True)
    (folder / "eval" / "best" / TEACHER_FILE).touch()
    of_teacher = {**vars(args), "arch": args.teacher_arch, "teacher_arch": None}
    config.save(make_config(argparse.Namespace(**of_teacher), args.precision), folder / "config.yaml")
    return folder


# --- The plain side --------------------------------------------------------------------------------------------------


class PlainArch(SSLMetaArch):
    """The same objective, without optimizations for speed."""

    def predictions(self, batch: Batch) -> Predictions:
        backbone, head = self.student["backbone"], self.student["dino_head"]
        with self._precision("student", "backbone") as dtype:
            on_global = backbone(batch.global_crops.to(dtype), batch.masks, is_training=True)
            on_local = backbone(batch.local_crops.to(dtype), is_training=True)
            patches = on_global["x_norm_patchtokens"].flatten(0, 1).index_select(0, batch.mask_index)
            global_cls, local_cls = on_global["x_norm_clstoken"], on_local["x_norm_clstoken"]
            return Predictions(head(global_cls), head(local_cls), head(patches), global_cls)

    @torch.no_grad()
    def targets(self, batches: Any, teacher_temp: float) -> list[Targets]:
        [batch] = batches
        with self._precision("teacher", "backbone") as dtype:
            features = self.teacher["backbone"](batch.global_crops.to(dtype), is_training=True)
            patches = features["x_norm_patchtokens"].flatten(0, 1).index_select(0, batch.mask_index)
            cls = torch.cat(features["x_norm_clstoken"].chunk(2)[::-1])
            cls_scores, patch_scores = self.teacher["dino_head"](cls), self.teacher["dino_head"](patches)
        scores: list[tuple[DINOLoss | iBOTPatchLoss, Tensor]] = [
            (self.dino_loss, cls_scores),
            (self.ibot_patch_loss, patch_scores),
        ]
        if self.cfg.train.centering == "sinkhorn_knopp":
            cls, patch = (_sinkhorn(found, teacher_temp) for _, found in scores)
        else:
            cls, patch = (loss.softmax_center_teacher(found, teacher_temp) for loss, found in scores)
            for loss, found in scores:
                loss.update_center(found)
        return [Targets(torch.stack(cls.chunk(2)), patch)]

    def losses(self, batch: Batch, targets: Targets, predictions: Predictions) -> Losses:
        assert predictions.global_cls is not None and predictions.local_cls is not None and targets.cls is not None
        views, num_local = targets.cls.unbind(), len(batch.local_crops) * 2 // len(batch.global_crops)
        pairs = itertools.product(predictions.local_cls.chunk(num_local), views)
        local = torch.stack([_cross_entropy(scores, view).mean() for scores, view in pairs]).sum()
        facing = _cross_entropy(predictions.global_cls, targets.cls.flatten(0, 1)).mean() * 2
        koleo = torch.stack([self.koleo_loss(part) for part in predictions.features.chunk(2)]).sum()
        assert predictions.patch is not None and targets.patch is not None
        patches = (_cross_entropy(predictions.patch, targets.patch) * batch.mask_weight).sum() / len(batch.masks)
        total = (local + facing) / (2 * num_local + 2) + self.cfg.dino.koleo_loss_weight * koleo + patches
        return Losses(total, {"all": total}, {})


def _sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    q = (scores.float() / temperature).exp().t()
    num_prototypes, num_rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= num_rows
    return (q * num_rows).t()


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(scores.float() / 0.1, dim=-1)).sum(dim=-1)


@torch.no_grad()
def _plain_moving_average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for average, latest in zip(teacher.parameters(), student.parameters(), strict=True):
        average.mul_(momentum).add_(latest, alpha=1 - momentum)


def _plain_optimizer(student: nn.ModuleDict) -> torch.optim.AdamW:
    groups = [fuse_params_groups(get_params_groups_with_decay(module, 0.9, 0.2)) for module in student.values()]
    return torch.optim.AdamW([group | {"can_be_frozen": False} for fused in groups for group in fused])


# --- The step --------------------------------------------------------------------------------------------------------


class Side:
    """A model with its optimizer that takes steps, ours or plain."""

    def __init__(self, cfg: Config, device: torch.device, *, plain: bool, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.cfg, self.device, self.plain = cfg, device, plain
        with device:  # much faster than drawing the weights of a giant on the CPU
            self.model = (PlainArch if plain else build_arch)(cfg).train()
        self.model.begin_step(0)
        if not plain:
            parallelize(
                self.model.student,
                self.model.teacher,
                cfg.compute_precision,
                frozen=self.model.frozen_networks,
                activation_checkpointing=cfg.train.activation_checkpointing,
                compile_blocks=compiled or cfg.train.compile,
            )
        self.optimizer = (
            _plain_optimizer(self.model.student)
            if plain
            else build_optimizer(self.model.student, betas=(0.9, 0.999), lr_decay_rate=0.9, patch_embed_lr_mult=0.2)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=uses_fp16(cfg))
        self.guard = NonFiniteGuard(3)

    def step(self, batches: Iterator[Batch], lap: Callable[[str], None]) -> Tensor:
        """One training step, all of it; `lap` is called at the end of each phase."""
        model, micro_batches = self.model, [next(batches) for _ in range(self.cfg.train.accumulate_steps)]
        lap("data")
        with self._way_of_dropping():
            set_hyperparameters(self.optimizer, NOW)
            model.student.zero_grad(set_to_none=True)
            all_targets = model.targets(micro_batches, NOW.teacher_temp)
            lap("teacher")
            for batch, targets in zip(micro_batches, all_targets, strict=True):
                predictions = model.predictions(batch)
                lap("student forward")
                losses = model.losses(batch, targets, predictions)
                lap("losses")
                self.scaler.scale(losses.total / len(micro_batches)).backward()
                del predictions
                lap("backward")
        if self.plain:
            self.scaler.unscale_(self.optimizer)
            for module in model.student.values():
                nn.utils.clip_grad_norm_(module.parameters(), 3.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            clip_and_step(losses.detach(), model.student, self.optimizer, self.scaler, 3.0, self.guard)
        lap("optimizer")
        (_plain_moving_average if self.plain else ema_update)(model.teacher, model.student, NOW.momentum)
        if not self.plain:
            self.guard.report(self.scaler)
        lap("moving average")
        return losses.total.detach()

    @contextlib.contextmanager
    def _way_of_dropping(self) -> Iterator[None]:
        """Makes the plain side mask residuals at any rate of stochastic depth."""
        threshold = block.SUBSET_THRESHOLD
        block.SUBSET_THRESHOLD = 1.0 if self.plain else threshold
        yield
        block.SUBSET_THRESHOLD = threshold

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_batch(cfg: Config, device: str = "cpu") -> Batch:
    """A batch of random pixels with real masks."""
    size, patch = cfg.crops.global_crops_size, cfg.student.patch_size
    anchored = cfg.gram.crops_scale * size if cfg.gram.loss_weight > 0 else 0

    def noise(side: int) -> Tensor:
        return torch.randn(3, side, side)

    crops = [
        MultiCrop(
            (noise(size), noise(size)),
            tuple(noise(cfg.crops.local_crops_size) for _ in range(cfg.crops.local_crops_number)),
            (noise(anchored), noise(anchored)) if anchored else (),
        )
        for _ in range(cfg.train.batch_size_per_gpu)
    ]
    return collate_data_and_cast(
        crops,
        mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
        mask_probability=cfg.ibot.mask_sample_probability if config.has_masks(cfg) else 0.0,
        dtype=config.DTYPES[cfg.compute_precision.student.backbone.mixed_precision.param_dtype],
        n_tokens=(size // patch) ** 2,
        mask_generator=MaskingGenerator(size // patch, max_num_patches=published_max_num_patches(size, patch)),
        rng=random.Random(0),
    )


# --- What is measured ------------------------------------------------------------------------------------------------


def phases_of(side: Side, batches: Iterator[Batch]) -> dict[str, float]:
    """Milliseconds of each phase in one step, which synchronizes the device after each phase."""
    times = dict.fromkeys(PHASES, 0.0)
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        side.synchronize()
        times[name] += (time.perf_counter() - last) * 1000
        last = time.perf_counter()

    side.step(batches, lap)
    return times


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    device = torch.device(args.device)
    if args.keep_memory:
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # as in training
    cfg, plain_cfg = make_config(args, args.precision), make_config(args, args.plain_precision)
    cfg = dataclasses.replace(cfg, student=dataclasses.replace(cfg.student, attention_backend=args.attention))
    source = build_loader(cfg, make_dataset(dataset_str=cfg.train.dataset_path), 0) if args.with_data else None
    batches = iter(to_device(itertools.repeat(make_batch(cfg)) if source is None else source, device))
    sides = {"ours": Side(cfg, device, plain=False, compiled=args.compile)}
    if not args.no_plain:
        sides["plain"] = Side(plain_cfg, device, plain=True)
    first = {name: side.step(batches, lambda _: None).item() for name, side in sides.items()}
    tolerance = 1e-4 if args.precision == args.plain_precision == "fp32" else 1e-2
    comparable = cfg.student.drop_path_rate == 0 and not args.with_data  # else each side has draws or images of its own
    if comparable and not math.isclose(min(first.values()), max(first.values()), rel_tol=tolerance):
        raise RuntimeError(f"the two sides do not compute the same loss: {first}")
    memory: dict[str, int] = {}

    def take_step(name: str) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        sides[name].step(batches, lambda _: None)
        if device.type == "cuda":
            memory[name] = torch.cuda.max_memory_allocated(device)

    seconds = alternate({name: partial(take_step, name) for name in sides}, args.rounds, device)
    phases: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        runs = [phases_of(side, batches) for _ in range(min(args.rounds, 3))]
        phases[name] = {phase: round(statistics.median(run[phase] for run in runs), 2) for phase in PHASES}
    # Workers deliver in bursts: the median would leave out the waiting.
    average = statistics.fmean if args.with_data else statistics.median
    averages = {name: average(times) for name, times in seconds.wall.items()}
    flops = step_flops(cfg, sides["ours"].model).model
    size = {"side": 8192, "repeats": 20} if device.type == "cuda" else {"side": 1024, "repeats": 1}
    product = product_speed(config.DTYPES[args.precision], device, **size)
    images = cfg.train.batch_size_per_gpu * cfg.train.accumulate_steps
    record: dict[str, Any] = {
        **vars(args),
        "arch": cfg.student.arch,
        "patch_size": cfg.student.patch_size,
        "batch_size": cfg.train.batch_size_per_gpu,
        "drop_path": cfg.student.drop_path_rate,
        "seconds_per_step": {name: spread(times) for name, times in seconds.wall.items()},
        "images_per_second": {name: images / typical for name, typical in averages.items()},
        "milliseconds_per_phase": phases,
        "first_loss": first,
        "flops_per_step": flops,
        "matrix_product_flops_per_second": product,
        "model_flops_utilization": flops / averages["ours"] / product,
        "peak_memory_bytes": memory or {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "predicted_memory_bytes": estimate(cfg, sides["ours"].model, 1, 1).memory,
        **hardware(device),
    }
    if "plain" in sides:
        record["ratio"] = {"ours / plain": ratios(seconds.wall["ours"], seconds.wall["plain"])}
        record["ratio_of_work"] = {"ours / plain": ratios(seconds.work["ours"], seconds.work["plain"])}
        record["ratio_means"] = "wall time (work: CPU time) of our step / of the plain one; [median, least, most]"
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
