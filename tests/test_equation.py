"""The one rule [Z-1]: its published numbers, and its laws against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize

from economies import (
    SEEDS,
    Economy,
    amount_of,
    economies,
    in_scope,
    is_sla,
    price_vectors,
    random_economy,
    random_shares,
)
from walras.equation import (
    DEFER,
    choose,
    choose_increments,
    cobb_douglas,
    equimarginal_residual,
    marginal_values,
    net_value,
    surplus,
    terms,
)
from walras.errors import QuantityError
from walras.prices import Constraint, Price, Prices
from walras.quantities import Tasks, Uses, whole_plans

# --- [Z-1], worked example -----------------------------------------------------------------------------------------

MODELS = ("cheap", "frontier")


def two_models(wrong_action: tuple[float, float] = (0.0, 0.0)) -> Uses:
    return Uses(MODELS, np.array([[0.7, 0.9]]), np.array([[[1.0], [5.0]]]), risk=np.array([wrong_action]))


def worked(value: float, wrong_action: tuple[float, float] = (0.0, 0.0), rho: float = 0.0) -> np.ndarray:
    tasks = Tasks(np.array([value]), risk_price=np.array([rho]))
    return surplus(tasks, two_models(wrong_action))[0]


def crossover(wrong_action: tuple[float, float] = (0.0, 0.0), rho: float = 0.0) -> float:
    """The V at which the rule changes its mind, by bisection on what it chooses."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        frontier = choose(worked(middle, wrong_action, rho)[None], defer=False).use[0] == 1
        low, high = (low, middle) if frontier else (middle, high)
    return high


@pytest.mark.parametrize(("value", "expected"), [(10.0, (6.0, 4.0)), (100.0, (69.0, 85.0))])
def test_worked_example(value: float, expected: tuple[float, float]) -> None:
    assert worked(value) == pytest.approx(expected)
    assert MODELS[choose(worked(value)[None]).use[0]] == {10.0: "cheap", 100.0: "frontier"}[value]


def test_worked_example_crosses_over_at_20() -> None:
    assert crossover() == pytest.approx(20.0)


def test_worked_example_with_wrong_actions_crosses_over_at_10() -> None:
    wrong, rho = (0.05, 0.01), 50.0
    cheap, frontier = worked(10.0) - worked(10.0, wrong, rho)
    assert cheap - frontier == pytest.approx(2.0)  # the cheap model loses a further 2
    assert crossover(wrong, rho) == pytest.approx(10.0)


# --- [Z-1], in full ------------------------------------------------------------------------------------------------


def by_hand(economy: Economy, prices: Prices, task: int, use: int) -> tuple[float, float, float, float]:
    """The four terms for one task and use, one scalar after the other."""
    tasks, uses = economy.tasks, economy.uses
    value = tasks.value[task] * uses.quality[task, use]
    compute = sum(
        usd * uses.amounts[task, use, uses.resources.index(resource)] for resource, usd in prices.declared
    )
    latency = tasks.latency_price[task] * uses.seconds[task, use]
    risk = tasks.risk_price[task] * uses.risk[task, use]
    risk += tasks.irreversible_price[task] * uses.irreversible_risk[task, use]
    for price in prices.discovered:
        row = price.constraint
        if not in_scope(row, tasks)[task]:
            continue
        charge = price.multiplier * (amount_of(row, uses)[task, use] - (row.bound if is_sla(row) else 0.0))
        if row.kind == "budget":
            compute += charge
        elif is_sla(row):
            latency += charge
        else:
            risk += charge
    return value, compute, latency, risk


@given(economies(max_tasks=6), SEEDS)
def test_net_value_and_its_terms_are_the_equation(economy: Economy, seed: int) -> None:
    prices = price_vectors(economy, np.random.default_rng(seed))
    net = net_value(economy.tasks, economy.uses, prices)
    parts = terms(economy.tasks, economy.uses, prices)
    for task, use in np.ndindex(*economy.uses.shape):
        if not economy.uses.allowed[task, use]:
            assert net[task, use] == -np.inf  # however good it looks, and even where it is unknown [Z-LEX]
            continue
        value, compute, latency, risk = by_hand(economy, prices, task, use)
        assert net[task, use] == pytest.approx(value - compute - latency - risk, abs=1e-9)
        got = [part[task, use] for part in (parts.value, parts.compute, parts.latency, parts.risk)]
        assert got == pytest.approx([value, compute, latency, risk], abs=1e-9)


