#!/usr/bin/env python
"""Stages of `gpu_day.py` that are no benchmarks of their own; prints JSON, after every part what is known by then.

python scripts/gpu_day_stages.py {environment,agreement,tests,data,training,rows} [--small]
"""

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch
from torch import Tensor

from scripts.gpu_day import TINY_STEP, last_object
from scripts.side_by_side import alternate, hardware, spread

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "pillow", "scikit-learn", "timm", "transformers", "xformers"),
    *("pytest", "omegaconf"),
)
AGREEMENT = {"fp32": 1e-3, "bf16": 1e-1}
"""Relative difference of gradients to those on the CPU in fp32 up to which they agree; a mistake is of order 1."""

Record = dict[str, Any]


def environment(small: bool) -> Iterator[Record]:
    """Hardware and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    memory = torch.cuda.get_device_properties(DEVICE).total_memory if DEVICE.type == "cuda" else 0
    python = ".".join(map(str, sys.version_info[:3]))
    yield {
        **hardware(DEVICE),
        **{"device_memory_bytes": memory, "cores": os.cpu_count(), "python": python, "versions": versions},
    }


def agreement(small: bool) -> Iterator[Record]:
    """One step on the device and one on the CPU in fp32, from the same weights: relative differences."""
    from scripts.bench_step import Side, get_args_parser, make_config

    words = ["--config-file=train/vitl16_short", "--arch=vit_small", "--batch-size=2", "student.layerscale=1.0"]
    torch.backends.cudnn.allow_tf32 = False  # the default for the patch embedding
    record: Record = {}
    for precision, limit in AGREEMENT.items():
        # KoLeo divides by the distances of features, which begin nearly equal: rounding in 16 bits would be all.
        more = [*(TINY_STEP if small else []), *(["dino.koleo_loss_weight=0"] if precision == "bf16" else [])]
        args = get_args_parser().parse_intermixed_args([*words, *more])
        on_cpu = Side(make_config(args, "fp32"), torch.device("cpu"), plain=False)
        weights = copy.deepcopy(on_cpu.model.state_dict())
        expected = results_of_step(on_cpu, weights)
        found = results_of_step(Side(make_config(args, precision), DEVICE, plain=False), weights)
        differences = {name: difference(found[name], expected[name]) for name in found}
        agrees = all(value <= limit for name, value in differences.items() if "change" not in name)
        record[precision] = {"agrees": agrees, "differences": differences, "loss": found["loss"]["loss"].item()}
        yield record


def results_of_step(side: Any, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Loss, clipped gradients, and changes of both networks by the first step from these weights, as copies."""
    from dinov2.data.loader import to_device
    from scripts.bench_step import make_batch

    side.model.load_state_dict(weights)
    torch.manual_seed(1)
    loss = side.step(iter(to_device([make_batch(side.cfg)], side.device)), lambda _: None)
    after = {name: value.detach().cpu().float() for name, value in side.model.state_dict().items()}
    changes = {name: value - weights[name] for name, value in after.items() if value.is_floating_point()}
    named = side.model.student.named_parameters()
    gradients = {name: parameter.grad.cpu() for name, parameter in named if parameter.grad is not None}

    def beginning(named: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {name: value for name, value in named.items() if name.startswith(prefix)}

    return {
        "loss": {"loss": loss.cpu()},
        "gradients of the backbone": beginning(gradients, "backbone."),
        "gradients of the heads": beginning(gradients, "dino_head."),
        "change of the student": beginning(changes, "student."),
        "change of the teacher": beginning(changes, "teacher."),
    }


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all tensors together, relative to that of the expected ones."""

    def norm(tensors: list[Tensor]) -> float:
        return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5

    return norm([found[name] - value for name, value in expected.items()]) / norm(list(expected.values()))


def tests(small: bool) -> Iterator[Record]:
    """The tests marked gpu, with warnings as they come: versions of other packages are not what is tested here."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    options = ["-v", "--no-header", "--tb=line", "-rfE", "-p", "no:cacheprovider", "-W", "default", "-o", "addopts="]
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    command = [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", "-m", "gpu", *files]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "300"}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b", line):
                outcomes[found[1].lower()] += 1
            elif line.startswith(("FAILED ", "ERROR ")):
                failures.append(line.strip()[:300])
            yield {"tests": dict(outcomes), "failures": failures}
    if not outcomes:
        raise SystemExit(1)  # pytest has said why


def data(small: bool) -> Iterator[Record]:
    """Steps that read JPEG files, with crops made by the device and by the CPU's cores."""
    from scripts.soak import write_photographs

    folder = Path(tempfile.mkdtemp())
    write_photographs(folder, 16 if small else 256)
    words = ["--config-file=train/vitl16_short", "--arch=vit_small", "--precision=bf16", "--no-plain", "--with-data"]
    words += ["--batch-size=2", "--rounds=2", *TINY_STEP] if small else ["--batch-size=128", "--rounds=300"]
    words += [f"train.dataset_path=ImageFolder:root={folder}", f"train.num_workers={os.cpu_count()}"]
    record: Record = {"images": len(list(folder.rglob("*.jpg")))}
    for place in ("device", "cpu"):
        output = run("scripts/bench_step.py", *words, f"train.augment_on={place}")
        yield (record := record | {place: last_object(output)})


def training(small: bool) -> Iterator[Record]:
    """The quickstart, resumed for another epoch, and its accuracy, which is documented for a CPU."""
    from dinov2.metrics_file import read_records
    from dinov2.train.environment import read_environment

    folder = Path(tempfile.mkdtemp())
    options = ["train.OFFICIAL_EPOCH_LENGTH=4", "health.knn_images=64"] if small else []
    words = ["dinov2/train/train.py", "--config-file=train/quickstart", f"--output-dir={folder}", *options]
    record: Record = {}
    for name, epochs in (("run", 2 if small else 30), ("resumed", 3 if small else 31)):
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, *words, f"optim.epochs={epochs}"], cwd=ROOT, stdout=sys.stderr
        ) as process:
            while process.poll() is None:
                time.sleep(0.5)
                yield record | {name: summary(read_records(folder / "training_metrics.json"))}
        if process.returncode:
            raise SystemExit(f"the training ended with status {process.returncode}: {log_end(folder)}")
        record[name] = summary(read_records(folder / "training_metrics.json"))
        record[name]["seconds"] = time.monotonic() - started
        record[name]["first_step"] = read_environment(folder / "environment.json")[-1]["first_step"]
        yield record
    run("scripts/quickstart_report.py", str(folder))
    yield record | {"accuracy": json.loads((folder / "knn.json").read_text())["metrics"]}


