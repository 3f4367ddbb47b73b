"""Decode image files of any kind to upright images, for the whole package; encode pixels as PNG."""

import io
import os
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from dinov2.data.images.arrays import is_array
from dinov2.data.images.band_image import AnyImage
from dinov2.data.images.bands import ArrayFile, BandFile
from dinov2.data.images.deep_pixels import Samples, all_samples, check_usable, map_to_rgb, read_samples
from dinov2.data.images.encoded import EncodedImage, decoding
from dinov2.data.images.formats import bits_of_jpeg2000, is_cut_to_8_bits, is_deep, open_header
from dinov2.data.images.limits import check_header, check_jpeg_scans, check_pixels, png_chunks
from dinov2.data.images.options import DEFAULT_OPTIONS, ImageOptions
from dinov2.data.images.orientation import SIDEWAYS, UPRIGHT, read_orientation, to_upright, upright
from dinov2.data.images.tiff import count_pages, is_tiff, read_tiff_header
from dinov2.data.images.value_range import to_8_bit

_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that may contain the orientation
_MAX_SAMPLES_OF_PILLOW = 6  # per pixel of a TIFF file; for more Pillow logs an error, each time
_BANDS_OF_PILLOW = ("L", "LA", "RGB", "RGBA", "CMYK")  # modes whose bands are used as they are; others become RGB


