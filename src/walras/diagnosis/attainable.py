"""What a policy could have reached that knows a task's class and value but not its outcome.

The ex-post oracle picks with outcomes in hand, luck included. The attainable policy is cross-fitted: tasks are split into folds;
what each model gives to a class is estimated on the other folds (`estimate.class_means`); the fold is then allocated
by the same price discovery as everything else, and scored with the outcomes nobody had looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from walras.diagnosis.case import Case
from walras.diagnosis.regret import Mean, bootstrap_mean
from walras.equation import DEFER, net_value, surplus
from walras.errors import InfeasibleError, NumeraireError
from walras.estimate.class_means import pooled_class_means
from walras.market.clearing import Usage, measure_usage
from walras.market.mix import Mix
from walras.prices import Prices
from walras.quantities import BoolArray, IntArray, Labels, Uses
from walras.risk import FloatArray

FOLDS = 5
GROUP = 20
"""Tasks a group must have before a change is proposed for it."""


@dataclass(frozen=True, slots=True)
class Attainable:
    """The cross-fitted policy, scored on tasks it was not fitted on."""

    surplus: Mean
    """USD per task at declared prices."""
    usage: tuple[Usage, ...]
    """What it really took out of each constraint: estimates may err, so a bound can be missed a little."""
    shares: FloatArray
    """Probability of each use, (N, I + 1); the last column is deferring."""
    multipliers: FloatArray
    """Mean price of each constraint over the folds, (K,): what it is worth to a policy without hindsight."""


@dataclass(frozen=True, slots=True)
class Change:
    """A switch for a group of tasks, worth making on held-out evidence."""

    tenant: str | None
    task_class: str | None
    from_use: str
    to_use: str
    """What the policy mostly uses instead."""
    tasks: int
    per_task: Mean
    """USD per task of the group, surplus and limits together (see `Gain`), for all that the policy does with the
    group. The interval holds for all groups at once, because the best ones are picked from many."""
    surplus: float
    """The part of it that is surplus at declared prices."""
    total: float
    """USD over the group, both parts."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What each task gains when the policy replaces the audited choice, (N,), USD."""

    surplus: FloatArray
    """At declared prices."""
    limits: FloatArray
    """What the switch frees (or, below 0, takes) of the limits, at the policy's own prices: the ex-post ones say what
    a limit would be worth to somebody with hindsight. A price is marginal, so a large overrun is valued too high."""


def attainable_policy(case: Case, seed: int = 0) -> Attainable | None:
    """Fit and score the policy; None where a log is too small, or a fold has no prices."""
    n, i = case.uses.shape
    if n < 2 * FOLDS:
        return None
    fold = np.random.default_rng(seed).permutation(n) % FOLDS
    classes = _classes(case)
    shares = np.zeros((n, i + 1))
    multipliers = np.zeros(len(case.constraints))
    for k in range(FOLDS):
        held_out, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        try:
            shares[held_out], found = _allocate(case, held_out, rest, classes)
        except (InfeasibleError, NumeraireError):
            return None
        multipliers += found / FOLDS
    true = surplus(case.tasks, case.uses, case.economy.declared(), case.economy.numeraire)
    mix = _mix_of(shares)
    return Attainable(
        surplus=bootstrap_mean(_expected(shares, true), seed),
        usage=tuple(measure_usage(case.tasks, case.uses, c, mix) for c in case.constraints),
        shares=shares,
        multipliers=multipliers,
    )


def _expected(shares: FloatArray, values: FloatArray) -> FloatArray:
    """Expected value of each task, (N,); a use without a share may be forbidden (−∞)."""
    used = shares[:, :-1]
    expected: FloatArray = (used * np.where(used > 0, values, 0.0)).sum(axis=1)
    return expected


def attainable_gain(case: Case, prices: Prices, policy: Attainable) -> Gain:
    """The gain from switching to the policy. `prices` are the discovered ones, for their constraints."""
    own = [
        replace(p, multiplier=float(mu)) for p, mu in zip(prices.discovered, policy.multipliers, strict=True)
    ]
    bare, priced = replace(prices, discovered=()), replace(prices, discovered=tuple(own))
    surplus_gain = _switch(case, policy, bare)
    return Gain(surplus_gain, _switch(case, policy, priced) - surplus_gain)


def _switch(case: Case, policy: Attainable, prices: Prices) -> FloatArray:
    """Net value at `prices` of the policy less that of the audited choice, (N,)."""
    audited = net_value(case.tasks, case.uses.pick(case.chosen), prices)[:, 0]
    gain: FloatArray = _expected(policy.shares, net_value(case.tasks, case.uses, prices))
    return gain - np.where(case.chosen == DEFER, 0.0, audited)


