#!/usr/bin/env python
"""Everything that only a GPU can show, the most valuable first, within a number of minutes; writes JSON and a table.

Each stage is a process of its own, so that none can spoil the others. DIR/gpu_day.json is written after each: a run
that is cut off is worth what it did until then. Stages whose packages are missing, or for which there is no time left,
are recorded as such. Needs PyTorch, torchvision, NumPy, Pillow and omegaconf; timm, transformers, scikit-learn and
pytest for some stages.

    python scripts/gpu_day.py --minutes 10 --out DIR
    python scripts/gpu_day.py --table DIR/gpu_day.json            # the table for docs/benchmarks.md
    python scripts/gpu_day.py --minutes 10 --out DIR --small      # the same stages in tiny sizes, also on a CPU
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch

from scripts.side_by_side import hardware

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "omegaconf", "timm", "transformers", "scikit-learn", "xformers")
CUDA = torch.cuda.is_available()
MIN_SECONDS = 10.0
"""With less time left no further stage begins."""


@dataclass(frozen=True)
class Stage:
    """A command that prints JSON on its last lines, or any text; relative to the clone."""

    name: str
    words: tuple[str, ...]
    seconds: float = 120.0


# --- Stages ----------------------------------------------------------------------------------------------------------


def stages(folder: Path, *, small: bool) -> Iterator[Stage]:
    """All stages, the most valuable first; `folder` takes their files."""
    here = ("scripts/gpu_day.py", *(("--small",) if small else ()), "--stage")
    yield Stage("agreement with the CPU, fp32", (*here, "agreement"))
    yield Stage("attention backends, bf16", ("scripts/bench_attention.py", "--precision=bf16"), 60)
    yield from steps(small, [("vit_large", 64, "bf16", ()), ("vit_large", 64, "bf16", ("--compile",))])
    yield Stage("tests marked gpu", ("-m", "pytest", "-q", "-m", "gpu", "--tb=line", *gpu_tests(small)), 180)
    yield from steps(
        small,
        [
            ("vit_small", 128, "bf16", ("--compile",)),
            ("vit_base", 128, "bf16", ("--compile",)),
            ("vit_giant2", 32, "bf16", ("--compile", "student.ffn_layer=swiglufused")),
            ("vit_large", 64, "bf16", ("train.activation_checkpointing=selective",)),
            ("vit_large", 64, "fp16", ()),
            ("vit_large", 64, "bf16", ("--attention=sdpa",)),
        ],
    )
    images, train = str(folder / "images"), ("dinov2/train/train.py", "--config-file", "train/quickstart")
    data = (f"train.dataset_path=ImageFolder:root={images}", f"train.num_workers={os.cpu_count() or 1}", "--with-data")
    yield Stage("write photographs", (*here, "photographs", "--out", images), 60)
    for place in ("device", "cpu"):
        yield from steps(small, [("vit_small", 128, "bf16", (*data, f"train.augment_on={place}"))])
    run = ("--output-dir", str(folder / "quickstart"), *(("train.OFFICIAL_EPOCH_LENGTH=4",) if small else ()))
    yield Stage("quickstart", (*train, *run, "optim.epochs=2" if small else "optim.epochs=8"))
    yield Stage("quickstart, resumed", (*train, *run, "optim.epochs=3" if small else "optim.epochs=10"))
    yield Stage("adding to rows and copying them", (*here, "rows"), 60)
    yield Stage("features, against timm and transformers", ("scripts/bench_features.py", "--precision=bf16"), 90)
    yield Stage("k-NN", ("scripts/bench_knn.py",), 90)


def steps(small: bool, ways: list[tuple[str, int, str, tuple[str, ...]]]) -> Iterator[Stage]:
    """Training steps of train/vitl16_short with another architecture, batch, precision and further words."""
    for arch, batch_size, precision, more in ways:
        size = (
            ("student.embed_dim=64", "student.depth=2", "student.num_heads=2", "student.block_chunks=0")
            if small
            else ()
        )
        words = ("--config-file=train/vitl16_short", f"--arch={arch}", f"--precision={precision}", "--no-plain")
        batch = f"--batch-size={2 if small else batch_size}"
        shown = ", ".join(word for word in more if "dataset_path" not in word and "num_workers" not in word)
        name = f"step: {arch}, batch {batch_size}, {precision}" + (f", {shown}" if shown else "")
        yield Stage(name, ("scripts/bench_step.py", *words, batch, *size, *more))


def gpu_tests(small: bool) -> tuple[str, ...]:
    return ("tests/layers", "tests/loss") if small else ()


def agreement(small: bool) -> dict[str, Any]:
    """Losses and gradients of one step in float32, on the device and on the CPU: largest relative differences."""
    from dinov2.data.loader import to_device
    from dinov2.train.ssl_meta_arch import SSLMetaArch
    from scripts.bench_step import NOW, get_args_parser, make_batch, make_config

    words = ["--arch=vit_small", "--batch-size=2", "--drop-path=0.3", *(["student.depth=2"] if small else [])]
    cfg = make_config(get_args_parser().parse_intermixed_args(words), "fp32")
    torch.manual_seed(0)
    on_cpu = SSLMetaArch(cfg).train()
    models = {"cpu": on_cpu, "device": copy.deepcopy(on_cpu).to("cuda" if CUDA else "cpu")}
    batch, losses = make_batch(cfg), {}
    for name, model in models.items():
        [moved] = to_device([batch], next(model.parameters()).device)
        torch.manual_seed(1)
        [targets] = model.targets([moved], NOW.teacher_temp)
        result, _ = model(moved, targets)
        result.total.backward()
        losses[name] = {term: value.item() for term, value in result.terms.items()}
    gradients: dict[str, float] = {}
    for (name, ours), theirs in zip(
        on_cpu.student.named_parameters(), models["device"].student.parameters(), strict=True
    ):
        if ours.grad is not None and theirs.grad is not None:
            difference = (ours.grad - theirs.grad.cpu()).norm() / ours.grad.norm().clamp_min(1e-12)
            gradients[name] = difference.item()
    worst = max(gradients, key=lambda name: gradients[name])
    return {
        "losses": losses,
        "loss_difference": max(abs(losses["device"][term] / value - 1) for term, value in losses["cpu"].items()),
        "gradient_difference": gradients[worst],
        "parameter": worst,
    }


def rows(small: bool) -> dict[str, Any]:
    """Milliseconds of adding to 70 % of the rows of a matrix, atomically or not, and of replacing them."""
    from functools import partial

    from scripts.side_by_side import alternate, spread

    device = torch.device("cuda" if CUDA else "cpu")
    count, width = (1000, 64) if small else (44160, 1024)
    x = torch.randn(count, width, device=device)
    index = torch.randperm(count)[: int(0.7 * count)].to(device)
    added = torch.randn(len(index), width, device=device)
    ways: dict[str, Callable[[], object]] = {
        "index_add": partial(x.index_add, 0, index, added),
        "index_copy": partial(x.index_copy, 0, index, added),
        "index_select and index_copy": lambda: x.index_copy(0, index, x.index_select(0, index) + added),
    }
    seconds = alternate(ways, 20, device).wall
    return {"milliseconds": {name: [1000 * value for value in spread(times)] for name, times in seconds.items()}}


def photographs(folder: Path, small: bool) -> dict[str, Any]:
    from scripts.soak import write_photographs

    write_photographs(folder, 16 if small else 2000)
    return {"images": len(list(folder.rglob("*.jpg")))}


# --- Running them ----------------------------------------------------------------------------------------------------


def run_all(out: Path, minutes: float, *, small: bool) -> None:
    """Run stages until all have run or the time is over; `out/gpu_day.json` is complete after each."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    record: dict[str, Any] = {"date": date.today().isoformat(), "minutes": minutes, "small": small, **environment()}
    record["stages"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages(Path(folder), small=small):
            left = deadline - time.monotonic()
            result = run_stage(stage, min(stage.seconds, left)) if left >= MIN_SECONDS else {"status": "no time left"}
            record["stages"][stage.name] = result
            temporary = out / "gpu_day.json.unfinished"
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            temporary.replace(out / "gpu_day.json")
            sys.stderr.write(f"{stage.name}: {result['status']} ({result.get('seconds', 0):.0f} s)\n")
    (out / "gpu_day.md").write_text(table(record))
    sys.stdout.write(table(record))


def run_stage(stage: Stage, seconds: float) -> dict[str, Any]:
    """Run one stage; its status, duration, and JSON, or the end of its output."""
    started = time.monotonic()
    command = [sys.executable, *stage.words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        status, output, errors = f"exit status {done.returncode}" if done.returncode else "ok", done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        status = f"stopped after {seconds:.0f} s"
        output, errors = (
            text.decode(errors="replace") if isinstance(text, bytes) else text or ""
            for text in (error.stdout, error.stderr)
        )
    result: dict[str, Any] = {"status": status, "seconds": time.monotonic() - started, "command": " ".join(stage.words)}
    try:
        return result | {"result": json.loads(output[output.index("{") :])}
    except ValueError:
        return result | {"output": output[-2000:], "errors": errors[-2000:]}


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {**hardware(torch.device("cuda" if CUDA else "cpu")), "cores": os.cpu_count(), "versions": versions}


def table(record: Mapping[str, Any]) -> str:
    """Markdown: one line for each training step, then one for each other stage."""
    title = f"{record['device']}, torch {record['torch']}, {record['date']}"
    lines = [
        f"| {title} | images/s | ms per step | MFU | peak memory, GiB | predicted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    others = ["", "| stage | result |", "| --- | --- |"]
    for name, stage in record["stages"].items():
        result = stage.get("result")
        if name.startswith("step: ") and result:
            peak = result["peak_memory_bytes"].get("ours", 0) / 2**30
            numbers = (
                f"{result['images_per_second']['ours']:.0f}",
                f"{1000 * result['seconds_per_step']['ours'][0]:.1f}",
                f"{result['model_flops_utilization']:.1%}",
                f"{peak:.1f}",
                f"{result['predicted_memory_bytes'] / 2**30:.1f}",
            )
            lines.append(f"| {name.removeprefix('step: ')} | {' | '.join(numbers)} |")
        else:
            shown = json.dumps(result) if result else (stage.get("output") or stage.get("errors") or "").strip()[-200:]
            others.append(f"| {name} | {stage['status']}: {' '.join(shown.split())[:300].replace('|', '/')} |")
    return "\n".join([*lines, *others, ""])


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="output folder")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try this script")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of an earlier run")
    parser.add_argument("--stage", choices=("agreement", "rows", "photographs"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if args.table:
        sys.stdout.write(table(json.loads(args.table.read_text())))
    elif args.stage:
        run = {"agreement": agreement, "rows": rows, "photographs": lambda small: photographs(args.out, small)}[
            args.stage
        ]
        sys.stdout.write(json.dumps(run(args.small)) + "\n")
    else:
        run_all(args.out, args.minutes, small=args.small)


if __name__ == "__main__":
    main()
