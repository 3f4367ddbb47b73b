"""Preprocessing of images: the crop of the evaluations, or whole images of any size.

Shapes: tensors are float32 (3, H, W), normalized; h x w patches of an image.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from dinov2.data.transforms import ToNormalizedTensor, make_classification_eval_transform
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.setup import resize_and_crop_size

logger = logging.getLogger(__name__)


class Preprocessing(NamedTuple):
    """How an image becomes the input of the model."""

    transform: Callable[[Any], Tensor]  # image -> (3, H, W)
    facts: dict[str, Any]  # description as JSON
    grid: tuple[int, int] | None  # (h, w) of all images; None if it depends on the image


class WholeImage:
    """Resizes an image without cropping, and normalizes it; both sides become multiples of the patch size.

    Args:
        backbone: Its patch size, mean and standard deviation are used.
        shorter_side: In pixels, before rounding; None keeps the size of the image.
    """

    def __init__(self, backbone: FrozenBackbone, shorter_side: int | None) -> None:
        self.patch_size, self.shorter_side = backbone.model.patch_size, shorter_side
        self.to_tensor = ToNormalizedTensor(backbone.mean, backbone.std)

    def __call__(self, image: Image.Image) -> Tensor:
        size = input_size(image.size, self.shorter_side, self.patch_size)
        resized = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
        return self.to_tensor(resized)


def check_sizes(size: int | str | None, resize_size: int | None, crop_size: int | None) -> None:
    """Raise a `ValueError` if the sizes of whole images and of crops are both given, or `size` is neither kind."""
    if isinstance(size, str) and size != "original":
        raise ValueError(f"unknown --size {size!r}; known: a number of pixels, original")
    crops = {"--resize-size": resize_size, "--crop-size": crop_size}
    if given := [f"{flag} {value}" for flag, value in crops.items() if value is not None and size is not None]:
        raise ValueError(f"--size {size} is for whole images, {' and '.join(given)} for crops: give one of them")
    for flag, value in {"--size": size, **crops}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{flag} {value} must be at least 1 pixel")


def make_preprocessing(
    backbone: FrozenBackbone,
    *,
    size: int | str | None = None,
    resize_size: int | None = None,
    crop_size: int | None = None,
) -> Preprocessing:
    """Build the preprocessing of whole images if `size` is given, else that of the evaluations.

    Args:
        backbone: The model.
        size: Shorter side in pixels, or "original" for the size of each image; both sides are rounded to multiples of
            the patch size.
        resize_size: Shorter side in pixels before cropping; None: as in the k-NN evaluation.
        crop_size: Side of the center crop in pixels; None: as in the k-NN evaluation.
    """
    check_sizes(size, resize_size, crop_size)
    patch_size = backbone.model.patch_size
    facts: dict[str, Any] = {"interpolation": "bicubic", "mean": list(backbone.mean), "std": list(backbone.std)}
    if size is not None:
        logger.info("images: whole, shorter side %s, both sides rounded to multiples of %d pixels", size, patch_size)
        shorter_side = None if isinstance(size, str) else size
        return Preprocessing(WholeImage(backbone, shorter_side), {"size": size, **facts}, None)
    resize, crop = resize_and_crop_size(resize_size, crop_size, backbone.shorter_side, patch_size)
    logger.info("images: shorter side to %d pixels, center crop of %d x %d", resize, crop, crop)
    transform = make_classification_eval_transform(
        resize_size=resize, crop_size=crop, mean=backbone.mean, std=backbone.std
    )
    facts = {"resize_size": resize, "crop_size": crop, **facts}
    return Preprocessing(transform, facts, (crop // patch_size, crop // patch_size))


def no_preprocessing(backbone: FrozenBackbone, images: Tensor) -> Preprocessing:
    """Images (n, 3, H, W) that are the input of the model as they are; a `ValueError` if their size is unsuitable."""
    height, width = images.shape[-2:]
    patch_size = backbone.model.patch_size
    if height % patch_size or width % patch_size or 0 in images.shape:
        raise ValueError(
            f"a tensor of {len(images)} images of {height} x {width} pixels: there must be some, and their sides "
            f"must be multiples of the patch size {patch_size}"
        )
    return Preprocessing(_as_it_is, {"size": "tensors as given"}, (height // patch_size, width // patch_size))


def _as_it_is(image: Tensor) -> Tensor:
    return image.float()


def input_size(size: tuple[int, int], shorter_side: int | None, patch_size: int) -> tuple[int, int]:
    """Size (width, height) of the model input for an image of a size: multiples of the patch size, at least one patch.

    Args:
        size: (width, height) in pixels.
        shorter_side: Of the input in pixels, before rounding; None keeps the size of the image.
        patch_size: In pixels.
    """
    scale = 1.0 if shorter_side is None else shorter_side / min(size)
    width, height = (max(round(side * scale / patch_size), 1) * patch_size for side in size)
    return width, height
