"""The audit as plain data: the contract of `--json` for scripts. Amounts are USD means per task unless named otherwise."""

from __future__ import annotations

import json
import math
from typing import Any

from walras.diagnosis.attainable import Change
from walras.diagnosis.audit import Audit
from walras.diagnosis.case import Case
from walras.diagnosis.regret import Mean, Row, overdrafts
from walras.diagnosis.sensitivity import SAMPLE, Scenario
from walras.diagnosis.shard_prices import ShardPrices
from walras.market.clearing import Clearing, Usage
from walras.prices import Layer, Scope
from walras.quantities import USD
from walras.risk import FloatArray

LAYERS: tuple[Layer, ...] = ("compute", "latency", "risk")


def prices_data(case: Case, clearing: Clearing) -> dict[str, Any]:
    """What `walras prices --json` prints, and the first part of an audit's."""
    return {
        "n_tasks": len(case.tasks),
        "prices": {layer: _price(case, clearing, layer) for layer in LAYERS},
        "multipliers": {layer: clearing.prices.multiplier(layer) for layer in LAYERS},
        "constraints": [_constraint(usage) for usage in clearing.usage],
        "certificate": _certificate(clearing),
        "price_vector": json.loads(clearing.prices.to_json()),
        "passes": clearing.passes,
        "seconds": clearing.seconds,
        "left_out": case.left_out,
        "synthetic": case.synthetic,
        "notes": list(case.notes),
    }


def shard_prices_data(found: ShardPrices) -> dict[str, Any]:
    """What `walras prices --json` prints about shards: the same keys as far as they make sense."""
    return {
        "n_tasks": found.tasks,
        "multipliers": {layer: found.prices.multiplier(layer) for layer in LAYERS},
        "constraints": [_constraint(usage) for usage in found.usage],
        "certificate": _certificate(found),
        "price_vector": json.loads(found.prices.to_json()),
        "engine": found.engine,
        "passes": found.passes,
        "steps": found.steps,
        "seconds": found.seconds,
        "bytes_per_pass": found.bytes_per_pass,
    }


def audit_data(audit: Audit) -> dict[str, Any]:
    """What `walras audit --json` prints."""
    case = audit.case
    data = prices_data(case, audit.clearing)
    for row, today, interval in zip(data["constraints"], audit.realised.usage, audit.intervals, strict=True):
        row |= {"used_by_baseline": today.used, "multiplier_ci": interval}
    return data | {
        "baseline": case.baseline,
        "complete": case.complete,
        **_benchmarks(audit),
        "realised": _realised(audit),
        "regret": _regret(audit),
        "failures": {
            f.label: {"name": f.name, "tasks": f.tasks, **_mean(f.per_task), "total": f.total}
            for f in audit.regret.failures
        },
        "changes": [_change(change) for change in audit.changes],
        "sensitivity": [_scenario(audit, s) for s in audit.scenarios],
        "sensitivity_sampled": min(len(case.tasks), SAMPLE),
        "curve": {
            "budget_usd": audit.curve.budget.tolist(),
            "surplus": audit.curve.surplus.tolist(),
            "multiplier": audit.curve.multiplier.tolist(),
            "sampled": audit.curve.sampled,
        },
        "shares": {name: _shares(case, shares) for name, shares in audit.shares.items()},
        "seconds": audit.seconds,
    }


def _benchmarks(audit: Audit) -> dict[str, Any]:
    """What the audited choices are held against."""
    fixed, luck = audit.best_fixed, "ex post, luck included"
    return {
        "best_fixed": fixed
        and {"use": audit.case.uses.names[fixed.use], "surplus": fixed.surplus, "feasible": fixed.feasible},
        "attainable": _attainable(audit),
        "oracle": None if audit.oracle is None else {"surplus": audit.oracle, "kind": luck},
        "oracle_with_defer": {"surplus": audit.oracle_with_defer, "kind": luck},
    }


def _attainable(audit: Audit) -> dict[str, Any] | None:
    policy, earned, limits = audit.attainable, audit.gain_surplus, audit.gain_limits
    if policy is None or earned is None or limits is None:
        return None
    prices = zip(policy.usage, policy.multipliers.tolist(), strict=True)
    return {
        "surplus": policy.surplus.mean,
        "ci": policy.surplus.ci,
        "gap_closed": _gap_closed(audit),
        "gain": {"surplus": _mean(earned), "limits": _mean(limits)},
        "multipliers": {usage.constraint.name: mu for usage, mu in prices},
        "used": {usage.constraint.name: usage.used for usage in policy.usage},
        "kind": "cross-fitted on class and value, scored on held-out tasks",
    }


