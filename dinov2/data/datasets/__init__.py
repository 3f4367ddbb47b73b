"""Datasets from dataset strings: the registry of known datasets, to which others can be added."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.concatenation import image_folders
from dinov2.data.datasets.fashion_mnist import FashionMNIST
from dinov2.data.datasets.image_folder import ImageFolder
from dinov2.data.datasets.image_list import ImageList
from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.image_net_22k import ImageNet22k
from dinov2.data.datasets.mixture import Mixture
from dinov2.data.datasets.pages import with_pages
from dinov2.data.datasets.torchvision_sets import TorchvisionSet
from dinov2.data.datasets.torchvision_sources import SOURCES
from dinov2.data.dense.depth_lists import FORMATS, ListedDepth
from dinov2.data.dense.fashion_scenes import FashionScenes
from dinov2.data.dense.folders import DepthFolder, SegmentationFolder
from dinov2.data.dense.segmentation_sets import ADE20K, VOC2012, Cityscapes
from dinov2.data.images import ImageOptions
from dinov2.data.shards import ParquetFiles, Shards

__all__ = [
    "ADE20K",
    "DATASETS",
    "VOC2012",
    "Cityscapes",
    "DepthFolder",
    "Entry",
    "FashionMNIST",
    "FashionScenes",
    "ImageDataset",
    "ImageFolder",
    "ImageList",
    "ImageNet",
    "ImageNet22k",
    "ListedDepth",
    "Mixture",
    "SegmentationFolder",
    "TorchvisionSet",
    "build_dataset",
    "make_dataset",
    "parse_dataset_str",
]

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A dataset of the registry."""

    factory: Callable[..., Any]  # called with the keys of the string, transform and target_transform
    required: tuple[str, ...] = ("root",)
    optional: tuple[str, ...] = ()
    splits: type[Enum] | tuple[str, ...] | None = None  # values of `split`; None: any text

    @property
    def keys(self) -> tuple[str, ...]:
        return self.required + self.optional

    @property
    def known_splits(self) -> Mapping[str, Any]:
        """Text for `split` -> value that the dataset gets; empty if any text is allowed."""
        if isinstance(self.splits, tuple):
            return {split: split for split in self.splits}
        return {} if self.splits is None else self.splits.__members__


def _mixture(*, file: str, **transforms: Any) -> Mixture:
    return Mixture(file, lambda text: build_dataset(text, DATASETS), **transforms)


# Name in the dataset string -> dataset. To add one, write a class like ImageFolder (see ImageDataset) and a line like
#     DATASETS["Birds"] = Entry(Birds, required=("root",), optional=("split",))
# here or in your code; then "Birds:root=/data/birds:split=val" is Birds(root="/data/birds", split="val").
DATASETS: dict[str, Entry] = (
    {
        "ImageNet": Entry(ImageNet, required=("split", "root", "extra"), optional=("real",), splits=ImageNet.Split),
        "ImageNet22k": Entry(ImageNet22k, required=("root", "extra")),
        "ImageFolder": Entry(image_folders, optional=("split", "suffixes")),
        "ImageList": Entry(ImageList, required=("file",), optional=("root", "classes")),
        "FashionMNIST": Entry(FashionMNIST, required=("split",), optional=("root",), splits=FashionMNIST.Split),
        "Tar": Entry(partial(Shards, "Tar"), required=("files",), optional=("image", "label")),
        "Zip": Entry(partial(Shards, "Zip"), required=("files",), optional=("image", "label")),
        "Parquet": Entry(ParquetFiles, required=("files",), optional=("image", "label")),
        "Mix": Entry(_mixture, required=("file",)),
        # With a map for each image, see dinov2.data.dense.
        "ADE20K": Entry(ADE20K, required=("split", "root"), splits=ADE20K.Splits),
        "VOC2012": Entry(VOC2012, required=("split", "root"), splits=VOC2012.Splits),
        "Cityscapes": Entry(Cityscapes, required=("split", "root"), splits=Cityscapes.Splits),
        "SegmentationFolder": Entry(SegmentationFolder, optional=("split", "classes", "colors", "ignore", "first")),
        "FashionScenes": Entry(
            FashionScenes,
            ("split",),
            ("size", "background", "noise", "length", "kind", "seed", "items"),
            FashionScenes.Split,
        ),
        "DepthFolder": Entry(DepthFolder, optional=("split", "scale")),
    }
    | {
        name: Entry(partial(ListedDepth, name), ("split", "root"), ("list", "depth_root", "scale"), tuple(known.lists))
        for name, known in FORMATS.items()
    }
    | {
        name: Entry(partial(TorchvisionSet, name), source.required, source.optional, source.split_names)
        for name, source in SOURCES.items()
    }
)


