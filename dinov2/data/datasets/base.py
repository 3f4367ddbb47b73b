"""The base classes of image datasets."""

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dinov2.data.datasets.file_list import PathTable
from dinov2.data.images import (
    DEFAULT_OPTIONS,
    AnyImage,
    BadImageError,
    EncodedImage,
    ImageOptions,
    encode_png,
    open_image,
    read_image_file,
)
from dinov2.data.images.survey import ImageSurvey, survey_images

logger = logging.getLogger(__name__)


class DataSourceError(Exception):
    """What images are read from fails as a whole, unlike one unreadable image: it ends a run."""

    caused_by_user = True  # to `dinov2.log.run_command`


class ChangedDataError(DataSourceError):
    """Files of a dataset are no longer those that it found: its samples may be others."""


NAMES_HASHED = 10_000  # by `ImageDataset.fingerprint`, at most


def label_table(lists: Sequence[Sequence[int]], width: int | None = None) -> np.ndarray:
    """Pad lists of class indices with -1: table (len(lists), width or the maximum length) int64."""
    table = np.full((len(lists), width or max(1, *map(len, lists))), -1, np.int64)
    for row, labels in zip(table, lists, strict=True):
        row[: len(labels)] = labels
    return table


class ImageDataset(Dataset, ABC):
    """A map-style dataset of (image, target) pairs, whose images are decoded from bytes.

    To add a dataset, derive from this class, implement `__len__`, `get_image_data` and `get_target`, preferably also
    `get_targets` and `describe`, and register it for dataset strings in `dinov2.data.datasets.DATASETS`.

    Args:
        transforms: Function (image, target) -> (image, target); excludes the other two.
        transform: Function of the image (PIL, RGB).
        target_transform: Function of the target.
    """

    image_options: ImageOptions = DEFAULT_OPTIONS
    """Options of reading image files, with the value range once it is known; set by `make_dataset`."""
    _survey: ImageSurvey | None = None
    _has_warned = False

    def __init__(
        self,
        *,
        transforms: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if transforms is not None and (transform is not None or target_transform is not None):
            raise ValueError("give either transforms, for image and target together, or transform/target_transform")
        self.transforms = transforms
        self.transform = transform
        self.target_transform = target_transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get_image_data(self, index: int) -> bytes:
        """Returns the content of the image file of sample `index`."""

    @abstractmethod
    def get_target(self, index: int) -> int | list[int] | None:
        """Returns the class index of a sample, a list for multi-label datasets, None without labels."""

    def image_files(self) -> Iterator[str]:
        """The file that each image is read from, its own one or an archive; a nonexistent name if there is none.

        Its size and modification time show whether images were replaced.
        """
        return map(self.describe, range(len(self)))

    def get_targets(self) -> np.ndarray | None:
        """Returns the class indices of all samples, (len(self),) int64, or a `label_table`; None without labels."""
        targets: list[Any] = [self.get_target(index) for index in range(len(self))]
        if None in targets:
            return None
        return label_table(targets) if targets and isinstance(targets[0], list) else np.array(targets, dtype=np.int64)

    def describe(self, index: int) -> str:
        """Describe the source of sample `index`, such as its path, for messages."""
        return f"{type(self).__name__} sample {index}"

    def fingerprint(self) -> str:
        """Hash the number of samples and their names in order, to detect changes of the dataset.

        At most `NAMES_HASHED` names are hashed, evenly spaced, and of each the last two parts of the path, so that the
        dataset may be moved. The result has 16 hexadecimal digits.
        """
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for index in range(0, len(self), max(1, len(self) // NAMES_HASHED)):
            digest.update(b"\0" + os.fsencode("/".join(self.describe(index).rsplit("/", 2)[-2:])))
        return digest.hexdigest()

    def open_image(self, index: int) -> EncodedImage:
        """Open an image without decoding or transforming it; errors in its data are raised here or when it is decoded.

        Raises:
            BadImageError: The image cannot be read; names the index and the file, the cause is chained.
        """
        with self._naming(index):
            encoded = open_image(self.get_image_data(index), self.image_options)
            if encoded.is_deep and self.image_options.value_range is None:
                encoded.options = self.survey().options
                self._warn_of_own_range(index)
            return encoded

    def survey(self) -> ImageSurvey:
        """Inspect some of the images, once, and measure the range that maps those of more than 8 bits to 8 bits."""
        if self._survey is None:
            self._survey = survey_images(self.get_image_data, self.describe, len(self), self.image_options)
            self.image_options = self._survey.options
        return self._survey

    def notes(self) -> list[tuple[int, str]]:
        """Messages about files and images for the user, each with its logging level."""
        return [(logging.INFO, note) for note in self.notes_on_files()] + self.survey().notes()

    def notes_on_files(self) -> list[str]:
        """Messages about files that were found but are not samples."""
        return []

    def _warn_of_own_range(self, index: int) -> None:
        if self.image_options.value_range is None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s has more than 8 bits, but the inspected sample had no such image to measure a range on: each is "
                "mapped to 8 bits by its own range; images.value_range=[low,high] sets one range for all",
                self.describe(index),
            )

    def get_image(self, index: int) -> AnyImage:
        """Decode an image, RGB or of chosen bands, not transformed; errors as in `open_image`."""
        encoded = self.open_image(index)
        with self._naming(index):
            return encoded.load()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Returns image and target of a sample, both transformed; errors as in `open_image`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        image, target = self.get_image(index), self.get_target(index)
        if self.transforms is not None:
            return self.transforms(image, target)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Turn any error into a BadImageError that names the sample."""
        path = ""
        try:
            path = self.describe(index)
            yield
        except DataSourceError:
            raise
        except Exception as error:
            where = f"sample {index} ({path})" if path else f"sample {index}"
            raise BadImageError(f"cannot read the image of {where}: {error}", path=path) from error


class ListedDataset(ImageDataset):
    """A dataset whose paths or pixels, and labels, are in memory.

    Attributes:
        root: Folder that paths are relative to.
        classes: Class names in the order of their indices; empty if there are none.
    """

    root: Path
    classes: Sequence[str]
    _images: Any  # PathTable, or pixels (N, H, W) or (N, H, W, 3) uint8
    _targets: np.ndarray | None  # (N,) int64; None without labels

    def __len__(self) -> int:
        return len(self._images)

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self._images[index])

    def open_image(self, index: int) -> EncodedImage:
        if isinstance(self._images, np.ndarray):  # several times faster than by an encoded file
            return EncodedImage(Image.fromarray(self._images[index]).convert("RGB"))
        return super().open_image(index)

    def get_image_data(self, index: int) -> bytes:
        """Returns the file of a sample, or a PNG file of its pixels if it has none."""
        if isinstance(self._images, PathTable):
            return read_image_file(self.describe(index), self.image_options)
        return encode_png(self._images[index])

    def get_target(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def get_class_name(self, index: int) -> str | None:
        """Returns the class name of a sample; None without names."""
        return self.classes[self._targets[index]] if self.classes and self._targets is not None else None
