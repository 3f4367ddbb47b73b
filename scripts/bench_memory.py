#!/usr/bin/env python
"""Memory and communication of processes by sharding strategy, measured and predicted; prints JSON.

Starts its processes itself (gloo, CPU, Linux): ViT-B in fp32 on crops so small that weights matter and activations do
not, two micro-batches per step, so that gradients are there already when weights are gathered. Takes 10 GB of memory
and, on two busy cores, ten minutes.

    python scripts/bench_memory.py
    python scripts/bench_memory.py --processes 2 --strategies FULL_SHARD,NO_SHARD student.arch=vit_small

Figures are bytes of the process with the most:

    state   weights, gradients and AdamW moments after a step, as `preflight/memory.py` counts them: tracked tensors
    peak    peak resident memory of two steps less that of the same process before the model was built; predicted are
            state, gathered weights and gradients that are being reduced, without activations, gloo and kernels
    start   the same up to the first step: every process builds both networks whole; not predicted
    sent    weights and gradients by the collectives of a step, as a ring sends them; measured with the sums of losses
"""

import argparse
import gc
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2 import config, distributed
from dinov2.config import Config
from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast
from dinov2.data.loader import to_device
from dinov2.data.masking import MaskingGenerator
from dinov2.train.guards import NonFiniteGuard
from dinov2.train.optim import build_optimizer, ema_update, set_hyperparameters
from dinov2.train.parallel import parallelize
from dinov2.train.preflight.memory import STRATEGIES, Estimate, allocated_bytes, estimate
from dinov2.train.schedules import StepValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import clip_and_step, forward_backward

NOW = StepValues(lr=1e-4, wd=0.04, momentum=0.99, teacher_temp=0.07, last_layer_lr=1e-4, backbone_lr=1e-4)
PLACES = [f"{side}.{name}" for side in ("student", "teacher") for name in ("backbone", "dino_head", "ibot_head")]
SMALL = [
    *("student.arch=vit_base", "dino.head_n_prototypes=1024", "train.centering=sinkhorn_knopp"),
    *("crops.global_crops_size=64", "crops.local_crops_size=32", "crops.local_crops_number=2"),
    *("train.batch_size_per_gpu=2", "train.accumulate_steps=2"),
    *(f"compute_precision.{place}.mixed_precision.{use}_dtype=fp32" for place in PLACES for use in ("param", "reduce")),
]
TINY = ["student.embed_dim=32", "student.num_heads=2", "dino.head_hidden_dim=32", "dino.head_n_prototypes=16"]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", help="default: the published defaults, made small as above")
    parser.add_argument("--processes", default="1,2,4", help="how many, several with commas")
    parser.add_argument("--processes-per-machine", type=int, default=2, help="pretended, for HYBRID_*")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="several with commas")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # of a process: where the first one writes
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    if args.record:
        measure(args)
        return
    runs = []
    for num_processes in map(int, args.processes.split(",")):
        for strategy in strategies_for(num_processes, args):
            runs.append(run(num_processes, strategy, args))
            print(runs[-1], file=sys.stderr)
    print(json.dumps({"torch": torch.__version__, "runs": runs}, indent=2))


def strategies_for(num_processes: int, args: argparse.Namespace) -> list[str]:
    """Distinct strategies: one process shards nothing, and on one machine hybrid strategies equal the others."""
    several_machines = num_processes > args.processes_per_machine
    chosen = [name for name in args.strategies.split(",") if several_machines or not name.startswith("HYBRID")]
    return chosen[:1] if num_processes == 1 else chosen


def run(num_processes: int, strategy: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start processes and wait for the record of the first."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        words = ["--record", str(record), "--strategies", strategy]
        words += ["--processes-per-machine", str(args.processes_per_machine)]
        words += ["--config-file", args.config_file] if args.config_file else []
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        settings = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MALLOC_MMAP_THRESHOLD_": "250000",  # freed tensors go back to the system at once
        }
        command = [sys.executable, *torchrun, __file__, *words, *args.opts]
        if subprocess.run(command, env=os.environ | settings).returncode:
            raise SystemExit(f"{strategy} on {num_processes} processes failed; what it wrote is above")
        return json.loads(record.read_text())


