"""Scenes of one to three items of Fashion-MNIST, with a class and a depth for every pixel; needs no files."""

from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dinov2.data.datasets.fashion_mnist import FashionMNIST, FashionMNISTSplit
from dinov2.data.dense.base import DEPTH, SEGMENTATION, DenseDataset
from dinov2.data.dense.palettes import distinct_palette
from dinov2.data.images import EncodedImage, encode_png
from dinov2.data.randomness import seed_for

BACKGROUND_DEPTH = 4.0  # meters
MAX_ITEMS = 3
_SINGLE_SHARES, _SEVERAL_SHARES = (0.75, 1.0), (0.4, 0.65)  # side of an item / side of the scene
_MAX_ANGLE = 12.0  # degrees
_TINTS = (0.4, 1.0)  # range of the factors of red, green and blue
_DARKEST = np.float32(0.25)  # level of a black pixel of an item, as a share of its tint
_CONTRAST = (1 - _DARKEST) / np.float32(255)  # difference of the shares of adjacent levels
_PHOTO_SIDE = 28  # pixels
_OPAQUE = 24  # gray level of a photo from which on a pixel belongs to the item; its background is black
_NUMBERS_OF_ITEM, _NUMBERS_OF_SCENE = 9, 8  # random numbers


class Background(Enum):
    """The background of the scenes."""

    GRADIENT = "gradient"  # of two colors, in any direction
    PLAIN = "plain"  # one color
    BLACK = "black"


class _Items(NamedTuple):
    """The items of all scenes, from far to near; those beyond the number of a scene are not drawn."""

    photo: np.ndarray  # (N, MAX_ITEMS) int64
    share: np.ndarray  # (N, MAX_ITEMS): side of the item / side of the scene
    tint: np.ndarray  # (N, MAX_ITEMS, 3) float32 levels
    matrix: np.ndarray  # (N, MAX_ITEMS, 6): scene, of side 1, -> pixels of the photo, as for `Image.transform`


