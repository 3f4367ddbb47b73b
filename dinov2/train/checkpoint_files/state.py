"""Read and validate `state.json` of a checkpoint, the entries that are not tensors.

    {"iteration": 7, "images_seen": 32, "scaler": {}, "metrics": {"total_loss": {"window": [...], ...}, ...},
     "world_size": 1, "global_batch": 4, "num_images": 1000, "dataset": "9f86d081884c7d65"}

The last three are missing in checkpoints of earlier versions.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dinov2.files import parse_json
from dinov2.train.checkpoint_files.folder import ADVICE, read_checked

STATE_FILE = "state.json"
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class Setup(NamedTuple):
    """What determines the images of a step, besides the config."""

    world_size: int  # processes
    global_batch: int  # images per step, of all processes and micro-batches
    num_images: int  # in the dataset
    dataset: str  # see `ImageDataset.fingerprint`

    def changes_since(self, state: Mapping[str, Any]) -> list[str]:
        """Changes since the state of a checkpoint, as far as it has the entries, such as "processes: 1 -> 2"."""
        titles = {
            "world_size": "processes",
            "global_batch": "images of a step",
            "num_images": "images of the dataset",
            "dataset": "hash of the names of its images and of the weights of a mixture; another order from here on",
        }
        now = self._asdict()
        return [
            f"{titles[name]}: {state[name]} -> {now[name]}" for name in now if state.get(name, now[name]) != now[name]
        ]


def read_state(folder: Path) -> dict[str, Any]:
    """Read `state.json`: `iteration`, `scaler` and the entries that the run added, each of the right type.

    A ValueError if it is damaged, or its iteration is not that in the name of the folder.
    """
    path = folder / STATE_FILE
    content = read_checked(folder, STATE_FILE)
    try:
        state = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {ADVICE}") from error
    if not isinstance(state, dict) or not _is_count(state.get("iteration")):
        raise ValueError(f"{path} has no valid iteration: {ADVICE}")
    for name, (is_right, meaning) in _KINDS.items():
        if name in state and not is_right(state[name]):
            raise ValueError(f"{path} is damaged ({name} is not {meaning}): {ADVICE}")
    named = re.fullmatch(r"model_(\d{7,})", folder.name)
    if named and int(named[1]) != state["iteration"]:
        raise ValueError(f"{path} is of iteration {state['iteration']}, which is not that of its folder: {ADVICE}")
    if state.get("images_seen", math.inf) <= state["iteration"]:
        raise ValueError(f"{path} is damaged ({state['images_seen']} images in more steps than that): {ADVICE}")
    return state


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_scaler(value: object) -> bool:
    """Whether this is the state of a gradient scaler, which is empty if the run does not use it."""
    if not isinstance(value, dict) or value.keys() not in (set(), _SCALER) or not all(map(_is_number, value.values())):
        return False
    return not value or 0 < value["scale"] < math.inf


def _are_meters(value: object) -> bool:
    """Whether this is the state of a `MetricLogger`."""
    return isinstance(value, dict) and all(map(_is_meter, value.values()))


def _is_meter(value: object) -> bool:
    match value:
        case {"window": list(window), "count": count, "total": total}:
            return _is_count(count) and _is_number(total) and all(map(_is_number, window))
    return False


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "images_seen": (_is_positive, "a number of images"),
    "world_size": (_is_positive, "a number of processes"),
    "global_batch": (_is_positive, "a number of images"),
    "num_images": (_is_positive, "a number of images"),
    "dataset": (lambda value: isinstance(value, str), "a text"),
    "scaler": (_is_scaler, "the state of a gradient scaler"),
    "metrics": (_are_meters, "the state of the meters"),
}
"""For each entry besides `iteration`: its check, and its description."""
