"""The parts of the page that are text, tables and images."""

from collections.abc import Mapping, Sequence
from html import escape

from dinov2.report.images import SMALL_SIDE, Gallery, galleries
from dinov2.report.numbers import measured, percent, readable
from dinov2.report.run import Measurement, Run
from dinov2.report.settings import changed_settings
from dinov2.report.tables import ABSENT, comparison, table
from dinov2.report.verdict import health_steps, unwatched, watched
from dinov2.train.monitor.alarms import Alarm

FEW_PATCHES = 14  # along a side: fewer show little of the things in an image

# --- Alarms ----------------------------------------------------------------------------------------------------------


def alarms(runs: Sequence[Run]) -> str:
    """What alarmed, when, and what to do about it."""
    return "".join(_heading(run) + _alarms(run) for run in runs)


def _heading(run: Run) -> str:
    return f"<h3>{escape(run.title)}</h3>" if run.tag else ""


def _alarms(run: Run) -> str:
    if run.alarms:
        kinds = dict.fromkeys(alarm.kind for alarm in run.alarms)
        return "".join(_alarm([alarm for alarm in run.alarms if alarm.kind == kind], run) for kind in kinds)
    seen = ", ".join(watched(run)) or "nothing"
    if not health_steps(run):
        return (
            f"<p>None, but little was watched: {seen}. Health is measured where <code>health.period</code> is not "
            "0.</p>"
        )
    return f"<p>None. Watched were: {seen}. {escape(unwatched(run))}</p>"


def _alarm(alarms: Sequence[Alarm], run: Run) -> str:
    """All that was found of one kind, and what to do about it."""
    over, heading = all(alarm.over for alarm in alarms), "h4" if run.tag else "h3"
    findings = "".join(f"<li>{_when(alarm)}: {escape(readable(alarm.finding))}.</li>" for alarm in alarms)
    advice = "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys(alarm.advice for alarm in alarms))
    return (
        f'<div class="alarm {"over" if over else "current"}"><{heading}>{escape(alarms[0].kind.capitalize())} '
        f"<small>{'over' if over else 'not over'}</small></{heading}><ul>{findings}</ul>"
        f"<p><strong>What to do</strong></p><ul>{advice}</ul></div>"
    )


def _when(alarm: Alarm) -> str:
    if not alarm.over:
        return f"Since step {alarm.first:,}"
    return f"Steps {alarm.first:,} to {alarm.last:,}" if alarm.last > alarm.first else f"Step {alarm.first:,}"


# --- Accuracy --------------------------------------------------------------------------------------------------------


def accuracy(runs: Sequence[Run]) -> str:
    """k-NN during training, and evaluations of teachers."""
    text = _knn_while_training(runs) + _evaluations(runs)
    return text or (
        "<p>Not measured. During training k-NN needs a dataset with labels (<code>health.knn_dataset</code>); "
        "afterwards <code>dinov2/run/eval/knn.py</code> and its neighbors evaluate a teacher.</p>"
    )


