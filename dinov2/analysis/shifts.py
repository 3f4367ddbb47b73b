"""Patch tokens on a grid finer than that of the patches: the model runs on several shifted copies of an image."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional


def finer_tokens(tokens_of: Callable[[Tensor], Tensor], images: Tensor, *, patch_size: int, shifts: int) -> Tensor:
    """Interleave the tokens of `shifts` x `shifts` shifted copies of images.

    Copies are shifted by multiples of patch_size / shifts pixels; the border of the image is replicated.

    Args:
        tokens_of: Maps images (n, 3, H, W) to patch tokens (n, H / p, W / p, D).
        images: (n, 3, H, W), H and W multiples of the patch size.
        patch_size: Side p of a patch in pixels.
        shifts: Number s of shifts in each direction; a `ValueError` if it does not divide the patch size.

    Returns:
        (n, s * H / p, s * W / p, D).
    """
    if shifts < 1 or patch_size % shifts:
        raise ValueError(f"shifts = {shifts} must divide the patch size {patch_size}")
    if shifts == 1:
        return tokens_of(images)
    step = patch_size // shifts
    height, width = images.shape[-2:]
    # Centers the patch of a token on its cell of the finer grid.
    before = (patch_size - step) // 2
    after = patch_size - step - before
    padded = functional.pad(images, (before, after, before, after), mode="replicate")
    copies = [
        tokens_of(padded[:, :, row * step : row * step + height, column * step : column * step + width])
        for row, column in product(range(shifts), repeat=2)
    ]
    rows = torch.stack(copies).unflatten(0, (shifts, shifts))  # (s, s, n, h, w, D)
    return rows.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)
