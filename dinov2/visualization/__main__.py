"""Figures of the features of a frozen backbone, for any model and any images (examples: docs/visualization.md).

    python -m dinov2.visualization COMMAND --model dinov2_vits14 --images FOLDER --output FILE

Without a command, `pca` is run. Colors of two models, or of two runs of the command, are not comparable.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.flags.visualization import DEFAULT_SIDE, PAGE_SUFFIXES, WRITABLE_SUFFIXES, output_suffixes, parse

if __name__ == "__main__":
    parse()  # for --help and wrong flags, before the imports that take seconds

import numpy as np
from PIL import Image

from dinov2.data.dense.pairing import read_lines
from dinov2.eval.dense import heads
from dinov2.eval.extract.frozen_backbone import FrozenBackbone, load_frozen_backbone
from dinov2.eval.extract.video import VIDEO_SUFFIXES, Video, is_video
from dinov2.eval.results import counted
from dinov2.files import atomic_write
from dinov2.log import run_command
from dinov2.visualization.dense_figures import depth_sheet, protocol_of, segmentation_sheet
from dinov2.visualization.explorer import similarity_page
from dinov2.visualization.figures import Figure, attention_sheet, neighbors_sheet, pca_sheet, similarity_sheet
from dinov2.visualization.inputs import list_inputs, load_images
from dinov2.visualization.neighbors import find_neighbors
from dinov2.visualization.video_figures import draw_video

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure that a command line (None: that of the process) selects. Returns the exit status."""
    args = parse(argv)
    if getattr(args, "html", None) is not None:
        _check_output(args.html, "--html", PAGE_SUFFIXES)
        explore_similarity(args)
        return 0
    if args.output is None:
        args.output = Path("pca.mp4" if args.command == "pca" and _is_one_video(args) else f"{args.command}.png")
    _check_output(args.output, "--output", output_suffixes(args.command))
    if args.output.suffix.lower() in WRITABLE_SUFFIXES and not _is_one_video(args):
        raise ValueError(
            f"--output {args.output} is a video, so --images must be one video file ({', '.join(VIDEO_SUFFIXES)}), "
            f"not {' '.join(args.images)}"
        )
    DRAW[args.command](args)
    return 0


def _check_output(output: Path, flag: str, suffixes: Sequence[str]) -> None:
    """Create the folder of the output that a flag names, if its name is fit."""
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {output} must end in one of {', '.join(suffixes)}")
    if output.is_dir():
        raise ValueError(f"{flag} {output} is a folder: give the name of a file")
    folder = output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the folder of {flag}: {error.strerror}", str(folder)) from error


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
        _draw_features(args, pca_sheet, **options)
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
    _draw_features(args, attention_sheet)


def draw_similarity(args: argparse.Namespace) -> None:
    _draw_features(args, similarity_sheet, points=args.point)


def explore_similarity(args: argparse.Namespace) -> None:
    """Write the page on which patches of all images are compared."""
    backbone = load_frozen_backbone(args)
    images = list(load_images(list_inputs(args.images, args.num_images, backbone.image_options)))
    page = similarity_page(backbone, images, shorter_side=_shorter_side(args, backbone))
    with atomic_write(args.html) as file:
        file.write(page)
    logger.info("%s, %.1f MB: %s", counted(len(images), "image"), len(page) / 1e6, args.html)


def draw_segmentation(args: argparse.Namespace) -> None:
    """Draw the classes that a segmentation head predicts."""
    names = None if args.classes is None else read_lines(args.classes)
    backbone = load_frozen_backbone(args)
    head = heads.read(args.head, "segmentation", backbone.model)
    protocol = protocol_of(head, backbone, args.protocol)
    if isinstance(args.size, int):
        protocol = protocol.scaled(args.size)
    options = {"protocol": protocol, "keep_size": args.size == "original", "names": names}
    _draw(args, backbone, partial(segmentation_sheet, head=head, **options))


def draw_depth(args: argparse.Namespace) -> None:
    """Draw the depth that a depth head predicts."""
    backbone = load_frozen_backbone(args)
    head = heads.read(args.head, "depth", backbone.model, None if args.bins is None else tuple(args.bins))
    _draw(args, backbone, partial(depth_sheet, head=head, shorter_side=_shorter_side(args, backbone)))


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


def _draw_features(args: argparse.Namespace, draw: Callable[..., Figure], **options: Any) -> None:
    """Draw and write a figure of the features of the images."""
    backbone = load_frozen_backbone(args)
    _draw(args, backbone, partial(draw, shorter_side=_shorter_side(args, backbone), **options))


def _draw(args: argparse.Namespace, backbone: FrozenBackbone, draw: Callable[..., Figure]) -> None:
    """Load the images, draw a figure and write it."""
    images = list(load_images(list_inputs(args.images, args.num_images, backbone.image_options)))
    figure = draw(backbone, images)
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


DRAW = {
    "pca": draw_pca,
    "attention": draw_attention,
    "similarity": draw_similarity,
    "neighbors": draw_neighbors,
    "segmentation": draw_segmentation,
    "depth": draw_depth,
}


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
