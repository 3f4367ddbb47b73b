"""Our backbones and those of two independent libraries, timm and transformers: same weights, same features.

The weights are random but generic (no zero biases, no gains of one), so that nothing hides. Widths and heads are the
published ones, depth and image size smaller.
"""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2.hub import backbones
from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer

StateDict = dict[str, Tensor]

SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
PUBLISHED = [f"dinov2_vit{size}14{suffix}" for size in SIZES for suffix in ("", "_reg")]
# The giant is the same code with SwiGLU layers, with and without registers.
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name == "dinov2_vitg14_reg")) for name in PUBLISHED]
NATIVE = 56  # pixels: 4 x 4 patches
OTHER_SIZES = [(28, 70), (84, 56), (28, 112)]  # the last has as many patches as the native size


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    return importlib.import_module("timm")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return importlib.import_module("transformers")


def published_backbone(name: str, **kwargs: object) -> DinoVisionTransformer:
    """One of the eight backbones, two blocks deep, for small images, with generic weights."""
    return with_generic_weights(
        getattr(backbones, name)(pretrained=False, **{"depth": 2, "img_size": NATIVE, **kwargs})
    )


@torch.no_grad()
def with_generic_weights(model: DinoVisionTransformer) -> DinoVisionTransformer:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.1, 1.0, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            parameter.normal_(1.0, 0.1, generator=generator)
        elif parameter.ndim in (2, 4) and name != "mask_token":
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.5, generator=generator)
    return model.eval()


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def tokens_of(model: DinoVisionTransformer, x: Tensor, masks: Tensor | None = None) -> Tensor:
    """All tokens after the last norm: class, registers, patches."""
    features = model.forward_features(x, masks)
    assert isinstance(features, dict)
    parts = [features["x_norm_clstoken"].unsqueeze(1), features["x_norm_regtokens"], features["x_norm_patchtokens"]]
    return torch.cat(parts, dim=1)


def assert_same_features(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


# --- timm ------------------------------------------------------------------------------------------------------------


def to_timm(state: StateDict) -> StateDict:
    """timm has no mask token, one name for both feed-forward layers, and with registers no position for the class."""
    renamed = {
        name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): value
        for name, value in state.items()
        if name != "mask_token"
    }
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def timm_model(timm: ModuleType, ours: DinoVisionTransformer, size: str, img_size: int) -> torch.nn.Module:
    registers = "_reg4" if ours.num_register_tokens else ""
    theirs = timm.create_model(
        f"vit_{SIZES[size]}_patch14{registers}_dinov2",
        pretrained=False,
        depth=ours.n_blocks,
        img_size=img_size,
        dynamic_img_size=True,
        num_classes=0,
    )
    theirs.load_state_dict(to_timm(ours.state_dict()))
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_timm_computes_the_same_features(timm: ModuleType, name: str) -> None:
    """At the native size with the published position rule; at other sizes with timm's: by size, antialiased."""
    ours = published_backbone(name)
    theirs = timm_model(timm, ours, name[10], NATIVE)
    x = images(NATIVE, NATIVE)
    assert_same_features(tokens_of(ours, x), theirs.forward_features(x))
    if not ours.num_register_tokens:  # with registers the published rule is timm's
        ours.interpolate_offset, ours.interpolate_antialias = 0.0, True
    for height, width in OTHER_SIZES[:2]:  # a table of the right length is returned as it is by timm
        x = images(height, width)
        assert_same_features(tokens_of(ours, x), theirs.forward_features(x))


@torch.no_grad()
def test_timm_computes_the_same_features_with_a_whole_vit_small(timm: ModuleType) -> None:
    ours = published_backbone("dinov2_vits14", depth=12, img_size=224)
    theirs = timm_model(timm, ours, "s", 224)
    x = images(224, 224)
    assert_same_features(tokens_of(ours, x), theirs.forward_features(x))


@torch.no_grad()
def test_timm_computes_the_same_intermediate_layers(timm: ModuleType) -> None:
    ours = published_backbone("dinov2_vits14_reg", depth=4)
    theirs = timm_model(timm, ours, "s", NATIVE)
    x = images(NATIVE, 84)
    for norm in (True, False):
        layers = ours.get_intermediate_layers(x, n=[0, 2], reshape=True, norm=norm)
        expected = theirs.forward_intermediates(x, indices=[0, 2], norm=norm, intermediates_only=True)
        for layer, their_layer in zip(layers, expected, strict=True):
            assert_same_features(layer, their_layer)


# --- transformers ----------------------------------------------------------------------------------------------------

TO_PUBLISHED_HF = [
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^norm\.", "layernorm."),
]


def to_published_hf(state: StateDict) -> StateDict:
    """The names in the files published for transformers, with separate queries, keys and values."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in TO_PUBLISHED_HF:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.contiguous()
        else:
            renamed[name] = value
    return renamed


def transformers_model(transformers: ModuleType, ours: DinoVisionTransformer, folder: Path) -> torch.nn.Module:
    """Write a folder as published, and let transformers load it."""
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": ours.embed_dim,
        "num_hidden_layers": ours.n_blocks,
        "num_attention_heads": ours.num_heads,
        "image_size": ours.patch_embed.img_size[0],
        "patch_size": ours.patch_size,
        "mlp_ratio": 4,
        "use_swiglu_ffn": "blocks.0.mlp.w12.weight" in ours.state_dict(),
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }
    model_class = transformers.Dinov2Model
    if ours.num_register_tokens:
        model_class = transformers.Dinov2WithRegistersModel
        config |= {
            "model_type": "dinov2_with_registers",
            "architectures": ["Dinov2WithRegistersModel"],
            "num_register_tokens": ours.num_register_tokens,
        }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(to_published_hf(ours.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    theirs, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_features(transformers: ModuleType, tmp_path: Path, name: str) -> None:
    """At the native size with the published position rule; at other sizes with transformers': by size."""
    ours = published_backbone(name)
    theirs = transformers_model(transformers, ours, tmp_path)
    x = images(NATIVE, NATIVE)
    assert_same_features(tokens_of(ours, x), theirs(x).last_hidden_state)
    assert_same_features(ours(x), theirs(x).pooler_output)
    ours.interpolate_offset = 0.0
    for height, width in OTHER_SIZES:
        x = images(height, width)
        assert_same_features(tokens_of(ours, x), theirs(x).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_transformers_computes_the_same_masked_features(transformers: ModuleType, tmp_path: Path, name: str) -> None:
    ours = published_backbone(name)
    theirs = transformers_model(transformers, ours, tmp_path)
    x, masks = images(NATIVE, NATIVE), torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    expected = theirs(x, bool_masked_pos=masks).last_hidden_state
    assert_same_features(tokens_of(ours, x, masks), expected)
    assert not torch.allclose(tokens_of(ours, x), expected, atol=0.1), "the mask matters"


@torch.no_grad()
def test_transformers_computes_the_same_features_with_a_whole_vit_small(
    transformers: ModuleType, tmp_path: Path
) -> None:
    ours = with_generic_weights(build_model("vit_small", patch_size=14, img_size=224, init_values=1.0))
    theirs = transformers_model(transformers, ours, tmp_path)
    x = images(224, 224)
    assert_same_features(tokens_of(ours, x), theirs(x).last_hidden_state)
