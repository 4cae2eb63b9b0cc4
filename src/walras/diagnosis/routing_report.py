"""Decisions of a router, and what an evaluation found, for a terminal and as data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from walras.demand.route import Routing
from walras.demand.search import Plan
from walras.diagnosis.evaluate import Calibration, Evaluation, Halves, Spread
from walras.diagnosis.terminal import table
from walras.diagnosis.words import count, interval, number, percent, usd
from walras.equation import DEFER
from walras.estimate.drift import Drift

SHOWN = 12
"""Requests of a batch that are listed one by one."""


# --- decisions --------------------------------------------------------------------------------------------------------


def routing_data(routing: Routing, plan: Plan | None = None) -> dict[str, Any]:
    """Every decision with every use's terms, USD."""
    return {
        "price_vector": json.loads(routing.prices.to_json()),
        "shares": routing.shares,
        "routes": [
            {**_route_data(routing, row), "search": None if plan is None else _plan_data(plan, row)}
            for row in range(len(routing.ids))
        ],
    }


def _plan_data(plan: Plan, row: int) -> dict[str, Any]:
    """Sequential search in brief, USD."""
    return {
        "plan": plan.text(row),
        "surplus": float(plan.surplus[row]),
        "one_shot": float(plan.one_shot[row]),
        "bound": float(plan.bound[row]),
        "cost": float(plan.cost[row]),
        "quality": float(plan.quality[row]),
    }


def _route_data(routing: Routing, row: int) -> dict[str, Any]:
    drawn, terms, uses = routing.drawn, routing.terms, routing.uses
    return {
        "request_id": routing.ids[row],
        "model": routing.model(row),
        "propensity": float(drawn.propensity[row]),
        "expected_regret": float(drawn.regret[row]),
        "floored": bool(drawn.floored[row]),
        "uses": [
            {
                "model": name,
                "allowed": bool(uses.allowed[row, i]),
                "quality": float(uses.quality[row, i]),
                "quality_error": float(routing.quality_error[row, i]),
                "usd": float(uses.amounts[row, i, 0]),
                "seconds": float(uses.seconds[row, i]),
                "value": float(terms.value[row, i]),
                "compute": float(terms.compute[row, i]),
                "latency": float(terms.latency[row, i]),
                "risk": float(terms.risk[row, i]),
                "net_value": float(routing.values[row, i]),
                "net_value_error": float(routing.value_error[row, i]),
                "probability": float(drawn.probability[row, i]),
            }
            for i, name in enumerate(uses.names)
        ],
    }


def routing_screen(routing: Routing, title: str, plan: Plan | None = None) -> RenderableType:
    """One request in full, or a batch in brief."""
    head = Text.assemble(("Walras ", "bold"), (title, "bold"))
    paid = [f"μ({p.constraint.name}) {p.multiplier:.4g}" for p in routing.prices.discovered]
    prices = Text("Prices: money 1" + "".join(f", {p}" for p in paid), style="dim")
    if len(routing.ids) == 1:
        sequence = [] if plan is None else [Text("\nSearch", style="bold"), Text(plan.text(0)), Text()]
        return Group(head, _decision(routing, 0), *sequence, prices)
    rows = [
        (escape(routing.ids[row]), escape(routing.model(row)), _net(routing, row), _odds(routing, row))
        for row in range(min(len(routing.ids), SHOWN))
    ]
    more = len(routing.ids) - SHOWN
    rest = [Text(f"… and {more:,} more (--json has all)", style="dim")] if more > 0 else []
    shares = [(escape(name), percent(share)) for name, share in routing.shares.items() if share]
    return Group(
        head,
        table("Decisions", ("request", "use", "net value", "probability"), rows),
        *rest,
        table("Shares", ("use", "of the requests"), shares),
        *([] if plan is None else [_searched(plan)]),
        prices,
    )


