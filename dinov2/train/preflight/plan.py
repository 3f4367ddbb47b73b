"""How many steps a run should have for its number of images, beside the published evidence.

The rule is ours: each image is seen a number of times, within limits. It changes nothing by itself. The dry run prints
the overrides to copy, so that a run keeps its length when it is resumed.
"""

import math
import shlex
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2.config import Config, of_run, sources_of
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.mixture import Mixture
from dinov2.models.published import PUBLISHED
from dinov2.train.schedules import global_batch_size, num_steps
from dinov2.train.start.source_runs import weights_of_run

MAX_EXCESS = 4  # times the recommended steps; longer runs get a warning
FEW_IMAGES = 5000  # with fewer, the frozen model may be all that is needed


class Rule(NamedTuple):
    """Number of times that each image is seen, and the limits of the number of steps."""

    passes: int
    shortest: int
    longest: int


# From weights, longer is not better: half of the passes, and at most the steps of FINO.
FROM_WEIGHTS = Rule(passes=100, shortest=2_500, longest=25_000)
# The short published recipe sees ImageNet-1k 200 times; the long ones have 625,000 steps.
FROM_SCRATCH = Rule(passes=200, shortest=12_500, longest=625_000)
# The last stages, higher resolution and Gram anchoring, are short whatever the data.
LAST_STAGE = FROM_WEIGHTS._replace(longest=10_000)

PUBLISHED_FROM_WEIGHTS = {
    "published: FINO, ViT-L": "25,000 steps of 3,072 images, 77 million in all",
    "published: OpenMidnight, ViT-g": "137,500 steps of 384 images, 53 million in all; longer was worse",
    "published: lightly-train": "advises at least 100,000 curated images",
}
PUBLISHED_FROM_SCRATCH = {
    "published: DINOv2, ViT-L short": "125,000 steps of 2,048 images, 256 million in all, ImageNet-1k 200 times",
    "published: DINOv2, ViT-L and g": "625,000 steps of 3,072 images, 1,920 million in all",
}
PUBLISHED_DISTILLED = {
    "published: DINOv2, ViT-S to L": "625,000 steps of 2,048 images, 1,280 million in all",
    "published: DINOv3, ViT-S to L": "1,250,000 steps of 1,920 images, 2,400 million in all",
}
PUBLISHED_HIGH_RESOLUTION = {
    "published: DINOv2, 518 pixels": "10,000 steps; the images of a step are not published",
    "published: DINOv2, 416 pixels": "10,000 steps, about as good as all steps at this size",
    "published: DINOv3, to 768 pixels": "10,000 steps",
}
PUBLISHED_GRAM = {
    "published: DINOv3, Gram": "200,000 steps of 4,096 images after 1,000,000; 2 points of mIoU within 10,000",
}


def recommended_epochs(cfg: Config, num_images: int, world_size: int) -> int:
    """The value of `optim.epochs` that the rule gives."""
    rule, epoch = _rule(cfg), cfg.train.OFFICIAL_EPOCH_LENGTH
    steps = min(rule.passes * num_images / global_batch_size(cfg, world_size), rule.longest)
    return max(round(steps / epoch), math.ceil(rule.shortest / epoch))


def describe_length(cfg: Config, num_images: int, world_size: int) -> dict[str, str]:
    """The recommended number of steps with the overrides for it, and published ones, by name."""
    rule, epochs = _rule(cfg), recommended_epochs(cfg, num_images, world_size)
    overrides = "as configured" if epochs == cfg.optim.epochs else " ".join(_overrides(cfg, epochs))
    steps = epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    passes = steps * global_batch_size(cfg, world_size) / num_images
    rule_text = f"our rule: {rule.passes} times, but {rule.shortest:,} to {rule.longest:,} steps"
    return {
        "recommended steps": f"{steps:,}, the dataset {passes:.1f} times: {overrides} ({rule_text})",
        **_stage(cfg)[1],
    }


def check_length(cfg: Config, num_images: int, world_size: int) -> list[str]:
    """A warning if the run has far more steps than recommended for its images."""
    steps = num_steps(cfg)
    recommended = recommended_epochs(cfg, num_images, world_size) * cfg.train.OFFICIAL_EPOCH_LENGTH
    if steps <= MAX_EXCESS * recommended:
        return []
    return [
        f"optim.epochs = {cfg.optim.epochs} are {steps:,} steps, {steps / recommended:.1f} times the {recommended:,} "
        f"recommended for {num_images:,} images (--dry-run prints the override): longer runs are seldom better"
    ]


def describe_sources(cfg: Config, dataset: ImageDataset, world_size: int) -> dict[str, str]:
    """Size, share and passes of each source of a mixture, and the images seen, by name; empty for other datasets."""
    if not isinstance(dataset, Mixture):
        return {}
    images = num_steps(cfg) * global_batch_size(cfg, world_size)
    lines = {"images seen": f"{images:,}"}
    for name, part, share in zip(dataset.names, dataset.parts, dataset.shares, strict=True):
        passes = share * images / len(part)
        lines[f"source {name}"] = f"{len(part):,} images, {100 * share:.4g} % of the samples, seen {passes:.1f} times"
    return lines


