"""Data of the linear evaluation: endless augmented images for training, and datasets for testing.

Shapes: n images of a dataset, L last blocks, D width of the backbone, C' classes of a test set.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import ImageOptions
from dinov2.data.randomness import seed_for
from dinov2.data.sample_stream import PositionBatches, SamplePosition
from dinov2.data.samplers import GlobalOrderSampler
from dinov2.data.transforms import make_classification_train_transform
from dinov2.data.workers import SupervisedLoader
from dinov2.eval.feature_cache import FeatureCache, Features
from dinov2.eval.features import ModelWithIntermediateLayers, ModelWithPooledTokens, extract_features
from dinov2.eval.file_identity import LabeledDataset, report_equal_images
from dinov2.eval.linear_checkpoint import read_checkpoint
from dinov2.eval.linear_heads import classifiers_from_state_dict
from dinov2.eval.metrics import MetricType
from dinov2.eval.setup import (
    check_classes,
    check_labels,
    class_names,
    eval_transform,
    image_options,
    image_sizes,
    labeled_dataset,
    labels_of,
    training_dataset,
)
from dinov2.eval.skip_unreadable import SkipUnreadable, collate_skipping_unreadable


class AugmentedTrainingSet(Dataset[tuple[Tensor, int]]):
    """SamplePosition -> (image, label); the augmentation depends on (seed, position in the run) only."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, item: SamplePosition) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, "linear augment", item.position))
            return self.dataset[item.sample]


def make_train_loader(
    start_iteration: int, *, dataset: ImageDataset, batch_size: int, num_workers: int, seed: int = 0
) -> DataLoader:
    """Build a loader of endless batches of this rank from `start_iteration` on, as in an uninterrupted run."""
    rank, world_size = distributed.rank(), distributed.world_size()
    start_position = start_iteration * batch_size * world_size
    share = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "start_position": start_position}
    order = GlobalOrderSampler(sample_count=len(dataset), seed=seed, **share)
    return SupervisedLoader(
        SkipUnreadable(AugmentedTrainingSet(dataset, seed)),
        batch_sampler=PositionBatches(order, **share),
        num_workers=num_workers,
        collate_fn=collate_skipping_unreadable,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # otherwise it draws from the global one
    )


class EvalSet(NamedTuple):
    """A labeled dataset for testing classifiers."""

    name: str  # dataset string
    dataset: ImageDataset
    metric_type: MetricType
    class_mapping: Tensor | None  # (C',) int64: training class of each class


def make_eval_set(
    *,
    dataset_str: str,
    transform: Callable[..., Tensor],
    metric_type: MetricType,
    class_mapping_fpath: str | None,
    image_options: ImageOptions,
) -> EvalSet:
    """Open the dataset of a dataset string, and its class mapping from a `.npy` file."""
    mapping = None if class_mapping_fpath is None else _read_class_mapping(Path(class_mapping_fpath))
    several = metric_type is MetricType.IMAGENET_REAL_ACCURACY
    dataset = labeled_dataset(dataset_str, transform, several=several, image_options=image_options)
    targets = dataset.get_targets()
    if several and targets is not None and targets.ndim == 1:
        raise ValueError(
            f"{metric_type.value} needs a list of labels per image, which {dataset_str!r} does not have "
            "(ImageNet:split=VAL:root=...:extra=...:real=/path/real.json has)"
        )
    return EvalSet(dataset_str, dataset, metric_type, mapping)


def _read_class_mapping(path: Path) -> Tensor:
    """Read the integers of a `.npy` file, (C',) int64 on the device of this process."""
    try:
        mapping = np.load(path)
    except (EOFError, ValueError) as error:
        raise ValueError(f"cannot read the class mapping {path}: {error}") from error
    if not isinstance(mapping, np.ndarray) or mapping.ndim != 1 or mapping.dtype.kind not in "iu" or not len(mapping):
        raise ValueError(f"the class mapping {path} must be a list of integers, one per class")
    return torch.from_numpy(mapping.astype(np.int64)).to(distributed.device())


class LinearSets(NamedTuple):
    """The data of a linear evaluation."""

    train: ImageDataset | None  # None if nothing is trained
    val: EvalSet
    tests: list[EvalSet]

    def by_name(self, train_name: str) -> dict[str, ImageDataset]:
        """The datasets by their dataset strings."""
        train = {} if self.train is None else {train_name: self.train}
        return train | {each.name: each.dataset for each in (self.val, *self.tests)}


