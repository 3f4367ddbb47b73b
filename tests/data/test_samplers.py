"""Orders: the released ones are reproduced, the global one deals every pass to any number of ranks."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from dinov2.data.samplers import (
    EndlessEpochs,
    EpochSampler,
    GlobalOrderSampler,
    InfiniteSampler,
    SamplerType,
    ShardedInfiniteSampler,
    ShardOrderSampler,
    make_sampler,
)


def take(sampler: Iterable[int], count: int) -> list[int]:
    return list(itertools.islice(sampler, count))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.replace(",", "").split()]


# ---- orders of the reference ----


def test_permutation_of_torch_is_still_the_one_that_the_orders_were_made_with() -> None:
    assert torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist() == numbers("4 1 7 5 3 9 0 8 6 2")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"start": 0}, "6 0 7 4 3, 4 0 7 6 3, 6 0 7 3 4"),
        ({"start": 1}, "8 5 9 2 1, 9 2 5 1 8, 2 5 9 1 8"),
        ({"start": 0, "advance": 7}, "7 6 3, 6 0 7 3 4"),
        ({"start": 0, "advance": 10}, "4 0 7 6 3, 6 0 7"),
        ({"start": 0, "use_new_shuffle_tensor_slice": True}, "6 4 7 0 3, 4 3 6 0 7, 7 6 3 0 4"),
        ({"start": 1, "use_new_shuffle_tensor_slice": True}, "1 2 9 8 5, 9 2 8 5 1, 9 2 5 8 1"),
    ],
)
def test_sharded_order_of_ten_samples_on_two_ranks(options: dict[str, Any], expected: str) -> None:
    sampler = ShardedInfiniteSampler(sample_count=10, shuffle=True, seed=0, step=2, **options)
    assert take(sampler, len(numbers(expected))) == numbers(expected)


def test_sharded_order_drops_what_does_not_divide() -> None:
    orders = [
        take(ShardedInfiniteSampler(sample_count=7, shuffle=True, seed=0, start=rank, step=3), 4) for rank in range(3)
    ]
    assert orders == [[3, 4, 4, 3], [0, 2, 2, 0], [6, 5, 5, 6]]


@pytest.mark.parametrize(
    "sampler, expected",
    [
        (
            InfiniteSampler(sample_count=10, shuffle=True, seed=0, start=0, step=2),
            "4 7 3 0 6, 1 6 0 5 4, 6 9 0 7 1",
        ),
        (InfiniteSampler(sample_count=23, shuffle=True, seed=5, start=3, step=4, advance=9), "18 2 16 5 18 20"),
        (InfiniteSampler(sample_count=100, shuffle=True, seed=123, start=7, step=8, advance=30), "17 57 61 54 56 95"),
        (InfiniteSampler(sample_count=5, start=0, step=2), "0 2 4 0 2 4"),
        (InfiniteSampler(sample_count=5, start=1, step=2), "1 3 1 3"),
        (InfiniteSampler(sample_count=7, start=1, step=3, advance=3), "4 1 4 1"),
        (ShardedInfiniteSampler(sample_count=12, start=1, step=3, advance=4), "1 4 7 10 1 4"),
        (
            ShardedInfiniteSampler(sample_count=23, shuffle=True, seed=5, start=3, step=4, advance=50),
            "8 16 9 8 17 2",
        ),
    ],
)
def test_endless_orders(sampler: Sampler[int], expected: str) -> None:
    assert take(sampler, len(numbers(expected))) == numbers(expected)
    assert take(sampler, len(numbers(expected))) == numbers(expected), "a sampler starts over every time"


@pytest.mark.parametrize(
    "size, count, step, seed, epoch, expected",
    [
        (12, 10, 2, 3, 0, ["7 5 4 3 2 8", "5 6 2 0 4 1"]),
        (12, 10, 2, 3, 1, ["2 2 3 8 0 1", "7 6 7 6 1 9"]),
        (17, 23, 3, 2, 4, ["7 20 21 22 9 14", "5 1 10 8 19 2", "12 3 13 0 11"]),
        (10, 10, 1, 0, 0, ["0 9 1 2 4 6 3 7 5 8"]),
    ],
)
def test_epochs(size: int, count: int, step: int, seed: int, epoch: int, expected: list[str]) -> None:
    for start, order in enumerate(expected):
        sampler = EpochSampler(size=size, sample_count=count, shuffle=True, seed=seed, start=start, step=step)
        sampler.set_epoch(epoch)
        assert list(sampler) == numbers(order)
        assert len(sampler) == len(numbers(order))


def test_epochs_in_order() -> None:
    assert list(EpochSampler(size=12, sample_count=5, start=1, step=2)) == [1, 3, 0, 2, 4, 1]


# ---- what is fixed ----


@pytest.mark.parametrize("new_shuffle", [False, True])
@pytest.mark.parametrize("advance", [0, 3, 5, 23, 50])
def test_the_fixed_sharded_order_advances_by_exactly_that_many(advance: int, new_shuffle: bool) -> None:
    def sampler(advance: int) -> ShardedInfiniteSampler:
        return ShardedInfiniteSampler(
            sample_count=23,
            shuffle=True,
            seed=5,
            start=3,
            step=4,
            advance=advance,
            use_new_shuffle_tensor_slice=new_shuffle,
            published=False,
        )

    assert take(sampler(advance), 30) == take(sampler(0), advance + 30)[advance:]


def test_fixed_epochs_depend_on_the_seed_from_the_first() -> None:
    def order(seed: int, epoch: int, published: bool) -> list[int]:
        sampler = EpochSampler(size=50, sample_count=50, shuffle=True, seed=seed, published=published)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0, published=True) == order(2, 0, published=True)
    orders = [order(seed, epoch, published=False) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("advance", [0, 5, 7, 8, 20])
@pytest.mark.parametrize(
    "make",
    [
        lambda: EpochSampler(size=20, sample_count=20, shuffle=True, start=1, step=3, published=False),
        lambda: DistributedSampler(range(20), num_replicas=3, rank=1),
    ],
)
def test_endless_epochs_go_on_and_can_be_entered_anywhere(
    make: Callable[[], EpochSampler | DistributedSampler], advance: int
) -> None:
    whole = take(EndlessEpochs(make()), 60)
    assert take(EndlessEpochs(make(), advance=advance), 30) == whole[advance:][:30]
    length = len(make())
    assert whole[:length] != whole[length : 2 * length]


@pytest.mark.parametrize(
    "make",
    [
        lambda: GlobalOrderSampler(sample_count=0, batch_size=2),
        lambda: EpochSampler(size=3, sample_count=0),
        lambda: InfiniteSampler(sample_count=2, start=2, step=4),
        lambda: ShardedInfiniteSampler(sample_count=3, shuffle=True, start=1, step=4),
    ],
)
def test_too_few_samples_are_an_error_and_not_an_endless_loop(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="no samples"):
        make()


# ---- the global order ----


def global_batches(
    count: int, global_batch: int, world_size: int, num_steps: int, start_position: int = 0
) -> list[list]:
    """The samples that all ranks see together, step by step, in the order of their positions."""
    batch_size = global_batch // world_size
    streams = [
        iter(
            GlobalOrderSampler(
                sample_count=count,
                batch_size=batch_size,
                seed=1,
                rank=rank,
                world_size=world_size,
                start_position=start_position,
            )
        )
        for rank in range(world_size)
    ]
    return [[index for stream in streams for index in take(stream, batch_size)] for _ in range(num_steps)]


@given(count=st.integers(1, 40), micro_batch=st.integers(1, 6), num_steps=st.integers(1, 8))
def test_any_number_of_ranks_sees_the_same_global_batches(count: int, micro_batch: int, num_steps: int) -> None:
    one, two, four = (global_batches(count, 4 * micro_batch, world_size, num_steps) for world_size in (1, 2, 4))
    assert one == two == four


@given(count=st.integers(1, 40), global_batch=st.integers(1, 12).map(lambda x: 2 * x))
def test_every_pass_has_every_sample_once_across_ranks_and_steps(count: int, global_batch: int) -> None:
    num_steps = -(-3 * count // global_batch)
    sequence = sum(global_batches(count, global_batch, 2, num_steps), [])
    for first in range(0, 3 * count, count):
        assert sorted(sequence[first : first + count]) == list(range(count))


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int) -> list[int]:
        return take(GlobalOrderSampler(sample_count=30, batch_size=4, seed=seed), 60)

    assert len({tuple(part) for seed in (0, 1) for part in (order(seed)[:30], order(seed)[30:])}) == 4


@given(count=st.integers(1, 40), start_step=st.integers(0, 30), world_size=st.sampled_from([1, 2, 4]))
def test_global_order_can_be_entered_at_any_step(count: int, start_step: int, world_size: int) -> None:
    whole = global_batches(count, 12, world_size, start_step + 3)
    assert global_batches(count, 12, world_size, 3, 12 * start_step) == whole[start_step:]


@given(count=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_another_number_of_ranks_continues_where_the_former_ones_stopped(count: int, batch_size: int) -> None:
    sequence: list[int] = []
    for world_size in (2, 1, 3):
        batches = global_batches(count, batch_size * world_size, world_size, 3, start_position=len(sequence))
        sequence += sum(batches, [])
    assert sequence == sum(global_batches(count, 1, 1, len(sequence)), [])


# ---- the order by shards ----


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=9), mixed=st.integers(1, 4), batch_size=st.integers(1, 5))
def test_a_pass_by_shards_has_every_sample_once_and_few_shards_at_a_time(
    sizes: list[int], mixed: int, batch_size: int
) -> None:
    count = sum(sizes)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    options: dict[str, Any] = {"sample_count": count, "batch_size": batch_size, "shard_sizes": sizes, "mixed": mixed}
    order = take(ShardOrderSampler(**options), 2 * count)
    for first in (0, count):
        shards = shard_of[order[first : first + count]]
        assert sorted(order[first : first + count]) == list(range(count))
        visits = [int(shard) for shard in dict.fromkeys(shards.tolist())]
        open_at_once = [
            len({s for s in visits if (shards[: i + 1] == s).any() and (shards[i:] == s).any()}) for i in range(count)
        ]
        assert max(open_at_once) <= mixed
    ranks = [iter(ShardOrderSampler(**options, rank=rank, world_size=3, start_position=count)) for rank in range(3)]
    assert [index for rank in ranks for index in take(rank, batch_size)] == take(
        ShardOrderSampler(**options, start_position=count), 3 * batch_size
    )


def test_orders_by_shards_differ_by_pass_and_seed() -> None:
    def order(seed: int) -> list[int]:
        return take(ShardOrderSampler(sample_count=30, batch_size=4, seed=seed, shard_sizes=[3] * 10, mixed=2), 60)

    assert len({tuple(part) for seed in (0, 1) for part in (order(seed)[:30], order(seed)[30:])}) == 4


def test_a_dataset_without_shards_has_no_order_by_shards() -> None:
    place: dict[str, Any] = {"sample_count": 9, "batch_size": 2, "seed": 0, "start_position": 0, "rank": 0}
    with pytest.raises(ValueError, match="SHARD_ORDER needs a dataset in shards: Tar, Zip or Parquet"):
        make_sampler(SamplerType.SHARD_ORDER, **place, world_size=1)
