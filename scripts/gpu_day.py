#!/usr/bin/env python
"""Everything that only a GPU can show, the most valuable first, within a number of minutes; writes JSON and a table.

Each stage is a process of its own, so that none can spoil the others. DIR/gpu_day.json is written after each: a run
that is cut off is worth what it did until then, and a stage that is stopped what it printed. If DIR has such a file
already, the next is gpu_day_2.json.

    python scripts/gpu_day.py --minutes 10 --out DIR
    python scripts/gpu_day.py --minutes 4 --out DIR --only agreement training   # stages whose names have these words
    python scripts/gpu_day.py --minutes 10 --out DIR --small                    # tiny sizes, also on a CPU
    python scripts/gpu_day.py --table DIR/gpu_day.json DIR/gpu_day_2.json       # for docs/benchmarks.md

Runs from a clone, with Python 3.11 and these packages: torch, torchvision, numpy, pillow, pyyaml, tqdm and jinja2. A
stage that lacks another package is skipped: tests need pytest, hypothesis and scikit-learn; features timm or
transformers. fvcore, iopath, submitit, omegaconf and xformers are not needed: without xformers its kernels are missing
from the table of attention.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.gpu_day_table import merge, table

MIN_SECONDS = 10.0
"""With less time left no further stage begins."""

TINY_STEP = (
    *("student.embed_dim=64", "student.depth=2", "student.num_heads=2", "student.block_chunks=0"),
    *("crops.global_crops_size=64", "crops.local_crops_size=32"),
    *("dino.head_n_prototypes=256", "dino.head_hidden_dim=64", "dino.head_bottleneck_dim=32"),
)


SIZES = {
    "bench_attention": (
        "--precision=bf16 --arch=vit_large --images=16",
        "--precision=bf16 --images=1 --global-tokens=17 --local-tokens=5 --rounds=2",
    ),
    "bench_features": (
        "--precision=bf16 --arch=vit_large --batch-size=128",
        "--precision=bf16 --size=28 --batch-size=2 --rounds=2",
    ),
    "bench_knn": (
        "--bank=1281167 --queries=10000 --width=1024",
        "--bank=4000 --queries=128 --width=64 --rounds=2",
    ),
}
"""Words for other benchmarks: in full, and small."""


@dataclass(frozen=True)
class Stage:
    """A Python program, relative to the clone, that prints JSON; of several objects the last one counts."""

    name: str
    words: tuple[str, ...]
    seconds: float = 60.0
    """Its limit."""


# --- Stages ----------------------------------------------------------------------------------------------------------


def stages(*, small: bool) -> Iterator[Stage]:
    """All stages, the most valuable first; limits are about twice of what an H200 should need."""

    def own(name: str, seconds: float) -> Stage:
        return Stage(name, ("scripts/gpu_day_stages.py", name, *(("--small",) if small else ())), seconds)

    def other(name: str, seconds: float, script: str, *words: str) -> Stage:
        return Stage(name, (f"scripts/{script}.py", *SIZES[script][small].split(), *words), seconds)

    step = partial(step_stage, small=small)
    yield own("environment", 60)
    yield own("agreement", 90)
    yield other("attention", 60, "bench_attention", "--ways=xformers,varlen,padded,nested,dense")
    yield step("vit_large", 64, "bf16")
    yield own("tests", 120)
    yield step("vit_large", 64, "bf16", "--compile")
    yield step("vit_small", 128, "bf16")
    yield step("vit_base", 128, "bf16")
    yield step("vit_giant2", 32, "bf16", "student.ffn_layer=swiglufused")
    yield own("data", 150)
    yield own("training", 180)
    yield step("vit_small", 64, "bf16", "--teacher-arch=vit_large", "--drop-path=0")
    yield step("vit_large", 64, "bf16", "gram.loss_weight=2")
    yield step("vit_large", 64, "bf16", "train.activation_checkpointing=selective")
    yield step("vit_large", 64, "fp16")
    yield own("rows", 40)
    yield other("features", 90, "bench_features")
    yield other("k-NN", 60, "bench_knn")
    yield step("vit_large", 64, "bf16", "train.activation_checkpointing=full")
    yield step("vit_large", 64, "bf16", "--attention=sdpa")
    yield step("vit_large", 128, "bf16")
    yield step("vit_large", 64, "fp32")
    yield other("attention, flex", 60, "bench_attention", "--ways=flex")
    if not small:  # minutes on a CPU
        yield step("vit_small", 128, "bf16", "--compile")
        yield step("vit_giant2", 32, "bf16", "student.ffn_layer=swiglufused", "--compile")


def step_stage(arch: str, batch_size: int, precision: str, *options: str, small: bool) -> Stage:
    """Training steps of train/vitl16_short with another network, batch and precision, and further words."""
    batch_size = max(batch_size // 32, 2) if small else batch_size
    words = ("--config-file=train/vitl16_short", f"--arch={arch}", f"--precision={precision}", "--no-plain")
    words += (f"--batch-size={batch_size}", *(("--rounds=2", *TINY_STEP) if small else ()), *options)
    shown = [re.sub(r"^(--|train\.|student\.)", "", option) for option in options]
    name = ", ".join([f"step: {arch}", str(batch_size), precision, *shown])
    return Stage(name, ("scripts/bench_step.py", *words), seconds=150 if "--compile" in options else 75)


# --- Running them ----------------------------------------------------------------------------------------------------


def run_all(chosen: list[Stage], out: Path, minutes: float, *, small: bool = False) -> dict[str, Any]:
    """Run stages until all have run or the time is over; the file in `out` is complete after each.

    Returns:
        The content of the file.
    """
    deadline, file = time.monotonic() + 60 * minutes, new_file(out)
    record: dict[str, Any] = {"date": date.today().isoformat(), "minutes": minutes, "small": small, "stages": {}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for stage in chosen:
            left = deadline - time.monotonic()
            result = {"status": "no time left"}
            if left >= MIN_SECONDS:
                result = run_stage(stage, min(stage.seconds * (3 if small else 1), left), Path(folder))
            record["stages"][stage.name] = result
            write_whole(file, json.dumps(record, indent=2, allow_nan=False) + "\n")
            seconds, reason = result.get("seconds", 0), result.get("reason", "")
            sys.stderr.write(f"{stage.name}: {result['status']} {reason} ({seconds:.0f} s)\n")
            if result["status"] == "interrupted":
                break
    write_whole(file.with_suffix(".md"), table(record))
    return record


def run_stage(stage: Stage, seconds: float, folder: Path) -> dict[str, Any]:
    """Run one stage, with `folder` for its temporary files; its processes end with it.

    Returns:
        Status, duration and command; the result, if it printed one; the reason in a line, unless all went well.
    """
    started = time.monotonic()
    settings = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile(dir=folder) as output, tempfile.TemporaryFile(dir=folder) as errors:
        # A group, not a session: what ends all processes of this session ends the stage too.
        process = subprocess.Popen(
            [sys.executable, *stage.words], cwd=ROOT, env=settings, stdout=output, stderr=errors, process_group=0
        )
        try:
            status, reason = ("failed", "") if process.wait(seconds) else ("ok", "")
        except subprocess.TimeoutExpired:
            status, reason = "stopped", f"after {seconds:.0f} s"
        except KeyboardInterrupt:
            status, reason = "interrupted", f"after {time.monotonic() - started:.0f} s"
        finally:
            end_group(process)
        printed, complaints = (read(file) for file in (output, errors))
    result: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    result["command"] = " ".join(stage.words)
    if status == "failed":
        reason = (complaints.strip() or printed.strip() or f"exit status {process.returncode}").splitlines()[-1]
        reason = reason.removeprefix(f"{sys.executable}: ")[:300]
        result |= {"status": "skipped" if "No module named" in reason else "failed", "errors": complaints[-3000:]}
    found = last_object(printed)
    return result | ({"reason": reason} if reason else {}) | ({"result": found} if found else {})


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def last_object(text: str) -> dict[str, Any] | None:
    """The last whole JSON object that begins a line and is none of another's lines; what JSON lacks becomes null."""
    decoder = json.JSONDecoder(parse_constant=lambda _: None)
    found, end = None, 0
    for match in re.finditer(r"^\{", text, re.MULTILINE):
        if match.start() >= end:
            try:
                found, end = decoder.raw_decode(text, match.start())
            except ValueError:
                continue
    return found


