"""Stages of the day with a GPU on CUDA's host code: they end and report; what agrees with the CPU no stub can know."""

import json
from pathlib import Path

import pytest
import rehearsal

pytestmark = pytest.mark.cuda


def test_stages_run_on_the_device(stub: Path, tmp_path: Path) -> None:
    words = ["--small", "--minutes=3", f"--out={tmp_path}", "--only", "agreement", "rows"]
    output = rehearsal.run(stub, "scripts/gpu_day.py", *words)
    stages = json.loads((tmp_path / "gpu_day.json").read_text())["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("environment", "agreement", "rows"), "ok"
    ), stages
    assert "H200" in stages["environment"]["result"]["device"]
    assert not stages["agreement"]["result"]["fp32"]["agrees"], "the stub computes nothing"
    assert "| agreement | fp32 **differs**" in output
