"""Datasets in archives: tar shards, as WebDataset writes them or of plain images, and zip files, read at any position."""

from dinov2.data.shards.dataset import Shards

__all__ = ["Shards"]
