"""Read and write files of dense heads: the released ones, and heads trained here.

Both hold `{"state_dict": {"decode_head.NAME": tensor}}`. Files of `save_head` also have an entry `head` with what the
tensors do not determine: the arguments of the head, its blocks, and whether the final norm is applied.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.models.dense.dpt import NUM_LAYERS, DPTDepthHead
from dinov2.models.dense.linear_depth_head import LinearDepthHead, check_depth_range
from dinov2.models.dense.segmentation_head import SegmentationHead
from dinov2.models.key_mapping import StateDict
from dinov2.models.networks import without_wrappers
from dinov2.models.weight_files import read_file
from dinov2.models.weights import check_numbers

PREFIX = "decode_head."
SETTINGS_KEY = "head"
RELEASED_LAYERS = (1, 4)
DepthRange = tuple[float, float]
"""(smallest, largest) depth in meters."""

HEADS: dict[str, type[nn.Module]] = {
    "segmentation": SegmentationHead,
    "linear depth": LinearDepthHead,
    "DPT depth": DPTDepthHead,
}
"""{kind of a head: its class}."""

_KIND_OF_TENSOR = {
    "conv_seg.weight": "segmentation",
    "conv_depth.weight": "linear depth",
    "conv_depth.head.0.weight": "DPT depth",
}
_PUBLISHED_WIDTHS = {"ViT-S/14": 384, "ViT-B/14": 768, "ViT-L/14": 1024, "ViT-g/14": 1536}


class HeadFile(NamedTuple):
    """A head as read from a file."""

    head: Any  # a module of HEADS, with the weights of the file
    kind: str  # a key of HEADS
    num_layers: int  # number of layers that it reads
    blocks: tuple[int, ...] | None  # their blocks; None if the file does not hold them, as the released ones
    norm: bool | None  # whether the final norm of the backbone is applied; likewise
    meta: dict[str, Any]  # what was given to `save_head`
    has_backbone: bool  # whether the file holds a backbone, too


def read_head(
    path_or_url: str | Path, *, kind: str | Sequence[str], embed_dim: int, depth_range: DepthRange | None = None
) -> HeadFile:
    """Read a head of a backbone of width `embed_dim`, strictly; the number of layers and of classes is inferred.

    Args:
        path_or_url: See `weight_files.read_file`.
        kind: The kind of head that is expected, or several, keys of `HEADS`.
        embed_dim: Width D of the backbone.
        depth_range: Depths in meters of the first and the last bin, or at which a DPT head begins and is clamped.
            Released files do not hold it; for files of `save_head` None is the range of the training.

    Raises:
        FileNotFoundError, ConnectionError: There is no such file, or it cannot be downloaded.
        ValueError: The file is damaged, or holds something else; the message has the cause.
    """
    expected = (kind,) if isinstance(kind, str) else tuple(kind)
    if unknown := set(expected) - set(HEADS):
        raise ValueError(f"unknown kind of head {min(unknown)!r}; known: {', '.join(HEADS)}")
    source = str(path_or_url)
    content = read_file(path_or_url)
    state, has_backbone = _head_state(content, source)
    kind = _kind_of(state, source)
    if kind not in expected:
        raise ValueError(f"{source} holds a {kind} head, not a {' or '.join(expected)} head")
    settings: Any = content.get(SETTINGS_KEY) if isinstance(content, dict) else None
    if settings is None:
        arguments, num_layers = _infer(kind, state, embed_dim, source)
    else:
        arguments, num_layers = _checked_settings(settings, embed_dim, source)
    if kind != "segmentation":
        arguments |= _range_arguments(depth_range, arguments, source)
    try:
        head = HEADS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"{source} is damaged: its arguments are not those of a {kind} head: {error}") from error
    _load(head, state, source)
    settings = settings or {}
    blocks = tuple(settings["blocks"]) if settings else None
    return HeadFile(head, kind, num_layers, blocks, settings.get("norm"), settings.get("meta", {}), has_backbone)


def save_head(
    path: str | Path, head: nn.Module, *, blocks: Sequence[int], norm: bool, meta: Mapping[str, Any] | None = None
) -> None:
    """Write a head in the format of the released files, and what is needed to use it; `read_head` is the inverse.

    The file is written under another name, then renamed, so that there is never an incomplete one.

    Args:
        path: The file; its folder exists.
        head: A head of `HEADS`.
        blocks: Indices of the blocks of the backbone that it reads.
        norm: Whether the final norm of the backbone is applied to their tokens.
        meta: What else to keep with it (dataset, classes, step, ...): texts, numbers, lists and dicts.
    """
    kinds = [kind for kind, cls in HEADS.items() if type(head) is cls]
    if not kinds:
        names = ", ".join(cls.__name__ for cls in HEADS.values())
        raise ValueError(f"a {type(head).__name__} is not a dense head; known: {names}")
    state = {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    try:
        kept = json.loads(json.dumps(dict(meta or {})))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta of a head must be texts, numbers, lists and dicts: {error}") from error
    arguments: dict[str, Any] = head.arguments  # type: ignore[assignment]
    width = _width(kinds[0], arguments, len(blocks))
    if width % 1 != 0:  # also for infinity, whose remainder is not a number
        raise ValueError(
            f"a head of {arguments['in_channels']} channels does not read the {len(blocks)} blocks {blocks}"
        )
    settings = {"kind": kinds[0], "arguments": arguments, "blocks": list(blocks), "norm": norm, "meta": kept}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        torch.save({"state_dict": state, SETTINGS_KEY: settings}, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of the weights of a module by name, as a head keeps it of the backbone that it was trained on."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        on_cpu = value.detach().cpu().contiguous()
        digest.update((ctypes.c_char * on_cpu.nbytes).from_address(on_cpu.data_ptr()))
    return digest.hexdigest()


def is_of_another_backbone(found: HeadFile, backbone: nn.Module) -> bool:
    """Whether a head tells that it was trained on a backbone with other weights; released heads do not tell."""
    return "backbone" in found.meta and found.meta["backbone"] != weights_digest(backbone)


def _head_state(content: object, source: str) -> tuple[StateDict, bool]:
    """The tensors of the head by name, without prefix, and whether there are also some of a backbone."""
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{source} holds no state dict of tensors; it holds: {held}")
    state = without_wrappers(state, source)
    head = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    others = [name for name in state if not name.startswith((PREFIX, "backbone."))]
    if not head:
        raise ValueError(f"{source} holds no dense head (names that begin with {PREFIX!r}): {_what(state)}")
    if others:
        raise ValueError(f"{source} holds unknown tensors beside the head: {_some(others)}")
    return head, len(head) < len(state)


def _what(state: StateDict) -> str:
    """What a file without a dense head is instead."""
    if any(name.endswith("patch_embed.proj.weight") for name in state):
        return "it is a backbone"
    if {name.removeprefix("linear_head.") for name in state} == {"weight", "bias"}:
        return "it is a linear classifier"
    return f"it holds {_some(list(state))}" if state else "it is empty"


def _kind_of(state: StateDict, source: str) -> str:
    for name, kind in _KIND_OF_TENSOR.items():
        if name in state:
            return kind
    known = ", ".join(_KIND_OF_TENSOR)
    raise ValueError(f"{source} holds an unknown head, without any of {known}; it has: {_some(list(state))}")


def _infer(kind: str, state: StateDict, embed_dim: int, source: str) -> tuple[dict[str, Any], int]:
    """Arguments of a released head, and the number of its layers, from the shapes of its tensors."""
    if kind == "DPT depth":
        return _infer_dpt(state, embed_dim, source), NUM_LAYERS
    weight = state["conv_seg.weight" if kind == "segmentation" else "conv_depth.weight"]
    if weight.ndim != 4:
        raise ValueError(f"{source} is damaged: the weights of its convolution are {tuple(weight.shape)}")
    outputs, channels = weight.shape[:2]
    per_layer = embed_dim if kind == "segmentation" else 2 * embed_dim
    num_layers = next((count for count in RELEASED_LAYERS if channels == count * per_layer), None)
    if num_layers is None:
        raise ValueError(_width_message(kind, channels, embed_dim, source))
    if kind == "segmentation":
        return {"in_channels": channels, "num_classes": outputs}, num_layers
    return {"in_channels": channels, "num_bins": outputs}, num_layers


def _width_message(kind: str, channels: int, embed_dim: int, source: str) -> str:
    tokens = 1 if kind == "segmentation" else 2
    layers = "1 layer" if kind == "segmentation" else "1 layer with class token"
    fits = [
        f"{name} with {count} layer{'s' if count > 1 else ''}"
        for name, width in _PUBLISHED_WIDTHS.items()
        for count in RELEASED_LAYERS
        if channels == tokens * width * count
    ]
    of = f"it fits {' or '.join(fits)}" if fits else "it fits no published backbone"
    return (
        f"the {kind} head in {source} does not fit a backbone of width {embed_dim}: it reads {channels} channels, not "
        f"{tokens * embed_dim} ({layers}) or {4 * tokens * embed_dim} (4); {of}"
    )


def _infer_dpt(state: StateDict, embed_dim: int, source: str) -> dict[str, Any]:
    try:
        projects = [state[f"reassemble_blocks.projects.{index}.conv.weight"] for index in range(4)]
        channels = state["project.conv.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise ValueError(f"{source} is damaged: its DPT depth head lacks {error}") from error
    width = projects[0].shape[1]
    if width != embed_dim:
        names = [name for name, value in _PUBLISHED_WIDTHS.items() if value == width]
        of = f"; it fits {names[0]}" if names else ""
        raise ValueError(
            f"the DPT depth head in {source} does not fit a backbone of width {embed_dim}: its own is {width}{of}"
        )
    with_readout = any(name.startswith("reassemble_blocks.readout_projects.") for name in state)
    return {
        "in_channels": width,
        "channels": channels,
        "post_channels": [weight.shape[0] for weight in projects],
        "readout": "project" if with_readout else "ignore",
    }


def _checked_settings(settings: Any, embed_dim: int, source: str) -> tuple[dict[str, Any], int]:
    """The arguments and the number of layers of a head of `save_head`."""
    try:
        arguments, blocks = dict(settings["arguments"]), tuple(map(int, settings["blocks"]))
        channels, has_norm = int(arguments["in_channels"]), isinstance(settings["norm"], bool)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{source} is damaged: its entry {SETTINGS_KEY!r} is not one of save_head: {error}") from error
    if not blocks or not has_norm:
        raise ValueError(f"{source} is damaged: its entry {SETTINGS_KEY!r} has no blocks, or no norm")
    width = _width(settings.get("kind"), arguments | {"in_channels": channels}, len(blocks))
    if width != embed_dim:
        raise ValueError(
            f"the head in {source} reads {len(blocks)} layers of a backbone of width {width:g}, not {embed_dim}"
        )
    return arguments, len(blocks)


def _width(kind: str, arguments: dict[str, Any], num_blocks: int) -> float:
    """Width of the backbone that a head reads; not a whole number, or infinite, if it cannot read so many blocks."""
    if kind == "DPT depth":
        return arguments["in_channels"] if num_blocks == NUM_LAYERS else float("inf")
    tokens = 2 if arguments.get("use_class_token") else 1
    return arguments["in_channels"] / (tokens * num_blocks) if num_blocks else float("inf")


def _range_arguments(depth_range: DepthRange | None, arguments: dict[str, Any], source: str) -> dict[str, float]:
    if depth_range is None:
        if "min_depth" in arguments and "max_depth" in arguments:
            return {}
        raise ValueError(
            f"{source} does not hold the range of its depths: give depth_range=(min, max) in meters; "
            "NYU is (0.001, 10), KITTI (0.001, 80)"
        )
    check_depth_range(*depth_range)
    return {"min_depth": depth_range[0], "max_depth": depth_range[1]}


def _load(head: nn.Module, state: StateDict, source: str) -> None:
    wanted = head.state_dict()
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unknown": [name for name in state if name not in wanted],
        "other shape": [
            f"{name} (file {tuple(state[name].shape)}, head {tuple(value.shape)})"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        lines = [f"  {title} ({len(names)}): {_some(names)}" for title, names in problems.items() if names]
        raise ValueError("\n".join([f"the weights in {source} do not fit this {type(head).__name__}", *lines]))
    check_numbers({name: value for name, value in state.items() if wanted[name].is_floating_point()}, source)
    head.load_state_dict(state)


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
