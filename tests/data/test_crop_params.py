"""Draws have the distributions of torchvision's random transforms."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dinov2.data.crop_params import HUE, NEUTRAL_FACTORS, CropParamSampler

DRAWS = 3000
SETTINGS = {
    "scale": [(0.05, 0.32)],
    "aspect_ratio": (3 / 4, 4 / 3),
    "flip": 0.5,
    "color_jitter": (0.4, 1.5, 0.0, 0.1),
    "jitter": 0.8,
    "gray": 0.2,
    "blur": [0.5],
    "blur_sigma": (0.1, 2.0),
    "solarize": [0.0],
}


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples, in standard errors."""
    values = np.concatenate([ours, theirs])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (ours, theirs)]
    return float(np.abs(shares[0] - shares[1]).max() / np.sqrt(1 / len(ours) + 1 / len(theirs)))


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("width, height", [(60, 40), (30, 90), (300, 7), (2, 3), (1, 1)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int, scale: tuple[float, float]) -> None:
    sampler = CropParamSampler(**(SETTINGS | {"scale": [scale]}))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    ours = np.array([sampler.draw(width, height, rng).boxes[0] for _ in range(DRAWS)])
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    crop = transforms.RandomResizedCrop
    theirs = np.array([crop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(DRAWS)])
    for column, name in enumerate(("top", "left", "height", "width")):
        assert distance(ours[:, column], theirs[:, column]) < 2.3, name  # 1 in 10^4 by chance


def test_jitter_is_distributed_as_torchvisions() -> None:
    sampler = CropParamSampler(**(SETTINGS | {"jitter": 1.0}))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    drawn = [sampler.draw(10, 10, rng) for _ in range(DRAWS)]
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 1.5, 0.0, 0.1)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(DRAWS)
    ]
    for operation in (0, 1, HUE):
        values = np.array([views.factors[0, operation] for views in drawn])
        assert distance(values, np.array([params[1 + operation] for params in theirs], float)) < 2.3
    assert {views.factors[0, 2] for views in drawn} == {1.0}  # strength 0 changes nothing
    orders = {tuple(views.order[0].tolist()) for views in drawn}
    assert len(orders) == 24
    first = np.bincount([views.order[0, 0] for views in drawn], minlength=4) / DRAWS
    assert np.abs(first - 0.25).max() < 4 * (0.25 * 0.75 / DRAWS) ** 0.5


def test_what_does_not_happen_is_neutral() -> None:
    nothing = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": [0.0]}
    views = CropParamSampler(**(SETTINGS | nothing)).draw(10, 10, np.random.default_rng(0))  # type: ignore[arg-type]
    (view,) = views.rows()
    assert tuple(view.factors) == NEUTRAL_FACTORS
    assert (view.flip, view.gray, view.sigma, view.solarize) == (False, False, 0.0, False)


def test_blur_is_uniform_in_its_range() -> None:
    rng = np.random.default_rng(0)
    sampler = CropParamSampler(**SETTINGS)  # type: ignore[arg-type]
    sigma = np.array([sampler.draw(10, 10, rng).sigma[0] for _ in range(DRAWS)])
    drawn = sigma[sigma > 0]
    assert abs(len(drawn) / DRAWS - 0.5) < 4 * 0.5 / DRAWS**0.5
    assert distance(drawn, np.linspace(0.1, 2.0, 5000)) < 2.3
