#!/usr/bin/env python
"""What each later stage gives at a small size, on embedded scenes of clothes; prints JSON and a Markdown table.

    python scripts/stages_evidence.py distillation --out OUT --steps 400  # a small student, with and without a teacher
    python scripts/stages_evidence.py resolution --out OUT                # further at twice the resolution
    python scripts/stages_evidence.py gram --out OUT                      # further, with and without the Gram loss

A network of `train/quickstart` is trained first; the stages follow from it, once for each seed. Each run is the
training command in a process of its own. Results are read from what it left in OUT, so that the same command continues
after an interruption, and the three have the first run in common. k-NN is that of class tokens of VAL scenes, each
classified by the others, mIoU that of segmentation of half of some VAL scenes by the patches of the other half.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch

from dinov2 import config
from dinov2.config import Config
from dinov2.metrics_file import read_records
from dinov2.train.monitor.conclusion import standard_error
from dinov2.train.monitor.starting_point import START
from scripts.continued_pretraining import mean_and_range
from scripts.side_by_side import hardware

RECIPE = "train/quickstart"
PERIODS = 20  # epochs of a run
FIRST_SEED = "0"  # of the run that the stages follow
SIDE = 28  # pixels, of scenes and global crops
STUDENT = ["student.embed_dim=48", "student.num_heads=2", "student.depth=2", "student.init_std=0.144"]  # 1 / sqrt(48)
LOW_LR, HIGH_LR = 3e-4, 6e-3  # a tenth of the recipe's peak, and twice the peak
METRICS = {  # title and decimals of a metric in the tables
    "knn": ("k-NN, %", 1),
    "patch_knn_miou": ("mIoU, %", 1),
    "probe_patch_similarity": ("similarity of patches", 2),
    "drift_patch_cosine": ("patches: cosine with the start", 2),
    "drift_patch_cka": ("patches: CKA with the start", 2),
}

Row = dict[str, float]
Results = dict[str, dict[str, Row]]  # by model and seed


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the stage; that of the first run is 0")
    parser.add_argument("--steps", type=int, default=100, help=f"of each run of the stage, a multiple of {PERIODS}")
    parser.add_argument("--first-steps", type=int, default=1000, help=f"of the first run, a multiple of {PERIODS}")
    parser.add_argument("--rate", type=float, default=HIGH_LR, help="peak learning rate of the Gram stage")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides of all runs")
    return parser


# --- Runs ------------------------------------------------------------------------------------------------------------


def scenes(split: str, side: int) -> str:
    return f"FashionScenes:split={split}:size={side}:items=1:background=black:noise=0.45"


def settings(steps: int, seed: int, side: int) -> list[str]:
    """Settings of every run: `train/quickstart` with other images for the measurements, and its length."""
    return [
        *(f"train.dataset_path={scenes('TRAIN', side)}", f"health.knn_dataset={scenes('VAL', side)}"),
        *(f"health.dense_dataset={scenes('VAL', side)}", "health.knn_images=2000", "health.dense_images=256"),
        *(f"train.seed={seed}", f"train.OFFICIAL_EPOCH_LENGTH={steps // PERIODS}", f"optim.epochs={PERIODS}"),
        *(f"crops.global_crops_size={side}", f"crops.local_crops_size={side // 2}"),
        *(f"train.checkpoint_period={steps}", f"evaluation.eval_period_iterations={steps}"),
        *(f"health.period={steps // 4}", f"health.knn_period={steps}"),
    ]


def run_training(words: Sequence[str]) -> None:
    """Run or resume the training command; a RuntimeError with the end of its output if it fails."""
    command = [sys.executable, "dinov2/train/train.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(words)}: {result.stderr[-2000:] or result.stdout[-2000:]}")


def changed_settings(one: Config, other: Config) -> list[str]:
    """Keys whose values differ, but for those that a run writes itself: its folder and its scaled learning rate."""
    flat = [
        {
            f"{part}.{key}".rstrip("."): value
            for part, values in config.to_dict(cfg).items()
            for key, value in _items(values)
        }
        for cfg in (one, other)
    ]
    return [key for key in flat[0] if flat[0][key] != flat[1][key] and key not in ("train.output_dir", "optim.lr")]


def _items(values: Any) -> Iterable[tuple[str, Any]]:
    return values.items() if isinstance(values, dict) else [("", values)]


class Runs:
    """Trains the runs of a stage in their folders."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.steps, self.rate, self.opts = args.out, args.steps, args.rate, args.opts
        self.first = self._train(args.out / "first", settings(args.first_steps, int(FIRST_SEED), SIDE))

    def _train(self, folder: Path, words: Sequence[str]) -> list[Row]:
        sys.stderr.write(f"{folder}\n")
        words = [*words, *self.opts]
        earlier = folder / "config.yaml"
        if earlier.exists() and (changed := changed_settings(config.load(earlier), config.load(RECIPE, words))):
            sys.exit(f"{folder} is a run with other {', '.join(changed)}: name another folder with --out")
        run_training(["--config-file", RECIPE, "--output-dir", str(folder), *words])
        return [record for record in read_records(folder / "training_metrics.json") if "knn" in record]

    def train(self, name: str, seed: int, words: Sequence[str], side: int = SIDE) -> list[Row]:
        """Train one run of the stage; returns its measurements, from the first to that of the last step."""
        return self._train(self.out / f"{name}_{seed}", [*settings(self.steps, seed, side), *words])

    @property
    def earlier(self) -> str:
        return str(self.out / "first")


