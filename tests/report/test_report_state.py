"""The report shows whether a run is running, how it ended, what was monitored, and on which images it was measured."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import session, write_json, write_run
from test_report import Parsed, parsed

from dinov2.log import last_error
from dinov2.report.__main__ import main
from dinov2.report.page import page, render
from dinov2.report.read_run import read_run
from dinov2.report.run import Run, State
from dinov2.report.sections import key_figures
from dinov2.report.verdict import judge
from dinov2.train.monitor.best_teacher import Rating

HOLD = (
    "import sys, pathlib, dinov2.files as f\nwith f.folder_lock(pathlib.Path(sys.argv[1])): print(flush=True), input()"
)
INFO = "I20261123 15:48:47 8920 dinov2.train.checkpoint checkpoint.py:180] checkpoint of iteration 31: /out"
ERROR = "E20261123 15:41:24 3114 dinov2.log log.py:139] too many bad images <b>"
TRACE = "Traceback (most recent call last):\n  File 'x.py', line 1\nOSError: too many bad images <b>"


def bare_run(folder: Path, **words: object) -> Path:
    return write_run(folder, images=False, evaluations=False, **words)  # type: ignore[arg-type]


def judged(run: Run) -> str:
    """The verdict as one text."""
    level, headline = judge(run)
    return f"{level}: {headline}. {Parsed(render('verdict.html', run=run)).text}"


def accuracy(run: Run) -> str:
    """The text of the section with that title."""
    section = page([run]).partition('<section id="accuracy">')[2].partition("</section>")[0]
    return Parsed(section).text


def rewrite(folder: Path, change) -> None:
    """Replace the records of the metrics file by those that are not None."""
    path = folder / "training_metrics.json"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))


def without_health(line: dict) -> dict:
    kept = ("iteration", "iter_time", "data_time", "data_wait", "total_loss")
    return {key: value for key, value in line.items() if key in kept}


# --- Running, stopped, failed ---------------------------------------------------------------------------------------


def test_a_run_is_running_exactly_as_long_as_a_process_holds_the_lock_of_its_folder(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run", done=300)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        assert "Running: 300 of 800 steps (37.5" in parsed(folder).text
        holder.kill()
    assert "Stopped at step 299 of 800 (no checkpoint); the same command starts over" in parsed(folder).text
    checkpoint = folder / "checkpoints" / "model_0000310"
    checkpoint.mkdir(parents=True)
    text = parsed(folder).text
    assert "Stopped at step 310 of 800 (checkpoint at step 310); the same command continues it." in text


def test_without_locks_a_run_with_a_recent_record_is_running(tmp_path: Path) -> None:
    run = read_run(bare_run(tmp_path / "run", done=300), "run")
    assert run.state.locked is False and not run.running()
    assert replace(run, state=State(None, idle_seconds=5.0)).running()
    assert not replace(run, state=State(None, idle_seconds=86400.0)).running()
    done = read_run(bare_run(tmp_path / "done"), "done")
    assert not replace(done, state=State(True, idle_seconds=5.0)).running()


def test_an_error_at_the_end_of_the_log_is_shown_and_no_continuation_is_promised(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run", done=300)
    (folder / "logs").mkdir()
    log = folder / "logs" / "log.txt"
    log.write_text(f"{INFO}\n{ERROR}\n{TRACE}\n")
    run = read_run(folder, "run")
    assert judged(run).startswith("bad: Ended with an error. Stopped at step 299 of 800 (no checkpoint) by an error:")
    assert "too many bad images <b>." in parsed(folder).text and "same command" not in judged(run)
    log.write_text(f"{ERROR}\n{TRACE}\n{INFO}\n")  # resumed since
    assert "error" not in judged(read_run(folder, "run"))
    assert "error" not in judged(
        replace(run, state=run.state._replace(locked=True))
    )  # an error of a second start, which was refused
    finished = bare_run(tmp_path / "finished")
    assert "error" not in judged(replace(read_run(finished, "finished"), state=run.state))
    none_yet = replace(run, records=[])
    assert "before the first step was logged (no checkpoint) by an error" in judged(none_yet)


def test_the_last_line_of_a_log_is_an_error_unless_the_user_interrupted(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    interrupted = ERROR.replace("too many bad images <b>", "interrupted; the same command again continues a training")
    critical = ERROR.replace("E2026", "C2026").replace("too many bad images <b>", "this process failed")
    for lines, message in {
        "": "",
        "no line of a log": "",
        INFO: "",
        f"{INFO}\n{interrupted}": "",
        f"{critical}\n{TRACE}": "OSError: too many bad images <b>",
        f"{INFO * 2000}\n{ERROR}\n": "too many bad images <b>",
    }.items():
        log.write_text(lines)
        assert last_error(log) == message
    assert last_error(tmp_path / "none.txt") == ""


# --- Monitoring ------------------------------------------------------------------------------------------------


def test_a_run_whose_health_was_not_measured_is_not_called_healthy(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run", overrides=("health.period=0",))
    rewrite(folder, without_health)
    text = parsed(folder).text
    assert "Finished, not monitored" in text and "Its health was not measured (health.period=0)." in text
    assert "Healthy" not in text and "No alarms" not in text
    assert "None, but little was monitored: data bottleneck." in text
    rewrite(folder, lambda line: {key: value for key, value in line.items() if key != "data_wait"})
    assert "None, but little was monitored: nothing." in parsed(folder).text


@pytest.mark.parametrize("period", [0, 100])
def test_a_run_that_is_no_longer_monitored_is_not_called_healthy(tmp_path: Path, period: int) -> None:
    folder = bare_run(tmp_path / "run", overrides=(f"health.period={period}",))
    rewrite(folder, lambda line: line if line["iteration"] <= 400 else without_health(line))
    run = read_run(folder, "run")
    assert "unclear: Finished, not monitored after step 400." in judged(run) and "No alarms up to step 400." in judged(
        run
    )
    assert f"not measured after step 400{' (health.period=0)' if period == 0 else ''}." in parsed(folder).text
    assert "The features of whole images at step 400 used about" in judged(run)
    assert key_figures(run)["effective rank"][1] == "(step 400)"
    rewrite(folder, lambda line: line if "probe_cls_rank_me" in line or line["iteration"] > 400 else None)
    assert "not monitored after step 400" in judged(read_run(folder, "run"))


def test_a_run_that_is_measured_periodically_is_monitored(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run", done=330)
    rewrite(folder, lambda line: line if line["iteration"] % 100 == 0 else without_health(line))
    assert "good: Healthy so far" in judged(read_run(folder, "run"))


def test_only_alarms_whose_metrics_were_logged_count_as_monitored(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    rewrite(folder, lambda line: {key: value for key, value in line.items() if not key.startswith("probe")})
    assert "None. Monitored: collapse, divergence, data bottleneck." in parsed(folder).text


def test_a_value_of_the_untrained_network_is_marked(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run", done=30)
    first = read_run(folder, "run").records[0]["knn"]
    begun = read_run(bare_run(tmp_path / "begun", done=1), "begun")
    assert key_figures(begun)["effective rank"][1] == "(step 0, untrained)"
    assert key_figures(read_run(folder, "run"))["k-NN accuracy"][1] == "(step 0, untrained)"
    assert f"k-NN accuracy {first:.1f} % (step 0, untrained)" in parsed(folder).text
    tuned = read_run(bare_run(tmp_path / "tuned", done=30, overrides=("MODEL.WEIGHTS=w.pth",)), "tuned")
    assert key_figures(tuned)["k-NN accuracy"][1] == "(step 0, initial weights)"


# --- The best teacher, the dataset ----------------------------------------------------------------------------------


def test_a_best_teacher_must_beat_the_untrained_network(tmp_path: Path) -> None:
    run = read_run(bare_run(tmp_path / "run"), "run")
    start, rank = run.records[0]["knn"], run.records[0]["probe_cls_rank_me"]
    assert f"The best teacher is that of step 599 (k-NN {start + 9:.1f}" in judged(
        replace(run, best=Rating(599, "knn", start + 9))
    )
    for rating, words in (
        (Rating(599, "knn", start - 9), f"No teacher is better than the untrained network (k-NN {start:.1f}"),
        (Rating(599, "probe_cls_rank_me", rank - 2), "No teacher is better than the untrained network (effective rank"),
        (Rating(599, "probe_cls_rank_me", 1.0), "No teacher distinguishes images: that of eval/best has the effective"),
    ):
        text = judged(replace(run, best=rating))
        assert words in text and "The best teacher" not in text
        assert text.startswith("unclear: Unclear: no teacher is better")


def test_after_a_change_of_the_dataset_only_the_last_one_is_compared(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluations=False)
    sessions = [session(0) | {"data": "Old"}, session(200) | {"data": "Old"}, session(400) | {"data": "New:<b>"}]
    write_json(folder / "environment.json", {"sessions": sessions})
    run = read_run(folder, "run")
    assert run.dataset_start == 400
    knn = {int(step): value for step, value in run.series("knn")}
    assert "From step 400 on another dataset was used (New:<b>): earlier measurements are of" in judged(run)
    assert f"{knn[400]:.1f} % at step 400 to" in judged(run) and "untrained" not in judged(run)
    assert "at step 400" in accuracy(run) and "at step 0" not in accuracy(run)
    assert "Before step 400 another dataset was trained on." in parsed(folder).text
    alts = " ".join(map(str, parsed(folder).attributes("alt")))
    assert "step 599" in alts and "step 799" in alts and "step 399" not in alts and "step 0" not in alts
    assert "of another dataset" in judged(replace(run, best=Rating(199, "knn", 1.0)))
    apart = write_run(tmp_path / "apart", overrides=("health.knn_dataset=Fixed",))
    changed = replace(read_run(apart, "apart"), sessions=run.sessions)
    assert "at step 0 (untrained)" in judged(changed)  # k-NN is of the same images all along


def test_repeated_steps_do_not_count_as_a_change(tmp_path: Path) -> None:
    run = read_run(bare_run(tmp_path / "run"), "run")
    known = [(0, "A"), (50, None), (60, "B"), (40, "A")]
    run = replace(run, sessions=[{"first_step": step, "data": data} for step, data in known])
    assert run.datasets == [(0, "A")] and run.dataset_start == 0
    assert replace(run, sessions=[{"first_step": 0}, {"first_step": 40, "data": "A"}]).dataset_start == 0


# --- Texts and files -------------------------------------------------------------------------------------------------


def test_images_of_few_patches_are_explained(tmp_path: Path) -> None:
    few = ("crops.global_crops_size=28", "student.patch_size=7")
    text = parsed(write_run(tmp_path / "few", overrides=few)).text
    assert "28 \N{MULTIPLICATION SIGN} 28 pixels are 4 \N{MULTIPLICATION SIGN} 4 patches of 7 pixels" in text
    many = ("crops.global_crops_size=224", "crops.local_crops_size=96", "student.patch_size=16")
    assert "These images are small" not in parsed(write_run(tmp_path / "many", overrides=many)).text


def test_the_caption_of_knn_while_training_describes_the_measurement(tmp_path: Path) -> None:
    run = read_run(bare_run(tmp_path / "run", overrides=("health.knn_images=1500",)), "run")
    assert "leaving one out among at most 1,500 labeled images" in accuracy(run)
    assert "not comparable with dinov2/eval/knn.py" in accuracy(run)


@pytest.mark.parametrize(("name", "problem"), [("a.pdf", "must end in .html or .htm"), ("there", "is a folder")])
def test_an_output_that_is_not_an_html_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, problem: str
) -> None:
    folder = bare_run(tmp_path / "run")
    (tmp_path / "there").mkdir()
    assert main([str(folder), "--output", str(tmp_path / name)]) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "a.pdf").exists() and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("miou", "knn", "texts"),
    [
        (
            (7.7, 7.9),
            (60.0, 62.0),
            (
                "others, did not change measurably: 60.0 % at step 0 (untrained) to 62.0 % at step 700 "
                "(standard error of the difference 2.2, guessing up to 12.0 %).",
                "mean IoU did not change measurably: 7.7 % at step 0 (untrained) to 7.9 % at step 700 "
                "(standard error of the difference 0.6, guessing up to 6.8 %).",
            ),
        ),
        ((7.7, 9.0), (60.0, 65.0), ("others, rose from 60.0 % at step 0", "mean IoU rose from 7.7 % at step 0")),
        ((9.0, 7.7), (65.0, 60.0), ("others, fell from 65.0 % at step 0", "mean IoU fell from 9.0 % at step 0")),
    ],
)
def test_only_a_change_beyond_two_standard_errors_is_one(
    tmp_path: Path, miou: tuple[float, float], knn: tuple[float, float], texts: tuple[str, str]
) -> None:
    def measured(line: dict) -> dict:
        kept = {key: value for key, value in line.items() if key != "knn"}
        if line["iteration"] not in (0, 700):
            return kept
        last = line["iteration"] > 0
        kept |= {"knn": knn[last], "knn_chance": 12.0, "knn_images": 1000.0}
        return kept | {
            **{"patch_knn_miou": miou[last], "patch_knn_error": (0.41, 0.46)[last]},
            **{"patch_knn_chance": 6.8, "patch_knn_images": 64.0},
        }

    folder = bare_run(tmp_path / "run", done=701)
    rewrite(folder, measured)
    run = read_run(folder, "run")
    assert all(text in judged(run) for text in texts)
    assert key_figures(run)["k-NN of patches, mIoU"][1] == "(standard error 0.5, guessing up to 6.8\N{NO-BREAK SPACE}%)"
    assert key_figures(run)["k-NN accuracy"][1] == "(guessing up to 12.0\N{NO-BREAK SPACE}%)"
    assert "did not change measurably" not in judged(run) or knn == (60.0, 62.0)


def test_a_fall_of_k_nn_within_its_error_is_not_called_one(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    rewrite(folder, lambda line: line | ({"knn": 60.0 - line["iteration"] / 400} if "knn" in line else {}))
    assert "unclear: Unclear: k-NN accuracy fell." in judged(read_run(folder, "run")), "the error is unknown"
    rewrite(folder, lambda line: line | ({"knn_images": 1000.0} if "knn" in line else {}))
    assert "unclear: Unclear: k-NN accuracy may have fallen." in judged(read_run(folder, "run"))


def test_percents_are_the_same_in_sentences_and_charts(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    rewrite(folder, lambda line: line | ({"knn": 76.4497} if "knn" in line else {}))
    found = parsed(folder)
    assert "76.4 %" in found.text and "76.45" not in found.text
    assert ": Healthy. Finished: all 800 steps" in judged(read_run(folder, "run"))
