"""The vision transformer: published sizes and names, initial weights, tokens, and every way to call it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.models import build_model
from dinov2.models.key_mapping import chunk_block_names
from dinov2.models.vision_transformer import DinoVisionTransformer


def small_vit(**kwargs: object) -> DinoVisionTransformer:
    """Width 12, two blocks, patches of 2 pixels, 4 x 4 of them; generic tokens and positions."""
    torch.manual_seed(0)
    settings = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3, "init_values": 1.0}
    model = DinoVisionTransformer(**{**settings, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_same_features(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)


# --- Sizes and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "options", "parameters", "tensors"),
    [
        ("vit_small", {}, 22_056_576, 175),
        ("vit_base", {}, 86_580_480, 175),
        ("vit_large", {}, 304_368_640, 343),
        ("vit_large", {"ffn_layer": "swiglufused"}, 304_794_880, 343),
        ("vit_giant2", {"ffn_layer": "swiglufused"}, 1_136_480_768, 567),
        ("vit_small", {"num_register_tokens": 4}, 22_056_576 + 1_536, 176),
        ("vit_base", {"num_register_tokens": 4}, 86_580_480 + 3_072, 176),
        ("vit_large", {"num_register_tokens": 4}, 304_368_640 + 4_096, 344),
        ("vit_giant2", {"ffn_layer": "swiglufused", "num_register_tokens": 4}, 1_136_480_768 + 6_144, 568),
        ("vit_large", {"img_size": 224, "patch_size": 16}, 303_351_808, 343),
    ],
)
def test_published_sizes(arch: str, options: dict[str, object], parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = build_model(arch, **{"img_size": 518, "patch_size": 14, "init_values": 1.0, **options})
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    ("arch", "depth", "width", "heads"),
    [("vit_small", 12, 384, 6), ("vit_base", 12, 768, 12), ("vit_large", 24, 1024, 16), ("vit_giant2", 40, 1536, 24)],
)
def test_published_attributes(arch: str, depth: int, width: int, heads: int) -> None:
    with torch.device("meta"):
        model = build_model(arch)
    assert (model.n_blocks, len(model.blocks)) == (depth, depth)
    assert model.embed_dim == model.num_features == width
    assert (model.num_heads, model.patch_size, model.num_tokens, model.num_register_tokens) == (heads, 16, 1, 0)
    assert tuple(model.pos_embed.shape) == (1, 197, width)
    assert model.register_tokens is None
    assert isinstance(model.head, nn.Identity)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * depth + 1 and {norm.eps for norm in norms} == {1e-6}


TOKENS = {"cls_token": (1, 1, 12), "pos_embed": (1, 17, 12), "mask_token": (1, 12)}
PATCHES = {"patch_embed.proj.weight": (12, 3, 2, 2), "patch_embed.proj.bias": (12,)}
NORM = {"norm.weight": (12,), "norm.bias": (12,)}
ATTENTION = {
    "attn.qkv.weight": (36, 12),
    "attn.qkv.bias": (36,),
    "attn.proj.weight": (12, 12),
    "attn.proj.bias": (12,),
}
MLP = {"mlp.fc1.weight": (48, 12), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (12, 48), "mlp.fc2.bias": (12,)}
SWIGLU = {"mlp.w12.weight": (64, 12), "mlp.w12.bias": (64,), "mlp.w3.weight": (12, 32), "mlp.w3.bias": (12,)}


def block_shapes(ffn: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    norm1, norm2 = ({f"norm{i}.weight": (12,), f"norm{i}.bias": (12,)} for i in (1, 2))
    return norm1 | ATTENTION | {"ls1.gamma": (12,)} | norm2 | ffn | {"ls2.gamma": (12,)}


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu", "swiglufused"])
def test_names_shapes_and_order_are_the_published_ones(ffn_layer: str) -> None:
    block = block_shapes(MLP if ffn_layer == "mlp" else SWIGLU)
    blocks = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    state = small_vit(ffn_layer=ffn_layer).state_dict()
    expected = TOKENS | PATCHES | blocks | NORM
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert list(state) == list(expected)


def test_registers_come_between_positions_and_mask_token() -> None:
    names = list(small_vit(num_register_tokens=4).state_dict())
    assert names[:4] == ["cls_token", "pos_embed", "register_tokens", "mask_token"]


@pytest.mark.parametrize(
    ("option", "gone"),
    [
        ({"init_values": None}, {"ls1.gamma", "ls2.gamma"}),
        ({"init_values": 0.0}, {"ls1.gamma", "ls2.gamma"}),
        ({"qkv_bias": False}, {"attn.qkv.bias"}),
        ({"proj_bias": False}, {"attn.proj.bias"}),
        ({"ffn_bias": False}, {"mlp.fc1.bias", "mlp.fc2.bias"}),
        ({"ffn_layer": "identity"}, set(MLP)),
    ],
)
def test_parts_can_be_left_out(option: dict[str, object], gone: set[str]) -> None:
    full, less = small_vit(), small_vit(**option)
    lost = set(full.state_dict()) - set(less.state_dict())
    assert lost == {f"blocks.{i}.{name}" for i in range(2) for name in gone}
    assert less(images(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_of_blocks_in_chunks_are_loaded_by_pytorch_itself(wrapped: bool) -> None:
    """Also where missing names are allowed, which would leave random blocks."""
    state = small_vit().state_dict()
    chunked = chunk_block_names(state, depth=len(small_vit().blocks), block_chunks=2)
    assert chunked.keys() != state.keys()
    model: Any = small_vit(block_chunks=2)
    if wrapped:
        outer = nn.ModuleDict({"encoder": model})
        found = outer.load_state_dict({f"encoder.{name}": value for name, value in chunked.items()}, strict=False)
    else:
        found = model.load_state_dict(chunked, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_can_be_drawn_again() -> None:
    model: Any = small_vit()
    before = model.blocks[0].attn.qkv.weight.clone()
    model.init_weights()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before)


def test_names_do_not_depend_on_chunks() -> None:
    assert list(small_vit(block_chunks=2).state_dict()) == list(small_vit().state_dict())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"ffn_layer": "moe"}, "unknown ffn_layer 'moe'; known: mlp, swiglu, swiglufused, identity"),
        ({"num_register_tokens": -1}, "num_register_tokens must be at least 0, not -1"),
        ({"num_heads": 5}, "width 12 is not divisible by 5 heads"),
        ({"attention_backend": "flash"}, "unknown attention backend 'flash'"),
        ({"drop_path_rate": -0.1}, "stochastic depth must be at least 0 and below 1, not -0.1"),
    ],
)
def test_impossible_settings_are_named(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_vit(**option)


# --- Initial weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def initial() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=64, patch_size=4, embed_dim=96, depth=3, num_heads=3, init_values=1e-5, num_register_tokens=50
    )
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", ["pos_embed", "blocks.1.attn.qkv.weight", "blocks.2.attn.proj.weight"])
def test_positions_and_linear_weights_are_normal(initial: dict[str, Tensor], name: str) -> None:
    values = initial[name]
    assert abs(values.mean()) < 5 * 0.02 / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(0.02, rel=0.03)
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
    assert kurtosis.item() == pytest.approx(3, abs=0.3), "not cut at two standard deviations"


def test_the_spread_of_positions_and_linear_weights_can_be_chosen() -> None:
    torch.manual_seed(0)
    model = DinoVisionTransformer(img_size=64, patch_size=4, embed_dim=96, depth=1, init_std=0.1, pos_embed_std=0.3)
    assert model.pos_embed.std().item() == pytest.approx(0.3, rel=0.03)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.1, rel=0.03)


def test_class_token_and_registers_start_near_zero(initial: dict[str, Tensor]) -> None:
    for name in ("cls_token", "register_tokens"):
        assert initial[name].std().item() == pytest.approx(1e-6, rel=0.2)


def test_patch_projection_keeps_the_default_of_pytorch(initial: dict[str, Tensor]) -> None:
    bound = 1 / (3 * 4 * 4) ** 0.5
    weight = initial["patch_embed.proj.weight"]
    assert weight.abs().max() <= bound and initial["patch_embed.proj.bias"].abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert initial["patch_embed.proj.bias"].any()


def test_everything_else_starts_constant(initial: dict[str, Tensor]) -> None:
    constants = {name: values.unique().tolist() for name, values in initial.items() if values.ndim == 1}
    constants.pop("patch_embed.proj.bias")
    for name, values in constants.items():
        start = 1.0 if "norm" in name and name.endswith("weight") else 1e-5 if name.endswith("gamma") else 0.0
        assert values == pytest.approx([start]), name
    assert not initial["mask_token"].any()


def test_stochastic_depth_is_a_ramp_or_uniform() -> None:
    ramp = [block.sample_drop_ratio for block in small_vit(depth=5, drop_path_rate=0.4).blocks]
    assert ramp == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    uniform = [
        block.sample_drop_ratio for block in small_vit(depth=3, drop_path_rate=0.4, drop_path_uniform=True).blocks
    ]
    assert uniform == [0.4, 0.4, 0.4]
    assert [block.sample_drop_ratio for block in small_vit(depth=1, drop_path_rate=0.4).blocks] == [0.0]


# --- Tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_are_class_registers_and_patches_with_positions_on_all_but_registers() -> None:
    model, x = small_vit(num_register_tokens=2), images(3, 3, 8, 8)
    tokens = model.prepare_tokens_with_masks(x)
    assert tokens.shape == (3, 1 + 2 + 16, 12)
    torch.testing.assert_close(tokens[:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(3, -1, -1))
    assert torch.equal(tokens[:, 1:3], model.register_tokens.expand(3, -1, -1))
    torch.testing.assert_close(tokens[:, 3:], model.patch_embed(x) + model.pos_embed[:, 1:])


def test_masked_patches_are_the_mask_token_with_their_position() -> None:
    model, x = small_vit(num_register_tokens=2), images(2, 3, 8, 8)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 3] = masks[0, 4] = masks[1, 15] = True
    tokens, plain = model.prepare_tokens_with_masks(x, masks), model.prepare_tokens_with_masks(x)
    for row, patch in masks.nonzero().tolist():
        torch.testing.assert_close(tokens[row, 3 + patch], model.mask_token[0] + model.pos_embed[0, 1 + patch])
    kept = torch.cat([torch.ones(2, 3, dtype=torch.bool), ~masks], dim=1)
    assert torch.equal(tokens[kept], plain[kept])


def test_an_empty_mask_changes_nothing() -> None:
    model, x = small_vit(), images(2, 3, 8, 8)
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(model.prepare_tokens_with_masks(x, nothing), model.prepare_tokens_with_masks(x))


def test_an_image_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="height 7 is not a multiple"):
        small_vit()(images(1, 3, 7, 8))


# --- Forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 2])
def test_features_are_the_normed_tokens_cut_apart(registers: int) -> None:
    model, x = small_vit(num_register_tokens=registers), images(3, 3, 8, 12)
    masks = images(3, 24) < 0
    features = model.forward_features(x, masks)
    tokens = model.prepare_tokens_with_masks(x, masks)
    for block in model.blocks:
        tokens = block(tokens)
    assert features["masks"] is masks
    torch.testing.assert_close(features["x_prenorm"], tokens)
    normed = model.norm(tokens)
    torch.testing.assert_close(features["x_norm_clstoken"], normed[:, 0])
    torch.testing.assert_close(features["x_norm_regtokens"], normed[:, 1 : 1 + registers])
    torch.testing.assert_close(features["x_norm_patchtokens"], normed[:, 1 + registers :])
    assert set(features) == {"x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks"}


def test_calling_gives_the_class_token_or_all_features() -> None:
    model, x = small_vit(), images(2, 3, 8, 8)
    masks = images(2, 16) < 0
    features = model.forward_features(x, masks)
    assert torch.equal(model(x, masks), features["x_norm_clstoken"])
    assert_same_features(model(x, masks, is_training=True), features)
    assert not torch.allclose(model(x), model(x, masks))


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
def test_a_list_of_batches_is_each_batch_by_itself(ffn_layer: str) -> None:
    model = small_vit(num_register_tokens=2, ffn_layer=ffn_layer)
    crops = [images(2, 3, 8, 8), images(5, 3, 4, 4), images(1, 3, 4, 10)]
    masks = [images(2, 16) < 0, None, None]
    together = model.forward_features(crops, masks)
    for features, crop, mask in zip(together, crops, masks, strict=True):
        assert_same_features(features, model.forward_features(crop, mask))
        assert features["masks"] is mask
    for features, expected in zip(model(crops, is_training=True), model.forward_features(crops), strict=True):
        assert_same_features(features, expected)


def test_gradients_of_a_list_are_those_of_each_batch_and_reach_every_parameter() -> None:
    model = small_vit(num_register_tokens=2).double()
    crops = [images(2, 3, 8, 8).double(), images(5, 3, 4, 4).double()]
    masks = [images(2, 16) < 0, None]

    def gradients(features: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        tokens = [torch.cat([f["x_norm_clstoken"], f["x_norm_patchtokens"].flatten(1)], dim=1) for f in features]
        loss = torch.stack([token.sin().sum() for token in tokens]).sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    ours = gradients(model.forward_features(crops, masks))
    expected = gradients([model.forward_features(crop, mask) for crop, mask in zip(crops, masks, strict=True)])
    for (name, _), gradient, expected_gradient in zip(model.named_parameters(), ours, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, msg=name)
        assert gradient.any(), name


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.4])
def test_features_and_gradients_of_wanted_patches_are_those_among_all(drop_path_rate: float) -> None:
    model = small_vit(num_register_tokens=2, drop_path_rate=drop_path_rate, drop_path_uniform=True).double()
    crops = [images(4, 3, 8, 8).double(), images(5, 3, 4, 4).double()]
    wanted = [torch.tensor([3, 60, 17, 16]), torch.tensor([], dtype=torch.int64)]

    def tokens_and_gradients(patches: list[Tensor] | None) -> list[Tensor]:
        torch.manual_seed(1)  # of stochastic depth
        tokens = []
        for features, index in zip(model(crops, is_training=True, patches=patches), wanted, strict=True):
            found = features["x_norm_patchtokens"]
            tokens += [features["x_norm_clstoken"], found if patches else found.flatten(0, 1)[index]]
        return tokens + list(
            torch.autograd.grad(torch.cat(tokens).sin().sum(), list(model.parameters()), materialize_grads=True)
        )

    torch.testing.assert_close(tokens_and_gradients(wanted), tokens_and_gradients(None))


def test_what_serves_unwanted_patches_only_is_not_computed() -> None:
    model = small_vit()
    rows: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1].numel()))
    model(
        [images(2, 3, 8, 8), images(5, 3, 4, 4)], is_training=True, patches=[torch.tensor([3, 30]), torch.tensor([4])]
    )
    assert rows == [2 * 17 + 5 * 5, (2 + 2) + (5 + 1)]


def test_a_list_needs_a_mask_or_none_for_each_batch() -> None:
    with pytest.raises(ValueError, match="2 batches of images with 1 masks: give one or None for each"):
        small_vit().forward_features([images(2, 3, 8, 8), images(2, 3, 4, 4)], [None])


def test_stochastic_depth_acts_in_training_only() -> None:
    model = small_vit(drop_path_rate=0.6, drop_path_uniform=True)
    x = images(8, 3, 8, 8)
    plain = small_vit()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain(x))


def test_images_need_not_be_square_nor_in_color() -> None:
    model = small_vit(img_size=(4, 10), in_chans=1)
    assert model.pos_embed.shape == (1, 1 + 2 * 5, 12)
    features = model.forward_features(images(2, 1, 4, 10))
    assert features["x_norm_patchtokens"].shape == (2, 10, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(dtype: torch.dtype) -> None:
    model = small_vit(num_register_tokens=2)
    crops, masks = [images(2, 3, 8, 8), images(3, 3, 4, 4)], [images(2, 16) < 0, None]
    expected = model.forward_features(crops, masks)
    with torch.autocast("cpu", dtype):
        autocast = model.forward_features(crops, masks)
    whole = model.to(dtype).forward_features([crop.to(dtype) for crop in crops], masks)
    assert whole[0]["x_norm_clstoken"].dtype == dtype
    for half in (autocast, whole):
        for features, reference in zip(half, expected, strict=True):
            for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
                error = (features[name].float() - reference[name]).norm() / reference[name].norm()
                assert error < 0.03


# --- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_a_training_step_of_every_backend_agrees_with_sdpa() -> None:
    crops, masks = [images(4, 3, 56, 56).cuda(), images(8, 3, 28, 28).cuda()], [(images(4, 16) < 0).cuda(), None]

    def loss_and_gradient(backend: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = DinoVisionTransformer(
            img_size=56,
            patch_size=14,
            embed_dim=128,
            depth=3,
            num_heads=2,
            attention_backend=backend,
            drop_path_rate=0.3,
        ).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            features = model.forward_features(crops, masks)
        loss = torch.stack([f["x_norm_clstoken"].float().square().sum() for f in features]).sum()
        loss = loss + features[0]["x_norm_patchtokens"].float().sin().sum()
        loss.backward()
        return loss.detach(), model.blocks[0].attn.qkv.weight.grad

    loss, gradient = loss_and_gradient("sdpa")
    for backend in ("auto", "varlen"):
        other_loss, other_gradient = loss_and_gradient(backend)
        torch.testing.assert_close(other_loss, loss, rtol=1e-2, atol=0)
        assert (other_gradient - gradient).norm() / gradient.norm() < 0.05
