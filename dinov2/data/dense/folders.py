"""Your own images with maps: a folder of images, and one of class maps or depth maps with the same names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.file_list import check_folder, list_images
from dinov2.data.dense.base import IGNORED, DepthDataset, SegmentationDataset
from dinov2.data.dense.depth_lists import parse_scale
from dinov2.data.dense.label_scan import numbered_classes
from dinov2.data.dense.map_files import MAX_VALUE, ColorTable, read_colors, read_indices, to_classes
from dinov2.data.dense.pairing import Pairs, given_file, pair_by_name, read_lines
from dinov2.data.images import read_image_file

_MASK_ENDINGS = (".png", ".tif", ".tiff", ".PNG", ".TIF", ".TIFF")
_DEPTH_ENDINGS = (".png", ".npy", *_MASK_ENDINGS[1:])
_IGNORED_NAMES = ("ignored", "ignore")  # of a color of ignored pixels


class SegmentationFolder(SegmentationDataset):
    """Images in `root/images` and class masks of the same names in `root/masks`.

    With a split they are in `root/images/SPLIT` and `root/masks/SPLIT`, or in `root/SPLIT/images` and
    `root/SPLIT/masks`. Masks are PNG or TIFF files of class indices (gray or palette), or with `colors` of colors.
    Without `classes` and `colors`, all masks of all splits are read, up to 2,000, to find the largest class index.

    Args:
        root: Folder of the images and masks.
        split: Name of a subfolder, such as "val".
        classes: File with the class names, one per line in the order of their indices; relative to `root` or the
            working folder.
        colors: File with the colors of classes, a line each: `name red green blue`. Classes are in the order of the
            lines; a name may have several colors, and the name "ignored" marks ignored pixels. Found like `classes`.
        ignore: Value of ignored pixels in masks of class indices, or "none".
        first: Value of class 0 in masks of class indices, such as 1 if labels begin at 1. Smaller values are ignored.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: Folders or files are missing, a file is malformed, the classes cannot be found.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        split: str | None = None,
        classes: str | Path | None = None,
        colors: str | Path | None = None,
        ignore: int | str = 255,
        first: int | str = 0,
        **transforms: Any,
    ) -> None:
        folder, pairs = find_pairs(Path(root), split, map_name="masks", endings=_MASK_ENDINGS)
        ignored, self._first = _parse_ignore(ignore), _parse_first(first)
        self._colors: ColorTable | None = None
        palette = None
        if colors is not None:
            if self._first:
                raise ValueError(f"first={first} is for masks of class indices; with colors= give no first=")
            names, palette, self._colors = read_color_table(given_file(folder, "colors", colors))
            if classes is not None and read_lines(given_file(folder, "classes", classes)) != names:
                raise ValueError(f"{classes} and {colors} name different classes; colors= needs no classes=")
        elif classes is not None:
            names = read_lines(given_file(folder, "classes", classes))
            if len(set(names)) < len(names):
                raise ValueError(f"{classes} names a class twice: {max(names, key=names.count)}")
        else:
            masks = _masks_of_all_splits(folder, split, pairs)
            names = numbered_classes(folder, masks, ignored=ignored, first=self._first)
        values = dict.fromkeys(range(self._first), IGNORED)
        values |= {self._first + label: label for label in range(len(names))}
        values |= {} if ignored is None else {ignored: IGNORED}
        super().__init__(classes=names, values=values, palette=palette, **transforms)
        self.has_own_indices = self._colors is None
        self.split = split
        self._set_files(folder, *pairs)

    def _read_map(self, index: int) -> np.ndarray:
        data = read_image_file(self.describe_map(index), self.image_options)
        if self._colors is not None:
            return self._colors.to_classes(read_colors(data, max_pixels=self.image_options.max_pixels))
        values = read_indices(data, max_pixels=self.image_options.max_pixels)
        try:
            return to_classes(values, self._lookup)
        except ValueError as error:
            raise ValueError(f"{error}{self._advice(values)}") from error

    def _advice(self, values: np.ndarray) -> str:
        """What to do about a mask with values of no class, if that can be seen."""
        high = int(values.max())
        if high in (255, MAX_VALUE) and high >= len(self._lookup):
            return f"; if {high} marks ignored pixels, give ignore={high}"
        if self._first == 0 and values.min() > 0:
            return "; 0 does not occur: if labels begin at 1, give first=1"
        return ""


