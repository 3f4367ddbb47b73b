"""The verdict on a run, and what it is based on; `templates/verdict.html` has the sentences."""

import math
from statistics import median
from typing import Literal, NamedTuple

from dinov2.report.numbers import percent
from dinov2.report.run import Run
from dinov2.train.monitor.alarm_rules import ALL_ALIKE_RANK
from dinov2.train.monitor.alarms import AlarmKind, monitored_kinds
from dinov2.train.monitor.conclusion import conclude, standard_error
from dinov2.train.monitor.starting_point import START

MIN_RECORDS = 3  # fewer are too few to judge a run

Level = Literal["good", "unclear", "bad"]


class Change(NamedTuple):
    """The first and the last value of a metric, and their steps."""

    first: float
    last: float
    start: float
    end: float


def judge(run: Run) -> tuple[Level, str]:
    """Judge a run: the level and the headline."""
    current = [alarm for alarm in run.alarms if not alarm.over]
    if ended_with_error(run):
        return "bad", "Ended with an error"
    if current:
        return "bad", f"Needs attention: {', '.join(dict.fromkeys(alarm.kind for alarm in current))}"
    if len(run.records) < MIN_RECORDS:
        return "unclear", "Too early to judge" if run.records else "No records yet"
    if problem := _problem(run):
        return "unclear", problem
    if run.alarms:
        return "good", "Healthy again" if not run.finished else "Ended healthy, after alarms"
    return "good", "Healthy" if run.finished else "Healthy so far"


def _problem(run: Run) -> str:
    """What keeps a run without active alarms from being called healthy; empty if nothing does."""
    loss, accuracy = change(run, "total_loss"), [value for _, value in run.comparable("knn")]
    chance = max((value for _, value in run.comparable("knn_chance")), default=0.0)
    lost = len(accuracy) > 1 and accuracy[-1] < (accuracy[0] + max(accuracy)) / 2  # half of the gain
    if lost and max(accuracy) > chance:
        images = max((value for _, value in run.series("knn_images")), default=math.inf)
        is_clear = max(accuracy) - accuracy[-1] > 2 * standard_error(max(accuracy), accuracy[-1], images)
        return f"Unclear: k-NN accuracy {'fell' if is_clear else 'may have fallen'}"
    if accuracy and accuracy[-1] <= chance:
        return "Unclear: k-NN is not better than guessing"
    if loss and loss.last >= loss.first and len(accuracy) < 2:
        return "Unclear: the loss did not fall"
    if unmonitored(run):
        state = "Finished" if run.finished else "Running" if run.running() else "Stopped"
        until = monitored_until(run)
        return f"{state}, not monitored{'' if until is None else f' after step {until:,.0f}'}"
    if distinguishes_no_images(run) or not_better_than(run) is not None:
        return "Unclear: no teacher is better than the initial network"
    if run.best is not None and run.best.iteration == START:
        return "Unclear: no teacher is better than the starting model"
    return ""


def ended_with_error(run: Run) -> bool:
    """Whether an error stopped the run before its end."""
    return bool(run.state.error) and not run.finished and not run.running()


def last_step(run: Run) -> int:
    """The last step that is known to be done; not every step is logged."""
    return max(run.steps_done - 1, -1 if run.state.checkpoint is None else run.state.checkpoint)


def change(run: Run, name: str) -> Change | None:
    """How a metric changed on the last dataset; None if it has fewer than two values."""
    series = run.comparable(name)
    return Change(series[0][1], series[-1][1], series[0][0], series[-1][0]) if len(series) > 1 else None


def trend(run: Run, name: str) -> str:
    """How `knn` or `patch_knn_miou` changed on the last dataset, in words; "" if it has fewer than two values.

    It "rose" or "fell" if the difference is more than two standard errors, as far as these were recorded.
    """
    found = change(run, name)
    if found is None:
        return ""
    start, _, initial = run.step_text(found.start).partition(", ")
    change_text = (
        f"{percent(found.first)} at {start}{f' ({initial})' if initial else ''} to {percent(found.last)} "
        f"at step {found.end:,.0f}"
    )
    error, chance = _error(run, name, found), run.value_at(name.removesuffix("_miou") + "_chance", found.end)
    remarks = [f"standard error of the difference {error:.1f}"] if error else []
    remarks += [f"guessing up to {percent(chance)}"] if chance else []
    remark = f" ({', '.join(remarks)})" if remarks else ""
    if abs(found.last - found.first) > 2 * error:
        return f"{'rose' if found.last > found.first else 'fell'} from {change_text}{remark}"
    return f"did not change measurably: {change_text}{remark}"


def _error(run: Run, name: str, found: Change) -> float:
    """The standard error of the difference of two values, in percent; 0 if it is not known."""
    if name == "patch_knn_miou":
        return math.hypot(*(run.value_at("patch_knn_error", step) or 0.0 for step in (found.start, found.end)))
    return standard_error(found.first, found.last, run.value_at("knn_images", found.end) or math.inf)


def knn_on_test_images(run: Run) -> dict[str, float]:
    """k-NN accuracy in percent on test images, of the trained and untrained network and of raw pixels."""
    return {each.name.partition(",")[0]: each.value for each in reversed(run.results) if each.evaluation == "knn"}


# --- The best teacher ------------------------------------------------------------------------------------------------


def distinguishes_no_images(run: Run) -> bool:
    """Whether the best teacher of the last dataset has nearly equal features for all images."""
    best = run.best
    if best is None or best.iteration < run.dataset_start:
        return False
    return best.signal.endswith("rank_me") and best.value < ALL_ALIKE_RANK


def conclusion(run: Run) -> str:
    """Whether continuing from weights helped, and how near a distillation comes to its teacher; else empty."""
    return conclude(run.records, run.best)


def not_better_than(run: Run) -> float | None:
    """The value of the network at step 0 on the last dataset, if the best teacher is not better.

    None for runs from weights, on which the conclusion says more.
    """
    best = run.best
    if best is None or run.start or best.iteration == 0 or best.iteration < run.dataset_start:
        return None
    start = next((value for step, value in run.comparable(best.signal) if step == 0), None)
    return None if start is None or best.value > start else start


# --- Monitoring ------------------------------------------------------------------------------------------------------


def monitored(run: Run) -> list[AlarmKind]:
    """The kinds of alarms for which the run has logged the metrics."""
    return monitored_kinds({name for record in run.records for name in record})


def health_steps(run: Run) -> list[float]:
    """The logged steps at which the health of the network was measured, so that an alarm could be raised."""
    return [
        record["iteration"]
        for record in run.records
        if any(kind.concerns_network for kind in monitored_kinds(record.keys()))
    ]


def monitored_until(run: Run) -> float | None:
    """The last step at which health was measured; None if it still is, or never was."""
    steps = health_steps(run)
    if not steps or steps[-1] == run.records[-1]["iteration"]:
        return None
    switched_off = run.config is not None and run.config.health.period == 0
    usual = median(after - before for before, after in zip(steps, steps[1:], strict=False)) if len(steps) > 1 else 0
    return steps[-1] if switched_off or run.records[-1]["iteration"] - steps[-1] > usual else None


def unmonitored(run: Run) -> str:
    """A sentence about health that was not measured, from some step on or at all; empty if it was."""
    if not run.records:
        return ""
    until, cfg = monitored_until(run), run.config
    if until is None and health_steps(run):
        return ""
    why = " (health.period=0)" if cfg is not None and cfg.health.period == 0 else ""
    after = "" if until is None else f" after step {until:,.0f}"
    return f"Its health was not measured{after}{why}."
