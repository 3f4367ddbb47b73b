"""Patch tokens in few bytes, from which cosine similarities of all pairs can be computed with small errors.

Tokens are scaled to length 1 and rotated, which changes no cosine, so that their first coordinates have most of the
energy. All coordinates are rounded to multiples of one step, which fit in 8 bits. Many of the last ones become 0, which
compresses well.

Shapes: m tokens, D feature dimension, d <= D coordinates that are kept.
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LARGEST_LEVEL = 127  # of int8
SMALLEST_GROWTH = 1.1  # factor of the step between two attempts to make the tokens small enough
NUM_CHECKED = 256  # tokens whose cosines to all others are compared with exact ones


class CompactTokens(NamedTuple):
    """Rounded coordinates of tokens."""

    levels: np.ndarray  # (d, m) int8, coordinates of the rotated tokens of length 1 in steps
    packed: bytes  # the levels in the format of zlib
    largest_error: float  # of the cosines that were compared with exact ones
    typical_error: float  # their root mean square error
    num_checked: int  # these cosines


def compact_tokens(tokens: Tensor, *, max_bytes: int) -> CompactTokens:
    """Round tokens (m, D) as finely as 8 bits permit, or more coarsely for at most `max_bytes` of packed levels.

    Raises:
        ValueError: They cannot be made so small.
    """
    unit = functional.normalize(tokens.float(), dim=-1)
    _, axes = torch.linalg.eigh((unit.T @ unit).double())  # of the second moments: centering would change cosines
    rotated = unit @ axes.flip(1).float()
    step = max(float(rotated.abs().max()), 1e-12) / LARGEST_LEVEL
    while True:
        levels = (rotated / step).round().to(torch.int8)
        used = (levels != 0).any(dim=0).nonzero()
        levels = levels[:, : int(used.max()) + 1 if len(used) else 1]
        packed = zlib.compress(levels.T.contiguous().numpy().tobytes())
        if len(packed) <= max_bytes:
            break
        excess = 8 * (len(packed) - max_bytes) / levels.numel()  # bits of a level; each doubling saves up to one
        step *= max(2**excess, SMALLEST_GROWTH)
        if step > 1:
            raise ValueError(f"{len(tokens)} tokens do not fit in {max_bytes} bytes")
    chosen = torch.linspace(0, len(unit) - 1, min(len(unit), NUM_CHECKED)).round().long()
    errors = cosines(levels.T, chosen) - unit[chosen] @ unit.T
    typical = float(errors.square().mean().sqrt())
    return CompactTokens(levels.T.numpy(), packed, float(errors.abs().max()), typical, errors.numel())


def cosines(levels: Tensor, chosen: Tensor) -> Tensor:
    """Cosines (n, m) of some tokens, with indices `chosen` (n,), to all of those with levels (d, m)."""
    unit = functional.normalize(levels.T.float(), dim=-1)
    return unit[chosen] @ unit.T