def check_sources(cfg: Config, dataset: ImageDataset, world_size: int) -> list[str]:
    """A warning for each source of a mixture that is repeated far more often than the rule wants."""
    if not isinstance(dataset, Mixture):
        return []
    images, wanted = num_steps(cfg) * global_batch_size(cfg, world_size), _rule(cfg).passes
    times = [share * images / len(part) for part, share in zip(dataset.parts, dataset.shares, strict=True)]
    return [
        f"source {name} of {len(part):,} images is seen {passes:,.0f} times, more than {MAX_EXCESS} times the "
        f"{wanted} of our rule: a smaller weight, or more images"
        for name, part, passes in zip(dataset.names, dataset.parts, times, strict=True)
        if passes > MAX_EXCESS * wanted
    ]


def advise_few_images(cfg: Config, dataset: ImageDataset) -> list[str]:
    """Advice to evaluate the frozen model first, with the command, if there are few images and its weights are known.

    Those that the run starts from; for one from random weights the published ones of its size.
    """
    key, source = next(iter(sources_of(cfg).items()), ("", ""))
    if key not in ("", "student.pretrained_weights"):
        return []  # of an own run its evaluations are known
    if not key:
        source = next((name for name, (arch, _) in PUBLISHED.items() if cfg.student.arch.startswith(arch)), "")
    if len(dataset) >= FEW_IMAGES or not source:
        return []
    return [
        f"note: {len(dataset):,} images are few: first evaluate {source} as it is, which may be all that you need:",
        f"  python {shlex.join(_evaluation(cfg, source, dataset))}",
    ]


def _stage(cfg: Config) -> tuple[Rule, dict[str, str]]:
    """The rule for the stage that a run is, and published lengths of this stage by name."""
    from_weights = bool(sources_of(cfg))
    rule = FROM_WEIGHTS if from_weights else FROM_SCRATCH
    if cfg.distillation.teacher:
        return rule, PUBLISHED_DISTILLED
    if cfg.gram.loss_weight > 0:
        return LAST_STAGE if from_weights else rule, PUBLISHED_GRAM
    if _has_larger_crops(cfg):
        return LAST_STAGE, PUBLISHED_HIGH_RESOLUTION
    return rule, PUBLISHED_FROM_WEIGHTS if from_weights else PUBLISHED_FROM_SCRATCH


def _has_larger_crops(cfg: Config) -> bool:
    """Whether the run of `init_from` had smaller global crops; False if it is no longer there."""
    with suppress(FileNotFoundError, ValueError):
        former = of_run(weights_of_run(cfg.init_from)) if cfg.init_from else None
        return former is not None and former.crops.global_crops_size < cfg.crops.global_crops_size
    return False


def _rule(cfg: Config) -> Rule:
    """The rule of a run; after the ramp of a frozen backbone there are as many steps at its full rate, at least."""
    rule, _ = _stage(cfg)
    shortest = max(rule.shortest, cfg.optim.freeze_backbone_steps + 2 * cfg.optim.backbone_warmup_steps)
    return rule._replace(shortest=shortest, longest=max(rule.longest, shortest))


def _overrides(cfg: Config, epochs: int) -> list[str]:
    """Overrides for a run of another length; warm-ups of more than half of it are shortened in proportion."""
    overrides = [f"optim.epochs={epochs}"]
    for key in ("optim.warmup_epochs", "optim.freeze_last_layer_epochs", "teacher.warmup_teacher_temp_epochs"):
        if 2 * (value := attrgetter(key)(cfg)) > epochs:
            overrides.append(f"{key}={round(value * epochs / cfg.optim.epochs)}")
    return overrides


def _evaluation(cfg: Config, source: str, dataset: ImageDataset) -> list[str]:
    """The words of a command: k-NN for a published model if there are labels, else the nearest neighbors of images."""
    images, output = cfg.train.dataset_path, Path(cfg.train.output_dir)
    targets = dataset.get_targets() if source in PUBLISHED else None
    if targets is not None and len(np.unique(targets)) > 1:
        recipe = f"eval/{source.removeprefix('dinov2_').replace('_reg', '_reg4')}_pretrain"
        model = ["--config-file", recipe, "--pretrained-weights", source]
        data = ["--train-dataset", images, "--val-dataset", "HELD_OUT_IMAGES"]
        return ["dinov2/eval/knn.py", *model, "--output-dir", str(output / "frozen_knn"), *data]
    model = ["--model" if source in PUBLISHED else "--pretrained-weights", source]
    figure = ["--output", str(output / "frozen_neighbors.png")]
    return ["-m", "dinov2.visualization", "neighbors", *model, "--query", images, "--images", images, *figure]
