"""Small videos with masks in the layout of DAVIS 2017."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = ((30, 30, 30), (230, 40, 40), (40, 60, 230))
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


def moving_squares(
    num_frames: int = 6, height: int = 48, width: int = 80, side: int = 16, step: int = 8, objects: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, H, W, 3) and label maps (T, H, W) of squares that move right, by default by whole patches."""
    labels = np.zeros((num_frames, height, width), np.uint8)
    for frame in range(num_frames):
        for number in range(objects):
            top, left = 24 * number, 8 + step * frame
            labels[frame, top : top + side, left : left + side] = number + 1
    return np.array(COLORS, np.uint8)[labels], labels


def write_video(
    root: Path, name: str, frames: np.ndarray, labels: np.ndarray, resolution: str = "480p", palette: bool = True
) -> None:
    images, annotations = (root / kind / resolution / name for kind in ("JPEGImages", "Annotations"))
    for folder in (images, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    for number, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        Image.fromarray(frame).save(images / f"{number:05d}.jpg", quality=95)
        image = Image.fromarray(label)
        if palette:
            image.putpalette(PALETTE)
        image.save(annotations / f"{number:05d}.png")


def write_davis(root: Path, names: Sequence[str] = ("bear", "dogs", "train")) -> str:
    """Write three videos and the list of the validation split, which has all of them; returns the dataset string."""
    for number, name in enumerate(names):
        frames, labels = moving_squares(num_frames=4 + number, step=5, objects=1 + number % 2)
        write_video(root, name, frames, labels)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n".join(names) + "\n")
    return f"DAVIS2017:split=VAL:root={root}"
