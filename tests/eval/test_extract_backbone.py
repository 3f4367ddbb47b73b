"""Any model: published ones by name, those of a config, and those inferred from tensors."""

import argparse
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dinov2 import config
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN
from dinov2.eval.extract.frozen_backbone import DEFAULT_SIDE, FrozenBackbone, load_frozen_backbone
from dinov2.flags.visualization import add_model_flags
from dinov2.models import build_model
from dinov2.models.backbones import build_published
from dinov2.models.key_mapping import to_hf
from dinov2.models.published import WEIGHTS_URL_VARIABLE
from dinov2.models.vision_transformer import DinoVisionTransformer

CONFIG = """
student: {arch: vit_small, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}
crops: {global_crops_size: 16, local_crops_size: 8}
augmentation: {mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}
"""


def load(*words: object) -> FrozenBackbone:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    return load_frozen_backbone(parser.parse_args([str(word) for word in words]))


def assert_same(model: DinoVisionTransformer, other: DinoVisionTransformer) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def tiny(tmp_path: Path) -> DinoVisionTransformer:
    """The network of CONFIG, which is at tmp_path / config.yaml."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    cfg = config.load(tmp_path / "config.yaml")
    torch.manual_seed(1)
    return build_model(**config.backbone_arguments(cfg))


def save_teacher(model: DinoVisionTransformer, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, path)
    return path


def test_a_config_with_weights(tiny: DinoVisionTransformer, tmp_path: Path) -> None:
    weights = save_teacher(tiny, tmp_path / "mine.pth")
    backbone = load("--config-file", tmp_path / "config.yaml", "--pretrained-weights", weights)
    assert_same(backbone.model, tiny)
    assert (list(backbone.mean), backbone.shorter_side, backbone.name) == ([0.1, 0.2, 0.3], 16, "mine.pth")


def test_the_teacher_of_a_run_brings_its_config(tiny: DinoVisionTransformer, tmp_path: Path) -> None:
    weights = save_teacher(tiny, tmp_path / "eval" / "training_99" / "teacher_checkpoint.pth")
    (tmp_path / "eval" / "best").symlink_to("training_99")
    for folder in (weights.parent, tmp_path / "eval" / "best"):
        for given in (folder, folder / "teacher_checkpoint.pth"):
            backbone = load("--pretrained-weights", given)
            assert_same(backbone.model, tiny)
            assert (list(backbone.mean), backbone.name) == ([0.1, 0.2, 0.3], f"{tmp_path.name}/{folder.name}")


def test_a_config_without_weights_is_the_network_before_training(tiny: DinoVisionTransformer, tmp_path: Path) -> None:
    backbone = load("--config-file", tmp_path / "config.yaml", "--random-init", "--opts", "student.depth=3")
    assert (backbone.model.n_blocks, backbone.name) == (3, f"{tmp_path.name} (untrained)")
    (tmp_path / "config.yaml").rename(tmp_path / "mine.yaml")
    for file, name in ((tmp_path / "mine.yaml", "mine.yaml"), ("train/quickstart", "train/quickstart")):
        assert load("--config-file", file, "--random-init").name == f"{name} (untrained)"


def test_the_architecture_is_inferred_from_tensors(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build_model("vit_small", img_size=28, patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=1.0)
    backbone = load("--pretrained-weights", save_teacher(model, tmp_path / "small.pth"))
    assert_same(backbone.model, model)
    assert (backbone.model.num_heads, backbone.shorter_side, backbone.name) == (2, 28, "small.pth")
    assert tuple(backbone.mean) == IMAGENET_DEFAULT_MEAN
    four = load("--pretrained-weights", tmp_path / "small.pth", "--num-heads", 4)
    assert four.model.num_heads == 4


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    model = build_model("vit_small", img_size=28, patch_size=14, embed_dim=48, depth=1, num_heads=6, init_values=1.0)
    safetensors.torch.save_file(to_hf(model.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 6}))
    backbone = load("--pretrained-weights", tmp_path)
    assert_same(backbone.model, model)
    assert backbone.model.num_heads == 6


def test_a_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_published("dinov2_vits14_reg")
    (tmp_path / "dinov2_vits14").mkdir()
    torch.save(model.state_dict(), tmp_path / "dinov2_vits14" / "dinov2_vits14_reg4_pretrain.pth")
    monkeypatch.setenv(WEIGHTS_URL_VARIABLE, tmp_path.as_uri())
    backbone = load("--model", "dinov2_vits14_reg")
    assert_same(backbone.model, model)
    assert (backbone.name, backbone.shorter_side) == ("dinov2_vits14_reg", DEFAULT_SIDE)
    mine = save_teacher(model, tmp_path / "mine.pth")
    assert_same(load("--model", "dinov2_vits14_reg", "--pretrained-weights", mine).model, model)
    with pytest.raises(ValueError, match=r"mine\.pth do not fit this backbone"):
        load("--model", "dinov2_vits14", "--pretrained-weights", mine)


def test_a_published_network_before_training_is_always_the_same() -> None:
    one, other = load("--model", "dinov2_vits14", "--random-init"), load("--model", "dinov2_vits14", "--random-init")
    assert_same(one.model, other.model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model selected"),
        (["--random-init"], "no model selected"),
        (["--config-file", "train/quickstart"], "no model selected"),
        (["--model", "dinov2_vits16"], "unknown --model 'dinov2_vits16'; did you mean dinov2_vits14"),
        (["--model", "dinov2_vits14", "--config-file", "train/quickstart"], "both define the architecture"),
        (["--model", "dinov2_vits14", "--random-init", "--pretrained-weights", "w.pth"], "exclude one another"),
        (
            ["--config-file", "train/quickstart", "--random-init", "--num-heads", "2"],
            "--num-heads 2 cannot be used",
        ),
        (["--model", "dinov2_vits14", "--random-init", "--opts", "a.b=1"], "--opts a.b=1 overrides a config"),
    ],
)
def test_flags_that_do_not_select_one_model_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(*words)


def test_missing_or_foreign_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none\.pth"):
        load("--pretrained-weights", tmp_path / "none.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: no backbone"):
        load("--pretrained-weights", tmp_path / "other.pth")
