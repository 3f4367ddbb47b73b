"""The classification datasets of torchvision by name, such as `CIFAR10:split=TRAIN:root=/data`."""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ListedDataset
from dinov2.data.datasets.file_list import PathTable, check_folder
from dinov2.data.datasets.torchvision_sources import SOURCES, Arrays, Pairs, Source

logger = logging.getLogger(__name__)

TRAIN_SHARE = 0.8  # of each class, for datasets without published splits


class TorchvisionSet(ListedDataset):
    """A classification dataset of torchvision, which locates and checks the files and gives the labels.

    Files are in the order of their paths; labels are those of torchvision. Nothing is downloaded by default.

    Caltech101, Caltech256, EuroSAT, SEMEION and SUN397 have no published splits: without `split` the whole dataset is
    read. For them TRAIN is 80 % of each class and TEST the rest, by a split of this package that depends on the names
    of the files and the seed only; results are not comparable to published ones with other splits.

    Args:
        name: Name of the dataset, a key of `SOURCES`.
        root: Folder that torchvision calls root; contains for instance `cifar-10-batches-py`.
        split: One of `SOURCES[name].split_names`.
        download: Whether to download missing files; may be the text "true" or "false". Safe with several processes.
        seed: Seed of the split of datasets without published splits; None means 0.
        transforms, transform, target_transform: See `ImageDataset`.
        options: Options from `SOURCES[name].options`, such as `partition` of DTD.

    Raises:
        OSError: The files are missing, not those that torchvision expects, or cannot be downloaded.
        ValueError: An argument is invalid, a file is malformed, or a package for reading it is missing.
    """

    def __init__(
        self,
        name: str,
        *,
        root: str | Path,
        split: str | None = None,
        download: bool | str = False,
        seed: int | str | None = None,
        transforms: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(transforms=transforms, transform=transform, target_transform=target_transform)
        if name not in SOURCES:
            raise ValueError(f"unknown dataset {name!r}; known: {', '.join(SOURCES)}")
        source = SOURCES[name]
        if split not in source.split_names and (source.splits or split is not None):
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(source.split_names)}")
        if unknown := options.keys() - source.options.keys():
            raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(source.options) or 'none'}")
        if seed is not None and (source.splits or split is None):
            raise ValueError(f"seed={seed} needs a split of a dataset without published splits")
        self.name, self.root, self.split = name, Path(root), split
        self._options = options
        arguments = source.splits.get(split or "", {}) | {
            key: _converted(key, value, source.options[key]) for key, value in options.items()
        }
        self.classes, samples = self._open(source, arguments, _converted("download", download, bool))
        self._store(samples, None if source.splits or split is None else _converted("seed", seed or 0, int))

    def describe(self, index: int) -> str:
        """The path of the image, or its index if images have no files of their own."""
        if isinstance(self._images, PathTable):
            return super().describe(index)
        return " ".join(filter(None, (self.name, self.split, f"image {index}")))

    def _store(self, samples: Pairs | Arrays, seed: int | None) -> None:
        """Store the samples, files in the order of their paths; with a seed, only those of the split."""
        if isinstance(samples, Arrays):
            pixels, targets = samples
            names = [str(index) for index in range(len(pixels))]
        else:
            pairs = sorted(((os.fspath(path), target) for path, target in samples), key=itemgetter(0))
            pixels, targets = None, [target for _, target in pairs]
            names = [path.removeprefix(f"{self.root}{os.sep}") for path, _ in pairs]
        labels = np.array([-1 if target is None else target for target in targets], np.int64)
        if seed is not None:
            chosen = split_samples(names, labels, self.split, seed)
            names, labels = [names[index] for index in chosen], labels[chosen]
            pixels = pixels[chosen] if isinstance(pixels, np.ndarray) else None
        # Not a list, of which each worker process would get a copy.
        self._images = PathTable.of(names) if pixels is None else pixels
        self._targets = None if (labels < 0).any() else labels

    def _open(self, source: Source, arguments: dict[str, Any], download: bool) -> tuple[list[str], Pairs | Arrays]:
        """Read class names and samples, perhaps after a download."""
        # torchvision raises OSError or RuntimeError for missing or wrong files.
        if not download:
            try:
                return self._read_existing(source, arguments)
            except (OSError, RuntimeError) as error:
                reason = str(error).partition(" You can")[0].rstrip(".")  # "You can use download=True"
                raise FileNotFoundError(f"no {self.name} in {self.root}: {reason}; {self._advice(source)}") from error
        try:
            with _one_process_at_a_time(self.root):
                try:
                    return self._read_existing(source, arguments)
                except (OSError, RuntimeError):
                    logger.info("downloading %s to %s", self.name, self.root)
                    return self._read(source, arguments | {"download": True})
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # can have several lines
            raise OSError(f"cannot download {self.name} to {self.root}: {reason}") from error

    def _read_existing(self, source: Source, arguments: dict[str, Any]) -> tuple[list[str], Pairs | Arrays]:
        """Read the samples if their folders exist; some classes of torchvision would create them."""
        if self.root.exists():
            check_folder(self.root)
        for path in (self.root, self.root / source.content):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist")
        return self._read(source, arguments)

    def _read(self, source: Source, arguments: dict[str, Any]) -> tuple[list[str], Pairs | Arrays]:
        """Read class names and samples by torchvision; an error for other reasons than the files is a ValueError."""
        from torchvision import datasets  # takes seconds

        dataset_class = getattr(datasets, self.name)
        defaults: dict[str, Any] = {"download": False} if source.can_download else {}
        if "loader" in inspect.signature(dataset_class).parameters:
            defaults["loader"] = os.fspath
        try:
            dataset = dataset_class(str(self.root), **(defaults | arguments))
            samples = source.read(dataset)
        except ImportError as error:
            package = str(error.name).partition(".")[0]
            raise ValueError(f"{self.name} needs the package {package}: pip install {package}") from error
        except (OSError, RuntimeError) as error:
            if isinstance(error.__context__, ImportError):
                raise ValueError(f"cannot read {self.name}: {error}") from error
            raise
        except Exception as error:
            raise ValueError(f"cannot read {self.name} in {self.root}: {type(error).__name__}: {error}") from error
        if not isinstance(samples, Arrays):
            folder = Path(samples[0][0]).parent if samples else self.root
            if not (samples and folder.is_dir()):
                raise FileNotFoundError(f"no images in {folder}")
        return _class_names(dataset), samples

    def _advice(self, source: Source) -> str:
        if not source.can_download:
            return "torchvision cannot download it"
        given = {"split": self.split, "root": self.root, **self._options, "download": "true"}
        keys = "".join(f":{key}={value}" for key, value in given.items() if value is not None)
        return f"to download it: {self.name}{keys}"


