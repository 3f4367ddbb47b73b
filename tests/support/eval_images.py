"""Small labeled images, a small backbone, and a command line, for the tests of the evaluations."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset
from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer

SIZE = 16
CONFIG = """
student: {arch: vit_small, patch_size: 8, embed_dim: 24, depth: 4, num_heads: 3, layerscale: 0.5}
crops: {global_crops_size: 16, local_crops_size: 8}
"""


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """An image of class 0, 1 or 2: red, green or blue dominates."""
    pixels = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
    pixels[..., label] += 100
    return pixels


class ImageSet(ImageDataset):
    """ImageSet of classes 0, 1, 2, 0, 1, ...; those of `broken` cannot be read."""

    def __init__(self, count: int, seed: int = 0, broken: Sequence[int] = (), transform: Any = to_tensor) -> None:
        super().__init__(transform=transform)
        rng = np.random.default_rng(seed)
        self.labels = np.arange(count) % 3
        self.files = [encoded(draw(label, rng)) for label in self.labels]
        for index in broken:
            self.files[index] = b"not an image"

    def __len__(self) -> int:
        return len(self.files)

    def get_image_data(self, index: int) -> bytes:
        return self.files[index]

    def get_target(self, index: int) -> int:
        return int(self.labels[index])


def write_images(root: Path, count: int, seed: int) -> str:
    """The dataset string of a folder with images of the three classes."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        path = root / "rgb"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded(draw(index % 3, rng))
        if not path.exists():  # a file that is written anew is another one
            path.write_bytes(data)
    return f"ImageFolder:root={root}"


def tiny_backbone() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = build_model("vit_small", img_size=SIZE, patch_size=8, embed_dim=24, depth=4, num_heads=3, init_values=0.5)
    return model.eval().requires_grad_(False)


def command(folder: Path, **options: Any) -> list[str]:
    """The common flags of an evaluation of an untrained network on images written to `folder`, and some more."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    words = ["--config-file", str(config), "--output-dir", str(folder / "out"), "--num-workers", "0"]
    words += ["--train-dataset", write_images(folder / "train", 30, seed=1)]
    words += ["--val-dataset", write_images(folder / "val", 21, seed=2)]
    if "pretrained_weights" not in options:
        words.append("--random-init")
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(v) for v in (value if isinstance(value, list | tuple) else [value])]
    return words
