"""What code written for the published models does with them: hooks, attention maps, features, positions."""

import copy
import types
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov2.hub import backbones
from dinov2.layers import Block, MemEffAttention
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


def resampled(model: DinoVisionTransformer, side: int) -> Tensor:
    """The position table for another square grid, as fine-tuning scripts make it."""
    grid = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic")
    return torch.cat([model.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize("side", [3, 5, 16])
@pytest.mark.parametrize("how", ["data", "parameter"])
def test_a_table_of_positions_can_be_put_in_place(model: DinoVisionTransformer, x: Tensor, how: str, side: int) -> None:
    """Its grid is then that of the table, at its own size and at others, as in a model built for that size."""
    table = resampled(model, side)
    built = copy.deepcopy(model)
    built.patch_embed.patches_resolution = (side, side)
    built.pos_embed = nn.Parameter(table, requires_grad=False)
    if how == "data":
        model.pos_embed.data = table
    else:
        model.pos_embed = nn.Parameter(table)
    size = 14 * side
    assert torch.equal(model.interpolate_pos_encoding(torch.zeros(1, 1 + side * side, 384), size, size), table)
    assert torch.equal(model(x), built(x))
    for height, width in ((size, size), (HEIGHT, WIDTH)):
        images = torch.zeros(1, 3, height, width)
        patches = height * width // 14**2
        assert model.forward_features(images)["x_norm_patchtokens"].shape == (1, patches, 384)
        assert model.get_intermediate_layers(images)[0].shape == (1, patches, 384)
        assert model([images, x], is_training=True)[0]["x_norm_patchtokens"].shape == (1, patches, 384)


@pytest.mark.parametrize("shape", [(1, 1 + 15, 384), (1, 16, 384), (1, 17, 380), (17, 384), (1, 0, 384)])
def test_a_table_that_is_of_no_square_grid_is_refused(
    model: DinoVisionTransformer, x: Tensor, shape: tuple[int, ...]
) -> None:
    model.pos_embed = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"pos_embed \({shape[0]}, .* is not a position table of a square grid"):
        model(x)


def test_a_model_for_images_that_are_not_square_keeps_its_grid() -> None:
    model = DinoVisionTransformer(img_size=(28, 112), patch_size=14, embed_dim=12, depth=1, num_heads=3)
    assert model.position_grid == (2, 8), "16 patches are no 4 x 4"
    tokens = torch.zeros(1, 17, 12)
    assert torch.equal(model.interpolate_pos_encoding(tokens, 28, 112), model.pos_embed)
    model.pos_embed.data = torch.randn(1, 26, 12)
    assert model.position_grid == (5, 5)


def test_networks_are_built_from_parts_of_others() -> None:
    class Stem(nn.Module):
        num_patches = 16

        def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
            super().__init__()
            self.proj = nn.Linear(in_chans * patch_size**2, embed_dim)
            self.patch_size = patch_size

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(nn.functional.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2))

    class Halved(Block):
        def forward(self, x: Any, *args: Any) -> Any:
            return super().forward(x, *args) / 2

    model = DinoVisionTransformer(
        56,
        14,
        3,
        12,
        2,
        3,
        4.0,
        True,
        True,
        True,
        0.0,
        False,
        None,
        Stem,
        nn.ReLU,
        partial(Halved, attn_class=MemEffAttention),
    )
    assert [type(block) for block in model.blocks] == [Halved, Halved]
    assert isinstance(model.blocks[0].mlp.act, nn.ReLU)
    assert model(torch.randn(2, 3, 28, 70)).shape == (2, 12)
    with pytest.raises(ValueError, match="the gate of SwiGLU is a SiLU"):
        DinoVisionTransformer(embed_dim=12, depth=1, num_heads=3, act_layer=nn.ReLU, ffn_layer="swiglu")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 15), "masks must be a bool tensor, True for masked patches, not torch.float32"),
        (torch.zeros(2, 15, dtype=torch.uint8), "masks must be a bool tensor, .* not torch.uint8"),
        (np.zeros((2, 15), dtype=bool), "masks must be a bool tensor, .* not ndarray"),
        (torch.zeros(2, 3, 5, dtype=torch.bool), r"masks \(2, 3, 5\) are not of 2 images of 15 patches"),
        (torch.zeros(2, 1, dtype=torch.bool), r"masks \(2, 1\) are not of 2 images of 15 patches"),
        (torch.zeros(3, 15, dtype=torch.bool), r"masks \(3, 15\) are not of 2 images of 15 patches"),
    ],
)
def test_masks_of_something_else_are_refused(model: DinoVisionTransformer, x: Tensor, masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.forward_features(x, masks)


@pytest.mark.parametrize(
    "call", ["forward", "forward_features", "get_intermediate_layers", "prepare_tokens_with_masks"]
)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 42, 70), r"\(3, 42, 70\); one image needs a batch dimension"),
        (torch.zeros(2, 4, 42, 70), "have 4 channels, but this model takes 3"),
        (torch.zeros(2, 3, 42, 70, dtype=torch.uint8), "floating-point numbers after normalization"),
        (torch.zeros(2, 3, 42, 71), "input image width 71 is not a multiple of patch width 14"),
        (np.zeros((2, 3, 42, 70)), "not ndarray"),
    ],
)
def test_images_of_something_else_are_refused(
    model: DinoVisionTransformer, images: Any, message: str, call: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(images)


def test_a_list_of_batches_has_features_only(model: DinoVisionTransformer, x: Tensor) -> None:
    with pytest.raises(ValueError, match="for a list of batches use is_training=True"):
        model([x, x])
    with pytest.raises(ValueError, match="patches can be selected only for a list of batches"):
        model(x, is_training=True, patches=[torch.tensor([0])])
    with pytest.raises(ValueError, match="0 batches of images"):
        model([], is_training=True)


@pytest.mark.filterwarnings("default")  # the compiler causes some of its own
def test_the_compiler_finds_one_program(model: DinoVisionTransformer, x: Tensor) -> None:
    """Also where the numbers of rows and columns are free, and for features of several blocks."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    layers = torch.compile(
        lambda x: model.get_intermediate_layers(x, [0, 2], reshape=True), backend="eager", fullgraph=True
    )
    for images in (x, x[:1], x[:, :, :28]):
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    for ours, expected in zip(layers(x), model.get_intermediate_layers(x, [0, 2], reshape=True), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    maps = list[torch.Size]()
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output.shape))
    torch.compile(lambda x: model(x), backend="eager", fullgraph=True)(x)
    assert [shape[:2] for shape in maps] == [(2, 6)], "a hook that is there when compiling is called"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_compiler_finds_one_program_in_training_too(
    rate: float, x: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    """With stochastic depth, for a batch and for a list; it draws what eager mode draws."""
    torch.compiler.reset()
    model = backbones.dinov2_vits14(pretrained=False, depth=3, img_size=56, drop_path_rate=rate).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for images in (x, [x, x[:1, :, :28, :28]]):
        masks: Any = [None, None] if isinstance(images, list) else None
        outputs = []
        for function in (compiled, model):
            torch.manual_seed(0)
            outputs.append(function(images, masks=masks, is_training=True))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_image_features_by_vmap(model: DinoVisionTransformer, x: Tensor) -> None:
    weights = dict(model.named_parameters())
    each = torch.func.vmap(lambda image: torch.func.functional_call(model, weights, (image[None],))[0])(x)
    torch.testing.assert_close(each, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_fine_tuning_on_one_image_under_autocast(dtype: torch.dtype, rate: float) -> None:
    model = DinoVisionTransformer(
        img_size=28, patch_size=14, embed_dim=12, depth=2, num_heads=3, drop_path_rate=rate, init_values=1.0
    ).train()
    with torch.autocast("cpu", dtype):
        model(torch.randn(1, 3, 28, 42)).float().square().sum().backward()
    gradient = model.blocks[0].attn.qkv.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_import_paths() -> None:
    from dinov2.hub.backbones import Weights, dinov2_vitb14_reg  # noqa: F401
    from dinov2.layers import MemEffAttention, Mlp, PatchEmbed, SwiGLUFFNFused  # noqa: F401
    from dinov2.layers import NestedTensorBlock as Block
    from dinov2.models.vision_transformer import vit_base, vit_giant2, vit_large, vit_small  # noqa: F401

    assert Weights.LVD142M.value == "LVD142M"
    assert isinstance(vit_small(patch_size=14, depth=1).blocks[0], Block)
