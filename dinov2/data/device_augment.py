"""Augmentation on the device: workers decode images and draw crop parameters, the device computes the crops.

A worker gives a `RawBatch`; `make_crops` applies the parameters to many crops at once and never waits for the device:
the sizes of images and the crops that an operation applies to are known on the host.

Legend: B images in the batch, P in a part of it; C crops of each; n crops of one side S in a part, image by image;
k crops that an operation applies to; H, W maximum height and width of the images in a part.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.data.augment import DataAugmentationDINO
from dinov2.data.collate import Batch, shared_tensor
from dinov2.data.color_ops import (
    BLUR_RADIUS,
    blend,
    blur,
    blur_weights,
    change_bands,
    gray_of,
    hue_centers,
    is_contrast_first,
    shift_hue,
    solarize,
)
from dinov2.data.crop_params import CONTRAST, HUE, NEUTRAL_FACTORS, SATURATION, CropParams, stack_crop_params
from dinov2.data.images import AnyImage, EncodedImage

_PART_SIDES = 2**14  # pixels; bounds the memory: number of images processed together times their longest side


class RawImage(NamedTuple):
    """A decoded image with the parameters of its crops."""

    pixels: np.ndarray  # (height, width, 3) uint8, or (height, width, channels) float32 levels
    params: CropParams  # of its C crops


class CropFormat(NamedTuple):
    """Size, normalization and type of crops."""

    global_side: int
    local_side: int
    gram_side: int  # of the global crops without changed colors; 0: none
    mean: tuple[float, ...]  # of each channel, in levels
    std: tuple[float, ...]  # of each channel, in levels
    dtype: torch.dtype


class RawBatch(NamedTuple):
    """A `Batch` with images and crop parameters in place of the crops."""

    batch: Batch  # without crops
    pixels: Tensor  # uint8, or float32 of bands: the images (height, width, channels), concatenated
    sizes: np.ndarray  # (B, 2) int64: height and width of each
    params: CropParams  # of B x C crops, image by image
    crop_format: CropFormat


class DeviceAugmentation:
    """Image -> RawImage: decodes and draws the parameters, but computes no crops."""

    accepts_encoded = True

    def __init__(self, augmentation: DataAugmentationDINO) -> None:
        self.augmentation = augmentation

    def __call__(self, image: AnyImage | EncodedImage) -> RawImage:
        return RawImage(*self.augmentation.draw(image))

    def crop_format(self, dtype: torch.dtype) -> CropFormat:
        source = self.augmentation
        mean, std = (tuple(values.flatten().tolist()) for values in (source.mean, source.std))
        return CropFormat(source.global_side, source.local_side, source.gram_side, mean, std, dtype)


def pack_raw_batch(images: Sequence[RawImage], batch: Batch, crop_format: CropFormat) -> RawBatch:
    """Put the images of a batch into one buffer; ``batch`` is everything else but the crops, see `make_masks`."""
    dtype = torch.uint8 if images[0].pixels.dtype == np.uint8 else torch.float32
    pixels = shared_tensor([sum(image.pixels.size for image in images)], dtype)
    np.concatenate([image.pixels.reshape(-1) for image in images], out=pixels.numpy())
    sizes = np.array([image.pixels.shape[:2] for image in images])
    return RawBatch(batch, pixels, sizes, stack_crop_params([image.params for image in images]), crop_format)


def make_crops(raw: RawBatch) -> Batch:
    """Compute the crops of a batch on the device where ``raw.pixels`` and the rest of the batch are."""
    batch, pixels, sizes, params, crop_format = raw
    count, crops_each = len(sizes), len(params.flip) // len(sizes)
    device, dtype, channels = pixels.device, crop_format.dtype, len(crop_format.mean)
    color_jittered = _color_jittered if channels == 3 else _bands_jittered
    mean, std = _move_together([torch.tensor(crop_format.mean), torch.tensor(crop_format.std)], device)
    num_gram = 2 if crop_format.gram_side else 0
    kinds = (
        (2, crop_format.global_side),
        (crops_each - 2, crop_format.local_side),
        (num_gram, crop_format.gram_side),
    )
    plain = params.without_colors()
    all_crops = [torch.empty(n, count, channels, side, side, dtype=dtype, device=device) for n, side in kinds]
    starts = np.concatenate([[0], np.cumsum(channels * sizes.prod(1))])
    for first, last in _parts(sizes):
        images = _padded(pixels[starts[first] : starts[last]], sizes[first:last], channels)
        crop_index = np.arange(first * crops_each, last * crops_each).reshape(-1, crops_each)
        global_index = crop_index[:, :2]
        each = ((global_index, params), (crop_index[:, 2:], params), (global_index[:, :num_gram], plain))
        for (rows, drawn), crops in zip(each, all_crops, strict=True):
            if not rows.size:
                continue
            part_params = drawn.take(rows.reshape(-1))
            levels = color_jittered(_resampled(images, part_params, crops.shape[-1]), part_params)
            levels.sub_(mean[:, None, None]).div_(std[:, None, None])
            crops[:, first:last] = levels.unflatten(0, (last - first, -1)).transpose(0, 1)
    global_crops, local_crops, gram_crops = (crops.flatten(0, 1) for crops in all_crops)
    return batch._replace(
        global_crops=global_crops,
        local_crops=local_crops if len(local_crops) else global_crops[:0],
        gram_crops=gram_crops if num_gram else None,
    )


def _parts(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Index of the first image of each part of the batch, and of the one after its last."""
    first = 0
    for last in range(1, len(sizes) + 1):
        if last == len(sizes) or (last + 1 - first) * sizes[first : last + 1].max() > _PART_SIDES:
            yield first, last
            first = last


