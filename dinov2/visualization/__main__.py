"""Images of what a frozen backbone sees, of any model and any images.

    python -m dinov2.visualization pca        --model dinov2_vits14 --images FOLDER --output pca.png
    python -m dinov2.visualization pca        --model dinov2_vits14 --images clip.mp4 --output pca.mp4
    python -m dinov2.visualization attention  --model dinov2_vits14_reg --images 'cats/*.jpg' --output attention.png
    python -m dinov2.visualization similarity --model dinov2_vits14 --images a.jpg b.jpg --point 200,150
    python -m dinov2.visualization neighbors --model dinov2_vits14 --query a.jpg --images FOLDER

Without a word of these four it is `pca`: principal components as colors (DINOv2 paper, section 7.5), one basis for all
images, so that parts with like features have like colors wherever they are. Colors of two models, or of two runs of
the command, have nothing to do with one another.
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

from dinov2.eval.setup import PUBLISHED_CROP_SIZE, positive_int
from dinov2.files import atomic_write
from dinov2.log import run_command
from dinov2.visualization.figures import Drawn, attention_sheet, neighbors_sheet, pca_sheet, similarity_sheet
from dinov2.visualization.frozen_backbone import LARGE_SIZE, FrozenBackbone, add_model_flags, load_frozen_backbone
from dinov2.visualization.inputs import ImageInput, LoadedImage, list_inputs, load_images
from dinov2.visualization.neighbors import find_neighbors
from dinov2.visualization.video import VIDEO_SUFFIXES, WRITABLE_SUFFIXES, Video, is_video
from dinov2.visualization.video_figures import draw_video

logger = logging.getLogger(__name__)

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NUM_IMAGES = 30  # on a sheet, of each folder, unless a person says otherwise
NUM_QUERIES = 10


# --- The command line ------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m dinov2.visualization", description="Images of what a frozen backbone sees."
    )
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    pca = _add_command(commands, "pca", "principal components of patch features as colors")
    pca.add_argument("--foreground", action="store_true", help="color what stands out, the rest is black")
    pca.add_argument("--smooth", action="store_true", help="blend the colors of neighboring patches")
    pca.add_argument(
        "--shifts",
        type=positive_int,
        default=1,
        help="look at each image shifted so many times per patch and direction: a grid that many times finer",
    )
    pca.add_argument(
        "--every", type=positive_int, default=1, help="of a video that becomes a video: one of so many frames"
    )
    _add_command(commands, "attention", "where the class token looks, per head of the last block")
    similarity = _add_command(commands, "similarity", "how similar all patches are to one of the first image")
    similarity.add_argument(
        "--point",
        nargs="+",
        required=True,
        metavar="X,Y",
        help="whole numbers: pixels of the original image; both with a decimal point: fractions of its width and "
        "height (0.5,0.25); several: a row each",
    )
    near = _add_command(commands, "neighbors", "the images that are most similar to an image, and a list as .json")
    near.add_argument(
        "--query", nargs="+", required=True, help="images to find the like of: files, folders, globs, dataset strings"
    )
    near.add_argument(
        "--num-queries",
        type=positive_int,
        default=NUM_QUERIES,
        help=f"at most so many of each folder, glob or dataset of them, evenly spaced (default: {NUM_QUERIES})",
    )
    near.add_argument("--k", type=positive_int, default=5, help="how many neighbors (default: 5)")
    near.add_argument("--num-workers", type=int, default=0, help="processes that read images (default: 0)")
    return parser


def _add_command(commands: Any, name: str, purpose: str) -> argparse.ArgumentParser:
    """A command with the flags that all of them have."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=purpose, description=purpose)
    add_model_flags(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, help="image files, folders, globs, dataset strings, videos"
    )
    whole = name == "neighbors"
    parser.add_argument(
        "--num-images",
        type=positive_int,
        default=None if whole else NUM_IMAGES,
        help="at most so many of each folder, glob, dataset or video, evenly spaced "
        + ("(default: all)" if whole else f"(default: {NUM_IMAGES})"),
    )
    parser.add_argument(
        "--size",
        type=_size,
        help="shorter side in pixels that images are brought to, then both sides to multiples of the patch; original: "
        f"only the latter (default: {PUBLISHED_CROP_SIZE if whole else LARGE_SIZE}, or the size of the global crops of "
        "a model trained on small images)" + (". Images are cut square, as for the k-NN evaluation" if whole else ""),
    )
    formats = ", ".join(SHEET_SUFFIXES + (WRITABLE_SUFFIXES if name == "pca" else ()))
    default = "pca.png, of one video pca.mp4" if name == "pca" else f"{name}.png"
    parser.add_argument("--output", type=Path, help=f"image to write: {formats} (default: {default})")
    parser.add_argument("--npy", action="store_true", help="also write the numbers as .npy files beside it")
    return parser


