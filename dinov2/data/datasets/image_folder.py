"""A folder of images, with or without class folders."""

import logging
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ListedDataset
from dinov2.data.datasets.file_list import ANY_SUFFIX, IMAGE_SUFFIXES, PathTable, check_folder, list_images

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {"test", "train", "val", "valid", "validation"}


class ImageFolder(ListedDataset):
    """All images under a folder, at any depth, in the order of their paths.

    If every image is in some folder below `root`, the sorted names of the first-level folders are the classes (as in
    `torchvision.datasets.ImageFolder`). If some images are in `root` itself, there are no labels; training needs none.
    A folder next to one called `train`, such as `val`, may lack some of its classes: if `train` has all of them, its
    class indices are used. Links are followed, hidden files are ignored. The list of files is cached between runs and
    rebuilt when a folder has changed.

    Args:
        root: Folder of the images.
        split: Subfolder of `root` to read instead, such as `val`.
        suffixes: How the names of images end, instead of the usual suffixes, such as ".img,.dat"; "any": files without
            a usual suffix are images if their first bytes are those of one.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    def __init__(
        self, *, root: str | Path, split: str | None = None, suffixes: str | None = None, **transforms: Any
    ) -> None:
        super().__init__(**transforms)
        wanted = _suffixes(suffixes)
        self.root = Path(root) if split is None else Path(root, split)
        check_folder(self.root)
        listed = list_images(self.root, wanted)
        self._images, self._notes = listed.images, listed.notes(self.root)
        ranges = _class_ranges(listed.images)
        self.classes = _complete(sorted(ranges), self.root.parent / "train", wanted)
        self._targets = None
        if ranges:
            self._targets = np.empty(len(self), np.int64)
            for class_index, name in enumerate(self.classes):
                self._targets[ranges.get(name, slice(0))] = class_index
        logger.info("%s: %s", self.root, f"{len(self.classes)} classes" if self.classes else "no labels")
        if self.classes and SPLIT_FOLDERS.issuperset(self.classes):
            logger.warning(
                "%s: the folders %s are used as classes; to read one of them, with the classes below it, add :split=%s",
                self.root,
                ", ".join(self.classes),
                self.classes[0],
            )

    def describe(self, index: int) -> str:
        return str(self.root / self._images[index])

    def fingerprint(self) -> str:
        return self._images.fingerprint()

    def notes_on_files(self) -> list[str]:
        return self._notes


def _class_ranges(files: PathTable) -> dict[str, slice]:
    """First-level folder -> range of its files; empty if a file is in no folder."""
    ranges: dict[str, slice] = {}  # files are sorted, so those of a folder are consecutive
    start = 0
    while start < len(files):
        name, slash, _ = files[start].partition("/")
        if not slash:
            return {}
        end = bisect_left(files, name + chr(ord("/") + 1), lo=start)  # the first path beyond all "name/..."
        ranges[name] = slice(start, end)
        start = end
    return ranges


def _suffixes(text: str | None) -> tuple[str, ...]:
    if text is None:
        return IMAGE_SUFFIXES
    if text == "any":
        return (*IMAGE_SUFFIXES, ANY_SUFFIX)
    suffixes = tuple(text.lower().split(","))
    if any(len(suffix) < 2 or suffix[0] != "." or "/" in suffix for suffix in suffixes):
        raise ValueError(f"suffixes must be any, or begin with dots and have commas between them, got {text!r}")
    return suffixes


def _complete(classes: list[str], train: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The classes of the folder `train` if they are a superset of `classes`, else `classes`."""
    if classes and train.is_dir() and set(classes) < {path.name for path in train.iterdir()}:
        train_classes = _class_ranges(list_images(train, suffixes).images)
        if set(classes) < set(train_classes):
            return sorted(train_classes)
    return classes