@given(economies(max_tasks=6), SEEDS)
def test_in_the_pure_form_only_discovered_prices_count(economy: Economy, seed: int) -> None:
    prices = replace(price_vectors(economy, np.random.default_rng(seed)), numeraire="compute")
    net = net_value(economy.tasks, economy.uses, prices)
    bare = replace(
        economy,
        tasks=Tasks(
            economy.tasks.value,
            risk_price=np.zeros(1),
            tenant=economy.tasks.tenant,
            task_class=economy.tasks.task_class,
            time=economy.tasks.time,
        ),
    )
    undeclared = replace(prices, numeraire="usd", declared=())
    for task, use in np.argwhere(economy.uses.allowed):
        value, *charged = by_hand(bare, undeclared, task, use)
        assert net[task, use] == pytest.approx(value - sum(charged), abs=1e-9)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("i", [1, 2])
def test_a_column_given_as_one_number_counts_for_all(n: int, i: int) -> None:
    """Columns broadcast; one number for all is not the same as a column nobody filled."""
    tasks = Tasks(
        np.full(n, 10.0), latency_price=np.ones(1), risk_price=np.full(1, 2.0), irreversible_price=np.ones(1)
    )
    uses = Uses(
        tuple("ab"[:i]),
        np.ones((n, i)),
        np.ones((n, i, 1)),
        seconds=np.full((1, 1), 3.0),
        risk=np.full((1, 1), 0.25),
        irreversible_risk=np.full((1, 1), 0.125),
    )
    assert (surplus(tasks, uses) == 10.0 - 1.0 - 3.0 - 0.5 - 0.125).all()


# --- choosing ------------------------------------------------------------------------------------------------------

value_tables = st.tuples(st.integers(1, 8), st.integers(1, 5)).flatmap(
    lambda shape: hnp.arrays(
        np.float64, shape, elements=st.sampled_from((-np.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 3.0))
    )
)


@given(value_tables)
def test_choose_is_the_first_best_or_nothing(values: np.ndarray) -> None:
    choice = choose(values)
    for row, use, value in zip(values, choice.use, choice.value, strict=True):
        if max(row) > 0:
            assert use == list(row).index(max(row))
            assert value == max(row)
        else:
            assert (use, value) == (DEFER, 0.0)


@given(value_tables)
def test_without_deferring_the_best_is_taken_however_bad(values: np.ndarray) -> None:
    stuck = [task for task, row in enumerate(values) if max(row) == -np.inf]
    if stuck:
        with pytest.raises(
            QuantityError, match=rf"task {stuck[0]} has no allowed use .*\({len(stuck)} such tasks\)"
        ):
            choose(values, defer=False)
        return
    choice = choose(values, defer=False)
    assert (choice.use == [list(row).index(max(row)) for row in values]).all()
    assert (choice.value == values.max(axis=1)).all()


@given(value_tables, SEEDS)
def test_random_ties_choose_a_best_use_too(values: np.ndarray, seed: int) -> None:
    choice = choose(values, rng=np.random.default_rng(seed))
    assert (choice.value == np.maximum(values.max(axis=1), 0.0)).all()
    for row, use in zip(values, choice.use, strict=True):
        assert row[use] == max(row) >= 0 if use != DEFER else max(row) <= 0
    if np.isfinite(values.max(axis=1)).all():
        served = choose(values, defer=False, rng=np.random.default_rng(seed))
        assert (served.value == values.max(axis=1)).all()
        assert (values[np.arange(len(values)), served.use] == served.value).all()


@pytest.mark.parametrize(
    ("row", "tied"),
    [
        ([1.0, 2.0, 2.0, -np.inf, 2.0], [1, 2, 4]),
        ([0.3, 0.1 + 0.2, -1.0], [0, 1]),  # a tie up to the last bit of a sum
        ([0.0, -1.0, 0.0], [DEFER, 0, 2]),  # at a price that makes a use worth nothing, half of them defer
        ([0.0, 1e-6], [1]),
        ([-1e9, 1.0, 0.5], [1]),  # an absurd use does not make the others look alike
        ([1e-17, -5.0], [DEFER, 0]),
    ],
)
def test_random_ties_are_even(row: list[float], tied: list[int]) -> None:
    n = 30_000
    drawn = choose(np.tile(row, (n, 1)), rng=np.random.default_rng(0)).use
    counts = {use: int((drawn == use).sum()) for use in range(-1, len(row))}
    assert {use for use, count in counts.items() if count} == set(tied)
    assert [counts[use] for use in tied] == pytest.approx([n / len(tied)] * len(tied), rel=0.05)


