"""Files of maps: what is stored is what is read, and every other kind of file is answered with the reason."""

import io

import numpy as np
import pytest
from PIL import Image

from dinov2.data.dense.map_files import ColorTable, label_lookup, read_colors, read_depths, read_indices, to_classes
from dinov2.data.dense.palettes import distinct_palette, voc_palette

LIMIT = 10**6


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of(values, kind="PNG", **options):
    return encoded(Image.fromarray(np.asarray(values)), kind, **options)


def numpy_file(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


VALUES = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_gray_levels_are_indices(kind):
    read = read_indices(of(VALUES, kind), max_pixels=LIMIT)
    assert read.dtype == np.int32 and (read == VALUES).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_indices_of_a_palette_are_read_not_its_colors(bits):
    values = VALUES & (2**bits - 1)
    image = Image.fromarray(values)
    image.putpalette([255 - index for index in range(2**bits) for _ in "rgb"])
    data = encoded(image, bits=bits)
    assert data[24:26] == bytes([bits, 3])  # bits, palette
    assert (read_indices(data, max_pixels=LIMIT) == values).all()


def gray_png(values, bits):
    """A PNG file of gray levels of few bits, which Pillow does not write: one of a palette, its header changed."""
    import struct
    import zlib

    height, width = values.shape
    rows = b"".join(
        b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].reshape(-1)).tobytes() for row in values
    )

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_levels_of_few_bits_are_not_scaled(bits):
    values = VALUES % 2**bits
    assert (read_indices(gray_png(values, bits), max_pixels=LIMIT) == values).all()


def test_indices_of_16_bits():
    values = np.array([[0, 300], [32767, 65535]], np.uint16)
    assert (read_indices(of(values), max_pixels=LIMIT) == values).all()
    assert (read_indices(of(values, "TIFF"), max_pixels=LIMIT) == values).all()


@pytest.mark.parametrize(
    "data, message",
    [
        (of(np.dstack([VALUES, VALUES * 2, VALUES])), r"3 channels \(mode RGB\).*colors=FILE"),
        (of(np.dstack([VALUES] * 3)), "red, green and blue are equal: save one of them"),
        (of(np.dstack([VALUES, VALUES])), r"2 channels \(mode LA\)"),
        (of(VALUES.astype(np.float32), "TIFF"), r"1 channel \(mode F\)"),
        (of(VALUES, "JPEG"), "JPEG file, whose lossy compression"),
        (of(VALUES)[:50], "truncated"),
        (b"", "the file is empty"),
        (of(np.zeros((1001, 1000), np.uint8)), "1,001,000 pixels"),
    ],
)
def test_other_files_are_no_indices(data, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_indices(data, max_pixels=LIMIT)


# --- Classes ---------------------------------------------------------------------------------------------------------


def test_values_become_classes():
    table = label_lookup({0: -1, 1: 0, 2: 1, 255: -1})
    classes = to_classes(np.array([[0, 1], [2, 255]], np.int32), table)
    assert classes.dtype == np.int16 and classes.tolist() == [[-1, 0], [1, -1]]


@pytest.mark.parametrize("wrong", [-1, 3, 254, 256, 70000])
def test_values_of_no_class_are_named_with_their_number_and_what_is_allowed(wrong):
    values = np.array([[0, wrong], [wrong, 255]], np.int32)
    with pytest.raises(
        ValueError, match=rf"2 pixels have .*: {wrong} \(2 pixels\); allowed: 0 to 2, 255 \(255: ignored\)$"
    ):
        to_classes(values, label_lookup({0: 0, 1: 1, 2: 2, 255: -1}))


def test_at_most_six_wrong_values_are_named():
    with pytest.raises(ValueError, match=r"5 \(1 pixels\), 6 \(1 pixels\), and 93 more; allowed: 0$"):
        to_classes(np.arange(100)[None], label_lookup({0: 0}))


@pytest.mark.parametrize("values", [{}, {-1: 0}, {2**16: 0}, {0: 2**15}])
def test_labels_that_do_not_fit(values):
    with pytest.raises(ValueError, match="from 0 to 65,535 and class indices from 0 to 32,767"):
        label_lookup(values)


def test_colors_become_classes():
    table = ColorTable.of({(255, 0, 0): 1, (0, 0, 0): 0, (0, 0, 255): 1, (255, 255, 255): -1})
    pixels = np.array([[[0, 0, 0], [255, 0, 0]], [[255, 255, 255], [0, 0, 255]]], np.uint8)
    assert (read_colors(of(pixels), max_pixels=LIMIT) == pixels).all()
    assert table.to_classes(pixels).tolist() == [[0, 1], [-1, 1]]
    pixels[0] = 1, 2, 255
    with pytest.raises(ValueError, match=r"2 pixels have colors .* of no class: 1 2 255 \(2 pixels\)"):
        table.to_classes(pixels)


def test_colors_of_palettes_and_gray_files():
    image = Image.fromarray(VALUES)
    image.putpalette([9, 8, 7, 200, 0, 0, 0, 201, 0, 0, 0, 202])
    assert read_colors(encoded(image), max_pixels=LIMIT)[0].tolist() == [[9, 8, 7], [200, 0, 0], [0, 201, 0]]
    assert read_colors(of(VALUES), max_pixels=LIMIT)[1].tolist() == [[3, 3, 3], [2, 2, 2], [1, 1, 1]]
    with pytest.raises(ValueError, match="8 bits per channel"):
        read_colors(of(VALUES.astype(np.uint16)), max_pixels=LIMIT)


# --- Depths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_depths_of_16_bits_are_divided_by_the_scale(kind):
    depths = read_depths(of(np.array([[0, 1000], [2500, 65535]], np.uint16), kind), scale=1000, max_pixels=LIMIT)
    assert depths.dtype == np.float32
    assert depths.tolist() == [[0, 1], [2.5, pytest.approx(65.535)]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (2, 3, 1)])
