"""Probes of patches: votes and modes are those of loops, the protocol chooses on held-out images and refits."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.analysis import patch_segmentation
from dinov2.eval.dense import patch_probes
from dinov2.eval.dense.patch_probes import (
    Patches,
    Standardizer,
    fit_knn,
    fit_logistic,
    hold_out_images,
    most_frequent,
    patch_areas,
    probe_scores,
    run_knn_probe,
    run_logistic_probe,
    score_patches,
    to_label_maps,
    to_patches,
)

NUM_CLASSES, PIXELS = 3, 4


def mode_by_loop(values: list[int]) -> int:
    counts = Counter(values)
    return min(value for value in counts if counts[value] == max(counts.values()))


def patches(count: int, seed: int, noise: float = 0.4) -> Patches:
    """Features around one center per class; most pixels of a patch have its class, some are ignored or of another."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
    centers = torch.randn(NUM_CLASSES, 6, generator=torch.Generator().manual_seed(99))
    features = centers[classes] + noise * torch.randn(count, 6, generator=generator)
    labels = classes[:, None].repeat(1, PIXELS)
    other = torch.rand(labels.shape, generator=generator) < 0.25
    labels[other] = torch.randint(-1, NUM_CLASSES, (int(other.sum()),), generator=generator)
    return Patches(features, labels)


def test_modes_are_those_of_a_loop_and_the_smallest_in_a_tie() -> None:
    rows = torch.randint(-1, 3, (300, 5), generator=torch.Generator().manual_seed(0))
    assert most_frequent(rows).tolist() == [mode_by_loop(row) for row in rows.tolist()]
    assert most_frequent(torch.tensor([[7, 7, 2, 2, 9], [4, 3, 2, 1, 0]])).tolist() == [2, 0]
    assert most_frequent(torch.tensor([[5]])).tolist() == [5]


def test_features_are_standardized_by_the_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_segmentation, "PATCH_BATCH", 7)
    features = torch.randn(50, 6) * torch.tensor([1, 1e-3, 1e3, 0, 5, 1]) + torch.tensor([0, 1, 1e4, 3, 0, 0])
    standardize = Standardizer.of(features)
    reference = features.double().numpy()
    deviation = reference.std(axis=0)
    deviation[3] = 1.0  # a constant feature becomes 0
    expected = (reference - reference.mean(axis=0)) / deviation
    np.testing.assert_allclose(standardize(features).numpy(), expected, atol=1e-6)
    assert standardize(features).dtype == torch.float32


def test_patches_are_tiles_of_the_label_maps_in_the_order_of_the_features() -> None:
    maps = torch.arange(2 * 4 * 9).view(2, 4, 9)
    features = torch.randn(2, 6, 5)
    found = to_patches(features, maps, (2, 3))
    assert found.features.shape == (12, 5) and found.labels.shape == (12, 6)
    assert found.labels[1].tolist() == maps[0, 0:2, 3:6].flatten().tolist()
    assert found.labels[6 + 5].tolist() == maps[1, 2:4, 6:9].flatten().tolist()
    assert torch.equal(found.features[6 + 5], features[1, 5])
    assert torch.equal(to_label_maps(found.labels, (2, 3), (2, 3)), maps)
    with pytest.raises(ValueError, match=r"\(2, 6, 5\) and label maps \(2, 4, 9\) do not fit a grid of 3 x 2 patches"):
        to_patches(features, maps, (3, 2))


@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_knn_predictions_are_those_of_a_loop(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_segmentation, "VOTES", 50)  # a few patches at once
    train, test = patches(40, seed=0), patches(9, seed=1)
    kept = [i for i, row in enumerate(train.labels.tolist()) if mode_by_loop(row) != -1]
    found = fit_knn(train, ks=[1, 5], distance=distance)(test.features)
    for k in (1, 5):
        for row, query in enumerate(test.features.double()):
            bank = train.features[kept].double()
            order = torch.cdist(query[None], bank)[0].argsort()
            if distance == "cosine":
                order = torch.nn.functional.cosine_similarity(query[None], bank).argsort(descending=True)
            votes = train.labels[kept][order[:k]]
            assert found[k][row].tolist() == [mode_by_loop(votes[:, pixel].tolist()) for pixel in range(PIXELS)]