def read_image_file(path: str | Path, options: ImageOptions = DEFAULT_OPTIONS) -> bytes:
    """Read an image file; one that is not regular (a named pipe, a device) or above the size limit is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else opening a named pipe waits forever for a writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is {kind_of_file(status.st_mode)}, not a regular file")
        if status.st_size > options.max_bytes:
            raise OSError(
                f"{path} has {status.st_size / 2**20:,.0f} MiB, limit {options.max_file_size:,} (images.max_file_size)"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def kind_of_file(mode: int) -> str:
    """Kind of a file that is not regular, from its `st_mode`."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class ImageFile(EncodedImage):
    """An image file of which only the header has been read; JPEG files decode faster at a reduced scale.

    Attributes:
        options: Options of reading it; datasets set their value range before it is decoded.
        tiff: Header of a TIFF file, else None.
        is_deep: Whether it has more than 8 bits per sample, which are mapped to 8 bits.
    """

    def __init__(self, data: bytes, options: ImageOptions) -> None:
        """Read the header; errors are of any type."""
        self.options = options
        self._data = data
        check_header(data)
        self._opened: Image.Image | None = None  # until it is decoded, which is possible once
        self.tiff = read_tiff_header(data) if is_tiff(data) else None
        stored = self.tiff.size if self.tiff is not None else self.opened.size
        check_pixels(stored, options.max_pixels)
        if self.tiff is not None and self.tiff.samples <= _MAX_SAMPLES_OF_PILLOW:
            with suppress(Exception):  # Pillow does not support all kinds of TIFF
                self._opened = open_header(data)
        if is_jpeg := isinstance(self._opened, JpegImageFile):
            check_jpeg_scans(data, stored)
        if self.tiff is not None:  # Pillow converts CMYK, palettes and others in 8 bits
            self.is_deep = self.tiff.is_deep and (self._opened is None or self.tiff.photometric in (0, 1, 2))
        else:
            self.is_deep = is_deep(self.opened) or is_cut_to_8_bits(self.opened)
        self._is_unsupported_by_pillow = self._opened is None
        if self.tiff is not None and (self.is_deep or self._is_unsupported_by_pillow):
            check_usable(self.tiff)
        self._orientation = self.tiff.orientation if self.tiff is not None else self._stored_orientation()
        self._is_plain_jpeg = is_jpeg and self.opened.mode == "RGB" and self._orientation not in UPRIGHT
        self.size = (stored[1], stored[0]) if self._orientation in SIDEWAYS else stored

    @property
    def opened(self) -> Image.Image:
        """The header opened by Pillow, reopened if the image has been decoded since."""
        if self._opened is None:
            self._opened = open_header(self._data)
        return self._opened

    def _stored_orientation(self) -> int | None:
        if self.opened.format != "PNG":
            return read_orientation(self.opened)
        texts = (self._data[start : start + 24] if kind != b"eXIf" else kind for kind, start in png_chunks(self._data))
        if not any(text.startswith(_PNG_ORIENTATION) for text in texts):
            return None
        self.opened.load()  # the orientation may follow the pixels
        orientation = read_orientation(self.opened)
        if self.is_deep:
            self._opened = None  # its pixels were truncated to 8 bits
        return orientation

    def load(self, reduction: int = 1) -> Image.Image:
        with decoding(self._data):
            if self.is_deep or self._is_unsupported_by_pillow:
                samples = read_samples(self._data, self.tiff, self.options.max_pixels)
                image, is_upright = map_to_rgb(samples, self.tiff, self.options.joint_range), samples.is_upright
            else:
                image, self._opened = self.opened, None
                if isinstance(image, JpegImageFile) and reduction > 1:
                    image.draft(None, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
                    reduction = 1
                image.load()
                is_upright = self.tiff is not None  # Pillow rotates TIFF while loading
            image = _to_rgb(image if is_upright else to_upright(image, self._orientation), self.options.background)
            return image if reduction == 1 else image.reduce(reduction)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        fast = _decode_by_torchvision(self._data) if self._is_plain_jpeg and reduction == 1 else None
        return super().pixels(reduction) if fast is None else fast

    def samples(self) -> Samples:
        """Decode the first band, or the first three, of an image of more than 8 bits."""
        with decoding(self._data):
            return read_samples(self._data, self.tiff, self.options.max_pixels)

    def all_bands(self) -> np.ndarray:
        """Decode all samples as they are stored: (height, width, bands), upright; NaN where there is no data."""
        pages_are_bands = self.options.pages == "bands" and self.has_more_frames
        if self.is_deep or self._is_unsupported_by_pillow or pages_are_bands:
            stored, is_upright = all_samples(self._data, self.tiff, self.options.max_pixels, pages_are_bands)
            if not self.is_deep and self.tiff is not None and self.tiff.bits < 8:
                stored = to_8_bit(stored, (0.0, float(2**self.tiff.bits - 1)))
        else:
            image, self._opened = self.opened, None
            image.load()
            if image.mode not in _BANDS_OF_PILLOW:
                rgb = "RGBA" if _may_be_transparent(image) else "RGB"
                image = image.convert("L" if image.mode == "1" else rgb)
            stored, is_upright = np.asarray(image), self.tiff is not None  # Pillow rotates TIFF while loading
        stored = stored if stored.ndim == 3 else stored[..., None]
        return stored if is_upright else upright(stored, self._orientation)

    # --- Content that is not used ---

    @property
    def num_dropped_bands(self) -> int:
        """Number of bands beyond the first three, or beyond the first of two; alpha does not count."""
        if self.tiff is None or self.tiff.photometric not in (0, 1, 2):
            return 0
        return self.tiff.num_bands - (3 if self.tiff.num_bands >= 3 else 1)

    @property
    def has_alpha(self) -> bool:
        return _may_be_transparent(self.opened) if self.tiff is None else self.tiff.alpha is not None

    def is_transparent(self) -> bool:
        """Whether any pixel is not opaque; decodes the image."""
        if self.is_deep or self._is_unsupported_by_pillow:
            return self.samples().is_transparent
        with decoding(self._data):
            image, self._opened = self.opened, None
            return int(np.asarray(image.convert("RGBA").getchannel("A")).min()) < 255

    @property
    def white_is_zero(self) -> bool:
        """Whether the samples of `all_bands` are to be inverted."""
        return self.is_deep and self.tiff is not None and self.tiff.photometric == 0

    @property
    def num_pages(self) -> int:
        """Number of pages of a TIFF file; 1 for others."""
        return 1 if self.tiff is None else count_pages(self._data)

    @property
    def has_more_frames(self) -> bool:
        return self.tiff.has_more_pages if self.tiff is not None else getattr(self.opened, "is_animated", False)

    @property
    def lost_bits(self) -> int:
        """Bits per sample beyond 8 that are dropped because no available library reads them."""
        if self.is_deep:
            return 0
        bits = self.tiff.bits if self.tiff is not None else bits_of_jpeg2000(self._data)
        return max(bits - 8, 0)


def _decode_by_torchvision(data: bytes) -> np.ndarray | None:
    """Decode a JPEG file by torchvision, to the pixels of Pillow, a third faster; None if that fails."""
    with warnings.catch_warnings(), suppress(ImportError, AttributeError, RuntimeError):
        warnings.simplefilter("ignore")  # torchvision has deprecated its decoder
        from torchvision.io import decode_jpeg

        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    return None


def open_image(data: bytes, options: ImageOptions = DEFAULT_OPTIONS) -> "ImageFile | BandFile":
    """Open an image file in one of `formats.FORMATS`, or NPY or NPZ, as an upright image.

    Only the header is read here; errors in the pixels are raised when they are decoded.

    - The EXIF orientation is applied. The published code ignores it, so training and evaluation differ from the
      published behavior on images with such a tag.
    - With `ImageOptions.bands` these are read as they are, see `BandFile`. Otherwise the image becomes 8-bit RGB:
    - Transparency is dropped, which shows the colors under it as in the published code, unless
      `ImageOptions.background` is set.
    - Values of more than 8 bits are mapped to 8 bits by `ImageOptions.value_range`. Without a range it is measured on
      this image alone, see `value_range.RangeMeasurement`; datasets measure one range for all their images.
    - Of more than three bands the first three are used, of two the first; of pages and frames the first.

    Raises:
        ImageDecodeError: The data are corrupt, the format is not supported, there are too many pixels, or a band that
            is chosen is missing.
    """
    with decoding(data):
        if is_array(data):
            return BandFile(ArrayFile(data, options), options, data)
        file = ImageFile(data, options)
        return file if options.bands is None else BandFile(file, options, data)


def decode_image(data: bytes, options: ImageOptions = DEFAULT_OPTIONS) -> AnyImage:
    """Decode an image file to an upright image, in mode RGB unless bands are chosen, see `open_image`."""
    return open_image(data, options).load()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode an image, (H, W) or (H, W, 3) uint8, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encode_array(pixels: np.ndarray) -> bytes:
    """Encode pixels of any type, (H, W, bands), as an NPY file."""
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def _may_be_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    """Convert an 8-bit image to mode RGB, composited on the background if there is one."""
    if background is not None and _may_be_transparent(image):
        below = Image.new("RGBA", image.size, (*background, 255))
        below.alpha_composite(image.convert("RGBA"))
        return below.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
