#!/usr/bin/env python
"""What continuing from weights gives, on the embedded part of Fashion-MNIST; prints JSON and a Markdown table.

For each seed a small network is trained on five of the ten classes. Runs on the other five then have the same number of
steps and the same schedules, and k-NN on images that no run is trained on:

- from random weights;
- from weights, with the backbone frozen for a tenth of the steps, whose learning rate then rises to that of the heads
  within another tenth;
- from weights without that;
- both of these at a high learning rate without a warm-up;
- from weights at a learning rate that is far too high.

Each run is the training command in a process of its own. Results are read from what it left in its folder, so that the
same command continues after an interruption.

    OMP_NUM_THREADS=1 python scripts/continued_pretraining.py --out OUT --steps 200 --seeds 0 1
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from PIL import Image

from dinov2.data.datasets.fashion_mnist import FashionMNIST
from dinov2.metrics_file import read_records
from dinov2.train.monitor.alarms import find_alarms
from dinov2.train.monitor.best_teacher import best_rating
from dinov2.train.monitor.conclusion import conclude
from scripts.side_by_side import hardware

HALVES = {"first": range(5), "other": range(5, 10)}  # classes that the weights come from, and those that follow
TRAINED = 0.6  # fraction of the TRAIN images of a class that runs are trained on; the others are for k-NN
PERIODS = 20  # k-NN measurements in a run, and epochs
MOMENTS = (0, 10, 25, 50, 100)  # percent of the steps, in the table
RECIPE_LR = 1.5e-3
HIGH, TOO_HIGH = 4, 20  # times that rate
TITLES = {
    "random": "random weights",
    "frozen": "weights, frozen phase",
    "free": "weights, no frozen phase",
    "frozen_high": f"weights, {HIGH} times the rate, frozen phase",
    "free_high": f"weights, {HIGH} times the rate, no frozen phase",
    "too_high": f"weights, {TOO_HIGH} times the rate, no frozen phase",
}
RUNS = tuple(TITLES)
NARROW = ["student.embed_dim=128", "student.num_heads=2", "student.init_std=0.088"]  # 1 / sqrt(128)
SMALL = [
    *("student.embed_dim=32", "student.num_heads=1", "student.depth=1", "train.batch_size_per_gpu=16"),
    *("dino.head_n_prototypes=32", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16"),
    *("crops.local_crops_number=2", "health.probe_images=16"),
]
SMALL_IMAGES = 20  # of each class and split


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for images, runs, results.json and results.md")
    parser.add_argument("--steps", type=int, default=200, help=f"of each run, a multiple of {PERIODS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="default: all")
    parser.add_argument("--small", action="store_true", help="a tiny network on few images, to test this script")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides of all runs")
    return parser


# --- Images ----------------------------------------------------------------------------------------------------------


def write_half(folder: Path, classes: Sequence[int], limit: int | None) -> dict[str, int]:
    """Write the images of some classes as PNG files, and the lists `train.tsv` and `knn.tsv`; returns their lengths.

    The lists have no image in common. `limit` is the maximum number of images of each class and split.
    """
    lines: dict[str, list[str]] = {"train": [], "knn": []}
    for split in FashionMNIST.Split:
        dataset = FashionMNIST(split=split)
        targets = dataset.get_targets()
        for target in classes:
            indices = np.flatnonzero(targets == target)[:limit].tolist()
            num_trained = int(TRAINED * len(indices)) if split is FashionMNIST.Split.TRAIN else 0
            for position, index in enumerate(indices):
                path = folder / split.name / dataset.classes[target].replace("/", " ") / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.array(dataset.get_image(index))[:, :, 0]).save(path)
                lines["train" if position < num_trained else "knn"].append(f"{path.relative_to(folder)}\t{target}\n")
    for name, content in lines.items():
        (folder / f"{name}.tsv").write_text("".join(content))
    return {name: len(content) for name, content in lines.items()}


# --- Runs ------------------------------------------------------------------------------------------------------------


def common_settings(folder: Path, steps: int, seed: int, num_images: int, *, small: bool) -> list[str]:
    """Settings of every run on the images of a folder: `train/fashion_mnist`, shorter, with a narrower network."""
    return [
        *(SMALL if small else NARROW),
        f"train.dataset_path=ImageList:file={folder / 'train.tsv'}",
        f"health.knn_dataset=ImageList:file={folder / 'knn.tsv'}",
        *(f"train.seed={seed}", f"health.knn_images={num_images}", "train.num_workers=0"),
        *(f"train.OFFICIAL_EPOCH_LENGTH={steps // PERIODS}", f"optim.epochs={PERIODS}", f"optim.base_lr={RECIPE_LR}"),
        *("optim.warmup_epochs=2", "teacher.warmup_teacher_temp_epochs=4", f"train.checkpoint_period={steps}"),
        f"evaluation.eval_period_iterations={steps // 4}",
    ]


def settings_of(run: str, weights: Path, steps: int) -> list[str]:
    """What distinguishes one of the `RUNS`."""
    settings = [] if run == "random" else [f"student.pretrained_weights={weights}"]
    if run.startswith("frozen"):
        settings += [f"optim.freeze_backbone_steps={steps // 10}", f"optim.backbone_warmup_steps={steps // 10}"]
    if run.endswith("high"):
        factor = TOO_HIGH if run == "too_high" else HIGH
        settings += [f"optim.base_lr={factor * RECIPE_LR}", "optim.warmup_epochs=0"]
    return settings


def train(out: Path, settings: Sequence[str]) -> None:
    """Run or resume the training command; a RuntimeError with the end of its output if it fails."""
    words = ["--config-file", "train/fashion_mnist", "--output-dir", str(out), *settings]
    command = [sys.executable, "dinov2/train/train.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{out}: {result.stderr[-2000:] or result.stdout[-2000:]}")


def train_all(args: argparse.Namespace, seed: int, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Train the source of the weights and the runs of a seed; returns their results by name."""
    out = args.out / f"seed_{seed}"

    def common(half: str) -> list[str]:
        return common_settings(args.out / "images" / half, args.steps, seed, counts[half]["knn"], small=args.small)

    sys.stderr.write(f"seed {seed}: the source of the weights\n")
    train(out / "source", [*common("first"), f"health.period={args.steps}", *args.opts])
    found = {"source": read_run(out / "source", args.steps)}
    often = [f"health.period={args.steps // PERIODS}", f"health.knn_period={args.steps // PERIODS}"]
    for run in args.runs:
        sys.stderr.write(f"seed {seed}: {TITLES[run]}\n")
        train(
            out / run, [*common("other"), *often, *settings_of(run, out / "source/eval/best", args.steps), *args.opts]
        )
        found[run] = read_run(out / run, args.steps)
    return found


