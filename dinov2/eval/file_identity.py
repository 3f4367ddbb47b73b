"""Identity of image files: whether a dataset has changed, and which of its images are copies.

A file is identified by its path, size and modification time; a replacement with the same size and time is not
detected. Shapes: n images of a dataset.
"""

import hashlib
import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset

logger = logging.getLogger(__name__)

THREADS = 16  # network file systems serve many requests at once
STATS_AT_ONCE = 4096
MOST_FILES, MOST_BYTES = 100_000, 2 * 2**30  # read to find equal images; larger datasets are compared in part

MISSING = (-1, -1)


def image_identity(dataset: ImageDataset) -> str:
    """Digest of the names, sizes and modification times of the image files, of the reading options and of the labels.

    It differs for datasets with other images, order or labels. Images without files, such as those of an array, have a
    name only. All processes must call it together; rank 0 reads the file system.
    """
    return distributed.from_main(lambda: _identity(dataset))


def _identity(dataset: ImageDataset) -> str:
    digest = hashlib.sha256()

    def hashed(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            digest.update(os.fsencode(f"{name}\n"))
            yield name

    digest.update(file_stats(hashed(dataset.image_files()), len(dataset)).tobytes())
    if not _have_own_files(dataset):
        deque(hashed(map(dataset.describe, range(len(dataset)))), maxlen=0)
    digest.update(repr(dataset.image_options).encode())  # includes a range measured on other images
    targets = dataset.get_targets()
    if targets is not None:
        digest.update(str(targets.shape).encode() + targets.tobytes())
    return digest.hexdigest()


def _have_own_files(dataset: ImageDataset) -> bool:
    """Whether `describe` names the file of each image, rather than an archive and its member."""
    return len(dataset) > 0 and dataset.describe(0) == next(iter(dataset.image_files()))


def file_stats(paths: Iterable[str], count: int) -> np.ndarray:
    """Size in bytes and modification time in ns of files, (count, 2) int64; -1 for missing files."""
    stats, remaining = np.empty((count, 2), np.int64), iter(paths)
    chunks = iter(lambda: list(islice(remaining, STATS_AT_ONCE)), [])
    with ThreadPoolExecutor(THREADS) as pool:
        for number, chunk in enumerate(pool.map(lambda paths: list(map(_stat, paths)), chunks)):
            stats[number * STATS_AT_ONCE : (number + 1) * STATS_AT_ONCE] = chunk
    return stats


def _stat(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a name that is not a path
        return MISSING
    return status.st_size, status.st_mtime_ns


# --- Equal images ----------------------------------------------------------------------------------------------------


class LabeledDataset(NamedTuple):
    """A dataset to search for copies, and its labels as training classes."""

    dataset: ImageDataset
    labels: np.ndarray | None  # (n,) int64, or (n, L) padded with -1; None: not comparable

    @classmethod
    def of(cls, dataset: ImageDataset) -> "LabeledDataset":
        return cls(dataset, dataset.get_targets())

    def own_sizes(self) -> np.ndarray:
        """File size in bytes of each image, -1 for images without their own files: (n,) int64."""
        if not _have_own_files(self.dataset):
            return np.full(len(self.dataset), -1)
        return file_stats(self.dataset.image_files(), len(self.dataset))[:, 0]

    def labels_at(self, index: int) -> set[int]:
        """Labels of an image; empty if they are not comparable."""
        return set() if self.labels is None else set(np.atleast_1d(self.labels[index]).tolist()) - {-1}


def report_equal_images(
    train_name: str, train: LabeledDataset, others: Mapping[str, LabeledDataset]
) -> dict[str, dict[str, int]]:
    """Count, on rank 0, the images with an identical copy (the same bytes) in the training set, and warn of them.

    Only files of equal size are read. Images in archives and arrays are not compared.

    Returns:
        For each dataset string the number of `compared` images, of those `equal` to a (in the training set: another)
        training image, and of the latter `with_other_labels` than a copy. If the training set is tested on, all of its
        images are `compared` and `equal`.
    """
    if not distributed.is_main():
        return {}
    sets = {train_name: train} | {name: other for name, other in others.items() if name != train_name}
    found = dict(zip(sets, _count_equal(list(sets.values())), strict=True))
    for name, counts in found.items():
        role = "duplicates" if name == train_name else "also training images"
        if counts["equal"]:
            text = f"{name}: {counts['equal']} of {counts['compared']} images are {role} (the same bytes)"
            if name != train_name or counts["with_other_labels"]:
                logger.warning("%s, %d of them with another label", text, counts["with_other_labels"])
            else:
                logger.info("%s", text)
    if train_name in others:
        logger.warning("%s is both training and test set", train_name)
        found[train_name] |= dict.fromkeys(("compared", "equal"), len(train.dataset))
    return found


def _count_equal(sets: list[LabeledDataset]) -> list[dict[str, int]]:
    """Counts for `report_equal_images`; the training set comes first."""
    sizes = [each.own_sizes() for each in sets]
    chosen, skipped = _sizes_to_read(sizes)
    copies: defaultdict[bytes, list[set[int]]] = defaultdict(list)  # digest of training images -> labels of each
    results = []
    for number, (each, own_sizes) in enumerate(zip(sets, sizes, strict=True)):
        digests = _digests(each.dataset, np.flatnonzero(np.isin(own_sizes, chosen)).tolist())
        if number == 0:
            for index, digest in digests.items():
                copies[digest].append(each.labels_at(index))
        needed = 1 if number else 2  # a training image equals itself
        equal = [(each.labels_at(i), copies[digest]) for i, digest in digests.items() if len(copies[digest]) >= needed]
        # Neither unlabeled nor with a label in common.
        num_other = sum(bool(labels) and any(o and not labels & o for o in others) for labels, others in equal)
        compared = int((own_sizes >= 0).sum() - np.isin(own_sizes, skipped).sum())
        results.append({"compared": compared, "equal": len(equal), "with_other_labels": num_other})
    return results


def _sizes_to_read(sizes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """File sizes that several files share, one of them for training: those to compare, and those beyond the limits."""
    values, counts = np.unique(np.concatenate(sizes), return_counts=True)
    several = (values >= 0) & (counts > 1) & np.isin(values, sizes[0])
    order = np.random.default_rng(0).permutation(np.flatnonzero(several))  # random, whatever the sizes
    fits = (np.cumsum(counts[order]) <= MOST_FILES) & (np.cumsum(counts[order] * values[order]) <= MOST_BYTES)
    return values[order[fits]], values[order[~fits]]


def _digests(dataset: ImageDataset, indices: list[int]) -> dict[int, bytes]:
    """SHA-256 of the files of some images, without unreadable ones."""

    def digest(index: int) -> bytes | None:
        try:
            return hashlib.sha256(dataset.get_image_data(index)).digest()
        except Exception:  # feature extraction reports it
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(indices, pool.map(digest, indices), strict=True)
        return {index: value for index, value in found if value is not None}
