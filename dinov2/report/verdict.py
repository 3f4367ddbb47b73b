"""How a run went, in words for somebody who has never seen one."""

from statistics import median
from typing import Literal, NamedTuple

from dinov2.report.numbers import duration, number, percent, rough
from dinov2.report.run import Run

# With fewer lines the numbers of a run say nothing yet.
_FEW_LINES = 3


# An effective rank below which all images have the same features.
_ALL_ALIKE = 1.1

_TARGETS = ("cls_target_information", "patch_target_information", "cls_target_entropy")
# Alarms, and the numbers of which at least one is needed to raise them.
_NEEDED = {
    "collapse": (*_TARGETS, "probe_cls_rank_me", "probe_distinct_images"),
    "divergence": ("cls_target_information", "probe_patch_norm"),
    "decay of dense features": ("probe_patch_similarity",),
    "waiting for data": ("data_wait",),
}
# What says how the network is; that it waits for data says nothing of it.
HEALTH_KEYS = (*_NEEDED["collapse"], *_NEEDED["divergence"], *_NEEDED["decay of dense features"])

Level = Literal["good", "unclear", "bad"]


class Verdict(NamedTuple):
    """A judgement and its reasons."""

    level: Level
    headline: str
    sentences: list[str]


def verdict(run: Run) -> Verdict:
    """What a stranger should know of a run: whether it is healthy, how far it is, and what it has learned."""
    return Verdict(*_judgement(run), [text for text in (progress(run), *_findings(run)) if text])


def _judgement(run: Run) -> tuple[Level, str]:
    """How it looks, and the headline."""
    current = [alarm for alarm in run.alarms if not alarm.over]
    if ended_with_error(run):
        return "bad", "Ended with an error"
    if current:
        return "bad", f"Needs attention: {', '.join(dict.fromkeys(alarm.kind for alarm in current))}"
    if len(run.records) < _FEW_LINES:
        return "unclear", "Too early to say" if run.records else "Nothing to judge yet"
    loss, accuracy = _change(run, "total_loss"), [value for _, value in run.comparable("knn")]
    chance = max((value for _, value in run.comparable("knn_chance")), default=0.0)
    lost = len(accuracy) > 1 and accuracy[-1] < (accuracy[0] + max(accuracy)) / 2  # half of what was won
    if lost and max(accuracy) > chance:
        return "unclear", "Look closer: k-NN accuracy fell"
    if loss and loss[1] >= loss[0] and len(accuracy) < 2:
        return "unclear", "Look closer: the loss did not fall"
    if unwatched(run):
        state = "Finished" if run.finished else "Running" if run.running() else "Stopped"
        until = watched_until(run)
        return "unclear", f"{state}, not watched{'' if until is None else f' after step {until:,.0f}'}"
    if no_better_teacher(run):
        return "unclear", "Look closer: no teacher is better than the network was at first"
    if run.alarms:
        return "good", "Healthy again" if not run.finished else "Ended healthy, after trouble"
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
        return f"{done:,} steps are logged{time}; how many there should be is not known."
    if run.running() and run.records:
        remaining = (total - done) * run.records[-1].get("iter_time", 0.0)
        share = percent(100 * done / total)
        return f"Running: {done:,} of {total:,} steps ({share}){time}, about {duration(remaining)} to go."
    if not run.records:
        return f"{'Running: no' if run.running() else 'No'} step of {total:,} is logged yet."
    again = "continues it" if run.state.checkpoint is not None else "begins anew"
    return f"Stopped at step {_last_step(run):,}{of} ({_checkpoint(run)}); the same command {again}."


def _last_step(run: Run) -> int:
    """The last one that is known to be done; not every step is logged."""
    return max(run.steps_done - 1, -1 if run.state.checkpoint is None else run.state.checkpoint)


def _checkpoint(run: Run) -> str:
    return "no checkpoint" if run.state.checkpoint is None else f"checkpoint at step {run.state.checkpoint:,}"


def _findings(run: Run) -> list[str]:
    return [_data(run), unwatched(run), _alarms(run), _loss(run), *_accuracy(run), _rank(run), _best(run)]


def _data(run: Run) -> str:
    if not run.data_since:
        return ""
    return (
        f"From step {run.data_since:,} on trained on another dataset ({run.data_sets[-1][1]}): what was measured "
        "before is of other images, and not compared with here."
    )


