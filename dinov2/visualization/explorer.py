"""A web page on which the similarity of any patch to all patches of all images is seen: one file, without network.

Besides similarity it shows the principal components of the patches, and the attention of the class token. Templates are
in the folder `templates`.

Shapes: h x w patches of an image, D feature dimension.
"""

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import dinov2
from dinov2.analysis.pca import fit_pca_colormap
from dinov2.data.images import AnyImage
from dinov2.eval.extract.frozen_backbone import DEFAULT_SIDE, FrozenBackbone
from dinov2.html_templates import template_environment
from dinov2.visualization.compact_tokens import CompactTokens, compact_tokens
from dinov2.visualization.contact_sheet import heat_map
from dinov2.visualization.feature_maps import image_attention, image_tokens
from dinov2.visualization.figures import inputs_and_features
from dinov2.visualization.inputs import LoadedImage

logger = logging.getLogger(__name__)

PAGE_BYTES, PAGE_IMAGES = 5_000_000, 24  # largest page for so many images; more images have as much each
SMALLEST_SHARE = 0.2  # of the page, for the features
TEXT_BYTES = 50_000  # of the page without its data
LONGER_SIDE, QUALITY = 480, 80  # of images on the page: largest size in pixels, quality of JPEG
PERMITTED_ERROR = 0.03  # of cosines: a warning is logged above it


class ShownImage(NamedTuple):
    """An image on the page."""

    name: str
    uri: str
    rows: int  # h
    columns: int  # w


def similarity_page(
    backbone: FrozenBackbone, images: Sequence[LoadedImage], *, shorter_side: int | None = DEFAULT_SIDE
) -> bytes:
    """The page in UTF-8; its size is at most `PAGE_BYTES` for up to `PAGE_IMAGES` images. See `pca_sheet`."""
    inputs, tokens = inputs_and_features(backbone, images, shorter_side, image_tokens)
    shown = [
        ShownImage(each.name, _data_uri(model_input), *grid.shape[:2])
        for each, model_input, grid in zip(images, inputs, tokens, strict=True)
    ]
    layers = {"pca": _text(_pca_levels(tokens)), "attention": _text(_attention_levels(backbone, inputs))}
    largest = int(PAGE_BYTES * max(1.0, len(images) / PAGE_IMAGES))
    left = largest - TEXT_BYTES - sum(map(len, layers.values())) - sum(len(each.uri) for each in shown)
    features = torch.cat([grid.flatten(0, 1) for grid in tokens])
    compact = compact_tokens(features, max_bytes=int(max(left, SMALLEST_SHARE * largest)) * 3 // 4)  # base64
    if compact.largest_error > PERMITTED_ERROR:
        logger.warning(
            "cosines on the page have errors of up to %.3f (typically %.4f), so that it is not too large: give fewer "
            "images or a smaller --size",
            *(compact.largest_error, compact.typical_error),
        )
    data = layers | {
        "grids": [[each.rows, each.columns] for each in shown],
        "features": _text(compact.packed),
        "palette": _text(np.array(heat_map(np.arange(256)[None], 0, 255)).tobytes()),
    }
    return _render(backbone, shown, data, compact, features.shape[1]).encode()


def _render(
    backbone: FrozenBackbone, shown: Sequence[ShownImage], data: dict[str, Any], compact: CompactTokens, width: int
) -> str:
    environment = template_environment("dinov2.visualization")
    return environment.get_template("explorer.html").render(
        model=backbone.name,
        images=shown,
        data=data,
        compact=compact,
        width=width,
        has_registers=backbone.model.num_register_tokens > 0,
        version=dinov2.__version__,
    )


def _pca_levels(tokens: Sequence[Tensor]) -> bytes:
    """Red, green and blue of all patches, image by image: their principal components in one basis."""
    batches = [grid[None] for grid in tokens]
    colormap = fit_pca_colormap(batches, clip=0.01)
    return b"".join((colormap(batch) * 255).round().to(torch.uint8).numpy().tobytes() for batch in batches)


def _attention_levels(backbone: FrozenBackbone, inputs: Sequence[AnyImage]) -> bytes:
    """Attention of the class token in the last block, mean of the heads; 255 is the 99th percentile of each image."""
    maps = [heads.mean(dim=0) for heads in image_attention(backbone, inputs)]
    scaled = [(values / values.quantile(0.99).clamp_min(1e-12)).clamp(0, 1) for values in maps]
    return b"".join((values * 255).round().to(torch.uint8).numpy().tobytes() for values in scaled)


def _data_uri(image: AnyImage) -> str:
    reduced, buffer = image.convert("RGB"), io.BytesIO()
    reduced.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
    reduced.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{_text(buffer.getvalue())}"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
