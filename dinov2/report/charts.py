"""Small line charts as SVG: drawn here, so that their type, colors and dark side are those of the page around them.

Lines differ by color and by dashes, and their last values stand at their ends: on paper without colors and for
eyes that do not tell colors apart nothing is lost. Colors are classes `line-0`, ... of the page's style sheet.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from dinov2.report.numbers import short

WIDTH, HEIGHT = 360, 196  # units of the drawing, about pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 62, 12, 26  # around the plot
FONT = 11
MAX_POINTS = 600  # of a line
MARKED = 25  # a line of so many points shows them
NUM_STYLES = 6
DASHES = ("", "6 3", "1.5 3", "9 3 1.5 3", "3 2", "12 4")

Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """A series of values."""

    points: Points  # (step, value), by step
    tag: str  # in front of its last value; may be empty
    style: int  # which color and dashes
    text: Callable[[float], str] = short  # its last value


class Span(NamedTuple):
    """Steps that are shaded."""

    first: float
    last: float
    label: str
    tag: str = ""  # beside the mark above it


class Axis(NamedTuple):
    """A range of values and where they are in the drawing."""

    low: float
    high: float
    start: float  # of the drawing, at `low`
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(lines: Sequence[Line], label: str, *, spans: Sequence[Span] = (), steps: float = 0, log: bool = False) -> str:
    """An SVG element.

    Args:
        lines: at least one, each with at least one point.
        label: what is shown, for those who do not see it.
        spans: steps to shade.
        steps: the axis reaches at least to here.
        log: whether values are drawn by their logarithm; they are not if some are not positive.
    """
    values = [value for line in lines for _, value in line.points]
    log = log and min(values) > 0
    x = Axis(*_range([0, steps, *(step for line in lines for step, _ in line.points)]), LEFT, WIDTH - RIGHT)
    y = value_axis(values, log=log)
    shades = "".join(_shade(span, x) for span in spans)
    curves = "".join(_curve(line, x, y) for line in lines)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(label)}" font-size="{FONT}">{shades}{_grid(x, y)}{curves}{_end_labels(lines, x, y)}</svg>'
    )


def swatch(style: int) -> str:
    """A piece of a line, for a legend."""
    box = 'viewBox="0 0 30 8" width="30" height="8"'
    return f'<svg class="swatch" {box} aria-hidden="true"><path {_look(style)} d="M0 4H30"/></svg>'


# --- Axes ------------------------------------------------------------------------------------------------------------


def value_axis(values: Sequence[float], *, log: bool = False) -> Axis:
    """The vertical axis of some values: from a little below to a little above."""
    low, high = min(values), max(values)
    if log:
        low, high = (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)
    elif high - low <= 1e-9 * max(abs(low), abs(high)):  # all alike
        low, high = (low - 0.05 * abs(low), high + 0.05 * abs(high)) if low else (-1.0, 1.0)
    else:
        margin = 0.04 * (high - low)
        low, high = (0.0 if 0 <= low < 0.25 * high else low - margin), high + margin
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low, high if high > low else low + 1


def ticks(low: float, high: float, most: int, *, log: bool = False) -> list[float]:
    """Round values within a range: multiples of 1, 2 or 5 times a power of ten; by `log` such numbers themselves."""
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
    """As short as it gets: 0.0005, 20k, 1.5M, 2e-6."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.4g}{unit}"
    text = f"{float(f'{value:.6g}'):g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for value in ticks(y.low, y.high, 5, log=y.log):
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{x.start} {at:.1f}H{x.end}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 6}" y="{at + 4:.1f}" text-anchor="end">{tick_text(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>')
    for value in ticks(x.low, x.high, 4):
        at = x.at(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {y.start}v4"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{y.start + 17}" text-anchor="middle">{tick_text(value)}</text>'
        )
    return "".join(parts)


# --- Lines -----------------------------------------------------------------------------------------------------------


def _look(style: int) -> str:
    dashes = DASHES[(style + style // NUM_STYLES) % len(DASHES)]
    return f'class="line line-{style % NUM_STYLES}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _curve(line: Line, x: Axis, y: Axis) -> str:
    points = [(x.at(step), y.at(value)) for step, value in thinned(line.points, MAX_POINTS)]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    curve = f'<path {_look(line.style)} d="{path}"/>' if len(points) > 1 else ""
    if len(points) > MARKED:
        return curve
    return curve + "".join(
        f'<circle class="dot-{line.style % NUM_STYLES}" cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in points
    )


def thinned(points: Points, most: int) -> Points:
    """A line of fewer points that looks the same: of each piece the first, the least, the largest and the last."""
    if len(points) <= most:
        return points
    size = math.ceil(4 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        least, largest = (choose(piece, key=lambda point: point[1]) for choose in (min, max))
        kept += sorted({piece[0], least, largest, piece[-1]})
    return kept


def _end_labels(lines: Sequence[Line], x: Axis, y: Axis) -> str:
    ends = [y.at(line.points[-1][1]) + 4 for line in lines]
    parts = []
    for line, at in zip(lines, pushed_apart(ends, FONT + 1, TOP + 4, HEIGHT - BOTTOM), strict=True):
        text = f"{line.tag} {line.text(line.points[-1][1])}".strip()
        parts.append(
            f'<text class="end text-{line.style % NUM_STYLES}" x="{x.end + 5}" y="{at:.1f}">{escape(text)}</text>'
        )
    return "".join(parts)


def pushed_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the given ones, in the same order, at least `gap` apart and as far as that goes within a range."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = [0.0] * len(places)
    at = -math.inf
    for index in order:
        found[index] = at = max(places[index], at + gap, low)
    limit = high
    for index in reversed(order):
        found[index] = limit = min(found[index], limit)
        limit -= gap
    return found


def _shade(span: Span, x: Axis) -> str:
    left, right = x.at(max(span.first, x.low)), x.at(min(span.last, x.high))
    middle, width = (left + right) / 2, max(right - left, 3)
    left, height = middle - width / 2, HEIGHT - BOTTOM - TOP
    return (
        f'<g class="span"><title>{escape(span.label)}</title><rect x="{left:.1f}" y="{TOP}" width="{width:.1f}" '
        f'height="{height}"/><path d="M{left:.1f} {TOP}v{height}m{width:.1f} 0v-{height}"/>'
        f'<text x="{middle:.1f}" y="{TOP - 3}" text-anchor="middle">&#9650; {escape(span.tag)}</text></g>'
    )
