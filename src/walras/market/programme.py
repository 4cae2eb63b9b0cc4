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

from walras.equation import DEFER, Charge, Choice, after_charges, choose
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
                charges.append(replace(charge, per_use=charge.per_use[rows]))
                limits[k] = self.limits[k] * weight.sum() / self.weight.sum()
            else:
                inside = np.flatnonzero(np.isin(rows, charge.tasks, assume_unique=True))
                at = np.searchsorted(charge.tasks, rows[inside])
                charges.append(replace(charge, per_use=charge.per_use[at], tasks=inside))
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
        """Σ w·share·|charge|, (K,), an SLA's bound included: what a row's slack is small or large against."""
        out = np.empty(len(programme.charges))
        for k, charge in enumerate(programme.charges):
            weight = programme.weight if charge.tasks is None else programme.weight[charge.tasks]
            charged = np.abs(programme.charge_at(k, self.task, self.use))
            out[k] = self.total(programme, charged) + charge.offset * float(weight.sum())
        return out


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
    best = _Pass.at(programme, mu)
    here, passes = best, 1
    solution: Solution | None = None
    while passes < MAX_PASSES:
        missing = columns.missing(np.arange(n), here.chosen.use)
        if solution is not None:
            solution.multipliers, solution.dual, solution.passes = best.mu, best.dual, passes
            if on_pass:
                on_pass(passes, (best.dual - solution.objective) / programme.weight.sum(), here.mu)
            if best.dual - solution.objective <= tolerance * scale or not missing.size:
                break
        if solution is not None and missing.size > 2 * ties:
            # The reduced LP was too narrow and its prices ran away: find better ones first, then look around them.
            here, more = _descend(programme, best)
            passes, ties, missing = passes + more, 2 * ties, columns.missing(np.arange(n), here.chosen.use)
        if not whole and here.dual <= best.dual:
            columns.add(*_near_ties(programme, here, ties))
        columns.add(missing, here.chosen.use[missing])
        best = min(best, here, key=lambda p: p.dual)
        mu, mix = _reduced_lp(programme, columns, feasible)
        here, passes = _Pass.at(programme, mu), passes + 1
        best = min(best, here, key=lambda p: p.dual)
        solution = Solution(best.mu, mix, mix.objective(programme), best.dual, mix.usage(programme), passes)
    assert solution is not None
    return _at_a_vertex(programme, solution)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over the tasks at given prices: everybody's best response, and the bound it proves."""

    mu: FloatArray
    values: FloatArray
    chosen: Choice
    dual: float

    @classmethod
    def at(cls, programme: Programme, mu: FloatArray) -> _Pass:
        values = after_charges(programme.worth, programme.charges, mu)
        chosen = choose(values, defer=programme.defer)
        return cls(mu, values, chosen, float(np.sum(programme.weight * chosen.value) + mu @ programme.limits))

    def slope(self, programme: Programme) -> FloatArray:
        """Subgradient of the dual: what is left of each limit, (K,)."""
        return programme.limits - Mix.pure(self.chosen.use).usage(programme)


def _descend(programme: Programme, start: _Pass) -> tuple[_Pass, int]:
    """Lower the dual by cutting planes in a trust region (Kelley 1960, boxed); the best pass, and how many it took.

    Each pass gives a plane below the dual. The next prices minimise the planes within a box that grows while they
    predict well and shrinks when they do not.
    """
    best, planes = start, [(start.dual, start.slope(programme), start.mu)]
    radius = 0.1 * np.maximum(_price_scale(programme, start), 1e-12)
    passes, k = 0, start.mu.size
    while passes < 8 + 4 * k:
        slopes = np.array([g for _, g, _ in planes])
        offsets = np.array([d - g @ m for d, g, m in planes])
        scale = max(abs(best.dual), 1e-300)
        box = [(max(0.0, m - r), m + r) for m, r in zip(best.mu, radius, strict=True)]
        model = linprog(
            np.append(np.zeros(k), 1.0),
            A_ub=np.column_stack((slopes / scale, -np.ones(len(planes)))),
            b_ub=-offsets / scale,
            bounds=[*box, (None, None)],
        )
        if model.x is None or best.dual - model.x[-1] * scale <= 1e-7 * scale:
            break
        here, passes = _Pass.at(programme, model.x[:-1]), passes + 1
        planes.append((here.dual, here.slope(programme), here.mu))
        good = best.dual - here.dual >= 0.1 * (best.dual - model.x[-1] * scale)
        radius = radius * (2.0 if good else 0.3)
        best = min(best, here, key=lambda p: p.dual)
    return best, passes


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
    """Every column that could be used. Where deferring is open, one that earns nothing and frees nothing could not: left
    out, because a single absurd amount would spoil the scale of the LP."""
    useful = np.isfinite(programme.worth)
    if programme.defer:
        frees = np.zeros(useful.shape, dtype=np.bool_)
        for charge in programme.charges:
            rows = slice(None) if charge.tasks is None else charge.tasks
            frees[rows] |= charge.per_use < 0
        useful = useful & ((programme.worth > 0) | frees)
    task, use = np.nonzero(useful)
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


