"""Semantic segmentation with a linear head on frozen patch tokens, trained here or given: mIoU by a named protocol.

Shapes: B crops of h x w pixels in training, test images of H x W pixels, C classes.
"""

import argparse
import dataclasses
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.dense import segmentation_parser as get_args_parser

if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before the imports that take seconds

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2 import distributed
from dinov2.config import DTYPES, Config
from dinov2.data.dense.base import IGNORED, DenseDataset
from dinov2.data.dense.transforms import EvaluationInputs, SegmentationCrops
from dinov2.data.images import in_colors
from dinov2.eval import setup
from dinov2.eval.dense import data, heads, prediction_figure, probes
from dinov2.eval.dense.protocols import (
    PROBE_PROTOCOL,
    SEGMENTATION,
    SegmentationProtocol,
    adapted,
    describe,
    with_flags,
)
from dinov2.eval.dense.segmentation_metrics import (
    Areas,
    SegmentationScores,
    as_percent,
    count_areas,
    segmentation_scores,
)
from dinov2.eval.dense.training import Layers, train_head
from dinov2.eval.features import CPU_PIXELS, autocast
from dinov2.eval.results import archive_results, counted
from dinov2.log import run_command
from dinov2.models.dense.averaging import predict_probabilities
from dinov2.models.dense.segmentation_head import SegmentationHead
from dinov2.models.dense.segmenter import Segmenter
from dinov2.models.dense.sliding_window import slide
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_segmentation.json"
WINDOWS_AT_ONCE = 4  # on a GPU; on a CPU as many as have `CPU_PIXELS`
LEGEND = 24  # classes


