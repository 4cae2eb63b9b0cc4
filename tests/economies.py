"""Random economies, and a planner who solves them the slow, obvious way: the second road to every answer.

The planner puts one variable on each share x_ni of every task and use and hands the whole to scipy's interior-point
HiGHS (Walras itself uses few columns and the dual simplex). All sums below are written out again on purpose: nothing
here calls `walras.equation` or `walras.market`, so an error there cannot hide in its own mirror.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from scipy.optimize import linprog

from walras.market.mix import Mix
from walras.prices import Constraint, Price, Prices, Scope
from walras.quantities import Labels, Tasks, Uses
from walras.risk import CVaR, MaxMin

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Declared = tuple[tuple[str, float], ...]

KINDS = ("budget", "mean_sla", "quantile_sla", "risk_envelope", "tools")
SCOPES = (
    Scope(),
    Scope(tenant="a"),
    Scope(tenant="b"),
    Scope(task_class="code"),
    Scope(window=(0.0, 10.0)),
    Scope(tenant="a", task_class="code", window=(5.0, 60.0)),
)
STYLES = ("smooth", "ties", "smooth", "twins", "dominated", "free")
LATE = 2.0
"""Seconds above which an answer is late, in quantile SLAs."""
SCENARIOS = 6


@dataclass(frozen=True)
class Economy:
    tasks: Tasks
    uses: Uses
    rows: tuple[Constraint, ...] = ()
    defer: bool = True
    declared: Declared = (("usd", 1.0),)

    @property
    def weight(self) -> float:
        return float(self.tasks.weight.sum())

    @property
    def scale(self) -> float:
        """Mean of the largest |worth| of each task: what an error in USD per task is to be measured against."""
        worth = np.where(self.uses.allowed, np.abs(worth_of(self)), 0.0)
        return float(self.tasks.weight @ worth.max(axis=1)) / self.weight or 1.0


# --- the economy's sums, written out again ----------------------------------------------------------------------


def worth_of(economy: Economy) -> Floats:
    """Surplus at declared prices, (N, I), NaN where it may be."""
    tasks, uses = economy.tasks, economy.uses
    worth = tasks.value[:, None] * uses.quality - tasks.latency_price[:, None] * uses.seconds
    worth = worth - tasks.risk_price[:, None] * uses.risk
    worth = worth - tasks.irreversible_price[:, None] * uses.irreversible_risk
    for resource, usd in economy.declared:
        worth = worth - usd * uses.amounts[:, :, uses.resources.index(resource)]
    return worth


def in_scope(row: Constraint, tasks: Tasks) -> Bools:
    inside = []
    for x in range(len(tasks)):
        scope, ok = row.scope, True
        if scope.tenant is not None:
            code = tasks.tenant.codes[x]
            ok = ok and code >= 0 and tasks.tenant.names[code] == scope.tenant
        if scope.task_class is not None:
            code = tasks.task_class.codes[x]
            ok = ok and code >= 0 and tasks.task_class.names[code] == scope.task_class
        if scope.window is not None:
            ok = ok and scope.window[0] <= tasks.time[x] < scope.window[1]
        inside.append(bool(ok))
    return np.array(inside, dtype=np.bool_)


def amount_of(row: Constraint, uses: Uses) -> Floats:
    """What a use takes out of a row, in the unit of its bound, (N, I)."""
    match row.kind:
        case "budget":
            return uses.amounts[:, :, uses.resources.index(row.resource)]
        case "mean_sla":
            return uses.seconds
        case "quantile_sla":
            if row.seconds in uses.late:
                return uses.late[row.seconds]
            return np.where(uses.seconds > row.seconds, 1.0, 0.0)
        case "risk_envelope":
            return uses.risk
    raise AssertionError(row.kind)


def is_sla(row: Constraint) -> bool:
    return row.kind in ("mean_sla", "quantile_sla")


def total(economy: Economy, shares: Floats, amounts: Floats, inside: Bools | None = None) -> float:
    """Σ_x w_x Σ_i share_xi · amount_xi; what has no share is not looked at, for it may be unknown."""
    mass = economy.tasks.weight[:, None] * shares
    if inside is not None:
        mass = mass * inside[:, None]
    return float(np.sum(mass[mass > 0] * amounts[mass > 0]))


def objective_of(economy: Economy, shares: Floats) -> float:
    """Surplus of an allocation at declared prices, USD per task."""
    return total(economy, shares, worth_of(economy)) / economy.weight


def scenario_means(economy: Economy, row: Constraint, shares: Floats) -> Floats:
    inside = in_scope(row, economy.tasks)
    everybody = float(economy.tasks.weight[inside].sum()) or 1.0
    losses = economy.uses.losses
    return np.array(
        [total(economy, shares, losses[:, :, s], inside) / everybody for s in range(losses.shape[2])]
    )


def tail(losses: Floats, measure: CVaR | MaxMin) -> float:
    """CVaR as Rockafellar and Uryasev's minimum (attained at a kink, so at one of the losses); max–min by a loop."""
    if isinstance(measure, CVaR):
        size = (1.0 - measure.alpha) * losses.size
        return min(float(t + np.maximum(losses - t, 0.0).sum() / size) for t in losses)
    return max(sum(p * loss for p, loss in zip(belief, losses, strict=True)) for belief in measure.beliefs)