@given(economies(max_tasks=8), SEEDS, st.floats(0, 1e9))
def test_no_price_buys_what_is_masked(economy: Economy, seed: int, quality: float) -> None:
    """[Z-LEX]: not at any value, and not when everything else is made worthless."""
    masked = ~economy.uses.allowed
    uses = replace(economy.uses, quality=np.where(masked, quality, economy.uses.quality))
    values = net_value(economy.tasks, uses, price_vectors(economy, np.random.default_rng(seed)))
    for use in (choose(values).use, choose(values - 1e12).use):
        chosen = use != DEFER
        assert not masked[np.flatnonzero(chosen), use[chosen]].any()


# --- increments ----------------------------------------------------------------------------------------------------

chains = st.tuples(st.integers(1, 4), st.integers(1, 7)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.integers(-8, 8).map(float) | st.floats(-5, 5))
)


@given(chains, st.data())
def test_marginal_choice_is_the_best_whole_plan(totals: np.ndarray, data: st.DataObject) -> None:
    """Concave or not, and where a plan is not allowed (−∞): the marginal rule earns what the best plan earns."""
    mask = data.draw(hnp.arrays(np.bool_, totals.shape))
    totals = np.where(mask, totals, -np.inf)
    steps = choose_increments(totals)
    for total, k in zip(totals, steps, strict=True):
        worth = [0.0, *total]
        assert worth[k] == pytest.approx(max(worth), abs=1e-9)
    # Marginal values fall along the chain: it is an envelope, so one cut by price decides.
    marginal = marginal_values(totals)
    assert (marginal[:, :-1] >= marginal[:, 1:]).all()


@given(SEEDS, st.integers(1, 6))
def test_on_a_concave_chain_marginal_values_are_differences(seed: int, n: int) -> None:
    falling = -np.sort(-np.random.default_rng(seed).normal(size=(3, n)), axis=1)
    totals = np.cumsum(falling, axis=1)
    assert marginal_values(totals) == pytest.approx(falling, abs=1e-12)
    for gains, steps in zip(falling, choose_increments(totals), strict=True):
        bought = 0  # buy the next step while it is worth its price
        while bought < n and gains[bought] > 0:
            bought += 1
        assert steps == bought


def test_a_step_that_pays_only_with_the_next_is_bought_with_it() -> None:
    """Planning alone costs 1, planning and acting earns 2: a myopic rule would stop at once, or go on to a third."""
    totals = np.array([[-1.0, 2.0, 1.5]])
    assert marginal_values(totals) == pytest.approx(np.array([[1.0, 1.0, -0.5]]))
    assert choose_increments(totals).tolist() == [2]
    assert choose_increments(np.array([[-1.0, -0.5]])).tolist() == [0]


@given(SEEDS, st.integers(1, 5), st.floats(0, 5))
def test_increments_priced_one_by_one_are_the_whole_plan(seed: int, n: int, mu: float) -> None:
    """Verifications: each costs, delays, and takes risk away. Net values of steps add up to those of plans."""
    economy = random_economy(seed, 5, n)
    prices = Prices((Price(Constraint("budget", 1.0), mu),), economy.declared)
    chain = replace(economy.uses, late={})
    plans = whole_plans(chain)
    of_plans = net_value(economy.tasks, plans, prices)
    of_steps = np.cumsum(net_value(economy.tasks, chain, prices), axis=1)
    assert (plans.allowed == np.isfinite(of_steps)).all()
    assert of_plans[plans.allowed] == pytest.approx(of_steps[plans.allowed], abs=1e-9)
    best = choose(of_plans)
    steps = choose_increments(of_plans)
    got = np.where(steps > 0, of_plans[np.arange(5), np.maximum(steps - 1, 0)], 0.0)
    assert got == pytest.approx(best.value, abs=1e-9)


# --- [Z-2] ---------------------------------------------------------------------------------------------------------


