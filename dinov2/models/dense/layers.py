"""What dense heads read: the tokens of several blocks; and operations that heads and models share.

Legend: B images, (h, w) tokens, D width of the backbone, L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.models.dense.padding import Size

Layer = tuple[Tensor, Tensor]
"""Tokens after a block: patch tokens (B, D, h, w), and the class token (B, D)."""

_PUBLISHED_BLOCKS = {24: (4, 11, 17, 23)}  # not quite evenly spaced, unlike those of 12 and of 40 blocks


def spread_blocks(depth: int) -> tuple[int, ...]:
    """Indices of the four blocks that depth heads read in a backbone of `depth` blocks, the last one included."""
    if depth < 4:
        raise ValueError(f"four blocks are needed, the backbone has {depth}")
    return _PUBLISHED_BLOCKS.get(depth) or tuple(depth * part // 4 - 1 for part in (1, 2, 3, 4))


def last_blocks(depth: int, count: int) -> tuple[int, ...]:
    """Indices of the last `count` of `depth` blocks."""
    if not 1 <= count <= depth:
        raise ValueError(f"{count} last blocks requested of a backbone with {depth}")
    return tuple(range(depth - count, depth))


def concatenate(layers: Sequence[Layer], *, class_token: bool, channels: int) -> Tensor:
    """Concatenate L layers to (B, C, h, w): C = L * D, or L * 2D with each class token after its layer's patches.

    A ValueError unless C is `channels`, the number of channels that a head expects.
    """
    if not layers:
        raise ValueError("no layers are given")
    parts: list[Tensor] = []
    for patches, token in layers:
        parts.append(patches)
        if class_token:
            parts.append(token[:, :, None, None].expand(-1, -1, *patches.shape[-2:]))
    features = torch.cat(parts, dim=1)
    if features.shape[1] != channels:
        widths = ", ".join(str(patches.shape[1]) for patches, _ in layers)
        kind = "with class tokens" if class_token else "without class tokens"
        raise ValueError(f"the head expects {channels} channels, not {len(layers)} layers of width {widths} {kind}")
    return features


def resize(maps: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """Resize maps (B, C, h, w) bilinearly to (height, width), in at least single precision."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)
