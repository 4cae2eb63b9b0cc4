"""The figures of a replay, as plotly specifications."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from walras.diagnosis.html.plot import ATTAINABLE, BEST, TODAY, Figure, figure_layout, hover
from walras.diagnosis.serving import Latencies, Played, Sweep, Timeline
from walras.diagnosis.serving_report import seconds_text, sweep_rows
from walras.diagnosis.words import number, percent
from walras.risk import FloatArray

POINTS = 400
"""Most points of a timeline; intervals are put together to get there."""
ROWS = 20
"""Rows of a timeline's table, about."""
SHARES = np.concatenate([np.linspace(0, 0.99, 100), [0.992, 0.995, 0.997, 0.998, 0.999, 0.9995, 1.0]])
"""Where a distribution is drawn."""
WIDE = 16.0
"""Rates of arrival that are more than so many times apart stand on a logarithmic axis."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def line(
    name: str, x: Sequence[float], y: Sequence[float], color: str, text: list[str], **more: Any
) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "width": 2} | more.pop("line", {}),
    }
    return trace | hover(text) | more


# --- timeline -----------------------------------------------------------------------------------------------------------


def _coarse(timeline: Timeline, points: int) -> dict[str, FloatArray]:
    """At most so many intervals: states as means of those put together (KV use in percent), counts as rates per second."""
    per = max(1, math.ceil(len(timeline) / points))
    starts = np.arange(0, len(timeline), per)
    sizes = np.diff(np.append(starts, len(timeline)))
    found = {"end_s": timeline.end_s[np.append(starts[1:], len(timeline)) - 1]}
    for key, unit in (("running", 1.0), ("waiting", 1.0), ("kv_use", 100.0)):
        found[key] = unit * np.add.reduceat(getattr(timeline, key).astype(np.float64), starts) / sizes
    for key in ("output_tokens", "prompt_tokens", "hit_tokens"):
        total = np.add.reduceat(getattr(timeline, key).astype(np.float64), starts)
        found[key] = total / (sizes * timeline.interval_s)
    return found


Series = tuple[str, str, str, Callable[[float], str]]
"""Column of a timeline, what it is called, colour, and how a number of it reads."""


def timeline_figures(timeline: Timeline) -> list[Figure]:
    """Requests, KV use and throughput against time."""
    return [
        _over_time(
            timeline,
            "Requests running and waiting",
            "Of all workers together. Where the waiting pile up, arrivals are ahead of the engine.",
            "requests",
            [
                ("running", "running", BEST, number),
                ("waiting", "waiting", TODAY, number),
            ],
        ),
        _over_time(
            timeline,
            "KV use",
            "Share of the KV blocks that running requests hold, mean of the workers. What is left keeps earlier prompts, for those "
            "that begin alike.",
            "KV use, %",
            [("kv_use", "KV use", ATTAINABLE, lambda share: percent(share / 100))],
        ),
        _over_time(
            timeline,
            "Throughput",
            "Prompt tokens found in memory need no computing.",
            "tokens per second",
            [
                ("prompt_tokens", "prompt tokens computed", BEST, number),
                ("hit_tokens", "prompt tokens found in memory", ATTAINABLE, number),
                ("output_tokens", "output tokens", TODAY, number),
            ],
        ),
    ]


def _over_time(timeline: Timeline, title: str, caption: str, unit: str, series: list[Series]) -> Figure:
    shown, few = _coarse(timeline, POINTS), _coarse(timeline, ROWS)
    times, data = shown["end_s"].tolist(), []
    for key, label, color, form in series:
        values = shown[key].tolist()
        text = [f"{label} {form(v)} at {number(t)} s" for t, v in zip(times, values, strict=True)]
        data.append(line(label, times, values, color, text))
    layout = figure_layout(250, x="time, s", y=unit, dollars="")
    layout["showlegend"] = len(series) > 1
    layout["yaxis"]["rangemode"] = "tozero"
    layout["xaxis"]["range"] = [0, times[-1]]
    cells = [[form(v) for v in few[key].tolist()] for key, _, _, form in series]
    return Figure(
        id=title.lower().replace(" ", "-"),
        title=title,
        caption=caption,
        data=tuple(data),
        layout=layout,
        head=("until", *(label for _, label, _, _ in series)),
        rows=tuple(zip([f"{number(t)} s" for t in few["end_s"].tolist()], *cells, strict=True)),
    )


# --- distributions ------------------------------------------------------------------------------------------------------


def distribution(name: str, title: str, caption: str, series: list[tuple[str, Latencies, str]]) -> Figure:
    """Cumulative distributions of seconds, on a logarithmic axis."""
    data = []
    for label, seconds, color in series:
        values = seconds.quantiles(SHARES)
        drawn = values > 0  # a logarithm has no place for those that did not wait
        x, y = values[drawn].tolist(), (100 * SHARES[drawn]).tolist()
        text = [
            f"{label}: {share:.4g}% within {seconds_text(value)}" for value, share in zip(x, y, strict=True)
        ]
        data.append(line(label, x, y, color, text))
    layout = figure_layout(330, x="seconds, logarithmic", y="requests, %", dollars="")
    layout["xaxis"] |= log_axis([value for trace in data for value in trace["x"]])
    layout["yaxis"] |= {"range": [0, 101], "dtick": 25}
    layout["showlegend"] = len(series) > 1
    rows = tuple(
        (f"{100 * share:g}%", *(seconds_text(value) for value in values))
        for share, *values in zip(
            QUANTILES, *(one[1].quantiles(np.array(QUANTILES)) for one in series), strict=True
        )
    )
    mean = ("mean", *(seconds_text(one[1].mean) for one in series))
    most = ("longest", *(seconds_text(one[1].most) for one in series))
    return Figure(
        name,
        title,
        caption,
        tuple(data),
        layout,
        ("within", *(one[0] for one in series)),
        (*rows, mean, most),
    )


def log_axis(values: list[float]) -> dict[str, Any]:
    """Decades, and where there are few of them what is between; ticks are written out as plain numbers."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [k * 10.0**power for power in range(first, last + 1) for k in steps]
    pad = 0.03 * max(math.log10(high / low), 0.1)
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:.12f}".rstrip("0").rstrip(".") for tick in ticks],
        "range": [math.log10(low) - pad, math.log10(high) + pad],
    }


