"""Fisher markets: goldens, laws, a second road, and what is said of who got what."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import clarabel
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import minimize

from economies import SEEDS
from walras.errors import NotCleared, QuantityError
from walras.market.tenants.fairness import envy, externalities, one_price, shares, utilities
from walras.market.tenants.fisher import FisherMarket, solve
from walras.market.tenants.proportional import proportional_response

KINDS = ("linear", "CES", "Leontief", "Cobb–Douglas", "mixed")
STYLES = ("plain", "ties", "sparse", "twins", "heavy", "wide")


def market(
    seed: int, kind: str, style: str = "plain", money: str = "no", n: int = 30, g: int = 5
) -> FisherMarket:
    rng = np.random.default_rng(seed)
    n, g = int(rng.integers(1, n + 1)), int(rng.integers(1, g + 1))
    weights, budgets, supply = rng.lognormal(0, 1, (n, g)), rng.lognormal(0, 1, n), rng.uniform(0.2, 5, g)
    if style == "ties":
        weights, budgets = rng.integers(0, 4, (n, g)).astype(float), rng.integers(0, 3, n).astype(float)
        supply = rng.integers(1, 4, g).astype(float)
    elif style == "sparse":
        weights *= rng.random((n, g)) < 0.3
    elif style == "twins":
        weights = weights[rng.integers(0, max(1, n // 4), n)]
    elif style == "heavy":
        budgets = rng.pareto(0.5, n)
    elif style == "wide":
        weights = rng.lognormal(0, 6, (n, g))
    weights[~weights.any(axis=1), 0] = 1.0
    budgets[0] += 1.0
    elasticity = {
        "linear": np.full(n, np.inf),
        "CES": rng.uniform(0.05, 8, n),
        "Leontief": np.zeros(n),
        "Cobb–Douglas": np.ones(n),
        "mixed": rng.choice([0.0, 0.3, 1.0, 2.0, 20.0, np.inf], n),
    }[kind]
    share = {"no": 0.0, "some": 0.5, "all": 1.0}[money]
    worth = np.where(rng.random(n) < share, rng.lognormal(0, 2, n), np.inf)
    return FisherMarket(budgets, weights, supply, elasticity, worth)


def plain_utility(m: FisherMarket, i: int, x: np.ndarray) -> float:
    """Written out again from the definition."""
    a, sigma = m.weights[i], float(m.elasticity[i])
    if np.isinf(sigma):
        return float(a @ x)
    a = a / a.sum()
    on = a > 0
    if sigma == 0:
        return float((x[on] / a[on]).min())
    if sigma == 1:
        return float(np.prod((x[on] / a[on]) ** a[on]))
    if sigma < 1 and not x[on].all():
        return 0.0
    return float((a[on] ** (1 / sigma) @ x[on] ** (1 - 1 / sigma)) ** (sigma / (sigma - 1)))


@pytest.mark.data
def test_goldens() -> None:
    golden = json.loads(
        (Path(os.environ["WALRAS_DATA"]) / "equilibrium/fisher.json").read_text(encoding="utf-8")
    )
    linear, douglas = golden["linear"], golden["cobb_douglas"]
    supply = np.array(golden["supply"], dtype=float)
    cleared = solve(
        FisherMarket(np.array(linear["budgets"], float), np.array(linear["valuations"], float), supply)
    )
    assert cleared.prices == pytest.approx(linear["prices"], abs=1e-12)
    assert cleared.allocation == pytest.approx(np.array(linear["allocation"]), abs=1e-12)
    assert cleared.certificate.objective == pytest.approx(
        linear["budgets"] @ np.log(linear["utilities"]), abs=1e-12
    )
    m = FisherMarket(
        np.array(douglas["budgets"], float), np.array(douglas["shares"], float), supply, np.ones(1)
    )
    assert solve(m).prices == pytest.approx(douglas["prices"], abs=1e-12)
    for step in (-1e-7, 1e-7):  # Newton instead of the closed form
        near = solve(replace(m, elasticity=np.full(1, 1 + step)))
        assert near.prices == pytest.approx(douglas["prices"], abs=1e-6)
        assert near.certificate.worst < 1e-12


@settings(max_examples=70)
@given(
    seed=SEEDS,
    kind=st.sampled_from(KINDS),
    style=st.sampled_from(STYLES),
    money=st.sampled_from(("no", "some", "all")),
)
def test_what_is_certified_is_so(seed: int, kind: str, style: str, money: str) -> None:
    """Goods clear, budgets are spent, nobody could do better, and bound and objective meet: Eisenberg–Gale's optimum is the
    competitive equilibrium."""
    m = market(seed, kind, style, money)
    cleared = solve(m)
    event(f"free goods: {int((cleared.prices == 0).sum())}")
    c, p, x = cleared.certificate, cleared.prices, cleared.allocation
    assert c.worst <= 1e-6
    assert (x >= 0).all()
    assert (cleared.kept >= 0).all()
    assert (x.sum(axis=0) <= m.supply * (1 + 2e-6)).all()
    assert p @ (m.supply - x.sum(axis=0)) == pytest.approx(0, abs=2e-6 * m.budgets.sum())
    assert x @ p + cleared.kept == pytest.approx(m.budgets, rel=1e-9)
    # No other bundle that a budget buys is better: single goods, and those of the others.
    i = seed % len(m)
    if style != "wide" and m.budgets[i] > 0:
        own = utilities(m, x, cleared.kept)[i]
        money_kept = cleared.kept[i] if np.isfinite(m.worth[i]) else 0.0
        scale = m.worth[i] if np.isfinite(m.worth[i]) else 1.0
        assert own == pytest.approx(scale * plain_utility(m, i, x[i]) + money_kept, rel=1e-7)
        for bundle in x:
            cost = float(p @ bundle)
            if cost > 0:
                part = bundle * m.budgets[i] / cost
                assert scale * plain_utility(m, i, part) <= own * (1 + 1e-5)


@settings(max_examples=30)
@given(seed=SEEDS, kind=st.sampled_from(("linear", "CES", "Leontief", "mixed")), power=st.integers(-30, 30))
def test_only_ratios_count(seed: int, kind: str, power: int) -> None:
    """Budgets in cents, goods by the dozen, and other units of utility: the same market."""
    m = market(seed, kind)
    rng = np.random.default_rng(seed)
    unit, by = rng.lognormal(0, 2, m.supply.size), 10.0 ** (power / 5)
    # α of a CES utility has the unit of its good to the power 1 − σ.
    sigma = np.where(np.isinf(m.elasticity), 2.0, m.elasticity)[:, None]
    weights = np.where(np.isinf(m.elasticity)[:, None], m.weights / unit, m.weights * unit ** (1 - sigma))
    weights *= rng.lognormal(0, 2, (len(m), 1))
    one = solve(m)
    other = solve(FisherMarket(by * m.budgets, weights, m.supply * unit, m.elasticity))
    assert other.prices * unit == pytest.approx(by * one.prices, rel=1e-5, abs=1e-6 * by * one.prices.max())
    order = rng.permutation(len(m))
    mixed = solve(FisherMarket(m.budgets[order], m.weights[order], m.supply, m.elasticity[order]))
    assert mixed.prices == pytest.approx(one.prices, rel=1e-6, abs=1e-7 * one.prices.max())


@settings(max_examples=8)
@given(seed=SEEDS, kind=st.sampled_from(("linear", "CES")))
def test_a_second_road_ends_at_the_same_prices(seed: int, kind: str) -> None:
    m = market(seed, kind, n=6, g=3)
    m = replace(m, elasticity=np.where(m.elasticity <= 1.2, 1.2, m.elasticity))
    road = proportional_response(m, tolerance=1e-4)
    assert road.prices == pytest.approx(solve(m).prices, rel=1e-2)
    assert road.certificate.objective == pytest.approx(
        solve(m).certificate.objective, abs=1e-4 * m.budgets.sum()
    )


def test_a_general_solver_finds_no_better_allocation() -> None:
    """scipy on Eisenberg–Gale itself, in quantities, for complements and substitutes with money kept by some."""
    m = market(11, "CES", n=5, g=3, money="some")
    m = replace(m, elasticity=np.clip(m.elasticity, 0.4, 3.0))
    n, g = m.weights.shape
    cleared = solve(m)

    def loss(z: np.ndarray) -> float:
        x, kept = z[: n * g].reshape(n, g), z[n * g :]
        rows = zip(range(n), x, kept, np.isfinite(m.worth), strict=True)
        u = [
            plain_utility(m, i, b) * m.worth[i] + k if has else plain_utility(m, i, b)
            for i, b, k, has in rows
        ]
        return float(-(m.budgets @ np.log(u)) + kept @ np.isfinite(m.worth))

    first = np.concatenate((np.tile(m.supply / n, n), 0.1 * m.budgets))
    room = {"type": "ineq", "fun": lambda z: m.supply - z[: n * g].reshape(n, g).sum(axis=0)}
    found = minimize(
        loss,
        first,
        bounds=[(1e-9, None)] * first.size,
        constraints=room,
        options={"maxiter": 500, "ftol": 1e-13},
    )
    assert found.success
    assert -found.fun == pytest.approx(cleared.certificate.objective, abs=1e-5)


def test_large_markets_are_cleared_to_the_last_digits() -> None:
    rng = np.random.default_rng(0)
    n, g = 70_000, 8
    m = FisherMarket(rng.lognormal(0, 1, n), rng.lognormal(0, 1, (n, g)), rng.uniform(0.5, 2, g))
    cleared = solve(m)
    assert cleared.certificate.worst <= 1e-12
    assert cleared.passes < 40
    again = solve(m, start=cleared.prices * rng.uniform(0.99, 1.01, g))
    assert again.prices == pytest.approx(cleared.prices, rel=1e-12)


# --- fairness ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=SEEDS, kind=st.sampled_from(KINDS), money=st.sampled_from(("no", "some")))
def test_nobody_envies_and_nobody_is_worse_off_than_with_its_share(seed: int, kind: str, money: str) -> None:
    m = market(seed, kind, money=money)
    cleared = solve(m)
    assert envy(m, cleared).gain.max() <= 1e-5
    view = shares(m, cleared)
    assert (view.over_budget_split >= 1 - 1e-5).all()
    assert (view.of_all <= 1 + 1e-5).all()
    _, asked, kept = one_price(m)
    assert (asked.sum(axis=0) <= m.supply * (1 + 1e-6)).all()
    assert (kept >= 0).all()
    even = replace(m, budgets=np.ones(len(m)), worth=np.full(len(m), np.inf))
    assert (shares(even, solve(even)).over_equal_split >= 1 - 1e-5).all()


def test_envy_is_found_where_there_is_some() -> None:
    m = market(3, "linear", n=20)
    cleared = solve(m)
    i = int(m.budgets.argmax())
    swapped = cleared.allocation.copy()
    swapped[i] *= 0.25
    worse = envy(m, replace(cleared, allocation=swapped))
    assert worse.gain[i] > 0.5
    assert worse.whom[i] != i
    few = envy(m, replace(cleared, allocation=swapped), look_at=2)
    assert few.looked_at.size == 2
    assert few.gain[i] <= worse.gain[i]


@settings(max_examples=15)
@given(seed=SEEDS, kind=st.sampled_from(KINDS))
def test_what_a_tenant_costs_the_others_lies_between_its_bundle_without_it_and_its_payment(
    seed: int, kind: str
) -> None:
    m = market(seed, kind, n=12)
    found = externalities(m, solve(m), sample=3)
    slack = found.error + 1e-6 * m.budgets.sum()
    assert (found.exact <= found.first_order[found.tenants] + slack).all()
    assert (found.exact >= found.least - slack).all()


def test_second_order_is_nearer_for_small_tenants() -> None:
    rng = np.random.default_rng(1)
    m = FisherMarket(rng.lognormal(0, 1, 200), rng.lognormal(0, 1, (200, 4)), np.ones(4), np.full(1, 0.5))
    found = externalities(m, solve(m), sample=10)
    off = [
        np.abs(guess[found.tenants] - found.exact).max() for guess in (found.first_order, found.second_order)
    ]
    assert off[1] < 0.1 * off[0]


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    names = {"goods": ("prefill", "decode"), "tenants": ("ann", "bob")}
    budgets, weights, supply = np.ones(2), np.array([[1.0, 2.0], [3.0, 4.0]]), np.ones(2)

    def refused(match: str, **change: object) -> None:
        given = {"budgets": budgets, "weights": weights, "supply": supply} | change
        with pytest.raises(QuantityError, match=match):
            FisherMarket(**given, **names)  # type: ignore[arg-type]

    refused("every tenant's budget is 0", budgets=np.zeros(2))
    refused("tenant 'bob': the budget is -1", budgets=np.array([1.0, -1.0]))
    refused("tenant 'bob': the budget is nan", budgets=np.array([1.0, np.nan]))
    refused("tenant 'ann' wants nothing", weights=np.array([[0.0, 0.0], [1.0, 1.0]]))
    refused("tenant 'bob': the weight of good 'decode' is nan", weights=np.array([[1.0, 0.0], [1.0, np.nan]]))
    refused("tenant 'ann': the weight of good 'prefill' is -1", weights=np.array([[-1.0, 0.0], [1.0, 1.0]]))
    refused("the supply of good 'decode' is 0", supply=np.array([1.0, 0.0]))
    refused("tenant 'ann': the elasticity is -1", elasticity=np.array([-1.0, 1.0]))
    refused("tenant 'bob': the worth of utility is 0", worth=np.array([1.0, 0.0]))
    refused(r"weights have shape \(2, 2\)", supply=np.ones(3))
    refused("elasticity has shape", elasticity=np.ones(3))


def test_a_good_that_nobody_with_a_budget_wants_is_free_and_said_to_be() -> None:
    m = FisherMarket(
        np.array([2.0, 1.0, 0.0]), np.array([[1.0, 0, 0], [1.0, 0, 2.0], [0, 5.0, 0]]), np.ones(3)
    )
    cleared = solve(m)
    assert cleared.unwanted == (1,)
    assert cleared.prices[1] == 0
    assert cleared.allocation[2].sum() == 0
    assert cleared.prices.sum() == pytest.approx(3)


def test_what_is_not_reached_is_not_claimed() -> None:
    m = market(5, "linear", n=30)
    with pytest.raises(NotCleared) as caught:
        proportional_response(m, tolerance=1e-9, steps=3)
    assert caught.value.certificate.worst > 1e-9
    with pytest.raises(QuantityError, match="elasticity above 1"):
        proportional_response(market(5, "Leontief"))


@pytest.mark.parametrize("elasticity", [np.inf, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_clarabel_finds_the_same_prices(elasticity: float, seed: int) -> None:
    """Another road: Eisenberg and Gale's conic programme, max Σ B·log u(x), whose multipliers of the supply are the prices."""
    rng, n, g = np.random.default_rng(seed), 6, 3
    budgets, weights, supply = rng.uniform(1, 3, n), rng.uniform(0.2, 1, (n, g)), rng.uniform(1, 4, g)
    found = solve(FisherMarket(budgets, weights, supply, np.array([elasticity])), tolerance=1e-9)
    assert eisenberg_gale(budgets, weights, supply, elasticity) == pytest.approx(found.prices, rel=1e-4)


