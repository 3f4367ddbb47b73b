"""Nearest neighbors by cosine similarity in bounded memory: exact for small data, by cells for large.

Of large data all rows are written to a temporary file, sorted into some 2 sqrt(n) cells by the nearest of as many
centroids. The queries of a cell are compared with the rows in the `probes` cells around it only, in one matrix product.
What this misses is measured on a sample of queries, and reported.

Shapes: n rows of the bank, q queries, k neighbors, D feature dimension.
"""

import importlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dinov2.curate.feature_table import FeatureTable
from dinov2.files import naming_full_disk

logger = logging.getLogger(__name__)

EXACT_PAIRS = 4e10  # of queries and rows, above which the search is approximate
SAMPLE = 1000  # queries on which it is compared with the exact search
POINTS_PER_CELL = 50  # that centroids are fitted to
ITERATIONS = 10  # of this k-means
LOW_RECALL = 0.95  # below it, a warning
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_COMPARED = 1 << 16  # pairs whose exact cosines are computed at once


class SearchOptions(NamedTuple):
    """How neighbors are searched."""

    probes: int = 16  # cells that the queries of a cell are compared with
    scratch: Path = Path()  # folder of the temporary file
    seed: int = 0


class Neighbors(NamedTuple):
    """The nearest rows of queries, from near to far; where there are fewer, rows are -1 and similarities -inf."""

    rows: np.ndarray  # (q, k) int64
    similarity: np.ndarray  # (q, k) float32, cosine

    @classmethod
    def none(cls, num_queries: int, k: int = 0) -> "Neighbors":
        return cls(np.full((num_queries, k), -1, np.int64), np.full((num_queries, k), -np.inf, np.float32))

    def joined(self, other: "Neighbors", k: int) -> "Neighbors":
        """The nearest k of both; of equally near ones those of `self` first."""
        rows = np.concatenate([self.rows, other.rows], axis=1)
        similarity = np.concatenate([self.similarity, other.similarity], axis=1)
        return Neighbors(rows, similarity).sorted(k)

    def sorted(self, k: int) -> "Neighbors":
        order = np.argsort(-self.similarity, axis=1, kind="stable")[:, :k]
        return Neighbors(*(np.take_along_axis(values, order, axis=1) for values in self))

    def without(self, own: np.ndarray | None, k: int) -> "Neighbors":
        """The nearest k except for one row of the bank for each query, `own` (q,), which it is itself; None: no row."""
        if own is None:
            return self.sorted(k)
        is_own = self.rows == own[:, None]
        return Neighbors(np.where(is_own, -1, self.rows), np.where(is_own, -np.inf, self.similarity)).sorted(k)


