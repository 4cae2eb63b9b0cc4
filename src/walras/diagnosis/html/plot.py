"""What every figure is made of: its page element, bars, whiskers, axes.

Colours are names of the page's style ("--today"), so they follow light and dark.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from walras.diagnosis.html.text import table

BARS = 12
"""Most bars of one figure; what is left is summed up in one more."""

TODAY, BEST, ATTAINABLE, REFERENCE = "--today", "--best", "--attainable", "--reference"
"""One meaning, one colour, in every figure."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, what it says, and the same numbers as a table."""

    id: str
    title: str
    caption: str
    data: tuple[dict[str, Any], ...]
    layout: dict[str, Any]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    """Columns of the table that hold words."""

    def html(self, *, heading: bool = False, numbers_shown: bool = False) -> str:
        shown = " open" if numbers_shown else ""
        numbers = table(self.head, self.rows, self.words)
        numbers = f"<details{shown}><summary>The numbers</summary>{numbers}</details>"
        above = f"<h3>{self.title}</h3>" if heading else ""
        return (
            f'<figure id="{self.id}">{above}'
            f'<div class="plot" role="img" aria-label="{self.title}"></div>'
            f'<script type="application/json">{_embed({"data": self.data, "layout": self.layout})}</script>'
            f"<figcaption>{self.caption}</figcaption>{numbers}</figure>"
        )


def _embed(data: dict[str, Any]) -> str:
    """JSON that no text inside can end: it stands in a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def bar_trace(x: list[float], names: Sequence[str], color: str, text: list[str]) -> dict[str, Any]:
    """Bars at 0, 1, …: names may repeat once cut, so the axis carries them as labels."""
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": x,
        "y": list(range(len(names))),
        "marker": {"color": color},
    }
    return bars | hover(text)


def hover(text: list[str]) -> dict[str, Any]:
    """What is shown where the pointer is; "text" alone, so that nothing in a name is read as a template."""
    return {"hovertext": text, "hoverinfo": "text"}


def whiskers(means: Sequence[float], ci: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Whiskers; a percentile interval need not hold the mean, and no whisker is negative."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(high - mean, 0.0) for mean, (_, high) in zip(means, ci, strict=True)],
        "arrayminus": [max(mean - low, 0.0) for mean, (low, _) in zip(means, ci, strict=True)],
        "color": "--muted",
        "thickness": 1.5,
        "width": 4,
    }


def bar_layout(
    names: list[str], title: str, per_bar: int = 30, *, reverse: bool = True, dollars: bool = True
) -> dict[str, Any]:
    """One row for each name, first on top unless not `reverse`; `title` says what is along, and its unit."""
    layout = figure_layout(90 + per_bar * len(names), x=title, y="", dollars="x" if dollars else "")
    ends = [-0.6, len(names) - 0.4]
    layout["yaxis"] |= {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "range": ends[::-1] if reverse else ends,
        "showgrid": False,
        "zeroline": False,
        "ticklabelstandoff": 8,
    }
    return layout


def figure_layout(height: int, *, x: str, y: str, dollars: str) -> dict[str, Any]:
    """`dollars` names the axes that are in USD: "x", "y", both or neither."""
    return {
        "height": height,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "--muted"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 10, "r": 14, "t": 10, "b": 10},
        "xaxis": _axis(x, "x" in dollars),
        "yaxis": _axis(y, "y" in dollars),
        "showlegend": dollars == "xy",
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {
            "bgcolor": "--paper",
            "bordercolor": "--grid",
            "font": {"color": "--ink"},
            "align": "left",
        },
        "dragmode": False,
    }


def _axis(title: str, dollars: bool) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 13}, "standoff": 12},
        "automargin": True,
        "fixedrange": True,
        "gridcolor": "--grid",
        "zerolinecolor": "--grid",
        "tickprefix": "$" if dollars else "",
        "exponentformat": "none",
        "nticks": 6,
    }
