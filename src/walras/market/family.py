"""Price discovery when tenants have budgets of their own, hundreds or thousands of them. [Z-3]

Up to `planes.MAX_ROWS` constraints are priced as rows like any other. A family of budgets, one for each tenant, costs no
more than a single row, however large it is (`blocks`); the constraints besides are still rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from walras.equation import DEFER, surplus
from walras.errors import InfeasibleError, NotCleared, SettingsError
from walras.market.blocks import Blocks, Family, GroupUnbounded
from walras.market.clearing import Certificate, Clearing, Rounded, Usage, measure_usage
from walras.market.dual import Answer, Unbounded, Unstable, solve
from walras.market.mix import Mix
from walras.market.planes import MAX_ROWS, planes_of
from walras.prices import Constraint, Numeraire, Price, Prices, Scope
from walras.quantities import IntArray, Tasks, Uses
from walras.risk import FloatArray

ENOUGH = 32
"""Budgets of tenants from which they are a family."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is settled before prices are looked for."""

    declared: tuple[tuple[str, float], ...]
    numeraire: Numeraire
    defer: bool


def family_of(constraints: Sequence[Constraint]) -> list[int]:
    """Positions of the largest family: the same kind and resource, one for each tenant; none if it is small."""
    families: dict[tuple[str, str], dict[str, int]] = {}
    for position, c in enumerate(constraints):
        alone = c.scope.tenant is not None and c.scope == Scope(tenant=c.scope.tenant)
        if alone and not c.exactly and c.kind in ("budget", "risk_envelope"):
            family = families.setdefault((c.kind, c.resource), {})
            family.setdefault(str(c.scope.tenant), position)
    largest = max(families.values(), key=len, default={})
    return list(largest.values()) if len(largest) >= ENOUGH else []


def discover_family(
    tasks: Tasks,
    uses: Uses,
    constraints: Sequence[Constraint],
    family: Sequence[int],
    terms: Terms,
    start: FloatArray | None,
    on_pass: Callable[[int, float, FloatArray], None] | None,
) -> Clearing:
    """`shadow.discover` for constraints of which those at the positions `family` are one for each tenant."""
    began = time.perf_counter()
    own = [constraints[j] for j in family]
    others = [j for j in range(len(constraints)) if j not in set(family)]
    if any(constraints[j].kind == "portfolio_envelope" for j in others):
        raise SettingsError(f"a portfolio envelope cannot be priced beside {len(own)} budgets of tenants")
    if len(others) > MAX_ROWS:
        raise SettingsError(f"{len(others)} constraints besides the tenants'; at most {MAX_ROWS}")
    # The family's constraint of one tenant stands for its plane; no row is kept of it.
    planes, rows = planes_of(
        tasks, uses, [*(constraints[j] for j in others), own[0]], terms.declared, terms.numeraire
    )
    group, weight = _groups(tasks, own)
    bounds = np.array([c.bound for c in own])
    blocks = Blocks(
        planes, rows.first(len(others)), Family(group, int(rows.plane[-1]), bounds * weight), terms.defer
    )
    total = tasks.weight.sum()
    report = None if on_pass is None else (lambda number, gap, mu: on_pass(number, gap / total, mu))
    try:
        answer = solve(blocks, start=None if start is None else start[others], on_pass=report)
    except GroupUnbounded as stuck:
        raise _too_small(own[stuck.group], stuck.least / weight[stuck.group]) from None
    except Unbounded:
        raise InfeasibleError(
            "infeasible: the tenants' budgets can be met, but not together with the other constraints",
            constraint=" and ".join(constraints[j].name for j in others),
            bound=None,
            least=None,
        ) from None
    except Unstable:
        raise NotCleared("no box of prices was found that holds the answer", certificate=None) from None
    multipliers = np.zeros(len(constraints))
    multipliers[others] = answer.multipliers
    multipliers[list(family)] = blocks.at(answer.multipliers).price
    mix = Mix.of(blocks, answer)
    usage = _usage(tasks, uses, constraints, family, multipliers, group, mix)
    certificate = _certificate(blocks, answer, usage)
    prices = tuple(Price(c, float(m)) for c, m in zip(constraints, multipliers, strict=True))
    return Clearing(
        Prices(prices, terms.declared, terms.numeraire),
        certificate,
        _rounded(tasks, uses, constraints, family, group, blocks, answer, terms),
        usage,
        answer.steps,
        time.perf_counter() - began,
        blocks,
        answer,
    )


