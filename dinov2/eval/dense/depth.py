"""Depth estimation with a linear head on frozen tokens, trained here or given: RMSE and others by a named protocol.

Shapes: B crops of h x w pixels in training, test images of H x W pixels. Depths are in meters.
"""

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.dense import depth_parser as get_args_parser

if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before the imports that take seconds

import numpy as np
import torch
from torch import Tensor, nn

from dinov2 import config, distributed
from dinov2.config import DTYPES, Config
from dinov2.data.datasets import parse_dataset_str
from dinov2.data.dense.base import DenseDataset
from dinov2.data.dense.color import DepthColors
from dinov2.data.dense.transforms import KITTI_SIZE, NYU_BOX, DepthCrops, EvaluationInputs
from dinov2.eval import setup
from dinov2.eval.dense import data, heads, prediction_figure
from dinov2.eval.dense.depth_losses import WARM_UP_STEPS, labeled_pixels, weighted_depth_loss
from dinov2.eval.dense.depth_metrics import (
    DepthMetrics,
    clamp_depth,
    crop_rectangle,
    depth_metrics,
    mean_over_images,
    valid_pixels,
)
from dinov2.eval.dense.protocols import DEPTH, DEPTH_DATA, DepthData, DepthProtocol, describe, with_flags
from dinov2.eval.dense.training import Layers, train_head
from dinov2.eval.features import autocast
from dinov2.eval.results import archive_results
from dinov2.log import run_command
from dinov2.models.dense.averaging import predict_depth
from dinov2.models.dense.depther import Depther
from dinov2.models.dense.layers import last_blocks, resize, spread_blocks
from dinov2.models.dense.linear_depth_head import LinearDepthHead
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_depth.json"
LARGE_ERROR = 0.25  # relative, in the darkest color of the figure
UNITS = "rmse, mae and sq_rel in meters, abs_rel and a1 to a3 as fractions, logarithms without unit, silog times 100"
IMAGES_OF_A_LOSS = 2  # the published trainings have two images per process, and a loss that is not linear in images


# --- Scores ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(depther: Depther, example: data.Example, protocol: DepthProtocol, dtype: torch.dtype) -> Tensor:
    """Depth (1, H, W) of an image at the size of its map."""
    images = example.inputs[0][None].to(distributed.device(), non_blocking=True)
    with autocast(dtype):
        depth = predict_depth(depther, images, mirror=protocol.mirror).float()
    height, width = example.target.shape[-2:]
    depth = resize(depth, (height, width))[0]
    if (~depth.isfinite()).any():
        raise ValueError(
            "the outputs of the head are NaN or infinite: its training diverged, or the weights of the backbone are bad"
        )
    return depth


class DepthScores(NamedTuple):
    """Scores of a dataset."""

    metrics: DepthMetrics  # means over images
    scored: float  # share of the measured pixels under the mask that are in the range of depths
    rows: prediction_figure.Rows  # of the first images: image, truth, prediction, relative error


def evaluate(
    depther: Depther,
    dataset: DenseDataset,
    protocol: DepthProtocol,
    rules: DepthData,
    prepare: EvaluationInputs,
    *,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    shown_images: int = 0,
    depth_range: tuple[float, float] | None = None,
) -> DepthScores:
    """Score a head on the images of a dataset, by all processes together; `depth_range` is that of the figure."""
    depther.eval()
    mine: list[tuple[int, DepthMetrics]] = []
    shown = []
    measured = torch.zeros(2, dtype=torch.int64)  # pixels with a measurement under the mask, and those in the range
    for example in data.examples(dataset, prepare, num_workers):
        predicted = clamp_depth(
            predict(depther, example, protocol, dtype).cpu(), min_depth=rules.min_depth, max_depth=rules.max_depth
        )
        crop = "full" if rules.mask == "none" else rules.mask
        valid = valid_pixels(example.target, min_depth=rules.min_depth, max_depth=rules.max_depth, crop=crop)
        rows, columns = crop_rectangle(crop, *example.target.shape[-2:])
        measured += torch.stack([(example.target[..., rows, columns] > 0).sum(), valid.sum()])
        mine.append((example.number, depth_metrics(predicted, example.target, valid)))
        if example.number < shown_images:
            row = _panels(example, predicted, valid, depth_range or (rules.min_depth, rules.max_depth))
            shown.append((example.number, dataset.describe(example.number), row))
    scored = sorted(pair for part in distributed.all_gather_object(mine) for pair in part)
    under_mask, in_range = distributed.all_reduce_sum(measured.to(distributed.device())).tolist()
    means = mean_over_images([metrics for _, metrics in scored])
    return DepthScores(means, in_range / max(under_mask, 1), prediction_figure.gathered(shown))


