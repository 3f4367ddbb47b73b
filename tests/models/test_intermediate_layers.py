"""get_intermediate_layers: every option, against the blocks run one by one."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.models.vision_transformer import DinoVisionTransformer

REGISTERS, DEPTH = 2, 5


@pytest.fixture(scope="module")
def model() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=8, patch_size=2, embed_dim=12, depth=DEPTH, num_heads=3, num_register_tokens=REGISTERS
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def block_outputs(model: DinoVisionTransformer, x: Tensor) -> list[Tensor]:
    """All tokens after each block."""
    tokens = model.prepare_tokens_with_masks(x)
    return [tokens := block(tokens) for block in model.blocks]


BLOCKS = [(1, [4]), (3, [2, 3, 4]), (5, [0, 1, 2, 3, 4]), ([0, 3], [0, 3]), ([3, 0], [0, 3]), ([-1, 1], [1, 4])]


@pytest.mark.parametrize(("n", "indices"), BLOCKS)
@pytest.mark.parametrize(
    ("reshape", "return_class_token", "norm"), list(itertools.product([False, True], [False, True], [True, False]))
)
def test_every_option(
    model: DinoVisionTransformer,
    x: Tensor,
    n: int | Sequence[int],
    indices: list[int],
    reshape: bool,
    return_class_token: bool,
    norm: bool,
) -> None:
    layers = model.get_intermediate_layers(x, n, reshape=reshape, return_class_token=return_class_token, norm=norm)
    assert isinstance(layers, tuple) and len(layers) == len(indices)
    outputs = block_outputs(model, x)
    for layer, index in zip(layers, indices, strict=True):
        expected = model.norm(outputs[index]) if norm else outputs[index]
        patches = layer[0] if return_class_token else layer
        if return_class_token:
            torch.testing.assert_close(layer[1], expected[:, 0])
        if reshape:
            assert patches.shape == (2, 12, 4, 6) and patches.is_contiguous()
            torch.testing.assert_close(patches[1, :, 2, 3], expected[1, 1 + REGISTERS + 2 * 6 + 3])
            patches = patches.flatten(2).transpose(1, 2)
        torch.testing.assert_close(patches, expected[:, 1 + REGISTERS :])


def test_the_last_layer_is_what_forward_features_gives(model: DinoVisionTransformer, x: Tensor) -> None:
    ((patches, class_token),) = model.get_intermediate_layers(x, return_class_token=True)
    features = model.forward_features(x)
    assert torch.equal(patches, features["x_norm_patchtokens"])
    assert torch.equal(class_token, features["x_norm_clstoken"])


@pytest.mark.parametrize("n", [0, -1, 6, [5], [-6], [], [0, 9]])
def test_blocks_that_do_not_exist_are_named(model: DinoVisionTransformer, x: Tensor, n: int | Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks .* requested of a model with 5 blocks"):
        model.get_intermediate_layers(x, n)


@pytest.mark.parametrize(
    ("n", "indices"),
    [
        (np.int64(2), [3, 4]),
        (np.uint8(2), [3, 4]),
        (np.array(2), [3, 4]),
        (torch.tensor(2), [3, 4]),
        (range(1, 4), [1, 2, 3]),
        (np.array([0, 3]), [0, 3]),
        (torch.tensor([-1, 1]), [1, 4]),
        ({0, 2}, [0, 2]),
        ((np.int32(0), torch.tensor(4)), [0, 4]),
    ],
    ids=repr,
)
def test_integers_of_any_library_are_taken(model: DinoVisionTransformer, x: Tensor, n: Any, indices: list[int]) -> None:
    layers = model.get_intermediate_layers(x, n)
    for layer, expected in zip(layers, model.get_intermediate_layers(x, indices), strict=True):
        assert torch.equal(layer, expected)


@pytest.mark.parametrize("n", [1.0, "2", [1.5], ["1"], None, np.array(1.0), torch.tensor([0.5])], ids=repr)
def test_what_is_no_integer_is_refused(model: DinoVisionTransformer, x: Tensor, n: Any) -> None:
    with pytest.raises(ValueError, match="n must be a number of last blocks, or a list of block indices, not "):
        model.get_intermediate_layers(x, n)


@pytest.mark.parametrize("n", [[1, 1], [-1, 4]])
def test_a_block_named_twice_is_refused(model: DinoVisionTransformer, x: Tensor, n: list[int]) -> None:
    with pytest.raises(ValueError, match="of a model with 5 blocks include one twice"):
        model.get_intermediate_layers(x, n)


def test_blocks_that_were_taken_off_do_not_count(model: DinoVisionTransformer, x: Tensor) -> None:
    """As scripts do that want features of a middle block only."""
    middle = model.get_intermediate_layers(x, n=[1])
    model.blocks = model.blocks[:2]
    (last,) = model.get_intermediate_layers(x, n=1)
    assert torch.equal(last, middle[0])
