"""Set g: the evaluation protocols on given features, images or scores."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2.eval.features import ModelWithIntermediateLayers, ModelWithNormalize
from dinov2.eval.knn import KnnModule, eval_knn_on_features, few_shot_index
from dinov2.eval.linear import Accuracies, best_of, build_optimizer, top_1, train_step
from dinov2.eval.linear_heads import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    create_linear_input,
    setup_linear_classifiers,
)
from dinov2.eval.log_regression import (
    C_VALUES,
    Fitter,
    LabeledFeatures,
    LogRegModule,
    eval_log_regression,
    hold_out,
)
from dinov2.eval.metrics import MetricType, build_metric
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import flatten_block_names
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

# Both sides hold fractions in float32.
SCORE_TOLERANCE = 1e-6
PROBABILITY_TOLERANCE = 1e-4
# What a fit minimizes, relative. It stops where rounding hides any further descent, which is a point for strong and
# a flat valley for weak regularization: at C = 1e5 the objectives of two machines agree to 1e-8 or better while single
# probabilities differ by 4e-4. There the objective decides if a fit is right, and probabilities are a sanity check.
OBJECTIVE_TOLERANCE = 1e-7
WEAK_REGULARIZATION = 1e3  # C above it
WEAK_PROBABILITY_TOLERANCE = 2e-3
# How C was chosen -> whether on the validation set.
CHOICE_OF_C = {"holdout10": False, "on_val": True}
# Whether the rows come in batches must not matter; the recorded ones were fed by 17.
METRIC_BATCH_SIZES = (17, 1000)

METRIC_OF_AVERAGING = {"micro": MetricType.MEAN_ACCURACY, "macro": MetricType.MEAN_PER_CLASS_ACCURACY}


def _compare_scores(comparison: Comparison, label: str, ours: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    comparison.exact(f"{label}: scores", sorted(ours), sorted(recorded))
    for top in recorded.keys() & ours.keys():
        a, b = (torch.as_tensor(scores[top], dtype=torch.float64) for scores in (ours, recorded))
        comparison.close(f"{label}: {top}", a, b, tolerance=SCORE_TOLERANCE)


# --- k-NN ------------------------------------------------------------------------------------------------------------


def replay_knn(recording: Recording, comparison: Comparison) -> None:
    config = recording.json["config"]
    normalize = ModelWithNormalize(nn.Identity())
    bank, queries = (normalize(recording.input(f"{side}_features")) for side in ("train", "val"))
    labels, targets = recording.input("train_labels"), recording.input("val_labels")

    knn = KnnModule(bank, labels, config["ks"], config["T"], torch.device("cpu"), num_classes=config["classes"])
    comparison.tensors({f"votes.k{k}": votes for k, votes in knn(queries).items()})
    for match in recording.matches(r"fewshot\.npc(\d+)\.try(\d+)\.train_index"):
        index = few_shot_index(labels, int(match[1]), int(match[2]))
        comparison.exact(match[0], index, recording.tensors[match[0]])
    for averaging, recorded in recording.json["results"].items():
        scores = eval_knn_on_features(
            bank,
            labels,
            queries,
            targets,
            nb_knn=config["ks"],
            temperature=config["T"],
            n_per_class_list=[-1, *config["npc"]],
            n_tries=config["tries"],
            metric_type=METRIC_OF_AVERAGING[averaging],
            device=torch.device("cpu"),
        )
        ours = {f"{name}|k={k}": accuracies for (name, k), accuracies in scores.items()}
        comparison.exact(f"{averaging}: banks and k", sorted(ours), sorted(recorded))
        for key in recorded.keys() & ours.keys():
            _compare_scores(comparison, f"{averaging}, {key}", ours[key], recorded[key])


# --- Logistic regression ---------------------------------------------------------------------------------------------


def replay_log_regression(recording: Recording, comparison: Comparison) -> None:
    """Compares weights by their objective and what they predict, as intercepts are defined up to a shift."""
    train = LabeledFeatures(recording.input("train_features"), recording.input("train_labels"))
    val = LabeledFeatures(recording.input("val_features"), recording.input("val_labels"))
    fitter = Fitter(num_classes=1 + int(max(train.labels.max(), val.labels.max())))
    strengths = recording.json["C_values"]
    if len(strengths) == len(C_VALUES):  # else the recording has a grid of its own
        comparison.close("C values", torch.tensor(C_VALUES), torch.tensor(strengths), tolerance=1e-6)
    for mode, recorded in recording.json["modes"].items():
        if mode not in CHOICE_OF_C:
            raise ValueError(f"unknown way of choosing C: {mode!r}; known: {', '.join(CHOICE_OF_C)}")
        on_val = CHOICE_OF_C[mode]
        ours = eval_log_regression(train, val, fitter=fitter, finetune_on_val=on_val, C_values=strengths)
        sweep = ours.pop("sweep")
        for scores in (ours, *sweep):
            scores.pop("converged")  # which was not recorded
        _compare_scores(comparison, mode, ours, recorded["result"])
        for theirs, scores in zip(recorded["per_C"], sweep, strict=True):
            _compare_scores(comparison, f"{mode}, C = {theirs['C']:.2g}", scores, theirs)
        fitted = train if on_val else hold_out(train)[0]
        if not on_val:
            _compare_permutation(comparison, f"{mode}.permutation", train)
        comparison.exact(f"{mode}: rows of the final fit", len(train.labels), recorded["final_train_rows"])
        best_C = ours["best_C"]
        final = fitter.fit(best_C, train)
        comparison.tensor(f"{mode}.final.val_probs", final(*val)["preds"], tolerance=_probability_tolerance(best_C))
        _compare_fit(comparison, f"{mode}.final", final, best_C, train, val)
        for match in recording.matches(rf"{mode}\.sweep(\d+)\.coef"):
            C = strengths[int(match[1])]
            _compare_fit(comparison, f"{mode}.sweep{match[1]}", fitter.fit(C, fitted), C, fitted, val)


def _compare_permutation(comparison: Comparison, name: str, train: LabeledFeatures) -> None:
    """That the same rows are held out: the first tenth of the recorded permutation."""
    rest, tenth = hold_out(LabeledFeatures(torch.arange(len(train.labels)), train.labels))
    comparison.exact(name, torch.cat([tenth.features, rest.features]), comparison.recording.tensors[name])


def _compare_fit(
    comparison: Comparison, name: str, module: LogRegModule, C: float, fitted: LabeledFeatures, val: LabeledFeatures
) -> None:
    """The objective on the images fitted to, and the probabilities of others."""
    coef, intercept = (comparison.recording.input(f"{name}.{part}") for part in ("coef", "intercept"))
    estimator = module.estimator
    classes, labels = np.unique(fitted.labels.numpy(), return_inverse=True)
    targets = torch.from_numpy(labels)
    ours, theirs = (
        _objective(C, LabeledFeatures(fitted.features, targets), *map(torch.as_tensor, weights))
        for weights in ((estimator.coef_, estimator.intercept_), (coef, intercept))
    )
    comparison.close(f"{name}: objective / recorded", ours / theirs, 1.0, tolerance=OBJECTIVE_TOLERANCE)
    expected = (val.features.double() @ coef.T + intercept).softmax(dim=1)
    found = module(*val)["preds"][:, torch.as_tensor(classes)]
    comparison.close(f"{name}: probabilities", found, expected, tolerance=_probability_tolerance(C))


def _objective(C: float, fitted: LabeledFeatures, coef: Tensor, intercept: Tensor) -> float:
    """C * (sum of the losses) + |weights|^2 / 2; coef (classes, D), intercept (classes,)."""
    logits = fitted.features.double() @ coef.T + intercept
    losses = functional.cross_entropy(logits, fitted.labels, reduction="sum")
    return float(C * losses + coef.square().sum() / 2)


def _probability_tolerance(C: float) -> float:
    return PROBABILITY_TOLERANCE if C <= WEAK_REGULARIZATION else WEAK_PROBABILITY_TOLERANCE


# --- Metrics ---------------------------------------------------------------------------------------------------------


def replay_metrics(recording: Recording, comparison: Comparison) -> None:
    """Ours follow the torchmetrics release that the published code pins where its releases differ."""
    current = recording.json["results"]
    pinned_key = next((key for key in recording.json if key.startswith("results_with_pinned")), "results")
    for case, recorded in recording.json[pinned_key].items():
        scores, targets = recording.input(f"{case}.preds"), recording.input(f"{case}.target")
        if targets.ndim == 2:
            ks = tuple(int(top.removeprefix("top-")) for top in recorded)
            _compare_metric(comparison, case, MetricType.IMAGENET_REAL_ACCURACY, ks, scores, targets, recorded)
            continue
        for key, values in recorded.items():
            kind, ks = _metric_and_ks(key)
            _compare_metric(comparison, f"{case}, {key}", kind, ks, scores, targets, values)
            if current[case][key] != values:
                comparison.leave_out("as of a torchmetrics release that treats absent classes otherwise", count=1)


def _metric_and_ks(key: str) -> tuple[MetricType, tuple[int, ...]]:
    """``"mean_accuracy ks=(1, 5)"`` -> the metric and (1, 5)."""
    name, ks = key.split(" ks=")
    return MetricType(name), tuple(int(number) for number in re.findall(r"\d+", ks))


def _compare_metric(
    comparison: Comparison,
    label: str,
    kind: MetricType,
    ks: tuple[int, ...],
    scores: Tensor,
    targets: Tensor,
    recorded: Mapping[str, Any],
) -> None:
    for size in METRIC_BATCH_SIZES:
        metric = build_metric(kind, num_classes=scores.shape[1], ks=ks)
        for batch in zip(scores.split(size), targets.split(size), strict=True):
            metric.update(*batch)
        _compare_scores(comparison, f"{label}, batches of {size}", metric.compute(), recorded)


# --- Linear ----------------------------------------------------------------------------------------------------------


def replay_linear(recording: Recording, comparison: Comparison) -> None:
    config, names = recording.json["config"], recording.json["classifier_names"]
    backbone = DinoVisionTransformer(**recording.json["vit_kwargs"])
    backbone.load_state_dict(flatten_block_names(recording.inputs_below("backbone.")))
    blocks = sorted({int(name.split("_")[1]) for name in names})
    feature_model = ModelWithIntermediateLayers(backbone, max(blocks))
    images, labels = recording.input("train_images").float(), recording.input("train_labels")

    for match in recording.matches(r"linear_input\.n(\d+)_avgpool([01])"):
        tokens = feature_model(images[: len(recording.tensors[match[0]])])
        comparison.tensor(match[0], create_linear_input(tokens, int(match[1]), bool(int(match[2]))))

    sample = feature_model(images[:1])
    classifiers, groups = setup_linear_classifiers(sample, blocks, config["lrs"], config["bs"], config["classes"])
    comparison.exact("names of the classifiers", list(classifiers.classifiers_dict), names)
    classifiers.load_state_dict(recording.inputs_below("init."))
    batch_index = recording.input("batch_index")
    optimizer, scheduler = build_optimizer(groups, len(batch_index))
    rates, losses = [], []
    for index in batch_index:
        rates.append([group["lr"] for group in optimizer.param_groups])
        step_losses = train_step(classifiers, feature_model(images[index]), labels[index], optimizer)
        losses.append(torch.stack([step_losses[name] for name in names]))
        scheduler.step()
    comparison.tensor("lr_per_iteration", torch.tensor(rates, dtype=torch.float64), tolerance=1e-9)
    comparison.tensor("train_losses", torch.stack(losses))
    comparison.tensors({f"final.{name}": value for name, value in classifiers.state_dict().items()})
    _compare_validation(recording, comparison, feature_model, classifiers)


def _compare_validation(
    recording: Recording, comparison: Comparison, feature_model: nn.Module, classifiers: AllClassifiers
) -> None:
    tokens, targets = feature_model(recording.input("val_images").float()), recording.input("val_labels")
    scores: dict[str, Accuracies] = {}
    for name, classifier in classifiers.classifiers_dict.items():
        assert isinstance(classifier, LinearClassifier), "the grid holds linear classifiers"
        with torch.no_grad():
            outputs = LinearPostprocessor(classifier)(tokens, targets)
        comparison.tensor(f"final_val_logits.{name}", outputs["preds"])
        metric = build_metric(MetricType.MEAN_ACCURACY, num_classes=recording.json["config"]["classes"])
        metric.update(**outputs)
        scores[name] = {top: float(value) for top, value in metric.compute().items()}
    accuracies = {name: top_1(score) / 100 for name, score in scores.items()}
    for name, recorded in recording.json["val_accuracy"].items():
        comparison.close(f"{name}: accuracy", accuracies[name], recorded, tolerance=SCORE_TOLERANCE)
    best = recording.json["best_classifier"]
    comparison.exact("best classifier", best_of(scores), best["name"])
    comparison.close("its accuracy", accuracies[best["name"]], best["accuracy"], tolerance=SCORE_TOLERANCE)