def summary(lines: list[dict[str, Any]]) -> Record:
    """Progress of a run by the lines of its metrics."""
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    times = [line["iter_time"] for line in lines[1:] if "iter_time" in line]
    return {
        "steps": int(lines[-1]["iteration"]) + 1 if lines else 0,
        "seconds_per_step": statistics.median(times) if times else None,
        **({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}),
    }


def log_end(folder: Path) -> str:
    """The last line of a training's log."""
    log = folder / "logs" / "log.txt"
    return log.read_text().strip().splitlines()[-1] if log.is_file() else "it left no log"


def rows(small: bool) -> Iterator[Record]:
    """Milliseconds of adding to 70 % of the rows of a matrix, atomically or not, and of replacing them."""
    count, width = (1000, 64) if small else (44160, 1024)
    milliseconds: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(count, width, device=DEVICE, dtype=dtype)
        index = torch.randperm(count)[: int(0.7 * count)].to(DEVICE)
        added = torch.randn(len(index), width, device=DEVICE, dtype=dtype)
        ways: dict[str, Callable[[], object]] = {
            "index_add": partial(x.index_add, 0, index, added),
            "index_copy": partial(x.index_copy, 0, index, added),
            "index_select, index_copy": partial(select_and_copy, x, index, added),
        }
        times = alternate(ways, 20, DEVICE).wall
        milliseconds[str(dtype).removeprefix("torch.")] = {
            name: spread([1000 * value for value in values]) for name, values in times.items()
        }
        yield {"rows": count, "width": width, "milliseconds": milliseconds}


def select_and_copy(x: Tensor, index: Tensor, added: Tensor) -> Tensor:
    """The same as `index_add` for distinct rows."""
    return x.index_copy(0, index, x.index_select(0, index) + added)


def run(*words: str) -> str:
    """Run a Python program of the clone; returns its output. What it complains of is passed on."""
    result = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout


STAGES: dict[str, Callable[[bool], Iterator[Record]]] = {
    stage.__name__: stage for stage in (environment, agreement, tests, data, training, rows)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="a stage of gpu_day.py")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    for record in STAGES[args.stage](args.small):
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
