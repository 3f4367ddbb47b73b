"""Datasets of images with a map each: a class index or a depth for every pixel.

Legend: H, W height and width of an image; C number of classes.
"""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.datasets.base import ImageDataset, ListedDataset
from dinov2.data.datasets.file_list import PathTable
from dinov2.data.dense.map_files import BadMapError, label_lookup, read_depths, read_indices, to_classes
from dinov2.data.dense.pairing import named
from dinov2.data.dense.palettes import distinct_palette
from dinov2.data.images import AnyImage, EncodedImage, read_image_file

IGNORED = -1
"""Class index of pixels that are neither trained on nor counted; files usually have 255."""

SEGMENTATION, DEPTH = "segmentation", "depth"

# Maps are suspicious:
_FEW_CLASSES = 30  # if one of so many classes, or fewer, is missing; of more classes, some are rare
_MANY_IGNORED = 0.05  # if more pixels than this share are ignored, and all others have the same class
_FAR, _NEAR = 1000.0, 0.1  # if the largest depth, in meters, is outside this range


class DenseDataset(ListedDataset):
    """Images as in all datasets of this package, and a map of each.

    Images have no labels of their own (`get_targets()` is None), so the same dataset string also serves training,
    extraction of features and visualization. To add a dataset, derive from `SegmentationDataset` or `DepthDataset`,
    call `_set_files` in the constructor, and register it in `dinov2.data.datasets.DATASETS`.

    Attributes:
        kind: "segmentation" or "depth".
        classes: Class names in the order of their indices; empty for depth.
        palette: (C, 3) uint8, the colors of the classes.
        has_own_indices: Whether maps are files of class indices of unknown origin, which may begin at 1, for example.
    """

    kind: str
    has_own_indices = False
    palette: np.ndarray
    classes: Sequence[str] = ()
    _maps: Any  # PathTable, relative to `root`
    _targets: np.ndarray | None = None
    _file_notes: Sequence[str] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def describe_map(self, index: int) -> str:
        """The path of the map of sample `index`, for messages."""
        return os.path.join(self.root, self._maps[index])

    def get_map(self, index: int) -> np.ndarray:
        """Read the map of a sample.

        Returns:
            Segmentation: (H, W) int16 class indices, `IGNORED` where a pixel has none.
            Depth: (H, W) float32 meters, 0 where there is no measurement.

        Raises:
            BadMapError: The map is missing, unreadable or has invalid values; names the sample, the file, the problem.
        """
        with self._naming_map(index):
            return self._read_map(index)

    def get_sample(self, index: int) -> tuple[AnyImage, np.ndarray]:
        """Read the image of a sample, RGB, and its map, which have the same size.

        Raises:
            BadImageError, BadMapError: One of them cannot be read, or their sizes differ.
        """
        image, labels = self.get_image(index), self.get_map(index)
        self._check_size(index, image.size, labels)
        return image, labels

    def fingerprint(self) -> str:
        return self._images.fingerprint()

    def notes_on_files(self) -> list[str]:
        return list(self._file_notes)

    @abstractmethod
    def _read_map(self, index: int) -> np.ndarray:
        """`get_map`, with errors of any type."""

    def _set_files(self, root: Path, images: Sequence[str], maps: Sequence[str], notes: Sequence[str] = ()) -> None:
        """Store the paths of images and maps, relative to a folder, and messages about other files."""
        self.root, self._file_notes = root, notes
        self._images, self._maps = PathTable.of(images), PathTable.of(maps)

    def _check_size(self, index: int, size: tuple[int, int], labels: np.ndarray) -> None:
        height, width = labels.shape
        if size == (width, height):
            return
        hint = ""
        if size == (height, width):
            hint = "; images are turned upright as their EXIF orientation demands, maps are read as they are stored"
        raise BadMapError(
            f"image {self.describe(index)} has {size[0]} x {size[1]} pixels (width x height), but its map "
            f"{self.describe_map(index)} has {width} x {height}{hint}",
            path=self.describe_map(index),
        )

    @contextmanager
    def _naming_map(self, index: int) -> Iterator[None]:
        """Turn any error into a BadMapError that names the sample."""
        path = self.describe_map(index)
        try:
            yield
        except Exception as error:  # damaged files make Pillow raise errors of any type
            reason = f"there is no {path}" if isinstance(error, FileNotFoundError) else error
            raise BadMapError(f"cannot read the map of sample {index} ({path}): {reason}", path=path) from error


class SegmentationDataset(DenseDataset):
    """Images with maps of class indices, in files of one integer per pixel (gray or palette).

    Args:
        classes: Class names in the order of their indices.
        values: Value in the files -> class index or `IGNORED`; others are errors.
        palette: (C, 3) uint8; default: distinct colors.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    kind = SEGMENTATION

    def __init__(
        self, *, classes: Sequence[str], values: Mapping[int, int], palette: np.ndarray | None = None, **transforms: Any
    ) -> None:
        super().__init__(**transforms)
        self.classes = tuple(classes)
        self.palette = distinct_palette(len(self.classes)) if palette is None else palette
        self._lookup = label_lookup(values)

    def _read_map(self, index: int) -> np.ndarray:
        data = read_image_file(self.describe_map(index), self.image_options)
        return to_classes(read_indices(data, max_pixels=self.image_options.max_pixels), self._lookup)


class DepthDataset(DenseDataset):
    """Images with maps of depths.

    Args:
        scale: Integers in files are divided by it to give meters.
        float_scale: Floats in files are divided by it to give meters.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    kind = DEPTH
    palette = np.empty((0, 3), np.uint8)

    def __init__(self, *, scale: float, float_scale: float = 1.0, **transforms: Any) -> None:
        super().__init__(**transforms)
        self.scale, self.float_scale = scale, float_scale

    def _read_map(self, index: int) -> np.ndarray:
        data = read_image_file(self.describe_map(index), self.image_options)
        limit = self.image_options.max_pixels
        return read_depths(data, scale=self.scale, float_scale=self.float_scale, max_pixels=limit)


