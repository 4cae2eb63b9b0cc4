"""The welfare theorems [Z-W1] [Z-W2] and the falsifiable claim [P0], on random economies.

Menus are discrete, so the market is the convexified one: shares of uses, mixed at ties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from economies import (
    SEEDS,
    Economy,
    economies,
    lagrangian,
    objective_of,
    planner,
    random_economy,
    random_shares,
    shares_of,
    total,
    used_of,
)
from walras.equation import equimarginal_residual, net_value
from walras.market.shadow import discover
from walras.prices import Constraint, Scope
from walras.quantities import Tasks, Uses

# --- [Z-W1] four layers that never meet ----------------------------------------------------------------------------
#
# Each task gets one use from every layer. The planner sees all layers at once. A layer sees its own uses and the
# prices, nothing else, and each has its own way of finding what is best, none of them Walras's.


@dataclass(frozen=True)
class Layer:
    """What one layer offers each task: quality, USD, seconds and USD of expected loss, (N, I) each."""

    quality: np.ndarray
    usd: np.ndarray
    seconds: np.ndarray
    risk: np.ndarray

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        return self.quality, self.usd, self.seconds, self.risk


@dataclass(frozen=True)
class PriceVector:
    """All that a layer is told: π_C per USD, π_L per second, π_R per USD of expected loss."""

    compute: float
    latency: float
    risk: float


def route(value: np.ndarray, menu: Layer, p: PriceVector) -> np.ndarray:
    """Demand: for each request the tier with the highest net value; a loop over tiers."""
    best = []
    for x, worth in enumerate(value):
        net = float("-inf")
        for m in range(menu.quality.shape[1]):
            offer = worth * menu.quality[x, m] - p.compute * menu.usd[x, m]
            offer -= p.latency * menu.seconds[x, m] + p.risk * menu.risk[x, m]
            net = max(net, offer)
        best.append(net)
    return np.array(best)


def act(value: np.ndarray, steps: Layer, p: PriceVector) -> np.ndarray:
    """Action: uses are 0, 1, 2 … verifications; backward induction on whether to go on from each."""
    n, k = steps.quality.shape
    best = []
    for x in range(n):
        full = p.compute * steps.usd[x] + p.latency * steps.seconds[x] + p.risk * steps.risk[x]
        gains = np.diff(value[x] * steps.quality[x] - full)
        ahead = 0.0  # what going on from here is worth, once the last step is done
        for step in range(k - 2, -1, -1):
            ahead = max(0.0, gains[step] + ahead)
        best.append(value[x] * steps.quality[x, 0] - full[0] + ahead)
    return np.array(best)


def serve(value: np.ndarray, modes: Layer, p: PriceVector) -> np.ndarray:
    """Supply: one matrix of full prices for all requests and serving modes."""
    amounts = np.stack(modes.columns, axis=-1)
    weights = np.column_stack([value, *(np.full_like(value, -q) for q in (p.compute, p.latency, p.risk))])
    return np.einsum("xmq,xq->xm", amounts, weights).max(axis=1)


def store(value: np.ndarray, options: Layer, p: PriceVector) -> np.ndarray:
    """Capital: options sorted by what they bring net of their price; the first of the list is taken."""
    best = []
    for x in range(value.size):
        rows = zip(*(column[x].tolist() for column in options.columns), strict=True)
        ranked = sorted(
            (p.compute * usd + p.latency * s + p.risk * r - value[x] * q for q, usd, s, r in rows)
        )
        best.append(-ranked[0])
    return np.array(best)


LAYERS = (route, act, serve, store)


def random_layers(seed: int, n: int, count: int) -> tuple[np.ndarray, list[Layer]]:
    rng = np.random.default_rng(seed)
    layers = []
    for layer in range(count):
        i = int(rng.integers(2, 5))
        columns = rng.random((4, n, i)) * np.array([0.5, 1.0, 2.0, 0.6])[:, None, None]
        if LAYERS[layer] is act:
            # Whole plans of 0, 1, … verifications: each adds quality and cost and takes risk away.
            columns = np.cumsum(columns, axis=2) * np.array([1.0, 1.0, 1.0, -0.5])[:, None, None]
        columns[:, :, 0] *= rng.integers(0, 2)  # sometimes a first use that is nothing at all
        layers.append(Layer(*columns))
    return rng.gamma(2.0, 4.0, n), layers


@dataclass(frozen=True)
class Bounds:
    """Means per task over all layers."""

    usd: float
    seconds: float
    risk: float


def central_plan(value: np.ndarray, layers: list[Layer], bounds: Bounds) -> tuple[float, list[np.ndarray]]:
    """One LP over the shares of all layers: Σ V·Q − USD − expected loss, within the bounds. Totals."""
    n = value.size
    sizes = [layer.quality.shape[1] for layer in layers]
    quality, usd, seconds, risk = (
        np.concatenate([column.ravel() for column in columns])
        for columns in zip(*(layer.columns for layer in layers), strict=True)
    )
    worth = np.concatenate([(value[:, None] * layer.quality).ravel() for layer in layers]) - usd - risk
    one_each = np.zeros((n * len(layers), quality.size))
    column = 0
    for k, size in enumerate(sizes):
        for x in range(n):
            one_each[k * n + x, column : column + size] = 1.0
            column += size
    answer = linprog(
        -worth,
        A_ub=np.vstack([usd, seconds, risk]),
        b_ub=n * np.array([bounds.usd, bounds.seconds, bounds.risk]),
        A_eq=one_each,
        b_eq=np.ones(one_each.shape[0]),
        method="highs-ipm",
    )
    assert answer.status == 0, answer.message
    ends = np.cumsum([n * size for size in sizes])[:-1]
    parts = np.split(answer.x, ends)
    return -float(answer.fun), [part.reshape(n, -1) for part in parts]


def market(value: np.ndarray, layers: list[Layer], bounds: Bounds) -> PriceVector:
    """Prices from Walras: each (task, layer) pair is a row, padded with masked uses to the widest menu."""
    n, width = value.size, max(layer.quality.shape[1] for layer in layers)

    def stacked(pick: int) -> np.ndarray:
        menus = (layer.columns[pick] for layer in layers)
        padded = [np.pad(m, ((0, 0), (0, width - m.shape[1])), constant_values=np.nan) for m in menus]
        return np.vstack(padded)

    quality = stacked(0)
    uses = Uses(
        tuple(f"use{i}" for i in range(width)),
        quality,
        stacked(1)[:, :, None],
        seconds=stacked(2),
        risk=stacked(3),
        allowed=~np.isnan(quality),
    )
    rows = [
        Constraint("budget", bounds.usd / len(layers)),
        Constraint("mean_sla", bounds.seconds / len(layers)),
        Constraint("risk_envelope", bounds.risk / len(layers)),
    ]
    tasks = Tasks(np.tile(value, len(layers)))
    assert len(tasks) == n * len(layers)
    mu = discover(tasks, uses, rows, defer=False).multipliers
    return PriceVector(1.0 + mu[0], mu[1], 1.0 + mu[2])


@settings(max_examples=150)
@given(SEEDS, st.integers(1, 10), st.integers(2, 4), st.floats(0.0, 1.0))
def test_w1_layers_alone_reach_the_planners_optimum(seed: int, n: int, count: int, ease: float) -> None:
    """Decentralised at one complete price vector, nothing is lost against the planner who sees all."""
    value, layers = random_layers(seed, n, count)
    # Bounds between what some allocation takes and what all would like, so that several of them bind.
    rng = np.random.default_rng(seed + 1)
    some = [rng.integers(0, layer.quality.shape[1], n) for layer in layers]
    least, most = np.zeros(3), np.zeros(3)
    for layer, use in zip(layers, some, strict=True):
        free = (value[:, None] * layer.quality - layer.usd - layer.risk).argmax(axis=1)
        for k, column in enumerate(layer.columns[1:]):
            least[k] += column[np.arange(n), use].mean()
            most[k] += column[np.arange(n), free].mean()
    bounds = Bounds(*map(float, np.maximum(least + ease * np.maximum(most - least, 0.0), 0.0)))

    optimum, plan = central_plan(value, layers, bounds)
    p = market(value, layers, bounds)
    event(f"prices discovered: {sum(map(bool, (p.compute > 1, p.latency > 0, p.risk > 1)))}")
    alone = [find(value, layer, p) for find, layer in zip(LAYERS, layers, strict=False)]

    scale = 1e-8 * n * (1.0 + float(value.max())) * (p.compute + p.latency + p.risk)
    rent = n * ((p.compute - 1) * bounds.usd + p.latency * bounds.seconds + (p.risk - 1) * bounds.risk)
    assert sum(best.sum() for best in alone) + rent == pytest.approx(optimum, abs=scale)
    # And what the planner gives each layer is what that layer would take by itself.
    for layer, shares, best in zip(layers, plan, alone, strict=True):
        got = shares * value[:, None] * layer.quality
        for price, column in zip((p.compute, p.latency, p.risk), layer.columns[1:], strict=True):
            got = got - price * shares * column
        assert got.sum() == pytest.approx(best.sum(), abs=10 * scale)


# --- [Z-W2] every optimum has its prices ----------------------------------------------------------------------------


@settings(max_examples=150)
@given(economies(min_rows=1, styles=("ties", "twins", "free", "smooth")), SEEDS)
def test_w2_any_optimum_is_supported_by_prices(economy: Economy, seed: int) -> None:
    """Another optimum than the solver's own, picked at random from the optimal face, and bounds set to what it uses."""
    assume(economy.rows)
    first = planner(economy)
    assert first is not None
    direction = np.random.default_rng(seed).normal(size=economy.uses.shape)
    other = planner(economy, direction, at_least=first.value - 1e-10 * economy.scale)
    assert other is not None
    shares = np.where(other.shares > 1e-9, other.shares, 0.0)
    event(f"another vertex: {bool(np.abs(shares - first.shares).max() > 1e-6)}")

    rows = tuple(
        replace(row, bound=max(used_of(economy, row, shares), 1e-9 if row.kind == "quantile_sla" else 0.0))
        for row in economy.rows
    )
    assume(all(row.kind != "quantile_sla" or row.bound < 1 for row in rows))
    own = replace(economy, rows=rows)
    clearing = discover(own.tasks, own.uses, own.rows, defer=own.defer, declared=own.declared)
    values = net_value(own.tasks, own.uses, clearing.prices)
    net, _ = lagrangian(own, clearing.multipliers)
    tolerance = 1e-6 * economy.scale * (1.0 + clearing.multipliers.sum())
    best = np.maximum(values.max(axis=1), 0.0) if own.defer else values.max(axis=1)
    for task, use in np.argwhere(shares > 1e-6):
        assert values[task, use] >= best[task] - tolerance / shares[task, use]
        assert values[task, use] == pytest.approx(net[task, use], abs=tolerance)
    deferred = 1.0 - shares.sum(axis=1)
    for task in np.flatnonzero(deferred > 1e-6):
        assert best[task] <= tolerance / deferred[task]


