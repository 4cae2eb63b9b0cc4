"""The figures of an evaluation, as plotly specifications."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm

from walras.diagnosis.evaluate import BINS, Calibration, Evaluation, Halves, Spread
from walras.diagnosis.html.plot import (
    ATTAINABLE,
    BARS,
    BEST,
    REFERENCE,
    Figure,
    bar_layout,
    bar_trace,
    figure_layout,
    hover,
    whiskers,
)
from walras.diagnosis.html.text import esc, label
from walras.diagnosis.words import interval, percent, usd
from walras.estimate.off_policy import OffPolicy
from walras.risk import FloatArray

NAMES = {"ips": "IPS", "snips": "SNIPS", "dr": "DR", "switch_dr": "switch-DR"}
"""Estimators as the literature writes them."""
APART = 0.2
"""How far from the middle of its row a strip stands that shares the row."""
FINE = 5.0
"""Points that coverage may be off and yet fill only a part of the picture."""
LARGEST = 38
"""Diameter of the largest bubble, pixels."""


# --- words for a figure over the splits -----------------------------------------------------------------------------


def give_or_take(spread: Spread, scale: float = 1.0, unit: str = "") -> str:
    """Mean ± standard deviation over the splits, if there is one, with one decimal: 8.9 ± 1.3%."""
    mean = round(scale * spread.mean, 1) + 0.0  # no −0.0
    sd = f" ± {scale * spread.sd:.1f}" if spread.sd > 0 else ""
    return f"{mean:.1f}{sd}{unit}".replace("-", "−")


def usd_give_or_take(spread: Spread) -> str:
    """The same in dollars."""
    return usd(spread.mean) + (f" ± {usd(spread.sd)}" if spread.sd > 0 else "")


def ahead(halves: Halves) -> Spread:
    """Learned router less class means, split by split: a share of the gap."""
    return Spread(halves.closed(halves.policy).by_seed - halves.closed(halves.category_mean).by_seed)


# --- gap closed -----------------------------------------------------------------------------------------------------


def gap_closed(halves: Halves, apart: Halves | None) -> Figure:
    """Share of the way from the best fixed model to hindsight, by policy and split."""
    names, colours = (
        ("learned router", "class means", "ceiling (estimated)", "router − class means"),
        (
            ATTAINABLE,
            REFERENCE,
            BEST,
            "--ink",
        ),
    )
    data = []
    for k, (name, color) in enumerate(zip(names, colours, strict=True)):
        off = APART if apart else 0.0
        data += _strip("random halves", name, k - off, _closed(halves)[k], color)
        if apart:
            data += _strip(
                "near-duplicates kept in one half", name, k + off, _closed(apart)[k], color, "-open"
            )
    for trace in data[2 * (1 + (apart is not None)) :]:
        trace["showlegend"] = False
    layout = bar_layout(list(names), "gap closed, %", per_bar=62 if apart else 44, dollars=False)
    layout["xaxis"] |= _marked_zero()
    layout["showlegend"] = apart is not None
    return Figure(
        id="gap-closed",
        title="Share of the gap from the best fixed model to hindsight that each policy closes",
        caption=(
            "0% is the one model that turned out best for all, which nobody knows beforehand; 100% picks with each outcome "
            "in hand, luck included, so no policy gets there. The ceiling knows how half of the models did on the "
            "very request when it picks among the others: a low estimate of what is not luck, no bound. Each dot is one split; upright marks and whiskers are the mean ± one "
            "standard deviation over the splits. Splits share requests, so that is no error over new logs."
        ),
        data=tuple(data),
        layout=layout,
        head=("policy", "surplus per task", "gap closed", "near-duplicates kept in one half")[
            : 4 if apart else 3
        ],
        rows=tuple(_policy_rows(halves, apart)),
    )


def _closed(halves: Halves) -> tuple[Spread, ...]:
    """What the rows of the figure show, as shares."""
    ours, by_class = halves.closed(halves.policy), halves.closed(halves.category_mean)
    return ours, by_class, halves.ceiling, ahead(halves)


def _policy_rows(halves: Halves, apart: Halves | None) -> list[tuple[str, ...]]:
    names = {
        "policy": "learned router",
        "category_mean": "class means",
        "fixed": "one model, chosen on the half learned from",
        "best_fixed": "best fixed, with hindsight",
        "oracle": "hindsight: luck included",
    }
    both = [h for h in (halves, apart) if h]
    rows = [
        (
            name,
            usd_give_or_take(getattr(halves, key)),
            *(give_or_take(h.closed(getattr(h, key)), 100, "%") for h in both),
        )
        for key, name in names.items()
    ]
    ceilings = [give_or_take(h.ceiling, 100, "%") for h in both]
    rows.insert(-1, ("knowing half the outcomes: ceiling, estimated", "", *ceilings))
    earned = Spread(halves.policy.by_seed - halves.category_mean.by_seed)
    points = [give_or_take(ahead(h), 100, " points") for h in both]
    return [*rows, ("learned router less class means", usd_give_or_take(earned), *points)]


def _marked_zero() -> dict[str, Any]:
    return {"zeroline": True, "zerolinecolor": "--muted", "zerolinewidth": 1.5}


def _strip(
    series: str, name: str, y: float, shares: Spread, color: str, hollow: str = ""
) -> list[dict[str, Any]]:
    """Every split a dot; the mean an upright mark, with its spread."""
    x = (100 * shares.by_seed).tolist()
    dots: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": series,
        "x": x,
        "y": [y] * len(x),
        "marker": {"color": color, "size": 9, "symbol": f"circle{hollow}", "opacity": 0.55},
    }
    dots |= hover([f"{name}, {series}, split {k + 1}: {v:.1f}".replace("-", "−") for k, v in enumerate(x)])
    mean: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": f"{name}, mean",
        "showlegend": False,
        "x": [100 * shares.mean],
        "y": [y],
        "marker": {"color": color, "size": 20, "symbol": "line-ns-open", "line": {"width": 3}},
    }
    if np.isfinite(shares.sd):
        reach = 100 * shares.sd
        mean["error_x"] = whiskers(mean["x"], [(mean["x"][0] - reach, mean["x"][0] + reach)])
    mean |= hover([f"{name}, {series}: {give_or_take(shares, 100)}"])
    return [dots, mean]


# --- calibration ----------------------------------------------------------------------------------------------------


def calibration_plot(found: Evaluation) -> Figure:
    """Observed against predicted quality, by bin of q̂."""
    bins, seen = found.calibration, found.calibration.count > 0
    low, high = wilson(bins, found.tasks * len(found.models))
    predicted, observed, count = bins.predicted[seen], bins.observed[seen], bins.count[seen]
    pairs = list(zip(low[seen].tolist(), high[seen].tolist(), strict=True))
    edges = [f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}" for k in np.flatnonzero(seen)]
    rows = tuple(
        (edge, f"{p:.3f}", f"{o:.3f}", interval(pair, lambda x: f"{x:.3f}"), f"{n:,}")
        for edge, p, o, pair, n in zip(edges, predicted, observed, pairs, count, strict=True)
    )
    text = [f"q̂ {e}: predicted {p}, observed {o} ({i}), {n} outcomes" for e, p, o, i, n in rows]
    layout = figure_layout(460, x="predicted quality q̂", y="observed quality", dollars="")
    layout["xaxis"] |= {"range": [-0.04, 1.04], "constrain": "domain", "zeroline": False}
    layout["yaxis"] |= {"range": [-0.04, 1.04], "constrain": "domain", "zeroline": False, "scaleanchor": "x"}
    return Figure(
        id="calibration",
        title="Predicted against observed quality",
        caption=(
            "On the dashed line, what is predicted is what happens; below it, q̂ promises too much. The area of a bubble is the "
            "number of outcomes. Whiskers: 95% Wilson interval for as many outcomes as are distinct, since splits share "
            "them; it takes those of one request as independent, and is wider than needed for quality between 0 and 1."
        ),
        data=_bubbles(predicted, observed, count.astype(float), pairs, text),
        layout=layout,
        head=("q̂", "predicted", "observed", "95% interval", "outcomes"),
        rows=rows,
    )


def _bubbles(
    predicted: FloatArray,
    observed: FloatArray,
    count: FloatArray,
    pairs: list[tuple[float, float]],
    text: list[str],
) -> tuple[dict[str, Any], ...]:
    """The diagonal, and for each bin a bubble with a dot and its interval on it."""
    where = {"type": "scatter", "x": predicted.tolist(), "y": observed.tolist()}
    area = {"size": count.tolist(), "sizemode": "area", "sizeref": 2 * float(count.max()) / LARGEST**2}
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "name": "as predicted",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "--muted", "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
    }
    bubbles = where | {
        "mode": "markers",
        "name": "outcomes",
        "marker": {"color": ATTAINABLE, "opacity": 0.3, "line": {"width": 0}} | area,
    }
    dots = where | {
        "mode": "markers",
        "name": "mean of the bin",
        "marker": {"color": ATTAINABLE, "size": 6},
        "error_y": whiskers(observed.tolist(), pairs) | {"color": "--ink"},
    }
    return diagonal, bubbles | hover(text), dots | hover(text)


def wilson(bins: Calibration, distinct: int, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Interval of the observed mean of each bin, (BINS,) each, NaN where empty (Wilson 1927).

    Counts are pooled over splits that share outcomes: they are scaled down so that they add up to no more than `distinct`.
    For quality between 0 and 1 the binomial variance is the largest there is, so the interval is on the safe side.
    """
    n = bins.count * min(1.0, distinct / max(int(bins.count.sum()), 1))
    n = np.where(n > 0, n, np.nan)
    z2, p = float(norm.ppf(0.5 + level / 2)) ** 2, bins.observed
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    reach = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return centre - reach, centre + reach


