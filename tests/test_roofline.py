"""The script that computes what a step costs at least: figures of recipes, as JSON and as a table."""

import json
from typing import Any

import pytest
from tiny import CONFIG_FILE, run_script

from dinov2 import config
from scripts.roofline import get_args_parser, roofline, table


def record_of(*words: str) -> dict[str, Any]:
    args = get_args_parser().parse_intermixed_args(words)
    return roofline(config.load(args.config_file, args.opts), args)


def test_the_short_recipe_on_the_default_device_as_json() -> None:
    result = run_script("scripts/roofline.py")
    assert result.returncode == 0, result.stderr
    [record] = json.loads(result.stdout)
    assert record["milliseconds"]["compute"] == pytest.approx(91.1, abs=0.1)
    speed = record["images_per_second"]
    assert (round(speed["compute at 55%"]), round(speed["compute at 65%"])) == (386, 457)
    assert sum(record["kernels_per_step"].values()) == 2815
    flops = record["gflop_per_image"]
    assert flops["total"] == pytest.approx(flops["teacher"] + flops["student"] + flops["backward"])
    assert record["gigabytes_per_step"]["moving average"] == pytest.approx(12 * 327_014_656 / 1e9)


def test_what_is_recomputed_and_accumulated_costs() -> None:
    recipe = ["--config-file", str(CONFIG_FILE)]
    settings = ["train.activation_checkpointing=full", "train.accumulate_steps=2"]
    plain, more = record_of(*recipe), record_of(*recipe, "--tflops=395", "--bandwidth=2.4", *settings)
    assert more["gflop_per_image"]["recomputed"] > 0 == plain["gflop_per_image"]["recomputed"]
    for name, least in (("compute", 4.5), ("bytes", 3), ("launches", 1.5)):
        assert more["milliseconds"][name] > least * plain["milliseconds"][name], name
    assert more["kernels_per_step"]["optimizer"] == plain["kernels_per_step"]["optimizer"]


def test_the_table_has_a_row_for_each_record() -> None:
    archs = ("vit_small", "vit_base")
    head, line, *rows = table([record_of(f"student.arch={arch}", "dino.head_n_prototypes=100") for arch in archs])
    assert {row.count("|") for row in (head, line, *rows)} == {head.count("|")}
    assert [arch in row for arch, row in zip(archs, rows, strict=True)] == [True, True]
