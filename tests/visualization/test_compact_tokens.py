"""Compact tokens: cosines of all pairs are kept, in the bytes that are given."""

import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dinov2.data import make_dataset
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ToNormalizedTensor
from dinov2.models import build_model
from dinov2.visualization.compact_tokens import compact_tokens, cosines
from dinov2.visualization.feature_maps import patch_tokens

PERMITTED = 0.03


def random_tokens(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 3 + 0.5


def real_tokens() -> Tensor:
    """Of embedded images, by an untrained network with weights as large as those of trained ones."""
    torch.manual_seed(0)
    model = build_model("vit_small", img_size=56, patch_size=7, embed_dim=96, depth=3, num_heads=3, init_std=0.3).eval()
    dataset = make_dataset(dataset_str="FashionScenes:split=VAL:size=56:length=12")
    to_tensor = ToNormalizedTensor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    images = torch.stack([to_tensor(dataset.get_image(index)) for index in range(12)])
    return patch_tokens(model, images).flatten(0, 2)


@pytest.mark.parametrize(
    "make_tokens",
    [partial(random_tokens, 900, 384), partial(random_tokens, 50, 8), real_tokens],
    ids=["wide", "narrow", "real"],
)
def test_no_cosine_is_off_by_more_than_permitted(make_tokens: Callable[[], Tensor]) -> None:
    tokens = make_tokens()
    compact = compact_tokens(tokens, max_bytes=10**6)
    unit = functional.normalize(tokens.double(), dim=-1)
    exact = unit @ unit.T
    found = cosines(torch.from_numpy(compact.levels), torch.arange(len(tokens))).double()
    assert (found - exact).abs().max() < PERMITTED
    assert compact.largest_error == pytest.approx(float((found - exact).abs().max()), rel=0.3)
    assert 0 < compact.typical_error < compact.largest_error / 2
    assert exact.std() > 0.01, "there is something to measure"


def test_the_bytes_are_the_levels_and_as_few_as_asked_for() -> None:
    tokens = random_tokens(2000, 64) * torch.arange(1, 65) ** -2.0
    generous, sparse = (compact_tokens(tokens, max_bytes=size) for size in (10**6, 8_000))
    for compact in (generous, sparse):
        unpacked = np.frombuffer(zlib.decompress(compact.packed), np.int8)
        assert np.array_equal(unpacked.reshape(-1, 2000), compact.levels)
    assert len(sparse.packed) <= 8_000 < len(generous.packed)
    assert generous.levels.max() == 127 or generous.levels.min() == -127
    assert generous.largest_error < sparse.largest_error < 0.3 and len(sparse.levels) < 64


def test_too_few_bytes_are_an_error_and_equal_tokens_are_not() -> None:
    with pytest.raises(ValueError, match="100 tokens do not fit in 20 bytes"):
        compact_tokens(random_tokens(100, 16), max_bytes=20)
    compact = compact_tokens(torch.ones(100, 16), max_bytes=10**4)
    assert compact.levels.shape == (1, 100) and compact.largest_error < 1e-5
