"""The part of the page with the charts."""

from collections.abc import Sequence
from html import escape

from dinov2.report.charts import Line, Span, chart, swatch
from dinov2.report.numbers import number, percent, short
from dinov2.report.panels import Group, Panel, groups_for, points_of
from dinov2.report.run import Run


def curves(runs: Sequence[Run]) -> str:
    """Everything that was logged, over the steps; the lines of several runs in the same charts."""
    if not any(run.records for run in runs):
        return "<p>Nothing is logged yet.</p>"
    shaded = " Shaded, under a triangle: an alarm." if any(run.alarms for run in runs) else ""
    intro = (
        '<p class="soft">Over the steps of the run. Losses are medians of the last 20 steps, features and targets are '
        f"those of one step; the number at the end of a line is its last value.{shaded}{_other_data(runs)}</p>"
    )
    legend = _legend([(run.title, index) for index, run in enumerate(runs)], "runs") if len(runs) > 1 else ""
    return intro + legend + "".join(_group(runs, group) for group in groups_for(runs))


def _other_data(runs: Sequence[Run]) -> str:
    """Until when features are of other images than in the end."""
    changed = [(f" of {run.title}" if run.tag else "", run.data_since) for run in runs if run.data_since]
    return "".join(f" Before step {step:,}{escape(name)} another dataset was trained on." for name, step in changed)


def _legend(entries: Sequence[tuple[str, int]], kind: str = "") -> str:
    """(text, style of the line) of each line."""
    spans = "".join(f"<span>{swatch(style)}{escape(text)}</span>" for text, style in entries)
    return f'<div class="legend {kind}">{spans}</div>'


def _group(runs: Sequence[Run], group: Group) -> str:
    panels = "".join(_panel(runs, panel) for panel in group.panels)
    question = f'<p class="soft question">{group.question}</p>' if group.question else ""
    return f'<h3>{escape(group.title)}</h3>{question}<div class="panels">{panels}</div>'


def _panel(runs: Sequence[Run], panel: Panel) -> str:
    """A chart; its lines are runs if there are several, else the quantities of the panel."""
    if len(runs) > 1:
        sources = [(run, panel.curves[0].key, run.tag) for run in runs]
    else:
        sources = [(runs[0], curve.key, curve.label) for curve in panel.curves]
    drawn = [
        (name, Line(points, name if len(runs) > 1 else "", style, percent if panel.percent else short))
        for style, (run, key, name) in enumerate(sources)
        if (points := points_of(run, key))
    ]
    spans = [span for run in runs for span in alarm_spans(run)]
    drawing = chart(
        [line for _, line in drawn],
        f"{panel.title}: " + "; ".join(_in_words(*each) for each in drawn),
        spans=spans,
        steps=max(run.steps_done for run in runs),
        log=panel.log,
    )
    several = len(runs) == 1 and len(panel.curves) > 1
    legend = _legend([(name, line.style) for name, line in drawn]) if several else ""
    return (
        f'<figure class="panel"><div><h4>{escape(panel.title)}</h4>{legend}</div>{drawing}'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
    )


def alarm_spans(run: Run) -> list[Span]:
    """When something was wrong: the steps of alarms, those that overlap in one; to the end if they are not over."""
    spans: list[Span] = []
    for alarm in sorted(run.alarms, key=lambda alarm: alarm.first):
        last = alarm.last if alarm.over else run.steps_done
        if spans and alarm.first <= spans[-1].last:
            former = spans.pop()
            label = former.label if alarm.kind in former.label else f"{former.label}, {alarm.kind}"
            spans.append(Span(former.first, max(former.last, last), label, run.tag))
        else:
            spans.append(Span(alarm.first, last, alarm.kind, run.tag))
    return spans


def _in_words(name: str, line: Line) -> str:
    (start, first), (end, last) = line.points[0], line.points[-1]
    text = percent if line.text is percent else number
    return f"{name} from {text(first)} at step {start:,.0f} to {text(last)} at step {end:,.0f}".strip()
