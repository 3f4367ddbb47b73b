"""An image file -> an upright 8-bit RGB image, whatever the file holds; and pixels -> a file.

Every image of every dataset, visualization and evaluation is read and decoded here, see `read_image_file` and
`open_image`.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from dinov2.data.images.deep_pixels import Samples, check_usable, map_to_rgb, read_samples
from dinov2.data.images.formats import UnknownFormatError, bits_of_jpeg2000, is_cut_to_8_bits, is_deep, open_header
from dinov2.data.images.limits import check_header, check_jpeg_scans, check_pixels, png_chunks
from dinov2.data.images.tiff import is_tiff, read_tiff_header
from dinov2.data.images.value_range import ValueRange

# EXIF orientation -> the transposition that turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations of images that are stored lying on their side
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that may have an orientation
_MAX_EXIF_BYTES = 2**16 - 1  # that are searched for the orientation; as many as a JPEG file can hold
_MAX_SAMPLES_OF_PILLOW = 6  # per pixel of a TIFF file; of more it logs an error, each time


class ImageDecodeError(ValueError):
    """The bytes are not a usable image: truncated, corrupt, of another format, or absurdly large."""


class BadImageError(RuntimeError):
    """A sample of a dataset has no usable image (missing, unreadable or undecodable file).

    Attributes:
        path: Where the image was read from, as `describe(index)` of the dataset says.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class ImageOptions:
    """How image files are read: the section `images` of the configuration.

    Attributes:
        value_range: Pixel values (low, high) of images of more than 8 bits that become 0 and 255; None: measured.
        max_pixels: Largest number of pixels of an image; others are unreadable.
        max_file_size: Largest size of an image file in MiB; others are unreadable.
        background: Color (red, green, blue), each from 0 to 255, that transparent images are composited on; None:
            transparency is dropped, and what lies under it shows.
    """

    value_range: ValueRange | None = None
    max_pixels: int = 178_956_970
    max_file_size: int = 1024
    background: tuple[int, int, int] | None = None

    @property
    def max_bytes(self) -> int:
        """Largest size of an image file in bytes."""
        return self.max_file_size * 2**20

    def with_range(self, value_range: ValueRange | None) -> "ImageOptions":
        """The same with another value range."""
        return replace(self, value_range=value_range)


DEFAULT_OPTIONS = ImageOptions()


def read_image_file(path: str | Path, options: ImageOptions = DEFAULT_OPTIONS) -> bytes:
    """The content of an image file.

    Raises:
        OSError: It is missing, no regular file (a named pipe, a device, a folder), or larger than the limit.
    """
    # Without O_NONBLOCK, opening a named pipe waits for ever for somebody who writes to it.
    with _descriptor(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) as descriptor:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is {kind_of_file(status.st_mode)}, not a regular file")
        if status.st_size > options.max_bytes:
            raise OSError(
                f"{path} has {status.st_size / 2**20:,.0f} MiB, limit {options.max_file_size:,} (images.max_file_size)"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)


