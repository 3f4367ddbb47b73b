"""Geometry of small line charts, which `templates/chart.html` draws as SVG in the type and colors of the page.

Lines differ by color and by dashes and have their last values at their ends, so that they can be distinguished in black
and white. Colors are the classes `line-0`, ... of the style sheet.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dinov2.report.numbers import short

WIDTH, HEIGHT = 360, 196  # units of the drawing, about pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 62, 12, 26  # margins of the plot
FONT = 11
MAX_POINTS = 600  # of a line
MAX_DOTS = 25  # points of a line that are drawn as dots
NUM_STYLES = 6
DASHES = ("", "6 3", "1.5 3", "9 3 1.5 3", "3 2", "12 4")

Points = Sequence[tuple[float, float]]


class Stroke(NamedTuple):
    """Color and dashes of a line."""

    color: int
    dashes: str


def stroke(style: int) -> Stroke:
    """The style of a line: styles differ by color and dashes; after the last color they repeat with other dashes."""
    return Stroke(style % NUM_STYLES, DASHES[(style + style // NUM_STYLES) % len(DASHES)])


class Line(NamedTuple):
    """A curve to draw: its (step, value) by step, the text before its last value, its style and number format."""

    points: Points
    tag: str
    style: int
    text: Callable[[float], str] = short

    @property
    def end_text(self) -> str:
        return f"{self.tag} {self.text(self.points[-1][1])}".strip()


class Span(NamedTuple):
    """A shaded range of steps, with a description and a text beside its marker."""

    first: float
    last: float
    label: str
    tag: str = ""


class Axis(NamedTuple):
    """A range of values and its position in the drawing, from `start` at the value `low` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


class Chart(NamedTuple):
    """A drawing of `WIDTH` x `HEIGHT`."""

    label: str  # text alternative, for screen readers
    x: Axis
    y: Axis
    lines: list[tuple[Line, float]]  # each with the height of the text at its end
    spans: Sequence[Span]

    def points(self, line: Line) -> list[tuple[float, float]]:
        """The line in the drawing."""
        return [(self.x.at(step), self.y.at(value)) for step, value in thinned(line.points, MAX_POINTS)]

    def shade(self, span: Span) -> tuple[float, float]:
        """The left end and the width of a span in the drawing."""
        left, right = self.x.at(max(span.first, self.x.low)), self.x.at(min(span.last, self.x.high))
        width = max(right - left, 3)
        return (left + right - width) / 2, width


def make_chart(
    lines: Sequence[Line], label: str, *, spans: Sequence[Span] = (), steps: float = 0, log: bool = False
) -> Chart:
    """Lay out a chart of lines, at least one, each with at least one point.

    The horizontal axis ends at `steps` or later. The vertical one is logarithmic if `log` and all values are positive.
    """
    values = [value for line in lines for _, value in line.points]
    last = max(steps, *(line.points[-1][0] for line in lines))
    x = Axis(0, last or 1, LEFT, WIDTH - RIGHT)
    y = value_axis(values, log=log and min(values) > 0)
    ends = spread_labels([y.at(line.points[-1][1]) + 4 for line in lines], FONT + 1, TOP + 4, HEIGHT - BOTTOM)
    return Chart(label, x, y, list(zip(lines, ends, strict=True)), spans)


# --- Axes ------------------------------------------------------------------------------------------------------------


def value_axis(values: Sequence[float], *, log: bool = False) -> Axis:
    """The vertical axis of some values: from slightly below to slightly above them."""
    low, high = min(values), max(values)
    if log:
        low, high = (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)
    elif high - low <= 1e-9 * max(abs(low), abs(high)):  # constant
        low, high = (low - 0.05 * abs(low), high + 0.05 * abs(high)) if low else (-1.0, 1.0)
    else:
        margin = 0.04 * (high - low)
        low, high = (0.0 if 0 <= low < 0.25 * high else low - margin), high + margin
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def ticks(low: float, high: float, most: int, *, log: bool = False) -> list[float]:
    """Round values within a range: multiples of 1, 2 or 5 times a power of ten; if `log`, such numbers themselves."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**power for power in powers for digit in digits]
            found = [value for value in found if low <= value <= high]
            if len(found) <= most:
                break
        if len(found) >= 2:
            return found[:: math.ceil(len(found) / most)]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A short text: 0.0005, 20k, 1.5M, 2e-6."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.4g}{unit}"
    text = f"{float(f'{value:.6g}'):g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


# --- Lines -----------------------------------------------------------------------------------------------------------


def thinned(points: Points, most: int) -> Points:
    """A line of fewer points with the same shape: of each piece the first, least, largest and last one."""
    if len(points) <= most:
        return points
    size = math.ceil(4 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        least, largest = (choose(piece, key=lambda point: point[1]) for choose in (min, max))
        kept += sorted({piece[0], least, largest, piece[-1]})
    return kept


def spread_labels(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the given ones, in the same order, at least `gap` apart and within a range if they fit."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    found = [0.0] * len(positions)
    at = -math.inf
    for index in order:
        found[index] = at = max(positions[index], at + gap, low)
    limit = high
    for index in reversed(order):
        found[index] = limit = min(found[index], limit)
        limit -= gap
    return found
