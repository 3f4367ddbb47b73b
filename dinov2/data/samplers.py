"""Samplers: the order in which samples are read.

``sample_count`` is the number n of samples in the dataset. A sampler yields the indices of one rank: the elements
``start, start + step, ...`` of a global sequence, with ``start`` the rank (None: 0) and ``step`` the number of ranks
(None: 1).

Training uses those of `dinov2.data.global_order`. The others are those of the released code and reproduce its orders.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from dinov2.data.global_order import (
    GlobalOrderSampler,
    MixtureSampler,
    ShardOrderSampler,
    Source,
    check_count,
    permutation,
)
from dinov2.data.randomness import seed_for

logger = logging.getLogger(__name__)


class SamplerType(Enum):
    """Order of the samples."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4
    GLOBAL_ORDER = 5
    SHARD_ORDER = 6


FINITE = (SamplerType.DISTRIBUTED, SamplerType.EPOCH)


class DividedSampler(Sampler[int]):
    """Base class of the samplers of the released code, in the order of the dataset unless ``shuffle`` is set."""

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ) -> None:
        self.sample_count = sample_count
        self.shuffle = shuffle
        self.seed = seed
        self.start, self.step = start or 0, step or 1


class EpochSampler(DividedSampler):
    """One rank's part of an epoch of ``size`` samples, drawn from as many copies of the dataset as needed.

    Args:
        size: Samples per epoch, over all ranks.
        published: Whether to draw like the released code, whose seed is ``seed * epoch`` and so has no effect in
            epoch 0. Otherwise seed and epoch are mixed.
    """

    def __init__(self, *, size: int, published: bool = True, **part: Any) -> None:
        super().__init__(**part)
        check_count(self.sample_count)
        self.size = size
        self.published = published
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil((self.size - self.start) / self.step)

    def __iter__(self) -> Iterator[int]:
        copies = math.ceil(self.size / self.sample_count)
        samples = np.tile(np.arange(self.sample_count), copies)
        if self.shuffle:
            seed = seed_for(self.seed, "epoch", self.epoch)
            if self.published:
                seed = self.seed * self.epoch if self.seed else self.epoch
            samples = np.random.default_rng(seed).choice(samples, self.size, replace=False)
        yield from samples[self.start : self.size : self.step].tolist()


