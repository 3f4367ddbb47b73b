"""The flags of the evaluations: those that all have, and those of each."""

import argparse
from enum import Enum

from dinov2.flags import CommandParser, positive_int, positive_number

PUBLISHED_CROP_SIZE = 224
SMALLEST_PUBLISHED_SIZE = 96  # a model trained on smaller global crops is evaluated at the size of its crops
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


class MetricType(Enum):
    """The metrics of the command line."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    IMAGENET_REAL_ACCURACY = "imagenet_real_accuracy"


def model_parser(description: str, add_help: bool = True) -> argparse.ArgumentParser:
    """Build a parser with the flags of every evaluation: the model and the output folder."""
    parser = CommandParser(description=description, add_help=add_help)
    add = parser.add_argument
    config_help = "config of the model: config.yaml of its training run, another YAML file, or a packaged name such as "
    add("--config-file", required=True, help=f"{config_help}eval/vits14_pretrain")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained-weights", help="file, folder (OUT/eval/best), URL or published name")
    random_help = "evaluate the network before training, as a baseline"
    weights.add_argument("--random-init", action="store_true", help=random_help)
    add("--output-dir", "--output_dir", default="", help="for results and logs (default: the current folder)")
    add("--opts", nargs="+", action="extend", default=[], metavar="key=value", help="config overrides, a.b=value")
    return parser


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the cache of features."""
    cache_help = (
        "cache of extracted features, reused as long as the weights, settings, labels, and the names, sizes and "
        "modification times of the images are the same; may be shared by several evaluations (default: features in the "
        "output folder); none: no cache"
    )
    parser.add_argument("--feature-cache", metavar="FOLDER", help=cache_help)


def get_args_parser(description: str = "DINOv2 evaluation", add_help: bool = True) -> argparse.ArgumentParser:
    """Build a parser with the flags common to the evaluations of image classification."""
    parser = model_parser(description, add_help)
    add = parser.add_argument
    add("--train-dataset", default="ImageNet:split=TRAIN", help="dataset string")
    add("--val-dataset", default="ImageNet:split=VAL", help="dataset string")
    small = f"for models trained on global crops below {SMALLEST_PUBLISHED_SIZE} pixels: the size of those crops"
    resize_help = "shorter side in pixels to which images are resized (default: 256, for logistic regression 224; "
    add("--resize-size", type=positive_int, help=f"{resize_help}{small})")
    crop_help = f"side of the center crop in pixels (default: {PUBLISHED_CROP_SIZE}; {small})"
    add("--crop-size", type=positive_int, help=crop_help)
    add_cache_flag(parser)
    return parser


def knn_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the k-NN evaluation."""
    parser = get_args_parser("DINOv2 k-NN evaluation", add_help)
    add, ks = parser.add_argument, [10, 20, 100, 200]
    add("--nb_knn", "--nb-knn", type=positive_int, nargs="+", default=ks, help="numbers of neighbors that vote")
    add("--temperature", type=positive_number, default=0.07, help="softmax temperature of the votes")
    add("--gather-on-cpu", action="store_true", help="keep the gathered features in host memory")
    add("--batch-size", type=positive_int, default=256, help="images per process in feature extraction")
    add("--num-workers", type=int, default=5, help="data loader workers per process")
    per_class_help = "training images per class to search for neighbors in; -1 = all"
    add("--n-per-class-list", type=int, nargs="+", default=[-1], help=per_class_help)
    tries_help = "random choices of training images per value of --n-per-class-list, whose scores are averaged"
    add("--n-tries", type=positive_int, default=1, help=tries_help)
    return parser


def log_regression_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the logistic regression."""
    parser = get_args_parser("DINOv2 logistic regression", add_help)
    add = parser.add_argument
    finetune_help = "dataset string of images for choosing C (default: a tenth of the training set)"
    add("--finetune-dataset-str", help=finetune_help)
    add("--finetune-on-val", action="store_true", help="choose C on the validation set, if no such dataset is given")
    metric_types = [t.value for t in MetricType if t is not MetricType.IMAGENET_REAL_ACCURACY]
    add("--metric-type", choices=metric_types, default=MetricType.MEAN_ACCURACY.value)
    device_help = "device of the features; on CUDA cuML is used if installed"
    add("--train-features-device", type=_device, default="cpu", help=device_help)
    add("--train-dtype", choices=("float32", "float64"), default="float64", help="precision of the fit")
    add("--max-train-iters", type=positive_int, default=1000, help="iterations of the solver")
    add("--batch-size", type=positive_int, default=256, help="images per process in feature extraction")
    add("--num-workers", type=int, default=0, help="data loader workers per process")
    return parser


def _device(text: str) -> str:
    """Argparse type of a device of this machine."""
    if text == "cpu":
        return text
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"expected cpu or, on a machine with a GPU, cuda, got {text!r}")
    return text


def linear_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the linear evaluation."""
    parser = get_args_parser("DINOv2 linear evaluation", add_help)
    add, metric_types = parser.add_argument, [each.value for each in MetricType]
    add("--test-datasets", nargs="+", help="dataset strings of further datasets for testing the best classifier")
    add("--epochs", type=positive_int, default=10, help="number of epochs of --epoch-length iterations")
    add("--batch-size", type=positive_int, default=128, help="images per process")
    add("--num-workers", type=int, default=8, help="data loader workers per process")
    length_help = "iterations per epoch; a checkpoint is written after each"
    add("--epoch-length", type=positive_int, default=1250, help=length_help)
    kept_help = "epochs between two checkpoints that are kept"
    add("--save-checkpoint-frequency", type=positive_int, default=20, help=kept_help)
    add("--eval-period-iterations", type=positive_int, default=1250, help="iterations between two validations")
    rates, rates_help = list(LEARNING_RATES), "learning rates for a batch of 256 images"
    add("--learning-rates", type=positive_number, nargs="+", default=rates, help=rates_help)
    add("--no-resume", action="store_true", help="start anew even if the output folder has a checkpoint")
    add("--val-metric-type", choices=metric_types, default=MetricType.MEAN_ACCURACY.value)
    add("--test-metric-types", choices=metric_types, nargs="+", help="one per test set (default: as for validation)")
    add("--classifier-fpath", help="checkpoint of classifiers to evaluate without training")
    add("--val-class-mapping-fpath", help=".npy file with the training class of each class in the validation set")
    add("--test-class-mapping-fpaths", nargs="+", help="the same for each test set; None for no mapping")
    return parser