def _classes(case: Case) -> IntArray:
    labels = case.tasks.task_class
    return np.zeros(len(case.tasks), dtype=np.int64) if labels is None else labels.codes - labels.codes.min()


def _allocate(
    case: Case, held_out: IntArray, rest: IntArray, classes: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Shares for the held-out tasks, (M, I + 1), and prices, (K,), from estimates made on the rest."""
    estimated = _estimate(case, rest, classes)
    tasks = case.tasks.take(held_out)
    uses = replace(estimated.take(classes[held_out]), allowed=case.uses.allowed[held_out])
    # Tasks that look the same to the policy are one task with a weight: fewer rows, and no ties to break.
    seen = [classes[held_out], tasks.value, tasks.latency_price, tasks.risk_price]
    seen += [_codes(tasks.tenant, held_out.size), *np.packbits(uses.allowed, axis=1).T]
    if tasks.time is not None and any(c.scope.window for c in case.constraints):
        seen.append(tasks.time)
    _, first, row, count = np.unique(
        np.column_stack(seen), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    small = replace(tasks.take(first), weight=count.astype(np.float64))
    cleared = replace(case, tasks=small, uses=uses.take(first)).clear()
    shares = np.zeros((first.size, uses.shape[1] + 1))
    shares[cleared.mix.task, cleared.mix.use] = cleared.mix.share  # DEFER = −1 is the last column
    return shares[row.ravel()], cleared.multipliers


def _codes(labels: Labels | None, n: int) -> IntArray:
    return np.zeros(n, dtype=np.int64) if labels is None else labels.codes


def _estimate(case: Case, rows: IntArray, classes: IntArray) -> Uses:
    """Class means of every column, one row a class."""
    uses, of, n_classes = case.uses.take(rows), classes[rows], int(classes.max()) + 1

    def pooled(values: FloatArray) -> FloatArray:
        return pooled_class_means(np.ascontiguousarray(values), of, n_classes)

    # An SLA's breach is estimated as such: the mean of late or not, never whether the mean is late.
    late = {c.seconds for c in case.constraints if c.kind == "quantile_sla"}
    uses = replace(uses, late={s: uses.late_share(s) for s in late})
    return Uses(names=uses.names, resources=uses.resources, **uses.each(pooled))


def _mix_of(shares: FloatArray) -> Mix:
    task, column = np.nonzero(shares)
    use = np.where(column == shares.shape[1] - 1, DEFER, column)
    return Mix(task, use, shares[task, column])


def best_changes(case: Case, policy: Attainable, gain: Gain, most: int = 3) -> list[Change]:
    """The switches worth most: for tasks of one tenant and class with one audited use, what the policy does instead.

    Only those whose held-out gain is above 0 with 95% confidence for all groups at once are returned (Student's t with
    Bonferroni's correction, groups of at least `GROUP` tasks): the best of many groups look good by luck alone.
    """
    both, names = gain.surplus + gain.limits, (*case.uses.names, "defer")
    switched = []
    for tenant, task_class, use, members in _groups(case):
        instead = policy.shares[members].mean(axis=0)
        instead[use] = 0.0  # use = DEFER = −1 is the last column
        if members.sum() >= GROUP and instead.sum() > 1e-9:
            switched.append((tenant, task_class, use, int(np.argmax(instead)), members))
    found = []
    for tenant, task_class, use, to, members in switched:
        per_task = _t_interval(both[members], 0.05 / len(switched))
        if per_task.ci[0] > 0:
            n, total = int(members.sum()), float(both[members].sum())
            earned = float(gain.surplus[members].mean())
            found.append(Change(tenant, task_class, names[use], names[to], n, per_task, earned, total))
    return sorted(found, key=lambda c: -c.total)[:most]


def _t_interval(values: FloatArray, level: float) -> Mean:
    from scipy import stats  # noqa: PLC0415 - half a second to import, and only an audit needs it

    n, mean = values.size, float(values.mean())
    reach = float(stats.t.ppf(1 - level / 2, n - 1)) * float(values.std(ddof=1)) / np.sqrt(n)
    return Mean(mean, (mean - reach, mean + reach))


def _groups(case: Case) -> list[tuple[str | None, str | None, int, BoolArray]]:
    """(tenant, class, audited use, members) of each group that occurs."""
    n = len(case.tasks)
    tenant, task_class = case.tasks.tenant, case.tasks.task_class
    keys = np.column_stack((_codes(tenant, n), _codes(task_class, n), case.chosen))
    unique, group = np.unique(keys, axis=0, return_inverse=True)
    return [
        (_name(tenant, t), _name(task_class, c), int(use), group.ravel() == g)
        for g, (t, c, use) in enumerate(unique.tolist())
    ]


def _name(labels: Labels | None, code: int) -> str | None:
    return labels.names[code] if labels and code >= 0 else None