def _regret(audit: Audit) -> dict[str, Any]:
    regret = audit.regret
    return _mean(regret.overall) | {
        "total": float(regret.per_task.sum()),
        "surplus_not_earned": audit.clearing.certificate.objective - audit.realised.surplus.mean,
        "overdrawn_at_prices": float(sum(overdrafts(audit.case, audit.clearing.prices))),
        "rule_breaking": regret.rule_breaking,
        "rule_breakers": regret.rule_breakers,
        "by_tenant": [_row(row) for row in regret.by_tenant],
        "by_class": [_row(row) for row in regret.by_class],
        "by_value_decile": [_row(row) for row in regret.by_value_decile],
        "value_correlation": regret.value_correlation,
        "top_decile_share": regret.top_decile_share,
    }


def _change(change: Change) -> dict[str, Any]:
    return {
        "tenant": change.tenant,
        "class": change.task_class,
        "from": change.from_use,
        "to": change.to_use,
        "tasks": change.tasks,
        **_mean(change.per_task),
        "surplus": change.surplus,
        "total": change.total,
    }


def to_json(data: dict[str, Any]) -> str:
    """Strict JSON: what is infinite or unknown becomes null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def declared_price(case: Case, layer: Layer) -> float:
    """The declared part of a price: 1, mean λ₀ or mean ρ₀; 0 in the paper's pure form."""
    if case.economy.numeraire == "compute":
        return 0.0
    if layer == "compute":
        return 1.0
    column = case.tasks.latency_price if layer == "latency" else case.tasks.risk_price
    return float(column.mean())


def _price(case: Case, clearing: Clearing, layer: Layer) -> dict[str, Any]:
    mine = [
        u.constraint
        for u in clearing.usage
        if u.constraint.layer == layer and u.constraint.scope == Scope() and u.constraint.resource == USD
    ]
    declared, discovered = declared_price(case, layer), clearing.prices.multiplier(layer)
    unit = {"compute": "USD per USD", "latency": "USD per second", "risk": "USD per unit of risk"}[layer]
    quantile = [c for c in mine if c.kind == "quantile_sla"]
    if quantile:
        # Breaches are another unit than seconds: the two prices cannot be added.
        return {
            "value": discovered,
            "unit": quantile[0].unit,
            "constraint": quantile[0].name,
            "declared": declared,
            "declared_unit": unit,
        }
    return {
        "value": declared + discovered,
        "unit": unit,
        "constraint": mine[0].name if mine else None,
        "declared": declared,
        "declared_unit": unit,
    }


def _constraint(usage: Usage) -> dict[str, Any]:
    c = usage.constraint
    return {
        "name": c.name,
        "kind": c.kind,
        "resource": c.resource if c.kind == "budget" else None,
        "tenant": c.scope.tenant,
        "class": c.scope.task_class,
        "bound": c.bound,
        "used": usage.used,
        "multiplier": usage.multiplier,
        "unit": c.unit,
        "service_rate": usage.service_rate,
        "hard": c.hard,
    }


def _certificate(clearing: Clearing | ShardPrices) -> dict[str, Any]:
    certificate, rounded = clearing.certificate, clearing.rounded
    return {
        "objective": certificate.objective,
        "dual": certificate.dual,
        "gap": certificate.gap,
        "max_violation": certificate.max_violation,
        "residual": certificate.residual,
        "slackness": certificate.slackness,
        "rounded": rounded
        and {
            "objective": rounded.objective,
            "gap": rounded.gap,
            "max_violation": rounded.max_violation,
            "split_tasks": rounded.split_tasks,
        },
    }


def _gap_closed(audit: Audit) -> float | None:
    """(attainable − best fixed)/(oracle − best fixed): how much of what hindsight adds a policy can have."""
    top = audit.clearing.certificate.objective
    if audit.attainable is None or audit.best_fixed is None or top <= audit.best_fixed.surplus:
        return None
    low = audit.best_fixed.surplus
    return (audit.attainable.surplus.mean - low) / (top - low)


def _realised(audit: Audit) -> dict[str, Any]:
    realised, chosen = audit.realised, audit.regret.chosen
    return {
        "surplus": realised.surplus.mean,
        "ci": realised.surplus.ci,
        "quality": realised.quality,
        "value": realised.value,
        "cost_usd": realised.cost,
        "latency_s": realised.latency_s,
        "risk": realised.risk,
        "served": realised.served,
        "at_prices": {
            "value": float(chosen.value.mean()),
            "compute": float(chosen.compute.mean()),
            "latency": float(chosen.latency.mean()),
            "risk": float(chosen.risk.mean()),
        },
    }


def _mean(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.mean, "ci": mean.ci}


def _row(row: Row) -> dict[str, Any]:
    return {"name": row.name, "tasks": row.tasks, **_mean(row.regret), "total": row.total}


def _scenario(audit: Audit, scenario: Scenario) -> dict[str, Any]:
    names = [u.constraint.name for u in audit.clearing.usage]
    return {
        "name": scenario.name,
        "surplus": scenario.surplus,
        "regret": scenario.regret,
        "multipliers": dict(zip(names, scenario.multipliers, strict=True)),
    }


def _shares(case: Case, shares: FloatArray) -> dict[str, float]:
    return dict(zip((*case.uses.names, "defer"), shares.tolist(), strict=True))
