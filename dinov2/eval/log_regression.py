"""Logistic regression on frozen features, with an L2 penalty whose strength is chosen on held-out images.

Shapes: n training images, B test images, D feature width, C classes.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.flags.evaluation import log_regression_parser as get_args_parser

if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before the imports that take seconds

import numpy as np
import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval import setup
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.features import extract_features
from dinov2.eval.metrics import Accuracies, MetricType, build_metric, percent, top_1
from dinov2.eval.results import archive_results, as_table, counted, described_set, run_facts, write_results
from dinov2.log import run_command

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_log_regression.json"
RESIZE_SIZE = 224
C_VALUES = (10.0 ** (torch.arange(-24, 21) / 4)).tolist()  # 45 values, 1e-6 to 1e5, rounded to float32
TOLERANCE = 1e-12
HELD_OUT_SEED = 0
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class LabeledFeatures(NamedTuple):
    """Features and labels of some images."""

    features: Tensor  # (n, D)
    labels: Tensor  # (n,) int64


class LogRegModule(nn.Module):
    """Multinomial logistic regression: minimizes C * (sum of the losses) + |weights|^2 / 2, intercept free."""

    def __init__(self, C: float, max_iter: int, dtype: torch.dtype, device: torch.device, num_classes: int) -> None:
        """Build a solver: cuML's if `device` is a GPU and cuML is installed, else scikit-learn's on the CPU."""
        super().__init__()
        self.dtype, self.num_classes = dtype, num_classes
        if device.type == "cuda" and find_spec("cuml"):
            from cuml.linear_model import LogisticRegression as GpuLogisticRegression

            self.device = device
            self.estimator: Any = GpuLogisticRegression(
                C=C, max_iter=max_iter, tol=TOLERANCE, linesearch_max_iter=50, output_type="numpy"
            )
        else:
            from sklearn.linear_model import LogisticRegression

            self.device = torch.device("cpu")
            self.estimator = LogisticRegression(C=C, max_iter=max_iter, tol=TOLERANCE)

    def fit(self, train_features: Tensor, train_labels: Tensor) -> None:
        """Fit to (n, D) features and (n,) int64 labels, which need not have all classes."""
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # also raised for fits limited by rounding only
            self.estimator.fit(self._array(train_features.to(self.dtype)), self._array(train_labels))

    @property
    def converged(self) -> bool:
        """Whether the fit ended before the maximum of iterations; True if the solver does not report iterations."""
        iterations = getattr(self.estimator, "n_iter_", None)
        return iterations is None or bool(np.max(iterations) < self.estimator.max_iter)

    def forward(self, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Class probabilities (B, C) of features (B, D), as arguments of metrics."""
        seen = self.estimator.predict_proba(self._array(samples.to(self.dtype)))
        classes = torch.as_tensor(np.asarray(self.estimator.classes_), dtype=torch.int64)
        probabilities = torch.zeros(len(samples), self.num_classes, dtype=self.dtype)
        probabilities[:, classes] = torch.as_tensor(seen)
        return {"preds": probabilities, "target": targets.cpu()}

    def _array(self, tensor: Tensor) -> Any:
        """Convert for the solver: to a tensor on the GPU for cuML, to an array for scikit-learn."""
        return tensor.to(self.device) if self.device.type == "cuda" else tensor.cpu().numpy()


class Fitter(NamedTuple):
    """Fits and evaluates models for given values of C."""

    num_classes: int
    metric_type: MetricType = MetricType.MEAN_ACCURACY
    max_iter: int = 1000
    dtype: torch.dtype = torch.float64

    def fit(self, C: float, train: LabeledFeatures) -> LogRegModule:
        module = LogRegModule(C, self.max_iter, self.dtype, train.features.device, self.num_classes)
        module.fit(train.features, train.labels)
        return module

    def score(self, module: LogRegModule, test: LabeledFeatures) -> Accuracies:
        """Accuracies {"top-1": ...} as fractions, in this process alone."""
        metric = build_metric(self.metric_type, num_classes=self.num_classes, sync_on_compute=False)
        metric.update(**module(test.features, test.labels))
        return {top: value.tolist() for top, value in metric.compute().items()}


