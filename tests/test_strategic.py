"""Silent routing against a menu: laws of the simulation on small synthetic populations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walras.errors import QuantityError
from walras.estimate.type_laws import LogNormal
from walras.simulate.strategic import (
    Population,
    Posted,
    Users,
    beliefs,
    best_report,
    draw_users,
    flat_price,
    heard,
    overtakes,
    published,
    routed,
    silent,
)

SHARES = np.linspace(0.0, 1.0, 6)
seeds = st.integers(0, 2**32 - 1)


def economy(seed: int, n: int = 40, ways: int = 3, models: int = 4, levels: int | None = None) -> Population:
    """Every expectation of the true prompt comes true; other ways to send it mislead the router. All are worth serving."""
    rng = np.random.default_rng(seed)
    value = rng.lognormal(1.0, 1.0, n) + 0.5
    signal = value.argsort().argsort() if levels is None else rng.integers(0, levels, n)
    quality, cost = rng.uniform(0.2, 1.0, (n, models)), rng.uniform(0.0, 0.1, (n, models))
    expected = np.concatenate([quality[:, None], rng.random((n, ways - 1, models))], axis=1)
    costs = np.concatenate([cost[:, None], rng.uniform(0.0, 0.1, (n, ways - 1, models))], axis=1)
    return Population(Users(value, signal, levels or n, rng.random(n)), expected, costs, quality, cost)


def best_worth(population: Population) -> float:
    worth = population.users.value[:, None] * population.quality - population.cost
    return float(worth.max(axis=1).mean())


# --- silent routing -----------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(["flat", "cost"]), st.sampled_from(["naive", "recalibrated"]))
def test_true_signals_that_say_all_give_the_first_best(seed, billing, operator):
    population = economy(seed)
    outcome = silent(population, 0.0, billing=billing, operator=operator)
    assert outcome.served == 1
    assert outcome.welfare == pytest.approx(best_worth(population), abs=1e-12)


@given(seeds)
def test_no_report_beats_the_best_report_and_the_truth_wins_ties(seed):
    population, rng = economy(seed, n=8, levels=3), np.random.default_rng(seed)
    users = population.users
    choice = routed(rng.uniform(0, 5, 3), population.expected, population.expected_cost)
    worth = np.round(users.value[:, None] * population.quality, 1)  # rounded, so that there are ties
    way, level = best_report(worth, choice, users.signal)
    for n, true in enumerate(users.signal):
        lies = {(k * 3 + abs(s - true), s): worth[n, choice[n, k, s]] for k, s in product(range(3), range(3))}
        most = max(lies.values())
        assert worth[n, choice[n, way[n], level[n]]] == most >= worth[n, choice[n, 0, true]]
        assert way[n] * 3 + abs(level[n] - true) == min(lie for (lie, _), got in lies.items() if got == most)


@given(seeds)
def test_billed_at_cost_lies_correct_the_router_where_users_know_best(seed):
    population = economy(seed, levels=4)
    welfare = [silent(population, a, billing="cost", operator="naive").welfare for a in SHARES]
    assert (np.diff(welfare) >= -1e-12).all()
    assert welfare[-1] <= best_worth(population) + 1e-12
    assert silent(population, 0.5, billing="cost", operator="naive").profit == 0


@given(seeds, st.sampled_from(["naive", "recalibrated"]), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_flat_price_recovers_the_cost(seed, operator, share):
    outcome = silent(economy(seed, levels=4), share, billing="flat", operator=operator)
    assert abs(outcome.profit) <= 1e-9
    assert outcome.revenue > 0


def two_models(every: int = 2) -> Population:
    """To one user in `every` the strong model is worth the dollar it costs; the signal says to whom."""
    n = 400
    high = np.arange(n) % every == 0
    value = np.where(high, 30.0, 3.0)
    quality, cost = np.tile([0.6, 0.7], (n, 1)), np.tile([0.01, 1.0], (n, 1))
    lot = np.random.default_rng(0).random(n)
    users = Users(value, high.astype(np.int64), 2, lot)
    return Population(users, quality[:, None], cost[:, None], quality, cost)


def test_under_a_flat_price_a_naive_operator_loses_by_every_lie():
    population = two_models()
    got = [silent(population, a, billing="flat", operator="naive") for a in SHARES]
    assert got[0].welfare == pytest.approx((3 * 0.6 - 0.01 + 30 * 0.7 - 1) / 2)
    assert got[-1].welfare == pytest.approx((3 * 0.7 - 1 + 30 * 0.7 - 1) / 2)
    assert (np.diff([o.welfare for o in got]) < 0).all()
    assert got[0].regret == pytest.approx(3 * 0.1 / 2)  # the low half would have liked the strong model
    assert np.isnan(got[-1].regret)
    assert np.isnan(got[-1].honest)


def test_where_no_lie_pays_nothing_changes():
    population = two_models()
    got = [silent(population, a, billing="cost", operator="recalibrated") for a in SHARES]
    assert {(o.welfare, o.swing) for o in got} == {(got[0].welfare, 0.0)}
    assert [o.regret for o in got[:-1]] == [0.0] * 5


def test_a_recalibrated_operator_that_cannot_settle_comes_near_the_mixed_equilibrium():
    # Lying pays while the signal is believed, and is not believed while it pays. At a belief of 9.9, where the router
    # is indifferent, the lies y solve (30·0.1 + 3y)/(0.1 + y) = 9.9: that share of the rounds has all liars lying.
    population = two_models(every=10)
    found = silent(population, 0.8, billing="flat", operator="recalibrated")
    gamed = silent(population, 0.8, billing="flat", operator="naive").welfare
    liars = float((population.users.lot < 0.8)[population.users.signal == 0].mean()) * 0.9
    believed = (3 - 0.99) / 6.9 / liars
    unbelieved = (3 * 0.9 + 30 * 0.1) * 0.6 - 0.01
    assert found.swing == pytest.approx(unbelieved - gamed)
    assert found.welfare == pytest.approx(believed * gamed + (1 - believed) * unbelieved, abs=0.02)


@given(seeds, st.integers(1, 12))
def test_flat_price_is_the_lowest_fixed_point(seed, n):
    rng = np.random.default_rng(seed)
    worth, cost = np.round(rng.uniform(0, 1, n), 1), rng.uniform(0, 1, n)
    price, present = flat_price(worth, cost)
    assert abs(price * present.sum() - cost @ present) <= 1e-9
    assert (present[worth > price] == 1).all()
    assert (present[worth < price] == 0).all()
    assert ((present > 0) & (present < 1)).sum() <= 1
    for other in np.unique(np.append(worth, np.add.accumulate(cost) / np.arange(1, n + 1))):
        inside = worth >= other
        if inside.any() and (worth >= cost[inside].mean()).sum() == inside.sum():
            assert price <= cost[inside].mean() + 1e-12


def test_a_market_where_nobody_covers_her_cost_is_empty():
    price, present = flat_price(np.array([0.1, 0.2]), np.array([1.0, 1.0]))
    assert price == 0.2
    assert not present.any()


@given(seeds)
def test_beliefs_are_means_over_those_who_report(seed):
    rng = np.random.default_rng(seed)
    value, level, present = rng.random(30), rng.integers(0, 5, 30), rng.integers(0, 2, 30).astype(float)
    belief = beliefs(*heard(value, level, present, 6))
    come = present > 0 if present.any() else np.ones(30, dtype=bool)
    for s in range(6):
        among = come & (level == s) if (come & (level == s)).any() else come
        assert belief[s] == pytest.approx(value[among].mean())


# --- the menu -----------------------------------------------------------------------------------------------------------


@given(seeds)
def test_a_menu_of_models_cannot_be_gamed(seed):
    population = economy(seed)
    posted = Posted(np.array([0.4, 0.8]), np.array([0.5, 2.0]), np.broadcast_to(np.array([1, 3]), (40, 3, 2)))
    got = [published(population, a, posted) for a in SHARES]
    assert len({(o.welfare, o.revenue, o.profit, o.served) for o in got}) == 1
    assert [o.regret for o in got[:-1]] == [0.0] * 5


def test_users_take_the_tier_that_is_worth_most_to_them_or_none():
    population = two_models()
    posted = Posted(
        np.array([0.6, 0.7]), np.array([2.0, 4.5]), np.broadcast_to(np.array([0, 1]), (400, 1, 2))
    )
    found = published(population, 0.5, posted)  # 3·0.6 < 2: the low half stays away
    assert found.served == 0.5
    assert found.revenue == pytest.approx(4.5 / 2)
    assert found.profit == pytest.approx(3.5 / 2)
    assert found.welfare == pytest.approx((30 * 0.7 - 1) / 2)


def test_a_line_that_moves_a_routed_tier_is_used_and_costs_the_operator():
    base = two_models()
    population = Population(
        base.users,
        base.expected.repeat(2, axis=1),
        base.expected_cost.repeat(2, axis=1),
        base.quality,
        base.cost,
    )
    model = np.zeros((400, 2, 2), dtype=np.int64)
    model[:, :, 1] = 1
    model[:, 1, 0] = 1  # with the line, the cheap tier gives the strong model
    posted = Posted(np.array([0.6, 0.7]), np.array([0.01, 1.0]), model)
    honest, gamed = (published(population, a, posted) for a in (0.0, 1.0))
    assert honest.profit == pytest.approx(0)
    assert gamed.profit == pytest.approx(0.01 - 1.0)
    assert gamed.welfare < honest.welfare
    assert honest.regret == pytest.approx(
        (3 * 0.1 + 1.0 - 0.01) / 2
    )  # the line; the upper tier for the price of the lower


# --- the rest -----------------------------------------------------------------------------------------------------------


def test_signals_say_what_the_correlation_says():
    law = LogNormal(0.04, 1.0)
    drawn = {
        r: draw_users(law, 20_000, correlation=r, levels=8, rng=np.random.default_rng(1))
        for r in (0.0, 0.8, 1.0)
    }
    for r, users in drawn.items():
        assert np.array_equal(users.value, drawn[0.0].value)  # only what is shown of them differs
        assert np.bincount(users.signal) == pytest.approx(np.full(8, 2500), abs=150)
        found = np.corrcoef(np.log(users.value), users.signal)[0, 1]
        assert found == pytest.approx(
            r * 0.976, abs=0.02
        )  # eight equal levels keep 0.976 of a normal's correlation
    order = drawn[1.0].value.argsort()
    assert (np.diff(drawn[1.0].signal[order]) >= 0).all()
    assert np.median(drawn[0.0].value) == pytest.approx(0.04, rel=0.03)


@given(seeds)
def test_the_router_takes_the_best_model_at_its_belief(seed):
    rng = np.random.default_rng(seed)
    worth, expected, cost = rng.uniform(0, 3, 4), rng.random((5, 2, 3)), rng.random((5, 2, 3))
    net = worth[:, None] * expected[:, :, None, :] - cost[:, :, None, :]
    assert np.array_equal(routed(worth, expected, cost), net.argmax(axis=-1))


def test_overtaking_is_for_good():
    shares = np.array([0.0, 0.5, 1.0])
    assert overtakes(shares, np.array([0.1, 0.0, 0.2])) == 0
    assert overtakes(shares, np.array([-0.1, 0.1, 0.2])) == pytest.approx(0.25)
    assert overtakes(shares, np.array([0.3, -0.1, 0.1])) == pytest.approx(
        0.75
    )  # ahead at first does not count
    assert overtakes(shares, np.array([0.3, 0.1, -0.1])) == np.inf


def test_a_population_that_does_not_fit_is_refused():
    p = two_models()
    with pytest.raises(QuantityError, match="expected_cost has shape"):
        Population(p.users, p.expected, p.expected_cost[:-1], p.quality, p.cost)
    with pytest.raises(QuantityError, match="every cost must be finite and ≥ 0"):
        Population(p.users, p.expected, p.expected_cost, p.quality, -p.cost)
    with pytest.raises(QuantityError, match="400 users for 399 requests"):
        Population(p.users, p.expected[1:], p.expected_cost[1:], p.quality[1:], p.cost[1:])
    with pytest.raises(QuantityError, match="a level from 0 to 0"):
        Population(
            Users(p.users.value, p.users.signal, 1, p.users.lot),
            p.expected,
            p.expected_cost,
            p.quality,
            p.cost,
        )
    with pytest.raises(QuantityError, match="and 4 levels"):
        draw_users(LogNormal(1.0, 1.0), 3, correlation=1.2, levels=4, rng=np.random.default_rng(0))
