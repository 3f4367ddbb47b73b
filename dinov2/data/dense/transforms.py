"""Joint transforms of an image and its map: random crops for training, resized images for testing.

All random numbers come from the generator that is passed, so a sample depends on the generator's seed alone; see
`dinov2.data.randomness`. Images are RGB, or for segmentation of any bands; their tensors are float32, normalized by
mean and standard deviation of ImageNet by default. Maps are those of `DenseDataset.get_map`: their tensors are int64
class indices (H, W), or float32 depths in meters (1, H, W).

Legend: H, W height and width of a crop or an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from dinov2.data.dense.base import IGNORED
from dinov2.data.dense.color import DepthColors, PhotometricDistortion, check_probability, check_range
from dinov2.data.dense.resampling import Window, resized_image, resized_map, size_for_short_side
from dinov2.data.images import AnyImage
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

NYU_BOX = Window(45, 43, 427, 565)
"""The part of the 480 x 640 images of NYU Depth v2 inside their white border: rows 45 to 471, columns 43 to 607."""
KITTI_SIZE = (352, 1216)
"""Height and width of the images of KITTI, cropped to their bottom rows and central columns."""


@dataclass(frozen=True, kw_only=True)
class _Normalized:
    """What all transforms have in common.

    Attributes:
        mean: Mean per channel in [0, 1], subtracted.
        std: Standard deviation per channel in [0, 1].
        antialias: Whether images are reduced with antialiasing; the published pipelines do without, see `resampling`.
    """

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    antialias: bool = False

    def _normalized(self, levels: Tensor) -> Tensor:
        """Levels (C, H, W), overwritten, -> normalized (C, H, W)."""
        mean, std = (255 * torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return levels.sub_(mean).div_(std)


@dataclass(frozen=True, kw_only=True)
class SegmentationCrops(_Normalized):
    """Random crops for training segmentation: (image, map, generator) -> tensors (3, H, W) and (H, W) int64.

    The image is resized, keeping its ratio, cropped, mirrored, its colors are distorted, and it is normalized. A crop
    larger than the image is padded at the right and the bottom: the image by 0, which is the mean color, the map by
    `IGNORED`. Defaults are the published ones; with `short_side=640, scale=(1.0, 3.0), crop_size=640` those of the
    multi-scale protocol.

    Attributes:
        short_side: Short side of the resized image in pixels at scale 1.
        scale: Range of the factor of the short side, drawn uniformly.
        long_side: Maximum long side at scale 1, multiplied by the same factor; None: no limit.
        crop_size: Height and width of the crop in pixels, or one number for both.
        max_class_share: A crop of which one class has this share of the labeled pixels, or more, is drawn again.
        crop_tries: Number of times that a crop is drawn again at most.
        flip: Probability of mirroring.
        distortion: Color distortion; None for none.
    """

    short_side: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    long_side: int | None = None
    crop_size: int | tuple[int, int] = 512
    max_class_share: float = 0.75
    crop_tries: int = 10
    flip: float = 0.5
    distortion: PhotometricDistortion | None = field(default_factory=PhotometricDistortion)

    def __post_init__(self) -> None:
        check_range("scale", self.scale)
        check_probability("flip", self.flip)
        check_probability("max_class_share", self.max_class_share)
        _check_sides("short_side", self.short_side, "long_side", self.long_side, "crop_size", *_pair(self.crop_size))
        if self.crop_tries < 0:
            raise ValueError(f"crop_tries must be at least 0, got {self.crop_tries}")

    def __call__(
        self, image: AnyImage | np.ndarray, labels: np.ndarray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        pixels = _checked_pixels(image, labels)
        size = self.draw_size((labels.shape[0], labels.shape[1]), generator)
        window = self._draw_window(labels, size, generator)
        is_mirrored = generator.random() < self.flip
        crop = resized_image(pixels, size, window, antialias=self.antialias)
        label_crop = torch.from_numpy(resized_map(labels, size, window).astype(np.int64))
        if is_mirrored:
            crop, label_crop = crop.flip(2), label_crop.flip(1)
        if self.distortion is not None:
            crop = self.distortion(crop, generator)
        border = _border(crop, _pair(self.crop_size))
        return pad(self._normalized(crop), border), pad(label_crop, border, value=IGNORED)

    def draw_size(self, size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
        """Draw the size (height, width) to which an image of ``size`` is resized."""
        factor = generator.uniform(*self.scale)
        long_side = None if self.long_side is None else max(int(self.long_side * factor), 1)
        return size_for_short_side(size, max(int(self.short_side * factor), 1), long_side=long_side)

    def _draw_window(self, labels: np.ndarray, size: tuple[int, int], generator: np.random.Generator) -> Window:
        """Draw the crop in an image resized to ``size``; the last one drawn is used if all have too much of a class."""
        window = _random_window(size, _pair(self.crop_size), generator)
        for _ in range(self.crop_tries if self.max_class_share < 1 else 0):
            if _largest_class_share(resized_map(labels, size, window)) < self.max_class_share:
                break
            window = _random_window(size, _pair(self.crop_size), generator)
        return window


@dataclass(frozen=True, kw_only=True)
class DepthCrops(_Normalized):
    """Random crops for training depth estimation: (image, map, generator) -> (3, H, W) and (1, H, W) float32.

    The order is: fixed crop, resizing, rotation, mirroring, random crop, colors, normalization. Depths are never
    interpolated; pixels that a rotation or a crop larger than the image brings in have depth 0, no measurement.
    Defaults are those of NYU Depth v2; `KITTI_CROPS` has those of KITTI.

    Attributes:
        box: Part of the image that is used; None: all of it.
        bottom: Height and width of the part at the bottom center that is used, in place of `box`.
        resize: Height and width to which it is resized, the ratio not kept; None: not resized.
        rotation: Maximum angle in degrees, drawn uniformly in both directions.
        rotation_probability: Probability of a rotation.
        flip: Probability of mirroring.
        crop_size: Height and width of the random crop in pixels.
        colors: Change of colors; None for none.
    """

    box: Window | None = NYU_BOX
    bottom: tuple[int, int] | None = None
    resize: tuple[int, int] | None = None
    rotation: float = 2.5
    rotation_probability: float = 0.5
    flip: float = 0.5
    crop_size: tuple[int, int] = (416, 544)
    colors: DepthColors | None = field(default_factory=DepthColors)

    def __post_init__(self) -> None:
        check_probability("rotation_probability", self.rotation_probability)
        check_probability("flip", self.flip)
        _check_sides("bottom", *(self.bottom or ()), "resize", *(self.resize or ()), "crop_size", *self.crop_size)
        if self.box is not None and self.bottom is not None:
            raise ValueError(f"give either box or bottom, got {self.box} and {self.bottom}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must be from 0 to 180 degrees, got {self.rotation}")

    def __call__(
        self, image: AnyImage | np.ndarray, depths: np.ndarray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        pixels = _checked_pixels(image, depths)
        chances, angle = generator.random(2), generator.uniform(-self.rotation, self.rotation)
        pixels, depths = _fixed_crop(pixels, depths, self.box, self.bottom)
        if self.resize is not None:
            levels = resized_image(pixels, self.resize, antialias=self.antialias)
            pixels, depths = levels.permute(1, 2, 0).to(torch.uint8).numpy(), resized_map(depths, self.resize)
        if chances[0] < self.rotation_probability and angle:
            pixels, depths = _rotated(pixels, depths, angle)
        top, left, height, width = _random_window(depths.shape, self.crop_size, generator)
        rows, columns = slice(top, top + height), slice(left, left + width)
        crop = torch.from_numpy(np.ascontiguousarray(pixels[rows, columns].transpose(2, 0, 1), np.float32))
        depth_crop = torch.from_numpy(depths[rows, columns].astype(np.float32))[None]
        if chances[1] < self.flip:
            crop, depth_crop = crop.flip(2), depth_crop.flip(2)
        if self.colors is not None:
            crop = self.colors(crop, generator)
        border = _border(crop, self.crop_size)
        return pad(self._normalized(crop), border), pad(depth_crop, border)


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs(_Normalized):
    """Images for testing: (image, map) -> images (3, H, W) float32, one per scale, and the map in its own size.

    The map is not resized: predictions are brought to its size. Without `short_side` and `size`, images keep their
    size at scale 1.

    Attributes:
        short_side: Short side of the resized image at scale 1, the ratio kept.
        long_side: Maximum long side at scale 1; None: no limit.
        size: Height and width of the resized image at scale 1, the ratio not kept, in place of `short_side`.
        bottom: Height and width of the part at the bottom center to which image and map are cropped first (KITTI:
            `KITTI_SIZE`); None: nothing is cropped.
        scales: Factors of the size, an image for each.
    """

    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None
    bottom: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        _check_sides("short_side", self.short_side, "long_side", self.long_side)
        _check_sides("size", *(self.size or ()), "bottom", *(self.bottom or ()))
        if self.size is not None and (self.short_side is not None or self.long_side is not None):
            raise ValueError(f"give either size or short_side, got {self.size}, {self.short_side}, {self.long_side}")
        if self.long_side is not None and self.short_side is None:
            raise ValueError(f"long_side={self.long_side} needs a short_side")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be positive numbers, got {self.scales}")

    def __call__(self, image: AnyImage | np.ndarray, labels: np.ndarray) -> tuple[tuple[Tensor, ...], Tensor]:
        pixels, labels = _fixed_crop(_checked_pixels(image, labels), labels, None, self.bottom)
        sizes = [self.size_at(scale, (labels.shape[0], labels.shape[1])) for scale in self.scales]
        images = tuple(self._normalized(resized_image(pixels, size, antialias=self.antialias)) for size in sizes)
        return images, map_tensor(labels)

    def size_at(self, scale: float, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an image of ``size`` at a scale."""
        if self.short_side is not None:
            long_side = None if self.long_side is None else max(int(self.long_side * scale), 1)
            return size_for_short_side(size, max(int(self.short_side * scale), 1), long_side=long_side)
        height, width = (max(int(side * scale + 0.5), 1) for side in self.size or size)
        return height, width


