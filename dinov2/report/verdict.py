"""The verdict on a run, in sentences that need no knowledge of DINOv2."""

from statistics import median
from typing import Literal, NamedTuple

from dinov2.report.numbers import duration, number, percent, rough
from dinov2.report.run import Run
from dinov2.train.monitor.alarm_rules import ALL_ALIKE_RANK
from dinov2.train.monitor.alarms import AlarmKind, monitored_kinds

MIN_RECORDS = 3  # fewer are too few to judge a run

Level = Literal["good", "unclear", "bad"]


class Verdict(NamedTuple):
    """A judgment and its reasons."""

    level: Level
    headline: str
    sentences: list[str]


def verdict(run: Run) -> Verdict:
    """Judge a run: whether it is healthy, how far it is, and what it has learned."""
    return Verdict(*_judgment(run), [text for text in (progress(run), *_findings(run)) if text])


def _judgment(run: Run) -> tuple[Level, str]:
    """The level and the headline."""
    current = [alarm for alarm in run.alarms if not alarm.over]
    if ended_with_error(run):
        return "bad", "Ended with an error"
    if current:
        return "bad", f"Needs attention: {', '.join(dict.fromkeys(alarm.kind for alarm in current))}"
    if len(run.records) < MIN_RECORDS:
        return "unclear", "Too early to judge" if run.records else "No records yet"
    loss, accuracy = _change(run, "total_loss"), [value for _, value in run.comparable("knn")]
    chance = max((value for _, value in run.comparable("knn_chance")), default=0.0)
    lost = len(accuracy) > 1 and accuracy[-1] < (accuracy[0] + max(accuracy)) / 2  # half of the gain
    if lost and max(accuracy) > chance:
        return "unclear", "Unclear: k-NN accuracy fell"
    if loss and loss[1] >= loss[0] and len(accuracy) < 2:
        return "unclear", "Unclear: the loss did not fall"
    if unmonitored(run):
        state = "Finished" if run.finished else "Running" if run.running() else "Stopped"
        until = monitored_until(run)
        return "unclear", f"{state}, not monitored{'' if until is None else f' after step {until:,.0f}'}"
    if no_better_teacher(run):
        return "unclear", "Unclear: no teacher is better than the initial network"
    if run.alarms:
        return "good", "Healthy again" if not run.finished else "Ended healthy, after alarms"
    return "good", "Healthy" if run.finished else "Healthy so far"


def ended_with_error(run: Run) -> bool:
    """Whether an error stopped the run before its end."""
    return bool(run.state.error) and not run.finished and not run.running()


def progress(run: Run) -> str:
    """How far the run is: finished, running or stopped."""
    done, total = run.steps_done, run.total_steps
    time = f" in {duration(run.seconds)}" if run.seconds else ""
    if run.finished:
        return f"Finished: all {total:,} steps{time}."
    of = "" if total is None else f" of {total:,}"
    if ended_with_error(run):
        at = f" at step {_last_step(run):,}{of}" if run.records else " before the first step was logged"
        return f"Stopped{at} ({_checkpoint(run)}) by an error: {run.state.error.rstrip('.')}."
    if total is None:
        return f"{done:,} steps are logged{time}; the planned number is unknown."
    if run.running() and run.records:
        remaining = (total - done) * run.records[-1].get("iter_time", 0.0)
        share = percent(100 * done / total)
        return f"Running: {done:,} of {total:,} steps ({share}){time}, about {duration(remaining)} left."
    if not run.records:
        return f"{'Running: no' if run.running() else 'No'} step of {total:,} is logged yet."
    again = "continues it" if run.state.checkpoint is not None else "starts over"
    return f"Stopped at step {_last_step(run):,}{of} ({_checkpoint(run)}); the same command {again}."


def _last_step(run: Run) -> int:
    """The last step that is known to be done; not every step is logged."""
    return max(run.steps_done - 1, -1 if run.state.checkpoint is None else run.state.checkpoint)


def _checkpoint(run: Run) -> str:
    return "no checkpoint" if run.state.checkpoint is None else f"checkpoint at step {run.state.checkpoint:,}"


def _findings(run: Run) -> list[str]:
    return [_data(run), unmonitored(run), _alarms(run), _loss(run), *_accuracy(run), _rank(run), _best(run)]


def _data(run: Run) -> str:
    if not run.dataset_start:
        return ""
    return (
        f"From step {run.dataset_start:,} on another dataset was used ({run.datasets[-1][1]}): earlier "
        "measurements are of other images, and are not compared with later ones."
    )


