"""The flags of the figures of features."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2.flags import CommandParser, positive_int, positive_number
from dinov2.flags.dense import SEGMENTATION_PROTOCOLS
from dinov2.flags.evaluation import PUBLISHED_CROP_SIZE

COMMANDS = ("pca", "attention", "similarity", "neighbors", "segmentation", "depth")
ALIASES = ("neighbours",)  # of "neighbors"
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WRITABLE_SUFFIXES = (".mp4", ".gif")  # of videos
PAGE_SUFFIXES = (".html", ".htm")
DEFAULT_SIDE = 448  # shorter side of the inputs of models that were trained on images of the published sizes, in pixels
NUM_IMAGES = 30  # default number of images of each folder, glob, dataset or video
NUM_QUERIES = 10


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m dinov2.visualization`."""
    parser = CommandParser(
        "python -m dinov2.visualization", description="Figures of the features of a frozen backbone."
    )
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    pca = _add_command(commands, "pca", "principal components of patch features as colors")
    pca.add_argument("--foreground", action="store_true", help="color the foreground only; the rest is black")
    pca.add_argument("--smooth", action="store_true", help="interpolate between the colors of patches")
    shifts_help = "run the model on N x N shifted copies of each image, for an N times finer grid (default: 1)"
    pca.add_argument("--shifts", type=positive_int, default=1, metavar="N", help=shifts_help)
    every_help = "of a video that becomes a video, use every Nth frame (default: 1)"
    pca.add_argument("--every", type=positive_int, default=1, metavar="N", help=every_help)
    _add_command(commands, "attention", "attention of the class token in the last block, per head")
    similarity = _add_command(commands, "similarity", "similarity of all patches to some of them")
    point_help = (
        "points of the first image, a row each. Two integers: pixels of the original image; two numbers with a decimal "
        "point: fractions of its width and height (0.5,0.25)"
    )
    similarity.add_argument("--point", nargs="+", metavar="X,Y", help=point_help)
    html_help = "instead of a figure, write a web page on which any patch of any image can be chosen"
    similarity.add_argument("--html", type=Path, metavar="FILE", help=html_help)
    neighbors = _add_command(commands, "neighbors", "nearest neighbors of images; also a .json list")
    query_help = "images to find neighbors of: files, folders, globs, dataset strings"
    neighbors.add_argument("--query", nargs="+", required=True, help=query_help)
    number_help = f"maximum number of queries of each folder, glob or dataset, evenly spaced (default: {NUM_QUERIES})"
    neighbors.add_argument("--num-queries", type=positive_int, default=NUM_QUERIES, help=number_help)
    neighbors.add_argument("--k", type=positive_int, default=5, help="number of neighbors (default: 5)")
    neighbors.add_argument("--num-workers", type=int, default=0, help="processes that decode images (default: 0)")
    _add_dense_commands(commands)
    return parser


def _add_dense_commands(commands: Any) -> None:
    """Add the commands that need a head."""
    segmentation = _add_command(commands, "segmentation", "classes that a segmentation head predicts")
    head_help = "head.pth of an evaluation, another file or URL, or a published head (ade20k_linear, voc2012_ms)"
    segmentation.add_argument("--head", required=True, help=head_help)
    protocol_help = "sizes, windows, scales and mirror images (default: those of the head's training, else dinov2)"
    trained = [name for name in SEGMENTATION_PROTOCOLS if name != "capi"]  # which has no head
    segmentation.add_argument("--protocol", choices=trained, help=protocol_help)
    classes_help = "file of class names, a line each in the order of the classes (default: those of the head, if known)"
    segmentation.add_argument("--classes", type=Path, metavar="FILE", help=classes_help)
    depth = _add_command(commands, "depth", "depth that a depth head predicts")
    depth.add_argument(
        "--head", required=True, help=head_help.replace("ade20k_linear, voc2012_ms", "nyu_linear4, kitti_dpt")
    )
    bins_help = "range in meters of the bins of the head (default: that of its training; released ones as the hub)"
    depth.add_argument("--bins", type=positive_number, nargs=2, metavar=("MIN", "MAX"), help=bins_help)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line (None: that of the process); without a command, `pca` is run."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = get_args_parser()
    if words and words[0] not in (*COMMANDS, *ALIASES, "-h", "--help"):
        if not words[0].startswith("-"):
            parser.error(f"unknown command {words[0]!r}; choose from {', '.join(COMMANDS)}")
        words.insert(0, "pca")
    # argparse would take a negative point for a flag.
    if negative := next((word for word in words if re.fullmatch(r"-[\d.]+,.*", word)), None):
        parser.error(f"the point {negative} is outside of any image")
    args = parser.parse_args(words)
    if args.command is None:
        parser.error(f"no command; choose from {', '.join(COMMANDS)}")
    if args.command == "similarity":
        if (args.point is None) == (args.html is None):
            parser.error("similarity needs either --point, for a figure, or --html, for a page")
        if args.html is not None and (args.output is not None or args.npy):
            parser.error("--html FILE is the output: --output and --npy belong to a figure")
    return args


