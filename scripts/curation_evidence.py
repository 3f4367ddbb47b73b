#!/usr/bin/env python
"""What curation finds, what it costs and whether it helps; prints JSON and Markdown tables.

    python scripts/curation_evidence.py planted --out OUT                  # recall and precision of known duplicates
    python scripts/curation_evidence.py long_tail --out OUT --seeds 0 1 2  # classes, and k-NN after a short training
    python scripts/curation_evidence.py large --out OUT --images 1000000   # time and memory on synthetic features

`planted` adds changed copies of embedded images of Fashion-MNIST, `long_tail` keeps 1 / r of its class of rank r. The
features are of `dinov2_fashion`, which was trained on the embedded images without labels. The same command uses what is
in OUT already.
"""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from dinov2.data.datasets.fashion_mnist import FashionMNIST
from dinov2.eval.extract.files import METADATA_FILE, NAMES_FILE, ShardArray, write_arrays
from dinov2.metrics_file import read_records
from scripts.side_by_side import hardware

MODEL = "dinov2_fashion"
THRESHOLDS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
SHARD_SIZE = 1 << 14  # rows of synthetic features in a file
WIDTH, CENTERS, COPIES = 384, 5000, 0.01  # of synthetic features; share of near duplicates


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("planted", "long_tail", "large"))
    parser.add_argument("--out", type=Path, required=True, help="folder for images, features, runs and results")
    parser.add_argument("--images", type=int, default=2000, help="originals (planted), rows (large)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the long tail and its trainings")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    return parser


def run(*words: str | Path) -> tuple[str, float, float]:
    """Run a command of Python; returns its output, the CPU seconds that it took, and its peak memory in GiB."""
    with subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {output[-2000:]}")
    return output, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def curate(command: str, output: Path, *words: str | Path) -> tuple[dict[str, Any], float, float]:
    """Run a command of curation; returns its `dropped.json`, CPU seconds, and peak memory in GiB."""
    _, seconds, memory = run("-m", "dinov2.curate", command, "--output", output, "--overwrite", *words)
    return json.loads((output / "dropped.json").read_text(encoding="utf-8")), seconds, memory


def extract(images: Path | str, output: Path) -> None:
    run("-m", "dinov2.eval.extract", "--model", MODEL, "--images", images, "--output", output, "--num-workers", "1")


# --- Planted duplicates ----------------------------------------------------------------------------------------------


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "copy": lambda image: image,
    "brightness + 10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "resized by 2": lambda image: image.resize((56, 56), Image.Resampling.BICUBIC),
    "JPEG, quality 50": _jpeg,
    "cropped by 1 pixel": lambda image: image.crop((1, 1, 27, 27)).resize((28, 28), Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
}


def write_planted(folder: Path, num_images: int) -> None:
    """Write embedded images, and of the first half a changed copy each, as `00007.png` and `00007_<change>.png`."""
    dataset = FashionMNIST(split=FashionMNIST.Split.TRAIN)
    folder.mkdir(parents=True)
    for index in range(num_images):
        image = dataset.get_image(index).convert("RGB")
        image.save(folder / f"{index:05d}.png")
        if index < num_images // 2:
            number = index % len(CHANGES)
            change = list(CHANGES.values())[number]
            change(image).save(folder / f"{index:05d}_{number}.png")


