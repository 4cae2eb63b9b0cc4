"""Prices from constraints: multipliers with a certificate. [Z-3] [Z-CS]

`discover` takes tasks, uses and constraints and returns the prices at which every task, choosing for itself by [Z-1],
meets the constraints at the highest total surplus. Discrete uses clear only in the mixture (a few tasks split
between two uses), so the certificate is about the convexified market, and what rounding those few tasks costs is
reported apart [Z-W1].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from walras.equation import DEFER, Charge, after_charges, choose, surplus
from walras.errors import InfeasibleError, NotCleared
from walras.market.envelopes import (
    MAX_CUTS,
    at_their_densities,
    broken_envelopes,
    least_envelope,
    same_envelope,
    scenario_totals,
)
from walras.market.programme import Mix, Programme, Solution, clear
from walras.prices import Constraint, Numeraire, Price, Prices
from walras.quantities import USD, IntArray, Tasks, Uses
from walras.risk import FloatArray

GAP_TOLERANCE = 1e-6
"""Largest certified gap, relative to |objective| or to 1e-3 of the mean worth at stake, whichever is larger."""
ROUND_OFF = 1e-9
"""Slack below this share of what a row sums up is round-off: the row binds."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """How well the prices are proved. All in USD per task."""

    objective: float
    """Surplus of the recovered (mixed) allocation at declared prices."""
    dual: float
    """Upper bound on what any allocation within the constraints can reach."""
    gap: float
    """dual − objective, absolute."""
    max_violation: float
    """Largest excess over a bound, relative to the bound; 0 when every constraint is met."""
    residual: float
    """[Z-2] residual of the allocation: what tasks lose, on average, against their best response at the prices."""
    slackness: float
    """Largest μ_k · |slack_k|: 0 when every price belongs to a constraint that binds [Z-CS]."""
    scale: float
    """What the gap is to be compared with where the objective is near 0: mean |worth| at stake."""

    @property
    def relative_gap(self) -> float:
        return self.gap / max(abs(self.objective), 1e-3 * self.scale, 1e-300)


@dataclass(frozen=True, slots=True)
class Rounded:
    """The allocation after every split task was given to one use; USD per task."""

    use: IntArray
    """(N,), `DEFER` where none."""
    objective: float
    gap: float
    max_violation: float
    split_tasks: int
    """How many tasks were split in the mixture."""


@dataclass(frozen=True, slots=True)
class Usage:
    """A constraint, what the allocation takes out of it, in the bound's unit, and its price."""

    constraint: Constraint
    used: float
    """In the bound's unit; NaN for an SLA where nobody is served."""
    multiplier: float
    service_rate: float
    """Share of tasks in scope that were served at all: an SLA must not be met by deferring unseen."""

    @property
    def excess(self) -> float:
        """How far over the bound, relative to it (absolute where the bound is 0); 0 when within."""
        over = self.used - self.constraint.bound
        return max(0.0, over / self.constraint.bound if self.constraint.bound else over)


@dataclass(frozen=True, slots=True)
class Clearing:
    """Discovered prices, their certificate, and the allocation they support."""

    prices: Prices
    certificate: Certificate
    mix: Mix
    rounded: Rounded
    usage: tuple[Usage, ...]
    passes: int
    seconds: float

    @property
    def multipliers(self) -> FloatArray:
        """One per constraint, in the order given, (K,)."""
        return np.array([p.multiplier for p in self.prices.discovered])


OnPass = Callable[[int, float], None]
"""Called after each pass over the data with its number and the gap in USD per task."""


