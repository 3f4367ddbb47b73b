"""Benchmarks of image retrieval from dataset strings."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from dinov2.data.datasets import Entry, build_dataset
from dinov2.data.images import ImageOptions
from dinov2.data.retrieval.benchmark import SETTINGS, GroundTruth, QuerySet, RetrievalBenchmark
from dinov2.data.retrieval.image_groups import read_image_groups
from dinov2.data.retrieval.revisited import read_revisited

__all__ = [
    "RETRIEVAL_DATASETS",
    "SETTINGS",
    "GroundTruth",
    "QuerySet",
    "RetrievalBenchmark",
    "make_retrieval_benchmark",
]

logger = logging.getLogger(__name__)

RETRIEVAL_DATASETS = {
    "RevisitedOxford": Entry(partial(read_revisited, "roxford5k")),
    "RevisitedParis": Entry(partial(read_revisited, "rparis6k")),
    "RetrievalList": Entry(read_image_groups, required=("file",), optional=("root",)),
}


def make_retrieval_benchmark(
    dataset_str: str, *, transform: Callable[[Any], Any] | None = None, image_options: ImageOptions | None = None
) -> RetrievalBenchmark:
    """Open a benchmark: `RevisitedOxford:root=...`, `RevisitedParis:root=...` or `RetrievalList:file=...[:root=...]`.

    Args:
        dataset_str: As above; `~` is the home folder.
        transform: Function of the images (of queries: after cropping).
        image_options: Options of reading image files.

    Raises:
        ValueError, OSError: The string is invalid, or files are missing or damaged.
    """
    benchmark: RetrievalBenchmark = build_dataset(dataset_str, RETRIEVAL_DATASETS, transform=transform)
    database, queries = benchmark.database, benchmark.queries
    database.image_options = image_options or database.image_options
    for level, note in database.notes():
        logger.log(level, "%s", note)
    queries.image_options = database.image_options  # with the value range measured on the database
    logger.info("%d queries, %d database images in %r", len(queries), len(database), dataset_str)
    return benchmark
