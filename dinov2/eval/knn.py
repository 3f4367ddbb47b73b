"""k-NN classification with frozen features: no training, no hyperparameters but k and a temperature.

Shapes: n training images (their features are the bank that is searched), Q queries, D feature width, C classes, K the
largest k.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.flags.evaluation import knn_parser as get_args_parser

if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before the imports that take seconds

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2 import distributed
from dinov2.analysis.nearest_neighbors import QUERY_BATCH, search_with_torch
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval import setup
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.features import extract_features
from dinov2.eval.metrics import MetricType, build_metric, percent
from dinov2.eval.results import archive_results, as_table, counted, described_set, run_facts, write_results
from dinov2.log import run_command

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_knn.json"

BANK_CHUNK = 65536  # bank images at once; similarities for QUERY_BATCH queries then take 128 MiB

TOPS = ("top-1", "top-5")

Scores = dict[tuple[str, int], dict[str, float]]  # (bank name, k) -> {"top-1": fraction, ...}


class KnnModule(nn.Module):
    """Weighted vote of the nearest neighbors (Wu et al. 2018, arXiv 1805.01978).

    The bank may be in host memory and is copied to `device` in chunks.

    Args:
        train_features: (n, D) float, L2-normalized rows.
        train_labels: (n,) int64 in 0..C-1.
        nb_knn: Values of k; those above n are replaced by n, with a warning.
        T: Temperature of the softmax over the similarities.
        device: Where to compute.
        num_classes: C.

    Raises:
        ValueError: A k is below 1, or, in a search, features are not finite.
    """

    def __init__(
        self,
        train_features: Tensor,
        train_labels: Tensor,
        nb_knn: Sequence[int],
        T: float,
        device: torch.device,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.features, self.labels = train_features, train_labels
        self.nb_knn = _possible_ks(nb_knn, len(train_labels))
        self.temperature, self.device, self.num_classes = T, device, num_classes

    @torch.inference_mode()
    def forward(self, queries: Tensor) -> dict[int, Tensor]:
        """Votes of the k nearest neighbors for each k: queries (Q, D) -> {k: (Q, C)}."""
        return self.votes(*self.neighbors(queries))

    @torch.inference_mode()
    def neighbors(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (Q, K) float32, largest first, and labels (Q, K) of the K nearest bank images.

        The similarities are cosines up to a constant per query, which changes neither their order nor the votes: for
        unit vectors cos(q, b) = 1 - |q - b|^2 / 2, and with the mean m of the bank the part of -|q - b|^2 / 2 that
        depends on b is (q - m)(b - m) - |b - m|^2 / 2. Unlike the cosine, this is not dominated by rounding errors if
        all features are close to each other, like those of an untrained network.
        """
        largest_k = max(self.nb_knn)
        queries = queries.to(self.device, torch.float32)
        sims = queries.new_full((len(queries), largest_k), -torch.inf)
        labels = torch.zeros_like(sims, dtype=torch.int64)
        mean = self.features.mean(dim=0).to(self.device, torch.float32)
        for name, values in (("bank", mean), ("queries", queries)):
            if (~values.isfinite()).any():  # faiss would answer with positions of -1
                raise ValueError(f"features of the {name} are not finite (inf or nan): they have no nearest neighbors")
        queries = queries - mean
        search = search_with_faiss if self.device.type == "cpu" and find_spec("faiss") else search_with_torch
        centered = queries.new_empty(min(BANK_CHUNK, len(self.labels)), queries.shape[1])
        for start in range(0, len(self.labels), BANK_CHUNK):
            chunk = self.features[start : start + BANK_CHUNK].to(self.device, torch.float32)
            bank = torch.sub(chunk, mean, out=centered[: len(chunk)])
            bank_labels = self.labels[start : start + BANK_CHUNK].to(self.device)
            values, positions = search(queries, bank, min(largest_k, len(bank)))
            candidates = torch.cat([labels, bank_labels[positions]], dim=1)
            sims, best = torch.cat([sims, values], dim=1).topk(largest_k, dim=1)
            labels = candidates.gather(1, best)
        return sims, labels

    def votes(self, sims: Tensor, labels: Tensor) -> dict[int, Tensor]:
        """Class scores from neighbors, sims and labels (Q, K) -> {k: (Q, C)}.

        The softmax is over all K neighbors whatever the k, so the votes of the smaller k sum to less than 1.
        """
        weights = functional.softmax(sims / self.temperature, dim=1)
        empty = weights.new_zeros(len(weights), self.num_classes)
        return {k: empty.scatter_add(1, labels[:, :k], weights[:, :k]) for k in self.nb_knn}


