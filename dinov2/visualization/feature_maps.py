"""What a frozen backbone sees in images: patch tokens, attention of the class token, similarities.

Images keep their proportions. A side that is no multiple of the patch is brought to the nearest one, which stretches
an image by less than half a patch.

Shapes: n images, h x w patches of an image, D feature width, H heads, p patch side in pixels.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dinov2.analysis.shifts import finer_tokens
from dinov2.data.transforms import ToNormalizedTensor
from dinov2.eval.features import autocast, run_model
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.visualization.frozen_backbone import FrozenBackbone

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # images on a GPU at once; a CPU takes them a few at a time anyway

# --- Images in -----------------------------------------------------------------------------------------------------


def input_size(size: tuple[int, int], shorter_side: int | None, patch_size: int) -> tuple[int, int]:
    """The size (width, height) at which an image of another one is looked at.

    Args:
        size: (width, height) of the image.
        shorter_side: pixels to bring that to; None: leave the size as it is.
        patch_size: both sides become multiples of it, at least one patch.
    """
    scale = 1.0 if shorter_side is None else shorter_side / min(size)
    width, height = (max(round(side * scale / patch_size), 1) * patch_size for side in size)
    return width, height


def resized(image: Image.Image, shorter_side: int | None, patch_size: int) -> Image.Image:
    """An image at the size at which it is looked at, see `input_size`."""
    size = input_size(image.size, shorter_side, patch_size)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def log_sizes(sizes: Iterable[tuple[tuple[int, int], tuple[int, int]]], patch_size: int) -> None:
    """Log what becomes of images: pairs of sizes (width, height) before and after."""
    changes = list(dict.fromkeys(pair for pair in sizes if pair[0] != pair[1]))
    if not changes:
        return
    examples = ", ".join(f"{a[0]} x {a[1]} to {b[0]} x {b[1]}" for a, b in changes[:4])
    more = f", and {len(changes) - 4} other sizes" if len(changes) > 4 else ""
    logger.info("resized to multiples of the patch (%d pixels): %s%s", patch_size, examples, more)


def _run(backbone: FrozenBackbone, images: Sequence[Image.Image], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What a function of batches (n, 3, H, W) gives for each image; those of one size that follow go together."""
    to_tensor = ToNormalizedTensor(backbone.mean, backbone.std)
    results: list[Tensor] = []
    batch: list[Image.Image] = []
    for image in [*images, None]:
        if batch and (image is None or image.size != batch[0].size or len(batch) == BATCH_SIZE):
            results += function(torch.stack([to_tensor(item) for item in batch]))
            batch = []
        if image is not None:
            batch.append(image)
    return results


# --- Patch tokens ----------------------------------------------------------------------------------------------------


def image_tokens(backbone: FrozenBackbone, images: Sequence[Image.Image], *, shifts: int = 1) -> list[Tensor]:
    """The patch tokens of images whose sides are multiples of the patch, see `patch_tokens`: each (h, w, D)."""

    def tokens(batch: Tensor) -> Tensor:
        return patch_tokens(backbone.model, batch, shifts=shifts, autocast_dtype=backbone.autocast_dtype)

    return _run(backbone, images, tokens)


