"""Backbones by name."""

from collections.abc import Callable
from typing import Any

from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small

ARCHS: dict[str, Callable[..., DinoVisionTransformer]] = {
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
    "vit_giant2": vit_giant2,
}


def build_model(arch: str, **kwargs: Any) -> DinoVisionTransformer:
    """Build a backbone of a name in `ARCHS`; a trailing `_memeff` is ignored, as in the published function.

    `kwargs` are arguments of `DinoVisionTransformer`, which override those of `arch` unless they are None.
    """
    if not isinstance(arch, str):
        raise ValueError(
            f"build_model takes the name of a backbone and its keywords, not {type(arch).__name__}; "
            "the networks of a configuration are built by build_model_from_cfg"
        )
    name = arch.removesuffix("_memeff")
    if name not in ARCHS:
        raise ValueError(f"unknown backbone {arch!r} (student.arch of a config); known: {', '.join(ARCHS)}")
    return ARCHS[name](**{key: value for key, value in kwargs.items() if value is not None})