def used_of(economy: Economy, row: Constraint, shares: Floats) -> float:
    """What an allocation takes out of a row, in the unit of its bound; 0 where nobody is concerned."""
    if row.kind == "portfolio_envelope":
        return tail(scenario_means(economy, row, shares), row.measure)
    inside = in_scope(row, economy.tasks)
    used = total(economy, shares, amount_of(row, economy.uses), inside)
    per = total(economy, shares, np.ones(shares.shape), inside) if is_sla(row) else 0.0
    if not is_sla(row):
        per = float(economy.tasks.weight[inside].sum())
    return used / per if per > 0 else 0.0


def lagrangian(economy: Economy, multipliers: Sequence[float]) -> tuple[Floats, float]:
    """Net values at prices, (N, I) with −∞ where masked, and the dual's value in USD per task.

    Portfolio envelopes must bring their density.
    """
    net = worth_of(economy)
    constant = 0.0
    for row, mu in zip(economy.rows, multipliers, strict=True):
        inside = in_scope(row, economy.tasks)
        if row.kind == "portfolio_envelope":
            amounts = sum(p * economy.uses.losses[:, :, s] for s, p in enumerate(row.density))
        else:
            amounts = amount_of(row, economy.uses) - (row.bound if is_sla(row) else 0.0)
        net = net - mu * np.where(inside[:, None], amounts, 0.0)
        constant += 0.0 if is_sla(row) else mu * row.bound * float(economy.tasks.weight[inside].sum())
    net = np.where(economy.uses.allowed, net, -np.inf)
    best = net.max(axis=1)
    if economy.defer:
        best = np.maximum(best, 0.0)
    return net, (float(economy.tasks.weight @ best) + constant) / economy.weight


def shares_of(mix: Mix, shape: tuple[int, int]) -> Floats:
    """A mix as a table of shares, (N, I); what is left of a row is deferred."""
    shares = np.zeros(shape)
    for task, use, share in zip(mix.task, mix.use, mix.share, strict=True):
        if use >= 0:
            shares[task, use] += share
    return shares


def pure(use: npt.NDArray[np.int64], shape: tuple[int, int]) -> Floats:
    shares = np.zeros(shape)
    for task, column in enumerate(use):
        if column >= 0:
            shares[task, column] = 1.0
    return shares


# --- the planner ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    value: float
    """Optimum, USD per task."""
    shares: Floats


