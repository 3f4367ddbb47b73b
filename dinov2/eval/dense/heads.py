"""Heads of the evaluations: given ones and trained ones, what identifies their training, and the report of a score."""

import argparse
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.config import Config
from dinov2.data.dense.base import DenseDataset
from dinov2.eval import setup
from dinov2.eval.dense.data import Sets
from dinov2.eval.dense.protocols import DepthProtocol, SegmentationProtocol
from dinov2.eval.dense.training import HeadRun, Layers
from dinov2.eval.features import autocast, require_finite
from dinov2.eval.file_identity import image_identity
from dinov2.eval.results import as_table, write_results
from dinov2.models.dense.dense_model import DenseModel
from dinov2.models.dense.head_files import DepthRange, read_head, save_head
from dinov2.models.dense.layers import last_blocks, spread_blocks
from dinov2.models.published import published_arch, weights_url
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

HEAD_FILE = "head.pth"
PUBLISHED_HEADS = {
    "segmentation": ("ade20k_linear", "ade20k_ms", "voc2012_linear", "voc2012_ms"),
    "depth": ("nyu_linear", "nyu_linear4", "nyu_dpt", "kitti_linear", "kitti_linear4", "kitti_dpt"),
}
"""Names of the released heads: dataset and kind, as in their files."""

HUB_RANGE: DepthRange = (0.001, 80.0)
DPT_RANGES: dict[str, DepthRange] = {"nyu": (0.001, 10.0), "kitti": (0.001, 80.0)}


class ChosenHead(NamedTuple):
    """A head, and how a backbone feeds it."""

    head: Any  # a module of `head_files.HEADS`
    blocks: tuple[int, ...]
    norm: bool
    described: str  # "trained here", or where it is from
    meta: Mapping[str, Any] = {}  # what `save` kept with it: "protocol", "classes", "colors", ...


def read(source: str, task: str, backbone: DinoVisionTransformer, bins: DepthRange | None = None) -> ChosenHead:
    """Read a head of a task ("segmentation" or "depth") from a file or URL, or a released one by its name.

    Args:
        source: A file or URL, or a member of `PUBLISHED_HEADS`.
        task: "segmentation" or "depth".
        backbone: The backbone that feeds it.
        bins: Range of the depth bins in meters; default: that of the file, for released ones that of the published hub
            code.
    """
    name = source if source in PUBLISHED_HEADS[task] else None
    if name is None and re.fullmatch(r"[a-z0-9]+_[a-z0-9]+", source) and not Path(source).exists():
        raise ValueError(f"unknown head {source!r}; known: {', '.join(PUBLISHED_HEADS[task])}, or a file or URL")
    if name is not None:
        source = _published_url(name, backbone)
    kinds = ("segmentation",) if task == "segmentation" else ("linear depth", "DPT depth")
    if task == "depth" and bins is None and _is_released(source):
        bins = DPT_RANGES["kitti" if "kitti" in Path(source).name else "nyu"] if "dpt" in source else HUB_RANGE
        if bins == HUB_RANGE and "nyu" in Path(source).name:
            logger.warning(
                "the bins of %s are decoded from 0.001 to 80 m, as in the published hub code, whatever it was trained "
                "for; --bins 0.001 10 decodes the range of NYU",
                source,
            )
    found = read_head(source, kind=kinds, embed_dim=backbone.embed_dim, depth_range=bins)
    blocks, norm = found.blocks, found.norm
    if blocks is None:
        spread = task == "depth" and found.num_layers > 1
        blocks = spread_blocks(backbone.n_blocks) if spread else last_blocks(backbone.n_blocks, found.num_layers)
    return ChosenHead(found.head, tuple(blocks), task == "segmentation" if norm is None else norm, source, found.meta)