def _padded(pixels: Tensor, sizes: np.ndarray, channels: int) -> Tensor:
    """Concatenated images -> (P, channels, H, W) float32, padded with zeros at the right and the bottom."""
    height, width = sizes.max(0).tolist()
    images = torch.zeros(len(sizes), channels, height, width, device=pixels.device)
    parts = pixels.split((channels * sizes.prod(1)).tolist())
    for image, part, (h, w) in zip(images, parts, sizes.tolist(), strict=True):
        image[:, :h, :w] = part.view(h, w, channels).permute(2, 0, 1)
    return images


# --- Geometry --------------------------------------------------------------------------------------------------------


def _resampled(images: Tensor, params: CropParams, side: int) -> Tensor:
    """Resample, and flip where drawn, the boxes of n/P crops of each image: (n, channels, side, side) levels.

    Two matrix products, along the rows and then the columns, each followed by rounding to 8 bits as in Pillow if images
    are RGB.
    """
    count, channels, height, width = images.shape
    edges = torch.from_numpy(np.column_stack([params.boxes, params.flip]).astype(np.float32))
    (edges,) = _move_together([edges], images.device)
    top, left, rows, columns, flip = edges.T
    across = _weights(left, columns, side, width)
    across = torch.where(flip[:, None, None] > 0, across.flip(1), across).view(count, -1, width)  # (P, n/P * side, W)
    down = _weights(top, rows, side, height)
    narrow = images.view(count, channels * height, width) @ across.mT
    narrow = _levels(narrow) if channels == 3 else narrow
    narrow = narrow.view(count, channels, height, -1, side).permute(0, 3, 1, 2, 4).reshape(-1, channels, height, side)
    resampled = down[:, None] @ narrow
    return _levels(resampled) if channels == 3 else resampled.clamp_(0, 255)


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Weights of antialiased bicubic resampling, (n,) boxes -> (n, side, size): rows sum to 1 and are 0 outside."""
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
    """One operation of the color jitter for each crop that has one in this round.

    Brightness, contrast and saturation are each a blend with `gray * gray(x) + mean * gray(mean(x))`.
    """

    blended: Tensor  # (k,) indices of the crops that are blended
    factor: Tensor  # (k, 1, 1, 1)
    gray: Tensor  # (k, 1, 1, 1)
    mean: Tensor  # (k, 1, 1, 1)
    shifted: Tensor  # (k,) indices of the crops whose hue is shifted
    centers: Tensor  # (k, 3, 1, 1)


def _color_jittered(crops: Tensor, params: CropParams) -> Tensor:
    """Apply the operations of `dinov2.data.color_ops.jitter_colors` to many crops at once, in place."""
    blurred = np.flatnonzero(params.sigma)
    weights = [blur_weights(sigma) for sigma in params.sigma[blurred].tolist()]
    chosen = [torch.from_numpy(x) for x in (np.flatnonzero(params.gray), blurred, np.flatnonzero(params.solarize))]
    rounds = [_jitter_round(operation, params.factors) for operation in params.order.T]
    tensors = [*chosen, torch.tensor(weights).view(-1, BLUR_RADIUS + 1, 1, 1, 1), *itertools.chain(*rounds)]
    gray, blurry, inverted, kernels, *of_rounds = _move_together(tensors, crops.device)
    for part in zip(*[iter(of_rounds)] * len(_JitterRound._fields), strict=True):
        _jitter(crops, _JitterRound(*part))
    _change(crops, gray, lambda some: gray_of(some).expand(-1, 3, -1, -1))
    _change(crops, blurry, lambda some: blur(some, kernels.unbind(1)))
    crops.round_()
    _change(crops, inverted, solarize)
    return crops


def _bands_jittered(crops: Tensor, params: CropParams) -> Tensor:
    """Apply the operations of `dinov2.data.color_ops.jitter_bands` to many crops at once."""
    changed, blurred = np.flatnonzero((params.factors != 1).any((1, 2))), np.flatnonzero(params.sigma)
    weights = [blur_weights(sigma) for sigma in params.sigma[blurred].tolist()]
    chosen = [torch.from_numpy(x) for x in (changed, blurred, np.flatnonzero(params.solarize))]
    factors = torch.from_numpy(params.factors[changed].astype(np.float32)).transpose(0, 1)[..., None, None].contiguous()
    first = torch.tensor([is_contrast_first(order) for order in params.order[changed].tolist()], dtype=torch.bool)
    kernels = torch.tensor(weights).view(-1, BLUR_RADIUS + 1, 1, 1, 1)
    jittered, blurry, inverted, factors, first, kernels = _move_together(
        [*chosen, factors, first.view(-1, 1, 1, 1), kernels], crops.device
    )
    _change(crops, jittered, lambda some: change_bands(some, factors, first))
    _change(crops, blurry, lambda some: blur(some, kernels.unbind(1)))
    _change(crops, inverted, solarize)
    return crops


def _jitter_round(operation: np.ndarray, factors: np.ndarray) -> _JitterRound:
    """The round with the given operation of each crop, (n,); factors (n, 4)."""
    factor = factors[np.arange(len(operation)), operation]
    takes_part = factor != np.take(NEUTRAL_FACTORS, operation)
    blended, shifted = (np.flatnonzero(takes_part & chosen) for chosen in (operation != HUE, operation == HUE))
    shares = np.stack([factor[blended], operation[blended] == SATURATION, operation[blended] == CONTRAST])
    share_of_x, share_of_gray, share_of_mean = torch.from_numpy(shares.astype(np.float32))[..., None, None, None]
    centers = torch.tensor([hue_centers(shift) for shift in factor[shifted].tolist()]).view(-1, 3, 1, 1)
    return _JitterRound(
        torch.from_numpy(blended), share_of_x, share_of_gray, share_of_mean, torch.from_numpy(shifted), centers
    )


def _jitter(crops: Tensor, part: _JitterRound) -> None:
    def blend_some(some: Tensor) -> Tensor:
        base = gray_of(some).mul_(part.gray).add_(gray_of(some.mean((2, 3), keepdim=True)).mul_(part.mean))
        return blend(some, base, part.factor)

    _change(crops, part.blended, blend_some)
    _change(crops, part.shifted, lambda some: shift_hue(some, part.centers))


def _change(crops: Tensor, which: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    if len(which):
        crops[which] = operation(crops[which])


def _move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to the device, those of one dtype in one copy; the host does not wait for it."""
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
