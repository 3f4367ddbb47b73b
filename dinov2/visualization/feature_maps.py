"""Feature maps of a frozen backbone: patch tokens, attention of the class token, patch similarity.

Sides of images are rounded to multiples of the patch size, which distorts an image by less than half a patch.

Shapes: n images, h x w patches of an image, D feature dimension, H heads, R registers, p patch side in pixels.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.analysis.shifts import finer_tokens
from dinov2.data.images import AnyImage
from dinov2.data.transforms import ToNormalizedTensor
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.features import autocast, run_model
from dinov2.eval.results import counted
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # images in a batch on a GPU; `run_model` splits batches on a CPU

# --- Image sizes -----------------------------------------------------------------------------------------------------


def log_sizes(sizes: Iterable[tuple[tuple[int, int], tuple[int, int]]], patch_size: int) -> None:
    """Log the distinct changes among pairs of sizes (width, height) before and after resizing."""
    changes = [f"{a[0]} x {a[1]} to {b[0]} x {b[1]}" for a, b in dict.fromkeys(sizes) if a != b]
    if len(changes) > 4:
        changes[4:] = [f"and {counted(len(changes) - 4, 'other size')}"]
    if changes:
        logger.info("resized to multiples of the patch (%d pixels): %s", patch_size, ", ".join(changes))


def _batches(backbone: FrozenBackbone, images: Iterable[AnyImage]) -> Iterator[Tensor]:
    """Normalized batches (n, 3, H, W) of consecutive images of one size."""
    to_tensor = ToNormalizedTensor(backbone.mean, backbone.std)
    for _, group in groupby(images, key=lambda image: image.size):
        while batch := [to_tensor(image) for image in islice(group, BATCH_SIZE)]:
            yield torch.stack(batch)


# --- Patch tokens ----------------------------------------------------------------------------------------------------


def image_tokens(backbone: FrozenBackbone, images: Sequence[AnyImage], *, shifts: int = 1) -> list[Tensor]:
    """Patch tokens (s * h, s * w, D) of each image, whose sides are multiples of the patch size; see `patch_tokens`."""
    tokens_of = partial(patch_tokens, backbone.model, shifts=shifts, autocast_dtype=backbone.autocast_dtype)
    return [tokens for batch in _batches(backbone, images) for tokens in tokens_of(batch)]


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
        model: Backbone in evaluation mode.
        images: (n, 3, H, W), normalized; H and W are multiples of the patch size.
        shifts: Factor s by which the grid of tokens is finer, see `finer_tokens`; a divisor of the patch size.
        batch_size: Images in a forward pass.
        autocast_dtype: Precision of the model.

    Returns:
        (n, s * h, s * w, D) float32 on the CPU.
    """

    def forward(batch: Tensor) -> Tensor:
        features: Any = model.forward_features(batch)
        return features["x_norm_patchtokens"]

    def tokens_of(images: Tensor) -> Tensor:
        parts = []
        for batch in images.split(batch_size):
            with autocast(autocast_dtype):
                parts.append(run_model(forward, batch.to(model.cls_token.device)).float().cpu())
        return torch.cat(parts).unflatten(1, (images.shape[-2] // model.patch_size, -1))

    return finer_tokens(tokens_of, images, patch_size=model.patch_size, shifts=shifts)


# --- Attention -------------------------------------------------------------------------------------------------------


def image_attention(backbone: FrozenBackbone, images: Sequence[AnyImage]) -> list[Tensor]:
    """Attention (H, h, w) in each image, whose sides are multiples of the patch size; see `class_attention`."""
    attention_in = partial(class_attention, backbone.model, autocast_dtype=backbone.autocast_dtype)
    return [attention for batch in _batches(backbone, images) for attention in attention_in(batch)]


@torch.inference_mode()
def class_attention(
    model: DinoVisionTransformer, images: Tensor, *, autocast_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Attention of the class token to the patches in the last block.

    Args:
        model: Backbone in evaluation mode.
        images: (n, 3, H, W), normalized; H and W are multiples of the patch size.
        autocast_dtype: Precision of the model; the softmax is computed in float32.

    Returns:
        (n, H, h, w) float32 on the CPU. The sum over a head is less than 1: the rest is attention to the class token
        and to registers.
    """
    outputs: list[Tensor] = []  # of the qkv projection, (B, 1 + R + h * w, 3D) each
    attention: Any = model.blocks[-1].attn
    hook = attention.qkv.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with autocast(autocast_dtype):
            run_model(model, images.to(model.cls_token.device))
    finally:
        hook.remove()
    parts = []
    for output in outputs:
        query, key, _ = output.unflatten(-1, (3, attention.num_heads, -1)).float().unbind(-3)  # (B, N, H, D / H)
        weights = torch.einsum("bhd,bnhd->bhn", query[:, 0] * attention.scale, key).softmax(dim=-1)
        parts.append(weights[..., 1 + model.num_register_tokens :].cpu())
    return torch.cat(parts).unflatten(-1, (images.shape[-2] // model.patch_size, -1))


# --- Similarity ------------------------------------------------------------------------------------------------------


def similarity_maps(tokens: Sequence[Tensor], image: int, cell: tuple[int, int]) -> list[Tensor]:
    """Cosine similarity of the patch at cell (row, column) of an image to all patches: (h, w, D) each -> (h, w)."""
    reference = functional.normalize(tokens[image][cell].double(), dim=-1)
    return [(functional.normalize(grid.double(), dim=-1) @ reference).float() for grid in tokens]


def parse_point(text: str, size: tuple[int, int]) -> tuple[float, float]:
    """Parse a point `x,y` of an image of `size` (width, height): fractions (x, y) of width and height, in [0, 1].

    Two integers are pixels, two decimal numbers fractions.

    Raises:
        ValueError: The text is not a point, or the point is outside the image.
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
    """(row, column) of the patch at a point, fractions (x, y), in a grid of (rows, columns)."""
    rows, columns = grid
    return min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)
