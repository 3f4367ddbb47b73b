"""Backbones by name: the published ones with settings and URLs of their weights, and those in the package."""

import os
import re
from pathlib import Path
from typing import Any

PUBLISHED_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2"
WEIGHTS_URL_VARIABLE = "DINOV2_WEIGHTS_URL"
"""Environment variable that replaces the server by the URL of a mirror, or by a folder."""

_ARCHS = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}

_ARCH_OF_FACTS = {
    (14, 384, 12): "vit_small",
    (14, 768, 12): "vit_base",
    (14, 1024, 24): "vit_large",
    (14, 1536, 40): "vit_giant2",
}
"""{(patch side in pixels, width, number of blocks): architecture of a published backbone}."""

PUBLISHED: dict[str, tuple[str, bool]] = {
    f"dinov2_vit{letter}14{suffix}": (arch, suffix == "_reg")
    for suffix in ("", "_reg")
    for letter, arch in _ARCHS.items()
}
"""{name of a published backbone: (architecture, whether it has registers)}."""

PACKAGED = {"dinov2_fashion": "train/quickstart"}
"""{name of a backbone whose weights are in this package: name of the configuration that has its settings}."""


def published_arch(backbone: Any) -> str | None:
    """The architecture of a published network that a `DinoVisionTransformer` has, with or without registers; or None.

    Patches, width and depth are compared.
    """
    facts = (backbone.patch_size, backbone.embed_dim, backbone.n_blocks)
    return _ARCH_OF_FACTS.get(facts)


def published_settings(arch: str, *, registers: bool) -> dict[str, Any]:
    """Arguments of `dinov2.models.build_model(arch, ...)` for the published network."""
    return {
        "img_size": 518,
        "patch_size": 14,
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if arch == "vit_giant2" else "mlp",
        "num_register_tokens": 4 if registers else 0,
        **position_settings(registers=registers),
    }


def position_settings(*, registers: bool) -> dict[str, Any]:
    """Arguments for resampling positions as the published networks do; tensors do not determine them."""
    return {"interpolate_antialias": registers, "interpolate_offset": 0.0 if registers else 0.1}


def weights_url_or_path(source: str) -> str:
    """The URL or path of the weights of a name in `PUBLISHED` or `PACKAGED`; any other source as it is."""
    if source in PACKAGED:
        return str(Path(__file__).parent / "embedded" / f"{source}.pth")
    if source not in PUBLISHED:
        return source
    arch, registers = PUBLISHED[source]
    return weights_url(arch, "pretrain", registers=registers)


def weights_url(arch: str, content: str, *, registers: bool) -> str:
    """URL or path of published weights.

    `content` is `pretrain`, `linear_head` or `linear4_head` (classifiers), `nyu_linear_head`, `nyu_linear4_head` or
    `nyu_dpt_head` (depth; also `kitti`), `ade20k_linear_head` or `ade20k_ms_head` (segmentation; also `voc2012`).
    """
    base = os.environ.get(WEIGHTS_URL_VARIABLE, PUBLISHED_WEIGHTS_URL).rstrip("/")
    folder = f"dinov2_{arch.replace('_', '')[:4]}14"
    return f"{base}/{folder}/{folder}{'_reg4' if registers else ''}_{content}.pth"


def check_name(source: str | Path, arch: str) -> None:
    """Raise a ValueError if a path or URL has the name of a published file of another backbone than `arch`.

    Shapes do not always tell: a head for four layers of ViT-S/14 fits one layer of ViT-g/14.
    """
    match = re.match(r"(dinov2_vit([sblg])14)(_|\.)", Path(source).name)
    if match and _ARCHS[match[2]] != arch:
        raise ValueError(f"{source} is named as a file of {match[1]}, but the backbone is {arch}")
