"""`python -m dinov2.tools` with weights: their architecture, and other forms, compared before they are kept."""

import json
import re
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from test_peers import published_backbone, to_published_hf, with_generic_weights
from torch import Tensor

from dinov2.layers import DINOHead
from dinov2.models import export
from dinov2.models.export import FORMS
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_backbone, read_state_dict
from dinov2.tools import backbone_forms
from dinov2.tools.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"embed_dim": 128, "num_heads": 2, "img_size": 56}
NAMES = {
    "hf": "OUT",
    "timm": "OUT.pth",
    "safetensors": "OUT.safetensors",
    "torch": "OUT.pth",
    "onnx": "OUT.onnx",
    "torch.export": "OUT.pt2",
}


def small(name: str = "dinov2_vits14", **kwargs: object) -> DinoVisionTransformer:
    return published_backbone(name, **SMALL | kwargs)


def written(folder: Path, state: dict[str, Tensor]) -> str:
    torch.save(state, folder / "weights.pth")
    return str(folder / "weights.pth")


def without_padding(text: str) -> str:
    """The output of `inspect` with two spaces after each title."""
    return re.sub(r"(?<=\S) {2,}", "  ", text)


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_prints_the_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = DINOHead(128, 20, hidden_dim=8, bottleneck_dim=4).state_dict()
    backbone = small("dinov2_vitg14_reg", in_chans=4).state_dict()
    state = {f"backbone.{name}": value for name, value in backbone.items()}
    state |= {f"dino_head.{name}": value for name, value in head.items()}
    torch.save({"teacher": state}, tmp_path / "dump.pth")
    assert main(["inspect", str(tmp_path / "dump.pth"), "--names"]) == 0
    text = without_padding(capsys.readouterr().out)
    for line in (
        "network  none of the published ones",
        "width  128, 2 blocks, 2 heads",
        "feed-forward  swiglufused, 4 times the width",
        "patches  14 pixels, 4 channels, 4 registers",
        "positions  4 x 4 patches, images of 56 pixels",
        f"parameters  {sum(value.numel() for value in backbone.values()):,} in {len(backbone)} tensors, float32",
        f"teacher dino_head  {sum(value.numel() for value in head.values()):,} parameters, float32",
        "\nteacher.backbone.blocks.1.attn.qkv.weight  384 x 128  float32\n",
    ):
        assert line in text


