"""Seeds are a function of (seed, purpose, position) and nothing else."""

from dinov2.data.randomness import seed_for


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    assert seed_for(0, "augment", 0) == 5245970379662454181
    assert seed_for(7, "replacement", 123456789, 2) == 6370798747673054561


def test_seed_purpose_and_position_all_matter() -> None:
    seeds = [
        seed_for(seed, purpose, *position)
        for seed in (0, 1, 11)
        for purpose in ("augment", "mask")
        for position in [(), (1,), (11,), (1, 1)]
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
