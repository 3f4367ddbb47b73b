"""Backbones from their weights alone: a published name, a file, a folder or a URL; the tensors tell the network."""

import json
from pathlib import Path

from dinov2.models import build_model
from dinov2.models.infer_architecture import find_arguments
from dinov2.models.key_mapping import StateDict
from dinov2.models.published import PUBLISHED, published_settings, weights_url
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import backbone_state_dict, load_state, read_state_dict


def read_weights(source: str, checkpoint_key: str = "teacher") -> tuple[str, StateDict]:
    """Where the weights of a published name, a file, folder or URL are, and the tensors there.

    Raises:
        FileNotFoundError: there are none.
        ConnectionError: they cannot be downloaded.
        ValueError: they cannot be read.
    """
    if source in PUBLISHED:
        arch, registers = PUBLISHED[source]
        source = weights_url(arch, "pretrain", registers=registers)
    return source, read_state_dict(source, checkpoint_key)


def num_heads_beside(source: str) -> int | None:
    """How many attention heads the configuration of transformers says that lies in a folder of weights, if one does."""
    config = Path(source) / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("num_attention_heads") if config.is_file() else None


def build_published(name: str, num_heads: int | None = None) -> DinoVisionTransformer:
    """The published backbone of a name, with random weights."""
    arch, registers = PUBLISHED[name]
    return build_model(arch, **published_settings(arch, registers=registers), num_heads=num_heads)


def load_from_weights(
    source: str, *, name: str | None = None, num_heads: int | None = None, checkpoint_key: str = "teacher"
) -> DinoVisionTransformer:
    """A frozen backbone with its weights, on the CPU.

    Args:
        source: a published name, a file, a folder of transformers or a URL.
        name: the published backbone that it is; None: the one that is its source, or what the tensors tell.
        num_heads: attention heads, which tensors do not tell; None: as a configuration of transformers in the folder
            says, or 64 channels per head.
        checkpoint_key: which network, if the source holds several.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: there are no such weights, or they fit no backbone.
    """
    num_heads = num_heads or num_heads_beside(source)
    name = name or (source if source in PUBLISHED else None)
    source, tensors = read_weights(source, checkpoint_key)
    state = backbone_state_dict(tensors, checkpoint_key, source)
    if name:
        model = build_published(name, num_heads)
    else:
        try:
            model = DinoVisionTransformer(**find_arguments(state, num_heads))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return load_state(model, state, source).eval().requires_grad_(False)
