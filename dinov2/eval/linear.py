"""Linear evaluation: a grid of linear classifiers on frozen tokens of the last blocks, trained together.

The classifiers are defined in `linear_heads`. The best one is chosen on the validation set itself, as published.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.flags.evaluation import linear_parser as get_args_parser

if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before the imports that take seconds

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from dinov2 import distributed
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval import linear_data, setup
from dinov2.eval.feature_cache import FeatureCache, Features
from dinov2.eval.features import ModelWithIntermediateLayers, autocast, require_finite, tokens_of_blocks
from dinov2.eval.file_identity import image_identity
from dinov2.eval.linear_checkpoint import FINAL, RUNNING, LinearCheckpointer, read_checkpoint
from dinov2.eval.linear_data import EvalSet, LinearSets
from dinov2.eval.linear_heads import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    check_width,
    classifiers_from_state_dict,
    create_linear_input,
    scale_lr,
    setup_linear_classifiers,
)
from dinov2.eval.metrics import Accuracies, build_metric, percent, top_1
from dinov2.eval.results import archive_results, as_table, counted, run_facts, set_facts, write_results
from dinov2.eval.skip_unreadable import skip_unreadable_batches
from dinov2.log import run_command
from dinov2.meters import MetricLogger
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "AllClassifiers",
    "LinearClassifier",
    "LinearPostprocessor",
    "create_linear_input",
    "eval_linear",
    "evaluate_linear_classifiers",
    "get_args_parser",
    "main",
    "run_eval_linear",
    "scale_lr",
    "setup_linear_classifiers",
    "test_on_datasets",
]

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_linear.json"
LAST_BLOCKS = (1, 4)
SCORED_AT_ONCE = 1024  # images

Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, 3, H, W), labels (B,)


# --- Scores ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate_linear_classifiers(
    classifiers: Mapping[str, LinearClassifier], eval_set: EvalSet, features: Features, num_classes: int
) -> dict[str, Accuracies]:
    """Compute the accuracies of each classifier by name, without diverged ones; a `ValueError` if all have diverged.

    `features` are the tokens, all finite, and labels of this rank (`extract_tokens`), `num_classes` those of training.
    """
    device, mapping = distributed.device(), eval_set.class_mapping
    width = num_classes if mapping is None else len(mapping)
    postprocessors = {name: LinearPostprocessor(classifier, mapping) for name, classifier in classifiers.items()}
    metrics = {name: build_metric(eval_set.metric_type, num_classes=width).to(device) for name in classifiers}
    is_finite = {name: torch.ones((), dtype=torch.bool, device=device) for name in classifiers}
    tokens, labels = features
    for some_tokens, some_labels in zip(tokens.split(SCORED_AT_ONCE), labels.split(SCORED_AT_ONCE), strict=True):
        blocks, targets = tokens_of_blocks(some_tokens.to(device)), some_labels.to(device)
        for name, postprocessor in postprocessors.items():
            outputs = postprocessor(blocks, targets)
            is_finite[name] &= outputs["preds"].isfinite().all()
            metrics[name].update(**outputs)
    # NaN outputs would count as predictions of one constant class.
    mine = {name for name, finite in is_finite.items() if not finite}
    diverged = set().union(*distributed.all_gather_object(mine))
    scores = {name: {top: v.tolist() for top, v in metric.compute().items()} for name, metric in metrics.items()}
    if diverged:
        names = ", ".join(name for name in classifiers if name in diverged)
        if len(diverged) == len(classifiers):
            raise ValueError(
                f"no classifier is left for {eval_set.name}: the outputs of {names} are NaN or infinite, which means "
                "that training diverged; use smaller --learning-rates"
            )
        logger.warning("diverged and excluded: %s", names)
    return {name: accuracies for name, accuracies in scores.items() if name not in diverged}


def best_of(scores: Mapping[str, Accuracies]) -> str:
    """Name of the classifier with the highest top-1 accuracy, the first one if tied."""
    return max(scores, key=lambda name: top_1(scores[name]))


def test_on_datasets(
    classifiers: Mapping[str, LinearClassifier],
    test_sets: Sequence[EvalSet],
    tokens_of: Callable[[ImageDataset], Features],
    num_classes: int,
) -> list[dict[str, Accuracies]]:
    """Compute the accuracies of each classifier by name, for each test set."""
    return [evaluate_linear_classifiers(classifiers, each, tokens_of(each.dataset), num_classes) for each in test_sets]


# --- Training --------------------------------------------------------------------------------------------------------


class Periods(NamedTuple):
    """Length of training and periods of validations and checkpoints, in iterations."""

    max_iter: int
    eval_period: int
    checkpoint_period: int  # of the checkpoint that is overwritten
    kept_checkpoint_period: int


def build_optimizer(param_groups: list[dict[str, Any]], max_iter: int) -> tuple[Optimizer, LRScheduler]:
    """SGD with momentum, without weight decay, and a cosine schedule of the rates to 0."""
    optimizer = SGD(param_groups, momentum=0.9, weight_decay=0)
    return optimizer, CosineAnnealingLR(optimizer, max_iter)


def train_step(classifiers: nn.Module, features: Any, labels: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """Update all classifiers on a batch; returns the mean cross-entropy of each before the update."""
    losses = {name: functional.cross_entropy(logits, labels) for name, logits in classifiers(features).items()}
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def eval_linear(
    feature_model: nn.Module,
    classifiers: AllClassifiers,
    param_groups: list[dict[str, Any]],
    batches_from: Callable[[int], Batches],
    validate: Callable[[], dict[str, Accuracies]],
    periods: Periods,
    *,
    output_dir: Path,
    resume: bool,
    run: dict[str, Any],
    validated_on: str = "",
) -> list[dict[str, Any]]:
    """Train the classifiers in place, from the latest checkpoint if there is one and `resume`.

    Args:
        feature_model: Images -> tokens of the last blocks.
        classifiers, param_groups: See `setup_linear_classifiers`.
        batches_from: Iteration -> batches of this rank from there on.
        validate: Evaluates the classifiers.
        periods: Length of training and periods of validations and checkpoints.
        output_dir, run, validated_on: See `LinearCheckpointer`.
        resume: Whether to start from the latest checkpoint.

    Returns:
        The history of validations, without that after the last iteration, which the caller does.
    """
    device = distributed.device()
    optimizer, scheduler = build_optimizer(param_groups, periods.max_iter)
    checkpointer = LinearCheckpointer(output_dir, classifiers, optimizer, scheduler, run=run, validated_on=validated_on)
    start, history = checkpointer.load_latest() if resume else (0, [])
    model = nn.parallel.DistributedDataParallel(classifiers) if distributed.is_enabled() else classifiers
    progress = MetricLogger("  ", is_main=distributed.is_main())
    batches = progress.log_every(skip_unreadable_batches(batches_from(start)), 10, "Training", periods.max_iter, start)
    for iteration, (images, labels) in enumerate(batches, start):
        features = feature_model(images.to(device, non_blocking=True))
        all_inputs = create_linear_input(features, len(features), use_avgpool=True)
        require_finite(all_inputs, f"image {{}} of the batch of iteration {iteration}".format, feature_model)
        losses = train_step(model, features, labels.to(device, non_blocking=True), optimizer)
        progress.update(loss=torch.stack(list(losses.values())).sum(), lr=optimizer.param_groups[0]["lr"])
        scheduler.step()

        finished = iteration + 1
        if finished % periods.eval_period == 0 and finished < periods.max_iter:
            history.append(validation_record(finished, validate()))
        for name in _due_checkpoints(iteration, periods):
            checkpointer.save(name, iteration, history)
    return history


def _due_checkpoints(iteration: int, periods: Periods) -> list[str]:
    """Names of the checkpoints to write after an iteration."""
    finished = iteration + 1
    kept = [f"model_{iteration:07d}"] if finished % periods.kept_checkpoint_period == 0 else []
    if finished == periods.max_iter:
        return [*kept, FINAL]
    return [*kept, RUNNING] if finished % periods.checkpoint_period == 0 else kept


def validation_record(iteration: int, scores: Mapping[str, Accuracies]) -> dict[str, Any]:
    """Log a validation after `iteration` iterations, and return its record for the history."""
    for name, accuracies in scores.items():
        logger.info("%s top-1: %.2f", name, top_1(accuracies))
    best = best_of(scores)
    logger.info("best after %s: %s, top-1 %.2f", counted(iteration, "iteration"), best, top_1(scores[best]))
    return {"iteration": iteration, "best_classifier": best, "top-1": top_1(scores[best])}


# --- The whole evaluation --------------------------------------------------------------------------------------------


def run_eval_linear(
    model: DinoVisionTransformer, sets: LinearSets, args: argparse.Namespace, cfg: Config, cache: FeatureCache
) -> dict[str, Any]:
    """Train and test the classifiers; returns and logs the metrics of the results file, accuracies in percent."""
    num_blocks, loading = min(max(LAST_BLOCKS), model.n_blocks), (args.batch_size, args.num_workers)
    feature_model = ModelWithIntermediateLayers(model, num_blocks, partial(autocast, setup.get_autocast_dtype(cfg)))

    def tokens_of(dataset: ImageDataset) -> Features:
        return linear_data.extract_tokens(feature_model, dataset, *loading, cache)

    val_tokens = tokens_of(sets.val.dataset)
    validate = partial(evaluate_linear_classifiers, eval_set=sets.val, features=val_tokens)
    if sets.train is None:
        state = read_checkpoint(Path(args.classifier_fpath))
        classifiers = classifiers_from_state_dict(state["model"], args.classifier_fpath).to(distributed.device())
        check_width(classifiers, tokens_of_blocks(val_tokens[0][:1].to(distributed.device())), args.classifier_fpath)
        history: list[dict[str, Any]] = []
        iteration = state.get("iteration", -1) + 1
    else:
        classifiers, history = train_classifiers(feature_model, sets, validate, args, cfg)
        iteration = args.epochs * args.epoch_length
    named, num_classes = classifiers.by_name(), classifiers.num_classes
    scores = validate(named, num_classes=num_classes)
    history.append(validation_record(iteration, scores))
    best = best_of(scores)
    tests = test_on_datasets({best: named[best]}, sets.tests, tokens_of, num_classes)
    results = {
        "best_classifier": {"name": best, **percent(scores[best])},
        "val": {name: percent(accuracies) for name, accuracies in scores.items()},
        "test": [
            {"dataset": test_set.name, "metric": test_set.metric_type.value, **percent(test[best])}
            for test_set, test in zip(sets.tests, tests, strict=True)
        ],
        "diverged": [name for name in named if name not in scores],
        "history": history,
    }
    log_results(results, sets)
    return results


def log_results(results: dict[str, Any], sets: LinearSets) -> None:
    """Log the results: the published line, and a table."""
    logger.info("Test Results Dict %s", {key: results[key] for key in ("best_classifier", "test")})
    rows = []
    scores_of_sets = [results["best_classifier"], *results["test"]]
    for number, (each, scores) in enumerate(zip([sets.val, *sets.tests], scores_of_sets, strict=True)):
        facts = [each.name, each.metric_type.value, set_facts(each.dataset)["images"]]
        rows.append(["test" if number else "validation", *facts, scores["top-1"], scores.get("top-5")])
    title = f"linear classification, best on validation: {results['best_classifier']['name']}, accuracy in %"
    logger.info("%s", as_table(title, ["set", "data", "metric", "images", "top-1", "top-5"], rows))


def train_classifiers(
    feature_model: ModelWithIntermediateLayers,
    sets: LinearSets,
    validate: Callable[..., dict[str, Accuracies]],
    args: argparse.Namespace,
    cfg: Config,
) -> tuple[AllClassifiers, list[dict[str, Any]]]:
    """Train the grid; returns it and the history of validations by `validate(classifiers, num_classes=...)`."""
    assert sets.train is not None, "there is a training set"
    num_classes = 1 + int(setup.labels_of(sets.train).max())
    _, crop = setup.image_sizes(args, cfg)
    max_iter, world_size = args.epochs * args.epoch_length, distributed.world_size()
    classifiers, param_groups = setup_linear_classifiers(
        feature_model(torch.zeros(1, len(cfg.augmentation.mean), crop, crop, device=distributed.device())),
        [n for n in LAST_BLOCKS if n <= feature_model.n_last_blocks],
        args.learning_rates,
        args.batch_size,
        num_classes,
        world_size=world_size,
    )
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    history = eval_linear(
        feature_model,
        classifiers,
        param_groups,
        partial(linear_data.make_train_loader, dataset=sets.train, **loading),
        partial(validate, classifiers.by_name(), num_classes=num_classes),
        Periods(
            max_iter=max_iter,
            eval_period=args.eval_period_iterations,
            checkpoint_period=args.epoch_length,
            kept_checkpoint_period=args.save_checkpoint_frequency * args.epoch_length,
        ),
        output_dir=Path(args.output_dir),
        resume=not args.no_resume,
        run={
            **setup.model_facts(args, cfg),
            "training set": args.train_dataset,
            "names, sizes, times and labels of its images": image_identity(sets.train)[:16],
            "classes": setup.class_names(sets.train),
            "images per iteration": args.batch_size * world_size,
            "iterations": max_iter,
            "learning rates": args.learning_rates,
        },
        validated_on=image_identity(sets.val.dataset),
    )
    return classifiers, history


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    started = time.monotonic()
    with distributed.session():
        train = [] if args.classifier_fpath else [args.train_dataset]
        cfg = setup.setup(args, [*train, *(each["dataset_str"] for each in linear_data.eval_set_options(args))])
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        sets, cache = linear_data.make_sets(args, cfg), setup.feature_cache(args, cfg)
        equal = linear_data.equal_images(sets, args.train_dataset)
        model = setup.build_model_for_eval(cfg, args.pretrained_weights)
        metrics = run_eval_linear(model, sets, args, cfg, cache)
        facts = run_facts(sets.by_name(args.train_dataset), cache, started) | {"equal_images": equal}
        write_results(path, evaluation="linear", metrics=metrics, args=args, **facts)


if __name__ == "__main__":
    words = "the same command again continues from the latest checkpoint"
    sys.exit(run_command(lambda: main(ARGS), after_interrupt=words))
