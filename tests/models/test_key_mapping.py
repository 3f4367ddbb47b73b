"""Weights of timm and transformers: models of theirs, read by us, compute the same; ours in their names are theirs."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_peers import (
    PUBLISHED,
    assert_same_features,
    images,
    published_backbone,
    to_published_hf,
    to_timm,
    tokens_of,
    with_generic_weights,
)
from torch import Tensor

from dinov2.hub import backbones, classifiers
from dinov2.models import build_model, key_mapping
from dinov2.models.infer_architecture import infer_arguments, published_name
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_backbone, read_state_dict

NATIVE = 56  # pixels: 4 x 4 patches
SMALL = {"embed_dim": 128, "num_heads": 2, "depth": 2, "img_size": NATIVE}


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    return importlib.import_module("timm")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return importlib.import_module("transformers")


def small(name: str) -> DinoVisionTransformer:
    """With the layers of a published model, but narrow."""
    return published_backbone(name, **SMALL)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# --- Names and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14", "dinov2_vitg14_reg"])
def test_names_of_transformers_and_back(name: str) -> None:
    state = small(name).state_dict()
    theirs = key_mapping.to_hf(state)
    assert_equal(theirs, to_published_hf(state))
    assert key_mapping.key_format(theirs) == "hf" and key_mapping.key_format(state) == "published"
    assert_equal(key_mapping.to_published(theirs), state)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14", "dinov2_vitg14_reg"])
def test_names_of_timm_and_back(name: str) -> None:
    """Two things do not come back: the mask token, and with registers what is class token and what its position."""
    state = small(name).state_dict()
    theirs = key_mapping.to_timm(state)
    assert_equal(theirs, to_timm(state))
    assert key_mapping.key_format(theirs) == "timm"
    back = key_mapping.to_published(theirs)
    assert torch.equal(back.pop("mask_token"), torch.zeros_like(state.pop("mask_token")))
    if "register_tokens" in state:
        for tensors in (state, back):
            tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    assert_equal(back, state)


def test_networks_without_layer_scale_get_one_of_ones_for_transformers() -> None:
    state = build_model("vit_small", depth=1, img_size=28, patch_size=14).state_dict()
    theirs = key_mapping.to_hf(state)
    for number in (1, 2):
        assert torch.equal(theirs[f"encoder.layer.0.layer_scale{number}.lambda1"], torch.ones(384))


# --- timm ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("head", [0, 10], ids=["backbone", "classifier"])
@pytest.mark.parametrize(
    ("their_name", "name"),
    [
        ("vit_small_patch14_dinov2", "dinov2_vits14"),
        ("vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg"),
        ("vit_giant_patch14_dinov2", "dinov2_vitg14"),
        ("vit_giant_patch14_reg4_dinov2", "dinov2_vitg14_reg"),
    ],
)
def test_a_model_of_timm_is_read(timm: ModuleType, tmp_path: Path, their_name: str, name: str, head: int) -> None:
    theirs = timm.create_model(their_name, pretrained=False, num_classes=head, **SMALL | {"mlp_ratio": 5.375})
    if "vits" in name:
        theirs = timm.create_model(their_name, pretrained=False, num_classes=head, **SMALL)
    with_generic_weights(theirs)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = getattr(backbones, name)(weights=tmp_path / "timm.pth", **SMALL).eval()
    x = images(NATIVE, NATIVE)
    assert_same_features(tokens_of(ours, x), theirs.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_timm_loads_our_files(timm: ModuleType, tmp_path: Path, name: str) -> None:
    """What it does with the released files works with ours; with its own names it needs to do nothing."""
    ours, path = published_backbone(name), tmp_path / "ours.pth"
    sizes = {"num_classes": 0, "depth": 2, "img_size": NATIVE}
    their_name = f"vit_small_patch14{'_reg4' if ours.num_register_tokens else ''}_dinov2"
    x = images(NATIVE, NATIVE)
    torch.save(ours.state_dict(), path)
    released = timm.create_model(their_name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **sizes)
    assert_same_features(released.eval().forward_features(x), tokens_of(ours, x))
    torch.save(key_mapping.to_timm(ours.state_dict()), path)
    translated = timm.create_model(their_name, checkpoint_path=str(path), **sizes)
    assert_same_features(translated.eval().forward_features(x), tokens_of(ours, x))


# --- transformers ----------------------------------------------------------------------------------------------------


def small_transformer(transformers: ModuleType, kind: str, *, registers: bool, gated: bool) -> torch.nn.Module:
    config = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": NATIVE,
        "patch_size": 14,
        "use_swiglu_ffn": gated,
        "num_labels": 1000,
    }
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    config_of = getattr(transformers, f"{family}Config")
    return with_generic_weights(getattr(transformers, f"{family}{kind}")(config_of(**config)))


@torch.no_grad()
@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("written", ["folder", "shards", "state dict"])
def test_a_model_of_transformers_is_read(
    transformers: ModuleType, tmp_path: Path, registers: bool, gated: bool, written: str
) -> None:
    """As it is saved, in one file and in several, and with the names it has in memory."""
    theirs = small_transformer(transformers, "Model", registers=registers, gated=gated)
    if written == "state dict":
        path = tmp_path / "theirs.pth"
        torch.save(theirs.state_dict(), path)
    else:
        path = tmp_path
        theirs.save_pretrained(path, max_shard_size="100KB" if written == "shards" else "5GB")
        assert (path / "model.safetensors.index.json").exists() == (written == "shards")
    name = f"dinov2_vit{'g' if gated else 's'}14{'_reg' if registers else ''}"
    ours = getattr(backbones, name)(weights=path, **SMALL).eval()
    x, masks = images(NATIVE, NATIVE), torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    assert_same_features(tokens_of(ours, x), theirs(x).last_hidden_state)
    assert_same_features(tokens_of(ours, x, masks), theirs(x, bool_masked_pos=masks).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_a_classifier_of_transformers_is_our_classifier_of_one_layer(
    transformers: ModuleType, tmp_path: Path, registers: bool
) -> None:
    theirs = small_transformer(transformers, "ForImageClassification", registers=registers, gated=False)
    theirs.save_pretrained(tmp_path)
    name = "dinov2_vits14_reg" if registers else "dinov2_vits14"
    ours = getattr(classifiers, f"{name}_lc")(layers=1, weights=tmp_path, **SMALL).eval()
    x = images(NATIVE, NATIVE)
    assert_same_features(ours(x), theirs(x).logits)
    alone = getattr(backbones, name)(weights=tmp_path, **SMALL).eval()
    assert torch.equal(alone(x), ours.backbone(x))


def test_a_missing_part_of_the_queries_keys_and_values_is_refused(tmp_path: Path) -> None:
    ours = small("dinov2_vits14")
    state = key_mapping.to_hf(ours.state_dict())
    del state["encoder.layer.1.attention.attention.key.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        load_backbone(ours, tmp_path)
    assert "missing (1): blocks.1.attn.qkv.bias" in str(caught.value)
    assert "unknown (2): encoder.layer.1.attention.attention.query.bias" in str(caught.value)


def test_foreign_names_of_transformers_are_refused(tmp_path: Path) -> None:
    ours = small("dinov2_vits14")
    state = key_mapping.to_hf(ours.state_dict()) | {"encoder.layer.0.adapter.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"unknown \(1\): encoder.layer.0.adapter.weight"):
        load_backbone(ours, tmp_path)


def test_the_error_of_a_folder_without_weights_names_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a folder without model.safetensors, pytorch_model.bin or teacher_"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10**5]
    + [
        '{"weight_map": {"a": "../other.safetensors"}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
    ],
)
def test_a_damaged_index_of_parts_is_named(content: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=f"{index} is damaged, it is not an index"):
        read_state_dict(tmp_path)


def test_the_teacher_of_a_run_may_be_given_as_its_folder(tmp_path: Path) -> None:
    teacher = tmp_path / "eval" / "training_99" / "teacher_checkpoint.pth"
    teacher.parent.mkdir(parents=True)
    torch.save({"teacher": {"backbone.cls_token": torch.ones(2)}}, teacher)
    (tmp_path / "eval" / "best").symlink_to("training_99")
    for folder in (teacher.parent, tmp_path / "eval" / "best"):
        assert read_state_dict(folder).keys() == {"backbone.cls_token"}
    (tmp_path / "checkpoints").mkdir()
    for folder in (tmp_path, tmp_path / "eval"):
        with pytest.raises(FileNotFoundError, match=f"teachers of this run: {tmp_path}/eval/best, .*/training_99"):
            read_state_dict(folder)


# --- Sizes from tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_recognized(name: str) -> None:
    with torch.device("meta"):
        model = getattr(backbones, name)(pretrained=False)
        state = model.state_dict()
        found = DinoVisionTransformer(**infer_arguments(state))
    assert published_name(state) == name
    assert {key: value.shape for key, value in found.state_dict().items()} == {k: v.shape for k, v in state.items()}
    for attribute in ("num_heads", "patch_size", "interpolate_offset", "interpolate_antialias", "num_register_tokens"):
        assert getattr(found, attribute) == getattr(model, attribute)


@pytest.mark.parametrize(
    "settings",
    [
        {"mlp_ratio": 3.3},
        {"ffn_layer": "swiglufused", "mlp_ratio": 3.0},
        {"ffn_layer": "swiglufused", "embed_dim": 192},
        {"ffn_layer": "identity"},
        {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
        {"init_values": 1e-5, "num_register_tokens": 3, "in_chans": 5},
    ],
)
def test_other_networks_are_recognized(settings: dict[str, object]) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1} | settings
    with torch.device("meta"):
        state = DinoVisionTransformer(**sizes).state_dict()
        found = DinoVisionTransformer(**infer_arguments(state)).state_dict()
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in state.items()}
    assert published_name(state) is None


def test_what_tensors_do_not_determine_must_be_given() -> None:
    model = DinoVisionTransformer(img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="width 12 is not a multiple of 64 channels per head: give the number"):
        infer_arguments(model.state_dict())
    assert infer_arguments(model.state_dict(), num_heads=3)["num_heads"] == 3
    with pytest.raises(ValueError, match="no backbone: pos_embed, patch_embed.proj.weight, norm.weight missing"):
        infer_arguments({"mlp.0.weight": torch.zeros(1)})
    state = DinoVisionTransformer(img_size=(8, 4), patch_size=2, embed_dim=64, depth=1, num_heads=1).state_dict()
    with pytest.raises(ValueError, match=r"pos_embed \(1, 9, 64\) is not of a square grid"):
        infer_arguments(state)


# --- Channels --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_an_image_that_is_the_same_in_all_channels_gives_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, channels: int
) -> None:
    """Exactly with fewer channels or a multiple; with others it is near, as the mean of the weights is another one."""
    source = small("dinov2_vits14")
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    model = backbones.dinov2_vits14(weights=tmp_path / "rgb.pth", in_chans=channels, **SMALL).eval()
    assert f"have 3 channels, this model's have {channels}" in caplog.text
    gray = images(NATIVE, NATIVE)[:, :1]
    ours, expected = model(gray.expand(-1, channels, -1, -1)), source(gray.expand(-1, 3, -1, -1))
    if channels != 4:
        assert_same_features(ours, expected)
    weight = source.patch_embed.proj.weight
    if channels > 3:
        for channel in range(channels):
            assert torch.equal(model.patch_embed.proj.weight[:, channel], weight[:, channel % 3] * (3 / channels))
