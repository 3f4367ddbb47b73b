"""A page about the images of a dataset: histograms of the bands, examples, duplicates, unreadable files.

One file that needs no network.
"""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import AnyImage, BadImageError, BandImage
from dinov2.data.statistics.measure import BINS, Band, Statistics
from dinov2.html_templates import template_environment

_EXAMPLES, _SPLIT, _GROUPS, _IN_GROUP, _LISTED = 24, 3, 12, 6, 50  # on the page at most
_SIDE = 160  # pixels of an example, at most
_SHOWN = ("1", "99")  # percentiles of a band that are black and white


class Example(NamedTuple):
    """An image on the page."""

    uri: str
    name: str


def write_page(dataset: ImageDataset, title: str, found: Statistics) -> str:
    """Render the page."""
    environment = template_environment("dinov2.data.statistics")
    count = min(_EXAMPLES, len(dataset))
    chosen = [position * len(dataset) // count for position in range(count)]
    edges = [_edges(band) for band in found.bands]
    examples = [example for index in chosen if (example := _example(dataset, index, edges))]
    has_own_bands = found.options.bands is not None
    split = [bands for index in chosen[: _SPLIT * has_own_bands] if (bands := _bands_of(dataset, index, edges))]
    groups = [
        [example for index in group[:_IN_GROUP] if (example := _example(dataset, index, edges))]
        for group in found.duplicates[:_GROUPS]
    ]
    return environment.get_template("statistics.html").render(
        title=title,
        found=found,
        lines=found.lines(),
        paths={band.name: _path(band) for band in found.bands},
        examples=examples,
        split=split,
        groups=groups,
        unreadable=found.unreadable[:_LISTED],
        command=" \\\n    ".join(f"'{each}'" for each in found.overrides()),
        shown=[f"band {band}" for band in found.options.shown_bands or (found.options.bands or ())[:3]],
    )


def _path(band: Band) -> str:
    """The outline of a histogram in a box of `BINS` x 40 units."""
    heights = [40 - 40 * count / max(*band.histogram, 1) for count in band.histogram]
    steps = (f"L{left} {height:.1f} L{left + 1} {height:.1f}" for left, height in enumerate(heights))
    return f"M0 40 {' '.join(steps)} L{BINS} 40 Z"


def _edges(band: Band) -> tuple[float, float]:
    """The levels that are shown black and white: percentiles of the band in all images."""
    low, high = band.value_range
    scale = 255 / max(high - low, 1e-12)
    dark, bright = ((band.percentiles[name] - low) * scale for name in _SHOWN)
    return dark, max(bright, dark + 1e-3)


def _example(dataset: ImageDataset, index: int, edges: Sequence[tuple[float, float]]) -> Example | None:
    try:
        return Example(_uri(dataset.get_image(index), edges), dataset.describe(index))
    except BadImageError:
        return None


def _bands_of(dataset: ImageDataset, index: int, edges: Sequence[tuple[float, float]]) -> list[Example]:
    """Each band of an image in gray."""
    try:
        levels = np.asarray(dataset.get_image(index), np.float32)
    except BadImageError:
        return []
    names = [f"band {band}" for band in dataset.image_options.bands or ()]
    return [
        Example(_uri(BandImage(levels[..., [number]]), edges[number : number + 1]), name)
        for number, name in enumerate(names)
    ]


def _uri(image: AnyImage, edges: Sequence[tuple[float, float]]) -> str:
    if isinstance(image, BandImage):
        low, high = np.array(edges, np.float32).T
        stretched = ((image.levels - low) * (255 / (high - low))).clip(0, 255)
        image = BandImage(stretched.astype(np.float32), image.shown)
    small, file = image.convert("RGB"), io.BytesIO()
    scale = _SIDE / max(small.size)
    if scale >= 2:
        small = small.resize((small.width * int(scale), small.height * int(scale)), Image.Resampling.NEAREST)
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
