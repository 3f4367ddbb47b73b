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
    shuffle: bool = True,
    seed: int,
    size: int = -1,
    start_position: int,
    rank: int,
    world_size: int,
    endless: bool = False,
) -> Sampler[int]:
    """Build a sampler; EPOCH and SHARDED_INFINITE are those without the published defects.

    Args:
        sample_count: Samples in the dataset.
        batch_size: Samples per batch of this rank.
        size: Samples per epoch over all ranks, for EPOCH; -1 means `sample_count`.
        start_position: Samples that all ranks together have read before; ignored by finite samplers.
        endless: Whether finite samplers continue with their next epoch, and heed `start_position`.
    """
    advance = start_position // world_size
    part: Any = {"sample_count": sample_count, "shuffle": shuffle, "seed": seed, "start": rank, "step": world_size}
    epoch: EpochSampler | DistributedSampler
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
