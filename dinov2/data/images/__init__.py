"""Image files of any common format -> upright images, 8-bit RGB or of chosen bands, within limits on size."""

from dinov2.data.images.band_image import AnyImage, BandImage, in_colors
from dinov2.data.images.decoding import (
    decode_image,
    encode_array,
    encode_png,
    kind_of_file,
    open_image,
    read_image_file,
)
from dinov2.data.images.encoded import BadImageError, EncodedImage, ImageDecodeError
from dinov2.data.images.options import DEFAULT_OPTIONS, ImageOptions

__all__ = [
    "DEFAULT_OPTIONS",
    "AnyImage",
    "BadImageError",
    "BandImage",
    "EncodedImage",
    "ImageDecodeError",
    "ImageOptions",
    "decode_image",
    "encode_array",
    "encode_png",
    "in_colors",
    "kind_of_file",
    "open_image",
    "read_image_file",
]
