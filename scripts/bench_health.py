#!/usr/bin/env python
"""Cost of measuring health metrics, as a share of the step time; prints JSON.

Steps with and without the measurements of a log line alternate; measurements of the probe images, k-NN and k-NN of
patches (with `health.dense_dataset`) are timed by themselves. The share is what all of them add at the periods of the
recipe, against steps without any: medians over the rounds of the time that the process was at work, and of the time
that passed.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python scripts/bench_health.py --batch-size 4
    python scripts/bench_health.py --batch-size 4 health.dense_dataset=FashionScenes:split=VAL:size=224
    python scripts/bench_health.py --config-file train/vitl16_short --batch-size 64 --precision bf16
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from dinov2.data import make_dataset
from dinov2.train.monitor.target_stats import HealthPanel
from dinov2.train.optim import ema_update
from dinov2.train.train import clip_and_step, forward_backward
from scripts import bench_step
from scripts.side_by_side import Seconds, alternate, hardware, spread


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", help="recipe; default: ViT-S/14, 2 x 224 + 8 x 98 crops")
    parser.add_argument("--batch-size", type=int, help="train.batch_size_per_gpu; default 4 without --config-file")
    parser.add_argument("--precision", choices=sorted(bench_step.config.DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def share(seconds: Mapping[str, Sequence[float]], periods: Mapping[str, int]) -> float:
    """What is added, by what it is and how many steps there are between two, over the time of a step."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    added = {**medians, "line": max(medians["step with line"] - medians["step"], 0.0)}
    return sum(added[name] / period for name, period in periods.items()) / medians["step"]


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    words = vars(args) | dict.fromkeys(("arch", "patch_size", "drop_path", "teacher_arch"))
    args.opts = [
        "train.dataset_path=FashionMNIST:split=TRAIN",
        *args.opts,
    ]  # images for the probe; only their size matters
    cfg = bench_step.make_config(argparse.Namespace(**words | {"opts": args.opts}), args.precision)
    device = torch.device(args.device)
    side = bench_step.Side(cfg, device, plain=False)
    batch = bench_step.make_batch(cfg)
    batch = type(batch)._make(x.to(device) if isinstance(x, torch.Tensor) else x for x in batch)
    panel = HealthPanel(cfg, side.model, make_dataset(dataset_str=cfg.train.dataset_path), last_step=10**9)
    assert panel.probe is not None, "health.period is not 0"

    def step(*, line: bool) -> None:
        stats = panel.target_stats(1, line_is_due=line)
        losses = forward_backward(side.model, [batch], 0.07, side.scaler, stats, seed=0, step=1)
        norms = clip_and_step(losses, side.model.student, side.optimizer, side.scaler, 3.0, side.guard)
        ema_update(side.model.teacher, side.model.student, 0.99)
        side.guard.report(side.scaler)
        panel.measure(1, stats, norms)

    sides: dict[str, Callable[[], object]] = {
        "step": partial(step, line=False),
        "step with line": partial(step, line=True),
        "probe": panel.probe.measure,
    }
    seconds = alternate(sides, args.rounds, device)
    by_labels: dict[str, Callable[[], object]] = {"knn": panel.probe.knn}
    if panel.probe.dense is not None:
        by_labels["patch_knn"] = panel.probe.patch_knn
    rare = alternate(by_labels, 1, device)
    seconds = Seconds(seconds.wall | rare.wall, seconds.work | rare.work)
    periods = {"line": cfg.train.log_period, "probe": panel.period}
    periods |= dict.fromkeys(by_labels, panel.knn_period or panel.dump_period)
    record: dict[str, Any] = {
        **vars(args),
        "batch_size": cfg.train.batch_size_per_gpu,
        "health": dataclasses.asdict(cfg.health),
        "seconds": {name: spread(times) for name, times in seconds.wall.items()},
        "steps_between": periods,
        "share_of_step_time": round(share(seconds.wall, periods), 5),
        "share_of_work": round(share(seconds.work, periods), 5),
        **hardware(device),
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