def _searched(plan: Plan) -> Text:
    gain = float((plan.surplus - plan.one_shot).mean())
    return Text(
        f"Search (try, verify, escalate) is worth {usd(gain)} more per request than one model (--json has each plan)."
    )


def _net(routing: Routing, row: int) -> str:
    use = int(routing.drawn.use[row])
    return usd(0.0 if use == DEFER else float(routing.values[row, use]))


def _odds(routing: Routing, row: int) -> str:
    chance = float(routing.drawn.propensity[row])
    return "" if chance == 1 else percent(chance)


def _decision(routing: Routing, row: int) -> RenderableType:
    """Why this use: every use's terms, best first."""
    terms, values = routing.terms, routing.values[row]
    chosen = int(routing.drawn.use[row])
    order = [int(i) for i in np.argsort(-values)]
    rows = []
    for i in order:
        quality = f"{routing.uses.quality[row, i]:.3f} ± {routing.quality_error[row, i]:.3f}"
        cells = [usd(float(part[row, i])) for part in (terms.value, terms.compute)]
        cells += [usd(float(part[row, i])) if part[row].any() else "" for part in (terms.latency, terms.risk)]
        net = usd(float(values[i])) if math.isfinite(values[i]) else "forbidden"
        mark = "← chosen" if i == chosen else ""
        chance = float(routing.drawn.probability[row, i])
        odds = percent(chance) if 0 < chance < 1 else ""
        rows.append((escape(routing.uses.names[i]), quality, *cells, net, odds, mark))
    columns = ("use", "quality", "V·ΔQ", "π·ΔC", "λ·ΔL", "ρ·ΔR", "net value", "probability", "")
    if chosen == DEFER:
        best = usd(float(values[order[0]])) if math.isfinite(values[order[0]]) else "nothing allowed"
        why = Text(f"defer: the best use is worth {best}, less than nothing at all", style="bold")
        return Group(table("Uses", columns, rows), why)
    return table("Uses", columns, rows)


# --- drift ------------------------------------------------------------------------------------------------------------


def drift_data(drift: Drift) -> dict[str, Any]:
    """What a newer log says of the estimates."""
    return {
        "refit": drift.refit,
        "reason": drift.reason,
        "rows": drift.rows,
        "alarms": [asdict(alarm) for alarm in drift.alarms],
        "unseen_models": dict(drift.unseen_models),
        "unseen_classes": dict(drift.unseen_classes),
    }


def drift_screen(drift: Drift, title: str) -> RenderableType:
    """Whether to fit again, and what has changed."""
    rows = [
        (
            escape(alarm.model or "all requests"),
            escape(alarm.task_class or ("all classes" if alarm.model else "new classes")),
            number(alarm.mean_residual),
            interval(alarm.interval, number),
            f"{number(alarm.since)}",
            f"{alarm.rows:,}",
        )
        for alarm in drift.alarms
    ]
    head = Text.assemble(("Walras ", "bold"), (title, "bold"), f" · {count(drift.rows, 'outcomes')}")
    answer = Text(drift.reason, style="bold red" if drift.refit else "bold")
    columns = ("model", "class", "off by", "interval", "since", "rows")
    return Group(head, answer, *([table("Changed", columns, rows)] if rows else []))


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluation_data(found: Evaluation) -> dict[str, Any]:
    """Everything an evaluation found. Gaps closed are shares (0.16 is 16%)."""
    halves = found.halves
    none = dict.fromkeys(("gap_closed", "category_mean", "advantage", "noise_ceiling"))
    gaps = _gaps(halves) if halves else none
    return {
        "tasks": found.tasks,
        "models": list(found.models),
        "classes": found.classes,
        "left_out": found.left_out,
        "synthetic": found.synthetic,
        **gaps,
        "best_fixed": halves.best_fixed.mean if halves else None,
        "oracle": halves.oracle.mean if halves else None,
        "surplus": halves.policy.mean if halves else None,
        "surplus_over_fixed": _spread(Spread(halves.policy.by_seed - halves.fixed.by_seed))
        if halves
        else None,
        "regret": {"mean": found.regret.mean, "ci": list(found.regret.ci)} if found.regret else None,
        "near_duplicates": {
            "share": found.near_duplicates,
            "kept_together": _gaps(found.apart) if found.apart else None,
        },
        "picks": dict(found.picks),
        "calibration": _calibration_data(found.calibration),
        "off_policy": _off_policy_data(found),
        "notes": list(found.notes),
    }


