"""Mapping of pixel values of any type to 8 bits, by one range [low, high] for all images of a dataset.

The range is measured on some images and used for all, so that equal values have equal gray levels in all images.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

ValueRange = tuple[float, float]

_POOLED = 2**16  # values per image that enter percentiles, evenly spaced
_OUTLIERS = 0.1  # percent of the values at either end that are ignored if they are far from the others
_FAR = 8  # ratio of the range with outliers to the range without
_FREQUENT = 0.003  # share of the values from which one that is far from the others may mark missing data,
_DISTANT = 0.1  # which means: by this share of the range of the others,
_FEW_VALUES = 16  # unless there are fewer values than that
_AT_ONCE = 2**20  # values converted at once; bounds the memory


class RangeMeasurement:
    """Collects pixel values of some images and chooses the range that is mapped to 8 bits.

    - Bytes keep their values.
    - Other nonnegative integers (sensors, counts) get [0, 2^n - 1] with the smallest n that covers the maximum, such as
      4095 for 12 bits, because other images of the dataset may be brighter than those measured.
    - Fractions from 0 to 1 with a maximum above 0.5 get [0, 1].
    - Others (signed, floating point) get their minimum and maximum.

    Outliers, less than 0.1 % of the values, are ignored if the range with them would be more than 8 times as wide.
    Values that are not finite are always ignored.
    """

    def __init__(self) -> None:
        self.types: Counter[str] = Counter()  # NumPy name of each type -> number of images
        self.smallest, self.largest = np.inf, -np.inf  # of all values
        self.samples: list[np.ndarray] = []  # of each image about 65,536 finite values at most, float64
        self.total = self.missing = 0  # values, and those that are not finite
        self._whole = True

    def add(self, values: np.ndarray) -> None:
        """Add the values of an image, of any shape and real type."""
        self.types[values.dtype.name] += 1
        flat = values.reshape(-1)
        self.total += flat.size
        is_float = np.issubdtype(values.dtype, np.floating)
        if is_float:
            flat = flat[np.isfinite(flat)]
        self.missing += values.size - flat.size
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        self.smallest, self.largest = min(self.smallest, low), max(self.largest, high)
        pooled = flat[:: max(flat.size // _POOLED, 1)].astype(np.float64)
        self.samples.append(pooled)
        if is_float:
            self._whole = self._whole and high > low and bool((pooled == np.rint(pooled)).all())

    def suspect(self) -> tuple[float, float] | None:
        """The smallest or the largest value and its share, if it is frequent and far from all others.

        Such a value often marks pixels without data. None if there is none.
        """
        if not self.samples or set(self.types) == {"uint8"}:
            return None
        values, counts = np.unique(np.concatenate(self.samples), return_counts=True)
        if len(values) < _FEW_VALUES:
            return None
        shares = counts / counts.sum()
        for value, gap, rest, share in (
            (values[0], values[1] - values[0], values[-1] - values[1], shares[0]),
            (values[-1], values[-1] - values[-2], values[-2] - values[0], shares[-1]),
        ):
            if share >= _FREQUENT and gap > _DISTANT * rest:
                return float(value), float(share)
        return None

    def range(self) -> ValueRange | None:
        """Returns the range; None without finite values."""
        if not self.samples:
            return None
        if set(self.types) == {"uint8"}:
            return 0.0, 255.0
        pooled = np.concatenate(self.samples)
        inner_low, inner_high = np.percentile(pooled, [_OUTLIERS, 100 - _OUTLIERS], method="nearest").tolist()
        low, high = self.smallest, self.largest
        if self._whole and low >= 0:
            high = _largest_of_bits(high)
            return 0.0, _largest_of_bits(inner_high) if high + 1 > _FAR * (inner_high + 1) else high
        if low >= 0 and 0.5 < high <= 1:
            return 0.0, 1.0
        if inner_high > inner_low and high - low > _FAR * (inner_high - inner_low):
            return inner_low, inner_high
        return low, high


def _largest_of_bits(value: float) -> float:
    """The smallest 2^n - 1 with n >= 1 that is not below ``value``."""
    return float(2 ** max(int(value).bit_length(), 1) - 1)


def measure_range(images: Iterable[np.ndarray]) -> ValueRange | None:
    """Measure the range of some images, see `RangeMeasurement`."""
    measurement = RangeMeasurement()
    for values in images:
        measurement.add(values)
    return measurement.range()


def to_8_bit(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Map ``value_range`` to 0..255; values outside are clipped, NaN becomes black.

    For [0, 2^n - 1] with n >= 8 the upper 8 bits are kept, as usual for such data; other ranges are scaled and rounded,
    those of equal numbers to black. The result has the shape of the values, of any real type, and is uint8.
    """
    if values.dtype.itemsize == 2 and values.dtype.kind in "ui":  # a lookup table is ten times faster than arithmetic
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        table = _scaled(np.arange(2**16, dtype=np.uint16).view(native.dtype), value_range)
        return table[native.view(np.uint16)]
    result = np.empty(values.shape, np.uint8)
    flat, flat_result = values.reshape(-1), result.reshape(-1)
    for start in range(0, flat.size, _AT_ONCE):
        flat_result[start : start + _AT_ONCE] = _scaled(flat[start : start + _AT_ONCE], value_range)
    return result


def _scaled(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    low, high = value_range
    levels = values.astype(np.float64)
    levels = np.clip(np.nan_to_num(levels, copy=False, nan=low, posinf=np.inf, neginf=-np.inf), low, high)
    if low == 0 and high >= 255 and np.log2(high + 1).is_integer():
        return np.floor(levels * (256 / (high + 1))).astype(np.uint8)
    return ((levels - low) * (255 / max(high - low, np.finfo(np.float64).tiny))).round().astype(np.uint8)


def to_levels(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Map ``value_range`` to 0..255 in float32, without rounding; values outside are clipped, NaN becomes 0."""
    low, high = value_range
    levels: np.ndarray = values.astype(np.float64)
    levels = (levels - low) * (255 / max(high - low, np.finfo(np.float64).tiny))
    return np.nan_to_num(levels, nan=0.0).clip(0, 255).astype(np.float32, copy=False)


def share_outside(values: np.ndarray, value_range: ValueRange) -> float:
    """Fraction of the values that `to_8_bit` clips, not counting those that are not finite."""
    low, high = value_range
    outside = (values < low) | (values > high)
    return float((outside & np.isfinite(values)).mean()) if values.size else 0.0
