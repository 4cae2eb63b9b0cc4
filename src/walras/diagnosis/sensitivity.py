"""How the answer moves when what went in was wrong: V, ρ, outcomes, and the sample itself. [Z, limits of the rule]"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from walras.diagnosis.case import Case
from walras.equation import DEFER, choose, net_value
from walras.errors import InfeasibleError, NumeraireError
from walras.market.clearing import Clearing
from walras.market.shadow import discover
from walras.prices import Constraint, Scope
from walras.quantities import USD
from walras.risk import FloatArray

SAMPLE = 10_000
"""Tasks on which re-solved answers are computed; more would not change a digit anybody reads."""
RESAMPLES = 100
NOISE_DRAWS = 4
RESAMPLE_TASKS = 1_000
QUALITY_NOISE = 0.1
"""Standard deviation of the error put on every quality, in units of quality."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """The audit's answer under one change of its inputs."""

    name: str
    multipliers: tuple[float, ...]
    """One per constraint."""
    surplus: float
    """Optimal surplus, USD per task."""
    regret: float
    """Mean regret of the audited choices, USD per task."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Optimal surplus against the compute budget; its slope is μ_C [Z-3]."""

    budget: FloatArray
    """USD per task, rising."""
    surplus: FloatArray
    multiplier: FloatArray
    sampled: int | None
    """Tasks it was computed on, when that is not all of them."""


def sample(case: Case, most: int = SAMPLE, seed: int = 0) -> Case:
    """The case on at most `most` tasks."""
    n = len(case.tasks)
    if n <= most:
        return case
    return case.take(np.sort(np.random.default_rng(seed).choice(n, most, replace=False)))


def _small(case: Case) -> Case:
    """A sample, unless its luck of the draw does not fit bounds that the whole log does."""
    small = sample(case)
    if small is not case and not case.economy.defer:
        try:
            small.clear()
        except InfeasibleError:
            return case
    return small


def scenarios(case: Case, on_step: Callable[[str], None] = lambda _: None) -> list[Scenario]:
    """The answer at V ± 50%, ρ₀ ± 50%, and with noise on every quality (mean of `NOISE_DRAWS` draws).

    In the pure form a scenario in which compute is not scarce has no prices; it is left out.
    """
    small = _small(case)
    tasks = small.tasks
    changed: list[tuple[str, list[Case]]] = [("as declared", [small])]
    for name, factor in (("− 50%", 0.5), ("+ 50%", 1.5)):
        changed.append((f"V {name}", [replace(small, tasks=replace(tasks, value=tasks.value * factor))]))
    for name, factor in (("− 50%", 0.5), ("+ 50%", 1.5)):
        changed.append(
            (f"ρ {name}", [replace(small, tasks=replace(tasks, risk_price=tasks.risk_price * factor))])
        )
    changed.append((f"quality ± {QUALITY_NOISE:g}", [_noisy(small, draw) for draw in range(NOISE_DRAWS)]))
    found = []
    for name, others in changed:
        on_step(name)
        with suppress(NumeraireError):
            found.append(_scenario(name, others))
    return found


def _noisy(case: Case, draw: int) -> Case:
    """The case with an error on every quality; not clipped to [0, 1], which would bias it."""
    error = np.random.default_rng(draw).normal(0.0, QUALITY_NOISE, case.uses.quality.shape)
    return replace(case, uses=replace(case.uses, quality=case.uses.quality + error))


def _scenario(name: str, cases: Sequence[Case]) -> Scenario:
    answers = [_answer(case) for case in cases]
    *multipliers, surplus, regret = np.mean(answers, axis=0).tolist()
    return Scenario(name, tuple(multipliers), surplus, regret)


def _answer(case: Case) -> list[float]:
    """Multipliers, optimal surplus and mean regret."""
    cleared = case.clear()
    best = choose(net_value(case.tasks, case.uses, cleared.prices), defer=case.economy.defer)
    picked = net_value(case.tasks, case.uses.pick(case.chosen), cleared.prices)[:, 0]
    regret = np.maximum(best.value - np.where(case.chosen == DEFER, 0.0, picked), 0.0)
    return [*cleared.multipliers.tolist(), cleared.certificate.objective, float(regret.mean())]


def multiplier_intervals(
    case: Case, multipliers: Sequence[float], seed: int = 0
) -> list[tuple[float, float]]:
    """95% intervals of the multipliers, one per constraint: what they would be on another log of the same kind.

    Each of `RESAMPLES` resamples of m tasks is solved again and its percentiles taken; where the log has N > m tasks the
    spread is scaled by √(m/N) (m out of n bootstrap). NaN where too few resamples have prices.
    """
    n = len(case.tasks)
    m = min(n, RESAMPLE_TASKS)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        try:
            draws.append(case.take(rng.integers(0, n, m)).clear(start=np.asarray(multipliers)).multipliers)
        except (InfeasibleError, NumeraireError):
            continue  # without deferring, a resample may not fit a tight bound; in the pure form, it may be slack
    if len(draws) < RESAMPLES // 2:
        return [(math.nan, math.nan)] * len(multipliers)
    centre = np.asarray(multipliers)
    spread = np.quantile(draws, [0.025, 0.975], axis=0) - np.median(draws, axis=0)
    low, high = centre + spread * np.sqrt(m / n)
    low = np.maximum(low, 0.0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _without_budget(case: Case, others: Sequence[Constraint]) -> Clearing:
    """What would be done if money were free of its budget; in the pure form, where nothing is declared, free outright."""
    if case.economy.numeraire == "usd":
        return replace(case, constraints=tuple(others)).clear()
    nothing = np.zeros(1)
    tasks = replace(case.tasks, latency_price=nothing, risk_price=nothing, irreversible_price=nothing)
    return discover(tasks, case.uses, others, defer=case.economy.defer, declared=())


def surplus_curve(case: Case, spent: float, points: int = 13) -> Curve:
    """Optimal surplus for budgets from the least that will do to more than anybody needs, other rows as declared.

    Args:
        spent: what the audited choices cost, USD per task, so that today lies on the curve.
    """
    n = len(case.tasks)
    case = _small(case)
    others = tuple(
        c for c in case.constraints if not (c.kind == "budget" and c.resource == USD and c.scope == Scope())
    )
    declared = [c.bound for c in case.constraints if c not in others]
    free = _without_budget(case, others)
    wanted = case.uses.amount(USD)[free.mix.task[free.mix.use >= 0], free.mix.use[free.mix.use >= 0]]
    most = float((wanted * free.mix.share[free.mix.use >= 0]).sum() / len(case.tasks))
    least = 0.0
    if not case.economy.defer:
        least = float(np.where(case.uses.allowed, case.uses.amount(USD), np.inf).min(axis=1).mean())
    top = max(1.15 * most, *declared, min(spent, 2 * most), 1e-12)
    grid = np.unique(
        np.concatenate((least + (top - least) * np.linspace(0, 1, points) ** 2, declared, [most]))
    )
    budgets, surpluses, prices = [], [], []
    start: FloatArray | None = None
    for budget in grid[grid >= least * (1 + 1e-9)]:
        try:
            row = Constraint("budget", float(budget))
            cleared = replace(case, constraints=(row, *others)).clear(start=start)
        except (InfeasibleError, NumeraireError):
            continue
        start = cleared.multipliers
        budgets.append(float(budget))
        surpluses.append(cleared.certificate.objective)
        prices.append(float(cleared.multipliers[0]))
    return Curve(
        np.array(budgets),
        np.array(surpluses),
        np.array(prices),
        None if len(case.tasks) == n else len(case.tasks),
    )
