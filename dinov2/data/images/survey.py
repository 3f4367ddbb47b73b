"""Inspection of a sample of the images in a dataset: their value range, and content that is not used.

Headers are read for all images of the sample, pixels only for those with more than 8 bits or transparency.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dinov2.data.images import ImageOptions, open_image
from dinov2.data.images.options import range_of_each
from dinov2.data.images.value_range import RangeMeasurement, ValueRange, share_outside, to_8_bit, to_levels

NUM_SAMPLED = 64  # images, evenly spaced in the dataset
LARGE = 100 * 10**6  # pixels from which an image slows down loading
FEW_LEVELS = 32  # of 256 gray levels
_MAX_DECODED = 64 * 10**6  # total pixels of decoded images, of more than 8 bits and of transparent ones each
_MUCH_CLIPPED = 0.01  # fraction of the values
_MANY_POOR = 0.1  # fraction of the images; any dataset may have some nearly empty ones, such as slices above a head
_MOST_NAMED = 5  # unreadable images in a message


@dataclass
class ImageSurvey:
    """Statistics of the sampled images of a dataset: numbers of images, unless stated otherwise."""

    options: ImageOptions  # of reading images, with the value range if one was measured
    num_sampled: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # path and reason
    num_deep: int = 0  # of more than 8 bits
    num_extra_bands: int = 0  # with more bands than are used
    num_transparent: int = 0  # with transparent pixels
    num_more_frames: int = 0  # with more than one page or frame
    num_large: int = 0  # of more than `LARGE` pixels
    array_layouts: Counter[str] = field(default_factory=Counter)  # of arrays: how they are read
    num_lost_bits: int = 0  # of more than 8 bits in a format of which only 8 are read
    # Of images of more than 8 bits, or of all if bands are chosen: one of all bands, or one of each.
    measurements: list[RangeMeasurement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.measurements = [RangeMeasurement() for _ in self.options.bands or [None]]

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each band in [0, 1], of all pixels measured; None if a band has none."""
        if self.options.value_range is None or not all(each.samples for each in self.measurements):
            return None
        ranges = range_of_each(self.options.value_range, len(self.measurements))
        found = [
            to_levels(np.concatenate(each.samples), value_range) / 255
            for each, value_range in zip(self.measurements, ranges, strict=True)
        ]
        return tuple(float(values.mean()) for values in found), tuple(float(values.std()) for values in found)

    def notes(self) -> list[tuple[int, str]]:
        """Messages for the user, each with its logging level; none for a dataset of plain 8-bit images."""
        sample = f"of {self.num_sampled:,} images sampled"
        background = self.options.background
        drop = "dropped, which shows the colors under it (images.background sets a color instead)"
        alpha = drop if background is None else f"composited on {list(background)}"
        counts = [
            (
                self.num_extra_bands,
                "have more bands than are used: those beyond the third, or of two the second, are dropped "
                "(images.bands chooses bands)",
            ),
            (self.num_transparent, f"are transparent: transparency is {alpha}"),
            (self.num_more_frames, "have more pages or frames than one: the first is used (images.pages, of TIFF)"),
            (self.num_lost_bits, "have more than 8 bits in a format of which only the upper 8 are read"),
            (self.num_large, f"have more than {LARGE // 10**6} megapixels, which slows down loading"),
        ]
        notes = [(logging.INFO, f"{layout} (images.bands_axis)") for layout, _ in self.array_layouts.most_common(3)]
        if self.options.bands is not None and self.options.channels == 3:
            notes.append((logging.INFO, "three bands are treated as red, green and blue, in 8 bits"))
        notes += self._notes_on_values()
        notes += [(logging.INFO, f"{count:,} {sample} {what}") for count, what in counts if count]
        if self.unreadable:
            named = [f"{path}: {reason}" for path, reason in self.unreadable[:_MOST_NAMED]]
            if len(self.unreadable) > _MOST_NAMED:
                named.append(f"and {len(self.unreadable) - _MOST_NAMED} more")
            notes.append((logging.INFO, f"{len(self.unreadable):,} {sample} cannot be read: {'; '.join(named)}"))
        return notes

    def _notes_on_values(self) -> list[tuple[int, str]]:
        if self.options.value_range is None:
            ranges: Sequence[ValueRange | None] = [None] * len(self.measurements)
        else:
            ranges = range_of_each(self.options.value_range, len(self.measurements))
        bands = self.options.bands or [None]
        return [
            note
            for band, measured, value_range in zip(bands, self.measurements, ranges, strict=True)
            for note in self._notes_on_band("" if band is None else f"band {band}: ", measured, value_range)
        ]

    def _notes_on_band(
        self, which: str, measured: RangeMeasurement, value_range: ValueRange | None
    ) -> Iterator[tuple[int, str]]:
        num_measured = measured.types.total()
        empty = num_measured - len(measured.samples)
        kind = "images" if which else "images of more than 8 bits"
        if empty:
            text = f"{which}{empty} of {num_measured} {kind} have no finite value and become black"
            yield logging.WARNING, text
        if value_range is None or not measured.samples:
            return
        low, high = (f"{value:,.6g}" for value in value_range)
        levels = "0..255" if self.options.channels == 3 else "[0, 1]"
        what = f"{self.num_deep:,} of {self.num_sampled:,} images sampled have more than 8 bits: pixel values"
        yield (
            logging.INFO,
            f"{f'{which}values' if which else what} of {' and '.join(sorted(measured.types))} from "
            f"{measured.smallest:,.6g} to {measured.largest:,.6g}; {low} to {high} is mapped to {levels} "
            "(images.value_range sets this)",
        )
        if measured.missing:
            share = measured.missing / measured.total
            yield (
                logging.INFO,
                f"{which}{share:.2%} of the values are missing (NaN or NoData): they become the lowest level",
            )
        if which and (found := measured.suspect()) is not None:
            value, share = found
            text = (
                f"{which}the value {value:,.6g}, of {share:.1%} of the pixels, is far from all others: if it marks "
                f"missing data, set images.nodata={value:.6g}"
            )
            yield logging.WARNING, text
        clipped = float(np.mean([share_outside(values, value_range) for values in measured.samples]))
        if clipped > _MUCH_CLIPPED:
            text = f"{100 * clipped:.1f} % of the pixel values are outside {low} to {high} and are clipped"
            yield logging.WARNING, f"{which}{text} (images.value_range)"
        poor = sum(
            np.unique(to_8_bit(values, value_range)).size < min(FEW_LEVELS, np.unique(values).size)
            for values in measured.samples
        )
        if poor and (not which or self.options.channels == 3):
            text = (
                f"{which}{poor} of {len(measured.samples)} {kind} keep fewer than {FEW_LEVELS} gray levels of 256: "
                f"{low} to {high} is too wide a range for them (images.value_range)"
            )
            yield logging.WARNING if poor > _MANY_POOR * len(measured.samples) else logging.INFO, text