def _panels(
    example: data.Example, predicted: Tensor, valid: Tensor, depth_range: tuple[float, float]
) -> list[np.ndarray]:
    truth, prediction = example.target[0].numpy(), predicted[0].numpy()
    error = torch.where(valid, (predicted - example.target).abs() / example.target.clamp_min(1e-6), 0)[0].numpy()
    maps = [prediction_figure.depth_colors(values, *depth_range) for values in (truth, prediction)]
    height, width = truth.shape
    pixels = example.pixels[-height:]
    left = (pixels.shape[1] - width) // 2
    return [pixels[:, left : left + width], *maps, prediction_figure.heat_colors(error / LARGE_ERROR, valid[0].numpy())]


def _legend(depth_range: tuple[float, float]) -> list[tuple[str, Sequence[int]]]:
    depths = np.linspace(*depth_range, 5)
    colors = prediction_figure.depth_colors(depths[None], *depth_range)[0].tolist()
    named = [(f"{depth:.3g} m", color) for depth, color in zip(depths, colors, strict=True)]
    return [
        *named,
        ("no error", prediction_figure.BACKGROUND),
        (f"error {LARGE_ERROR:.0%} and more", prediction_figure.WRONG),
    ]


# --- Training --------------------------------------------------------------------------------------------------------


def depth_loss(
    head: nn.Module,
    layers: Layers,
    depths: Tensor,
    step: int,
    *,
    gradient_loss: float = 0.0,
    warm_up_steps: int = WARM_UP_STEPS,
) -> Tensor:
    """Loss of depths (B, 1, h, w) at their size: that of every `IMAGES_OF_A_LOSS` images, averaged.

    It is SigLoss, and `gradient_loss` times `depth_losses.gradient_log_loss`. The published trainings add half of a
    gradient loss that is exactly 0 for their two images per process, see `depth_losses.published_gradient_loss`. With a
    fixed number of images, the number of processes does not matter.
    """
    predicted = resize(head(layers).float(), (depths.shape[-2], depths.shape[-1]))
    pairs = zip(predicted.split(IMAGES_OF_A_LOSS), depths.split(IMAGES_OF_A_LOSS), strict=True)
    weights = {"sig": 1.0} | ({"gradient_log": gradient_loss} if gradient_loss else {})
    options = {"step": step, "warm_up_steps": warm_up_steps}
    return torch.stack([weighted_depth_loss(weights, p, d, labeled_pixels(d), **options) for p, d in pairs]).mean()


def make_depther(
    backbone: DinoVisionTransformer, protocol: DepthProtocol, rules: DepthData, args: argparse.Namespace
) -> tuple[Depther, heads.ChosenHead]:
    """A backbone with a new head or the given one, on the device of this process, and the head.

    Raises:
        ValueError: The backbone has too few blocks, or a given head is one of another protocol.
    """
    if args.head is not None:
        chosen = heads.read(args.head, "depth", backbone, None if args.bins is None else tuple(args.bins))
        _check_protocol(chosen, protocol, args.layers)
    else:
        if protocol.layers > backbone.n_blocks:
            raise ValueError(
                f"a head on {protocol.layers} blocks, but the backbone has {backbone.n_blocks}: --layers 1"
            )
        blocks = spread_blocks(backbone.n_blocks) if protocol.layers > 1 else last_blocks(backbone.n_blocks, 1)
        torch.manual_seed(heads.SEED)
        head = LinearDepthHead(
            len(blocks) * backbone.embed_dim * (1 + protocol.class_token),
            min_depth=rules.min_depth,
            max_depth=rules.max_depth,
            use_class_token=protocol.class_token,
            upsample=protocol.upsample,
            batch_norm=protocol.batch_norm,
        )
        chosen = heads.ChosenHead(head, tuple(blocks), protocol.final_norm, "trained here")
    depther = Depther(backbone, chosen.head, blocks=chosen.blocks, norm=chosen.norm)
    return depther.to(distributed.device()), chosen


