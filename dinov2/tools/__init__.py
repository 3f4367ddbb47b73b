"""One command that inspects and converts weights and checkpoints: `python -m dinov2.tools`."""
