"""Datasets around datasets."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.datasets.base import ImageDataset


class DatasetWithEnumeratedTargets(Dataset):
    """Adds its position to each target: item i is (image, (i, target)), so that shuffled results find their place.

    A target that is None is replaced by i in the items, for they must be collated.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        image, target = self.dataset[index]
        return image, (index, index if target is None else target)

    def get_image_data(self, index: int) -> bytes:
        return self.dataset.get_image_data(index)

    def get_target(self, index: int) -> tuple[int, int | list[int] | None]:
        """(index, target); a target that is None stays None here."""
        return index, self.dataset.get_target(index)

    def get_targets(self) -> np.ndarray | None:
        """The targets alone, see `ImageDataset`."""
        return self.dataset.get_targets()

    def describe(self, index: int) -> str:
        return self.dataset.describe(index)
