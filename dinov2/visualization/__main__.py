"""Figures of the features of a frozen backbone, for any model and any images (examples: docs/visualization.md).

    python -m dinov2.visualization COMMAND --model dinov2_vits14 --images FOLDER --output FILE

Without a command, `pca` is run. Colors of two models, or of two runs of the command, are not comparable.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from PIL import Image

from dinov2.eval.results import counted
from dinov2.eval.setup import PUBLISHED_CROP_SIZE, positive_int
from dinov2.files import atomic_write
from dinov2.log import run_command
from dinov2.visualization.figures import Figure, attention_sheet, neighbors_sheet, pca_sheet, similarity_sheet
from dinov2.visualization.frozen_backbone import DEFAULT_SIDE, FrozenBackbone, add_model_flags, load_frozen_backbone
from dinov2.visualization.inputs import list_inputs, load_images
from dinov2.visualization.neighbors import find_neighbors
from dinov2.visualization.video import VIDEO_SUFFIXES, WRITABLE_SUFFIXES, Video, is_video
from dinov2.visualization.video_figures import draw_video

logger = logging.getLogger(__name__)

COMMANDS = ("pca", "attention", "similarity", "neighbors")
ALIASES = ("neighbours",)  # of "neighbors"
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NUM_IMAGES = 30  # default number of images of each folder, glob, dataset or video
NUM_QUERIES = 10


# --- Command line ----------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    """The command line parser."""
    parser = argparse.ArgumentParser(
        "python -m dinov2.visualization", description="Figures of the features of a frozen backbone."
    )
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    pca = _add_command(commands, "pca", draw_pca, "principal components of patch features as colors")
    pca.add_argument("--foreground", action="store_true", help="color the foreground only; the rest is black")
    pca.add_argument("--smooth", action="store_true", help="interpolate between the colors of patches")
    shifts_help = "run the model on N x N shifted copies of each image, for an N times finer grid (default: 1)"
    pca.add_argument("--shifts", type=positive_int, default=1, metavar="N", help=shifts_help)
    every_help = "of a video that becomes a video, use every Nth frame (default: 1)"
    pca.add_argument("--every", type=positive_int, default=1, metavar="N", help=every_help)
    _add_command(commands, "attention", draw_attention, "attention of the class token in the last block, per head")
    similarity = _add_command(commands, "similarity", draw_similarity, "similarity of all patches to some of them")
    point_help = (
        "points of the first image, a row each. Two integers: pixels of the original image; two numbers with a decimal "
        "point: fractions of its width and height (0.5,0.25)"
    )
    similarity.add_argument("--point", nargs="+", required=True, metavar="X,Y", help=point_help)
    neighbors = _add_command(commands, "neighbors", draw_neighbors, "nearest neighbors of images; also a .json list")
    query_help = "images to find neighbors of: files, folders, globs, dataset strings"
    neighbors.add_argument("--query", nargs="+", required=True, help=query_help)
    number_help = f"maximum number of queries of each folder, glob or dataset, evenly spaced (default: {NUM_QUERIES})"
    neighbors.add_argument("--num-queries", type=positive_int, default=NUM_QUERIES, help=number_help)
    neighbors.add_argument("--k", type=positive_int, default=5, help="number of neighbors (default: 5)")
    neighbors.add_argument("--num-workers", type=int, default=0, help="processes that decode images (default: 0)")
    return parser


def _add_command(
    commands: Any, name: str, draw: Callable[[argparse.Namespace], None], description: str
) -> argparse.ArgumentParser:
    """Add a command with the flags that all commands have."""
    aliases: tuple[str, ...] = ()
    number: int | None = NUM_IMAGES
    side = DEFAULT_SIDE
    size_help = "shorter side of the model inputs in pixels; both sides are rounded to multiples of the patch; "
    size_help += "original: only rounded"
    if name == "neighbors":
        aliases, number, side = ALIASES, None, PUBLISHED_CROP_SIZE
        size_help = "side of the center crop in pixels, as for the k-NN evaluation; rounded to a multiple of the patch"
    parser: argparse.ArgumentParser = commands.add_parser(
        name, aliases=aliases, help=description, description=description
    )
    suffixes = SHEET_SUFFIXES + (WRITABLE_SUFFIXES if name == "pca" else ())
    parser.set_defaults(draw=draw, suffixes=suffixes)
    add_model_flags(parser)
    add = parser.add_argument
    add("--images", nargs="+", required=True, help="image files, folders, globs, dataset strings, videos")
    number_help = "maximum number of images of each folder, glob, dataset or video, evenly spaced (default: "
    add("--num-images", type=positive_int, default=number, help=f"{number_help}{number or 'all'})")
    size_help += f" (default: {side}, or the size of the global crops of a model trained on small images)"
    add("--size", type=_size, help=size_help)
    default = "pca.png, of one video pca.mp4" if name == "pca" else f"{name}.png"
    add("--output", type=Path, help=f"file to write: {', '.join(suffixes)} (default: {default})")
    add("--npy", action="store_true", help="also write the numbers to .npy files beside it")
    return parser


def _size(text: str) -> int | str:
    return text if text == "original" else positive_int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure that a command line (None: that of the process) selects. Returns the exit status."""
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
    if args.output is None:
        args.output = Path("pca.mp4" if args.command == "pca" and _is_one_video(args) else f"{args.command}.png")
    _check_output(args)
    args.draw(args)
    return 0


