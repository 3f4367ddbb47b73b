"""Orders of our own: one global sequence of samples, whatever the number of processes.

``sample_count`` is the number of samples in the dataset. A sampler yields the indices of one rank.

A mixture of sources is divided into blocks of the same length. A block has a fixed number of samples of each source, in
an order that depends on (seed, block). So the number of samples of a source before a position is known in closed form,
which leads to a pass over the source and a place in it. Pass t over source s is a permutation that depends on (seed, s,
t): no sample of it comes again before the pass has ended.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from dinov2.data.randomness import seed_for

MIXED_SHARDS = 16  # by SHARD_ORDER
_EXACT_BLOCKS = range(1, 101)  # lengths of blocks of a mixture: the first one with all shares exactly, or else
_BLOCKS = (100, 1000, 10_000)  # the first one with all shares nearly
_TOLERANCE = 0.01  # of a share, relative to it


@dataclass(kw_only=True, eq=False)
class GlobalOrderSampler(Sampler[int]):
    """One endless order of the samples, the same for any number of ranks.

    Pass t over the data is a permutation that depends on (seed, t) only. The passes are concatenated and divided into
    global batches of ``batch_size * world_size``, of which each rank gets ``batch_size`` consecutive samples. So no
    sample of a pass is dropped or repeated, and the ranks together get the global batch that one process would get.
    """

    sample_count: int
    batch_size: int  # samples per rank and step
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start_position: int = 0  # samples that all ranks together have read before, when a run is resumed

    def __post_init__(self) -> None:
        check_count(self.sample_count)

    def __iter__(self) -> Iterator[int]:
        current = -1
        first_of_rank = self.start_position + self.rank * self.batch_size
        for first in itertools.count(first_of_rank, self.batch_size * self.world_size):
            for position in range(first, first + self.batch_size):
                pass_index, index = divmod(position, self.period)
                if pass_index != current:
                    current, order = pass_index, self.order_of(pass_index)
                yield int(order[index])

    @property
    def period(self) -> int:
        """The number of samples of a pass."""
        return self.sample_count

    def order_of(self, pass_index: int) -> np.ndarray:
        """The samples of a pass, (period,)."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "order", pass_index))
        return permutation(self.sample_count, generator).numpy()


@dataclass(kw_only=True, eq=False)
class ShardOrderSampler(GlobalOrderSampler):
    """The same for a dataset in shards on a disk that seeks badly: a pass reads ``mixed`` shards at a time.

    Pass t permutes the shards, divides them into groups, and permutes the samples of each group, all by (seed, t). So a
    batch is drawn from the shards of one group (or two) instead of all, which should be told apart by nothing.
    """

    shard_sizes: Sequence[int]  # samples of each shard, in the order of the dataset
    mixed: int = MIXED_SHARDS

    def order_of(self, pass_index: int) -> np.ndarray:
        rng = np.random.default_rng(seed_for(self.seed, "shard order", pass_index))
        ends = np.cumsum(self.shard_sizes)
        shards = rng.permutation(len(ends))
        groups = (shards[start : start + self.mixed] for start in range(0, len(shards), self.mixed))
        samples = [[np.arange(ends[i] - self.shard_sizes[i], ends[i]) for i in group] for group in groups]
        return np.concatenate([rng.permutation(np.concatenate(group)) for group in samples])


# --- Mixtures --------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A dataset of a mixture."""

    name: str
    num_samples: int
    per_block: int  # samples in each block
    shard_sizes: Sequence[int] | None  # of a dataset in shards


def samples_per_block(weights: Sequence[float]) -> list[int]:
    """The number of samples of each source in a block, by largest remainders; their sum is the length of a block.

    Raises:
        ValueError: A weight is so small that its share is off by more than 1 % even in a block of 10,000.
    """
    shares = np.array(weights, np.float64) / sum(weights)
    lengths = [*((length, 1e-9) for length in _EXACT_BLOCKS), *((length, _TOLERANCE) for length in _BLOCKS)]
    for length, tolerance in lengths:
        exact = shares * length
        counts = np.floor(exact + 1e-9).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: length - counts.sum()]] += 1
        if (np.abs(counts - exact) <= tolerance * exact).all():
            per_block: list[int] = counts.tolist()
            return per_block
    raise ValueError(
        f"weight {min(weights):g} of {sum(weights):g} is too small: in a block of {_BLOCKS[-1]:,} samples its share "
        f"would be off by more than {_TOLERANCE:.0%}"
    )


class _Passes:
    """The endless passes over one source; keeps the permutation of the latest one."""

    def __init__(self, order: GlobalOrderSampler) -> None:
        self.order = order
        self.latest, self.permutation = -1, np.empty(0, np.int64)

    def samples_at(self, places: np.ndarray) -> np.ndarray:
        """The samples at some consecutive places, counted from the start of the run."""
        passes, indices = np.divmod(places, self.order.sample_count)
        found = np.empty(len(places), np.int64)
        for number in range(passes[0], passes[-1] + 1):
            if number != self.latest:
                self.latest, self.permutation = number, self.order.order_of(number)
            found[passes == number] = self.permutation[indices[passes == number]]
        return found


@dataclass(kw_only=True, eq=False)
class MixtureSampler(GlobalOrderSampler):
    """A `GlobalOrderSampler` whose passes are the blocks of a mixture; ``sample_count`` is that of all sources."""

    sources: Sequence[Source]
    by_shards: bool = False  # whether a pass over a source in shards reads some shards at a time

    def __post_init__(self) -> None:
        super().__post_init__()
        self._starts = np.cumsum([0] + [source.num_samples for source in self.sources])
        self._block = np.repeat(np.arange(len(self.sources)), [source.per_block for source in self.sources])
        self._passes = [_Passes(self._order_within(number)) for number in range(len(self.sources))]

    def _order_within(self, number: int) -> GlobalOrderSampler:
        source = self.sources[number]
        place: Any = {
            "sample_count": source.num_samples,
            "batch_size": 1,
            "seed": seed_for(self.seed, "source", number),
        }
        if self.by_shards and source.shard_sizes is not None:
            return ShardOrderSampler(**place, shard_sizes=source.shard_sizes)
        return GlobalOrderSampler(**place)

    @property
    def period(self) -> int:
        """The length of a block."""
        return len(self._block)

    def order_of(self, pass_index: int) -> np.ndarray:
        """The samples of a block, in order."""
        block = np.random.default_rng(seed_for(self.seed, "mixture", pass_index)).permutation(self._block)
        order = np.empty(len(block), np.int64)
        for number, source in enumerate(self.sources):
            drawn = np.arange(pass_index * source.per_block, (pass_index + 1) * source.per_block)
            order[block == number] = self._starts[number] + self._passes[number].samples_at(drawn)
        return order


def check_count(count: int) -> None:
    """Raise a ValueError if there are no samples."""
    if count < 1:
        raise ValueError("no samples to draw from: the dataset is empty or has fewer samples than there are ranks")


def permutation(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random permutation of range(count), (count,); 32-bit integers where possible, which halves the memory."""
    return torch.randperm(count, dtype=torch.int32 if count <= 2**31 else torch.int64, generator=generator)
