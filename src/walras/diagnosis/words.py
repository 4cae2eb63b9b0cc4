"""Numbers as people read them, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Callable

Format = Callable[[float], str]


def number(x: float) -> str:
    """Three significant digits, without an exponent where one can do without."""
    size = abs(x)
    if not math.isfinite(x):
        return "unknown"
    if size < 1e-12:
        text = "0"
    elif size < 1e-6 or size >= 1e15:
        text = f"{size:.2e}"
    elif size >= 999.5:
        text = f"{size:,.0f}"
    else:
        text = f"{size:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return "−" + text if x < 0 and text != "0" else text


def as_declared(x: float) -> str:
    """A number somebody typed: more digits, no trailing zeros."""
    return f"{x:.6g}" if x == 0 or 1e-4 <= abs(x) < 1e6 else number(x)


def usd(x: float) -> str:
    """$1,234 · $42.10 · $0.0420 · $0.000329."""
    text = f"{abs(x):.2f}" if 1 <= abs(x) < 999.5 else number(abs(x))
    return f"{'−' if x < 0 and text != '0' else ''}{'$' if math.isfinite(x) else ''}{text}"


def percent(x: float) -> str:
    """A share; 0% and 100% only where it is just that."""
    for text in (f"{x:.0%}", f"{x:.1%}", f"{x:.2%}"):
        if float(text.rstrip("%")) not in (0, 100) or x in (0, 1):
            return text
    return "<0.01%" if x < 0.5 else ">99.99%"


def interval(pair: tuple[float, float], form: Format = usd) -> str:
    return f"{form(pair[0])} to {form(pair[1])}"


def count(n: int, thing: str) -> str:
    """1 task, 2,000 tasks; `thing` is the plural."""
    return f"{n:,} {thing[:-2] if thing.endswith('sses') else thing[:-1]}" if n == 1 else f"{n:,} {thing}"
