"""The operator's linear programme, reduced to what a solver needs. [Z-3]

    maximise   Σ_x w_x Σ_i share_xi · worth_xi
    subject to Σ_x w_x Σ_i share_xi · charge_kxi ≤ limit_k   for every constraint k
               Σ_i share_xi ≤ 1 (or = 1 without deferring),   share ≥ 0

It has N·I shares but only a handful of prices. `clear` solves it exactly by *sifting*: prices
from a quarter of the tasks (found the same way) are almost right; at them almost every task has one use that is clearly
best, so only the near-ties go into a small LP (HiGHS). Its prices are tested on all tasks, and uses that turn out to be
better than thought are added, until none is. The test is one pass over the columns and gives an upper bound (the
Lagrangian dual), so the answer is certified however it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, hstack

from walras.equation import DEFER, Charge, after_charges, choose
from walras.quantities import IntArray
from walras.risk import FloatArray

SMALL = 4_000
"""Columns below which the whole programme goes to HiGHS at once."""
NEAR_TIES = 16.0
"""Tasks with more than one use in the reduced LP: this many times √(N·K), as prices from a sample err by 1/√N."""
MAX_PASSES = 100


@dataclass(frozen=True, slots=True)
class Programme:
    """The data of the LP above; `limits` (K,) are totals over tasks."""

    worth: FloatArray
    charges: Sequence[Charge]
    limits: FloatArray
    weight: FloatArray
    defer: bool = True

    def charge_at(self, k: int, task: IntArray, use: IntArray) -> FloatArray:
        """Charge of constraint k on (task, use) pairs, (M,); 0 for deferring and outside the scope."""
        charge = self.charges[k]
        row, inside = task, use != DEFER
        if charge.tasks is not None:
            row = np.searchsorted(charge.tasks, task)
            row[row == charge.tasks.size] = 0
            inside = (
                inside & (charge.tasks.size > 0) & (charge.tasks[row] == task)
                if charge.tasks.size
                else inside & False
            )
        out = np.zeros(task.shape)
        out[inside] = charge.per_use[row[inside], use[inside]]
        return out

    def worth_at(self, task: IntArray, use: IntArray) -> FloatArray:
        """Worth of (task, use) pairs, (M,); 0 for deferring."""
        return np.where(use == DEFER, 0.0, self.worth[task, use])

    def sample(self, rows: IntArray) -> Programme:
        """The same programme on some tasks, limits scaled to their share of the weight in each constraint's scope."""
        weight = self.weight[rows]
        charges, limits = [], np.empty(len(self.charges))
        for k, charge in enumerate(self.charges):
            if charge.tasks is None:
                charges.append(Charge(charge.per_use[rows], None))
                limits[k] = self.limits[k] * weight.sum() / self.weight.sum()
            else:
                inside = np.flatnonzero(np.isin(rows, charge.tasks, assume_unique=True))
                at = np.searchsorted(charge.tasks, rows[inside])
                charges.append(Charge(charge.per_use[at], inside))
                # A scope may hold no task at all (a tenant who was idle): its weight is then 0, and so is its share.
                limits[k] = self.limits[k] * weight[inside].sum() / (self.weight[charge.tasks].sum() or 1.0)
        return Programme(self.worth[rows], charges, limits, weight, self.defer)


@dataclass(slots=True)
class Mix:
    """A (mixed) allocation as (task, use, share) triples sorted by task; shares of a task sum to 1."""

    task: IntArray
    use: IntArray
    """Column, or `DEFER`."""
    share: FloatArray

    @classmethod
    def pure(cls, use: IntArray) -> Mix:
        return cls(np.arange(use.size), use, np.ones(use.size))

    def total(self, programme: Programme, amounts: FloatArray) -> float:
        return float(np.sum(programme.weight[self.task] * self.share * amounts))

    def objective(self, programme: Programme) -> float:
        return self.total(programme, programme.worth_at(self.task, self.use))

    def usage(self, programme: Programme) -> FloatArray:
        """What it takes out of each constraint, (K,) totals."""
        return np.array(
            [
                self.total(programme, programme.charge_at(k, self.task, self.use))
                for k in range(len(programme.charges))
            ]
        )

    def magnitude(self, programme: Programme) -> FloatArray:
        """Σ w·share·|charge|, (K,): what a row's slack is small or large against (its limit may be 0)."""
        charged = (np.abs(programme.charge_at(k, self.task, self.use)) for k in range(len(programme.charges)))
        return np.array([self.total(programme, charge) for charge in charged])


@dataclass(slots=True)
class Solution:
    """Multipliers with a lower (`objective`, by `mix`) and an upper bound (`dual`) on the programme's value, totals."""

    multipliers: FloatArray
    mix: Mix
    objective: float
    dual: float
    usage: FloatArray
    passes: int


Progress = Callable[[int, float, FloatArray], None]
"""Called after each pass with its number, the gap so far and the multipliers."""


