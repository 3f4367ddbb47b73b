"""dinov2.log, meters and metrics_file: where lines go, what meters compute, and metrics files that survive crashes."""

import json
import logging
import math
import os
import random
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2.log import run_command, setup_logging
from dinov2.meters import MetricLogger, SmoothedValue
from dinov2.metrics_file import append_json, read_records, truncate_metrics

logger = logging.getLogger("dinov2.test")


def read_metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Log lines -------------------------------------------------------------------------------------------------------


def test_the_file_has_the_published_prefix_and_the_console_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path)
    logger.info("hello %d", 3)
    pattern = rf"I\d{{8}} \d\d:\d\d:\d\d {os.getpid()} dinov2\.test test_log\.py:\d+\] hello 3\n"
    assert re.fullmatch(pattern, (tmp_path / "logs" / "log.txt").read_text())
    logger.warning("mind")
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello 3\n\d\d:\d\d:\d\d WARNING mind\n", capsys.readouterr().out)


def test_the_console_shows_a_short_line_and_the_file_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path)
    meters = MetricLogger(hidden=("wd",))
    for _ in meters.log_every([0], 1, "Training", 10, 7, batch_size=64):
        meters.update(total_loss=2.5, wd=0.1)
        meters.note(rank=3.0, lost=math.nan)
    line = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(
        r"[\d:]{8} Training  7/10 \| total 2.5 \| [\d.e+]+ images/s  data wait \d+%  0:00:00 left", line
    )
    assert "wd: 0.1 (0.1)" in (tmp_path / "logs" / "log.txt").read_text()


def test_the_console_shows_the_last_value_of_a_schedule_and_the_median_of_a_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path)
    meters = MetricLogger(scheduled=("lr",))
    for step in meters.log_every(range(5), 4, "Training", 5):
        meters.update(lr=float(step), loss=float(step))
    assert "| lr 4  loss 2 |" in capsys.readouterr().out


def test_notes_are_in_the_record_of_their_iteration_and_make_it_one(tmp_path: Path) -> None:
    records_heard: list[Any] = []
    meters = MetricLogger(output_file=tmp_path / "m.json")
    meters.listeners = [records_heard.append]
    for step in meters.log_every(range(10), 5):
        if step == 3:
            assert not meters.line_is_due()
            meters.note(rank=1.5, lost=math.nan)
    records = read_records(tmp_path / "m.json")
    assert [record["iteration"] for record in records] == [0, 3, 5, 9]
    assert [record.get("rank") for record in records] == [None, 1.5, None, None]
    assert "lost" not in records[1]
    assert records_heard == records


def test_a_torn_line_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"iteration": 0, "lr": 1}\n{"iteration": 10, "l')
    assert read_records(tmp_path / "m.json") == [{"iteration": 0, "lr": 1}]
    assert read_records(tmp_path / "none.json") == []


def test_other_ranks_write_their_own_file_and_show_only_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path, rank=3)
    logger.info("as usual")
    logger.error("broken")
    assert (tmp_path / "logs" / "log.txt.rank3").read_text().count("\n") == 2
    out = capsys.readouterr().out
    assert "broken" in out
    assert "as usual" not in out


def test_repeated_calls_add_no_lines_and_a_new_folder_replaces_the_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path / "a")
    setup_logging(tmp_path / "a")
    logger.info("first")
    setup_logging(tmp_path / "b.log")
    logger.info("second")
    assert (tmp_path / "a/logs/log.txt").read_text().endswith("] first\n")
    assert (tmp_path / "a/logs/log.txt").read_text().count("\n") == 1
    assert (tmp_path / "b.log").read_text().count("second") == 1
    assert capsys.readouterr().out.count("\n") == 2


def test_names_that_are_not_text_are_printed_and_logged(tmp_path: Path) -> None:
    code = """
import os, sys
from dinov2.log import logger, run_command, setup_logging
def command():
    setup_logging(sys.argv[1])
    logger.info("reading %s", os.fsdecode(b"caf\\xe9"))
    sys.stdout.write(os.fsdecode(b"caf\\xe9") + "\\n")
sys.exit(run_command(command))
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("reading caf\\udce9\ncaf\\udce9\n")
    assert done.stderr == ""
    assert "reading caf\\udce9\n" in (tmp_path / "logs/log.txt").read_text()


LINES = """
import logging, sys
from dinov2.log import run_command
def command():
    for number in range(200):
        logging.getLogger("dinov2").info("line %d of %s %s", number, sys.argv[1], 100 * sys.argv[1])
    sys.stdin.readline()
