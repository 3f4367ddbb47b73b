"""ImageNet-1k in its usual folders, indexed by small tables (the "extra" files)."""

import csv
import json
import logging
import re
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import label_table
from dinov2.data.datasets.index_files import INTEGERS, TEXT, ExtraFile, IndexedDataset
from dinov2.data.images import read_image_file

logger = logging.getLogger(__name__)

JPEG_SUFFIXES = (".jpeg", ".jpg")
_FIELDS = {"actual_index": INTEGERS, "class_index": INTEGERS, "class_id": TEXT, "class_name": TEXT}
NO_CLASS = 2**32 - 1  # class_index of the test images, whose labels are not public


class ImageNetSplit(Enum):
    """A split; its value is the name of its folder."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def official_length(self) -> int:
        return {"TRAIN": 1_281_167, "VAL": 50_000, "TEST": 100_000}[self.name]

    def image_path(self, actual_index: int, class_id: str) -> str:
        """Path of an image relative to the root, from the number in its name and its class id ("n01440764")."""
        if self is ImageNetSplit.TRAIN:
            return f"train/{class_id}/{class_id}_{actual_index}.JPEG"
        if self is ImageNetSplit.VAL:
            return f"val/{class_id}/ILSVRC2012_val_{actual_index:08d}.JPEG"
        return f"test/ILSVRC2012_test_{actual_index:08d}.JPEG"

    def actual_index(self, path: Path) -> int:
        """The number in the name of an image; a ValueError if images of this split are not named like this."""
        number = re.search(r"_(\d+)$", path.stem)
        if number is None or not path.as_posix().endswith(self.image_path(int(number[1]), path.parent.name)):
            example = self.image_path(293, "n01440764")
            raise ValueError(f"{path} is not named like an ImageNet image of split {self.name} ({example})")
        return int(number[1])


class ImageNet(IndexedDataset):
    """ImageNet-1k (ILSVRC 2012).

    Expects `<root>/train/<wnid>/<wnid>_<n>.JPEG`, `<root>/val/<wnid>/ILSVRC2012_val_<n>.JPEG`,
    `<root>/test/ILSVRC2012_test_<n>.JPEG`, and in `extra` the tables that `dump_extra` writes once per split, which
    needs `<root>/labels.txt` (lines `n01440764,tench`). `root` and `extra` may be the same folder. A subset of ImageNet
    is accepted: an unofficial number of images is only logged.

    Args:
        split: An `ImageNet.Split`.
        root, extra: Folders of the images and of the tables.
        real: File of the reassessed labels, `real.json` of ImageNet-ReaL (Beyer et al. 2020, arXiv 2006.07159); for VAL
            only. Targets are then lists of all correct classes, some of them empty.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    Split = ImageNetSplit

    def __init__(
        self,
        *,
        split: ImageNetSplit,
        root: str | Path,
        extra: str | Path,
        real: str | Path | None = None,
        **transforms: Any,
    ) -> None:
        super().__init__(**transforms)
        self.root = Path(root)
        self.split = split
        if real is not None and split is not ImageNetSplit.VAL:
            raise ValueError(f"real={str(real)!r}: reassessed labels exist for split VAL only, not for {split.name}")
        self._real_file = None if real is None else Path(real)
        creation = (
            "from dinov2.data.datasets import ImageNet; "
            f"ImageNet(split=ImageNet.Split.{split.name}, root={str(root)!r}, extra={str(extra)!r}).dump_extra()"
        )
        self._entries = ExtraFile(Path(extra, f"entries-{split.name}.npy"), creation, _FIELDS)
        self._class_ids = ExtraFile(Path(extra, f"class-ids-{split.name}.npy"), creation)
        self._class_names = ExtraFile(Path(extra, f"class-names-{split.name}.npy"), creation)

    def _check_tables(self) -> None:
        length, official = len(self._entries.array), self.split.official_length
        if self.split is not ImageNetSplit.TEST:
            num_ids, num_names = len(self._class_ids.array), len(self._class_names.array)
            if num_ids != num_names:
                raise self._class_names.damaged(f"it has {num_names} classes, {self._class_ids.path} has {num_ids}")
            super()._check_tables()
        if length != official:
            logger.warning("%s has %d images, ImageNet %s has %d", self.root, length, self.split.name, official)

    def describe(self, index: int) -> str:
        entry = self._entries.array[index]
        return str(self.root / self.split.image_path(int(entry["actual_index"]), str(entry["class_id"])))

    def get_image_data(self, index: int) -> bytes:
        return read_image_file(self.describe(index), self.image_options)

    def get_target(self, index: int) -> int | list[int] | None:
        if self.split is ImageNetSplit.TEST:
            return None
        if self._real_file is not None:
            return self._real_labels[index]
        return super().get_target(index)

    def get_targets(self) -> np.ndarray | None:
        if self._real_file is not None:
            return label_table(self._real_labels)
        return None if self.split is ImageNetSplit.TEST else super().get_targets()

    @cached_property
    def _real_labels(self) -> list[list[int]]:
        """Reassessed labels of each sample."""
        assert self._real_file is not None, "read only if a file is given"
        by_number = _read_real(self._real_file, self.split.official_length, len(self._class_ids.array))
        numbers = self._entries.array["actual_index"]
        if not 1 <= numbers.min() <= numbers.max() <= len(by_number):
            raise self._entries.damaged(f"it has images numbered {numbers.min()} to {numbers.max()}")
        return [by_number[number - 1] for number in numbers.tolist()]

    def get_class_id(self, index: int) -> str | None:
        return None if self.split is ImageNetSplit.TEST else super().get_class_id(index)

    def get_class_name(self, index: int) -> str | None:
        """Returns the class name of a sample; None without labels."""
        return None if self.split is ImageNetSplit.TEST else str(self._entries.array[index]["class_name"])

    def find_class_id(self, class_index: int) -> str:
        self._require_classes()
        return super().find_class_id(class_index)

    def find_class_name(self, class_index: int) -> str:
        """Returns the name of a class."""
        self._require_classes()
        return str(self._class_names.array[class_index])

    def _require_classes(self) -> None:
        if self.split is ImageNetSplit.TEST:
            raise ValueError("the TEST split of ImageNet has no classes; TRAIN and VAL have")

    def dump_extra(self) -> None:
        """Write the extra files of this split from the images and `<root>/labels.txt` (TEST needs neither).

        Raises:
            RuntimeError: `labels.txt` cannot be read.
            ValueError, FileNotFoundError: A line of it, a class folder or the name of an image is invalid or missing.
        """
        if self.split is ImageNetSplit.TEST:
            entries = np.zeros(self.split.official_length, _entry_dtype("", ""))
            entries["actual_index"] = np.arange(1, len(entries) + 1)
            entries["class_index"] = NO_CLASS
            self._entries.save(entries)
        else:
            self._dump_with_classes()
        logger.info("wrote the extra files of split %s to %s", self.split.name, self._entries.path.parent)

    def _dump_with_classes(self) -> None:
        name_of_class = _read_labels(self.root / "labels.txt")
        folder = self.root / self.split.value
        class_ids = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        unlabeled = [class_id for class_id in class_ids if class_id not in name_of_class]
        if unlabeled:
            raise ValueError(f"{self.root / 'labels.txt'} lacks these class folders of {folder}: {unlabeled}")
        class_names = [name_of_class[class_id] for class_id in class_ids]
        actual_indices, class_indices = self._list_images(folder, class_ids)

        entries = np.empty(len(actual_indices), _entry_dtype(max(class_ids, key=len), max(class_names, key=len)))
        entries["actual_index"] = actual_indices
        entries["class_index"] = class_indices
        entries["class_id"] = np.array(class_ids)[class_indices]
        entries["class_name"] = np.array(class_names)[class_indices]
        self._class_ids.save(np.array(class_ids))
        self._class_names.save(np.array(class_names))
        self._entries.save(entries)

    def _list_images(self, folder: Path, class_ids: list[str]) -> tuple[list[int], list[int]]:
        """List the number in the name and the class index of each image in the class folders."""
        actual_indices: list[int] = []
        class_indices: list[int] = []
        for class_index, class_id in enumerate(class_ids):
            paths = sorted(path for path in (folder / class_id).glob("[!.]*") if path.suffix.lower() in JPEG_SUFFIXES)
            actual_indices += [self.split.actual_index(path) for path in paths]
            class_indices += [class_index] * len(paths)
            percent, percent_before = (100 * done // len(class_ids) for done in (class_index + 1, class_index))
            if percent != percent_before:
                logger.info("listing %s: %d %%", folder, percent)
        if not actual_indices:
            raise FileNotFoundError(f"no images in folders like {folder}/n01440764; expected one folder per class")
        return actual_indices, class_indices


def _entry_dtype(longest_class_id: str, longest_class_name: str) -> np.dtype:
    return np.dtype(
        [
            ("actual_index", "<u4"),
            ("class_index", "<u4"),
            ("class_id", f"<U{len(longest_class_id)}"),
            ("class_name", f"<U{len(longest_class_name)}"),
        ]
    )


def _read_labels(path: Path) -> dict[str, str]:
    """Read the lines `wnid,name`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise RuntimeError(f"cannot read the class names from {path}: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of classes and their names: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) not in (0, 2):  # 0: an empty line
            raise ValueError(f"{path}, row {number}: {row} should be a class and its name, like n01440764,tench")
    return dict(row for row in rows if row)


def _read_real(path: Path, length: int, num_classes: int) -> list[list[int]]:
    """Read the reassessed labels of the validation images, in the order of the numbers in their names."""
    try:
        lists = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(lists, list) or len(lists) != length:
        found = f"a list of {len(lists)}" if isinstance(lists, list) else f"a {type(lists).__name__}"
        raise ValueError(f"{path} contains {found}, not a list of {length} lists of class indices, one per image")
    for number, labels in enumerate(lists, start=1):
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < num_classes for label in labels):
            raise ValueError(
                f"{path}, image {number}: {labels!r} is not a list of indices of the {num_classes} classes of the data"
            )
    return lists
