"""Setup shared by the three evaluations: flags, configuration, frozen backbone, datasets."""

import argparse
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2 import config, distributed
from dinov2.config import DTYPES, Config
from dinov2.data import make_dataset
from dinov2.data.datasets import parse_dataset_str
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import ImageOptions
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.file_identity import LabeledDataset, report_equal_images
from dinov2.eval.results import counted, weights_fingerprint
from dinov2.flags.evaluation import PUBLISHED_CROP_SIZE, SMALLEST_PUBLISHED_SIZE
from dinov2.flags.evaluation import get_args_parser as get_args_parser
from dinov2.log import setup_logging
from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_backbone

logger = logging.getLogger(__name__)

MOST_CLASSES = 1_000_000  # larger labels are no class indices, but for example product numbers


def setup(args: argparse.Namespace, datasets: Iterable[str] = ()) -> Config:
    """Load the configuration, create the output folder and start logging; requires a `distributed.session()`.

    The configuration is saved as `config.yaml` in the output folder, but never over the file it was read from.

    If the configuration or one of the dataset strings is wrong, nothing has been created.
    """
    cfg = config.load(args.config_file, args.opts)
    config.require_normalization(cfg)
    for dataset_str in datasets:
        _check_dataset_str(dataset_str)
    output_dir = Path(args.output_dir).resolve()
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"--output-dir {output_dir} is a file")
    output_dir.mkdir(parents=True, exist_ok=True)
    setup_logging(output_dir, distributed.rank())
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, output_dir=str(output_dir)))
    path = output_dir / "config.yaml"
    if distributed.is_main() and path != Path(args.config_file).resolve():
        config.save(cfg, path)
    logger.info("%s", "\n".join(["arguments:", *(f"  {name}: {value}" for name, value in sorted(vars(args).items()))]))
    torch.backends.cudnn.benchmark = True  # all batches have the same shape
    return cfg


def _check_dataset_str(dataset_str: str) -> None:
    """Raise the error of opening a dataset if the string is invalid or a path in it is missing."""
    try:
        _, arguments = parse_dataset_str(dataset_str)
    except ValueError as error:
        raise ValueError(f"{error} (--train-dataset, --val-dataset and --test-datasets name datasets)") from error
    paths = [Path(arguments[key]).expanduser() for key in ("root", "extra", "file") if key in arguments]
    if not all(path.exists() for path in paths):
        make_dataset(dataset_str=dataset_str)


def build_model_for_eval(cfg: Config, pretrained_weights: str | None) -> DinoVisionTransformer:
    """Build the frozen backbone of the teacher on the device of this process.

    Weights are a path or URL; None gives random ones, from the seed `train.seed`. A `ValueError` if they do not fit.
    """
    torch.manual_seed(cfg.train.seed)
    model = build_model(**config.backbone_arguments(cfg))
    if pretrained_weights is None:
        logger.warning("evaluating the network before training (--random-init)")
    else:
        load_backbone(model, pretrained_weights)
    return model.eval().requires_grad_(False).to(distributed.device())


def get_autocast_dtype(cfg: Config) -> torch.dtype:
    """Precision of the teacher's backbone in training; float32 on a CPU, where half precision is not faster."""
    if distributed.device().type == "cpu":
        return torch.float32
    return DTYPES[cfg.compute_precision.teacher.backbone.mixed_precision.param_dtype]


def setup_and_build_model(args: argparse.Namespace) -> tuple[DinoVisionTransformer, torch.dtype]:
    """Build the frozen backbone of the command line, and its autocast dtype."""
    cfg = setup(args)
    return build_model_for_eval(cfg, args.pretrained_weights), get_autocast_dtype(cfg)


def image_sizes(args: argparse.Namespace, cfg: Config, published_resize_size: int = 256) -> tuple[int, int]:
    """Sizes (resize, crop) in pixels from the flags, else the published ones or those of a small-image model."""
    return resize_and_crop_size(
        *(args.resize_size, args.crop_size, cfg.crops.global_crops_size, cfg.student.patch_size, published_resize_size)
    )


