"""Regret: what each task lost against the best use it could have had, at one price vector. [Z-4]

    regret_x = max_i v_xi − v_x,chosen ≥ 0,    v = net value [Z-1] at the discovered prices.

Its mean is what the whole log left on the table, and it splits into two parts that add up exactly:

    mean regret = (optimal surplus − realised surplus) + Σ_k μ_k·(used_k − bound_k)

surplus not earned, and constraints overdrawn (or left unused) valued at their prices. A choice that breaks an absolute
rule [Z-LEX] may beat every allowed use; that is no negative regret, and `rule_breaking` is the third part then. An outcome is one draw, so the
*ex-post* best includes luck; what a policy could have known is the business of `attainable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from walras.diagnosis.case import Case, by_label
from walras.equation import DEFER, Charge, Terms, choose, net_value, terms
from walras.prices import Price, Prices
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

BLOCKS = 2_000
"""Tasks are pooled into at most this many random blocks before resampling, so an interval costs the same for any N."""
RESAMPLES = 999
ROUND_OFF = 1e-12
"""A difference below this share of what is compared is round-off."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over tasks with a 95% bootstrap interval."""

    mean: float
    ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """Regret of a group of tasks, USD."""

    name: str
    tasks: int
    regret: Mean
    """Per task of the group."""
    total: float
    """Over the group."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure mode of [Z §4]: how often, and how much is at stake."""

    label: str
    name: str
    tasks: int
    per_task: Mean
    """USD per task of the whole log."""
    total: float


@dataclass(frozen=True, slots=True)
class Regret:
    """Regret of the audited choices."""

    per_task: FloatArray
    """(N,) USD ≥ 0."""
    best: IntArray
    """Ex-post best use at the prices, (N,), `DEFER` where none is worth it."""
    chosen: Terms
    """The audited choices taken apart, each (N,): V·ΔQ, π_C·ΔC, π_L·ΔL, π_R·ΔR."""
    net: FloatArray
    """Net value of the audited choices at the prices, (N,)."""
    overall: Mean
    by_tenant: tuple[Row, ...]
    by_class: tuple[Row, ...]
    by_value_decile: tuple[Row, ...]
    failures: tuple[Failure, ...]
    value_correlation: float | None
    """P2's signature: Spearman correlation of regret with V; None where V is constant."""
    top_decile_share: float | None
    """Share of all regret in the tenth of tasks with the highest V (a tie at its edge counts in part)."""
    rule_breakers: int
    """Audited choices that an absolute rule forbids [Z-LEX], deferring included where it is closed."""
    rule_breaking: float
    """What they gained by it beyond the best allowed use, USD per task of the log."""


def measure_regret(case: Case, prices: Prices, seed: int = 0) -> Regret:
    """Regret of `case.chosen` at `prices`."""
    values = net_value(case.tasks, case.uses, prices)
    best = choose(values, defer=case.economy.defer)
    picked = case.uses.pick(case.chosen)
    one = terms(case.tasks, picked, prices)
    # A deferred task takes nothing, so it pays nothing, SLA credits included.
    served = (case.chosen != DEFER)[:, None]
    chosen = Terms(*(np.where(served, t, 0.0)[:, 0] for t in (one.value, one.compute, one.latency, one.risk)))
    got = chosen.value - chosen.compute - chosen.latency - chosen.risk
    lost = best.value - got
    regret = np.where(lost > ROUND_OFF * (np.abs(best.value) + np.abs(got)), lost, 0.0)
    inside = case.uses.allowed[np.arange(got.size), np.maximum(case.chosen, 0)]
    broke = np.where(served[:, 0], ~inside, not case.economy.defer)
    worth = case.tasks.value
    varied = bool(np.ptp(worth) > 0)
    deciles = _deciles(worth) if varied else []
    total = float(regret.sum())
    return Regret(
        per_task=regret,
        best=best.use,
        chosen=chosen,
        net=got,
        overall=bootstrap_mean(regret, seed),
        by_tenant=_rows(regret, by_label(case.tasks.tenant), seed),
        by_class=_rows(regret, by_label(case.tasks.task_class), seed),
        by_value_decile=_rows(regret, deciles, seed),
        failures=_failures(case, prices, chosen, best.use, regret, seed),
        value_correlation=_spearman(worth, regret) if varied and np.ptp(regret) else None,
        top_decile_share=_top_tenth(worth, regret) / total if varied and total else None,
        rule_breakers=int(broke.sum()),
        rule_breaking=float(np.where(broke, np.maximum(-lost, 0.0), 0.0).mean()),
    )


