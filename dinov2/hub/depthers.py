"""The published depth estimators: a backbone and a linear (`_ld`) or DPT (`_dd`) head, trained on NYU or KITTI.

model = dinov2_vits14_dd(weights="KITTI")   # images (B, 3, H, W) -> depth (B, 1, H, W) in meters
model = dinov2_vits14_ld(layers=1, depth_range=DEPTH_RANGES["NYU"])

The published code decodes the bins of linear heads from 0.001 to 80 m whatever they were trained on. So does this by
default; `depth_range` gives another range.
"""

import logging
from enum import Enum
from pathlib import Path
from typing import Any

from dinov2.hub.backbones import make_backbone, weights_source
from dinov2.models.dense.depther import Depther
from dinov2.models.dense.dpt import DPTDepthHead
from dinov2.models.dense.head_files import DepthRange, is_of_another_backbone, read_head
from dinov2.models.dense.layers import last_blocks, spread_blocks
from dinov2.models.dense.linear_depth_head import LinearDepthHead
from dinov2.models.published import check_name, weights_url
from dinov2.models.weights import load_backbone

logger = logging.getLogger(__name__)

DEPTH_RANGES: dict[str, DepthRange] = {"NYU": (0.001, 10.0), "KITTI": (0.001, 80.0)}
"""Depths in meters of the datasets that the released heads were trained on."""

PUBLISHED_LINEAR_RANGE: DepthRange = (0.001, 80.0)
"""Range that the published code gives to the bins of every linear head."""

_KINDS = {"linear": "linear depth", "dpt": "DPT depth"}


class Weights(Enum):
    """Training data of the published depth heads."""

    NYU = "NYU"
    KITTI = "KITTI"


def dinov2_vits14_ld(*, layers: int = 4, **kwargs: Any) -> Depther:
    """ViT-S/14 with a linear depth head on 1 or 4 `layers`. Keywords: see `make_depther`."""
    return make_depther("vit_small", layers=layers, **kwargs)


def dinov2_vitb14_ld(*, layers: int = 4, **kwargs: Any) -> Depther:
    """ViT-B/14 with a linear depth head on 1 or 4 `layers`. Keywords: see `make_depther`."""
    return make_depther("vit_base", layers=layers, **kwargs)


def dinov2_vitl14_ld(*, layers: int = 4, **kwargs: Any) -> Depther:
    """ViT-L/14 with a linear depth head on 1 or 4 `layers`. Keywords: see `make_depther`."""
    return make_depther("vit_large", layers=layers, **kwargs)


def dinov2_vitg14_ld(*, layers: int = 4, **kwargs: Any) -> Depther:
    """ViT-g/14 with a linear depth head on 1 or 4 `layers`. Keywords: see `make_depther`."""
    return make_depther("vit_giant2", layers=layers, **kwargs)


def dinov2_vits14_dd(**kwargs: Any) -> Depther:
    """ViT-S/14 with a DPT depth head. Keywords: see `make_depther`."""
    return make_depther("vit_small", head="dpt", **kwargs)


def dinov2_vitb14_dd(**kwargs: Any) -> Depther:
    """ViT-B/14 with a DPT depth head. Keywords: see `make_depther`."""
    return make_depther("vit_base", head="dpt", **kwargs)


def dinov2_vitl14_dd(**kwargs: Any) -> Depther:
    """ViT-L/14 with a DPT depth head. Keywords: see `make_depther`."""
    return make_depther("vit_large", head="dpt", **kwargs)


def dinov2_vitg14_dd(**kwargs: Any) -> Depther:
    """ViT-g/14 with a DPT depth head. Keywords: see `make_depther`."""
    return make_depther("vit_giant2", head="dpt", **kwargs)


def make_depther(
    arch: str,
    *,
    head: str = "linear",
    layers: int = 4,
    pretrained: bool = True,
    weights: Weights | str | Path = Weights.NYU,
    depth_range: DepthRange | None = None,
    cut_padding: bool = False,
    **kwargs: Any,
) -> Depther:
    """Build one of the published depth estimators in evaluation mode, by default with all weights.

    Args:
        arch, kwargs: See `make_backbone`.
        head: `linear` or `dpt`.
        layers: Number of layers that a linear head reads, 1 or 4; DPT heads read 4.
        weights: Published weights of the head, or a file, folder or URL of others. If it has a backbone as well, that
            is loaded, too.
        depth_range: (smallest, largest) depth in meters, of the bins and for clamping. None is that of the published
            code: 0.001 to 80 for every linear head, that of the training data (`DEPTH_RANGES`) for DPT; and for a file
            of `save_head` that of its training.
        cut_padding: See `DenseModel`.
    """
    published = weights_url(arch, content_name(head, layers, weights), registers=False)
    source = weights_source(Weights, weights, published)
    if source == published:
        depth_range = depth_range or _published_range(head, weights)
    elif not pretrained:
        raise ValueError(f"weights={str(weights)!r} are not loaded with pretrained=False: leave that out")
    backbone = make_backbone(arch, pretrained=False, **kwargs)
    width, depth, norm = backbone.embed_dim, len(backbone.blocks), False
    blocks = last_blocks(depth, 1) if layers == 1 else spread_blocks(depth)
    if pretrained:
        check_name(source, arch)
        found = read_head(source, kind=_KINDS[head], embed_dim=width, depth_range=depth_range)
        if found.blocks is None and found.num_layers != layers:
            raise ValueError(f"the head in {source} reads {found.num_layers} layers, not layers={layers}")
        decode_head, blocks, norm = found.head, found.blocks or blocks, bool(found.norm)
        load_backbone(backbone, source if found.has_backbone else weights_url(arch, "pretrain", registers=False))
        if is_of_another_backbone(found, backbone):
            logger.warning("the head in %s was trained on a backbone with other weights than those of %s", source, arch)
    else:
        assert depth_range is not None, "published heads have a range"
        decode_head = _new_head(head, width, layers, depth_range)
    return Depther(backbone, decode_head, blocks=blocks, norm=norm, cut_padding=cut_padding).eval()


def content_name(head: str, layers: int, weights: Weights | str | Path) -> str:
    """The part of the name of a published file after that of the backbone: `nyu_linear4_head`."""
    if head not in _KINDS:
        raise ValueError(f"unknown depth head {head!r}; known: {', '.join(_KINDS)}")
    if layers not in (1, 4) or (head == "dpt" and layers != 4):
        raise ValueError(f"layers must be {'1 or 4' if head == 'linear' else '4 for a DPT head'}, not {layers!r}")
    dataset = weights.name if isinstance(weights, Weights) else str(weights)
    return f"{dataset.lower()}_{head}{layers if head == 'linear' and layers > 1 else ''}_head"


def _published_range(head: str, weights: Weights | str | Path) -> DepthRange:
    if head == "linear":
        return PUBLISHED_LINEAR_RANGE
    return DEPTH_RANGES[weights.name if isinstance(weights, Weights) else str(weights)]


def _new_head(head: str, width: int, layers: int, depth_range: DepthRange) -> LinearDepthHead | DPTDepthHead:
    low, high = depth_range
    if head == "linear":
        return LinearDepthHead(2 * width * layers, min_depth=low, max_depth=high)
    return DPTDepthHead(width, min_depth=low, max_depth=high)
