"""Removes images from training data that are near duplicates of test images, and all that are connected with these."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dinov2.curate.duplicates import warn_of_many
from dinov2.curate.feature_table import FeatureTable, check_comparable
from dinov2.curate.groups import Groups
from dinov2.curate.images import Images
from dinov2.curate.outputs import Selection
from dinov2.curate.page import Example, Section, Shown, spread
from dinov2.curate.search import SearchOptions, make_search, nearest_cosines, nearest_pairs, similarities, with_progress


def drop_test_images(images: Images, tests: Images, *, threshold: float, k: int, options: SearchOptions) -> Selection:
    """Drop whole groups of near duplicates if one of their images is near a test image (arXiv 2304.07193, appendix A).

    Args:
        images: Training images, to select from.
        tests: Test images.
        threshold: Cosine above which two images are near duplicates.
        k: Neighbors of a training image among the training images that are considered.
        options: How neighbors are searched.
    """
    table = images.table
    check_comparable(table, tests.table)
    cosines = nearest_cosines(table, tests.table, options.seed)
    nearest, similarity, facts = _nearest_tests(table, tests.table, threshold, options)
    is_near = similarity > threshold
    pairs, _ = nearest_pairs(table, k=k, threshold=threshold, options=options) if is_near.any() else (iter(()), {})
    groups = Groups(len(table), pairs)
    is_dropped = np.isin(groups.labels, groups.labels[is_near])
    dropped = np.flatnonzero(is_dropped)
    partner = _partners(groups, nearest, similarity, is_near)[groups.labels[dropped]]
    partner = np.where(is_near[dropped], nearest[dropped], partner)
    values = similarities(table, dropped, tests.table, partner)
    warn_of_many(len(dropped), len(table), threshold, cosines)
    counts = {
        "near a test image": int(is_near.sum()),
        "connected with those": len(dropped) - int(is_near.sum()),
        "test images that are near": len(np.unique(nearest[is_near])),
    }
    return Selection(
        np.flatnonzero(~is_dropped),
        _records(images, tests, dropped, partner, values, is_near, groups),
        {"threshold": threshold}
        | facts
        | counts
        | {"cosine of an image and the nearest test image, quantiles": cosines},
        _sections(images, tests, dropped, partner, values, is_near),
    )


def _nearest_tests(
    table: FeatureTable, tests: FeatureTable, threshold: float, options: SearchOptions
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The nearest test image of each image (n,), and their cosine (n,)."""
    search = make_search(tests, table, k=1, at_least=threshold, options=options)
    nearest, similarity = np.full(len(table), -1, np.int64), np.full(len(table), -np.inf, np.float32)
    for part, near in with_progress(search.batches(table, 1), len(table)):
        nearest[part], similarity[part] = near.rows[:, 0], near.similarity[:, 0]
    return nearest, similarity, search.facts()


def _partners(groups: Groups, nearest: np.ndarray, similarity: np.ndarray, is_near: np.ndarray) -> np.ndarray:
    """The test image that is nearest to each group, by its number; -1 where none is near."""
    partners = np.full(groups.count, -1, np.int64)
    rows = np.flatnonzero(is_near)
    rows = rows[np.argsort(similarity[rows], kind="stable")]  # the most similar one is the last, and stays
    partners[groups.labels[rows]] = nearest[rows]
    return partners


def _records(
    images: Images,
    tests: Images,
    dropped: np.ndarray,
    partner: np.ndarray,
    values: np.ndarray,
    is_near: np.ndarray,
    groups: Groups,
) -> Iterator[dict[str, Any]]:
    for row, test, value in zip(dropped.tolist(), partner.tolist(), values.tolist(), strict=True):
        yield {
            "name": images.table.names[row],
            "reason": "near a test image" if is_near[row] else "connected with an image near a test image",
            "group": int(groups.labels[row]),
            "test": tests.table.names[test],
            "similarity": round(value, 4),
        }


def _sections(
    images: Images,
    tests: Images,
    dropped: np.ndarray,
    partner: np.ndarray,
    values: np.ndarray,
    is_near: np.ndarray,
) -> list[Section]:
    """Dropped images beside their test images: the least similar, the most similar, and the connected ones."""

    def examples(order: np.ndarray) -> list[Example]:
        return [
            Example(
                f"Cosine {values[number]:.3f}",
                [Shown(tests, int(partner[number]), "test"), Shown(images, int(dropped[number]), "dropped")],
            )
            for number in spread(order)
        ]

    order, near = np.argsort(values, kind="stable"), is_near[dropped]
    direct = order[near[order]]
    return [
        Section("Least similar to a test image", examples(direct)),
        Section("Most similar to a test image", examples(direct[::-1])),
        Section("Connected through other images, the least similar", examples(order[~near[order]])),
    ]