@given(economies(max_tasks=8), SEEDS)
def test_residual_is_what_is_lost_against_the_best_response(economy: Economy, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = net_value(economy.tasks, economy.uses, price_vectors(economy, rng))
    shares = random_shares(rng, economy)
    residual = equimarginal_residual(values, shares, defer=economy.defer)
    for row, share, lost in zip(values, shares, residual, strict=True):
        best = max(*row, 0.0) if economy.defer else max(row)
        got = sum(s * v for s, v in zip(share, row, strict=True) if s > 0)
        assert lost == pytest.approx(best - got, abs=1e-9)
        assert lost >= -1e-9
        # 0 exactly when the first-order conditions hold: whatever has a share has the highest value.
        held = all(v >= best - 1e-12 for s, v in zip(share, row, strict=True) if s > 0)
        held = held and (share.sum() >= 1 - 1e-12 or best <= 1e-12)
        if held:
            assert lost == pytest.approx(0.0, abs=1e-9)
        if lost <= 0:
            assert all(v >= best - 1e-6 for s, v in zip(share, row, strict=True) if s > 1e-6)


def test_residual_of_what_is_not_allowed_is_infinite() -> None:
    assert equimarginal_residual(np.array([[1.0, -np.inf]]), np.array([[0.5, 0.5]])) == [np.inf]


def test_residual_wants_whole_tasks_where_none_may_defer() -> None:
    with pytest.raises(QuantityError, match="sum to 1"):
        equimarginal_residual(np.array([[1.0, 2.0]]), np.array([[0.0, 0.5]]), defer=False)


# --- [Z-CD] --------------------------------------------------------------------------------------------------------

exponents = st.lists(st.sampled_from((0.0, 0.1, 0.25, 0.5, 1.0, 2.0)), min_size=1, max_size=5).filter(any)


@given(exponents, st.floats(0.01, 1e4), SEEDS)
def test_cobb_douglas(exponent: list[float], budget: float, seed: int) -> None:
    alpha = np.array(exponent)
    price = np.random.default_rng(seed).uniform(0.01, 5.0, alpha.size)
    tokens = cobb_douglas(alpha, price, budget)
    assert price @ tokens == pytest.approx(budget)  # nothing is left over
    assert (
        (tokens == 0) == (alpha == 0)
    ).all()  # no price buys what does nothing, none cuts a complement to zero
    used = alpha > 0
    marginal_product = alpha[used] / tokens[used] / price[used]  # ∂ln Q/∂t per full price
    assert marginal_product == pytest.approx(marginal_product[0])


@given(exponents, SEEDS)
def test_cobb_douglas_agrees_with_a_numeric_optimiser(exponent: list[float], seed: int) -> None:
    """The optimiser knows only ln Q and the budget, and moves spending, not tokens."""
    alpha = np.array(exponent)[np.array(exponent) > 0]
    price, budget = np.random.default_rng(seed).uniform(0.1, 5.0, alpha.size), 10.0

    def minus_log_output(spent: np.ndarray) -> float:
        return -float(alpha @ np.log(np.maximum(spent, 1e-12) / price))

    found = minimize(
        minus_log_output,
        np.full(alpha.size, budget / alpha.size),
        bounds=[(1e-6, budget)] * alpha.size,
        constraints={"type": "ineq", "fun": lambda spent: budget - spent.sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert cobb_douglas(alpha, price, budget) * price == pytest.approx(found.x, rel=1e-3, abs=1e-3)
    assert minus_log_output(cobb_douglas(alpha, price, budget) * price) <= found.fun + 1e-9


def test_cobb_douglas_golden() -> None:
    """α = (1/2, 1/4, 0), p = (2, 1, 1), B = 12: two thirds on the first, one third on the second."""
    assert cobb_douglas(np.array([0.5, 0.25, 0.0]), np.array([2.0, 1.0, 1.0]), 12.0).tolist() == [
        4.0,
        4.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("alpha", "price", "budget"),
    [
        ((-1.0, 1.0), (1.0, 1.0), 1.0),
        ((0.0, 0.0), (1.0, 1.0), 1.0),
        ((1.0,), (0.0,), 1.0),
        ((1.0,), (1.0,), -1.0),
    ],
)
def test_cobb_douglas_refuses_what_has_no_optimum(
    alpha: tuple[float, ...], price: tuple[float, ...], budget: float
) -> None:
    with pytest.raises(QuantityError, match="Cobb–Douglas"):
        cobb_douglas(np.array(alpha), np.array(price), budget)
