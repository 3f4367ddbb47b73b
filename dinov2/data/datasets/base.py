"""What every dataset of images has in common."""

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dinov2.data.images import DEFAULT_OPTIONS, BadImageError, EncodedImage, ImageOptions, open_image
from dinov2.data.images.survey import ImageSurvey, survey_images

logger = logging.getLogger(__name__)

NAMES_HASHED = 10_000
"""Names that `ImageDataset.fingerprint` looks at."""


def label_table(lists: Sequence[Sequence[int]], width: int | None = None) -> np.ndarray:
    """Lists of class indices, the shorter ones filled up with -1: (len(lists), width or the longest's length) int64."""
    table = np.full((len(lists), width or max(1, *map(len, lists))), -1, np.int64)
    for row, labels in zip(table, lists, strict=True):
        row[: len(labels)] = labels
    return table


class ImageDataset(Dataset, ABC):
    """A dataset of (encoded, target) pairs that are read from bytes.

    A dataset of one's own derives from it, implements `__len__`, `get_image_data` and `get_target`, better also
    `get_targets` and `describe`, and is made known to dataset strings by a line in `dinov2.data.datasets.DATASETS`.

    Args:
        transforms: applied to (encoded, target), returns both; excludes the other two.
        transform: applied to the encoded (PIL, RGB).
        target_transform: applied to the target.

    Attributes:
        image_options: How image files are read, with the value range once it is known; `make_dataset` sets it.
    """

    image_options: ImageOptions = DEFAULT_OPTIONS
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
            raise ValueError("give either transforms, for encoded and target together, or transform/target_transform")
        self.transforms = transforms
        self.transform = transform
        self.target_transform = target_transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get_image_data(self, index: int) -> bytes:
        """The image file of sample `index`."""

    @abstractmethod
    def get_target(self, index: int) -> int | list[int] | None:
        """The class index of sample `index`, a list in datasets with several, None when there are no labels."""

    def image_files(self) -> Iterator[str]:
        """The file that each image is read from, its own one or an archive; one that does not exist if there is none.

        By its size and time of change one notices that images were replaced. By default what `describe` names.
        """
        return map(self.describe, range(len(self)))

    def get_targets(self) -> np.ndarray | None:
        """The class indices of all samples, (len(self),) int64, None when the dataset has no labels.

        Lists are a table with a row for each sample, see `label_table`.
        """
        targets: list[Any] = [self.get_target(index) for index in range(len(self))]
        if None in targets:
            return None
        return label_table(targets) if targets and isinstance(targets[0], list) else np.array(targets, dtype=np.int64)

    def describe(self, index: int) -> str:
        """Where the encoded of sample `index` comes from, for messages."""
        return f"{type(self).__name__} sample {index}"

    def fingerprint(self) -> str:
        """A hash of the number of samples and of their names in order: whether a list of images is still the same.

        Of more than `NAMES_HASHED` samples so many are taken, evenly spread; of each name the last two parts, so that
        the files may move together. A dataset that can hash all names quickly overrides it.

        Returns:
            16 hexadecimal digits.
        """
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for index in range(0, len(self), max(1, len(self) // NAMES_HASHED)):
            digest.update(b"\0" + os.fsencode("/".join(self.describe(index).rsplit("/", 2)[-2:])))
        return digest.hexdigest()

    def open_image(self, index: int) -> EncodedImage:
        """The encoded of sample `index`, decoded as late as possible, not transformed. What it takes to read it fails
        here or when it is loaded.

        Raises:
            BadImageError: it cannot be read; names the index and the file, the cause is chained.
        """
        with self._naming(index):
            encoded = open_image(self.get_image_data(index), self.image_options)
            if encoded.is_deep and self.image_options.value_range is None:
                encoded.options = self.survey().options
                self._warn_of_own_range(index)
            return encoded

    def survey(self) -> ImageSurvey:
        """What is in a sample of the images, and the value range for all of them; measured once.

        Images of more than 8 bits are mapped to 8 bits by this range.
        """
        if self._survey is None:
            self._survey = survey_images(self.get_image_data, self.describe, len(self), self.image_options)
            self.image_options = self._survey.options
        return self._survey

    def notes(self) -> list[tuple[int, str]]:
        """What a person should know of files and images, each with its level of logging; see `ImageSurvey.notes`."""
        return [(logging.INFO, note) for note in self.notes_on_files()] + self.survey().notes()

    def notes_on_files(self) -> list[str]:
        """Files that were found but are no samples, in words, for log and dry run."""
        return []

    def _warn_of_own_range(self, index: int) -> None:
        """Once, if an image has more than 8 bits and the sample had none to measure a range on."""
        if self.image_options.value_range is None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s has more than 8 bits, and the sample had no such image to measure a range on: each is mapped to 8 "
                "bits by its own values; images.value_range=[low,high] sets one range for all",
                self.describe(index),
            )

    def get_image(self, index: int) -> Image.Image:
        """The encoded of sample `index`, RGB, not transformed.

        Raises:
            BadImageError: it cannot be read or decoded; names the index and the file, the cause is chained.
        """
        encoded = self.open_image(index)
        with self._naming(index):
            return encoded.load()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """EncodedImage and target of sample `index`, both transformed.

        Raises:
            IndexError: no such sample.
            BadImageError: see `get_image`.
        """
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
        """Turns any error into one that says which sample it was."""
        path = ""
        try:
            path = self.describe(index)
            yield
        except Exception as error:
            where = f"sample {index} ({path})" if path else f"sample {index}"
            raise BadImageError(f"cannot read the image of {where}: {error}", path=path) from error