def resize_and_crop_size(
    resize_size: int | None,
    crop_size: int | None,
    trained_size: int,
    patch_size: int,
    published_resize_size: int = 256,
) -> tuple[int, int]:
    """Sizes (resize, crop) in pixels: those given, else the published ones or `trained_size` of a small-image model."""
    small = trained_size < SMALLEST_PUBLISHED_SIZE
    resize = resize_size or (trained_size if small else published_resize_size)
    crop = crop_size or (trained_size if small else PUBLISHED_CROP_SIZE)
    if crop % patch_size:
        raise ValueError(f"--crop-size {crop} is not a multiple of student.patch_size = {patch_size}")
    if crop > resize:
        raise ValueError(f"--crop-size {crop} is larger than --resize-size {resize}")
    return resize, crop


def eval_transform(args: argparse.Namespace, cfg: Config, published_resize_size: int = 256) -> Callable[..., Tensor]:
    """Build the transform image -> (C, crop, crop), of C channels, with the normalization of training."""
    resize, crop = image_sizes(args, cfg, published_resize_size)
    logger.info("images: shorter side to %d pixels, center crop of %d x %d", resize, crop, crop)
    return make_classification_eval_transform(
        resize_size=resize, crop_size=crop, mean=cfg.augmentation.mean, std=cfg.augmentation.std
    )


def feature_cache(args: argparse.Namespace, cfg: Config, published_resize_size: int = 256) -> FeatureCache:
    """Build the cache of features of the evaluated model."""
    if args.feature_cache == "none":
        return FeatureCache()
    folder = Path(args.feature_cache or Path(args.output_dir) / "features")
    return FeatureCache(folder, model_facts(args, cfg, published_resize_size))


def model_facts(args: argparse.Namespace, cfg: Config, published_resize_size: int = 256) -> dict[str, Any]:
    """Description of the model and of the preprocessing of images for classification, as JSON."""
    return {**frozen_model_facts(args, cfg), "image sizes": list(image_sizes(args, cfg, published_resize_size))}


