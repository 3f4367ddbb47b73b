"""The report: one HTML file about some runs that needs no other file and no network, by the templates beside it."""

import logging
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

import dinov2
from dinov2.files import atomic_write
from dinov2.html_templates import template_environment
from dinov2.report import charts, curves, images, sections, verdict
from dinov2.report.numbers import counted, duration, number, percent, readable, rough
from dinov2.report.read_run import read_runs
from dinov2.report.run import Run

logger = logging.getLogger(__name__)


def write_report(folders: Sequence[Path], output: Path | None = None, title: str | None = None) -> Path:
    """Write the report about the trainings in some folders, side by side, and return its file.

    Args:
        folders: At least one.
        output: File to write; default: `report.html` in the first folder.
        title: Default: the names of the folders.

    Raises:
        FileNotFoundError: A folder is not the output folder of a training.
        ValueError: `output` is not the name of an HTML file.
    """
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file, such as {output / 'report.html'}")
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: the report is a web page, its name must end in .html or .htm")
    runs = read_runs(folders)
    output = output or folders[0] / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(page(runs, title).encode())
    logger.info("report: %s", output)
    return output


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The HTML text about at least one run."""
    *others, last = [run.name for run in runs]
    return render(
        "page.html",
        title=title or (f"{', '.join(others)} and {last}" if others else last),
        subtitle=sections.subtitle(runs),
        runs=runs,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=dinov2.__version__,
    )


def render(template: str, **context: Any) -> str:
    """The text of a template in `templates/`; all values are escaped."""
    return report_environment().get_template(template).render(**context)


@cache
def report_environment() -> Environment:
    """The templates, with the modules whose functions they call."""
    environment = template_environment("dinov2.report", ["jinja2.ext.do"])
    environment.filters |= {"commas": "{:,}".format, "coordinate": "{:.1f}".format, "breakable": breakable}
    environment.filters |= {each.__name__: each for each in (counted, duration, number, percent, readable, rough)}
    modules = {"charts": charts, "curves": curves, "images": images, "sections": sections, "verdict": verdict}
    environment.globals |= modules
    return environment


def breakable(text: str) -> Markup:
    """Escaped text with line breaks allowed after these signs, for long keys and datasets on a phone."""
    return Markup(re.sub(r"([._:](?=[^\W\d]))", r"\1<wbr>", str(escape(text))))
