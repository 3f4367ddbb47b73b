#!/usr/bin/env python
"""What a training step costs at least: FLOPs, bytes and kernels of a recipe on one device, on paper; prints JSON.

    python scripts/roofline.py --config-file train/vitl16_short
    python scripts/roofline.py --archs vit_small,vit_base,vit_large,vit_giant2 --table
    python scripts/roofline.py --config-file train/vitg14 --tflops 700 train.batch_size_per_gpu=32

    flops    of matrix products, see `train/preflight/flops.py`
    bytes    read and written by the kernels of an eager step in mixed precision, each input and output once; caches and
             compiled blocks make them fewer. The times are without those of products, which move while these compute
    kernels  launched by an eager step

Bytes for each token, channel and score, and kernels for each block, were counted on the operators that CUDA's host code
calls (torch 2.14, tests/cuda). Times are these figures divided by the speeds given: nothing is measured.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from dinov2 import config
from dinov2.config import Config
from dinov2.layers.packing import Segments
from dinov2.train.preflight.flops import H200_FLOPS, StepFlops, crop_sequences, rows_of_blocks, step_flops
from dinov2.train.preflight.memory import masked_patches_per_image
from dinov2.train.ssl_meta_arch import SSLMetaArch

KERNELS = {  # of a phase, and in addition for each block, and for each block with stochastic depth
    "teacher": (77, 19, 0),
    "student": (54, 19, 10),
    "losses": (74, 0, 0),
    "backward": (176, 39, 6),
    "optimizer": (49, 6.25, 0),
    "moving average": (3, 0, 0),
}
SHARES = (0.55, 0.65)  # of the speed of a large product


def positive(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="train/vitl16_short", help="recipe")
    parser.add_argument("--archs", help="values of student.arch, several with commas; default: that of the recipe")
    parser.add_argument("--tflops", type=positive, default=H200_FLOPS / 1e12, help="TFLOP/s of a large product")
    parser.add_argument("--bandwidth", type=positive, default=4.8, help="TB/s of the device's memory")
    parser.add_argument("--launch", type=positive, default=5.0, help="microseconds of the host for a kernel")
    parser.add_argument("--table", action="store_true", help="Markdown instead of JSON")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    archs = [f"student.arch={arch}" for arch in args.archs.split(",")] if args.archs else []
    rows = [roofline(config.load(args.config_file, [*args.opts, arch]), args) for arch in archs]
    rows = rows or [roofline(config.load(args.config_file, args.opts), args)]
    print("\n".join(table(rows)) if args.table else json.dumps(rows, indent=2))


def roofline(cfg: Config, args: argparse.Namespace) -> dict[str, Any]:
    """The record of a recipe, for the speeds of the arguments."""
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    flops, moved, kernels = step_flops(cfg, model), bytes_of_step(cfg, model), kernels_of_step(cfg, model)
    images = cfg.train.batch_size_per_gpu * cfg.train.accumulate_steps
    num_kernels, num_bytes = sum(kernels.values()), sum(moved.values()) - moved["products"]
    compute, memory = flops.total / args.tflops / 1e12, num_bytes / args.bandwidth / 1e12
    return {
        "config_file": args.config_file,
        "arch": cfg.student.arch,
        "patch_size": cfg.student.patch_size,
        "images_per_step": images,
        "tflops": args.tflops,
        "terabytes_per_second": args.bandwidth,
        "microseconds_per_kernel": args.launch,
        "gflop_per_image": {name: number / images / 1e9 for name, number in parts(flops).items()},
        "tflop_per_step": flops.total / 1e12,
        "gigabytes_per_step": {name: number / 1e9 for name, number in moved.items()},
        "kernels_per_step": kernels,
        "milliseconds": {
            "compute": compute * 1e3,
            "bytes": memory * 1e3,
            "launches": num_kernels * args.launch / 1e3,
        },
        "images_per_second": {
            **{f"compute at {share:.0%}": share * images / compute for share in SHARES},
            "compute, then bytes": images / (compute + memory),
            "launches": images / (num_kernels * args.launch * 1e-6),
        },
    }


def parts(flops: StepFlops) -> dict[str, float]:
    """FLOPs by phase; heads and attention are shares of these."""
    return {
        "teacher": sum(flops.teacher),
        "student": sum(flops.student),
        "backward": flops.backward,
        "recomputed": flops.recomputed,
        "total": flops.total,
        "of heads": flops.heads,
        "of attention": flops.teacher.attention + 3 * flops.student.attention,
    }


def kernels_of_step(cfg: Config, model: SSLMetaArch) -> dict[str, int]:
    """Number of kernels by phase; other variants of the networks and losses differ by less than a tenth."""
    depth, drops = model.student_backbone.n_blocks, cfg.student.drop_path_rate > 0
    number = {name: some + depth * (each + drops * more) for name, (some, each, more) in KERNELS.items()}
    if recomputes(cfg):
        number["backward"] += number["student"] - KERNELS["student"][0]
    for name in ("teacher", "student", "losses", "backward"):
        number[name] *= cfg.train.accumulate_steps
    return {name: round(value) for name, value in number.items()}


def recomputes(cfg: Config) -> bool:
    """Whether the backward pass repeats the forward pass of the blocks, at least their element-wise operations."""
    return cfg.train.activation_checkpointing != "none"


# --- Bytes -----------------------------------------------------------------------------------------------------------

# (forward, backward). Of a residual branch, for each token and channel: norm in float32, gain, casts, sums of biases.
BRANCH_WITH_DEPTH, BRANCH = (22, 53), (32, 84)  # with stochastic depth and without
PASSED_BY = (4, 4)  # for each token and channel with stochastic depth, also those that it drops
ATTENTION = (8, 16)  # for each token and channel: queries, keys, values and the result
MLP, GATED = (4, 6), (10, 26)  # for each token and hidden channel: the activation
SCORES = (38, 54)  # for each score of the student: the losses and their gradient
TARGETS = {"centering": 28, "sinkhorn_knopp": 117}  # for each score of the teacher
CASTS_OF_TEACHER, CASTS_OF_STUDENT = 6, 12  # for each weight: to half precision, and its gradient from it
OPTIMIZER = 40  # for each weight: norm 4, clipping 8, and 28 of AdamW: weight, gradient and moments
MOVING_AVERAGE = 12  # for each weight


def bytes_of_step(cfg: Config, model: SSLMetaArch) -> dict[str, float]:
    """Bytes that a step of a process moves, by part, in half precision."""
    steps, groups = cfg.train.accumulate_steps, crop_sequences(cfg)
    num_weights = sum(param.numel() for param in model.student.parameters())
    moved: defaultdict[str, float] = defaultdict(float)
    directions = (0, 1, 0) if recomputes(cfg) else (0, 1)
    for networks, seen, passes in ((model.teacher, groups[:1], (0,)), (model.student, groups, directions)):
        for direction in passes:
            for name, number in bytes_of_pass(cfg, networks, seen, direction).items():
                moved[name] += number
    moved["scores"] = TARGETS[cfg.train.centering] * num_scores(cfg, groups[:1]) + sum(SCORES) * num_scores(cfg, groups)
    moved["casts of weights"] = num_weights * (CASTS_OF_TEACHER + CASTS_OF_STUDENT)
    return {name: steps * number for name, number in moved.items()} | {
        "optimizer": num_weights * OPTIMIZER,
        "moving average": num_weights * MOVING_AVERAGE,
    }


def bytes_of_pass(cfg: Config, networks: nn.ModuleDict, groups: Segments, direction: int) -> dict[str, float]:
    """Bytes of the blocks of student or teacher for a micro-batch, by part; `direction` is 0 forward, 1 backward."""
    backbone: Any = networks["backbone"]
    masked = masked_patches_per_image(cfg) * cfg.train.batch_size_per_gpu
    num_tokens, width = sum(count * length for count, length in groups), backbone.embed_dim
    moved: defaultdict[str, float] = defaultdict(float)
    for block, rows in zip(backbone.blocks, rows_of_blocks(backbone, groups, masked), strict=True):
        drops, gated = block.sample_drop_ratio > 0, hasattr(block.mlp, "w3")
        last = getattr(block.mlp, "w3" if gated else "fc2", None)
        hidden = last.in_features if last else 0
        branch, activation = (BRANCH_WITH_DEPTH if drops else BRANCH), (GATED if gated else MLP)
        moved["element-wise"] += (rows.attention + rows.feed_forward) * width * branch[direction]
        moved["element-wise"] += rows.feed_forward * hidden * activation[direction]
        moved["element-wise"] += 2 * num_tokens * width * PASSED_BY[direction] if drops else 0
        moved["attention"] += rows.attention * width * ATTENTION[direction]
        for part, number in ((block.attn, rows.attention), (block.mlp, rows.feed_forward)):
            for matrix in (param for param in part.parameters() if param.ndim == 2):
                moved["products"] += 2 * (direction + 1) * (number * sum(matrix.shape) + matrix.numel())
    return moved


def num_scores(cfg: Config, groups: Segments) -> float:
    """Number of scores in a micro-batch: of class tokens and masked patches for all prototypes."""
    of_classes = sum(count for count, _ in groups) * cfg.dino.head_n_prototypes if cfg.dino.loss_weight > 0 else 0
    prototypes = (cfg.ibot if cfg.ibot.separate_head else cfg.dino).head_n_prototypes
    return of_classes + masked_patches_per_image(cfg) * cfg.train.batch_size_per_gpu * prototypes


# --- Table -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("recipe", "GFLOP per image: teacher, student, backward", "of them heads, attention"),
    *("images, TFLOP per step", "ms of compute", "images/s at 55 %, 65 %"),
    *("GB per step", "ms of bytes", "kernels", "ms of launches"),
)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table, one row for each record."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "| --- " * len(COLUMNS) + "|"
    for row in rows:
        flops, time = row["gflop_per_image"], row["milliseconds"]
        per_second = (f"{row['images_per_second'][f'compute at {share:.0%}']:,.0f}" for share in SHARES)
        cells = (
            f"{Path(row['config_file']).stem}, {row['arch']}/{row['patch_size']}",
            f"{flops['total']:,.0f}: {', '.join(f'{flops[name]:,.0f}' for name in ('teacher', 'student', 'backward'))}",
            f"{flops['of heads']:,.0f}, {flops['of attention']:,.0f}",
            f"{row['images_per_step']}, {row['tflop_per_step']:.1f}",
            f"{time['compute']:.1f}",
            ", ".join(per_second),
            f"{sum(row['gigabytes_per_step'].values()) - row['gigabytes_per_step']['products']:,.0f}",
            f"{time['bytes']:.1f}",
            f"{sum(row['kernels_per_step'].values()):,}",
            f"{time['launches']:.1f}",
        )
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