def frozen_model_facts(args: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    """Description of the model and of reading and normalizing images, as JSON."""
    weights = weights_fingerprint(args.pretrained_weights)
    return {
        "weights": weights["sha256"] if weights else f"random, seed {cfg.train.seed}",
        "backbone": config.backbone_arguments(cfg),
        "normalization": [list(cfg.augmentation.mean), list(cfg.augmentation.std)],
        "image options": dataclasses.asdict(cfg.images),
        "precision": str(get_autocast_dtype(cfg)),
    }


def class_names(dataset: ImageDataset) -> list[str]:
    """Class names by label; empty if the dataset has none."""
    return list(getattr(dataset, "classes", None) or [])


def check_classes(mine: Sequence[str], other: ImageDataset, other_name: str) -> None:
    """Raise a `ValueError` if a dataset has class names, and others than the training classes, if these have any."""
    others = class_names(other)
    if mine and others and list(mine) != others:
        different = ", ".join(map(str, sorted(set(mine) ^ set(others))[:6])) or "none, but their order differs"
        raise ValueError(
            f"{other_name} has other classes than the training images, so their labels mean different things: "
            f"{len(others)} and {len(mine)} classes; not in both: {different}"
        )


def check_labels(
    train_targets: np.ndarray, other: ImageDataset, other_name: str, *, num_classes: int | None = None
) -> None:
    """Raise a `ValueError` if a label of a test set is not below `num_classes`; warn of classes not trained on."""
    targets = labels_of(other)
    if num_classes is not None and targets.max() >= num_classes:
        raise ValueError(f"{other_name} has labels up to {targets.max()}, but there are {num_classes} classes, from 0")
    unseen = np.setdiff1d(targets, train_targets)
    if targets.ndim == 1 and len(unseen):
        names = ", ".join(map(str, unseen[:6])) + (", ..." if len(unseen) > 6 else "")
        logger.warning(
            "%s: %d of %d images are of classes without a training image, which cannot be predicted: labels %s",
            *(other_name, np.isin(targets, unseen).sum(), len(targets), names),
        )


def open_sets(
    train_name: str, names: Iterable[str], transform: Callable[..., Tensor], options: ImageOptions
) -> tuple[dict[str, ImageDataset], dict[str, dict[str, int]]]:
    """Open and compare a training set and others: datasets by dataset string, and `report_equal_images`."""
    train = training_dataset(train_name, transform, options)
    others = {name: labeled_dataset(name, transform, image_options=train.image_options) for name in names}
    for name, other in others.items():
        check_classes(class_names(train), other, name)
        check_labels(labels_of(train), other, name)
    labeled = {name: LabeledDataset.of(other) for name, other in others.items()}
    return {train_name: train} | others, report_equal_images(train_name, LabeledDataset.of(train), labeled)


def labels_of(dataset: ImageDataset) -> np.ndarray:
    """Labels of a dataset from `labeled_dataset`."""
    targets = dataset.get_targets()
    assert targets is not None, "labeled"
    return targets


def training_dataset(dataset_str: str, transform: Callable[..., Tensor], image_options: ImageOptions) -> ImageDataset:
    """Open a `labeled_dataset`; a `ValueError` also if all images are of one class."""
    dataset = labeled_dataset(dataset_str, transform, image_options=image_options)
    targets = labels_of(dataset)
    if (targets == targets[0]).all():
        name = next((f", {name}" for name in class_names(dataset)[targets[0] :]), "")
        subject, verb = ("the only image", "is") if len(targets) == 1 else (f"all {len(targets)} images", "are")
        raise ValueError(
            f"{subject} of --train-dataset {dataset_str!r} {verb} of one class (label {targets[0]}{name}): "
            "classification needs at least two; in an image folder, each class is a subfolder"
        )
    return dataset


def image_options(cfg: Config) -> ImageOptions:
    """Options of reading images, as in training.

    With several datasets, all use the options of the first one, with the value range measured there.
    """
    return ImageOptions(**vars(cfg.images))


def labeled_dataset(
    dataset_str: str,
    transform: Callable[..., Tensor],
    *,
    several: bool = False,
    image_options: ImageOptions | None = None,
) -> ImageDataset:
    """Open a dataset with one label per image, or lists of labels if `several`; a `ValueError` if it has none."""
    dataset = make_dataset(dataset_str=dataset_str, transform=transform, image_options=image_options)
    if len(dataset) == 0:
        raise ValueError(f"dataset {dataset_str!r} is empty")
    targets = dataset.get_targets()
    if targets is None or targets.max() < 0:  # lists may all be empty
        raise ValueError(f"dataset {dataset_str!r} has no labels, which this evaluation needs")
    if targets.max() >= MOST_CLASSES:
        first = dataset.describe(int(targets.reshape(len(targets), -1).max(axis=1).argmax()))
        raise ValueError(
            f"dataset {dataset_str!r} has labels up to {targets.max()} ({first}); labels are indices of classes, from 0"
        )
    if targets.ndim == 1 and targets.min() < 0:
        first = dataset.describe(int(targets.argmin()))
        num_bad = int((targets < 0).sum())
        verb = "has" if num_bad == 1 else "have"
        raise ValueError(f"{counted(num_bad, 'image')} of {dataset_str!r} {verb} a label below 0, such as {first}")
    if targets.ndim > 1 and not several:
        raise ValueError(
            f"dataset {dataset_str!r} has lists of labels, which only the metric imagenet_real_accuracy "
            "of the linear evaluation can take"
        )
    return dataset
