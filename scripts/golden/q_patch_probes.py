"""Set q_patch_probes: k-NN and logistic regression on given patch features."""

from typing import Any

from torch import Tensor

from dinov2.eval.dense import patch_probes
from dinov2.eval.dense.patch_probes import Patches, Standardizer, fit_knn, fit_logistic, patch_areas, probe_scores
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

SPLITS = ("train", "val", "test")
STANDARDIZED_TOLERANCE = 1e-6
PROBABILITY_TOLERANCE = 1e-4
SCORE_TOLERANCE = 1e-9


def replay_patch_probes(recording: Recording, comparison: Comparison) -> None:
    standardize = Standardizer.of(recording.input("features.train"))
    sets = {}
    for split in SPLITS:
        standardized = standardize(recording.input(f"features.{split}"))
        comparison.tensor(f"features_std.{split}", standardized, tolerance=STANDARDIZED_TOLERANCE)
        sets[split] = Patches(standardized, recording.input(f"labels.{split}"))
    _knn(recording, comparison, sets)
    _logistic(recording, comparison, sets)
    _protocol(recording, comparison, sets)


def _scores(recording: Recording, predictions: Tensor, labels: Tensor, *, published: bool = True) -> dict[str, float]:
    num_classes, ignored = recording.json["config"]["classes"], recording.json["config"]["ignore"]
    areas = patch_areas(predictions, labels, num_classes, ignored)
    return probe_scores(areas, num_classes, published=published)._asdict()


def _knn(recording: Recording, comparison: Comparison, sets: dict[str, Patches]) -> None:
    config, recorded = recording.json["config"], recording.json["results"]["val"]["knn"]
    for distance in config["distances"]:
        predict = fit_knn(sets["train"], ks=config["ks"], distance=distance, ignored=config["ignore"])
        for k, predictions in predict(sets["val"].features).items():
            for kind in ("knn", "knn_chunked"):
                name = f"{kind}.{distance}.k{k}.pred_val"
                comparison.exact(name, predictions, recording.tensors[name])
            scores = _scores(recording, predictions, sets["val"].labels)
            key = f"mIoU_num_neighbors={k}_distance={distance}"
            comparison.close(key, scores["mIoU"], recorded[key], tolerance=SCORE_TOLERANCE)


def _logistic(recording: Recording, comparison: Comparison, sets: dict[str, Patches]) -> None:
    config, recorded = recording.json["config"], recording.json["results"]
    for C in config["C"]:
        probabilities, predict = fit_logistic(sets["train"], C=C, ignored=config["ignore"])
        found = probabilities(sets["val"].features)
        comparison.tensor(f"logreg.c{C}.proba_val", found.float(), tolerance=PROBABILITY_TOLERANCE)
        predictions = predict(sets["val"].features)
        comparison.exact(f"logreg.c{C}.pred_val", predictions, recording.tensors[f"logreg.c{C}.pred_val"])
        scores = _scores(recording, predictions, sets["val"].labels)
        for name, value in scores.items():
            comparison.close(f"C={C} {name}", value, recorded["logreg"][str(C)][name], tolerance=SCORE_TOLERANCE)
        # Coefficients are defined by the probabilities, up to a common shift and the stopping rule of the solver.
        recording.inputs |= {f"logreg.c{C}.coef", f"logreg.c{C}.intercept"}


def _protocol(recording: Recording, comparison: Comparison, sets: dict[str, Patches]) -> None:
    config, recorded = recording.json["config"], recording.json["results"]
    data: Any = (*(sets[split] for split in SPLITS), config["classes"])
    ignored = {"ignored": config["ignore"]}
    found = {
        "knn": patch_probes.run_knn_probe(*data, ks=config["ks"], distances=config["distances"], **ignored),
        "logreg": patch_probes.run_logistic_probe(*data, C_values=config["C"], **ignored),
    }
    for kind, result in found.items():
        best = {"num_neighbors" if key == "k" else key: value for key, value in result.best.items()}
        comparison.exact(f"{kind} best", best, recorded["best"][kind])
        for name, value in recorded["test"][kind].items():
            comparison.close(f"{kind} {name}", getattr(result.test, name), value, tolerance=SCORE_TOLERANCE)
    both, best = sets["train"] + sets["val"], recorded["best"]
    knn = fit_knn(both, ks=[best["knn"]["num_neighbors"]], distance=best["knn"]["distance"], **ignored)
    _, logistic = fit_logistic(both, C=best["logreg"]["C"], **ignored)
    (of_knn,) = knn(sets["test"].features).values()
    for kind, predictions in {"knn": of_knn, "logreg": logistic(sets["test"].features)}.items():
        comparison.exact(f"{kind}.pred_test", predictions, recording.tensors[f"{kind}.pred_test"])
        scores = _scores(recording, predictions, sets["test"].labels, published=False)
        expected = recorded["test_mIoU_if_only_non_ignored_classes_were_averaged"][kind]
        comparison.close(f"{kind} without ignored", scores["mIoU"], expected, tolerance=SCORE_TOLERANCE)
    grids = recording.json["default_grids"]
    comparison.exact("default k", list(patch_probes.KS), grids["knn"]["num_neighbors"])
    comparison.exact("default distances", list(patch_probes.DISTANCES), grids["knn"]["distance"])
    for number, (ours, theirs) in enumerate(zip(patch_probes.C_VALUES, grids["logreg"]["C"], strict=True)):
        comparison.close(f"default C {number}", ours / theirs, 1.0, tolerance=SCORE_TOLERANCE)
