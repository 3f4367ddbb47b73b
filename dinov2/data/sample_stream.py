"""The training stream: every sample has a position in the run, from which alone its randomness comes.

Batch b of rank r, counted from where a run starts or resumes, covers the positions
start + (b * world_size + r) * batch_size and the following ones. A sampler says which image stands at a position;
(seed, position) says how it is cropped, and how the batch that begins there is masked. So a run may go on with another
number of processes: the positions continue where the others stopped.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast, make_masks
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.device_augment import CropFormat, RawBatch, RawImage, pack
from dinov2.data.images import BadImageError, ImageDecodeError
from dinov2.data.masking import MaskingGenerator
from dinov2.data.randomness import seed_for
from dinov2.data.workers import LoadingError, note_sample

_MAX_REPLACEMENTS = 10  # tried for one image that cannot be read


class SamplePosition(NamedTuple):
    """What is read where."""

    position: int  # in the run
    sample: int  # in the dataset


class Sample(NamedTuple):
    """One augmented image."""

    position: int
    crops: MultiCrop | RawImage
    bad_images: tuple[str, ...]  # "path: reason" of images that could not be read and that this one replaces


class PositionBatches(Sampler[list[SamplePosition]]):
    """Endless batches of places for one rank, from ``start_position`` on.

    Args:
        indices: this rank's endless indices, those before ``start_position`` left out.
        batch_size: places per batch.
        start_position: where the first batch of rank 0 begins.
        rank: whose positions.
        world_size: number of ranks.
    """

    def __init__(
        self, indices: Iterable[int], *, batch_size: int, start_position: int, rank: int, world_size: int
    ) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.start_position = start_position
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[SamplePosition]]:
        indices = iter(self.indices)
        mine = self.start_position + self.rank * self.batch_size
        for first in itertools.count(mine, self.batch_size * self.world_size):
            yield [SamplePosition(first + i, next(indices)) for i in range(self.batch_size)]


class AugmentedDataset(Dataset[Sample]):
    """SamplePosition -> Sample. An image that cannot be read is replaced by a random other one.

    Args:
        dataset: item i is (PIL image, anything); raises BadImageError for an image that cannot be read.
        augmentation: draws from torch's CPU generator, which is seeded here for each position and left as it was. If
            it has a true attribute `opens_encoded` it is given a `EncodedImage` wherever the dataset can open one.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, augmentation: Callable[[Any], MultiCrop | RawImage], seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.opens = getattr(augmentation, "opens_encoded", False) and _gives_encoded_images(dataset)

    def __getitem__(self, at: SamplePosition) -> Sample:
        bad_images: list[str] = []
        index = at.sample
        for attempt in range(_MAX_REPLACEMENTS + 1):
            try:
                return Sample(at.position, self._augmented(index, at.position), tuple(bad_images))
            except BadImageError as error:
                bad_images.append(_with_reason(error))
                rng = random.Random(seed_for(self.seed, "replacement", at.position, attempt))
                index = rng.randrange(len(self.dataset))  # type: ignore[arg-type]
        raise LoadingError(f"{len(bad_images)} images drawn in a row cannot be read: {'; '.join(bad_images)}")

    def _augmented(self, index: int, position: int) -> MultiCrop | RawImage:
        note_sample(index)
        image = self.dataset.open_image(index) if self.opens else self.dataset[index][0]  # type: ignore[attr-defined]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, "augment", position))
            try:
                return self.augmentation(image)
            except ImageDecodeError as error:  # of a image that was opened but cannot be decoded
                path = self.dataset.describe(index) if self.opens else ""  # type: ignore[attr-defined]
                raise BadImageError(f"cannot read the image of sample {index}: {error}", path=path) from error


def _with_reason(error: BadImageError) -> str:
    """Which image cannot be read, and why: "path: reason"."""
    reason = error.__cause__ or error
    return f"{error.path}: {reason}" if error.path and error.path not in str(reason) else str(reason)


def _gives_encoded_images(dataset: Dataset) -> bool:
    """Whether `dataset[i]` is just the image that `dataset.open_image(i)` opens."""
    return (
        isinstance(dataset, ImageDataset)
        and dataset.transforms is None
        and dataset.transform is None
        and type(dataset).__getitem__ is ImageDataset.__getitem__
        and type(dataset).get_image is ImageDataset.get_image
    )


class StreamCollate:
    """Samples of one batch -> Batch, masked by (seed, position of the first sample). Arguments as in `collate`.

    With a ``crop_format`` the samples are raw images, and so is the batch.
    """

    def __init__(
        self,
        *,
        seed: int,
        mask_generator: MaskingGenerator,
        mask_ratio_tuple: tuple[float, float],
        mask_probability: float,
        dtype: torch.dtype,
        crop_format: CropFormat | None = None,
    ) -> None:
        self.seed = seed
        self.mask_generator = mask_generator
        self.mask_ratio_tuple = mask_ratio_tuple
        self.mask_probability = mask_probability
        self.dtype = dtype
        self.crop_format = crop_format

    def __call__(self, samples: list[Sample]) -> Batch | RawBatch:
        crops: list[Any] = [sample.crops for sample in samples]
        bad_images = tuple(bad for sample in samples for bad in sample.bad_images)
        masking: dict[str, Any] = {
            "mask_ratio_tuple": self.mask_ratio_tuple,
            "mask_probability": self.mask_probability,
            "n_tokens": math.prod(self.mask_generator.get_shape()),
            "mask_generator": self.mask_generator,
            "rng": random.Random(seed_for(self.seed, "mask", samples[0].position)),
        }
        if self.crop_format is None:
            return collate_data_and_cast(crops, dtype=self.dtype, **masking)._replace(bad_images=bad_images)
        return pack(crops, make_masks(2 * len(crops), **masking)._replace(bad_images=bad_images), self.crop_format)
