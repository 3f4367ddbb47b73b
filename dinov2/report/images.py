"""The teacher's patch features of the same images over training, as colors.

Shapes: n images, h x w patches, D feature width.
"""

import base64
import io
import logging
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.analysis.pca import pca_colors, to_images
from dinov2.files import read_array
from dinov2.report.run import Run

logger = logging.getLogger(__name__)

MAX_IMAGES = 8
MAX_STEPS = 8
MAX_SIDE = 128  # pixels
SMALL_SIDE = 64  # pixels; up to here PNG, which is lossless, is small enough
FEW_PATCHES = 14  # along a side; fewer show little of the objects in an image


class Gallery(NamedTuple):
    """Rows of images as data URIs; each column belongs to one probe image."""

    images: list[str]  # of the probe; empty if they were not kept
    steps: dict[int, list[str]]  # colored features at some steps, the earliest first
    num_steps: int  # that have features
    colors: Tensor | None  # (n, h, w, 3) of the last step


def gallery(run: Run, reference: Tensor | None = None) -> Gallery:
    """The features of a run at steps that are evenly spread.

    The colors of the last step are aligned with those of another run, `reference` (n, h, w, 3) of the same shape.
    """
    files = run.comparable_tokens
    chosen = [list(files)[index] for index in spread(len(files), MAX_STEPS)]
    colors: dict[int, Tensor] = {}
    for step in reversed(chosen):
        tokens = read_tokens(files[step])
        if tokens is None:
            continue
        found = pca_colors(tokens)
        later = next(reversed(colors.values())) if colors else reference
        colors[step] = aligned(found, later) if later is not None and later.shape == found.shape else found
    images: Iterable[np.ndarray] = () if run.images is None else run.images[:MAX_IMAGES]
    return Gallery(
        images=[data_uri(Image.fromarray(image.transpose(1, 2, 0))) for image in images],
        steps={step: [data_uri(image) for image in to_images(colors[step])] for step in sorted(colors)},
        num_steps=len(files),
        colors=colors[max(colors)] if colors else None,
    )


def read_tokens(path: Path) -> Tensor | None:
    """Read patch tokens (n, h, w, D) of the first images; None, with a warning, if the file cannot be read."""
    try:
        tokens = read_array(path)
        if tokens.dtype.kind != "f" or tokens.ndim != 4 or min(tokens.shape) < 1 or tokens.shape[-1] < 3:
            raise ValueError(f"expected (images, rows, columns, features), got {tokens.dtype} of shape {tokens.shape}")
    except (OSError, ValueError) as error:
        logger.warning("%s is left out: %s", path, error)
        return None
    return torch.from_numpy(tokens[:MAX_IMAGES].astype(np.float32)).nan_to_num()


def spread(count: int, most: int) -> list[int]:
    """Indices below `count`: all, or `most` of them at even distances, including the first and the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def aligned(colors: Tensor, reference: Tensor) -> Tensor:
    """Permute and invert color channels so that they correlate best with others of the same patches.

    Sign and order of principal components are arbitrary; this makes them follow `reference`. All are (n, h, w, 3) in
    [0, 1].
    """
    flat = np.concatenate([each.flatten(0, 2).double().numpy() for each in (colors, reference)], axis=1)
    with np.errstate(invalid="ignore"):  # channels without contrast
        agreement = np.nan_to_num(np.corrcoef(flat, rowvar=False)[:3, 3:])  # (channel, channel of the reference)
    order = max(permutations(range(3)), key=lambda order: sum(abs(agreement[c, t]) for t, c in enumerate(order)))
    channels = [
        1 - colors[..., channel] if agreement[channel, target] < 0 else colors[..., channel]
        for target, channel in enumerate(order)
    ]
    return torch.stack(channels, dim=-1)


def data_uri(image: Image.Image) -> str:
    """The data URI of an image, reduced to at most `MAX_SIDE`: PNG, or JPEG if it is large."""
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= SMALL_SIDE else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def galleries(runs: Sequence[Run]) -> list[Gallery]:
    """The galleries of several runs; those with the same images have aligned colors."""
    found: list[Gallery] = []
    for run in runs:
        alike = (each.colors for other, each in zip(runs, found, strict=False) if same_images(run, other))
        found.append(gallery(run, next((colors for colors in alike if colors is not None), None)))
    return found


def same_images(run: Run, other: Run) -> bool:
    """Whether two runs have the same probe images."""
    return run.images is not None and other.images is not None and np.array_equal(run.images, other.images)