def sweep_C_values(
    fitter: Fitter, train: LabeledFeatures, choice: LabeledFeatures, C_values: Sequence[float] = C_VALUES
) -> list[Accuracies]:
    """Accuracies on `choice` of a model fitted to `train` for each C, and whether it `converged`; shared by ranks."""
    mine = {}
    for i in range(distributed.rank(), len(C_values), distributed.world_size()):
        model = fitter.fit(C_values[i], train)
        mine[i] = fitter.score(model, choice) | {"converged": model.converged}
        logger.info("C = %.3g: top-1 %.2f", C_values[i], top_1(mine[i]))
    everything = {i: scores for part in distributed.all_gather_object(mine) for i, scores in part.items()}
    unfinished = [f"{C:.3g}" for i, C in enumerate(C_values) if not everything[i]["converged"]]
    if unfinished and distributed.is_main():
        shown = ", ".join([*unfinished[:4], *["..."] * (len(unfinished) > 4)])
        logger.warning(
            "not converged after %s (--max-train-iters): %d of %d fits, C = %s",
            *(counted(fitter.max_iter, "iteration"), len(unfinished), len(C_values), shown),
        )
    return [everything[i] for i in range(len(C_values))]


def hold_out(train: LabeledFeatures) -> tuple[LabeledFeatures, LabeledFeatures]:
    """Split a training set into a random tenth (rounded down) for choosing C and the rest: (rest, tenth).

    As published, it is the first tenth of a random order, except that the last image of each class stays in the rest.
    """
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    _, last_of_class = np.unique(train.labels.cpu()[order].flip(0).numpy(), return_index=True)  # counted from the end
    candidates = np.setdiff1d(np.arange(len(order)), len(order) - 1 - last_of_class)
    positions = candidates[: len(order) // 10]
    if not len(positions):
        raise ValueError(
            f"{len(order)} training images of {len(last_of_class)} classes are too few to hold out a tenth to choose C "
            "on and leave one of each class: choose it on the validation set with --finetune-on-val, or on another set "
            "with --finetune-dataset-str"
        )
    is_held_out = torch.zeros(len(order), dtype=torch.bool)
    is_held_out[positions] = True
    rest, tenth = (LabeledFeatures(*(t[order[part]] for t in train)) for part in (~is_held_out, is_held_out))
    return rest, tenth


def eval_log_regression(
    train: LabeledFeatures,
    val: LabeledFeatures,
    *,
    fitter: Fitter,
    finetune: LabeledFeatures | None = None,
    finetune_on_val: bool = False,
    C_values: Sequence[float] = C_VALUES,
) -> dict[str, Any]:
    """Choose C, fit and evaluate; features must be complete on every rank.

    C is chosen on `finetune` if given, else on `val` if `finetune_on_val`, else on a tenth of `train`. Unless it was
    chosen on `val`, the final model is fitted to the images of the choice too.

    Returns:
        On rank 0 {"top-1": fraction, ..., "best_C": C, "converged": whether the final fit converged, "sweep":
        [{"C": C, "top-1": ..., "converged": ...}, ...]}; empty on other ranks.
    """
    fitted, everything, choice = train, train, val
    if finetune is not None:
        choice = finetune
        everything = LabeledFeatures(*(torch.cat(pair) for pair in zip(train, finetune, strict=True)))
    elif not finetune_on_val:
        fitted, choice = hold_out(train)
    sweep = sweep_C_values(fitter, fitted, choice, C_values)
    if not distributed.is_main():
        return {}
    best = max(range(len(C_values)), key=lambda i: top_1(sweep[i]))  # the first one if tied
    logger.info("best C = %.3g; fitting to all %d images", C_values[best], len(everything.labels))
    final = fitter.fit(C_values[best], everything)
    if not final.converged:
        logger.warning(
            "the final fit has not converged after --max-train-iters %d iterations: its accuracy may differ from "
            "that of the solution",
            fitter.max_iter,
        )
    by_C = [{"C": C, **accuracies} for C, accuracies in zip(C_values, sweep, strict=True)]
    return {**fitter.score(final, val), "best_C": C_values[best], "converged": final.converged, "sweep": by_C}


def eval_log_regression_with_model(
    model: nn.Module,
    *,
    train_dataset: ImageDataset,
    val_dataset: ImageDataset,
    finetune_dataset: ImageDataset | None = None,
    finetune_on_val: bool = False,
    metric_type: MetricType = MetricType.MEAN_ACCURACY,
    train_features_device: str = "cpu",
    train_dtype: torch.dtype = torch.float64,
    max_train_iters: int = 1000,
    batch_size: int = 256,
    num_workers: int = 0,
    autocast_dtype: torch.dtype = torch.float32,
    cache: FeatureCache | None = None,
) -> dict[str, Any]:
    """Extract the class tokens of the datasets (not normalized) and run `eval_log_regression` on them."""
    device = torch.device(train_features_device)
    loading = (batch_size, num_workers, device.type == "cpu")

    def extract(dataset: ImageDataset) -> LabeledFeatures:
        found = extract_features(model, dataset, *loading, autocast_dtype=autocast_dtype, cache=cache)
        return LabeledFeatures(*(tensor.to(device) for tensor in found))

    train, val = extract(train_dataset), extract(val_dataset)
    finetune = None if finetune_dataset is None else extract(finetune_dataset)
    num_classes = 1 + max(int(part.labels.max()) for part in (train, val, finetune) if part is not None)
    fitter = Fitter(num_classes, metric_type, max_train_iters, train_dtype)
    return eval_log_regression(train, val, fitter=fitter, finetune=finetune, finetune_on_val=finetune_on_val)


def log_scores(metrics: dict[str, Any], val_dataset: ImageDataset) -> None:
    """Log the accuracies, in percent: the published lines, and a table."""
    for top in [key for key in metrics if key.startswith("top-")]:
        logger.info("%s: %s", top, np.round(metrics[top], 1))
    title = f"logistic regression on {described_set(val_dataset)}, accuracy in %"
    row = [f"{metrics['best_C']:.3g}", metrics["top-1"], metrics.get("top-5")]
    logger.info("%s", as_table(title, ["best C", "top-1", "top-5"], [row]))


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    started = time.monotonic()
    with distributed.session():
        names = [name for name in (args.val_dataset, args.finetune_dataset_str) if name]
        cfg = setup.setup(args, [args.train_dataset, *names])
        if args.finetune_dataset_str and args.finetune_on_val:
            logger.warning("--finetune-on-val has no effect: C is chosen on the images of --finetune-dataset-str")
        transform, cache = setup.eval_transform(args, cfg, RESIZE_SIZE), setup.feature_cache(args, cfg, RESIZE_SIZE)
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        sets, equal_images = setup.open_sets(args.train_dataset, names, transform, setup.image_options(cfg))
        results = eval_log_regression_with_model(
            setup.build_model_for_eval(cfg, args.pretrained_weights),
            train_dataset=sets[args.train_dataset],
            val_dataset=sets[args.val_dataset],
            finetune_dataset=sets.get(args.finetune_dataset_str),
            finetune_on_val=args.finetune_on_val,
            metric_type=MetricType(args.metric_type),
            train_features_device=args.train_features_device,
            train_dtype=DTYPES[args.train_dtype],
            max_train_iters=args.max_train_iters,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            autocast_dtype=setup.get_autocast_dtype(cfg),
            cache=cache,
        )
        if distributed.is_main():
            metrics = percent(results) | {"sweep": [percent(scores) for scores in results["sweep"]]}
            log_scores(metrics, sets[args.val_dataset])
            facts = run_facts(sets, cache, started) | {"equal_images": equal_images}
            write_results(path, evaluation="log_regression", metrics=metrics, args=args, **facts)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(ARGS)))