def _check_output(args: argparse.Namespace) -> None:
    """Create the folder of the output, if its name is fit."""
    suffix = args.output.suffix.lower()
    if suffix not in args.suffixes:
        raise ValueError(f"--output {args.output} must end in one of {', '.join(args.suffixes)}")
    if suffix in WRITABLE_SUFFIXES and not _is_one_video(args):
        raise ValueError(
            f"--output {args.output} is a video, so --images must be one video file ({', '.join(VIDEO_SUFFIXES)}), "
            f"not {' '.join(args.images)}"
        )
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder: give the name of a file")
    folder = args.output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the folder of --output: {error.strerror}", str(folder)) from error


def _is_one_video(args: argparse.Namespace) -> bool:
    path = Path(args.images[0]).expanduser()
    return len(args.images) == 1 and path.is_file() and is_video(path)


# --- Figures ---------------------------------------------------------------------------------------------------------


def draw_pca(args: argparse.Namespace) -> None:
    """Draw the principal components of images in a figure, or of a video in a video."""
    if args.foreground:
        logger.info("--foreground assumes that objects cover less of the image border than the background does")
    options = {"shifts": args.shifts, "foreground": args.foreground, "smooth": args.smooth}
    if args.output.suffix.lower() not in WRITABLE_SUFFIXES:
        _draw(args, pca_sheet, **options)
        return
    video, backbone = Video(Path(args.images[0]).expanduser()), load_frozen_backbone(args)
    count = draw_video(
        backbone,
        video,
        args.output,
        shorter_side=_shorter_side(args, backbone),
        every=args.every,
        tokens_file=_array_path(args.output, "tokens") if args.npy else None,
        **options,
    )
    logger.info("%s: %s", counted(count, "frame"), args.output)


def draw_attention(args: argparse.Namespace) -> None:
    _draw(args, attention_sheet)


def draw_similarity(args: argparse.Namespace) -> None:
    _draw(args, similarity_sheet, points=args.point)


def draw_neighbors(args: argparse.Namespace) -> None:
    """Draw the nearest neighbors of images, and list them in a JSON file."""
    if args.size == "original":
        raise ValueError("--size original cannot be used with neighbors: all images are cropped to one square")
    backbone = load_frozen_backbone(args)
    queries = list_inputs(args.query, args.num_queries, backbone.image_options)
    images = list_inputs(args.images, args.num_images, backbone.image_options)
    rows, tokens = find_neighbors(backbone, queries, images, count=args.k, side=args.size, num_workers=args.num_workers)
    if args.npy:
        _save_arrays(args.output, "class_tokens", list(tokens.numpy()))
    entries: list[dict[str, Any]] = [
        {"query": q.path, "neighbors": [{"image": image.path, "cosine": round(cosine, 6)} for image, cosine in found]}
        for q, found in rows
    ]
    with atomic_write(args.output.with_suffix(".json")) as file:
        file.write((json.dumps(entries, indent=2) + "\n").encode())
    loaded = [(query.load(), [(image.load(), cosine) for image, cosine in found]) for query, found in rows]
    _save_sheet(neighbors_sheet(backbone.name, loaded), args.output)
    fewest = min(len(found) for _, found in rows)
    if fewest < args.k:
        logger.warning("--k %d: there are only %s", args.k, counted(fewest, "other image"))
    num_queries, num_images = counted(len(rows), "query", "queries"), counted(len(tokens), "image")
    logger.info("%s, the %d nearest of %s: %s", num_queries, min(fewest, args.k), num_images, args.output)


def _draw(args: argparse.Namespace, draw: Callable[..., Figure], **options: Any) -> None:
    """Load the model and the images, draw a figure and write it."""
    backbone = load_frozen_backbone(args)
    images = list(load_images(list_inputs(args.images, args.num_images, backbone.image_options)))
    figure = draw(backbone, images, shorter_side=_shorter_side(args, backbone), **options)
    if args.npy:
        for name, arrays in figure.arrays.items():
            _save_arrays(args.output, name, arrays)
    _save_sheet(figure.sheet, args.output)
    logger.info("%s: %s", counted(len(images), "image"), args.output)


def _shorter_side(args: argparse.Namespace, backbone: FrozenBackbone) -> int | None:
    """Shorter side of the model inputs in pixels; None keeps the sizes of the images."""
    side = backbone.shorter_side
    if args.size is None and side < DEFAULT_SIDE:
        text = "the model was trained on images of %d pixels: shorter side %d; --size N for more patches"
        logger.info(text, side, side)
    return None if args.size == "original" else args.size or side


# --- Files -----------------------------------------------------------------------------------------------------------


def _save_sheet(sheet: Image.Image, output: Path) -> None:
    with atomic_write(output) as file:
        sheet.save(file, Image.registered_extensions()[output.suffix.lower()])


def _array_path(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}.{name}.npy")


def _save_arrays(output: Path, name: str, arrays: Sequence[np.ndarray]) -> None:
    """Write arrays of one shape to one file (n, ...), others to a file each, numbered from 0."""
    if len({array.shape for array in arrays}) == 1:
        files = {_array_path(output, name): np.stack(arrays)}
    else:
        files = {_array_path(output, f"{name}.{index}"): array for index, array in enumerate(arrays)}
    for path, array in files.items():
        with atomic_write(path) as file:
            np.save(file, array)
    logger.info("%s: %s", name, ", ".join(map(str, files)))


if __name__ == "__main__":
    sys.exit(run_command(main))