def _check_protocol(chosen: heads.ChosenHead, protocol: DepthProtocol, layers: int | None) -> None:
    """Raise a `ValueError` if a given head is one of another protocol, or reads another number of blocks than asked."""
    if isinstance(chosen.head, LinearDepthHead) and chosen.norm != protocol.final_norm:
        fitting = ", ".join(name for name, each in DEPTH.items() if each.final_norm == chosen.norm)
        raise ValueError(f"the head {chosen.described} is one of the protocol {fitting}: give --protocol {fitting}")
    if layers is not None and len(chosen.blocks) != layers:
        raise ValueError(f"the head {chosen.described} reads {len(chosen.blocks)} block(s), not --layers {layers}")


def make_crops(protocol: DepthProtocol, rules: DepthData, cfg: Config) -> DepthCrops:
    """The random crops of a training."""
    is_kitti = rules.train_box == "kitti"
    return DepthCrops(
        box=NYU_BOX if rules.train_box == "nyu" else None,
        bottom=KITTI_SIZE if is_kitti else None,
        rotation=protocol.rotation,
        crop_size=rules.train_crop,
        colors=DepthColors(brightness=(0.9, 1.1) if is_kitti else protocol.brightness),
        mean=tuple(cfg.augmentation.mean),
        std=tuple(cfg.augmentation.std),
    )


def train(
    depther: Depther,
    sets: data.Sets,
    protocol: DepthProtocol,
    rules: DepthData,
    validate: Any,
    args: argparse.Namespace,
    cfg: Config,
) -> list[dict[str, Any]]:
    """Train the head in place; returns the history of validations by `validate() -> scores`."""
    assert sets.train is not None, "a head is trained"
    return train_head(
        depther.decode_head,
        partial(heads.frozen_features, depther, DTYPES[args.precision]),
        partial(
            depth_loss,
            gradient_loss=protocol.gradient_loss,
            warm_up_steps=min(WARM_UP_STEPS, protocol.training.warmup),
        ),
        partial(
            data.make_train_loader,
            dataset=sets.train,
            crops=make_crops(protocol, rules, cfg),
            batch_size=data.images_per_process(protocol.training.batch_size),
            num_workers=args.num_workers,
        ),
        validate,
        protocol.training,
        heads.head_run(args, cfg, sets, protocol, best_by="minus abs_rel", rules=dataclasses.asdict(rules)),
    )


# --- The whole evaluation --------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """What the command line asks for."""

    protocol: DepthProtocol
    published: DepthProtocol
    rules: DepthData  # of the dataset
    changed: dict[str, Any]  # what the command line changes of the published rules


def chosen(args: argparse.Namespace, cfg: Config) -> Chosen:
    """The protocol of the command line, and what it prescribes for the validation set.

    Raises:
        ValueError: The dataset has no published range of depths, and none is given.
    """
    published = DEPTH[args.protocol]
    protocol = with_flags(published, args, distributed.world_size())
    of_head = {"layers": args.layers, "gradient_loss": args.gradient_loss}
    protocol = dataclasses.replace(protocol, **{key: v for key, v in of_head.items() if v is not None})
    name, _ = parse_dataset_str(args.val_dataset)
    if name not in DEPTH_DATA and args.max_depth is None:
        raise ValueError(f"--max-depth is missing: {name} has no published range; known: {', '.join(DEPTH_DATA)}")
    side = cfg.crops.global_crops_size
    crop = (side, side) if side < setup.SMALLEST_PUBLISHED_SIZE else DEPTH_DATA["NYUv2"].train_crop
    rules = DEPTH_DATA.get(name, DepthData(1e-3, args.max_depth or 1.0, "none", crop, "none"))
    flags = {"min_depth": args.min_depth, "max_depth": args.max_depth, "mask": args.mask}
    flags["train_crop"] = None if args.train_crop is None else tuple(args.train_crop)
    given = {key: value for key, value in flags.items() if value is not None}
    precision = {} if args.precision == "fp32" else {"precision": args.precision}
    changed = {key: value for key, value in given.items() if value != getattr(rules, key)} | precision
    return Chosen(protocol, published, dataclasses.replace(rules, **given), changed)


