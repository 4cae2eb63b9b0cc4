"""The figures of an audit, as plotly specifications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from walras.diagnosis.audit import Audit
from walras.diagnosis.case import Case
from walras.diagnosis.html.plot import (
    ATTAINABLE,
    BARS,
    BEST,
    REFERENCE,
    TODAY,
    Figure,
    bar_layout,
    bar_trace,
    figure_layout,
    hover,
    whiskers,
)
from walras.diagnosis.html.text import esc, label, small
from walras.diagnosis.regret import Row
from walras.diagnosis.words import interval, number, percent, usd
from walras.market.clearing import Usage
from walras.prices import Scope
from walras.quantities import USD
from walras.risk import FloatArray

FAR = 2.0
"""A point that costs more than this many times what anybody needs is drawn at the edge."""


def audited_name(case: Case) -> str:
    """The audited choices in two words or so; not escaped."""
    return "today" if case.baseline == "realised" else f"all on {case.uses.names[int(case.chosen[0])]}"


def budget_row(audit: Audit) -> Usage | None:
    """The compute budget that holds for everybody, where one is declared."""
    rows = (u for u in audit.clearing.usage if u.constraint.kind == "budget")
    return next((u for u in rows if u.constraint.resource == USD and u.constraint.scope == Scope()), None)


# --- surplus against budget ---------------------------------------------------------------------------------------


def budget_curve(audit: Audit) -> Figure:
    """Optimal surplus against the budget, with where things stand; its slope is μ_C [Z-3]."""
    curve, budget, points = audit.curve, budget_row(audit), _standing(audit)
    x, y = curve.budget.tolist(), curve.surplus.tolist()
    style = {"color": BEST, "width": 2.5}
    data = [_line("best possible", x, y, style)]
    # What costs far more is drawn at the right edge, or the curve would be squeezed into a corner.
    right = max([x[-1], *(p.cost for p in points if p.cost <= FAR * x[-1])])
    if any(p.cost > x[-1] for p in points):
        right *= 1.1
        data.append(_line("more buys nothing", [x[-1], right], [y[-1]] * 2, style | {"dash": "dot"}))
    if budget and budget.multiplier:
        objective = audit.clearing.certificate.objective
        tangent = _tangent(budget.constraint.bound, objective, budget.multiplier, right, max(y))
        name = f"slope μ_C = {number(budget.multiplier)}"
        data.append(_line(name, *tangent, {"color": "--ink", "width": 1.5, "dash": "dash"}))
    data += [_mark(point, right) for point in points]
    return Figure(
        id="budget-curve",
        title="The most surplus that can be had for a budget",
        caption=_curve_caption(audit, budget),
        data=tuple(data),
        layout=figure_layout(400, x="budget, USD per task", y="net surplus, USD per task", dollars="xy"),
        head=("budget per task", "best surplus per task", "price μ_C (the slope)"),
        rows=tuple(
            (usd(b), usd(s), number(m) if b else "–")
            for b, s, m in zip(x, y, curve.multiplier.tolist(), strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Point:
    name: str
    cost: float
    surplus: float
    color: str
    symbol: str
    text: str = "bottom left"
    """Where its name stands when it has one: apart, should two of them meet at the edge."""


def _standing(audit: Audit) -> list[_Point]:
    """Where the audited choices, the best fixed model and the declared budget stand."""
    case, fixed, budget = audit.case, audit.best_fixed, budget_row(audit)
    points = [_Point(audited_name(case), audit.realised.cost, audit.realised.surplus.mean, TODAY, "circle")]
    if fixed and case.baseline != "best fixed":
        cost = float(case.uses.amount(USD)[:, fixed.use].mean())
        name = f"best fixed: {case.uses.names[fixed.use]}"
        points.append(_Point(name, cost, fixed.surplus, REFERENCE, "square", "top left"))
    if budget:
        objective = audit.clearing.certificate.objective
        points.append(_Point("declared budget", budget.constraint.bound, objective, BEST, "diamond"))
    return points


def _curve_caption(audit: Audit, budget: Usage | None) -> str:
    parts = [
        "The other limits are kept. A point below the line wastes money; one above it breaks another limit."
    ]
    if budget and budget.multiplier:
        worth = usd(budget.multiplier)
        parts.insert(
            0, f"The price is the slope: at the declared budget, one more dollar buys {worth} of net surplus."
        )
    elif budget:
        parts.insert(
            0, "The declared budget lies where the line is flat: more of it buys nothing, so its price is 0."
        )
    else:
        parts.insert(
            0, "No budget is declared, so money has no price beyond itself; the slope is what one would have."
        )
    if audit.curve.sampled:
        parts.append(f"Computed on a sample of {audit.curve.sampled:,} tasks.")
    return " ".join(parts)


def _tangent(x: float, y: float, slope: float, right: float, top: float) -> tuple[list[float], list[float]]:
    """The line through (x, y), as far as it stays in the picture."""
    left, end = max(x - y / slope, 0.0), min(x + 0.12 * top / slope, max(right, 1.5 * x))
    return [left, end], [y + slope * (left - x), y + slope * (end - x)]


def _line(name: str, x: list[float], y: list[float], style: dict[str, Any]) -> dict[str, Any]:
    text = [f"{usd(b)} per task → {usd(s)}" for b, s in zip(x, y, strict=True)]
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style} | hover(text)


def _mark(point: _Point, right: float) -> dict[str, Any]:
    """A point with its name; one that is far off is an arrow at the edge that says how far."""
    off = point.cost > right
    marker = {
        "color": point.color,
        "symbol": "triangle-right" if off else point.symbol,
        "size": 13,
        "line": {"color": "--paper", "width": 1.5},
    }
    mark = {
        "type": "scatter",
        "mode": "markers+text" if off else "markers",
        "name": label(point.name),
        "x": [min(point.cost, right)],
        "y": [point.surplus],
        "marker": marker,
        "text": [f"{label(point.name)}, at {usd(point.cost)}"],
        "textposition": point.text,
        "cliponaxis": False,
    }
    return mark | hover([f"{label(point.name, 60)}: {usd(point.cost)} per task → {usd(point.surplus)}"])


# --- regret -------------------------------------------------------------------------------------------------------


def regret_by_value(audit: Audit) -> Figure:
    """Mean regret by decile of V, with intervals."""
    rows = audit.regret.by_value_decile
    names = [f"${row.name}" for row in rows]
    text = [
        f"V {name}: {usd(r.regret.mean)} per task ({interval(r.regret.ci)}), {r.tasks:,} tasks"
        for name, r in zip(names, rows, strict=True)
    ]
    means = [r.regret.mean for r in rows]
    bars = bar_trace(means, names, TODAY, text) | {"error_x": whiskers(means, [r.regret.ci for r in rows])}
    return Figure(
        id="regret-by-value",
        title="Mean regret by value of the task",
        caption="Tenths of the tasks by value V, USD per unit of quality, most valuable on top. Whiskers: 95% interval.",
        data=(bars,),
        layout=bar_layout([label(n) for n in names], "mean regret, USD per task", reverse=False),
        head=("value V", "tasks", "regret per task", "95% interval", "in all"),
        rows=tuple(_group_cells(r, f"${r.name}") for r in rows),
    )


def regret_by_group(what: str, rows: Sequence[Row]) -> Figure:
    """Total regret by tenant or class, largest first."""
    ordered = sorted(rows, key=lambda row: -row.total)
    shown, rest = ordered[:BARS], ordered[BARS:]
    names = [r.name for r in shown]
    totals = [r.total for r in shown]
    text = [
        f"{label(r.name, 60)}: {usd(r.total)} on {r.tasks:,} tasks, {usd(r.regret.mean)} per task"
        for r in shown
    ]
    if rest:
        names.append(f"{len(rest)} others")
        totals.append(sum(r.total for r in rest))
        text.append(f"{len(rest)} others: {usd(totals[-1])} on {sum(r.tasks for r in rest):,} tasks")
    return Figure(
        id=f"regret-by-{what}",
        title=f"Regret by {what}",
        caption="Sum over the log. The mean per task, with its interval, is in the numbers.",
        data=(bar_trace(totals, names, TODAY, text),),
        layout=bar_layout([label(n) for n in names], "regret over the log, USD"),
        head=(what, "tasks", "regret per task", "95% interval", "in all"),
        rows=tuple(_group_cells(r, r.name) for r in shown),
    )


def _group_cells(row: Row, name: str) -> tuple[str, ...]:
    return esc(name), f"{row.tasks:,}", usd(row.regret.mean), interval(row.regret.ci), usd(row.total)


# --- choices ------------------------------------------------------------------------------------------------------


def choice_shares(audit: Audit) -> Figure:
    """Which use the tasks get: as audited, at declared prices, at discovered ones."""
    names, columns = _share_columns(audit)
    colours = (TODAY, REFERENCE, BEST)
    titles = (f"{label(audited_name(audit.case))}", "at declared prices", "at discovered prices")
    data = []
    for title, color, shares in zip(titles, colours, columns, strict=True):
        text = [f"{label(n, 60)}, {title}: {percent(s)}" for n, s in zip(names, shares, strict=True)]
        data.append(bar_trace([100 * s for s in shares], names, color, text) | {"name": title})
    layout = bar_layout([label(n) for n in names], "share of tasks, %", per_bar=52, dollars=False)
    layout |= {"barmode": "group", "bargap": 0.3, "showlegend": True}
    layout["xaxis"]["rangemode"] = "tozero"
    return Figure(
        id="choice-shares",
        title="Which model the tasks get",
        caption="At declared prices nothing but what you declared counts; at discovered prices your limits are kept too. "
        "Both know each outcome beforehand.",
        data=tuple(data),
        layout=layout,
        head=("model", *titles),
        rows=tuple((esc(n), *map(percent, row)) for n, *row in zip(names, *columns, strict=True)),
    )


def _share_columns(audit: Audit) -> tuple[list[str], list[list[float]]]:
    """Names, and the shares of the three policies: models somebody gets by share at discovered prices, defer last."""
    columns = np.array([audit.shares[k] for k in ("chosen", "declared prices", "discovered prices")])
    models, defer = columns[:, :-1], columns[:, -1]
    order = np.lexsort((-models[0], -models[2]))
    order = order[models[:, order].max(axis=0) > 0]
    shown, rest = order[:BARS], order[BARS:]
    names = [audit.case.uses.names[i] for i in shown]
    parts: list[FloatArray] = [models[:, shown]]
    if rest.size:
        names.append(f"{rest.size} other models")
        parts.append(models[:, rest].sum(axis=1, keepdims=True))
    names.append("no model (deferred)")
    parts.append(defer[:, None])
    return names, np.concatenate(parts, axis=1).tolist()


# --- benchmarks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Benchmark:
    name: str
    surplus: float
    ci: tuple[float, float] | None
    color: str
    limits: str
    luck: bool = False


def benchmarks(audit: Audit) -> Figure:
    """What was, what one model would do, what a policy can reach, and what only hindsight could."""
    rows = _benchmarks(audit)
    layout = bar_layout([label(r.name) for r in rows], "net surplus, USD per task", per_bar=44)
    ends = [end for row in rows for end in (row.surplus, *(row.ci or ()))]
    margin = 0.08 * max(max(ends) - min(ends), 0.1 * max(map(abs, ends)), 1e-9)
    layout["xaxis"]["range"] = [min(ends) - margin, max(ends) + margin]
    return Figure(
        id="benchmarks",
        title="Net surplus per task",
        caption=_benchmark_caption(audit),
        data=tuple(_dot(k, row) for k, row in enumerate(rows)),
        layout=layout,
        head=("policy", "surplus per task", "95% interval", "can be had?", "limits"),
        rows=tuple(
            (
                esc(r.name),
                usd(r.surplus),
                interval(r.ci) if r.ci else "",
                "no, includes luck" if r.luck else "yes",
                r.limits,
            )
            for r in rows
        ),
        words=(0, 3, 4),
    )


def _benchmark_caption(audit: Audit) -> str:
    parts = ["Hollow: picks with each outcome in hand, so it includes luck and no policy reaches it."]
    if audit.attainable:
        parts.append("Attainable: knows only a task’s class and value, and was fitted on other tasks.")
    if audit.oracle is None:
        parts.append("No allocation serves every task within the limits.")
    parts.append("Whiskers: 95% interval over tasks.")
    if audit.case.constraints:
        parts.append("Surplus is at declared prices: what breaks a limit may earn more and still be worse.")
    return " ".join(parts)


def _dot(k: int, row: _Benchmark) -> dict[str, Any]:
    spread = f" ({interval(row.ci)})" if row.ci else ""
    marker = {"color": row.color, "size": 13, "symbol": "circle-open" if row.luck else "circle"}
    dot: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": label(row.name),
        "x": [row.surplus],
        "y": [k],
        "marker": marker | {"line": {"width": 2.5, "color": row.color}},
    }
    if row.ci:
        dot["error_x"] = whiskers([row.surplus], [row.ci])
    return dot | hover([f"{label(row.name, 60)}: {usd(row.surplus)}{spread}"])


def _benchmarks(audit: Audit) -> list[_Benchmark]:
    case, real, fixed, policy = audit.case, audit.realised, audit.best_fixed, audit.attainable
    within = _limits(audit.clearing.usage)
    found = [_Benchmark(audited_name(case), real.surplus.mean, real.surplus.ci, TODAY, _limits(real.usage))]
    if fixed and case.baseline != "best fixed":
        name, limits = f"best fixed: {case.uses.names[fixed.use]}", within if fixed.feasible else "broken"
        found.append(_Benchmark(name, fixed.surplus, None, REFERENCE, limits))
    if policy:
        surplus = policy.surplus
        found.append(_Benchmark("attainable", surplus.mean, surplus.ci, ATTAINABLE, _limits(policy.usage)))
    if audit.oracle is not None:
        found.append(_Benchmark("hindsight, all served", audit.oracle, None, BEST, within, luck=True))
    deferring = _Benchmark("hindsight, may defer", audit.oracle_with_defer, None, BEST, within, luck=True)
    return [*found, deferring]


def _limits(usage: Sequence[Usage]) -> str:
    """Whether the limits are kept, and which is missed most."""
    worst = max(usage, key=lambda u: u.excess, default=None)
    if worst is None:
        return "none declared"
    return f"broken: {esc(worst.constraint.name)} {small(over(worst))}" if over(worst) else "kept"


def over(usage: Usage) -> str:
    """How far over the bound, in words; nothing when within."""
    if usage.excess <= 1e-9:
        return ""
    ratio = usage.used / usage.constraint.bound if usage.constraint.bound else np.inf
    return f"{ratio:.1f}× the limit" if 2 <= ratio < np.inf else f"over by {percent(usage.excess)}"
