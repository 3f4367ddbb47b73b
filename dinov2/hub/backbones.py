"""The eight published backbones: ViT-S/B/L/g with patches of 14 pixels, without and with registers.

model = dinov2_vits14()                   # downloads the published weights
model = dinov2_vits14(pretrained=False)   # the same network with random weights
"""

import os
from enum import Enum
from typing import Any, TypeVar

from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_backbone

PUBLISHED_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2"

E = TypeVar("E", bound=Enum)


class Weights(Enum):
    """What the published backbones were trained on."""

    LVD142M = "LVD142M"


def dinov2_vits14(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-S/14, width 384. Keywords: see `make_backbone`."""
    return make_backbone("vit_small", **kwargs)


def dinov2_vitb14(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-B/14, width 768. Keywords: see `make_backbone`."""
    return make_backbone("vit_base", **kwargs)


def dinov2_vitl14(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-L/14, width 1024. Keywords: see `make_backbone`."""
    return make_backbone("vit_large", **kwargs)


def dinov2_vitg14(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-g/14, width 1536, SwiGLU. Keywords: see `make_backbone`."""
    return make_backbone("vit_giant2", **kwargs)


def dinov2_vits14_reg(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-S/14, width 384, four registers. Keywords: see `make_backbone`."""
    return make_backbone("vit_small", registers=True, **kwargs)


def dinov2_vitb14_reg(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-B/14, width 768, four registers. Keywords: see `make_backbone`."""
    return make_backbone("vit_base", registers=True, **kwargs)


def dinov2_vitl14_reg(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-L/14, width 1024, four registers. Keywords: see `make_backbone`."""
    return make_backbone("vit_large", registers=True, **kwargs)


def dinov2_vitg14_reg(**kwargs: Any) -> DinoVisionTransformer:
    """ViT-g/14, width 1536, SwiGLU, four registers. Keywords: see `make_backbone`."""
    return make_backbone("vit_giant2", registers=True, **kwargs)


def make_backbone(
    arch: str,
    *,
    registers: bool = False,
    pretrained: bool = True,
    weights: Weights | str = Weights.LVD142M,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Build one of the published backbones, on the CPU and in training mode.

    Args:
        arch: a key of `dinov2.models.ARCHS`.
        registers: whether it is the variant with four registers.
        pretrained: whether to load the published weights, all of them or none.
        weights: which weights (there is one choice).
        kwargs: for the vision transformer; they win over the published settings.

    Raises:
        ValueError: if there are no such weights, or they do not fit the settings.
    """
    weights = as_member(Weights, weights)
    published = {
        "img_size": 518,
        "patch_size": 14,
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if arch == "vit_giant2" else "mlp",
        "num_register_tokens": 4 if registers else 0,
        "interpolate_antialias": registers,
        "interpolate_offset": 0.0 if registers else 0.1,
    }
    model = build_model(arch, **{**published, **kwargs})
    if pretrained:
        load_backbone(model, weights_url(arch, "pretrain", registers=registers))
    return model


def weights_url(arch: str, content: str, *, registers: bool) -> str:
    """Where published weights are; `content` is `pretrain`, `linear_head` or `linear4_head`.

    The environment variable DINOV2_WEIGHTS_URL replaces the server: the URL of a mirror, or a folder.
    """
    base = os.environ.get("DINOV2_WEIGHTS_URL", PUBLISHED_WEIGHTS_URL).rstrip("/")
    folder = f"dinov2_{arch.replace('_', '')[:4]}14"
    return f"{base}/{folder}/{folder}{'_reg4' if registers else ''}_{content}.pth"


def as_member(choices: type[E], value: E | str) -> E:
    """The member of an enumeration that is given itself or by its name."""
    if isinstance(value, choices):
        return value
    if str(value) not in choices.__members__:
        raise ValueError(f"unknown weights {value!r}; known: {', '.join(choices.__members__)}")
    return choices[str(value)]
