"""Several datasets as one."""

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.image_folder import ImageFolder


class Concatenation(ImageDataset):
    """The samples of several datasets, one after the other; classes of the same name are one class.

    Without labels if one of the datasets has none, or no class names.

    Args:
        parts: The datasets, without transforms of their own.
        names: Their names in messages.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    def __init__(self, parts: Sequence[ImageDataset], names: Sequence[str], **transforms: Any) -> None:
        super().__init__(**transforms)
        self.parts = parts
        self.names = names
        self._ends = np.cumsum([len(part) for part in parts])
        self.classes: list[str] = []
        self._targets = None
        self._notes: list[str] = []
        classes = [_class_names(part) for part in parts]
        if all(classes):
            self.classes = sorted(set(chain.from_iterable(classes)))
            of_class = {name: index for index, name in enumerate(self.classes)}
            tables = (np.array([of_class[name] for name in names]) for names in classes)
            self._targets = np.concatenate(
                [table[part.get_targets()] for table, part in zip(tables, parts, strict=True)]
            )
        elif any(part.get_targets() is not None for part in parts):
            without = names[classes.index([])]
            self._notes = [
                f"{without} has no labels with class names, so that those of the others are not used: there is no k-NN "
                "while training, unless health.knn_dataset names a dataset with labels"
            ]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[ImageDataset, int]:
        """The dataset of a sample, and its index there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], int(index - (self._ends[part - 1] if part else 0))

    def get_image_data(self, index: int) -> bytes:
        part, own = self._find(index)
        part.image_options = self.image_options
        return part.get_image_data(own)

    def get_target(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def get_class_name(self, index: int) -> str | None:
        """Returns the class name of a sample; None without names."""
        return None if self._targets is None else self.classes[self._targets[index]]

    def describe(self, index: int) -> str:
        part, own = self._find(index)
        return part.describe(own)

    def image_files(self) -> Iterator[str]:
        return chain.from_iterable(part.image_files() for part in self.parts)

    def fingerprint(self) -> str:
        return hashlib.blake2b(" ".join(part.fingerprint() for part in self.parts).encode(), digest_size=8).hexdigest()

    def notes_on_files(self) -> list[str]:
        return [*chain.from_iterable(part.notes_on_files() for part in self.parts)]

    def notes(self) -> list[tuple[int, str]]:
        return [(logging.WARNING, note) for note in self._notes] + super().notes()


def image_folders(*, root: str | Path, **arguments: Any) -> ImageDataset:
    """Images under a folder, or under several: with commas between them, or those that match a glob.

    The other arguments are those of `ImageFolder`.
    """
    roots = [str(root)] if os.path.exists(root) else _folders(str(root))
    if len(roots) == 1:
        return ImageFolder(root=roots[0], **arguments)
    own = {name: arguments.pop(name) for name in ("split", "suffixes") if name in arguments}
    folders = [ImageFolder(root=each, **own) for each in roots]
    return Concatenation(folders, [str(folder.root) for folder in folders], **arguments)


def _folders(text: str) -> list[str]:
    """The folders that a text names; those of a glob are sorted, and not below one another."""
    found: list[str] = []
    if len(parts := text.split(",")) > 1 and "" in parts:
        raise ValueError(f"root={text} names no folder between commas")
    for part in parts:
        folder = os.path.expanduser(part)
        if glob.has_magic(folder) and not os.path.exists(folder):
            matches = sorted(glob.glob(folder, recursive=True))
            if not any(map(os.path.isdir, matches)):
                but = f", but files do, such as {matches[0]}: give the folder above them" if matches else ""
                raise FileNotFoundError(f"no folder matches root={part}{but}")
            found += filter(os.path.isdir, matches)
        else:
            found.append(folder)
    places = sorted((Path(os.path.realpath(each)), each) for each in found)
    for (above, first), (below, second) in pairwise(places):
        if below == above:
            raise ValueError(f"root={text} names a folder twice: {second}")
        if below.is_relative_to(above):
            raise ValueError(f"root={text} names {second}, which is in {first}: its images would come twice")
    return found


def _class_names(part: ImageDataset) -> list[str]:
    """The class names of a dataset, if each of its images has one; else an empty list."""
    targets, names = part.get_targets(), list(getattr(part, "classes", ()))
    return names if targets is not None and targets.ndim == 1 and targets.min(initial=0) >= 0 else []