# --- Results ---------------------------------------------------------------------------------------------------------


def read_run(out: Path, steps: int) -> dict[str, Any]:
    """The results of a run from its folder; steps are counted from 1, and 0 is the start."""
    records = read_records(out / "training_metrics.json")
    measured = [record for record in records if "knn" in record]
    knn = {int(record["iteration"]) + 1: round(record["knn"], 3) for record in measured}
    knn = {0: knn[1]} | knn  # random weights are measured after a step, whose learning rate is 0
    early = [value for step, value in knn.items() if 0 < step <= steps / 4]
    return {
        "knn": knn,
        "knn_images": int(measured[0]["knn_images"]),
        "dip": round(max(knn[0] - min(early), 0.0), 3),
        "alarms": alarms_raised(records),
        "best": (out / "eval" / "best").resolve().name,
        "conclusion": conclude(records, best_rating(out)),
    }


def alarms_raised(records: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """The number of steps after which each kind of alarm was raised for the first time."""
    raised: dict[str, int] = {}
    for count, record in enumerate(records, start=1):
        for alarm in find_alarms(records[:count]):
            raised.setdefault(str(alarm.kind), int(record["iteration"]) + 1)
    return raised


def mean_and_range(values: Sequence[float], decimals: int = 1) -> str:
    """Formats "89.1 [88.9, 89.3]", the mean of the seeds and their least and most; of one only the value."""
    mean, least, most = (f"{value:.{decimals}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{least}, {most}]"


def describe_alarms(of_seeds: Sequence[Mapping[str, int]]) -> str:
    """Formats "collapse (50, 60)", the step in which each seed raised a kind of alarm, or once if they agree."""
    texts = []
    for kind in dict.fromkeys(kind for alarms in of_seeds for kind in alarms):
        steps = dict.fromkeys(str(alarms.get(kind, "never")) for alarms in of_seeds)
        texts.append(f"{kind} ({', '.join(steps)})")
    return "; ".join(texts) or "none"


def as_table(results: Mapping[str, Mapping[str, Any]], runs: Sequence[str], steps: int) -> str:
    """Markdown table with a row for each run; `results` by seed."""
    heads = ["from", "start", *(f"{percent} %" for percent in MOMENTS[1:]), "dip", "alarm (step)", "`eval/best`"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for run in runs:
        of_seeds = [result[run] for result in results.values()]
        cells = [TITLES[run]]
        cells += [mean_and_range([one["knn"][steps * percent // 100] for one in of_seeds]) for percent in MOMENTS]
        cells.append(mean_and_range([one["dip"] for one in of_seeds]))
        cells += [describe_alarms([one["alarms"] for one in of_seeds])]
        cells += [", ".join(dict.fromkeys(f"`{one['best']}`" for one in of_seeds))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def standard_error(results: Mapping[str, Mapping[str, Any]], runs: Sequence[str]) -> float:
    """Largest standard error of an accuracy at the start of a run, percent."""
    starts = [(result[run]["knn"][0], result[run]["knn_images"]) for result in results.values() for run in runs]
    return max(math.sqrt(accuracy * (100 - accuracy) / count) for accuracy, count in starts)


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    if args.steps < PERIODS or args.steps % PERIODS:
        sys.exit(f"--steps {args.steps} is not a multiple of {PERIODS}")
    args.out = args.out.resolve()
    limit = SMALL_IMAGES if args.small else None
    counts = {half: write_half(args.out / "images" / half, list(classes), limit) for half, classes in HALVES.items()}
    results = {str(seed): train_all(args, seed, counts) for seed in args.seeds}
    table = as_table(results, args.runs, args.steps)
    record = {**hardware(torch.device("cpu")), "steps": args.steps, "images": counts["other"]}
    record |= {"standard_error": round(standard_error(results, args.runs), 2), "seeds": results}
    (args.out / "results.md").write_text(table)
    (args.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    sys.stdout.write(json.dumps(record, indent=2) + "\n\n" + table)


if __name__ == "__main__":
    main()