def _alarms(run: Run) -> str:
    if not run.alarms:
        until = watched_until(run)
        return (f"No alarms{'' if until is None else f' up to step {until:,.0f}'}.") if health_steps(run) else ""
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
        start, end = run.comparable("knn")[0][0], run.comparable("knn")[-1][0]
        word = "rose" if last > first else "fell" if last < first else "stayed: it went"
        first_step, _, untrained = run.when(start).partition(", ")
        note = f" ({untrained})" if untrained else ""
        sentences.append(
            f"k-NN accuracy, the share of images whose class is that of the most similar others, {word} from "
            f"{percent(first)} at {first_step}{note} to {percent(last)} at step {end:,.0f}."
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
    trend = "as at first" if rough(last) == rough(first) else f"{'up' if last > first else 'down'} from {rough(first)}"
    step = run.comparable("probe_cls_rank_me")[-1][0]
    when = "" if run.is_late(step) else f"At step {step:,.0f} "
    text = f"he features of whole images {'use' if not when else 'used'} about {_dimensions(last)}, {trend}."
    return f"{when}{'t' if when else 'T'}{text}"


def _dimensions(rank: float) -> str:
    return f"{rough(rank)} dimension{'' if rough(rank) == '1' else 's'}"


def _best(run: Run) -> str:
    if run.best is None:
        return ""
    if at_first := no_better_teacher(run):
        return at_first
    other = ", of another dataset" if run.best.iteration < run.data_since else ""
    value = _rated(run.best.signal, run.best.value)
    return f"The best teacher is that of step {run.best.iteration:,} ({value}{other}): eval/best."


def no_better_teacher(run: Run) -> str:
    """A sentence, if training has not made the best teacher better than what it began with."""
    if run.best is None or run.best.iteration < run.data_since:
        return ""
    signal, value = run.best.signal, run.best.value
    if signal != "knn" and value < _ALL_ALIKE:
        return f"No teacher tells images apart: that of eval/best has the {_rated(signal, value)}."
    start = next((former for step, former in run.comparable(signal) if step == 0), None)
    if start is None or value > start or run.best.iteration == 0:
        return ""
    so_far = "" if run.finished else " so far"
    network = "untrained network" if "untrained" in run.when(0) else "network it began with"
    return (
        f"No teacher{so_far} is better than the {network} ({_rated(signal, start)} at step 0): that of eval/best, of "
        f"step {run.best.iteration:,}, has {_rated(signal, value)}."
    )


def _rated(signal: str, value: float) -> str:
    return f"k-NN {percent(value)}" if signal == "knn" else f"effective rank {rough(value)}"


def _change(run: Run, key: str) -> tuple[float, float] | None:
    """The first and the last value on the last dataset, if there are two."""
    series = run.comparable(key)
    return (series[0][1], series[-1][1]) if len(series) > 1 else None


# --- What was measured, and until when ---


def watched(run: Run) -> list[str]:
    """Kinds of trouble that would have been seen."""
    return [kind for kind, keys in _NEEDED.items() if any(run.series(key) for key in keys)]


def health_steps(run: Run) -> list[float]:
    """The logged steps at which anything about the network's health was measured."""
    return [record["iteration"] for record in run.records if any(key in record for key in HEALTH_KEYS)]


def watched_until(run: Run) -> float | None:
    """The step after which nothing was measured any more; None if it still is, or never was."""
    steps = health_steps(run)
    if not steps or steps[-1] == run.records[-1]["iteration"]:
        return None
    switched_off = run.config is not None and run.config.health.period == 0
    usual = median(after - before for before, after in zip(steps, steps[1:], strict=False)) if len(steps) > 1 else 0
    return steps[-1] if switched_off or run.records[-1]["iteration"] - steps[-1] > usual else None


def unwatched(run: Run) -> str:
    """A sentence about health that was not measured, from some step on or never; empty if it was."""
    if not run.records:
        return ""
    until, cfg = watched_until(run), run.config
    if until is None and health_steps(run):
        return ""
    why = " (health.period=0)" if cfg is not None and cfg.health.period == 0 else ""
    after = "" if until is None else f" after step {until:,.0f}"
    return f"Its health was not measured{after}{why}."