class FashionScenes(DenseDataset):
    """Scenes made on the fly of the images of Fashion-MNIST in the package: tinted items on a background.

    A scene has one item, of 75 to 100 % of its size, or two or three of 40 to 65 %; each turned by up to 12 degrees and
    perhaps mirrored. An item is as far away as it is small: its depth in meters is the side of the scene divided by
    that of the item, 1 to 2.5, and nearer items cover farther ones. The background is 4 m away. The label of an image
    is the class of its nearest, which is its largest, item. TRAIN and VAL have different photos.

    A scene depends on (seed, split, index) alone, not on the number of scenes; its size only changes its resolution
    (and which noise it has).

    Args:
        split: A `FashionMNIST.Split`.
        size: Height and width of the scenes in pixels.
        background: "gradient", "plain" or "black".
        noise: Standard deviation of Gaussian noise on every pixel and color, as a share of the range of levels.
        length: Number of scenes; default: 10,000 for TRAIN, 2,000 for VAL.
        kind: Whether maps are of classes ("segmentation") or of depths ("depth").
        seed: Seed of the scenes.
        items: Maximum number of items in a scene, 1 to 3.
        transforms, transform, target_transform: See `ImageDataset`.

    Attributes:
        classes: "background" and the ten classes of Fashion-MNIST; labels are from 1 to 10.
    """

    Split = FashionMNISTSplit
    classes = ("background", *FashionMNIST.classes)

    def __init__(
        self,
        *,
        split: FashionMNISTSplit,
        size: int | str = _PHOTO_SIDE,
        background: str = Background.GRADIENT.value,
        noise: float | str = 0.0,
        length: int | str | None = None,
        kind: str = SEGMENTATION,
        seed: int | str = 0,
        items: int | str = MAX_ITEMS,
        **transforms: Any,
    ) -> None:
        super().__init__(**transforms)
        if kind not in (SEGMENTATION, DEPTH):
            raise ValueError(f"kind must be {SEGMENTATION} or {DEPTH}, got {kind!r}")
        backgrounds = [each.value for each in Background]
        if background not in backgrounds:
            raise ValueError(f"background must be {', '.join(backgrounds)}, got {background!r}")
        photos = FashionMNIST(split=split)
        self.split, self.kind, self.root = split, kind, Path()
        self.size = _number("size", size, at_least=8)
        self.noise = _noise(noise)
        count = _number("length", len(photos) if length is None else length, at_least=1)
        self.seed = _number("seed", seed, at_least=0)
        max_items = _number("items", items, at_least=1, at_most=MAX_ITEMS)
        self.palette = np.vstack([np.zeros((1, 3), np.uint8), distinct_palette(len(FashionMNIST.classes))])
        self._layers = _with_silhouettes(photos._images)
        targets = photos.get_targets()
        assert targets is not None, "Fashion-MNIST has labels"
        self._labels = targets + 1
        self._units = np.array([1 / self.size, 1 / self.size, 1] * 2)
        self._along = np.linspace(-0.5, 0.5, self.size, dtype=np.float32)
        # One row of numbers per scene: the first scenes do not depend on how many there are.
        rng = np.random.default_rng(seed_for(self.seed, f"fashion scenes {split.name}"))
        numbers = rng.random((count, _NUMBERS_OF_SCENE + MAX_ITEMS * _NUMBERS_OF_ITEM))
        self._num_items = 1 + (numbers[:, 0] * max_items).astype(np.int64)
        self._items = _draw_items(numbers[:, _NUMBERS_OF_SCENE:], self._num_items, len(photos))
        self._backdrops = _draw_backdrops(numbers[:, 1:_NUMBERS_OF_SCENE], Background(background))
        nearest = self._items.photo[np.arange(count), self._num_items - 1]
        self._targets = self._labels[nearest]

    def __len__(self) -> int:
        return len(self._num_items)

    def describe(self, index: int) -> str:
        return f"FashionScenes {self.split.name} scene {index}"

    def describe_map(self, index: int) -> str:
        return f"{self.describe(index)}, map of {self.kind}"

    def fingerprint(self) -> str:
        colors = self._backdrops[0].tolist()  # they differ by the background
        purpose = f"{self.split.name} {self.size} {colors}" + (f" noise {self.noise}" if self.noise else "")
        return f"{seed_for(self.seed, purpose, len(self), int(self._num_items.sum())):016x}"

    def get_image_data(self, index: int) -> bytes:
        """Returns a PNG file of a scene."""
        return encode_png(self.get_scene(index)[0])

    def open_image(self, index: int) -> EncodedImage:
        return EncodedImage(Image.fromarray(self.get_scene(index)[0]))

    def get_scene(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a scene: pixels (size, size, 3) uint8, class indices (size, size) int16, depths (size, size) float32."""
        side, items = self.size, self._items
        pixels = self._backdrop(index)
        labels, depths = np.zeros((side, side), np.int16), np.full((side, side), BACKGROUND_DEPTH, np.float32)
        for position in range(self._num_items[index]):
            photo, matrix = items.photo[index, position], items.matrix[index, position]
            image = Image.fromarray(self._layers[photo])
            item = image.transform(
                (side, side), Image.Transform.AFFINE, (matrix * self._units).tolist(), Image.Resampling.BILINEAR
            )
            layers = np.asarray(item)
            inside = layers[..., 1] >= 128
            pixels[inside] = (layers[..., 0][inside] * _CONTRAST + _DARKEST)[:, None] * items.tint[index, position]
            labels[inside], depths[inside] = self._labels[photo], 1 / items.share[index, position]
        if self.noise:
            rng = np.random.default_rng(seed_for(self.seed, f"noise of fashion scenes {self.split.name}", index))
            pixels += np.float32(255 * self.noise) * rng.standard_normal(pixels.shape, np.float32)
        return (pixels.clip(0, 255) + 0.5).astype(np.uint8), labels, depths

    def _backdrop(self, index: int) -> np.ndarray:
        """The background of a scene, (size, size, 3) float32 levels."""
        first, second, (cos, sin, _) = self._backdrops[index]
        weight = 0.5 + (cos * self._along + sin * self._along[:, None])
        return weight[..., None] * (second - first) + first

    def _read_map(self, index: int) -> np.ndarray:
        _, labels, depths = self.get_scene(index)
        return labels if self.kind == SEGMENTATION else depths


def _number(name: str, value: int | str, *, at_least: int, at_most: int | None = None) -> int:
    try:
        number = int(value)
    except ValueError:
        number = at_least - 1
    if number < at_least or (at_most is not None and number > at_most):
        allowed = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")
    return number


def _noise(noise: float | str) -> float:
    try:
        value = float(noise)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"noise must be a number from 0 to 1, got {noise!r}")
    return value


def _with_silhouettes(photos: np.ndarray) -> np.ndarray:
    """Photos (N, 28, 28) uint8 -> (N, 28, 28, 3) uint8: gray level, opacity (0 or 255), and 0.

    The item is what is brighter than the background, and what lies between such pixels both in its row and its column.
    """
    bright = photos >= _OPAQUE
    inside = np.ones_like(bright)
    for axis in (1, 2):
        inside &= np.maximum.accumulate(bright, axis)
        inside &= np.flip(np.maximum.accumulate(np.flip(bright, axis), axis), axis)
    return np.stack([photos, np.uint8(255) * inside, np.zeros_like(photos)], 3)


def _draw_backdrops(numbers: np.ndarray, background: Background) -> np.ndarray:
    """Two colors, in levels, and the direction of the gradient, (N, 3, 3) float32, from (N, 7) numbers in [0, 1)."""
    angle = 2 * np.pi * numbers[:, 6]
    direction = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], 1) / np.sqrt(2)
    first, second = 255 * numbers[:, :3], 255 * numbers[:, 3:6]
    if background is not Background.GRADIENT:
        second = first = first * (background is Background.PLAIN)
    return np.stack([first, second, direction], 1).astype(np.float32)


def _draw_items(numbers: np.ndarray, num_items: np.ndarray, num_photos: int) -> _Items:
    """Items from numbers in [0, 1), (N, MAX_ITEMS * _NUMBERS_OF_ITEM), and the number of items in each scene, (N,)."""
    numbers = numbers.reshape(len(numbers), MAX_ITEMS, _NUMBERS_OF_ITEM)
    is_single = (num_items == 1)[:, None]
    low, high = (np.where(is_single, *ends) for ends in zip(_SINGLE_SHARES, _SEVERAL_SHARES, strict=True))
    share = low + (high - low) * numbers[..., 0]
    # Far, and so small, items come first; those that a scene does not have come last.
    order = np.where(np.arange(MAX_ITEMS) < num_items[:, None], share, 2.0).argsort(1)
    numbers, share = np.take_along_axis(numbers, order[..., None], 1), np.take_along_axis(share, order, 1)
    x, y = np.moveaxis(share[..., None] / 2 + (1 - share[..., None]) * numbers[..., 2:4], 2, 0)  # of the center
    # A rotation about the center of the item, then mirroring.
    angle = np.radians(_MAX_ANGLE) * (2 * numbers[..., 4] - 1)
    cos, sin = _PHOTO_SIDE / share * np.stack([np.cos(angle), np.sin(angle)])
    sign, middle = np.where(numbers[..., 5] < 0.5, -1, 1), _PHOTO_SIDE / 2
    across = (sign * cos, sign * sin, middle - sign * (cos * x + sin * y))
    return _Items(
        photo=(numbers[..., 1] * num_photos).astype(np.int64),
        share=share,
        tint=(255 * (_TINTS[0] + (_TINTS[1] - _TINTS[0]) * numbers[..., 6:9])).astype(np.float32),
        matrix=np.stack([*across, -sin, cos, middle - (cos * y - sin * x)], 2),
    )
