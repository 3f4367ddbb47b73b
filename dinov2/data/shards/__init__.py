"""Images in shards, read at any position: tar archives, of WebDataset or of plain images, zip and Parquet files."""

from dinov2.data.shards.dataset import Shards
from dinov2.data.shards.parquet import ParquetFiles

__all__ = ["ParquetFiles", "Shards"]