@dataclass(slots=True)
class _Columns:
    """(task, use) pairs in the reduced LP, unique, sorted by task then use."""

    width: int
    keys: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def add(self, task: IntArray, use: IntArray) -> None:
        self.keys = np.union1d(self.keys, task * self.width + (use + 1))

    def missing(self, task: IntArray, use: IntArray) -> IntArray:
        """The tasks whose pair is not there yet."""
        keys = task * self.width + (use + 1)
        at = np.searchsorted(self.keys, keys)
        at[at == self.keys.size] = 0
        return task[self.keys[at] != keys] if self.keys.size else task

    @property
    def pairs(self) -> tuple[IntArray, IntArray]:
        return self.keys // self.width, self.keys % self.width - 1


def clear(
    programme: Programme,
    *,
    feasible: Mix | None = None,
    start: FloatArray | None = None,
    tolerance: float = 1e-11,
    on_pass: Progress | None = None,
) -> Solution:
    """Solve the programme by sifting.

    Args:
        feasible: an allocation known to be feasible; deferring everywhere when None, so it may be omitted only when
            deferring is open and every limit is ≥ 0.
        start: multipliers to start from, (K,), e.g. those of a neighbouring problem.
        tolerance: stop when dual − objective ≤ tolerance · (Σ w·|best worth|), far below any statistical error.
    """
    n, i = programme.worth.shape
    k = len(programme.charges)
    scale = _scale(programme)
    at_zero = _without_prices(programme)
    if at_zero is not None:
        return at_zero
    feasible = feasible or Mix.pure(np.full(n, DEFER, dtype=np.int64))
    columns = _Columns(i + 1)
    mu = np.zeros(k) if start is None else np.asarray(start, dtype=np.float64)
    whole = n * i <= SMALL
    if whole:
        columns.add(*_all_columns(programme))
    elif start is None:
        mu = _sample_prices(programme, feasible, tolerance)
    ties = int(NEAR_TIES * np.sqrt(n * k))
    # The upper bound comes from the best pass; the lower one from the latest reduced LP, which only improves.
    best_dual, best_mu = np.inf, mu
    solution: Solution | None = None
    for number in range(1, MAX_PASSES + 1):
        values = after_charges(programme.worth, programme.charges, mu)
        chosen = choose(values, defer=programme.defer)
        dual = float(np.sum(programme.weight * chosen.value) + mu @ programme.limits)
        missing = columns.missing(np.arange(n), chosen.use)
        if dual < best_dual:
            best_dual, best_mu = dual, mu
        if solution is not None:
            solution.multipliers, solution.dual, solution.passes = best_mu, best_dual, number
            if on_pass:
                on_pass(number, (best_dual - solution.objective) / programme.weight.sum(), mu)
            if best_dual - solution.objective <= tolerance * scale or not missing.size:
                return solution
        if not whole and best_mu is mu:
            columns.add(*_near_ties(programme, values, chosen.value, ties))
        if number == 1 or missing.size <= 2 * ties:
            columns.add(missing, chosen.use[missing])
        else:
            # The reduced LP was too narrow and its prices ran away: widen it around the best prices so far.
            ties *= 4
            values = after_charges(programme.worth, programme.charges, best_mu)
            chosen = choose(values, defer=programme.defer)
            columns.add(*_near_ties(programme, values, chosen.value, ties))
        mu, mix = _reduced_lp(programme, columns, feasible)
        solution = Solution(best_mu, mix, mix.objective(programme), best_dual, mix.usage(programme), number)
    assert solution is not None
    return solution


def _scale(programme: Programme) -> float:
    best = np.where(np.isfinite(programme.worth), np.abs(programme.worth), 0.0).max(axis=1)
    return float(np.sum(programme.weight * best)) or 1.0


def _without_prices(programme: Programme) -> Solution | None:
    """The allocation nobody has to pay for, if it happens to be feasible: then every μ is exactly 0 [Z-CS]."""
    chosen = choose(programme.worth, defer=programme.defer)
    mix = Mix.pure(chosen.use)
    usage = mix.usage(programme)
    if (usage > programme.limits).any():
        return None
    objective = mix.objective(programme)
    return Solution(np.zeros(len(programme.charges)), mix, objective, objective, usage, 1)


def _all_columns(programme: Programme) -> tuple[IntArray, IntArray]:
    task, use = np.nonzero(np.isfinite(programme.worth))
    if programme.defer:
        n = programme.worth.shape[0]
        task, use = np.concatenate((task, np.arange(n))), np.concatenate((use, np.full(n, DEFER)))
    return task, use


