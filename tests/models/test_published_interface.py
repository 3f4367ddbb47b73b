"""What code written for the published models does with them: hooks, attention maps, features, positions."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.hub import backbones
from dinov2.models.vision_transformer import DinoVisionTransformer

NAMES = ["dinov2_vits14", "dinov2_vits14_reg"]
HEIGHT, WIDTH = 42, 70


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = getattr(backbones, request.param)(pretrained=False, depth=3, img_size=56)
    return model.eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def test_attributes(model: DinoVisionTransformer) -> None:
    assert (model.embed_dim, model.num_features, model.num_heads, model.n_blocks) == (384, 384, 6, 3)
    assert (model.patch_size, model.patch_embed.patch_size, model.patch_embed.img_size) == (14, (14, 14), (56, 56))
    assert model.num_tokens == 1 and model.chunked_blocks is False and isinstance(model.head, nn.Identity)
    assert len(model.blocks) == 3
    block: Any = model.blocks[-1]
    assert block.attn.qkv.weight.shape == (3 * 384, 384) and block.attn.proj.weight.shape == (384, 384)
    assert block.attn.num_heads == 6 and block.attn.scale == 64**-0.5
    assert model.cls_token.shape == (1, 1, 384) and model.pos_embed.shape == (1, 17, 384)
    assert (model.register_tokens is None) == (model.num_register_tokens == 0)


def test_features(model: DinoVisionTransformer, x: Tensor) -> None:
    features: Any = model.forward_features(x)
    registers = model.num_register_tokens
    assert {name: value.shape if isinstance(value, Tensor) else value for name, value in features.items()} == {
        "x_norm_clstoken": (2, 384),
        "x_norm_regtokens": (2, registers, 384),
        "x_norm_patchtokens": (2, 15, 384),
        "x_prenorm": (2, 1 + registers + 15, 384),
        "masks": None,
    }
    assert torch.equal(model(x), features["x_norm_clstoken"])
    assert torch.equal(model(x, is_training=True)["x_norm_patchtokens"], features["x_norm_patchtokens"])
    ((patches, class_token),) = model.get_intermediate_layers(x, n=1, reshape=True, return_class_token=True)
    assert patches.shape == (2, 384, 3, 5)
    assert torch.equal(patches.flatten(2).transpose(1, 2), features["x_norm_patchtokens"])
    assert torch.equal(class_token, features["x_norm_clstoken"])


@pytest.mark.parametrize("call", ["forward", "forward_features", "get_intermediate_layers"])
def test_hooks_see_whole_sequences_once(model: DinoVisionTransformer, x: Tensor, call: str) -> None:
    """Queries, keys and values of every token, (B, N, 3D), and (B, N, D) elsewhere."""
    block: Any = model.blocks[-1]
    seen: dict[str, list[torch.Size]] = {}
    for name, module in (("qkv", block.attn.qkv), ("proj", block.attn.proj), ("attn", block.attn), ("block", block)):
        shapes = seen.setdefault(name, [])
        module.register_forward_hook(lambda module, inputs, output, shapes=shapes: shapes.append(output.shape))
    getattr(model, call)(x)
    num_tokens = 1 + model.num_register_tokens + 15
    whole = (2, num_tokens, 384)
    assert seen == {"qkv": [(2, num_tokens, 3 * 384)], "proj": [whole], "attn": [whole], "block": [whole]}


def test_attention_maps_from_a_hook_explain_the_output(model: DinoVisionTransformer, x: Tensor) -> None:
    """Rows of qkv are queries, keys, values, each by heads: attention computed from them is that of the layer."""
    attention: Any = model.blocks[-1].attn
    seen: dict[str, Tensor] = {}
    attention.qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output))
    attention.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    model(x)
    batch, num_tokens, _ = seen["qkv"].shape
    q, k, v = seen["qkv"].reshape(batch, num_tokens, 3, 6, 64).permute(2, 0, 3, 1, 4)
    maps = (q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    output = attention.proj((maps @ v).transpose(1, 2).reshape(batch, num_tokens, 384))
    torch.testing.assert_close(output, seen["output"], rtol=1e-5, atol=1e-6)


def test_the_forward_of_attention_can_be_replaced(model: DinoVisionTransformer, x: Tensor) -> None:
    """As code that wants attention maps does; the layer is called with the tokens alone."""
    expected, maps = model(x), []

    def forward(self: Any, x: Tensor) -> Tensor:
        batch, num_tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        maps.append(attention)
        return self.proj_drop(self.proj((attention @ v).transpose(1, 2).reshape(batch, num_tokens, width)))

    attention: Any = model.blocks[-1].attn
    attention.forward = types.MethodType(forward, attention)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    num_tokens = 1 + model.num_register_tokens + 15
    assert [map.shape for map in maps] == [(2, 6, num_tokens, num_tokens)]


def test_tokens_can_be_prepared_and_sent_through_the_blocks_one_by_one(model: DinoVisionTransformer, x: Tensor) -> None:
    tokens = model.prepare_tokens_with_masks(x)
    for block in model.blocks:
        tokens = block(tokens)
    assert torch.equal(model.norm(tokens)[:, 0], model(x))
    masks = torch.zeros(2, 15, dtype=torch.bool)
    assert torch.equal(model.prepare_tokens_with_masks(x, masks), model.prepare_tokens_with_masks(x))


def test_positions_have_the_published_signature(model: DinoVisionTransformer, x: Tensor) -> None:
    """(tokens, height, width): a table in the dtype of the tokens."""
    positions = model.interpolate_pos_encoding(torch.zeros(2, 16, 384, dtype=torch.float16), HEIGHT, WIDTH)
    assert positions.shape == (1, 16, 384) and positions.dtype == torch.float16


def test_positions_can_be_replaced(model: DinoVisionTransformer, x: Tensor) -> None:
    """As code for other strides does, with the published order of arguments."""
    seen: list[tuple[torch.Size, int, int]] = []

    def interpolate_pos_encoding(self: Any, x: Tensor, w: int, h: int) -> Tensor:
        seen.append((x.shape, w, h))
        return torch.zeros(1, x.shape[1], x.shape[2])

    model.interpolate_pos_encoding = types.MethodType(interpolate_pos_encoding, model)  # type: ignore[method-assign]
    tokens = model.prepare_tokens_with_masks(x)
    assert seen == [((2, 16, 384), HEIGHT, WIDTH)]
    assert torch.equal(tokens[:, -15:], model.patch_embed(x))


def test_import_paths() -> None:
    from dinov2.hub.backbones import Weights, dinov2_vitb14_reg  # noqa: F401
    from dinov2.layers import MemEffAttention, Mlp, PatchEmbed, SwiGLUFFNFused  # noqa: F401
    from dinov2.layers import NestedTensorBlock as Block
    from dinov2.models.vision_transformer import vit_base, vit_giant2, vit_large, vit_small  # noqa: F401

    assert Weights.LVD142M.value == "LVD142M"
    assert isinstance(vit_small(patch_size=14, depth=1).blocks[0], Block)
