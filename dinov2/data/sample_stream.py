"""The sample stream of training: each sample has a position in the run, which determines its random numbers.

Batch b of rank r, counted from where a run starts or resumes, covers the batch_size positions from
start + (b * world_size + r) * batch_size on. A sampler maps positions to images; (seed, position) determines the crops
of an image, and the masks of the batch that begins there. So a run may continue on another number of processes: the
positions continue where the earlier ones ended.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, Masking, collate_data_and_cast, make_masks
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.device_augment import CropFormat, RawBatch, RawImage, pack_raw_batch
from dinov2.data.images import BadImageError, ImageDecodeError
from dinov2.data.masking import MaskingGenerator
from dinov2.data.randomness import seed_for
from dinov2.data.workers import LoadingError, note_sample

_MAX_REPLACEMENTS = 10  # attempts to replace an unreadable image


class SamplePosition(NamedTuple):
    """A position in the run and the sample that is read for it."""

    position: int
    sample: int  # index in the dataset


class Sample(NamedTuple):
    """One augmented image."""

    position: int
    crops: MultiCrop | RawImage
    bad_images: tuple[str, ...]  # "path: reason" of unreadable images that this one replaces


@dataclass(eq=False)
class PositionBatches(Sampler[list[SamplePosition]]):
    """Endless batches of sample positions for one rank, from ``start_position`` on."""

    indices: Iterable[int]  # endless, of this rank, beginning at ``start_position``
    _: KW_ONLY
    batch_size: int  # samples per batch of one rank
    start_position: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[SamplePosition]]:
        indices = iter(self.indices)
        first_of_rank = self.start_position + self.rank * self.batch_size
        for first in itertools.count(first_of_rank, self.batch_size * self.world_size):
            yield [SamplePosition(first + i, next(indices)) for i in range(self.batch_size)]


class AugmentedDataset(Dataset[Sample]):
    """SamplePosition -> augmented Sample. An unreadable image is replaced by a random other one.

    Args:
        dataset: Item i is (PIL image, any target); raises BadImageError for an unreadable image.
        augmentation: Draws from torch's CPU generator, which is seeded for each position and restored afterwards. If
            its attribute `accepts_encoded` is true, it gets an `EncodedImage` where the dataset can open one.
    """

    def __init__(self, dataset: Dataset, augmentation: Callable[[Any], MultiCrop | RawImage], seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.opens_encoded = getattr(augmentation, "accepts_encoded", False) and _gives_encoded_images(dataset)

    def __getitem__(self, item: SamplePosition) -> Sample:
        bad_images: list[str] = []
        index = item.sample
        for attempt in range(_MAX_REPLACEMENTS + 1):
            try:
                return Sample(item.position, self._augmented(index, item.position), tuple(bad_images))
            except BadImageError as error:
                reason, path = str(error.__cause__ or error), error.path
                bad_images.append(f"{path}: {reason}" if path and path not in reason else reason)
                rng = random.Random(seed_for(self.seed, "replacement", item.position, attempt))
                index = rng.randrange(len(self.dataset))  # type: ignore[arg-type]
        raise LoadingError(f"{len(bad_images)} images drawn in a row cannot be read: {'; '.join(bad_images)}")

    def _augmented(self, index: int, position: int) -> MultiCrop | RawImage:
        note_sample(index)
        image = self.dataset.open_image(index) if self.opens_encoded else self.dataset[index][0]  # type: ignore[attr-defined]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, "augment", position))
            try:
                return self.augmentation(image)
            except ImageDecodeError as error:  # opened, but cannot be decoded
                path = self.dataset.describe(index) if self.opens_encoded else ""  # type: ignore[attr-defined]
                raise BadImageError(f"cannot read the image of sample {index}: {error}", path=path) from error


def _gives_encoded_images(dataset: Dataset) -> bool:
    """Whether `dataset[i]` is the image that `dataset.open_image(i)` opens, without transforms or overrides."""
    return (
        isinstance(dataset, ImageDataset)
        and dataset.transforms is None
        and dataset.transform is None
        and type(dataset).__getitem__ is ImageDataset.__getitem__
        and type(dataset).get_image is ImageDataset.get_image
    )


@dataclass(kw_only=True, eq=False)
class StreamCollate:
    """Collates samples to a batch; the masks depend on (seed, position of the first sample).

    With a ``crop_format`` samples hold raw images, and the result is a `RawBatch`. The other arguments are those of
    `collate_data_and_cast`.
    """

    seed: int
    mask_generator: MaskingGenerator
    mask_ratio_tuple: tuple[float, float]
    mask_probability: float
    dtype: torch.dtype
    crop_format: CropFormat | None = None

    def __call__(self, samples: list[Sample]) -> Batch | RawBatch:
        crops: list[Any] = [sample.crops for sample in samples]
        bad_images = tuple(bad for sample in samples for bad in sample.bad_images)
        masking = Masking(
            mask_ratio_tuple=self.mask_ratio_tuple,
            mask_probability=self.mask_probability,
            n_tokens=math.prod(self.mask_generator.get_shape()),
            mask_generator=self.mask_generator,
            rng=random.Random(seed_for(self.seed, "mask", samples[0].position)),
        )
        if self.crop_format is None:
            return collate_data_and_cast(crops, dtype=self.dtype, **masking)._replace(bad_images=bad_images)
        masks = make_masks(2 * len(crops), **masking)._replace(bad_images=bad_images)
        return pack_raw_batch(crops, masks, self.crop_format)
