"""Images that cannot be read are left out of an evaluation, and said so."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset, default_collate

from dinov2.data.images import BadImageError

logger = logging.getLogger(__name__)


class ReadableOnly(Dataset[Any]):
    """A data set in which samples whose image cannot be read are None."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except BadImageError as error:
            logger.warning("left out of the evaluation: %s", error)
            return None


def collate_readable(samples: Sequence[Any], collate: Callable[[list[Any]], Any] = default_collate) -> Any:
    """A batch of the samples that are not None.

    Raises:
        ValueError: if there is none.
    """
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        raise ValueError(f"not one of the {len(samples)} images of a batch can be read; the log names them")
    return collate(readable)