def planner(economy: Economy, goal: Floats | None = None, *, at_least: float | None = None) -> Plan | None:
    """The best allocation over all N·I shares at once; None when there is none.

    Args:
        goal: what is maximised, (N, I); the surplus at declared prices when None.
        at_least: a floor under the surplus at declared prices, USD per task: looks for other optima than the first.
    """
    tasks, uses = economy.tasks, economy.uses
    worth = worth_of(economy)
    task, use = np.nonzero(uses.allowed)
    mass = tasks.weight[task]
    m = task.size
    if not m:
        return Plan(0.0, np.zeros(uses.shape))
    tails = [row for row in economy.rows if row.kind == "portfolio_envelope"]
    size = m + sum(1 + SCENARIOS for row in tails if isinstance(row.measure, CVaR))
    rows: list[Floats] = []
    bounds: list[float] = []

    def at_most(
        coefficients: Floats, bound: float, extra: dict[int, float] | None = None, floor: float = 0.0
    ) -> None:
        line = np.zeros(size)
        line[:m] = coefficients
        for column, value in (extra or {}).items():
            line[column] = value
        norm = max(float(np.abs(line).max()), floor) or 1.0
        rows.append(line / norm)
        bounds.append(bound / norm)

    t = m
    for row in economy.rows:
        inside = in_scope(row, tasks)[task]
        everybody = float(tasks.weight[in_scope(row, tasks)].sum())
        if row.kind == "portfolio_envelope":
            by_scenario = [
                inside * mass * uses.losses[task, use, s] / (everybody or 1.0) for s in range(SCENARIOS)
            ]
            if isinstance(row.measure, CVaR):
                # t + Σ_s e_s / ((1 − α)·S) ≤ bound,  loss_s − t − e_s ≤ 0,  e ≥ 0
                each = 1.0 / ((1.0 - row.measure.alpha) * SCENARIOS)
                at_most(np.zeros(m), row.bound, {t: 1.0} | {t + 1 + s: each for s in range(SCENARIOS)})
                for s in range(SCENARIOS):
                    at_most(by_scenario[s], 0.0, {t: -1.0, t + 1 + s: -1.0})
                t += 1 + SCENARIOS
            else:
                for belief in row.measure.beliefs:
                    at_most(sum(p * part for p, part in zip(belief, by_scenario, strict=True)), row.bound)
        elif is_sla(row):
            at_most(inside * mass * (amount_of(row, uses)[task, use] - row.bound), 0.0, floor=row.bound)
        else:
            at_most(inside * mass * amount_of(row, uses)[task, use], row.bound * everybody)
    if at_least is not None:
        at_most(-mass * worth[task, use], -at_least * economy.weight)
    one_each = np.zeros((len(tasks), size))
    one_each[task, np.arange(m)] = 1.0
    served = {"A_eq": one_each, "b_eq": np.ones(len(tasks))}
    if economy.defer:
        served = {}
        rows += list(one_each)
        bounds += [1.0] * len(tasks)
    line = np.zeros(size)
    line[:m] = mass * (worth if goal is None else goal)[task, use]
    free: list[tuple[float | None, float | None]] = [(0, None)] * m
    for row in tails:
        if isinstance(row.measure, CVaR):
            free += [(None, None)] + [(0, None)] * SCENARIOS
    for method in ("highs-ipm", "highs-ds"):  # where interior points give up, which is seldom, corners do not
        answer = linprog(
            -line / (np.abs(line).max() or 1.0),
            A_ub=np.array(rows) if rows else None,
            b_ub=np.array(bounds) if rows else None,
            bounds=free,
            method=method,
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
            **served,
        )
        if answer.status in (0, 2):
            break
    if answer.status == 2:
        return None
    assert answer.status == 0, answer.message
    shares = np.zeros(uses.shape)
    shares[task, use] = np.maximum(answer.x[:m], 0.0)
    return Plan(float(line @ answer.x) / economy.weight, shares)


def least_tail(economy: Economy, measure: CVaR | MaxMin) -> float:
    """The least that a measure of everybody's mean loss can be, everybody served and nothing else asked."""
    uses, tasks = economy.uses, economy.tasks
    task, use = np.nonzero(uses.allowed)
    m = task.size
    by_scenario = tasks.weight[task] / economy.weight * uses.losses[task, use].T  # (S, M)
    # Minimise t + Σ_s e_s / ((1 − α)·S) with loss_s ≤ t + e_s, or t with belief · loss ≤ t.
    excess = np.zeros(0)
    worst = np.array(measure.beliefs) @ by_scenario if isinstance(measure, MaxMin) else by_scenario
    if isinstance(measure, CVaR):
        excess = np.full(SCENARIOS, 1.0 / ((1.0 - measure.alpha) * SCENARIOS))
    at_most = np.hstack(
        [worst, np.full((worst.shape[0], 1), -1.0), -np.eye(worst.shape[0])[:, : excess.size]]
    )
    one_each = np.zeros((len(tasks), at_most.shape[1]))
    one_each[task, np.arange(m)] = 1.0
    answer = linprog(
        np.concatenate((np.zeros(m), [1.0], excess)),
        A_ub=at_most,
        b_ub=np.zeros(worst.shape[0]),
        A_eq=one_each,
        b_eq=np.ones(len(tasks)),
        bounds=[(0, None)] * m + [(None, None)] + [(0, None)] * excess.size,
        method="highs-ds",
    )
    assert answer.status == 0, answer.message
    return float(answer.fun)


