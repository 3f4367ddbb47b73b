"""Inspection of a sample of the images in a dataset: their value range, and content that is not used.

Headers are read for all images of the sample, pixels only for those with more than 8 bits or transparency.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dinov2.data.images import ImageOptions, open_image
from dinov2.data.images.value_range import RangeMeasurement, share_outside, to_8_bit

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
    num_lost_bits: int = 0  # of more than 8 bits in a format of which only 8 are read
    measurement: RangeMeasurement = field(default_factory=RangeMeasurement)  # of images of more than 8 bits

    def notes(self) -> list[tuple[int, str]]:
        """Messages for the user, each with its logging level; none for a dataset of plain 8-bit images."""
        sample = f"of {self.num_sampled:,} images sampled"
        background = self.options.background
        drop = "dropped, which shows the colors under it (images.background sets a color instead)"
        alpha = drop if background is None else f"composited on {list(background)}"
        counts = [
            (
                self.num_extra_bands,
                "have more bands than are used: those beyond the third, or of two the second, are dropped",
            ),
            (self.num_transparent, f"are transparent: transparency is {alpha}"),
            (self.num_more_frames, "have more pages or frames than one: the first is used"),
            (self.num_lost_bits, "have more than 8 bits in a format of which only the upper 8 are read"),
            (self.num_large, f"have more than {LARGE // 10**6} megapixels, which slows down loading"),
        ]
        notes = self._notes_on_values()
        notes += [(logging.INFO, f"{count:,} {sample} {what}") for count, what in counts if count]
        if self.unreadable:
            named = [f"{path}: {reason}" for path, reason in self.unreadable[:_MOST_NAMED]]
            if len(self.unreadable) > _MOST_NAMED:
                named.append(f"and {len(self.unreadable) - _MOST_NAMED} more")
            notes.append((logging.INFO, f"{len(self.unreadable):,} {sample} cannot be read: {'; '.join(named)}"))
        return notes

    def _notes_on_values(self) -> list[tuple[int, str]]:
        value_range, measured = self.options.value_range, self.measurement
        num_measured = measured.types.total()
        empty = num_measured - len(measured.samples)
        text = f"{empty} of {num_measured} images of more than 8 bits have no finite value and become black"
        notes = [(logging.WARNING, text)] if empty else []
        if value_range is None or not measured.samples:
            return notes
        low, high = (f"{value:,.6g}" for value in value_range)
        text = (
            f"{self.num_deep:,} of {self.num_sampled:,} images sampled have more than 8 bits: pixel values of "
            f"{' and '.join(sorted(measured.types))} from {measured.smallest:,.6g} to {measured.largest:,.6g}; "
            f"{low} to {high} is mapped to 0..255 (images.value_range sets this)"
        )
        notes.append((logging.INFO, text))
        clipped = float(np.mean([share_outside(values, value_range) for values in measured.samples]))
        if clipped > _MUCH_CLIPPED:
            text = f"{100 * clipped:.1f} % of the pixel values are outside {low} to {high} and are clipped"
            notes.append((logging.WARNING, f"{text} (images.value_range)"))
        poor = sum(
            np.unique(to_8_bit(values, value_range)).size < min(FEW_LEVELS, np.unique(values).size)
            for values in measured.samples
        )
        if poor:
            text = (
                f"{poor} of {len(measured.samples)} images of more than 8 bits keep fewer than {FEW_LEVELS} gray "
                f"levels of 256: {low} to {high} is too wide a range for them (images.value_range)"
            )
            notes.append((logging.WARNING if poor > _MANY_POOR * len(measured.samples) else logging.INFO, text))
        return notes


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
            survey.num_lost_bits += image.lost_bits > 0
            if image.is_deep:
                deep.append((index, pixels))
            elif image.has_alpha and decoded < _MAX_DECODED:
                decoded += pixels
                survey.num_transparent += image.is_transparent()
        except Exception as error:  # damaged files raise errors of any type
            survey.unreadable.append((describe(index), str(error)))
    survey.num_deep = len(deep)
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
        survey.measurement.add(samples.values)
        survey.num_transparent += samples.is_transparent
    if survey.options.value_range is None:
        survey.options = survey.options.with_range(survey.measurement.range())
