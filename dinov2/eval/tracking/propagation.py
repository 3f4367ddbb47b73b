"""Label propagation: the labels of a patch are a mean of those of similar patches nearby in earlier frames.

Shapes: a frame has a grid of h x w patches with features of width D; C context frames; M masks, of which the first is
the background; (H, W) pixels. Features are L2-normalized.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

TILE = 16  # patches: the similarities of a square of this side with its neighborhood are computed at once


@dataclass(frozen=True)
class PropagationSettings:
    """The settings of a protocol."""

    shape: Literal["circle", "square"]
    size: float  # of the neighborhood in patches: radius of the circle, half the side of the square
    topk: int  # similarities that count, and all equal to the last of them
    temperature: float  # of the softmax over similarities
    context: int  # previous frames, besides the first one
    upsampling: Literal["nearest", "bilinear"]  # of the probabilities to pixels
    min_max: bool  # whether the probabilities of each mask are then stretched to 0..1 over the image

    def __post_init__(self) -> None:
        if self.shape not in ("circle", "square"):
            raise ValueError(f"unknown shape of neighborhoods {self.shape!r}; known: circle, square")
        if self.upsampling not in ("nearest", "bilinear"):
            raise ValueError(f"unknown upsampling {self.upsampling!r}; known: nearest, bilinear")
        if self.size < 0 or self.topk < 1 or self.temperature <= 0 or self.context < 0:
            raise ValueError(f"size and context must be at least 0, topk at least 1, temperature above 0: {self}")


PROTOCOLS = {
    # DINOv3's published notebook.
    "dinov3": PropagationSettings("circle", 12, 5, 0.2, 7, "nearest", min_max=True),
    # The text of DINOv3's appendix D.5, which differs from the notebook in the last step.
    "dinov3_paper": PropagationSettings("circle", 12, 5, 0.2, 7, "bilinear", min_max=False),
    # DINO (Caron et al. 2021): exp(similarity / 0.1), normalized, is a softmax.
    "dino": PropagationSettings("square", 12, 5, 0.1, 7, "bilinear", min_max=True),
}


def frame_size(height: int, width: int, short_side: int, multiple: int) -> tuple[int, int]:
    """The size (height, width) in pixels to which a frame is resized.

    The shorter side becomes `short_side`, rounded up to a multiple of the patch size; the longer side follows in
    proportion to that, and is rounded up too.
    """
    shorter = -(-short_side // multiple) * multiple
    longer = -(-max(height, width) * shorter // (min(height, width) * multiple)) * multiple
    return (shorter, longer) if height <= width else (longer, shorter)


def neighborhood_mask(queries: Tensor, others: Tensor, settings: PropagationSettings) -> Tensor:
    """Which positions (k, 2) are in the neighborhoods of the positions (q, 2), rows and columns: (q, k) bool."""
    offset = (queries[:, None] - others[None]).abs()
    if settings.shape == "square":
        return (offset <= settings.size).all(dim=-1)
    return (offset**2).sum(dim=-1) <= settings.size**2


def propagate(
    context_features: Tensor, context_probs: Tensor, features: Tensor, settings: PropagationSettings
) -> Tensor:
    """Mask probabilities of a frame from those of context frames.

    Memory is bounded by a square of `TILE` patches and its neighborhood, whatever the size of the frame.

    Args:
        context_features: (C, h, w, D).
        context_probs: (C, h, w, M).
        features: (h, w, D).
        settings: Neighborhood, top-k and temperature.

    Returns:
        (h, w, M).
    """
    height, width, _ = features.shape
    reach = int(settings.size)
    result = context_probs.new_empty(height, width, context_probs.shape[-1])
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            tile = (slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width)))
            around = (
                slice(max(top - reach, 0), min(top + TILE + reach, height)),
                slice(max(left - reach, 0), min(left + TILE + reach, width)),
            )
            inside = neighborhood_mask(_positions(tile, features.device), _positions(around, features.device), settings)
            found = _propagate_tile(
                context_features[:, *around].flatten(1, 2),
                context_probs[:, *around].flatten(1, 2),
                features[tile].flatten(0, 1),
                inside,
                settings,
            )
            result[tile] = found.view(*result[tile].shape)
    return result


def _positions(area: tuple[slice, slice], device: torch.device) -> Tensor:
    """Rows and columns of an area of the grid, row by row: (n, 2) float32."""
    rows, columns = (torch.arange(part.start, part.stop, dtype=torch.float32, device=device) for part in area)
    return torch.cartesian_prod(rows, columns)


def _propagate_tile(
    context_features: Tensor, context_probs: Tensor, features: Tensor, inside: Tensor, settings: PropagationSettings
) -> Tensor:
    """Context (C, k, D) and (C, k, M), queries (q, D), neighborhoods (q, k) -> (q, M)."""
    with torch.autocast(features.device.type, enabled=False):  # half precision causes ties
        similarity = features @ context_features.flatten(0, 1).T
    similarity = similarity.unflatten(1, context_features.shape[:2]).masked_fill(~inside[:, None], -torch.inf)
    similarity = similarity.flatten(1)
    kept = min(settings.topk, similarity.shape[1])
    smallest = similarity.topk(kept, dim=1).values[:, -1:]
    similarity = similarity.masked_fill(similarity < smallest, -torch.inf)  # keeps those equal to the k-th
    return functional.softmax(similarity / settings.temperature, dim=1) @ context_probs.flatten(0, 1)


class Propagator:
    """Propagates the masks of a first frame through a video, frame by frame.

    Args:
        features: Of the first frame, (h, w, D).
        probs: Its masks, (h, w, M), see `patch_probabilities`.
        settings: The protocol.
    """

    def __init__(self, features: Tensor, probs: Tensor, settings: PropagationSettings) -> None:
        self.settings = settings
        self.first = (features, probs)
        self.previous: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)

    def step(self, features: Tensor) -> Tensor:
        """The probabilities (h, w, M) of the next frame, from its features (h, w, D)."""
        context = [self.first, *self.previous]
        context_features, context_probs = (torch.stack(part) for part in zip(*context, strict=True))
        probs = propagate(context_features, context_probs, features, self.settings)
        self.previous.append((features, probs))
        return probs


def patch_probabilities(labels: Tensor, grid: Sequence[int], num_masks: int) -> Tensor:
    """One-hot masks (h, w, M) float32 of the patches, from a label map (H, W) by the pixel at the center of each."""
    small = functional.interpolate(labels[None, None].float(), tuple(grid), mode="nearest-exact")[0, 0]
    return functional.one_hot(small.long(), num_masks).float()


def stretch(probs: Tensor) -> Tensor:
    """Stretch each mask (..., M, H, W) to 0..1 over the image; a constant one becomes 0."""
    low, high = probs.amin((-2, -1), keepdim=True), probs.amax((-2, -1), keepdim=True)
    return ((probs - low) / (high - low)).nan_to_num(nan=0.0)


def pixel_probabilities(probs: Tensor, size: tuple[int, int], settings: PropagationSettings) -> Tensor:
    """Upsample probabilities (h, w, M) to pixels (M, H, W), stretched if the protocol says so."""
    align = {"align_corners": False} if settings.upsampling == "bilinear" else {}
    large = functional.interpolate(probs.movedim(-1, 0)[None], size, mode=settings.upsampling, **align)[0]
    return stretch(large) if settings.min_max else large
