"""decode_image turns whatever Pillow can open into an upright 8-bit RGB image, and anything else into one error."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from dinov2.data.images import BadImageError, ImageDecodeError, decode_image, open_image

RAMP = np.linspace(0, 1, 24 * 16).reshape(24, 16)  # a gray image, in [0, 1]


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def colors():
    """A smooth color image without symmetry, 24 high, 16 wide."""
    red, green = np.meshgrid(np.linspace(0, 255, 16), np.linspace(0, 255, 24))
    return Image.fromarray(np.stack([red, green, 255 - green / 2], axis=-1).astype(np.uint8))


def difference(data, expected):
    """Largest difference between the decoded image and the expected one."""
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.size == expected.size
    return np.abs(np.asarray(image, int) - np.asarray(expected.convert("RGB"), int)).max()


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_unchanged(file_format):
    assert difference(encode(colors(), file_format), colors()) == 0


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA"])
def test_other_modes_are_the_plain_conversion(mode):
    image = colors().convert(mode)
    assert difference(encode(image, "PNG"), image) == 0


def test_transparency_is_dropped_not_composited():
    image = colors()
    image.putalpha(0)
    assert difference(encode(image, "PNG"), colors()) == 0


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(64))])
def test_palette_with_and_without_transparency(transparency):
    image = colors().quantize(64)
    options = {} if transparency is None else {"transparency": transparency}
    assert difference(encode(image, "PNG", **options), image) == 0


def test_animation_gives_the_first_frame():
    frames = [Image.new("L", (16, 24), gray) for gray in (10, 200)]
    assert difference(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0]) == 0


def test_cmyk_jpeg_is_not_inverted():
    # Pillow writes the Adobe marker with inverted inks, as Photoshop does.
    data = encode(colors().convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data
    assert difference(data, colors()) < 8


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_the_upper_8_bits(file_format):
    values = (RAMP * 65535).astype(np.uint16)
    data = encode(Image.fromarray(values), file_format)
    assert difference(data, Image.fromarray((values // 256).astype(np.uint8))) == 0


def test_16_bit_values_in_32_bits_are_16_bit_gray():
    values = (RAMP * 65535).astype(np.int32)
    assert difference(encode(Image.fromarray(values), "TIFF"), Image.fromarray((values // 256).astype(np.uint8))) == 0


@pytest.mark.parametrize("dtype, low, high", [(np.int32, -70_000, 900_000), (np.float32, -0.5, 2.0)])
def test_wider_gray_is_scaled_by_its_range(dtype, low, high):
    data = encode(Image.fromarray((low + RAMP * (high - low)).astype(dtype)), "TIFF")
    assert difference(data, Image.fromarray((RAMP * 255).round().astype(np.uint8))) <= 1


def test_float_with_holes_and_constant_float():
    values = RAMP.astype(np.float32)
    values[3, 4], values[5, 6] = np.nan, np.inf
    pixels = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))
    assert pixels[3, 4, 0] == 0
    assert pixels[5, 6, 0] == 255
    assert not np.asarray(decode_image(encode(Image.fromarray(np.full_like(values, 7)), "TIFF"))).any()
    assert not np.asarray(decode_image(encode(Image.fromarray(np.full_like(values, np.nan)), "TIFF"))).any()


# The EXIF standard in words: where the first row and the first column of the stored image belong.
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],  # top, right
    3: lambda pixels: pixels[::-1, ::-1],  # bottom, right
    4: lambda pixels: pixels[::-1],  # bottom, left
    5: lambda pixels: pixels.swapaxes(0, 1),  # left, top
    6: lambda pixels: pixels.swapaxes(0, 1)[::-1],  # right, top
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(orientation, file_format):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(colors()))))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert difference(encode(stored, file_format, exif=exif), colors()) == 0


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_broken_exif_block_does_not_lose_the_image(exif):
    assert difference(encode(colors(), "JPEG", exif=exif, quality=95, subsampling=0), colors()) < 12


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_smaller_image_is_the_same_image(file_format, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(colors().resize((160, 241))))))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = open_image(encode(stored, file_format, exif=exif, **({"quality": 95} if file_format == "JPEG" else {})))
    assert image.size == image.load().size == (160, 241)
    for reduction, size in ((2, (80, 121)), (4, (40, 61)), (8, (20, 31))):
        smaller = image.load(reduction)
        assert smaller.mode == "RGB" and smaller.size == size
        expected = image.load().resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(smaller, int) - np.asarray(expected, int)).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_pixels_are_those_of_pillow(mode, options):
    data = encode(colors().resize((163, 201)).convert(mode), "JPEG", **options)
    pixels = open_image(data).pixels()
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.asarray(open_image(data).load()))


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch):
    data = encode(colors(), "JPEG")
    fast = open_image(data).pixels()
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert np.array_equal(open_image(data).pixels(), fast)


def test_pixels_of_a_file_that_is_cut_off_are_the_same_error():
    with pytest.raises(ImageDecodeError, match="truncated"):
        open_image(encode(colors(), "JPEG")[:-40]).pixels()


def test_only_the_header_of_a_jpeg_is_needed_to_open_it():
    data = encode(colors(), "JPEG")[:-40]
    assert open_image(data).size == (16, 24)
    with pytest.raises(ImageDecodeError, match="truncated"):
        open_image(data).load()


def huge_png():
    """A PNG of 10^10 pixels in a few bytes."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>404</html>", id="not an image"),
        pytest.param(encode(colors(), "JPEG")[:-40], id="truncated jpeg"),
        pytest.param(encode(colors(), "JPEG")[:100], id="jpeg header"),
        pytest.param(encode(colors(), "PNG")[:-40], id="truncated png"),
        pytest.param(encode(colors(), "PNG").replace(b"IDAT", b"IDAT\xff\xff\xff"), id="corrupt png"),
        pytest.param(encode(colors(), "TIFF")[:300], id="truncated tiff"),
        pytest.param(encode(colors(), "GIF")[:-60], id="truncated gif"),
        pytest.param(huge_png(), id="decompression bomb"),
    ],
)
def test_what_is_no_image_is_one_kind_of_error(data):
    with pytest.raises(ImageDecodeError, match=f"{len(data)} bytes"):
        decode_image(data)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "GIF", "WEBP"])
def test_random_damage_gives_a_image_or_that_error(file_format):
    data = np.frombuffer(encode(colors(), file_format), np.uint8)
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        damaged = data.copy()
        damaged[generator.integers(0, len(data), 3)] = generator.integers(0, 256, 3)
        try:
            outcomes.add(decode_image(damaged.tobytes()).mode)
        except ImageDecodeError:
            outcomes.add("error")
    assert outcomes == {"RGB", "error"}


def test_nothing_is_warned_of_and_filters_are_restored():
    filters = list(warnings.filters)
    decode_image(encode(colors().quantize(64), "PNG", transparency=bytes(range(64))))
    assert warnings.filters == filters


def test_bad_image_error_keeps_its_path_when_pickled():
    error = pickle.loads(pickle.dumps(BadImageError("cannot read", path="/data/a.jpg")))
    assert (str(error), error.path) == ("cannot read", "/data/a.jpg")
