"""Images that cannot be read are left out of an evaluation, each with a warning that gives the reason."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, default_collate

from dinov2.data.images import BadImageError

logger = logging.getLogger(__name__)


class SkipUnreadable(Dataset[Any]):
    """A dataset in which the samples whose image cannot be read are the error."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except BadImageError as error:
            logger.warning("left out of the evaluation: %s", error)
            return error


class UnreadableBatch(NamedTuple):
    """A batch of which no image can be read."""

    size: int
    reason: str  # that of the first


def collate_skipping_unreadable(samples: Sequence[Any], collate: Callable[[list[Any]], Any] = default_collate) -> Any:
    """A batch of the samples that are no `BadImageError`, an `UnreadableBatch` if there is none."""
    readable = [sample for sample in samples if not isinstance(sample, BadImageError)]
    return collate(readable) if readable else UnreadableBatch(len(samples), str(samples[0]))


def skip_unreadable_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader with `collate_skipping_unreadable`.

    Raises:
        ValueError: If there is an `UnreadableBatch` among them. Not in a worker, which would add its traceback.
    """
    for batch in batches:
        if isinstance(batch, UnreadableBatch):
            raise ValueError(f"not one of the {batch.size} images of a batch can be read; the first: {batch.reason}")
        yield batch
