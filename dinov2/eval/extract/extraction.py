"""Runs a model over images, shard by shard.

A shard is a range of consecutive images. Batches begin at the first image of a shard, so that the features do not
depend on which shards a process computes, nor in which order.

Shapes: B images of a batch, h x w patches of an image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import BadImageError
from dinov2.data.workers import SupervisedLoader
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.extract.preprocessing import Preprocessing
from dinov2.eval.extract.sources import VideoFrames, parts_of
from dinov2.eval.extract.tokens import TokenChoice, TokenModel, arrays_of
from dinov2.eval.features import MAX_BAD_SHARE, autocast, require_finite, run_model
from dinov2.eval.results import counted
from dinov2.meters import MetricLogger


class Row(NamedTuple):
    """An image whose features were extracted."""

    name: str
    label: Any  # class index, list of them, or None
    grid: tuple[int, int]  # rows and columns of patches


class Unreadable(NamedTuple):
    """An image that cannot be read, and has no row."""

    image_index: int  # in the dataset
    name: str
    reason: str


@dataclass
class Shard:
    """The features of consecutive images: `rows` of those that can be read, and arrays by kind of tokens, in parts."""

    rows: list[Row] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)


class Extraction(NamedTuple):
    """What is run over what."""

    backbone: FrozenBackbone
    dataset: ImageDataset
    preprocessing: Preprocessing
    choice: TokenChoice
    batch_size: int
    num_workers: int

    @torch.inference_mode()
    def run(self, shards: Sequence[range]) -> Iterator[Shard]:
        """Compute shards, given the images of each, one after the other.

        Raises:
            ValueError: Features are not finite, or more than `MAX_BAD_SHARE` of all images cannot be read.
        """
        if not shards:
            return
        batches = [
            range(start, min(start + self.batch_size, images.stop))
            for images in shards
            for start in range(images.start, images.stop, self.batch_size)
        ]
        reads_videos = any(isinstance(part, VideoFrames) for part in parts_of(self.dataset))
        loader = SupervisedLoader(
            _Samples(self.dataset, self.preprocessing.transform),
            batch_sampler=batches,
            num_workers=min(self.num_workers, 1) if reads_videos else self.num_workers,  # each decodes all frames
            collate_fn=list,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise it draws from the global one
        )
        logged = MetricLogger("  ", is_main=distributed.is_main()).log_every(
            loader, 10, "Features:", len(batches), batch_size=self.batch_size
        )
        model = TokenModel(self.backbone.model, self.choice).eval()
        unreadable: list[Unreadable] = []
        for images in shards:
            shard = Shard(arrays={kind: [] for kind in self.choice.kinds})
            for _ in range(images.start, images.stop, self.batch_size):
                self._add_batch(shard, model, next(logged))
            unreadable += shard.unreadable
            check_unreadable(unreadable, len(self.dataset))
            yield shard
        next(logged, None)  # logs the total time

    def _add_batch(self, shard: Shard, model: TokenModel, samples: Sequence[tuple[int, Tensor | str]]) -> None:
        """Add samples to a shard; images of one size are run together."""
        readable: dict[int, Tensor] = {}
        for index, image in samples:
            if isinstance(image, str):
                shard.unreadable.append(Unreadable(index, self.dataset.describe(index), image))
            else:
                readable[index] = image
        found: dict[int, dict[str, np.ndarray]] = {}
        for size in dict.fromkeys(image.shape for image in readable.values()):
            found |= self._run_model(model, {i: image for i, image in readable.items() if image.shape == size})
        for index, image in readable.items():
            shard.rows.append(Row(self.dataset.describe(index), self.dataset.get_target(index), self._grid(image)))
            for kind, array in found[index].items():
                shard.arrays[kind].append(array)

    def _run_model(self, model: TokenModel, images: dict[int, Tensor]) -> dict[int, dict[str, np.ndarray]]:
        """Arrays of images of one size by index, each with the first dimension of the shard's arrays."""
        batch, indices, flat = torch.stack(list(images.values())), list(images), self.preprocessing.grid is None
        with autocast(self.backbone.autocast_dtype):
            output = run_model(model, batch.to(distributed.device(), non_blocking=True)).float()
        require_finite(output, lambda row: self.dataset.describe(indices[row]), model)
        arrays = arrays_of(output, self.choice, self._grid(batch), flat=flat)
        for array in arrays.values():
            is_bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if is_bad.any():
                raise ValueError(
                    f"features of {self.dataset.describe(indices[int(is_bad.argmax())])} exceed the largest float16, "
                    f"{np.finfo(np.float16).max:g}: use --dtype float32"
                )
        return {
            index: {
                kind: array[row] if flat and kind == "patch" else array[row : row + 1] for kind, array in arrays.items()
            }
            for row, index in enumerate(indices)
        }

    def _grid(self, images: Tensor) -> tuple[int, int]:
        patch_size = self.backbone.model.patch_size
        return images.shape[-2] // patch_size, images.shape[-1] // patch_size


def check_unreadable(unreadable: Sequence[Unreadable], num_images: int) -> None:
    """Raise a `ValueError` if too many images cannot be read."""
    if len(unreadable) > MAX_BAD_SHARE * num_images:
        raise ValueError(
            f"{len(unreadable)} of {counted(num_images, 'image')} cannot be read, more than the {MAX_BAD_SHARE:.0%} "
            f"that may be omitted: remove or repair them; the first: {unreadable[0].reason}"
        )


class _Samples(Dataset[tuple[int, Tensor | str]]):
    """Index and transformed image of a sample, or the reason why it cannot be read."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Any], Tensor]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.transform(self.dataset.get_image(index))
        except BadImageError as error:
            return index, str(error)