def eisenberg_gale(budgets: Any, weights: Any, supply: Any, elasticity: float) -> Any:
    """(G,) for σ > 1. Variables x (N·G), r ≤ x^ρ (N·G) and t ≤ log Σ α·r (N); ρ = 1 − 1/σ, α = weights^(1/σ), and u = (Σ α·x^ρ)^(1/ρ). For σ = ∞ the α are the weights."""
    (n, g), power = weights.shape, 1 - 1 / elasticity
    share, eye = weights if power == 1 else weights ** (1 - power), np.eye(n * g)
    none, one = np.zeros((n * g, n * g)), np.zeros((n * g, n))
    x, r, t = np.hstack([eye, none, one]), np.hstack([none, eye, one]), np.eye(n, 2 * n * g + n, 2 * n * g)
    sold = np.tile(np.eye(g), n) @ x
    powers = [row for k in range(n * g) for row in (-x[k], 0 * x[k], -r[k])]
    logs = [row for i in range(n) for row in (-t[i], 0 * t[i], -(share[i] @ r[i * g : (i + 1) * g]))]
    ones = np.tile([0.0, 1.0, 0.0], n * g + n)
    cones = [clarabel.NonnegativeConeT(g)]
    if power < 1:
        cones += [clarabel.PowerConeT(power)] * (n * g)
    else:  # r = x ≥ 0
        powers, ones = [*(r - x), *(-x)], np.concatenate([np.zeros(2 * n * g), ones[: 3 * n]])
        cones += [clarabel.ZeroConeT(n * g), clarabel.NonnegativeConeT(n * g)]
    cones += [clarabel.ExponentialConeT()] * n
    quiet = clarabel.DefaultSettings()
    quiet.verbose = False
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix((2 * n * g + n, 2 * n * g + n)),
        -(budgets @ t) / power,
        sparse.csc_matrix(np.vstack([sold, *powers, *logs])),
        np.concatenate([supply, ones]),
        cones,
        quiet,
    )
    return np.array(solver.solve().z[:g])
