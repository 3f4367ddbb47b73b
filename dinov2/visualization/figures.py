"""The four loaded of features, from a backbone and images to a sheet: components, attention, similarity, neighbors.

backbone = FrozenBackbone(model, "my model")
loaded = list(load_images(list_inputs(["holiday/*.jpg"])))
pca_sheet(backbone, loaded).sheet.save("pca.png")
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.analysis.pca import fit_foreground, fit_pca_colormap, to_images
from dinov2.eval.features import require_finite
from dinov2.visualization.contact_sheet import Cell, Legend, contact_sheet, draw_sheet, heat_map, overlay
from dinov2.visualization.feature_maps import (
    cell_at,
    image_attention,
    image_tokens,
    locate,
    log_sizes,
    resized,
    similarity_maps,
)
from dinov2.visualization.frozen_backbone import LARGE_SIZE, FrozenBackbone
from dinov2.visualization.inputs import LoadedImage

HEADS_PER_LINE = 6
NEIGHBORS_PER_LINE = 10
SHEET_WIDTH = 1280  # pixels, about, that loaded are spread over


class Drawn(NamedTuple):
    """A sheet, and the numbers behind it."""

    sheet: Image.Image
    arrays: dict[str, list[np.ndarray]]  # what -> one array for each image


def pca_sheet(
    backbone: FrozenBackbone,
    loaded: Sequence[LoadedImage],
    *,
    shorter_side: int | None = LARGE_SIZE,
    shifts: int = 1,
    foreground: bool = False,
    smooth: bool = False,
) -> Drawn:
    """Images, and below each the first three principal components of its patch features as red, green and blue.

    Args:
        shorter_side: of the images that the model sees, in pixels; None: as they are.
        shifts: see `feature_maps.patch_tokens`.
        foreground: color what stands out, the rest is black.
        smooth: blend the colors of neighboring patches.
    """
    images = _seen(backbone, loaded, shorter_side)
    tokens = image_tokens(backbone, images, shifts=shifts)
    _require_finite(tokens, loaded, backbone)
    batches = [grid[None] for grid in tokens]
    colormap = fit_pca_colormap(batches, fit_foreground(batches) if foreground else None)
    colors = [colormap(batch) for batch in batches]
    maps = [to_images(color)[0] for color in colors]
    if smooth:
        maps = [drawn.resize(image.size, Image.Resampling.BICUBIC) for drawn, image in zip(maps, images, strict=True)]
    columns = min(len(images), 4 if len(images) <= 8 else 6 if len(images) <= 18 else 10)
    sheet = contact_sheet(
        {"image": images, "PCA": maps},
        title=f"What {backbone.name} sees",
        subtitle=f"The first three principal components of the patch features{' of the foreground' * foreground} as "
        "red, green and blue" + ("; one basis for all images" if len(images) > 1 else ""),
        captions=[item.name for item in loaded],
        columns=columns,
        cell=min(SHEET_WIDTH // columns, 320),
    )
    return Drawn(sheet, {"tokens": _arrays(tokens), "colors": [color[0].numpy() for color in colors]})


def attention_sheet(
    backbone: FrozenBackbone, loaded: Sequence[LoadedImage], *, shorter_side: int | None = LARGE_SIZE
) -> Drawn:
    """Images, and where the class token looks in the last block: the mean of all heads, and each head."""
    images = _seen(backbone, loaded, shorter_side)
    attention = image_attention(backbone, images)
    _require_finite(attention, loaded, backbone)
    lines: list[list[Cell | None]] = []
    for item, image, heads in zip(loaded, images, attention, strict=True):
        named = [Cell(_attention_map(head), f"head {n}: {head.sum():.0%}") for n, head in enumerate(heads, start=1)]
        mean = heads.mean(dim=0)
        first: list[Cell | None] = [Cell(image, item.name), Cell(_attention_map(mean), f"mean: {mean.sum():.0%}")]
        for start in range(0, len(named), HEADS_PER_LINE):
            lines.append([*(first if start == 0 else [None, None]), *named[start : start + HEADS_PER_LINE]])
    sheet = draw_sheet(
        lines,
        title=f"Where the class token of {backbone.name} looks",
        subtitle="Attention of the class token in the last block. Percent: what goes to patches; the rest goes to the "
        "class token" + (" and the registers" if backbone.model.num_register_tokens else ""),
        legend=Legend("attention", "0", "99th percentile of each item"),
        cell=160,
    )
    return Drawn(sheet, {"attention": _arrays(attention)})


def similarity_sheet(
    backbone: FrozenBackbone,
    loaded: Sequence[LoadedImage],
    points: Sequence[str],
    *,
    shorter_side: int | None = LARGE_SIZE,
) -> Drawn:
    """How similar every patch is to the one at a point of the first image; a row for each point.

    Args:
        points: see `feature_maps.locate`.
    """
    places = [locate(point, loaded[0].image.size) for point in points]
    images = _seen(backbone, loaded, shorter_side)
    tokens = image_tokens(backbone, images)
    _require_finite(tokens, loaded, backbone)
    maps = [similarity_maps(tokens, 0, cell_at(place, (tokens[0].shape[0], tokens[0].shape[1]))) for place in places]
    low = min(float(values.min()) for row in maps for values in row)
    lines = []
    for place, row in zip(places, maps, strict=True):
        cells = [Cell(images[0], loaded[0].name, ring=place)]
        for index, (item, image, values) in enumerate(zip(loaded, images, row, strict=True)):
            drawn = overlay(image, heat_map(values.numpy(), low, 1.0))
            caption = f"{item.name}: up to {values.max():.2f}" if index else "the same image"
            cells.append(Cell(drawn, caption, ring=place if index == 0 else _center_of_largest(values)))
        lines.append(cells)
    sheet = draw_sheet(
        lines,
        title=f"What {backbone.name} finds alike",
        subtitle="Cosine similarity of the patch at the ring, left, to every patch"
        + ("; in the other images the ring is at the most similar one" if len(images) > 1 else ""),
        legend=Legend("cosine", f"{low:.2f}", "1.00"),
        cell=min(max(SHEET_WIDTH // len(lines[0]), 160), 448),
    )
    return Drawn(sheet, {"similarity": [torch.stack(parts).numpy() for parts in zip(*maps, strict=True)]})


def neighbors_sheet(
    backbone_name: str, rows: Sequence[tuple[LoadedImage, Sequence[tuple[LoadedImage, float]]]]
) -> Image.Image:
    """Images, and at the right of each its nearest neighbors with their cosine similarities."""
    lines: list[list[Cell | None]] = []
    for query, near in rows:
        cells = [Cell(found.image, f"{cosine:.3f}  {found.name}") for found, cosine in near]
        lines.append([Cell(query.image, query.name), *cells[:NEIGHBORS_PER_LINE]])
        for start in range(NEIGHBORS_PER_LINE, len(cells), NEIGHBORS_PER_LINE):
            lines.append([None, *cells[start : start + NEIGHBORS_PER_LINE]])
    columns = max(map(len, lines))
    wrapped = len(lines) > len(rows)
    return draw_sheet(
        lines,
        title=f"Nearest neighbors in the eyes of {backbone_name}",
        subtitle="Cosine similarity of class tokens" + "; the nearest first, line by line" * wrapped,
        headings=["query", *([] if wrapped else [f"{rank}." for rank in range(1, columns)])],
        cell=min(max(SHEET_WIDTH // columns, 160), 256),
    )


def _seen(backbone: FrozenBackbone, loaded: Sequence[LoadedImage], shorter_side: int | None) -> list[Image.Image]:
    """The loaded at the sizes at which the model looks at them."""
    patch_size = backbone.model.patch_size
    images = [resized(item.image, shorter_side, patch_size) for item in loaded]
    log_sizes([(item.image.size, image.size) for item, image in zip(loaded, images, strict=True)], patch_size)
    return images


def _require_finite(features: Sequence[Tensor], loaded: Sequence[LoadedImage], backbone: FrozenBackbone) -> None:
    """Refuse features (...) of each image that are not finite, see `require_finite`."""
    largest = torch.stack([values.abs().amax() for values in features])[:, None]  # NaN and inf come through
    require_finite(largest, [item.path for item in loaded].__getitem__, backbone.model)


def _attention_map(values: Tensor) -> Image.Image:
    """Brightest is the 99th percentile: a single patch that draws all attention leaves the others visible."""
    return heat_map(values.numpy(), 0.0, float(values.flatten().quantile(0.99)))


def _center_of_largest(values: Tensor) -> tuple[float, float]:
    """The middle of the patch with the largest value of a map (h, w), as fractions (x, y) of the item."""
    rows, columns = values.shape
    row, column = divmod(int(values.argmax()), columns)
    return (column + 0.5) / columns, (row + 0.5) / rows


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]
