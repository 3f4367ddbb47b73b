"""DINOv2: self-supervised training of vision transformers, and evaluation of their frozen features."""

import sys

# Before anything that an older Python cannot read, so that it is told in words; this file itself it can.
if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(f"DINOv2 needs Python 3.11 or newer, this is {sys.version_info[0]}.{sys.version_info[1]}")

from dinov2 import published_names

__version__ = "0.1.0"

published_names.install()
