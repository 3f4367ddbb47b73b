"""How fast is k-NN? Our classifier against a bare matrix product with top-k, sides alternating; prints JSON.

    python scripts/bench_knn.py [--bank 200000] [--queries 10000] [--width 384] [--repeats 3]

Both find the k nearest of a bank for every query, the bare version in blocks of queries against the whole bank; ours
also votes. Peak memory is that of the process while each side runs, above what the features themselves take.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path from a clone: make the package importable

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.eval.knn import KnnModule

K = 200
NUM_CLASSES = 1000
ROWS = 256  # queries at once


def bare(bank: Tensor, queries: Tensor) -> Tensor:
    """Similarities of the nearest: (Q, K)."""
    return torch.cat([(part @ bank.T).topk(K, dim=1).values for part in queries.split(ROWS)])


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="k-NN against a bare matrix product and top-k")
    for name, default in (("bank", 200_000), ("queries", 10_000), ("width", 384), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    bank = functional.normalize(torch.randn(args.bank, args.width, device=device), dim=1)
    queries = functional.normalize(torch.randn(args.queries, args.width, device=device), dim=1)
    labels = torch.randint(NUM_CLASSES, (args.bank,), device=device)
    knn = KnnModule(bank, labels, [10, 20, 100, K], 0.07, device, NUM_CLASSES)

    def ours() -> None:
        for part in queries.split(ROWS * 16):
            knn(part)

    ours_s, bare_s = [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(args.repeats):
        ours_s.append(seconds(ours))
        if len(ours_s) == 1:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        bare_s.append(seconds(lambda: bare(bank, queries)))
    record = {
        "bank": args.bank,
        "queries": args.queries,
        "width": args.width,
        "k": K,
        "ours_s": round(statistics.median(ours_s), 3),
        "bare_s": round(statistics.median(bare_s), 3),
        "ratio": round(statistics.median(o / b for o, b in zip(ours_s, bare_s, strict=True)), 3),
        "ours_extra_memory_mb": round(memory / 1024),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