def new_file(folder: Path) -> Path:
    """A file for the record that no earlier run has written."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (file := folder / f"gpu_day{f'_{number}' if number > 1 else ''}.json").exists():
        number += 1
    return file


def write_whole(file: Path, text: str) -> None:
    """Write a file that is never seen in part."""
    unfinished = file.with_suffix(file.suffix + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


# --- The command -----------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages together (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="output folder (default: gpu_day)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="stages whose names have one of these words")
    parser.add_argument("--small", action="store_true", help="tiny sizes and longer limits, to try this script")
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="print the table of earlier runs")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if args.table:
        sys.stdout.write(table(merge([json.loads(path.read_text()) for path in args.table])))
        return
    interrupt: Callable[..., Any] = signal.default_int_handler
    signal.signal(signal.SIGTERM, interrupt)  # what the stage has printed so far is kept
    every = list(stages(small=args.small))
    for word in args.only or ():
        if not any(word in stage.name for stage in every):
            names = "; ".join(stage.name for stage in every)
            raise SystemExit(f"error: --only {word}: no stage has this word in its name; stages: {names}")
    chosen = [
        stage for stage in every if not args.only or any(word in stage.name for word in ["environment", *args.only])
    ]
    sys.stdout.write(table(run_all(chosen, args.out, args.minutes, small=args.small)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
