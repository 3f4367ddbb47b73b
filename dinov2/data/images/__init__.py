"""Image files of any common format -> upright 8-bit RGB images, within limits on size."""

from dinov2.data.images.decoding import (
    DEFAULT_OPTIONS,
    BadImageError,
    EncodedImage,
    ImageDecodeError,
    ImageOptions,
    decode_image,
    encode_png,
    kind_of_file,
    open_image,
    read_image_file,
)

__all__ = [
    "DEFAULT_OPTIONS",
    "BadImageError",
    "EncodedImage",
    "ImageDecodeError",
    "ImageOptions",
    "decode_image",
    "encode_png",
    "kind_of_file",
    "open_image",
    "read_image_file",
]
