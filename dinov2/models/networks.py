"""Find the network in a checkpoint of any trainer; among several, one is selected only by name.

A network is recognized by its patch projection. The part of the name before that is its prefix: keys of nested
dictionaries (`state_dict`, `model`, ...) and modules (`teacher.backbone.`). Names of wrappers (`module.`, `_orig_mod.`)
are removed wherever they are in a name.
"""

import logging
import re
from collections.abc import Iterator, Sequence

from torch import Tensor

from dinov2.models.key_mapping import PATCH_PROJECTIONS, StateDict

logger = logging.getLogger(__name__)

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts of parameter names added by data parallelism, the compiler, sharding and activation checkpointing."""

_COUNTER = "n_averaged"  # number of updates, stored with the averaged weights by torch.optim.swa_utils
_DEEPEST = 8  # nested dictionaries; a file may have one that contains itself
_WRAPPED = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")
_PROJECTION = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, PATCH_PROJECTIONS))})$")


def find_state_dict(content: object, checkpoint_key: str, source: str) -> StateDict | None:
    """Find the state dict with a backbone in the content of a file, without names of wrappers; None if there is none.

    Of several, `checkpoint_key` selects one, see `choose`; `source` names the file in messages.
    """
    holders = {path: without_wrappers(tensors, source) for path, tensors in _holders(content, "", _DEEPEST)}
    found = {f"{path}{prefix}": path for path, tensors in holders.items() for prefix in prefixes(tensors)}
    if not found:
        return None
    several_in_one = len(holders) == 1 < len(found)  # selected later by callers that need one backbone
    state = holders[found[next(iter(found)) if several_in_one else choose(list(found), checkpoint_key, source)]]
    while (parent := _common_parent(state)) is not None:
        state = {name.removeprefix(parent): value for name, value in state.items()}
    return state


def prefixes(state: StateDict) -> list[str]:
    """The prefix of each network in a state dict: its names before the patch projection, possibly ""."""
    return [_PROJECTION.sub("", name) for name in state if _PROJECTION.search(name)]


def choose(networks: Sequence[str], checkpoint_key: str, source: str) -> str:
    """Select the network whose prefix has `checkpoint_key` among its parts, or among the words of its parts.

    A single network is always selected. Otherwise a key that matches none or several is a ValueError.
    """
    if len(networks) == 1:
        other = {"student": "teacher"}.get(checkpoint_key, "")
        if other and f".{other}." in f".{networks[0]}":
            logger.warning("%s holds no student: its teacher is used", source)
        return networks[0]
    exact = [name for name in networks if f".{checkpoint_key}." in f".{name}"]
    words = [name for name in networks if checkpoint_key in re.split(r"[._]", name)]
    for matching in (exact, words):
        if len(matching) == 1:
            return matching[0]
    names = ", ".join(name.rstrip(".") or "one without prefix" for name in networks)
    raise ValueError(
        f"{source} holds several networks: {names}; checkpoint_key = {checkpoint_key!r} matches none of them or "
        "several. Select one: load_backbone(..., checkpoint_key=NAME), or python -m dinov2.tools convert with "
        "--checkpoint-key NAME"
    )


def without_wrappers(tensors: StateDict, source: str) -> StateDict:
    """Remove what wrappers add: parts of names, which must stay different, and the counter of weight averaging."""
    counted = {name: value for name, value in tensors.items() if name.rpartition(".")[2] != _COUNTER}
    plain = {_WRAPPED.sub("", name): value for name, value in counted.items()}
    if len(plain) < len(counted):
        raise ValueError(f"{source} holds tensors with and without wrapper ({', '.join(WRAPPERS)}) of the same name")
    return plain


def _holders(content: object, path: str, levels: int) -> Iterator[tuple[str, StateDict]]:
    """All nested dictionaries with the tensors of a network, with their dotted paths."""
    if not isinstance(content, dict) or not levels:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if prefixes(tensors):
        yield path, tensors
    for name, value in content.items():
        if isinstance(name, str):
            yield from _holders(value, f"{path}{name}.", levels - 1)


def _common_parent(state: StateDict) -> str | None:
    """The common first part of all names, unless it is the name of a network."""
    (parent, *others) = {name.partition(".")[0] for name in state}
    if others or parent in ("backbone", "teacher", "student") or "" in prefixes(state):
        return None
    return f"{parent}."
