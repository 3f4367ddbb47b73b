"""Pictures of what frozen patch features see: their principal components as colours (DINOv2 paper, section 7.5).

    python -m dinov2.eval.visualize --config-file CONFIG --pretrained-weights WEIGHTS --images FOLDER --output pca.png

One basis for all images: parts with like features have like colours wherever they are. Colours of two models, or of
two runs of the command, have nothing to do with one another.

Shapes: n images, h x w patches of an image, D feature width, m feature vectors.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional

from dinov2 import config, distributed
from dinov2.analysis.pca import foreground_mask, pca_colours, to_pictures
from dinov2.data import make_dataset
from dinov2.data.datasets import DATASETS
from dinov2.data.folder import ImageFolder
from dinov2.data.images import decode_image
from dinov2.data.transforms import ToNormalizedTensor
from dinov2.eval import setup
from dinov2.eval.features import autocast
from dinov2.log import run_command
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

LARGE_SIZE = 448  # pixels; default for models trained on images of the published sizes


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("DINOv2 feature pictures", add_help=add_help)
    parser.add_argument("--config-file", required=True, help="config of the model: YAML file or packaged name")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained-weights", help="path or URL of the weights")
    weights.add_argument("--random-init", action="store_true", help="the network as it is before training")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="key=value", help="config overrides")
    parser.add_argument("--images", nargs="+", required=True, help="image files, folders or dataset strings")
    parser.add_argument("--num-images", type=int, default=30, help="at most so many of each folder or data set")
    parser.add_argument(
        "--size",
        type=int,
        help="images are cut square and brought to this many pixels, a multiple of the patch size "
        f"(default: {LARGE_SIZE}, or the size of the global crops of a model trained on small images)",
    )
    parser.add_argument(
        "--shifts",
        type=int,
        default=1,
        help="look at each image shifted so many times per patch and direction: a grid that many times finer",
    )
    parser.add_argument("--foreground", action="store_true", help="colour what stands out, the rest is black")
    parser.add_argument("--output", type=Path, default=Path("pca.png"), help="picture to write")
    return parser


# --- Features --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def patch_tokens(
    model: DinoVisionTransformer,
    images: Tensor,
    *,
    shifts: int = 1,
    batch_size: int = 16,
    autocast_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised patch tokens of the last block, without class token and registers.

    Args:
        model: in evaluation mode.
        images: (n, 3, H, W), H and W multiples of the patch size.
        shifts: s, a divisor of the patch size. With s > 1 every image is seen s x s times, shifted by steps of
            patch / s pixels with its border repeated, and the tokens are put in between one another.
        batch_size: images at once.
        autocast_dtype: precision of the model.

    Returns:
        (n, s * h, s * w, D) float32 on the CPU.

    Raises:
        ValueError: if the patch size is not a multiple of `shifts`.
    """
    patch_size = model.patch_size
    if shifts < 1 or patch_size % shifts:
        raise ValueError(f"shifts = {shifts} must divide the patch size {patch_size}")
    step = patch_size // shifts
    height, width = images.shape[-2:]
    # Centres the patch of a token on its cell of the finer grid.
    before = (patch_size - step) // 2
    after = patch_size - step - before
    padded = functional.pad(images, (before, after, before, after), mode="replicate")
    tokens = torch.empty(len(images), height // step, width // step, model.embed_dim)
    for row, column in product(range(shifts), repeat=2):
        shifted = padded[:, :, row * step : row * step + height, column * step : column * step + width]
        parts = []
        for batch in shifted.split(batch_size):
            with autocast(autocast_dtype):
                features: Any = model.forward_features(batch.to(distributed.device()))
            parts.append(features["x_norm_patchtokens"].float().cpu())
        tokens[:, row::shifts, column::shifts] = torch.cat(parts).unflatten(1, (height // patch_size, -1))
    return tokens


# --- Pictures --------------------------------------------------------------------------------------------------------


def load_images(sources: Sequence[str], num_images: int) -> list[Image.Image]:
    """RGB pictures from image files, folders and dataset strings; of the last two evenly spaced ones.

    Raises:
        FileNotFoundError: a source is none of these.
        ValueError: a wrong dataset string or a broken image.
    """
    images: list[Image.Image] = []
    for source in sources:
        path = Path(source)
        if path.is_file():
            images.append(decode_image(path.read_bytes()))
            continue
        if source.partition(":")[0] in DATASETS:
            dataset = make_dataset(dataset_str=source)
        elif path.is_dir():
            dataset = ImageFolder(root=path)
        else:
            raise FileNotFoundError(f"{source!r} is no image file, no folder, and no data set ({', '.join(DATASETS)})")
        count = min(num_images, len(dataset))
        images += [dataset.get_image(position * len(dataset) // count) for position in range(count)]
    return images


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]],
    *,
    title: str = "",
    headings: Sequence[str] = (),
    columns: int = 10,
    cell: int = 112,
) -> Image.Image:
    """Rows of pictures below one another, pictures of one image in one column.

    Args:
        rows: label -> one picture for each of n images; after `columns` images all rows start again below.
        title: the first line.
        headings: one for each column.
        columns: images beside one another.
        cell: width and height of a picture on the sheet in pixels; whole multiples of the pictures' look best.
    """
    gap, font, title_font = 4, ImageFont.load_default(15), ImageFont.load_default(20)
    num_images = len(next(iter(rows.values())))
    num_bands = -(-num_images // columns)
    left = gap * 3 + max(round(font.getlength(label)) for label in rows)
    top = gap * 2 + (30 if title else 0) + (22 if headings else 0)
    band = len(rows) * (cell + gap) + 3 * gap
    width = left + min(columns, num_images) * (cell + gap)
    if title:
        width = max(width, left + round(title_font.getlength(title)) + gap)
    sheet = Image.new("RGB", (width, top + num_bands * band), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, gap), title, "black", title_font)
    for column, heading in enumerate(headings):
        draw.text((left + column * (cell + gap) + cell // 2, top - gap), heading, "black", font, anchor="md")
    for row, (label, pictures) in enumerate(rows.items()):
        for index, picture in enumerate(pictures):
            x, y = left + index % columns * (cell + gap), top + index // columns * band + row * (cell + gap)
            if index % columns == 0:
                draw.text((left - 2 * gap, y + cell // 2), label, "black", font, anchor="rm")
            sheet.paste(picture.resize((cell, cell), Image.Resampling.BOX), (x, y))  # box: patches stay squares
    return sheet


def main(args: argparse.Namespace) -> int:
    """Draw what the command line asks for; the exit status."""
    cfg = config.load(args.config_file, args.opts)
    small = cfg.crops.global_crops_size < setup.SMALLEST_PUBLISHED_SIZE
    size = args.size or (cfg.crops.global_crops_size if small else LARGE_SIZE)
    if size % cfg.student.patch_size:
        raise ValueError(f"--size {size} is not a multiple of student.patch_size = {cfg.student.patch_size}")
    square = partial(ImageOps.fit, size=(size, size), method=Image.Resampling.BICUBIC)
    images = [square(image) for image in load_images(args.images, args.num_images)]
    to_tensor = ToNormalizedTensor(cfg.augmentation.mean, cfg.augmentation.std)
    tokens = patch_tokens(
        setup.build_model_for_eval(cfg, args.pretrained_weights),
        torch.stack([to_tensor(image) for image in images]),
        shifts=args.shifts,
        autocast_dtype=setup.get_autocast_dtype(cfg),
    )
    colours = pca_colours(tokens, foreground_mask(tokens) if args.foreground else None)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet({"image": images, "PCA": to_pictures(colours)}).save(args.output)
    logger.info("%d images, %d x %d features each: %s", len(images), *tokens.shape[1:3], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(get_args_parser().parse_args())))
