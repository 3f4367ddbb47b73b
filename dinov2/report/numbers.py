"""Numbers as short texts."""

import math
import re


def number(value: float) -> str:
    """Four significant digits: 0.0001234 -> 1.234e-4, 3.6085 -> 3.608, 12345.6 -> 12,346."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def short(value: float) -> str:
    """As `number`, with fewer digits where that has more than six characters: 0.09992 -> 0.0999, 5.783e-7 -> 5.8e-7."""
    texts = [number(float(f"{value:.{digits}g}")) for digits in (4, 3, 2)]
    return texts[0] if abs(value) >= 1000 else next((text for text in texts if len(text) <= 6), texts[-1])


def rough(value: float) -> str:
    """As `number`, with three significant digits: 41.8712 -> 41.9, 2123.4 -> 2,120."""
    return number(float(f"{value:.3g}"))


def readable(text: str) -> str:
    """A text without exponents of large numbers: 2.12e+03 -> 2,120."""
    return re.sub(r"\b\d(?:\.\d+)?e\+\d+\b", lambda found: number(float(found[0])), text)


def percent(value: float) -> str:
    """82.3999 -> 82.4 %, without a line break."""
    return f"{value:.1f}\N{NO-BREAK SPACE}%"


def result_text(value: float) -> str:
    """A result of an evaluation, two decimals: 83 -> 83.00; small numbers, which are hyperparameters, as `number`."""
    return f"{value:.2f}" if abs(value) >= 0.1 else number(value)


def duration(seconds: float) -> str:
    """42 s, 6 min, 3 h 20 min, 2 d 5 h"""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def counted(number: int, noun: str) -> str:
    """1 step, 2,000 steps"""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