def measure_planted(names: Sequence[str], left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Recall of each change, and precision, of pairs of names that are joined, in percent.

    A pair is right if it is an original and its copy.
    """
    stems = [Path(name).stem for name in names]
    planted = {stem for stem in stems if "_" in stem}
    pairs = [(stems[one], stems[other]) for one, other in zip(left.tolist(), right.tolist(), strict=True)]
    hits = {max(pair, key=len) for pair in pairs if pair[0][:5] == pair[1][:5]}
    found = {}
    for number, change in enumerate(CHANGES):
        of_change = {stem for stem in planted if stem.endswith(f"_{number}")}
        found[change] = 100 * len(hits & of_change) / len(of_change)
    found["recall"] = 100 * len(hits) / len(planted)
    found["precision"] = 100 * len(hits) / max(1, len(set(map(frozenset, pairs))))
    return {name: round(value, 1) for name, value in found.items()}


def planted(out: Path, num_images: int) -> tuple[dict[str, Any], str]:
    """Pairs and groups of planted duplicates that are found, by threshold."""
    from dinov2.curate.feature_table import FeatureTable
    from dinov2.curate.search import SearchOptions, nearest_pairs

    if not (out / "images").exists():
        write_planted(out / "images", num_images)
    extract(out / "images", out / "features")
    table = FeatureTable([out / "features"])
    results = {}
    for threshold in THRESHOLDS:
        batches, _ = nearest_pairs(table, k=64, threshold=threshold, options=SearchOptions())
        left, right = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        found = measure_planted(list(table.names), left, right)
        written, _, _ = curate(
            "duplicates", out / "curated", "--features", out / "features", "--threshold", f"{threshold}"
        )
        stems = [(Path(each["name"]).stem, Path(each["kept"]).stem) for each in written["dropped"]]
        wrong = sum(name[:5] != kept[:5] for name, kept in stems)
        results[str(threshold)] = found | {"dropped": len(stems), "wrongly": wrong}
    return {"cosines": written["facts"], "thresholds": results}, table_of("threshold", results)


# --- Long tail -------------------------------------------------------------------------------------------------------


def write_long_tail(folder: Path, seed: int) -> None:
    """Write images of Fashion-MNIST, of the class of rank r as many as 1000 / r; the seed decides ranks and images."""
    dataset = FashionMNIST(split=FashionMNIST.Split.TRAIN)
    targets, rng = dataset.get_targets(), np.random.default_rng(seed)
    lines = []
    folder.mkdir(parents=True)
    for rank, target in enumerate(rng.permutation(10), start=1):
        for index in rng.permutation(np.flatnonzero(targets == target))[: 1000 // rank].tolist():
            dataset.get_image(index).convert("RGB").save(folder / f"{index:05d}.png")
            lines.append(f"{index:05d}.png\t{target}\n")
    (folder / "images.tsv").write_text("".join(sorted(lines)))


def write_raw_sample(source: Path, size: int, seed: int) -> Path:
    """Write a list of random images of a list, beside it."""
    lines = np.array(source.read_text().splitlines())
    chosen = np.sort(np.random.default_rng((seed, 1)).choice(len(lines), size, replace=False))
    target = source.with_name("raw.tsv")
    target.write_text("".join(f"{line}\n" for line in lines[chosen].tolist()))
    return target


def train(out: Path, images: Path, seed: int, steps: int) -> float:
    """k-NN in percent, on the embedded test images, of a short training on a list of images."""
    words = [
        *("student.embed_dim=128", "student.num_heads=2", "student.init_std=0.088", "train.num_workers=0"),
        *(f"train.dataset_path=ImageList:file={images}", f"train.seed={seed}", "health.knn_images=12000"),
        *("health.knn_dataset=FashionMNIST:split=VAL", f"health.period={steps}", f"health.knn_period={steps}"),
        *(f"train.OFFICIAL_EPOCH_LENGTH={steps // 20}", "optim.epochs=20", "optim.warmup_epochs=2"),
        *("teacher.warmup_teacher_temp_epochs=4", f"train.checkpoint_period={steps}", "optim.base_lr=1.5e-3"),
        f"evaluation.eval_period_iterations={steps}",
    ]
    run("dinov2/train/train.py", "--config-file", "train/fashion_mnist", "--output-dir", out, *words)
    records = [each for each in read_records(out / "training_metrics.json") if "knn" in each]
    return round(records[-1]["knn"], 2)


def long_tail(out: Path, seeds: Sequence[int], steps: int) -> tuple[dict[str, Any], str]:
    """Class distribution, and k-NN after trainings on equally many balanced and raw images, by seed."""
    results, size = {}, 1000
    for seed in seeds:
        folder = out / f"seed_{seed}"
        if not (folder / "images").exists():
            write_long_tail(folder / "images", seed)
        extract(folder / "images" / "images.tsv", folder / "features")
        words = ["--clusters", "300,30", "--size", f"{size}", "--seed", f"{seed}"]
        written, _, _ = curate("balance", folder / "balanced", "--features", folder / "features", *words)
        raw = write_raw_sample(folder / "images" / "images.tsv", size, seed)
        before, after = (written["facts"][f"classes, {when}"] for when in ("before", "after"))
        results[str(seed)] = {
            "largest / smallest class before": round(before["largest"] / before["smallest"], 1),
            "after": round(after["largest"] / after["smallest"], 1),
            "entropy before": before["entropy in bits"],
            "entropy after": after["entropy in bits"],
            "k-NN, raw": train(folder / "run_raw", raw, seed, steps),
            "k-NN, balanced": train(folder / "run_balanced", folder / "balanced" / "images.txt", seed, steps),
        }
    return results, table_of("seed", results)


# --- Large -----------------------------------------------------------------------------------------------------------


def write_synthetic(folder: Path, num_images: int, seed: int = 0) -> None:
    """Write features around random centers; the last `COPIES` of them are near duplicates of the first ones."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    centers = rng.standard_normal((CENTERS, WIDTH), np.float32)
    copies = int(COPIES * num_images)
    originals = np.empty((copies, WIDTH), np.float32)
    shards: list[dict[str, Any]] = []
    for start in range(0, num_images, SHARD_SIZE):
        rows = np.arange(start, min(start + SHARD_SIZE, num_images))
        values = centers[rng.integers(CENTERS, size=len(rows))] + rng.standard_normal((len(rows), WIDTH), np.float32)
        is_original, is_copy = rows < copies, rows >= num_images - copies
        originals[rows[is_original]] = values[is_original]
        noise = rng.standard_normal((is_copy.sum(), WIDTH), np.float32)
        values[is_copy] = originals[rows[is_copy] - (num_images - copies)] + 0.2 * noise  # a cosine of 0.99
        name = f"features_{len(shards):05d}.safetensors"
        write_arrays(
            folder / name, {"class_token": ShardArray(values.shape, np.dtype("float16"), [values.astype("f2")])}, {}
        )
        shards.append({"images": len(rows), "files": {name: ""}})
    settings = {
        "model": {"name": "synthetic", "weights": {}},
        **{"tokens": ["class"], "layers": [11], "final_norm": True, "preprocessing": {}, "format": "safetensors"},
        **{"images": ["synthetic"], "num_images": num_images, "image_options": [{}]},
    }
    metadata = {"format": 1, "settings": settings, "complete": True, "images": num_images}
    (folder / METADATA_FILE).write_text(json.dumps(metadata | {"unreadable": [], "shards": shards}))
    with (folder / NAMES_FILE).open("w") as file:
        file.writelines(f'{{"name": "synthetic/{row:08d}.jpg", "grid": [16, 16]}}\n' for row in range(num_images))


def large(out: Path, num_images: int) -> tuple[dict[str, Any], str]:
    """Time, memory and what is found of planted duplicates, on synthetic features."""
    features = out / f"features_{num_images}"
    if not features.exists():
        write_synthetic(features, num_images)
    copies = int(COPIES * num_images)
    queries = out / "queries"
    if not queries.exists():
        write_synthetic(queries, 1000)
    results = {}
    flags: dict[str, list[str | Path]] = {
        "duplicates": ["--threshold", "0.95"],
        "balance": ["--clusters", f"{min(1000, num_images // 20)},50", "--size", str(num_images // 10)],
        "retrieve": ["--queries", queries, "--k", "32"],
    }
    for command, words in flags.items():
        sys.stderr.write(f"{command}\n")
        written, seconds, memory = curate(command, out / command, "--features", features, *words)
        results[command] = {
            "CPU seconds": round(seconds),
            "peak GiB": round(memory, 2),
            "search": str(written["facts"].get("search")),
        }
        if command == "duplicates":
            names = [each["name"] for each in written["dropped"]]
            hits = sum(int(name[-12:-4]) >= num_images - copies for name in names)
            results[command] |= {"recall": 100 * hits / copies, "precision": 100 * hits / max(1, len(names))}
            results[command] |= {"measured recall": written["facts"].get("recall of a sample")}
    return results, table_of("command", results)


# --- Results ---------------------------------------------------------------------------------------------------------


def table_of(first: str, results: dict[str, dict[str, Any]]) -> str:
    """Markdown table with a row for each of the results."""
    heads = list(dict.fromkeys(head for row in results.values() for head in row))
    lines = [f"| {' | '.join([first, *heads])} |", "| --- |" + " --- |" * len(heads)]
    lines += [f"| {' | '.join([name, *(str(row.get(head, '')) for head in heads)])} |" for name, row in results.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = get_args_parser().parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.mode == "planted":
        results, table = planted(out, args.images)
    elif args.mode == "long_tail":
        results, table = long_tail(out, args.seeds, args.steps)
    else:
        results, table = large(out, args.images)
    record = {**hardware(torch.device("cpu")), "results": results}
    (out / f"{args.mode}.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / f"{args.mode}.md").write_text(table)
    sys.stdout.write(json.dumps(record, indent=2) + "\n\n" + table)


if __name__ == "__main__":
    main()
