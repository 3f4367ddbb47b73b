"""Rankings of a database by the cosine similarity of class tokens, and their scores.

Shapes: Q queries, n images of the database, D feature width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2 import distributed
from dinov2.data.retrieval import GroundTruth, QuerySet, RetrievalBenchmark
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.features import extract_features
from dinov2.eval.retrieval.average_precision import KS, QueryScores, RetrievalScores, mean_scores, score_query

QUERY_BATCH = 64  # queries ranked at once


class RetrievalFeatures:
    """Normalized class tokens, with the images that could be read.

    Args:
        queries: (Q, D) float32.
        database: (n, D) float32; rows of images that could not be read are 0.
        readable: (n,) bool.
    """

    def __init__(self, queries: Tensor, database: Tensor, readable: Tensor) -> None:
        device = distributed.device()
        self.queries, self.database, self.readable = queries, database.to(device), readable.to(device)

    def ranking(self, start: int, stop: int) -> Tensor:
        """Indices of the database for some queries, the most similar first and unreadable images last: (q, n) int64."""
        device = self.database.device
        with torch.autocast(device.type, enabled=False):  # half precision causes ties
            similarity = self.queries[start:stop].to(device) @ self.database.T
        similarity[:, ~self.readable] = -torch.inf
        return similarity.argsort(dim=1, descending=True, stable=True).cpu()


def extract_retrieval_features(
    model: nn.Module,
    benchmark: RetrievalBenchmark,
    *,
    batch_size: int,
    num_workers: int,
    autocast_dtype: torch.dtype = torch.float32,
    cache: FeatureCache | None = None,
) -> RetrievalFeatures:
    """Extract the class tokens of queries and database; each process gets all of them.

    Raises:
        ValueError: A query cannot be read, or more than 1 % of the images of the database.
    """

    def extract(dataset: QuerySet) -> tuple[Tensor, Tensor]:
        features, index = extract_features(
            model, dataset, batch_size, num_workers, gather_on_cpu=True, autocast_dtype=autocast_dtype, cache=cache
        )
        return functional.normalize(features, dim=1), index  # without labels, those are the numbers of the images

    queries, query_index = extract(benchmark.queries)
    missing = sorted(set(range(len(benchmark.queries))) - set(query_index.tolist()))
    if missing:
        raise ValueError(f"{len(missing)} queries cannot be read: {benchmark.queries.describe(missing[0])}, ...")
    found, index = extract(benchmark.database)
    database = found.new_zeros(len(benchmark.database), found.shape[1])
    database[index] = found
    readable = torch.zeros(len(database), dtype=torch.bool)
    readable[index] = True
    return RetrievalFeatures(queries, database, readable)


def score_benchmark(
    features: RetrievalFeatures, ground_truth: Sequence[GroundTruth], settings: Sequence[str], ks: Sequence[int] = KS
) -> dict[str, RetrievalScores]:
    """Score the rankings of all queries, which the processes share; without settings in which no query has positives.

    Raises:
        ValueError: No query has positives in any setting.
    """
    mine: dict[tuple[str, int], QueryScores | None] = {}
    starts = range(0, len(ground_truth), QUERY_BATCH)
    for start in starts[distributed.rank() :: distributed.world_size()]:
        stop = min(start + QUERY_BATCH, len(ground_truth))
        rankings = features.ranking(start, stop).numpy()
        for query, ranking in zip(range(start, stop), rankings, strict=True):
            for setting in settings:
                mine[setting, query] = score_query(ranking, ground_truth[query], setting, ks)
    everything = {key: scores for part in distributed.all_gather_object(mine) for key, scores in part.items()}
    per_setting = {setting: [everything[setting, query] for query in range(len(ground_truth))] for setting in settings}
    scored = {setting: scores for setting, scores in per_setting.items() if any(each is not None for each in scores)}
    if not scored:
        mean_scores(per_setting[settings[0]], ks)  # raises
    return {setting: mean_scores(scores, ks) for setting, scores in scored.items()}
