"""Measure all images of a dataset, or some: values of each band, sizes, unreadable files, duplicates.

Every image counts the same, whatever its size, as in training, which crops them to one size.

Legend: n images, C bands, P sampled pixels of an image.
"""

import hashlib
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import BadImageError
from dinov2.data.images.options import ImageOptions, range_of_each
from dinov2.data.images.value_range import share_outside
from dinov2.data.workers import SupervisedLoader
from dinov2.meters import MetricLogger

PERCENTILES = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)
BINS = 64  # of histograms
_OPTIONS = ("bands", "shown_bands", "bands_axis", "nodata", "pages")  # that training needs as well
_PIXELS = 1024  # P at most, evenly spaced
_POOLED = 2**22  # sampled values per band that are kept, at most
_BATCH = 16


class Measured(NamedTuple):
    """One image."""

    sample: int  # index in the dataset
    size: tuple[int, int]  # width and height
    kind: str  # type and number of bands, as they are read
    digest: bytes  # of the pixels
    mean: np.ndarray  # (C,) of the levels, in [0, 1]
    square: np.ndarray  # (C,) mean of their squares
    low: np.ndarray  # (C,) smallest value as stored; NaN without finite ones
    high: np.ndarray  # (C,) largest value
    values: np.ndarray  # (C, P) as stored


class Unreadable(NamedTuple):
    """An image that cannot be read."""

    path: str
    reason: str


@dataclass
class Band:
    """The values of a band in all images, as stored unless stated otherwise."""

    name: str
    value_range: tuple[float, float]  # that is mapped to [0, 1]
    mean: float  # of the values mapped to [0, 1]
    std: float
    smallest: float
    largest: float
    percentiles: dict[str, float]
    outside: float  # share of the values outside the range
    missing: float  # share of the values that are not finite
    constant: int  # images in which all sampled values are equal
    histogram: list[int]  # of the values between the outer percentiles