def _published_url(name: str, backbone: DinoVisionTransformer) -> str:
    arch = published_arch(backbone)
    if arch is None or backbone.num_register_tokens:
        raise ValueError(
            f"the released head {name!r} is for released backbones, with patches of 14 pixels and without registers, "
            f"not for one of width {backbone.embed_dim} with {backbone.n_blocks} blocks, patches of "
            f"{backbone.patch_size} pixels and {backbone.num_register_tokens} registers"
        )
    return weights_url(arch, f"{name}_head", registers=False)


def _is_released(source: str) -> bool:
    return re.match(r"dinov2_vit[sblg]14_(nyu|kitti)_", Path(source).name) is not None


def frozen_features(model: DenseModel, dtype: torch.dtype, images: Tensor) -> Layers:
    """Tokens of a batch of images (B, 3, h, w) in float32, without gradient; a `ValueError` if one is not finite."""
    with torch.no_grad(), autocast(dtype):
        layers = model.features(images)
    for patches, _ in layers:
        require_finite(patches, "image {} of a training batch".format, model.backbone)
    return [(patches.float(), class_token.float()) for patches, class_token in layers]


def head_run(
    args: argparse.Namespace,
    cfg: Config,
    sets: Sets,
    protocol: SegmentationProtocol | DepthProtocol,
    *,
    best_by: str | None = None,
    **more: Any,
) -> HeadRun:
    """Where and how the head of the command line is trained; a checkpoint of other settings is refused."""
    assert sets.train is not None, "a head is trained"
    settings = asdict(protocol)
    return HeadRun(
        output_dir=Path(args.output_dir),
        resume=not args.no_resume,
        eval_period=protocol.eval_period,
        save_period=args.save_period_iterations,
        identity={
            **setup.frozen_model_facts(args, cfg),
            "precision": args.precision,
            "protocol": settings.pop("name"),
            "settings": settings,
            "training set": args.train_dataset,
            "names, sizes and times of its images": image_identity(sets.train)[:16],
            "classes": list(sets.train.classes),
            **more,
        },
        validated_on=image_identity(sets.val),
        best_by=best_by,
    )


def save(args: argparse.Namespace, model: DenseModel, dataset: DenseDataset, protocol: str, **more: Any) -> str:
    """Write the trained head to the output folder, from which `--head` and the hub read it; returns where it is.

    `more` is kept with it, too.
    """
    path = Path(args.output_dir) / HEAD_FILE
    if distributed.is_main():
        meta = {"protocol": protocol, "dataset": args.train_dataset, **more}
        meta |= {"classes": list(dataset.classes), "colors": dataset.palette.tolist()}
        save_head(path, model.decode_head, blocks=model.blocks, norm=model.norm, meta=meta)
        logger.info("head: %s", path)
    distributed.barrier()
    return f"trained here ({path})"


def report(
    path: Path,
    evaluation: str,
    metrics: Mapping[str, Any],
    args: argparse.Namespace,
    *,
    table: Sequence[tuple[str, Any]],
    unit: str,
    sets: Sets,
    started: float,
    **facts: Any,
) -> None:
    """Log a table of scores with the protocol, the resolution and the head beside them, and write the results file.

    Args:
        path, evaluation, metrics, args: See `write_results`.
        table: The scores of the table.
        unit: Unit of the scores, for the table and the file.
        sets: Data of the evaluation.
        started: When it began, by `time.monotonic()`.
        facts: Among others `protocol`, `resolution` and `head`, which are logged, too.
    """
    beside = [facts[name] for name in ("protocol", "resolution", "head")]
    names, values = zip(*table, strict=True)
    title = f"{evaluation} of {args.val_dataset}, {len(sets.val)} images, {unit}"
    logger.info("%s", as_table(title, [*names, "protocol", "resolution", "head"], [[*values, *beside]]))
    counts = {args.val_dataset: {"images": len(sets.val)}}
    if sets.train is not None:
        counts[args.train_dataset] = {"images": len(sets.train)}
    seconds = round(time.monotonic() - started, 2)
    write_results(
        path, evaluation=evaluation, unit=unit, metrics=metrics, args=args, sets=counts, seconds=seconds, **facts
    )
