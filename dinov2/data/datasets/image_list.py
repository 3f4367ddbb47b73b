"""Images and labels listed in a text file."""

import csv
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ListedDataset
from dinov2.data.datasets.file_list import PathTable
from dinov2.data.images import kind_of_file

logger = logging.getLogger(__name__)

_MAX_DIGITS = 9  # digits of a class index


class ImageList(ListedDataset):
    """The images of a list, in its order, with their labels.

    A line of the list is `path<TAB>label`, or in a `.csv` file `path,label` with the usual quotes; without labels it is
    just the path. Further columns are allowed if the first line names all columns, among them `path` and `label`. Empty
    lines are ignored.

    Labels that are all integers are class indices. Other labels are class names, which are indexed in sorted order. If
    one of several lists, for training and testing, lacks some classes, give all of them the same `classes`, such as the
    training list. Labels that are all among these classes are then names.

    Args:
        file: The list, UTF-8.
        root: Folder that paths are relative to; default: the folder of the list.
        classes: File with the class names, one per line in the order of their indices; or a list like `file`, whose
            sorted labels are the names.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: A list or the first image of `file` is missing, a line is malformed, a label is unknown.
    """

    def __init__(
        self,
        *,
        file: str | Path,
        root: str | Path | None = None,
        classes: str | Path | None = None,
        **transforms: Any,
    ) -> None:
        super().__init__(**transforms)
        self.file = Path(file)
        self.root = self.file.parent if root is None else Path(root)
        paths, labels = read_list(self.file)
        self._images = PathTable.of(paths)
        if not Path(self.describe(0)).is_file():
            raise FileNotFoundError(
                f"no file {self.describe(0)}, the first image in {self.file}; paths are relative to {self.root}, and "
                f"columns are separated by {'commas' if self.file.suffix.lower() == '.csv' else 'tabs'}"
            )
        known = None if classes is None else read_class_names(Path(classes))
        self.classes, self._targets = _classes_and_targets(labels, known, self.file)
        logger.info("%s: %s", self.file, "no labels" if labels is None else f"{len(set(labels))} different labels")

    def fingerprint(self) -> str:
        return self._images.fingerprint()


def read_list(file: Path) -> tuple[list[str], list[str] | None]:
    """Read the paths of a list and its labels, None if there are none; see `ImageList`."""
    lines = read_rows(file)
    number, first = next(lines, (0, None))
    if first is None:
        raise ValueError(f"{file} is empty")
    if {"path", "label"} <= set(first):
        columns = [first.index("path"), first.index("label")]
    else:
        columns = list(range(len(first)))
        lines = chain([(number, first)], lines)
        if len(first) > 2:
            raise ValueError(
                f"line {number} of {file} has {len(first)} columns; expected a path and a label, or a first line that "
                f"names the columns, two of them path and label"
            )
    rows = []
    for number, row in lines:
        if len(row) != len(first):
            raise ValueError(f"line {number} of {file} has {len(row)} column(s), the first has {len(first)}: {row}")
        rows.append([row[column] for column in columns])
        if "" in (cell.strip() for cell in rows[-1]):
            raise ValueError(f"line {number} of {file} has an empty path or label: {row}")
    if not rows:
        raise ValueError(f"{file} lists no image")
    return [row[0] for row in rows], [row[1].strip() for row in rows] if len(columns) == 2 else None


def read_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of each line that is not empty."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, not a list; for its images write ImageFolder:root={file}")
    if file.exists() and not file.is_file():
        raise OSError(f"{file} is {kind_of_file(file.stat().st_mode)}, not a list")
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:  # like paths
        is_csv = file.suffix.lower() == ".csv"
        dialect: Any = {"skipinitialspace": True} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        reader = csv.reader(_without_nul(text, file), **dialect)
        try:
            yield from ((reader.line_num, row) for row in reader if row)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {file} is malformed: {error}") from error


def _without_nul(lines: Iterable[str], file: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ValueError(f"line {number} of {file} has zero bytes: it is not a text file, or not in UTF-8")
        yield line


def read_class_names(file: Path) -> list[str] | None:
    """Read the class names in the order of their indices, see `ImageList`; None if the list has class indices."""
    names, labels = read_list(file)
    if labels is not None:
        return None if _are_numbers(labels) else sorted(set(labels))
    if len(set(names)) < len(names):
        raise ValueError(f"{file} names a class twice: {max(names, key=names.count)}")
    return names


def _classes_and_targets(
    labels: Sequence[str] | None, known: list[str] | None, file: Path
) -> tuple[list[str], np.ndarray | None]:
    """Class names, if there are any, and class index of each image."""
    if labels is None:
        return known or [], None
    unknown = sorted(set(labels) - set(known or []))
    if _are_numbers(labels) and unknown:
        if (longest := max(map(len, labels))) > _MAX_DIGITS:
            raise ValueError(f"{file} has a class index of {longest} digits")
        targets = np.array([int(label) for label in labels], np.int64)
        if targets.min() < 0 or (known is not None and targets.max() >= len(known)):
            limit = "" if known is None else f" and below {len(known)}, the number of classes"
            raise ValueError(f"{file} has labels {targets.min()} to {targets.max()}; they must be at least 0{limit}")
        return known or [], targets
    if known is not None and unknown:
        raise ValueError(f"{file} has labels that are not among the {len(known)} classes: {', '.join(unknown[:6])}")
    names = unknown if known is None else known
    index = {name: position for position, name in enumerate(names)}
    return names, np.array([index[label] for label in labels], np.int64)


def _are_numbers(labels: Sequence[str]) -> bool:
    return all(re.fullmatch(r"-?[0-9]+", label) for label in labels)