def discover(
    tasks: Tasks,
    uses: Uses,
    constraints: Sequence[Constraint] = (),
    *,
    defer: bool = True,
    numeraire: Numeraire = "usd",
    declared: Sequence[tuple[str, float]] = ((USD, 1.0),),
    start: FloatArray | None = None,
    on_pass: OnPass | None = None,
) -> Clearing:
    """Discover the price of every constraint.

    Args:
        tasks, uses: N tasks and their I uses.
        constraints: K rows; their prices come back in the same order.
        defer: whether a task may get no use at all, at surplus 0.
        numeraire: `usd`, or the paper's pure form `compute`.
        declared: USD per unit of each resource.
        start: multipliers of a neighbouring problem, (K,), to start from.

    Raises:
        InfeasibleError: no allocation meets the constraints; names one and the least bound that would do.
        NumeraireError: `numeraire="compute"` and no budget binds.
        NotCleared: the certificate did not reach `GAP_TOLERANCE`; carries the best one.
    """
    began = time.perf_counter()
    worth = surplus(tasks, uses, declared, numeraire)
    if not defer:
        choose(worth, defer=False)  # raises, naming the task, where nothing is allowed
    report = None if on_pass is None else (lambda number, gap, _mu: on_pass(number, gap))
    rows = [c for c in constraints if c.kind != "portfolio_envelope"]
    cuts: list[tuple[int, Constraint]] = []
    """Portfolio envelopes are met by linear pieces: (position in `constraints`, envelope with a density)."""
    programme = _programme(tasks, uses, worth, rows, defer)
    feasible: Mix | None = None
    solution: Solution | None = None
    passes = 0
    for _ in range(MAX_CUTS):
        pieces = [*rows, *(cut for _, cut in cuts)]
        programme = _extend(programme, tasks, uses, pieces)
        feasible = _feasible_mix(programme, tasks, uses, pieces, feasible)
        if solution is not None:
            start = np.append(solution.multipliers, np.zeros(len(pieces) - solution.multipliers.size))
        elif start is not None and start.size != len(pieces):
            start = None
        solution = clear(programme, feasible=feasible, start=start, on_pass=report)
        passes += solution.passes
        broken = broken_envelopes(tasks, uses, constraints, solution.mix)
        if not broken:
            break
        cuts += broken
    assert solution is not None
    solution = _zero_slack_prices(programme, solution)
    constraints = at_their_densities(tasks, uses, constraints, solution.mix)
    prices = Prices(_prices(constraints, rows, cuts, solution.multipliers), tuple(declared), numeraire)
    if numeraire == "compute":
        prices.normalised()  # raises when compute has no price
    usage = tuple(
        measure_usage(tasks, uses, p.constraint, solution.mix, p.multiplier) for p in prices.discovered
    )
    certificate = _certificate(programme, solution, usage)
    if certificate.relative_gap > GAP_TOLERANCE or certificate.max_violation > GAP_TOLERANCE:
        raise NotCleared(
            f"prices were not certified: gap {certificate.gap:.2e} USD per task, violation "
            f"{certificate.max_violation:.1e} after {passes} passes",
            certificate=certificate,
        )
    return Clearing(
        prices,
        certificate,
        solution.mix,
        _round(programme, solution),
        usage,
        passes,
        time.perf_counter() - began,
    )


def _programme(
    tasks: Tasks, uses: Uses, worth: FloatArray, constraints: Sequence[Constraint], defer: bool
) -> Programme:
    charges = [Charge.of(c, tasks, uses) for c in constraints]
    limits = np.array([_limit(c, ch, tasks) for c, ch in zip(constraints, charges, strict=True)])
    return Programme(worth, charges, limits, tasks.weight, defer)


def _limit(constraint: Constraint, charge: Charge, tasks: Tasks) -> float:
    weight = tasks.weight if charge.tasks is None else tasks.weight[charge.tasks]
    return constraint.per_task_limit * float(weight.sum())


def _extend(programme: Programme, tasks: Tasks, uses: Uses, constraints: Sequence[Constraint]) -> Programme:
    """The programme with charges for the constraints it does not hold yet."""
    new = constraints[len(programme.charges) :]
    if not new:
        return programme
    more = _programme(tasks, uses, programme.worth, new, programme.defer)
    return replace(
        programme,
        charges=[*programme.charges, *more.charges],
        limits=np.concatenate((programme.limits, more.limits)),
    )


# --- feasibility ------------------------------------------------------------------------------------------------


