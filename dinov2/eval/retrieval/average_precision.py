"""Average precision of rankings, by the protocol of Revisited Oxford and Paris.

Shapes: Q queries, n images of the database. Ranks are counted from 0; scores are fractions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dinov2.data.retrieval import SETTINGS, GroundTruth

KS = (1, 5, 10)
DEFINITIONS = {
    "mAP": "mean over the queries of the area under the precision-recall curve, by the trapezoidal rule",
    "mP@k": "mean over the queries of the precision of the first min(k, r) images, where r is the rank of the last "
    "positive, from 1, as in Revisited Oxford and Paris; with fewer than k positives it can exceed their number / k",
}
"""What the published names mean."""


class QueryScores(NamedTuple):
    """Average precision, and precision at each k."""

    average_precision: float
    precisions: tuple[float, ...]


class RetrievalScores(NamedTuple):
    """Means over the queries that have positives, and the scores of each query, None without positives."""

    mAP: float  # noqa: N815
    precisions: dict[int, float]  # k -> mean precision at k, see `DEFINITIONS`
    per_query: list[QueryScores | None]

    @property
    def num_queries(self) -> int:
        """Number of queries with positives."""
        return sum(scores is not None for scores in self.per_query)


def trapezoid_average_precision(ranks: Sequence[int], num_positives: int) -> float:
    """Area under the precision-recall curve by the trapezoidal rule.

    Args:
        ranks: Increasing ranks of the positives that are in the ranking.
        num_positives: Number of all positives, also of those that are not in the ranking; they add nothing.
    """
    if num_positives < max(1, len(ranks)):
        raise ValueError(f"{num_positives} positives for {len(ranks)} ranks")
    total = 0.0
    for found, rank in enumerate(ranks):
        before = found / rank if rank else 1.0
        total += (before + (found + 1) / (rank + 1)) / 2
    return total / num_positives


def ranks_without_junk(ranking: np.ndarray, positives: Sequence[int], junk: Sequence[int]) -> np.ndarray:
    """Ranks (increasing) of the positives in a ranking (m,) from which the junk has been removed."""
    is_junk = np.isin(ranking, np.asarray(junk, np.int64))
    ranks = np.flatnonzero(np.isin(ranking, np.asarray(positives, np.int64)))
    return ranks - np.cumsum(is_junk)[ranks]


def score_query(ranking: np.ndarray, truth: GroundTruth, setting: str, ks: Sequence[int] = KS) -> QueryScores | None:
    """Score the ranking of one query, best image first: (m,) indices, all or the first ones; None without positives.

    As published, the precision at k is that of the first min(k, rank of the last positive + 1) images.

    Raises:
        ValueError: The setting is unknown.
    """
    if setting not in SETTINGS:
        raise ValueError(f"unknown setting {setting!r}; known: {', '.join(SETTINGS)}")
    positives, junk = ([index for name in names for index in getattr(truth, name)] for names in SETTINGS[setting])
    if not positives:
        return None
    ranks = ranks_without_junk(ranking, positives, junk)
    if not len(ranks):
        return QueryScores(0.0, (0.0,) * len(ks))
    depths = [min(k, int(ranks[-1]) + 1) for k in ks]
    precisions = tuple(float((ranks < depth).sum() / depth) for depth in depths)
    return QueryScores(trapezoid_average_precision(ranks.tolist(), len(positives)), precisions)


def mean_scores(per_query: Sequence[QueryScores | None], ks: Sequence[int] = KS) -> RetrievalScores:
    """Average over the queries that have positives; a `ValueError` if none has any."""
    scored = [scores for scores in per_query if scores is not None]
    if not scored:
        raise ValueError(f"none of {len(per_query)} queries has a relevant image in the database")
    mean = math.fsum(scores.average_precision for scores in scored) / len(scored)
    at_k = zip(ks, zip(*(scores.precisions for scores in scored), strict=True), strict=True)
    return RetrievalScores(mean, {k: math.fsum(values) / len(scored) for k, values in at_k}, list(per_query))


def score_rankings(
    rankings: np.ndarray, ground_truth: Sequence[GroundTruth], setting: str, ks: Sequence[int] = KS
) -> RetrievalScores:
    """Score rankings (Q, m) of all queries in a key of `SETTINGS`, see `score_query` and `mean_scores`."""
    pairs = zip(rankings, ground_truth, strict=True)
    return mean_scores([score_query(ranking, truth, setting, ks) for ranking, truth in pairs], ks)


def by_name(scores: RetrievalScores) -> Mapping[str, float]:
    """ "mAP", "mP@1", ... as fractions."""
    return {"mAP": scores.mAP, **{f"mP@{k}": value for k, value in scores.precisions.items()}}
