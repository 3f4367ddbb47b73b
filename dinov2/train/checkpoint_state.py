"""`state.json` of a checkpoint: what is in it besides tensors, checked before anything is done with it.

    {"iteration": 7, "images_seen": 32, "scaler": {}, "metrics": {"total_loss": {"window": [...], ...}, ...},
     "world_size": 1, "global_batch": 4, "num_images": 1000, "dataset": "9f86d081884c7d65"}

Checkpoints of earlier versions lack the last three.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dinov2.files import parse_json
from dinov2.train.checkpoint_metadata import ADVICE, read_checked

STATE_FILE = "state.json"
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class Setup(NamedTuple):
    """What decides which images a step sees, besides the config."""

    world_size: int  # processes
    global_batch: int  # images of a step, over all processes and micro-batches
    num_images: int  # of the dataset
    dataset: str  # see `ImageDataset.fingerprint`

    def changes_since(self, state: Mapping[str, Any]) -> list[str]:
        """What is not as it was when a checkpoint was written, as far as its state says.

        Returns:
            Texts such as "processes: 1 -> 2".
        """
        titles = {
            "world_size": "processes",
            "global_batch": "images of a step",
            "num_images": "images of the dataset",
            "dataset": "hash of the names of its images, which from here on come in another order",
        }
        now = self._asdict()
        return [
            f"{titles[name]}: {state[name]} -> {now[name]}" for name in now if state.get(name, now[name]) != now[name]
        ]


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: `iteration`, `scaler` and what the run added, each of its kind.

    Raises:
        FileNotFoundError: if `state.json` is missing.
        OSError: if it cannot be read.
        ValueError: if it is damaged, or of another checkpoint than the name of its folder says.
    """
    path = folder / STATE_FILE
    content = read_checked(folder, STATE_FILE)
    try:
        state = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {ADVICE}") from error
    if not isinstance(state, dict) or not _is_count(state.get("iteration")):
        raise ValueError(f"{path} does not say which iteration it is of: {ADVICE}")
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
    """The state of a gradient scaler, empty if it is not in use."""
    if not isinstance(value, dict) or value.keys() not in (set(), _SCALER) or not all(map(_is_number, value.values())):
        return False
    return not value or 0 < value["scale"] < math.inf


def _are_meters(value: object) -> bool:
    """The state of a `MetricLogger`."""
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
"""Of each entry besides `iteration`: a test, and what it is."""
