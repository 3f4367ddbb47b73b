"""Hierarchical k-means finds clusters that are there; shares are equal as far as they can be."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_features import unit_rows, write_features

from dinov2.curate.clusters import ClusterOptions, balanced_sample, hierarchical_kmeans, resample, share_out
from dinov2.curate.feature_table import FeatureTable


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 5))
def test_shares_are_equal_up_to_what_each_has(capacities: list[int], fraction: float, seed: int) -> None:
    total = int(fraction * sum(capacities))
    shares = share_out(total, np.array(capacities), np.random.default_rng(seed))
    assert shares.sum() == total and (shares >= 0).all() and (shares <= capacities).all()
    # Whoever has something left gives as much as anyone, but for one.
    left = [share for share, capacity in zip(shares.tolist(), capacities, strict=True) if share < capacity]
    assert not left or min(left) >= shares.max() - 1


def test_too_large_a_total_cannot_be_shared() -> None:
    assert share_out(7, np.array([1, 9, 2, 0]), np.random.default_rng(0)).tolist() == [1, 4, 2, 0]
    with pytest.raises(ValueError, match="13 of 12"):
        share_out(13, np.array([1, 9, 2]), np.random.default_rng(0))


def test_resampling_takes_the_closest_or_random_points_of_each_cluster() -> None:
    nearest = np.array([0, 0, 0, 2, 2, 2, 2, 0])
    similarity = np.array([0.9, 0.5, 0.8, 0.1, 0.4, 0.3, 0.2, 0.7])
    rng = np.random.default_rng(0)
    assert resample(nearest, similarity, 2, "closest", rng).tolist() == [0, 2, 4, 5]
    drawn = {tuple(resample(nearest, similarity, 2, "random", rng).tolist()) for _ in range(50)}
    assert len(drawn) > 10 and {len(each) for each in drawn} == {4}
    assert all(nearest[list(each)].tolist().count(0) == 2 for each in drawn)
    assert resample(nearest, similarity, 9, "closest", rng).tolist() == list(range(8))


CENTERS = np.repeat(np.eye(4, 32), 2, axis=0) + 0.35 * np.eye(8, 32, k=10)  # four pairs of similar directions
COUNTS = [400, 200, 100, 50, 40, 30, 20, 10]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> FeatureTable:
    labels = np.repeat(np.arange(8), COUNTS)
    rows = CENTERS[labels] + 0.02 * np.random.default_rng(0).standard_normal((len(labels), 32))
    folder = tmp_path_factory.mktemp("tree")
    return FeatureTable([write_features(folder, rows.astype(np.float32), labels=labels.tolist(), shard_size=200)])


@pytest.mark.parametrize("resampling", ["closest", "random"])
def test_clusters_of_clusters_are_found_and_balanced(table: FeatureTable, resampling: str) -> None:
    assert table.labels is not None
    levels = hierarchical_kmeans(table, [24, 4], ClusterOptions(resampling))
    assert [len(level) for level in levels] == [850, 24]
    pairs = levels[1][levels[0]]
    assert len({(pair, label // 2) for pair, label in zip(pairs.tolist(), table.labels.tolist(), strict=True)}) == 4
    kept = balanced_sample(levels, 120, seed=0)
    assert len(set(kept.tolist())) == 120 and (np.diff(kept) > 0).all()
    of_pair = np.bincount(table.labels[kept] // 2, minlength=4)
    assert of_pair.tolist() == [30, 30, 30, 30], "600, 150, 70 and 30 images before"
    assert not np.array_equal(kept, balanced_sample(levels, 120, seed=1))


def test_the_seed_decides(table: FeatureTable) -> None:
    first, same, other = (hierarchical_kmeans(table, [20, 5], ClusterOptions(seed=seed, steps=1)) for seed in (0, 0, 1))
    assert all(np.array_equal(one, two) for one, two in zip(first, same, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_all_and_none_can_be_chosen(table: FeatureTable) -> None:
    levels = hierarchical_kmeans(table, [10], ClusterOptions(steps=0))
    assert balanced_sample(levels, 850, seed=0).tolist() == list(range(850))
    assert len(balanced_sample(levels, 1, seed=0)) == 1


def test_equal_images_leave_clusters_empty(tmp_path: Path) -> None:
    rows = np.repeat(unit_rows(2, 8), 10, axis=0)
    levels = hierarchical_kmeans(FeatureTable([write_features(tmp_path, rows)]), [6, 3], ClusterOptions())
    assert balanced_sample(levels, 4, seed=0).shape == (4,)


@pytest.mark.parametrize(("clusters", "message"), [([851], "only 850 images"), ([50, 50], "fewer clusters")])
def test_numbers_of_clusters_descend(table: FeatureTable, clusters: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hierarchical_kmeans(table, clusters, ClusterOptions())