def split_samples(names: Sequence[str], labels: np.ndarray, split: str | None, seed: int) -> list[int]:
    """Indices of the samples in a split of a dataset without published splits, in ascending order.

    The samples of each class are sorted by a hash of seed and name; the first `TRAIN_SHARE` of them, at least one, are
    TRAIN, the others TEST.
    """
    order = sorted(range(len(names)), key=lambda index: sha256(os.fsencode(f"{seed} {names[index]}")).digest())
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(labels[index], []).append(index)
    chosen: list[int] = []
    for members in by_class.values():
        num_train = max(1, int(TRAIN_SHARE * len(members)))
        chosen += members[:num_train] if split == "TRAIN" else members[num_train:]
    return sorted(chosen)


def _class_names(dataset: Any) -> list[str]:
    """Class names in the order of their indices; empty if torchvision has none."""
    for attribute in ("classes", "categories", "all_categories"):
        if names := getattr(dataset, attribute, None):
            return [name if isinstance(name, str) else name[0] for name in names]  # the first of the synonyms
    return []


def _converted(key: str, value: Any, to: type) -> Any:
    try:
        return {"true": True, "false": False}[str(value).lower()] if to is bool else to(value)
    except (KeyError, ValueError):
        kind = "true or false" if to is bool else "an integer"
        raise ValueError(f"{key} must be {kind}, got {value!r}") from None


@contextmanager
def _one_process_at_a_time(root: Path) -> Iterator[None]:
    """Lock a folder: one process of a distributed run downloads, the others wait for it."""
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):  # downloads are impossible, but the files may exist
        yield
        return
    with (root / ".download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
