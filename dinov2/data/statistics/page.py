"""A page about the images of a dataset: histograms of the bands, examples, duplicates, unreadable files.

One file that needs no network.
"""

import base64
import io
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import AnyImage, BadImageError, BandImage
from dinov2.data.statistics.measure import BINS, Band, Statistics

_EXAMPLES, _SPLIT, _GROUPS, _IN_GROUP, _LISTED = 24, 3, 12, 6, 50  # on the page at most
_SIDE = 160  # pixels of an example, at most
_STRETCHED = (1, 99)  # percentiles of an image that are black and white, for bands


class Example(NamedTuple):
    """An image on the page."""

    uri: str
    name: str


def write_page(dataset: ImageDataset, title: str, found: Statistics) -> str:
    """Render the page."""
    environment = Environment(
        loader=PackageLoader("dinov2.data.statistics"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    count = min(_EXAMPLES, len(dataset))
    chosen = [position * len(dataset) // count for position in range(count)]
    examples = [example for index in chosen if (example := _example(dataset, index))]
    split = [] if found.is_rgb else [bands for index in chosen[:_SPLIT] if (bands := _bands_of(dataset, index))]
    groups = [
        [example for index in group[:_IN_GROUP] if (example := _example(dataset, index))]
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
    )


def _path(band: Band) -> str:
    """The outline of a histogram in a box of `BINS` x 40 units."""
    heights = [40 - 40 * count / max(*band.histogram, 1) for count in band.histogram]
    steps = (f"L{left} {height:.1f} L{left + 1} {height:.1f}" for left, height in enumerate(heights))
    return f"M0 40 {' '.join(steps)} L{BINS} 40 Z"


def _example(dataset: ImageDataset, index: int) -> Example | None:
    try:
        return Example(_uri(dataset.get_image(index)), dataset.describe(index))
    except BadImageError:
        return None


def _bands_of(dataset: ImageDataset, index: int) -> list[Example]:
    """Each band of an image in gray, stretched."""
    try:
        levels = np.asarray(dataset.get_image(index), np.float32)
    except BadImageError:
        return []
    names = [f"band {band}" for band in dataset.image_options.bands or ()]
    return [Example(_uri(BandImage(levels[..., [number]])), name) for number, name in enumerate(names)]


def _uri(image: AnyImage) -> str:
    if isinstance(image, BandImage):
        low, high = np.percentile(image.levels, _STRETCHED, axis=(0, 1))
        stretched = (image.levels - low) * (255 / np.maximum(high - low, 1e-6))
        image = BandImage(stretched.clip(0, 255).astype(np.float32), image.shown)
    picture, file = image.convert("RGB"), io.BytesIO()
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
