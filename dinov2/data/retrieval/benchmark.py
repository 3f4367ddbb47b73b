"""What a benchmark of image retrieval consists of: queries, a database of images, and the relevant images per query."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2.data.datasets.base import ListedDataset
from dinov2.data.datasets.file_list import PathTable
from dinov2.data.images import AnyImage, read_image_file

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""


class GroundTruth(NamedTuple):
    """The images of the database that show the object of a query; indices. All others are irrelevant."""

    easy: Sequence[int]
    hard: Sequence[int]
    junk: Sequence[int]  # neither right nor wrong


# Setting -> fields of `GroundTruth` that are (positives, junk), as revised by Radenovic et al. (2018).
SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
    "all": (("easy", "hard"), ("junk",)),  # of sets that do not distinguish easy from hard
}


class QuerySet(ListedDataset):
    """The images of a list, optionally cropped to a box each; they have no labels.

    Args:
        root: Folder that paths are relative to.
        paths: Paths of images.
        boxes: Part of each image, rounded to pixels and limited to the image; None for whole images.
        **transforms: See `ImageDataset`.
    """

    def __init__(self, root: Path, paths: Sequence[str], boxes: Sequence[Box] | None = None, **transforms: Any) -> None:
        super().__init__(**transforms)
        self.root, self.boxes, self.classes = root, boxes, ()
        self._images, self._targets = PathTable.of(paths), None

    def image_files(self) -> Iterator[str]:
        return map(self.path, range(len(self)))

    def path(self, index: int) -> str:
        """The file of an image."""
        return os.path.join(self.root, self._images[index])

    def describe(self, index: int) -> str:
        """The file and box of an image."""
        box = "" if self.boxes is None else f" [{', '.join(f'{edge:g}' for edge in self.boxes[index])}]"
        return self.path(index) + box

    def get_image_data(self, index: int) -> bytes:
        return read_image_file(self.path(index), self.image_options)

    def get_image(self, index: int) -> AnyImage:
        image = super().get_image(index)
        if self.boxes is None:
            return image
        with self._naming(index):
            left, top, right, bottom = (round(edge) for edge in self.boxes[index])
            box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
            if box[0] >= box[2] or box[1] >= box[3]:
                raise ValueError(f"the box has no pixel of the image of {image.width} x {image.height} pixels")
            return image.crop(box)


class RetrievalBenchmark(NamedTuple):
    """Queries (Q), database (n), and the ground truth of each query (Q)."""

    queries: QuerySet
    database: QuerySet
    ground_truth: Sequence[GroundTruth]
    settings: Sequence[str] = ("easy", "medium", "hard")  # those in which it is scored
