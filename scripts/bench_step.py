#!/usr/bin/env python
"""Time of a whole training step against a plain version of the same step, both in one run; prints JSON.

The plain version sends global and local crops through the backbone in two forward passes and through the head in
three, and masks dropped residuals instead of skipping their work. Steps of both sides alternate, so that what else the
machine does hits both alike; the ratio of the medians is the figure to quote, not the seconds.

    OMP_NUM_THREADS=2 python scripts/bench_step.py --batch-size 4 --drop-path 0.3
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from dinov2 import config
from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast
from dinov2.data.loader import to_device
from dinov2.data.masking import MaskingGenerator, published_max_num_patches
from dinov2.layers import block
from dinov2.train.optim import build_optimizer, clip_gradients, ema_update, set_hyperparameters
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import Predictions, SSLMetaArch

NOW = StepValues(lr=1e-4, wd=0.04, momentum=0.99, teacher_temp=0.07, last_layer_lr=1e-4)


class PlainArch(SSLMetaArch):
    """The same objective, one forward pass per kind of crop."""

    def predictions(self, batch: Batch) -> Predictions:
        backbone, head = self.student["backbone"], self.student["dino_head"]
        with self._precision("student", "backbone"):
            on_global = backbone(batch.global_crops, batch.masks, is_training=True)
            on_local = backbone(batch.local_crops, is_training=True)
            patches = on_global["x_norm_patchtokens"].flatten(0, 1).index_select(0, batch.mask_index)
            global_cls, local_cls = on_global["x_norm_clstoken"], on_local["x_norm_clstoken"]
            return Predictions(head(global_cls), head(local_cls), head(patches), global_cls)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch-size", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--precision", choices=sorted(config.DTYPES), default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one warm-up step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def make_config(args: argparse.Namespace) -> config.Config:
    """The default recipe with 2 x 224 + 8 x 98 crops (96 for patch 16) at the asked precision."""
    modules = [f"{side}.{name}" for side in ("student", "teacher") for name in ("backbone", "dino_head", "ibot_head")]
    return config.load(
        None,
        [f"compute_precision.{module}.mixed_precision.param_dtype={args.precision}" for module in modules]
        + [
            f"student.arch={args.arch}",
            f"student.patch_size={args.patch_size}",
            f"student.drop_path_rate={args.drop_path}",
            f"train.batch_size_per_gpu={args.batch_size}",
            f"crops.local_crops_size={98 if args.patch_size == 14 else 96}",
        ],
    )


def make_batch(cfg: config.Config) -> Batch:
    """Random pixels with real masks."""
    size, patch = cfg.crops.global_crops_size, cfg.student.patch_size
    crops = [
        MultiCrop(
            (torch.randn(3, size, size), torch.randn(3, size, size)),
            tuple(torch.randn(3, cfg.crops.local_crops_size, cfg.crops.local_crops_size) for _ in range(8)),
        )
        for _ in range(cfg.train.batch_size_per_gpu)
    ]
    return collate_data_and_cast(
        crops,
        mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
        mask_probability=cfg.ibot.mask_sample_probability,
        dtype=torch.float32,
        n_tokens=(size // patch) ** 2,
        mask_generator=MaskingGenerator(size // patch, max_num_patches=published_max_num_patches(size, patch)),
        rng=random.Random(0),
    )


def make_step(arch: type[SSLMetaArch], cfg: config.Config, batch: Batch, device: torch.device) -> Callable[[], None]:
    """One training step of a model of its own, all of it: forward, backward, clipping, AdamW, teacher."""
    torch.manual_seed(0)
    model = arch(cfg).to(device).train()
    optimizer = build_optimizer(model.student, betas=(0.9, 0.999), lr_decay_rate=0.9, patch_embed_lr_mult=0.2)
    precision = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step() -> None:
        set_hyperparameters(optimizer, NOW)
        optimizer.zero_grad()
        scaler.scale(model(batch, NOW.teacher_temp).total).backward()
        scaler.unscale_(optimizer)
        clip_gradients(model.student, 3.0)
        scaler.step(optimizer)
        scaler.update()
        ema_update(model.teacher, model.student, NOW.momentum)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def main() -> None:
    args = get_args_parser().parse_args()
    device = torch.device(args.device)
    cfg = make_config(args)
    batch = next(iter(to_device([make_batch(cfg)], device)))
    sides = {"ours": make_step(SSLMetaArch, cfg, batch, device), "plain": make_step(PlainArch, cfg, batch, device)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(args.steps + 1):
        for name, step in sides.items():
            block.SUBSET_THRESHOLD = 0.1 if name == "ours" else 1.0
            started = time.perf_counter()
            step()
            if index > 0:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    record = {
        **vars(args),
        "seconds_per_step": medians,
        "images_per_second": args.batch_size / medians["ours"],
        "ratio_ours_to_plain": medians["ours"] / medians["plain"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
