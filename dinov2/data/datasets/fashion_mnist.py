"""Fashion-MNIST: grayscale product images of ten classes, 28 x 28 pixels. A subset is part of the package."""

import gzip
import importlib.resources
import io
import math
import zlib
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ListedDataset

_MAX_IDX_BYTES = 2**26  # uncompressed; the larger file has 47 MB


class FashionMNISTSplit(Enum):
    """A split; its value is the prefix of its file names."""

    TRAIN = "train"
    VAL = "t10k"


class FashionMNIST(ListedDataset):
    """Fashion-MNIST (Zalando, MIT license), with the gray channel repeated three times.

    Without `root`, the 10,000 training and 2,000 validation images in the package, which need neither files nor a
    network: the first ones of each class in the full dataset. With `root`, the full 60,000 and 10,000 images from their
    usual files (`train-images-idx3-ubyte`, ..., `t10k-labels-idx1-ubyte`, each plain or `.gz`), in `root` or in
    `root/FashionMNIST/raw`, where torchvision stores them.

    Args:
        split: A `FashionMNIST.Split`; VAL is the published test split.
        root: Folder of the full dataset.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    Split = FashionMNISTSplit
    classes = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip

    def __init__(self, *, split: FashionMNISTSplit, root: str | Path | None = None, **transforms: Any) -> None:
        super().__init__(**transforms)
        self.split = split
        self._images, labels = _embedded(split) if root is None else _full(split, Path(root))  # (length, 28, 28) uint8
        self._targets = labels.astype(np.int64)

    def describe(self, index: int) -> str:
        return f"FashionMNIST {self.split.name} image {index}"


def _embedded(split: FashionMNISTSplit) -> tuple[np.ndarray, np.ndarray]:
    resource = importlib.resources.files("dinov2.data.datasets.embedded") / "fashion_mnist_12k.npz"
    try:
        with resource.open("rb") as file, np.load(file) as arrays:
            prefix = split.name.lower()
            return _checked(arrays[f"{prefix}_images"], arrays[f"{prefix}_labels"])
    except Exception as error:  # damaged files raise exceptions of any type
        raise OSError(f"{resource} is damaged, install the package again: {error}") from error


def _full(split: FashionMNISTSplit, root: Path) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(_find(root, f"{split.value}-images-idx3-ubyte"), num_dimensions=3)
    labels = _read_idx(_find(root, f"{split.value}-labels-idx1-ubyte"), num_dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{root} has {len(images)} images but {len(labels)} labels of split {split.name}")
    return _checked(images, labels)


def _checked(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Raise a ValueError if types, shapes or values are invalid."""
    if images.dtype != np.uint8 or images.ndim != 3 or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{images.dtype} images of shape {images.shape}, {labels.dtype} labels of shape {labels.shape}"
        )
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(FashionMNIST.classes):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    return images, labels


def _find(root: Path, name: str) -> Path:
    candidates = [folder / file for folder in (root, root / "FashionMNIST" / "raw") for file in (name, f"{name}.gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no file of Fashion-MNIST at any of {', '.join(map(str, candidates))}")


def _read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Read a uint8 array in the idx format: 0, 0, 8 (uint8), number of dimensions, sizes (big-endian), values."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MAX_IDX_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    header = 4 + 4 * num_dimensions
    shape = tuple(int.from_bytes(data[start : start + 4], "big") for start in range(4, header, 4))
    if data[:4] != bytes([0, 0, 8, num_dimensions]) or len(data) != header + math.prod(shape):
        raise ValueError(f"{path} is not a complete idx file of {num_dimensions}-dimensional bytes")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