def _feasible_mix(
    programme: Programme, tasks: Tasks, uses: Uses, constraints: Sequence[Constraint], known: Mix | None
) -> Mix | None:
    """An allocation within all limits; None when deferring everywhere is one.

    Rows are met one after another, hard ones first: given an allocation within the rows so far, take the one that
    uses least of the next row. If even that is too much, the row and that least are what the user needs to know.
    """
    if programme.defer:
        return None
    order = sorted(range(len(constraints)), key=lambda k: not constraints[k].hard)
    mix = known or Mix.pure(choose(programme.worth, defer=False).use)
    for position, k in enumerate(order):
        met = order[:position]
        if _within(programme, mix, [*met, k]):
            continue
        cheapest = np.full(programme.worth.shape, -np.inf)
        rows = programme.charges[k].tasks
        cost = np.zeros(programme.worth.shape)
        cost[slice(None) if rows is None else rows] = programme.charges[k].per_use
        np.copyto(cheapest, -cost, where=np.isfinite(programme.worth))
        least = replace(
            programme,
            worth=cheapest,
            charges=[programme.charges[j] for j in met],
            limits=programme.limits[met],
        )
        solution = clear(least, feasible=mix)  # which is within the rows met so far
        if _within(programme, solution.mix, [k]):
            mix = solution.mix
            continue
        if constraints[k].kind == "portfolio_envelope":
            # That was the least of one linear piece; with the bound, all pieces of the envelope would move.
            met = [j for j in met if not same_envelope(constraints[j], constraints[k])]
            least_bound = least_envelope(programme, tasks, uses, constraints[k], met, mix)
        else:
            weight = float(programme.weight.sum() if rows is None else programme.weight[rows].sum())
            # An SLA's charge is measured against its bound, and every task in scope is served.
            least_bound = -solution.objective / weight + programme.charges[k].offset
        raise _infeasible(constraints[k], [constraints[j] for j in met], least_bound)
    return mix


def _within(programme: Programme, mix: Mix, rows: Sequence[int]) -> bool:
    excess = mix.usage(programme) - programme.limits
    small = ROUND_OFF * mix.magnitude(programme)
    return all(excess[k] <= small[k] for k in rows)


def _infeasible(row: Constraint, met: Sequence[Constraint], least: float) -> InfeasibleError:
    given = f" given {' and '.join(dict.fromkeys(c.name for c in met))}" if met else ""
    return InfeasibleError(
        f"infeasible: {row.name} cannot be met{given}; the least bound that would do is {_round_up(least):.4g} "
        f"({'a hard constraint: it is not relaxed' if row.hard else 'raise it, or let tasks be deferred'})",
        constraint=row.name,
        bound=row.bound,
        least=least,
    )


def _round_up(bound: float) -> float:
    """To four digits, so that the number people read is one that works."""
    if bound <= 0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(bound)) - 3)
    return float(np.ceil(bound / unit * (1 - 1e-12)) * unit)


def _prices(
    constraints: Sequence[Constraint],
    rows: Sequence[Constraint],
    cuts: Sequence[tuple[int, Constraint]],
    multipliers: FloatArray,
) -> tuple[Price, ...]:
    """One price per constraint; an envelope's pieces add up to one price with their mean density."""
    plain = iter(multipliers[: len(rows)])
    out = []
    for position, constraint in enumerate(constraints):
        if constraint.kind != "portfolio_envelope":
            out.append(Price(constraint, float(next(plain))))
            continue
        mine = [
            (m, cut.density)
            for m, (p, cut) in zip(multipliers[len(rows) :], cuts, strict=True)
            if p == position
        ]
        total = float(sum(m for m, _ in mine))
        if total > 0:
            mean = sum(m * np.asarray(density) for m, density in mine) / total
            constraint = replace(constraint, density=tuple(map(float, mean)))  # noqa: PLW2901
        out.append(Price(constraint, total))
    return tuple(out)


# --- certificate --------------------------------------------------------------------------------------------------


