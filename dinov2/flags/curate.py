"""The flags of curation."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dinov2.flags import CommandParser, positive_int, positive_number

COMMANDS = {
    "duplicates": "keep one image of each group of near duplicates",
    "decontaminate": "drop images that are near duplicates of test images",
    "balance": "choose images equally from the clusters of a hierarchical k-means",
    "retrieve": "choose the nearest images of some queries",
}
_THRESHOLD = (
    "cosine above which two images are near duplicates. It depends on the model: of DINOv2 start at 0.95 and look at "
    "the page; published for features of SSCD: 0.6 for duplicates, 0.45 for decontaminate"
)


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m dinov2.curate`."""
    parser = CommandParser("python -m dinov2.curate", description="Select images by their features.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    commands = {name: parsers.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    for command in commands.values():
        add_common_flags(command)
    for name in ("duplicates", "decontaminate"):
        add = commands[name].add_argument
        add("--threshold", type=_cosine, required=True, metavar="COSINE", help=_THRESHOLD)
        add("--k", type=positive_int, default=64, help="neighbors of an image that are considered (default: 64)")
    keep_help = "of a group: the image of the most pixels, then bytes (default), or the first one"
    commands["duplicates"].add_argument("--keep", choices=("largest", "first"), default="largest", help=keep_help)
    test_help = "folders with the features of test images"
    add_folders(commands["decontaminate"], "--against", test_help)
    add_folders(commands["retrieve"], "--queries", "folders with the features of the queries")
    commands["retrieve"].add_argument(
        "--k", type=positive_int, default=4, help="images for each query (default: 4; published: 4 and 32)"
    )
    for name in ("duplicates", "decontaminate", "retrieve"):
        probes_help = (
            "cells of images that each is compared with, if there are too many for an exact search (default: 16)"
        )
        commands[name].add_argument("--probes", type=positive_int, default=16, help=probes_help)
    add_balance_flags(commands["balance"])
    return parser


def add_folders(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, nargs="+", type=Path, required=True, metavar="FEATURES", help=text)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all commands."""
    add = parser.add_argument
    add_folders(parser, "--features", "folders of python -m dinov2.eval.extract with the images to select from")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the lists and the page are written")
    add("--overwrite", action="store_true", help="replace the lists and the page in a folder that is not empty")
    add("--tokens", choices=("class", "mean"), default="class", help="the features to compare (default: class)")
    add("--root", type=Path, help="folder where relative names of image files begin (default: the current one)")
    add("--seed", type=_count, default=0, help="of all random choices (default: 0)")


def add_balance_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the balanced sample."""
    add = parser.add_argument
    clusters_help = "number of clusters of each level, descending, such as 1000,50"
    add("--clusters", type=_descending, required=True, metavar="N,N,...", help=clusters_help)
    add("--size", type=positive_int, required=True, metavar="N", help="number of images to choose")
    memory_help = "GiB for the features that a k-means is fitted to; the rest takes some 1 GiB (default: 4)"
    add("--memory", type=positive_number, default=4.0, metavar="GIB", help=memory_help)
    resampling_help = "what each cluster gives for new centroids: points closest to its own (default), or random ones"
    add("--resampling", choices=("closest", "random"), default="closest", help=resampling_help)
    add("--resampling-steps", type=_count, default=3, metavar="N", help="how many times (default: 3)")
    points_help = "points of each cluster (default: 10)"
    add("--resampling-points", type=positive_int, default=10, metavar="N", help=points_help)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line (None: that of the process)."""
    return get_args_parser().parse_args(argv)


def _cosine(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 2.0
    if not -1 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a cosine between -1 and 1, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def _descending(text: str) -> list[int]:
    numbers = [positive_int(word) for word in text.split(",")]
    if numbers != sorted(set(numbers), reverse=True):
        raise argparse.ArgumentTypeError(f"expected numbers that descend, such as 1000,50, got {text!r}")
    return numbers