def search_with_faiss(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same on a CPU by the library faiss, which is faster there."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # not which instructions of the CPU it tries to use
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    squares, positions = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_L2)
    return torch.from_numpy(squares) / -2, torch.from_numpy(positions)


def _possible_ks(nb_knn: Sequence[int], bank_size: int) -> list[int]:
    """The distinct values of k in ascending order, at most the size of the bank."""
    if not nb_knn or min(nb_knn) < 1:
        raise ValueError(f"the numbers of neighbors must be at least 1, got {list(nb_knn)}")
    if too_large := [k for k in nb_knn if k > bank_size]:
        size = counted(bank_size, "image")
        logger.warning("k = %s: the training set has only %s, k = %d is used", too_large, size, bank_size)
    return sorted({min(k, bank_size) for k in nb_knn})


def few_shot_index(labels: Tensor, n_per_class: int, seed: int) -> Tensor:
    """Indices of `n_per_class` random images of each class (all images of smaller classes), class by class."""
    generator = torch.Generator().manual_seed(seed)
    by_class = labels.cpu().argsort(stable=True).split(labels.cpu().bincount().tolist())
    return torch.cat([index[torch.randperm(len(index), generator=generator)[:n_per_class]] for index in by_class])


def eval_knn_on_features(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    nb_knn: Sequence[int],
    temperature: float = 0.07,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
    metric_type: MetricType = MetricType.MEAN_ACCURACY,
    device: torch.device | None = None,
) -> Scores:
    """Evaluate k-NN on given features, which must be complete on every rank.

    Args:
        train_features: Bank (n, D), L2-normalized.
        train_labels: (n,) int64.
        val_features: Queries (Q, D), L2-normalized; each rank classifies its share.
        val_labels: (Q,) int64.
        nb_knn: Values of k.
        temperature: Temperature of the softmax over similarities.
        n_per_class_list: Negative: the whole bank; n > 0: random banks of n images per class, for which k takes the
            values of `nb_knn` up to n, and n itself.
        n_tries: Random banks per value of n, seeded 0, 1, ...; their scores are averaged.
        metric_type: Type of accuracy.
        device: Where to compute; None: the device of the process.
    """
    num_classes = 1 + int(max(train_labels.max(), val_labels.max()))
    device = device or distributed.device()
    mine = slice(distributed.rank(), None, distributed.world_size())

    def score(features: Tensor, labels: Tensor, ks: Sequence[int]) -> dict[int, dict[str, float]]:
        knn = KnnModule(features, labels, ks, temperature, device, num_classes)
        return _score(knn, val_features[mine], val_labels[mine], metric_type)

    scores: Scores = {}
    for n in n_per_class_list:
        if n == 0:
            raise ValueError("images per class must be at least 1, or -1 for all, got 0")
        if n < 0:
            name, tries = "full", [score(train_features, train_labels, nb_knn)]
        else:
            ks = sorted(k for k in {*nb_knn, n} if k <= n)
            banks = _few_shot_banks(train_features, train_labels, n, n_tries)
            name, tries = f"{n} per class", [score(*bank, ks) for bank in banks]
        for k in tries[0]:
            scores[name, k] = {top: sum(t[k][top] for t in tries) / len(tries) for top in tries[0][k]}
    return scores


