"""What any checkpoint holds, a folder of a run or a file, in one form: flat names, sorted into networks and modules."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2.models.checksums import CHECKSUM_KEY
from dinov2.models.weights import import_safetensors, read_file
from dinov2.train.checkpoint_folder import find_checkpoint, read_shapes
from dinov2.train.checkpoint_state import read_state

NETWORKS = ("student", "teacher")
OPTIMIZER = ("", "optimizer")
"""The place of the optimizer's state among the parts of a checkpoint."""

_NAME = re.compile(
    r"(?:(?:model|state_dict|module)\.)*(?:(student|teacher)\.)?(?:module\.)?(?:(backbone|dino_head|ibot_head)\.)?(.+)"
)


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint."""

    source: Path  # a checkpoint folder, or a file
    tensors: dict[str, Tensor]  # by flat names; those of a folder are on the meta device, those of files in the file
    facts: dict[str, Any]  # what is no tensor: iteration, ...

    def parts(self) -> dict[tuple[str, str], dict[str, str]]:
        """Names of tensors as they are within a part -> here, by part.

        A part is a pair of student, teacher or "" (not said), and backbone, dino_head, ibot_head, optimizer or "" (the
        centers of the losses, and what is not known).
        """
        parts: dict[tuple[str, str], dict[str, str]] = {}
        for name in self.tensors:
            part, inner = _place(name)
            parts.setdefault(part, {})[inner] = name
        for network in ("", *NETWORKS):  # a backbone alone, as the released files
            if "patch_embed.proj.weight" in parts.get((network, ""), {}):
                parts[network, "backbone"] = parts.pop((network, ""))
        return parts


def _place(name: str) -> tuple[tuple[str, str], str]:
    if name.startswith("optimizer."):
        return OPTIMIZER, name.removeprefix("optimizer.").removeprefix("state.")
    match = _NAME.fullmatch(name)
    assert match is not None, "its last group takes everything"
    return (match[1] or "", match[2] or ""), match[3]


def read_contents(path: Path, *, verified: bool = False) -> Contents:
    """Open a checkpoint folder (or the newest one of a run), a file of `torch.save`, or a safetensors file.

    Args:
        path: of the folder or file.
        verified: whether the checksums of a file are compared with its content, for whoever uses its numbers; those of
            a folder are when its tensors are read.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is damaged, is unsafe to read, or holds no tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        folder = find_checkpoint(path)
        return Contents(folder, read_shapes(folder), read_state(folder))
    content = read_file(path, mapped=True, verified=verified)
    content = content if isinstance(content, dict) else {}
    facts = {str(name): value for name, value in content.items() if not any(_flat("", value))}
    tensors = {name: value for key, item in content.items() if key not in facts for name, value in _flat(key, item)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; it holds: {', '.join(facts) or type(content).__name__}")
    if path.suffix == ".safetensors":
        facts = _safetensors_facts(path)
        facts = {name: value for name, value in facts.items() if name not in ("format", CHECKSUM_KEY)}
        network = facts.pop("contents", "")
        if network in NETWORKS:
            tensors = {f"{network}.{name}": value for name, value in tensors.items()}
    return Contents(path, tensors, facts)


def _flat(name: object, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, with the keys on the way to them."""
    if isinstance(value, Tensor):
        yield str(name), value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)


def _safetensors_facts(path: Path) -> dict[str, Any]:
    """The metadata in a safetensors file: texts, or JSON."""
    with import_safetensors().safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    facts: dict[str, Any] = {}
    for name, text in sorted(metadata.items()):
        try:
            facts[name] = json.loads(text)
        except ValueError:
            facts[name] = text
    return facts
