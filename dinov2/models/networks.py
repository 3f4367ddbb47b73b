"""Which network of a checkpoint: found below the wrappers of any trainer, and never chosen silently among several.

A network is recognized by its patch projection. What stands before that name is its prefix: of nested dictionaries
(`state_dict`, `model`, ...), of modules (`teacher.backbone.`), or of a wrapper (`module.`, `_orig_mod.`), wherever the
wrapper puts it in a name.
"""

import logging
import re
from collections.abc import Iterator, Sequence

from torch import Tensor

from dinov2.models.key_mapping import PATCH_PROJECTIONS, StateDict

logger = logging.getLogger(__name__)

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Names that data parallelism, the compiler, sharding and activation checkpointing put into those of parameters."""

_COUNTER = "n_averaged"  # of updates, beside the averaged weights of torch.optim.swa_utils
_DEEPEST = 8  # dictionaries in dictionaries; a file may hold one that contains itself
_WRAPPED = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")
_PROJECTION = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, PATCH_PROJECTIONS))})$")


def find_state_dict(content: object, checkpoint_key: str, source: str) -> StateDict | None:
    """The state dict in a checkpoint that holds a backbone, without names of wrappers; None if there is none.

    Args:
        content: What a file holds: a state dict, or dictionaries that hold one somewhere.
        checkpoint_key: Which network is meant if several state dicts hold one, see `choose`.
        source: Where it is from, for messages.

    Raises:
        ValueError: If there are several, and the key does not tell which.
    """
    holders = {path: without_wrappers(tensors, source) for path, tensors in _holders(content, "", _DEEPEST)}
    found = {f"{path}{prefix}": path for path, tensors in holders.items() for prefix in prefixes(tensors)}
    if not found:
        return None
    several_in_one = len(holders) == 1 < len(found)  # left to whoever wants a backbone, not all of the state dict
    state = holders[found[next(iter(found)) if several_in_one else choose(list(found), checkpoint_key, source)]]
    while (parent := _common_parent(state)) is not None:
        state = {name.removeprefix(parent): value for name, value in state.items()}
    return state


def prefixes(state: StateDict) -> list[str]:
    """What stands before the patch projection of each network in a state dict; "" if nothing does."""
    return [_PROJECTION.sub("", name) for name in state if _PROJECTION.search(name)]


def choose(networks: Sequence[str], checkpoint_key: str, source: str) -> str:
    """The one of several networks, by their prefixes, that has `checkpoint_key` among the parts of its prefix.

    Raises:
        ValueError: If it is none of them, or several.
    """
    if len(networks) == 1:
        other = {"student": "teacher"}.get(checkpoint_key, "")
        if other and f".{other}." in f".{networks[0]}":
            logger.warning("%s holds no student: its teacher is taken", source)
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
    """A state dict without what wrappers add: names in those of its tensors, and the counter of averaging.

    Raises:
        ValueError: If that gives two tensors one name.
    """
    counted = {name: value for name, value in tensors.items() if name.rpartition(".")[2] != _COUNTER}
    plain = {_WRAPPED.sub("", name): value for name, value in counted.items()}
    if len(plain) < len(counted):
        raise ValueError(f"{source} holds tensors with and without wrapper ({', '.join(WRAPPERS)}) of the same name")
    return plain


def _holders(content: object, path: str, levels: int) -> Iterator[tuple[str, StateDict]]:
    """The dictionaries with tensors of a network among `content` and what it holds, by their dotted paths."""
    if not isinstance(content, dict) or not levels:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if prefixes(tensors):
        yield path, tensors
    for name, value in content.items():
        if isinstance(name, str):
            yield from _holders(value, f"{path}{name}.", levels - 1)


def _common_parent(state: StateDict) -> str | None:
    """The first part of all names, if it is one and the same and says nothing of which network it is."""
    (parent, *others) = {name.partition(".")[0] for name in state}
    if others or parent in ("backbone", "teacher", "student") or "" in prefixes(state):
        return None
    return f"{parent}."
