"""Hierarchical k-means, and samples that take equally much from each of its clusters.

The first level divides the images by the cosine of their features, the next one the centroids of the first, and so on.
Large clusters of similar images attract too many centroids. Resampling corrects this: some images of every cluster,
few but equally many, give new centroids, several times (Vo et al., arXiv 2405.15613, section 3).

Shapes: n points, k clusters, D feature dimension.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dinov2.curate.feature_table import FeatureTable
from dinov2.curate.search import fit_centroids, sample_rows, search_rows

logger = logging.getLogger(__name__)

POINTS_PER_CLUSTER = 256  # at most, that a k-means is fitted to
ITERATIONS = 20
MOST_SEEDED = 10_000  # clusters up to which k-means++ chooses the first centroids; more are random points
POINTS_PER_SEED = 10  # that it chooses from


class ClusterOptions(NamedTuple):
    """How points are divided into clusters."""

    resampling: str = "closest"  # to the centroid, or random
    steps: int = 3  # of resampling
    points: int = 10  # of each cluster, in a step
    memory: float = 4.0  # GiB for what a k-means is fitted to
    seed: int = 0


class Centroids:
    """Centroids of one level, which are the points of the next, in memory."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.width = rows, rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> np.ndarray:
        return self.rows[index]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, self.rows


Points = FeatureTable | Centroids


def hierarchical_kmeans(table: FeatureTable, clusters: Sequence[int], options: ClusterOptions) -> list[np.ndarray]:
    """Divide images into clusters, these into fewer clusters, and so on.

    Args:
        table: The features.
        clusters: Number of clusters of each level, descending.
        options: See `ClusterOptions`.

    Returns:
        For each level the cluster of each point (n,) int64; the points of a level are the clusters of the former.

    Raises:
        ValueError: The numbers do not descend, or there are not as many images.
    """
    check_clusters(clusters, len(table))
    points: Points = table
    levels = []
    for number, k in enumerate(clusters):
        centroids, nearest = kmeans(points, k, options, (options.seed, number))
        levels.append(nearest)
        sizes = np.bincount(nearest, minlength=k)
        text = "level %d: %d points in %d clusters, the largest of %d, %d empty"
        logger.info(text, number + 1, len(points), k, sizes.max(), (sizes == 0).sum())
        points = Centroids(centroids)
    return levels


def check_clusters(clusters: Sequence[int], num_images: int) -> None:
    """Raise a `ValueError` for numbers of clusters that do not descend from the number of images."""
    shown = ",".join(map(str, clusters))
    if clusters[0] > num_images:
        raise ValueError(f"--clusters {shown}: there are only {num_images} images")
    if any(upper >= lower for lower, upper in zip(clusters, clusters[1:], strict=False)):
        raise ValueError(f"--clusters {shown}: each level must have fewer clusters than the former, such as 1000,50")