def _few_shot_banks(
    features: Tensor, labels: Tensor, n_per_class: int, n_tries: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of `n_tries` random banks, see `few_shot_index`."""
    fewest = int(labels.bincount().min())
    if fewest < n_per_class:
        text = "%s per class: the smallest class has only %d, all of which are used"
        logger.warning(text, counted(n_per_class, "image"), fewest)
    for seed in range(n_tries):
        index = few_shot_index(labels, n_per_class, seed).to(features.device)
        yield features[index], labels[index]


def _score(knn: KnnModule, queries: Tensor, labels: Tensor, metric_type: MetricType) -> dict[int, dict[str, float]]:
    """Accuracies {k: {"top-1": ...}} for the queries of all ranks."""
    metrics = {k: build_metric(metric_type, num_classes=knn.num_classes).to(knn.device) for k in knn.nb_knn}
    found = (*knn.neighbors(queries), labels.to(knn.device))
    batches = zip(*(t.split(QUERY_BATCH) for t in found), strict=True)
    for batch_sims, batch_labels, target in batches:
        for k, votes in knn.votes(batch_sims, batch_labels).items():
            metrics[k].update(votes, target)
    return {k: {top: float(value) for top, value in metric.compute().items()} for k, metric in metrics.items()}


def eval_knn(
    model: nn.Module,
    train_dataset: ImageDataset,
    val_dataset: ImageDataset,
    *,
    batch_size: int = 256,
    num_workers: int = 5,
    gather_on_cpu: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    cache: FeatureCache | None = None,
    **protocol: Any,
) -> Scores:
    """Extract the normalized class tokens of both sets, and run `eval_knn_on_features(..., **protocol)`."""

    def extract(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
        features, labels = extract_features(
            model, dataset, batch_size, num_workers, gather_on_cpu, autocast_dtype=autocast_dtype, cache=cache
        )
        return functional.normalize(features, dim=1), labels

    return eval_knn_on_features(*extract(train_dataset), *extract(val_dataset), **protocol)


def log_scores(scores: Scores, val_dataset: ImageDataset) -> None:
    """Log the scores in percent: the published lines, and a table."""
    for key, accuracies in scores.items():
        for top, accuracy in accuracies.items():
            logger.info("%s %s: %.2f", key, top.replace("top-", "Top "), 100 * accuracy)
    title = f"k-NN classification of {described_set(val_dataset)}, accuracy in %"
    rows = [[bank, k, *(100 * s[top] if top in s else None for top in TOPS)] for (bank, k), s in scores.items()]
    logger.info("%s", as_table(title, ["images", "k", *TOPS], rows))


def main(args: argparse.Namespace) -> None:
    """Run the evaluation of the command line."""
    started = time.monotonic()
    with distributed.session():
        cfg = setup.setup(args, [args.train_dataset, args.val_dataset])
        transform, cache = setup.eval_transform(args, cfg), setup.feature_cache(args, cfg)
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        options = setup.image_options(cfg)
        sets, equal_images = setup.open_sets(args.train_dataset, [args.val_dataset], transform, options)
        scores = eval_knn(
            setup.build_model_for_eval(cfg, args.pretrained_weights),
            sets[args.train_dataset],
            sets[args.val_dataset],
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            gather_on_cpu=args.gather_on_cpu,
            autocast_dtype=setup.get_autocast_dtype(cfg),
            cache=cache,
            nb_knn=args.nb_knn,
            temperature=args.temperature,
            n_per_class_list=args.n_per_class_list,
            n_tries=args.n_tries,
        )
        log_scores(scores, sets[args.val_dataset])
        metrics: dict[str, dict[str, dict[str, float]]] = {}
        for (name, k), accuracies in scores.items():
            metrics.setdefault(name, {})[str(k)] = percent(accuracies)
        facts = run_facts(sets, cache, started) | {"equal_images": equal_images}
        write_results(path, evaluation="knn", metrics=metrics, args=args, **facts)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(ARGS)))
