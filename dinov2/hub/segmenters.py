"""The published linear segmentation heads on their backbones, trained on ADE20K or VOC2012.

model = dinov2_vits14_seg(weights="VOC2012", head="ms")   # images (B, 3, H, W) -> logits (B, 21, H, W)

The release has files of these heads, but no entry points for them. How images are scaled and divided into windows to
obtain the published scores is a matter of the evaluation.
"""

import logging
from enum import Enum
from pathlib import Path
from typing import Any

from dinov2.hub.backbones import make_backbone, weights_source
from dinov2.models.dense.head_files import HeadFile, is_of_another_backbone, read_head
from dinov2.models.dense.layers import last_blocks
from dinov2.models.dense.segmentation_head import SegmentationHead
from dinov2.models.dense.segmenter import Segmenter
from dinov2.models.published import check_name, weights_url
from dinov2.models.weights import load_backbone

logger = logging.getLogger(__name__)

NUM_CLASSES = {"ADE20K": 150, "VOC2012": 21}
"""Classes of the published heads. VOC2012 includes the background, class 0; ADE20K does not, class 0 is its label 1."""

NUM_LAYERS = {"linear": 1, "ms": 4}
"""Number of last blocks that the published heads read, all after the final norm."""


class Weights(Enum):
    """Training data of the published segmentation heads."""

    ADE20K = "ADE20K"
    VOC2012 = "VOC2012"


def dinov2_vits14_seg(**kwargs: Any) -> Segmenter:
    """ViT-S/14 with a linear segmentation head. Keywords: see `make_segmenter`."""
    return make_segmenter("vit_small", **kwargs)


def dinov2_vitb14_seg(**kwargs: Any) -> Segmenter:
    """ViT-B/14 with a linear segmentation head. Keywords: see `make_segmenter`."""
    return make_segmenter("vit_base", **kwargs)


def dinov2_vitl14_seg(**kwargs: Any) -> Segmenter:
    """ViT-L/14 with a linear segmentation head. Keywords: see `make_segmenter`."""
    return make_segmenter("vit_large", **kwargs)


def dinov2_vitg14_seg(**kwargs: Any) -> Segmenter:
    """ViT-g/14 with a linear segmentation head. Keywords: see `make_segmenter`."""
    return make_segmenter("vit_giant2", **kwargs)


def make_segmenter(
    arch: str,
    *,
    head: str = "linear",
    pretrained: bool = True,
    weights: Weights | str | Path = Weights.ADE20K,
    cut_padding: bool = False,
    **kwargs: Any,
) -> Segmenter:
    """Build a segmenter in evaluation mode, by default with the published weights of the backbone and of the head.

    Args:
        arch, kwargs: See `make_backbone`.
        head: `linear` for the last block, or `ms` for the last four (the multi-scale protocol).
        weights: Published weights of the head, or a file, folder or URL of others, from which the number of classes is
            inferred. If it has a backbone as well, that is loaded, too.
        cut_padding: See `DenseModel`.
    """
    if head not in NUM_LAYERS:
        raise ValueError(f"unknown segmentation head {head!r}; known: {', '.join(NUM_LAYERS)}")
    dataset = weights.name if isinstance(weights, Weights) else str(weights)
    published = weights_url(arch, f"{dataset.lower()}_{head}_head", registers=False)
    source = weights_source(Weights, weights, published)
    if not pretrained and source != published:
        raise ValueError(f"weights={str(weights)!r} are not loaded with pretrained=False: leave that out")
    backbone = make_backbone(arch, pretrained=False, **kwargs)
    width, num_layers, norm = backbone.embed_dim, NUM_LAYERS[head], True
    blocks = last_blocks(len(backbone.blocks), num_layers)
    if pretrained:
        check_name(source, arch)
        found = read_head(source, kind="segmentation", embed_dim=width)
        _check(found, source, head, dataset if source == published else None)
        decode_head, blocks = found.head, found.blocks or blocks
        norm = norm if found.norm is None else found.norm
        load_backbone(backbone, source if found.has_backbone else weights_url(arch, "pretrain", registers=False))
        if is_of_another_backbone(found, backbone):
            logger.warning("the head in %s was trained on a backbone with other weights than those of %s", source, arch)
    else:
        decode_head = SegmentationHead(width * num_layers, NUM_CLASSES[dataset])
    return Segmenter(backbone, decode_head, blocks=blocks, norm=norm, cut_padding=cut_padding).eval()


def _check(found: HeadFile, source: str | Path, head: str, dataset: str | None) -> None:
    """Raise a ValueError unless a file holds the kind of head that was asked for, and the classes of its dataset."""
    if found.blocks is None and found.num_layers != NUM_LAYERS[head]:
        kinds = {count: kind for kind, count in NUM_LAYERS.items()}
        raise ValueError(
            f"{source} holds the head {kinds[found.num_layers]!r}, on {found.num_layers} layers, not {head!r}"
        )
    if dataset is not None and found.head.num_classes != NUM_CLASSES[dataset]:
        raise ValueError(f"{source} has {found.head.num_classes} classes, {dataset} has {NUM_CLASSES[dataset]}")
