"""The page: everything about some runs in one HTML file that needs nothing else."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from string import ascii_uppercase
from typing import Any

import dinov2
from dinov2.train.report.charts import Line, Span, chart, swatch
from dinov2.train.report.numbers import duration, number, percent
from dinov2.train.report.panels import Group, Panel, groups_for, points_of
from dinov2.train.report.pictures import SMALL_SIDE, Gallery, galleries
from dinov2.train.report.run import Run
from dinov2.train.report.settings import changed_settings
from dinov2.train.report.style import STYLE
from dinov2.train.report.verdict import HEALTH_KEYS, verdict

WATCHED = "collapse, divergence, waiting for data, decay of dense features"


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The HTML text.

    Args:
        runs: at least one; several are shown side by side.
        title: of the page; default: the names of the runs.
    """
    title = title or " and ".join(run.name for run in runs)
    sections = [
        ("alarms", "Alarms", _alarms(runs)),
        ("accuracy", "Accuracy", _accuracy(runs)),
        ("pictures", "What the network sees", _pictures(runs, galleries(runs))),
        ("curves", "Curves", _curves(runs)),
        ("settings", "Settings", _settings(runs)),
        ("environment", "Environment", _environment(runs)),
    ]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{text}</section>' for name, heading, text in sections)
    several = " several" if len(runs) > 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)} - training report</title>'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1>{_subtitle(runs)}"
        f'<div class="verdicts{several}">{"".join(_verdict(runs, run) for run in runs)}</div>'
        f"{_tiles(runs[0]) if len(runs) == 1 else _summary(runs)}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by dinov2 {escape(dinov2.__version__)}, "
        "<code>python -m dinov2.train.report</code>.</footer></body></html>\n"
    )


# --- Top -------------------------------------------------------------------------------------------------------------


def letter(runs: Sequence[Run], run: Run) -> str:
    """The short name of a run among several, A to Z; empty if there is one run."""
    return "" if len(runs) == 1 else ascii_uppercase[[id(each) for each in runs].index(id(run)) % 26]


def _name(runs: Sequence[Run], run: Run) -> str:
    tag = letter(runs, run)
    return escape(f"{tag}: {run.name}" if tag else run.name)


def facts(run: Run) -> dict[str, str]:
    """What a run is, in a few words."""
    cfg = run.config
    if cfg is None:
        return {}
    sizes = {"wide": cfg.student.embed_dim, "blocks": cfg.student.depth}
    arch = " ".join([cfg.student.arch, *(f"{size} {what}" for what, size in sizes.items() if size)])
    batch = run.global_batch(run.steps_done)
    return {
        "data": cfg.train.dataset_path,
        "network": f"{arch}, patches of {cfg.student.patch_size}",
        "steps": f"{run.total_steps:,}",
        "images per step": f"{batch:,}" if run.sessions else f"{batch:,} per process",
    }


def _subtitle(runs: Sequence[Run]) -> str:
    """What the run is; of several, what they have in common."""
    shared = facts(runs[0])
    for run in runs[1:]:
        shared = {key: value for key, value in shared.items() if facts(run).get(key) == value}
    network, data = shared.get("network"), shared.get("data")
    parts = [
        *([network] if network else []),
        *([f"trained on {data}"] if data else []),
        *(f"{shared[key]} {key}" for key in ("steps", "images per step") if key in shared),
    ]
    return f'<p class="soft">{escape(", ".join(parts))}</p>'


def _verdict(runs: Sequence[Run], run: Run) -> str:
    found = verdict(run)
    name = f'<p class="run">{_name(runs, run)}</p>' if len(runs) > 1 else ""
    sentences = "".join(f"<p>{escape(text)}</p>" for text in found.sentences)
    notes = "".join(f'<p class="soft">{escape(text)}</p>' for text in run.notes)
    return f'<div class="verdict {found.level}">{name}<h2>{escape(found.headline)}</h2>{sentences}{notes}</div>'


def key_figures(run: Run) -> dict[str, str]:
    """The few numbers that one looks for first."""

    def last(key: str, text: Callable[[float], str]) -> str:
        points = points_of(run, key)
        return text(points[-1][1]) if points else ""

    total = "" if run.total_steps is None else f" of {run.total_steps:,}"
    figures = {
        "k-NN accuracy": last("knn", percent),
        "total loss": last("total_loss", number),
        "effective rank": last("probe_cls_rank_me", number),
        "steps": f"{run.steps_done:,}{total}",
        "training time": duration(run.seconds) if run.seconds else "",
        "images per second": last("images_per_second", number),
    }
    return {name: text for name, text in figures.items() if text}


