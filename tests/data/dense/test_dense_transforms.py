"""Joint transforms: image and map stay aligned, sizes and shares are the published ones, one generator decides all."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from dinov2.data.dense import (
    IGNORED,
    KITTI_CROPS,
    NYU_CROPS,
    DepthColors,
    DepthCrops,
    EvaluationInputs,
    SegmentationCrops,
)
from dinov2.data.dense.resampling import Window, resized_image, resized_map, size_for_short_side
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

COLORS = np.array([[20, 30, 200], [220, 40, 30], [30, 210, 60], [240, 230, 40]], np.uint8)
LEVELS = {"mean": (0, 0, 0), "std": (1 / 255, 1 / 255, 1 / 255)}  # normalization that leaves levels as they are


def scene(height, width, seed=0):
    """Shapes whose colors encode their classes: image (height, width, 3) uint8 and map (height, width) int16."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int16)
    y, x = np.mgrid[:height, :width]
    for label in (1, 2, 3, 1, 2, 3):
        center_y, center_x, radius = rng.random(3) * (height, width, min(height, width) / 2)
        labels[(y - center_y) ** 2 + (x - center_x) ** 2 < radius**2 / 2] = label
    return COLORS[labels], labels


def rng(seed=0):
    return np.random.default_rng(seed)


def agreement(levels, labels):
    """Share of the labeled pixels (H, W) whose color, (3, H, W), is nearest to that of their class."""
    distance = (levels[None] - torch.from_numpy(COLORS).float()[:, :, None, None]).abs().sum(1)
    inside = labels >= 0
    return (distance.argmin(0) == labels)[inside].float().mean().item()


# --- Resampling ------------------------------------------------------------------------------------------------------


def resized_by_a_loop(pixels, size):
    """Bilinear interpolation at the centers of pixels, in float64."""
    height, width, _ = pixels.shape
    result = np.empty((*size, 3))
    for i, j in itertools.product(*map(range, size)):
        y, x = (i + 0.5) * height / size[0] - 0.5, (j + 0.5) * width / size[1] - 0.5
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = math.floor(y), math.floor(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        b, r = y - top, x - left
        upper = (1 - r) * pixels[top, left] + r * pixels[top, right]
        lower = (1 - r) * pixels[bottom, left] + r * pixels[bottom, right]
        result[i, j] = (1 - b) * upper + b * lower
    return result.transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(5, 7), (11, 4), (10, 14), (1, 1), (3, 30)])
def test_images_are_resized_as_by_a_loop_in_float64(size):
    pixels = rng().integers(0, 256, (5, 7, 3), np.uint8)
    resized = resized_image(pixels, size)
    assert resized.shape == (3, *size) and resized.dtype == torch.float32
    assert np.abs(resized.numpy() - resized_by_a_loop(pixels, size)).max() <= 0.5 + 1e-4
    assert (resized == resized.round()).all()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    assert (resized - interpolate(image, size, mode="bilinear")[0]).abs().max() <= 0.5 + 1e-4


@given(st.data())
def test_a_window_is_a_part_of_the_whole(data):
    height, width, new_height, new_width = (data.draw(st.integers(1, 30)) for _ in range(4))
    top, left = data.draw(st.integers(0, new_height - 1)), data.draw(st.integers(0, new_width - 1))
    rows, columns = data.draw(st.integers(1, new_height - top)), data.draw(st.integers(1, new_width - left))
    pixels = rng().integers(0, 256, (height, width, 3), np.uint8)
    size, window, part = (new_height, new_width), Window(top, left, rows, columns), np.s_[..., top : top + rows, :]
    for antialias in (False, True):
        whole = resized_image(pixels, size, antialias=antialias)
        expected = whole[part][..., left : left + columns]
        assert torch.equal(resized_image(pixels, size, window, antialias=antialias), expected)
    values = resized_map(pixels[..., 0], size)
    assert (resized_map(pixels[..., 0], size, window) == values[top : top + rows, left : left + columns]).all()
    nearest = interpolate(torch.from_numpy(pixels[..., 0].copy())[None, None].float(), size, mode="nearest")
    if height % new_height == 0 or new_height % height == 0:  # otherwise the float32 scale of torch may round down
        assert (values[:, 0] == nearest[0, 0, :, 0].numpy()).all()


def test_antialiasing_averages_what_is_skipped_without_it():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[::4, ::4] = 240
    assert resized_image(pixels, (2, 2)).max() == 0
    assert (resized_image(pixels, (2, 2), antialias=True) > 5).all()