# --- Scores ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(segmenter: Segmenter, example: data.Example, protocol: SegmentationProtocol, dtype: torch.dtype) -> Tensor:
    """Class index of every pixel of an image, (H, W) int64, by the windows, scales and mirror images of a protocol."""
    on_cpu = max(CPU_PIXELS // protocol.crop_size**2, 1)
    windows = partial(
        slide,
        segmenter,
        window=protocol.crop_size,
        stride=protocol.stride,
        squares_if_smaller=protocol.small_windows == "squares",
        windows_at_once=on_cpu if distributed.device().type == "cpu" else WINDOWS_AT_ONCE,
    )
    images = [image[None].to(distributed.device(), non_blocking=True) for image in example.inputs]
    height, width = example.target.shape
    with autocast(dtype):
        probabilities = predict_probabilities(windows, images, (height, width), mirror=protocol.test_mirror)
    if (~probabilities.isfinite()).any():
        raise ValueError(
            "the outputs of the head are NaN or infinite: its training diverged, or the weights of the backbone are bad"
        )
    return probabilities[0].argmax(dim=0)


def evaluate(
    segmenter: Segmenter,
    dataset: DenseDataset,
    protocol: SegmentationProtocol,
    prepare: EvaluationInputs,
    *,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    shown_images: int = 0,
) -> tuple[SegmentationScores, prediction_figure.Rows]:
    """Score a head on the whole images of a dataset, by all processes together.

    Returns:
        The scores, and panels of the first images: the image, the truth, the prediction, the errors.
    """
    segmenter.eval()
    areas, shown = Areas.zeros(dataset.num_classes), []
    for example in data.examples(dataset, prepare, num_workers):
        predicted = predict(segmenter, example, protocol, dtype).cpu()
        areas += count_areas(predicted, example.target, dataset.num_classes)
        if example.number < shown_images:
            truth, predicted_labels = example.target.numpy(), predicted.numpy()
            colors = [prediction_figure.class_colors(labels, dataset.palette) for labels in (truth, predicted_labels)]
            errors = prediction_figure.error_colors(predicted_labels, truth, IGNORED)
            image = in_colors(example.pixels, dataset.image_options.shown)
            shown.append((example.number, dataset.describe(example.number), [image, *colors, errors]))
    return segmentation_scores(areas.summed_over_processes()), prediction_figure.gathered(shown)


# --- Training --------------------------------------------------------------------------------------------------------


def pixel_loss(head: nn.Module, layers: Layers, labels: Tensor, step: int) -> Tensor:
    """Cross-entropy of labels (B, h, w) at their size; as published, ignored pixels count in the number of pixels."""
    logits = functional.interpolate(head(layers), labels.shape[-2:], mode="bilinear", align_corners=False)
    losses = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return losses.mean()


def make_segmenter(
    backbone: DinoVisionTransformer, protocol: SegmentationProtocol, val: DenseDataset, source: str | None
) -> tuple[Segmenter, heads.ChosenHead]:
    """A backbone with a new head or the one at `source`, on the device of this process, and the head.

    Raises:
        ValueError: The head has other classes than the dataset, or reads another number of blocks than the protocol.
    """
    if source is None:
        blocks = range(backbone.n_blocks)[-protocol.last_blocks :]
        torch.manual_seed(heads.SEED)
        head: Any = SegmentationHead(len(blocks) * backbone.embed_dim, val.num_classes, dropout=protocol.dropout)
        chosen = heads.ChosenHead(head, tuple(blocks), norm=True, described="trained here")
    else:
        chosen = heads.read(source, "segmentation", backbone)
    if chosen.head.num_classes != val.num_classes:
        raise ValueError(
            f"the head {source} predicts {chosen.head.num_classes} classes, the validation set has {val.num_classes}"
        )
    setup.check_classes(chosen.meta.get("classes", []), val, "the validation set")
    if len(chosen.blocks) != min(protocol.last_blocks, backbone.n_blocks):
        fitting = ", ".join(name for name, each in SEGMENTATION.items() if each.last_blocks == len(chosen.blocks))
        raise ValueError(
            f"the head {source} reads {counted(len(chosen.blocks), 'block')}, the protocol {protocol.name} "
            f"{protocol.last_blocks}: give --protocol {fitting or 'of its training'}"
        )
    segmenter = Segmenter(backbone, chosen.head, blocks=chosen.blocks, norm=chosen.norm)
    return segmenter.to(distributed.device()), chosen


def train(
    segmenter: Segmenter,
    sets: data.Sets,
    protocol: SegmentationProtocol,
    validate: Any,
    args: argparse.Namespace,
    cfg: Config,
) -> list[dict[str, Any]]:
    """Train the head in place; returns the history of validations by `validate() -> scores`."""
    assert sets.train is not None, "a head is trained"
    crops = SegmentationCrops(
        short_side=protocol.short_side,
        scale=protocol.train_scale,
        crop_size=protocol.crop_size,
        max_class_share=protocol.max_class_share,
        mean=tuple(cfg.augmentation.mean),
        std=tuple(cfg.augmentation.std),
    )
    return train_head(
        segmenter.decode_head,
        partial(heads.frozen_features, segmenter, DTYPES[args.precision]),
        pixel_loss,
        partial(
            data.make_train_loader,
            dataset=sets.train,
            crops=crops,
            batch_size=data.images_per_process(protocol.training.batch_size),
            num_workers=args.num_workers,
        ),
        validate,
        protocol.training,
        heads.head_run(args, cfg, sets, protocol, best_by="mIoU" if protocol.keep == "best" else None),
    )


# --- The whole evaluation --------------------------------------------------------------------------------------------


def chosen_protocol(args: argparse.Namespace, cfg: Config) -> tuple[SegmentationProtocol, SegmentationProtocol]:
    """The protocol of the command line for the patch size of the model, and the published one that it varies."""
    published = adapted(SEGMENTATION[args.protocol], cfg.student.patch_size)
    crop_size = args.crop_size
    if crop_size is None and cfg.crops.global_crops_size < setup.SMALLEST_PUBLISHED_SIZE:
        crop_size = cfg.crops.global_crops_size
    protocol = published if crop_size is None else published.scaled(crop_size)
    return with_flags(protocol, args, distributed.world_size()), published


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    if args.protocol == PROBE_PROTOCOL:
        return probes.main(args)
    if args.max_train_images is not None:
        raise ValueError(
            f"--max-train-images has no meaning with --protocol {args.protocol}, only with {PROBE_PROTOCOL}"
        )
    started = time.monotonic()
    with distributed.session():
        cfg = setup.setup(args, data.named_sets(args))
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        protocol, published = chosen_protocol(args, cfg)
        sets = data.open_sets(args, cfg, "segmentation")
        backbone = setup.build_model_for_eval(cfg, args.pretrained_weights)
        segmenter, head = make_segmenter(backbone, protocol, sets.val, args.head)
        source, head_facts = head.described, None if args.head is None else head.facts()
        prepare = EvaluationInputs(
            short_side=protocol.short_side,
            scales=protocol.test_scales,
            mean=tuple(cfg.augmentation.mean),
            std=tuple(cfg.augmentation.std),
        )
        loading: dict[str, Any] = {"dtype": DTYPES[args.precision], "num_workers": args.num_workers}
        score = partial(evaluate, segmenter, sets.val, protocol, prepare, **loading)
        history: list[dict[str, Any]] = []
        precision = None if args.precision == "fp32" else args.precision
        protocol_text = describe(protocol, published, precision=precision)
        if sets.train is not None:
            history = train(segmenter, sets, protocol, lambda: {"mIoU": 100 * score()[0].mIoU}, args, cfg)
            source = heads.save(args, segmenter, sets.train, protocol_text, crop_size=protocol.crop_size)
        scores, rows = score(shown_images=args.shown_images)
        legend = list(zip(sets.val.classes, sets.val.palette.tolist(), strict=True))
        if len(legend) > LEGEND:
            legend = [*legend[: LEGEND - 1], (f"... {len(legend) - LEGEND + 1} more", prediction_figure.BACKGROUND)]
        metrics = as_percent(scores) | {"classes": list(sets.val.classes)}
        size = f"short side {protocol.short_side}, windows of {protocol.crop_size} pixels"
        heads.report(
            path,
            "segmentation",
            metrics,
            args,
            unit="percent",
            table=[(name, metrics[name]) for name in ("mIoU", "mAcc", "aAcc")],
            protocol=protocol_text,
            resolution=size,
            head=source,
            given_head=head_facts,
            protocol_settings=dataclasses.asdict(protocol) | {"seed": heads.SEED},
            history=history,
            sets=sets,
            started=started,
        )
        prediction_figure.write(args, ("image", "truth", "prediction", "errors: red; ignored: gray"), rows, legend)
    return None


if __name__ == "__main__":
    words = "the same command again continues from the latest checkpoint"
    sys.exit(run_command(lambda: main(ARGS), after_interrupt=words))