def test_depths_of_numpy_files_are_meters(dtype, shape):
    stored = np.array([[0, 1.5, np.nan], [np.inf, -np.inf, 8]], dtype).reshape(shape)
    depths = read_depths(numpy_file(stored), scale=1000, max_pixels=LIMIT)
    assert depths.dtype == np.float32 and depths.tolist() == [[0, 1.5, 0], [0, 0, 8]]


def test_floating_point_tiff_files_are_meters():
    stored = np.array([[0, 1.5, 8]], np.float32)
    assert (read_depths(of(stored, "TIFF"), scale=1000, max_pixels=LIMIT) == stored).all()


@pytest.mark.parametrize(
    "data, message",
    [
        (of(VALUES), r"8 bits \(mode L\), perhaps a visualization"),
        (of(np.dstack([VALUES] * 3)), "several channels"),
        (numpy_file(np.array([[1.0, -0.5], [-2, 0]])), "2 of 4 depths are negative, down to -2 m"),
        (numpy_file(np.ones((2, 2), np.int64)), r"int64 of shape \(2, 2\); expected \(H, W\) floats"),
        (numpy_file(np.ones((2, 2, 2))), r"shape \(2, 2, 2\)"),
        (numpy_file(np.array([{}])), "allow_pickle|pickle"),
        (numpy_file(np.ones((2, 2)))[:-4], "."),
        (numpy_file(np.ones((1001, 1000), np.float16)), "1,001,000 pixels"),
    ],
)
def test_other_files_are_no_depths(data, message):
    with pytest.raises(ValueError, match=message):
        read_depths(data, scale=1000, max_pixels=LIMIT)


# --- Palettes --------------------------------------------------------------------------------------------------------


def test_the_palette_of_voc_is_the_published_one():
    palette = voc_palette(256)
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 7: (128, 128, 128)}
    published |= {8: (64, 0, 0), 15: (192, 128, 128), 16: (0, 64, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(palette[index].tolist()) for index in published} == published
    assert len(np.unique(palette, axis=0)) == 256


def test_other_palettes_are_distinct_and_do_not_depend_on_the_number_of_classes():
    palette = distinct_palette(300)
    assert palette.shape == (300, 3) and palette.dtype == np.uint8
    assert len(np.unique(palette, axis=0)) == 300
    assert (distinct_palette(12) == palette[:12]).all() and distinct_palette(0).shape == (0, 3)
    differences = np.abs(np.diff(palette.astype(int), axis=0)).max(1)
    assert differences.min() > 60