def coverage(bins: Calibration) -> Figure:
    """By how much the share of outcomes inside conformal intervals misses the nominal level, by split."""
    levels = [f"{level:.0%}" for level in bins.coverage]
    missed = [Spread(share.by_seed - level) for level, share in bins.coverage.items()]
    data = []
    for k, (level, miss) in enumerate(zip(levels, missed, strict=True)):
        data += _strip("a split", f"{level} interval, points off", k, miss, ATTAINABLE)
    layout = bar_layout(levels, "coverage less nominal, points", per_bar=62, dollars=False)
    layout["yaxis"]["title"]["text"] = "nominal level"
    furthest = 1.1 * max(FINE, *(100 * float(np.abs(miss.by_seed).max()) for miss in missed))
    layout["xaxis"] |= _marked_zero() | {"range": [-furthest, furthest]}
    return Figure(
        id="coverage",
        title="Coverage of the conformal intervals of quality",
        caption=(
            "An interval keeps its word where the dots lie around 0; left of it, too few outcomes are inside. Upright marks "
            "and whiskers: mean ± one standard deviation over the splits."
        ),
        data=tuple(data),
        layout=layout,
        head=("nominal level", "outcomes inside"),
        rows=tuple(
            (level, give_or_take(share, 100, "%"))
            for level, share in zip(levels, bins.coverage.values(), strict=True)
        ),
    )


