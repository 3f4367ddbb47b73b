"""DINOv2: self-supervised training of vision transformers, and evaluation of their frozen features."""

import sys
from typing import TYPE_CHECKING, Any

# Before imports that an older Python cannot parse, so that it gets a clear message.
if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(f"DINOv2 needs Python 3.11 or newer, this is {sys.version_info[0]}.{sys.version_info[1]}")

from dinov2 import published_names

if TYPE_CHECKING:
    from dinov2.eval.extract.api import extract_features as extract_features
    from dinov2.eval.extract.files import load_features as load_features

__version__ = "0.1.0"

_ON_FIRST_USE = {"extract_features": "dinov2.eval.extract.api", "load_features": "dinov2.eval.extract.files"}

published_names.install()


def __getattr__(name: str) -> Any:
    """Import a function that needs PyTorch when it is first used."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'dinov2' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ON_FIRST_USE[name]), name)
