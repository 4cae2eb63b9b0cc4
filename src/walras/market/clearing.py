"""What price discovery returns: prices, the allocation they support, and how well both are proved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from walras.equation import DEFER
from walras.market.blocks import Blocks
from walras.market.dual import Answer
from walras.market.envelopes import scenario_totals
from walras.market.memory import Memory
from walras.market.mix import Mix
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
