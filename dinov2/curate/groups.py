"""Groups of images that are connected by similarity, also through others."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

BATCH = 1 << 20  # pairs that are added at once


class Groups:
    """Connected components of n images, to which pairs are added in batches."""

    def __init__(self, num_images: int, pairs: Iterable[tuple[np.ndarray, np.ndarray]] = ()) -> None:
        self.labels = np.arange(num_images, dtype=np.int32)  # number of the component of each image
        self.count = num_images
        for left, right in _gathered(pairs):
            self.add(left, right)

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        """Connect images, given by two arrays of the same length."""
        from scipy.sparse import coo_array  # which comes with scikit-learn
        from scipy.sparse.csgraph import connected_components

        if len(left) == 0:
            return
        edges = (np.ones(len(left), bool), (self.labels[left], self.labels[right]))
        self.count, merged = connected_components(coo_array(edges, shape=(self.count, self.count)), directed=False)
        self.labels = merged.astype(np.int32)[self.labels]

    def of_several(self) -> Iterator[np.ndarray]:
        """The images of each group of at least two, ascending; groups in the order of their first images."""
        is_shared = np.bincount(self.labels, minlength=self.count)[self.labels] > 1
        images = np.flatnonzero(is_shared)
        labels = self.labels[images]
        _, first, group = np.unique(labels, return_index=True, return_inverse=True)
        order = np.argsort(first[group], kind="stable")
        starts = np.flatnonzero(np.diff(first[group][order], prepend=-1))
        return iter(np.split(images[order], starts[1:])) if len(images) else iter(())


def _gathered(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same pairs in large batches, each of which costs time for all images."""
    waiting, count = [(np.empty(0, np.int64), np.empty(0, np.int64))], 0
    for batch in pairs:
        waiting.append(batch)
        count += len(batch[0])
        if count >= BATCH:
            yield np.concatenate([left for left, _ in waiting]), np.concatenate([right for _, right in waiting])
            waiting, count = waiting[:1], 0
    yield np.concatenate([left for left, _ in waiting]), np.concatenate([right for _, right in waiting])


def choose_kept(group: np.ndarray, keep: Literal["largest", "first"], size_of: Callable[[int], tuple[int, int]]) -> int:
    """The image of a group to keep: of the most pixels, then bytes, by `size_of`, then the first; or simply the first.

    An image whose size is unknown, (0, 0), is smaller than any other.
    """
    if keep == "first":
        return int(group[0])
    return int(max(group.tolist(), key=lambda image: (*size_of(image), -image)))