def _size(text: str) -> int | str:
    return text if text == "original" else positive_int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what a command line (None: that of the process) asks for; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = get_args_parser()
    if words and words[0] not in COMMANDS and words[0] not in ("-h", "--help"):
        if not words[0].startswith("-"):
            parser.error(f"unknown command {words[0]!r}; choose from {', '.join(COMMANDS)}")
        words.insert(0, "pca")
    if below := next((word for word in words if re.fullmatch(r"-[\d.]+,.*", word)), None):
        parser.error(f"the point {below} is outside of any image")  # which argparse would take for a flag
    args = parser.parse_args(words)
    if args.command is None:
        parser.error(f"say what to draw: {', '.join(COMMANDS)}")
    if args.output is None:
        args.output = Path("pca.mp4" if args.command == "pca" and _one_video(args) else f"{args.command}.png")
    _check_output(args)
    COMMANDS[args.command](args)
    return 0


def _check_output(args: argparse.Namespace) -> None:
    """Raises a `ValueError` if the output cannot be what its name says; makes its folder."""
    suffix = args.output.suffix.lower()
    known = SHEET_SUFFIXES + (WRITABLE_SUFFIXES if args.command == "pca" else ())
    if suffix not in known:
        raise ValueError(f"--output {args.output} must end in one of {', '.join(known)}")
    if suffix in WRITABLE_SUFFIXES and not _one_video(args):
        raise ValueError(
            f"--output {args.output} is a video, so --images must be one video file ({', '.join(VIDEO_SUFFIXES)}), "
            f"not {' '.join(args.images)}"
        )
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder: give the name of a file")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        folder = args.output.parent
        raise OSError(error.errno, f"cannot make the folder of --output: {error.strerror}", str(folder)) from error


def _one_video(args: argparse.Namespace) -> bool:
    """Whether the images are one video file."""
    path = Path(args.images[0]).expanduser()
    return len(args.images) == 1 and path.is_file() and is_video(path)


def _shorter_side(args: argparse.Namespace, backbone: FrozenBackbone) -> int | None:
    if args.size is None and backbone.size < LARGE_SIZE:
        logger.info(
            "the model was trained on images of %d pixels: shorter side %d; --size N for more patches",
            backbone.size,
            backbone.size,
        )
    return None if args.size == "original" else args.size or backbone.size


# --- What it draws ---------------------------------------------------------------------------------------------------


def draw_pca(args: argparse.Namespace) -> None:
    """Principal components of images on a sheet, or of a video as a video."""
    if args.foreground:
        logger.info("--foreground: which side is the object is a guess: what the border of the images shows less of")
    if args.output.suffix.lower() not in WRITABLE_SUFFIXES:
        _draw(args, pca_sheet, shifts=args.shifts, foreground=args.foreground, smooth=args.smooth)
        return
    video, backbone = Video(Path(args.images[0]).expanduser()), load_frozen_backbone(args)
    count = draw_video(
        backbone,
        video,
        args.output,
        shorter_side=_shorter_side(args, backbone),
        every=args.every,
        shifts=args.shifts,
        foreground=args.foreground,
        smooth=args.smooth,
        tokens_file=_array_path(args.output, "tokens") if args.npy else None,
    )
    logger.info("%d frames: %s", count, args.output)