def test_patches_that_are_mostly_ignored_do_not_vote() -> None:
    train = Patches(torch.eye(3), torch.tensor([[-1, -1, 1], [2, 2, -1], [0, 0, 0]]))
    found = fit_knn(train, ks=[1])(torch.tensor([[1.0, 0.5, 0.0]]))[1]
    assert found.tolist() == [[2, 2, -1]], "not the nearest one, of which most pixels are ignored"
    with pytest.raises(ValueError, match="none of the 3 training patches has a label that is not ignored"):
        fit_knn(Patches(torch.eye(3), torch.full((3, 2), -1)), ks=[1])
    with pytest.raises(ValueError, match="unknown distance 'L1'; known: cosine, L2"):
        fit_knn(train, distance="L1")


def test_the_logistic_regression_minimizes_the_published_objective() -> None:
    train, test = patches(60, seed=0, noise=1.5), patches(11, seed=1)
    C = 0.7
    probabilities, predict = fit_logistic(train, C=C)
    modes = most_frequent(train.labels)
    kept = modes != -1
    x, y = train.features[kept].double(), modes[kept]
    weights = torch.zeros(6, NUM_CLASSES, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(NUM_CLASSES, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        losses = torch.nn.functional.cross_entropy(x @ weights + bias, y, reduction="sum")
        value = C * losses + weights.square().sum() / 2
        value.backward()
        return value

    solver.step(objective)
    expected = (test.features.double() @ weights + bias).softmax(dim=1).detach()
    torch.testing.assert_close(probabilities(test.features), expected, rtol=0, atol=1e-5)
    assert torch.equal(predict(test.features), expected.argmax(dim=1)[:, None].expand(-1, PIXELS))


def test_one_class_alone_can_be_learned() -> None:
    _, predict = fit_logistic(Patches(torch.randn(5, 3), torch.full((5, 2), 4)), C=1.0)
    assert predict(torch.randn(2, 3)).tolist() == [[4, 4], [4, 4]]


def test_a_fit_that_has_not_converged_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit_logistic(patches(60, seed=0, noise=1.5), C=10.0, max_iter=2)
    assert "logistic regression with C = 10: not converged after 2 iterations" in caplog.text


def test_a_predicted_ignored_label_is_one_more_class_as_published() -> None:
    predictions, labels = torch.tensor([[0, 1, -1, 1]]), torch.tensor([[0, 1, 1, -1]])
    areas = patch_areas(predictions, labels, 2, ignored=[-1])
    assert probe_scores(areas, 2).mIoU == pytest.approx((1 + 1 / 2 + 0) / 3)
    found = probe_scores(areas, 2, published=False)
    assert found.mIoU == pytest.approx((1 + 1 / 2) / 2) and found.acc == pytest.approx(2 / 3)


def test_the_protocol_chooses_on_held_out_images_and_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_probes, "PATCH_BATCH", 16)
    train, held_out, test = patches(80, 0), patches(30, 1), patches(40, 2)
    result = run_knn_probe(train, held_out, test, NUM_CLASSES, ks=[1, 5], distances=["L2", "cosine"])
    assert [chosen for chosen, _ in result.held_out] == [
        {"k": k, "distance": distance} for distance in ("L2", "cosine") for k in (1, 5)
    ]
    best = max(result.held_out, key=lambda item: item[1].mIoU)
    assert result.best == best[0]
    predict = fit_knn(train + held_out, ks=[result.best["k"]], distance=result.best["distance"])
    assert result.test == score_patches(predict, test, NUM_CLASSES)[result.best["k"]]
    logistic = run_logistic_probe(train, held_out, test, NUM_CLASSES, C_values=[1e-4, 1.0])
    assert logistic.best == {"C": 1.0}
    assert logistic.test.acc > 0.7 and result.test.acc > 0.7, "about a fifth of the labels are random"


def test_a_tenth_of_the_images_is_held_out() -> None:
    rest, tenth = hold_out_images(57)
    assert len(tenth) == 5 and sorted([*rest.tolist(), *tenth.tolist()]) == list(range(57))
    assert len(hold_out_images(3)[1]) == 1
    with pytest.raises(ValueError, match=r"1 training image\(s\) are too few"):
        hold_out_images(1)
