"""The multi-crop augmentation of training: one image -> two global and L local crops.

All random parameters are drawn first (`dinov2.data.crop_params`) and then applied by one of two implementations.
Legend: G, S side of a global and a local crop; L number of local crops.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.data.color_ops import SMALLEST_BLURRED, jitter_bands, jitter_colors
from dinov2.data.crop_params import NEUTRAL_FACTORS, CropParam, CropParams, CropParamSampler, possible_reduction
from dinov2.data.images import AnyImage, EncodedImage
from dinov2.data.transforms import BLUR_KERNEL, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


class MultiCrop(NamedTuple):
    """The crops of one image, float32."""

    global_crops: tuple[Tensor, Tensor]  # each (C, G, G), of C channels
    local_crops: tuple[Tensor, ...]  # L times (C, S, S)
    gram_crops: tuple[Tensor, ...] = ()  # the global crops at another size, without changed colors, if wanted


class DataAugmentationDINO:
    """Image -> MultiCrop. Each crop draws its own geometry and colors.

    The order is: resized crop (bicubic), flip, color jitter, grayscale, blur, solarize (second global crop only),
    normalization. With means of another number of channels than three, images have these bands (`BandImage`), of which
    each has a brightness and a contrast of its own; there is no saturation, hue or grayscale then.

    The blur probabilities are those in effect in the released code, which applied blur with probability 1 - p;
    the paper's are (1.0, 0.1, 0.5).

    Args:
        global_crops_scale: Range of a global crop's area, as share of the image.
        local_crops_scale: The same for local crops.
        local_crops_number: L; 0 gives no local crops.
        global_crops_size: G in pixels.
        local_crops_size: S in pixels.
        flip_probability: Probability of the horizontal flip.
        color_jitter: Strengths of brightness, contrast, saturation and hue.
        color_jitter_probability: Probability of color jitter.
        grayscale_probability: Probability of converting a crop to grayscale.
        blur_probabilities: Blur probabilities of the first global, the second global and each local crop.
        blur_sigma: Range of the blur's standard deviation in pixels.
        solarize_probability: Probability of solarizing the second global crop (inverting bright pixels).
        mean: Mean per channel, in [0, 1]; subtracted.
        std: Standard deviation per channel, in [0, 1].
        aspect_ratio: Range of width / height of a crop.
        gram_crops_size: Side of `MultiCrop.gram_crops` in pixels; 0: none.
        implementation: "tensor", or "pil", which runs every operation by torchvision on PIL images, like the released
            code, and is several times slower. Both draw the same parameters and give the same pixels up to rounding and
            the resampling kernels.

    Raises:
        ValueError: The implementation is unknown, or crops are too small to be blurred.
    """

    accepts_encoded = True  # and decodes at a smaller scale where possible, see `AugmentedDataset`

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        *,
        flip_probability: float = 0.5,
        color_jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        color_jitter_probability: float = 0.8,
        grayscale_probability: float = 0.2,
        blur_probabilities: Sequence[float] = (0.0, 0.9, 0.5),
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize_probability: float = 0.2,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        aspect_ratio: Sequence[float] = (3 / 4, 4 / 3),
        gram_crops_size: int = 0,
        implementation: str = "tensor",
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")
        blur_global_1, blur_global_2, blur_local = blur_probabilities
        blur = [blur_global_1, blur_global_2] + [blur_local] * local_crops_number
        self.global_side, self.local_side = global_crops_size, local_crops_size
        self.gram_side = gram_crops_size
        self.sides = [global_crops_size] * 2 + [local_crops_size] * local_crops_number
        for side, probability in zip(self.sides, blur, strict=True):
            if probability > 0 and side < SMALLEST_BLURRED:
                raise ValueError(f"crops of {side} pixels cannot be blurred; they need at least {SMALLEST_BLURRED}")
        self.implementation = implementation
        self.mean, self.std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))  # in levels
        if (channels := len(mean)) != 3 and implementation == "pil":
            raise ValueError(f"the implementation pil is for images of three channels, not of {channels}")
        self.sampler = CropParamSampler(
            scale=[global_crops_scale] * 2 + [local_crops_scale] * local_crops_number,
            aspect_ratio=aspect_ratio,
            flip=flip_probability,
            color_jitter=color_jitter,
            jitter=color_jitter_probability,
            gray=grayscale_probability,
            blur=blur,
            blur_sigma=blur_sigma,
            solarize=[0.0, solarize_probability] + [0.0] * local_crops_number,
            num_bands=None if channels == 3 else channels,
        )

    def __call__(self, image: AnyImage | EncodedImage) -> MultiCrop:
        """Augment an image; the seed of all its random numbers is drawn from torch's CPU generator."""
        return self.apply(*self.draw(image))

    def draw(self, image: AnyImage | EncodedImage) -> tuple[np.ndarray, CropParams]:
        """Decode an image, at a reduced scale if its crops allow it, and draw the parameters of its C crops.

        The pixels are (height, width, 3) uint8, or (height, width, bands) float32; the parameters are in pixels of that
        scale.
        """
        encoded = image if isinstance(image, EncodedImage) else EncodedImage(image)
        seed = int(torch.randint(2**63 - 1, ()))
        params = self.sampler.draw(*encoded.size, np.random.default_rng(seed))
        reduction = 1 if self.implementation == "pil" else possible_reduction(params, self._largest_sides)
        pixels = encoded.pixels(reduction)
        height, width, channels = pixels.shape
        if channels != len(self.mean):
            raise ValueError(f"an image of {channels} channels, but mean and standard deviation of {len(self.mean)}")
        return pixels, params if reduction == 1 else params.reduced(reduction, width, height)

    def apply(self, pixels: np.ndarray, params: CropParams) -> MultiCrop:
        rows = list(zip(params.rows(), self.sides, strict=True))
        if self.gram_side:
            rows += [(row, self.gram_side) for row in params.take(slice(0, 2)).without_colors().rows()]
        crops = IMPLEMENTATIONS[self.implementation](pixels, rows)
        first, second, *others = (crop[0].sub_(self.mean).div_(self.std) for crop in crops)
        num_local = len(self.sides) - 2
        return MultiCrop((first, second), tuple(others[:num_local]), tuple(others[num_local:]))

    @property
    def _largest_sides(self) -> list[int]:
        """The largest side that each box is resampled to."""
        return [max(side, self.gram_side) for side in self.sides[:2]] + self.sides[2:]