def survey_images(
    read: Callable[[int], bytes], describe: Callable[[int], str], length: int, options: ImageOptions
) -> ImageSurvey:
    """Inspect some of the ``length`` images of a dataset, given functions index -> image file, and index -> its path.

    A value range that is missing in the options is measured if there are images of more than 8 bits.
    """
    survey = ImageSurvey(options)
    survey.num_sampled = count = min(NUM_SAMPLED, length)
    deep: list[tuple[int, int]] = []  # sample and its number of pixels
    decoded = 0
    for index in (position * length // count for position in range(count)):
        try:
            image = open_image(read(index), options)
            pixels = math.prod(image.size)
            survey.num_extra_bands += image.num_dropped_bands > 0
            survey.num_more_frames += image.has_more_frames
            survey.num_large += pixels > LARGE
            if layout := getattr(image, "layout", ""):
                survey.array_layouts[layout] += 1
            survey.num_lost_bits += image.lost_bits > 0
            if image.is_deep or options.bands is not None:
                deep.append((index, pixels))
                survey.num_deep += image.is_deep
            elif image.has_alpha and decoded < _MAX_DECODED:
                decoded += pixels
                survey.num_transparent += image.is_transparent()
        except Exception as error:  # damaged files raise errors of any type
            survey.unreadable.append((describe(index), str(error)))
    _measure(survey, read, describe, deep)
    return survey


def _measure(
    survey: ImageSurvey, read: Callable[[int], bytes], describe: Callable[[int], str], deep: Sequence[tuple[int, int]]
) -> None:
    """Measure the value range on the images of more than 8 bits, or on fewer of them if they are large."""
    step = max(math.ceil(sum(pixels for _, pixels in deep) / _MAX_DECODED), 1)
    for index, _ in deep[::step]:
        try:
            samples = open_image(read(index), survey.options).samples()
        except Exception as error:
            survey.unreadable.append((describe(index), str(error)))
            continue
        own = survey.options.bands is not None
        parts = np.moveaxis(samples.values, 2, 0) if own else [samples.values]
        for measurement, values in zip(survey.measurements, parts, strict=True):
            measurement.add(values)
        survey.num_transparent += samples.is_transparent
    ranges = [each.range() for each in survey.measurements]
    if survey.options.value_range is None and None not in ranges:
        joint = len(ranges) == 1
        survey.options = survey.options.with_range(ranges[0] if joint else tuple(ranges))  # type: ignore[arg-type]
