"""Images of the linear evaluation: endless augmented ones to train on, sets to test on.

Shapes: B images of a batch, C' classes of a test set.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.data import SamplerType, make_data_loader
from dinov2.data.base import ImageDataset
from dinov2.data.randomness import seed_for
from dinov2.data.samplers import GlobalOrderSampler
from dinov2.data.stream import Place, PlaceBatches
from dinov2.eval.metrics import MetricType
from dinov2.eval.readable import ReadableOnly, collate_readable
from dinov2.eval.setup import labelled_dataset


class AugmentedTrainingSet(Dataset[tuple[Tensor, int]]):
    """Place -> (image, label), where the augmentation is random through (seed, position in the run) alone."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, "linear augment", place.position))
            return self.dataset[place.sample]


def make_train_loader(
    start_iteration: int, *, dataset: ImageDataset, batch_size: int, num_workers: int, seed: int = 0
) -> DataLoader:
    """Endless batches of this rank from `start_iteration` on, the same that an uninterrupted run sees there."""
    rank, world_size = distributed.rank(), distributed.world_size()
    start_position = start_iteration * batch_size * world_size
    order = GlobalOrderSampler(
        sample_count=len(dataset),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        start_position=start_position,
    )
    return DataLoader(
        ReadableOnly(AugmentedTrainingSet(dataset, seed)),
        batch_sampler=PlaceBatches(
            order, batch_size=batch_size, start_position=start_position, rank=rank, world_size=world_size
        ),
        num_workers=num_workers,
        collate_fn=collate_readable,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # else it draws from the global one
    )


class EvalSet(NamedTuple):
    """A labelled set to test classifiers on."""

    name: str  # dataset string
    loader: DataLoader  # each image once, on one of the ranks
    metric_type: MetricType
    class_mapping: Tensor | None  # (C',) int64, its classes among those trained on


def make_eval_set(
    dataset_str: str,
    transform: Callable[..., Tensor],
    *,
    batch_size: int,
    num_workers: int,
    metric_type: MetricType,
    class_mapping_fpath: str | None = None,
) -> EvalSet:
    """The set of a dataset string, dealt to the ranks; a class mapping is read from a `.npy` file."""
    mapping = None
    if class_mapping_fpath is not None:
        mapping = torch.from_numpy(np.load(class_mapping_fpath).astype(np.int64)).to(distributed.device())
    several_labels = metric_type is MetricType.IMAGENET_REAL_ACCURACY
    loader = make_data_loader(
        dataset=ReadableOnly(labelled_dataset(dataset_str, transform)),
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=False,
        sampler_type=SamplerType.EPOCH,  # unlike DISTRIBUTED it does not fill up the last batches with duplicates
        drop_last=False,
        collate_fn=partial(collate_readable, collate=collate_label_lists) if several_labels else collate_readable,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return EvalSet(dataset_str, loader, metric_type, mapping)


def collate_label_lists(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and their lists of labels (B, longest list), the shorter ones filled up with -1."""
    labels = [torch.as_tensor(target, dtype=torch.int64).reshape(-1) for _, target in samples]
    return torch.stack([image for image, _ in samples]), pad_sequence(labels, batch_first=True, padding_value=-1)