def _sample_prices(programme: Programme, feasible: Mix, tolerance: float) -> FloatArray:
    """Prices of the programme on a quarter of the tasks: a good place to start, nothing more."""
    n = programme.weight.size
    rows = np.sort(np.random.default_rng(n).choice(n, n // 4, replace=False))
    inside = np.isin(feasible.task, rows)
    part = Mix(np.searchsorted(rows, feasible.task[inside]), feasible.use[inside], feasible.share[inside])
    small = programme.sample(rows)
    # The sample may be unable to meet its part of the limits by the feasible allocation: let it use what that takes.
    small = replace(small, limits=np.maximum(small.limits, part.usage(small)))
    return clear(small, feasible=part, tolerance=tolerance).multipliers


def _near_ties(
    programme: Programme, values: FloatArray, best: FloatArray, ties: int
) -> tuple[IntArray, IntArray]:
    """Columns within reach of the best one, for the `ties` tasks that are closest to changing their mind."""
    ordered = values if values.shape[1] == 1 else np.partition(values, -2, axis=1)[:, -2:]
    runner_up = (
        np.where(best > ordered[:, -1], ordered[:, -1], ordered[:, 0]) if programme.defer else ordered[:, 0]
    )
    if programme.defer:
        runner_up = np.where(best > 0, np.maximum(runner_up, 0.0), runner_up)
    margin = best - runner_up
    finite = np.flatnonzero(np.isfinite(margin))
    if finite.size <= ties:
        close, reach = finite, np.inf
    else:
        at = np.argpartition(margin[finite], ties)
        close, reach = finite[at[:ties]], margin[finite[at[ties]]]
    near = values[close]
    task, use = np.nonzero(np.isfinite(near) & (near >= (best[close] - reach)[:, None]))
    task = close[task]
    if programme.defer:
        may_defer = close[best[close] <= reach]
        task, use = np.concatenate((task, may_defer)), np.concatenate((use, np.full(may_defer.size, DEFER)))
    return task, use


def _reduced_lp(programme: Programme, columns: _Columns, feasible: Mix) -> tuple[FloatArray, Mix]:
    """The programme restricted to `columns` and to mixing with `feasible`; exact multipliers and a vertex mix.

    A task with one column is fixed and only moves the right-hand side. One extra variable θ mixes in the feasible
    allocation as a whole, which keeps the LP feasible however few columns there are.
    """
    task, use = columns.pairs
    weight = programme.weight[task]
    count = np.bincount(task, minlength=programme.weight.size)
    free = count[task] > 1
    fixed = ~free
    k = len(programme.charges)
    charge = np.array([programme.charge_at(j, task, use) for j in range(k)]) * weight
    worth = programme.worth_at(task, use) * weight
    base_worth, base_charge = worth[fixed].sum(), charge[:, fixed].sum(axis=1)
    theta_worth = feasible.objective(programme) - base_worth
    theta_charge = feasible.usage(programme) - base_charge

    # The feasible allocation may exceed a limit by round-off, which must not make the LP infeasible.
    limits = np.maximum(programme.limits, feasible.usage(programme))
    # Rows and objective are scaled to order one: HiGHS tolerances are absolute.
    row_scale = np.maximum(np.abs(charge[:, free]).max(axis=1, initial=0.0), 1e-300)
    worth_scale = max(np.abs(worth[free]).max(initial=0.0), 1e-300)
    tasks_free, position = np.unique(task[free], return_inverse=True)
    m = int(free.sum())
    ones: Any = csr_matrix((np.ones(m), (position, np.arange(m))), shape=(tasks_free.size, m))
    answer = linprog(
        -np.append(worth[free], theta_worth) / worth_scale,
        A_ub=np.column_stack((charge[:, free], theta_charge)) / row_scale[:, None],
        b_ub=(limits - base_charge) / row_scale,
        A_eq=hstack([ones, csr_matrix(np.ones((tasks_free.size, 1)))]) if tasks_free.size else None,
        b_eq=np.ones(tasks_free.size) if tasks_free.size else None,
        bounds=(0, 1),
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if answer.x is None:
        raise RuntimeError(f"the reduced programme was not solved: {answer.message}")
    mu = np.maximum(-answer.ineqlin.marginals, 0.0) * worth_scale / row_scale
    share = np.ones(task.size)
    share[free] = np.maximum(answer.x[:-1], 0.0)
    return mu, _mix(task, use, share, float(answer.x[-1]), feasible)


def _mix(task: IntArray, use: IntArray, share: FloatArray, theta: float, feasible: Mix) -> Mix:
    """(1 − θ) of the columns' shares plus θ of the feasible mix, each task renormalised to exactly 1."""
    if theta > 1e-12:
        fixed = np.bincount(task)[task] == 1
        share = np.where(fixed, share * (1.0 - theta), share)
        task = np.concatenate((task, feasible.task))
        use = np.concatenate((use, feasible.use))
        share = np.concatenate((share, theta * feasible.share))
    keep = share > 1e-12
    task, use, share = task[keep], use[keep], share[keep]
    order = np.lexsort((use, task))
    task, use, share = task[order], use[order], share[order]
    return Mix(task, use, share / np.bincount(task, weights=share)[task])
