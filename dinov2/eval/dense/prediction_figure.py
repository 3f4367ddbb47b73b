"""A figure of predictions: one row per image with the image, the truth, the prediction, and the errors."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dinov2 import distributed
from dinov2.files import atomic_write

logger = logging.getLogger(__name__)

FIGURE_FILE = "predictions.png"

LONGEST_SIDE = 320  # pixels of a panel
GAP, MARGIN, LINE = 8, 8, 16  # pixels
BACKGROUND, TEXT = (255, 255, 255), (40, 40, 40)
IGNORED_COLOR = (128, 128, 128)
WRONG, RIGHT = (214, 39, 40), (230, 230, 230)


Rows = list[tuple[str, list[np.ndarray]]]
"""Name of an image, and its panels (H, W, 3) uint8 of equal size."""


def gathered(mine: Sequence[tuple[int, str, list[np.ndarray]]]) -> Rows:
    """The rows of all processes, (index, name, panels), by index, with the last two parts of the names."""
    rows = sorted((row for part in distributed.all_gather_object(list(mine)) for row in part), key=lambda row: row[0])
    return [("/".join(Path(name).parts[-2:]), shown) for _, name, shown in rows]


def write(
    args: argparse.Namespace, titles: Sequence[str], rows: Rows, legend: Sequence[tuple[str, Sequence[int]]] = ()
) -> None:
    """Write the rows, if there are any, to `FIGURE_FILE` in the output folder, by one process; failure is a warning."""
    if rows and distributed.is_main():
        path = Path(args.output_dir) / FIGURE_FILE
        try:
            write_rows(path, titles, rows, legend)
            logger.info("figure of %d images: %s", len(rows), path)
        except OSError as error:  # for example on a full disk; the results are written already
            logger.warning("no figure of the predictions: %s", error)


def class_colors(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Class indices (H, W) -> colors (H, W, 3) uint8; labels outside the palette (C, 3), ignored ones, are gray."""
    known = (labels >= 0) & (labels < len(palette))
    colors = np.asarray(palette, np.uint8)[np.where(known, labels, 0)]
    colors[~known] = IGNORED_COLOR
    return colors


def error_colors(predicted: np.ndarray, truth: np.ndarray, ignored: int) -> np.ndarray:
    """Wrong pixels are red, right ones light, ignored ones gray: (H, W, 3) uint8."""
    colors = np.where((predicted == truth)[..., None], RIGHT, WRONG).astype(np.uint8)
    colors[truth == ignored] = IGNORED_COLOR
    return colors


def depth_colors(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depth (H, W) in meters -> (H, W, 3) uint8, from near (yellow) to far (dark blue); black where it is 0."""
    anchors = np.array([[253, 231, 37], [53, 183, 121], [49, 104, 142], [68, 1, 84]], float)  # of viridis
    place = np.clip((depth - low) / max(high - low, 1e-6), 0, 1) * (len(anchors) - 1)
    lower = np.minimum(place.astype(int), len(anchors) - 2)
    share = (place - lower)[..., None]
    colors = ((1 - share) * anchors[lower] + share * anchors[lower + 1]).round().astype(np.uint8)
    colors[depth <= 0] = 0
    return colors


def heat_colors(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Values (H, W) from 0 (white) to 1 and above (red), gray where they are not valid: (H, W, 3) uint8."""
    share = np.clip(values, 0, 1)[..., None]
    colors = ((1 - share) * np.array(BACKGROUND) + share * np.array(WRONG)).round().astype(np.uint8)
    colors[~valid] = IGNORED_COLOR
    return colors


def write_rows(
    path: Path,
    titles: Sequence[str],
    rows: Rows,
    legend: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """Write a PNG file of rows of panels.

    Args:
        path: The file, replaced atomically.
        titles: One per column.
        rows: Name of each image, and its panels (H, W, 3) uint8 of equal size.
        legend: Names and colors below the rows.
    """
    panels = [[_fit(panel) for panel in row] for _, row in rows]
    widths = [max(row[column].width for row in panels) for column in range(len(titles))]
    width = max(sum(widths) + GAP * (len(widths) - 1), 480) + 2 * MARGIN
    in_row = max(1, (width - 2 * MARGIN) // 160)
    height = 2 * MARGIN + LINE + sum(max(p.height for p in row) + LINE + GAP for row in panels)
    height += LINE * -(-len(legend) // in_row)
    page = Image.new("RGB", (width, height), BACKGROUND)
    draw, top = ImageDraw.Draw(page), MARGIN
    lefts = [MARGIN + sum(widths[:column]) + GAP * column for column in range(len(widths))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, top), title, fill=TEXT)
    top += LINE
    for (name, _), row in zip(rows, panels, strict=True):
        for left, panel in zip(lefts, row, strict=True):
            page.paste(panel, (left, top))
        top += max(panel.height for panel in row)
        draw.text((MARGIN, top), name, fill=TEXT)
        top += LINE + GAP
    for number, (name, color) in enumerate(legend):
        x, y = MARGIN + 160 * (number % in_row), top + LINE * (number // in_row)
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=tuple(color))
        draw.text((x + 16, y), name[:22], fill=TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        page.save(file, format="PNG")


def _fit(panel: np.ndarray) -> Image.Image:
    """Resize to `LONGEST_SIDE`, without interpolation."""
    image = Image.fromarray(panel)
    ratio = LONGEST_SIDE / max(image.size)
    return image.resize(
        (max(1, round(image.width * ratio)), max(1, round(image.height * ratio))), Image.Resampling.NEAREST
    )