def _groups(tasks: Tasks, own: Sequence[Constraint]) -> tuple[IntArray, FloatArray]:
    """Which constraint of the family each task is under, −1 for none, (N,); and the weight under each."""
    labels = tasks.tenant
    if labels is None:
        raise SettingsError(
            f"a constraint names tenant '{own[0].scope.tenant}', but the records have no tenant"
        )
    of_name = {str(c.scope.tenant): g for g, c in enumerate(own)}
    of_code = np.array([of_name.get(name, -1) for name in labels.names] + [-1], dtype=np.int64)
    group = of_code[labels.codes]
    weight = np.bincount(group + 1, weights=tasks.weight, minlength=len(own) + 1)[1:]
    return group, weight.astype(np.float64)


def _too_small(row: Constraint, least: float) -> InfeasibleError:
    return InfeasibleError(
        f"infeasible: {row.name} cannot be met; the least bound that would do is {least:.4g} "
        "(raise it, or let tasks be deferred)",
        constraint=row.name,
        bound=row.bound,
        least=least,
    )


def _usage(
    tasks: Tasks,
    uses: Uses,
    constraints: Sequence[Constraint],
    family: Sequence[int],
    multipliers: FloatArray,
    group: IntArray,
    mix: Mix,
) -> tuple[Usage, ...]:
    """What is used of every constraint; of the family's in one go."""
    own, on = set(family), mix.use != DEFER
    task, mass = mix.task[on], tasks.weight[mix.task[on]] * mix.share[on]
    charge = constraints[family[0]].charge(uses)[task, mix.use[on]]
    size = len(family) + 1
    used, served = (
        np.bincount(group[task] + 1, weights=w, minlength=size)[1:] for w in (mass * charge, mass)
    )
    everybody = np.bincount(group + 1, weights=tasks.weight, minlength=size)[1:]
    everybody[everybody == 0] = 1.0
    g, out = 0, []
    for j, (row, mu) in enumerate(zip(constraints, multipliers, strict=True)):
        if j in own:
            out.append(Usage(row, float(used[g] / everybody[g]), float(mu), float(served[g] / everybody[g])))
            g += 1
        else:
            out.append(measure_usage(tasks, uses, row, mix, float(mu)))
    return tuple(out)


def _certificate(blocks: Blocks, answer: Answer, usage: Sequence[Usage]) -> Certificate:
    total = blocks.weight
    # What is idle, at its price: per task of its own scope, so no less than per task of all.
    used = [u for u in usage if u.multiplier > 0 and np.isfinite(u.used)]
    idle = [u.multiplier * abs(u.constraint.bound - u.used) for u in used]
    gap = abs(answer.dual - answer.objective) / total
    return Certificate(
        objective=answer.objective / total,
        dual=answer.dual / total,
        gap=gap,
        max_violation=max((u.excess for u in usage), default=0.0),
        residual=gap,
        slackness=max(idle, default=0.0),
        scale=answer.scale / total,
    )


def _rounded(
    tasks: Tasks,
    uses: Uses,
    constraints: Sequence[Constraint],
    family: Sequence[int],
    group: IntArray,
    blocks: Blocks,
    answer: Answer,
    terms: Terms,
) -> Rounded:
    """Everybody at the price just above each tenant's own: no tenant is over its budget; the other rows may be, a bit."""
    mix = Mix.of(blocks, answer)
    split = int((np.bincount(mix.task) > 1).sum())
    use = blocks.within_limits(answer.multipliers)
    whole = Mix.pure(use)
    usage = _usage(tasks, uses, constraints, family, np.zeros(len(constraints)), group, whole)
    on = np.flatnonzero(use != DEFER)
    chosen = uses.take(on).pick(use[on])
    worth = surplus(tasks.take(on), chosen, terms.declared, terms.numeraire)[:, 0]
    objective, total = float(tasks.weight[on] @ worth), blocks.weight
    return Rounded(
        objective / total,
        abs(answer.dual - objective) / total,
        max((u.excess for u in usage), default=0.0),
        split,
        np.arange(use.size),
        use,
    )
