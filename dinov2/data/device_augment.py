"""Batches of whole images, from which the device cuts the crops.

A worker only decodes and draws (`RawBatch`); `cut` carries the draws out, for many crops at once and without waiting
for the device: how large images are and which crops an operation concerns is known on the host.

Legend: B images of the batch, P of a part of it; C crops of each; n crops of one side S in a part, image by
image; k those among them that an operation concerns; H, W greatest height and width of the images of a part.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.augment import DataAugmentationDINO
from dinov2.data.collate import Batch, shared_tensor
from dinov2.data.color_ops import BLUR_RADIUS, blend, blur, blur_weights, gray_of, hue_centers, solarize, turn_hue
from dinov2.data.crop_params import CONTRAST, HUE, NEUTRAL_FACTORS, SATURATION, CropParams, stack_crop_params
from dinov2.data.images import EncodedImage

_PART_SIDES = 2**14  # pixels, of the images cut together: their number times their longest side; bounds the memory


class RawImage(NamedTuple):
    """What `DataAugmentationDINO` gives in place of crops where the device is to make them."""

    pixels: np.ndarray  # (height, width, 3) uint8
    views: CropParams  # of its C crops


class CropFormat(NamedTuple):
    """What crops are to be like."""

    global_side: int
    local_side: int
    mean: tuple[float, ...]  # of red, green and blue in levels, subtracted
    std: tuple[float, ...]  # in levels, divided by
    dtype: torch.dtype


class RawBatch(NamedTuple):
    """A `Batch` whose crops are still to be cut."""

    batch: Batch  # without crops
    pixels: Tensor  # (bytes,) uint8: (height, width, 3) of each image, one after the other
    sizes: np.ndarray  # (B, 2) int64: height and width of each
    views: CropParams  # of B x C crops, image by image
    crop_format: CropFormat


class DeviceAugmentation:
    """Draws as an augmentation does, and leaves it at that: image -> RawImage."""

    opens_encoded = True

    def __init__(self, augmentation: DataAugmentationDINO) -> None:
        self.augmentation = augmentation

    def __call__(self, image: Image.Image | EncodedImage) -> RawImage:
        return RawImage(*self.augmentation.draw(image))

    def crop_format(self, dtype: torch.dtype) -> CropFormat:
        """What the augmentation makes of the crops."""
        made = self.augmentation
        mean, std = (tuple(values.flatten().tolist()) for values in (made.mean, made.std))
        return CropFormat(made.global_side, made.local_side, mean, std, dtype)


def pack(images: Sequence[RawImage], batch: Batch, crop_format: CropFormat) -> RawBatch:
    """The images of a batch in one buffer, and ``batch`` with everything but the crops."""
    pixels = shared_tensor([sum(image.pixels.size for image in images)], torch.uint8)
    np.concatenate([image.pixels.reshape(-1) for image in images], out=pixels.numpy())
    return RawBatch(
        batch,
        pixels,
        np.array([image.pixels.shape[:2] for image in images]),
        stack_crop_params([image.views for image in images]),
        crop_format,
    )


def cut(raw: RawBatch) -> Batch:
    """The batch with its crops, on the device where ``raw.pixels`` and the rest of the batch are."""
    batch, pixels, sizes, views, crop_format = raw
    count, crops_each = len(sizes), len(views.flip) // len(sizes)
    device, dtype = pixels.device, crop_format.dtype
    mean, std = _move_together([torch.tensor(crop_format.mean), torch.tensor(crop_format.std)], device)
    sides = (crop_format.global_side, crop_format.local_side)
    numbers = (2, crops_each - 2)
    made = [torch.empty(n, count, 3, s, s, dtype=dtype, device=device) for n, s in zip(numbers, sides, strict=True)]
    starts = np.concatenate([[0], np.cumsum(3 * sizes.prod(1))])
    for first, last in _parts(sizes):
        images = _padded(pixels[starts[first] : starts[last]], sizes[first:last])
        of_part = np.arange(first * crops_each, last * crops_each).reshape(-1, crops_each)
        for rows, crops in zip((of_part[:, :2], of_part[:, 2:]), made, strict=True):
            if not rows.size:
                continue
            drawn = views.take(rows.reshape(-1))
            levels = _color_jittered(_resampled(images, drawn, crops.shape[-1]), drawn)
            levels.sub_(mean[:, None, None]).div_(std[:, None, None])
            crops[:, first:last] = levels.unflatten(0, (last - first, -1)).transpose(0, 1)
    global_crops, local_crops = (crops.flatten(0, 1) for crops in made)
    return batch._replace(global_crops=global_crops, local_crops=local_crops if len(local_crops) else global_crops[:0])


def _parts(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """First image of each part of the batch, and the one after its last."""
    first = 0
    for last in range(1, len(sizes) + 1):
        if last == len(sizes) or (last + 1 - first) * sizes[first : last + 1].max() > _PART_SIDES:
            yield first, last
            first = last


def _padded(pixels: Tensor, sizes: np.ndarray) -> Tensor:
    """Images one after the other -> (P, 3, H, W) float32, with zeros right of them and below."""
    height, width = sizes.max(0).tolist()
    images = torch.zeros(len(sizes), 3, height, width, device=pixels.device)
    for image, part, (h, w) in zip(images, pixels.split((3 * sizes.prod(1)).tolist()), sizes.tolist(), strict=True):
        image[:, :h, :w] = part.view(h, w, 3).permute(2, 0, 1)
    return images


# --- Geometry --------------------------------------------------------------------------------------------------------


def _resampled(images: Tensor, views: CropParams, side: int) -> Tensor:
    """The boxes of P x n/P views, flipped where that was drawn, as crops (n, 3, side, side) of whole levels.

    Two matrix products, along the rows and then the columns, each rounded to 8 bits as Pillow does.
    """
    count, _, height, width = images.shape
    edges = torch.from_numpy(np.column_stack([views.boxes, views.flip]).astype(np.float32))
    (edges,) = _move_together([edges], images.device)
    top, left, rows, columns, flip = edges.T
    across = _weights(left, columns, side, width)
    across = torch.where(flip[:, None, None] > 0, across.flip(1), across).view(count, -1, width)  # (P, n/P * side, W)
    down = _weights(top, rows, side, height)
    narrow = _levels(images.view(count, 3 * height, width) @ across.mT)
    narrow = narrow.view(count, 3, height, -1, side).permute(0, 3, 1, 2, 4).reshape(-1, 3, height, side)
    return _levels(down[:, None] @ narrow)


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Weights of antialiased bicubic resampling, (n,) boxes -> (n, side, size): rows sum to 1, and are 0 outside."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / side
    pixels = torch.arange(size, device=start.device) + 0.5
    centers = start + (torch.arange(side, device=start.device)[:, None] + 0.5) * scale
    distance = ((pixels - centers) / scale.clamp(min=1)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * ((pixels > start) & (pixels < start + length))
    return weights / weights.sum(2, keepdim=True)


def _levels(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255)


# --- Colors ---------------------------------------------------------------------------------------------------------


class _JitterRound(NamedTuple):
    """One operation of the color jitter for each crop that takes part in this round.

    Brightness, contrast and saturation are all a blend with `gray * gray(x) + mean * gray(mean(x))`.
    """

    blended: Tensor  # (k,) the crops of a blend
    factor: Tensor  # (k, 1, 1, 1)
    gray: Tensor  # (k, 1, 1, 1)
    mean: Tensor  # (k, 1, 1, 1)
    turned: Tensor  # (k,) the crops whose hue is turned
    centers: Tensor  # (k, 3, 1, 1)


def _color_jittered(crops: Tensor, views: CropParams) -> Tensor:
    """What `dinov2.data.color_ops.jitter_colors` does, for crops that each have their own draws; in place."""
    blurred = np.flatnonzero(views.sigma)
    weights = [blur_weights(sigma) for sigma in views.sigma[blurred].tolist()]
    chosen = [torch.from_numpy(x) for x in (np.flatnonzero(views.gray), blurred, np.flatnonzero(views.solarize))]
    rounds = [_jitter_round(operation, views.factors) for operation in views.order.T]
    tensors = [*chosen, torch.tensor(weights).view(-1, BLUR_RADIUS + 1, 1, 1, 1), *itertools.chain(*rounds)]
    gray, blurry, inverted, kernels, *of_rounds = _move_together(tensors, crops.device)
    for part in zip(*[iter(of_rounds)] * len(_JitterRound._fields), strict=True):
        _jitter(crops, _JitterRound(*part))
    _change(crops, gray, lambda some: gray_of(some).expand(-1, 3, -1, -1))
    _change(crops, blurry, lambda some: blur(some, kernels.unbind(1)))
    crops.round_()
    _change(crops, inverted, solarize)
    return crops


def _jitter_round(operation: np.ndarray, factors: np.ndarray) -> _JitterRound:
    """The round whose operation of each crop is given, (n,); factors (n, 4)."""
    factor = factors[np.arange(len(operation)), operation]
    takes_part = factor != np.take(NEUTRAL_FACTORS, operation)
    blended, turned = (np.flatnonzero(takes_part & chosen) for chosen in (operation != HUE, operation == HUE))
    shares = np.stack([factor[blended], operation[blended] == SATURATION, operation[blended] == CONTRAST])
    share_of_x, share_of_gray, share_of_mean = torch.from_numpy(shares.astype(np.float32))[..., None, None, None]
    centers = torch.tensor([hue_centers(shift) for shift in factor[turned].tolist()]).view(-1, 3, 1, 1)
    return _JitterRound(
        torch.from_numpy(blended), share_of_x, share_of_gray, share_of_mean, torch.from_numpy(turned), centers
    )


def _jitter(crops: Tensor, part: _JitterRound) -> None:
    def blend_some(some: Tensor) -> Tensor:
        base = gray_of(some).mul_(part.gray).add_(gray_of(some.mean((2, 3), keepdim=True)).mul_(part.mean))
        return blend(some, base, part.factor)

    _change(crops, part.blended, blend_some)
    _change(crops, part.turned, lambda some: turn_hue(some, part.centers))


def _change(crops: Tensor, which: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    if len(which):
        crops[which] = operation(crops[which])


def _move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of a few dtypes, those of each dtype in one copy, for which the host does not wait."""
    if device.type == "cpu":
        return list(tensors)
    moved: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        packed = torch.cat([tensors[i].flatten() for i in group])
        packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
        for i, part in zip(group, packed.split([tensors[i].numel() for i in group]), strict=True):
            moved[i] = part.view(tensors[i].shape)
    return [moved[i] for i in range(len(tensors))]