def _zero_slack_prices(programme: Programme, solution: Solution) -> Solution:
    """Multipliers of rows with slack set to exactly 0 [Z-CS], and the bound recomputed at what remains."""
    slack = programme.limits - solution.usage
    tight = slack <= ROUND_OFF * np.maximum(np.abs(programme.limits), solution.mix.magnitude(programme))
    # A scope without tasks has no use for a price, such as one it was started from.
    idle = [charge.tasks is not None and not charge.tasks.size for charge in programme.charges]
    mu = np.where(tight & ~np.array(idle, dtype=np.bool_), solution.multipliers, 0.0)
    if (mu == solution.multipliers).all():
        return solution
    values = after_charges(programme.worth, programme.charges, mu)
    dual = float(
        np.sum(programme.weight * choose(values, defer=programme.defer).value) + mu @ programme.limits
    )
    return replace(solution, multipliers=mu, dual=dual)


def measure_usage(
    tasks: Tasks, uses: Uses, constraint: Constraint, mix: Mix, multiplier: float = 0.0
) -> Usage:
    """What an allocation takes out of a constraint, in the bound's own unit."""
    members = constraint.scope.members(tasks)
    inside = np.ones(len(tasks), dtype=np.bool_) if members is None else members
    mass = tasks.weight[mix.task] * mix.share * inside[mix.task]
    everybody = float(tasks.weight[inside].sum()) or 1.0
    on = mix.use != DEFER
    served = float(mass[on].sum())
    if constraint.kind == "portfolio_envelope":
        assert constraint.measure is not None
        totals = scenario_totals(tasks, uses, constraint, mix)
        used = float(constraint.measure.density(totals) @ totals)
    else:
        # An SLA's charge is measured against its bound and per served task; add the bound back for people.
        per_use = constraint.charge(uses)[mix.task[on], mix.use[on]]
        total = float(np.sum(mass[on] * per_use))
        sla = constraint.layer == "latency"
        average = total / served + constraint.bound if served else math.nan
        used = average if sla else total / everybody
    return Usage(constraint, used, multiplier, served / everybody)


def _certificate(programme: Programme, solution: Solution, usage: Sequence[Usage]) -> Certificate:
    total = float(programme.weight.sum())
    worth = np.where(np.isfinite(programme.worth), np.abs(programme.worth), 0.0).max(axis=1)
    slack = programme.limits - solution.usage
    mu = solution.multipliers
    # dual = Σ w·best + μ·limit and objective = Σ w·got + μ·usage: what is left of the gap besides the slack.
    residual = solution.dual - solution.objective - float(mu @ slack)
    return Certificate(
        objective=solution.objective / total,
        dual=solution.dual / total,
        gap=abs(solution.dual - solution.objective) / total,
        max_violation=max((u.excess for u in usage), default=0.0),
        residual=abs(residual) / total,
        slackness=float(np.max(mu * np.abs(slack), initial=0.0)) / total,
        scale=float(np.sum(programme.weight * worth)) / total,
    )


def _round(programme: Programme, solution: Solution) -> Rounded:
    """Give every split task to one of its uses: the best that still fits, else the one that overshoots least."""
    mix = solution.mix
    split = np.bincount(mix.task)[mix.task] > 1
    use = np.full(programme.weight.size, DEFER, dtype=np.int64)
    use[mix.task[~split]] = mix.use[~split]
    tasks = np.unique(mix.task[split])
    used = Mix(mix.task[~split], mix.use[~split], mix.share[~split]).usage(programme)
    room = np.maximum(np.abs(programme.limits), mix.magnitude(programme)) + 1e-300
    for task in tasks:
        options = mix.use[mix.task == task]
        at = np.full(options.size, task)
        charge = programme.weight[task] * np.array(
            [programme.charge_at(k, at, options) for k in range(len(programme.charges))]
        ).reshape(-1, options.size)
        excess = (np.maximum(used[:, None] + charge - programme.limits[:, None], 0.0) / room[:, None]).sum(
            axis=0
        )
        best = np.lexsort((-programme.worth_at(at, options), excess))[0]
        use[task] = options[best]
        used += charge[:, best]
    whole = Mix.pure(use)
    objective = whole.objective(programme)
    total = float(programme.weight.sum())
    over = (whole.usage(programme) - programme.limits) / room
    return Rounded(
        use,
        objective / total,
        abs(solution.dual - objective) / total,
        float(np.max(over, initial=0.0)),
        int(tasks.size),
    )
