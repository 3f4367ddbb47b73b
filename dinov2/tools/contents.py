"""The contents of weights or of a checkpoint, whatever their form: tensors by flat names, and the other entries."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2.models.checksums import CHECKSUM_KEY
from dinov2.models.key_mapping import StateDict, flatten_block_names, to_published
from dinov2.models.networks import without_wrappers
from dinov2.models.published import PUBLISHED, weights_url_or_path
from dinov2.models.weight_files import files_in, import_safetensors, local_path, read_file
from dinov2.models.weights import backbone_state_dict
from dinov2.train.checkpoint_files.folder import find_checkpoint
from dinov2.train.checkpoint_files.state import read_state
from dinov2.train.checkpoint_files.tensors import read_shapes

NETWORKS = ("student", "teacher")
OPTIMIZER = ("", "optimizer")  # the part of the optimizer state, see `Contents.parts`

_NAME = re.compile(
    r"(?:(?:model|state_dict|module)\.)*(?:(student|teacher)\.)?(?:module\.)?(?:(backbone|dino_head|ibot_head)\.)?(.+)"
)

Part = tuple[str, str]
"""Network (student, teacher or "" if not named) and module (backbone, dino_head, ibot_head, optimizer or "")."""


@dataclass(frozen=True)
class Contents:
    """The contents of weights or of a checkpoint."""

    source: str  # the checkpoint folder, file or URL, for messages
    files: list[Path]  # local; of a checkpoint folder all of them
    folder: Path | None  # the checkpoint folder, None for weights in files
    tensors: StateDict  # by flat, published names; of a folder on the meta device, of files mapped from disk
    metadata: dict[str, Any]  # the other entries: iteration, ...

    def parts(self) -> dict[Part, dict[str, str]]:
        """{part: {name within the part: name in `tensors`}}; ("", "") has the centers and what is not recognized."""
        parts: dict[Part, dict[str, str]] = {}
        for name in self.tensors:
            part, inner = _part_of(name)
            parts.setdefault(part, {})[inner] = name
        for network in ("", *NETWORKS):  # a backbone alone, as in the released files
            if "patch_embed.proj.weight" in parts.get((network, ""), {}):
                parts[network, "backbone"] = parts.pop((network, ""))
        return parts

    def backbone(self, checkpoint_key: str) -> StateDict:
        """The state dict, with the published names, of the backbone that `checkpoint_key` selects among several."""
        state = without_wrappers(flatten_block_names(self.tensors), self.source)
        return backbone_state_dict(state, checkpoint_key, self.source)


def _part_of(name: str) -> tuple[Part, str]:
    if name.startswith("optimizer."):
        return OPTIMIZER, name.removeprefix("optimizer.").removeprefix("state.")
    match = _NAME.fullmatch(name)
    assert match is not None, "its last group takes everything"
    return (match[1] or "", match[2] or ""), match[3]


def checkpoint_folder(source: str) -> Path | None:
    """The checkpoint folder that a source refers to; None if it refers to weights in files."""
    path = Path(source)
    if source in PUBLISHED or not path.is_dir():
        return None
    try:
        files_in(path)
    except FileNotFoundError as no_weights:
        try:
            return find_checkpoint(path)
        except FileNotFoundError as no_checkpoint:
            raise FileNotFoundError(f"{no_checkpoint}; {no_weights}") from None
    return None


def read_contents(source: str) -> Contents:
    """Read the names, shapes and other entries of weights or of a checkpoint.

    Checksums in files are compared with their content; tensors of a checkpoint folder are verified when they are read.
    The source is a run's output folder (its newest checkpoint is used), a checkpoint folder, a file of `torch.save` or
    of safetensors, a folder of transformers, a URL, or the name of a published model. A ValueError if it is damaged,
    unsafe to read, or has no tensors.
    """
    if (folder := checkpoint_folder(source)) is not None:
        files = [path for path in folder.iterdir() if path.is_file()]
        return Contents(str(folder), files, folder, read_shapes(folder), read_state(folder))
    source = weights_url_or_path(source)
    content = read_file(source, mapped=True)
    content = content if isinstance(content, dict) else {}
    metadata = {str(name): value for name, value in content.items() if not any(_flat("", value))}
    tensors = {name: value for key, item in content.items() if key not in metadata for name, value in _flat(key, item)}
    if not tensors:
        raise ValueError(f"{source} holds no tensors; it holds: {', '.join(metadata) or type(content).__name__}")
    path = local_path(source)
    files = files_in(path) if path.is_dir() else [path]
    if files[0].suffix == ".safetensors":
        metadata = _safetensors_metadata(files[0])
        network = metadata.pop("contents", "")
        if network in NETWORKS:
            tensors = {f"{network}.{name}": value for name, value in tensors.items()}
    return Contents(source, files, None, to_published(tensors), metadata)


def _flat(name: object, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, by their dotted keys."""
    if isinstance(value, Tensor):
        yield str(name), value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)


def _safetensors_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, in which JSON values are decoded."""
    with import_safetensors().safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    decoded: dict[str, Any] = {}
    for name, text in sorted(metadata.items()):
        if name in ("format", CHECKSUM_KEY):
            continue
        try:
            decoded[name] = json.loads(text)
        except ValueError:
            decoded[name] = text
    return decoded