def _knn_while_training(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        points = run.comparable("knn")
        if points:
            shown = (points[0], max(points, key=lambda point: point[1]), points[-1])
            rows.append([run.title if run.tag else "teacher", *(f"{percent(v)} at step {s:,.0f}" for s, v in shown)])
    if not rows:
        return ""
    most = {run.config.health.knn_images for run in runs if run.config is not None}
    among = f"at most {max(most):,}" if most else "a few"
    caption = (
        f"k-NN while training: measured by leaving one out among {among} labeled images, each classified by those "
        "whose features are most similar; not comparable with dinov2/eval/knn.py."
    )
    return table(["", "first", "best", "last"], rows, caption)


def _evaluations(runs: Sequence[Run]) -> str:
    """A table for each evaluation of a teacher on the same data, with a column for each run."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for index, run in enumerate(runs):
        for each in run.measurements:
            row = groups.setdefault((_subject(each), each.data), {}).setdefault(each.name, [ABSENT] * len(runs))
            row[index] = measured(each.value)
    tables = ""
    for (subject, data), rows in groups.items():
        caption = f"{subject}, in percent{f': {data}' if data else ''}."
        columns = [run.title if run.tag else "" for run in runs]
        tables += table(["", *columns], [[name, *row] for name, row in rows.items()], caption, len(runs))
    return tables


def _subject(each: Measurement) -> str:
    name = {"knn": "k-NN", "log_regression": "Logistic regression", "linear": "Linear classification"}
    teacher = "" if each.teacher is None else f" of the teacher of step {each.teacher:,}"
    return name.get(each.evaluation, each.evaluation) + teacher


# --- Images --------------------------------------------------------------------------------------------------------


def images(runs: Sequence[Run]) -> str:
    """The same images over training in the eyes of the teacher."""
    found = galleries(runs)
    if not any(gallery.steps for gallery in found):
        return (
            "<p>The run has kept no patch features (folder <code>health</code>)"
            f"{' of its last dataset' if any(run.data_since for run in runs) else ''}, so there are no images.</p>"
        )
    intro = (
        "<p>The same images over training, and below each what the teacher's patch features are like: their first "
        "three principal components as red, green and blue. Patches that are alike to the network have like colors, "
        "in all images of a row. Noise, or colors that follow the place in the image alone, should become parts of "
        "things.</p>"
        '<p class="soft">Every row has components of its own. Their signs and order, which are arbitrary, are chosen '
        "to agree with the row below, so that colors can be followed upwards from the last step"
        f"{', and to agree between runs with the same images' if len(runs) > 1 else ''}.</p>"
    )
    return intro + "".join(_heading(run) + _gallery(run, gallery) for run, gallery in zip(runs, found, strict=True))


def _gallery(run: Run, gallery: Gallery) -> str:
    if not gallery.steps:
        since = f" since step {run.data_since:,}, of the last dataset" if run.data_since else ""
        return f"<p>No patch features were kept{since}.</p>"
    rows = ""
    if gallery.images:
        tiny = run.images is not None and max(run.images.shape[2:]) <= SMALL_SIDE
        rows = _row("images", gallery.images, "Image {}", f"originals{' tiny' if tiny else ''}")
    for step, uris in gallery.steps.items():
        rows += _row(f"step {step:,}", uris, f"Features of image {{}} at step {step:,}, in colors", "features")
    shown = len(gallery.steps)
    note = f'<p class="soft">{shown} of {gallery.num_steps} steps are shown.</p>' if shown < gallery.num_steps else ""
    return f'{_coarse(run)}<div class="gallery">{rows}{note}</div>'


def _coarse(run: Run) -> str:
    """What to expect of images of images that have but few patches."""
    if run.config is None:
        return ""
    pixels, patch = run.config.crops.global_crops_size, run.config.student.patch_size
    side = pixels // patch
    if side >= FEW_PATCHES:
        return ""
    size, patches = (f"{n} \N{MULTIPLICATION SIGN} {n}" for n in (pixels, side))
    return (
        f'<p class="soft">These images are small: {size} pixels are {patches} patches of {patch} pixels for the '
        "network. With so few patches colors that follow the place in the image are normal, and no sign of "
        "failure.</p>"
    )


def _row(label: str, uris: Sequence[str], alt: str, kind: str) -> str:
    images = "".join(f'<img src="{uri}" alt="{alt.format(index)}">' for index, uri in enumerate(uris, 1))
    columns = f"grid-template-columns: repeat({len(uris)}, 1fr)"
    return f'<div class="row {kind}"><span>{label}</span><div class="images" style="{columns}">{images}</div></div>'


# --- Settings --------------------------------------------------------------------------------------------------------


def settings(runs: Sequence[Run]) -> str:
    """What is not as by default, what differs between the runs, and all of it folded away."""
    known = [run for run in runs if run.config is not None]
    parts = [_changed(known)] if known else []
    for run in runs:
        if run.config_text:
            name = f" of {escape(run.title)}" if run.tag else ""
            parts.append(
                f"<details><summary>All settings{name}</summary><pre>{escape(run.config_text)}</pre></details>"
            )
    return "".join(parts) or "<p>There is no configuration to show.</p>"


def _changed(runs: Sequence[Run]) -> str:
    columns, defaults = [changed_settings(run.config) for run in runs], changed_settings(None)
    names = [name for name in defaults if any(name in column for column in columns)]
    names.sort(key=lambda name: name.startswith("compute_precision."))  # many, and seldom what one looks for
    rows = [[name, defaults[name], *(column.get(name, defaults[name]) for column in columns)] for name in names]
    different = [row for row in rows if len(set(row[2:])) > 1]
    alike = [row[:3] for row in rows if row not in different]
    tables = ""
    if len(runs) > 1:
        headings = ["", "default", *(run.title for run in runs)]
        caption = "In which settings the runs differ."
        tables = table(headings, different, caption) if different else "<p>All runs have the same settings.</p>"
    which = "What all runs have that is" if len(runs) > 1 else "Settings that are"
    return tables + table(["", "default", "here"], alike, f"{which} not as by default.") if alike else tables


# --- Environment -----------------------------------------------------------------------------------------------------


def environment(runs: Sequence[Run]) -> str:
    """What the runs were made by and on, and the commands that make them again."""
    columns = [session_facts(run) for run in runs]
    if not any(columns):
        facts = "<p>Not recorded.</p>"
    elif len(runs) > 1:
        facts = comparison([run.title for run in runs], columns, "The latest session of each; what differs is bold.")
    else:
        facts = table(["", "latest session"], list(columns[0].items()))
    return facts + "".join(_heading(run) + _reproduce(run) for run in runs)


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


def session_facts(run: Run) -> Mapping[str, str]:
    """The latest session in words, and when all of them began; empty if none was recorded."""
    if not run.sessions:
        return {}
    latest = run.sessions[-1]
    found = {word: str(latest[key]) for key, word in _WORDS.items() if latest.get(key) is not None}
    if latest.get("commit"):
        changed = latest.get("changed_files")
        found["commit"] = f"{latest['commit']}{f', with {changed} changed file(s)' if changed else ''}"
    starts = [f"step {each.get('first_step', 0):,} on {_minute(each.get('date'))}" for each in run.sessions]
    found["started at"] = "; ".join(starts)
    if len(run.data_sets) > 1:
        found["datasets"] = "; ".join(f"from step {first:,} on {name}" for first, name in run.data_sets)
    return found


def _minute(date: object) -> str:
    """2026-11-23T14:18:21+00:00 -> 2026-11-23 14:18 UTC"""
    return f"{str(date)[:16].replace('T', ' ')} UTC" if date else "an unknown day"


def _reproduce(run: Run) -> str:
    commands = [each["command"] for each in run.sessions if each.get("command")]
    if commands:
        text, how = str(commands[-1]), "This command, in the top folder of the code, continues the run; in another"
        how += " output folder it makes it again:"
    elif run.config_text:
        text = "python dinov2/train/train.py --config-file OUT/config.yaml --output-dir NEW"
        how = "The command was not recorded. With OUT the folder of this run, this makes it again in another one:"
    else:
        return ""
    return f"<p>{how}</p><pre>{escape(text)}</pre>"
