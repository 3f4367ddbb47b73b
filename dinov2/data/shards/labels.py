"""Labels of samples from texts that name them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Labels(NamedTuple):
    """Class names and class indices of samples."""

    classes: list[str]  # in the order of their indices; empty without names
    targets: np.ndarray | None  # (N,) int64; None without labels
    notes: list[str]  # messages for the user


def labels_of(texts: Sequence[str], describe: Callable[[int], str], classes: Sequence[str] = ()) -> Labels:
    """Labels from a text of each sample: if all are integers, class indices, else names, whose sorted order counts.

    Args:
        texts: "" for a sample without label; if there is one, no labels are used.
        describe: Index of a sample -> its name in messages.
        classes: Names of the class indices, if they are known.

    Raises:
        ValueError: An index is negative, or beyond the class names.
    """
    missing = texts.count("")
    if missing:
        first = describe(texts.index(""))
        note = f"{missing:,} of {len(texts):,} samples have no label, such as {first}: none is used"
        return Labels([], None, [note] if missing < len(texts) else [])
    if not all(text.removeprefix("-").isdecimal() for text in texts):
        names, targets = np.unique(texts, return_inverse=True)
        return Labels(names.tolist(), targets.astype(np.int64), [])
    targets = np.array(texts, np.int64)
    if (lowest := int(targets.min())) < 0:
        raise ValueError(f"the label of {describe(int(targets.argmin()))} is {lowest}")
    if classes and (highest := int(targets.max())) >= len(classes):
        raise ValueError(f"the label of {describe(int(targets.argmax()))} is {highest} of {len(classes)} classes")
    return Labels(list(classes), targets, [])
