"""The report: one HTML file about some runs that needs no other file and no network, by the templates beside it."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import dinov2
from dinov2.files import atomic_write
from dinov2.report import charts, images, sections
from dinov2.report import verdict as judgments
from dinov2.report.curves import panels_by_group, points_of
from dinov2.report.numbers import duration, number, percent, readable, rough, short
from dinov2.report.read_run import read_runs
from dinov2.report.run import Run

logger = logging.getLogger(__name__)


def write_report(folders: Sequence[Path], output: Path | None = None, title: str | None = None) -> Path:
    """Write the report about some runs.

    Args:
        folders: Output folders of trainings; several are shown side by side.
        output: File to write; default: `report.html` in the first folder.
        title: Title of the page; default: the names of the folders.

    Returns:
        The file.

    Raises:
        FileNotFoundError: A folder is not the output folder of a training.
        ValueError: `output` is not the name of an HTML file.
    """
    if output is not None:
        _check_output(output)
    runs = read_runs(folders)
    output = output or folders[0] / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(page(runs, title).encode())
    logger.info("report: %s", output)
    return output


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file, such as {output / 'report.html'}")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: the report is a web page, its name must end in .html or .htm")


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The HTML text about at least one run."""
    *others, last = [run.name for run in runs]
    return render(
        "page.html",
        title=title or (f"{', '.join(others)} and {last}" if others else last),
        subtitle=subtitle(runs),
        runs=runs,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=dinov2.__version__,
    )


def render(template: str, **context: Any) -> str:
    """The text of a template in `templates/`; all values are escaped."""
    return template_environment().get_template(template).render(**context)


@cache
def template_environment() -> Environment:
    """Templates with the functions that they call."""
    environment = Environment(
        loader=PackageLoader("dinov2.report"),
        autoescape=True,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"commas": "{:,}".format, "coordinate": "{:.1f}".format, "breakable": breakable}
    environment.filters |= {each.__name__: each for each in (duration, number, percent, readable, rough)}
    environment.globals |= {name: getattr(charts, name) for name in ("WIDTH", "HEIGHT", "FONT", "MAX_DOTS")}
    functions = (
        *(judgments.verdict, judgments.ended_with_error, judgments.last_step, judgments.change),
        *(judgments.knn_on_test_images, judgments.distinguishes_no_images, judgments.not_better_than),
        *(judgments.health_steps, judgments.monitored, judgments.monitored_until, judgments.unmonitored),
        *(sections.result_tables, sections.setting_tables, sections.session_facts),
        *(key_figures, side_by_side, comparison_rows, panels_by_group, charts.stroke, charts.ticks, charts.tick_text),
        *(images.galleries, images.has_tiny_images, images.coarse_grid),
    )
    environment.globals |= {function.__name__: function for function in functions}
    return environment


def breakable(text: str) -> Markup:
    """Escaped text with line breaks allowed after these signs, for long keys and datasets on a phone."""
    return Markup(re.sub(r"([._:](?=[^\W\d]))", r"\1<wbr>", str(escape(text))))


# --- The head of the page --------------------------------------------------------------------------------------------


def facts(run: Run) -> Mapping[str, str]:
    """Data, network and size of a run."""
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
    """The facts that all runs share."""
    first, *others = map(facts, runs)
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return " \N{MIDDLE DOT} ".join(f"batches of {value}" if key == "batch" else value for key, value in shared.items())


def key_figures(run: Run) -> Mapping[str, tuple[str, str]]:
    """The most important numbers of a run, each with a remark that may be empty."""

    def last(name: str, text: Callable[[float], str]) -> tuple[str, str]:
        points = points_of(run, name)
        if not points:
            return "", ""
        step, value = points[-1]
        return text(value), "" if run.is_late(step) else f"({run.step_text(step)})"

    figures = {
        "k-NN accuracy": last("knn", percent),
        "total loss": last("total_loss", number),
        "effective rank": last("probe_cls_rank_me", rough),
        "steps done": (f"{run.steps_done:,}", "" if run.total_steps is None else f"of {run.total_steps:,}"),
        "training time": (duration(run.seconds) if run.seconds else "", ""),
        "images per second": last("images_per_second", short),
    }
    return {name: (figure, remark) for name, (figure, remark) in figures.items() if figure}


def side_by_side(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Key figures and facts of several runs."""
    figures = [{name: " ".join(texts).strip() for name, texts in key_figures(run).items()} for run in runs]
    return [
        {**shown, **{name: text for name, text in facts(run).items() if name != "steps"}}
        for shown, run in zip(figures, runs, strict=True)
    ]


def comparison_rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str], bool]]:
    """(name, text of each column, whether these differ) of each name in any column."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, sections.ABSENT) for column in columns]) for name in names]
    return [(name, texts, len(set(texts)) > 1) for name, texts in rows]