# --- Stages ----------------------------------------------------------------------------------------------------------


def distillation(runs: Runs, seeds: Sequence[int]) -> Results:
    """A small student of the first run, and the same network from random weights, for as many steps."""
    results: Results = {"teacher": {FIRST_SEED: runs.first[-1]}, "student, untrained": {}}
    for seed in seeds:
        alone = runs.train("alone", seed, STUDENT)
        distilled = runs.train(
            "distilled", seed, [*STUDENT, f"distillation.teacher={runs.earlier}:{runs.first[-1]['iteration']:.0f}"]
        )
        results["student, untrained"][str(seed)] = alone[0]  # the rate of the first step is 0
        results.setdefault("student, without a teacher", {})[str(seed)] = alone[-1]
        results.setdefault("student, distilled", {})[str(seed)] = distilled[-1]
    return results


def resolution(runs: Runs, seeds: Sequence[int]) -> Results:
    """The first run, further at twice the resolution; the control is its start, the first run at that resolution."""
    results: Results = {f"earlier model, {SIDE} pixels": {FIRST_SEED: runs.first[-1]}}
    words = [f"init_from={runs.earlier}", f"optim.base_lr={LOW_LR}"]
    for side in (SIDE, 2 * SIDE):
        for seed in seeds:
            measured = runs.train(f"side_{side}", seed, words, side)
            assert measured[0]["iteration"] == START, "measured before the first step"
            if side != SIDE:
                results[f"earlier model, {side} pixels (the control)"] = {FIRST_SEED: measured[0]}
            results.setdefault(f"trained further at {side} pixels", {})[str(seed)] = measured[-1]
    return results


def gram(runs: Runs, seeds: Sequence[int]) -> Results:
    """The first run, further with the image-level loss alone at a high rate, with and without the Gram loss."""
    results: Results = {"earlier model": {FIRST_SEED: runs.first[-1]}}
    words = [f"init_from={runs.earlier}", "ibot.loss_weight=0", f"optim.base_lr={runs.rate}"]
    for seed in seeds:
        without = runs.train(f"no_gram_{runs.rate}", seed, words)
        anchor = ["gram.loss_weight=2", f"gram.teacher={runs.earlier}"]
        anchored = runs.train(f"gram_{runs.rate}", seed, [*words, *anchor])
        results.setdefault("further, without Gram loss", {})[str(seed)] = without[-1]
        results.setdefault("further, with Gram loss", {})[str(seed)] = anchored[-1]
    return results


STAGES = {"distillation": distillation, "resolution": resolution, "gram": gram}


# --- Results ---------------------------------------------------------------------------------------------------------


def as_table(results: Results) -> str:
    """Markdown table with a row for each model and those of the `METRICS` that any of them has."""
    rows = [list(of_seeds.values()) for of_seeds in results.values()]
    names = [name for name in METRICS if any(name in row for of_seeds in rows for row in of_seeds)]
    lines = [f"| {' | '.join(['model', *(METRICS[name][0] for name in names)])} |", "| --- |" + " --- |" * len(names)]
    for model, of_seeds in zip(results, rows, strict=True):
        cells = [[row[name] for row in of_seeds if name in row] for name in names]
        texts = [mean_and_range(x, METRICS[name][1]) if x else "" for name, x in zip(names, cells, strict=True)]
        lines.append(f"| {' | '.join([model, *texts])} |")
    return "\n".join(lines) + "\n"


def errors_of(results: Results) -> dict[str, float]:
    """Largest standard errors of the difference of two k-NN accuracies and of one mean IoU, in percent."""
    rows = [row for of_seeds in results.values() for row in of_seeds.values()]
    knn = max(standard_error(row["knn"], row["knn"], row["knn_images"]) for row in rows)
    return {"knn_difference": round(knn, 2), "miou": round(max(row["patch_knn_error"] for row in rows), 2)}


def main(words: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_intermixed_args(words)
    for name in ("steps", "first_steps"):
        if (value := getattr(args, name)) < PERIODS or value % PERIODS:
            sys.exit(f"--{name.replace('_', '-')} {value} is not a multiple of {PERIODS}")
    args.out = args.out.resolve()
    results = STAGES[args.stage](Runs(args), args.seeds)
    record: dict[str, Any] = {**hardware(torch.device("cpu")), "steps": args.steps, "first_steps": args.first_steps}
    kept = ("iteration", "knn_images", "knn_chance", "patch_knn_error", "patch_knn_chance", *METRICS)
    record["standard_errors"] = errors_of(results)
    record["results"] = {
        model: {seed: {key: round(row[key], 3) for key in kept if key in row} for seed, row in of_seeds.items()}
        for model, of_seeds in results.items()
    }
    (args.out / f"{args.stage}.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / f"{args.stage}.md").write_text(as_table(results))
    sys.stdout.write(json.dumps(record, indent=2) + "\n\n" + as_table(results))


if __name__ == "__main__":
    main()
