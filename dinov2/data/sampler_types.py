"""The samplers of loaders by name."""

from enum import Enum
from typing import Any

from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from dinov2.data.samplers import (
    EndlessEpochs,
    EpochSampler,
    GlobalOrderSampler,
    InfiniteSampler,
    ShardedInfiniteSampler,
)


class SamplerType(Enum):
    """Order of the samples, see `dinov2.data.samplers`."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4
    GLOBAL_ORDER = 5


FINITE = (SamplerType.DISTRIBUTED, SamplerType.EPOCH)


def make_sampler(
    sampler_type: SamplerType,
    *,
    sample_count: int,
    batch_size: int,
    shuffle: bool,
    seed: int,
    size: int,
    start_position: int,
    rank: int,
    world_size: int,
) -> Sampler[int]:
    """Build a sampler.

    Args:
        sampler_type: Order of the samples.
        sample_count: Samples in the dataset.
        batch_size: Samples per batch of this rank.
        shuffle: Whether samples come in random order.
        seed: Seed of the order.
        size: Samples per epoch over all ranks, for EPOCH.
        start_position: Samples that all ranks together have read before; ignored by finite samplers.
        rank: Rank of this process.
        world_size: Number of processes.
    """
    advance = start_position // world_size
    match sampler_type:
        case SamplerType.GLOBAL_ORDER:
            return GlobalOrderSampler(
                sample_count=sample_count,
                batch_size=batch_size,
                seed=seed,
                rank=rank,
                world_size=world_size,
                start_position=start_position,
            )
        case SamplerType.EPOCH:
            return EpochSampler(
                size=size,
                sample_count=sample_count,
                shuffle=shuffle,
                seed=seed,
                start=rank,
                step=world_size,
                published=False,
            )
        case SamplerType.DISTRIBUTED:
            counted: Any = range(sample_count)  # it only reads the length
            return DistributedSampler(counted, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        case SamplerType.INFINITE:
            return InfiniteSampler(
                sample_count=sample_count, shuffle=shuffle, seed=seed, start=rank, step=world_size, advance=advance
            )
        case SamplerType.SHARDED_INFINITE | SamplerType.SHARDED_INFINITE_NEW:
            return ShardedInfiniteSampler(
                sample_count=sample_count,
                shuffle=shuffle,
                seed=seed,
                start=rank,
                step=world_size,
                advance=advance,
                use_new_shuffle_tensor_slice=sampler_type is SamplerType.SHARDED_INFINITE_NEW,
                published=False,
            )


def make_endless_sampler(
    sampler_type: SamplerType,
    *,
    sample_count: int,
    batch_size: int,
    seed: int,
    start_position: int,
    rank: int,
    world_size: int,
) -> Sampler[int]:
    """Build a shuffling sampler; finite ones continue with their next epoch. Arguments as in `make_sampler`."""
    sampler = make_sampler(
        sampler_type,
        sample_count=sample_count,
        batch_size=batch_size,
        shuffle=True,
        seed=seed,
        size=sample_count,
        start_position=start_position,
        rank=rank,
        world_size=world_size,
    )
    if isinstance(sampler, EpochSampler | DistributedSampler):
        return EndlessEpochs(sampler, advance=start_position // world_size)
    return sampler
