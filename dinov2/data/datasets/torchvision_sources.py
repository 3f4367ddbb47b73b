"""Which classification sets torchvision reads, what their splits are called, how to take the samples out of them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision import datasets

# --- Readers: from an object of torchvision to where its images are, none of which is opened, and their classes ---


class HDF5Images:
    """The images `x` of an HDF5 file, opened for each: an open file survives neither a fork nor pickling."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        import h5py

        with h5py.File(self.path) as file:
            return len(file["x"])

    def __getitem__(self, index: int) -> np.ndarray:
        import h5py

        with h5py.File(self.path) as file:
            return file["x"][index]


class Arrays(NamedTuple):
    """Images that do not lie in files of their own."""

    images: np.ndarray | HDF5Images  # (N, H, W) or (N, H, W, 3) uint8
    targets: np.ndarray | Sequence[int | None]


Pairs = list[tuple[Any, int | None]]  # (path of the image, class)


def read_pairs(theirs: Any) -> Pairs:
    """Of a dataset whose class takes a loader: with one that returns the path, that is what its items are."""
    return [theirs[index] for index in range(len(theirs))]


def read_arrays(theirs: Any) -> Arrays:
    """Of a dataset that torchvision holds in memory."""
    images = np.asarray(theirs.data)
    targets = np.asarray(theirs.targets if hasattr(theirs, "targets") else theirs.labels)
    if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL10: channels before rows and columns
        images = images.transpose(0, 2, 3, 1)
    if targets.ndim == 2:  # QMNIST: the class, then the writer and the like
        targets = targets[:, 0]
    return Arrays(images, targets)


def _read_pets(theirs: Any) -> Pairs:
    return list(zip(theirs._images, theirs._labels, strict=True))


def _read_gtsrb(theirs: Any) -> Pairs:
    return theirs._samples


def _read_caltech(theirs: Any, pattern: str) -> Pairs:
    names = [pattern.format(name=name, order=order) for order, name in enumerate(theirs.categories, start=1)]
    places = zip(theirs.y, theirs.index, strict=True)
    return [(Path(theirs.root, f"{names[target]}{number:04d}.jpg"), target) for target, number in places]


def _read_fer2013(theirs: Any) -> Arrays:
    return Arrays(
        np.stack([pixels.numpy() for pixels, _ in theirs._samples]), [target for _, target in theirs._samples]
    )


def _read_pcam(theirs: Any) -> Arrays:
    files = {kind: theirs._base_folder / name for kind, (name, *_) in theirs._FILES[theirs._split].items()}
    with theirs.h5py.File(files["targets"]) as file:
        return Arrays(HDF5Images(files["images"]), file["y"][:].reshape(-1))


# --- The table -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where the samples of a dataset come from."""

    theirs: Callable[..., Any]  # the class of torchvision
    # Split in a dataset string -> what the class is told. Where the published set has no validation split there is no
    # VAL, so that nobody selects on its test set unknowingly. Empty: the published set is not divided.
    splits: dict[str, dict[str, Any]]
    place: str = ""  # what is below the root when the dataset is there, if that is the same for all splits
    read: Callable[[Any], Pairs | Arrays] = read_pairs
    options: dict[str, type] = {}  # further keys of a dataset string that torchvision is told, and their types
    can_download: bool = True

    @property
    def split_names(self) -> tuple[str, ...]:
        return tuple(self.splits) or ("TRAIN", "TEST")

    @property
    def required(self) -> tuple[str, ...]:
        """Keys that a dataset string must have."""
        return ("split", "root") if self.splits else ("root",)

    @property
    def optional(self) -> tuple[str, ...]:
        """Keys that it may have."""
        division = () if self.splits else ("split", "seed")
        return (*division, *self.options, *(("download",) if self.can_download else ()))


_FLAG: dict[str, dict[str, Any]] = {"TRAIN": {"train": True}, "TEST": {"train": False}}
_TRAIN_TEST: dict[str, dict[str, Any]] = {"TRAIN": {"split": "train"}, "TEST": {"split": "test"}}
_TRAIN_VAL_TEST: dict[str, dict[str, Any]] = {name.upper(): {"split": name} for name in ("train", "val", "test")}