def overdrafts(case: Case, prices: Prices) -> list[float]:
    """μ_k·(used_k − bound_k) of the audited choices for each constraint, USD per task of the log.

    Taken from what each task is charged: an SLA's charge is per served task, a scoped one is paid inside its scope.
    """
    picked = case.uses.pick(case.chosen)
    return [_overdraft(case, p, Charge.of(p.constraint, case.tasks, picked)) for p in prices.discovered]


def _overdraft(case: Case, price: Price, charge: Charge) -> float:
    rows = slice(None) if charge.tasks is None else charge.tasks
    served = case.chosen[rows] != DEFER
    taken = float(charge.per_use[served].sum())
    return float(price.multiplier * (taken - price.constraint.per_task_limit * served.size) / len(case.tasks))


def bootstrap_mean(values: FloatArray, seed: int = 0) -> Mean:
    """Mean with a 95% percentile bootstrap interval over tasks (over random blocks of tasks when there are many)."""
    n = values.size
    mean = float(values.mean())
    if n < 2 or not np.ptp(values):
        return Mean(mean, (mean, mean))
    rng = np.random.default_rng(seed)
    blocks = min(n, BLOCKS)
    block = rng.permutation(n) % blocks
    sums, sizes = np.bincount(block, weights=values), np.bincount(block)
    draws = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES)
    low, high = np.quantile((draws @ sums) / (draws @ sizes), [0.025, 0.975])
    return Mean(mean, (float(low), float(high)))


def _spearman(x: FloatArray, y: FloatArray) -> float:
    from scipy import stats  # noqa: PLC0415 - half a second to import, and only an audit needs it

    return float(stats.spearmanr(x, y).statistic)


def _rows(regret: FloatArray, groups: Sequence[tuple[str, BoolArray]], seed: int) -> tuple[Row, ...]:
    return tuple(
        Row(name, int(mask.sum()), bootstrap_mean(regret[mask], seed), float(regret[mask].sum()))
        for name, mask in groups
    )


def _top_tenth(worth: FloatArray, regret: FloatArray) -> float:
    """Regret of the tenth of tasks with the highest V; tasks that tie at its edge share what is left of it."""
    edge = np.partition(worth, -max(1, worth.size // 10))[-max(1, worth.size // 10)]
    above, at = worth > edge, worth == edge
    left = (worth.size / 10 - above.sum()) / at.sum()
    return float(regret[above].sum() + min(max(left, 0.0), 1.0) * regret[at].sum())


def _deciles(worth: FloatArray) -> list[tuple[str, BoolArray]]:
    """Tenths of the tasks by V, lowest first; fewer where many tasks share a value."""
    edges = np.unique(np.quantile(worth, np.linspace(0, 1, 11)))
    bins = np.clip(np.searchsorted(edges, worth, side="right") - 1, 0, edges.size - 2)
    names = [f"{low:.3g}–{high:.3g}" for low, high in pairwise(edges)]
    groups = [(name, bins == k) for k, name in enumerate(names)]
    return [(name, mask) for name, mask in groups if mask.any()]


def _failures(
    case: Case, prices: Prices, chosen: Terms, best: IntArray, regret: FloatArray, seed: int
) -> tuple[Failure, ...]:
    """FM-1 and FM-2: was the better use cheaper or dearer, at full price π·(ΔC, ΔL, ΔR)?

    The two are disjoint and together hold all regret: V·ΔQ of the step from the better use to the chosen one was either
    less than what the step cost (over-routing), or the step saved less than the quality it gave up (under-routing).
    """
    there = terms(case.tasks, case.uses.pick(best), prices)
    served = best != DEFER
    full_best = np.where(served, (there.compute + there.latency + there.risk)[:, 0], 0.0)
    full_chosen = chosen.compute + chosen.latency + chosen.risk
    lost = regret > 0
    over = lost & (full_best < full_chosen)
    found = []
    for label, name, mask in (("FM-1", "over-routing", over), ("FM-2", "under-routing", lost & ~over)):
        stake = np.where(mask, regret, 0.0)
        found.append(Failure(label, name, int(mask.sum()), bootstrap_mean(stake, seed), float(stake.sum())))
    return tuple(found)
