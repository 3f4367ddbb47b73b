"""Infer the architecture of a vision transformer from the names and shapes in its state dict."""

import math
from typing import Any

import torch
from torch import Tensor

from dinov2.models import build_model
from dinov2.models.published import PUBLISHED, position_settings, published_settings

HEAD_DIM = 64  # channels per attention head in all published models, which tensors do not determine


def infer_arguments(state: dict[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """Infer the arguments of `DinoVisionTransformer` from the state dict of a backbone with the published names.

    Tensors determine neither the number of heads, by default of 64 channels each, nor how positions are resampled: as
    in the published models with the same use of registers. A ValueError if it is not that of a whole backbone.
    """
    missing = [name for name in ("pos_embed", "patch_embed.proj.weight", "norm.weight") if name not in state]
    if missing:
        raise ValueError(f"no backbone: {', '.join(missing)} missing; there are: {', '.join(list(state)[:8])}")
    table, projection = state["pos_embed"], state["patch_embed.proj.weight"]
    width, patch_size = projection.shape[0], projection.shape[-1]
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        raise ValueError(f"pos_embed {tuple(table.shape)} is not of a square grid of patches")
    if num_heads is None and width % HEAD_DIM:
        raise ValueError(f"width {width} is not a multiple of {HEAD_DIM} channels per head: give the number of heads")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": projection.shape[1],
        "embed_dim": width,
        "depth": 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1),
        "num_heads": num_heads or width // HEAD_DIM,
        **_feed_forward(state, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "num_register_tokens": registers,
        **position_settings(registers=registers > 0),
    }


def _feed_forward(state: dict[str, Tensor], width: int) -> dict[str, Any]:
    for kind, first, second in (("mlp", "fc1", "fc2"), ("swiglufused", "w12", "w3")):
        if (weight := state.get(f"blocks.0.mlp.{second}.weight")) is not None:
            hidden = weight.shape[1]
            if kind == "swiglufused":  # two thirds of what the ratio gives, rounded up to a multiple of 8
                usual = (4 * width * 2 // 3 + 7) // 8 * 8
                hidden = 4 * width if hidden == usual else hidden * 3 // 2
            bias = f"blocks.0.mlp.{first}.bias" in state
            return {"ffn_layer": kind, "mlp_ratio": exact_ratio(hidden, width), "ffn_bias": bias}
    return {"ffn_layer": "identity", "mlp_ratio": 4.0, "ffn_bias": True}


def exact_ratio(hidden: int, width: int) -> float:
    """The ratio for which `int(width * ratio) == hidden` holds despite rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def published_name(state: dict[str, Tensor]) -> str | None:
    """The name of the published backbone with the same parameter names and shapes; None if there is none."""
    shapes = {name: value.shape for name, value in state.items()}
    for name, (arch, registers) in PUBLISHED.items():
        if registers == ("register_tokens" in state):
            with torch.device("meta"):
                model = build_model(arch, **published_settings(arch, registers=registers))
            if {key: value.shape for key, value in model.state_dict().items()} == shapes:
                return name
    return None
