"""Depth estimation with a linear head on frozen tokens, trained here or given: RMSE and others by a named protocol.

Shapes: B crops of h x w pixels in training, test images of H x W pixels. Depths are in meters.
"""

import argparse
import dataclasses
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.dense import depth_parser as get_args_parser

if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before the imports that take seconds

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.config import DTYPES, Config
from dinov2.data.datasets import parse_dataset_str
from dinov2.data.dense.base import DenseDataset
from dinov2.data.dense.color import DepthColors
from dinov2.data.dense.transforms import KITTI_SIZE, NYU_BOX, DepthCrops, EvaluationInputs
from dinov2.eval import setup
from dinov2.eval.dense import data, heads, pictures
from dinov2.eval.dense.depth_losses import WARM_UP_STEPS, labeled_pixels, weighted_depth_loss
from dinov2.eval.dense.depth_metrics import DepthMetrics, clamp_depth, depth_metrics, mean_over_images, valid_pixels
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


def evaluate(
    depther: Depther,
    dataset: DenseDataset,
    protocol: DepthProtocol,
    rules: DepthData,
    prepare: EvaluationInputs,
    *,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    num_pictures: int = 0,
) -> tuple[DepthMetrics, pictures.Rows]:
    """Score a head on the images of a dataset, by all processes together.

    Returns:
        The means over images, and pictures of the first ones: image, truth, prediction, and relative error up to 0.25.
    """
    depther.eval()
    mine: list[tuple[int, DepthMetrics]] = []
    shown = []
    for example in data.examples(dataset, prepare, num_workers):
        predicted = clamp_depth(
            predict(depther, example, protocol, dtype).cpu(), min_depth=rules.min_depth, max_depth=rules.max_depth
        )
        valid = valid_pixels(
            example.target,
            min_depth=rules.min_depth,
            max_depth=rules.max_depth,
            crop="full" if rules.mask == "none" else rules.mask,
        )
        mine.append((example.number, depth_metrics(predicted, example.target, valid)))
        if example.number < num_pictures:
            row = _pictures(example, predicted, valid)
            shown.append((example.number, dataset.describe(example.number), row))
    scored = sorted(pair for part in distributed.all_gather_object(mine) for pair in part)
    return mean_over_images([metrics for _, metrics in scored]), pictures.gathered(shown)


def _pictures(example: data.Example, predicted: Tensor, valid: Tensor) -> list[Any]:
    truth, prediction = example.target[0].numpy(), predicted[0].numpy()
    measured = truth[truth > 0]
    low, high = (float(measured.min()), float(measured.max())) if measured.size else (0.0, 1.0)
    error = torch.where(valid, (predicted - example.target).abs() / example.target.clamp_min(1e-6), 0)[0].numpy()
    maps = [pictures.depth_colors(values, low, high) for values in (truth, prediction)]
    height, width = truth.shape
    pixels = example.pixels[-height:]
    left = (pixels.shape[1] - width) // 2
    return [pixels[:, left : left + width], *maps, pictures.heat_colors(error / 0.25, valid[0].numpy())]


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
) -> tuple[Depther, str]:
    """A backbone with a new head or the given one, on the device of this process, and a description of the head."""
    if args.head is not None:
        bins = None if args.bins is None else tuple(args.bins)
        chosen = heads.read(args.head, "depth", backbone, bins)
    else:
        if protocol.layers > backbone.n_blocks:
            raise ValueError(
                f"the head reads {protocol.layers} blocks, the backbone has {backbone.n_blocks}: --layers 1"
            )
        blocks = spread_blocks(backbone.n_blocks) if protocol.layers > 1 else last_blocks(backbone.n_blocks, 1)
        torch.manual_seed(0)
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
    return depther.to(distributed.device()), chosen.described


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


def chosen(args: argparse.Namespace) -> Chosen:
    """The protocol of the command line, and what it prescribes for the validation set.

    Raises:
        ValueError: The dataset has no published range of depths, and none is given.
    """
    published = DEPTH[args.protocol]
    protocol = with_flags(published, args, distributed.world_size())
    changed = {"layers": args.layers, "gradient_loss": args.gradient_loss}
    protocol = dataclasses.replace(protocol, **{key: v for key, v in changed.items() if v is not None})
    name, _ = parse_dataset_str(args.val_dataset)
    if name not in DEPTH_DATA and args.max_depth is None:
        raise ValueError(f"--max-depth is missing: {name} has no published range; known: {', '.join(DEPTH_DATA)}")
    rules = DEPTH_DATA.get(name, DepthData(1e-3, args.max_depth or 1.0, "none", (416, 544), "none"))
    changed = {"min_depth": args.min_depth, "max_depth": args.max_depth, "mask": args.mask}
    if args.train_crop is not None:
        changed["train_crop"] = tuple(args.train_crop)
    return Chosen(
        protocol, published, dataclasses.replace(rules, **{key: v for key, v in changed.items() if v is not None})
    )


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    started = time.monotonic()
    with distributed.session():
        cfg = setup.setup(args, data.named_sets(args))
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        protocol, published, rules = chosen(args)
        sets = data.open_sets(args, cfg, "depth")
        backbone = setup.build_model_for_eval(cfg, args.pretrained_weights)
        depther, source = make_depther(backbone, protocol, rules, args)
        prepare = EvaluationInputs(
            size=rules.test_size,
            bottom=KITTI_SIZE if rules.test_box == "kitti" else None,
            mean=tuple(cfg.augmentation.mean),
            std=tuple(cfg.augmentation.std),
        )
        loading: dict[str, Any] = {"dtype": DTYPES[args.precision], "num_workers": args.num_workers}
        score = partial(evaluate, depther, sets.val, protocol, rules, prepare, **loading)

        def validate() -> dict[str, float]:
            metrics = score()[0]
            return {"minus abs_rel": -metrics.abs_rel, "abs_rel": metrics.abs_rel, "rmse": metrics.rmse}

        history: list[dict[str, Any]] = []
        if sets.train is not None:
            history = train(depther, sets, protocol, rules, validate, args, cfg)
            source = heads.save(args, depther, sets.train, describe(protocol, published))
        metrics, rows = score(num_pictures=args.num_pictures)
        pictures.write(args, ("image", "truth", "prediction", "relative error, red: 0.25"), rows)
        heads.report(
            path,
            "depth",
            metrics._asdict(),
            args,
            unit="meters and fractions",
            table=[(name, f"{getattr(metrics, name):.3f}") for name in ("rmse", "abs_rel", "a1", "silog")],
            protocol=describe(protocol, published),
            resolution=_resolution(rules),
            head=source,
            protocol_settings=dataclasses.asdict(protocol) | dataclasses.asdict(rules),
            history=[{key: value for key, value in record.items() if key != "minus abs_rel"} for record in history],
            sets=sets,
            started=started,
        )


def _resolution(rules: DepthData) -> str:
    size = "images of {} x {} pixels".format(*rules.test_size) if rules.test_size else "images in their size"
    if rules.test_box == "kitti":
        size = "the lower {} x {} pixels".format(*KITTI_SIZE)
    scored = "all pixels" if rules.mask == "none" else f"mask {rules.mask}"
    return f"{size}, {scored}, {rules.min_depth:g} to {rules.max_depth:g} m"


if __name__ == "__main__":
    words = "the same command again continues from the latest checkpoint"
    sys.exit(run_command(lambda: main(ARGS), after_interrupt=words))
