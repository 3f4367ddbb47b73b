"""What datasets in shards have in common."""

import heapq
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from dinov2.data.datasets.base import ImageDataset, ListedDataset
from dinov2.data.global_order import MIXED_SHARDS
from dinov2.data.images.survey import ImageSurvey, survey_images
from dinov2.data.shards.local_cache import LIMIT_VARIABLE, data_cache

_SURVEYED = 8  # shards whose images are inspected, if their data have to be copied first


class ShardedDataset(ListedDataset):
    """Images in shards, of which some can be read by a copy in the data cache only."""

    @property
    @abstractmethod
    def shard_sizes(self) -> list[int]:
        """The number of samples in each shard, in their order."""

    @property
    def copied_bytes(self) -> list[int]:
        """The size of the copy of each shard that needs one; empty if all are read where they are."""
        return []

    def survey(self) -> ImageSurvey:
        """As of every dataset, but from a few shards if they have to be copied first."""
        if self._survey is None:
            self._survey = survey_some(self, [self])
            self.image_options = self._survey.options
        return self._survey


def order_warning(parts: Sequence[ImageDataset], *, by_shards: bool) -> str:
    """A warning if the data cache is too small for the order of samples of some datasets together, else "".

    Args:
        by_shards: Whether the order is that of SHARD_ORDER, not one of all samples.
    """
    # Around the end of a group of mixed shards those of the next one are read, too.
    sizes = [part.copied_bytes for part in parts if isinstance(part, ShardedDataset)]
    needed = sum(sum(heapq.nlargest(2 * MIXED_SHARDS, each) if by_shards else each) for each in sizes)
    limit = data_cache().limit
    if needed <= limit:
        return ""
    remedy = "" if by_shards else "train.sampler=SHARD_ORDER, which reads some shards at a time, or "
    return (
        f"reading in this order copies the same data again and again: it needs {needed / 1e9:.3g} GB of the data "
        f"cache, which has {limit / 1e9:.3g}; use {remedy}a larger cache ({LIMIT_VARIABLE})"
    )


def survey_some(dataset: ImageDataset, parts: Sequence[ImageDataset]) -> ImageSurvey:
    """Inspect some images of a dataset, of a few shards only where these have to be copied first.

    Args:
        parts: The datasets of which it is the concatenation.

    Raises:
        DataSourceError: One of these shards cannot be read; it would be counted as unreadable images.
    """
    start, ranges = 0, []
    for part in parts:
        if isinstance(part, ShardedDataset) and part.copied_bytes:
            for first, end in _few_shards(part.shard_sizes):
                with suppress(OSError):
                    part.get_image_data(first)
                ranges.append(np.arange(start + first, start + end))
        else:
            ranges.append(np.arange(start, start + len(part)))
        start += len(part)
    samples = np.concatenate(ranges)
    return survey_images(
        lambda index: dataset.get_image_data(int(samples[index])),
        lambda index: dataset.describe(int(samples[index])),
        len(samples),
        dataset.image_options,
    )


def _few_shards(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """First sample and end of some shards, evenly spread."""
    ends = np.cumsum(sizes)
    filled = np.flatnonzero(sizes)
    count = min(_SURVEYED, len(filled))
    return [
        (int(ends[shard] - sizes[shard]), int(ends[shard])) for shard in filled[np.arange(count) * len(filled) // count]
    ]
