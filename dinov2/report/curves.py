"""The charts of the page: every logged metric over the steps, by the table `dinov2.metric_names`."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, get_args

from dinov2.metric_names import BY_NAME, METRICS, Group, Metric
from dinov2.report.charts import Chart, Line, Span, make_chart
from dinov2.report.numbers import number, percent, short
from dinov2.report.run import Points, Run

_LOG_SCALE = {"Gradient norms"}


class Panel(NamedTuple):
    """A chart with its title and caption."""

    title: str
    metric: Metric  # describes the curves: meaning, unit, direction
    legend: list[tuple[str, int]]  # (text, style) of each line; empty if there is only one, or if the lines are runs
    chart: Chart


def panels_by_group(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """The charts of all logged metrics by group (`metric_names.Group`), "other" for metrics that are not in the table.

    With several runs every metric has a chart of its own, whose lines are the runs.
    """
    groups = {name: [m for m in (*METRICS, *_DERIVED) if m.group == name and m.chart] for name in get_args(Group)}
    logged = {key: None for run in runs for record in run.records for key in record}  # in order
    groups["other"] = [Metric(key, "features", "", chart=key.replace("_", " ")) for key in logged if key not in BY_NAME]
    return {name: panels for name, metrics in groups.items() if (panels := _panels(runs, metrics))}


def _panels(runs: Sequence[Run], metrics: Sequence[Metric]) -> list[Panel]:
    """The charts of some metrics, those of the same chart in sequence."""
    present = [metric for metric in metrics if any(points_of(run, metric.name) for run in runs)]
    panels = []
    if len(runs) > 1:
        for metric in present:
            title = f"{metric.chart}, {metric.label}" if metric.label else metric.chart
            panels.append(_panel(title, metric, [(run.tag, points_of(run, metric.name)) for run in runs], runs))
        return panels
    for title, each in groupby(present, key=lambda metric: metric.chart):
        drawn = list(each)
        panels.append(_panel(title, drawn[0], [(m.label, points_of(runs[0], m.name)) for m in drawn], runs))
    return panels


def _panel(title: str, metric: Metric, series: Sequence[tuple[str, Points]], runs: Sequence[Run]) -> Panel:
    several = len(runs) > 1
    text = percent if metric.unit == "%" else short
    drawn = [
        (name, Line(points, name if several else "", style, text))
        for style, (name, points) in enumerate(series)
        if points
    ]
    chart = make_chart(
        [line for _, line in drawn],
        f"{title}: " + "; ".join(_description(name, line) for name, line in drawn),
        spans=[span for run in runs for span in alarm_spans(run)],
        steps=max(run.steps_done for run in runs),
        log=metric.chart in _LOG_SCALE,
    )
    named = [(name, line.style) for name, line in drawn] if not several and len(series) > 1 else []
    return Panel(title, metric, named, chart)


def _description(name: str, line: Line) -> str:
    (start, first), (end, last) = line.points[0], line.points[-1]
    text = percent if line.text is percent else number
    return f"{name} from {text(first)} at step {start:,.0f} to {text(last)} at step {end:,.0f}".strip()


def alarm_spans(run: Run) -> list[Span]:
    """The steps of alarms, overlapping ones merged; to the end of the run if an alarm is not over."""
    spans: list[Span] = []
    for alarm in sorted(run.alarms, key=lambda alarm: alarm.first):
        last = alarm.last if alarm.over else run.steps_done
        if spans and alarm.first <= spans[-1].last:
            earlier = spans.pop()
            label = earlier.label if alarm.kind in earlier.label else f"{earlier.label}, {alarm.kind}"
            spans.append(Span(earlier.first, max(earlier.last, last), label, run.tag))
        else:
            spans.append(Span(alarm.first, last, alarm.kind, run.tag))
    return spans


# --- Metrics computed from others ------------------------------------------------------------------------------------


def _images_per_second(run: Run) -> Points:
    timed = [(step, time, run.global_batch(step)) for step, time in run.series("iter_time") if time > 0]
    return [(step, batch / time) for step, time, batch in timed if batch]


def _data_wait(run: Run) -> Points:
    """In percent; computed from the times where it was not logged."""
    found = []
    for record in run.records:
        time = record.get("iter_time", 0.0)
        computed = record.get("data_time", 0.0) / time if time > 0 else None
        share = record.get("data_wait", computed)
        if share is not None:
            found.append((record["iteration"], 100 * share))
    return found


_WAITING = "Share of the step time. Near 0; where it is large, data loading limits the run."
_DERIVED: dict[Metric, Callable[[Run], Points]] = {
    Metric("images_per_second", "speed", "Over all processes. Steady.", chart="Images per second"): _images_per_second,
    Metric("data_wait_percent", "speed", _WAITING, "%", chart="Waiting for data"): _data_wait,
}


def points_of(run: Run, name: str) -> Points:
    """(step, value) of a logged metric, or of one that is computed from others."""
    computed = next((function for metric, function in _DERIVED.items() if metric.name == name), None)
    points = run.series(name) if computed is None else computed(run)
    if name.startswith("frozen_teacher_"):  # measured once: a reference for the whole run
        points += [(run.steps_done - 1, value) for _, value in points]
    return points