def _gaps(halves: Halves) -> dict[str, Any]:
    ours, by_class = halves.closed(halves.policy), halves.closed(halves.category_mean)
    return {
        "gap_closed": _spread(ours),
        "category_mean": _spread(by_class),
        "advantage": _spread(Spread(ours.by_seed - by_class.by_seed)),
        "noise_ceiling": _spread(halves.ceiling),
    }


def _spread(spread: Spread) -> dict[str, float]:
    return {"mean": spread.mean, "sd": spread.sd}


def _calibration_data(calibration: Calibration) -> dict[str, Any]:
    bins = zip(calibration.predicted, calibration.observed, calibration.count, strict=True)
    return {
        "ece": _spread(calibration.error),
        "bins": [{"predicted": float(p), "observed": float(o), "count": int(n)} for p, o, n in bins],
        "coverage": [{"level": level, **_spread(share)} for level, share in calibration.coverage.items()],
    }


def _off_policy_data(found: Evaluation) -> dict[str, Any] | None:
    policy, gain = found.off_policy, found.gain
    if policy is None or gain is None:
        return None
    overlap = policy.overlap
    return {
        "estimates": {
            name: {"value": e.value, "se": e.se, "interval": list(e.interval)}
            for name, e in policy.estimates.items()
        },
        "level": policy.level,
        "recommended": policy.recommended,
        "reason": policy.reason,
        "gain": {"value": gain.value, "se": gain.se, "interval": list(gain.interval)},
        "overlap": {
            "ess": overlap.ess,
            "max_weight": overlap.max_weight,
            "mean_weight": overlap.mean_weight,
            "mean_weight_z": overlap.mean_weight_z,
            "never_logged": overlap.never_logged,
            "thin": overlap.thin,
        },
    }


def evaluation_screen(found: Evaluation, title: str, seeds: int) -> RenderableType:
    """The answer first, then what it rests on."""
    size = f"{count(found.tasks, 'tasks')} × {count(len(found.models), 'models')}"
    head = Text.assemble(("Walras ", "bold"), (title, "bold"), f" · {size}")
    if found.synthetic:
        head.append(" · SYNTHETIC LOG", style="bold yellow")
    parts: list[RenderableType] = [head]
    if found.halves:
        parts += _complete(found, found.halves, seeds)
    parts += _logged(found)
    parts += _calibrated(found.calibration)
    picks = sorted(((s, m) for m, s in found.picks.items() if s >= 0.0005), reverse=True)
    parts.append(Text("Picks: " + ", ".join(f"{m} {percent(s)}" for s, m in picks)))
    return Group(*parts, *(Text(f"note: {note}", style="dim") for note in found.notes))