@pytest.mark.parametrize(
    "size, short, long, expected",
    [
        ((480, 640), 512, None, (512, 683)),
        ((640, 480), 512, None, (683, 512)),
        ((375, 1242), 512, None, (512, 1696)),
        ((100, 1000), 512, 2048, (205, 2048)),  # 2048 / 1000 = 2.048 limits
        ((512, 512), 512, 2048, (512, 512)),
        ((1, 1000), 2, 100, (1, 100)),
    ],
)
def test_short_side(size, short, long, expected):
    assert size_for_short_side(size, short, long_side=long) == expected


# --- Training for segmentation ---------------------------------------------------------------------------------------


def test_types_sizes_and_normalization():
    image, labels = scene(60, 80)
    crop, label_crop = SegmentationCrops(short_side=48, crop_size=32)(Image.fromarray(image), labels, rng())
    assert crop.shape == (3, 32, 32) and crop.dtype == torch.float32
    assert label_crop.shape == (32, 32) and label_crop.dtype == torch.int64
    plain = SegmentationCrops(short_side=60, scale=(1, 1), crop_size=(60, 80), flip=0, distortion=None)
    crop, label_crop = plain(image, labels, rng())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(crop, expected, atol=1e-5) and (label_crop.numpy() == labels).all()


@pytest.mark.parametrize("height, width", [(61, 83), (97, 40), (33, 33)])
@pytest.mark.parametrize("antialias", [False, True])
def test_labels_stay_on_their_pixels(height, width, antialias):
    image, labels = scene(height, width)
    crops = SegmentationCrops(short_side=64, crop_size=48, distortion=None, antialias=antialias, **LEVELS)
    shares = [agreement(*crops(image, labels, rng(seed))) for seed in range(30)]
    assert min(shares) > 0.85 and np.mean(shares) > 0.94  # the others are at the borders of shapes


def test_distorted_colors_do_not_move():
    image, labels = scene(64, 64)
    crops = SegmentationCrops(short_side=64, scale=(1, 1), crop_size=64, flip=0.5, **LEVELS)
    for seed in range(20):
        crop, label_crop = crops(image, labels, rng(seed))
        for label in range(4):
            colors = crop[:, label_crop == label]
            assert colors.numel() == 0 or (colors == colors[:, :1]).all()  # one color in, one color out
    assert crop.min() >= 0 and crop.max() <= 255


def test_mirroring_has_its_probability():
    image, labels = scene(32, 32)
    crops = SegmentationCrops(short_side=32, scale=(1, 1), crop_size=32, distortion=None, **LEVELS)
    mirrored = [bool((crops(image, labels, rng(seed))[1].numpy() == labels[:, ::-1]).all()) for seed in range(300)]
    assert 120 < sum(mirrored) < 180
    for flip, expected in ((0.0, labels), (1.0, labels[:, ::-1])):
        crops = SegmentationCrops(short_side=32, scale=(1, 1), crop_size=32, flip=flip)
        assert all((crops(image, labels, rng(seed))[1].numpy() == expected).all() for seed in range(9))


def test_scales_are_uniform_and_keep_the_ratio():
    crops = SegmentationCrops()
    sizes = np.array([crops.draw_size((480, 640), rng(seed)) for seed in range(2000)])
    short = sizes[:, 0]
    assert short.min() >= 256 and short.max() <= 1024
    counts, _ = np.histogram(short, bins=6, range=(256, 1024))
    assert (np.abs(counts - 2000 / 6) < 65).all()  # 4 standard deviations
    assert np.abs(sizes[:, 1] / sizes[:, 0] - 640 / 480).max() < 0.01
    limited = SegmentationCrops(long_side=600)
    assert max(max(limited.draw_size((480, 640), rng(seed))) for seed in range(200)) <= 1200


def test_an_image_smaller_than_the_crop_is_padded_at_the_right_and_the_bottom():
    image, labels = scene(20, 30)
    crops = SegmentationCrops(short_side=20, scale=(1, 1), crop_size=48, flip=0, distortion=None)
    crop, label_crop = crops(image, labels, rng())
    assert crop.shape == (3, 48, 48)
    assert (label_crop[:20, :30].numpy() == labels).all() and (crop[:, :20, :30] != 0).all()
    for part in (np.s_[20:], np.s_[:, 30:]):
        assert (label_crop[part] == IGNORED).all() and (crop[(slice(None), *np.atleast_1d(part))] == 0).all()


