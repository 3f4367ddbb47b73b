#!/usr/bin/env python
"""Memory growth in a long training: trains from JPEG files with workers and fits the growth; prints JSON.

A small network is trained on generated, photograph-like JPEG files, with log lines, health measurements, teachers and
checkpoints as often as in a real run per unit of time. Every few seconds the memory of the training process and of each
worker is sampled: its proportional set size (PSS), which shares out common pages, and its anonymous memory. Lines are
fitted to what comes after the first minutes, when caches and pools have filled; a leak is a slope of the
anonymous memory that is clearly above its standard error. PSS also grows when processes write to pages that they have
shared since a worker was forked, which happens once for each page. Linux only.

    OMP_NUM_THREADS=1 python scripts/soak.py --minutes 20
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from PIL import Image

from scripts.side_by_side import hardware

SIZE = (500, 375)  # width and height, of the median ImageNet photograph
CURVE_POINTS = 12
SETTINGS = [
    *("train.batch_size_per_gpu=8", "train.OFFICIAL_EPOCH_LENGTH=100000", "optim.epochs=10", "train.log_period=10"),
    *("optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0", "teacher.warmup_teacher_temp_epochs=0"),
    *("student.patch_size=14", "student.embed_dim=64", "student.depth=2", "student.num_heads=2"),
    *("dino.head_n_prototypes=256", "dino.head_hidden_dim=64", "dino.head_bottleneck_dim=32"),
    *("crops.global_crops_size=112", "crops.local_crops_size=56", "crops.local_crops_number=4"),
    *("health.period=100", "health.probe_images=32", "health.knn_images=64", "health.knn_period=200"),
    *("train.checkpoint_period=200", "evaluation.eval_period_iterations=500"),
]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, after its first step")
    parser.add_argument("--settle", type=float, help="minutes that are not fitted; default: a quarter, at most 5")
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between samples")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


class Sample(NamedTuple):
    """Memory at one time, by process: `trainer`, `worker 0`, ..."""

    seconds: float
    pss: dict[str, float]  # MB
    anonymous: dict[str, float]  # MB


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files in four classes: soft shapes with fine texture, which compress about as photographs do."""
    rng = np.random.default_rng(0)
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width] / height
    for number in range(count):
        waves = [np.sin(rng.uniform(2, 30) * x + rng.uniform(2, 30) * y + rng.uniform(0, 7)) for _ in range(6)]
        shapes = np.stack([waves[0] + waves[1], waves[2] + waves[3], waves[4] + waves[5]], axis=-1)
        pixels = 128 + 40 * shapes + rng.normal(0, 8, shapes.shape)
        path = folder / f"class_{number % 4}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def memory_of(pid: int) -> dict[str, float] | None:
    """MB by kind, see proc(5); None if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(kilobytes) / 1024 for name, kilobytes, *_ in fields}


def take_sample(trainer: int, started: float) -> Sample:
    children = Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()
    names = {"trainer": trainer} | {f"worker {place}": int(pid) for place, pid in enumerate(children)}
    found = {name: memory for name, pid in names.items() if (memory := memory_of(pid)) is not None}
    pss, anonymous = ({name: each[kind] for name, each in found.items()} for kind in ("Pss", "Anonymous"))
    return Sample(time.monotonic() - started, pss, anonymous)


def slope(seconds: Sequence[float], megabytes: Sequence[float]) -> list[float]:
    """MB per hour and its standard error, by least squares."""
    hours = np.array(seconds) / 3600
    centered, values = hours - hours.mean(), np.array(megabytes)
    fitted = float(centered @ values / (centered @ centered))
    residual = values - values.mean() - fitted * centered
    error = np.sqrt(residual @ residual / max(len(values) - 2, 1) / (centered @ centered))
    return [round(fitted, 2), round(float(error), 2)]


def growth(samples: Iterable[Sample], settle: float) -> dict[str, Any]:
    """For each process: slopes after `settle` seconds, and a few points of the curve."""
    samples = list(samples)
    record: dict[str, Any] = {}
    for name in samples[-1].pss:
        known = [sample for sample in samples if name in sample.pss]
        late = [sample for sample in known if sample.seconds >= settle]
        seconds = [sample.seconds for sample in late]
        points = {f"{point.seconds / 60:.2f}": point for point in known[:: max(len(known) // CURVE_POINTS, 1)]}
        record[name] = {
            "pss_mb_per_hour": slope(seconds, [sample.pss[name] for sample in late]),
            "anonymous_mb_per_hour": slope(seconds, [sample.anonymous[name] for sample in late]),
            "pss_mb_at_minute": {minute: round(point.pss[name], 1) for minute, point in points.items()},
            "anonymous_mb_at_minute": {minute: round(point.anonymous[name], 1) for minute, point in points.items()},
        }
    return record


def steps_done(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["iteration"] + 1 if lines else 0


def train_and_sample(folder: Path, args: argparse.Namespace) -> tuple[list[Sample], int]:
    """Train and sample memory from the first step on; returns the samples and the number of steps."""
    metrics = folder / "out" / "training_metrics.json"
    words = ["--config-file", "train/fashion_mnist", "--output-dir", str(folder / "out"), *SETTINGS]
    words += [f"train.dataset_path=ImageFolder:root={folder / 'images'}", f"train.num_workers={args.workers}"]
    command = [sys.executable, "dinov2/train/train.py", *words, *args.opts]
    samples: list[Sample] = []
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while not steps_done(metrics) and process.poll() is None:
                time.sleep(0.2)
            started = time.monotonic()
            while process.poll() is None and time.monotonic() < started + 60 * args.minutes:
                samples.append(take_sample(process.pid, started))
                time.sleep(args.interval)
            if process.poll() is not None:
                raise RuntimeError(f"the training ended: {(folder / 'log.txt').read_text()[-2000:]}")
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            process.kill()
    return samples, steps_done(metrics)


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    settle = 60 * (min(args.minutes / 4, 5) if args.settle is None else args.settle)
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name) / "images", args.images)
        samples, steps = train_and_sample(Path(name), args)
    record = {**hardware(torch.device("cpu")), "minutes": args.minutes, "steps": steps, "samples": len(samples)}
    sys.stdout.write(json.dumps(record | {"growth": growth(samples, settle)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
