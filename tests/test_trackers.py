"""Trackers show what was logged, continue after a resume, and never stop a training."""

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinov2.meters import MetricLogger
from dinov2.trackers import by_group, check_trackers, open_trackers

ROOT = Path(__file__).resolve().parents[1]
OFF = {"tensorboard": False, "wandb_project": "", "wandb_name": "", "wandb_mode": "offline", "config": {}}
TENSORBOARD = OFF | {"tensorboard": True, "config": {"optim": {"lr": 0.25}}}
WANDB = OFF | {"wandb_project": "project", "config": {"optim": {"lr": 0.25}}}


def track(output_dir: Path, settings: dict[str, Any], steps: range, factor: float = 1.0) -> None:
    """A run from `steps.start` on, whose loss at a step is `factor` x step."""
    with open_trackers(**settings, output_dir=output_dir, start=steps.start) as trackers:
        for step in steps:
            for tracker in trackers:
                tracker({"iteration": step, "lr": 0.5, "total_loss": factor * step})


# --- Records ---------------------------------------------------------------------------------------


def test_trackers_receive_the_records_of_the_metrics_file(tmp_path: Path) -> None:
    records: list[Any] = []
    path = tmp_path / "metrics.json"
    for output_file in (path, None):
        metrics = MetricLogger(output_file=output_file)
        metrics.listeners = [records.append]
        for step in metrics.log_every(range(5), 2):
            metrics.update(total_loss=float(step))
    assert [record["iteration"] for record in records] == [0, 2, 4] * 2
    assert records[:3] == [json.loads(line) for line in path.read_text().splitlines()]
    metrics = MetricLogger(is_main=False)
    metrics.listeners = [records.append]
    list(metrics.log_every([0], 1))
    assert len(records) == 6, "only the main process calls listeners"


def test_metrics_are_grouped_and_the_step_is_left_out() -> None:
    record = dict.fromkeys(["iteration", "total_loss", "wd", "iter_time", "data_wait", "probe_cls_rank_me", "knn"], 1.0)
    names = ["loss/total_loss", "schedule/wd", "time/iter_time", "time/data_wait"]
    assert list(by_group(record)) == [*names, "health/probe_cls_rank_me", "health/knn"]


def test_by_default_there_are_no_trackers_and_nothing_is_written(tmp_path: Path) -> None:
    with open_trackers(**OFF, output_dir=tmp_path, start=0) as trackers:
        assert trackers == []
    assert list(tmp_path.iterdir()) == []


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def read_events(output_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(output_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def test_event_files_contain_what_was_logged(tmp_path: Path) -> None:
    track(tmp_path, TENSORBOARD, range(0, 50, 10))
    events = read_events(tmp_path)
    assert events.Tags()["scalars"] == ["schedule/lr", "loss/total_loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss/total_loss")] == [(s, float(s)) for s in range(0, 50, 10)]
    (config,) = events.Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert json.loads(text) == TENSORBOARD["config"]
    assert all(line.startswith("    ") for line in text.splitlines()), "shown as it is, not as Markdown"


def test_events_of_repeated_steps_show_once(tmp_path: Path) -> None:
    track(tmp_path, TENSORBOARD, range(0, 40, 10))
    track(tmp_path, TENSORBOARD, range(20, 60, 10), factor=2.0)
    values = [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss/total_loss")]
    assert values == [(0, 0.0), (10, 10.0), (20, 40.0), (30, 60.0), (40, 80.0), (50, 100.0)]


# --- Weights & Biases, offline ---------------------------------------------------------------------------------------

BLOCK = 32768  # bytes, into which the file of a run is divided, after a header of 7 bytes
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # part of a record; each has a header: checksum, length, kind


def read_wandb(path: Path) -> list[Any]:
    """The records of the file that a run of Weights & Biases leaves."""
    from wandb.proto import wandb_internal_pb2

    data, position, content, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        content += data[position - length : position]
        if kind in (FULL, LAST):
            records.append(wandb_internal_pb2.Record.FromString(content))
            content = b""
    return records


def losses(records: list[Any]) -> list[tuple[int, float]]:
    """Step and value of the loss in the history of a run."""
    steps = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    values = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in s.item} for s in steps]
    return [(value["_step"], value["loss/total_loss"]) for value in values]