def output_suffixes(command: str) -> tuple[str, ...]:
    """Suffixes of the files that a command can write."""
    return SHEET_SUFFIXES + (WRITABLE_SUFFIXES if command == "pca" else ())


def _add_command(commands: Any, name: str, description: str) -> argparse.ArgumentParser:
    """Add a command with the flags that all commands have."""
    aliases: tuple[str, ...] = ()
    number: int | None = NUM_IMAGES
    side = DEFAULT_SIDE
    size_help = "shorter side of the model inputs in pixels; both sides are rounded to multiples of the patch; "
    size_help += "original: only rounded"
    default_size = f"{side}, or the size of the global crops of a model trained on small images"
    if name == "segmentation":
        size_help = "short side of the images in pixels, windows in proportion; original: the sizes of the images"
        default_size = "that of the protocol, 512 or 640, or of the head's training"
    if name == "neighbors":
        aliases, number, side = ALIASES, None, PUBLISHED_CROP_SIZE
        size_help = "side of the center crop in pixels, as for the k-NN evaluation; rounded to a multiple of the patch"
    parser: argparse.ArgumentParser = commands.add_parser(
        name, aliases=aliases, help=description, description=description
    )
    parser.set_defaults(command=name)
    add_model_flags(parser)
    add = parser.add_argument
    add("--images", nargs="+", required=True, help="image files, folders, globs, dataset strings, videos")
    number_help = "maximum number of images of each folder, glob, dataset or video, evenly spaced (default: "
    add("--num-images", type=positive_int, default=number, help=f"{number_help}{number or 'all'})")
    add("--size", type=_size, help=f"{size_help} (default: {default_size})")
    default = "pca.png, of one video pca.mp4" if name == "pca" else f"{name}.png"
    add("--output", type=Path, help=f"file to write: {', '.join(output_suffixes(name))} (default: {default})")
    add("--npy", action="store_true", help="also write the numbers to .npy files beside it")
    return parser


def _size(text: str) -> int | str:
    return text if text == "original" else positive_int(text)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select the model."""
    group = parser.add_argument_group("the model: --model, --config-file with weights, or --pretrained-weights alone")
    add = group.add_argument
    add("--model", metavar="NAME", help="a published model, such as dinov2_vits14_reg, or dinov2_fashion")
    add("--config-file", help="config of the model: YAML file or packaged name")
    weights_help = (
        "file, URL, folder of transformers or of a run's teacher (OUT/eval/best); without other flags, the "
        "architecture is inferred from the tensors, and that of a run's teacher read from the config.yaml of the run"
    )
    add("--pretrained-weights", metavar="WEIGHTS", help=weights_help)
    add("--random-init", action="store_true", help="untrained model with random weights")
    heads_help = (
        "number of attention heads if there is no config, because the tensors do not determine it (default: that "
        "of a config.json of transformers beside them, else 64 channels per head)"
    )
    add("--num-heads", type=int, help=heads_help)
    add("--opts", nargs="+", action="extend", default=[], metavar="key=value", help="config overrides, a.b=value")
