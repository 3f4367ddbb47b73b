"""Drawing: images with captions on a sheet, and numbers as colors.

Feature maps are small; enlarged, each of their patches is a square. Photographs are shrunk smoothly.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP = 20, 6  # pixels around the sheet, and between images
INK, QUIET = "#1a1a1a", "#666666"
TITLE, SUBTITLE, TEXT = 22, 15, 14  # font sizes

# Magma, a map of matplotlib (public domain, CC0) whose lightness grows evenly, so that it also reads in gray.
_MAGMA = (
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 d0416f e75263 f56b5c fc8961 fea772 fec488 fde2a3 "
    "fcfdbf"
)


class Cell(NamedTuple):
    """An image on a sheet, and a line below it."""

    image: Image.Image
    caption: str = ""
    at_top: bool = False  # whether it hangs from the top of its row or stands on the bottom, if others are higher
    ring: tuple[float, float] | None = None  # what to point out, as fractions (x, y) of its width and height


class Legend(NamedTuple):
    """What the colors of a heat map mean."""

    name: str
    low: str  # what the darkest color stands for
    high: str  # and the brightest


# --- Heat maps -------------------------------------------------------------------------------------------------------


def heat_map(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Numbers (h, w) as colors from black for `low` to bright for `high`: an image of w x h pixels."""
    stops = np.array([list(bytes.fromhex(stop)) for stop in _MAGMA.split()])
    position = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(stops) - 1)
    channels = [np.interp(position, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def overlay(image: Image.Image, colors: Image.Image, strength: float = 0.65) -> Image.Image:
    """A small image of patches over a photograph in gray, in the size of the photograph."""
    gray = image.convert("L").convert("RGB")
    return Image.blend(gray, enlarged(colors, image.size), strength)


def enlarged(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image at a larger size (width, height), its pixels as rectangles with true proportions."""
    width, height = size
    return image.resize((4 * width, 4 * height), Image.Resampling.NEAREST).reduce(4)  # borders blend between pixels


def mark(image: Image.Image, center: tuple[float, float]) -> Image.Image:
    """A copy of an image with a ring around a point (x, y) in pixels, to be seen on any color."""
    marked = image.copy()
    draw, stroke = ImageDraw.Draw(marked), max(round(min(image.size) / 112), 2)
    for color, radius, width in (("black", 5 * stroke, 3 * stroke), ("white", 4 * stroke, stroke)):
        box = [center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius]
        draw.ellipse(box, outline=color, width=width)
    return marked


# --- Sheets ----------------------------------------------------------------------------------------------------------


def draw_sheet(
    rows: Sequence[Sequence[Cell | None]],
    *,
    title: str = "",
    subtitle: str = "",
    headings: Sequence[str] = (),
    labels: Sequence[str] = (),
    legend: Legend | None = None,
    cell: int = 192,
) -> Image.Image:
    """Rows of images below one another.

    Args:
        rows: each from left to right; None leaves a place empty. Each row is as high as its highest image.
        title: the first line.
        subtitle: the lines below it.
        headings: one for each column.
        labels: one for each row, at its left.
        legend: drawn below the subtitle.
        cell: longer side of every image on the sheet in pixels.
    """
    parts = [_draw_head(title, subtitle, legend)] if title or subtitle or legend else []
    parts.append(_draw_rows(rows, headings, labels, cell))
    height = sum(part.height for part in parts) + 2 * GAP * (len(parts) - 1)
    sheet = Image.new("RGB", (max(part.width for part in parts) + 2 * MARGIN, height + 2 * MARGIN), "white")
    y = MARGIN
    for part in parts:
        sheet.paste(part, (MARGIN, y))
        y += part.height + 2 * GAP
    return sheet


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]],
    *,
    title: str = "",
    subtitle: str = "",
    headings: Sequence[str] = (),
    captions: Sequence[str] = (),
    columns: int = 10,
    cell: int = 112,
) -> Image.Image:
    """Rows of images below one another, images of one image in one column.

    Args:
        rows: label -> one image for each of n images; after `columns` images all rows start again below.
        title, subtitle: the first lines.
        headings: one for each column.
        captions: one for each image.
        columns: images beside one another.
        cell: longer side of an image on the sheet in pixels; whole multiples of the images' look best.
    """
    num_images = len(next(iter(rows.values())))
    cells, labels = [], []
    for start in range(0, num_images, columns):
        for number, (label, images) in enumerate(rows.items()):
            is_last = number == len(rows) - 1
            texts = captions[start : start + columns] if is_last else ()
            band = images[start : start + columns]
            # The last row hangs, the one above stands: what belongs together touches, whatever its proportions.
            cells.append([Cell(image, "".join(texts[i : i + 1]), is_last) for i, image in enumerate(band)])
            labels.append(label)
    return draw_sheet(cells, title=title, subtitle=subtitle, headings=headings, labels=labels, cell=cell)


def _draw_head(title: str, subtitle: str, legend: Legend | None) -> Image.Image:
    """Title, subtitle and legend below one another."""
    lines = [(title, TITLE, INK)] if title else []
    lines += [(line, SUBTITLE, QUIET) for line in subtitle.splitlines()]
    width = max([round(_font(size).getlength(text)) for text, size, _ in lines] + [600 if legend else 0])
    height = sum(size + GAP for _, size, _ in lines) + (TEXT + 2 * GAP if legend else 0)
    head = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(head), 0
    for text, size, ink in lines:
        draw.text((0, y + size), text, ink, _font(size), anchor="ls")
        y += size + GAP
    if legend:
        x, middle = 0, y + GAP + TEXT // 2
        for text in (legend.name, legend.low):
            draw.text((x, middle), text, INK, _font(TEXT), anchor="lm")
            x += round(_font(TEXT).getlength(text)) + 2 * GAP
        head.paste(heat_map(np.arange(160)[None], 0, 159).resize((160, TEXT)), (x, middle - TEXT // 2))
        draw.text((x + 160 + 2 * GAP, middle), legend.high, INK, _font(TEXT), anchor="lm")
    return head


def _draw_rows(
    rows: Sequence[Sequence[Cell | None]], headings: Sequence[str], labels: Sequence[str], cell: int
) -> Image.Image:
    """The images with what is written beside them."""
    images = [[None if item is None else _drawn(item, cell) for item in row] for row in rows]
    heights = [max((image.height for image in row if image), default=0) for row in images]
    captions = [TEXT + GAP if any(item and item.caption for item in row) else 0 for row in rows]
    left = max((round(_font(TEXT).getlength(label)) + 2 * GAP for label in labels if label), default=0)
    top = TEXT + GAP if headings else 0
    width = left + max(map(len, rows)) * (cell + GAP) - GAP
    body = Image.new("RGB", (width, top + sum(heights) + sum(captions) + GAP * (len(rows) - 1)), "white")
    draw = ImageDraw.Draw(body)
    for column, heading in enumerate(headings):
        center = left + column * (cell + GAP) + cell // 2
        draw.text((center, TEXT), _shortened(heading, cell), INK, _font(TEXT), anchor="ms")
    y = top
    for index, row in enumerate(rows):
        if index < len(labels):
            draw.text((left - 2 * GAP, y + heights[index] // 2), labels[index], INK, _font(TEXT), anchor="rm")
        for column, (item, image) in enumerate(zip(row, images[index], strict=True)):
            if item is None or image is None:
                continue
            x = left + column * (cell + GAP)
            bottom = y + (image.height if item.at_top else heights[index])
            body.paste(image, (x + (cell - image.width) // 2, bottom - image.height))
            caption = _shortened(item.caption, cell - GAP)
            draw.text((x + cell // 2, bottom + TEXT), caption, QUIET, _font(TEXT), anchor="ms")
        y += heights[index] + captions[index] + GAP
    return body


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _drawn(item: Cell, cell: int) -> Image.Image:
    """The image of a cell as it is on the sheet, with its ring if it has one."""
    image = _fitted(item.image, cell)
    return mark(image, (item.ring[0] * image.width, item.ring[1] * image.height)) if item.ring else image


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """An image whose longer side is `cell`."""
    scale = cell / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return enlarged(image, size) if scale >= 1 else image.resize(size, Image.Resampling.LANCZOS)


def _shortened(text: str, width: int) -> str:
    """A text that fits, without its middle if it is too long: the ends of file names tell them apart."""
    font = _font(TEXT)
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and font.getlength(f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}") > width:
        kept -= 1
    return f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
