"""The order in which samples are read.

n is the number of samples of the dataset. A sampler yields the indices of one rank: of a global sequence it takes the
elements ``start, start + step, ...``, with ``start`` the rank and ``step`` the number of ranks.

`GlobalOrderSampler` is the one training uses. The others are those of the released code and reproduce its orders.
"""

import itertools
import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from dinov2.data.randomness import seed_for

logger = logging.getLogger(__name__)


class GlobalOrderSampler(Sampler[int]):
    """One endless order of the samples, the same for any number of ranks.

    Pass t over the data is a permutation that depends on (seed, t) only. The passes follow each other without a gap
    and are cut into global batches of ``batch_size * world_size``, each of which is dealt to the ranks in runs of
    ``batch_size``. So no sample of a pass is dropped or repeated, and ranks that share a global batch between them
    see together what one process with that batch size sees.

    Args:
        sample_count: n.
        batch_size: samples per rank and step.
        seed: of the order.
        rank: whose samples to yield.
        world_size: number of ranks.
        start_position: samples that all ranks together have had before, when a run is resumed.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
    ) -> None:
        _check_count(sample_count)
        self.sample_count = sample_count
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_position = start_position

    def __iter__(self) -> Iterator[int]:
        current = -1
        mine = self.start_position + self.rank * self.batch_size
        for first in itertools.count(mine, self.batch_size * self.world_size):
            for position in range(first, first + self.batch_size):
                pass_index, place = divmod(position, self.sample_count)
                if pass_index != current:
                    current, order = pass_index, self._order(pass_index)
                yield int(order[place])

    def _order(self, pass_index: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed_for(self.seed, "order", pass_index))
        return _permutation(self.sample_count, generator).numpy()


class EpochSampler(Sampler[int]):
    """A part of one epoch of ``size`` samples, drawn from as many copies of the dataset as that takes.

    Args:
        size: samples per epoch, over all ranks.
        sample_count: n.
        shuffle: draw at random; otherwise in the order of the dataset.
        seed: of the draw.
        start: see the top of the file; None is 0.
        step: see the top of the file; None is 1.
        published: draw as the released code, whose seed is ``seed * epoch`` and so has no effect in epoch 0.
            Otherwise seed and epoch are mixed.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        published: bool = True,
    ) -> None:
        _check_count(sample_count)
        self.size = size
        self.sample_count = sample_count
        self.shuffle = shuffle
        self.seed = seed
        self.start, self.step = start or 0, step or 1
        self.published = published
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil((self.size - self.start) / self.step)

    def __iter__(self) -> Iterator[int]:
        copies = math.ceil(self.size / self.sample_count)
        samples = np.tile(np.arange(self.sample_count), copies)
        if self.shuffle:
            samples = np.random.default_rng(self._epoch_seed()).choice(samples, self.size, replace=False)
        yield from samples[self.start : self.size : self.step].tolist()

    def _epoch_seed(self) -> int:
        if self.published:
            return self.seed * self.epoch if self.seed else self.epoch
        return seed_for(self.seed, "epoch", self.epoch)


