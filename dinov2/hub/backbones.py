"""The eight published backbones: ViT-S/B/L/g with patches of 14 pixels, without and with registers.

model = dinov2_vits14()                   # downloads the published weights
model = dinov2_vits14(pretrained=False)   # the same architecture with random weights
model = dinov2_vits14(weights="mine.pth")  # other weights; also a URL, or a folder of transformers
"""

from enum import Enum
from pathlib import Path
from typing import Any

from dinov2.models import build_model
from dinov2.models.published import published_settings, weights_url
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_backbone


class Weights(Enum):
    """Training data of the published backbones."""

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
    weights: Weights | str | Path = Weights.LVD142M,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Build one of the published backbones, on the CPU and in training mode, by default with all weights.

    Args:
        arch: A key of `dinov2.models.ARCHS`.
        registers: Whether it is the variant with four registers.
        weights: Published weights (there is one choice), or a file, folder or URL of others.
        kwargs: Arguments of `DinoVisionTransformer`, which override the published settings.
    """
    published = weights_url(arch, "pretrain", registers=registers)
    source = weights_source(Weights, weights, published)
    if not pretrained and source != published:
        raise ValueError(f"weights={str(weights)!r} are not loaded with pretrained=False: leave that out")
    model = build_model(arch, **{**published_settings(arch, registers=registers), **kwargs})
    return load_backbone(model, source) if pretrained else model


def weights_source(choices: type[Enum], weights: Enum | str | Path, published: str) -> str | Path:
    """The path or URL of `weights`: a member of the enumeration of `published` ones or its name, or a path or URL."""
    if isinstance(weights, choices) or weights in choices.__members__:
        return published
    if isinstance(weights, Path) or (isinstance(weights, str) and (Path(weights).suffix or Path(weights).exists())):
        return weights
    known = ", ".join(choices.__members__)
    raise ValueError(f"unknown weights {weights!r}; known: {known}, or the path or URL of a file")
