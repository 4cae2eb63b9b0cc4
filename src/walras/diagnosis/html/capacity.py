"""The page of `walras capacity`: the answer, what other budgets buy, and latency per dollar."""

from __future__ import annotations

from importlib.metadata import version

from walras.diagnosis.capacity import (
    CHANGE_HEAD,
    CURVE_HEAD,
    Capacity,
    Plan,
    answer,
    change_rows,
    curve_rows,
    equal_text,
    fleet_text,
    latency_text,
)
from walras.diagnosis.html.plot import BEST, TODAY, Figure, figure_layout
from walras.diagnosis.html.serving_figures import line
from walras.diagnosis.html.text import esc, header, section, table
from walras.diagnosis.serving_report import profile_text
from walras.diagnosis.words import count, usd


def capacity_report(found: Capacity) -> str:
    """All of it."""
    points = [
        (
            "What was compared.",
            f"{count(found.replays, 'fleets')}, each on {count(found.requests, 'requests')}.",
        ),
        ("How far to trust it.", esc(profile_text(found.engine.profile)) + "."),
    ]
    parts = [
        header(
            f"capacity for {found.traffic.name}", esc(answer(found)), points, synthetic=False, simulated=True
        ),
        section("What other budgets buy", _curve(found).html(numbers_shown=True)),
    ]
    for plan in found.plans:
        title = f"{fleet_text(found, plan.fleet)}: {latency_text(found, plan.latency)} a request"
        rows = [tuple(map(esc, row)) for row in change_rows(found, plan)]
        body = f"<p>{esc(equal_text(plan))}</p>{table(CHANGE_HEAD, rows)}"
        parts.append(section(esc(title), body, "[Z-9]"))
    return "".join(parts) + f"<footer>Walras {version('walras')}</footer>"


def _curve(found: Capacity) -> Figure:
    unit = "USD" if found.in_usd else "seconds"
    layout = figure_layout(320, x="USD an hour", y=f"{unit} a request, mean", dollars="x")
    layout["showlegend"] = len(found.plans) > 1
    layout["yaxis"]["rangemode"] = "tozero"
    return Figure(
        id="curve",
        title="Latency against budget",
        caption="The best fleet for each budget, replayed. SIMULATED.",
        data=tuple(
            _line(found, plan, color) for plan, color in zip(found.plans, (BEST, TODAY), strict=False)
        ),
        layout=layout,
        head=CURVE_HEAD,
        rows=tuple(tuple(map(esc, row)) for row in curve_rows(found)),
        words=(0, 1),
    )


def _line(found: Capacity, plan: Plan, color: str) -> dict[str, object]:
    name = "prefill and decoding apart" if plan.apart else "every worker does both"
    said = [
        f"{usd(budget)} an hour: {fleet_text(found, fleet)}, {latency_text(found, latency)}"
        for budget, fleet, latency in plan.curve
    ]
    x, y = [point[0] for point in plan.curve], [point[2] for point in plan.curve]
    return line(name, x, y, color, said, mode="lines+markers")
