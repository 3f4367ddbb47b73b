"""The published models: names, settings, and URLs of their weights."""

import os
from typing import Any

PUBLISHED_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2"
WEIGHTS_URL_VARIABLE = "DINOV2_WEIGHTS_URL"
"""Environment variable that replaces the server by the URL of a mirror, or by a folder."""

_ARCHS = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}

PUBLISHED: dict[str, tuple[str, bool]] = {
    f"dinov2_vit{letter}14{suffix}": (arch, suffix == "_reg")
    for suffix in ("", "_reg")
    for letter, arch in _ARCHS.items()
}
"""{name of a published backbone: (architecture, whether it has registers)}."""


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


def weights_url(arch: str, content: str, *, registers: bool) -> str:
    """URL or path of published weights; `content` is `pretrain`, `linear_head` or `linear4_head`."""
    base = os.environ.get(WEIGHTS_URL_VARIABLE, PUBLISHED_WEIGHTS_URL).rstrip("/")
    folder = f"dinov2_{arch.replace('_', '')[:4]}14"
    return f"{base}/{folder}/{folder}{'_reg4' if registers else ''}_{content}.pth"
