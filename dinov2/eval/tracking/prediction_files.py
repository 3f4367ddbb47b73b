"""Files of a tracked video: its scores, its label maps as the benchmark wants them, and an overlay for the eye."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2.data.images import AnyImage, ImageOptions
from dinov2.data.videos import AnnotatedVideo, read_palette
from dinov2.eval.tracking.region_and_boundary import boundary
from dinov2.eval.tracking.video_tracking import read_frame
from dinov2.files import atomic_write, read_json

logger = logging.getLogger(__name__)

OVERLAY_HEIGHT, OVERLAY_GAP, OPACITY = 240, 6, 0.55  # pixels, pixels, fraction


def write_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the scores of a video as JSON, with null for nan; returns what `read_record` will."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(record), indent=1, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")
    written: dict[str, Any] = json.loads(text)
    return written


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_record(path: Path, identity: str) -> dict[str, Any] | None:
    """Read the scores of a video that an earlier run finished; None if there are none of this `identity`."""
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = read_json(path)
        return record if record["identity"] == identity else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        logger.warning("cannot use %s, the sequence is computed anew: %s", path, error)
        return None


def prediction_paths(folder: Path, video: AnnotatedVideo) -> list[Path]:
    """Where the label maps of a video are saved."""
    return [folder / video.name / f"{frame.stem}.png" for frame in video.frames]


def save_predictions(folder: Path, video: AnnotatedVideo, predictions: np.ndarray) -> None:
    """Save label maps (T, H, W) uint8 as PNGs with the palette of the annotations."""
    palette = read_palette(video.annotations[0])
    (folder / video.name).mkdir(parents=True, exist_ok=True)
    for path, labels in zip(prediction_paths(folder, video), predictions, strict=True):
        image = Image.fromarray(labels)
        image.putpalette(palette)
        with atomic_write(path) as file:
            image.save(file, "PNG")


def save_overlay(
    path: Path, video: AnnotatedVideo, predictions: np.ndarray, options: ImageOptions, count: int = 4
) -> None:
    """Draw `count` evenly spaced frames side by side with the predicted objects in their colors and their names.

    A figure that cannot be written, for example on a full disk, is a warning.
    """
    numbers = sorted({round(i * (len(predictions) - 1) / max(count - 1, 1)) for i in range(count)})
    palette = np.array(read_palette(video.annotations[0]), np.uint8).reshape(-1, 3)
    panels = [draw_overlay(read_frame(video.frames[i], options), predictions[i], palette) for i in numbers]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            _side_by_side(panels, [video.frames[i].stem for i in numbers]).save(file, "JPEG", quality=90)
    except OSError as error:
        logger.warning("no overlay of %s: %s", video.name, error)


def draw_overlay(frame: AnyImage, labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Color the objects of a frame, and outline them in white."""
    pixels = np.asarray(frame.convert("RGB")).astype(np.float32)
    colored = np.where((labels > 0)[..., None], (1 - OPACITY) * pixels + OPACITY * palette[labels], pixels)
    for label in np.unique(labels[labels > 0]):
        colored[boundary(labels == label)] = 255
    return Image.fromarray(colored.round().astype(np.uint8))


def _side_by_side(panels: Sequence[Image.Image], names: Sequence[str]) -> Image.Image:
    """A row of images of equal height, with the name of each in its upper left corner."""
    resized = [
        panel.resize((max(round(panel.width * OVERLAY_HEIGHT / panel.height), 1), OVERLAY_HEIGHT)) for panel in panels
    ]
    page = Image.new(
        "RGB", (sum(panel.width + OVERLAY_GAP for panel in resized) - OVERLAY_GAP, OVERLAY_HEIGHT), "white"
    )
    draw, font, left = ImageDraw.Draw(page), ImageFont.load_default(16), 0
    for panel, name in zip(resized, names, strict=True):
        page.paste(panel, (left, 0))
        draw.text((left + 6, 4), name, "white", font, stroke_width=2, stroke_fill="black")
        left += panel.width + OVERLAY_GAP
    return page