def test_an_offline_run_contains_what_was_logged_and_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    output_dir = tmp_path / "my_run"
    output_dir.mkdir()
    hooks = sys.excepthook, sys.exit
    track(output_dir, WANDB, range(0, 40, 10))
    track(output_dir, WANDB, range(20, 60, 10))
    assert (sys.excepthook, sys.exit) == hooks
    run_id = (output_dir / "wandb_run_id").read_text()
    files = sorted(
        (output_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime
    )
    expected = [range(0, 40, 10), range(20, 60, 10)]
    for path, steps in zip(files, expected, strict=True):
        records = read_wandb(path)
        assert losses(records) == [(step, float(step)) for step in steps]
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project, run.display_name) == (run_id, "project", "my_run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["optim"] == {"lr": 0.25}
        assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_a_missing_login_is_reported_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        pytest.raises(ValueError, match=r"wandb login.*tracking.wandb_mode=offline"),
        open_trackers(**WANDB | {"wandb_mode": "online"}, output_dir=tmp_path, start=0),
    ):
        pass


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "module", "package"),
    [(TENSORBOARD, "tensorboard", "tensorboard"), (WANDB, "wandb", "wandb")],
)
def test_a_missing_package_is_named_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], module: str, package: str
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == module or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"tracking\.{module}.* missing: pip install {package}"):
        check_trackers(tensorboard=settings["tensorboard"], wandb_project=settings["wandb_project"])
    with pytest.raises(ValueError, match="pip install"), open_trackers(**settings, output_dir=tmp_path, start=0):
        pass


HEADER = f"""
import logging, os, resource, signal, sys
from pathlib import Path
from dinov2.trackers import open_trackers
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s")
off = dict({OFF!r}, output_dir=Path(sys.argv[1]), start=0)
"""


def in_a_process(script: str, output_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run a script after `HEADER` in a process of its own, in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", HEADER + textwrap.dedent(script), str(output_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_full_disk_ends_tensorboard_and_not_the_training(tmp_path: Path) -> None:
    script = """
        with open_trackers(**off | {"tensorboard": True}) as (tracker,):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # bytes that a file may have
            for step in range(2000):
                tracker({"iteration": step, "total_loss": 1.0})
        print("trained")
    """
    result = in_a_process(script, tmp_path)
    assert result.returncode == 0, result.stderr
    warning, end = result.stdout.splitlines()
    assert warning.startswith("WARNING TensorBoard failed, the run continues without it: OSError: ")
    assert end == "trained"


def test_a_dead_service_ends_weights_and_biases_and_not_the_training(tmp_path: Path) -> None:
    script = """
        with open_trackers(**off | {"wandb_project": "project"}) as (tracker,):
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            for step in range(2000):
                tracker({"iteration": step, "total_loss": 1.0})
        print("trained")
    """
    result = in_a_process(script, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    warning, end = result.stdout.splitlines()
    assert warning.startswith("WARNING Weights & Biases failed, the run continues without it: ConnectionResetError: ")
    assert end == "trained"


def test_a_tracker_that_cannot_open_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    track(tmp_path, TENSORBOARD, range(10))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "TensorBoard failed, the run continues without it"
    ]


def test_a_preempted_run_is_tracked_to_its_last_step_and_exits_as_without_trackers(tmp_path: Path) -> None:
    script = """
        from dinov2.train.interruption import Interruption
        on = {"tensorboard": True, "wandb_project": "project"}
        with open_trackers(**off | on) as trackers, Interruption() as interruption:
            for step in range(3):
                if step == 2:
                    signal.raise_signal(signal.SIGTERM)
                for tracker in trackers:
                    tracker({"iteration": step, "total_loss": step})
                if interruption.requested():
                    interruption.leave()
    """
    result = in_a_process(script, tmp_path)
    assert (result.returncode, result.stderr) == (128 + 15, "")
    steps = [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss/total_loss")] == steps
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = read_wandb(path)
    assert losses(records) == steps
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]
