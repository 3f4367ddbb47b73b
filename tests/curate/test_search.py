"""Neighbors: equal to a naive search where it is exact, and with a measured recall where it is not."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_features import near, unit_rows, write_features

from dinov2.curate import feature_table, search
from dinov2.curate.feature_table import FeatureTable
from dinov2.curate.search import CellSearch, ExactSearch, SearchOptions, nearest_cosines, nearest_pairs


def naive(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    cosines = queries.astype(np.float64) @ rows.astype(np.float64).T
    order = np.argsort(-cosines, axis=1)[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize("k", [1, 5, 100])
def test_exact_search_equals_a_naive_one_over_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    rows, queries = unit_rows(50, 8), unit_rows(6, 8, seed=3)
    monkeypatch.setattr(feature_table, "CHUNK_BYTES", 11 * 8 * 4)
    found = ExactSearch(FeatureTable([write_features(tmp_path, rows)])).neighbors(queries, k)
    expected, cosines = naive(queries, rows, k)
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_allclose(found.similarity, cosines, atol=1e-6)


def all_pairs(table: FeatureTable, threshold: float, k: int = 64) -> set[tuple[int, int]]:
    options = SearchOptions(scratch=table.folders[0])
    batches, _ = nearest_pairs(table, k=k, threshold=threshold, options=options)
    return {
        (min(pair), max(pair)) for left, right in batches for pair in zip(left.tolist(), right.tolist(), strict=True)
    }


@pytest.mark.parametrize("exact_pairs", [1e9, 0])
def test_pairs_are_those_above_the_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, exact_pairs: float
) -> None:
    """Copies at a cosine of 0.96 and 0.94 on both sides of 0.95, among rows that are not similar."""
    monkeypatch.setattr(search, "EXACT_PAIRS", exact_pairs)
    rows = unit_rows(1500, 32)
    close, far = near(rows[:200], 0.96), near(rows[200:400], 0.94, seed=5)
    table = FeatureTable([write_features(tmp_path, np.concatenate([rows, close, far]), shard_size=500)])
    pairs = all_pairs(table, 0.95)
    planted = {(row, 1500 + row) for row in range(200)}
    assert pairs <= planted
    if exact_pairs:
        assert pairs == planted
    else:
        assert len(pairs) >= 0.95 * len(planted)
    assert not caplog.records


@pytest.mark.parametrize("is_self", [True, False])
def test_all_cells_give_what_the_exact_search_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_self: bool
) -> None:
    monkeypatch.setattr(feature_table, "CHUNK_BYTES", 300 * 32 * 4)
    bank = FeatureTable([write_features(tmp_path / "a", unit_rows(2000, 32), shard_size=500)])
    queries = bank if is_self else FeatureTable([write_features(tmp_path / "b", unit_rows(70, 32, seed=2))])
    found = CellSearch(bank, SearchOptions(probes=1000, scratch=tmp_path))
    seen = []
    for part, neighbors in found.batches(queries, 6):
        exact = ExactSearch(bank).neighbors(queries.take(part), 6)
        np.testing.assert_allclose(neighbors.similarity, exact.similarity, atol=5e-4)
        assert (neighbors.rows == exact.rows).mean() > 0.9, "but for those that are rounded"
        seen += part.tolist()
    assert sorted(seen) == list(range(len(queries)))
    found.measure(queries, 5, -1.0, seed=0)
    assert found.recall["recall"] > 0.99 and found.recall["pairs"] == 5 * min(len(queries), 1000)
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b"}, "no temporary file"


def test_what_few_probes_miss_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = FeatureTable([write_features(tmp_path, unit_rows(2000, 64), shard_size=500)])
    found = CellSearch(table, SearchOptions(probes=2, scratch=tmp_path))
    found.measure(table, 8, -1.0, seed=0)
    expected, _ = naive(table.take(np.arange(1000)), table.take(np.arange(2000)), 9)
    near = {row: set(rows[1:]) for row, rows in enumerate(expected.tolist())}
    hits = sum(
        len(near[row] & set(rows))
        for part, neighbors in found.batches(table, 9, np.arange(1000))
        for row, rows in zip(part.tolist(), neighbors.rows.tolist(), strict=True)
    )
    assert found.recall["recall"] == pytest.approx(hits / 8000, abs=0.05)
    assert found.recall["recall"] < 0.5 and "give more --probes" in caplog.text
    caplog.clear()
    found.measure(table, 8, 0.99, seed=0)
    assert "what the search misses is unknown" in caplog.text and found.facts()["recall of a sample"] == "unknown"


def test_the_same_seed_gives_the_same_cells(tmp_path: Path) -> None:
    table = FeatureTable([write_features(tmp_path, unit_rows(2000, 16), shard_size=500)])
    first, same, other = (CellSearch(table, SearchOptions(4, tmp_path, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.order, same.order)
    assert not np.array_equal(first.order, other.order)


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)):
        search.scratch_array((1 << 40, 1 << 10), tmp_path)


def test_an_image_is_no_neighbor_of_itself(tmp_path: Path) -> None:
    rows = unit_rows(3, 8)
    table = FeatureTable([write_features(tmp_path / "a", np.concatenate([rows, rows, rows]))])
    assert (
        all_pairs(table, 0.99, k=1)
        < all_pairs(table, 0.99)
        == {(row + 3 * one, row + 3 * other) for row in range(3) for one, other in ((0, 1), (0, 2), (1, 2))}
    )
    single = FeatureTable([write_features(tmp_path / "b", rows[:1])])
    assert all_pairs(single, 0.0) == set()
    assert nearest_cosines(single, single, 0) == {}
    assert nearest_cosines(single, table, 0)["1%"] == pytest.approx(1, abs=1e-4)


def test_a_missing_faiss_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r'pip install "faiss-cpu>=1.8"'):
        search.import_faiss()
    assert logging.getLogger("faiss.loader").level == logging.WARNING