def _complete(found: Evaluation, halves: Halves, seeds: int) -> list[RenderableType]:
    ours, by_class = halves.closed(halves.policy), halves.closed(halves.category_mean)
    ahead = Spread(ours.by_seed - by_class.by_seed)
    over_fixed = Spread(halves.policy.by_seed - halves.fixed.by_seed)
    answer = (
        f"A router learned from this log {verdict(ahead)} class means ({_points(ahead)} of the gap, split by split) "
        f"and {verdict(over_fixed)} one model for all ({usd(over_fixed.mean)} per task)."
    )
    rows = [
        _policy_row("learned router", halves.policy, halves),
        _policy_row("class means", halves.category_mean, halves),
        _policy_row("one model, chosen before", halves.fixed, halves),
        _policy_row("best fixed, with hindsight", halves.best_fixed, halves),
        ("knowing half the outcomes", "", _percent(halves.ceiling)),
        _policy_row("oracle: luck included", halves.oracle, halves),
    ]
    out: list[RenderableType] = [
        Text(answer, style="bold"),
        table(f"Held-out halves, {count(seeds, 'splits')}", ("policy", "per task", "gap closed"), rows),
    ]
    if found.regret:
        out.append(Text(f"Regret {usd(found.regret.mean)} per task ({interval(found.regret.ci)})."))
    if found.apart:
        apart = found.apart
        rest = Spread(apart.closed(apart.policy).by_seed - apart.closed(apart.category_mean).by_seed)
        out.append(
            Text(
                f"{percent(found.near_duplicates)} of the requests have a near-duplicate in the log. With those kept "
                f"in one half the router is ahead by {_points(rest)}."
            )
        )
    return out


def verdict(ahead: Spread) -> str:
    """In words; a mean within one spread of 0 is no difference."""
    if not math.isfinite(ahead.sd) or abs(ahead.mean) > ahead.sd:
        return "beats" if ahead.mean > 0 else "loses to"
    return "is level with"


def _points(spread: Spread) -> str:
    sd = f" ± {100 * spread.sd:.1f}" if math.isfinite(spread.sd) else ""
    return f"{100 * spread.mean:.1f}{sd} points".replace("-", "−")


def _policy_row(name: str, policy: Spread, halves: Halves) -> tuple[str, str, str]:
    return name, usd(policy.mean), _percent(halves.closed(policy))


def _percent(share: Spread) -> str:
    sd = f" ± {100 * share.sd:.1f}" if math.isfinite(share.sd) and share.sd > 5e-4 else ""
    return f"{round(100 * share.mean, 1) + 0.0:.1f}{sd}%".replace("-", "−")


def _logged(found: Evaluation) -> list[RenderableType]:
    policy, gain = found.off_policy, found.gain
    if policy is None or gain is None:
        return []
    rows = [
        (
            name.replace("_", "-").upper(),
            usd(e.value),
            interval(e.interval),
            "← " + policy.reason if name == policy.recommended else "",
        )
        for name, e in policy.estimates.items()
    ]
    helps = "earns more than" if gain.interval[0] > 0 else "is not shown to earn more than"
    overlap = policy.overlap
    return [
        Text(
            f"The learned router {helps} the logged choices: {usd(gain.value)} per task ({interval(gain.interval)}).",
            style="bold",
        ),
        table("Off policy, per task", ("estimator", "value", f"{policy.level:.0%}", ""), rows),
        Text(
            f"Overlap: {number(overlap.ess)} effective of {overlap.rows:,} rows, largest weight {number(overlap.max_weight)}, "
            f"mean weight {overlap.mean_weight:.3f}",
            style="dim",
        ),
    ]


def _calibrated(calibration: Calibration) -> list[RenderableType]:
    rows = [
        (f"{k / 10:.1f} to {(k + 1) / 10:.1f}", f"{p:.3f}", f"{o:.3f}", f"{n:,}", _bar(p, o))
        for k, (p, o, n) in enumerate(
            zip(calibration.predicted, calibration.observed, calibration.count, strict=True)
        )
        if n
    ]
    coverage = ", ".join(f"{level:.0%}: {share.mean:.1%}" for level, share in calibration.coverage.items())
    return [
        table("Calibration of q̂", ("q̂", "predicted", "observed", "outcomes", ""), rows),
        Text(f"Expected calibration error {calibration.error.mean:.3f}. Intervals cover {coverage}."),
    ]


def _bar(predicted: float, observed: float) -> str:
    """Observed as a bar, predicted as a mark on it."""
    cells = ["█" if k < round(20 * observed) else "·" for k in range(20)]
    cells[min(int(20 * predicted), 19)] = "|"
    return "".join(cells)
