"""Images of chosen bands, of any type of pixels: what is read, and what the augmentation makes of it."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dinov2 import config
from dinov2.data import DataAugmentationDINO, make_dataset
from dinov2.data.collate import make_masks
from dinov2.data.device_augment import DeviceAugmentation, make_crops, pack_raw_batch
from dinov2.data.images import BandImage, ImageDecodeError, ImageOptions, decode_image, open_image
from dinov2.data.masking import MaskingGenerator
from dinov2.data.statistics.__main__ import main
from dinov2.data.transforms import make_classification_eval_transform

RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 4096, (12, 10, 5)).astype(np.uint16)  # 12 bits


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **{"photometric": "minisblack"} | options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def levels(data: bytes, bands: tuple[int, ...], value_range: Any = (0.0, 255.0), **options: Any) -> np.ndarray:
    return np.asarray(decode_image(data, ImageOptions(bands=bands, value_range=value_range, **options)))


# --- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        tiff(FIVE, planarconfig="contig"),
        tiff(np.moveaxis(FIVE, 2, 0), planarconfig="separate"),
        tiff(FIVE, planarconfig="contig", tile=(16, 16)),
        tiff(FIVE.byteswap().view(FIVE.dtype.newbyteorder()), planarconfig="contig", byteorder=">"),
        npy(FIVE),
        npy(np.moveaxis(FIVE, 2, 0)),
        npy(np.asfortranarray(FIVE)),
        npz(x=FIVE),
        npz(image=FIVE, mask=FIVE[..., 0]),
    ],
    ids=["contiguous", "planes", "tiles", "big-endian", "npy", "npy-bands-first", "npy-fortran", "npz", "npz-image"],
)
def test_bands_have_the_values_of_the_file(data: bytes) -> None:
    found = levels(data, (4, 0, 3, 3), (0.0, 4095.0))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, FIVE[..., [4, 0, 3, 3]] * (255 / 4095), rtol=1e-6)


def test_every_band_has_its_range_and_what_is_outside_is_clipped() -> None:
    ranges = ((0.0, 1000.0), (1000.0, 2000.0), (-500.0, 4500.0), (0.0, 4095.0))
    found = levels(npy(FIVE), (0, 1, 2, 3), ranges)
    for band, (low, high) in enumerate(ranges):
        expected = (FIVE[..., band].astype(np.float64).clip(low, high) - low) / (high - low) * 255
        np.testing.assert_allclose(found[..., band], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float16, np.float32, np.float64, np.uint32])
def test_types_of_pixels(dtype: type) -> None:
    values = RNG.integers(-1000, 1000, (7, 6)) if np.dtype(dtype).kind != "u" else RNG.integers(0, 1000, (7, 6))
    values = values.astype(dtype)
    for data in (npy(values), *([] if dtype == np.float16 else [tiff(values)])):
        found = levels(data, (0,), (-1000.0, 1000.0))
        np.testing.assert_allclose(found[..., 0], (values.astype(np.float64) + 1000) * (255 / 2000), rtol=1e-5)


def test_missing_values_are_the_lowest_level() -> None:
    values = np.array([[np.nan, 1.0], [np.inf, -np.inf]], np.float32)
    assert levels(npy(values), (0,), (0.0, 2.0))[..., 0].tolist() == [[0, 127.5], [255, 0]]


def test_a_single_band_keeps_more_than_8_bits_and_white_may_be_0() -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    assert len(np.unique(levels(tiff(values), (0,), (0.0, 4095.0)))) == 4096
    inverted = levels(tiff(values, photometric="miniswhite"), (0,), (0.0, 4095.0))
    np.testing.assert_allclose(inverted[..., 0], (4095 - values) * (255 / 4095.0), rtol=1e-4, atol=1e-4)


def test_three_bands_are_an_rgb_image_of_8_bits() -> None:
    image = decode_image(npy(FIVE), ImageOptions(bands=(3, 0, 1), value_range=(0.0, 4095.0)))
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    assert np.array_equal(np.asarray(image), FIVE[..., [3, 0, 1]] >> 4)


def test_bytes_are_levels_already_and_alpha_is_a_band() -> None:
    pixels = RNG.integers(0, 256, (9, 8, 4)).astype(np.uint8)
    assert np.array_equal(levels(encoded(pixels), (0, 1, 2, 3), (0.0, 1.0)), pixels.astype(np.float32))
    assert np.array_equal(levels(encoded(pixels[..., :3]), (2,)), pixels[..., 2:3].astype(np.float32))
    assert np.array_equal(levels(encoded(pixels[..., 0]), (0,)), pixels[..., :1].astype(np.float32))
    assert np.array_equal(levels(npy(pixels), (3,)), pixels[..., 3:].astype(np.float32))
    seven = RNG.integers(0, 256, (9, 8, 7)).astype(np.uint8)  # more than Pillow reads
    assert np.array_equal(levels(tiff(seven, planarconfig="contig"), (6, 1)), seven[..., [6, 1]].astype(np.float32))
    palette = Image.fromarray(pixels[..., 0]).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert np.array_equal(levels(file.getvalue(), (0,))[..., 0], np.asarray(palette.convert("RGB"))[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_upright(orientation: int) -> None:
    pixels = RNG.integers(0, 256, (6, 9)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(pixels, "PNG", exif=exif)
    assert np.array_equal(levels(data, (0,))[..., 0], np.asarray(decode_image(data))[..., 0])
    deep = tiff(pixels.astype(np.uint16) * 257, extratags=[(274, "H", 1, orientation, True)])
    upright = np.asarray(decode_image(deep, ImageOptions(value_range=(0.0, 65535.0))))[..., 0]
    assert np.array_equal(np.floor(levels(deep, (0,), (0.0, 65535.0))[..., 0]), upright)


def test_pages_are_bands() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for band in range(5):
            writer.write(FIVE[..., band], photometric="minisblack")
    found = levels(file.getvalue(), (4, 1), (0.0, 4095.0), pages="bands")
    np.testing.assert_allclose(found, FIVE[..., [4, 1]] * (255 / 4095), rtol=1e-6)
    different = io.BytesIO()
    with tifffile.TiffWriter(different) as writer:
        writer.write(FIVE[..., 0], photometric="minisblack")
        writer.write(FIVE[:5, :, 0], photometric="minisblack")
    message = r"pages cannot be bands.*differ: 1 of uint16 \(12, 10\), 1 of uint16 \(5, 10\)"
    with pytest.raises(ImageDecodeError, match=message):
        levels(different.getvalue(), (0, 1), pages="bands")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(FIVE[..., :2]), r"it has 2 band\(s\), 0 to 1, but images.bands = \[0, 2\]"),
        (encoded(np.zeros((4, 4), np.uint8)), r"it has 1 band\(s\), 0 to 0, but images.bands = \[0, 2\]"),
        (npy(np.zeros((2, 2, 2, 2))), r"an array of shape \(2, 2, 2, 2\); images are \(height, width\)"),
        (npy(np.zeros((4, 4), complex)), "an array of complex128; images have integers or floating"),
        (npy(np.array([{}], object)), "an array of object"),
        (npz(a=FIVE, b=FIVE), "an NPZ file of 2 arrays, none of them named image: a, b"),
        (npy(FIVE)[:-7], "cannot decode"),
        (npz(x=FIVE)[:-40], "a zip archive, or an NPZ file, that is damaged"),
    ],
)
def test_files_without_the_bands_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ImageDecodeError, match=message):
        levels(data, (0, 2))


@pytest.mark.parametrize(
    ("shape", "axis", "size", "bands"),
    [
        ((100, 32, 32), "auto", (32, 32), 100),  # spectra of square patches
        ((32, 32, 100), "auto", (32, 32), 100),
        ((5, 48, 40), "auto", (40, 48), 5),
        ((48, 40, 5), "auto", (40, 48), 5),
        ((16, 16, 16), "auto", (16, 16), 16),
        ((100, 48, 40), "first", (40, 48), 100),
        ((6, 7, 90), "last", (7, 6), 90),
    ],
)
def test_which_axis_has_the_bands(shape: tuple[int, ...], axis: str, size: tuple[int, int], bands: int) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    image = open_image(npy(array), ImageOptions(bands=(bands - 1,), value_range=(0.0, 255.0), bands_axis=axis))
    assert image.size == size and f"are read as {bands} band(s) of {size[0]} x {size[1]} pixels" in image.layout
    expected = array[-1] if axis == "first" or (axis == "auto" and shape[0] == bands != 16) else array[..., -1]
    assert np.array_equal(np.asarray(image.load())[..., 0], expected.clip(0, 255))


def test_rows_that_were_written_as_pages_are_refused_with_the_remedy() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((48, 40, 5), np.uint16))  # 48 pages of 40 x 5
    for pages in ("first", "bands"):
        with pytest.raises(
            ImageDecodeError, match="its 48 pages of 5 x 40 pixels .* look like the rows of .*planarconfig"
        ):
            levels(file.getvalue(), (0, 1), pages=pages)
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((5, 48, 40), np.uint16), photometric="minisblack")
    with pytest.raises(
        ImageDecodeError, match="it has 5 pages of 40 x 48 pixels .*: if these are its bands, set images.pa"
    ):
        levels(file.getvalue(), (0, 1))


def test_missing_data_are_neither_measured_nor_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, kinds = np.random.default_rng(0), ("nan", "tag", "value")
    for kind in kinds:
        (tmp_path / kind).mkdir()
    for number in range(4):
        pixels = rng.uniform(100, 900, (20, 20, 2)).astype(np.float32)
        for kind, value in zip(kinds, (np.nan, -9999, -9999), strict=True):
            marked = pixels.copy()
            marked[:2] = value
            tag = {"extratags": [(42113, "s", 0, "-9999", True)]} if kind == "tag" else {}
            (tmp_path / kind / f"{number}.tif").write_bytes(tiff(marked, planarconfig="contig", **tag))
    caplog.set_level("INFO")
    found = {}
    for kind in kinds:
        options = ImageOptions(bands=(0, 1), nodata=-9999.0 if kind == "value" else None)
        dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path / kind}", image_options=options)
        main(
            [
                f"ImageFolder:root={tmp_path / kind}",
                "--output",
                str(tmp_path / f"{kind}.out"),
                "--num-workers",
                "0",
                "images.bands=[0,1]",
                *(["images.nodata=-9999"] if kind == "value" else []),
            ]
        )
        written = json.loads((tmp_path / f"{kind}.out" / "statistics.json").read_text())
        found[kind] = dataset.image_options.value_range, dataset.survey().normalization()
        assert [band["mean"] for band in written["bands"]] == pytest.approx(found[kind][1][0], abs=1e-4)
        assert written["bands"][0]["missing"] == pytest.approx(0.1, abs=0.01)
        assert np.asarray(dataset.get_image(0))[:2].max() == 0
    assert found["nan"] == found["tag"] == found["value"]
    assert caplog.text.count("10.00% of the values are missing (NaN or NoData): they become the lowest level") >= 6
    caplog.clear()
    make_dataset(dataset_str=f"ImageFolder:root={tmp_path / 'value'}", image_options=ImageOptions(bands=(0, 1)))
    assert "the value -9,999, of 10.0% of the pixels, is far from all others: if it marks missing data" in caplog.text


def test_an_array_without_chosen_bands_is_read_like_any_file() -> None:
    gray = npy(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(decode_image(gray))[..., 2].ravel(), np.arange(256))
    five = open_image(npy(FIVE), ImageOptions(value_range=(0.0, 4095.0)))
    assert five.size == (10, 12) and five.is_deep
    assert np.array_equal(five.pixels(), FIVE[..., :3] >> 4)


def test_a_dataset_measures_one_range_for_each_band(tmp_path: Path) -> None:
    for number in range(6):
        bands = [RNG.integers(0, 1000 * 10**band, (8, 8)).astype(np.float32) for band in range(3)]
        bands.append(RNG.normal(0, 1, (8, 8)).astype(np.float32))
        tifffile.imwrite(
            tmp_path / f"{number}.tif", np.stack(bands, 2), photometric="minisblack", planarconfig="contig"
        )
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}", image_options=ImageOptions(bands=(3, 0, 1, 2)))
    ranges = dataset.image_options.value_range
    assert ranges[1:] == ((0.0, 1023.0), (0.0, 16383.0), (0.0, 131071.0)) and -5 < ranges[0][0] < -2 < 2 < ranges[0][1]
    found = dataset.survey().normalization()
    images = np.stack([np.asarray(dataset.get_image(index)) for index in range(6)]) / 255
    np.testing.assert_allclose(found, [images.mean((0, 1, 2)), images.std((0, 1, 2))], rtol=1e-4)


def test_arrays_are_listed_when_asked(tmp_path: Path) -> None:
    (tmp_path / "0.npy").write_bytes(npy(FIVE))
    (tmp_path / "1").write_bytes(npy(FIVE + 1))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match="a NumPy array: if these are images, write .*:suffixes=.npy"):
        make_dataset(dataset_str=f"ImageFolder:root={tmp_path}")
    options = ImageOptions(bands=(0, 4), value_range=(0.0, 255.0))
    for suffixes, count in ((".npy", 1), ("any", 2)):
        name = f"ImageFolder:root={tmp_path}:suffixes={suffixes}"
        assert len(dataset := make_dataset(dataset_str=name, image_options=options)) == count
        assert np.asarray(dataset.get_image(0)).shape == (12, 10, 2)
    with pytest.raises(ValueError, match="unknown key 'bands'.*bands is a key of the configuration: images.bands=..."):
        make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:bands=0")


# --- What becomes of it ----------------------------------------------------------------------------------------------


def band_image(bands: int, side: int = 40) -> BandImage:
    smooth = np.random.default_rng(side).random((side // 4, side // 4, bands)).repeat(4, 0).repeat(4, 1)
    return BandImage((smooth * 255).astype(np.float32))


def test_the_methods_of_a_band_image_are_those_of_pil() -> None:
    pixels = np.random.default_rng(1).integers(60, 190, (30, 21, 3)).astype(np.uint8)
    ours, theirs = BandImage(pixels.astype(np.float32)), Image.fromarray(pixels)
    assert ours.size == theirs.size and np.array_equal(np.asarray(ours.convert("RGB")), pixels)
    for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        resized = np.asarray(ours.resize((13, 17), resample))
        np.testing.assert_allclose(resized, np.asarray(theirs.resize((13, 17), resample)), atol=2)
    for factor in (2, 4, 8):
        np.testing.assert_allclose(np.asarray(ours.reduce(factor)), np.asarray(theirs.reduce(factor)), atol=1)
    assert np.array_equal(np.asarray(ours.crop((2, 3, 9, 20))), np.asarray(theirs.crop((2, 3, 9, 20))))
    six = BandImage(np.stack([np.full((2, 2), 10 * band, np.float32) for band in range(6)], 2), shown=(5, 0, 2))
    assert np.asarray(six.convert("RGB"))[0, 0].tolist() == [50, 0, 20]
    assert np.asarray(BandImage(six.levels, shown=(4,)).convert("RGB"))[1, 1].tolist() == [40, 40, 40]


def augmentation(bands: int, **options: Any) -> DataAugmentationDINO:
    settings: dict[str, Any] = {"mean": [0.0] * bands, "std": [1 / 255] * bands, "blur_probabilities": (0, 0, 0)}
    return DataAugmentationDINO((0.3, 1.0), (0.1, 0.3), 2, 16, 8, **settings | options)


def test_bands_change_in_brightness_and_contrast_each_by_its_own_factors() -> None:
    image = band_image(5, 16)
    whole = augmentation(
        5,
        color_jitter=(0.5, 0.5, 0.5, 0.5),
        color_jitter_probability=1.0,
        flip_probability=0.0,
        solarize_probability=0.0,
    )
    whole.sampler.scale[:] = 1.0  # the image, not resampled
    whole.sampler.aspect_ratio = (1.0, 1.0)
    torch.manual_seed(0)
    pixels, params = whole.draw(image)
    (crop, _), *_ = whole.apply(pixels, params)
    assert params.factors.shape == (4, 2, 5) and len(np.unique(params.factors[0])) == 10
    expected = image.levels.astype(np.float64)
    for operation in (each for each in params.order[0] if each < 2):
        base = 0.0 if operation == 0 else expected.mean((0, 1))
        expected = ((expected - base) * params.factors[0, operation] + base).clip(0, 255)
    np.testing.assert_allclose(crop.numpy().transpose(1, 2, 0), expected, atol=1e-3)


@pytest.mark.parametrize("bands", [1, 2, 4, 9])
def test_the_device_computes_the_crops_of_the_workers(bands: int) -> None:
    made = augmentation(bands, blur_probabilities=(1.0, 0.5, 0.5), solarize_probability=1.0)
    on_device, images = DeviceAugmentation(made), [band_image(bands, side) for side in (40, 24, 32)]
    expected, raw = [], []
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        expected.append(made(image))
        torch.manual_seed(seed)
        raw.append(on_device(image))
    masks = make_masks(
        6,
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.5,
        n_tokens=4,
        mask_generator=MaskingGenerator((2, 2)),
        rng=random.Random(0),
    )
    batch = make_crops(pack_raw_batch(raw, masks, on_device.crop_format(torch.float32)))
    crops = torch.stack([each.global_crops[i] for i in range(2) for each in expected])
    assert batch.global_crops.shape == (6, bands, 16, 16)
    torch.testing.assert_close(batch.global_crops, crops, atol=0.02, rtol=0)
    crops = torch.stack([each.local_crops[i] for i in range(2) for each in expected])
    torch.testing.assert_close(batch.local_crops, crops, atol=0.02, rtol=0)


def test_other_channels_than_those_of_the_normalization_are_named() -> None:
    with pytest.raises(ValueError, match="an image of 4 channels, but mean and standard deviation of 5"):
        augmentation(5)(band_image(4))
    with pytest.raises(ValueError, match="the implementation pil is for images of three channels, not of 5"):
        augmentation(5, implementation="pil")


def test_the_transform_of_evaluations() -> None:
    image = band_image(4, 32)
    transform = make_classification_eval_transform(resize_size=32, crop_size=16, mean=[0.5] * 4, std=[0.25] * 4)
    expected = (image.levels[8:24, 8:24] / 255 - 0.5) / 0.25
    np.testing.assert_allclose(transform(image).numpy(), expected.transpose(2, 0, 1), atol=1e-5)


# --- Pages and statistics of a dataset -------------------------------------------------------------------------------


def write_stack(path: Path, pages: int, **options: Any) -> np.ndarray:
    """A TIFF file of some pages of int16 slices."""
    slices = np.random.default_rng(pages).integers(-1000, 1000, (pages, 9, 7)).astype(np.int16)
    with tifffile.TiffWriter(path) as writer:
        for page in slices:
            writer.write(page, photometric="minisblack", **options)
    return slices


def test_pages_are_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = write_stack(tmp_path / "a" / "0.tif", 3), write_stack(tmp_path / "b" / "1.tif", 1)
    (tmp_path / "b" / "2.png").write_bytes(encoded(np.full((4, 5), 7, np.uint8)))
    options = ImageOptions(bands=(0,), value_range=(-1000.0, 1000.0), pages="images")
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}", image_options=options)
    assert len(dataset) == 5 and dataset.get_targets().tolist() == [0, 0, 0, 1, 1]
    assert [dataset.get_target(index) for index in range(5)] == [0, 0, 0, 1, 1]
    assert dataset.describe(2) == f"{tmp_path}/a/0.tif page 2" and dataset.describe(3) == f"{tmp_path}/b/1.tif"
    for index, expected in enumerate([*first, *second]):
        found = np.asarray(dataset.get_image(index))[..., 0]
        np.testing.assert_allclose(found, (expected.astype(float) + 1000) * (255 / 2000), rtol=1e-4, atol=1e-3)
    assert np.asarray(dataset.get_image(4)).tolist() == [[[7.0]] * 5] * 4
    assert len(set(dataset.image_files())) == 3 and len({dataset.get_image_data(index) for index in range(5)}) == 5


def test_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pixels = [rng.integers(0, 1000 * (1 + n), (20, 10 + n, 2)).astype(np.uint16) for n in range(12)]
    for number, each in enumerate(pixels):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        (tmp_path / str(number % 2) / f"{number}.tif").write_bytes(tiff(each, planarconfig="contig"))
    (tmp_path / "1" / "copy.tif").write_bytes(tiff(pixels[0], planarconfig="contig", rowsperstrip=3))
    (tmp_path / "1" / "cut.tif").write_bytes(tiff(pixels[1], planarconfig="contig")[:300])
    output = tmp_path.with_name("statistics")
    flags = ["--output", str(output), "--num-workers", "0", "images.bands=[0,1]"]
    assert main([f"ImageFolder:root={tmp_path}", *flags]) == 0
    found = json.loads((output / "statistics.json").read_text())
    assert [each["path"] for each in found["unreadable"]] == [f"{tmp_path}/1/cut.tif"] and found["inspected"] == 14
    assert found["duplicates"] == [[f"{tmp_path}/0/0.tif", f"{tmp_path}/1/copy.tif"]]
    assert found["duplicates_of_several_classes"] == 1 and found["types"] == {"uint16 x 2 bands": 13}
    levels_of = [each / 16383 for each in [*pixels, pixels[0]]]
    for band, values in enumerate(found["bands"]):
        assert values["value_range"] == [0, 16383]
        mean = np.mean([each[..., band].mean() for each in levels_of])
        square = np.mean([(each[..., band] ** 2).mean() for each in levels_of])
        assert values["mean"] == pytest.approx(mean) and values["std"] == pytest.approx((square - mean**2) ** 0.5)
        every = np.concatenate([each[..., band].ravel() for each in [*pixels, pixels[0]]])
        assert (values["smallest"], values["largest"]) == (every.min(), every.max())
        assert values["percentiles"]["50"] == np.percentile(every, 50) and sum(values["histogram"]) > 0.99 * every.size
    cfg = config.load(None, found["overrides"])
    assert cfg.augmentation.mean[1] == pytest.approx(mean, abs=1e-4)
    page = (output / "statistics.html").read_text()
    assert page.count("data:image/jpeg") == 13 + 3 * 2 + 2 and "cut.tif" in page and "http" not in page


def test_statistics_of_plain_images_and_of_none(tmp_path: Path) -> None:
    gray = [np.full((4, 4), value, np.uint8) for value in (0, 51, 255)]
    for number, pixels in enumerate(gray):
        (tmp_path / f"{number}.png").write_bytes(encoded(pixels))
    output = tmp_path / "out"
    assert main([f"ImageFolder:root={tmp_path}", "--output", str(output), "--num-workers", "0"]) == 0
    found = json.loads((output / "statistics.json").read_text())
    assert found["overrides"] == ["augmentation.mean=[0.4,0.4,0.4]", "augmentation.std=[0.432,0.432,0.432]"]
    assert [band["constant"] for band in found["bands"]] == [3, 3, 3]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of 1 images can be read; the first, .*0.png: .* no supported image"):
        main([f"ImageFolder:root={tmp_path / 'bad'}", "--output", str(tmp_path / "other"), "--num-workers", "0"])
    with pytest.raises(ValueError, match="--output .* has the statistics of ImageFolder:root=.*: give another folder"):
        main([f"ImageFolder:root={tmp_path / 'bad'}", "--output", str(output), "--num-workers", "0"])