@dataclass
class Statistics:
    """The statistics of a dataset."""

    images: int  # that were inspected
    total: int  # in the dataset
    unreadable: list[Unreadable]
    sizes: Counter[tuple[int, int]]  # (width, height) -> images
    kinds: Counter[str]  # type and number of bands -> images
    bands: list[Band]
    duplicates: list[list[int]]  # samples with the same pixels, groups
    contradicting: int  # of these groups, whose samples are of several classes
    names: dict[int, str]  # of the duplicates
    options: ImageOptions  # of reading images, with the range

    def overrides(self) -> list[str]:
        """The settings to train with, as `key=value`."""
        values = {f"images.{key}": value for key, value in self.options.facts().items() if key in _OPTIONS}
        if self.options.value_range is not None:
            ranges = [[round(edge, 6) for edge in band.value_range] for band in self.bands]
            values["images.value_range"] = ranges[0] if self.options.bands is None else ranges
        for key in ("mean", "std"):
            values[f"augmentation.{key}"] = [round(getattr(band, key), 4) for band in self.bands]
        return [
            f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
            for key, value in values.items()
            if value is not None
        ]

    def lines(self) -> list[str]:
        """The result in some lines of text."""
        smallest, largest = (choose(self.sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
        found = [
            f"{self.images:,} of {self.total:,} images: {len(self.unreadable):,} unreadable; "
            f"{' x '.join(map(str, smallest))} to {' x '.join(map(str, largest))} pixels; "
            + ", ".join(f"{count:,} of {kind}" for kind, count in self.kinds.most_common(4))
        ]
        for band in self.bands:
            low, high = band.percentiles["1"], band.percentiles["99"]
            found.append(
                f"{band.name}: {band.smallest:,.6g} to {band.largest:,.6g}, 98 % from {low:,.6g} to {high:,.6g}; "
                f"{band.value_range[0]:,.6g} to {band.value_range[1]:,.6g} is mapped to [0, 1]: mean {band.mean:.4f}, "
                f"std {band.std:.4f}, {band.outside:.2%} outside"
                + (f", {band.missing:.2%} missing (NaN or NoData), which become 0" if band.missing else "")
            )
        copies = sum(len(group) - 1 for group in self.duplicates)
        found.append(
            f"{copies:,} images have the same pixels as an earlier one"
            + (f"; {self.contradicting:,} groups of them are of several classes" if self.contradicting else "")
        )
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "images": self.total,
            "inspected": self.images,
            "unreadable": [each._asdict() for each in self.unreadable],
            "sizes": [{"width": w, "height": h, "images": count} for (w, h), count in self.sizes.most_common()],
            "types": dict(self.kinds.most_common()),
            "bands": [vars(band) for band in self.bands],
            "duplicates": [[self.names[index] for index in group] for group in self.duplicates],
            "duplicates_of_several_classes": self.contradicting,
            "overrides": self.overrides(),
        }


def measure(dataset: ImageDataset, *, max_images: int | None = None, num_workers: int = 0) -> Statistics:
    """Measure the images of a dataset; its options of reading images decide what bands are and which range they have.

    Args:
        dataset: The dataset; a missing range of values is measured on some of its images first.
        max_images: Inspect so many, evenly spaced; None: all.
        num_workers: Processes that decode images.

    Raises:
        ValueError: No image can be read.
    """
    dataset.survey()
    count = min(max_images or len(dataset), len(dataset))
    indices = [position * len(dataset) // count for position in range(count)]
    loader = SupervisedLoader(
        _Images(dataset, keep_every=max(count * _PIXELS // _POOLED, 1)),
        batch_size=_BATCH,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator().manual_seed(0),
    )
    images: list[Measured] = []
    unreadable: list[Unreadable] = []
    for batch in MetricLogger("  ").log_every(loader, 50, "Images:", len(loader)):
        images += [each for each in batch if isinstance(each, Measured)]
        unreadable += [each for each in batch if isinstance(each, Unreadable)]
    if not images:
        raise ValueError(f"none of {count} images can be read; the first, {unreadable[0].path}: {unreadable[0].reason}")
    groups = defaultdict(list)
    for each in images:
        groups[each.digest].append(each.sample)
    duplicates = sorted(group for group in groups.values() if len(group) > 1)
    options = dataset.image_options
    return Statistics(
        images=count,
        total=len(dataset),
        unreadable=unreadable,
        sizes=Counter(each.size for each in images),
        kinds=Counter(each.kind for each in images),
        bands=_bands(images, options.bands, options.value_range),
        duplicates=duplicates,
        contradicting=sum(len({str(dataset.get_target(index)) for index in group}) > 1 for group in duplicates),
        names={index: dataset.describe(index) for group in duplicates for index in group},
        options=options,
    )


class _Images(Dataset[Measured | Unreadable]):
    """The measures of each image, without the sampled values of all but every `keep_every`-th."""

    def __init__(self, dataset: ImageDataset, keep_every: int) -> None:
        self.dataset, self.keep_every = dataset, keep_every

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Measured | Unreadable:
        try:
            return self._measured(index)
        except BadImageError as error:
            return Unreadable(error.path, str(error.__cause__ or error))

    def _measured(self, index: int) -> Measured:
        image = self.dataset.open_image(index)
        with self.dataset._naming(index):
            levels = image.pixels()
            stored = image.samples().values if hasattr(image, "samples") and image.is_deep else levels
        step = max(stored.shape[0] * stored.shape[1] // _PIXELS, 1) if index % self.keep_every == 0 else 0
        values = stored.reshape(-1, stored.shape[2])[::step].T if step else stored.reshape(-1, stored.shape[2])[:0].T
        finite = np.where(np.isfinite(stored), stored, np.nan) if stored.dtype.kind == "f" else stored
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of images without a finite value
            extremes = [np.asarray(find(finite, axis=(0, 1)), np.float64) for find in (np.nanmin, np.nanmax)]
        if len(values) < levels.shape[2]:  # gray, read as RGB
            values, *extremes = (np.repeat(each, levels.shape[2], axis=0) for each in (values, *extremes))
        flat = levels.reshape(-1, levels.shape[2]).astype(np.float64) / 255
        known = np.broadcast_to(np.isfinite(stored.reshape(-1, stored.shape[2])), flat.shape)
        number = np.where(known.any(0), known.sum(0), np.nan)  # no mean of a band without values
        return Measured(
            index,
            image.size,
            f"{stored.dtype.name} x {stored.shape[2]} band{'s' * (stored.shape[2] > 1)}",
            hashlib.blake2b(repr(stored.shape).encode() + np.ascontiguousarray(stored).data, digest_size=16).digest(),
            np.where(known, flat, 0).sum(0) / number,
            np.where(known, flat**2, 0).sum(0) / number,
            extremes[0],
            extremes[1],
            np.array(values, np.float64),
        )


def _bands(images: Sequence[Measured], chosen: Sequence[int] | None, value_range: Any) -> list[Band]:
    mean, square = (np.array([getattr(each, name) for each in images]) for name in ("mean", "square"))
    mean, square = (np.nan_to_num(np.nansum(each, 0) / np.isfinite(each).sum(0)) for each in (mean, square))
    ranges = range_of_each(value_range or (0.0, 255.0), len(mean))
    names = ["red", "green", "blue"] if chosen is None else [f"band {band}" for band in chosen]
    bands = []
    for number, name in enumerate(names):
        of_each = [each.values[number] for each in images if each.values.shape[1]]
        values = np.concatenate(of_each)
        finite = values[np.isfinite(values)]
        percentiles = np.percentile(finite if finite.size else np.zeros(1), PERCENTILES).tolist()
        histogram, _ = np.histogram(finite, BINS, (percentiles[0], max(percentiles[-1], percentiles[0] + 1e-12)))
        bands.append(
            Band(
                name=name,
                value_range=ranges[number],
                mean=float(mean[number]),
                std=float(max(square[number] - mean[number] ** 2, 0.0) ** 0.5),
                smallest=min((low for each in images if math.isfinite(low := float(each.low[number]))), default=0.0),
                largest=max((high for each in images if math.isfinite(high := float(each.high[number]))), default=0.0),
                percentiles={f"{p:g}": value for p, value in zip(PERCENTILES, percentiles, strict=True)},
                outside=share_outside(values, ranges[number]),
                missing=float(1 - np.isfinite(values).mean()),
                constant=sum(bool((each == each[0]).all()) for each in of_each),
                histogram=histogram.tolist(),
            )
        )
    return bands
