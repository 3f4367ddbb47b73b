"""Figures of frozen features: PCA, attention, patch similarity and nearest neighbors."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.analysis.pca import fit_foreground, fit_pca_colormap, to_images
from dinov2.data.images import AnyImage
from dinov2.eval.extract.frozen_backbone import DEFAULT_SIDE, FrozenBackbone
from dinov2.eval.extract.preprocessing import input_size
from dinov2.eval.features import require_finite
from dinov2.visualization.contact_sheet import Cell, Legend, contact_sheet, draw_sheet, heat_map, overlay
from dinov2.visualization.feature_maps import (
    cell_at,
    image_attention,
    image_tokens,
    log_sizes,
    parse_point,
    similarity_maps,
)
from dinov2.visualization.inputs import LoadedImage

HEADS_PER_ROW = 6
NEIGHBORS_PER_ROW = 10
SHEET_WIDTH = 1280  # approximate width of the images of a row together, in pixels


class Figure(NamedTuple):
    """A contact sheet and the numbers that it shows."""

    sheet: Image.Image
    arrays: dict[str, list[np.ndarray]]  # name -> one for each image


def pca_sheet(
    backbone: FrozenBackbone,
    images: Sequence[LoadedImage],
    *,
    shorter_side: int | None = DEFAULT_SIDE,
    shifts: int = 1,
    foreground: bool = False,
    smooth: bool = False,
) -> Figure:
    """Images, and below each the first three principal components of its patch tokens as red, green and blue.

    The arrays of an image are "tokens" (h, w, D) and "colors" (h, w, 3).

    Args:
        backbone: The model.
        images: They share one basis.
        shorter_side: Of the model inputs in pixels; None keeps the sizes of the images.
        shifts: Factor by which the grid of tokens is finer, see `feature_maps.patch_tokens`.
        foreground: Color the foreground only; the rest is black.
        smooth: Interpolate between the colors of patches.
    """
    inputs, tokens = inputs_and_features(backbone, images, shorter_side, partial(image_tokens, shifts=shifts))
    batches = [grid[None] for grid in tokens]
    colormap = fit_pca_colormap(batches, fit_foreground(batches) if foreground else None)
    colors = [colormap(batch)[0] for batch in batches]
    maps = [to_images(color[None])[0] for color in colors]
    if smooth:
        maps = [colors.resize(each.size, Image.Resampling.BICUBIC) for colors, each in zip(maps, inputs, strict=True)]
    columns = min(len(inputs), 4 if len(inputs) <= 8 else 6 if len(inputs) <= 18 else 10)
    sheet = contact_sheet(
        {"image": inputs, "PCA": maps},
        title=f"PCA of the patch features of {backbone.name}",
        subtitle=f"The first three principal components{' of the foreground' * foreground} as red, green and blue"
        + ("; one basis for all images" if len(inputs) > 1 else ""),
        captions=[image.name for image in images],
        columns=columns,
        cell=min(SHEET_WIDTH // columns, 320),
    )
    return Figure(sheet, {"tokens": [grid.numpy() for grid in tokens], "colors": [color.numpy() for color in colors]})


def attention_sheet(
    backbone: FrozenBackbone, images: Sequence[LoadedImage], *, shorter_side: int | None = DEFAULT_SIDE
) -> Figure:
    """Images, and the attention of the class token in the last block: the mean of all heads, and each head.

    The array of an image is "attention" (H, h, w). See `pca_sheet` for the arguments.
    """
    inputs, attention = inputs_and_features(backbone, images, shorter_side, image_attention)

    def cell(name: str, values: Tensor) -> Cell:
        # The brightest color is the 99th percentile: a single patch with all the attention would hide the others.
        return Cell(heat_map(values.numpy(), 0.0, float(values.quantile(0.99))), f"{name}: {values.sum():.0%}")

    rows: list[list[Cell | None]] = []
    for image, model_input, heads in zip(images, inputs, attention, strict=True):
        first = [Cell(model_input, image.name), cell("mean", heads.mean(dim=0))]
        rows += _wrap(first, [cell(f"head {n}", head) for n, head in enumerate(heads, 1)], HEADS_PER_ROW)
    sheet = draw_sheet(
        rows,
        title=f"Class token attention of {backbone.name}",
        subtitle="Attention of the class token in the last block. Percentage: attention to patches; the rest is to the "
        "class token" + (" and the registers" if backbone.model.num_register_tokens else ""),
        legend=Legend("attention", "0", "99th percentile of each map"),
        cell=160,
    )
    return Figure(sheet, {"attention": [heads.numpy() for heads in attention]})


def similarity_sheet(
    backbone: FrozenBackbone,
    images: Sequence[LoadedImage],
    points: Sequence[str],
    *,
    shorter_side: int | None = DEFAULT_SIDE,
) -> Figure:
    """Cosine similarity of the patches at some `points` of the first image to all patches; a row for each point.

    The array of an image is "similarity" (points, h, w). See `feature_maps.parse_point` and `pca_sheet`.
    """
    positions = [parse_point(point, images[0].image.size) for point in points]
    inputs, tokens = inputs_and_features(backbone, images, shorter_side, image_tokens)
    rows, columns, _ = tokens[0].shape
    maps = [similarity_maps(tokens, 0, cell_at(position, (rows, columns))) for position in positions]
    low = min(float(values.min()) for row in maps for values in row)
    cells = []
    for position, row in zip(positions, maps, strict=True):
        line = [Cell(inputs[0], images[0].name, ring=position)]
        for image, model_input, values in zip(images, inputs, row, strict=True):
            colors = overlay(model_input, heat_map(values.numpy(), low, 1.0))
            is_first = len(line) == 1
            caption = "the same image" if is_first else f"{image.name}: up to {values.max():.2f}"
            line.append(Cell(colors, caption, ring=position if is_first else _position_of_maximum(values)))
        cells.append(line)
    sheet = draw_sheet(
        cells,
        title=f"Patch similarity of {backbone.name}",
        subtitle="Cosine similarity of the patch at the ring in the leftmost image to all patches"
        + ("; in the other images, the ring is at the most similar patch" if len(images) > 1 else ""),
        legend=Legend("cosine", f"{low:.2f}", "1.00"),
        cell=min(max(SHEET_WIDTH // len(cells[0]), 160), 448),
    )
    return Figure(sheet, {"similarity": [torch.stack(parts).numpy() for parts in zip(*maps, strict=True)]})


def neighbors_sheet(
    backbone_name: str, rows: Sequence[tuple[LoadedImage, Sequence[tuple[LoadedImage, float]]]]
) -> Image.Image:
    """Images, and at the right of each its nearest neighbors with their cosine similarities."""
    cells: list[list[Cell | None]] = []
    for query, neighbors in rows:
        found = [Cell(neighbor.image, f"{cosine:.3f}  {neighbor.name}") for neighbor, cosine in neighbors]
        cells += _wrap([Cell(query.image, query.name)], found, NEIGHBORS_PER_ROW)
    columns = max(map(len, cells))
    wrapped = len(cells) > len(rows)
    return draw_sheet(
        cells,
        title=f"Nearest neighbors by {backbone_name}",
        subtitle="Cosine similarity of class tokens" + "; in decreasing order, row by row" * wrapped,
        headings=["query", *([] if wrapped else [f"{rank}." for rank in range(1, columns)])],
        cell=min(max(SHEET_WIDTH // columns, 160), 256),
    )


def _wrap(first: Sequence[Cell], cells: Sequence[Cell], count: int) -> list[list[Cell | None]]:
    """Rows of at most `count` cells, with `first` at the left of the first of them."""
    rows: list[list[Cell | None]] = [[*first, *cells[:count]]]
    return rows + [[*[None] * len(first), *cells[at : at + count]] for at in range(count, len(cells), count)]


def inputs_and_features(
    backbone: FrozenBackbone,
    images: Sequence[LoadedImage],
    shorter_side: int | None,
    compute: Callable[[FrozenBackbone, Sequence[AnyImage]], list[Tensor]],
) -> tuple[list[AnyImage], list[Tensor]]:
    """The images at the sizes of model inputs, and their features, which must be finite."""
    patch_size = backbone.model.patch_size
    sizes = [(each.image.size, input_size(each.image.size, shorter_side, patch_size)) for each in images]
    log_sizes(sizes, patch_size)
    inputs = [
        each.image.resize(after, Image.Resampling.BICUBIC) for each, (_, after) in zip(images, sizes, strict=True)
    ]
    features = compute(backbone, inputs)
    largest = torch.stack([values.abs().amax() for values in features])[:, None]  # keeps NaN and infinity
    require_finite(largest, [each.path for each in images].__getitem__, backbone.model)
    return inputs, features


def _position_of_maximum(values: Tensor) -> tuple[float, float]:
    """Center of the patch with the largest value of a map (h, w), as fractions (x, y)."""
    rows, columns = values.shape
    row, column = divmod(int(values.argmax()), columns)
    return (column + 0.5) / columns, (row + 0.5) / rows
