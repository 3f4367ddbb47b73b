"""Names that code imports from the published package: each exists, or its error names the replacement."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2 import config
from dinov2.layers import Mlp
from dinov2.published_names import TABLE, install

ROOT = Path(__file__).resolve().parents[1]

NAMES = [(module, name, entry) for module, names in TABLE.items() for name, entry in names.items() if name]
HERE = [(module, name, entry) for module, name, entry in NAMES if ":" in entry and " " not in entry]
ELSEWHERE = [item for item in NAMES if item not in HERE]


def imported(module: str, name: str) -> object:
    """What `from module import name` gives."""
    scope: dict[str, object] = {}
    exec(f"from {module} import {name}", scope)
    return scope[name]


@pytest.mark.parametrize(("module", "name", "entry"), HERE, ids=lambda text: text)
def test_a_name_is_the_object_in_the_table(module: str, name: str, entry: str) -> None:
    home, _, attribute = entry.partition(":")
    assert imported(module, name) is getattr(importlib.import_module(home), attribute)
    assert getattr(importlib.import_module(module), name) is imported(module, name)


@pytest.mark.parametrize(("module", "name", "entry"), ELSEWHERE, ids=lambda text: text)
def test_the_error_for_a_missing_name_names_its_replacement(module: str, name: str, entry: str) -> None:
    with pytest.raises(ImportError, match=f"^there is no {module}.{name} here: ") as caught:
        imported(module, name)
    assert entry in str(caught.value)


@pytest.mark.parametrize("module", [module for module, names in TABLE.items() if "" in names])
def test_the_error_for_a_missing_module_has_the_reason(module: str) -> None:
    for name in (module, f"{module}.models"):
        with pytest.raises(ModuleNotFoundError, match=f"^there is no {module} here: {TABLE[module]['']}"):
            importlib.import_module(name)


@pytest.mark.parametrize("place", sorted({entry for _, _, entry in ELSEWHERE}))
def test_what_a_message_names_exists(place: str) -> None:
    for word in place.replace(",", " ").replace("(", " ").split():
        if word.startswith("dinov2."):
            parts = word.split(".")
            try:
                importlib.import_module(word)
            except ImportError:
                assert hasattr(importlib.import_module(".".join(parts[:-1])), parts[-1]), word


def test_unpublished_names_are_missing() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Attention' from 'dinov2.layers.mlp'"):
        imported("dinov2.layers.mlp", "Attention")
    with pytest.raises(ModuleNotFoundError, match="No module named 'dinov2.layers.mlps'"):
        importlib.import_module("dinov2.layers.mlps")
    assert not hasattr(importlib.import_module("dinov2.models"), "build_models")


def test_a_module_is_found_once() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


@pytest.mark.parametrize("only_teacher", [False, True])
def test_networks_are_built_from_a_configuration(only_teacher: bool) -> None:
    build_model_from_cfg = importlib.import_module("dinov2.models").build_model_from_cfg
    cfg = config.load(overrides=["student.arch=vit_small", "student.depth=2", "student.drop_path_rate=0.2"])
    for given in (cfg, config.to_dict(cfg), OmegaConf.create(config.to_dict(cfg))):
        *networks, width = build_model_from_cfg(given, only_teacher=only_teacher)
        assert width == 384
        assert [network.blocks[1].sample_drop_ratio for network in networks] == ([0.0] if only_teacher else [0.2, 0.0])


def test_what_is_made_here_does_what_the_published_did(tmp_path: Path) -> None:
    published = importlib.import_module("dinov2.utils.utils")
    published.fix_random_seeds(7)
    first = torch.rand(2)
    published.fix_random_seeds(7)
    assert torch.equal(torch.rand(2), first)
    assert published.has_batchnorms(torch.nn.Sequential(torch.nn.BatchNorm1d(2))) and not published.has_batchnorms(
        Mlp(2)
    )
    source, model = (importlib.import_module("dinov2.models").build_model("vit_small", depth=1) for _ in range(2))
    torch.save({"teacher": source.state_dict()}, tmp_path / "teacher.pth")
    published.load_pretrained_weights(model, str(tmp_path / "teacher.pth"), "teacher")
    assert torch.equal(model.pos_embed, source.pos_embed)

    as_torch_dtype = importlib.import_module("dinov2.utils.dtype").as_torch_dtype
    assert [as_torch_dtype(name) for name in ("fp16", "bfloat16", torch.float32)] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    with pytest.raises(ValueError, match="unknown dtype 'half-ish'; known: fp32, fp16, bf16"):
        as_torch_dtype("half-ish")
    cfg = config.load()
    path = importlib.import_module("dinov2.utils.config").write_config(cfg, str(tmp_path))
    assert path == str(tmp_path / "config.yaml") and config.load(path) == cfg


@pytest.mark.parametrize("module", ["hubconf", "dinov2", "dinov2.hub.backbones"])
def test_an_old_python_is_rejected_with_a_clear_error(module: str) -> None:
    program = f"import sys; sys.version_info = (3, 9, 18, 'final', 0); import {module}"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr.splitlines()[-1] == "ImportError: DINOv2 needs Python 3.11 or newer, this is 3.9"
