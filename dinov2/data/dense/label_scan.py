"""The labels that occur in masks without a list of classes, and whether they look like class indices."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2.data.dense.map_files import MAX_CLASS, BadMapError, read_indices
from dinov2.data.dense.pairing import named
from dinov2.data.images import DEFAULT_OPTIONS, read_image_file

logger = logging.getLogger(__name__)

_MAX_SCANNED = 2_000  # masks that are read to find the number of classes
_FEW_LABELS = 8  # so many labels, or fewer, are not called in-between values
_RARE_SHARE = 2e-4  # of the pixels: median of the labels in a mask that was a JPEG file, less than in real datasets


class _Label(NamedTuple):
    """Where a value occurs."""

    num_pixels: int
    file: str  # the first mask with it, relative to the root


def numbered_classes(root: Path, masks: Sequence[str], *, ignored: int | None, first: int) -> list[str]:
    """Names "class 0", "class 1", ... up to the largest class index in any of the masks.

    Args:
        root: Folder that the paths of the masks are relative to.
        masks: The masks.
        ignored: Value of ignored pixels; None for none.
        first: Value of class 0; smaller values are ignored.

    Raises:
        BadMapError: A mask cannot be read.
        ValueError: There are too many masks, or their values are hardly class indices.
    """
    if len(masks) > _MAX_SCANNED:
        raise ValueError(
            f"{root} has {len(masks):,} masks, too many to read them all for the number of classes: give their names, "
            "classes=FILE with one per line"
        )
    found = _labels_of(root, masks)
    labels = {value: label for value, label in found.items() if value != ignored and not 0 <= value < first}
    _check_labels(root, labels, sorted(found.keys() - labels.keys()))
    count = max(labels) - first + 1
    rarest = min(labels.values())
    logger.info(
        "%s: %d classes, as the largest label in %d masks is %d; the rarest label has %d pixels, see %s",
        root, count, len(masks), max(labels), rarest.num_pixels, rarest.file,
    )  # fmt: skip
    for warning in label_warnings(labels, first=first):
        logger.warning("%s: %s", root, warning)
    return [f"class {label}" for label in range(count)]


def label_warnings(labels: Mapping[int, tuple[int, str]], *, first: int) -> list[str]:
    """What is suspicious about labels: a line of text each.

    Args:
        labels: Value -> number of its pixels, and a mask with it.
        first: Value of class 0.
    """
    ordered, warnings = sorted(labels), []
    count, advice = ordered[-1] - first + 1, "classes=FILE with the names makes other labels an error"
    if first == 0 and ordered[0] > 0:
        warnings.append(f"label 0 never occurs, {ordered[0]} is the smallest: if labels begin at 1, give first=1")
    rarest = min(ordered, key=lambda label: labels[label])
    pixels, file = labels[rarest]
    where = f"the rarest is {rarest} ({pixels:,} pixels, see {file})"
    shares = np.array([num_pixels for num_pixels, _ in labels.values()]) / sum(each[0] for each in labels.values())
    if 2 * len(ordered) < count:
        occurring = f"{len(ordered)} of {count} labels occur: {named(ordered, most=6)}"
        warnings.append(f"{occurring}; {where}; {advice}, colors=FILE reads levels such as 0 and 255")
    elif len(ordered) > _FEW_LABELS and np.median(shares) < _RARE_SHARE:
        warnings.append(
            f"half of the {len(ordered)} labels have less than {_RARE_SHARE:.2%} of the pixels each, as in masks that "
            f"were JPEG files; {where}; {advice}"
        )
    return warnings


def _labels_of(root: Path, masks: Sequence[str]) -> dict[int, _Label]:
    labels: dict[int, _Label] = {}
    for mask in masks:
        try:
            values = read_indices(read_image_file(root / mask, DEFAULT_OPTIONS), max_pixels=DEFAULT_OPTIONS.max_pixels)
        except Exception as error:  # damaged files make Pillow raise errors of any type
            raise BadMapError(f"cannot read the map {root / mask}: {error}", path=str(root / mask)) from error
        for value, num_pixels in zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True):
            known = labels.get(value, _Label(0, mask))
            labels[value] = known._replace(num_pixels=known.num_pixels + num_pixels)
    return labels


def _check_labels(root: Path, labels: Mapping[int, _Label], ignored: Sequence[int]) -> None:
    """Raise a ValueError if the labels in all masks, next to the ignored values, are hardly class indices."""
    if not labels:
        raise ValueError(f"all pixels of the masks in {root} have ignored values: {named(ignored)}")
    if set(labels) == {0} and ignored:
        [value] = ignored
        raise ValueError(
            f"the masks in {root} have only 0 and {value}, which is ignored; if both are classes, give their colors: "
            f"colors=FILE with lines such as 'background 0 0 0' and 'object {value} {value} {value}'"
        )
    low, high = min(labels), max(labels)
    if low < 0 or high > MAX_CLASS:
        raise ValueError(
            f"the masks in {root} have values from {low} to {high}, not class indices; {labels[high].file} has {high}: "
            f"if its pixels are to be ignored, give ignore={high}"
        )
