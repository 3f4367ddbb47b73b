"""Numbers about features against naive versions and libraries, and at the ends of their scales."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional

from dinov2.analysis.feature_statistics import (
    leave_one_out_accuracy,
    linear_cka,
    nearest_distance,
    patch_similarity,
    rank_me,
)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_rank_is_the_exponential_of_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    shares = [s / sum(torch.linalg.svdvals(features).tolist()) for s in torch.linalg.svdvals(features).tolist()]
    assert rank_me(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)


def test_rank_counts_directions() -> None:
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1, abs=1e-5)
    assert rank_me(torch.eye(8).repeat(5, 1)) == pytest.approx(8)


def test_rank_of_what_is_not_finite_or_nothing_is_not_a_number() -> None:
    assert math.isnan(rank_me(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
    assert math.isnan(rank_me(torch.zeros(3, 2)))


def test_patch_similarity_is_the_mean_cosine_of_all_pairs_of_an_image() -> None:
    tokens = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    cosines = [
        functional.cosine_similarity(image[i], image[j], dim=0)
        for image in tokens
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert patch_similarity(tokens) == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert patch_similarity(torch.ones(2, 4, 3)) == pytest.approx(1)


def test_nearest_distance_is_that_of_unit_vectors() -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(*[functional.normalize(features, dim=1)] * 2).fill_diagonal_(torch.inf)
    torch.testing.assert_close(nearest_distance(features), distances.amin(dim=1).mean())
    assert nearest_distance(torch.ones(4, 3)) < 1e-3


def test_leave_one_out_vote_agrees_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) + 2 * functional.one_hot(labels, 5)
    unit = functional.normalize(features.double(), dim=1)
    right = 0
    for left_out in range(60):
        others = torch.arange(60) != left_out
        knn = KNeighborsClassifier(7, weights=lambda d: torch.softmax(torch.from_numpy(1 - d**2 / 2) / 0.07, 1).numpy())
        right += int(
            knn.fit(unit[others].numpy(), labels[others].numpy()).predict(unit[left_out : left_out + 1].numpy())[0]
            == labels[left_out]
        )
    assert 0.5 < right / 60 < 1
    assert leave_one_out_accuracy(features, labels, k=7) == pytest.approx(right / 60)


def test_cka_is_one_for_rotated_and_zero_for_independent_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert linear_cka(features, 3 * features @ rotation + 5) == pytest.approx(1, abs=1e-5)
    independent = [
        linear_cka(torch.randn(40, 200, generator=generator), torch.randn(40, 200, generator=generator))
        for _ in range(200)
    ]
    assert abs(sum(independent) / 200) < 0.01, "the biased estimate would be about 0.8"


def test_cka_is_the_ratio_of_unbiased_estimates() -> None:
    """The estimator of Song et al. 2012, equation 5, written out."""
    first, second = torch.randn(9, 3).double(), torch.randn(9, 4).double()

    def hsic(one: torch.Tensor, two: torch.Tensor) -> float:
        k, m = ((each @ each.T).fill_diagonal_(0) for each in (one, two))
        n, ones = 9, torch.ones(9).double()
        terms = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return float((terms - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3)))

    expected = hsic(first, second) / (hsic(first, first) * hsic(second, second)) ** 0.5
    assert linear_cka(first, second) == pytest.approx(expected, abs=1e-9)
