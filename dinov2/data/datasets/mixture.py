"""Mixtures of datasets with weights, from a YAML file."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.concatenation import Concatenation
from dinov2.data.datasets.image_folder import ImageFolder
from dinov2.data.global_order import Source, samples_per_block
from dinov2.data.images import EncodedImage
from dinov2.data.images.survey import ImageSurvey
from dinov2.data.images.value_range import ValueRange
from dinov2.data.shards.sharded import survey_some
from dinov2.yaml_values import YamlError, parse

_KEYS = ("dataset", "weight", "name", "value_range")


class Entry(NamedTuple):
    """A source in the file of a mixture."""

    dataset: str
    weight: float | None
    name: str
    value_range: ValueRange | None  # instead of that of all sources


class Mixture(Concatenation):
    """Several datasets one after the other, from which training draws samples by their weights.

    The file is a YAML list of sources with the keys `dataset` (a dataset string), `weight` and `name` (default: the
    dataset string). A weight is the share of the samples of a run, relative to the sum of all weights; see
    `dinov2.data.global_order` for the order. Without weights it is a plain concatenation. The length is that of all
    sources together, and what reads the whole dataset, such as an evaluation, reads every sample once. Images
    of a source that have more than 8 bits are mapped by its `value_range`, if there is one, not by the range of others.

    Args:
        file: The YAML file.
        open_dataset: Opens the dataset of a dataset string.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: The file or a source of it is missing or wrong; names the source.
    """

    def __init__(self, file: str | Path, open_dataset: Callable[[str], Any], **transforms: Any) -> None:
        entries = _read(Path(file))
        self._weights = [entry.weight for entry in entries if entry.weight is not None]
        try:  # before sources are listed
            self._per_block = samples_per_block(self._weights) if self._weights else []
        except ValueError as error:
            smallest = min(entries, key=lambda entry: entry.weight or 0.0)
            raise ValueError(f"{file}: {smallest.name}: {error}") from error
        super().__init__(
            [_open(entry, open_dataset) for entry in entries], [each.name for each in entries], **transforms
        )
        pairs = zip(self.parts, entries, strict=True)
        self._ranges = {id(part): entry.value_range for part, entry in pairs if entry.value_range is not None}
        _check_apart(self.parts, self.names, file)

    @property
    def mixture(self) -> list[Source]:
        """The sources with their samples in a block; empty without weights."""
        if not self._per_block:
            return []
        return [
            Source(name, len(part), count, getattr(part, "shard_sizes", None))
            for name, part, count in zip(self.names, self.parts, self._per_block, strict=True)
        ]

    @property
    def shares(self) -> list[float]:
        """The share of each source in the samples of a run."""
        counts = self._per_block or [len(part) for part in self.parts]
        return [count / sum(counts) for count in counts]

    @property
    def shard_sizes(self) -> list[int] | None:
        """The number of samples in the shards of all sources; None if one is not in shards."""
        sizes: list[Any] = [getattr(part, "shard_sizes", None) for part in self.parts]
        return None if None in sizes else list(chain.from_iterable(sizes))

    def open_image(self, index: int) -> EncodedImage:
        part, own = self._find(index)
        if (value_range := self._ranges.get(id(part))) is None:
            return super().open_image(index)
        part.image_options = self.image_options.with_range(value_range)
        return part.open_image(own)

    def fingerprint(self) -> str:
        """Hash of the sources, and of their shares and ranges."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=8)
        digest.update(str(self._per_block).encode())
        if self._ranges:
            digest.update(str([self._ranges.get(id(part)) for part in self.parts]).encode())
        return digest.hexdigest()

    def survey(self) -> ImageSurvey:
        if self._survey is None:
            places = [place for place, part in enumerate(self.parts) if id(part) not in self._ranges]
            places = places or list(range(len(self.parts)))  # of which a range is measured
            parts = [self.parts[place] for place in places]
            sources = Concatenation(parts, [self.names[place] for place in places])
            sources.image_options = self.image_options
            self._survey = survey_some(sources, parts)
            self.image_options = self._survey.options
        return self._survey


def _read(file: Path) -> list[Entry]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (YamlError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{file} must be a list of sources, - dataset: ..., each with a weight or none of them")
    entries = [_entry(each, f"source {number} in {file}") for number, each in enumerate(content, start=1)]
    _check_unique([entry.name for entry in entries], file)
    without = [entry.name for entry in entries if entry.weight is None]
    if 0 < len(without) < len(entries):
        raise ValueError(f"{file}: {without[0]} has no weight, but others have: give all of them one, or none")
    return entries


def _entry(content: object, where: str) -> Entry:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must have the keys {', '.join(_KEYS)}, got {content!r}")
    if unknown := [key for key in content if key not in _KEYS]:
        raise ValueError(f"unknown key {unknown[0]!r} of {where}; known: {', '.join(_KEYS)}")
    dataset, weight = content.get("dataset"), cast(Any, content.get("weight"))
    name = content.get("name", dataset)
    if not isinstance(dataset, str) or not isinstance(name, str) or not dataset or not name:
        raise ValueError(f"{where} needs a text as dataset, and as name if there is one, got {dict(content)}")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if "weight" in content and not (is_number and 0 < weight < math.inf):
        raise ValueError(f"weight of {where} must be a number above 0, got {weight!r}")
    return Entry(dataset, weight, name, _value_range(content.get("value_range"), where))


def _value_range(value: Any, where: str) -> ValueRange | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(each) in (int, float) for each in value):
        low, high = float(value[0]), float(value[1])
        if -math.inf < low < high < math.inf:
            return low, high
    raise ValueError(f"value_range of {where} must be [low, high], the smaller one first, got {value!r}")


def _check_unique(names: Sequence[str], file: Path) -> None:
    if len(set(names)) < len(names):
        twice = max(names, key=list(names).count)
        raise ValueError(f"{file} names {twice} twice: the same images would be two sources, with a pass over each")


def _check_apart(parts: Sequence[ImageDataset], names: Sequence[str], file: str | Path) -> None:
    """Raise a ValueError for a folder that is in two sources, whose images would be drawn twice as often."""
    folders: dict[str, str] = {}
    for part, name in zip(parts, names, strict=True):
        roots = part.parts if isinstance(part, Concatenation) else [part]
        for root in {os.path.realpath(each.root) for each in roots if isinstance(each, ImageFolder)}:
            for other, owner in folders.items():
                if owner != name and (root == other or root.startswith(f"{other}/") or other.startswith(f"{root}/")):
                    raise ValueError(
                        f"{file}: {owner} and {name} have images of one folder, {max(root, other, key=len)}"
                    )
            folders[root] = name


def _open(entry: Entry, open_dataset: Callable[[str], Any]) -> ImageDataset:
    if entry.dataset.partition(":")[0] == "Mix":
        raise ValueError(f"source {entry.name}: a Mix cannot be a source of another one; list its sources here")
    try:
        part = open_dataset(entry.dataset)
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"source {entry.name}: {error}") from error
    if not isinstance(part, ImageDataset):
        raise ValueError(f"source {entry.name}: {type(part).__name__} cannot be a source of a mixture")
    if not len(part):
        raise ValueError(f"source {entry.name} has no images")
    return part