# Not here: ImageNet and Fashion-MNIST, which have classes of their own; sets whose images have several classes or
# none (CelebA, captions, segmentation, videos); those that test on other classes than they train on (Omniglot, LFW);
# LSUN, whose files are data bases.
SOURCES: dict[str, Source] = {
    "CIFAR10": Source(datasets.CIFAR10, _FLAG, "cifar-10-batches-py", read_arrays),
    "CIFAR100": Source(datasets.CIFAR100, _FLAG, "cifar-100-python", read_arrays),
    "CLEVRClassification": Source(datasets.CLEVRClassification, _TRAIN_VAL_TEST, "clevr"),  # TEST has no labels
    "Caltech101": Source(
        datasets.Caltech101,
        {},
        "caltech101/101_ObjectCategories/BACKGROUND_Google",  # which it looks for only to leave it out
        partial(_read_caltech, pattern="101_ObjectCategories/{name}/image_"),
    ),
    "Caltech256": Source(
        datasets.Caltech256,
        {},
        "caltech256/256_ObjectCategories",
        partial(_read_caltech, pattern="256_ObjectCategories/{name}/{order:03d}_"),
    ),
    "Country211": Source(datasets.Country211, _TRAIN_VAL_TEST | {"VAL": {"split": "valid"}}, "country211"),
    "DTD": Source(datasets.DTD, _TRAIN_VAL_TEST, "dtd", options={"partition": int}),
    "EMNIST": Source(
        datasets.EMNIST,
        {f"{name}_{kind.upper()}": {"split": kind} | _FLAG[name] for kind in datasets.EMNIST.splits for name in _FLAG},
        "EMNIST",
        read_arrays,
    ),
    "EuroSAT": Source(datasets.EuroSAT, {}, "eurosat"),
    "FER2013": Source(datasets.FER2013, _TRAIN_TEST, "fer2013", _read_fer2013, can_download=False),
    "FGVCAircraft": Source(
        datasets.FGVCAircraft,
        _TRAIN_VAL_TEST | {"TRAINVAL": {"split": "trainval"}},
        "fgvc-aircraft-2013b",
        options={"annotation_level": str},
    ),
    "Flowers102": Source(datasets.Flowers102, _TRAIN_VAL_TEST, "flowers-102"),
    "Food101": Source(datasets.Food101, _TRAIN_TEST, "food-101"),
    "GTSRB": Source(datasets.GTSRB, _TRAIN_TEST, "gtsrb", _read_gtsrb),
    "INaturalist": Source(  # that of 2021; torchvision reads those of earlier years undivided
        datasets.INaturalist,
        {
            "TRAIN": {"version": "2021_train"},
            "TRAIN_MINI": {"version": "2021_train_mini"},
            "VAL": {"version": "2021_valid"},
        },
    ),
    "Imagenette": Source(
        datasets.Imagenette, {"TRAIN": {"split": "train"}, "VAL": {"split": "val"}}, options={"size": str}
    ),
    "KMNIST": Source(datasets.KMNIST, _FLAG, "KMNIST", read_arrays),
    "MNIST": Source(datasets.MNIST, _FLAG, "MNIST", read_arrays),
    "OxfordIIITPet": Source(
        datasets.OxfordIIITPet,
        {"TRAIN": {"split": "trainval"}, "TEST": {"split": "test"}},  # trainval is published in one piece
        "oxford-iiit-pet",
        _read_pets,
    ),
    "PCAM": Source(datasets.PCAM, _TRAIN_VAL_TEST, "pcam", _read_pcam),
    "Places365": Source(
        datasets.Places365,
        {
            "TRAIN": {"split": "train-standard"},
            "TRAIN_CHALLENGE": {"split": "train-challenge"},
            "VAL": {"split": "val"},
            "TEST": {"split": "test"},  # has no labels
        },
        "categories_places365.txt",
        options={"small": bool},
    ),
    "QMNIST": Source(
        datasets.QMNIST, {name.upper(): {"what": name} for name in datasets.QMNIST.subsets}, "QMNIST", read_arrays
    ),
    "RenderedSST2": Source(datasets.RenderedSST2, _TRAIN_VAL_TEST, "rendered-sst2"),
    "SEMEION": Source(datasets.SEMEION, {}, "semeion.data", read_arrays),
    "STL10": Source(
        datasets.STL10,
        _TRAIN_TEST | {"UNLABELED": {"split": "unlabeled"}},
        "stl10_binary",
        read_arrays,
        options={"folds": int},
    ),
    "SUN397": Source(datasets.SUN397, {}, "SUN397"),
    "SVHN": Source(datasets.SVHN, _TRAIN_TEST | {"EXTRA": {"split": "extra"}}, read=read_arrays),
    "StanfordCars": Source(datasets.StanfordCars, _TRAIN_TEST, "stanford_cars", can_download=False),
    "USPS": Source(datasets.USPS, _FLAG, read=read_arrays),
}