def test_a_crop_has_no_more_than_the_share_of_a_class_where_one_exists():
    labels = np.zeros((100, 100), np.int16)
    labels[:40] = 1
    image = COLORS[labels]
    options = {"short_side": 100, "scale": (1, 1), "crop_size": 32, "distortion": None}

    def shares(tries, seeds=200):
        crops = SegmentationCrops(crop_tries=tries, **options)
        return [torch.bincount(crops(image, labels, rng(s))[1].flatten()).max().item() / 32**2 for s in range(seeds)]

    bad = {tries: np.mean([share >= 0.75 for share in shares(tries)]) for tries in (0, 1, 10)}
    rows_of_1 = [min(max(40 - top, 0), 32) for top in range(69)]  # by the top of the crop
    good = np.mean([max(rows, 32 - rows) / 32 < 0.75 for rows in rows_of_1])
    for tries, measured in bad.items():
        assert measured == pytest.approx((1 - good) ** (tries + 1), abs=0.1)
    assert bad[10] < 0.15


def test_ignored_pixels_do_not_count_for_the_share():
    labels = np.full((64, 64), IGNORED, np.int16)
    labels[:4], labels[4:6] = 0, 1  # in most crops with both, more than 0.75 of the pixels are ignored
    crops = SegmentationCrops(short_side=64, scale=(1, 1), crop_size=32, distortion=None, crop_tries=200, flip=0)
    for seed in range(20):
        label_crop = crops(COLORS[labels.clip(0)], labels, rng(seed))[1]
        counts = torch.bincount(label_crop[label_crop >= 0])
        assert len(counts) == 2 and counts.max() < 0.75 * counts.sum()


