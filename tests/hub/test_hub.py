"""torch.hub: every published name builds the published network, with torch alone, and loads weights strictly."""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.hub import backbones, classifiers
from dinov2.hub.backbones import weights_url

ROOT = Path(__file__).resolve().parents[2]

NUM_PARAMETERS = {  # published backbones, 518 pixels, patches of 14
    "dinov2_vits14": 22_056_576,
    "dinov2_vitb14": 86_580_480,
    "dinov2_vitl14": 304_368_640,
    "dinov2_vitg14": 1_136_480_768,
    "dinov2_vits14_reg": 22_058_112,
    "dinov2_vitb14_reg": 86_583_552,
    "dinov2_vitl14_reg": 304_372_736,
    "dinov2_vitg14_reg": 1_136_486_912,
}
HEAD_INPUTS = {"s": (768, 1920), "b": (1536, 3840), "l": (2048, 5120), "g": (3072, 7680)}
TINY = {"depth": 4, "embed_dim": 16, "num_heads": 2, "img_size": 28}  # keywords win over the published settings


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Same names, same values."""
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[key], value), key


def hub_load(name: str, **kwargs: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_backbones_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):  # shapes without memory
        model = hub_load(name, pretrained=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]
    assert model.pos_embed.shape[1] == 1 + 37 * 37
    registers = name.endswith("_reg")
    assert model.num_register_tokens == (4 if registers else 0)
    assert (model.interpolate_antialias, model.interpolate_offset) == ((True, 0.0) if registers else (False, 0.1))
    assert model.training


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("suffix", ["_lc", "_reg_lc"])
@pytest.mark.parametrize("size", "sblg")
def test_classifiers_have_the_published_heads(size: str, suffix: str, layers: int) -> None:
    with torch.device("meta"):
        model = hub_load(f"dinov2_vit{size}14{suffix}", pretrained=False, layers=layers)
    assert model.linear_head.weight.shape == (1000, HEAD_INPUTS[size][0 if layers == 1 else 1])
    assert {name for name, _ in model.named_children()} == {"backbone", "linear_head"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_vits14_lc", "dinov2_vits14_reg_lc"])
def test_classifier_input_is_class_tokens_then_mean_patch(name: str) -> None:
    images = torch.randn(3, 3, 28, 42)
    for layers in (1, 4):
        model = hub_load(name, pretrained=False, layers=layers, **TINY).eval()
        features = model.backbone.forward_features(images)
        parts: list[Tensor] = [features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(1)]
        if layers == 4:
            blocks = model.backbone.get_intermediate_layers(images, n=[0, 1, 2], return_class_token=True)
            parts = [class_token for _, class_token in blocks] + parts
        expected = torch.cat(parts, dim=1) @ model.linear_head.weight.T + model.linear_head.bias
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_urls_follow_the_published_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOV2_WEIGHTS_URL", raising=False)
    base = "https://dl.fbaipublicfiles.com/dinov2"
    assert weights_url("vit_small", "pretrain", registers=False) == f"{base}/dinov2_vits14/dinov2_vits14_pretrain.pth"
    assert (
        weights_url("vit_giant2", "linear4_head", registers=True)
        == f"{base}/dinov2_vitg14/dinov2_vitg14_reg4_linear4_head.pth"
    )


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("layers", [1, 4])
def test_pretrained_loads_what_the_mirror_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, registers: bool
) -> None:
    name = f"dinov2_vits14{'_reg' if registers else ''}"
    source = hub_load(f"{name}_lc", pretrained=False, layers=layers, **TINY)
    stem = tmp_path / "dinov2_vits14" / f"dinov2_vits14{'_reg4' if registers else ''}"
    stem.parent.mkdir()
    torch.save(source.backbone.state_dict(), f"{stem}_pretrain.pth")
    torch.save(source.linear_head.state_dict(), f"{stem}_linear{'' if layers == 1 else 4}_head.pth")
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path))

    loaded = hub_load(f"{name}_lc", layers=layers, weights="IMAGENET1K", **TINY)
    assert_same(loaded, source)
    backbone = hub_load(name, weights=backbones.Weights.LVD142M, **TINY)
    assert torch.equal(backbone.cls_token, source.backbone.cls_token)


def test_weights_that_do_not_fit_load_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = hub_load("dinov2_vits14", pretrained=False, **TINY).state_dict()
    state.pop("blocks.3.ls1.gamma")
    (tmp_path / "dinov2_vits14").mkdir()
    torch.save(state, tmp_path / "dinov2_vits14" / "dinov2_vits14_pretrain.pth")
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path))
    with pytest.raises(ValueError, match=r"blocks\.3\.ls1\.gamma"):
        backbones.dinov2_vits14(**TINY)


def test_wrong_choices_are_named_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="unknown weights 'IMAGENET22K'; known: LVD142M, or the path or URL"):
        backbones.dinov2_vits14(weights="IMAGENET22K")
    with pytest.raises(ValueError, match="unknown weights 'LVD142M'; known: IMAGENET1K"):
        classifiers.dinov2_vits14_lc(weights="LVD142M", **TINY)
    with pytest.raises(ValueError, match="layers must be 1 or 4, not 2"):
        classifiers.dinov2_vits14_lc(layers=2, pretrained=False, **TINY)


# --- Weights of one's own --------------------------------------------------------------------------------------------


def test_weights_may_be_a_file_or_its_url(tmp_path: Path) -> None:
    source = hub_load("dinov2_vits14_reg", pretrained=False, **TINY)
    path = tmp_path / "my weights.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in source.state_dict().items()}}, path)
    for weights in (path, str(path), path.as_uri()):
        assert_same(hub_load("dinov2_vits14_reg", weights=weights, **TINY), source)
    with pytest.raises(FileNotFoundError, match="no weights at absent.pth"):
        hub_load("dinov2_vits14", weights="absent.pth", **TINY)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_whole_classifier_of_ones_own_is_taken(tmp_path: Path, layers: int) -> None:
    source = hub_load("dinov2_vits14_lc", pretrained=False, layers=layers, **TINY)
    torch.save(source.state_dict(), tmp_path / "classifier.pth")
    loaded = hub_load("dinov2_vits14_lc", layers=layers, weights=tmp_path / "classifier.pth", **TINY)
    assert_same(loaded, source)


def test_a_linear_layer_of_another_number_of_blocks_is_refused(tmp_path: Path) -> None:
    source = hub_load("dinov2_vits14_lc", pretrained=False, layers=1, **TINY)
    torch.save(source.state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(ValueError, match=r"classifier.pth do not fit this classifier: [^$]*\[1000, 32\]"):
        hub_load("dinov2_vits14_lc", layers=4, weights=tmp_path / "classifier.pth", **TINY)


def test_other_channels_are_adapted_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four channels of which the last is the first again; the projection of one is the sum of the three."""
    source = hub_load("dinov2_vits14", pretrained=False, **TINY)
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    gray = hub_load("dinov2_vits14", weights=tmp_path / "rgb.pth", in_chans=1, **TINY).eval()
    assert "have 3 channels, this model's have 1" in caplog.text
    images = torch.randn(2, 1, 28, 42)
    torch.testing.assert_close(gray(images), source.eval()(images.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)


# --- torch alone, as torch.hub has it --------------------------------------------------------------------------------

# The packages that `pip install torch` brings are allowed, and nothing else that happens to be installed here.
ONLY_TORCH = """
import importlib.abc, importlib.metadata, re, sys

def with_requirements(name, seen):
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in seen:
        return seen
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return seen
    seen.add(name)
    for requirement in requirements:
        if "extra ==" not in requirement:
            with_requirements(re.match(r"[\\w.-]+", requirement)[0], seen)
    return seen

allowed = with_requirements("torch", set())
owners = importlib.metadata.packages_distributions()
blocked = {
    module for module, distributions in owners.items()
    if not any(re.sub(r"[-_.]+", "-", d).lower() in allowed for d in distributions)
} - {"dinov2", "hubconf"}
assert {"torchvision", "yaml", "numpy"} <= blocked, "the test would prove nothing"

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
import torch

repository, weights = sys.argv[1:]
tiny = {"depth": 4, "embed_dim": 16, "num_heads": 2, "img_size": 28}
images = torch.zeros(2, 3, 28, 42)
torch.manual_seed(0)
for name in ("dinov2_vits14", "dinov2_vits14_reg"):
    for layers in (1, 4):
        options = {"layers": layers, **tiny}
        source = torch.hub.load(repository, f"{name}_lc", source="local", pretrained=False, **options).eval()
        stem = f"{weights}/dinov2_vits14/{name.replace('reg', 'reg4')}"
        torch.save(source.backbone.state_dict(), f"{stem}_pretrain.pth")
        torch.save(source.linear_head.state_dict(), f"{stem}_linear{'' if layers == 1 else 4}_head.pth")
        loaded = torch.hub.load(repository, f"{name}_lc", source="local", weights="IMAGENET1K", **options).eval()
        backbone = torch.hub.load(repository, name, source="local", **tiny).eval()
        with torch.no_grad():
            assert loaded(images).shape == (2, 1000) and torch.equal(loaded(images), source(images))
            assert torch.equal(backbone(images), source.backbone(images))
for entry, options, content in (
    ("ld", {"layers": 1}, "nyu_linear"), ("dd", {"weights": "KITTI"}, "kitti_dpt"), ("seg", {"head": "ms"}, "ade20k_ms")
):
    options = {**options, **tiny}
    source = torch.hub.load(repository, f"dinov2_vits14_{entry}", source="local", pretrained=False, **options)
    stem = f"{weights}/dinov2_vits14/dinov2_vits14"
    torch.save(source.backbone.state_dict(), f"{stem}_pretrain.pth")
    head = {f"decode_head.{name}": value for name, value in source.decode_head.state_dict().items()}
    torch.save({"state_dict": head}, f"{stem}_{content}_head.pth")
    loaded = torch.hub.load(repository, f"dinov2_vits14_{entry}", source="local", **options)
    with torch.no_grad():
        assert loaded(images).shape[2:] == (28, 42) and torch.equal(loaded(images), source(images))
fashion = torch.hub.load(repository, "dinov2_fashion", source="local").eval()  # weights of the repository
with torch.no_grad():
    assert fashion(images).shape == (2, 128)
import dinov2
assert dinov2.__file__.startswith(repository), dinov2.__file__
"""


def zip_as_published(target: Path) -> None:
    """The files of the repository as a server of git packs them: in one folder, links as files with their target."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            path = ROOT / name
            if path.is_symlink():
                archive.writestr(f"dinov2-main/{name}", os.readlink(path))
            elif path.is_file():
                archive.write(path, f"dinov2-main/{name}")


def test_hub_needs_nothing_but_torch_and_works_from_a_zip(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository with the list of files")
    zip_as_published(tmp_path / "main.zip")
    with zipfile.ZipFile(tmp_path / "main.zip") as archive:
        archive.extractall(tmp_path / "hub")
    (tmp_path / "weights" / "dinov2_vits14").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    repository, weights = str(tmp_path / "hub" / "dinov2-main"), str(tmp_path / "weights")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ONLY_TORCH), repository, weights],
        cwd=tmp_path,
        env=environment | {"DINOV2_WEIGHTS_URL": weights},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