def tight_economy(seed: int, n: int = 24, i: int = 4, *, defer: bool = True) -> Economy:
    """A fixed economy with one budget, half of what it would spend without: its price is > 0."""
    economy = random_economy(seed, n, i, defer=defer)
    worth = np.where(economy.uses.allowed, worth_of(economy), -np.inf)
    use = worth.argmax(axis=1)
    if defer:
        use[worth.max(axis=1) <= 0] = -1
    row = Constraint("budget", 0.0)
    return replace(economy, rows=(replace(row, bound=used_of(economy, row, pure(use, worth.shape)) / 2),))


# --- random economies -------------------------------------------------------------------------------------------


def random_columns(rng: np.random.Generator, n: int, i: int, style: str) -> dict[str, Any]:
    """Physical columns of N × I uses. `ties` has few distinct, exact values; `twins` repeats tasks and uses."""
    if style == "ties":
        columns = {
            "quality": rng.integers(0, 5, (n, i)) / 4,
            "amounts": rng.integers(0, 5, (n, i, 2)) / 2,
            "seconds": rng.integers(0, 9, (n, i)) / 2,
            "risk": rng.integers(-1, 4, (n, i)) / 4,
            "irreversible_risk": rng.integers(0, 2, (n, i)) / 8,
            "late": rng.integers(0, 5, (n, i)) / 4,
            "losses": rng.integers(0, 4, (n, i, SCENARIOS)) / 2,
        }
    else:
        columns = {
            "quality": rng.random((n, i)),
            "amounts": rng.random((n, i, 2)) * [2.0, 3.0],
            "seconds": rng.random((n, i)) * 4,
            "risk": rng.random((n, i)) * 1.2 - 0.2,
            "irreversible_risk": rng.random((n, i)) / 4,
            "late": rng.random((n, i)),
            "losses": rng.gamma(0.5, 1.0, (n, i, SCENARIOS)),
        }
    if style == "twins":
        columns = {name: column[rng.integers(0, (n + 1) // 2, n)] for name, column in columns.items()}
        columns = {name: column[:, rng.integers(0, i, i)] for name, column in columns.items()}
    if style == "dominated":
        for name, column in columns.items():
            column[:, 0] = 1.0 if name == "quality" else 0.0
    if style == "free":
        columns["amounts"] = columns["amounts"] * 0.0
    return columns


def random_economy(
    seed: int, n: int, i: int, style: str = "smooth", *, defer: bool = True, losses: bool = False
) -> Economy:
    """An economy without constraints. Some uses are masked, and what is masked is not even known (NaN)."""
    rng = np.random.default_rng(seed)
    columns = random_columns(rng, n, i, style)
    allowed = rng.random((n, i)) < (1.0 if style in ("free", "dominated") else 0.85)
    if not defer:
        allowed[np.arange(n), rng.integers(0, i, n)] = True
    for column in columns.values():
        column[~allowed] = np.nan
    late = columns.pop("late")
    if not losses:
        del columns["losses"]
    uses = Uses(
        names=tuple(f"use{column}" for column in range(i)),
        resources=("usd", "tools"),
        allowed=allowed,
        late={LATE: late} if rng.random() < 0.5 else {},
        **columns,
    )
    coarse = style == "ties"
    value = rng.integers(0, 25, n).astype(float) if coarse else rng.gamma(1.0, 12.0, n)
    tasks = Tasks(
        value=value,
        latency_price=rng.integers(0, 2, n) / 4,
        risk_price=rng.integers(0, 3, n) / 2,
        irreversible_price=rng.integers(0, 2, n) / 1.0,
        weight=np.ones(n) if rng.random() < 0.5 else rng.integers(1, 4, n) / (2.0 if coarse else 3.0),
        tenant=Labels(rng.integers(-1, 2, n), ("a", "b")),
        task_class=Labels(rng.integers(0, 2, n), ("code", "chat")),
        time=rng.random(n) * 20,
    )
    declared: Declared = (("usd", 1.0),) if rng.random() < 0.5 else (("usd", 1.0), ("tools", 0.25))
    return Economy(tasks, uses, (), defer, declared)


def random_shares(rng: np.random.Generator, economy: Economy, *, thrift: float = 0.0) -> Floats:
    """A random allocation of allowed uses, some of it deferred where that is open; half of the time without mixtures.

    With `thrift` > 0, which is a probability, that many of the tasks get a use that takes little: an allocation whose
    own usage, taken as bounds, leaves too little for the best.
    """
    n, i = economy.uses.shape
    uses, allowed = economy.uses, economy.uses.allowed
    odds = rng.random((n, i + 1)) ** 3.0
    takes = [uses.amounts[:, :, 0], uses.amounts[:, :, 1], uses.seconds, uses.risk]
    if uses.losses is not None:
        takes.append(uses.losses.max(axis=2))
    weights = rng.random(len(takes)) ** 4
    need = sum(
        weight * np.where(allowed, amount, np.inf) for weight, amount in zip(weights, takes, strict=True)
    )
    thrifty = rng.random(n) < thrift
    odds[thrifty, need.argmin(axis=1)[thrifty]] += 5.0
    odds[:, :i] *= allowed
    odds[:, i] *= economy.defer
    if rng.random() < 0.5:
        odds = (odds == odds.max(axis=1, keepdims=True)).astype(float)
    none = odds.sum(axis=1) == 0
    odds[none, i] = 1.0
    shares: Floats = (odds / odds.sum(axis=1, keepdims=True))[:, :i]
    return shares * rng.uniform(0.2, 1.0) if thrift and economy.defer else shares


def with_row(
    economy: Economy, kind: str, scope: Scope, reference: Floats, slack: float, **more: Any
) -> Economy:
    """One more constraint, which the reference allocation meets with `slack` to spare (a share of what it uses)."""
    row = {
        "budget": Constraint("budget", 0.0, scope),
        "tools": Constraint("budget", 0.0, scope, resource="tools"),
        "mean_sla": Constraint("mean_sla", 0.0, scope),
        "quantile_sla": Constraint("quantile_sla", 0.5, scope, seconds=LATE),
        "risk_envelope": Constraint("risk_envelope", 0.0, scope),
        "portfolio_envelope": Constraint(
            "portfolio_envelope", 0.0, scope, measure=more.pop("measure", None) or CVaR(0.5)
        ),
    }[kind]
    used = used_of(economy, row, reference)
    bound = max(used + slack * (abs(used) + 0.1), 0.0)
    if kind == "quantile_sla":
        bound = min(max(bound, 0.02), 0.98)
        if used > bound:
            return economy
    return replace(economy, rows=(*economy.rows, replace(row, bound=bound, **more)))


SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def economies(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = KINDS,
    scopes: Sequence[Scope] = SCOPES,
    styles: Sequence[str] = STYLES,
    defer: bool | None = None,
    max_tasks: int = 24,
    min_rows: int = 1,
    max_rows: int = 4,
    losses: bool = False,
) -> Economy:
    """An economy with constraints that some allocation meets: tightly, with a little room, or with plenty.

    Its shape shrinks; its numbers come from a seed.
    """
    n, i = draw(st.integers(1, max_tasks)), draw(st.sampled_from((2, 3, 4, 1)))
    style = draw(st.sampled_from(styles))
    seed = draw(SEEDS)
    economy = random_economy(
        seed, n, i, style, defer=draw(st.booleans()) if defer is None else defer, losses=losses
    )
    reference = random_shares(np.random.default_rng(seed + 1), economy, thrift=0.8)
    for _ in range(draw(st.integers(min_rows, max_rows))):
        slack = draw(st.sampled_from((0.05, 0.0, 0.2, 0.01, 5.0)))
        scope = draw(st.sampled_from(scopes)) if draw(st.booleans()) else Scope()
        economy = with_row(economy, draw(st.sampled_from(kinds)), scope, reference, slack)
    return economy


def price_vectors(economy: Economy, rng: np.random.Generator) -> Prices:
    """Some prices for the economy's rows, some of them 0; not those that clear it."""
    mu = rng.random(len(economy.rows)) * rng.integers(0, 2, len(economy.rows)) * 3
    return Prices(
        tuple(Price(row, float(m)) for row, m in zip(economy.rows, mu, strict=True)), economy.declared
    )