sys.exit(run_command(command))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_gets_each_line_at_once_and_whole_also_from_several_processes(unbuffered: str) -> None:
    """As with `| tee`, or two students on one console: Python would write blocks of 8 kB, or line ends separately."""
    reading, writing = os.pipe()
    options: Any = {"stdin": subprocess.PIPE, "stdout": writing, "env": os.environ | {"PYTHONUNBUFFERED": unbuffered}}
    processes = [subprocess.Popen([sys.executable, "-c", LINES, name], **options) for name in "AB"]
    os.close(writing)
    with open(reading) as pipe:
        received = [pipe.readline().rstrip("\n").partition(" ")[2] for _ in range(2 * 200)]  # while both still run
        for process in processes:
            process.communicate(b"\n")
    assert sorted(received) == sorted(f"line {n} of {name} {100 * name}" for n in range(200) for name in "AB")


def test_warnings_are_logged(tmp_path: Path) -> None:
    setup_logging(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # catch_warnings() has replaced the hook: install it again inside
        logging.captureWarnings(True)
        warnings.warn("look out", stacklevel=1)
        logging.captureWarnings(False)
    assert "look out" in (tmp_path / "logs/log.txt").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize(
    ("options", "expected"), [({}, "interrupted"), ({"after_interrupt": "go on"}, "interrupted; go on")]
)
def test_an_interrupted_command_reports_only_what_applies_to_it(
    options: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupted, **options) == 130
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_a_full_disk_stops_neither_logging_nor_closing_and_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    setup_logging(tmp_path / "log.txt")
    for _ in range(3):
        logger.info("still here")
    setup_logging()
    captured = capsys.readouterr()
    assert captured.out.count("still here") == 3
    assert captured.out.count("cannot write the log file") == 1
    assert "log.txt" in captured.out
    assert "Traceback" not in captured.out + captured.err


# --- Meters ----------------------------------------------------------------------------------------------------------


def test_published_example_of_the_window_median() -> None:
    meter = SmoothedValue()
    for value in (1, 2, 3, 4):
        meter.update(value)
    assert meter.median == 2.0
    assert str(meter) == "2.0000 (2.5000)"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(1, 8))
def test_statistics_equal_naive_ones(values: list[float], window_size: int) -> None:
    meter = SmoothedValue(window_size)
    for i, value in enumerate(values):
        meter.update(torch.tensor(value, dtype=torch.float64) if i % 2 else value)
    window = values[-window_size:]
    assert meter.window == window
    assert meter.median == statistics.median_low(window)
    assert meter.max == max(window)
    assert meter.value == values[-1]
    assert meter.count == len(values)
    assert meter.avg == pytest.approx(statistics.fmean(window), rel=1e-9, abs=1e-6)
    assert meter.global_avg == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)


def test_a_nan_shows_in_the_median() -> None:
    meter = SmoothedValue()
    for value in (1.0, math.nan, 2.0):
        meter.update(value)
    assert math.isnan(meter.median)


def test_tensors_meet_those_of_other_processes_once_and_only_when_a_number_is_needed() -> None:
    meetings = []

    def mean_with_another(mine: torch.Tensor) -> torch.Tensor:  # whose values are all 6
        meetings.append(len(mine))
        return (mine + 6) / 2

    meters = MetricLogger(mean_over_processes=mean_with_another)
    for step in range(5):
        meters.update(loss=torch.tensor(2.0, requires_grad=True), norm=torch.tensor(4.0), lr=0.1 * step)
    assert meetings == []
    text = str(meters)
    assert meetings == [10], "all in one; numbers that are no tensors are the same everywhere"
    assert text == "loss: 4 (4)\tnorm: 5 (5)\tlr: 0.2 (0.2)"


def test_values_that_are_not_finite_are_ignored_on_request() -> None:
    meters = MetricLogger()
    for value in (1.0, math.nan, math.inf, 3.0):
        meters.update(loss=torch.tensor(value), only_finite=True)
        meters.update(seen=torch.tensor(value))
    assert (meters.loss.window, meters.loss.count, meters.loss.total) == ([1.0, 3.0], 2, 4.0)
    assert meters.seen.count == 4 and math.isnan(meters.seen.median)


