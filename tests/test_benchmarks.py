"""Each benchmark runs on tiny sizes, and its record has the ratios that it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_images

from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stages.distillation import DistillationArch
from dinov2.train.stages.gram_anchoring import GramAnchoringArch
from scripts import bench_health, bench_step
from scripts.soak import slope

ROOT = Path(__file__).resolve().parents[1]
TINY = ["student.embed_dim=32", "student.num_heads=2", "dino.head_hidden_dim=32", "dino.head_n_prototypes=16"]
TINY_STEP = [
    "--batch-size=2",
    "--rounds=2",
    "student.depth=1",
    "crops.global_crops_size=28",
    "crops.local_crops_size=14",
]


def record_of(script: str, *words: str) -> dict[str, Any]:
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"scripts/{script}.py", *words]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)
    assert record["threads"] == 1
    assert {"device", "torch"} <= record.keys()
    return record


def is_spread(values: list[float]) -> bool:
    """Median, least, most of times or their ratios."""
    median, least, most = values
    return 0 < least <= median <= most


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_checkpoint_and_what_it_costs(num_processes: int) -> None:
    words = ["--arch=vit_small", f"--processes={num_processes}", "--rounds=2", "--steps=1", "--every=50", *TINY]
    record = record_of("bench_checkpoint", *words)
    assert record["processes"] == num_processes
    assert record["checkpoint_bytes"] > 100_000
    for name in ("step", "stands_still", "waited", "plain_save", "resume", "plain_read"):
        assert is_spread(record[name]), name
    share, added, step = (record[name] for name in ("share_of_time", "added", "step"))
    assert min(added[1:]) / max(step) / 50 <= share[0] + 1e-3
    assert all(is_spread(ratio) for name, ratio in record["ratio"].items() if name != "added / plain_save")


def test_what_watching_a_run_costs() -> None:
    record = record_of("bench_health", *TINY_STEP, "health.knn_images=32", *TINY)
    assert all(is_spread(times) for times in record["seconds"].values())
    assert record["share_of_step_time"] > 0


def test_the_share_of_a_step_that_watching_takes() -> None:
    seconds = {"step": [2.0, 1.0, 9.0], "step with line": [3.0], "probe": [10.0]}
    assert bench_health.share(seconds, {"line": 10, "probe": 50}) == pytest.approx((1 / 10 + 10 / 50) / 2)
    assert bench_health.share({**seconds, "step with line": [1.0]}, {"line": 10}) == 0  # a disturbed measurement


def test_a_step_and_its_phases() -> None:
    record = record_of("bench_step", *TINY_STEP, *TINY)
    assert all(is_spread(ratio) for ratio in record["ratio"].values())
    assert all(min(times.values()) > 0 for times in record["milliseconds_per_phase"].values())
    assert 0 < record["model_flops_utilization"] < 1
    tokens, width, prototypes = 2 * 2 * 5 + 2 * 8 * 2, 32, 16
    assert record["flops_per_step"] > 3 * 2 * tokens * 12 * width**2 + 2 * width * prototypes, "of the student's blocks"


@pytest.mark.parametrize(
    ("words", "arch"),
    [(["--teacher-arch=vit_base", "--drop-path=0"], DistillationArch), (["gram.loss_weight=2"], GramAnchoringArch)],
    ids=["distillation", "Gram anchoring"],
)
def test_a_step_of_a_later_stage_is_that_of_its_objective(words: list[str], arch: type[SSLMetaArch]) -> None:
    args = bench_step.get_args_parser().parse_intermixed_args([*TINY_STEP, *TINY, *words])
    cfg, cpu = bench_step.make_config(args, "fp32"), torch.device("cpu")
    batch = bench_step.make_batch(cfg)
    side, same = (bench_step.Side(cfg, cpu, plain=False) for _ in range(2))
    losses, _ = same.model(batch, same.model.targets([batch], bench_step.NOW.teacher_temp)[0])
    assert isinstance(side.model, arch)
    assert side.step(iter([batch]), lambda _: None).item() == losses.total.item()
    assert ("gram_loss" in losses.terms) == (arch is GramAnchoringArch)


def test_ways_to_attend() -> None:
    words = ["--images=1", "--global-tokens=5", "--local-tokens=3", "--rounds=2", "--precision=fp32,bf16"]
    record = record_of("bench_attention", *words)
    ways = {"sdpa", "xformers", "varlen", "dense", "padded", "nested", "flex"}
    for result in record["results"].values():
        assert result["milliseconds"].keys() | result["not_run"].keys() == ways
        assert {"sdpa", "dense", "padded", "nested"} <= result["milliseconds"].keys(), result["not_run"]
        assert result["ratio"]["sdpa / sdpa"] == [1, 1, 1]
        assert all(map(is_spread, result["ratio"].values()))
    assert max(record["results"]["fp32"]["difference"].values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features(precision: str) -> None:
    record = record_of("bench_features", "--size=28", "--batch-size=2", "--rounds=2", f"--precision={precision}")
    for ratio in (record["ratio"], record["ratio_of_work"]):
        assert {"timm / ours", "transformers / ours"} <= ratio.keys()
        assert all(map(is_spread, ratio.values()))
    parameters = record["parameters"]
    assert parameters["ours"] == parameters["transformers"] == parameters["timm"] + 384, "timm has no mask token"


def test_nearest_neighbors() -> None:
    record = record_of("bench_knn", "--bank=8000", "--queries=300", "--width=16", "--rounds=2")
    for ratio in (record["ratio"], record["ratio_of_work"]):
        assert {"ours / bare", "ours / sklearn"} <= ratio.keys()
        assert all(map(is_spread, ratio.values()))
    assert min(record["found_by_both"].values()) > 0.999


@pytest.mark.slow
def test_soaking() -> None:
    record = record_of("soak", "--minutes=0.15", "--interval=0.5", "--images=24", "health.period=0")
    assert record["steps"] > 0 and record["samples"] > 5
    assert record["growth"].keys() == {"trainer", "worker 0", "worker 1"}
    for grown in record["growth"].values():
        assert {len(grown["pss_mb_per_hour"]), len(grown["anonymous_mb_per_hour"])} == {2}
        assert all(megabytes > 10 for megabytes in grown["pss_mb_at_minute"].values())


def test_a_slope_is_found_with_its_error() -> None:
    seconds = [3.0 * number for number in range(400)]
    noise = [0.5 * (-1) ** number for number in range(400)]
    fitted, error = slope(seconds, [100 + each / 3600 * 60 + other for each, other in zip(seconds, noise, strict=True)])
    assert abs(fitted - 60) < 3 * error < 1


def test_what_a_step_of_the_whole_command_costs(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    words = [f"--images={tmp_path / 'images'}", "--steps", "1", "3", "--rounds=1", "--batch-size=2", *TINY]
    record = record_of("bench_training", *words, "student.depth=1", "crops.global_crops_size=28")
    median, least, most = record["cpu_seconds_per_step"]["ours"]
    assert -60 < least <= median <= most < 60, "a difference of two runs, of which the shorter may be the slower"
    assert "ratio" not in record, "there is no other side"


@pytest.mark.slow
def test_students_that_share_a_teacher() -> None:
    record = record_of("bench_students", "--steps", "1", "3", "--rounds=2", "--batch-size=2", "--depth=1")
    assert is_spread(record["ratio"]) and 0.5 < record["operations"] < 1


def test_bench_start(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    record = record_of("bench_start", f"--images={tmp_path / 'images'}", "--rounds=2")
    assert record["ratio"].keys() == {"import torch", "--help", "dry run, images", "dry run, quickstart"}
    assert record["ratio"]["import torch"] == [1, 1, 1]
