"""How a run went, in words for somebody who has never seen one."""

from typing import Literal, NamedTuple

from dinov2.train.report.numbers import duration, number, percent
from dinov2.train.report.run import Run

# What alarms are about; without any of these values there is nothing to raise one.
HEALTH_KEYS = (
    "cls_target_information",
    "patch_target_information",
    "cls_target_entropy",
    "probe_cls_rank_me",
    "probe_patch_similarity",
    "data_wait",
)
# With fewer lines the numbers of a run say nothing yet.
_FEW_LINES = 3


class Verdict(NamedTuple):
    """A judgement and its reasons."""

    level: Literal["good", "unclear", "bad"]
    headline: str
    sentences: list[str]


def verdict(run: Run) -> Verdict:
    """What a stranger should know of a run: whether it is healthy, how far it is, and what it has learned."""
    reasons = [text for text in (progress(run), *_findings(run)) if text]
    current = [alarm for alarm in run.alarms if not alarm.over]
    if current:
        kinds = ", ".join(dict.fromkeys(alarm.kind for alarm in current))
        return Verdict("bad", f"Needs attention: {kinds}", reasons)
    if len(run.records) < _FEW_LINES:
        return Verdict("unclear", "Too early to say" if run.records else "Nothing to judge yet", reasons)
    loss, accuracy = _change(run, "total_loss"), [value for _, value in run.series("knn")]
    if len(accuracy) > 1 and accuracy[-1] < (accuracy[0] + max(accuracy)) / 2:  # half of what was won is lost again
        return Verdict("unclear", "Look closer: k-NN accuracy fell", reasons)
    if loss and loss[1] >= loss[0] and len(accuracy) < 2:
        return Verdict("unclear", "Look closer: the loss did not fall", reasons)
    if not any(run.series(key) for key in HEALTH_KEYS):
        return Verdict("unclear", "The losses look right; health was not measured", reasons)
    if run.alarms:
        return Verdict("good", "Healthy again" if not run.finished else "Ended healthy, after trouble", reasons)
    return Verdict("good", "Healthy" if run.finished else "Healthy so far", reasons)


def progress(run: Run) -> str:
    """How far the run is: finished, running or stopped."""
    done, total = run.steps_done, run.total_steps
    time = f" in {duration(run.seconds)}" if run.seconds else ""
    if total is None:
        return f"{done:,} steps are logged{time}; how many there should be is not known."
    if not run.records:
        return f"No step of {total:,} is logged yet."
    if run.finished:
        return f"Finished: all {total:,} steps{time}."
    share = percent(100 * done / total)
    if run.running():
        remaining = (total - done) * run.records[-1].get("iter_time", 0.0)
        return f"Running: {done:,} of {total:,} steps ({share}){time}, about {duration(remaining)} to go."
    return f"Stopped at step {done:,} of {total:,} ({share}); the same command again continues it."


def _findings(run: Run) -> list[str]:
    return [_alarms(run), _loss(run), *_accuracy(run), _rank(run), _best(run)]


def _alarms(run: Run) -> str:
    if not run.alarms:
        return "No alarms." if any(run.series(key) for key in HEALTH_KEYS) else ""
    now = dict.fromkeys(alarm.kind for alarm in run.alarms if not alarm.over)
    passed = dict.fromkeys(alarm.kind for alarm in run.alarms if alarm.kind not in now)
    kinds = [*now, *(f"{kind} (which passed)" for kind in passed)]
    return f"Alarms: {', '.join(kinds)}. What was seen, and what to do, is below."


def _loss(run: Run) -> str:
    change = _change(run, "total_loss")
    if change is None:
        return ""
    first, last = change
    if last < first:
        but = ", but it can fall while features get worse" if any(not alarm.over for alarm in run.alarms) else ""
        return f"The loss fell from {number(first)} to {number(last)}{but}."
    return (
        f"The loss went from {number(first)} to {number(last)}. It may rise for a while, as the teacher's targets "
        f"sharpen, but should fall in the end."
    )


def _accuracy(run: Run) -> list[str]:
    sentences = []
    change = _change(run, "knn")
    if change is not None:
        first, last = change
        start, end = run.series("knn")[0][0], run.series("knn")[-1][0]
        word = "rose" if last > first else "fell" if last < first else "stayed: it went"
        untrained = " (untrained)" if start == 0 else ""
        sentences.append(
            f"k-NN accuracy, the share of images whose class is that of the most similar others, {word} from "
            f"{percent(first)} at step {start:,.0f}{untrained} to {percent(last)} at step {end:,.0f}."
        )
    tested = {
        each.name.partition(",")[0]: each.value for each in reversed(run.measurements) if each.evaluation == "knn"
    }
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
    word = "up" if last > first else "down"
    return f"The features of whole images use about {last:.3g} dimensions, {word} from {first:.3g}."


def _best(run: Run) -> str:
    if run.best is None:
        return ""
    value = f"k-NN {percent(run.best.value)}" if run.best.signal == "knn" else f"effective rank {run.best.value:.3g}"
    return f"The best teacher is that of step {run.best.iteration:,} ({value}): eval/best."


def _change(run: Run, key: str) -> tuple[float, float] | None:
    """The first and the last value, if there are two."""
    series = run.series(key)
    return (series[0][1], series[-1][1]) if len(series) > 1 else None