class DepthFolder(DepthDataset):
    """Images in `root/images` and depth maps of the same names in `root/depth`; splits as in `SegmentationFolder`.

    Maps are PNG or TIFF files of 16-bit integers in millimeters, or `.npy` (or TIFF) files of floats in meters; for
    other units, `scale` divides both. Depths of 0, and floats that are not finite, are pixels without a measurement.

    Args:
        root: Folder of the images and maps.
        split: Name of a subfolder, such as "val".
        scale: Values in the maps per meter; default: 1000 for integers, 1 for floats.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: Folders or files are missing, or the scale is no positive number.
    """

    def __init__(
        self, *, root: str | Path, split: str | None = None, scale: float | str | None = None, **transforms: Any
    ) -> None:
        super().__init__(scale=parse_scale(scale, 1000.0), float_scale=parse_scale(scale, 1.0), **transforms)
        folder, pairs = find_pairs(Path(root), split, map_name="depth", endings=_DEPTH_ENDINGS)
        self.split = split
        self._set_files(folder, *pairs)


def find_pairs(root: Path, split: str | None, *, map_name: str, endings: Sequence[str]) -> tuple[Path, Pairs]:
    """Find images and maps below a folder, in `images` and ``map_name``, with the split above or below these."""
    check_folder(root)
    pairs = [("images", map_name)]
    if split is not None:
        pairs = [(f"images/{split}", f"{map_name}/{split}"), (f"{split}/images", f"{split}/{map_name}")]
    found = [(images, maps) for images, maps in pairs if (root / images).is_dir() and (root / maps).is_dir()]
    if not found:
        expected = " or ".join(f"{images} and {maps}" for images, maps in pairs)
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise FileNotFoundError(f"root={root} has no folders {expected}; it has {', '.join(folders[:20]) or 'none'}")
    image_folder, map_folder = found[0]
    images = list(list_images(root / image_folder).images)
    return root, pair_by_name(root, images, image_folder=image_folder, map_folder=map_folder, endings=endings)


def read_color_table(file: Path) -> tuple[list[str], np.ndarray, ColorTable]:
    """Read the colors of classes, see `SegmentationFolder`: names, palette (C, 3) uint8, table of all colors."""
    names: list[str] = []
    palette: list[tuple[int, int, int]] = []
    labels: dict[tuple[int, int, int], int] = {}
    for line in read_lines(file):
        name, *numbers = line.rsplit(maxsplit=3)
        if len(numbers) != 3 or not all(number.isdigit() and int(number) < 256 for number in numbers):
            raise ValueError(f"{file} must have lines 'name red green blue' with numbers from 0 to 255, got {line!r}")
        red, green, blue = map(int, numbers)
        color = (red, green, blue)
        if color in labels:
            raise ValueError(f"{file} gives the color {red} {green} {blue} twice, the second time for {name}")
        if name.lower() in _IGNORED_NAMES:
            labels[color] = IGNORED
            continue
        if name not in names:
            names.append(name)
            palette.append(color)
        labels[color] = names.index(name)
    if not names:
        raise ValueError(f"{file} has no class but ignored ones")
    return names, np.array(palette, np.uint8), ColorTable.of(labels)


def _parse_ignore(ignore: int | str) -> int | None:
    if str(ignore).lower() == "none":
        return None
    if not str(ignore).isdecimal() or int(ignore) > MAX_VALUE:
        raise ValueError(f"ignore must be the value of ignored pixels in the masks, or none, got {ignore!r}")
    return int(ignore)


def _parse_first(first: int | str) -> int:
    if not str(first).isdecimal() or int(first) > MAX_VALUE:
        raise ValueError(f"first must be the value of class 0 in the masks, 0 or more, got {first!r}")
    return int(first)


def _masks_of_all_splits(root: Path, split: str | None, pairs: Pairs) -> list[str]:
    """Masks of this split and of the others, relative to the root, so that all splits have the same classes."""
    if split is None:
        return pairs.maps
    is_above = pairs.maps[0].startswith(f"{split}{os.sep}")  # root/SPLIT/masks
    folders = root.glob("*/masks") if is_above else (root / "masks").glob("*")
    files = [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    masks = sorted(str(path.relative_to(root)) for path in files if path.name.endswith(_MASK_ENDINGS))
    return masks or pairs.maps