def _alarms(run: Run) -> str:
    if not run.alarms:
        until = monitored_until(run)
        return (f"No alarms{'' if until is None else f' up to step {until:,.0f}'}.") if health_steps(run) else ""
    now = dict.fromkeys(alarm.kind for alarm in run.alarms if not alarm.over)
    passed = dict.fromkeys(alarm.kind for alarm in run.alarms if alarm.kind not in now)
    kinds = [*now, *(f"{kind} (over)" for kind in passed)]
    return f"Alarms: {', '.join(kinds)}. What was found, and what to do, is below."


def _loss(run: Run) -> str:
    change = _change(run, "total_loss")
    if change is None:
        return ""
    first, last = change
    if last < first:
        but = ", but it can fall while features get worse" if any(not alarm.over for alarm in run.alarms) else ""
        return f"The loss fell from {number(first)} to {number(last)}{but}."
    return (
        f"The loss changed from {number(first)} to {number(last)}. It may rise for a while, as the teacher's targets "
        "sharpen, but should fall in the end."
    )


def _accuracy(run: Run) -> list[str]:
    sentences = []
    change = _change(run, "knn")
    if change is not None:
        first, last = change
        start, end = run.comparable("knn")[0][0], run.comparable("knn")[-1][0]
        word = "rose" if last > first else "fell" if last < first else "did not change:"
        first_step, _, untrained = run.step_text(start).partition(", ")
        note = f" ({untrained})" if untrained else ""
        sentences.append(
            f"k-NN accuracy, the share of images whose class is that of the most similar others, {word} from "
            f"{percent(first)} at {first_step}{note} to {percent(last)} at step {end:,.0f}."
        )
    tested = {each.name.partition(",")[0]: each.value for each in reversed(run.results) if each.evaluation == "knn"}
    if {"trained", "untrained"} <= tested.keys():
        pixels = f", raw pixels {percent(tested['raw pixels'])}" if "raw pixels" in tested else ""
        sentences.append(
            f"On test images k-NN is right for {percent(tested['trained'])}; the same network untrained for "
            f"{percent(tested['untrained'])}{pixels}."
        )
    return sentences


def _rank(run: Run) -> str:
    change = _change(run, "probe_cls_rank_me")
    if change is None:
        return ""
    first, last = change
    trend = f"{'up' if last > first else 'down'} from {rough(first)}"
    step = run.comparable("probe_cls_rank_me")[-1][0]
    when, use = ("", "use") if run.is_late(step) else (f" at step {step:,.0f}", "used")
    features = f"The features of whole images{when} {use} about {_dimensions(last)}"
    return f"{features}, {'as at the start' if rough(last) == rough(first) else trend}."


def _dimensions(rank: float) -> str:
    return f"{rough(rank)} dimension{'' if rough(rank) == '1' else 's'}"


def _best(run: Run) -> str:
    if run.best is None:
        return ""
    if at_first := no_better_teacher(run):
        return at_first
    other = ", of another dataset" if run.best.iteration < run.dataset_start else ""
    value = _rated(run.best.signal, run.best.value)
    return f"The best teacher is that of step {run.best.iteration:,} ({value}{other}): eval/best."


def no_better_teacher(run: Run) -> str:
    """A sentence, if the best teacher is not better than the network at step 0; else empty."""
    if run.best is None or run.best.iteration < run.dataset_start:
        return ""
    signal, value = run.best.signal, run.best.value
    if signal != "knn" and value < ALL_ALIKE_RANK:
        return f"No teacher distinguishes images: that of eval/best has the {_rated(signal, value)}."
    start = next((former for step, former in run.comparable(signal) if step == 0), None)
    if start is None or value > start or run.best.iteration == 0:
        return ""
    so_far = "" if run.finished else " so far"
    network = "untrained network" if "untrained" in run.step_text(0) else "network with the initial weights"
    return (
        f"No teacher{so_far} is better than the {network} ({_rated(signal, start)} at step 0): that of eval/best, of "
        f"step {run.best.iteration:,}, has {_rated(signal, value)}."
    )


def _rated(signal: str, value: float) -> str:
    return f"k-NN {percent(value)}" if signal == "knn" else f"effective rank {rough(value)}"


def _change(run: Run, key: str) -> tuple[float, float] | None:
    """The first and the last value on the last dataset, if there are at least two."""
    series = run.comparable(key)
    return (series[0][1], series[-1][1]) if len(series) > 1 else None


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