def import_faiss() -> Any:
    """Import the optional library faiss, on as many threads as torch; a `ValueError` if it is missing."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # not which instructions of the CPU it tries to use
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError('curation needs a package that is missing: pip install "faiss-cpu>=1.8"') from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def search_rows(queries: np.ndarray, rows: np.ndarray, k: int) -> Neighbors:
    """Search the nearest of some rows (n, D) of unit length for queries (q, D), exactly."""
    faiss = import_faiss()
    similarity, found = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    return Neighbors(found, similarity)


class ExactSearch:
    """Compares each query with each row of the bank, which is read from its files chunk by chunk."""

    def __init__(self, bank: FeatureTable) -> None:
        self.bank = bank

    def neighbors(self, queries: np.ndarray, k: int) -> Neighbors:
        """Search the k nearest rows for queries (q, D) of unit length."""
        found = Neighbors.none(len(queries))
        for start, rows in self.bank.chunks():
            near = search_rows(queries, rows, k)
            found = found.joined(Neighbors(near.rows + start, near.similarity), k)
        return found

    def batches(self, queries: FeatureTable, k: int) -> Iterator[tuple[np.ndarray, Neighbors]]:
        """Numbers of queries, each once, and their k nearest rows."""
        for start, rows in queries.chunks():
            yield np.arange(start, start + len(rows)), self.neighbors(rows, k)

    def facts(self) -> dict[str, Any]:
        return {"search": "exact"}


class CellSearch:
    """Compares queries with the rows in the cells around their own.

    Args:
        bank: The rows to find.
        options: See `SearchOptions`.
    """

    def __init__(self, bank: FeatureTable, options: SearchOptions) -> None:
        self.bank, n = bank, len(bank)
        self.num_cells = max(1, min(round(2 * math.sqrt(n)), n // POINTS_PER_CELL))
        self.probes, self.recall = min(options.probes, self.num_cells), {"recall": math.nan, "pairs": 0}
        logger.info("%d rows in %d cells, %d of which are searched", n, self.num_cells, self.probes)
        points = bank.take(sample_rows(n, POINTS_PER_CELL * self.num_cells, options.seed))
        seed = int(np.random.default_rng((options.seed, 1)).integers(1, 2**31 - 1))
        self.centroids = fit_centroids(points, self.num_cells, ITERATIONS, seed)
        self.around = search_rows(self.centroids, self.centroids, self.probes).rows  # (cells, probes)
        self.cell = self._cells_of(bank)
        self.order = np.argsort(self.cell, kind="stable")  # (n,) rows of the bank, cell by cell
        self.ends = np.cumsum(np.bincount(self.cell, minlength=self.num_cells))
        self.place = np.empty(n, np.int64)  # of each row of the bank in that order
        self.place[self.order] = np.arange(n)
        self._sorted = scratch_array((n, bank.width), options.scratch)
        for start, rows in bank.chunks():
            self._sorted[self.place[start : start + len(rows)]] = rows

    def batches(
        self, queries: FeatureTable, k: int, only: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, Neighbors]]:
        """As `ExactSearch.batches`; `only` some queries. Similarities are rounded, to some 0.0005."""
        chosen = np.arange(len(queries)) if only is None else only
        cell = self.cell[chosen] if queries is self.bank else self._cells_of(queries, chosen)
        order = np.argsort(cell, kind="stable")
        ends = np.cumsum(np.bincount(cell, minlength=self.num_cells))
        for number in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
            members = chosen[order[ends[number - 1] if number else 0 : ends[number]]]
            for start in range(0, len(members), self.bank.chunk_rows):
                part = members[start : start + self.bank.chunk_rows]
                rows = self._rows(self.place[part]) if queries is self.bank else queries.take(part)
                yield part, self._neighbors(rows, number, k)

    def measure(self, queries: FeatureTable, k: int, at_least: float, seed: int) -> None:
        """Record which of the exact neighbors of a sample of queries are found, of those of some similarity."""
        sample = sample_rows(len(queries), SAMPLE, seed)
        own = sample if queries is self.bank else None
        exact = ExactSearch(self.bank).neighbors(queries.take(sample), k + 1).without(own, k)
        found = Neighbors.none(len(sample), k)
        for part, near in self.batches(queries, k + 1, sample):
            position = np.searchsorted(sample, part)
            near = near.without(None if own is None else part, k)
            found.rows[position, : near.rows.shape[1]] = near.rows
        counts = exact.similarity >= at_least
        hits = sum(
            np.isin(rows[count], near).sum() for rows, count, near in zip(exact.rows, counts, found.rows, strict=True)
        )
        pairs = int(counts.sum())
        self.recall = {"recall": round(float(hits / pairs), 4) if pairs else math.nan, "pairs": pairs}
        if pairs == 0:
            logger.warning("no pair in a sample of %d counts: what the search misses is unknown", len(sample))
        elif hits < LOW_RECALL * pairs:
            logger.warning(
                "the search finds %.1f %% of the neighbors that count: give more --probes", 100 * hits / pairs
            )

    def facts(self) -> dict[str, Any]:
        recall = "unknown" if self.recall["pairs"] == 0 else self.recall["recall"]
        measured = {"recall of a sample": recall, "its pairs": self.recall["pairs"]}
        return {"search": f"{self.probes} of {self.num_cells} cells"} | measured

    def _neighbors(self, queries: np.ndarray, cell: int, k: int) -> Neighbors:
        """The nearest of the rows around a cell for queries (q, D)."""
        found = Neighbors.none(len(queries), k)
        places = np.concatenate(
            [np.arange(self.ends[near - 1] if near else 0, self.ends[near]) for near in self.around[cell]]
        )
        for start in range(0, len(places), self.bank.chunk_rows):
            part = places[start : start + self.bank.chunk_rows]
            near = search_rows(queries, self._rows(part), k)
            found = found.joined(Neighbors(self.order[part][near.rows], near.similarity), k)
        return found

    def _rows(self, places: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._sorted[places].astype(np.float32)
        return rows

    def _cells_of(self, table: FeatureTable, index: np.ndarray | None = None) -> np.ndarray:
        """The cell of each row of a table, or of those of an index."""
        return np.concatenate([search_rows(rows, self.centroids, 1).rows[:, 0] for _, rows in table.chunks(index)])


def scratch_array(shape: tuple[int, int], folder: Path) -> np.ndarray:
    """An array of float16 in a file without a name, which is gone with the array; a full disk is an OSError."""
    with tempfile.TemporaryFile(dir=folder) as file, naming_full_disk(folder):
        os.posix_fallocate(file.fileno(), 0, 2 * shape[0] * shape[1])  # writing to a map of a full disk kills
        return np.memmap(file, np.float16, "r+", shape=shape)


def fit_centroids(
    points: np.ndarray, k: int, iterations: int, seed: int, first: np.ndarray | None = None
) -> np.ndarray:
    """Centroids (k, D) of points (m, D), all of unit length, by spherical k-means that begins at `first` (k, D)."""
    options: dict[str, Any] = {"niter": iterations, "spherical": True, "seed": seed}
    # All points that are given are used, however few or many they are for a cluster.
    options |= {"min_points_per_centroid": 1, "max_points_per_centroid": math.ceil(len(points) / k) + 1}
    fitted = import_faiss().Kmeans(points.shape[1], k, **options)
    fitted.train(np.ascontiguousarray(points), init_centroids=first)
    centroids: np.ndarray = fitted.centroids
    return centroids


def make_search(
    bank: FeatureTable, queries: FeatureTable, *, k: int, at_least: float = -1.0, options: SearchOptions
) -> ExactSearch | CellSearch:
    """The search for neighbors of all rows of `queries`, which may be the bank itself.

    Args:
        bank: The rows to find.
        queries: What neighbors are searched for.
        k: Neighbors of a query.
        at_least: Similarity of the neighbors that count when a search by cells is measured.
        options: See `SearchOptions`.
    """
    if len(bank) * len(queries) <= EXACT_PAIRS:
        return ExactSearch(bank)
    search = CellSearch(bank, options)
    search.measure(queries, k, at_least, options.seed)
    return search


def nearest_pairs(
    table: FeatureTable, *, k: int, threshold: float, options: SearchOptions
) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], dict[str, Any]]:
    """Pairs of rows more similar than a threshold among the k nearest of each row, in batches; facts of the search."""
    k = min(k, len(table) - 1)
    if k == 0:
        return iter(()), {"search": "exact"}
    search = make_search(table, table, k=k, at_least=threshold, options=options)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for own, near in with_progress(search.batches(table, k + 1), len(table)):
            near = near.without(own, k)
            query, rank = np.nonzero(near.similarity > threshold)
            yield own[query], near.rows[query, rank]

    return pairs(), search.facts()


def with_progress(
    batches: Iterator[tuple[np.ndarray, Neighbors]], total: int
) -> Iterator[tuple[np.ndarray, Neighbors]]:
    """Batches of a search as they are, with a progress bar of the images in them."""
    with tqdm(total=total, unit=" images", mininterval=5, disable=None) as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch[0]))


def sample_rows(n: int, count: int, seed: int) -> np.ndarray:
    """Some of n rows, all different, in ascending order."""
    if count >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng((seed, n)).choice(n, count, replace=False))


def nearest_cosines(table: FeatureTable, bank: FeatureTable, seed: int) -> dict[str, float]:
    """Quantiles of the exact cosine of an image and its nearest, in the same table another one; of a sample."""
    sample = sample_rows(len(table), SAMPLE, seed)
    found = ExactSearch(bank).neighbors(table.take(sample), 2)
    nearest = found.without(sample if bank is table else None, 1).similarity[:, 0]
    if not np.isfinite(nearest).all():
        return {}
    return {f"{quantile:.0%}": round(float(np.quantile(nearest, quantile)), 4) for quantile in QUANTILES}


def similarities(first: FeatureTable, left: np.ndarray, second: FeatureTable, right: np.ndarray) -> np.ndarray:
    """Exact cosines (m,) of the rows `left` of one table and `right` of another."""
    parts = [slice(start, start + _COMPARED) for start in range(0, len(left), _COMPARED)]
    values = [np.einsum("nd,nd->n", first.take(left[part]), second.take(right[part])) for part in parts]
    return np.concatenate([np.empty(0, np.float32), *values]).clip(-1, 1)
