"""The flags of the evaluations of patch tokens: segmentation and depth."""

import argparse

from dinov2.flags import positive_int, positive_number
from dinov2.flags.evaluation import add_cache_flag, model_parser

SEGMENTATION_PROTOCOLS = ("dinov2", "dinov2_ms", "dinov3", "capi")
DEPTH_PROTOCOLS = ("dinov2", "dinov3")


def segmentation_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the segmentation."""
    parser = model_parser("DINOv2 segmentation with a linear head on frozen patch tokens", add_help)
    add = parser.add_argument
    protocol_help = (
        "dinov2: last block, windows of 512 pixels; dinov2_ms: last four blocks, windows of 640, five scales and "
        "mirror images; dinov3: as dinov2 with another schedule, dropout, and the best head of all validations; "
        "capi: nearest patches and logistic regression, without training, in minutes"
    )
    add("--protocol", choices=SEGMENTATION_PROTOCOLS, default="dinov2", help=protocol_help)
    _add_shared(parser, "ade20k_linear, voc2012_ms")
    crop_help = (
        "side of crops and windows in pixels instead of the protocol's, other sizes in proportion; for capi the side "
        "of the images (default for models trained on global crops below 96 pixels: the size of those crops)"
    )
    add("--crop-size", type=positive_int, help=crop_help)
    add("--max-train-images", type=positive_int, help="for capi: number of training images (default: all)")
    add("--probe-batch-size", type=positive_int, default=64, help="for capi: images per process in extraction")
    add_cache_flag(parser)
    return parser


def depth_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the depth estimation."""
    parser = model_parser("DINOv2 depth estimation with a linear head on frozen patch tokens", add_help)
    add = parser.add_argument
    protocol_help = "dinov2: class token beside each patch token; dinov3: last block after the norm, batch norm"
    add("--protocol", choices=DEPTH_PROTOCOLS, default="dinov2", help=protocol_help)
    layers_help = "blocks whose tokens the head sees: 4 (default for dinov2), or 1 (default for dinov3)"
    add("--layers", type=int, choices=(1, 4), help=layers_help)
    gradient_help = "weight of the loss of gradients, whose published form has no effect (default: 0; intended: 0.5)"
    add("--gradient-loss", type=positive_number, help=gradient_help)
    _add_shared(parser, "nyu_linear, nyu_linear4, kitti_dpt")
    bins_help = "range in meters of the bins of a given head (default: that of its training; released ones as the hub)"
    add("--bins", type=positive_number, nargs=2, metavar=("MIN", "MAX"), help=bins_help)
    add("--min-depth", type=positive_number, help="smallest depth in meters (default: that of the dataset, 0.001)")
    add("--max-depth", type=positive_number, help="largest depth in meters (default: that of the dataset)")
    mask_help = "pixels that are scored (default: those of the dataset)"
    add("--mask", choices=("nyu_eigen", "kitti_garg", "kitti_eigen", "none"), help=mask_help)
    crop_help = "height and width in pixels of crops in training (default: those of the dataset)"
    add("--train-crop", type=positive_int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=crop_help)
    return parser


def _add_shared(parser: argparse.ArgumentParser, published_heads: str) -> None:
    """Add the flags of datasets, head and training."""
    add = parser.add_argument
    add("--train-dataset", help="dataset string, for training the head")
    add("--val-dataset", required=True, help="dataset string")
    head_help = f"test this head, without training: file, URL, or a published one ({published_heads})"
    add("--head", metavar="HEAD", help=head_help)
    add("--iterations", type=positive_int, help="iterations instead of the protocol's, warm-up in proportion")
    add("--batch-size", type=positive_int, help="crops per process (default: the protocol's 16, shared out)")
    add("--learning-rate", type=positive_number, help="largest learning rate instead of the protocol's")
    add("--eval-period-iterations", type=positive_int, help="iterations between validations instead of the protocol's")
    add("--save-period-iterations", type=positive_int, default=1000, help="iterations between two checkpoints")
    add("--no-resume", action="store_true", help="start anew even if the output folder has a checkpoint")
    precision_help = "precision of the backbone (default: fp32, as published)"
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help=precision_help)
    add("--num-workers", type=int, default=4, help="data loader workers per process")
    add("--shown-images", type=int, default=8, help="images of the validation set in predictions.png; 0: no figure")