def _near_ties(programme: Programme, here: _Pass, ties: int) -> tuple[IntArray, IntArray]:
    """Columns that a small relative change of the prices could make best, for the `ties` tasks closest to changing.

    A column is as far away as its margin over what it pays differently, Σ_k price_k·|charge_k − charge_k,best|: prices err in
    proportion, so a task with a small margin but little at stake is not near a tie.
    """
    reach = _reach(programme, here)
    nearest = reach.min(axis=1)
    limit = np.inf if nearest.size <= ties else np.partition(nearest, ties)[ties]
    close = np.flatnonzero(nearest <= limit)[: 2 * ties]
    task, use = np.nonzero(np.isfinite(reach[close]) & (reach[close] <= limit))
    return close[task], np.where(use == here.values.shape[1], DEFER, use)


def _reach(programme: Programme, here: _Pass) -> FloatArray:
    """Relative price change that would make each column best, (N, I + 1), the last column being deferring; ∞ for the
    chosen one and for what is not allowed."""
    n, i = here.values.shape
    price = _price_scale(programme, here)
    stake = np.zeros((n, i + 1))
    for k, charge in enumerate(programme.charges):
        rows = np.arange(n) if charge.tasks is None else charge.tasks
        own = programme.charge_at(k, rows, here.chosen.use[rows])[:, None]
        there = np.concatenate((charge.per_use, np.zeros((rows.size, 1))), axis=1)
        stake[rows] += price[k] * np.abs(there - own)
    last = np.zeros((n, 1)) if programme.defer else np.full((n, 1), -np.inf)
    margin = here.chosen.value[:, None] - np.concatenate((here.values, last), axis=1)
    out = np.full(stake.shape, np.inf)
    np.divide(margin, stake, out=out, where=(stake > 0) & np.isfinite(margin))
    return out


def _price_scale(programme: Programme, here: _Pass) -> FloatArray:
    """Prices for measuring distances: the current ones, and for a row priced near 0 a hundredth of what could matter."""
    everyone, use = np.arange(programme.weight.size), here.chosen.use
    worth = np.abs(programme.worth_at(everyone, use)).mean()
    charged = [np.abs(programme.charge_at(k, everyone, use)).mean() for k in range(here.mu.size)]
    return np.array([max(m, 0.01 * worth / c if c else 0.0) for m, c in zip(here.mu, charged, strict=True)])


def _at_a_vertex(programme: Programme, solution: Solution) -> Solution:
    """The same value with at most one split task per constraint.

    Where many tasks tie, mixing in the feasible allocation (θ) can be as good as any answer and splits all of them.
    """
    mix = solution.mix
    if (np.bincount(mix.task) > 1).sum() <= len(programme.charges):
        return solution
    columns = _Columns(programme.worth.shape[1] + 1)
    columns.add(mix.task, mix.use)
    _, mix = _reduced_lp(programme, columns, mix, most_theta=0.0)
    return replace(solution, mix=mix, objective=mix.objective(programme), usage=mix.usage(programme))


def _reduced_lp(
    programme: Programme, columns: _Columns, feasible: Mix, most_theta: float = 1.0
) -> tuple[FloatArray, Mix]:
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
    # What is left of an SLA's charge when seconds equal the bound is round-off, not something to be scaled up.
    offset = np.array([c.offset for c in programme.charges]) * programme.weight.max()
    row_scale = np.maximum(_order(charge[:, free], theta_charge), offset)
    worth_scale = float(_order(worth[None, free], np.array([theta_worth]))[0])
    tasks_free, position = np.unique(task[free], return_inverse=True)
    m = int(free.sum())
    ones: Any = csr_matrix((np.ones(m), (position, np.arange(m))), shape=(tasks_free.size, m))
    answer = linprog(
        -np.append(worth[free], theta_worth) / worth_scale,
        A_ub=np.column_stack((charge[:, free], theta_charge)) / row_scale[:, None],
        b_ub=(limits - base_charge) / row_scale,
        A_eq=hstack([ones, csr_matrix(np.ones((tasks_free.size, 1)))]) if tasks_free.size else None,
        b_eq=np.ones(tasks_free.size) if tasks_free.size else None,
        bounds=[*[(0, 1)] * m, (0, most_theta)],
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if answer.x is None:
        raise RuntimeError(f"the reduced programme was not solved: {answer.message}")
    mu = np.maximum(-answer.ineqlin.marginals, 0.0) * worth_scale / row_scale
    share = np.ones(task.size)
    share[free] = np.maximum(answer.x[:-1], 0.0)
    return mu, _mix(task, use, share, float(answer.x[-1]), feasible)


def _order(free: FloatArray, theta: FloatArray) -> FloatArray:
    """The size of each row's coefficients (K, M), (K,): that of its coefficient on θ where all others are 0, or 1.

    The one on θ sums over all tasks and counts only then: when no task in the row's scope is free.
    """
    size, size_theta = np.abs(free).max(axis=1, initial=0.0), np.abs(theta)
    size = np.where(size > 1e-9 * size_theta, size, size_theta)
    return np.where(size > 0, size, 1.0)


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
    # The feasible mix may give a task the use it has already: one share each.
    width = int(use.max(initial=DEFER)) + 2
    keys, at = np.unique(task * width + (use + 1), return_inverse=True)
    tasks, total = keys // width, np.bincount(at, weights=share)
    return Mix(tasks, keys % width - 1, total / np.bincount(tasks, weights=total)[tasks])