@torch.inference_mode()
def patch_tokens(
    model: DinoVisionTransformer,
    images: Tensor,
    *,
    shifts: int = 1,
    batch_size: int = BATCH_SIZE,
    autocast_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalized patch tokens of the last block, without class token and registers.

    Args:
        model: in evaluation mode.
        images: (n, 3, H, W), H and W multiples of the patch size.
        shifts: s, see `finer_tokens`.
        batch_size: images at once.
        autocast_dtype: precision of the model.

    Returns:
        (n, s * h, s * w, D) float32 on the CPU.

    Raises:
        ValueError: if the patch size is not a multiple of `shifts`.
    """

    def run(batch: Tensor) -> Tensor:
        features: Any = model.forward_features(batch)
        return features["x_norm_patchtokens"]

    def tokens_of(view: Tensor) -> Tensor:
        parts = []
        for batch in view.split(batch_size):
            with autocast(autocast_dtype):
                parts.append(run_model(run, batch.to(model.cls_token.device)).float().cpu())
        return torch.cat(parts).unflatten(1, (view.shape[-2] // model.patch_size, -1))

    return finer_tokens(tokens_of, images, patch_size=model.patch_size, shifts=shifts)


# --- Attention -------------------------------------------------------------------------------------------------------


def image_attention(backbone: FrozenBackbone, images: Sequence[Image.Image]) -> list[Tensor]:
    """The attention of the class token in images whose sides are multiples of the patch: each (H, h, w)."""

    def attention(batch: Tensor) -> Tensor:
        return class_attention(backbone.model, batch, autocast_dtype=backbone.autocast_dtype)

    return _run(backbone, images, attention)


@torch.inference_mode()
def class_attention(
    model: DinoVisionTransformer, images: Tensor, *, autocast_dtype: torch.dtype = torch.float32
) -> Tensor:
    """How much the class token attends to each patch in the last block.

    Args:
        model: in evaluation mode.
        images: (n, 3, H, W), H and W multiples of the patch size.
        autocast_dtype: precision of the model; the softmax is in float32.

    Returns:
        (n, heads, h, w) float32 on the CPU. What goes to the class token and to registers is left out, so that the
        numbers of a head add up to less than 1.
    """
    seen: list[Tensor] = []
    attention: Any = model.blocks[-1].attn
    hook = attention.qkv.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        with autocast(autocast_dtype):
            run_model(model, images.to(model.cls_token.device))
    finally:
        hook.remove()
    parts = []
    for output in seen:  # (B, 1 + R + h * w, 3D) each
        query, key, _ = output.unflatten(-1, (3, attention.num_heads, -1)).float().unbind(-3)  # (B, N, H, D / H)
        weights = torch.einsum("bhd,bnhd->bhn", query[:, 0] * attention.scale, key).softmax(dim=-1)
        parts.append(weights[..., 1 + model.num_register_tokens :].cpu())
    return torch.cat(parts).unflatten(-1, (images.shape[-2] // model.patch_size, -1))


# --- Similarities ----------------------------------------------------------------------------------------------------


def similarity_maps(tokens: Sequence[Tensor], image: int, cell: tuple[int, int]) -> list[Tensor]:
    """Cosine similarity of one patch to every patch.

    Args:
        tokens: (h, w, D) of each image.
        image, cell: the patch: which image, and (row, column) in it.

    Returns:
        (h, w) float32 for each image.
    """
    reference = functional.normalize(tokens[image][cell].double(), dim=-1)
    return [(functional.normalize(grid.double(), dim=-1) @ reference).float() for grid in tokens]


def locate(text: str, size: tuple[int, int]) -> tuple[float, float]:
    """A point as fractions (x, y) of the width and height of an image of that size.

    Args:
        text: `x,y`; whole numbers are pixels of the original image, two with a decimal point are fractions.
        size: (width, height) of the image.

    Raises:
        ValueError: it is no point, or outside the image.
    """
    words = [word.strip() for word in text.split(",")]
    outside = f"the point {text} is outside the image of {size[0]} x {size[1]} pixels"
    if len(words) == 2 and all(re.fullmatch(r"-?\d+", word) for word in words):
        x, y = map(int, words)
        if not (0 <= x < size[0] and 0 <= y < size[1]):
            raise ValueError(outside)
        return (x + 0.5) / size[0], (y + 0.5) / size[1]
    if len(words) == 2 and all(re.fullmatch(r"-?(\d+\.\d*|\.\d+)", word) for word in words):
        across, down = map(float, words)
        if not (0 <= across <= 1 and 0 <= down <= 1):
            raise ValueError(f"{outside}: with a decimal point, numbers are fractions of its sides, 0.0 to 1.0")
        return across, down
    raise ValueError(
        f"a point is x,y in pixels, both whole numbers (200,150), or in fractions, both with a decimal point "
        f"(0.5,0.25), not {text!r}"
    )


def cell_at(point: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """The (row, column) of the patch at a point given as fractions (x, y), in a grid of (rows, columns)."""
    rows, columns = grid
    return min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)
