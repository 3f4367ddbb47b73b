"""Any folder of images."""

import logging
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.base import ImageDataset
from dinov2.data.file_list import PathTable, list_images

logger = logging.getLogger(__name__)


class ImageFolder(ImageDataset):
    """All images under a folder, at any depth, in the order of their paths.

    When every image lies in some folder below `root`, the sorted names of the folders of the first level are the
    classes (as in `torchvision.datasets.ImageFolder`); when some lie in `root` itself there are no labels, and training
    needs none. Links are followed, hidden files passed over. The list of files is kept between runs and made anew when
    a folder has changed.

    Args:
        root: the folder.
        split: a folder below `root` to read instead, such as `val`.
        transforms, transform, target_transform: see `ImageDataset`.

    Raises:
        FileNotFoundError: the folder is missing or has no images.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        split: str | None = None,
        transforms: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transforms=transforms, transform=transform, target_transform=target_transform)
        self.root = Path(root) if split is None else Path(root, split)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}{_folders_in(Path(root))}")
        self._files = list_images(self.root)
        self.classes, self._targets = _classes_and_targets(self._files)
        logger.info("%s: %s", self.root, f"{len(self.classes)} classes" if self.classes else "no labels")

    def __len__(self) -> int:
        return len(self._files)

    def describe(self, index: int) -> str:
        """The path of the image."""
        return str(self.root / self._files[index])

    def get_image_data(self, index: int) -> bytes:
        return (self.root / self._files[index]).read_bytes()

    def get_target(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def get_class_name(self, index: int) -> str | None:
        """The folder that gives sample `index` its label, None without labels."""
        return None if self._targets is None else self.classes[self._targets[index]]


def _classes_and_targets(files: PathTable) -> tuple[list[str], np.ndarray | None]:
    """Names of the classes and class index of each file; no names and None without labels."""
    ranges: dict[str, slice] = {}  # files are sorted, so those of a folder follow one another
    start = 0
    while start < len(files):
        name, slash, _ = files[start].partition("/")
        if not slash:
            return [], None
        end = bisect_left(files, name + chr(ord("/") + 1), lo=start)  # the first path beyond all "name/..."
        ranges[name] = slice(start, end)
        start = end
    classes = sorted(ranges)
    targets = np.empty(len(files), np.int64)
    for class_index, name in enumerate(classes):
        targets[ranges[name]] = class_index
    return classes, targets


def _folders_in(root: Path) -> str:
    """What there is instead, for the message about a missing folder."""
    if not root.is_dir():
        return ""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())[:20]
    return f"; folders in {root}: {', '.join(folders) or 'none'}"
