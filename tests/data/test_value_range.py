"""Values of more than 8 bits are mapped to 8 bits by one range of a dataset, which is measured once and logged."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data.datasets import ImageFolder, make_dataset
from dinov2.data.images import ImageDecodeError, ImageOptions, decode_image, open_image
from dinov2.data.images.value_range import RangeMeasurement, measure_range, to_8_bit

WAVES = 0.5 + 0.5 * np.sin(np.add.outer(np.arange(40), 2 * np.arange(50)) / 9)
WAVES = (WAVES - WAVES.min()) / np.ptp(WAVES)  # (40, 50), from 0 to 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def waves(bands, high, dtype=np.uint16):
    return np.stack([np.roll(WAVES, band, 1) * high for band in range(bands)], -1).astype(dtype)


def tiff(samples, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def png_16(samples):
    """A PNG of 16 bits, (H, W, 1 to 4), which Pillow cannot write."""
    height, width, channels = samples.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )


def folder(root, files):
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


# --- The choice of a range ---


@pytest.mark.parametrize(
    "values, expected",
    [
        (waves(1, 4000), (0, 4095)),
        (waves(1, 4096), (0, 8191)),
        (waves(1, 65535), (0, 65535)),
        (waves(1, 200, np.uint32), (0, 255)),
        (waves(1, 20, np.uint32), (0, 31)),
        (waves(1, 3000, np.float32).round(), (0, 4095)),
        (waves(1, 3000, np.int16) - 1000, (-1000, 2000)),
        (waves(1, 0.9, np.float32), (0, 1)),
        (waves(1, 7.5, np.float64) - 2.5, (-2.5, 5)),
    ],
)
def test_the_range_is_what_sensors_count_to_or_the_extremes(values, expected):
    assert measure_range([values]) == pytest.approx(expected, abs=2e-2)


def test_a_few_outliers_do_not_decide():
    values = waves(1, 4000)
    hot = values.copy()
    hot[0, 0] = 65535
    assert measure_range([hot]) == (0, 4095)
    signed = values.astype(np.float32) - 1000.5
    signed[0, 0] = -1e9
    low, high = measure_range([signed])
    assert low > -1100 and high == pytest.approx(2999.5, abs=1)
    assert measure_range([values, values * 3]) == (0, 16383), "values that many pixels have do"


def test_what_is_not_finite_does_not_count():
    values = waves(1, 1, np.float32)
    values[0, 0], values[1, 1], values[2, 2] = np.nan, np.inf, -np.inf
    assert measure_range([values]) == (0, 1)
    assert to_8_bit(values, (0, 1))[[0, 1, 2], [0, 1, 2], 0].tolist() == [0, 255, 0]
    assert RangeMeasurement().range() is measure_range([np.full(3, np.nan)]) is None


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int64, np.float32, np.float64])
def test_bits_are_kept_from_above_and_other_ranges_are_rounded(dtype):
    values = np.array([0 if np.dtype(dtype).kind == "u" else -5, 0, 15, 16, 2048, 4095, 5000], dtype)
    assert to_8_bit(values, (0, 4095)).tolist() == [0, 0, 0, 1, 128, 255, 255]
    assert to_8_bit(np.array([0, 20, 60, 100], dtype), (0, 100)).tolist() == [0, 51, 153, 255]


# --- One image ---


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_all_16_bits_of_a_png_are_used(bands):
    samples = waves(bands, 4095)
    image = open_image(png_16(samples))
    values, alpha, _ = image.samples()
    colors = bands - (bands in (2, 4))
    assert np.array_equal(values, samples[..., :colors])
    assert (alpha is None) == (bands in (1, 3)) and (alpha is None or np.array_equal(alpha, samples[..., -1]))
    assert np.array_equal(np.asarray(image.load()), np.broadcast_to(samples[..., :colors] >> 4, (40, 50, 3)))


DEEP_TIFFS = {
    "gray": (waves(1, 4095), {}),
    "RGB": (waves(3, 4095), {"photometric": "rgb"}),
    "big-endian RGB": (waves(3, 4095), {"photometric": "rgb", "byteorder": ">"}),
    "Deflate with predictor": (waves(3, 4095), {"photometric": "rgb", "compression": "zlib", "predictor": True}),
    "tiles": (waves(3, 4095), {"photometric": "rgb", "tile": (16, 16)}),
    "BigTIFF": (waves(3, 4095), {"photometric": "rgb", "bigtiff": True}),
    "four bands": (waves(4, 4095), {"photometric": "minisblack", "planarconfig": "contig"}),
    "float": (waves(3, 4095, np.float32).round(), {"photometric": "rgb"}),
    "wide integers": (waves(1, 4095, np.uint32), {}),
    "200 bands": (waves(200, 4095), {"photometric": "minisblack", "planarconfig": "contig"}),
}


@pytest.mark.parametrize("name", DEEP_TIFFS)
def test_all_bits_of_a_tiff_are_used(name):
    samples, options = DEEP_TIFFS[name]
    image = open_image(tiff(samples.squeeze(), **options))
    values = samples[..., : 3 if samples.shape[2] >= 3 else 1]
    assert np.array_equal(image.samples().values, values)
    assert np.array_equal(np.asarray(image.load()), np.broadcast_to(values.astype(int) >> 4, (40, 50, 3)))
    assert image.num_dropped_bands == max(samples.shape[2] - 3, 0)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_a_compression_that_tifffile_does_not_know_is_read_by_pillow(mode):
    values = waves(1, 4095, {"I;16": np.uint16, "F": np.float32}[mode])[..., 0].round()
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", compression="tiff_lzw")
    assert np.array_equal(np.asarray(decode_image(file.getvalue()))[..., 0], values.astype(int) >> 4)


def test_planes_stored_one_after_the_other():
    planes = np.moveaxis(waves(4, 4095), -1, 0)
    data = tiff(planes, photometric="minisblack", planarconfig="separate")
    assert np.array_equal(np.asarray(decode_image(data)), waves(3, 4095) >> 4)


def test_white_that_is_zero_is_white():
    pixels = np.asarray(decode_image(tiff(waves(1, 4095)[..., 0], photometric="miniswhite")))
    assert np.array_equal(pixels[..., 0], 255 - (waves(1, 4095)[..., 0] >> 4))


def test_signed_bytes_are_not_taken_for_unsigned_ones():
    values = (waves(1, 200, np.int16) - 100).astype(np.int8)
    assert np.array_equal(open_image(tiff(values[..., 0])).samples().values, values)
    assert np.corrcoef(np.asarray(decode_image(tiff(values[..., 0])))[..., 0].flat, values.flat)[0, 1] > 0.999


def test_values_without_data_are_black_and_do_not_count():
    values = waves(1, 900, np.float32) + 0.25
    values[:10] = -9999
    pixels = np.asarray(decode_image(tiff(values[..., 0], extratags=[(42113, "s", 0, "-9999", True)])))
    assert not pixels[:10].any() and pixels[10:].max() == 255 and len(np.unique(pixels)) > 80


def test_a_rotated_tiff_is_made_upright():
    data = tiff(waves(3, 4095), photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    image = open_image(data)
    assert image.size == image.load().size == (40, 50)
    assert np.array_equal(np.asarray(image.load()), np.rot90(waves(3, 4095) >> 4, -1))


# --- A dataset ---


def test_slices_with_other_minima_map_equal_values_to_equal_gray(tmp_path):
    hounsfield = waves(1, 2000, np.int16)[..., 0] - 1000
    shallow = np.maximum(hounsfield, -200)
    root = folder(tmp_path / "ct", {"a.tif": tiff(hounsfield), "b.tif": tiff(shallow)})
    for dataset in (make_dataset(dataset_str=f"ImageFolder:root={root}"), ImageFolder(root=root)):
        first, second = (np.asarray(dataset.get_image(index)) for index in range(2))
        same = hounsfield == shallow
        assert np.array_equal(first[same], second[same]) and (first != second).any()
        assert dataset.image_options.value_range == (-1000, 1000)


def test_the_range_is_logged_and_may_be_set(tmp_path, caplog):
    caplog.set_level("INFO")
    root = folder(tmp_path / "x", {f"{i}.png": png_16(waves(3, 4003 - i)) for i in range(3)})
    make_dataset(dataset_str=f"ImageFolder:root={root}")
    assert (
        "3 of 3 images sampled have more than 8 bits: pixel values of uint16 from 0 to 4,003; 0 to 4,095 is mapped to "
        "0..255 (images.value_range sets this)" in caplog.text
    )
    assert "WARNING" not in caplog.text
    options = ImageOptions(value_range=(0, 2000))
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}", image_options=options)
    assert np.asarray(dataset.get_image(0))[..., 0].max() == 255
    assert "% of the pixel values are outside 0 to 2,000 and are clipped" in caplog.text


def test_few_gray_levels_are_warned_of(tmp_path, caplog):
    root = folder(tmp_path / "x", {"a.png": png_16(waves(1, 4095)), "b.png": png_16(waves(1, 60000))})
    make_dataset(dataset_str=f"ImageFolder:root={root}")
    assert "1 of 2 images of more than 8 bits keep fewer than 32 gray levels of 256" in caplog.text


def test_a_few_dark_images_among_many_are_nothing_to_warn_of(tmp_path, caplog):
    caplog.set_level("INFO")
    files = {f"{i}.png": png_16(waves(1, 4095 if i else 200)) for i in range(12)}
    make_dataset(dataset_str=f"ImageFolder:root={folder(tmp_path / 'x', files)}")
    assert "1 of 12 images of more than 8 bits keep fewer than 32 gray levels" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_deep_image_missing_in_the_sample_is_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dinov2.data.images.survey.NUM_SAMPLED", 1)
    plain = io.BytesIO()
    Image.new("L", (4, 4)).save(plain, "PNG")
    root = folder(tmp_path / "x", {"a.png": plain.getvalue(), "b.png": png_16(waves(1, 4095))})
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}")
    assert np.asarray(dataset.get_image(1)).max() == np.asarray(dataset.get_image(1)).max() == 255
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "b.png has more than 8 bits, but the inspected sample had no such image to measure a range on" in warning


def test_images_without_any_finite_value_are_warned_of(tmp_path, caplog):
    files = {name: tiff(np.full((8, 8), np.nan, np.float32)) for name in ("a.tif", "b.tif")}
    make_dataset(dataset_str=f"ImageFolder:root={folder(tmp_path / 'x', files)}")
    files["c.tif"] = tiff(WAVES.astype(np.float32))
    make_dataset(dataset_str=f"ImageFolder:root={folder(tmp_path / 'y', files)}")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "2 of 2 images of more than 8 bits have no finite value and become black",
        "2 of 3 images of more than 8 bits have no finite value and become black",
    ]


@pytest.mark.parametrize(("file_format", "largest"), [("P6", 65535), ("P6", 4095), ("P3", 65535)])
def test_all_16_bits_of_a_ppm_are_used(file_format, largest):
    samples = waves(3, 4095)
    pixels = samples.astype(">u2").tobytes() if file_format == "P6" else " ".join(map(str, samples.ravel())).encode()
    header = f"{file_format}\n# 50 x 40\n50 40\n{largest}\n".encode()
    comment = b"# a comment 7\n" if file_format == "P3" else b""
    found = np.asarray(decode_image(header + comment + pixels))
    np.testing.assert_array_equal(found, to_8_bit(samples, (0, 4095)))
    with pytest.raises(ImageDecodeError, match="truncated"):
        decode_image(header + pixels[:1000])


def encode(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def test_what_is_dropped_is_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    gray = Image.new("L", (8, 8), 7)
    clear, opaque = Image.new("RGBA", (8, 8), (1, 2, 3, 0)), Image.new("RGBA", (8, 8), (1, 2, 3, 255))
    files = {
        "bands.tif": tiff(waves(5, 255, np.uint8), photometric="rgb"),
        "black is zero.tif": tiff(waves(5, 255, np.uint8), photometric="minisblack", planarconfig="contig"),
        "two.tif": tiff(waves(2, 255, np.uint8), photometric="minisblack", planarconfig="contig"),
        "pages.tif": tiff(np.zeros((3, 8, 8), np.uint8), photometric="minisblack"),
        "frames.gif": encode(gray, "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 200)]),
        "clear.png": encode(clear),
        "opaque.png": encode(opaque),
        "broken.png": b"",
        "large.png": encode(Image.new("1", (12_000, 9_000))),
    }
    root = folder(tmp_path / "x", files)
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}")
    for expected in (
        "3 of 9 images sampled have more bands than are used: those beyond the third, or of two the second, are",
        "1 of 9 images sampled are transparent: transparency is dropped, which shows the colors under it",
        "2 of 9 images sampled have more pages or frames than one: the first is used (images.pages, of TIFF)",
        "1 of 9 images sampled have more than 100 megapixels, which slows down loading",
        f"1 of 9 images sampled cannot be read: {root}/broken.png: 0 bytes in no supported image format",
    ):
        assert expected in caplog.text
    assert dataset.survey() is dataset.survey() and "8 bits" not in caplog.text


def test_plain_images_give_no_notes(tmp_path):
    root = folder(
        tmp_path / "x", {"a.png": encode(Image.new("RGB", (8, 8))), "b.jpg": encode(Image.new("L", (8, 8)), "JPEG")}
    )
    assert ImageFolder(root=root).notes() == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "16 bits"])
def test_transparency_is_composited_where_a_background_is_set(mode):
    if mode == "16 bits":
        data = png_16(np.dstack([np.zeros((4, 4, 3)), np.full((4, 4), 0)]).astype(np.uint16))
    elif mode == "P":
        data = encode(Image.new("P", (4, 4), 0), transparency=0)
    else:
        data = encode(Image.new(mode, (4, 4), 0))
    assert decode_image(data).getpixel((0, 0)) == (0, 0, 0)
    assert decode_image(data, ImageOptions(background=(255, 250, 240))).getpixel((0, 0)) == (255, 250, 240)


@pytest.mark.parametrize(
    "options", [{}, {"byteorder": ">"}, {"compression": "zlib"}, {"compression": "zlib", "byteorder": ">"}]
)
def test_colors_of_16_bits_are_read_by_pillow_where_tifffile_cannot(monkeypatch, options):
    def cannot(*arguments):
        raise ValueError("no such codec")

    monkeypatch.setattr("dinov2.data.images.deep_pixels.read_stored", cannot)
    image = open_image(tiff(waves(3, 4095), photometric="rgb", **options))
    assert np.array_equal(image.samples().values, waves(3, 4095))
    with pytest.raises(ImageDecodeError, match=r"4 band\(s\) x 16 bits, .*no such codec.*convert it"):
        decode_image(tiff(waves(4, 4095), photometric="minisblack", planarconfig="contig"))