# --- picks, off policy ----------------------------------------------------------------------------------------------


def picks(found: Evaluation) -> Figure:
    """Share of the requests that each model gets from the learned router, largest first."""
    ordered = sorted(found.picks.items(), key=lambda pick: -pick[1])
    given = [pick for pick in ordered if pick[1] > 0]
    shown, rest = given[:BARS], given[BARS:]
    if rest:
        shown.append((f"{len(rest)} other models", sum(share for _, share in rest)))
    never = len(ordered) - len(given)
    text = [f"{label(name, 60)}: {percent(share)}" for name, share in shown]
    names = [label(name) for name, _ in shown]
    layout = bar_layout(names, "share of held-out requests, %", dollars=False)
    layout["xaxis"]["rangemode"] = "tozero"
    return Figure(
        id="picks",
        title="Which model the learned router picks",
        caption="At declared prices, on requests it has not learned from."
        + (f" Never picked: {never} of {len(ordered)} models." if never else ""),
        data=(bar_trace([100 * share for _, share in shown], names, ATTAINABLE, text),),
        layout=layout,
        head=("model", "share of requests"),
        rows=tuple((esc(name), percent(share)) for name, share in ordered),
    )


def off_policy_estimates(policy: OffPolicy, exact: Spread | None) -> Figure:
    """What the learned router would have earned, by estimator; `exact` where every model's outcome is known."""
    level = f"{policy.level:.0%}"
    found = [
        (NAMES[key], e.value, e.interval, ATTAINABLE if key == policy.recommended else REFERENCE, usd(e.se))
        for key, e in policy.estimates.items()
    ]
    data, rows = [], []
    for k, (name, value, pair, color, se) in enumerate(found):
        recommended = "recommended" if color == ATTAINABLE else ""
        data.append(_dot(k, name, value, color) | {"error_x": whiskers([value], [pair])})
        data[k] |= hover([f"{name}: {usd(value)} ({interval(pair)})"])
        rows.append((name, usd(value), se, interval(pair), recommended))
    names = [row[0] for row in rows]
    meaning = (
        f"{policy.reason[:1].upper()}{policy.reason[1:]}: so {NAMES[policy.recommended]} is the one to read."
    )
    if exact:
        meaning += " Exact: what its picks on held-out halves earned, since this log knows every outcome."
        data.append(_dot(len(names), "exact", exact.mean, BEST) | hover([f"exact: {usd(exact.mean)}"]))
        names.append("exact")
        rows.append(("exact", usd(exact.mean), "", "", "every outcome of this log is known"))
    return Figure(
        id="off-policy",
        title="Net surplus the learned router would have had, from the logged choices alone",
        caption=f"{esc(meaning)} Whiskers: {level} interval over requests.",
        data=tuple(data),
        layout=bar_layout(names, "net surplus, USD per task", per_bar=44),
        head=("estimator", "surplus per task", "standard error", f"{level} interval", ""),
        rows=tuple(rows),
        words=(0, 4),
    )


def _dot(y: int, name: str, x: float, color: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x],
        "y": [y],
        "marker": {"color": color, "size": 13},
    }
