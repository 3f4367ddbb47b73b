#!/usr/bin/env python
"""Benchmark of checkpoints during training, and of resuming, against `torch.save` in the same run; prints JSON.

Starts its processes itself: ViT-B/14 with the published heads on crops so small that two CPU cores do a step in a few
seconds. That is the hard case: a checkpoint costs the same whatever the step, and here the thread that writes it takes
its time from the cores that train. Takes 12 GB of memory, 6 GB of disk and, on two cores, three minutes.

    python scripts/bench_checkpoint.py
    python scripts/bench_checkpoint.py --processes 1 --arch vit_small --strategy NO_SHARD train.batch_size_per_gpu=8

Figures are seconds of wall time on the first process, [median, least, most] over the rounds. A round is a few
steps, a checkpoint with steps until it is complete, a few steps, a checkpoint that is waited for, and `torch.save`.
Resuming is timed after all rounds, from files that the system still has in memory.

    step            a step while no checkpoint is written; in each round before and after the checkpoint
    stands_still    until `Checkpointer.save` returns
    overlapped      from then until the checkpoint is complete, while training goes on, in so many `overlapped_steps`
    added           what a checkpoint adds: both, less as many steps without one
    share_of_time   added / time of so many steps as there are between checkpoints (--every); to stay below 0.02
    waited          a checkpoint at the end of a run: `save` and `finish` with nothing to do meanwhile
    plain_save      everything gathered on the first process and saved by `torch.save`, not flushed to the disk
    resume          `Checkpointer.load`
    plain_read      `torch.load` of the file by each process, without putting it anywhere
    ratio           added / plain_save and resume / plain_read: below 1 we are faster
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from dinov2 import config, distributed
from dinov2.train.checkpoint import Checkpointer
from dinov2.train.checkpoint_files.folder import latest_checkpoint
from dinov2.train.parallel import full_tensor
from dinov2.train.preflight.memory import STRATEGIES
from scripts.bench_memory import PLACES, Run
from scripts.side_by_side import hardware, spread

SMALL = [
    *("crops.global_crops_size=56", "crops.local_crops_size=28", "train.batch_size_per_gpu=2"),
    *(f"compute_precision.{place}.mixed_precision.{use}_dtype=fp32" for place in PLACES for use in ("param", "reduce")),
]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_base")
    parser.add_argument("--patch-size", type=int, default=14)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategy", choices=STRATEGIES, default="SHARD_GRAD_OP")
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints, for the share")
    parser.add_argument("--steps", type=int, default=3, help="steps on each side of a checkpoint, for comparison")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one of warm-up")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: where temporary files are)")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # of a process: where the first one writes
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    if args.record:
        measure(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        record = Path(folder) / "record.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        command = [sys.executable, *torchrun, __file__, "--record", str(record), *sys.argv[1:]]
        if subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ).returncode:
            raise SystemExit("the processes failed; what they wrote is above")
        print(record.read_text())


# --- One process -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Time some rounds; the first process writes the record."""
    with distributed.session() as place:
        bench = Bench(args)
        bench.round()
        rounds = [bench.round() for _ in range(args.rounds)]
        for one in rounds:
            one |= {"resume": bench.seconds(bench.resume), "plain_read": bench.seconds(bench.plain_read)}
        if not distributed.is_main():
            return
        for one in rounds:
            one["share_of_time"] = one["added"] / (args.every * one["step"])
        seconds = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
        pairs = (("added", "plain_save"), ("resume", "plain_read"))
        record = {
            "arch": f"{args.arch}/{args.patch_size}",
            "processes": place.world_size,
            "strategy": args.strategy if place.world_size > 1 else "none",
            "every": args.every,
            "rounds": args.rounds,
            "checkpoint_bytes": bench.checkpoint_bytes(),
            **seconds,
            "ratio": {f"{a} / {b}": spread([one[a] / one[b] for one in rounds]) for a, b in pairs},
            **hardware(distributed.device()),
        }
        args.record.write_text(json.dumps(record, indent=2))


class Bench:
    """A run, its checkpoints, and what to time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder = args.record.parent
        self.num_steps = args.steps
        sizes = [f"student.arch={args.arch}", f"student.patch_size={args.patch_size}"]
        sharding = [f"compute_precision.{place}.sharding_strategy={args.strategy}" for place in PLACES]
        self.run = Run(config.load(None, [*SMALL, *sizes, *args.opts, *sharding]))
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints",
            self.run.model,
            self.run.optimizer,
            torch.amp.GradScaler(distributed.device().type, enabled=False),
            period=args.every,
            last_step=sys.maxsize,
            keep=1,
        )
        self.saved = 0

    def round(self) -> dict[str, float]:
        """Time everything once, in seconds; all processes call it together."""
        steps = [self.seconds(self.step) for _ in range(self.num_steps)]
        stands_still, overlapped = self.seconds(self.save), 0.0
        num_overlapped = 0
        while not self.is_complete():
            overlapped += self.seconds(self.step)
            num_overlapped += 1
        steps += [self.seconds(self.step) for _ in range(self.num_steps)]
        return {
            "step": statistics.median(steps),
            "stands_still": stands_still,
            "overlapped": overlapped,
            "overlapped_steps": num_overlapped,
            "added": stands_still + overlapped - num_overlapped * statistics.median(steps),
            "waited": self.seconds(self.save_and_wait),
            "plain_save": self.seconds(self.plain_save),
        }

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds from the common start until all processes are done."""
        distributed.barrier()
        started = time.perf_counter()
        work()
        if distributed.device().type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()
        return time.perf_counter() - started

    def step(self) -> None:
        self.run.train(steps=1)
        self.checkpointer.finish(wait=False)

    def save(self) -> None:
        self.saved += 1
        self.checkpointer.save(self.saved, {})

    def save_and_wait(self) -> None:
        self.save()
        self.checkpointer.finish()

    def is_complete(self) -> bool:
        """Whether the first process sees the final name of the latest checkpoint."""
        found = latest_checkpoint(self.checkpointer.directory)
        return distributed.all_gather_object(found is not None and found.name.endswith(f"_{self.saved:07d}"))[0]

    def resume(self) -> None:
        folder = distributed.all_gather_object(latest_checkpoint(self.checkpointer.directory))[0]
        self.checkpointer.load(folder)

    def plain_save(self) -> None:
        """The simplest implementation: one file with everything, while all processes wait."""
        parts = {"model": self.run.model.state_dict(), **self.run.optimizer.state_dict()["state"]}
        state: dict[Any, dict[str, Tensor]] = {part: {} for part in parts}
        for part, tensors in parts.items():
            for name, value in tensors.items():
                whole = full_tensor(value)
                if distributed.is_main():
                    state[part][name] = whole.cpu()
        if distributed.is_main():
            torch.save(state, self.folder / "plain.pth")

    def plain_read(self) -> None:
        torch.load(self.folder / "plain.pth", map_location="cpu", weights_only=True)

    def checkpoint_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.checkpointer.directory.rglob("*.distcp"))


if __name__ == "__main__":
    main()
