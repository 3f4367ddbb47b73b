"""Semantic segmentation by classifying frozen patch features: k-NN and logistic regression, with no training loop.

The protocol is that of CAPI (arXiv 2502.08769): features are standardized on the training set, hyperparameters are
chosen by mIoU on a tenth of the training images, and the chosen probe is fitted to all of them. A prediction of the
logistic regression is constant within a patch.

Shapes: n images of N patches each, M patches of all images, P pixels of a patch, D feature width, C classes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dinov2 import distributed
from dinov2.analysis.patch_segmentation import PATCH_BATCH, Patches, labeled_patches, vote
from dinov2.analysis.patch_segmentation import Standardizer as Standardizer
from dinov2.analysis.patch_segmentation import most_frequent as most_frequent
from dinov2.analysis.patch_segmentation import to_label_maps as to_label_maps
from dinov2.analysis.patch_segmentation import to_patches as to_patches
from dinov2.eval.dense.segmentation_metrics import IGNORED, Areas, count_areas, segmentation_scores
from dinov2.eval.knn import KnnModule
from dinov2.eval.log_regression import LogRegModule

logger = logging.getLogger(__name__)

KS = (1, 3, 10, 30)
DISTANCES = ("cosine", "L2")
C_VALUES = tuple(10.0 ** (-6 + 11 * i / 7) for i in range(8))  # 8 values from 1e-6 to 1e5
MAX_ITER = 1000
HELD_OUT_SEED = 0


Predict = Callable[[Tensor], Tensor]
"""Features (m, D) -> predicted labels of pixels (m, P)."""


def fit_knn(
    train: Patches, *, ks: Sequence[int] = KS, distance: str = "cosine", ignored: Sequence[int] = (IGNORED,)
) -> Callable[[Tensor], dict[int, Tensor]]:
    """Build the k-NN probe: each pixel of a patch gets the most frequent label at its place in the k nearest patches.

    The search holds a part of the training patches on the device of the process at a time.

    Args:
        train: Training patches; those whose most frequent label is ignored are left out.
        ks: Numbers of neighbors; those above the number of patches are replaced by it, with a warning.
        distance: A member of `DISTANCES`.
        ignored: Labels that are not scored; pixels of training patches may have them, and so may predictions.

    Returns:
        A function: features (m, D) -> {k: predicted labels (m, P)}.
    """
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; known: {', '.join(DISTANCES)}")
    train, _ = labeled_patches(train, ignored)

    def prepared(features: Tensor) -> Tensor:
        return functional.normalize(features, dim=1) if distance == "cosine" else features

    # The search returns labels of neighbors: here their numbers.
    numbers = torch.arange(len(train.labels), device=train.features.device)
    search = KnnModule(prepared(train.features), numbers, ks, 1.0, distributed.device())

    def predict(features: Tensor) -> dict[int, Tensor]:
        neighbors = search.neighbors(prepared(features))[1].to(train.labels.device)
        return vote(train.labels, neighbors, search.nb_knn)

    return predict


def fit_logistic(
    train: Patches, *, C: float, ignored: Sequence[int] = (IGNORED,), max_iter: int = MAX_ITER
) -> tuple[Callable[[Tensor], Tensor], Predict]:
    """Fit the logistic regression: one class per patch, the most frequent label of its pixels.

    It minimizes C * (sum of the losses) + |weights|^2 / 2 by L-BFGS in float64: with cuML where it is installed and the
    features are on a GPU, else with scikit-learn.

    Returns:
        Two functions of features (m, D): class probabilities (m, C) in increasing order of the labels in the training
        set, and predicted labels (m, P).
    """
    train, modes = labeled_patches(train, ignored)
    labels, classes = modes.unique(return_inverse=True)
    model = LogRegModule(C, max_iter, torch.float64, train.features.device, len(labels))
    num_pixels = train.labels.shape[1]
    if len(labels) > 1:
        model.fit(train.features, classes)
        if not model.converged:
            logger.warning("logistic regression with C = %.3g: not converged after %d iterations", C, max_iter)

    def probabilities(features: Tensor) -> Tensor:
        if len(labels) == 1:
            return torch.ones(len(features), 1, dtype=torch.float64)
        return model(features, torch.empty(0))["preds"]

    def predict(features: Tensor) -> Tensor:
        best = probabilities(features).argmax(dim=1)
        return labels.cpu()[best][:, None].expand(-1, num_pixels)

    return probabilities, predict


class ProbeScores(NamedTuple):
    """Fractions."""

    mIoU: float  # noqa: N815
    acc: float


def patch_areas(predictions: Tensor, labels: Tensor, num_classes: int, ignored: Sequence[int]) -> Areas:
    """Count pixels as `count_areas`, with one more class for each of the `ignored` labels, which may be predicted."""
    predictions, labels = predictions.long().cpu(), labels.long().cpu()
    known, target = predictions, labels
    for number, label in enumerate(ignored):
        known = torch.where(predictions == label, num_classes + number, known)
        target = torch.where(labels == label, _NOT_SCORED, target)
    return count_areas(known, target, num_classes + len(ignored), ignored=_NOT_SCORED)


_NOT_SCORED = -(2**62)


def probe_scores(areas: Areas, num_classes: int, *, published: bool = True) -> ProbeScores:
    """Mean IoU over the classes that are labeled or predicted, and accuracy, from `patch_areas`.

    As published, a predicted ignored label is one more class, with an IoU of 0; not so if `published` is False.
    """
    scores = segmentation_scores(areas)
    iou = scores.iou_per_class if published else scores.iou_per_class[:num_classes]
    return ProbeScores(iou.nanmean().item(), scores.aAcc)


def score_patches(
    predict: Callable[[Tensor], Mapping[Any, Tensor]],
    test: Patches,
    num_classes: int,
    *,
    ignored: Sequence[int] = (IGNORED,),
    published: bool = True,
) -> dict[Any, ProbeScores]:
    """Scores of the probes that `predict` gives the labels (m, P) of, by name, in batches of patches."""
    areas: dict[Any, Areas] = {}
    batches = zip(test.features.split(PATCH_BATCH), test.labels.split(PATCH_BATCH), strict=True)
    for features, labels in batches:
        for name, predictions in predict(features).items():
            counted = patch_areas(predictions, labels, num_classes, ignored)
            areas[name] = areas[name] + counted if name in areas else counted
    return {name: probe_scores(each, num_classes, published=published) for name, each in areas.items()}


class ProbeResult(NamedTuple):
    """The chosen hyperparameters, the scores of all of them on the held-out images, and the test scores."""

    best: dict[str, Any]
    held_out: list[tuple[dict[str, Any], ProbeScores]]
    test: ProbeScores


def hold_out_images(num_images: int, seed: int = HELD_OUT_SEED) -> tuple[Tensor, Tensor]:
    """Indices of the images to fit to, and of a random tenth (at least one) to choose hyperparameters on."""
    if num_images < 2:
        raise ValueError(f"{num_images} training image(s) are too few to hold out one to choose hyperparameters on")
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    count = max(num_images // 10, 1)
    return order[count:].sort().values, order[:count].sort().values


def run_knn_probe(
    train: Patches,
    held_out: Patches,
    test: Patches,
    num_classes: int,
    *,
    ks: Sequence[int] = KS,
    distances: Sequence[str] = DISTANCES,
    ignored: Sequence[int] = (IGNORED,),
    published: bool = True,
) -> ProbeResult:
    """Choose k and the distance on `held_out`, then search in `train` and `held_out`; features are standardized."""
    scoring: dict[str, Any] = {"ignored": ignored, "published": published}
    scored: list[tuple[dict[str, Any], ProbeScores]] = []
    for distance in distances:
        predict = fit_knn(train, ks=ks, distance=distance, ignored=ignored)
        for k, scores in score_patches(predict, held_out, num_classes, **scoring).items():
            scored.append(({"k": k, "distance": distance}, scores))
    best = _best(scored)
    predict = fit_knn(train + held_out, ks=[best["k"]], distance=best["distance"], ignored=ignored)
    (found,) = score_patches(predict, test, num_classes, **scoring).values()
    return ProbeResult(best, scored, found)


def run_logistic_probe(
    train: Patches,
    held_out: Patches,
    test: Patches,
    num_classes: int,
    *,
    C_values: Sequence[float] = C_VALUES,
    ignored: Sequence[int] = (IGNORED,),
    max_iter: int = MAX_ITER,
    published: bool = True,
) -> ProbeResult:
    """Choose C on `held_out`, then fit to `train` and `held_out`; features are standardized."""

    def score(C: float, fitted: Patches, scored_on: Patches) -> ProbeScores:
        _, predict = fit_logistic(fitted, C=C, ignored=ignored, max_iter=max_iter)
        (found,) = score_patches(
            lambda features: {C: predict(features)}, scored_on, num_classes, ignored=ignored, published=published
        ).values()
        return found

    scored = [({"C": C}, score(C, train, held_out)) for C in C_values]
    best = _best(scored)
    return ProbeResult(best, scored, score(best["C"], train + held_out, test))


def _best(scored: Sequence[tuple[dict[str, Any], ProbeScores]]) -> dict[str, Any]:
    """The hyperparameters with the highest mIoU, the first ones if tied."""
    return max(scored, key=lambda item: item[1].mIoU)[0]