class DenseSubset(DenseDataset):
    """Some samples of a dataset, in the order of the given indices."""

    def __init__(self, dataset: DenseDataset, indices: Sequence[int] | np.ndarray) -> None:
        super().__init__(transform=dataset.transform)
        self.whole, self.indices = dataset, [int(index) for index in indices]
        self.kind, self.classes, self.palette = dataset.kind, dataset.classes, dataset.palette
        self.has_own_indices, self.image_options = dataset.has_own_indices, dataset.image_options

    def __len__(self) -> int:
        return len(self.indices)

    def describe(self, index: int) -> str:
        return self.whole.describe(self.indices[index])

    def describe_map(self, index: int) -> str:
        return self.whole.describe_map(self.indices[index])

    def open_image(self, index: int) -> EncodedImage:
        return self.whole.open_image(self.indices[index])

    def get_image_data(self, index: int) -> bytes:
        return self.whole.get_image_data(self.indices[index])

    def fingerprint(self) -> str:
        return ImageDataset.fingerprint(self)

    def _read_map(self, index: int) -> np.ndarray:
        return self.whole._read_map(self.indices[index])


class MapSummary(NamedTuple):
    """What `check_maps` found in some maps of a dataset."""

    num_checked: int
    num_pixels: int
    num_valid: int  # pixels with a class or a depth
    class_counts: np.ndarray  # (C,) int64: pixels of each class; empty for depth
    depth_range: tuple[float, float] | None  # smallest and largest depth in meters
    classes: Sequence[str] = ()  # names, (C,)
    has_own_indices: bool = False  # of the dataset

    def describe(self) -> str:
        """One line of text for the log."""
        share = 100 * self.num_valid / max(self.num_pixels, 1)
        if self.depth_range is not None:
            what = (
                f"depths from {self.depth_range[0]:.3g} to {self.depth_range[1]:.3g} m at {share:.1f} % of the pixels"
            )
        else:
            found = int((self.class_counts > 0).sum())
            what = f"{found} of {len(self.class_counts)} classes, {share:.1f} % of the pixels labeled"
        return f"{self.num_checked:,} maps checked: {what}"

    def warnings(self) -> list[str]:
        """What is suspicious about valid maps, a line of text each, to be logged as warnings."""
        if self.depth_range is not None:
            return self._depth_warnings(self.depth_range[1])
        warnings = []
        found = np.flatnonzero(self.class_counts)
        absent = [name for name, count in zip(self.classes, self.class_counts, strict=True) if not count]
        if absent and (len(self.classes) <= _FEW_CLASSES or not self.class_counts[0]):
            begins_at_1 = self.has_own_indices and not self.class_counts[0] and self.class_counts[-1]
            hint = "; if labels begin at 1, give first=1" if begins_at_1 else ""
            number = f"{len(absent)} of {len(self.classes)} classes have no pixel in {self.num_checked:,} maps"
            warnings.append(f"{number}: {named(absent)}{hint}")
        ignored = 1 - self.num_valid / max(self.num_pixels, 1)
        if self.has_own_indices and len(found) == 1 and ignored > _MANY_IGNORED:
            only = f"{ignored:.1%} of the pixels are ignored, and all others have one class, {self.classes[found[0]]}"
            warnings.append(f"{only}: if the masks have values such as 0 and 255, colors=FILE makes both classes")
        return warnings

    @staticmethod
    def _depth_warnings(largest: float) -> list[str]:
        if largest > _FAR:
            what = "perhaps they are millimeters, or large values mark pixels without a measurement"
        elif largest < _NEAR:
            what = "perhaps they are divided by a wrong scale"
        else:
            return []
        return [f"the largest depth is {largest:.3g} m: {what}; scale= gives the values in the files per meter"]


def check_maps(dataset: DenseDataset, *, limit: int = 100) -> MapSummary:
    """Read some maps, evenly spaced, so that wrong files are an error before hours of work.

    Args:
        dataset: The dataset.
        limit: Maximum number of maps that are read; of their images only the headers are.

    Raises:
        BadMapError, BadImageError: A map or image cannot be read, or their sizes differ.
        ValueError: No pixel of all these maps has a class or a depth.
    """
    count = min(limit, len(dataset))
    num_pixels = num_valid = 0
    class_counts = np.zeros(dataset.num_classes, np.int64)
    low, high = np.inf, 0.0
    for index in (position * len(dataset) // count for position in range(count)):
        values = dataset.get_map(index)
        dataset._check_size(index, dataset.open_image(index).size, values)
        num_pixels += values.size
        if dataset.kind == SEGMENTATION:
            class_counts += np.bincount(values[values != IGNORED], minlength=dataset.num_classes)
        else:
            measured = values[values > 0]
            num_valid += measured.size
            low, high = min(low, measured.min(initial=np.inf)), max(high, measured.max(initial=0))
    num_valid += int(class_counts.sum())
    if not num_valid:
        where = f"in {count:,} maps of {len(dataset):,}, such as {dataset.describe_map(0)}" if count else "without maps"
        raise ValueError(f"no pixel has a {'class' if dataset.kind == SEGMENTATION else 'depth'} {where}")
    depth_range = (float(low), float(high)) if dataset.kind == DEPTH else None
    return MapSummary(
        count, num_pixels, num_valid, class_counts, depth_range, tuple(dataset.classes), dataset.has_own_indices
    )
