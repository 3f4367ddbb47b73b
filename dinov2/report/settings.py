"""Settings of a run as texts, by dotted key."""

from collections.abc import Iterator, Mapping
from typing import Any

from dinov2 import config
from dinov2.config import Config

# Not wishes of a person, but what the run knows.
_OF_THE_RUN = {"train.output_dir", "optim.lr"}


def changed_settings(cfg: Config | None) -> dict[str, str]:
    """What differs from the defaults; of None, all defaults."""
    defaults = dict(_flat(config.to_dict(config.load())))
    if cfg is None:
        return defaults
    values = dict(_flat(config.to_dict(cfg)))
    return {key: value for key, value in values.items() if value != defaults[key] and key not in _OF_THE_RUN}


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    """As in a YAML file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"
