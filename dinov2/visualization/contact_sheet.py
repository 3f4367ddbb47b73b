"""Contact sheets: images with captions in rows, and heat maps.

Feature maps are small: they are enlarged so that each patch is a rectangle. Photographs are reduced with antialiasing.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dinov2.data.images import AnyImage

MARGIN, GAP = 20, 6  # pixels around the sheet, and between images
BLACK, GRAY = "#1a1a1a", "#666666"
TITLE, SUBTITLE, TEXT = 22, 15, 14  # font sizes in pixels

# Every 16th color of matplotlib's magma (CC0): lightness increases evenly, so that it can be printed in gray.
_MAGMA = (
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 d0416f e75263 f56b5c fc8961 fea772 fec488 fde2a3 "
    "fcfdbf"
)


class Cell(NamedTuple):
    """An image on a sheet, and the caption below it."""

    image: AnyImage
    caption: str = ""
    align_top: bool = False  # where the image is in a row of taller images: at the top, or at the bottom
    ring: tuple[float, float] | None = None  # center of a ring, as fractions (x, y) of width and height


class Legend(NamedTuple):
    """The color scale of heat maps."""

    name: str
    low: str  # label of the darkest color
    high: str  # label of the brightest color


# --- Images ----------------------------------------------------------------------------------------------------------


def heat_map(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Map numbers (h, w) to colors from black (`low`) to bright (`high`): an image of w x h pixels."""
    stops = np.array([list(bytes.fromhex(stop)) for stop in _MAGMA.split()])
    position = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(stops) - 1)
    channels = [np.interp(position, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def overlay(image: AnyImage, colors: Image.Image, opacity: float = 0.65) -> Image.Image:
    """Blend patch colors over a photograph in gray, at the size of the photograph."""
    return Image.blend(image.convert("L").convert("RGB"), enlarge(colors, image.size), opacity)


def enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarge an image to (width, height): its pixels become rectangles of equal size."""
    width, height = size
    return image.resize((4 * width, 4 * height), Image.Resampling.NEAREST).reduce(4)  # edges are antialiased


def draw_ring(image: Image.Image, center: tuple[float, float]) -> Image.Image:
    """A copy of an image with a ring around a point (x, y) in pixels, visible on any color."""
    result = image.copy()
    draw, stroke = ImageDraw.Draw(result), max(round(min(image.size) / 112), 2)
    for color, radius, width in (("black", 5 * stroke, 3 * stroke), ("white", 4 * stroke, stroke)):
        box = [center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius]
        draw.ellipse(box, outline=color, width=width)
    return result


# --- Sheets ----------------------------------------------------------------------------------------------------------


def draw_sheet(
    rows: Sequence[Sequence[Cell | None]],
    *,
    title: str = "",
    subtitle: str = "",
    headings: Sequence[str] = (),
    labels: Sequence[str] = (),
    legend: Legend | None = None,
    swatches: Sequence[tuple[str, Sequence[int]]] = (),
    cell: int = 192,
) -> Image.Image:
    """Draw rows of images.

    Args:
        rows: Cells from left to right; None leaves a cell empty. A row is as high as its highest image.
        title, subtitle: Lines at the top.
        headings: One for each column.
        labels: One for each row, at its left.
        legend: Color scale below the subtitle.
        swatches: Names and colors (red, green, blue) of classes, below the subtitle in lines as wide as the rows.
        cell: Longer side of every image on the sheet in pixels.
    """
    bands = [_text_line(title, TITLE)] if title else []
    bands += [_text_line(line, SUBTITLE, GRAY) for line in subtitle.splitlines()]
    if legend:
        scale = heat_map(np.arange(160)[None], 0, 159).resize((160, TEXT))
        bands.append(_join([_text_line(f"{legend.name}    {legend.low}   "), scale, _text_line(f"   {legend.high}")]))
    if swatches:
        bands += _swatch_lines(swatches, max(max(map(len, rows)) * (cell + GAP), 4 * cell))
    if bands:
        bands.append(Image.new("RGB", (1, 2 * GAP), "white"))
    label_width = max((math.ceil(_font(TEXT).getlength(label)) + 2 * GAP for label in labels if label), default=0)
    if headings:
        boxes = [_text_box(_shorten(text, cell), (cell + GAP, TEXT + GAP), (cell // 2, TEXT)) for text in headings]
        bands.append(_join([Image.new("RGB", (label_width, 1), "white"), *boxes]))
    for row, label in zip(rows, [*labels, *[""] * (len(rows) - len(labels))], strict=True):
        images = [_fit(item, cell) if item else None for item in row]
        height = max((image.height for image in images if image), default=0)
        box_height = height + GAP + (TEXT + GAP if any(item and item.caption for item in row) else 0)
        boxes = [_draw_cell(*each, height, (cell + GAP, box_height)) for each in zip(row, images, strict=True)]
        label_box = _text_box(label, (label_width, box_height), (label_width - 2 * GAP, height // 2), "rm")
        bands.append(_join([label_box, *boxes]))
    # Every band and every cell ends with a gap.
    return ImageOps.expand(_join(bands, vertical=True), (MARGIN, MARGIN, MARGIN - GAP, MARGIN - GAP), "white")


def contact_sheet(
    rows: Mapping[str, Sequence[AnyImage]],
    *,
    captions: Sequence[str] = (),
    columns: int = 10,
    cell: int = 112,
    **texts: Any,
) -> Image.Image:
    """Draw several versions of n images below one another.

    Args:
        rows: Label -> n images. After `columns` images all rows start again below.
        captions: One for each of the n images.
        columns: Number of images in a row.
        cell: Longer side of an image on the sheet in pixels; multiples of the size of feature maps are sharpest.
        **texts: title, subtitle, headings, legend and swatches, see `draw_sheet`.
    """
    *_, last = rows
    cells: list[list[Cell | None]] = []
    labels = []
    for start in range(0, len(rows[last]), columns):
        for label, images in rows.items():
            # Versions of one image touch, whatever its proportions: the last row is aligned at the top.
            lines = captions if captions and label == last else [""] * len(images)
            pairs = list(zip(images, lines, strict=True))[start : start + columns]
            cells.append([Cell(image, caption, align_top=label == last) for image, caption in pairs])
            labels.append(label)
    return draw_sheet(cells, labels=labels, cell=cell, **texts)


def _draw_cell(item: Cell | None, image: Image.Image | None, height: int, size: tuple[int, int]) -> Image.Image:
    """A box (width, height) with an image in the first `height` pixels, and its caption below it."""
    if item is None or image is None:
        return Image.new("RGB", size, "white")
    width = size[0] - GAP
    bottom = image.height if item.align_top else height
    box = _text_box(_shorten(item.caption, width - GAP), size, (width // 2, bottom + TEXT), color=GRAY)
    box.paste(image, ((width - image.width) // 2, bottom - image.height))
    return box


def _fit(item: Cell, side: int) -> Image.Image:
    """The image of a cell with a longer side of `side` pixels, and its ring if it has one."""
    image = item.image if isinstance(item.image, Image.Image) else item.image.convert("RGB")
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = enlarge(image, size) if scale >= 1 else image.resize(size, Image.Resampling.LANCZOS)
    return draw_ring(image, (item.ring[0] * image.width, item.ring[1] * image.height)) if item.ring else image


def _join(parts: Sequence[Image.Image], *, vertical: bool = False) -> Image.Image:
    """Paste images below one another, aligned at the left, or side by side, centered vertically."""
    widths, heights = zip(*(part.size for part in parts), strict=True)
    size = (max(widths), sum(heights)) if vertical else (sum(widths), max(heights))
    joined, offset = Image.new("RGB", size, "white"), 0
    for part in parts:
        joined.paste(part, (0, offset) if vertical else (offset, (size[1] - part.height) // 2))
        offset += part.height if vertical else part.width
    return joined


def _swatch_lines(swatches: Sequence[tuple[str, Sequence[int]]], width: int) -> list[Image.Image]:
    """Lines of squares in the colors of classes, each before its name, at most `width` pixels wide if they can be."""
    lines: list[list[Image.Image]] = []
    for name, color in swatches:
        square = ImageOps.expand(Image.new("RGB", (TEXT, TEXT), tuple(color)), 1, GRAY)
        entry = _join([square, _text_line(f"  {name}     ")])
        if not lines or sum(each.width for each in lines[-1]) + entry.width > width:
            lines.append([])
        lines[-1].append(entry)
    return [_join(line) for line in lines]


def _text_line(text: str, font_size: int = TEXT, color: str = BLACK) -> Image.Image:
    size = (math.ceil(_font(font_size).getlength(text)), font_size + GAP)
    return _text_box(text, size, (0, font_size), "ls", font_size, color)


def _text_box(
    text: str, size: tuple[int, int], at: tuple[int, int], anchor: str = "ms", font_size: int = TEXT, color: str = BLACK
) -> Image.Image:
    """A white box (width, height) with a text at a position, which is that of its anchor (as in Pillow)."""
    box = Image.new("RGB", size, "white")
    ImageDraw.Draw(box).text(at, text, color, _font(font_size), anchor=anchor)
    return box


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, width: int) -> str:
    """Replace the middle of a text by an ellipsis if it is wider: file names often differ in their ends."""
    font, kept, short = _font(TEXT), len(text), text
    while kept > 2 and font.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
    return short