@pytest.mark.parametrize(
    "crops", [SegmentationCrops(short_side=40, crop_size=32), DepthCrops(box=None, crop_size=(9, 9))]
)
def test_a_generator_decides_everything(crops):
    image, labels = scene(40, 50)
    values = labels if isinstance(crops, SegmentationCrops) else labels.astype(np.float32)
    first = crops(image, values, rng(1))
    torch.manual_seed(3)
    np.random.seed(3)
    again, other = crops(image, values, rng(1)), crops(image, values, rng(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert (image == scene(40, 50)[0]).all() and (labels == scene(40, 50)[1]).all()  # not changed in place


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SegmentationCrops(scale=(2, 1)), r"scale must be a range .*got \(2, 1\)"),
        (lambda: SegmentationCrops(crop_size=0), "crop_size must be at least 1 pixel, got 0"),
        (lambda: SegmentationCrops(crop_size=(4, 0)), "crop_size must be at least 1 pixel, got 0"),
        (lambda: SegmentationCrops(short_side=-1), "short_side must be at least 1 pixel"),
        (lambda: SegmentationCrops(flip=2), "flip must be from 0 to 1, got 2"),
        (lambda: SegmentationCrops(crop_tries=-1), "crop_tries"),
        (lambda: DepthCrops(bottom=(3, 3)), "either box or bottom"),
        (lambda: DepthCrops(rotation=-1), "rotation must be from 0 to 180"),
        (lambda: DepthColors(gamma=(0, 1)), "gamma must be a range of positive numbers"),
        (lambda: EvaluationInputs(size=(3, 3), short_side=3), "either size or short_side"),
        (lambda: EvaluationInputs(long_side=3), "long_side=3 needs a short_side"),
        (lambda: EvaluationInputs(scales=()), "scales must be positive"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("crops", [SegmentationCrops(), DepthCrops(box=None)])
def test_wrong_images(crops):
    with pytest.raises(ValueError, match=r"has \(4, 5\) pixels .* map \(5, 4\)"):
        crops(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.int16), rng())
    with pytest.raises(ValueError, match="must be RGB"):
        crops(Image.new("L", (5, 4)), np.zeros((4, 5), np.int16), rng())


# --- Training for depth ----------------------------------------------------------------------------------------------


def depth_scene(height=480, width=640):
    """An image whose red and green levels encode the depth, which is nowhere an average of two others."""
    image, labels = scene(height, width)
    depths = np.array([0, 1.5, 4.25, 9], np.float32)[labels]
    return image, depths


def test_depths_are_never_interpolated_and_stay_on_their_pixels():
    image, depths = depth_scene()
    index = {0.0: 0, 1.5: 1, 4.25: 2, 9.0: 3}
    for seed in range(6):
        crops = DepthCrops(
            colors=None, rotation=20, rotation_probability=1, resize=(300, 500), crop_size=(200, 300), **LEVELS
        )
        crop, depth_crop = crops(image, depths, rng(seed))
        assert crop.shape == (3, 200, 300) and depth_crop.shape == (1, 200, 300)
        assert crop.dtype == depth_crop.dtype == torch.float32
        assert set(depth_crop.unique().tolist()) <= set(index)
        labels = depth_crop[0].clone().apply_(index.get).long()
        labels[(crop == 0).all(0)] = -1  # black corners of the rotation
        assert agreement(crop, labels) > 0.97


def test_nyu_box_is_the_published_one():
    image = np.zeros((480, 640, 3), np.uint8)
    image[45:472, 43:608] = 200  # inside the white border
    depths = np.ones((480, 640), np.float32)
    crops = DepthCrops(rotation_probability=0, crop_size=(427, 565), colors=None, **LEVELS)
    crop, depth_crop = crops(image, depths, rng())
    assert (crop - 200).abs().max() < 1e-3 and depth_crop.shape == (1, 427, 565)
    with pytest.raises(ValueError, match="image of 240 x 320 pixels .* does not contain the crop: rows from 45"):
        NYU_CROPS(image[::2, ::2], depths[::2, ::2], rng())
    crop, depth_crop = NYU_CROPS(image, depths, rng())
    assert crop.shape == (3, 416, 544) and depth_crop.shape == (1, 416, 544)


def test_kitti_crop_is_at_the_bottom_center():
    height, width = 375, 1242
    image = np.zeros((height, width, 3), np.uint8)
    image[height - 352 :, 13 : 13 + 1216] = 100
    depths = image[..., 0] / np.float32(10)
    inputs = EvaluationInputs(bottom=(352, 1216), **LEVELS)
    [image_tensor], depth = inputs(image, depths)
    assert image_tensor.shape == (3, 352, 1216) and (image_tensor - 100).abs().max() < 1e-3 and (depth == 10).all()
    crop, depth_crop = KITTI_CROPS(image, depths, rng())
    assert crop.shape == (3, 352, 704) and depth_crop.shape == (1, 352, 704) and depth_crop.max() == 10


def test_rotation_brings_in_pixels_without_measurement():
    image, depths = np.full((40, 60, 3), 255, np.uint8), np.full((40, 60), 3, np.float32)
    crops = DepthCrops(box=None, rotation=45, rotation_probability=1, crop_size=(40, 60), colors=None, **LEVELS)
    crop, depth_crop = crops(image, depths, rng(4))
    assert set(depth_crop.unique().tolist()) == {0, 3}
    assert (crop[:, depth_crop[0] == 0].mean() < 40) and (depth_crop[0, 20, 30] == 3)
    still = DepthCrops(box=None, rotation_probability=0, crop_size=(40, 60), colors=None, **LEVELS)
    assert all((still(image, depths, rng(seed))[1] == 3).all() for seed in range(5))


def test_an_image_smaller_than_the_depth_crop_is_padded_without_measurement():
    crops = DepthCrops(box=None, rotation_probability=0, flip=0, crop_size=(8, 9), colors=None)
    crop, depth_crop = crops(np.full((5, 6, 3), 9, np.uint8), np.full((5, 6), 2, np.float32), rng())
    assert (depth_crop[0, :5, :6] == 2).all() and depth_crop.sum() == 60
    assert (crop[:, 5:] == 0).all() and (crop[:, :, 6:] == 0).all() and (crop[:, :5, :6] != 0).all()


# --- Testing ---------------------------------------------------------------------------------------------------------


def test_images_for_testing_are_resized_and_maps_are_not():
    image, labels = scene(60, 90)
    images, tensor = EvaluationInputs(short_side=30, scales=(1.0, 1.32, 3.0))(Image.fromarray(image), labels)
    assert [tuple(each.shape) for each in images] == [(3, 30, 45), (3, 39, 59), (3, 90, 135)]
    assert tensor.dtype == torch.int64 and (tensor.numpy() == labels).all()
    [exact], depth = EvaluationInputs(size=(48, 64))(image, labels.astype(np.float32))
    assert exact.shape == (3, 48, 64) and depth.shape == (1, 60, 90) and depth.dtype == torch.float32
    [same], _ = EvaluationInputs(**LEVELS)(image, labels)
    assert (same - torch.from_numpy(image).permute(2, 0, 1)).abs().max() < 1e-3
    [long], _ = EvaluationInputs(short_side=60, long_side=45)(image, labels)
    assert long.shape == (3, 30, 45)
