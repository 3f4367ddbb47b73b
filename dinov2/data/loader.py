"""Data loaders: a general one, the one of training, and the transfer of batches to the device."""

import logging
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.augment import DataAugmentationDINO, MultiCrop
from dinov2.data.collate import Batch
from dinov2.data.device_augment import DeviceAugmentation, RawBatch, make_crops
from dinov2.data.masking import MaskingGenerator
from dinov2.data.sample_stream import AugmentedDataset, PositionBatches, StreamCollate
from dinov2.data.samplers import FINITE, SamplerType, make_sampler
from dinov2.data.shards.sharded import order_warning
from dinov2.data.workers import DEFAULT_TIMEOUT, SupervisedLoader

logger = logging.getLogger(__name__)


def make_data_loader(
    *,
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Build a torch DataLoader over this rank's part of a dataset.

    Args:
        batch_size: Samples per batch of this rank.
        sampler_type: Order of the samples; None reads the whole dataset on every rank.
        sampler_size: Samples per epoch over all ranks, for EPOCH only; -1 means the size of the dataset.
        sampler_advance: Samples of this rank to skip at the start, for infinite samplers only.
        persistent_workers: Whether to keep the worker processes between epochs; no effect without workers.
        collate_fn: List of samples -> batch; None means torch's default.
    """
    _check_sampler_options(sampler_type, shuffle=shuffle, size=sampler_size, advance=sampler_advance)
    sampler = None
    if sampler_type is not None:
        place: Any = {"start_position": sampler_advance * world_size, "rank": rank, "world_size": world_size}
        order: Any = {"sample_count": _num_samples(dataset), "shuffle": shuffle, "seed": seed, "size": sampler_size}
        sampler = make_sampler(sampler_type, batch_size=batch_size, **order, **place)
    loader = SupervisedLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle if sampler is None else None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=persistent_workers and num_workers > 0,
        generator=torch.Generator().manual_seed(seed),  # otherwise it draws from the global one
    )
    infinite = sampler_type is not None and sampler_type not in FINITE
    logger.info("%s batches of %d samples", "endless" if infinite else len(loader), batch_size)
    return loader


def _check_sampler_options(sampler_type: SamplerType | None, *, shuffle: bool, size: int, advance: int) -> None:
    if size > 0 and sampler_type is not SamplerType.EPOCH:
        raise ValueError(f"sampler_size={size} is for the sampler EPOCH only, not for {sampler_type}")
    if advance > 0 and (sampler_type is None or sampler_type in FINITE):
        raise ValueError(f"sampler_advance={advance} is for infinite samplers only, not for {sampler_type}")
    if sampler_type is SamplerType.GLOBAL_ORDER and not shuffle:
        raise ValueError("the sampler GLOBAL_ORDER always shuffles: not with shuffle=False")


def make_train_loader(
    dataset: Dataset,
    *,
    augmentation: Callable[[Any], MultiCrop],
    batch_size: int,
    num_workers: int,
    seed: int,
    mask_generator: MaskingGenerator,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype = torch.float32,
    augment_on: str = "cpu",
    sampler: SamplerType = SamplerType.GLOBAL_ORDER,
    start_position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    patience: float = DEFAULT_TIMEOUT,
    while_waiting: Callable[[], object] | None = None,
) -> Iterable[Batch] | Iterable[RawBatch]:
    """Build the loader of training: endless batches of one rank, after the first ``start_position`` images of the run.

    A batch depends neither on ``num_workers`` nor on where the loader started. With GLOBAL_ORDER and SHARD_ORDER the
    images at a position of the run and their crops depend on the seed only, not on the number of ranks.

    Args:
        dataset: Item i is (PIL image, any target); raises `BadImageError` for an image that cannot be read.
        augmentation: Image -> crops; draws from torch's CPU generator only. Must be picklable, as must the dataset.
        batch_size: B, images per rank and batch.
        mask_generator, mask_ratio_tuple, mask_probability: See `Masking`.
        augment_on: "cpu", or "device": the loader gives whole images and crop parameters, and `to_device` computes the
            crops there; requires a DataAugmentationDINO whose implementation is not "pil".
        sampler: Order of the images; finite samplers continue with their next epoch.
        start_position: Images used by all ranks before, when a run is resumed. Only GLOBAL_ORDER and SHARD_ORDER
            neither repeat nor omit any when ``world_size`` has changed; the others skip what each rank would have read.
        patience, while_waiting: See `SupervisedLoader`.
    """
    raw = _device_augmentation(augmentation, augment_on)
    place: Any = {"batch_size": batch_size, "start_position": start_position, "rank": rank, "world_size": world_size}
    parts: Any = {"shard_sizes": getattr(dataset, "shard_sizes", None), "mixture": getattr(dataset, "mixture", ())}
    order: Any = {"sample_count": _num_samples(dataset), "seed": seed}
    indices = make_sampler(sampler, **order, **parts, endless=True, **place)
    by_shards = sampler is SamplerType.SHARD_ORDER
    if warning := order_warning(getattr(dataset, "parts", [dataset]), by_shards=by_shards):
        logger.warning("train.sampler=%s: %s", sampler.name, warning)
    crop_format = raw.crop_format(dtype) if raw else None
    return SupervisedLoader(
        AugmentedDataset(dataset, raw or augmentation, seed),
        batch_sampler=PositionBatches(indices, **place),
        num_workers=num_workers,
        collate_fn=StreamCollate(
            seed=seed,
            mask_generator=mask_generator,
            mask_ratio_tuple=mask_ratio_tuple,
            mask_probability=mask_probability,
            dtype=dtype,
            crop_format=crop_format,
        ),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # otherwise it draws from the global one
        patience=patience,
        patience_key="train.data_timeout",
        while_waiting=while_waiting,
    )


def _device_augmentation(augmentation: Callable[[Any], MultiCrop], augment_on: str) -> DeviceAugmentation | None:
    if augment_on not in ("cpu", "device"):
        raise ValueError(f"unknown augment_on {augment_on!r}; known: cpu, device")
    if augment_on == "cpu":
        return None
    if not isinstance(augmentation, DataAugmentationDINO) or augmentation.implementation == "pil":
        name = getattr(augmentation, "implementation", type(augmentation).__name__)
        raise ValueError(f"augment_on='device' is for DataAugmentationDINO with the tensor implementation, not {name}")
    return DeviceAugmentation(augmentation)


def to_device(loader: Iterable[Batch] | Iterable[RawBatch], device: torch.device) -> Generator[Batch]:
    """Move the batches of a loader to a device and compute missing crops there; on CUDA one batch ahead.

    Closing the generator ends the worker processes of the loader.
    """
    if device.type == "cuda":
        return _to_cuda(loader, device)
    return (_move(batch, device) for batch in loader)


def _to_cuda(loader: Iterable[Batch] | Iterable[RawBatch], device: torch.device) -> Generator[Batch]:
    copies = torch.cuda.Stream(device)
    ahead = None
    for batch in loader:
        with torch.cuda.stream(copies):
            copied = _move(batch, device)
        if ahead is not None:
            yield ahead
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for x in copied:
            if isinstance(x, Tensor):
                x.record_stream(compute)  # so that the allocator waits for it before it uses the memory again
        ahead = copied
    if ahead is not None:
        yield ahead


def _move(batch: Batch | RawBatch, device: torch.device) -> Batch:
    if isinstance(batch, RawBatch):
        pixels = batch.pixels.to(device, non_blocking=True)
        return make_crops(batch._replace(pixels=pixels, batch=_move(batch.batch, device)))
    moved = Batch._make(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch)
    return moved._replace(bad_images=tuple(moved.bad_images))  # pinning the memory turned it into a list


def _num_samples(dataset: Dataset) -> int:
    return len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare it
