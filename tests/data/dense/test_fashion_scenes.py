"""FashionScenes: maps that agree with the image, with the order of the items, and with the label of the scene."""

import numpy as np
import pytest

from dinov2.data.datasets import make_dataset
from dinov2.data.dense import check_maps
from dinov2.data.dense.fashion_scenes import BACKGROUND_DEPTH, FashionScenes, _with_silhouettes

TRAIN, VAL = FashionScenes.Split


@pytest.fixture(scope="module")
def scenes():
    return FashionScenes(split=TRAIN, length=300)


def test_a_scene(scenes):
    image, labels = scenes.get_sample(3)
    assert (image.mode, image.size, labels.shape, labels.dtype) == ("RGB", (28, 28), (28, 28), np.int16)
    assert scenes.num_classes == 11 and scenes.classes[0] == "background" and scenes.palette.shape == (11, 3)
    depths = FashionScenes(split=TRAIN, length=4, kind="depth").get_map(3)
    assert depths.dtype == np.float32 and ((depths == BACKGROUND_DEPTH) == (labels == 0)).all()
    assert (np.asarray(scenes[3][0]) == np.asarray(image)).all() and scenes[3][1] == scenes.get_targets()[3]


def test_the_label_is_the_class_of_the_nearest_item_which_covers_the_others(scenes):
    numbers = []
    for index in range(len(scenes)):
        _, labels, depths = scenes.get_scene(index)
        planes = np.unique(depths)
        assert planes[-1] == BACKGROUND_DEPTH and (planes[:-1] >= 1).all() and (planes[:-1] <= 2.5 + 1e-6).all()
        numbers.append(int(scenes._num_items[index]))
        assert len(planes) <= numbers[-1] + 1
        for plane in planes[:-1]:
            assert len(np.unique(labels[depths == plane])) == 1  # an item has one depth and one class
        assert (labels[depths == planes[0]] == scenes.get_target(index)).all()
        if numbers[-1] == 1:
            assert planes[0] <= 1 / 0.75 + 1e-6
        else:
            assert planes[0] >= 1 / 0.65 - 1e-6
    assert [numbers.count(n) for n in (1, 2, 3)] == pytest.approx([100] * 3, abs=35)
    assert set(scenes.get_targets().tolist()) == set(range(1, 11))


def test_an_item_is_as_large_as_its_depth_says():
    size = 112
    scenes = FashionScenes(split=TRAIN, size=size, length=200)
    single = [index for index in range(200) if scenes._num_items[index] == 1]
    for index in single:
        _, labels, depths = scenes.get_scene(index)
        photo = scenes._items.photo[index, 0]
        expected = (scenes._layers[photo, ..., 1] > 0).mean() * (size / depths.min()) ** 2
        assert (labels > 0).sum() == pytest.approx(expected, rel=0.08, abs=60)


def test_a_scene_depends_on_seed_split_and_index_alone(scenes):
    again = FashionScenes(split=TRAIN, length=20)
    assert all((a == b).all() for i in range(20) for a, b in zip(again.get_scene(i), scenes.get_scene(i), strict=True))
    assert again.get_targets().tolist() == scenes.get_targets()[:20].tolist()
    for other in (FashionScenes(split=TRAIN, length=20, seed=1), FashionScenes(split=VAL, length=20)):
        assert any((other.get_scene(i)[0] != scenes.get_scene(i)[0]).any() for i in range(3))
        assert other.fingerprint() != again.fingerprint()
    small, large = again.get_scene(5)[1], FashionScenes(split=TRAIN, length=20, size=84).get_scene(5)[1]
    assert (large[1::3, 1::3] == small).mean() > 0.97  # another resolution of the same scene


def test_scenes_of_one_item_have_its_class_as_their_only_one():
    scenes = FashionScenes(split=TRAIN, length=60, items="1")
    for index in range(60):
        _, labels, depths = scenes.get_scene(index)
        assert set(np.unique(labels)) == {0, scenes.get_target(index)} and depths.min() <= 1 / 0.75 + 1e-6
    several = FashionScenes(split=TRAIN, length=60, items=2)
    assert set(several._num_items) == {1, 2}
    assert len({each.fingerprint() for each in (scenes, several, FashionScenes(split=TRAIN, length=60))}) == 3


