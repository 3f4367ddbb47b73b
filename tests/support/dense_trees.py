"""Small images of red and blue boxes with class and depth maps, and command lines of dense evaluations."""

from pathlib import Path
from typing import Any

import numpy as np
from eval_images import CONFIG
from PIL import Image

CLASSES = ("ground", "red", "blue")
NEAR = {1: 2.0, 2: 4.0}  # meters, of the red and of the blue box; the ground is at 8
COLORS = {1: (220, 40, 40), 2: (40, 40, 220)}


def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8, classes (H, W) uint8 with an ignored row, and depths (H, W) uint16 in millimeters."""
    height, width = (int(side) for side in rng.integers(32, 48, 2))
    pixels = rng.integers(0, 50, (height, width, 3)).astype(np.uint8)
    classes, depths = np.zeros((height, width), np.uint8), np.full((height, width), 8000, np.uint16)
    for label in (2, 1):
        side = int(rng.integers(12, 20))
        top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
        box = (slice(top, top + side), slice(left, left + side))
        pixels[box] = np.array(COLORS[label]) + rng.integers(-20, 20, (side, side, 3))
        classes[box], depths[box] = label, round(1000 * NEAR[label])
    classes[0], depths[0] = 255, 0
    return pixels, classes, depths


def write_scenes(root: Path, split: str, count: int, seed: int) -> None:
    """Write scenes as `SegmentationFolder` and `DepthFolder` read them."""
    rng = np.random.default_rng(seed)
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for index in range(count):
        for folder, values in zip(("images", "masks", "depth"), scene(rng), strict=True):
            path = root / folder / split / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():  # a file that is written anew is another one
                Image.fromarray(values).save(path)


def segmentation_set(root: Path, split: str) -> str:
    return f"SegmentationFolder:root={root}:split={split}:classes={root}/classes.txt"


def depth_set(root: Path, split: str) -> str:
    return f"DepthFolder:root={root}:split={split}"


def dense_command(folder: Path, kind: str, **options: Any) -> list[str]:
    """The flags of a dense evaluation of an untrained network on scenes written to `folder`, and some more."""
    data, config = folder / "data", folder / "tiny.yaml"
    for split, count in (("train", 16), ("val", 7)):
        write_scenes(data, split, count, seed=count)
    config.write_text(CONFIG)
    dataset_of = {"segmentation": segmentation_set, "depth": depth_set}[kind]
    defaults = {"val_dataset": dataset_of(data, "val"), "output_dir": folder / "out", "num_workers": 0}
    if "head" not in options:
        defaults["train_dataset"] = dataset_of(data, "train")
    words = ["--config-file", str(config)]
    if "pretrained_weights" not in options:
        words.append("--random-init")
    for name, value in (defaults | options).items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(v) for v in (value if isinstance(value, list | tuple) else [value])]
    return words
