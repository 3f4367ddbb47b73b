"""Benchmark of the k-NN classifier against other nearest-neighbor searches, sides alternating; prints JSON.

    python scripts/bench_knn.py [--bank 200000] [--queries 2000] [--width 384] [--rounds 5]

All find the 200 nearest of a bank for every query, by brute force; ours also votes for four values of k.

    bare       PyTorch: matrix product and top-k, 256 queries at a time against the whole bank
    sklearn    `NearestNeighbors(algorithm="brute")` of scikit-learn; on the CPU
    faiss      `IndexFlatIP`, if faiss is installed; on the CPU
    torch      ours without faiss, by which ours searches if it is installed; on the CPU

`ratio` is [median, least, most] over the rounds of our time / the side's in the same round: below 1 we are faster.
`ratio_of_work` is the same of CPU seconds, which other programs disturb less (with OMP_NUM_THREADS=1; not on a GPU).
`found_by_both` is the share of the nearest that the side finds like we do, of 64 queries; the rest are ties but for
rounding. Extra memory is what ours takes of the host at its peak, beyond the features (Linux).
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path from a clone: make the package importable

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.eval.knn import BANK_CHUNK, QUERY_BATCH, KnnModule, search_with_torch
from scripts.bench_memory import peak, reset_peak
from scripts.side_by_side import alternate, hardware, ratios

K = 200
NUM_CLASSES = 1000
CHECKED = 64  # queries

Search = Callable[[Tensor], Tensor]  # queries (Q, D) -> positions of the nearest (Q, K)


def bare(bank: Tensor) -> Search:
    return lambda queries: torch.cat([(part @ bank.T).topk(K, dim=1).indices for part in queries.split(QUERY_BATCH)])


def sklearn(bank: Tensor) -> Search:
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(bank.numpy())
    return lambda queries: torch.from_numpy(index.kneighbors(queries.numpy(), return_distance=False))


def faiss(bank: Tensor) -> Search:
    library = importlib.import_module("faiss")
    library.omp_set_num_threads(torch.get_num_threads())
    index = library.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return lambda queries: torch.from_numpy(index.search(queries.numpy(), K)[1])


def ours_by_torch(bank: Tensor) -> Search:
    """The search of `KnnModule` where faiss is not installed."""
    mean = bank.mean(dim=0)

    def search(queries: Tensor) -> Tensor:
        parts = [search_with_torch(queries - mean, part - mean, K) for part in bank.split(BANK_CHUNK)]
        sims = torch.cat([sims for sims, _ in parts], dim=1)
        positions = torch.cat([found + index * BANK_CHUNK for index, (_, found) in enumerate(parts)], dim=1)
        return positions.gather(1, sims.topk(K, dim=1).indices)

    return search


def main() -> None:
    parser = argparse.ArgumentParser(description="k-NN against other searches by brute force")
    for name, default in (("bank", 200_000), ("queries", 2000), ("width", 384), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    bank = functional.normalize(torch.randn(args.bank, args.width, device=device), dim=1)
    queries = functional.normalize(torch.randn(args.queries, args.width, device=device), dim=1)
    labels = torch.randint(NUM_CLASSES, (args.bank,), device=device)
    knn = KnnModule(bank, labels, [10, 20, 100, K], 0.07, device, NUM_CLASSES)

    def ours() -> None:
        sims, nearest = knn.neighbors(queries)
        for part in zip(sims.split(QUERY_BATCH), nearest.split(QUERY_BATCH), strict=True):
            knn.votes(*part)

    before = reset_peak()
    ours()
    memory = peak() - before
    searches = {"bare": bare(bank)}
    if device.type == "cpu":
        searches["sklearn"] = sklearn(bank)
        if importlib.util.find_spec("faiss"):
            searches["faiss"] = faiss(bank)
            searches["torch"] = ours_by_torch(bank)
    positions = KnnModule(bank, torch.arange(args.bank, device=device), [K], 0.07, device)
    _, expected = positions.neighbors(queries[:CHECKED])
    found = {name: share_in_both(expected, search(queries[:CHECKED])) for name, search in searches.items()}

    sides: dict[str, Callable[[], object]] = {
        "ours": ours,
        **{name: partial(search, queries) for name, search in searches.items()},
    }
    seconds = alternate(sides, args.rounds, device)
    record = {
        **vars(args),
        "k": K,
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.wall.items()},
        **{
            key: {f"ours / {name}": ratios(times["ours"], times[name]) for name in searches}
            for key, times in (("ratio", seconds.wall), ("ratio_of_work", seconds.work))
        },
        "found_by_both": found,
        "ours_extra_memory_mb": round(memory / 2**20),
        **hardware(device),
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


def share_in_both(a: Tensor, b: Tensor) -> float:
    """Of positions (Q, K) that are distinct in each row."""
    shared = sum(len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return round(shared / a.numel(), 4)


if __name__ == "__main__":
    main()