def kmeans(points: Points, k: int, options: ClusterOptions, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (k, D) of unit length, and the nearest of each point (n,)."""
    rng = np.random.default_rng(seed)
    most = max(k, int(options.memory * 2**30 / (8 * points.width)))
    sample = sample_rows(len(points), min(most, POINTS_PER_CLUSTER * k), int(rng.integers(2**31)))
    centroids = _fit(points.take(sample), k, rng)
    nearest, similarity = _assign(points, centroids)
    for _ in range(options.steps):
        chosen = resample(nearest, similarity, min(options.points, max(1, most // k)), options.resampling, rng)
        if len(chosen) < k:  # so many clusters are empty
            break
        centroids = _fit(points.take(chosen), k, rng)
        nearest, similarity = _assign(points, centroids)
    return centroids, nearest


def resample(
    nearest: np.ndarray, similarity: np.ndarray, count: int, method: str, rng: np.random.Generator
) -> np.ndarray:
    """At most `count` points of each cluster, ascending: those closest to its centroid, or random ones.

    Args:
        nearest: Cluster of each point (n,).
        similarity: Cosine of each point with its centroid (n,).
        count: Points of a cluster.
        method: `closest` or `random`.
        rng: For random ones.
    """
    key = -similarity if method == "closest" else rng.random(len(nearest))
    return np.sort(_first_of_each(nearest, key, np.full(nearest.max() + 1, count)))


def _first_of_each(cluster: np.ndarray, key: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The points of least key in each cluster, as many as `counts` (k,) has for it."""
    order = np.lexsort((key, cluster))
    sizes = np.bincount(cluster, minlength=len(counts))
    rank = np.arange(len(cluster)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[rank < counts[cluster[order]]]


def _fit(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Centroids (k, D) of points (m, D), all of unit length, by spherical k-means."""
    from sklearn.cluster import kmeans_plusplus

    seed, first = int(rng.integers(1, 2**31 - 1)), None
    if k <= MOST_SEEDED:
        some = points[sample_rows(len(points), POINTS_PER_SEED * k, seed)]
        first, _ = kmeans_plusplus(some, k, random_state=seed)
    return fit_centroids(points, k, ITERATIONS, seed, first)


def _assign(points: Points, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each point (n,), and their cosine (n,)."""
    nearest, similarity = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    for start, rows in points.chunks():
        found = search_rows(rows, centroids, 1)
        part = slice(start, start + len(rows))
        nearest[part], similarity[part] = found.rows[:, 0], found.similarity[:, 0]
    return nearest, similarity


# --- Samples ---------------------------------------------------------------------------------------------------------


def balanced_sample(levels: Sequence[np.ndarray], size: int, seed: int) -> np.ndarray:
    """Choose images, equally many of each cluster of the last level, and so on down to random images of the first.

    A cluster that has fewer gives all, and the others share the rest.

    Args:
        levels: See `hierarchical_kmeans`.
        size: Number of images.
        seed: Of the random choices.

    Returns:
        Indices (size,) int64, ascending.
    """
    rng = np.random.default_rng((seed, len(levels)))
    capacities = [np.bincount(levels[0], minlength=_num_clusters(levels, 0))]
    for number, level in enumerate(levels[1:], start=1):
        capacities.append(
            np.bincount(level, weights=capacities[-1], minlength=_num_clusters(levels, number)).astype(int)
        )
    quotas = share_out(size, capacities[-1], rng)
    for number in range(len(levels) - 1, 0, -1):
        children = np.zeros(len(levels[number]), np.int64)
        for cluster in np.flatnonzero(quotas):
            members = np.flatnonzero(levels[number] == cluster)
            children[members] = share_out(int(quotas[cluster]), capacities[number - 1][members], rng)
        quotas = children
    return np.sort(_first_of_each(levels[0], rng.random(len(levels[0])), quotas))


def _num_clusters(levels: Sequence[np.ndarray], number: int) -> int:
    """Clusters of a level: as many as the next has points; empty ones at the end of the last do not matter."""
    return len(levels[number + 1]) if number + 1 < len(levels) else int(levels[number].max()) + 1


def share_out(total: int, capacities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share a number out equally; who has less gives all, and what cannot be shared equally goes to random ones.

    Args:
        total: At most the sum of the capacities.
        capacities: Most that each can give (k,).
        rng: Decides who gives one more.

    Returns:
        What each gives (k,) int64; the sum is `total`.
    """
    if total > capacities.sum():
        raise ValueError(f"{total} of {capacities.sum()} cannot be chosen")
    shares = np.zeros(len(capacities), np.int64)
    is_open = capacities > 0
    while total and is_open.any():
        each = total // is_open.sum()
        if not (is_full := is_open & (capacities <= each)).any():
            shares[is_open] = each
            extra = rng.permutation(np.flatnonzero(is_open))[: total - each * is_open.sum()]
            shares[extra] += 1
            break
        shares[is_full] = capacities[is_full]
        total -= int(capacities[is_full].sum())
        is_open &= ~is_full
    return shares
