"""How image files are read: the section `images` of the configuration."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dinov2.data.images.value_range import ValueRange

ValueRanges = ValueRange | tuple[ValueRange, ...]
"""One range for all bands, or one for each."""


@dataclass(frozen=True)
class ImageOptions:
    """Options of reading image files: the section `images` of the configuration."""

    value_range: ValueRanges | None = None  # mapped to 0 and 255, for images of more than 8 bits; None: measured
    max_pixels: int = 178_956_970  # larger images are unreadable
    max_file_size: int = 1024  # in MiB; larger files are unreadable
    # Color (red, green, blue), each from 0 to 255, that transparent images are composited on; None: transparency is
    # dropped, which shows the colors under it.
    background: tuple[int, int, int] | None = None
    bands: tuple[int, ...] | None = None  # samples of a pixel that are read, from 0; None: red, green and blue
    shown_bands: tuple[int, ...] | None = None  # three of the bands, or one, for figures; None: the first
    bands_axis: str = "auto"  # of arrays: "first", "last" or "auto", see `arrays.bands_are_first`
    nodata: float | None = None  # value of pixels without data, besides NaN and what TIFF files say
    pages: str = "first"  # of a TIFF file: "first", or "bands", whose samples together are the bands, or "images"

    @property
    def max_bytes(self) -> int:
        return self.max_file_size * 2**20

    @property
    def channels(self) -> int:
        """Number of channels of an image for the model."""
        return 3 if self.bands is None else len(self.bands)

    @property
    def shown(self) -> tuple[int, ...] | None:
        """Positions of the shown bands among the bands that are read; None for the first."""
        return self.bands and self.shown_bands and tuple(self.bands.index(band) for band in self.shown_bands)

    @property
    def joint_range(self) -> ValueRange | None:
        """The range of all bands; a ValueError if each band has its own."""
        return None if self.value_range is None else range_of_each(self.value_range, 1)[0]

    def facts(self) -> dict[str, Any]:
        """The options as JSON; those added later only where they are set, so that older records still compare."""
        later = {
            name: getattr(DEFAULT_OPTIONS, name) for name in ("bands", "shown_bands", "bands_axis", "nodata", "pages")
        }
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def with_range(self, value_range: ValueRanges | None) -> "ImageOptions":
        return replace(self, value_range=value_range)


DEFAULT_OPTIONS = ImageOptions()


def range_of_each(value_range: ValueRanges, count: int) -> Sequence[ValueRange]:
    """The range of each of some bands; a ValueError if there are ranges of another number of bands."""
    if isinstance(value_range[0], tuple):
        if len(value_range) != count:
            raise ValueError(f"images.value_range has {len(value_range)} ranges for {count} bands")
        return value_range
    return [value_range] * count
