"""The multi-crop augmentation of training: one image -> two global and L local crops.

Legend: G, S side of a global and a local crop; L number of local crops.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, GaussianBlur, ToNormalizedTensor

_SOLARIZE_THRESHOLD = 128  # of 8-bit pixels


class MultiCrop(NamedTuple):
    """The crops of one image, float32."""

    global_crops: tuple[Tensor, Tensor]  # each (3, G, G)
    local_crops: tuple[Tensor, ...]  # L times (3, S, S)


class DataAugmentationDINO:
    """RGB image -> MultiCrop. Every crop draws its own geometry and colours, from torch's CPU generator.

    The order is: resized crop (bicubic), flip, colour jitter, grayscale, blur, solarize (second global crop only),
    normalisation. An operation with probability 0 is left out.

    The blur probabilities are those in effect in the released code, whose blur was applied with probability 1 - p;
    the paper's are (1.0, 0.1, 0.5).

    Args:
        global_crops_scale: range of a global crop's area, as share of the image.
        local_crops_scale: the same for local crops.
        local_crops_number: L; 0 gives no local crops.
        global_crops_size: G in pixels.
        local_crops_size: S in pixels.
        flip_probability: of the horizontal flip.
        color_jitter: strengths of brightness, contrast, saturation and hue.
        color_jitter_probability: of jittering a crop.
        grayscale_probability: of turning a crop grey.
        blur_probabilities: for the first global, the second global and each local crop.
        blur_sigma: range of the blur's standard deviation in pixels.
        solarize_probability: of inverting bright pixels in the second global crop.
        mean: subtracted per channel, in [0, 1].
        std: divided by per channel.
        aspect_ratio: range of width / height of a crop.
    """

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
    ) -> None:
        self.local_crops_number = local_crops_number
        brightness, contrast, saturation, hue = color_jitter
        sigma_min, sigma_max = blur_sigma

        def view(size: int, scale: Sequence[float], blur: float, solarize: float) -> transforms.Compose:
            crop = transforms.RandomResizedCrop(
                size, scale=tuple(scale), ratio=tuple(aspect_ratio), interpolation=InterpolationMode.BICUBIC
            )
            jitter = transforms.ColorJitter(brightness, contrast, saturation, hue)
            maybe: list[tuple[float, Callable[[Any], Any]]] = [
                (flip_probability, transforms.RandomHorizontalFlip(flip_probability)),
                (color_jitter_probability, transforms.RandomApply([jitter], color_jitter_probability)),
                (grayscale_probability, transforms.RandomGrayscale(grayscale_probability)),
                (blur, GaussianBlur(p=blur, radius_min=sigma_min, radius_max=sigma_max)),
                (solarize, transforms.RandomSolarize(_SOLARIZE_THRESHOLD, solarize)),
            ]
            kept = [operation for probability, operation in maybe if probability > 0]
            return transforms.Compose([crop, *kept, ToNormalizedTensor(mean, std)])

        blur_global_1, blur_global_2, blur_local = blur_probabilities
        self.global_view_1 = view(global_crops_size, global_crops_scale, blur_global_1, solarize=0.0)
        self.global_view_2 = view(global_crops_size, global_crops_scale, blur_global_2, solarize_probability)
        self.local_view = view(local_crops_size, local_crops_scale, blur_local, solarize=0.0)

    def __call__(self, image: Image.Image) -> MultiCrop:
        global_crops = (self.global_view_1(image), self.global_view_2(image))
        return MultiCrop(global_crops, tuple(self.local_view(image) for _ in range(self.local_crops_number)))