def map_tensor(values: np.ndarray) -> Tensor:
    """A map of integers as (H, W) int64, one of depths as (1, H, W) float32."""
    if values.dtype.kind in "iu":
        return torch.from_numpy(values.astype(np.int64))
    return torch.from_numpy(values.astype(np.float32))[None]


def _check_sides(*names_and_sides: str | int | None) -> None:
    """Raise a ValueError for a side that is not positive; each number belongs to the name before it."""
    name = ""
    for item in names_and_sides:
        if isinstance(item, str):
            name = item
        elif item is not None and item < 1:
            raise ValueError(f"{name} must be at least 1 pixel, got {item}")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _checked_pixels(image: AnyImage | np.ndarray, values: np.ndarray) -> np.ndarray:
    """The pixels of an image, (H, W, 3) uint8 or levels of bands (H, W, C) float32; ValueError for others.

    Or if it differs in size from its map.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or (pixels.shape[2] == 3) != (pixels.dtype == np.uint8):
        raise ValueError(
            "the image must be RGB, (H, W, 3) uint8, or have other bands, float32, "
            f"got {pixels.dtype} of shape {pixels.shape}"
        )
    if values.shape != pixels.shape[:2]:
        raise ValueError(f"the image has {pixels.shape[:2]} pixels (height, width), but its map {values.shape}")
    return pixels


def _random_window(size: Sequence[int], crop_size: tuple[int, int], generator: np.random.Generator) -> Window:
    """Draw the position of a crop in an image; where the image is smaller, the crop is as large as the image."""
    height, width = (min(side, crop) for side, crop in zip(size, crop_size, strict=True))
    top, left = generator.integers(0, (size[0] - height + 1, size[1] - width + 1)).tolist()
    return Window(top, left, height, width)


def _largest_class_share(labels: np.ndarray) -> float:
    """Share of the most frequent class among the labeled pixels; 1 without any."""
    counts = np.bincount(labels.reshape(-1) - IGNORED)[1:]  # of IGNORED, class 0, class 1, ...
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def _border(crop: Tensor, crop_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels missing at the left, right, top and bottom of a crop (C, H, W), as for `torch.nn.functional.pad`."""
    return 0, crop_size[1] - crop.shape[2], 0, crop_size[0] - crop.shape[1]


def _fixed_crop(
    pixels: np.ndarray, values: np.ndarray, box: Window | None, bottom: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    height, width = values.shape
    if bottom is not None:
        box = Window(height - bottom[0], (width - bottom[1]) // 2, *bottom)
    if box is None:
        return pixels, values
    if min(box.top, box.left) < 0 or box.top + box.height > height or box.left + box.width > width:
        what = f"rows from {box.top}, columns from {box.left}, {box.height} x {box.width} pixels"
        raise ValueError(f"an image of {height} x {width} pixels (height x width) does not contain the crop: {what}")
    rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    return pixels[rows, columns], values[rows, columns]


def _rotated(pixels: np.ndarray, depths: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotate about the center by an angle in degrees, counterclockwise: the image bilinearly, depths nearest."""
    image = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR)
    rotated = Image.fromarray(depths.astype(np.float32)).rotate(angle, Image.Resampling.NEAREST)
    return np.array(image), np.array(rotated)


NYU_CROPS = DepthCrops()
"""The crops of NYU Depth v2."""
KITTI_CROPS = DepthCrops(box=None, bottom=KITTI_SIZE, crop_size=(352, 704), colors=DepthColors(brightness=(0.9, 1.1)))
"""The crops of KITTI."""
