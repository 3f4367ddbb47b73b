"""Numbers as people read them."""

import math


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


def percent(value: float) -> str:
    """82.3999 -> 82.4 %"""
    return f"{value:.1f} %"


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
