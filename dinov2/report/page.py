"""The page: everything about some runs in one HTML file that needs nothing else."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import dinov2
from dinov2.files import atomic_write
from dinov2.report import sections
from dinov2.report.curves import curves
from dinov2.report.numbers import duration, number, percent, rough, short
from dinov2.report.panels import points_of
from dinov2.report.run import Run, read_runs
from dinov2.report.style import STYLE
from dinov2.report.tables import comparison
from dinov2.report.verdict import verdict

logger = logging.getLogger(__name__)


def write_report(folders: Sequence[Path], output: Path | None = None, title: str | None = None) -> Path:
    """Write the page about some runs; returns its file.

    Args:
        folders: output folders of trainings; several are shown side by side.
        output: the file; default: `report.html` in the first folder.
        title: of the page; default: the names of the folders.

    Raises:
        FileNotFoundError: a folder is none that a training wrote.
        ValueError: `output` cannot be the name of a page.
    """
    if output is not None:
        check_output(output)
    runs = read_runs(folders)
    output = output or folders[0] / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(page(runs, title).encode())
    logger.info("report: %s", output)
    return output


def check_output(output: Path) -> None:
    """Refuse a file that browsers would not take for a page.

    Raises:
        ValueError: saying what is wrong with the name.
    """
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file, such as {output / 'report.html'}")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: the report is a web page, its name must end in .html or .htm")


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The HTML text about at least one run."""
    *former, last = [run.name for run in runs]
    title = title or (f"{', '.join(former)} and {last}" if former else last)
    parts = [
        ("alarms", "Alarms", sections.alarms(runs)),
        ("accuracy", "Accuracy", sections.accuracy(runs)),
        ("images", "What the network sees", sections.images(runs)),
        ("curves", "Curves", curves(runs)),
        ("settings", "Settings", sections.settings(runs)),
        ("environment", "Environment", sections.environment(runs)),
    ]
    links = "".join(f'<a href="#{name}">{heading}</a> ' for name, heading, _ in parts)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{text}</section>' for name, heading, text in parts)
    several = " several" if len(runs) > 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)} - training report</title>'
        f'<style>{STYLE}</style></head>\n<body><header><p class="kind">Training report</p><h1>{escape(title)}</h1>'
        f'<p class="soft">{escape(subtitle(runs))}</p>'
        f'<div class="verdicts{several}">{"".join(_verdict(run) for run in runs)}</div>'
        f"{_tiles(runs[0]) if len(runs) == 1 else _side_by_side(runs)}<nav>{links}</nav></header>\n"
        f"<main>{body}</main>\n"
        f"<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by dinov2 {escape(dinov2.__version__)}, "
        "<code>python -m dinov2.report</code>.</footer></body></html>\n"
    )


def facts(run: Run) -> Mapping[str, str]:
    """What a run is, in a few words."""
    cfg = run.config
    if cfg is None:
        return {}
    sizes = {"wide": cfg.student.embed_dim, "blocks": cfg.student.depth}
    network = [cfg.student.arch, *(f"{size} {what}" for what, size in sizes.items() if size)]
    return {
        "data": cfg.train.dataset_path,
        "network": ", ".join([*network, f"patches of {cfg.student.patch_size} pixels"]),
        "steps": f"{run.total_steps:,} steps",
        "batch": f"{run.global_batch(run.steps_done):,} images{'' if run.sessions else ' of each process'}",
    }


def subtitle(runs: Sequence[Run]) -> str:
    """What the runs have in common."""
    first, *others = map(facts, runs)
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return " \N{MIDDLE DOT} ".join(f"batches of {value}" if key == "batch" else value for key, value in shared.items())


def key_figures(run: Run) -> Mapping[str, str]:
    """The few numbers that one looks for first."""

    def last(key: str, text: Callable[[float], str]) -> str:
        points = points_of(run, key)
        if not points:
            return ""
        step, value = points[-1]
        return f"{text(value)}{'' if run.is_late(step) else f' ({run.when(step)})'}"

    total = "" if run.total_steps is None else f" of {run.total_steps:,}"
    figures = {
        "k-NN accuracy": last("knn", percent),
        "total loss": last("total_loss", number),
        "effective rank": last("probe_cls_rank_me", rough),
        "steps done": f"{run.steps_done:,}{total}",
        "training time": duration(run.seconds) if run.seconds else "",
        "images per second": last("images_per_second", short),
    }
    return {name: text for name, text in figures.items() if text}


def _verdict(run: Run) -> str:
    found = verdict(run)
    name = f'<p class="run">{escape(run.title)}</p>' if run.tag else ""
    sentences = "".join(f"<p>{escape(text)}</p>" for text in found.sentences)
    notes = "".join(f'<p class="soft">{escape(text)}</p>' for text in run.notes)
    return f'<div class="verdict {found.level}">{name}<h2>{escape(found.headline)}</h2>{sentences}{notes}</div>'


def _tiles(run: Run) -> str:
    def tile(name: str, text: str) -> str:
        figure, space, rest = text.partition(" ") if re.search(r" of | \(", text) else (text, "", "")
        small = f" <small>{escape(rest)}</small>" if space else ""
        return f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}{small}</dd></div>"

    return f'<dl class="tiles">{"".join(tile(*item) for item in key_figures(run).items())}</dl>'


def _side_by_side(runs: Sequence[Run]) -> str:
    columns = [{**key_figures(run), **facts(run)} for run in runs]
    for column in columns:
        column.pop("steps", None)  # the key figures have them
    return comparison([run.title for run in runs], columns, "Side by side; what differs is bold.")
