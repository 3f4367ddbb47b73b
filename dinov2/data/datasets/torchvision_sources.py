"""The classification datasets of torchvision: their splits, and functions that read their samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# --- Readers: torchvision dataset -> paths or arrays of its images, and their classes; no image is decoded ---------


@dataclass(frozen=True)
class HDF5Images:
    """The images `x` of an HDF5 file, which is opened for each image: open files survive neither fork nor pickling."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        import h5py

        with h5py.File(self.path) as file:
            return file["x"][index]


class Arrays(NamedTuple):
    """Images without files of their own."""

    images: np.ndarray | HDF5Images  # (N, H, W) or (N, H, W, 3) uint8
    targets: np.ndarray | Sequence[int | None]


Pairs = list[tuple[Any, int | None]]  # (path of the image, class)


def read_pairs(dataset: Any) -> Pairs:
    """Read a dataset that was given a loader which returns the path: its items are pairs (path, class)."""
    return [dataset[index] for index in range(len(dataset))]


def read_arrays(dataset: Any) -> Arrays:
    """Read a dataset that torchvision keeps in memory."""
    images = np.asarray(dataset.data)
    targets = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL10: channels before rows and columns
        images = images.transpose(0, 2, 3, 1)
    if targets.ndim == 2:  # QMNIST: the class, followed by metadata
        targets = targets[:, 0]
    return Arrays(images, targets)


def _read_pets(dataset: Any) -> Pairs:
    return list(zip(dataset._images, dataset._labels, strict=True))


def _read_caltech(dataset: Any, pattern: str) -> Pairs:
    names = [pattern.format(name=name, order=order) for order, name in enumerate(dataset.categories, start=1)]
    numbered = zip(dataset.y, dataset.index, strict=True)
    return [(Path(dataset.root, f"{names[target]}{number:04d}.jpg"), target) for target, number in numbered]


def _read_fer2013(dataset: Any) -> Arrays:
    images, targets = zip(*dataset._samples, strict=True)
    return Arrays(np.stack([pixels.numpy() for pixels in images]), targets)


def _read_pcam(dataset: Any) -> Arrays:
    files = {kind: dataset._base_folder / name for kind, (name, *_) in dataset._FILES[dataset._split].items()}
    with dataset.h5py.File(files["targets"]) as targets, dataset.h5py.File(files["images"]) as images:
        return Arrays(HDF5Images(files["images"], len(images["x"])), targets["y"][:].reshape(-1))


# --- The table -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A dataset of torchvision: the class of this name in `torchvision.datasets`."""

    # Split in a dataset string -> arguments of the class. There is no VAL if no validation split is published, so that
    # models are not selected on the test split by accident. Empty: there are no published splits.
    splits: dict[str, dict[str, Any]]
    content: str = ""  # path below the root that exists if the dataset does, the same for all splits
    read: Callable[[Any], Pairs | Arrays] = read_pairs
    options: dict[str, type] = {}  # further keys of a dataset string that are passed to torchvision, and their types
    can_download: bool = True

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(self.splits) or ("TRAIN", "TEST")

    # Required and optional keys of a dataset string.

    @property
    def required(self) -> tuple[str, ...]:
        return ("split", "root") if self.splits else ("root",)

    @property
    def optional(self) -> tuple[str, ...]:
        division = () if self.splits else ("split", "seed")
        return (*division, *self.options, *(("download",) if self.can_download else ()))


def _splits(argument: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {name: {argument: value} for name, value in values.items()}


_FLAG = _splits("train", TRAIN=True, TEST=False)
_TRAIN_TEST = _splits("split", TRAIN="train", TEST="test")
_EMNIST = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
_QMNIST = ("train", "test", "test10k", "test50k", "nist")
_TRAIN_VAL_TEST = _splits("split", TRAIN="train", VAL="val", TEST="test")

# Excluded: ImageNet and Fashion-MNIST, which have their own modules; datasets whose images have several classes or none
# (CelebA, captions, segmentation, videos); those with other classes for testing than for training (Omniglot, LFW);
# LSUN, which is stored in databases.
SOURCES: dict[str, Source] = {
    "CIFAR10": Source(_FLAG, "cifar-10-batches-py", read_arrays),
    "CIFAR100": Source(_FLAG, "cifar-100-python", read_arrays),
    "CLEVRClassification": Source(_TRAIN_VAL_TEST, "clevr"),  # TEST has no labels
    "Caltech101": Source(
        {},
        "caltech101/101_ObjectCategories/BACKGROUND_Google",  # which torchvision requires, but does not read
        partial(_read_caltech, pattern="101_ObjectCategories/{name}/image_"),
    ),
    "Caltech256": Source(
        {},
        "caltech256/256_ObjectCategories",
        partial(_read_caltech, pattern="256_ObjectCategories/{name}/{order:03d}_"),
    ),
    "Country211": Source(_splits("split", TRAIN="train", VAL="valid", TEST="test"), "country211"),
    "DTD": Source(_TRAIN_VAL_TEST, "dtd", options={"partition": int}),
    "EMNIST": Source(
        {f"{name}_{kind.upper()}": {"split": kind} | _FLAG[name] for kind in _EMNIST for name in _FLAG},
        "EMNIST",
        read_arrays,
    ),
    "EuroSAT": Source({}, "eurosat"),
    "FER2013": Source(_TRAIN_TEST, "fer2013", _read_fer2013, can_download=False),
    "FGVCAircraft": Source(
        _TRAIN_VAL_TEST | _splits("split", TRAINVAL="trainval"),
        "fgvc-aircraft-2013b",
        options={"annotation_level": str},
    ),
    "Flowers102": Source(_TRAIN_VAL_TEST, "flowers-102"),
    "Food101": Source(_TRAIN_TEST, "food-101"),
    "GTSRB": Source(_TRAIN_TEST, "gtsrb", attrgetter("_samples")),
    "INaturalist": Source(  # of 2021; torchvision has no splits of earlier years
        _splits("version", TRAIN="2021_train", TRAIN_MINI="2021_train_mini", VAL="2021_valid"),
    ),
    "Imagenette": Source(_splits("split", TRAIN="train", VAL="val"), options={"size": str}),
    "KMNIST": Source(_FLAG, "KMNIST", read_arrays),
    "MNIST": Source(_FLAG, "MNIST", read_arrays),
    "OxfordIIITPet": Source(
        _splits("split", TRAIN="trainval", TEST="test"),  # trainval is published as one split
        "oxford-iiit-pet",
        _read_pets,
    ),
    "PCAM": Source(_TRAIN_VAL_TEST, "pcam", _read_pcam),
    "Places365": Source(  # TEST has no labels
        _splits("split", TRAIN="train-standard", TRAIN_CHALLENGE="train-challenge", VAL="val", TEST="test"),
        "categories_places365.txt",
        options={"small": bool},
    ),
    "QMNIST": Source({name.upper(): {"what": name} for name in _QMNIST}, "QMNIST", read_arrays),
    "RenderedSST2": Source(_TRAIN_VAL_TEST, "rendered-sst2"),
    "SEMEION": Source({}, "semeion.data", read_arrays),
    "STL10": Source(
        _splits("split", TRAIN="train", TEST="test", UNLABELED="unlabeled"),
        "stl10_binary",
        read_arrays,
        options={"folds": int},
    ),
    "SUN397": Source({}, "SUN397"),
    "SVHN": Source(_splits("split", TRAIN="train", TEST="test", EXTRA="extra"), read=read_arrays),
    "StanfordCars": Source(_TRAIN_TEST, "stanford_cars", can_download=False),
    "USPS": Source(_FLAG, read=read_arrays),
}
