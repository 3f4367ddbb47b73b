"""Backbones by name."""

import argparse

import pytest
import torch
from torch import nn

from dinov2.models import ARCHS, build_model
from dinov2.models.vision_transformer import vit_base, vit_giant2, vit_large, vit_small

TINY = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 3}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def test_every_published_name_is_known() -> None:
    assert {"vit_small": vit_small, "vit_base": vit_base, "vit_large": vit_large, "vit_giant2": vit_giant2} == ARCHS


@pytest.mark.parametrize("arch", ARCHS)
def test_none_selects_the_default_of_the_name(arch: str) -> None:
    with torch.device("meta"):
        model = build_model(arch, embed_dim=None, depth=None, num_heads=None, mlp_ratio=None, init_values=None)
        assert shapes(model) == shapes(ARCHS[arch]())


def test_keywords_win_over_the_name() -> None:
    model = build_model("vit_large", **TINY, mlp_ratio=2.0, num_register_tokens=3)
    assert (model.embed_dim, model.n_blocks, model.num_heads, model.num_register_tokens) == (12, 1, 3, 3)
    assert model.blocks[0].mlp.fc1.weight.shape == (24, 12)


def test_the_published_suffix_is_ignored() -> None:
    assert shapes(build_model("vit_small_memeff", **TINY)) == shapes(build_model("vit_small", **TINY))


@pytest.mark.parametrize("arch", ["vit_tiny", "", "memeff", "vit_small_memeff_memeff"])
def test_an_unknown_name_lists_the_known_ones(arch: str) -> None:
    known = "vit_small, vit_base, vit_large, vit_giant2"
    with pytest.raises(ValueError, match=rf"unknown backbone '{arch}' \(student.arch of a config\); known: {known}"):
        build_model(arch)


def test_an_unknown_keyword_is_named() -> None:
    with pytest.raises(TypeError, match="'embed_dims'"):
        build_model("vit_small", embed_dims=12)


def test_a_configuration_in_place_of_a_name_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="takes the name of a backbone .* not Namespace; .* build_model_from_cfg"):
        build_model(argparse.Namespace(arch="vit_small"))  # type: ignore[arg-type]
