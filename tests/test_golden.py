"""Recorded numbers of the published implementation come out of this one, and a replay that is off is noticed."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.golden import check

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests" / "golden"
# All recordings, where the checkout has them beside it.
ALL = [ROOT.parent / "shared" / "golden" / folder for folder in ("dev", "dense")]
# Sets that take seconds, or start processes.
LONG_SETS = ("e_collate", "g_logreg", "i_augment")


def _sets(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if "set" in json.loads(path.read_text()))


def _all_recordings() -> list[Any]:
    if not all(folder.is_dir() for folder in ALL):
        absent = pytest.mark.skip(reason="the full recordings are absent: no ../shared/golden beside the checkout")
        return [pytest.param(None, marks=absent, id="absent")]
    recordings = []
    for path in (path for folder in ALL for path in _sets(folder)):
        recorded = json.loads(path.read_text())
        long = recorded["set"] in LONG_SETS or recorded.get("world_size", 1) > 1
        recordings.append(pytest.param(path, marks=[pytest.mark.slow] if long else [], id=path.stem))
    return recordings


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command hides GPUs and warnings from itself and its children; that must not outlive a test."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("path", _sets(SMALL), ids=lambda path: path.stem)
def test_small_recordings_are_reproduced(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok = check.check(path)
    assert ok, capsys.readouterr().out


@pytest.mark.parametrize("path", _all_recordings())
def test_all_recordings_are_reproduced(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok = check.check(path)
    assert ok, capsys.readouterr().out


@pytest.fixture
def recordings(tmp_path: Path) -> Callable[..., Path]:
    """Copies recordings into a folder of their own, where a test may spoil them."""

    def copy(*names: str) -> Path:
        for name in names:
            for path in SMALL.glob(f"{name}.*"):
                shutil.copy(path, tmp_path)
        return tmp_path

    return copy


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    recorded = json.loads(path.read_text())
    edit(recorded)
    path.write_text(json.dumps(recorded))


def test_a_folder_as_recorded_is_ok_and_gets_one_line_per_set(
    recordings: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recordings("b_dino_head", "h_samplers")
    (folder / "ABOUT.json").write_text('{"what": "a file about the recordings is no set"}')
    assert check.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["set", "b_dino_head", "h_samplers", "2"]


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("b_dino_head", "n1.y", 1e-3),  # an output
        ("b_dino_head", "n1.dw.mlp.bias", 1e-3),  # a gradient
        ("b_dino_head", "n1.w.mlp.bias", 1e-3),  # a weight that goes in
        ("b_dino_head", "n1.y", float("nan")),
        ("c_losses_ws1", "rank0.dino_center.step1.center_used", 1e-4),
        ("e_masking", "p14_i56.seed1", True),  # one patch of one mask
    ],
)
def test_a_tampered_tensor_gives_exit_status_1(
    recordings: Callable[..., Path], name: str, tensor: str, change: float
) -> None:
    folder = recordings(name)
    tensors = load_file(folder / f"{name}.safetensors")
    flat = tensors[tensor].flatten()
    flat[0] = ~flat[0] if flat.dtype == torch.bool else flat[0] + change
    tensors[tensor] = flat.view_as(tensors[tensor])
    save_file(tensors, folder / f"{name}.safetensors")
    assert check.main([str(folder)]) == 1


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("h_samplers", lambda recorded: recorded["samplers"]["EPOCH"][0]["indices"].reverse()),
        ("d_schedules", lambda recorded: recorded["lr_scaling"][0].update(lr=0.0010001)),
        ("d_param_groups", lambda recorded: recorded["models"]["dino_head_n3"]["fused_groups"].reverse()),
        ("j_state_dicts", lambda recorded: recorded["models"]["vit_small14_reg4"]["info"].update(n_parameters=1)),
        ("g_knn", lambda recorded: recorded["results"]["micro"]["full|k=3"].update({"top-1": 0.5})),
    ],
)
def test_a_tampered_number_gives_exit_status_1(
    recordings: Callable[..., Path], name: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    folder = recordings(name)
    _edit_json(folder / f"{name}.json", edit)
    assert check.main([str(folder)]) == 1


def test_one_bad_set_does_not_hide_the_others(
    recordings: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recordings("b_dino_head", "h_samplers")
    _edit_json(folder / "b_dino_head.json", lambda recorded: recorded.pop("cases"))
    assert check.main([str(folder)]) == 1
    assert "1 of 2 sets ok" in capsys.readouterr().out


def test_an_unknown_set_gives_exit_status_1(
    recordings: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recordings("h_samplers")
    (folder / "z_new.json").write_text('{"set": "z_new"}')
    assert check.main([str(folder)]) == 1
    assert "unknown set 'z_new'; known: a_backbone, " in capsys.readouterr().out


def test_tensors_that_no_json_describes_give_exit_status_1(recordings: Callable[..., Path]) -> None:
    folder = recordings("b_dino_head", "h_samplers")
    (folder / "b_dino_head.json").unlink()
    assert check.main([str(folder)]) == 1


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_truncated_file_does_not_hide_the_other_sets(
    recordings: Callable[..., Path], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recordings("b_dino_head", "h_samplers")
    path = folder / f"b_dino_head.{suffix}"
    path.write_bytes(path.read_bytes()[:100])
    assert check.main([str(folder)]) == 1
    assert "1 of 2 sets ok" in capsys.readouterr().out


def test_a_recorded_tensor_that_is_not_replayed_gives_exit_status_1(
    recordings: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recordings("b_dino_head")
    tensors = load_file(folder / "b_dino_head.safetensors")
    save_file(tensors | {"n9.y": torch.zeros(1)}, folder / "b_dino_head.safetensors")
    assert check.main([str(folder)]) == 1
    assert "1 recorded tensors were not replayed: ['n9.y']" in capsys.readouterr().out


def test_an_empty_folder_ends_the_command_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"no recordings in {tmp_path}"):
        check.main([str(tmp_path)])


@pytest.mark.slow
def test_the_command_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_golden.py"), str(SMALL), "--only", "b_dino_head"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 1 sets ok"
