"""A sample of images that takes equally much from each cluster of a hierarchical k-means."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dinov2.curate.clusters import ClusterOptions, balanced_sample, check_clusters, hierarchical_kmeans
from dinov2.curate.images import Images
from dinov2.curate.outputs import Selection
from dinov2.curate.page import EXAMPLES, SHOWN, Example, Section, Shown


def sample_balanced(images: Images, *, clusters: Sequence[int], size: int, options: ClusterOptions) -> Selection:
    """Choose images so that clusters are balanced (arXiv 2405.15613).

    Args:
        images: What to select from.
        clusters: Number of clusters of each level, descending.
        size: Number of images to choose.
        options: How images are divided into clusters.
    """
    table = images.table
    if size > len(table):
        raise ValueError(f"--size {size}: there are only {len(table)} images")
    check_clusters(clusters, len(table))
    levels = hierarchical_kmeans(table, clusters, options)
    kept = balanced_sample(levels, size, options.seed)
    above = [levels[0]]  # cluster of each image, level by level
    for level in levels[1:]:
        above.append(level[above[-1]])
    facts = {
        f"level {number}: clusters, largest before, after": _sizes(cluster, cluster[kept])
        for number, cluster in enumerate(above, start=1)
    }
    return Selection(kept, _records(images, kept, above), facts, _sections(images, kept, above))


def _sizes(before: np.ndarray, after: np.ndarray) -> str:
    counts = np.bincount(before), np.bincount(after)
    return f"{(counts[0] > 0).sum()}, {counts[0].max()}, {counts[1].max()}"


def _records(images: Images, kept: np.ndarray, above: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    is_kept = np.zeros(len(images.table), bool)
    is_kept[kept] = True
    for row in np.flatnonzero(~is_kept).tolist():
        clusters = [int(level[row]) for level in above]
        yield {"name": images.table.names[row], "reason": "not chosen from its cluster", "clusters": clusters}


def _sections(images: Images, kept: np.ndarray, above: Sequence[np.ndarray]) -> list[Section]:
    """Kept images of the clusters of the last level, of the largest and of the smallest."""
    cluster = above[-1]
    sizes, kept_sizes = np.bincount(cluster), np.bincount(cluster[kept], minlength=cluster.max() + 1)

    def example(number: int) -> Example:
        rows = kept[cluster[kept] == number]
        rows = rows[np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)]
        caption = f"Cluster {number}: {sizes[number]} images, {kept_sizes[number]} kept"
        return Example(caption, [Shown(images, row) for row in rows.tolist()])

    order = np.argsort(-sizes, kind="stable")
    order = order[kept_sizes[order] > 0]
    small = order[EXAMPLES:][-EXAMPLES:]
    return [
        Section("Largest clusters of the last level, kept images", [example(each) for each in order[:EXAMPLES]]),
        Section("Smallest clusters of the last level, kept images", [example(each) for each in small]),
    ]
