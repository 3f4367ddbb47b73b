"""Run training steps of a recipe on the stub device and print, phase by phase, what the last one asked of it, as JSON.

measure_step.py CONFIG_FILE [key=value ...]

With COMPILER=aot_eager in the environment, blocks are traced, forward and backward, but no kernels are generated.
"""

import functools
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import rehearsal
import torch
from torch import nn

from dinov2 import config
from dinov2.config import DTYPES, Config
from dinov2.data.collate import Batch, make_masks
from dinov2.data.loader import to_device
from dinov2.data.masking import MaskingGenerator, published_max_num_patches
from dinov2.train.guards import NonFiniteGuard
from dinov2.train.monitor.target_stats import TargetStats
from dinov2.train.optim import build_optimizer, ema_update, set_hyperparameters
from dinov2.train.parallel import parallelize
from dinov2.train.preflight.memory import estimate
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import clip_and_step
from dinov2.train.training_run import uses_fp16

STEPS, STEPS_COMPILED = 3, 22  # the latter with as many numbers of masked patches
NOW = StepValues(lr=1e-4, wd=0.04, momentum=0.99, teacher_temp=0.07, last_layer_lr=1e-4, backbone_lr=1e-4)


def make_batches(cfg: Config) -> Iterator[Batch]:
    """Batches in pinned memory as of the loader, each with other masks; the crops are not initialized."""
    crops, size = cfg.crops, cfg.train.batch_size_per_gpu
    side = crops.global_crops_size // cfg.student.patch_size
    dtype = DTYPES[cfg.compute_precision.student.backbone.mixed_precision.param_dtype]
    generator = MaskingGenerator(
        (side, side), max_num_patches=published_max_num_patches(crops.global_crops_size, cfg.student.patch_size)
    )
    global_crops, local_crops = (
        torch.empty(number * size, 3, pixels, pixels, dtype=dtype).pin_memory()
        for number, pixels in ((2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size))
    )
    for seed in range(1000):
        batch = make_masks(
            2 * size,
            mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
            mask_probability=cfg.ibot.mask_sample_probability,
            n_tokens=side**2,
            mask_generator=generator,
            rng=random.Random(seed),
        )
        masks = {name: getattr(batch, name).pin_memory() for name in ("masks", "mask_index", "mask_weight")}
        yield batch._replace(global_crops=global_crops, local_crops=local_crops, **masks)


class Phases:
    """What was called in each phase of a step, and the peak of allocated memory."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.start()

    def start(self) -> None:
        rehearsal.reset()
        torch.cuda.reset_peak_memory_stats()

    def end(self, name: str) -> None:
        record: dict[str, Any] = rehearsal.counters()
        record["kernels"] -= rehearsal.num_calls("im2col")  # one for each image, of the convolution without cuDNN
        record |= {f"attention_{kind}": rehearsal.num_calls(f"flash_{kind}") for kind in ("fwd", "bwd")}
        self.records[name] = record | {"gib": torch.cuda.max_memory_allocated() / 2**30}
        self.start()


def num_graphs() -> int:
    """Number of programs that the compiler has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if "torch._dynamo" in sys.modules else 0


def main() -> None:
    cfg = config.load(sys.argv[1], sys.argv[2:])
    if compiler := os.environ.get("COMPILER"):
        nn.Module.compile = functools.partialmethod(nn.Module.compile, backend=compiler)  # type: ignore[method-assign]
    device = torch.device("cuda")
    torch.set_float32_matmul_precision("high")
    with device:
        model = SSLMetaArch(cfg).train()
    parallelize(
        model.student,
        model.teacher,
        cfg.compute_precision,
        activation_checkpointing=cfg.train.activation_checkpointing,
        compile_blocks=cfg.train.compile,
    )
    optimizer = build_optimizer(model.student, betas=(0.9, 0.999), lr_decay_rate=0.9, patch_embed_lr_mult=0.2)
    scaler, guard = torch.amp.GradScaler("cuda", enabled=uses_fp16(cfg)), NonFiniteGuard(1000)
    batches = iter(to_device(make_batches(cfg), device))
    warned: list[str] = []
    graphs = 0
    for step in range(STEPS_COMPILED if cfg.train.compile else STEPS):
        # The first steps choose kernels, compile, and allocate the moments.
        torch.cuda.set_sync_debug_mode("warn" if step >= 2 else "default")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            phases = Phases()
            batch = next(batches)
            phases.end("data")
            set_hyperparameters(optimizer, NOW)
            model.student.zero_grad(set_to_none=True)
            [targets] = model.targets([batch], NOW.teacher_temp)
            phases.end("teacher")
            predictions = model.predictions(batch)
            phases.end("student")
            losses = model.losses(batch, targets, predictions)
            phases.end("losses")
            stats = TargetStats()
            stats.add(targets, predictions)
            stats.compute()
            del stats
            phases.end("target statistics")
            scaler.scale(losses.total).backward()
            del predictions, targets
            phases.end("backward")
            norms = clip_and_step(losses.detach(), model.student, optimizer, scaler, 3.0, guard)
            phases.end("optimizer")
            ema_update(model.teacher, model.student, NOW.momentum)
            guard.report(scaler)
            phases.end("moving average")
            del losses, norms
        torch.cuda.set_sync_debug_mode("default")
        graphs = graphs if step > 1 else num_graphs()
        warned += [f"{warning.filename}:{warning.lineno}: {warning.message}" for warning in found if step >= 2]
    record = {
        "phases": phases.records,
        "synchronizing": [text for text in warned if "synchroniz" in text],
        "peak_gib": max(phase["gib"] for phase in phases.records.values()),
        "predicted_gib": estimate(cfg, model, 1, 1).memory / 2**30,
        "graph_breaks": dict(torch._dynamo.utils.counters["graph_break"]) if cfg.train.compile else {},
        "recompilations": num_graphs() - graphs,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
