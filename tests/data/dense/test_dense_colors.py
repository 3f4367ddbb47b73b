"""Color changes of the dense trainings: the values of OpenCV-like pipelines, worked out pixel by pixel."""

import colorsys

import numpy as np
import pytest
import torch

from dinov2.data.dense import DepthColors, PhotometricDistortion
from dinov2.data.dense.color import scale_saturation


class Numbers:
    """A generator that gives the numbers of a test in turn, in place of random ones."""

    def __init__(self, chances, uniform, steps):
        self.chances, self.numbers, self.steps = np.array(chances, float), list(uniform), steps

    def random(self, count=None):
        return self.chances if count else self.chances[0]

    def uniform(self, low, high, size=None):
        value = self.numbers.pop(0)
        assert np.all((low <= np.array(value)) & (np.array(value) <= high))
        return value if size is None else np.array(value)

    def integers(self, low, high):
        assert low <= self.steps < high
        return self.steps


def colors(*triples):
    return torch.tensor(triples, dtype=torch.float32).T[:, None, :].contiguous()  # (3, 1, n)


PIXELS = [(10, 20, 30), (200, 100, 0), (255, 255, 255), (0, 0, 0), (7, 250, 128), (90, 90, 91)]
ON, OFF = 0.0, 0.9


def distorted(*chances, numbers=(0.0, 1.0, 1.0), steps=0, pixels=PIXELS):
    distortion = PhotometricDistortion()
    result = distortion(colors(*pixels), Numbers(chances, numbers, steps))
    return result[:, 0].T.tolist()


def test_nothing_is_changed_with_probability_one_half_each():
    assert distorted(OFF, OFF, OFF, OFF, OFF, numbers=(9.0, 1.5, 0.5), steps=9) == [list(map(float, p)) for p in PIXELS]


def test_brightness_and_contrast_are_clamped_and_rounded_down():
    assert distorted(ON, OFF, OFF, OFF, OFF, numbers=(-20.5, 1, 1))[:2] == [[0, 0, 9], [179, 79, 0]]
    assert distorted(OFF, ON, OFF, OFF, OFF, numbers=(0, 1.33, 1))[:2] == [[13, 26, 39], [255, 133, 0]]
    # Both, contrast after brightness: (10 + 5) * 1.5 = 22.5
    assert distorted(ON, ON, OFF, OFF, OFF, numbers=(5, 1.5, 1))[0] == [22, 37, 52]


@pytest.mark.parametrize("contrast_is_last", [OFF, ON])
def test_saturation_and_hue_are_those_of_hsv(contrast_is_last):
    contrast, saturation, steps = 0.8, 1.4, -11
    got = distorted(OFF, ON, ON, ON, contrast_is_last, numbers=(0, contrast, saturation), steps=steps)
    for pixel, result in zip(PIXELS, got, strict=True):
        levels = np.array(pixel, float)
        if contrast_is_last == OFF:
            levels = np.floor(levels * contrast)
        hue, sat, value = colorsys.rgb_to_hsv(*(levels / 255))
        levels = 255 * np.array(colorsys.hsv_to_rgb((hue + steps / 180) % 1, min(sat * saturation, 1), value))
        if contrast_is_last == ON:
            levels = np.floor(levels * contrast)
        assert np.abs(levels - result).max() <= 1.6, (pixel, levels, result)  # rounded after each operation


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 30.0])
def test_saturation_of_all_colors(factor):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3)).tolist() + [[5, 5, 5], [0, 0, 0]]
    result = scale_saturation(colors(*pixels), factor)[:, 0].T.numpy()
    for pixel, got in zip(pixels, result, strict=True):
        hue, sat, value = colorsys.rgb_to_hsv(*(np.array(pixel) / 255))
        assert 255 * np.array(colorsys.hsv_to_rgb(hue, min(sat * factor, 1), value)) == pytest.approx(got, abs=1e-2)


def test_the_distribution_of_the_distortion():
    gray = [
        np.ravel(PhotometricDistortion()(torch.full((3, 1, 1), 100.0), np.random.default_rng(s))) for s in range(2000)
    ]
    first = np.array(gray)[:, 0]
    assert (np.array(gray) == first[:, None]).all()  # gray stays gray
    assert np.mean(first == 100) == pytest.approx(0.25, abs=0.04)  # neither brightness nor contrast
    assert first.min() >= (100 - 32) * 0.5 - 1 and first.max() <= (100 + 32) * 1.5
    # Half of the hues unchanged, the others uniform over 36 steps of 2 degrees, one of which is 0.
    only_hue = PhotometricDistortion(brightness=0, contrast=(1, 1), saturation=(1, 1))
    red = np.array([200.0, 0, 0], np.float32)[:, None, None]
    moved = [only_hue(torch.tensor(red), np.random.default_rng(seed))[:, 0, 0].tolist() for seed in range(1000)]
    angles = np.array([round(360 * colorsys.rgb_to_hsv(*np.array(each) / 255)[0] + 180) % 360 - 180 for each in moved])
    assert angles.min() == -36 and angles.max() == 34 and np.mean(angles == 0) == pytest.approx(0.51, abs=0.05)


def test_distortion_of_integers_gives_integers_in_range():
    for seed in range(30):
        image = torch.randint(0, 256, (3, 9, 9), generator=torch.Generator().manual_seed(seed)).float()
        result = PhotometricDistortion()(image, np.random.default_rng(seed))
        assert (result == result.round()).all() and result.min() >= 0 and result.max() <= 255


@pytest.mark.parametrize(
    "options", [{"brightness": 256}, {"hue": 91}, {"contrast": (2, 1)}, {"saturation": (0, 1)}, {"hue": -1}]
)
def test_wrong_distortions(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PhotometricDistortion(**options)


def test_depth_colors():
    change = DepthColors()
    got = change(colors(*PIXELS), Numbers([0.4], (1.1, 0.8, [0.9, 1.0, 1.1]), 0))[:, 0].T.numpy()
    expected = [(255 * np.clip((np.array(p) / 255) ** 1.1 * 0.8 * np.array([0.9, 1, 1.1]), 0, 1)) for p in PIXELS]
    assert np.abs(got - np.array(expected)).max() < 1e-2
    assert torch.equal(change(colors(*PIXELS), Numbers([0.5], (1.1, 0.8, [0.9, 1.0, 1.1]), 0)), colors(*PIXELS))
    changed = [
        not torch.equal(change(colors((9, 9, 9)), np.random.default_rng(s)), colors((9, 9, 9))) for s in range(400)
    ]
    assert np.mean(changed) == pytest.approx(0.5, abs=0.08)
