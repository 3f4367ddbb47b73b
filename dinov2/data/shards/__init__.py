"""Images in tar shards, of WebDataset or of plain images, and in zip files, read at any position."""

from dinov2.data.shards.dataset import Shards

__all__ = ["Shards"]
