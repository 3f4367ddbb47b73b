"""The models published with the paper: their names, their settings, and where their weights are."""

import os
from typing import Any

PUBLISHED_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2"
WEIGHTS_URL_VARIABLE = "DINOV2_WEIGHTS_URL"
"""The environment variable that replaces the server: the URL of a mirror, or a folder."""

_ARCHS = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}

PUBLISHED: dict[str, tuple[str, bool]] = {
    f"dinov2_vit{letter}14{suffix}": (arch, suffix == "_reg")
    for suffix in ("", "_reg")
    for letter, arch in _ARCHS.items()
}
"""Name of each published backbone -> its architecture, and whether it has registers."""


def published_settings(arch: str, *, registers: bool) -> dict[str, Any]:
    """Arguments for `dinov2.models.build_model(arch, ...)` that make the published network."""
    return {
        "img_size": 518,
        "patch_size": 14,
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if arch == "vit_giant2" else "mlp",
        "num_register_tokens": 4 if registers else 0,
        **position_settings(registers=registers),
    }


def position_settings(*, registers: bool) -> dict[str, Any]:
    """How the published networks resample positions, which their tensors do not tell."""
    return {"interpolate_antialias": registers, "interpolate_offset": 0.0 if registers else 0.1}


def weights_url(arch: str, content: str, *, registers: bool) -> str:
    """Where published weights are; `content` is `pretrain`, `linear_head` or `linear4_head`."""
    base = os.environ.get(WEIGHTS_URL_VARIABLE, PUBLISHED_WEIGHTS_URL).rstrip("/")
    folder = f"dinov2_{arch.replace('_', '')[:4]}14"
    return f"{base}/{folder}/{folder}{'_reg4' if registers else ''}_{content}.pth"