def tensor_crops(pixels: np.ndarray, crops: Iterable[tuple[CropParam, int]]) -> Iterator[Tensor]:
    """Crops (1, C, side, side) of float32 levels 0..255: resampled in 8 bits like Pillow, color-jittered in float32.

    Pixels that are float32 already are not rounded.
    """
    is_rgb = pixels.dtype == np.uint8
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for param, side in crops:
        top, left, height, width = param.box
        box = image[:, :, top : top + height, left : left + width]
        crop = interpolate(box, (side, side), mode="bicubic", antialias=True)
        crop = crop.flip(3) if param.flip else crop
        if is_rgb:
            yield jitter_colors(crop.to(torch.float32, memory_format=torch.contiguous_format), param)
        else:
            yield jitter_bands(crop.contiguous().clamp_(0, 255), param)


def pil_crops(pixels: np.ndarray, crops: Iterable[tuple[CropParam, int]]) -> Iterator[Tensor]:
    """The same crops by torchvision's operations on PIL images."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as pillow

    jitter = (pillow.adjust_brightness, pillow.adjust_contrast, pillow.adjust_saturation, pillow.adjust_hue)
    image = Image.fromarray(pixels)
    for param, side in crops:
        crop = pillow.resized_crop(image, *param.box, [side, side], InterpolationMode.BICUBIC)
        if param.flip:
            crop = pillow.hflip(crop)
        for operation in param.order:
            if param.factors[operation] != NEUTRAL_FACTORS[operation]:
                crop = jitter[operation](crop, param.factors[operation])
        if param.gray:
            crop = pillow.rgb_to_grayscale(crop, num_output_channels=3)
        if param.sigma > 0:
            crop = pillow.gaussian_blur(crop, BLUR_KERNEL, [param.sigma, param.sigma])
        if param.solarize:
            crop = pillow.solarize(crop, 128)
        yield pillow.pil_to_tensor(crop)[None].to(torch.float32, memory_format=torch.contiguous_format)


IMPLEMENTATIONS: dict[str, Callable[[np.ndarray, Iterable[tuple[CropParam, int]]], Iterator[Tensor]]] = {
    "tensor": tensor_crops,
    "pil": pil_crops,
}
