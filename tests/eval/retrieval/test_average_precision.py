"""Average precision is the area that a loop finds, without junk and without queries that have no positives."""

import numpy as np
import pytest

from dinov2.data.retrieval import SETTINGS, GroundTruth
from dinov2.eval.retrieval.average_precision import (
    mean_scores,
    score_query,
    score_rankings,
    trapezoid_average_precision,
)


def by_walking_down(ranking: list[int], positives: set[int], junk: set[int]) -> float:
    """Integrate precision over recall while walking down the ranking."""
    seen, found, area, precision_before = 0, 0, 0.0, 1.0
    for image in ranking:
        if image in junk:
            continue
        seen += 1
        if image in positives:
            found += 1
            area += (precision_before + found / seen) / 2 / len(positives)
        precision_before = found / seen
    return area


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_the_area_found_by_walking_down_the_ranking(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranking = rng.permutation(30)
    kinds = rng.choice(4, size=30, p=[0.2, 0.2, 0.2, 0.4])
    truth = GroundTruth(*(np.flatnonzero(kinds == kind).tolist() for kind in range(3)))
    for setting, names in SETTINGS.items():
        positives, junk = ({i for name in part for i in getattr(truth, name)} for part in names)
        found = score_query(ranking, truth, setting, ks=[1, 3])
        if not positives:
            assert found is None
            continue
        assert found is not None
        assert found.average_precision == pytest.approx(by_walking_down(ranking.tolist(), positives, junk), abs=1e-12)
        kept = [image for image in ranking.tolist() if image not in junk]
        last = max(kept.index(image) for image in positives)
        for k, precision in zip((1, 3), found.precisions, strict=True):
            depth = min(k, last + 1)
            assert precision == pytest.approx(sum(image in positives for image in kept[:depth]) / depth)


def test_small_rankings_by_hand() -> None:
    assert trapezoid_average_precision([0, 1, 2], 3) == 1.0
    assert trapezoid_average_precision([3], 1) == (0 + 1 / 4) / 2
    assert trapezoid_average_precision([], 2) == 0.0
    assert trapezoid_average_precision([0], 2) == 0.5, "the other one is not in the ranking"
    with pytest.raises(ValueError, match="1 positives for 2 ranks"):
        trapezoid_average_precision([0, 1], 1)


def test_junk_on_top_does_not_matter() -> None:
    truth = GroundTruth(easy=[3], hard=[], junk=[0, 1, 2])
    scores = score_query(np.array([0, 1, 2, 3, 4]), truth, "medium", ks=[1])
    assert scores is not None and scores.average_precision == 1.0 and scores.precisions == (1.0,)


def test_hard_images_are_junk_in_the_easy_setting_and_the_other_way_round() -> None:
    truth = GroundTruth(easy=[1], hard=[0], junk=[])
    ranking = np.array([0, 2, 1])
    found = {setting: score_query(ranking, truth, setting) for setting in ("easy", "medium", "hard")}
    assert {setting: scores.average_precision for setting, scores in found.items() if scores} == {
        "easy": (0 + 1 / 2) / 2,
        "hard": 1.0,
        "medium": pytest.approx((1 + 1 + 1 / 2 + 2 / 3) / 4),
    }


def test_queries_without_positives_are_skipped_and_an_error_if_there_are_no_others() -> None:
    rankings = np.array([[0, 1], [1, 0]])
    truth = [GroundTruth([0], [], []), GroundTruth([], [], [1])]
    scores = score_rankings(rankings, truth, "easy")
    assert scores.mAP == 1.0 and scores.num_queries == 1 and scores.per_query[1] is None
    with pytest.raises(ValueError, match="none of 2 queries has a relevant image in the database"):
        score_rankings(rankings, truth, "hard")
    with pytest.raises(ValueError, match="unknown setting 'extreme'; known: easy, medium, hard, all"):
        score_query(rankings[0], truth[0], "extreme")


def test_a_ranking_that_ends_before_the_first_positive_scores_nothing() -> None:
    scores = score_query(np.array([1, 2]), GroundTruth([0], [], []), "easy", ks=[1, 5])
    assert scores is not None and scores.average_precision == 0 and scores.precisions == (0.0, 0.0)
    assert mean_scores([scores], ks=[1, 5]).precisions == {1: 0.0, 5: 0.0}