def _tiles(run: Run) -> str:
    def tile(name: str, text: str) -> str:
        figure, space, rest = text.partition(" of ")
        small = f" <small>of {escape(rest)}</small>" if space else ""
        return f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}{small}</dd></div>"

    return f'<dl class="tiles">{"".join(tile(*item) for item in key_figures(run).items())}</dl>'


def _summary(runs: Sequence[Run]) -> str:
    columns = [facts(run) | key_figures(run) for run in runs]
    return _comparison(runs, columns, "The runs side by side; what differs is bold.")


# --- Tables ----------------------------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", numbers: int = 0) -> str:
    """A table of texts; the first cell of a row is its heading, the last `numbers` columns are aligned right."""
    left = len(headings) - numbers

    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        number_class = ' class="number"' if column >= left else ""
        return f"<{tag}{scope}{number_class}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, column, ' scope="col"') for column, text in enumerate(headings))
    body = ""
    for row in rows:
        cells = [cell("th", row[0], 0, ' scope="row"'), *(cell("td", text, 1 + i) for i, text in enumerate(row[1:]))]
        body += f"<tr>{''.join(cells)}</tr>"
    label = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{label}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _comparison(runs: Sequence[Run], columns: Sequence[Mapping[str, str]], caption: str) -> str:
    """A row for each name in any column; rows in which the columns differ stand out."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    body = ""
    for name in names:
        texts = [column.get(name, "") for column in columns]
        kind = ' class="other"' if len(set(texts)) > 1 else ""
        cells = "".join(f"<td{kind}>{escape(text) or '&ndash;'}</td>" for text in texts)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    head = "".join(f'<th scope="col">{_name(runs, run)}</th>' for run in runs)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


# --- Alarms, accuracy ------------------------------------------------------------------------------------------------


def _alarms(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{_name(runs, run)}</h3>")
        if run.alarms:
            parts += [_alarm(alarm, "h4" if len(runs) > 1 else "h3") for alarm in run.alarms]
        elif any(run.series(key) for key in HEALTH_KEYS):
            parts.append(f"<p>None. Watched were: {WATCHED}.</p>")
        else:
            parts.append(
                "<p>None, but little was watched: this run logged no health. It is measured where "
                "<code>health.period</code> in the configuration is not 0.</p>"
            )
    return "".join(parts)


def _alarm(alarm: Any, heading: str) -> str:
    steps = f"step {alarm.first:,}" if alarm.first == alarm.last else f"steps {alarm.first:,} to {alarm.last:,}"
    state = "over" if alarm.over else "still so in the last line"
    return (
        f'<div class="alarm{" over" if alarm.over else ""}"><{heading}>{escape(alarm.kind.capitalize())} '
        f"<small>{steps}, {state}</small></{heading}><p>{escape(alarm.finding)}</p>"
        f"<p><strong>What to do:</strong> {escape(alarm.advice)}</p></div>"
    )


def _accuracy(runs: Sequence[Run]) -> str:
    parts = [_knn_while_training(runs), _evaluations(runs)]
    if not any(parts):
        return (
            "<p>Not measured. During training k-NN needs a data set with labels (<code>health.knn_dataset</code>); "
            "afterwards <code>dinov2/run/eval/knn.py</code> and its neighbours evaluate a teacher.</p>"
        )
    return "".join(parts)


def _knn_while_training(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        points = run.series("knn")
        if points:
            at = {"first": points[0], "best": max(points, key=lambda point: point[1]), "last": points[-1]}
            rows.append([letter(runs, run) or "k-NN", *(f"{percent(v)} at step {s:,.0f}" for s, v in at.values())])
    if not rows:
        return ""
    caption = "k-NN of the teacher while it was trained: each of a few labelled images is classified by the others."
    return table(["run" if len(runs) > 1 else "", "first", "best", "last"], rows, caption)


def _evaluations(runs: Sequence[Run]) -> str:
    """A row for each number, a column for each run."""
    values: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for index, run in enumerate(runs):
        for each in run.measurements:
            teacher = "" if each.teacher is None else f"step {each.teacher:,}"
            values.setdefault((each.evaluation, teacher, each.name, each.data), {})[index] = each.value
    if not values:
        return ""
    rows = []
    for (evaluation, teacher, name, data), found in values.items():
        numbers = [number(found[index]) if index in found else "\N{EN DASH}" for index in range(len(runs))]
        rows.append([evaluation.replace("_", " "), teacher, name, data, *numbers])
    headings = ["evaluation", "teacher of", "measure", "data", *(letter(runs, run) or "percent" for run in runs)]
    return table(headings, rows, "Evaluations of teachers, in percent.", len(runs))


# --- Pictures --------------------------------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run], pictures: Mapping[str, Gallery]) -> str:
    if not any(gallery.steps for gallery in pictures.values()):
        return "<p>No patch features were kept in the folder <code>health</code>: no pictures.</p>"
    intro = (
        "<p>The same images over training. Below each, the first three principal components of the teacher's patch "
        "features as red, green and blue: patches that are alike to the network have like colours, in all images of a "
        "row. At the start colours follow position and brightness; with training, the parts of things.</p>"
        '<p class="soft">Every row has components of its own. Their signs and order, which are arbitrary, are chosen to '
        "agree with the row below, so that colours can be followed upwards from the last step.</p>"
    )
    return intro + "".join(_gallery(runs, run, pictures[run.name]) for run in runs)


def _gallery(runs: Sequence[Run], run: Run, gallery: Gallery) -> str:
    heading = f"<h3>{_name(runs, run)}</h3>" if len(runs) > 1 else ""
    if not gallery.steps:
        return f"{heading}<p>No patch features were kept.</p>"
    rows = ""
    if gallery.images:
        tiny = run.images is not None and max(run.images.shape[2:]) <= SMALL_SIDE
        rows = _row("images", gallery.images, "Image {}", f"originals{' tiny' if tiny else ''}")
    for step, row in gallery.steps.items():
        rows += _row(f"step {step:,}", row, f"Features of image {{}} at step {step:,} in colours", "features")
    shown = len(gallery.steps)
    note = f'<p class="soft">{shown} of {gallery.num_steps} steps are shown.</p>' if shown < gallery.num_steps else ""
    return f'{heading}<div class="gallery">{rows}{note}</div>'


def _row(label: str, pictures: Sequence[str], alt: str, kind: str) -> str:
    images = "".join(f'<img src="{uri}" alt="{alt.format(index)}">' for index, uri in enumerate(pictures, 1))
    columns = f"grid-template-columns: repeat({len(pictures)}, 1fr)"
    return f'<div class="row {kind}"><span>{label}</span><div class="pictures" style="{columns}">{images}</div></div>'


# --- Curves ----------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> str:
    if not any(run.records for run in runs):
        return "<p>Nothing is logged yet.</p>"
    legend = ""
    if len(runs) > 1:
        entries = (f"<span>{swatch(index)}{_name(runs, run)}</span>" for index, run in enumerate(runs))
        legend = f'<div class="legend runs">{"".join(entries)}</div>'
    intro = (
        '<p class="soft">Over the steps of the run; each point is the median of the last 20 steps, the number at the end '
        f"of a line its last value.{' Shaded: an alarm.' if any(run.alarms for run in runs) else ''}</p>"
    )
    return intro + legend + "".join(_group(runs, group) for group in groups_for(runs))


def _group(runs: Sequence[Run], group: Group) -> str:
    panels = "".join(_panel(runs, panel) for panel in group.panels)
    return f'<h3>{group.title}</h3><p class="soft question">{group.question}</p><div class="panels">{panels}</div>'


def _panel(runs: Sequence[Run], panel: Panel) -> str:
    if len(runs) > 1:
        series = [(letter(runs, run), points_of(run, panel.curves[0].key), style) for style, run in enumerate(runs)]
    else:
        series = [("", points_of(runs[0], curve.key), style) for style, curve in enumerate(panel.curves)]
    lines = [Line(points, tag, style) for tag, points, style in series if points]
    spans = [
        Span(alarm.first, alarm.last, f"{letter(runs, run)} {alarm.kind}".strip()) for run in runs for alarm in run.alarms
    ]
    names = [letter(runs, run) for run in runs] if len(runs) > 1 else [curve.label for curve in panel.curves]
    drawn = [(name, line) for name, line in zip(names, [Line(p, t, s) for t, p, s in series], strict=True) if line.points]
    label = f"{panel.title}: " + "; ".join(_in_words(name, line) for name, line in drawn)
    legend = ""
    if len(runs) == 1 and len(panel.curves) > 1:
        entries = (f"<span>{swatch(line.style)}{escape(name)}</span>" for name, line in drawn)
        legend = f'<span class="legend">{"".join(entries)}</span>'
    steps = max((run.steps_done - 1 for run in runs), default=0)
    drawing = chart(lines, label, spans=spans, steps=steps, log=panel.log)
    return (
        f'<figure class="panel"><h4>{escape(panel.title)}{legend}</h4>{drawing}'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
    )


def _in_words(name: str, line: Line) -> str:
    (start, first), (end, last) = line.points[0], line.points[-1]
    return f"{name} from {number(first)} at step {start:,.0f} to {number(last)} at step {end:,.0f}".strip()


# --- Settings, environment -------------------------------------------------------------------------------------------


def _settings(runs: Sequence[Run]) -> str:
    parts = []
    columns = [changed_settings(run.config) if run.config else {} for run in runs]
    defaults = changed_settings(None)
    names = list(dict.fromkeys(name for column in columns for name in column))
    names = [name for name in defaults if name in names]  # in the order of the schema
    if names:
        rows = [[name, defaults[name], *(column.get(name, defaults[name]) for column in columns)] for name in names]
        if len(runs) > 1:
            different = [row for row in rows if len(set(row[2:])) > 1]
            parts.append(_setting_table(runs, different, "Settings in which the runs differ."))
            rows = [row for row in rows if row not in different]
        parts.append(_setting_table(runs[:1], [row[:3] for row in rows], "Settings that are not the default ones."))
    for run in runs:
        if run.config_text:
            name = f" of {_name(runs, run)}" if len(runs) > 1 else ""
            parts.append(f"<details><summary>All settings{name}</summary><pre>{escape(run.config_text)}</pre></details>")
    return "".join(parts) or "<p>There is no configuration to show.</p>"


def _setting_table(runs: Sequence[Run], rows: Sequence[Sequence[str]], caption: str) -> str:
    if not rows:
        return f"<p>{caption} There are none.</p>"
    headings = ["setting", "default", *(letter(runs, run) or "here" for run in runs)]
    return table(headings, rows, caption)


def _environment(runs: Sequence[Run]) -> str:
    columns = [environment_facts(run) for run in runs]
    parts = []
    if len(runs) > 1:
        parts.append(_comparison(runs, columns, "What the runs were made on; what differs is bold."))
    elif columns[0]:
        parts.append(table(["", "latest session"], list(columns[0].items())))
    else:
        parts.append("<p>Not recorded.</p>")
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{_name(runs, run)}</h3>")
        parts.append(_reproduce(run))
    return "".join(parts)


_WORDS = {
    "device": "device",
    "processes": "processes",
    "cores": "cores per process",
    "threads": "threads per process",
    "system": "system",
    "python": "Python",
    "dinov2": "dinov2",
    "torch": "PyTorch",
    "torchvision": "torchvision",
    "numpy": "NumPy",
    "xformers": "xFormers",
    "cuda": "CUDA",
    "driver": "driver",
    "slurm_job": "SLURM job",
}


def environment_facts(run: Run) -> dict[str, str]:
    """The latest session in words; empty if none was recorded."""
    if not run.sessions:
        return {}
    latest = run.sessions[-1]
    found = {word: str(latest[key]) for key, word in _WORDS.items() if latest.get(key) is not None}
    if latest.get("commit"):
        changed = latest.get("changed_files")
        found["commit"] = latest["commit"] + (f", with {changed} changed file(s)" if changed else "")
    starts = [f"step {each.get('first_step', 0):,} ({each.get('date', 'date unknown')})" for each in run.sessions]
    found["started at"] = "; ".join(starts)
    return found


def _reproduce(run: Run) -> str:
    commands = [each["command"] for each in run.sessions if each.get("command")]
    if commands:
        text, how = commands[-1], "In the top folder of the code, this command makes the run again, or continues it:"
    elif run.config_text:
        text = "python dinov2/train/train.py --config-file OUT/config.yaml --output-dir NEW"
        how = "The command was not recorded. With OUT the folder of this run, this makes it again in another one:"
    else:
        return ""
    return f"<p>{how}</p><pre>{escape(text)}</pre>"
