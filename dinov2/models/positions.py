"""Resample position tables for other image sizes, also in exported programs with dynamic sizes.

Legend: a table (1, 1 + g, D) holds the position of the class token and those of a grid of g = rows * columns patches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]  # rows and columns of patches


def resample_positions(table: Tensor, old: Grid, new: Grid, *, offset: float, antialias: bool) -> Tensor:
    """Resample a position table with bicubic interpolation: (1, 1 + old rows * columns, D) -> (1, 1 + new ..., D).

    For the same grid it is returned unchanged, else in float32.

    Args:
        table: Positions.
        old, new: Grid of the table, and of the result.
        offset: With an offset o > 0 the scale factor is (new + o) / old, which samples at slightly different points
            than with o = 0, where the size is given (the released models without registers were trained with 0.1).
        antialias: Whether the interpolation is antialiased.
    """
    if not all(isinstance(size, int) for size in new):
        return _resample_to_any(table, old, new, offset=offset, antialias=antialias)
    if old == new:
        return table
    table = table.float()
    grid = table[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    target: dict[str, Any] = {"size": new}
    if offset:
        target = {"scale_factor": tuple((size + offset) / before for size, before in zip(new, old, strict=True))}
    grid = F.interpolate(grid, mode="bicubic", antialias=antialias, **target)
    assert grid.shape[-2:] == new, "position grid has the size of the patch grid"
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _resample_to_any(table: Tensor, old: Grid, new: Grid, *, offset: float, antialias: bool) -> Tensor:
    """Resample in a program exported with dynamic image sizes, whose rows and columns are known only when it runs.

    Bicubic interpolation is a matrix product along each axis. Exporters support interpolation only with a constant
    scale; for the old size the matrices are the identity, so no case distinction is needed.
    """
    sizes = [torch.full((), size, dtype=torch.int64, device=table.device) for size in new]
    same = [size == before for size, before in zip(sizes, old, strict=True)]
    if not antialias:  # PyTorch leaves an axis of unchanged size alone only with antialiasing
        same = [same[0] & same[1]] * 2
    down, across = (
        _bicubic_matrix(before, after, before / (after + offset * ~kept), antialias=antialias)
        for before, after, kept in zip(old, new, same, strict=True)
    )
    table = table.float()
    rows = (down @ table[0, 1:].view(old[0], -1)).view(new[0], old[1], -1)
    return torch.cat([table[:, :1], (across @ rows).view(1, new[0] * new[1], -1)], dim=1)


def _bicubic_matrix(old: int, new: int, step: Tensor, *, antialias: bool) -> Tensor:
    """Weights (new, old) of old cells in new ones; new cell i is centered on (i + 0.5) * step, in units of old cells.

    As in PyTorch: without antialiasing the four nearest cells with a = -0.75 and a repeated border; with antialiasing
    a = -0.5, a kernel as wide as the step when downsampling, truncated at the border and normalized.
    """
    centers = (torch.arange(new, device=step.device) + 0.5).unsqueeze(1) * step
    cells = torch.arange(old, device=step.device, dtype=step.dtype)  # some exporters compare equal types only
    if antialias:
        weights = _cubic((cells + 0.5 - centers) / step.clamp(min=1), a=-0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    nearest = (centers - 0.5).floor() + torch.arange(-1, 3, device=step.device)  # (new, 4)
    weights = _cubic(centers - 0.5 - nearest, a=-0.75)
    chosen = nearest.clamp(0, old - 1).unsqueeze(-1) == cells  # (new, 4, old)
    return (weights.unsqueeze(-1) * chosen).sum(dim=1)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Kernel of Keys, "Cubic convolution interpolation for digital image processing" (1981)."""
    x = distance.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * a * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
