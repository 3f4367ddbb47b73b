"""Map the parameter names of other libraries and of chunked checkpoints to the published ones, and back.

| format | written by | differences |
| --- | --- | --- |
| `published` | the release, this package | |
| `hf` | transformers, `Dinov2...` | other names, yet others in transformers 5; separate query, key and value |
| `timm` | timm, `vit_..._dinov2` | no mask token; one name for MLP and SwiGLU; with registers `cls_token` + position |

Pure functions from state dict to state dict. Unknown names are kept, so that strict loading reports them.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

# --- Chunked blocks --------------------------------------------------------------------------------------------------

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


# --- Any format ------------------------------------------------------------------------------------------------------

_HF_MARK = "embeddings.patch_embeddings.projection.weight"
PATCH_PROJECTIONS = ("patch_embed.proj.weight", _HF_MARK)
"""Names that every backbone has and nothing else, in one format or another."""


def key_format(state: StateDict) -> str:
    """The format of the names: `hf`, `timm`, or else `published` (with any prefix, or without a backbone)."""
    if any(name.endswith(_HF_MARK) for name in state):
        return "hf"
    if {"cls_token", "patch_embed.proj.weight"} <= state.keys() and "mask_token" not in state:
        return "timm"
    return "published"


def to_published(state: StateDict) -> StateDict:
    """Map a state dict of any format to the published names, with the prefix `backbone.` if it has more than that."""
    match key_format(state):
        case "hf":
            return from_hf(state)
        case "timm":
            return from_timm(state)
    return state


# --- transformers ----------------------------------------------------------------------------------------------------

# Published name -> names in transformers, without the final `.weight` or `.bias`; several are concatenated.
_HF_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_BLOCK: dict[str, tuple[str, ...]] = {
    "norm1": ("norm1",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "ls1.gamma": ("layer_scale1.lambda1",),
    "norm2": ("norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
    "mlp.w12": ("mlp.weights_in",),
    "mlp.w3": ("mlp.weights_out",),
    "ls2.gamma": ("layer_scale2.lambda1",),
}
# Names of transformers 5 in memory; its files have the names above.
_HF_BLOCK_5: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.w3": ("mlp.down_proj",),
}


def from_hf(state: StateDict) -> StateDict:
    """Map from transformers; beside others a backbone gets the prefix `backbone.`, a classifier `linear_head.`."""
    prefix = next(name.removesuffix(_HF_MARK) for name in state if name.endswith(_HF_MARK))
    home = "backbone." if prefix else ""
    outside = {theirs: ours for ours, theirs in _HF_OUTSIDE.items()}
    in_block = {
        theirs: (ours, parts) for table in (_HF_BLOCK, _HF_BLOCK_5) for ours, parts in table.items() for theirs in parts
    }
    result: StateDict = {}
    for name, value in state.items():
        block, module, kind = _split(name.removeprefix(prefix), "encoder.layer.")
        if not name.startswith(prefix):
            result[re.sub(r"^classifier\.", "linear_head.", name)] = value
        elif not block:
            result[f"{home}{outside.get(module, module)}{kind}"] = value
        elif module not in in_block:
            result[name] = value
        else:
            ours, parts = in_block[module]
            stacked = [state.get(f"{prefix}encoder.layer.{block}.{part}{kind}") for part in parts]
            if any(part is None for part in stacked):
                result[name] = value
            elif module == parts[0]:
                result[f"{home}blocks.{block}.{ours}{kind}"] = _stack(stacked)
    return result


def to_hf(state: StateDict) -> StateDict:
    """Map to the names in files of transformers, whose blocks always have LayerScale; missing ones are added."""
    result: StateDict = {}
    for name, value in state.items():
        block, module, kind = _split(name, "blocks.")
        if not block:
            result[f"{_HF_OUTSIDE.get(module, module)}{kind}"] = value
            continue
        parts = _HF_BLOCK.get(module, (module,))
        for part, rows in zip(parts, value.chunk(len(parts)), strict=True):
            result[f"encoder.layer.{block}.{part}{kind}"] = rows.contiguous()
        for number in (1, 2):
            if module == f"norm{number}" and f"blocks.{block}.ls{number}.gamma" not in state:
                result[f"encoder.layer.{block}.layer_scale{number}.lambda1"] = torch.ones_like(value)
    return result


def _split(name: str, blocks: str) -> tuple[str, str, str]:
    """Split a name into the block index or "", the module or token, and ".weight", ".bias" or ""."""
    match = re.fullmatch(rf"(?:{re.escape(blocks)}(\d+)\.)?(.+?)(\.weight|\.bias|)", name)
    assert match is not None, "its second group takes everything"
    return match[1] or "", match[2], match[3]


def _stack(parts: list[Any]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# --- timm ------------------------------------------------------------------------------------------------------------

_TIMM_SWIGLU = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}


def from_timm(state: StateDict) -> StateDict:
    """Map from the names of timm; adds a zero mask token, and the prefix `backbone.` beside a classifier `head.`."""
    renamed = dict(state)
    table = state["pos_embed"]
    if math.isqrt(table.shape[1]) ** 2 == table.shape[1]:  # no position of the class token
        renamed["pos_embed"] = torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
    if "reg_token" in renamed:
        renamed["register_tokens"] = renamed.pop("reg_token")
    renamed["mask_token"] = table.new_zeros(1, table.shape[2])
    for ours, theirs in _TIMM_SWIGLU.items():
        for name in [name for name in renamed if theirs in name and _is_gated(state, name)]:
            renamed[name.replace(theirs, ours)] = renamed.pop(name)
    if any(name.startswith("head.") for name in renamed):
        return {name if name.startswith("head.") else f"backbone.{name}": value for name, value in renamed.items()}
    return renamed


def to_timm(state: StateDict) -> StateDict:
    """Map to the names of timm, without mask token; with registers the class token includes its position."""
    renamed = {name: value for name, value in state.items() if name != "mask_token"}
    for ours, theirs in _TIMM_SWIGLU.items():
        renamed = {name.replace(ours, theirs): value for name, value in renamed.items()}
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:].contiguous()
    return renamed


def _is_gated(state: StateDict, name: str) -> bool:
    """Whether the feed-forward layer of a parameter is SwiGLU: `fc1` has the rows of gate and value."""
    mlp = name.partition(".mlp.")[0] + ".mlp"
    first, second = state.get(f"{mlp}.fc1.weight"), state.get(f"{mlp}.fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]