# --- One process -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Train a few steps and measure; the first process writes the results of all."""
    pretend_machines(args.processes_per_machine)
    with distributed.session() as place:
        Run(make_config(args, args.strategies, *TINY)).train(steps=1)  # loads what is loaded on first use
        gc.collect()
        before = reset_peak()
        run = Run(make_config(args, args.strategies))
        start = peak() - before
        reset_peak()
        run.train(steps=1)
        with Traffic() as traffic:
            run.train(steps=1)
        measured = {"state": allocated_bytes(run.model, run.optimizer), "peak": peak() - before, "start": start}
        everywhere = distributed.all_gather_object({**measured, "sent": traffic.sent})
        if distributed.is_main():
            with torch.device("meta"):
                predicted = estimate(run.cfg, SSLMetaArch(run.cfg), place.world_size, place.local_world_size)
            record = {
                "processes": place.world_size,
                "strategy": args.strategies if place.world_size > 1 else "none",
                "measured": {name: max(one[name] for one in everywhere) for name in everywhere[0]},
                "predicted": figures(predicted),
            }
            args.record.write_text(json.dumps(record))


def figures(predicted: Estimate) -> dict[str, float]:
    """Predictions that can be compared with measurements."""
    peak = predicted.state + predicted.gathered + predicted.reducing
    return {"state": predicted.state, "peak": peak, "sent": predicted.sent}


def pretend_machines(num_processes: int) -> None:
    """Simulate machines with at most this number of processes."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    num_processes = min(num_processes, world_size)
    os.environ |= {"LOCAL_RANK": str(rank % num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}


def make_config(args: argparse.Namespace, strategy: str, *last: str) -> Config:
    sharding = [f"compute_precision.{place}.sharding_strategy={strategy}" for place in PLACES]
    return config.load(args.config_file, [*([] if args.config_file else SMALL), *args.opts, *sharding, *last])


class Run:
    """Student, teacher, optimizer, and the micro-batches of a step, always the same."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.model = SSLMetaArch(cfg).to(distributed.device()).train()
        parallelize(
            self.model.student,
            self.model.teacher,
            cfg.compute_precision,
            block_chunks=cfg.student.block_chunks,
            activation_checkpointing=cfg.train.activation_checkpointing,
        )
        self.optimizer = build_optimizer(
            self.model.student, betas=(0.9, 0.999), lr_decay_rate=0.9, patch_embed_lr_mult=0.2
        )
        self.batches = [*to_device([make_batch(cfg)], distributed.device())] * cfg.train.accumulate_steps

    def train(self, steps: int) -> None:
        """Run the parts of training steps that involve weights and gradients."""
        scaler, guard = torch.amp.GradScaler("cpu", enabled=False), NonFiniteGuard(1)
        for step in range(steps):
            set_hyperparameters(self.optimizer, NOW)
            losses = forward_backward(self.model, self.batches, NOW.teacher_temp, scaler, seed=0, step=step)
            clip_and_step(losses, self.model.student, self.optimizer, scaler, 3.0, guard)
            ema_update(self.model.teacher, self.model.student, NOW.momentum)


def make_batch(cfg: Config) -> Batch:
    """A batch of noise with masks."""
    crops, side = cfg.crops, cfg.crops.global_crops_size // cfg.student.patch_size

    def noise(size: int) -> torch.Tensor:
        return torch.randn(3, size, size)

    images = [
        MultiCrop(
            (noise(crops.global_crops_size), noise(crops.global_crops_size)),
            tuple(noise(crops.local_crops_size) for _ in range(crops.local_crops_number)),
        )
        for _ in range(cfg.train.batch_size_per_gpu)
    ]
    return collate_data_and_cast(
        images,
        mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
        mask_probability=cfg.ibot.mask_sample_probability,
        dtype=config.DTYPES[cfg.compute_precision.student.backbone.mixed_precision.param_dtype],
        n_tokens=side**2,
        mask_generator=MaskingGenerator(side, min_num_patches=1),
        rng=random.Random(0),
    )


class Traffic(TorchDispatchMode):
    """Adds up what the collectives of this process would send in a ring."""

    sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match func.name():
            case "c10d::_allgather_base_":
                whole, share = args[:2]
                self.sent += whole.nbytes - share.nbytes
            case "c10d::_reduce_scatter_base_":
                share, whole = args[:2]
                self.sent += whole.nbytes - share.nbytes
            case "c10d::allreduce_":
                num_processes = dist.ProcessGroup.unbox(args[1]).size()
                self.sent += 2 * (num_processes - 1) / num_processes * sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def reset_peak() -> int:
    """Reset the peak; returns the resident bytes, which are the new peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Peak resident bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "on Linux"
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
