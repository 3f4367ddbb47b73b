"""Images with maps for the evaluations of patch tokens: endless crops for training, whole images for testing.

Shapes: B crops of h x w pixels; a test image has H x W pixels.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.config import Config
from dinov2.data.dense.base import DenseDataset, MapSummary, check_maps
from dinov2.data.dense.opening import open_dense
from dinov2.data.dense.transforms import EvaluationInputs
from dinov2.data.images import BadImageError
from dinov2.data.randomness import seed_for
from dinov2.data.sample_stream import PositionBatches, SamplePosition
from dinov2.data.samplers import GlobalOrderSampler
from dinov2.data.workers import SupervisedLoader
from dinov2.eval import setup
from dinov2.eval.features import MAX_BAD_SHARE
from dinov2.eval.skip_unreadable import SkipUnreadable, collate_skipping_unreadable
from dinov2.meters import MetricLogger

logger = logging.getLogger(__name__)

Crops = Callable[[Any, np.ndarray, np.random.Generator], tuple[Tensor, Tensor]]
"""(PIL image, map, generator) -> image (3, h, w) float32, normalized, and map (h, w) or (1, h, w)."""


class TrainingCrops(Dataset[tuple[Tensor, Tensor]]):
    """SamplePosition -> crop of an image and of its map; random numbers depend on (seed, position in the run) only."""

    def __init__(self, dataset: DenseDataset, crops: Crops, seed: int) -> None:
        self.dataset, self.crops, self.seed = dataset, crops, seed

    def __getitem__(self, item: SamplePosition) -> tuple[Tensor, Tensor]:
        image, target = self.dataset.get_sample(item.sample)
        generator = np.random.default_rng(seed_for(self.seed, "dense augment", item.position))
        return self.crops(image, target, generator)


def make_train_loader(
    start_iteration: int, *, dataset: DenseDataset, crops: Crops, batch_size: int, num_workers: int, seed: int = 0
) -> DataLoader:
    """Endless batches (B, 3, h, w) and maps of this rank from `start_iteration` on, as in an uninterrupted run."""
    rank, world_size = distributed.rank(), distributed.world_size()
    start = start_iteration * batch_size * world_size
    share = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "start_position": start}
    order = GlobalOrderSampler(sample_count=len(dataset), seed=seed, **share)
    return SupervisedLoader(
        SkipUnreadable(TrainingCrops(dataset, crops, seed)),
        batch_sampler=PositionBatches(order, **share),
        num_workers=num_workers,
        collate_fn=collate_skipping_unreadable,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


class Example(NamedTuple):
    """A whole image for testing."""

    number: int  # in the dataset
    pixels: np.ndarray  # (H, W, 3) uint8, or levels of bands (H, W, C) float32
    inputs: tuple[Tensor, ...]  # the image as the model gets it, (3, h, w) float32, at each scale
    target: Tensor  # class indices (H, W) int64, or depths (1, H, W) float32


class _Examples(Dataset[Example]):
    def __init__(self, dataset: DenseDataset, prepare: EvaluationInputs) -> None:
        self.dataset, self.prepare = dataset, prepare

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        image, target = self.dataset.get_sample(index)
        return Example(index, np.array(image), *self.prepare(image, target))


def examples(dataset: DenseDataset, prepare: EvaluationInputs, num_workers: int) -> Iterator[Example]:
    """Iterate over this rank's share of a dataset in its order, with progress, without unreadable images.

    Raises:
        ValueError: More than `MAX_BAD_SHARE` of the images of this rank cannot be read.
    """
    mine = range(distributed.rank(), len(dataset), distributed.world_size())
    loader = SupervisedLoader(
        SkipUnreadable(_Examples(dataset, prepare)),
        batch_size=1,
        sampler=mine,
        num_workers=num_workers,
        collate_fn=_only,
        generator=torch.Generator().manual_seed(0),  # otherwise it draws from the global one
    )
    num_bad = 0
    for example in MetricLogger("  ", is_main=distributed.is_main()).log_every(loader, 50, "Testing:", len(mine)):
        if isinstance(example, BadImageError):
            num_bad += 1
            if num_bad > MAX_BAD_SHARE * len(mine):
                raise ValueError(
                    f"{num_bad} of {len(mine)} images cannot be read, more than the {MAX_BAD_SHARE:.0%} that may be "
                    f"omitted: remove or repair them; the last: {example}"
                )
        else:
            yield example


def _only(samples: Sequence[Any]) -> Any:
    return samples[0]


class Sets(NamedTuple):
    """The data of an evaluation."""

    train: DenseDataset | None  # None if a head is given
    val: DenseDataset
    found: MapSummary  # in some maps of the latter


def named_sets(args: argparse.Namespace) -> list[str]:
    """The dataset strings of the command line; a `ValueError` unless it has either a training set or a head."""
    if (args.head is None) == (args.train_dataset is None):
        raise ValueError("give either --train-dataset, to train a head, or --head, to test one")
    return [name for name in (args.train_dataset, args.val_dataset) if name is not None]


def open_sets(args: argparse.Namespace, cfg: Config, kind: str) -> Sets:
    """Open the datasets of the command line, and read some maps, so that wrong ones are an error now.

    Raises:
        ValueError: A dataset has no such maps, or the two have different classes.
    """
    options, train = setup.image_options(cfg), None
    if args.train_dataset is not None:
        train = open_dense(args.train_dataset, kind, options, "--train-dataset")
        options = train.image_options
    val = open_dense(args.val_dataset, kind, options, "--val-dataset")
    if train is not None:
        setup.check_classes(setup.class_names(train), val, args.val_dataset)
    for name, dataset in ((args.train_dataset, train), (args.val_dataset, val)):
        if dataset is not None:
            found = distributed.from_main(partial(check_maps, dataset))
            logger.info("%s: %s", name, found.describe())
            for warning in found.warnings():
                logger.warning("%s: %s", name, warning)
    return Sets(train, val, found)


def images_per_process(batch_size: int) -> int:
    """The share of each process in the images of an iteration; a `ValueError` if there is a remainder."""
    world_size = distributed.world_size()
    if batch_size % world_size:
        raise ValueError(
            f"{batch_size} images per iteration cannot be shared by {world_size} processes: give --batch-size, the "
            "number per process"
        )
    return batch_size // world_size
