"""Datasets that wrap other datasets."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.datasets.base import ImageDataset


class DatasetWithEnumeratedTargets(Dataset):
    """Adds the index to each target: item i is (image, (i, target)), so that results can be put in order.

    In items a target of None is replaced by i, because items must be collated.
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
        return index, self.dataset.get_target(index)

    def get_targets(self) -> np.ndarray | None:
        """Returns the targets without indices."""
        return self.dataset.get_targets()

    def describe(self, index: int) -> str:
        return self.dataset.describe(index)
