"""Unreadable images are omitted from evaluations, each with a warning that states the reason."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, default_collate

from dinov2.data.images import BadImageError

logger = logging.getLogger(__name__)


class SkipUnreadable(Dataset[Any]):
    """A dataset that returns the error in place of a sample with an unreadable image."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except BadImageError as error:
            logger.warning("omitted from the evaluation: %s", error)
            return error


def collate_skipping_unreadable(samples: Sequence[Any], collate: Callable[[list[Any]], Any] = default_collate) -> Any:
    """Collate the readable samples; the error to raise if there are none."""
    if readable := [sample for sample in samples if not isinstance(sample, BadImageError)]:
        return collate(readable)
    return ValueError(f"none of the {len(samples)} images of a batch can be read; the first: {samples[0]}")


def skip_unreadable_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the batches of a loader with `collate_skipping_unreadable`, and raise its errors.

    They are not raised in workers, which would add their traceback.
    """
    for batch in batches:
        if isinstance(batch, ValueError):
            raise batch
        yield batch
