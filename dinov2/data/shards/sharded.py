"""What datasets in shards have in common."""

import heapq
from abc import abstractmethod
from contextlib import suppress

import numpy as np

from dinov2.data.datasets.base import ListedDataset
from dinov2.data.images.survey import ImageSurvey, survey_images
from dinov2.data.samplers import MIXED_SHARDS
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

    def order_warning(self, *, by_shards: bool) -> str:
        """A warning if the data cache is too small for an order of samples, by shards or of all of them; else ""."""
        sizes, limit = self.copied_bytes, data_cache().limit
        # Around the end of a group of mixed shards those of the next one are read, too.
        needed = sum(heapq.nlargest(2 * MIXED_SHARDS, sizes) if by_shards else sizes)
        if needed <= limit:
            return ""
        remedy = "" if by_shards else "train.sampler=SHARD_ORDER, which reads some shards at a time, or "
        return (
            f"reading in this order copies the same data again and again: it needs {needed / 1e9:.3g} GB of the data "
            f"cache, which has {limit / 1e9:.3g}; use {remedy}a larger cache ({LIMIT_VARIABLE})"
        )

    def survey(self) -> ImageSurvey:
        """As of every dataset, but from a few shards if they have to be copied first."""
        if self._survey is None and self.copied_bytes:
            sizes = np.array(self.shard_sizes)
            starts, filled = np.cumsum(sizes) - sizes, np.flatnonzero(sizes)
            count = min(_SURVEYED, len(filled))
            chosen = filled[np.arange(count) * len(filled) // count]
            for shard in chosen:  # a shard that cannot be read is no unreadable image
                with suppress(OSError):
                    self.get_image_data(int(starts[shard]))
            samples = np.concatenate([np.arange(starts[shard], starts[shard] + sizes[shard]) for shard in chosen])
            self._survey = survey_images(
                lambda index: self.get_image_data(int(samples[index])),
                lambda index: self.describe(int(samples[index])),
                len(samples),
                self.image_options,
            )
            self.image_options = self._survey.options
        return super().survey()
