#!/usr/bin/env python
"""Table of memory and communication of a process by sharding strategy and backbone.

Computed from the sizes of the networks (see `train/preflight/memory.py`), with the heads, precisions and units of a
recipe; activations are not in it. Prints JSON in bytes, or with --markdown two tables in GiB.

    python scripts/sharding_table.py --markdown
    python scripts/sharding_table.py --config-file train/vitg14 --archs vit_large,vit_giant2 student.block_chunks=0
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from dinov2 import config
from dinov2.models import ARCHS
from dinov2.train.preflight.memory import STRATEGIES, estimate
from dinov2.train.ssl_meta_arch import SSLMetaArch

GIB = 2**30
PLACES = [f"{side}.{name}" for side in ("student", "teacher") for name in ("backbone", "dino_head", "ibot_head")]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="train/vitl16_short", help="recipe; its architecture is replaced")
    parser.add_argument("--archs", default=",".join(ARCHS), help="several with commas")
    parser.add_argument("--processes", default="1,8,32", help="several with commas")
    parser.add_argument("--processes-per-machine", type=int, default=8)
    parser.add_argument("--markdown", action="store_true", help="tables instead of JSON")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    rows = [
        row(args, arch, int(num_processes), strategy)
        for arch in args.archs.split(",")
        for num_processes in args.processes.split(",")
        for strategy in strategies_for(int(num_processes), args.processes_per_machine)
    ]
    print(markdown(rows) if args.markdown else json.dumps(rows, indent=2))


def strategies_for(num_processes: int, processes_per_machine: int) -> list[str]:
    """Distinct strategies: one process shards nothing, and one machine has no replicas."""
    if num_processes == 1:
        return ["NO_SHARD"]
    return [name for name in STRATEGIES if num_processes > processes_per_machine or not name.startswith("HYBRID")]


def row(args: argparse.Namespace, arch: str, num_processes: int, strategy: str) -> dict[str, Any]:
    sharding = [f"compute_precision.{place}.sharding_strategy={strategy}" for place in PLACES]
    cfg = config.load(args.config_file, [f"student.arch={arch}", *args.opts, *sharding])
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    costs = dataclasses.asdict(estimate(cfg, model, num_processes, args.processes_per_machine))
    del costs["activations"]
    return {
        "arch": arch,
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in model.student.items()},
        "processes": num_processes,
        "strategy": strategy,
        **{name: round(num_bytes) for name, num_bytes in costs.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format tables of memory and communication: rows by processes and strategy, columns by backbone."""
    several = [row for row in rows if row["processes"] > 1]
    return "\n".join(
        [
            "GiB held by a process all the time + whole weights and gradients at the peak:\n",
            *table(rows, lambda row: [row["state"], row["gathered"] + row["reducing"]], " + "),
            "\nGiB sent by a process in a step / sent by a machine to others:\n",
            *table(several, lambda row: [row["sent"], row["sent_by_machine"]], " / "),
        ]
    )


def table(rows: list[dict[str, Any]], figures: Callable[[dict[str, Any]], list[float]], sign: str) -> Iterator[str]:
    heads = {row["arch"]: sum(row["parameters"].values()) / 1e6 for row in rows}
    yield " | ".join(["| processes", "strategy", *(f"{arch} ({size:,.0f} M)" for arch, size in heads.items())]) + " |"
    yield "| --- " * (2 + len(heads)) + "|"
    lines: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        cell = sign.join(f"{figure / GIB:.2f}" for figure in figures(row))
        lines.setdefault((row["processes"], row["strategy"]), []).append(cell)
    for (num_processes, strategy), cells in lines.items():
        yield " | ".join([f"| {num_processes}", strategy if num_processes > 1 else "any", *cells]) + " |"


if __name__ == "__main__":
    main()