def distributions(played: Played) -> list[Figure]:
    """The first token; and those after it, where an answer has any."""
    first = distribution(
        "ttft",
        "Until the first token (TTFT)",
        "Read: so many percent of the requests had their first token within so many seconds. In line: until the step that first "
        "computes for them.",
        [("first token", played.ttft, BEST), ("in line", played.queue, TODAY)],
    )
    if not played.tpot.count:
        return [first]
    each = distribution(
        "tpot",
        "Per output token (TPOT)",
        "Mean seconds between the tokens of an answer, of the answers with more than one.",
        [("per output token", played.tpot, ATTAINABLE)],
    )
    return [first, each]


# --- load against latency -----------------------------------------------------------------------------------------------


def load_figure(found: Sweep, most: int) -> Figure:
    """Latency against the rate of arrivals, with the knee."""
    x = [run.arrivals_per_s for run in found.runs]
    series = [
        ("whole answer, mean", BEST, [run.latency.mean for run in found.runs], {}),
        ("TTFT, mean", TODAY, [run.ttft.mean for run in found.runs], {}),
        ("TTFT, p95", TODAY, [run.ttft.quantile(0.95) for run in found.runs], {"dash": "dot"}),
        ("TPOT, mean", ATTAINABLE, [run.tpot.mean for run in found.runs], {}),
    ]
    data = []
    for label, color, y, style in series:
        text = [
            f"{label} {seconds_text(s)} at {factor:g}× the rate"
            for factor, s in zip(found.factors, y, strict=True)
        ]
        if all(s > 0 for s in y):  # no answer has a second token: there is no TPOT
            data.append(line(label, x, y, color, text, mode="lines+markers", line=style))
    seen = [s for trace in data for s in trace["y"]]
    layout = figure_layout(400, x="arrivals, requests per second", y="seconds, logarithmic", dollars="")
    layout["xaxis"] |= log_axis(x) if x[-1] > WIDE * x[0] else {"rangemode": "tozero"}
    layout["yaxis"] |= log_axis(seen)
    layout["showlegend"] = True
    if found.bracketed:
        text = [f"knee: {found.factors[found.knee]:g}× the rate"] * 2
        dashes = {"dash": "dash", "width": 1.5}
        data.append(line("knee", [x[found.knee]] * 2, [min(seen), max(seen)], "--ink", text, line=dashes))
    first = f" (the first {most:,} of them)" if found.runs[0].requests == most else ""
    return Figure(
        id="load",
        title="Latency against load",
        caption=(
            f"Every point is a replay of the same requests{first}, arriving faster or slower. The knee is where requests completed per "
            "second, over the mean time of a whole answer, are most (Kleinrock 1979)."
        ),
        data=tuple(data),
        layout=layout,
        head=("rate", "arrivals/s", "completed/s", "TTFT", "TTFT p95", "TPOT", "whole answer", ""),
        rows=tuple(sweep_rows(found)),
        words=(0, 7),
    )