@contextmanager
def _descriptor(path: str | Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def kind_of_file(mode: int) -> str:
    """What a file that is not regular is, from its `st_mode`."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class EncodedImage:
    """An image of known size whose pixels come when they are asked for, smaller if that will do.

    Attributes:
        size: (width, height), upright.
    """

    def __init__(self, image: Image.Image) -> None:
        """Of an upright RGB image."""
        self._image = image
        self.size = image.size

    def load(self, reduction: int = 1) -> Image.Image:
        """The image in mode RGB, its sides divided by ``reduction`` (1, 2, 4 or 8) and rounded up.

        Raises:
            ImageDecodeError: Truncated or corrupt data.
        """
        return self._image if reduction == 1 else self._image.reduce(reduction)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """The same as an array, (height, width, 3) uint8, for the caller to keep."""
        return np.array(self.load(reduction))


class ImageFile(EncodedImage):
    """An image file of which only the header is read; a JPEG file can be decoded at a smaller scale, in less time.

    Attributes:
        size: (width, height), upright.
        options: How it is read. Who knows the value range of the dataset sets it before the image is loaded.
        tiff: Header of a TIFF file, else None.
        is_deep: Whether it has more than 8 bits, so that its values must be mapped to 8 bits.
    """

    def __init__(self, data: bytes, options: ImageOptions) -> None:
        """Reads the header.

        Raises:
            ValueError: It has too many pixels, or would take too long.
            Exception: Nearly any, for a damaged file.
        """
        self.options = options
        self._data = data
        check_header(data)
        self._opened: Image.Image | None = None  # until it is decoded, which can be done once
        self.tiff = read_tiff_header(data) if is_tiff(data) else None
        stored = self.tiff.size if self.tiff is not None else self.opened.size
        check_pixels(stored, options.max_pixels)
        if self.tiff is not None and self.tiff.samples <= _MAX_SAMPLES_OF_PILLOW:
            with suppress(Exception):  # Pillow does not know all kinds of TIFF
                self._opened = open_header(data)
        if is_jpeg := isinstance(self._opened, JpegImageFile):
            check_jpeg_scans(data, stored)
        if self.tiff is not None:  # Pillow converts inks, palettes and the like, in 8 bits
            self.is_deep = self.tiff.is_deep and (self._opened is None or self.tiff.photometric in (0, 1, 2))
        else:
            self.is_deep = is_deep(self.opened) or is_cut_to_8_bits(self.opened)
        self._is_unknown_to_pillow = self._opened is None
        if self.tiff is not None and (self.is_deep or self._is_unknown_to_pillow):
            check_usable(self.tiff)
        self._orientation = self.tiff.orientation if self.tiff is not None else self._read_orientation()
        self._is_plain_jpeg = is_jpeg and self.opened.mode == "RGB" and self._orientation not in _UPRIGHT
        self.size = (stored[1], stored[0]) if self._orientation in _SIDEWAYS else stored

    @property
    def opened(self) -> Image.Image:
        """The header as Pillow reads it, again if the image has been decoded since."""
        if self._opened is None:
            self._opened = open_header(self._data)
        return self._opened

    def _read_orientation(self) -> int | None:
        if self.opened.format != "PNG":
            return _orientation(self.opened)
        texts = (self._data[at : at + 24] if kind != b"eXIf" else kind for kind, at in png_chunks(self._data))
        if not any(text.startswith(_PNG_ORIENTATION) for text in texts):
            return None
        self.opened.load()  # the orientation may stand behind the pixels
        orientation = _orientation(self.opened)
        if self.is_deep:
            self._opened = None  # its pixels have been cut to 8 bits
        return orientation

    def load(self, reduction: int = 1) -> Image.Image:
        with _decoding(self._data):
            if self.is_deep or self._is_unknown_to_pillow:
                samples = read_samples(self._data, self.tiff, self.options.max_pixels)
                image = map_to_rgb(samples, self.tiff, self.options.value_range)
                image = _to_rgb(
                    image if samples.is_turned else _turn(image, self._orientation), self.options.background
                )
            else:
                image, self._opened = self.opened, None
                if isinstance(image, JpegImageFile) and reduction > 1:
                    image.draft(None, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
                    reduction = 1
                image.load()  # before the orientation: TIFF is turned while it loads
                upright = image if self.tiff is not None else _turn(image, self._orientation)
                image = _to_rgb(upright, self.options.background)
            return image if reduction == 1 else image.reduce(reduction)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        fast = _decode_at_once(self._data) if self._is_plain_jpeg and reduction == 1 else None
        return super().pixels(reduction) if fast is None else fast

    def samples(self) -> Samples:
        """The pixels of a deep image, the first band or the first three.

        Raises:
            ImageDecodeError: Truncated or corrupt data.
        """
        with _decoding(self._data):
            return read_samples(self._data, self.tiff, self.options.max_pixels)

    # --- What is not used of it ---

    @property
    def num_dropped_bands(self) -> int:
        """Bands beyond the first three, or of two bands the second; alpha is none."""
        if self.tiff is None or self.tiff.photometric not in (0, 1, 2):
            return 0
        return self.tiff.num_bands - (3 if self.tiff.num_bands >= 3 else 1)

    @property
    def has_alpha(self) -> bool:
        """Whether pixels may be transparent."""
        if self.tiff is not None and self.tiff.alpha is not None:
            return True
        return _may_be_transparent(self.opened) if self.tiff is None else False

    def is_transparent(self) -> bool:
        """Whether a pixel is not opaque; decodes the image.

        Raises:
            ImageDecodeError: Truncated or corrupt data.
        """
        if self.is_deep or self._is_unknown_to_pillow:
            return self.samples().is_transparent
        with _decoding(self._data):
            image, self._opened = self.opened, None
            return int(np.asarray(image.convert("RGBA").getchannel("A")).min()) < 255

    @property
    def has_more_frames(self) -> bool:
        """Whether there are pages or frames after the first."""
        return self.tiff.has_more_pages if self.tiff is not None else getattr(self.opened, "is_animated", False)

    @property
    def lost_bits(self) -> int:
        """Bits of a sample that are dropped because no library at hand reads them: those beyond 8 of some formats."""
        if self.is_deep:
            return 0
        bits = self.tiff.bits if self.tiff is not None else bits_of_jpeg2000(self._data)
        return max(bits - 8, 0)


def _decode_at_once(data: bytes) -> np.ndarray | None:
    """The same pixels as Pillow's, without the way over an image of Pillow, a third faster; None where that fails.

    By torchvision, which means to drop its decoder: then, as for all that it cannot read, Pillow decodes or complains.
    """
    with warnings.catch_warnings(), suppress(ImportError, AttributeError, RuntimeError):
        warnings.simplefilter("ignore")
        from torchvision.io import decode_jpeg

        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    return None


def open_image(data: bytes, options: ImageOptions = DEFAULT_OPTIONS) -> ImageFile:
    """Opens an image file of one of `image_formats.FORMATS`, of any type of pixels, as an upright 8-bit RGB image.

    Only the header is read here; what is wrong with the pixels shows when they are loaded.

    - Turned by its EXIF orientation. The published code ignores it: on images with such a tag, training and
      evaluation differ from the published behavior.
    - Transparency is dropped, not composited on a background: the colors under it show, as in the published code;
      see `ImageOptions.background`.
    - Values of more than 8 bits are mapped to 8 bits by `ImageOptions.value_range`. Without one it is measured on this
      image alone, see `pixel_range.RangeMeasurement`; datasets measure one for all their images.
    - Of more than three bands the first three, of two the first; of pages and frames the first.

    Args:
        data: Content of the file.
        options: See `ImageOptions`.

    Raises:
        ImageDecodeError: Corrupt data, a format that is not read, or more pixels than allowed.
    """
    with _decoding(data):
        return ImageFile(data, options)


def decode_image(data: bytes, options: ImageOptions = DEFAULT_OPTIONS) -> Image.Image:
    """The image of an image file, upright and in mode RGB; see `open_image`.

    Raises:
        ImageDecodeError: It cannot be decoded.
    """
    return open_image(data, options).load()


@contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Makes one error of all that Pillow raises, and no noise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on broken metadata and the like: once per image
            yield
    except UnknownFormatError as error:
        raise ImageDecodeError(f"{len(data)} bytes {error}") from error
    except Exception as error:  # broken files make Pillow raise nearly anything: SyntaxError, OverflowError, ...
        is_short = isinstance(error.__cause__ or error, struct.error)  # whose words are of buffers and offsets
        reason = "they end within the header, or it is damaged" if is_short else error
        raise ImageDecodeError(f"cannot decode {len(data)} bytes: {reason}") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of an image, (H, W) or (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _turn(image: Image.Image, orientation: int | None) -> Image.Image:
    # Not ImageOps.exif_transpose, which copies upright images and rewrites the EXIF block of the others: it fails
    # on the malformed blocks that are common in photographs from the web.
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int | None:
    try:
        block = image.info.get("exif")
        if block is not None and len(block) > _MAX_EXIF_BYTES:  # tags that all point to one large value fill the memory
            exif = Image.Exif()
            exif.load(block[:_MAX_EXIF_BYTES])
            return exif.get(ExifTags.Base.Orientation)
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None  # an unreadable EXIF block says nothing about the image


def _may_be_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    """An image of 8 bits in mode RGB, composited on the background, if there is one."""
    if background is not None and _may_be_transparent(image):
        below = Image.new("RGBA", image.size, (*background, 255))
        below.alpha_composite(image.convert("RGBA"))
        return below.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
