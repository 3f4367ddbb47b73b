"""DINOv2: self-supervised training of vision transformers, and evaluation of their frozen features."""

import sys

# Before imports that an older Python cannot parse, so that it gets a clear message.
if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(f"DINOv2 needs Python 3.11 or newer, this is {sys.version_info[0]}.{sys.version_info[1]}")

from dinov2 import published_names

__version__ = "0.1.0"

published_names.install()
