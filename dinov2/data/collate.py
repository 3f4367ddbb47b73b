"""Collation of samples to a batch: crops are stacked and masks are drawn.

Legend: B images in the batch; G, S side of a global and a local crop; L local crops per image; N patches of a global
crop; M masked patches in the batch.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dinov2.data.augment import MultiCrop
from dinov2.data.masking import MaskingGenerator


class Batch(NamedTuple):
    """The crops and masks of one training step. Rows are crop-major: crop 0 of all images, then crop 1, ..."""

    global_crops: Tensor  # (2B, C, G, G), of C channels
    local_crops: Tensor  # (L*B, C, S, S); without local crops (0, C, G, G)
    masks: Tensor  # (2B, N) bool, True = masked; patches in row-major order
    mask_index: Tensor  # (M,) int64, where masks.flatten() is True, ascending
    mask_weight: Tensor  # (M,) float32, 1 / masked patches of the same crop
    upperbound: int  # >= M; the same for every batch with these settings
    gram_crops: Tensor | None = None  # (2B, C, H, H): the global crops at another size, without changed colors
    bad_images: tuple[str, ...] = ()  # "path: reason" of images that could not be read and were replaced by others


class Masking(TypedDict):
    """How the masks of a batch are drawn."""

    mask_ratio_tuple: tuple[float, float]  # minimum and maximum fraction of masked patches in a masked crop
    mask_probability: float  # fraction of the global crops that get a mask; 0 when iBOT is off
    n_tokens: int  # N
    mask_generator: MaskingGenerator  # draws one mask on the patch grid of a global crop
    rng: random.Random


def collate_data_and_cast(samples: Sequence[MultiCrop], *, dtype: torch.dtype, **masking: Unpack[Masking]) -> Batch:
    """Stack the crops of B images as `dtype`, and draw the masks of their global crops."""
    global_crops = _stacked([sample.global_crops[i] for i in range(2) for sample in samples], dtype)
    num_local = len(samples[0].local_crops)
    local_crops = [sample.local_crops[i] for i in range(num_local) for sample in samples]
    gram_crops = [sample.gram_crops[i] for i in range(len(samples[0].gram_crops)) for sample in samples]
    batch = make_masks(len(global_crops), **masking)
    return batch._replace(
        gram_crops=_stacked(gram_crops, dtype) if gram_crops else None,
        global_crops=global_crops,
        local_crops=_stacked(local_crops, dtype) if local_crops else global_crops[:0],
    )


def shared_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialized tensor; in a worker process in shared memory, which avoids a copy."""
    if get_worker_info() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload]


def _stacked(crops: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    stacked = shared_tensor((len(crops), *crops[0].shape), dtype)
    for row, crop in zip(stacked, crops, strict=True):
        row.copy_(crop)
    return stacked


def make_masks(num_crops: int, **masking: Unpack[Masking]) -> Batch:
    """Build a batch without crops, for ``num_crops`` global crops."""
    masks, upperbound = draw_masks(num_crops, **masking)
    weight = 1 / masks.sum(-1, keepdim=True).clamp(min=1)
    return Batch(
        global_crops=torch.empty(0),
        local_crops=torch.empty(0),
        masks=masks,
        mask_index=masks.flatten().nonzero().flatten(),
        mask_weight=weight.expand_as(masks)[masks],
        upperbound=upperbound,
    )


def draw_masks(
    num_crops: int,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    *,
    n_tokens: int,
    mask_generator: MaskingGenerator,
    rng: random.Random,
) -> tuple[Tensor, int]:
    """Draw masks for exactly floor(num_crops * mask_probability) of the crops, see `Masking`.

    The range of ratios is divided into as many equal intervals as there are masked crops, one for each, so that every
    batch covers the whole range evenly. Which crops are masked is random: both, one or none of an image.

    Returns:
        Masks (num_crops, N) bool, and the upper bound of the number of masked patches, which depends on the settings
        only.
    """
    num_masked = int(num_crops * mask_probability)
    edges = torch.linspace(*mask_ratio_tuple, num_masked + 1)  # float32 throughout: the floors below depend on it
    masks = torch.zeros(num_crops, n_tokens, dtype=torch.bool)
    upperbound = 0
    for i in range(num_masked):
        low, high = edges[i], edges[i + 1]
        ratio = low + (high - low) * rng.random()
        masks[i] = torch.from_numpy(mask_generator(int(n_tokens * ratio), rng=rng).reshape(-1))
        upperbound += int(n_tokens * high)
    order = list(range(num_crops))
    rng.shuffle(order)
    return masks[order], upperbound
