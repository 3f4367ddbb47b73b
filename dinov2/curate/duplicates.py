"""Groups of near duplicates in a set of images, of which one each is kept."""

import logging
from typing import Any, Literal

import numpy as np

from dinov2.curate.groups import Groups, choose_kept
from dinov2.curate.images import Images
from dinov2.curate.outputs import Selection
from dinov2.curate.page import Example, Section, Shown, spread
from dinov2.curate.search import SearchOptions, nearest_cosines, nearest_pairs, similarities

logger = logging.getLogger(__name__)

SUSPICIOUS_SHARE = 0.25  # of images that are dropped, above which the threshold may be too low


def drop_duplicates(
    images: Images, *, threshold: float, k: int, keep: Literal["largest", "first"], options: SearchOptions
) -> Selection:
    """Keep one image of each group that is connected by pairs of near duplicates (arXiv 2304.07193, appendix A).

    Args:
        images: What to select from.
        threshold: Cosine above which two images are near duplicates.
        k: Neighbors of an image that are considered.
        keep: Which image of a group; see `choose_kept`.
        options: How neighbors are searched.
    """
    table = images.table
    cosines = nearest_cosines(table, table, options.seed)
    pairs, facts = nearest_pairs(table, k=k, threshold=threshold, options=options)
    groups = list(Groups(len(table), pairs).of_several())
    kept = np.array([choose_kept(group, keep, images.size_of) for group in groups], np.int64)
    sizes = np.array([len(group) for group in groups], np.int64)
    members, number = np.concatenate([np.empty(0, np.int64), *groups]), np.repeat(np.arange(len(groups)), sizes)
    is_dropped = members != kept[number]
    dropped, number = members[is_dropped], number[is_dropped]
    similarity = similarities(table, dropped, table, kept[number])
    warn_of_many(len(dropped), len(table), threshold, cosines)
    records = (
        {
            "name": table.names[row],
            "reason": "duplicate",
            "group": group,
            "kept": table.names[int(kept[group])],
            "similarity": round(value, 4),
        }
        for row, group, value in zip(dropped.tolist(), number.tolist(), similarity.tolist(), strict=True)
    )
    facts = {"threshold": threshold} | facts
    counts = {"groups": len(groups), "largest group": int(sizes.max(initial=0))}
    if table.labels is not None:
        several = sum(len(np.unique(table.labels[group])) > 1 for group in groups)
        counts["groups of several classes"] = several
        if several:
            first = next(group for group in groups if len(np.unique(table.labels[group])) > 1)
            names = " and ".join(f"{table.names[row]} (class {table.labels[row]})" for row in first[:2].tolist())
            logger.warning("%d of %d groups have images of several classes, such as %s", several, len(groups), names)
    return Selection(
        np.setdiff1d(np.arange(len(table)), dropped, assume_unique=True),
        records,
        facts | counts | {"cosine of an image and its nearest, quantiles": cosines},
        _sections(images, kept, dropped, number, similarity),
    )


def warn_of_many(num_dropped: int, num_images: int, threshold: float, cosines: dict[str, float]) -> None:
    """Log a warning if so many images are dropped that the threshold may be too low for the features."""
    if num_dropped > SUSPICIOUS_SHARE * num_images:
        logger.warning(
            "%d of %d images are dropped: --threshold %g may be too low for these features; in a sample an image and "
            "its nearest have cosines of %s",
            *(num_dropped, num_images, threshold, quantiles_text(cosines)),
        )


def quantiles_text(cosines: dict[str, float]) -> str:
    """Quantiles for a message, "0.91 (50%), ..."."""
    return ", ".join(f"{value:.3f} ({name})" for name, value in cosines.items()) or "unknown (there is one image)"


def _sections(
    images: Images, kept: np.ndarray, dropped: np.ndarray, number: np.ndarray, similarity: np.ndarray
) -> list[Section]:
    """The groups with the least similar images, which show whether the threshold is right, and the largest ones."""

    def example(group: int) -> Example:
        rows = np.flatnonzero(number == group)
        rows = rows[np.argsort(similarity[rows])]
        others = [Shown(images, int(dropped[row]), f"{similarity[row]:.3f}") for row in rows.tolist()]
        return Example(f"Group {group}, {len(rows) + 1} images", [Shown(images, int(kept[group]), "kept"), *others])

    least = np.full(len(kept), np.inf)
    np.minimum.at(least, number, similarity)
    sizes: Any = np.bincount(number, minlength=len(kept))
    return [
        Section("Groups with the least similar images", [example(group) for group in spread(np.argsort(least))]),
        Section("Largest groups", [example(group) for group in spread(np.argsort(-sizes, kind="stable"))]),
    ]
