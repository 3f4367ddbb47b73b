"""Patch tokens on a grid finer than that of the patches, by looking at an image several times, shifted a little."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional


def finer_tokens(tokens_of: Callable[[Tensor], Tensor], images: Tensor, *, patch_size: int, shifts: int) -> Tensor:
    """Tokens of images that are seen `shifts` x `shifts` times, put in between one another.

    Every view is shifted by steps of patch / shifts pixels, with the border of the image repeated.

    Args:
        tokens_of: images (n, 3, H, W) -> patch tokens (n, H / p, W / p, D).
        images: (n, 3, H, W), H and W multiples of the patch size.
        patch_size: p.
        shifts: s, a divisor of the patch size; 1 looks once.

    Returns:
        (n, s * H / p, s * W / p, D).

    Raises:
        ValueError: if the patch size is not a multiple of `shifts`.
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
    views = [
        tokens_of(padded[:, :, row * step : row * step + height, column * step : column * step + width])
        for row, column in product(range(shifts), repeat=2)
    ]
    rows = torch.stack(views).unflatten(0, (shifts, shifts))  # (s, s, n, h, w, D)
    return rows.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)