@pytest.mark.gpu
def test_updates_with_cuda_tensors_do_not_wait_for_the_device() -> None:
    meters = MetricLogger()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meters.update(loss=torch.ones((), device="cuda"), lr=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (meters.loss.value, meters.lr.value) == (1.0, 0.5)


def test_a_vector_is_no_meter_value() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        MetricLogger().update(loss=torch.zeros(2))


def test_a_name_that_is_no_meter_is_named() -> None:
    with pytest.raises(AttributeError, match="neither an attribute nor a meter 'lost'"):
        _ = MetricLogger().lost


# --- The loop --------------------------------------------------------------------------------------------------------


def test_lines_have_the_published_form(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    meters = MetricLogger(delimiter="  ")
    for value in meters.log_every([1.0, 2.0, 3.0, 4.0], 3, "Training", n_iterations=104, start_iteration=100):
        meters.update(lr=value)
    lines = [record.getMessage() for record in caplog.records]
    timing = r"time: \d+\.\d{6}  data: \d+\.\d{6}  data wait: \d+%(  max mem: \d+)?"
    assert re.fullmatch(rf"Training \[102/104\]  eta: 0:00:00  lr: 2 \(2\)  {timing}", lines[0])
    assert re.fullmatch(rf"Training \[103/104\]  eta: 0:00:00  lr: 2 \(2.5\)  {timing}", lines[1])
    assert re.fullmatch(r"Training Total time: 0:00:00 \(\d+\.\d{6} s / it\)", lines[2])
    assert len(lines) == 3


def test_images_per_second_are_printed_when_the_batch_size_is_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(MetricLogger().log_every([0], 1, batch_size=64)) == [0]
    assert re.search(r"\timages/s: \d+\.\d\t", caplog.text)


def test_a_finished_loop_neither_fetches_nor_yields() -> None:
    def fetched() -> Iterator[int]:
        raise AssertionError("nothing may be fetched")
        yield 0

    assert list(MetricLogger().log_every(fetched(), 1, n_iterations=10, start_iteration=10)) == []


def test_no_more_is_fetched_than_is_needed() -> None:
    source = iter(range(100))
    assert list(MetricLogger().log_every(source, 1, n_iterations=5, start_iteration=2)) == [0, 1, 2]
    assert next(source) == 3


def test_seconds_per_iteration_count_only_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    list(MetricLogger().log_every([0, 0], 100, n_iterations=1_000_002, start_iteration=1_000_000))
    average = re.search(r"\((\S+) s / it\)", caplog.text)
    assert average is not None
    assert float(average[1]) > 0, "divided by all iterations of the run it would round to 0"


def test_metrics_lines_hold_times_and_window_medians_in_order(tmp_path: Path) -> None:
    meters = MetricLogger(output_file=tmp_path / "m.json")
    for i in meters.log_every(range(5), 2):
        meters.update(lr=i / 10, total_loss=torch.tensor(float(i)))
    lines = read_metrics(tmp_path / "m.json")
    assert [list(line) for line in lines] == [
        ["iteration", "iter_time", "data_time", "lr", "total_loss", "data_wait"]
    ] * 3
    assert [(line["iteration"], line["total_loss"]) for line in lines] == [(0, 0.0), (2, 1.0), (4, 2.0)]


def test_only_the_main_process_writes_metrics(tmp_path: Path) -> None:
    list(MetricLogger(output_file=tmp_path / "m.json", is_main=False).log_every([0], 1))
    assert not (tmp_path / "m.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_metrics_that_cannot_be_written_name_the_file() -> None:
    with pytest.raises(OSError, match="cannot write the metrics: No space left on device: '/dev/full'"):
        append_json(Path("/dev/full"), {"iteration": 1})


def train(path: Path, state: dict[str, object] | None, start: int, stop: int, crash_after: int) -> dict[str, object]:
    """A run over `stop` steps that checkpoints every second step and dies in the middle of step `crash_after`."""
    meters = MetricLogger(output_file=path)
    meters.load_state_dict(state or {})
    checkpoint: dict[str, object] = {"start": start, "meters": state}
    for step in meters.log_every(range(start, stop), 2, n_iterations=stop, start_iteration=start):
        meters.update(total_loss=random.Random(step).random())
        if step % 2 == 0:
            meters.end_iteration()
            checkpoint = {"start": step + 1, "meters": meters.state_dict()}
        if step == crash_after:
            break
    return checkpoint


@pytest.mark.parametrize("crash_after", range(30))
def test_a_crashed_and_resumed_run_leaves_the_lines_of_an_undisturbed_one(tmp_path: Path, crash_after: int) -> None:
    def losses(path: Path) -> list[tuple[float, float]]:
        return [(line["iteration"], line["total_loss"]) for line in read_metrics(path)]

    train(tmp_path / "whole.json", None, 0, 30, crash_after=99)
    path = tmp_path / "resumed.json"
    checkpoint = train(path, None, 0, 30, crash_after)
    if path.exists():
        with path.open("a") as file:
            file.write('{"iteration": 99, "iter_')  # torn by the crash
    truncate_metrics(path, checkpoint["start"])
    train(path, checkpoint["meters"], checkpoint["start"], 30, crash_after=99)
    assert losses(path) == losses(tmp_path / "whole.json")


def test_truncation_drops_late_and_torn_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0, "x": 1}\n{"iteration": 10}\n{"iterat{"iteration": 20}\n{"iteration": 30}\n{"it')
    truncate_metrics(path, before_iteration=30)
    assert path.read_text() == '{"iteration": 0, "x": 1}\n{"iteration": 10}\n'
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"
    truncate_metrics(tmp_path / "absent.json", 0)
