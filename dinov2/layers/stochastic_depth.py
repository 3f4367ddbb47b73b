"""Stochastic depth of packed tokens: dropped sequences are skipped, not masked (DINOv2 paper, section 5).

Which sequences are dropped in all blocks of a pass is drawn on the host, and sent to the device in one copy: no block
waits for the device, and the draws are the same on every device.

Legend: T packed tokens, T' of them kept, D channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.layers.packing import Segments, kept_outside_graphs, sequence_ends


class Branch(NamedTuple):
    """The tokens for which a residual branch is computed."""

    segments: Segments  # of these tokens
    ends: Tensor | None = None  # on CUDA (1 + sequences,) int32, see `sequence_ends`
    rows: Tensor | None = None  # (T',) int64, their positions among all tokens; None: all tokens in order
    scale: Tensor | None = None  # (T', 1) float32, all sequences / kept ones of the group


def draw_branches(segments: Segments, rates: Sequence[float], device: torch.device) -> list[tuple[Branch, Branch]]:
    """Draw for some blocks the tokens of their two residual branches, attention and feed-forward.

    Of each group a fixed number of sequences is kept: floor(count * (1 - rate)), at least one.

    Args:
        segments: Sequences of the packed tokens.
        rates: Rate of each block, in [0, 1).
        device: Device of the tokens.
    """
    on_cuda = device.type == "cuda"
    everything = Branch(segments, sequence_ends(segments, device) if on_cuda else None)
    kept = [tuple((num_kept(count, rate), length) for count, length in segments) for rate in rates]
    drawn = [_draw_index(segments, kept[block]) for block, rate in enumerate(rates) if rate > 0 for _ in range(2)]
    if not drawn:
        return [(everything, everything)] * len(rates)
    joint = torch.cat(drawn)
    if on_cuda:
        pinned = joint if torch.compiler.is_compiling() else joint.pin_memory()  # which compilers do not know
        joint = pinned.to(device, non_blocking=True)
    indices = iter(joint.split([len(index) for index in drawn]))
    branches = []
    for block, rate in enumerate(rates):
        if rate > 0:
            ends = sequence_ends(kept[block], device) if on_cuda else None
            scale = _scale(segments, kept[block], device)
            attention, ffn = (Branch(kept[block], ends, next(indices), scale) for _ in range(2))
            branches.append((attention, ffn))
        else:
            branches.append((everything, everything))
    return branches


def num_kept(count: int, rate: float) -> int:
    """Sequences of a group that are kept."""
    return min(max(int(count * (1 - rate)), 1), count)


def _draw_index(segments: Segments, kept: Segments) -> Tensor:
    """Positions (T',) of the tokens of random sequences, on the CPU."""
    parts, start = [], 0
    for (count, length), (keep, _) in zip(segments, kept, strict=True):
        chosen = torch.randperm(count)[:keep, None]
        parts.append((start + chosen * length + torch.arange(length)).flatten())
        start += count * length
    return torch.cat(parts)


@kept_outside_graphs
def _scale(segments: Segments, kept: Segments, device: torch.device) -> Tensor:
    parts = [
        torch.full((keep * length, 1), count / max(keep, 1), device=device)
        for (count, length), (keep, _) in zip(segments, kept, strict=True)
    ]
    return torch.cat(parts)


def add_residual(x: Tensor, branch: Branch, residual: Callable[[Tensor], Tensor]) -> Tensor:
    """Add to the kept tokens their residual, times `branch.scale`: (T, D) -> (T, D)."""
    assert branch.rows is not None and branch.scale is not None
    x, kept = _Select.apply(x, branch.rows)
    kept = torch.addcmul(kept, residual(kept).to(x.dtype), branch.scale.to(x.dtype))
    return _Replace.apply(x, branch.rows, kept)


def token_scale(x: Tensor, branch: Branch) -> Tensor:
    """Factor of the residual of each token, 0 for those that are dropped: (T, 1)."""
    assert branch.rows is not None and branch.scale is not None
    return x.new_zeros(len(x), 1).index_copy(0, branch.rows, branch.scale.to(x.dtype))


# Rows are unique. Autograd does not know that and would add gradients to them atomically, as if they were not.


class _Select(torch.autograd.Function):
    """(x, index) -> (x, x[index]). The gradient of x[index] replaces those rows of the gradient of x."""

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_selected: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.index_copy(0, index, grad_selected), None


class _Replace(torch.autograd.Function):
    """(x, index, rows) -> x with x[index] = rows. The gradient of the replaced rows of x is left to `_Select`."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        return x.index_copy(0, index, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (index,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, index)
