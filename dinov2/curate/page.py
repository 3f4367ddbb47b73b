"""A page of examples of what was selected, with its numbers: one HTML file that needs no network and no other files."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import dinov2
from dinov2.curate.images import Images
from dinov2.html_templates import template_environment

EXAMPLES = 20  # in a section
SHOWN = 8  # images of an example


class Shown(NamedTuple):
    """An image on the page, and what is said about it."""

    images: Images
    row: int
    note: str = ""

    @property
    def name(self) -> str:
        return self.images.table.names[self.row]

    @property
    def uri(self) -> str | None:
        return self.images.thumbnail(self.row)


class Example(NamedTuple):
    """Images side by side; of more than `SHOWN`, the first."""

    caption: str
    shown: Sequence[Shown]


class Section(NamedTuple):
    """Examples of one kind; of more than `EXAMPLES`, the first."""

    title: str
    examples: Sequence[Example]


def render_page(title: str, facts: Mapping[str, Any], sections: Sequence[Section]) -> bytes:
    """The page in UTF-8, some 4 MB at most.

    Args:
        title: The command and what it was given.
        facts: Numbers by name; those in mappings follow in a table of their own.
        sections: Empty ones are left out.
    """
    environment = template_environment("dinov2.curate")
    sections = [
        Section(
            section.title,
            [Example(each.caption, each.shown[:SHOWN]) for each in section.examples[:EXAMPLES]],
        )
        for section in sections
        if section.examples
    ]
    text = environment.get_template("examples.html").render(
        title=title,
        facts={name: value for name, value in facts.items() if not isinstance(value, Mapping)},
        tables={name: value for name, value in facts.items() if isinstance(value, Mapping) and value},
        sections=sections,
        version=dinov2.__version__,
    )
    return text.encode("utf-8", "backslashreplace")  # file names may contain any bytes


def spread(order: np.ndarray) -> list[int]:
    """At most `EXAMPLES` of some numbers, the first ones."""
    return [int(number) for number in order[:EXAMPLES]]
