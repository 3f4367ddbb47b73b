"""Figures of what a dense head predicts on a frozen backbone: classes of pixels, or their depth.

Predictions are those of the evaluations, `dinov2.eval.dense`: windows, scales and mirror images of a named protocol.

Shapes: images of H x W pixels, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dinov2.data.dense.palettes import distinct_palette, voc_palette
from dinov2.data.dense.segmentation_sets import VOC2012
from dinov2.data.dense.transforms import EvaluationInputs
from dinov2.data.images import AnyImage
from dinov2.eval.dense import depth, heads, segmentation
from dinov2.eval.dense.data import Example
from dinov2.eval.dense.prediction_figure import class_colors
from dinov2.eval.dense.protocols import DEPTH, SEGMENTATION, SegmentationProtocol
from dinov2.eval.extract.frozen_backbone import DEFAULT_SIDE, FrozenBackbone
from dinov2.eval.extract.preprocessing import input_size
from dinov2.models.dense.depther import Depther
from dinov2.models.dense.segmenter import Segmenter
from dinov2.visualization.contact_sheet import Legend, contact_sheet, heat_map, overlay
from dinov2.visualization.feature_maps import log_sizes
from dinov2.visualization.figures import SHEET_WIDTH, Figure
from dinov2.visualization.inputs import LoadedImage

SMALLEST_SHARE = 0.001  # of all pixels: classes below are drawn, but not in the legend
MAX_IN_LEGEND = 24  # classes
CLASS_OPACITY = 0.75  # of class colors over an image
SHOWN_PERCENTILES = (1, 99)  # of the depths of all images: the ends of the color scale


class Classes(NamedTuple):
    """Names and colors of the classes of a head."""

    names: Sequence[str]
    palette: np.ndarray  # (C, 3) uint8


def classes_of(head: heads.ChosenHead, names: Sequence[str] | None = None) -> Classes:
    """The classes of a segmentation head: those in its file, those of VOC2012 for its released heads, else numbers.

    Args:
        head: The head.
        names: Other names of all classes, in order.
    """
    count = head.head.num_classes
    kept, colors = head.meta.get("classes") or [], head.meta.get("colors") or []
    palette = np.array(colors, np.uint8) if len(colors) == count else distinct_palette(count)
    if not kept and "voc2012" in Path(head.described).name and count == len(VOC2012.names):
        kept, palette = VOC2012.names, voc_palette(count)
    if names is not None and len(names) != count:
        raise ValueError(f"--classes names {len(names)} classes, the head has {count}")
    return Classes(names or kept or [f"class {index}" for index in range(count)], palette)


def protocol_of(head: heads.ChosenHead, backbone: FrozenBackbone, name: str | None = None) -> SegmentationProtocol:
    """The protocol by which a segmentation head predicts: by default that of its training, with the same crop size.

    Released heads on four layers, and others that do not name theirs, have `dinov2_ms`, those on one layer `dinov2`.

    Args:
        head: The head.
        backbone: For models of small images, the default window has the size of their global crops.
        name: A key of `protocols.SEGMENTATION` in its place.
    """
    trained_by = str(head.meta.get("protocol", "")).partition(" ")[0]
    chosen = name or (trained_by if trained_by in SEGMENTATION else "dinov2" if len(head.blocks) == 1 else "dinov2_ms")
    protocol = SEGMENTATION[chosen]
    if chosen == trained_by and "crop_size" in head.meta:
        return protocol.scaled(int(head.meta["crop_size"]))
    return protocol.scaled(backbone.shorter_side) if backbone.shorter_side < DEFAULT_SIDE else protocol


class _Prepared(NamedTuple):
    """An image that is ready for prediction."""

    image: AnyImage  # at the size of the prediction
    example: Example


def segmentation_sheet(
    backbone: FrozenBackbone,
    images: Sequence[LoadedImage],
    head: heads.ChosenHead,
    *,
    protocol: SegmentationProtocol,
    keep_size: bool = False,
    names: Sequence[str] | None = None,
) -> Figure:
    """Images, and below each the predicted class of every pixel in color, with a legend of the classes found.

    The array of an image is "classes" (H, W) int16.

    Args:
        backbone: The model.
        images: Of any sizes.
        head: A segmentation head.
        protocol: Sizes of images and windows, scales and mirror images.
        keep_size: Predict images in their own size instead of resizing the short side to that of the protocol.
        names: Names of the classes in place of those of the head.
    """
    classes = classes_of(head, names)
    segmenter = Segmenter(backbone.model, head.head, blocks=head.blocks, norm=head.norm)
    segmenter = segmenter.to(backbone.model.cls_token.device).eval()
    prepare = _inputs(backbone, short_side=None if keep_size else protocol.short_side, scales=protocol.test_scales)
    shown, maps = [], []
    for each in images:
        prepared = _prepared(each, prepare)
        shown.append(prepared.image)
        predicted = segmentation.predict(segmenter, prepared.example, protocol, torch.float32)
        maps.append(predicted.cpu().numpy().astype(np.int16))
    shares = np.bincount(np.concatenate([labels.ravel() for labels in maps]), minlength=len(classes.names))
    found = [
        int(index) for index in np.argsort(-shares, kind="stable") if shares[index] >= SMALLEST_SHARE * shares.sum()
    ]
    mirrored = " and mirror images" if protocol.test_mirror else ""
    scales = f", {len(protocol.test_scales)} scales" if len(protocol.test_scales) > 1 else ""
    sheet = _sheet(
        images,
        {"image": shown, "classes": _class_maps(shown, maps, classes.palette)},
        title=f"Segmentation by {Path(head.described).name} on {backbone.name}",
        subtitle=f"Protocol {protocol.name}: windows of {protocol.crop_size} pixels{scales}{mirrored}. Classes by area"
        + (f"; the {MAX_IN_LEGEND} largest" if len(found) > MAX_IN_LEGEND else ""),
        swatches=[
            (f"{classes.names[index]}  {shares[index] / shares.sum():.1%}", classes.palette[index].tolist())
            for index in found[:MAX_IN_LEGEND]
        ],
    )
    return Figure(sheet, {"classes": maps})


def depth_sheet(
    backbone: FrozenBackbone,
    images: Sequence[LoadedImage],
    head: heads.ChosenHead,
    *,
    shorter_side: int | None = DEFAULT_SIDE,
) -> Figure:
    """Images, and below each the predicted depth of every pixel, one color scale in meters for all; near is bright.

    Depths are the mean of those of an image and of its mirror image, as published. The array of an image is "depth"
    (H, W) float32 in meters.

    Args:
        backbone: The model.
        images: Of any sizes.
        head: A depth head.
        shorter_side: Of the model inputs in pixels; None keeps the sizes of the images. Both sides are rounded to
            multiples of the patch.
    """
    depther = Depther(backbone.model, head.head, blocks=head.blocks, norm=head.norm)
    depther = depther.to(backbone.model.cls_token.device).eval()
    patch_size = backbone.model.patch_size
    sizes = [input_size(each.image.size, shorter_side, patch_size) for each in images]
    log_sizes(zip((each.image.size for each in images), sizes, strict=True), patch_size)
    shown, maps = [], []
    for each, (width, height) in zip(images, sizes, strict=True):
        prepared = _prepared(each, _inputs(backbone, size=(height, width)))
        shown.append(prepared.image)
        predicted = depth.predict(depther, prepared.example, DEPTH["dinov2"], torch.float32)
        maps.append(predicted[0].cpu().numpy())
    low, high = (float(value) for value in np.percentile(np.concatenate([d.ravel() for d in maps]), SHOWN_PERCENTILES))
    sheet = _sheet(
        images,
        {"image": shown, "depth": [heat_map(-values, -high, -low) for values in maps]},
        title=f"Depth by {Path(head.described).name} on {backbone.name}",
        subtitle="Predicted distance in meters; one scale for all images",
        legend=Legend("depth", f"{high:.2f} m or more", f"{low:.2f} m or less"),
        captions=[f"{each.name}: {d.min():.2f} to {d.max():.2f} m" for each, d in zip(images, maps, strict=True)],
    )
    return Figure(sheet, {"depth": maps})


def _class_maps(images: Sequence[AnyImage], maps: Sequence[np.ndarray], palette: np.ndarray) -> list[Image.Image]:
    """Class colors over the images in gray, so that outlines of objects and of classes can be compared."""
    colors = [Image.fromarray(class_colors(labels, palette)) for labels in maps]
    return [overlay(image, each, CLASS_OPACITY) for image, each in zip(images, colors, strict=True)]


def _inputs(backbone: FrozenBackbone, **sizes: Any) -> EvaluationInputs:
    return EvaluationInputs(mean=tuple(backbone.mean), std=tuple(backbone.std), **sizes)


def _prepared(image: LoadedImage, prepare: EvaluationInputs) -> _Prepared:
    """The inputs of an image, and as target an empty map at the size of the first of them."""
    pixels = np.array(image.image)
    size = height, width = prepare.size_at(1.0, (pixels.shape[0], pixels.shape[1]))
    inputs, _ = prepare(pixels, np.zeros(pixels.shape[:2], np.int16))
    shown = image.image.resize((width, height), Image.Resampling.BICUBIC)
    return _Prepared(shown, Example(0, pixels, inputs, torch.zeros(size)))


def _sheet(
    images: Sequence[LoadedImage], rows: Mapping[str, Sequence[AnyImage]], captions: Sequence[str] = (), **texts: Any
) -> Image.Image:
    columns = min(len(images), 4 if len(images) <= 8 else 6)
    return contact_sheet(
        rows,
        captions=captions or [image.name for image in images],
        columns=columns,
        cell=min(SHEET_WIDTH // columns, 320),
        **texts,
    )
