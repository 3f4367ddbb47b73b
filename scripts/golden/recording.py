"""One recorded set: ``NAME.json`` (configuration, scalar results) and, usually, ``NAME.safetensors`` beside it."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


class Recording:
    """A recorded set. Keeps track of which tensors a replay consumed as inputs.

    Attributes:
        path: The JSON file.
        name: File name without suffix, as in the ``--only`` option.
        json: Parsed JSON.
        tensors: Name -> recorded tensor; empty when the set has no tensor file.
        inputs: Names that were read through :meth:`input` or :meth:`inputs_below`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.json: dict[str, Any] = json.loads(path.read_text())
        tensor_file = path.with_suffix(".safetensors")
        self.tensors = load_file(tensor_file) if tensor_file.exists() else {}
        missing = sorted(set(self.json.get("_tensors", {})) - set(self.tensors))
        if missing:
            raise FileNotFoundError(f"{tensor_file} lacks {len(missing)} tensors that {path.name} lists: {missing[:3]}")
        self.inputs: set[str] = set()
        self.noise = _flat_noise(self.json.get("noise_fp32_vs_fp64", {}))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def input(self, name: str) -> Tensor:
        """The recorded tensor ``name``, marked as an input of the replay."""
        self.inputs.add(name)
        return self.tensors[name]

    def inputs_below(self, prefix: str) -> dict[str, Tensor]:
        """All recorded tensors whose name starts with ``prefix``, without it, marked as inputs."""
        return {name.removeprefix(prefix): self.input(name) for name in self.names(prefix)}

    def names(self, prefix: str = "") -> list[str]:
        """Recorded tensor names that start with ``prefix``."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Full matches of a regular expression among the recorded tensor names, in natural order of the groups."""
        found = [match for name in self.tensors if (match := re.fullmatch(pattern, name))]
        return sorted(found, key=lambda match: [_natural(group) for group in match.groups()])


def _natural(text: str | None) -> tuple[int, int, str]:
    return (0, int(text), "") if text and text.isdigit() else (1, 0, text or "")


def _flat_noise(tree: dict[str, Any], prefix: str = "") -> dict[str, dict[str, float]]:
    """Nested noise records -> ``{"case.tensor": {"max_abs": ..., "rel_l2": ...}}``."""
    flat: dict[str, dict[str, float]] = {}
    for key, value in tree.items():
        if not isinstance(value, dict):
            continue
        if "max_abs" in value:
            flat[prefix + key] = value
        else:
            flat |= _flat_noise(value, f"{prefix}{key}.")
    return flat
