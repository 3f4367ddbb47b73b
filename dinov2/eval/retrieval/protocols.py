"""How images are prepared for retrieval.

DINOv2's paper does not state the size of its images. DINOv3's (appendix D.8) resizes the longer side to 224 pixels and
takes a full center crop of 224 x 224, in which the rest is black.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2.data.images import AnyImage
from dinov2.data.transforms import ToNormalizedTensor, make_classification_eval_transform
from dinov2.flags.evaluation import PUBLISHED_CROP_SIZE, SMALLEST_PUBLISHED_SIZE

_NOTES = {
    "dinov2": "DINOv2's image size is not published; images are prepared as by DINOv3",
    "dinov3": "as DINOv3's appendix D.8 at 224 pixels",
    "short_side": "as in image classification",
}


class Preparation(NamedTuple):
    """A protocol at an image size."""

    protocol: str
    image_size: int  # side of the square that the network gets, in pixels

    def description(self) -> str:
        """The steps and where they come from."""
        side = self.image_size
        steps = f"shorter side to {side * 8 // 7}" if self.protocol == "short_side" else f"longer side to {side}"
        return f"{steps} pixels, center crop of {side} x {side} ({_NOTES[self.protocol]})"

    def transform(self, mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Tensor]:
        """Image -> (3, side, side), normalized."""
        side = self.image_size
        if self.protocol == "short_side":
            return make_classification_eval_transform(resize_size=side * 8 // 7, crop_size=side, mean=mean, std=std)
        return LongerSideTransform(side, mean, std)


def preparation(protocol: str, image_size: int | None, trained_size: int, patch_size: int) -> Preparation:
    """The protocol at the given size, else at the published one, or `trained_size` for a model of small images.

    Raises:
        ValueError: The protocol is unknown, or the size is not a multiple of the patch size.
    """
    if protocol not in _NOTES:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(_NOTES)}")
    is_small = trained_size < SMALLEST_PUBLISHED_SIZE
    size = image_size or (trained_size if is_small else PUBLISHED_CROP_SIZE // patch_size * patch_size)
    if size % patch_size:
        raise ValueError(f"--image-size {size} is not a multiple of student.patch_size = {patch_size}")
    return Preparation(protocol, size)


class LongerSideTransform:
    """Resizes the longer side to `side` pixels, bicubic, and centers the image on a black square; then normalizes."""

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.side, self.normalize = side, ToNormalizedTensor(mean, std)

    def __call__(self, image: AnyImage) -> Tensor:
        scale = self.side / max(image.size)
        width, height = (max(round(length * scale), 1) for length in image.size)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        top, left = (self.side - height) // 2, (self.side - width) // 2
        square = np.zeros((self.side, self.side, pixels.shape[2]), pixels.dtype)
        square[top : top + height, left : left + width] = pixels
        return self.normalize(square)