# --- [P0] a violation of [Z-2] is waste ------------------------------------------------------------------------------


def waste_free_prices_of(economy: Economy, shares: np.ndarray) -> tuple[Economy, np.ndarray, np.ndarray]:
    """The economy bounded by what an allocation uses, its clearing's allocation, and net values at its prices.

    Nothing has a declared price here: what counts is V·Q, and USD, seconds and risk only because they are bounded.
    """
    uses = economy.uses
    timed = replace(
        uses,
        amounts=np.concatenate((uses.amounts[:, :, :1], uses.seconds[:, :, None]), axis=2),
        resources=("usd", "seconds"),
        risk=np.maximum(uses.risk, 0.0),
    )
    bare = replace(
        economy,
        tasks=replace(
            economy.tasks,
            latency_price=np.zeros(len(economy.tasks)),
            risk_price=np.zeros(len(economy.tasks)),
            irreversible_price=np.zeros(len(economy.tasks)),
        ),
        uses=timed,
        declared=(),
    )
    rows = tuple(
        replace(row, bound=used_of(bare, row, shares))
        for row in (
            Constraint("budget", 0.0),
            Constraint("budget", 0.0, resource="seconds"),
            Constraint("risk_envelope", 0.0, Scope()),
        )
    )
    bare = replace(bare, rows=rows)
    clearing = discover(bare.tasks, bare.uses, rows, defer=bare.defer, declared=())
    values = net_value(bare.tasks, bare.uses, clearing.prices)
    return bare, shares_of(clearing.mix, uses.shape), values


