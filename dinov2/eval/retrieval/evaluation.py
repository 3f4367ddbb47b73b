"""Image retrieval with frozen features: the command, its table, results file and figure."""

import argparse
import logging
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dinov2 import distributed
from dinov2.config import Config
from dinov2.data.datasets import parse_dataset_str
from dinov2.data.images import BadImageError
from dinov2.data.retrieval import RETRIEVAL_DATASETS, RetrievalBenchmark, make_retrieval_benchmark
from dinov2.eval import setup
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.results import archive_results, as_table, counted, run_facts, write_results
from dinov2.eval.retrieval.average_precision import DEFINITIONS, RetrievalScores, by_name
from dinov2.eval.retrieval.protocols import Preparation, preparation
from dinov2.eval.retrieval.ranking_figure import draw_rankings
from dinov2.eval.retrieval.rankings import RetrievalFeatures, extract_retrieval_features, score_benchmark
from dinov2.files import atomic_write

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_retrieval.json"
FIGURE_FILE = "retrieval_rankings.png"


def retrieval_cache(args: argparse.Namespace, cfg: Config, prepared: Preparation) -> FeatureCache:
    """The cache of features of the evaluated model, by protocol and image size."""
    if args.feature_cache == "none":
        return FeatureCache()
    folder = Path(args.feature_cache or Path(args.output_dir) / "features")
    return FeatureCache(folder, {**setup.frozen_model_facts(args, cfg), "preparation": prepared._asdict()})


def metrics_of(scores: Mapping[str, RetrievalScores]) -> dict[str, dict[str, float]]:
    """Setting -> mAP and mean precisions, in percent."""
    return {setting: {name: 100 * value for name, value in by_name(each).items()} for setting, each in scores.items()}


def per_query(benchmark: RetrievalBenchmark, scores: Mapping[str, RetrievalScores]) -> list[dict[str, Any]]:
    """The average precisions of each query in percent, None without positives."""
    rows: list[dict[str, Any]] = []
    for query in range(len(benchmark.queries)):
        found = {setting: each.per_query[query] for setting, each in scores.items()}
        percent = {name: None if each is None else 100 * each.average_precision for name, each in found.items()}
        rows.append({"query": benchmark.queries.describe(query), **percent})
    return rows


def log_scores(scores: Mapping[str, RetrievalScores], benchmark: RetrievalBenchmark, prepared: Preparation) -> None:
    """Log a table, in percent, with what the scores depend on."""
    queries, images = counted(len(benchmark.queries), "query", "queries"), counted(len(benchmark.database), "image")
    title = (
        f"retrieval: {queries} in a database of {images}, scores in %\n{prepared.description()}\n"
        "mP@k: precision of the first k images, or of those up to the last positive if they are fewer"
    )
    metrics = metrics_of(scores)
    rows = [[setting, each.num_queries, *metrics[setting].values()] for setting, each in scores.items()]
    logger.info("%s", as_table(title, ["setting", "queries", *next(iter(metrics.values()))], rows))


def save_figure(
    path: Path, benchmark: RetrievalBenchmark, features: RetrievalFeatures, count: int, columns: int = 8
) -> None:
    """Draw the rankings of evenly spaced queries; a figure that cannot be drawn or written is a warning.

    The query itself is left out of its ranking if the database has it.
    """
    total = len(benchmark.queries)
    queries = sorted({index * total // count for index in range(count)}) if count > 0 else []
    if not queries:
        return
    rankings = []
    for query in queries:
        ranking, itself = features.ranking(query, query + 1)[0].tolist(), benchmark.queries.path(query)
        others = (index for index in ranking if benchmark.database.path(index) != itself)
        rankings.append(list(islice(others, columns)))
    try:
        with atomic_write(path) as file:
            draw_rankings(benchmark, queries, rankings, columns).save(file, "PNG")
        logger.info("figure of the first ranks: %s", path)
    except (OSError, BadImageError) as error:
        logger.warning("no figure of the rankings: %s", error)


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    started = time.monotonic()
    with distributed.session():
        parse_dataset_str(args.dataset, RETRIEVAL_DATASETS)  # before anything is created
        cfg = setup.setup(args)
        prepared = preparation(args.protocol, args.image_size, cfg.crops.global_crops_size, cfg.student.patch_size)
        logger.info("images: %s", prepared.description())
        cache, path = retrieval_cache(args, cfg, prepared), Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        transform = prepared.transform(cfg.augmentation.mean, cfg.augmentation.std)
        options = setup.image_options(cfg)
        benchmark = make_retrieval_benchmark(args.dataset, transform=transform, image_options=options)
        features = extract_retrieval_features(
            setup.build_model_for_eval(cfg, args.pretrained_weights),
            benchmark,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            autocast_dtype=setup.get_autocast_dtype(cfg),
            cache=cache,
        )
        scores = score_benchmark(features, benchmark.ground_truth, benchmark.settings)
        for setting in set(benchmark.settings) - set(scores):
            logger.warning("no query has a relevant image in the setting %r", setting)
        log_scores(scores, benchmark, prepared)
        facts: dict[str, Any] = run_facts(
            {"queries": benchmark.queries, "database": benchmark.database}, cache, started
        )
        facts |= {"protocol": prepared.protocol, "image_size": prepared.image_size}
        facts |= {"preparation": prepared.description(), "per_query": per_query(benchmark, scores)}
        facts |= {"definitions": DEFINITIONS}
        facts |= {"scored_queries": {setting: each.num_queries for setting, each in scores.items()}}
        write_results(path, evaluation="retrieval", metrics=metrics_of(scores), args=args, **facts)
        if distributed.is_main():
            save_figure(path.with_name(FIGURE_FILE), benchmark, features, args.shown_queries)
