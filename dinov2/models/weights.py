"""Weights in: from any checkpoint we know to the state dict of a backbone, strictly.

Layouts read: a flat state dict (the released backbones), `{"teacher": {...}}` (teacher dumps of a run, whose
backbone keys start with `backbone.`), `{"model": {...}}` (published training checkpoints, `student.backbone.` or
`teacher.backbone.`), safetensors; block names flat (`blocks.7.`) or chunked (`blocks.1.7.`).
Pickles are only ever read with `weights_only=True`.
"""

import importlib
import logging
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import TypeGuard
from urllib.parse import urlparse

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

_CHUNKED = re.compile(r"\bblocks\.\d+\.(\d+)\.")


def flatten_block_names(state: StateDict) -> StateDict:
    """Rename `blocks.<chunk>.<block>.` to `blocks.<block>.`; flat names stay as they are."""
    return {_CHUNKED.sub(r"blocks.\1.", name): value for name, value in state.items()}


def chunk_block_names(state: StateDict, depth: int, block_chunks: int) -> StateDict:
    """Rename `blocks.<block>.` to the published `blocks.<chunk>.<block>.`, chunks of depth // block_chunks blocks."""
    size = max(depth // block_chunks, 1)

    def chunked(match: re.Match[str]) -> str:
        return f"blocks.{int(match[1]) // size}.{match[1]}."

    return {re.sub(r"\bblocks\.(\d+)\.", chunked, name): value for name, value in state.items()}


def read_state_dict(path_or_url: str | Path, checkpoint_key: str = "teacher") -> StateDict:
    """Read the tensors of a checkpoint file or URL, on the CPU, with flat block names.

    If the file holds several networks (`teacher`, `model`, `student`), `checkpoint_key` is preferred.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, holds no tensors, or would need an unsafe pickle.
    """
    content = read_file(path_or_url)
    for key in (checkpoint_key, "teacher", "model", "state_dict", "student"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not _is_state_dict(content):
        held = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path_or_url} holds no state dict of tensors; it holds: {held}")
    return flatten_block_names({name.removeprefix("module."): value for name, value in content.items()})


def backbone_state_dict(state: StateDict, checkpoint_key: str = "teacher") -> StateDict:
    """The part of a state dict that belongs to the backbone, without its prefix; all of it if there is no prefix."""
    for prefix in (f"{checkpoint_key}.backbone.", "backbone."):
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if part:
            return part
    return state


def load_backbone(
    model: DinoVisionTransformer, path_or_url: str | Path, checkpoint_key: str = "teacher"
) -> DinoVisionTransformer:
    """Load backbone weights from a file or URL into `model`, all of them or none; returns the model.

    A position table of another grid is resampled, which is logged as a warning. Heads in the file are ignored.

    Raises:
        ValueError: if names or shapes differ, listing them and what usually causes it.
    """
    state = backbone_state_dict(read_state_dict(path_or_url, checkpoint_key), checkpoint_key)
    wanted = model.state_dict()
    if "pos_embed" in state and state["pos_embed"].shape != wanted["pos_embed"].shape:
        state["pos_embed"] = _resized_positions(state["pos_embed"], model, str(path_or_url))
    missing = [name for name in wanted if name not in state]
    foreign = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} (file {tuple(state[name].shape)}, model {tuple(wanted[name].shape)})"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if missing or foreign or misshapen:
        raise ValueError(_mismatch_message(str(path_or_url), missing, foreign, misshapen))
    model.load_state_dict(state)
    logger.info("loaded %d tensors of the backbone from %s", len(state), path_or_url)
    return model


def _is_state_dict(content: object) -> TypeGuard[StateDict]:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def read_file(path_or_url: str | Path, *, mapped: bool = False) -> object:
    """Read a file or URL as it is, without running code that may be in it; tensors come to the CPU.

    Args:
        path_or_url: a file of `torch.save`, or one that ends in `.safetensors`.
        mapped: leave tensors in the file until they are looked at; nobody may change it meanwhile.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, would need an unsafe pickle, or needs the package safetensors.
    """
    if urlparse(str(path_or_url)).scheme in ("http", "https"):
        return torch.hub.load_state_dict_from_url(str(path_or_url), map_location="cpu", weights_only=True)
    path = Path(str(path_or_url).removeprefix("file://"))
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    safetensors = import_safetensors() if path.suffix == ".safetensors" else None
    try:
        if safetensors:
            return safetensors.load_file(path)
        can_be_mapped = mapped and zipfile.is_zipfile(path)  # unlike files of torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except PermissionError:
        raise
    except Exception as error:  # on bytes they do not expect both readers fail in many ways, even with KeyError
        raise ValueError(f"{path} is no checkpoint of plain tensors, or is truncated or damaged: {error}") from error


def import_safetensors() -> ModuleType:
    """The module `safetensors.torch`, which only files of that kind need.

    Raises:
        ValueError: saying how to install it.
    """
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ValueError("safetensors files need a package that is missing: pip install safetensors") from error


def _resized_positions(table: Tensor, model: DinoVisionTransformer, source: str) -> Tensor:
    """Resample a position table (1, 1 + g*g, D) to the grid of the model: (1, 1 + n, D)."""
    side = round((table.shape[1] - 1) ** 0.5)
    if side * side != table.shape[1] - 1 or table.shape[2] != model.embed_dim:
        return table  # not a square grid or another width: reported with the other mismatches
    rows, columns = model.patch_embed.patches_resolution
    logger.warning(
        "the position table of %s is for %s patches, this model has %s: resampled (bicubic)",
        source,
        f"{side} x {side}",
        f"{rows} x {columns}",
    )
    class_position, grid = table.float().split([1, side * side], dim=1)
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=model.interpolate_antialias)
    return torch.cat([class_position, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).to(table.dtype)


def _mismatch_message(source: str, missing: list[str], foreign: list[str], misshapen: list[str]) -> str:
    lines = [f"the weights in {source} do not fit this backbone, nothing was loaded"]
    for title, names in (("missing", missing), ("unknown", foreign), ("other shape", misshapen)):
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            lines.append(f"  {title} ({len(names)}): {', '.join(names[:6])}{more}")
    if any(".mlp.w12." in name for name in missing + foreign):
        lines.append(
            "  the file and the model have different feed-forward layers: check student.ffn_layer (mlp, swiglufused)"
        )
    if any("register_tokens" in name for name in missing + foreign):
        lines.append("  check student.num_register_tokens")
    if misshapen:
        lines.append("  check student.arch, student.patch_size and the config the weights were trained with")
    return "\n".join(lines)