@settings(max_examples=150)
@given(
    SEEDS, st.integers(1, 12), st.integers(2, 4), st.booleans(), st.sampled_from(("smooth", "ties", "twins"))
)
def test_p0_a_residual_is_pareto_dominated_and_none_is_not(
    seed: int, n: int, i: int, defer: bool, style: str
) -> None:
    """Off the first-order conditions, somebody can have more V·Q with no more USD, seconds or risk in sum; the
    residual of [Z-2] says how much. On them, nobody can."""
    economy = random_economy(seed, n, i, style, defer=defer)
    shares = random_shares(np.random.default_rng(seed + 1), economy)
    bare, better, values = waste_free_prices_of(economy, shares)
    weight = economy.tasks.weight
    residual = float(weight @ equimarginal_residual(values, shares, defer=defer)) / economy.weight
    tolerance = 1e-7 * bare.scale

    had, has = objective_of(bare, shares), objective_of(bare, better)
    assert has - had == pytest.approx(residual, abs=tolerance)
    event(f"dominated: {residual > tolerance}")
    if residual > tolerance:
        assert has > had
        for row in bare.rows:
            assert used_of(bare, row, better) <= used_of(bare, row, shares) * (1 + 1e-9) + 1e-12
    best = planner(bare)
    assert best is not None
    assert best.value == pytest.approx(had + residual, abs=tolerance)

    # The other way round: the dominating allocation has no residual at its own prices, and the planner finds no more.
    again, still, at_own_prices = waste_free_prices_of(economy, better)
    left = float(weight @ equimarginal_residual(at_own_prices, better, defer=defer)) / economy.weight
    assert left == pytest.approx(0.0, abs=10 * tolerance)
    nothing_more = planner(again)
    assert nothing_more is not None
    assert nothing_more.value <= has + 10 * tolerance
    assert objective_of(again, still) == pytest.approx(has, abs=10 * tolerance)


