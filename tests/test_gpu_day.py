"""The day with a GPU: stages that fail, lack a package, hang or are cut off spoil nothing; its record as a table."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_day import ROOT, Stage, last_object, run_all, stages
from scripts.gpu_day_stages import STAGES
from scripts.gpu_day_table import FORMS, merge, table


def python(name: str, code: str, seconds: float = 60.0) -> Stage:
    return Stage(name, ("-c", code), seconds)


def recorded(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "gpu_day.json").read_text())
    return record


def test_a_stage_that_ends_badly_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    file = tmp_path / "gpu_day.json"
    chosen = [
        python("good", "print('a line'); print('{\"value\": NaN}')"),
        python("bad", "print('{\"part\": 1}'); raise ValueError('this is why')"),
        python("without a package", "import not_installed"),
        python("slow", "print('{\"part\": 1}'); import time; time.sleep(60)", seconds=1),
        python("complete file", f"import json; print(json.dumps(json.load(open({str(file)!r}))))"),
    ]
    run_all(chosen, tmp_path, minutes=2)
    found = recorded(tmp_path)["stages"]
    assert found["good"]["result"] == {"value": None}
    assert (found["bad"]["status"], found["bad"]["reason"]) == ("failed", "ValueError: this is why")
    assert found["bad"]["result"] == {"part": 1}
    assert found["without a package"]["status"] == "skipped"
    assert found["without a package"]["reason"] == "ModuleNotFoundError: No module named 'not_installed'"
    assert (found["slow"]["status"], found["slow"]["reason"]) == ("stopped", "after 1 s")
    assert found["slow"]["result"] == {"part": 1}
    assert list(found["complete file"]["result"]["stages"]) == [stage.name for stage in chosen[:-1]]
    assert "| without a package | **skipped** ModuleNotFoundError" in (tmp_path / "gpu_day.md").read_text()


def test_the_children_of_a_stopped_stage_end_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('{\"child\": %d}' % child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    run_all([python("parent", code, seconds=3)], tmp_path, minutes=1)
    child = recorded(tmp_path)["stages"]["parent"]["result"]["child"]
    deadline = time.monotonic() + 30
    with suppress(FileNotFoundError, ProcessLookupError):  # it is gone
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":  # a kill takes a moment
            assert time.monotonic() < deadline, "the child is still running"
            time.sleep(0.05)


def test_without_time_nothing_begins_and_an_earlier_record_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        run_all([python("any", "print(1)")], tmp_path, minutes=0)
    assert recorded(tmp_path)["stages"] == {"any": {"status": "no time left"}}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("gpu_day.json", "gpu_day.md", "gpu_day_2.json", "gpu_day_2.md")
    }


def test_an_interruption_keeps_what_a_stage_has_printed(tmp_path: Path) -> None:
    code = "import os, signal, time; print('{\"part\": 1}', flush=True); os.kill(os.getppid(), signal.SIGINT)"
    run_all([python("cut off", f"{code}; time.sleep(60)"), python("next", "print(1)")], tmp_path, minutes=1)
    found = recorded(tmp_path)["stages"]
    assert found.keys() == {"cut off"}
    assert (found["cut off"]["status"], found["cut off"]["result"]) == ("interrupted", {"part": 1})


def test_the_last_whole_object_counts() -> None:
    assert last_object('text {}\n{\n "a": {\n"b": 1}\n}\n{"a": [') == {"a": {"b": 1}}
    assert last_object('{"a": 1}\n{"a": 2}\nmore') == {"a": 2}
    assert last_object("nothing") is None


@pytest.mark.parametrize("small", [False, True])
def test_stages_have_names_of_their_own_and_programs(small: bool) -> None:
    chosen = list(stages(small=small))
    names = [stage.name for stage in chosen]
    assert len(set(names)) == len(names)
    for stage in chosen:
        assert (ROOT / stage.words[0]).is_file()
        assert stage.name in STAGES or stage.words[0].startswith("scripts/bench_")
        assert stage.name.startswith("step: ") or stage.name.partition(",")[0] in {"environment", *FORMS}


STEP = {
    "seconds_per_step": {"ours": [0.25, 0.24, 0.26]},
    "images_per_second": {"ours": 256.0},
    "model_flops_utilization": 0.456,
    "peak_memory_bytes": {"ours": 40 * 2**30},
    "predicted_memory_bytes": 38 * 2**30,
}
RECORD: dict[str, Any] = {
    "date": "2026-12-01",
    "small": False,
    "stages": {
        "environment": {"status": "ok", "result": {"device": "NVIDIA H200", "torch": "2.11.0"}},
        "agreement": {
            "status": "ok",
            "result": {
                "fp32": {"agrees": True, "differences": {"loss": 2e-7}},
                "bf16": {"agrees": False, "differences": {"loss": None}},
            },
        },
        "step: vit_large, 64, bf16": {"status": "ok", "result": STEP},
        "step: vit_base, 128, bf16, ffn_layer=mlp, compile": {
            "status": "ok",
            "result": STEP | {"peak_memory_bytes": {"process": 1}},
        },
        "step: vit_giant2, 32, bf16": {"status": "stopped", "reason": "after 75 s"},
        "tests": {"status": "ok", "result": {"tests": {"passed": 3, "failed": 1}, "failures": ["FAILED a::b - c | d"]}},
        "data": {"status": "stopped", "reason": "after 150 s", "result": {"images": 256, "device": STEP}},
        "rows": {"status": "ok", "result": {"milliseconds": {"float32": {"index_add": [1.5, 1.4, 1.6]}}}},
        "k-NN": {"status": "ok", "result": {"another": "form"}},
    },
}


def test_a_record_becomes_a_table() -> None:
    lines = table(RECORD).splitlines()
    assert lines[0] == "NVIDIA H200, torch 2.11.0, 2026-12-01:"
    for line in (
        "| vit_large | 64 | bf16 |  | 256 | 250.0 [240.0, 260.0] | 45.6% | 40.0 | 38.0 | 0.95 |",
        "| vit_base | 128 | bf16 | ffn_layer=mlp, compile | 256 | 250.0 [240.0, 260.0] | 45.6% | - | 38.0 | - |",
        "| step: vit_giant2, 32, bf16 | **stopped** after 75 s |",
        "| agreement | fp32 agrees, relative differences: loss 2.0e-07; bf16 **differs**, relative differences: loss"
        " not finite |",
        "| tests | 1 failed, 3 passed; a::b - c / d |",
        "| data | **stopped** after 150 s; crops by the device: 256 images/s |",
        "| rows | float32, ms: index_add 1.500 |",
        "| k-NN | an incomplete result: KeyError 'seconds' |",
    ):
        assert line in lines


def test_a_second_run_fills_the_gaps_of_the_first() -> None:
    later = {"date": "2026-12-02", "stages": {"tests": {"status": "no time left"}, "data": {"status": "ok"}}}
    later["stages"]["step: vit_giant2, 32, bf16"] = {"status": "ok", "result": STEP}  # type: ignore[index]
    whole = merge([RECORD, later])
    assert whole["stages"]["tests"] == RECORD["stages"]["tests"]
    assert whole["stages"]["data"] == RECORD["stages"]["data"]
    assert "| vit_giant2 | 32 | bf16 |" in table(whole)


def test_the_command_runs_chosen_stages_and_prints_the_table_again(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_day.py"]
    words = ["--small", "--minutes=2", f"--out={tmp_path}", "--only", "rows"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *words], cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
    assert {stage["status"] for stage in recorded(tmp_path)["stages"].values()} == {"ok"}, done.stderr
    assert "| rows | float32, ms: index_add " in done.stdout
    again = subprocess.run([*command, "--table", tmp_path / "gpu_day.json"], cwd=ROOT, capture_output=True, text=True)
    assert again.stdout == done.stdout


def test_a_word_that_no_stage_has_is_an_error_with_the_stages(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_day.py", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([*command, "--only", "rows", "crops"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert re.fullmatch(r"error: --only crops: no stage has this word in its name; stages: .*; data; .*\n", done.stderr)
    done = subprocess.run([*command, "--table", tmp_path / "none.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
