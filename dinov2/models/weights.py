"""Read weights of any supported format, and load them strictly into a backbone.

Sources are files of `torch.save` and safetensors, URLs, and folders: of transformers, or of a run's teacher
(`OUT/eval/best`). They hold a flat state dict (the released backbones), `{"teacher": {...}}` (teachers exported by a
run, keys `backbone.`...), `{"model": {...}}` (published training checkpoints, `student.backbone.` or
`teacher.backbone.`), or nested and wrapped forms of these by other trainers (`models.networks`); with the names of the
release, of transformers or of timm; blocks flat (`blocks.7.`) or chunked (`blocks.1.7.`).
"""

import logging
import runpy
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from dinov2.models.carry_over import fit_state
from dinov2.models.key_mapping import StateDict, chunk_block_names, flatten_block_names, key_format, to_published
from dinov2.models.networks import choose, find_state_dict, prefixes, without_wrappers
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weight_files import TEACHER_FILE, files_in, read_file

__all__ = [
    "TEACHER_FILE",
    "chunk_block_names",
    "files_in",
    "flatten_block_names",
    "load_backbone",
    "read_file",
    "read_state_dict",
]

logger = logging.getLogger(__name__)

_HEADS = ("head.", "linear_head.", "dino_head.", "ibot_head.")  # beside a backbone without prefix


def read_state_dict(path_or_url: str | Path, checkpoint_key: str = "teacher") -> StateDict:
    """Read the tensors of a checkpoint by name, on the CPU, with the published names and flat block names.

    Args:
        path_or_url: See `read_file`. The state dict may be nested in others, and have the prefixes of any wrapper.
        checkpoint_key: The network to use if there are several (`teacher`, `model_ema`, ...); see `networks.choose`.
    """
    content, source = read_file(path_or_url), str(path_or_url)
    state = find_state_dict(content, checkpoint_key, source)
    if state is None:  # a head, or an incomplete backbone
        for key in (checkpoint_key, "teacher", "model", "state_dict", "student"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
                break
        if not _is_state_dict(content):
            held = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{source} holds no state dict of tensors; it holds: {held}")
        state = without_wrappers(content, source)
    state = flatten_block_names(state)
    if (names := key_format(state)) != "published":
        logger.info("%s has the key names of %s: mapped to the published ones", source, names)
        if len(found := prefixes(state)) > 1:
            chosen = choose(found, checkpoint_key, source)
            state = {name.removeprefix(chosen): value for name, value in state.items() if name.startswith(chosen)}
    return to_published(state)


def backbone_state_dict(state: StateDict, checkpoint_key: str = "teacher", source: str = "the file") -> StateDict:
    """Select the backbone in a state dict, by the key among several, and remove its prefix if there is one."""
    found = prefixes(state)
    prefix = choose(found, checkpoint_key, source) if found else "backbone."
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return to_published(part) if part else state


def load_backbone(
    model: DinoVisionTransformer, path_or_url: str | Path, checkpoint_key: str = "teacher"
) -> DinoVisionTransformer:
    """Load backbone weights from a file, folder or URL in place, all of them or none; returns the same model.

    Heads in the file are ignored. With a warning, a position table for another grid is resampled, and a patch
    projection for another number of channels is repeated or summed.

    Args:
        model: The backbone.
        path_or_url, checkpoint_key: See `read_state_dict`, which also has the other errors.

    Raises:
        ValueError: The file cannot be read, or names or shapes differ; lists them and the usual causes.
    """
    state = backbone_state_dict(read_state_dict(path_or_url, checkpoint_key), checkpoint_key, str(path_or_url))
    return load_state(model, state, str(path_or_url))


def load_state(
    model: DinoVisionTransformer, state: StateDict, source: str, *, carry_over: bool = False, assign: bool = False
) -> DinoVisionTransformer:
    """Load a state dict with the published names into a backbone, as `load_backbone`; errors name its `source`.

    With `carry_over`, to train the model further, weights of other patches are resampled and registers that the state
    dict lacks stay as they are, too. With `assign` the tensors become those of the model, which may be on the meta
    device, instead of being copied.
    """
    wanted = model.state_dict()
    state = fit_state(state, model, source, all_parts=carry_over)
    missing = [name for name in wanted if name not in state]
    if not missing:
        state = {name: value for name, value in state.items() if name in wanted or not name.startswith(_HEADS)}
    unknown = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} (file {tuple(state[name].shape)}, model {tuple(wanted[name].shape)})"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if missing or unknown or misshapen:
        raise ValueError(_mismatch_message(source, _cause(state, model), missing, unknown, misshapen))
    check_numbers(state, source)
    if assign:
        state = {name: value.float().contiguous() for name, value in state.items()}
    model.load_state_dict(state, assign=assign)
    logger.info("loaded %d tensors of the backbone from %s", len(state), source)
    return model


def check_numbers(state: StateDict, source: str) -> None:
    """Check that all weights are finite floating-point numbers in dense tensors; a ValueError names others."""
    if texts := [f"{name} ({value.dtype})" for name, value in state.items() if not value.is_floating_point()]:
        raise ValueError(f"weights in {source} are not floating-point numbers: {_some(texts)}")
    kinds = {name: "meta" if value.is_meta else str(value.layout) for name, value in state.items()}
    if texts := [f"{name} ({kind})" for name, kind in kinds.items() if kind != str(torch.strided)]:
        raise ValueError(f"weights in {source} are not plain tensors: {_some(texts)}")
    if texts := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"weights in {source} are not finite (NaN or infinite): {_some(texts)}")


def _some(texts: list[str], limit: int = 6) -> str:
    """The first few texts, and the number of the others."""
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def _is_state_dict(content: object) -> TypeGuard[StateDict]:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _cause(state: StateDict, model: DinoVisionTransformer) -> str:
    """The most likely reason why a state dict does not fit, if there is a simple one."""
    projection = state.get("patch_embed.proj.weight")
    if projection is None or "pos_embed" not in state:
        return ": it holds no whole backbone (a head, or a part of one?)"
    if projection.ndim == 4 and projection.shape[0] != model.embed_dim:
        return f": its width is {projection.shape[0]}, that of this one {model.embed_dim} (student.arch, the recipe)"
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if registers != model.num_register_tokens:
        key = "student.num_register_tokens"
        return f": it has {registers} register tokens, this one {model.num_register_tokens} ({key}, the recipe)"
    return ""


def _mismatch_message(source: str, cause: str, missing: list[str], unknown: list[str], misshapen: list[str]) -> str:
    lines = [f"the weights in {source} do not fit this backbone, nothing was loaded{cause}"]
    for title, names in (("missing", missing), ("unknown", unknown), ("other shape", misshapen)):
        if names:
            lines.append(f"  {title} ({len(names)}): {_some(names)}")
    if any(".mlp.w12." in name for name in missing + unknown):
        lines.append(
            "  the file and the model have different feed-forward layers: check student.ffn_layer (mlp, swiglufused)"
        )
    if any("register_tokens" in name for name in missing + unknown):
        lines.append("  check student.num_register_tokens")
    if misshapen:
        lines.append("  check student.arch, student.patch_size and the config the weights were trained with")
    return "\n".join(lines)


if __name__ == "__main__":  # the former name of a command
    runpy.run_module("dinov2.tools", run_name="__main__", alter_sys=True)