def parse_dataset_str(dataset_str: str, datasets: Mapping[str, Entry] | None = None) -> tuple[str, dict[str, Any]]:
    """Parse a dataset string `Name(:key=value)*`, such as `ImageNet:split=TRAIN:root=/data/imagenet:extra=/data/extra`.

    A `:` begins a new key only before a key of the dataset and `=`, so values may contain both `:` and `=`.

    Args:
        dataset_str: The string.
        datasets: Known datasets by name; None for `DATASETS`.

    Returns:
        The name and the keyword arguments; `split` as a member of the enum of the dataset if it has one, else as text.

    Raises:
        ValueError: A name, key or split is unknown, or a key is missing, empty or repeated.
    """
    datasets = DATASETS if datasets is None else datasets
    name, _, rest = dataset_str.partition(":")
    if name not in datasets:
        if os.path.isdir(dataset_str):
            advice = f"; for its images write ImageFolder:root={dataset_str}" if datasets is DATASETS else ""
            raise ValueError(f"{dataset_str!r} is a folder, not a dataset string{advice}")
        raise ValueError(f"unknown dataset {_quote(name, datasets)} in {dataset_str!r}; known: {', '.join(datasets)}")
    entry = datasets[name]
    usage = _usage(name, entry)

    # "root=/a:b:extra=/c" -> "", "root", "/a:b", "extra", "/c"
    leading, *parts = re.split(rf"(?:^|:)({'|'.join(entry.keys)})=", rest)
    if leading:
        raise _unknown_key(leading.partition("=")[0], dataset_str, entry)
    keys, values = parts[::2], parts[1::2]
    arguments: dict[str, Any] = dict(zip(keys, values, strict=True))
    if len(arguments) < len(keys):
        raise ValueError(f"a key is given twice in {dataset_str!r}; write {usage}")
    missing = [key for key in entry.required if not arguments.get(key)]
    if missing:
        raise ValueError(f"missing {' and '.join(missing)} in {dataset_str!r}; write {usage}")
    if empty := [key for key, value in arguments.items() if not value]:  # for example from an unset shell variable
        raise ValueError(f"{' and '.join(empty)} empty in {dataset_str!r}; write {usage}")
    if entry.splits is not None and "split" in arguments:
        split, known = arguments["split"], entry.known_splits
        if split not in known:
            if key := _key_inside(split):
                raise _unknown_key(key, dataset_str, entry)
            raise ValueError(f"unknown split {_quote(split, known)} in {dataset_str!r}; known: {', '.join(known)}")
        arguments["split"] = known[split]
    return name, arguments


def make_dataset(
    *,
    dataset_str: str,
    transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
    image_options: ImageOptions | None = None,
) -> Any:
    """Build a dataset, see `ImageDataset`, from a dataset string.

    Args:
        dataset_str: See `parse_dataset_str`; `~` at the beginning of a path is the home folder.
        transform: Function of the images.
        target_transform: Function of the targets.
        image_options: Options of reading image files. Without a value range, it is measured if there are images of more
            than 8 bits, and is then in `image_options` of the dataset.

    Raises:
        ValueError, OSError: The string is invalid, or files are missing or damaged.
    """
    dataset = build_dataset(dataset_str, DATASETS, transform=transform, target_transform=target_transform)
    logger.info("%d samples in dataset %r", len(dataset), dataset_str)
    if isinstance(dataset, ImageDataset):
        dataset.image_options = image_options or dataset.image_options
        dataset = with_pages(dataset)
        for level, note in dataset.notes():
            logger.log(level, "%s", note)
    return dataset


def build_dataset(dataset_str: str, datasets: Mapping[str, Entry], **arguments: Any) -> Any:
    """Call the factory of one of the `datasets` with the keys of a dataset string and the `arguments`.

    `~` at the beginning of a path is the home folder; errors as in `parse_dataset_str`.
    """
    logger.info("using dataset %r", dataset_str)
    name, found = parse_dataset_str(dataset_str, datasets)
    for key, value in found.items():
        if key != "split":
            found[key] = os.path.expanduser(value)
            # A misspelled key, as in "root=/data:splt=val", or a path that really has such a name?
            unknown = _key_inside(value)
            if unknown and not os.path.exists(found[key]):
                raise _unknown_key(unknown, dataset_str, datasets[name])
    return datasets[name].factory(**found, **arguments)


def _key_inside(value: str) -> str | None:
    """The `key` in a value like `/data:key=text`, which may be misspelled."""
    match = re.search(r":(\w+)=", value)
    return None if match is None else match[1]


def _unknown_key(key: str, dataset_str: str, entry: Entry) -> ValueError:
    usage = _usage(dataset_str.partition(":")[0], entry)
    options = [field.name for field in fields(ImageOptions)]
    hint = f"; {key} is a key of the configuration: images.{key}=..." if key in options else ""
    return ValueError(f"unknown key {_quote(key, entry.keys)} in {dataset_str!r}; write {usage}{hint}")


def _quote(text: str, known: Iterable[str]) -> str:
    """Quote a text; suggest the nearest known one if they are similar."""
    lowered = {choice.lower(): choice for choice in known}
    near = difflib.get_close_matches(text.lower(), lowered, n=1)
    return f"{text!r} (did you mean {lowered[near[0]]}?)" if near else repr(text)


def _usage(name: str, entry: Entry) -> str:
    values = {} if entry.splits is None else {"split": "|".join(entry.known_splits)}
    required = "".join(f":{key}={values.get(key, '...')}" for key in entry.required)
    optional = "".join(f"[:{key}={values.get(key, '...')}]" for key in entry.optional)
    return name + required + optional