def test_p0_by_hand() -> None:
    """Two tasks, 6 USD. The dear model went to the task that gains less from it: swapping wins, and [Z-2] sees it."""
    tasks = Tasks(np.array([10.0, 100.0]), risk_price=np.zeros(1))
    quality = np.array([[0.7, 0.9], [0.7, 0.9]])
    uses = Uses(("cheap", "frontier"), quality, np.array([[[1.0], [5.0]]] * 2))
    economy = Economy(tasks, uses, (Constraint("budget", 3.0),), defer=False, declared=())
    wrong = np.array([[0.0, 1.0], [1.0, 0.0]])
    right = 1.0 - wrong
    clearing = discover(tasks, uses, economy.rows, defer=False, declared=())
    values = net_value(tasks, uses, clearing.prices)
    assert used_of(economy, economy.rows[0], wrong) == used_of(economy, economy.rows[0], right) == 3.0
    assert equimarginal_residual(values, wrong, defer=False).sum() == pytest.approx((100 - 10) * 0.2)
    assert equimarginal_residual(values, right, defer=False) == pytest.approx([0.0, 0.0], abs=1e-9)
    assert total(economy, right, tasks.value[:, None] * quality) == pytest.approx(97.0)
    assert total(economy, wrong, tasks.value[:, None] * quality) == pytest.approx(79.0)
