"""What price discovery returns: prices, the allocation they support, and how well both are proved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from walras.equation import DEFER
from walras.market.blocks import Blocks
from walras.market.dual import Answer
from walras.market.envelopes import scenario_totals
from walras.market.memory import Memory
from walras.market.mix import Mix
from walras.market.planes import Planes, Rows, tables
from walras.prices import Constraint, Prices
from walras.quantities import IntArray, Tasks, Uses
from walras.risk import FloatArray


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

    objective: float
    gap: float
    max_violation: float
    split_tasks: int
    """How many tasks were split in the mixture."""
    task: IntArray
    """The tasks that were split, and what each got."""
    given: IntArray


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
        if self.constraint.exactly:
            over = abs(over)
        return max(0.0, over / self.constraint.bound if self.constraint.bound else over)


@dataclass(frozen=True)
class Clearing:
    """Discovered prices, their certificate, and the allocation they support."""

    prices: Prices
    certificate: Certificate
    rounded: Rounded
    usage: tuple[Usage, ...]
    passes: int
    """Passes over all of the data."""
    seconds: float
    market: Memory | Blocks = field(repr=False)
    answer: Answer = field(repr=False)

    @property
    def multipliers(self) -> FloatArray:
        """One per constraint, in the order given, (K,)."""
        return np.array([p.multiplier for p in self.prices.discovered])

    @cached_property
    def mix(self) -> Mix:
        """The allocation, spelled out for every task."""
        return Mix.of(self.market, self.answer)

    @cached_property
    def use(self) -> IntArray:
        """The allocation without mixtures, (N,), `DEFER` where none."""
        use = np.empty(len(self.market), dtype=np.int64)
        use[self.mix.task] = self.mix.use
        use[self.rounded.task] = self.rounded.given
        return use


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


def usage_of(constraints: Sequence[Constraint], answer: Answer, weight: FloatArray) -> Iterator[Usage]:
    """What an answer takes out of plain rows, in the bounds' units; `weight` (K,) is that of the tasks in scope."""
    for k, constraint in enumerate(constraints):
        served, used = float(answer.served[k]), float(answer.usage[k])
        if constraint.layer == "latency":
            # Charged against its bound and per served task; the bound is added back for people.
            used = used / served + constraint.bound if served else math.nan
        else:
            used = used / weight[k]
        yield Usage(constraint, float(used), float(answer.multipliers[k]), served / float(weight[k]))


def size_of(rows: Rows, weight: float, answer: Answer) -> FloatArray:
    """(K,) what a row's slack is small or large against: its limit, or what it sums up, an SLA's bound included."""
    return np.maximum(np.abs(rows.limits), answer.size + rows.offset * weight) + 1e-300


def certificate_of(rows: Rows, weight: float, answer: Answer, usage: Sequence[Usage]) -> Certificate:
    """How well an answer is proved; `weight` is that of all tasks."""
    mu, slack = answer.multipliers, rows.limits - answer.usage
    # dual = Σ w·best + μ·limit and objective = Σ w·got + μ·usage: what is left of the gap besides the slack.
    residual = answer.dual - answer.objective - float(mu @ slack)
    return Certificate(
        objective=answer.objective / weight,
        dual=answer.dual / weight,
        gap=abs(answer.dual - answer.objective) / weight,
        max_violation=max((u.excess for u in usage), default=0.0),
        residual=abs(residual) / weight,
        slackness=float(np.max(np.abs(mu * slack), initial=0.0)) / weight,
        scale=answer.scale / weight,
    )


GREEDY = 2_000
"""Split tasks rounded one by one, each with an eye on the rows; the others are dealt out evenly first."""


def round_off(rows: Rows, weight: float, answer: Answer, market: Memory | None = None) -> Rounded | None:
    """Give every split task to one of its uses: the best that still fits, else the one that overshoots least.

    None where best responses are mixed and there is no market at hand to ask them.
    """
    if len(answer.at) > 1 and market is None:
        return None
    split, near = _split_tasks(answer, market)
    tasks = np.unique(split.task)
    own_weight = near.weight if near.weight.size > 1 else np.repeat(near.weight, len(near))
    worth, charges, _ = tables(near, rows)
    row = np.searchsorted(tasks, split.task)
    mass = own_weight[row] * split.share
    on = split.use != DEFER
    limits = rows.limits
    used = answer.usage - charges[:, row[on], split.use[on]] @ mass[on]
    objective = answer.objective - float(worth[row[on], split.use[on]] @ mass[on])
    room = size_of(rows, weight, answer)
    starts = np.concatenate((np.flatnonzero(np.diff(row, prepend=-1)), [row.size]))
    given = np.full(tasks.size, DEFER, dtype=np.int64)
    for at in range(tasks.size):
        own = slice(starts[at], starts[at + 1])
        options = split.use[own]
        served = options != DEFER
        charge = own_weight[at] * np.where(served, charges[:, at, options], 0.0)
        value = own_weight[at] * np.where(served, worth[at, options], 0.0)
        if at < tasks.size - GREEDY:
            # The golden ratio deals shares out evenly, whatever the order of the tasks.
            best = int(np.searchsorted(np.cumsum(split.share[own]), (at * 0.6180339887498949) % 1.0))
            best = min(best, options.size - 1)
        else:
            excess = (np.maximum(used[:, None] + charge - limits[:, None], 0.0) / room[:, None]).sum(axis=0)
            best = int(np.lexsort((-value, excess))[0])
        given[at] = options[best]
        used += charge[:, best]
        objective += float(value[best])
    over = np.where(rows.exactly, np.abs(used - limits), used - limits) / room
    violation, gap = float(np.max(over, initial=0.0)), abs(answer.dual - objective)
    return Rounded(objective / weight, gap / weight, violation, tasks.size, tasks, given)


def _split_tasks(answer: Answer, market: Memory | None) -> tuple[Mix, Planes]:
    """The triples of the tasks that have more than one use, and their columns."""
    among = answer.split.among
    if market is not None and len(answer.at) > 1:
        mix = Mix.of(market, answer)
    else:
        at = np.searchsorted(among, answer.split.task)
        given = np.bincount(at, weights=answer.split.share, minlength=among.size).astype(np.float64)
        mix = Mix.merged(
            np.concatenate((answer.split.task, among)),
            np.concatenate((answer.split.use, np.full(among.size, DEFER))),
            np.concatenate((answer.split.share, 1.0 - given)),
        )
    tasks, counts = np.unique(mix.task, return_counts=True)
    several = tasks[counts > 1]
    keep = np.isin(mix.task, several)
    split = Mix(mix.task[keep], mix.use[keep], mix.share[keep])
    if market is not None:
        return split, market.planes.take(several)
    assert answer.near is not None
    return split, answer.near.planes.take(np.searchsorted(among, several))