class InfiniteSampler(DividedSampler):
    """Endless passes over the dataset; each pass is shuffled as a whole and then divided among the ranks.

    The first ``advance`` samples of this rank are skipped.
    """

    def __init__(self, *, advance: int = 0, **part: Any) -> None:
        super().__init__(**part)
        self.advance = advance
        check_count(self.sample_count - self.start)

    def __iter__(self) -> Iterator[int]:
        in_order = range(self.start, self.sample_count, self.step)
        passes, skip = divmod(self.advance, len(in_order))
        endless = self._shuffled(passes) if self.shuffle else itertools.cycle(in_order)
        return itertools.islice(endless, skip, None)

    def _shuffled(self, first_pass: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for pass_index in itertools.count():
            order = permutation(self.sample_count, generator)
            torch.randint(1, (1,), generator=generator)  # the released shuffle draws once more for the last element
            if pass_index >= first_pass:
                yield from order[self.start :: self.step].tolist()


class ShardedInfiniteSampler(DividedSampler):
    """Endless passes over one shard of the dataset per rank; the shards are drawn once.

    Each pass shuffles the shard again. All shards have floor(n / step) samples, so up to ``step - 1`` samples are
    never read. Without shuffling the order is that of `InfiniteSampler`.

    Args:
        advance: Samples of this rank to skip at the start.
        use_new_shuffle_tensor_slice: Whether to shuffle with one torch call. The released training uses the other
            shuffle, which draws one number per sample and is slow for large shards.
        published: Whether to skip like the released code, which counts whole passes by n instead of the size of the
            shard, and so skips too few samples when ``advance`` exceeds n and there are several ranks.
    """

    def __init__(
        self, *, advance: int = 0, use_new_shuffle_tensor_slice: bool = False, published: bool = True, **part: Any
    ) -> None:
        super().__init__(**part)
        self.advance = advance
        self.shuffle_shard = _shuffle_at_once if use_new_shuffle_tensor_slice else _shuffle_one_by_one
        self.published = published
        self.shard_size, left = divmod(self.sample_count, self.step)
        check_count(self.shard_size)
        if self.shuffle and left:
            logger.warning("%d of %d samples are in no shard and are never read", left, self.sample_count)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(
                InfiniteSampler(sample_count=self.sample_count, start=self.start, step=self.step, advance=self.advance)
            )
        passes, skip = divmod(self.advance, self.sample_count if self.published else self.shard_size)
        return itertools.islice(self._shuffled(passes), skip, None)

    def _shuffled(self, first_pass: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        shard = permutation(self.sample_count, generator)[self.start :: self.step][: self.shard_size]
        for pass_index in itertools.count(first_pass):
            generator.manual_seed(self.seed + self.start + (pass_index << 24))
            yield from self.shuffle_shard(shard, generator)


class EndlessEpochs(Sampler[int]):
    """Endless sequence of the epochs of a sampler, without the first ``advance`` samples of this rank."""

    def __init__(self, sampler: EpochSampler | DistributedSampler, *, advance: int = 0) -> None:
        self.sampler = sampler
        self.advance = advance
        check_count(len(sampler))

    def __iter__(self) -> Iterator[int]:
        first, skip = divmod(self.advance, len(self.sampler))
        for epoch in itertools.count(first):
            self.sampler.set_epoch(epoch)
            yield from itertools.islice(self.sampler, skip, None)
            skip = 0


def make_sampler(
    sampler_type: SamplerType,
    *,
    sample_count: int,
    batch_size: int,
    shuffle: bool = True,
    seed: int,
    size: int = -1,
    start_position: int,
    rank: int,
    world_size: int,
    endless: bool = False,
    shard_sizes: Sequence[int] | None = None,
    mixture: Sequence[Source] = (),
) -> Sampler[int]:
    """Build a sampler; EPOCH and SHARDED_INFINITE are those without the published defects.

    Args:
        sample_count: Samples in the dataset.
        batch_size: Samples per batch of this rank.
        size: Samples per epoch over all ranks, for EPOCH; -1 means `sample_count`.
        start_position: Samples that all ranks together have read before; ignored by finite samplers.
        endless: Whether finite samplers continue with their next epoch, and heed `start_position`.
        shard_sizes: Samples in each shard of the dataset, for SHARD_ORDER.
        mixture: The sources of a dataset with weights, for GLOBAL_ORDER and SHARD_ORDER only.
    """
    advance = start_position // world_size
    part: Any = {"sample_count": sample_count, "shuffle": shuffle, "seed": seed, "start": rank, "step": world_size}
    epoch: EpochSampler | DistributedSampler
    match sampler_type:
        case SamplerType.GLOBAL_ORDER | SamplerType.SHARD_ORDER:
            place: Any = {"rank": rank, "world_size": world_size, "start_position": start_position}
            place |= {"sample_count": sample_count, "batch_size": batch_size, "seed": seed}
            by_shards = sampler_type is SamplerType.SHARD_ORDER
            if mixture and (not by_shards or any(source.shard_sizes for source in mixture)):
                return MixtureSampler(**place, sources=mixture, by_shards=by_shards)
            if not by_shards:
                return GlobalOrderSampler(**place)
            if shard_sizes is None or mixture:
                raise ValueError("the sampler SHARD_ORDER needs a dataset in shards: Tar, Zip or Parquet")
            return ShardOrderSampler(**place, shard_sizes=shard_sizes)
        case _ if mixture:
            raise ValueError(
                f"weights of a mixture need the sampler GLOBAL_ORDER or SHARD_ORDER, not {sampler_type.name}"
            )
        case SamplerType.INFINITE:
            return InfiniteSampler(**part, advance=advance)
        case SamplerType.SHARDED_INFINITE | SamplerType.SHARDED_INFINITE_NEW:
            at_once = sampler_type is SamplerType.SHARDED_INFINITE_NEW
            return ShardedInfiniteSampler(
                **part, advance=advance, use_new_shuffle_tensor_slice=at_once, published=False
            )
        case SamplerType.EPOCH:
            epoch = EpochSampler(**part, size=size if size > 0 else sample_count, published=False)
        case SamplerType.DISTRIBUTED:
            counted: Any = range(sample_count)  # it only reads the length
            epoch = DistributedSampler(counted, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
    return EndlessEpochs(epoch, advance=advance) if endless else epoch


def _shuffle_at_once(shard: torch.Tensor, generator: torch.Generator) -> list[int]:
    return shard[torch.randperm(len(shard), generator=generator)].tolist()


def _shuffle_one_by_one(shard: torch.Tensor, generator: torch.Generator) -> list[int]:
    """Inside-out Fisher-Yates shuffle: element i moves to a random index j <= i, and the element there to index i."""
    shuffled: list[int] = []
    for i, element in enumerate(shard.tolist()):
        j = int(torch.randint(i + 1, (1,), generator=generator)) if i else 0
        shuffled.append(element)
        shuffled[i], shuffled[j] = shuffled[j], element
    return shuffled