def check_range(found: tuple[float, float] | None, rules: DepthData) -> None:
    """Warn of depths of the validation set that are not scored; a `ValueError` if no depth is in the range."""
    if found is None:
        return
    low, high = found
    text = f"depths of the validation set are from {low:.4g} to {high:.4g} m, scored from {rules.min_depth:g} to "
    text += f"{rules.max_depth:g} m (--min-depth, --max-depth; scale= of the dataset)"
    if high <= rules.min_depth or low >= rules.max_depth:
        raise ValueError(f"{text}: none is in the range")
    if low <= rules.min_depth or high >= rules.max_depth:
        logger.warning("%s: those outside are left out", text)


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    started = time.monotonic()
    with distributed.session():
        cfg = setup.setup(args, data.named_sets(args))
        config.require_rgb(cfg, "depth estimation")
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        protocol, published, rules, changed = chosen(args, cfg)
        sets = data.open_sets(args, cfg, "depth")
        check_range(sets.found.depth_range, rules)
        backbone = setup.build_model_for_eval(cfg, args.pretrained_weights)
        depther, head = make_depther(backbone, protocol, rules, args)
        source, head_facts = head.described, None if args.head is None else head.facts()
        protocol = dataclasses.replace(protocol, layers=len(head.blocks))
        described = describe(protocol, published, **changed)
        prepare = EvaluationInputs(
            size=rules.test_size,
            bottom=KITTI_SIZE if rules.test_box == "kitti" else None,
            mean=tuple(cfg.augmentation.mean),
            std=tuple(cfg.augmentation.std),
        )
        loading: dict[str, Any] = {"dtype": DTYPES[args.precision], "num_workers": args.num_workers}
        score = partial(evaluate, depther, sets.val, protocol, rules, prepare, **loading)

        def validate() -> dict[str, float]:
            metrics = score().metrics
            return {"minus abs_rel": -metrics.abs_rel, "abs_rel": metrics.abs_rel, "rmse": metrics.rmse}

        history: list[dict[str, Any]] = []
        if sets.train is not None:
            logger.info("training crops of %d x %d pixels", *rules.train_crop)
            history = train(depther, sets, protocol, rules, validate, args, cfg)
            source = heads.save(args, depther, sets.train, described)
        shown = sets.found.depth_range or (rules.min_depth, rules.max_depth)
        scores = score(shown_images=args.shown_images, depth_range=shown)
        heads.report(
            path,
            "depth",
            scores.metrics._asdict(),
            args,
            unit=UNITS,
            table=[
                *((name, f"{getattr(scores.metrics, name):.3f}") for name in ("rmse", "abs_rel", "a1", "silog")),
                ("scored", f"{scores.scored:.1%}"),
            ],
            protocol=described,
            resolution=_resolution(rules),
            head=source,
            given_head=head_facts,
            scored_pixels=scores.scored,
            protocol_settings=dataclasses.asdict(protocol) | dataclasses.asdict(rules) | {"seed": heads.SEED},
            history=[{key: value for key, value in record.items() if key != "minus abs_rel"} for record in history],
            sets=sets,
            started=started,
        )
        prediction_figure.write(args, ("image", "truth", "prediction", "relative error"), scores.rows, _legend(shown))


def _resolution(rules: DepthData) -> str:
    size = "images of {} x {} pixels".format(*rules.test_size) if rules.test_size else "images in their size"
    if rules.test_box == "kitti":
        size = "the lower {} x {} pixels".format(*KITTI_SIZE)
    scored = "all pixels" if rules.mask == "none" else f"mask {rules.mask}"
    return f"{size}, {scored}, {rules.min_depth:g} to {rules.max_depth:g} m"


if __name__ == "__main__":
    words = "the same command again continues from the latest checkpoint"
    sys.exit(run_command(lambda: main(ARGS), after_interrupt=words))
