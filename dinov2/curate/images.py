"""The images that features are of: their files, sizes and thumbnails."""

import base64
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.curate.feature_table import FeatureTable
from dinov2.curate.search import sample_rows
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import BadImageError, ImageOptions
from dinov2.eval.extract.sources import ImageFiles, check_sources, open_sources

logger = logging.getLogger(__name__)

CHECKED = 1000  # names that are looked for on the disk
LONGER_SIDE, QUALITY = 128, 80  # of thumbnails: largest size in pixels, quality of JPEG


class Images:
    """The images of a table of features.

    Args:
        table: The features, whose names are paths, or positions in datasets.
        root: Folder that relative paths begin at; None: the current one.

    Raises:
        FileNotFoundError: Some of the names are files, and some are not.
    """

    def __init__(self, table: FeatureTable, root: Path | None = None) -> None:
        self.table, self.root = table, os.path.abspath(root or Path())
        names = [self.path(row) for row in sample_rows(len(table), CHECKED, 0).tolist()]
        missing = [name for name in names if not os.path.isfile(name)]
        if missing and len(missing) < len(names):
            raise FileNotFoundError(f"{len(missing)} of {len(names)} images are missing, such as {missing[0]}")
        self.are_files = not missing
        self._datasets: dict[int, ImageDataset | None] = {}

    def path(self, row: int) -> str:
        """Absolute path of an image that is a file."""
        return os.path.join(self.root, self.table.names[row])

    def size_of(self, row: int) -> tuple[int, int]:
        """Pixels and bytes of an image file; (0, 0) if it cannot be opened, or is none."""
        if not self.are_files:
            return 0, 0
        try:
            with Image.open(self.path(row)) as image:
                return image.width * image.height, os.path.getsize(self.path(row))
        except (OSError, ValueError, Image.DecompressionBombError):
            return 0, 0

    def open(self, row: int) -> Image.Image | None:
        """An image, RGB; None if it cannot be read."""
        number, position = self.table.locate(row)
        options = _image_options(self.table.metadata[number]["settings"])
        try:
            if self.are_files:
                files = ImageFiles([self.path(row)])
                files.image_options = options
                return files.get_image(0).convert("RGB")
            if number not in self._datasets:
                self._datasets[number] = self._open_dataset(number, options)
            dataset = self._datasets[number]
            if dataset is None or dataset.describe(position) != self.table.names[row]:
                return None
            return dataset.get_image(position).convert("RGB")
        except (BadImageError, ValueError, OSError):
            return None

    def thumbnail(self, row: int) -> str | None:
        """A small JPEG of an image as a data URI; None if it cannot be read."""
        if (image := self.open(row)) is None:
            return None
        buffer = io.BytesIO()
        image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _open_dataset(self, number: int, options: ImageOptions) -> ImageDataset | None:
        """What the features of a folder were extracted from, None if it has changed or cannot be opened."""
        settings = self.table.metadata[number]["settings"]
        try:
            check_sources(settings["images"])
            dataset = open_sources(settings["images"], options)
            if len(dataset) == settings["num_images"]:
                return dataset
            reason = f"there are {len(dataset)} images, not {settings['num_images']}"
        except (ValueError, OSError) as error:
            reason = str(error)
        logger.warning("the page shows no images of %s: %s", self.table.folders[number], reason)
        return None


def _image_options(settings: Mapping[str, Any]) -> ImageOptions:
    """How images were decoded; of several sources, those of the first."""
    given: dict[str, Any] = settings["image_options"][0]

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return ImageOptions(**{key: frozen(value) for key, value in given.items()})