class InfiniteSampler(Sampler[int]):
    """Endless passes over the dataset; every pass is shuffled as a whole and then dealt to the ranks.

    Args:
        sample_count: n.
        shuffle: a new permutation for every pass, from one generator; otherwise the order of the dataset.
        seed: of that generator.
        start: see the top of the file; None is 0.
        step: see the top of the file; None is 1.
        advance: samples of this rank to skip at the start.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ) -> None:
        self.sample_count = sample_count
        self.shuffle = shuffle
        self.seed = seed
        self.start, self.step = start or 0, step or 1
        self.advance = advance
        _check_count(sample_count - self.start)

    def __iter__(self) -> Iterator[int]:
        in_order = range(self.start, self.sample_count, self.step)
        passes, skip = divmod(self.advance, len(in_order))
        endless = self._shuffled(passes) if self.shuffle else itertools.cycle(in_order)
        return itertools.islice(endless, skip, None)

    def _shuffled(self, first_pass: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for pass_index in itertools.count():
            order = _permutation(self.sample_count, generator)
            torch.randint(1, (1,), generator=generator)  # the released shuffle draws once more, for the last element
            if pass_index >= first_pass:
                yield from order[self.start :: self.step].tolist()


class ShardedInfiniteSampler(Sampler[int]):
    """Endless passes over a shard of the dataset, which is drawn once for each rank and stays its own.

    Every pass shuffles the shard anew. All shards have floor(n / step) samples, so up to ``step - 1`` samples are
    never seen. Without shuffling the order is that of `InfiniteSampler`.

    Args:
        sample_count: n.
        shuffle: see above.
        seed: of the shards and the order within them.
        start: see the top of the file; None is 0.
        step: see the top of the file; None is 1.
        advance: samples of this rank to skip at the start.
        use_new_shuffle_tensor_slice: shuffle with one call of torch. The released training uses the other shuffle,
            which draws one number per sample and is slow for large shards.
        published: skip as the released code, which takes n instead of the size of the shard when it counts whole
            passes, and so skips too little when ``advance`` exceeds n and there are several ranks.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
        published: bool = True,
    ) -> None:
        self.sample_count = sample_count
        self.shuffle = shuffle
        self.seed = seed
        self.start, self.step = start or 0, step or 1
        self.advance = advance
        self.shuffle_shard = _shuffle_at_once if use_new_shuffle_tensor_slice else _shuffle_one_by_one
        self.published = published
        self.shard_size = sample_count // self.step
        _check_count(self.shard_size)
        if shuffle and sample_count % self.step:
            logger.warning("%d of %d samples are in no shard: never seen", sample_count % self.step, sample_count)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(
                InfiniteSampler(sample_count=self.sample_count, start=self.start, step=self.step, advance=self.advance)
            )
        passes, skip = divmod(self.advance, self.sample_count if self.published else self.shard_size)
        return itertools.islice(self._shuffled(passes), skip, None)

    def _shuffled(self, first_pass: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        shard = _permutation(self.sample_count, generator)[self.start :: self.step][: self.shard_size]
        for pass_index in itertools.count(first_pass):
            generator.manual_seed(self.seed + self.start + (pass_index << 24))
            yield from self.shuffle_shard(shard, generator)


class EndlessEpochs(Sampler[int]):
    """The epochs of a sampler one after the other, without end.

    Args:
        sampler: one that yields an epoch.
        advance: samples of this rank to skip at the start.
    """

    def __init__(self, sampler: EpochSampler | DistributedSampler, *, advance: int = 0) -> None:
        self.sampler = sampler
        self.advance = advance
        _check_count(len(sampler))

    def __iter__(self) -> Iterator[int]:
        first, skip = divmod(self.advance, len(self.sampler))
        for epoch in itertools.count(first):
            self.sampler.set_epoch(epoch)
            yield from itertools.islice(self.sampler, skip, None)
            skip = 0


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError("no samples to draw from: the dataset is empty or has fewer samples than there are ranks")


def _permutation(count: int, generator: torch.Generator) -> torch.Tensor:
    """Permutation of range(count), (count,): 32-bit numbers where they do, which halves the memory."""
    return torch.randperm(count, dtype=torch.int32 if count <= 2**31 else torch.int64, generator=generator)


def _shuffle_at_once(shard: torch.Tensor, generator: torch.Generator) -> list[int]:
    return shard[torch.randperm(len(shard), generator=generator)].tolist()


def _shuffle_one_by_one(shard: torch.Tensor, generator: torch.Generator) -> list[int]:
    """Fisher-Yates "inside out": element i goes to a random place j <= i, and what was there to place i."""
    shuffled: list[int] = []
    for i, element in enumerate(shard.tolist()):
        j = int(torch.randint(i + 1, (1,), generator=generator)) if i else 0
        shuffled.append(element)
        shuffled[i], shuffled[j] = shuffled[j], element
    return shuffled