def test_train_and_val_have_different_photos():
    train, val = (FashionScenes(split=split, length=1)._layers[..., 0] for split in (TRAIN, VAL))
    assert (len(train), len(val)) == (10_000, 2_000)
    assert not {photo.tobytes() for photo in train} & {photo.tobytes() for photo in val}


def test_silhouettes_have_no_holes_but_gaps():
    photo = np.zeros((1, 28, 28), np.uint8)
    photo[0, 5:20, 8:20] = 200
    photo[0, 10:12, 12:14] = 0  # a dark spot inside
    photo[0, 14:20, 13:15] = 0  # between two legs
    opacity = _with_silhouettes(photo)[0, ..., 1]
    expected = np.zeros((28, 28), np.uint8)
    expected[5:20, 8:20] = 255
    expected[14:20, 13:15] = 0
    assert (opacity == expected).all()


@pytest.mark.parametrize("background", ["plain", "black", "gradient"])
def test_backgrounds(background):
    scenes = FashionScenes(split=VAL, background=background, length=30)
    for index in range(30):
        pixels, labels, _ = scenes.get_scene(index)
        colors = np.unique(pixels[labels == 0], axis=0)
        assert len(colors) == 1 or background == "gradient"
        assert background != "black" or (colors == 0).all()


def test_noise_has_its_standard_deviation_and_is_that_of_the_scene_alone():
    clean, noisy = (
        FashionScenes(split=VAL, size=56, background="plain", noise=noise, length=20) for noise in (0, "0.1")
    )
    levels = [np.stack([each.get_scene(index)[0] for index in range(20)]).astype(float) for each in (clean, noisy)]
    far_from_the_ends = abs(levels[0] - 127.5) < 60
    difference = (levels[1] - levels[0])[far_from_the_ends]
    assert difference.std() == pytest.approx(25.5, rel=0.02) and abs(difference.mean()) < 0.3
    for index in (0, 7):
        assert all((a == b).all() for a, b in zip(clean.get_scene(index)[1:], noisy.get_scene(index)[1:], strict=True))
    again = FashionScenes(split=VAL, size=56, background="plain", noise=0.1, length=8)
    assert (again.get_scene(7)[0] == noisy.get_scene(7)[0]).all()
    noises = [(levels[1] - levels[0])[index] for index in (0, 7)]
    assert not np.allclose(*noises, atol=60) and noisy.fingerprint() != clean.fingerprint()


def test_a_dataset_string_names_scenes():
    dataset = make_dataset(dataset_str="FashionScenes:split=VAL:size=32:length=7:kind=depth:seed=5:background=black")
    assert (len(dataset), dataset.kind, dataset.get_sample(6)[1].shape) == (7, "depth", (32, 32))
    assert check_maps(dataset).depth_range[1] == BACKGROUND_DEPTH
    assert len(make_dataset(dataset_str="FashionScenes:split=TRAIN")) == 10_000


@pytest.mark.parametrize(
    "key, message",
    [
        ("size=7", "size must be an integer of at least 8, got '7'"),
        ("length=x", "length must be an integer of at least 1, got 'x'"),
        ("kind=boxes", "kind must be segmentation or depth, got 'boxes'"),
        ("background=red", "background must be gradient, plain, black, got 'red'"),
        ("seed=-1", "seed must be"),
        ("noise=2", "noise must be a number from 0 to 1, got '2'"),
        ("noise=nan", "noise must be a number from 0 to 1, got 'nan'"),
        ("noise=much", "noise must be a number from 0 to 1, got 'much'"),
        ("items=4", "items must be an integer from 1 to 3, got '4'"),
    ],
)
def test_wrong_keys(key, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=f"FashionScenes:split=VAL:{key}")