def draw_attention(args: argparse.Namespace) -> None:
    """Attention of the class token."""
    _draw(args, attention_sheet)


def draw_similarity(args: argparse.Namespace) -> None:
    """Similarity to the patches at some points of the first image."""
    _draw(args, similarity_sheet, points=args.point)


def _draw(args: argparse.Namespace, draw: Callable[..., Drawn], **options: Any) -> None:
    """Read the images, draw a sheet of them, write it."""
    backbone = load_frozen_backbone(args)
    images = list(load_images(list_inputs(args.images, args.num_images, backbone.image_options)))
    drawn = draw(backbone, images, shorter_side=_shorter_side(args, backbone), **options)
    if args.npy:
        for what, arrays in drawn.arrays.items():
            _save_arrays(args.output, what, arrays)
    _save_sheet(drawn.sheet, args.output)
    logger.info("%d images: %s", len(images), args.output)


def draw_neighbors(args: argparse.Namespace) -> None:
    """Nearest neighbors of some images, as a sheet and as a list."""
    if args.size == "original":
        raise ValueError("--size original does not go with neighbors: all images are cut to one square")
    backbone = load_frozen_backbone(args)
    options = backbone.image_options
    queries = list_inputs(args.query, args.num_queries, options)
    images = list_inputs(args.images, args.num_images, options)
    rows, tokens = find_neighbors(backbone, queries, images, count=args.k, side=args.size, num_workers=args.num_workers)
    if args.npy:
        _save_arrays(args.output, "class_tokens", list(tokens.numpy()))
    listed = [
        {
            "query": query.path,
            "neighbors": [{"image": image.path, "cosine": round(cosine, 6)} for image, cosine in found],
        }
        for query, found in rows
    ]
    with atomic_write(args.output.with_suffix(".json")) as file:
        file.write((json.dumps(listed, indent=2) + "\n").encode())
    loaded = [(_loaded(query), [(_loaded(image), cosine) for image, cosine in found]) for query, found in rows]
    _save_sheet(neighbors_sheet(backbone.name, loaded), args.output)
    fewest = min(len(found) for _, found in rows)
    if fewest < args.k:
        logger.warning("--k %d: there are only %d other images", args.k, fewest)
    logger.info("%d queries, the %d nearest of %d images: %s", len(rows), min(fewest, args.k), len(tokens), args.output)


def _loaded(source: ImageInput) -> LoadedImage:
    return LoadedImage(source.name, source.path, source.load())


# --- Files -----------------------------------------------------------------------------------------------------------


def _save_sheet(sheet: Image.Image, output: Path) -> None:
    with atomic_write(output) as file:
        sheet.save(file, Image.registered_extensions()[output.suffix.lower()])


def _array_path(output: Path, what: str) -> Path:
    return output.with_name(f"{output.stem}.{what}.npy")


def _save_arrays(output: Path, what: str, arrays: Sequence[np.ndarray]) -> None:
    """One file, (n, ...), if all arrays have one shape, else one for each, numbered from 0."""
    if len({array.shape for array in arrays}) == 1:
        files = {_array_path(output, what): np.stack(arrays)}
    else:
        files = {_array_path(output, f"{what}.{index}"): array for index, array in enumerate(arrays)}
    for path, array in files.items():
        with atomic_write(path) as file:
            np.save(file, array)
    logger.info("%s: %s", what, ", ".join(map(str, files)))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pca": draw_pca,
    "attention": draw_attention,
    "similarity": draw_similarity,
    "neighbors": draw_neighbors,
}

if __name__ == "__main__":
    sys.exit(run_command(main))
