"""Synthetic output folders of trainings: healthy, failing, unfinished, or with missing parts."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2 import config

NUM_IMAGES, SIDE, GRID, WIDTH = 6, 48, 12, 16
FEATURE_STEPS = (0, 199, 399, 599, 799)


def write_run(
    folder: Path,
    *,
    steps: int = 800,
    done: int | None = None,
    health: bool = True,
    images: bool = True,
    evaluations: bool = True,
    environment: bool = True,
    collapse_at: int | None = None,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
) -> Path:
    """Write a run of `steps` steps, of which `done` are logged; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = (f"optim.epochs={steps // 50}", "optim.warmup_epochs=1", "train.OFFICIAL_EPOCH_LENGTH=50", *overrides)
    config.save(config.load("train/fashion_mnist", words), folder / "config.yaml")
    logged = [*range(0, done or steps, 10), (done or steps) - 1]
    lines = [record(step, steps, health, collapse_at, seed) for step in logged]
    (folder / "training_metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if environment:
        write_json(folder / "environment.json", {"sessions": [session(0), session(400)][: 1 if steps < 400 else 2]})
    if images:
        write_images(folder / "health", seed)
    if evaluations:
        write_evaluations(folder, seed)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def record(step: int, steps: int, health: bool, collapse_at: int | None, seed: int) -> dict[str, float]:
    """One record of the metrics: losses fall and the rank of the features rises, until they collapse."""
    noise = np.random.default_rng([seed, step]).normal(0, 1, 20)
    learned = 1 - math.exp(-4 * step / steps)
    broken = 0.0 if collapse_at is None else 1 / (1 + math.exp(-(step - collapse_at) / 15))
    well = learned * (1 - broken)
    losses = {
        "dino_local_crops_loss": 4.3 - 2.1 * learned - 1.5 * broken + 0.03 * noise[0] + 0.1 * seed,
        "dino_global_crops_loss": 1.1 - 0.5 * learned - 0.4 * broken + 0.01 * noise[1],
        "koleo_loss": 0.37 - 0.2 * well + 0.5 * broken + 0.005 * noise[2],
        "ibot_loss": 2.07 - 0.9 * learned - 0.8 * broken + 0.02 * noise[3],
    }
    line = {
        "iteration": step,
        "iter_time": 0.6 + 0.03 * noise[4],
        "data_time": 0.03 + 0.004 * noise[5],
        "lr": 1.5e-3 * min(step / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        "wd": 0.04 + 0.06 * step / steps,
        "mom": 0.99 + 0.008 * step / steps,
        "last_layer_lr": 0.0 if step < 50 else 1.5e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
        "current_batch_size": 64.0,
        "total_loss": sum(losses.values()),
        **losses,
    }
    if not health:
        return line
    line |= {
        "cls_target_entropy": 1.8 + 2.4 * broken - 0.4 * learned + 0.02 * noise[6],
        "patch_target_entropy": 2.4 + 2.0 * broken - 0.5 * learned + 0.02 * noise[7],
        "cls_target_information": 2.9 * (1 - broken) + 0.02 * abs(noise[8]),
        "patch_target_information": 2.2 * (1 - broken) + 0.02 * abs(noise[9]),
        "cls_target_perplexity": 118 * (1 - broken) + 1 + noise[10],
        "patch_target_perplexity": 102 * (1 - broken) + 1 + noise[11],
        "cls_target_capacity": math.log(128),
        "patch_target_capacity": math.log(128),
        "cls_prototypes_used": round(80 * (1 - broken)) + 1,
        "patch_prototypes_used": round(96 * (1 - broken)) + 1,
        "cls_largest_prototype": 0.04 + 0.95 * broken,
        "patch_largest_prototype": 0.06 + 0.92 * broken,
        "koleo_distance": 0.3 + 0.3 * well - 0.28 * broken + 0.01 * noise[12],
        "grad_norm_backbone": 1.5 * math.exp(0.15 * noise[13]) * (1 - 0.9 * broken),
        "grad_norm_dino_head": 0.4 * math.exp(0.15 * noise[14]) * (1 - 0.9 * broken),
        "student_teacher_distance": 0.02 + 0.03 * line["lr"] / 1.5e-3,
        "data_wait": line["data_time"] / line["iter_time"],
    }
    if step % 50 == 0 or step == steps - 1:
        line |= {
            "probe_cls_rank_me": 8 + 34 * well - 6.5 * broken,
            "probe_patch_rank_me": 14 + 50 * well - 12 * broken,
            "probe_patch_similarity": 0.55 - 0.3 * well + 0.4 * broken,
            "probe_cls_norm": 16 + 2 * learned,
            "probe_patch_norm": 15 + 1.5 * learned,
        }
    if step % 100 == 0 or step == steps - 1:
        line["knn"] = round(64 + 19 * well - 40 * broken + 0.4 * noise[15] + seed, 3)
    return line


def session(first_step: int) -> dict[str, Any]:
    return {
        "first_step": first_step,
        "date": "2026-11-23T14:18:21+00:00",
        "command": "python dinov2/train/train.py --config-file train/fashion_mnist --output-dir quickstart",
        "processes": 2,
        "device": "A processor with a name",
        "cores": 2,
        "threads": 1,
        "slurm_job": None,
        "system": "Linux x86_64",
        "python": "3.11.2",
        "dinov2": "0.1.0",
        "torch": "2.15.0",
        "torchvision": "0.29.2",
        "numpy": "2.4.1",
        "xformers": None,
        "cuda": None,
        "driver": None,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "changed_files": 2,
    }


def write_images(folder: Path, seed: int = 0) -> None:
    """Discs with a bright half on a shaded background, and features that separate these parts better and better."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    generator = np.random.default_rng(seed)
    images, parts = [], []
    for _ in range(NUM_IMAGES):
        y, x, turn = generator.uniform(0.4, 0.6), generator.uniform(0.4, 0.6), generator.uniform(0, 6.28)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < 0.08
        half = disc & ((rows - y) * math.sin(turn) + (columns - x) * math.cos(turn) > 0)
        red, green, blue = (60 + 90 * rows, 80 + 60 * columns, 120 + 0 * rows)
        color = generator.integers(120, 255, 3)
        image = np.stack([np.where(disc, c, g) for c, g in zip(color, (red, green, blue), strict=True)])
        images.append(np.where(half, 0.6 * image + 100, image).clip(0, 255).astype(np.uint8))
        cells = np.stack([~disc, disc & ~half, half, rows, columns]).astype(float)
        parts.append(cells.reshape(5, GRID, SIDE // GRID, GRID, SIDE // GRID).mean((2, 4)))
    np.savez(folder / "images.npz", images=np.stack(images))
    cells = np.stack(parts).transpose(0, 2, 3, 1)
    for step in FEATURE_STEPS:
        learned = step / max(FEATURE_STEPS)
        directions = np.random.default_rng([seed, 1]).normal(0, 1, (5, WIDTH))
        weights = np.array([1.5, 1, 1, 0, 0]) * learned + np.array([0.1, 0.05, 0.1, 1, 1]) * (1 - learned)
        tokens = (cells * weights) @ directions + generator.normal(0, 0.5 - 0.4 * learned, (*cells.shape[:3], WIDTH))
        np.save(folder / f"patch_tokens_{step:07d}.npy", tokens.astype(np.float16))


def write_evaluations(folder: Path, seed: int = 0) -> None:
    """Results of the last teacher, and the link to the best one."""
    teacher = "eval/training_799/teacher_checkpoint.pth"
    facts = {"weights": {"path": teacher, "sha256": "0"}, "settings": sets()}
    knn = {"raw pixels": {"10": 83.0, "20": 82.5}, "untrained": {"10": 78.0, "20": 77.25}}
    knn["trained"] = {"10": 82.4 + seed, "20": 82.125}
    write_json(folder / "knn.json", {"evaluation": "knn", "metrics": knn, **facts})
    linear = {
        "best_classifier": {"name": "1_blocks_avgpool_True_lr_0_01", "top-1": 84.5, "top-5": 99.25},
        "val": {"1_blocks_avgpool_True_lr_0_01": {"top-1": 84.5}},
        "test": [{"dataset": "FashionMNIST:split=VAL", "metric": "mean_accuracy", "top-1": 84.0}],
        "history": [{"iteration": 10, "top-1": 80.0}],
    }
    path = folder / "eval" / "training_799" / "linear" / "results_eval_linear.json"
    write_json(path, {"evaluation": "linear", "metrics": linear, **facts})
    best = folder / "eval" / "training_599"
    write_json(best / "health.json", {"iteration": 599, "signal": "knn", "value": 82.8})
    (folder / "eval" / "best").symlink_to("training_599")


def sets() -> Mapping[str, str]:
    return {"train_dataset": "FashionMNIST:split=TRAIN", "val_dataset": "FashionMNIST:split=VAL"}


def colors(number: int = 3, side: int = 5, seed: int = 0) -> torch.Tensor:
    """Colors of some images, (number, side, side, 3), as `pca_colors` makes them."""
    return torch.rand(number, side, side, 3, generator=torch.Generator().manual_seed(seed))
