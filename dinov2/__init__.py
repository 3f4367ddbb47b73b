"""DINOv2: self-supervised training of vision transformers, and evaluation of their frozen features."""

__version__ = "0.1.0"
