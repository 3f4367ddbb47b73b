"""Backbones from weights alone: a published name, a file, a folder or a URL; their architecture is inferred."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from dinov2.models import build_model
from dinov2.models.infer_architecture import infer_arguments, published_name
from dinov2.models.key_mapping import StateDict
from dinov2.models.published import PUBLISHED, published_settings
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import backbone_state_dict, load_state, read_state_dict

logger = logging.getLogger(__name__)


def num_heads_beside(source: str) -> int | None:
    """The number of attention heads in the `config.json` of a folder of transformers; None if there is none."""
    config = Path(source) / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("num_attention_heads") if config.is_file() else None


def unstored_settings(**arguments: Any) -> dict[str, Any]:
    """Settings of a backbone that its tensors do not determine, from arguments of `build_model`.

    These are `num_heads`, and how positions are resampled.
    """
    with torch.device("meta"):
        model = build_model(**arguments)
    return {name: getattr(model, name) for name in ("num_heads", "interpolate_antialias", "interpolate_offset")}


def build_published(name: str, num_heads: int | None = None) -> DinoVisionTransformer:
    """Build the published backbone of a name in `PUBLISHED` with random weights; by default with its `num_heads`."""
    arch, registers = PUBLISHED[name]
    return build_model(arch, **published_settings(arch, registers=registers), num_heads=num_heads)


def load_from_weights(
    source: str,
    *,
    name: str | None = None,
    num_heads: int | None = None,
    checkpoint_key: str = "teacher",
    **settings: Any,
) -> DinoVisionTransformer:
    """Build a frozen backbone in evaluation mode and load its weights, on the CPU; errors as `load_backbone`.

    Args:
        source: A published name, a file, a folder of transformers or a URL.
        name: Name of the published architecture; None for that of a published `source`, or else to infer it.
        num_heads: Number of attention heads, which tensors do not determine; None for that in a `config.json` in the
            folder, or of 64 channels each, with a warning if the network is not a published one.
        checkpoint_key: The network to use if the source holds several.
        settings: Others of its `unstored_settings`, if they are known.
    """
    num_heads = num_heads or num_heads_beside(source)
    name = name or (source if source in PUBLISHED else None)
    state = backbone_state_dict(read_state_dict(source, checkpoint_key), checkpoint_key, source)
    model = backbone_from_state(state, source, name=name, num_heads=num_heads, **settings)
    if num_heads is None and name is None and published_name(state) is None:
        logger.warning(
            "%s does not state its number of attention heads: 64 channels each are assumed, %d heads; if it has "
            "another number, give it (--num-heads), or its features are wrong",
            source,
            model.num_heads,
        )
    return model


def backbone_from_state(
    state: StateDict, source: str, *, name: str | None = None, num_heads: int | None = None, **settings: Any
) -> DinoVisionTransformer:
    """Build a frozen backbone in evaluation mode from a state dict with the published names, or raise a ValueError.

    `source` is its origin, for messages; `name` and `num_heads` as in `load_from_weights`. `settings` are further
    arguments of `DinoVisionTransformer` instead of the inferred ones, unused with a `name`.
    """
    try:
        arguments = {} if name else infer_arguments(state, num_heads) | settings
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with torch.device("meta"):  # a second copy of a large model may not fit into memory
        model = build_published(name, num_heads) if name else DinoVisionTransformer(**arguments)
    return load_state(model, state, source, assign=True).eval().requires_grad_(False)
