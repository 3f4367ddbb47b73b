"""Several datasets as one."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ImageDataset, ListedDataset
from dinov2.data.datasets.image_folder import ImageFolder


class Concatenation(ImageDataset):
    """The samples of several datasets, one after the other; classes of the same name are one class.

    Without labels if one of the datasets has none, or if only some of them have class names.

    Args:
        parts: The datasets, without transforms of their own.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    def __init__(self, parts: Sequence[ListedDataset], **transforms: Any) -> None:
        super().__init__(**transforms)
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.classes: list[str] = []
        self._targets = None
        self._notes: list[str] = []
        unlabeled = [part for part in parts if part.get_targets() is None or not part.classes]
        if not unlabeled:
            self.classes = sorted(set(chain.from_iterable(part.classes for part in parts)))
            of_class = {name: index for index, name in enumerate(self.classes)}
            self._targets = np.concatenate(
                [np.array([of_class[name] for name in part.classes])[part.get_targets()] for part in parts]
            )
        elif len(unlabeled) < len(parts):
            self._notes = [f"{unlabeled[0].root} has no labels, so that those of the other folders are not used"]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[ListedDataset, int]:
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
        return [*chain.from_iterable(part.notes_on_files() for part in self.parts), *self._notes]


def image_folders(*, root: str | Path, split: str | None = None, **transforms: Any) -> ImageDataset:
    """Images under a folder, or under several with commas between them; see `ImageFolder`."""
    roots = [str(root)] if os.path.exists(root) else str(root).split(",")
    if len(roots) == 1:
        return ImageFolder(root=root, split=split, **transforms)
    if "" in roots or len({os.path.realpath(each) for each in roots}) < len(roots):
        raise ValueError(f"root={root} names {'no folder' if '' in roots else 'a folder twice'} between commas")
    return Concatenation([ImageFolder(root=os.path.expanduser(each), split=split) for each in roots], **transforms)