def test_inspect_recognizes_a_published_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in published_shapes("dinov2_vitb14_reg").items()}
    path = written(tmp_path, {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    assert main(["inspect", path]) == 0
    assert "network  dinov2_vitb14_reg\n" in without_padding(capsys.readouterr().out)


def published_shapes(name: str) -> dict[str, Tensor]:
    from dinov2.hub import backbones

    return getattr(backbones, name)(pretrained=False).state_dict()


def test_the_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "dinov2.models.weights", "inspect", written(tmp_path, small().state_dict())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "") and "2 blocks" in result.stdout
    assert main(["inspect", str(tmp_path / "absent.pth")]) == 1
    assert capsys.readouterr() == ("", f"error: no weights at {tmp_path / 'absent.pth'}\n")


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14_reg"])
@pytest.mark.parametrize("form", ["hf", "timm", "safetensors", "torch"])
def test_converted_weights_load_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, form: str) -> None:
    model = small(name)
    output = tmp_path / "new" / NAMES[form]
    assert main(["convert", written(tmp_path, model.state_dict()), str(output), "--to", form]) == 0
    text = capsys.readouterr().out
    assert "56 x 56 pixels: largest difference" in text and "42 x 70 pixels: largest difference" in text
    assert ("resamples positions in its own way" in text) == (form in ("hf", "timm") and "reg" not in name)
    assert str(output) in text
    assert [path.name for path in output.parent.iterdir()] == [output.name], "nothing else is left"
    back = load_backbone(small(name), output).eval()
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(back(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "torch.export"])
def test_networks_for_other_runtimes(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    output = tmp_path / "new" / NAMES[form]
    assert main(["convert", written(tmp_path, small().state_dict()), str(output), "--to", form, "--num-heads=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "42 x 70 pixels: largest difference" in lines[2]
    assert len(lines) == 4, "no lines of other libraries"
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_number_of_heads_that_is_assumed_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", written(tmp_path, small(num_heads=4).state_dict()), "--to", "torch"]
    assert main([*words, str(tmp_path / "assumed.pth")]) == 0
    assert (
        "does not state its number of attention heads: 64 channels each are assumed, 2 heads" in capsys.readouterr().out
    )
    assert main([*words, str(tmp_path / "given.pth"), "--num-heads=4"]) == 0
    assert "number of attention heads" not in capsys.readouterr().out


def test_files_of_transformers_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with a number of heads that only the config of transformers has."""
    model = small(num_heads=4)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    torch.save(to_published_hf(model.state_dict()), tmp_path / "pytorch_model.bin")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "128, 2 blocks, 4 heads" in capsys.readouterr().out
    assert main(["convert", str(tmp_path), str(tmp_path / "OUT.pth"), "--to", "torch"]) == 0
    assert all(torch.equal(value, model.state_dict()[k]) for k, value in read_state_dict(tmp_path / "OUT.pth").items())


def test_a_published_model_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path))
    (tmp_path / "dinov2_vits14").mkdir()
    state = published_shapes("dinov2_vits14_reg")
    torch.save(state, tmp_path / "dinov2_vits14" / "dinov2_vits14_reg4_pretrain.pth")
    output = tmp_path / "OUT.safetensors"
    monkeypatch.setattr(backbone_forms, "compare", lambda *_: [])  # at 518 pixels it takes seconds
    assert main(["convert", "dinov2_vits14_reg", str(output), "--to", "safetensors"]) == 0
    assert read_state_dict(output).keys() == state.keys()
    assert main(["convert", str(output), str(tmp_path / "OUT.pth"), "--to", "torch", "--model", "dinov2_vitb14"]) == 1
    assert "do not fit this backbone" in capsys.readouterr().err


def test_what_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(model: DinoVisionTransformer, path: Path) -> None:
        torch.save(model.state_dict() | {"norm.bias": model.norm.bias + 0.01}, path)

    monkeypatch.setitem(FORMS, "torch", FORMS["torch"]._replace(write=write))
    output = tmp_path / "new" / "OUT.pth"
    assert main(["convert", written(tmp_path, small().state_dict()), str(output), "--to", "torch"]) == 1
    streams = capsys.readouterr()
    assert "largest difference 1.0e-02" in streams.out
    assert "not written: at 56 x 56 pixels torch computes something else" in streams.err
    assert not list(output.parent.iterdir())


def test_weights_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: value.clone() for name, value in small().state_dict().items()}
    state["blocks.1.norm1.bias"][5] = float("nan")
    source = written(tmp_path, state)
    assert main(["convert", source, str(tmp_path / "OUT.safetensors"), "--to", "safetensors"]) == 1
    message = f"error: weights in {source} are not finite (NaN or infinite): blocks.1.norm1.bias\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "OUT.safetensors").exists()


def test_one_of_several_networks_is_converted_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, average = small(), small(depth=3)
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, tmp_path / "weights.pth")
    source, output = str(tmp_path / "weights.pth"), str(tmp_path / "OUT.safetensors")
    assert main(["convert", source, output, "--to", "safetensors"]) == 1
    assert "holds several networks: model, model_ema; " in capsys.readouterr().err
    assert main(["inspect", source, "--checkpoint-key", "model"]) == 0
    assert "128, 2 blocks, 2 heads" in capsys.readouterr().out
    assert main(["convert", source, output, "--to", "safetensors", "--checkpoint-key", "model_ema"]) == 0
    assert read_state_dict(output).keys() == average.state_dict().keys()


def test_an_existing_output_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, small().state_dict())
    for name, form in (("OUT.pth", "torch"), ("OUT", "hf")):
        command = ["convert", source, str(tmp_path / name), "--to", form]
        assert [main(command), main(command), main([*command, "--force"])] == [0, 1, 0]
        assert f"{tmp_path / name} exists already" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "OUT.pth"), "--to", "hf", "--force"]) == 1
    assert "is a file: give another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("safetensors", "OUT.pth", "needs an OUTPUT that ends in .safetensors, not"),
        ("torch.export", "OUT.onnx", "needs an OUTPUT that ends in .pt2, not"),
        ("onnx", "OUT", "needs an OUTPUT that ends in .onnx, not"),
    ],
)
def test_a_suffix_that_readers_do_not_accept_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, name: str, message: str
) -> None:
    assert main(["convert", "anything", str(tmp_path / name), "--to", form]) == 1
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    source = written(tmp_path, small().state_dict())
    assert main(["convert", source, str(tmp_path / "OUT.onnx"), "--to", "onnx"]) == 1
    assert "writing ONNX needs a package that is missing: pip install onnxscript" in capsys.readouterr().err


def test_heads_alone_are_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, DINOHead(12, 20, hidden_dim=8, bottleneck_dim=4).state_dict())
    message = "no backbone: pos_embed, patch_embed.proj.weight, norm.weight missing"
    assert main(["inspect", path]) == 0
    assert f"network  not recognized: {message}" in without_padding(capsys.readouterr().out)
    assert main(["convert", path, str(tmp_path / "OUT.onnx"), "--to", "onnx"]) == 1
    assert f"{path}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "OUT.onnx").exists()


@pytest.mark.parametrize("form", ["hf", "timm"])
def test_unpublished_architectures(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    """Without LayerScale, another ratio, another patch size, gray images."""
    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 96, "depth": 2, "num_heads": 3}
    model = DinoVisionTransformer(**sizes, mlp_ratio=3.0, num_register_tokens=2)
    source = written(tmp_path, with_generic_weights(model).state_dict())
    command = ["convert", source, str(tmp_path / NAMES[form]), "--to", form, "--num-heads", "3"]
    assert main(command) == 0, capsys.readouterr().err
    assert "28 x 28 pixels: largest difference" in capsys.readouterr().out


def test_a_network_that_transformers_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path, small(mlp_ratio=3.3).state_dict())
    assert main(["convert", source, str(tmp_path / "OUT"), "--to", "hf"]) == 1
    assert "the MLP ratio of transformers is an integer, but this network has 3.297" in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()


@pytest.mark.slow
def test_onnx_of_a_large_network_is_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "_LARGEST_ONNX_BYTES", 100_000)
    output = tmp_path / "new" / "OUT.onnx"
    assert main(["convert", written(tmp_path, small().state_dict()), str(output), "--to", "onnx"]) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["OUT.onnx", "OUT.onnx.data"]
    assert output.stat().st_size < 1_000_000
    onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
