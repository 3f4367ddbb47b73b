"""The flags of the extraction of features."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dinov2.flags import CommandParser, positive_int, positive_number
from dinov2.flags.evaluation import PUBLISHED_CROP_SIZE, SMALLEST_PUBLISHED_SIZE
from dinov2.flags.visualization import add_model_flags

TOKENS = ("class", "patch", "both", "mean")
FORMATS = ("safetensors", "npy")
SHARD_SIZE, SHARD_SIZE_WITH_PATCHES = 1024, 256  # default number of images per file
BATCH_SIZE, BATCH_SIZE_OF_WHOLE_IMAGES = 64, 8  # defaults
MOST_WORKERS = 4  # default, on fewer processors as many as these


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m dinov2.eval.extract`."""
    parser = CommandParser("python -m dinov2.eval.extract", description="Features of images by a frozen backbone.")
    add_model_flags(parser)
    add = parser.add_argument
    images_help = (
        "folders, image files, globs, lists of images (.txt, .csv, .tsv), dataset strings, videos; in the order given"
    )
    add("--images", nargs="+", required=True, metavar="SOURCE", help=images_help)
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of the features; continued if it has some")
    add("--overwrite", action="store_true", help="delete the features in the output folder and start anew")
    tokens_help = (
        "class: class token (default); patch: patch tokens; both: these two; mean: mean of the patch tokens; or several"
    )
    add("--tokens", nargs="+", choices=TOKENS, default=["class"], help=tokens_help)
    layers_help = (
        "number of last blocks, or indices of blocks with commas, from 0, negative ones from the end (--layers=5,11; "
        "--layers=-4,-1; one block: 5,); all with the final norm, as in the evaluations (default: 1, the last block)"
    )
    add("--layers", type=parse_layers, default=1, metavar="N|I,J,...", help=layers_help)
    small = f"for models trained on global crops below {SMALLEST_PUBLISHED_SIZE} pixels: the size of those crops"
    resize_help = f"shorter side in pixels to which images are resized before cropping (default: 256; {small})"
    add("--resize-size", type=positive_int, help=resize_help)
    crop_help = f"side of the center crop in pixels (default: {PUBLISHED_CROP_SIZE}; {small})"
    add("--crop-size", type=positive_int, help=crop_help)
    size_help = (
        "whole images instead of crops: shorter side in pixels, or original for their own size; both sides are rounded "
        "to multiples of the patch"
    )
    add("--size", type=_size, metavar="N|original", help=size_help)
    fps_help = "frames per second that are used of videos (default: every frame)"
    add("--fps", type=positive_number, help=fps_help)
    add("--format", choices=FORMATS, default="safetensors", help="of the files (default: safetensors)")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the features (default: float32)")
    shard_help = f"images per file (default: {SHARD_SIZE}, with patch tokens {SHARD_SIZE_WITH_PATCHES})"
    add("--shard-size", type=positive_int, help=shard_help)
    batch_help = f"images per process and batch (default: {BATCH_SIZE}, with --size {BATCH_SIZE_OF_WHOLE_IMAGES})"
    add("--batch-size", type=positive_int, help=batch_help)
    num_workers = min(MOST_WORKERS, os.cpu_count() or 1)
    workers_help = f"processes that decode images, per process (default here: {num_workers})"
    add("--num-workers", type=int, default=num_workers, help=workers_help)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line (None: that of the process)."""
    return get_args_parser().parse_args(argv)


def parse_layers(text: str) -> int | list[int]:
    """Argparse type of a number of last blocks, or of a list of block indices."""
    if re.fullmatch(r"-?\d+(,-?\d+)+|-?\d+,|-\d+", text):
        return [int(word) for word in text.split(",") if word]
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number of last blocks such as 4, or indices of blocks such as 5,11, got {text!r}"
        ) from error


def _size(text: str) -> int | str:
    return text if text == "original" else positive_int(text)
