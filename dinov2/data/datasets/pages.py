"""Each page of the TIFF files of a dataset as an image of its own."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dinov2.data.datasets.base import ChangedDataError, DataSourceError, ImageDataset
from dinov2.data.images import encode_array
from dinov2.data.images.tiff import count_pages, is_tiff, read_page

logger = logging.getLogger(__name__)

_THREADS = 8


class Pages(ImageDataset):
    """The samples of a dataset, where a TIFF file of n pages is n samples with the label of the file.

    All files are read once here, to count their pages.

    Args:
        dataset: Its transforms become those of the pages.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(
            transforms=dataset.transforms, transform=dataset.transform, target_transform=dataset.target_transform
        )
        self.files, self.image_options = dataset, dataset.image_options
        self.classes = getattr(dataset, "classes", [])
        with ThreadPoolExecutor(_THREADS) as pool:
            counts = np.fromiter(pool.map(self._count, range(len(dataset))), np.int64, len(dataset))
        self._ends = np.cumsum(counts)
        logger.info("%d pages in %d files (images.pages=images)", len(self), len(dataset))

    def _count(self, file: int) -> int:
        try:
            data = self.files.get_image_data(file)
            return count_pages(data) if is_tiff(data) else 1
        except (ChangedDataError, DataSourceError):
            raise
        except Exception:  # damaged; the error is raised when it is read
            return 1

    def _find(self, index: int) -> tuple[int, int, int]:
        """The file of a sample, its page, and the number of pages of the file."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[file - 1]) if file else 0
        return file, index - start, int(self._ends[file]) - start

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def get_image_data(self, index: int) -> bytes:
        """Returns the file of a sample, or an NPY file of its page if it has several."""
        file, page, count = self._find(index)
        data = self.files.get_image_data(file)
        return data if count == 1 else encode_array(read_page(data, page))

    def get_target(self, index: int) -> int | list[int] | None:
        return self.files.get_target(self._find(index)[0])

    def get_targets(self) -> np.ndarray | None:
        targets = self.files.get_targets()
        return None if targets is None else np.repeat(targets, np.diff(self._ends, prepend=0), axis=0)

    def describe(self, index: int) -> str:
        file, page, count = self._find(index)
        return self.files.describe(file) + (f" page {page}" if count > 1 else "")

    def image_files(self) -> Iterator[str]:
        files = self.files.image_files()
        return (name for name, count in zip(files, np.diff(self._ends, prepend=0), strict=True) for _ in range(count))

    @property
    def shard_sizes(self) -> list[int] | None:
        """The number of pages in each shard of files; None if they are not in shards."""
        if (sizes := getattr(self.files, "shard_sizes", None)) is None:
            return None
        ends = np.concatenate([[0], self._ends])[np.cumsum(sizes)]
        return np.diff(ends, prepend=0).tolist()

    def notes_on_files(self) -> list[str]:
        return self.files.notes_on_files()


def with_pages(dataset: ImageDataset) -> ImageDataset:
    """The dataset, or its `Pages` if its options of reading images say so; a ValueError for a mixture with weights."""
    if dataset.image_options.pages == "images" and getattr(dataset, "mixture", None):
        raise ValueError("images.pages=images: the sources of a Mix with weights must have one image in a file")
    return Pages(dataset) if dataset.image_options.pages == "images" else dataset