def eval_set_options(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Arguments of `make_eval_set` for the validation set and each test set of the command line."""
    datasets = args.test_datasets or []
    metric_types = args.test_metric_types or [args.val_metric_type] * len(datasets)
    mappings = args.test_class_mapping_fpaths or ["None"] * len(datasets)
    for flag, values in (("--test-metric-types", metric_types), ("--test-class-mapping-fpaths", mappings)):
        if len(values) != len(datasets):
            raise ValueError(f"{flag} has {len(values)} values for {len(datasets)} --test-datasets")
    tests = [
        (dataset, metric, None if mapping == "None" else mapping)
        for dataset, metric, mapping in zip(datasets, metric_types, mappings, strict=True)
    ]
    return [
        {"dataset_str": dataset, "metric_type": MetricType(metric), "class_mapping_fpath": mapping}
        for dataset, metric, mapping in [(args.val_dataset, args.val_metric_type, args.val_class_mapping_fpath), *tests]
    ]


def make_sets(args: argparse.Namespace, cfg: Config) -> LinearSets:
    """Open the datasets of the command line.

    Raises:
        ValueError: A dataset has labels that no classifier predicts, or other classes and no class mapping.
    """
    options, train = image_options(cfg), None
    if not args.classifier_fpath:
        _, crop = image_sizes(args, cfg)
        augmentation = make_classification_train_transform(
            crop_size=crop, mean=cfg.augmentation.mean, std=cfg.augmentation.std
        )
        train = training_dataset(args.train_dataset, augmentation, options)
        options = train.image_options
    transform = eval_transform(args, cfg)
    sets = [make_eval_set(transform=transform, image_options=options, **each) for each in eval_set_options(args)]
    if train is not None:
        _check_classes(class_names(train), labels_of(train), sets)
    else:
        state = read_checkpoint(Path(args.classifier_fpath))
        num_classes = classifiers_from_state_dict(state["model"], args.classifier_fpath).num_classes
        _check_classes(state["run"].get("classes") or [], np.arange(num_classes), sets)
    return LinearSets(train, val=sets[0], tests=sets[1:])


def _check_classes(names: list[str], train_targets: np.ndarray, sets: list[EvalSet]) -> None:
    """Check that labels mean the classes of the training set, directly or by a class mapping."""
    num_classes = 1 + int(train_targets.max())
    for each in sets:
        if each.class_mapping is None:
            check_classes(names, each.dataset, each.name)
            check_labels(train_targets, each.dataset, each.name, num_classes=num_classes)
            continue
        mapping = each.class_mapping.tolist()
        if not 0 <= min(mapping) <= max(mapping) < num_classes:
            raise ValueError(
                f"the class mapping of {each.name} has indices from {min(mapping)} to {max(mapping)}, "
                f"but there are {num_classes} classes"
            )
        check_labels(np.arange(len(mapping)), each.dataset, each.name, num_classes=len(mapping))


def equal_images(sets: LinearSets, train_name: str) -> dict[str, dict[str, int]]:
    """Count the copies of training images in the other datasets, see `report_equal_images`."""
    if sets.train is None:
        return {}
    others = {}
    for each in (sets.val, *sets.tests):
        mapping = None if each.class_mapping is None else np.append(each.class_mapping.cpu(), -1)  # padding stays -1
        labels = labels_of(each.dataset)
        others[each.name] = LabeledDataset(each.dataset, labels if mapping is None else mapping[labels])
    return report_equal_images(train_name, LabeledDataset.of(sets.train), others)


def extract_tokens(
    model: ModelWithIntermediateLayers, dataset: ImageDataset, batch_size: int, num_workers: int, cache: FeatureCache
) -> Features:
    """Extract tokens (n, L, 2, D), see `ModelWithPooledTokens`, and labels of this rank's share, in host memory."""
    pooled = ModelWithPooledTokens(model)
    tokens, labels = extract_features(
        pooled, dataset, batch_size, num_workers, gather_on_cpu=True, cache=cache, kind="last_blocks"
    )
    mine = slice(distributed.rank(), None, distributed.world_size())
    return tokens[mine].contiguous(), labels[mine]  # with several ranks a copy, so that the rest can be freed
