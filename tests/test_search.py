"""Sequential use of models: reservation indices, plans beside brute force, replays, and what they gain on a real log."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product
from math import prod

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from conftest import DataDir
from walras.demand.escalation import best_fixed, break_even, fit_escalation, simulate
from walras.demand.search import (
    STOP,
    TAKE,
    VERIFY,
    Plan,
    Verifier,
    full_prices,
    plan_search,
    reservation_index,
)
from walras.equation import DEFER, net_value
from walras.errors import QuantityError
from walras.estimate.outcomes import Joint, fit_joint
from walras.prices import Constraint, Price, Prices
from walras.quantities import Tasks, Uses

seeds = st.integers(0, 2**32)
accuracies = st.sampled_from([0.5, 0.6, 0.75, 0.9, 0.99, 1.0])
shares = st.floats(0.01, 0.99)
PERFECT = Verifier.accurate(1.0)
BLIND = Verifier.accurate(0.5)


def names(n: int) -> tuple[str, ...]:
    return tuple(f"m{i}" for i in range(n))


def independent(*right: float) -> Joint:
    return Joint.declared(np.ones((1, 1)), np.array([right]))


def draw(seed: int, models: int, types: int = 3) -> tuple[Joint, np.ndarray]:
    """A joint law of one class and prices at which search is often worth while; V is about 5."""
    rng = np.random.default_rng(seed)
    joint = Joint.declared(rng.dirichlet(np.ones(types))[None], rng.random((types, models)))
    return joint, rng.exponential(0.5, (1, models))


def outcomes_of(models: int) -> np.ndarray:
    return np.array(list(product((0.0, 1.0), repeat=models)))


# --- the slow, obvious road: Bayes on every pattern of outcomes, and recursion over histories ------------------------


def brute_force(joint: Joint, value: float, costs: np.ndarray, verifier: Verifier, check: float) -> float:
    """The best any policy can do, USD: nothing here is shared with `search`."""
    patterns = outcomes_of(costs.size)
    prior = [
        sum(
            w * prod(q if x else 1 - q for q, x in zip(right, pattern, strict=True))
            for w, right in zip(joint.weight[0], joint.right, strict=True)
        )
        for pattern in patterns
    ]
    says = {1.0: verifier.sensitivity, 0.0: 1 - verifier.specificity}

    def best(belief: list[float], tried: frozenset[int]) -> float:
        """`belief`: P(pattern and what was seen), not normalised; the answer is weighted by its sum."""
        options = [0.0]
        for m, cost in enumerate(costs):
            right = sum(p for p, pattern in zip(belief, patterns, strict=True) if pattern[m])
            if m in tried:
                options.append(value * right)
                continue
            options.append(value * right - cost * sum(belief))
            passed = [p * says[pattern[m]] for p, pattern in zip(belief, patterns, strict=True)]
            failed = [p - q for p, q in zip(belief, passed, strict=True)]
            after = best(passed, tried | {m}) + best(failed, tried | {m})
            options.append(after - (cost + check) * sum(belief))
        return max(options)

    return best(prior, frozenset())


@given(seed=seeds, models=st.integers(1, 3), accuracy=accuracies, check=st.sampled_from([0.0, 0.02, 0.3]))
@settings(max_examples=60)
def test_the_programme_is_the_best_there_is(seed: int, models: int, accuracy: float, check: float) -> None:
    joint, costs = draw(seed, models)
    verifier = Verifier(accuracy, 1 - (1 - accuracy) / 2)
    plan = plan_search(joint, names(models), 5.0, costs, verifier, check)
    assert plan.exact
    assert_allclose(plan.surplus, brute_force(joint, 5.0, costs[0], verifier, check), atol=1e-9)
    assert_allclose(5.0 * plan.quality - plan.cost, plan.surplus, atol=1e-9)


@given(seed=seeds, models=st.integers(2, 5), accuracy=accuracies, check=st.sampled_from([0.0, 0.02, 0.3]))
def test_one_shot_index_programme_clairvoyant_in_this_order(
    seed: int, models: int, accuracy: float, check: float
) -> None:
    joint, costs = draw(seed, models)
    args = (joint, names(models), 5.0, costs, Verifier.accurate(accuracy), check)
    best, index = plan_search(*args, exact=True), plan_search(*args, exact=False)
    one_shot = max(0.0, float((5.0 * joint.quality - costs).max()))
    assert_allclose(best.one_shot, one_shot)
    assert one_shot - 1e-9 <= index.surplus[0] <= best.surplus[0] + 1e-9
    assert best.surplus[0] <= index.bound[0] + 1e-9
    # The bound, anew: with all outcomes known, the best of what is right.
    patterns = outcomes_of(models)
    known = np.maximum((5.0 * patterns - costs).max(axis=1), 0.0)
    assert_allclose(index.bound, joint.patterns(patterns) @ known)


def test_the_index_loses_little_to_the_programme() -> None:
    args = [(*draw(seed, 4), accuracy) for seed in range(40) for accuracy in (0.75, 0.9, 1.0)]
    best, index = (
        np.array(
            [
                plan_search(j, names(4), 5.0, k, Verifier.accurate(a), 0.05, exact=exact).surplus[0]
                for j, k, a in args
            ]
        )
        for exact in (True, False)
    )
    # Correlated boxes: not optimal (some are worse), yet near it.
    assert (best - index).max() > 1e-3
    assert (best - index).mean() < 0.01 * best.mean()


# --- the index ------------------------------------------------------------------------------------------------------


@given(
    right=shares,
    cost=st.floats(0.0, 6.0),
    check=st.floats(0.0, 2.0),
    accuracy=accuracies,
    value=st.floats(0.1, 20.0),
)
def test_at_its_index_opening_a_box_is_indifferent(
    right: float, cost: float, check: float, accuracy: float, value: float
) -> None:
    index = reservation_index(value, np.array(right), cost, Verifier.accurate(accuracy), check)
    z, passed = float(index.value), right * accuracy + (1 - right) * (1 - accuracy)
    certain = [(1.0, value * right)]
    seen = [
        (passed, value * right * accuracy / passed),
        (1 - passed, value * right * (1 - accuracy) / (1 - passed)),
    ]
    gains = [
        sum(p * max(x - z, 0.0) for p, x in law) - paid
        for law, paid in ((certain, cost), (seen, cost + check))
    ]
    # The better way of opening it breaks even at z, the other falls short or does too.
    assert_allclose(gains[int(index.verify)], 0.0, atol=1e-9 * (value + cost + check))
    assert max(gains) <= 1e-9 * (value + cost + check)


@given(right=shares, more=st.floats(1e-3, 0.5), cost=st.floats(0.0, 6.0), accuracy=accuracies, check=shares)
def test_the_index_falls_with_cost_and_rises_with_quality(
    right: float, more: float, cost: float, accuracy: float, check: float
) -> None:
    verifier = Verifier.accurate(accuracy)

    def z(q: float, k: float) -> float:
        return float(reservation_index(5.0, np.array(q), k, verifier, check).value)

    assert z(right, cost + more) < z(right, cost)
    assert z(min(right + more, 1.0), cost) > z(right, cost)


def test_weitzman_by_hand() -> None:
    # V = 10, answers are checked for nothing and without error, outcomes independent.
    #   A: right half the time for 1 USD.   10 − z = 1 / 0.5, z = 8.  Taken alone it is worth 0.5·10 − 1 = 4.
    #   B: right 9 times in 10 for 4.50.  10 − z = 4.5 / 0.9, z = 5.  Taken alone it is worth 4.5: the better one.
    # Yet A comes first: −1 + 0.5·10 + 0.5·(−4.5 + 0.9·10) = 6.25. B first: −4.5 + 0.9·10 + 0.1·(−1 + 0.5·10) = 4.9.
    right, costs = np.array([0.5, 0.9]), np.array([[1.0, 4.5]])
    assert_allclose(reservation_index(10.0, right, costs[0], PERFECT).value, [8.0, 5.0])
    plan = plan_search(independent(0.5, 0.9), ("A", "B"), 10.0, costs, PERFECT)
    assert_allclose([plan.surplus[0], plan.one_shot[0]], [6.25, 4.5])
    assert (plan.kind[0, 0], plan.use[0, 0]) == (VERIFY, 0)
    assert (plan.kind[0, 1], plan.use[0, 1]) == (STOP, 0)
    assert plan.use[0, 2] == 1
    assert_allclose([plan.quality[0], plan.cost[0]], [0.95, 1 + 0.5 * 4.5])


@given(seed=seeds, models=st.integers(1, 4))
@settings(max_examples=50)
def test_weitzmans_order_is_optimal_for_independent_boxes(seed: int, models: int) -> None:
    rng = np.random.default_rng(seed)
    right, costs = rng.uniform(0.05, 0.95, models), rng.exponential(1.5, models)
    args = (independent(*right), names(models), 5.0, costs[None], PERFECT)

    def in_turn(order: tuple[int, ...]) -> float:
        total, alive = 0.0, 1.0
        for m in order:
            total += alive * (right[m] * 5.0 - costs[m])
            alive *= 1 - right[m]
        return total

    # Every order of every subset, by hand.
    by_hand = max(in_turn(order) for size in range(models + 1) for order in permutations(range(models), size))
    z = reservation_index(5.0, right, costs, PERFECT).value
    by_index = in_turn(tuple(int(m) for m in np.argsort(-z) if z[m] > 0))
    assert_allclose(by_index, by_hand, atol=1e-9)
    assert_allclose(plan_search(*args, exact=True).surplus, by_hand, atol=1e-9)
    assert_allclose(plan_search(*args, exact=False).surplus, by_hand, atol=1e-9)


# --- laws of plans ----------------------------------------------------------------------------------------------------


@given(seed=seeds, models=st.integers(2, 4), exact=st.booleans(), check=st.sampled_from([0.0, 0.1]))
def test_a_verifier_that_tosses_a_coin_is_never_bought(
    seed: int, models: int, exact: bool, check: float
) -> None:
    joint, costs = draw(seed, models)
    plan = plan_search(joint, names(models), 5.0, costs, BLIND, check, exact=exact)
    assert not (plan.kind == VERIFY).any()
    assert plan.surplus == plan.one_shot


@given(seed=seeds, models=st.integers(2, 4), exact=st.booleans(), accuracy=accuracies)
def test_a_dear_verifier_leaves_the_one_shot_choice(
    seed: int, models: int, exact: bool, accuracy: float
) -> None:
    joint, costs = draw(seed, models)
    plan = plan_search(joint, names(models), 5.0, costs, Verifier.accurate(accuracy), 5.0, exact=exact)
    worth = (5.0 * joint.quality - costs)[0]
    assert plan.use[0, 0] == (worth.argmax() if worth.max() > 0 else DEFER)
    assert plan.kind[0, 0] == (TAKE if worth.max() > 0 else STOP)


@given(seed=seeds, models=st.integers(2, 4), check=st.sampled_from([0.0, 0.05, 0.3]))
@settings(max_examples=30)
def test_a_better_or_cheaper_verifier_is_worth_no_less(seed: int, models: int, check: float) -> None:
    joint, costs = draw(seed, models)
    value = [
        [
            plan_search(joint, names(models), 5.0, costs, Verifier.accurate(a), check + more).surplus[0]
            for a in (0.5, 0.6, 0.8, 0.95, 1.0)
        ]
        for more in (0.0, 0.1)
    ]
    assert (np.diff(value, axis=1) >= -1e-9).all()  # Blackwell
    assert (np.diff(value, axis=0) <= 1e-9).all()


def test_the_crossover_of_the_theory() -> None:
    # THEORY §1: q = 0.7 for 1 USD, q = 0.9 for 5; the dearer one from V* = (5 − 1) / (0.9 − 0.7) = 20 on.
    values = np.array([10.0, 19.99, 20.01, 100.0])
    costs, one = np.tile([1.0, 5.0], (4, 1)), np.zeros(4, dtype=np.int64)
    law = independent(0.7, 0.9)
    plan = plan_search(law, ("cheap", "frontier"), values, costs, BLIND, classes=one)
    assert plan.use[:, 0].tolist() == [0, 0, 1, 1]
    assert_allclose(plan.surplus, [6.0, 12.993, 13.009, 85.0])
    # A sure verifier for nothing moves the crossover away: cheap first at every V, then frontier: V·0.97 − 1 − 0.3·5.
    sure = plan_search(law, ("cheap", "frontier"), values, costs, PERFECT, classes=one)
    assert_allclose(sure.surplus, 0.97 * values - 2.5)
    assert sure.use[:, 0].tolist() == [0, 0, 0, 0]


def test_a_fail_lowers_what_the_others_are_expected_to_do() -> None:
    # Easy tasks all models get right; on the others a is hopeless and b right half the time. A sure fail of a says which,
    # and b's chance falls from 0.6 + 0.4·0.5 = 0.8 to 0.5.
    law = Joint.declared(np.array([[0.6, 0.4]]), np.array([[1.0, 1.0], [0.0, 0.5]]))
    plan = plan_search(law, ("a", "b"), 5.0, np.array([[0.1, 0.2]]), PERFECT)
    assert_allclose(law.quality, [[0.6, 0.8]])
    assert (plan.kind[0, 2], plan.use[0, 2]) == (TAKE, 1)
    assert_allclose(plan.right[0, 2], 0.5)
    # Where both are hopeless together there is nothing to escalate to, and no use for a verifier that is for nothing.
    together = Joint.declared(np.array([[0.6, 0.4]]), np.array([[1.0, 1.0], [0.0, 0.0]]))
    assert plan_search(together, ("a", "b"), 5.0, np.array([[0.1, 0.2]]), PERFECT).kind[0, 0] == TAKE
    assert (
        plan_search(independent(0.6, 0.6), ("a", "b"), 5.0, np.array([[0.1, 0.2]]), PERFECT).kind[0, 0]
        == VERIFY
    )


def test_what_is_not_allowed_is_never_opened() -> None:
    joint, costs = draw(3, 3)
    costs = np.where([[True, False, True]], costs, np.inf)
    for exact in (True, False):
        plan = plan_search(joint, names(3), 5.0, costs, PERFECT, 0.01, exact=exact)
        assert not ((plan.use == 1) & (plan.kind != STOP)).any()
        assert np.isfinite(plan.cost).all()
        without = Joint.declared(joint.weight, joint.right[:, [0, 2]])
        assert_allclose(
            plan.surplus,
            plan_search(without, names(2), 5.0, costs[:, [0, 2]], PERFECT, 0.01, exact=exact).surplus,
        )


def test_many_models_take_the_index() -> None:
    joint, costs = draw(0, 20)
    plan = plan_search(joint, names(20), 5.0, costs, Verifier.accurate(0.9), 0.02)
    assert not plan.exact
    assert plan.one_shot[0] + 0.1 < plan.surplus[0] < plan.bound[0]
    assert_allclose((plan.reach * (plan.kind != VERIFY)).sum(), 1.0)
    with pytest.raises(QuantityError, match="use the index"):
        plan_search(joint, names(20), 5.0, costs, PERFECT, exact=True)


@given(seed=seeds)
@settings(max_examples=20)
def test_rows_do_not_touch_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    joint = Joint.declared(rng.dirichlet(np.ones(3), 2), rng.random((3, 3)))
    value, costs, check = rng.exponential(5, 6), rng.exponential(0.5, (6, 3)), rng.exponential(0.05, 6)
    classes = rng.integers(0, 2, 6)
    verifier = Verifier(0.9, 0.8)
    for exact in (True, False):
        many = plan_search(joint, names(3), value, costs, verifier, check, classes=classes, exact=exact)
        for g in range(6):
            at = slice(g, g + 1)
            one = plan_search(
                joint,
                names(3),
                value[at],
                costs[at],
                verifier,
                check[at],
                classes=classes[at],
                exact=exact,
            )
            assert_allclose(one.surplus[0], many.surplus[g])
            assert (one.use[0] == many.use[g]).all()


def test_a_plan_reads_like_one() -> None:
    plan = plan_search(independent(0.5, 0.9), ("small", "large"), 10.0, np.array([[1.0, 4.5]]), PERFECT, 0.5)
    assert plan.text(0).splitlines() == [
        "expected surplus $5.75 (one-shot $4.5), cost $3.75, right 95.0%; verifier: sensitivity 1, specificity 1",
        "try small ($1), right 50.0%, and verify ($0.5); going on is worth $1.25",
        "  pass 50.0%: stop with small, right 100.0%",
        "  fail 50.0%: take large ($4.5) unverified, right 90.0%",
    ]
    nothing = plan_search(independent(0.1), ("small",), 1.0, np.array([[2.0]]), PERFECT)
    assert nothing.text(0).splitlines()[1] == "take no model"


def test_full_prices_are_what_the_equation_charges() -> None:
    rng = np.random.default_rng(0)
    tasks = Tasks(rng.exponential(5, 4), latency_price=np.full(4, 0.01), risk_price=np.full(4, 2.0))
    uses = Uses(
        names(3),
        rng.random((4, 3)),
        rng.exponential(0.1, (4, 3, 1)),
        seconds=rng.exponential(10, (4, 3)),
        risk=rng.exponential(0.02, (4, 3)),
        allowed=rng.random((4, 3)) > 0.2,
    )
    prices = Prices(
        discovered=(Price(Constraint("budget", 0.05), 0.7), Price(Constraint("mean_sla", 8.0), 0.02))
    )
    paid, net = full_prices(tasks, uses, prices), net_value(tasks, uses, prices)
    assert not uses.allowed.all()
    assert_allclose(tasks.value[:, None] * uses.quality - paid, net)


# --- replay -----------------------------------------------------------------------------------------------------------


@given(seed=seeds, models=st.integers(1, 4), accuracy=accuracies, exact=st.booleans())
def test_replayed_on_its_own_law_a_plan_gets_what_it_expects(
    seed: int, models: int, accuracy: float, exact: bool
) -> None:
    joint, costs = draw(seed, models)
    plan = plan_search(joint, names(models), 5.0, costs, Verifier(accuracy, 1.0), 0.05, exact=exact)
    patterns = outcomes_of(models)
    p = joint.patterns(patterns)[0]
    assert_allclose(p.sum(), 1.0)
    rows = np.zeros(len(patterns), dtype=np.int64)
    got = simulate(plan, rows, patterns, np.broadcast_to(costs, patterns.shape), 5.0)
    assert_allclose(p @ got.surplus, plan.surplus[0], atol=1e-9)
    assert_allclose(p @ got.quality, plan.quality[0], atol=1e-9)
    assert_allclose(p @ got.spending, plan.cost[0], atol=1e-9)
    assert_allclose(got.surplus, 5.0 * got.quality - got.spending)


def played(plan: Plan, outcome: np.ndarray, cost: np.ndarray, value: float, verifier: Verifier) -> float:
    """One task's expected surplus by walking its tree."""

    def at(node: int) -> float:
        kind, use = plan.kind[0, node], plan.use[0, node]
        if use == DEFER:
            return 0.0
        if kind == STOP:
            return value * outcome[use]
        if kind == TAKE:
            return value * outcome[use] - cost[use]
        p = verifier.sensitivity if outcome[use] else 1 - verifier.specificity
        return p * at(2 * node + 1) + (1 - p) * at(2 * node + 2) - cost[use] - plan.verifier_cost[0]

    return at(0)


@given(seed=seeds, planned=accuracies, real=accuracies)
@settings(max_examples=30)
def test_a_replay_walks_the_tree_with_the_verifier_there_is(seed: int, planned: float, real: float) -> None:
    rng = np.random.default_rng(seed)
    joint, costs = draw(seed, 3)
    plan = plan_search(joint, names(3), 5.0, costs, Verifier.accurate(planned), 0.05)
    outcomes, paid = rng.integers(0, 2, (20, 3)).astype(float), rng.exponential(0.5, (20, 3))
    verifier = Verifier(real, 0.5 * (1 + real))
    got = simulate(plan, np.zeros(20, dtype=np.int64), outcomes, paid, 5.0, verifier=verifier)
    assert_allclose(
        got.surplus, [played(plan, x, k, 5.0, verifier) for x, k in zip(outcomes, paid, strict=True)]
    )
    assert (got.opened <= 1 + 1e-12).all()
    assert str(got).startswith("SIMULATED verifier")


# --- the joint law ----------------------------------------------------------------------------------------------------


def sample(joint: Joint, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    types = np.array([rng.choice(joint.right.shape[0], p=joint.weight[c]) for c in classes])
    return (rng.random((classes.size, joint.right.shape[1])) < joint.right[types]).astype(float)


def test_a_fitted_law_knows_the_patterns() -> None:
    rng = np.random.default_rng(0)
    true = Joint.declared(np.array([[0.3, 0.7]]), np.array([[0.05, 0.1, 0.2, 0.1], [0.9, 0.8, 0.95, 0.85]]))
    one = np.zeros(4000, dtype=np.int64)
    log = sample(true, one, rng)
    fitted = fit_joint(log, one, 1)
    patterns = outcomes_of(4)
    expected, found = true.patterns(patterns)[0], fitted.patterns(patterns)[0]
    assert fitted.right.shape == (2, 4)
    assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 4000))
    # Independence would have been far off.
    apart = independent(*log.mean(axis=0)).patterns(patterns)[0]
    assert np.abs(apart - expected).max() > 10 * np.abs(found - expected).max()
    assert_allclose(
        fitted.error[0], np.sqrt(expected @ patterns * (1 - expected @ patterns) / 4000), rtol=0.1
    )


def test_independent_outcomes_need_one_type() -> None:
    rng = np.random.default_rng(1)
    log = (rng.random((2000, 3)) < [0.3, 0.6, 0.8]).astype(float)
    assert fit_joint(log, np.zeros(2000, dtype=np.int64), 1).right.shape == (1, 3)


def test_classes_keep_to_themselves_as_far_as_they_show_it() -> None:
    rng = np.random.default_rng(2)
    right = np.array([[0.1, 0.15, 0.1], [0.9, 0.85, 0.95]])
    apart = Joint.declared(np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]]), right)
    alike = Joint.declared(np.tile([0.5, 0.5], (3, 1)), right)
    classes = np.repeat([0, 1, 2], 200)
    easy = [fit_joint(sample(law, classes, rng), classes, 4) for law in (apart, alike)]
    assert_allclose(easy[0].quality[:3], apart.quality, atol=0.12)
    assert np.ptp(easy[1].quality, axis=0).max() < 0.05
    # The class without tasks gets the overall law, and is known least.
    assert_allclose(easy[0].quality[3], 0.5, atol=0.06)
    assert (easy[0].error[3] > easy[0].error[:3]).all()


def test_models_that_ran_on_some_tasks_only() -> None:
    rng = np.random.default_rng(3)
    true = Joint.declared(np.array([[0.4, 0.6]]), np.array([[0.1, 0.1, 0.3], [0.9, 0.8, 0.95]]))
    one = np.zeros(4000, dtype=np.int64)
    log = sample(true, one, rng)
    log[rng.random(log.shape) < 0.4] = np.nan
    log[1000:, 0] = np.nan
    fitted = fit_joint(log, one, 1)
    assert_allclose(fitted.patterns(outcomes_of(3)), true.patterns(outcomes_of(3)), atol=0.04)
    assert fitted.error[0, 0] > 1.5 * fitted.error[0, 1:].max()  # it ran a quarter as often


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value": -1.0}, "value must be"),
        ({"value": np.ones(3)}, r"expected \(1,\)"),
        ({"costs": np.array([[0.1, np.nan]])}, "costs must be"),
        ({"costs": np.ones((1, 3))}, "2 models"),
        ({"verifier_cost": np.inf}, "verifier_cost must be"),
        ({"classes": np.array([1])}, "0…0"),
        ({"names": ("a",)}, "1 names"),
    ],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, object], says: str) -> None:
    good = {"names": ("a", "b"), "value": 1.0, "costs": np.ones((1, 2)), "verifier": PERFECT}
    with pytest.raises(QuantityError, match=says):
        plan_search(independent(0.5, 0.5), **(good | change))


def test_bad_laws_and_verifiers_are_refused() -> None:
    with pytest.raises(QuantityError, match="read its pass as a fail"):
        Verifier.accurate(0.4)
    with pytest.raises(QuantityError, match=r"in \[0, 1\]"):
        Verifier(1.1, 0.5)
    with pytest.raises(QuantityError, match="sum to 1"):
        Joint.declared(np.array([[0.5, 0.4]]), np.ones((2, 2)))
    with pytest.raises(QuantityError, match=r"in \[0, 1\]"):
        independent(1.2)
    with pytest.raises(QuantityError, match="expected"):
        Joint.declared(np.ones((1, 1)), np.ones((2, 2)))
    with pytest.raises(QuantityError, match="expected"):
        Joint(np.ones((1, 1)), np.ones((1, 2)), np.ones((1, 1)))


def test_bad_logs_are_refused() -> None:
    log, one = np.ones((6, 2)), np.zeros(6, dtype=np.int64)
    with pytest.raises(QuantityError, match="set a bar"):
        fit_joint(log * 0.5, one, 1)
    with pytest.raises(QuantityError, match="no outcome"):
        fit_joint(np.where([True, False], log, np.nan), one, 1)
    with pytest.raises(QuantityError, match="classes must be"):
        fit_joint(log, one + 1, 1)
    with pytest.raises(QuantityError, match="folds"):
        fit_escalation(log, log, ("a", "b"), one, 1, folds=7)
    with pytest.raises(QuantityError, match="0 or 1"):
        fit_escalation(log * np.nan, log, ("a", "b"), one, 1)
    with pytest.raises(QuantityError, match="cost must be"):
        fit_escalation(log, -log, ("a", "b"), one, 1)
    with pytest.raises(QuantityError, match=r"must be \(6, 3\)"):
        break_even(log, log, names(3), (1.0,), (1.0,))
    with pytest.raises(QuantityError, match="halves"):
        break_even(log[:1], log[:1], ("a", "b"), (1.0,), (1.0,))
    plan = plan_search(independent(0.5, 0.5), ("a", "b"), 1.0, np.ones((1, 2)), PERFECT)
    with pytest.raises(QuantityError, match="5 rows for 6 tasks"):
        simulate(plan, one[:5], log, log, 1.0)


# --- where it stops paying --------------------------------------------------------------------------------------------


def test_break_even_where_it_can_be_worked_out() -> None:
    # Independent: a is right 0.6 for 0.10, b 0.8 for 1; V = 5. Unverified, b: 5·0.8 − 1 = 3. Try a, verify, on a fail
    # take b: −0.1 − κ_v + 0.6·5 + 0.4·3 = 4.1 − κ_v. So a sure verifier may cost 1.10. At accuracy x a pass is kept and
    # b taken on a fail: −0.1 − κ_v + 5·(0.6·x + p_f·0.8) − p_f, with p_f = 0.6·(1 − x) + 0.4·x: 0.52 at 0.8.
    rng = np.random.default_rng(0)
    log = (rng.random((4000, 2)) < [0.6, 0.8]).astype(float)
    costs = np.broadcast_to([0.1, 1.0], log.shape)
    p_f = 0.6 * 0.2 + 0.4 * 0.8
    at_80 = -0.1 + 5 * (0.6 * 0.8 + p_f * 0.8) - p_f - 3.0
    found = break_even(log, costs, ("a", "b"), (5.0,), (0.5, 0.8, 1.0), splits=2)
    assert found.priced.shape == (2, 1, 3)
    assert_allclose(found.priced.mean(axis=0)[0], [0.0, at_80, 1.1], atol=0.08)
    assert_allclose(found.held_out.mean(axis=0)[0], [0.0, at_80, 1.1], atol=0.12)
    assert (found.held_out <= found.priced).all()


def test_gain_is_what_new_tasks_get() -> None:
    rng = np.random.default_rng(1)
    log = (rng.random((1500, 2)) < [0.6, 0.8]).astype(float)
    costs = np.broadcast_to([0.1, 1.0], log.shape)
    learned = fit_escalation(log, costs, ("a", "b"), np.zeros(1500, dtype=np.int64), 1)
    gain = learned.gain(5.0, PERFECT)
    # A free sure verifier for both: −0.1 + 3 + 0.4·(−1 + 4) = 4.1 against 3.
    assert abs(gain.mean - 1.1) < 4 * gain.error < 0.4
    nothing = learned.gain(0.05, PERFECT)
    assert (nothing.mean, nothing.error) == (0.0, 0.0)  # nobody is worth its cost, fixed or not
    assert learned.plan(0.05, PERFECT).use[0, 0] == DEFER


# --- a real log: SWE-bench Verified, four models, USD per run ---------------------------------------------------------

MINI, SONNET = 1, 3


class Log:
    """The whole file as tables."""

    def __init__(self, data_dir: DataDir) -> None:
        table = pq.read_table(data_dir / "routing/swebench_verified_mini.parquet").to_pydict()
        tasks, self.names = sorted(set(table["request_id"])), tuple(sorted(set(table["model"])))
        repos = sorted(set(table["repo"]))
        at = {task: n for n, task in enumerate(tasks)}
        self.outcomes, self.costs = np.full((2, len(tasks), len(self.names)), np.nan)
        self.classes, self.n_classes = np.zeros(len(tasks), dtype=np.int64), len(repos)
        for task, model, quality, cost, repo in zip(
            *(table[c] for c in ("request_id", "model", "quality", "cost_usd", "repo")), strict=True
        ):
            self.outcomes[at[task], self.names.index(model)] = quality
            self.costs[at[task], self.names.index(model)] = cost
            self.classes[at[task]] = repos.index(repo)

    def halves(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for seed in range(10):
            # The baselines were measured on these halves.
            order = np.random.RandomState(seed).permutation(len(self.classes))
            yield order[:250], order[250:]

    def cascade(self, value: float, accuracy: float, check: float) -> np.ndarray:
        """gpt-5-mini, verified; on a fail, sonnet-4-5."""
        right, cost = self.outcomes, self.costs
        go = np.where(right[:, MINI] > 0, 1 - accuracy, accuracy)
        quality = (1 - go) * right[:, MINI] + go * right[:, SONNET]
        return value * quality - cost[:, MINI] - check - go * cost[:, SONNET]


@pytest.fixture(scope="module")
def log(data_dir: DataDir) -> Log:
    return Log(data_dir)


@pytest.mark.data
def test_the_baselines_are_the_measured_ones(log: Log) -> None:
    assert (log.names[MINI], log.names[SONNET]) == ("gpt-5-mini", "sonnet-4-5")
    assert_allclose(log.cascade(5.0, 1.0, 0.0).mean(), 3.5312, atol=1e-4)
    for value, fixed, cascade in ((1.0, 0.582, 0.526), (5.0, 2.979, 3.574), (20.0, 13.70, 15.00)):
        found = []
        for train, test in log.halves():
            best = best_fixed(log.outcomes[train], log.costs[train], value)
            worth = value * log.outcomes[test] - log.costs[test]
            found.append((worth[:, best].mean(), log.cascade(value, 1.0, 0.0)[test].mean()))
        assert_allclose(np.mean(found, axis=0), (fixed, cascade), rtol=1e-3)


@pytest.mark.data
def test_search_on_held_out_halves(log: Log) -> None:
    learned = [
        (
            fit_escalation(
                log.outcomes[train], log.costs[train], log.names, log.classes[train], log.n_classes, folds=2
            ),
            train,
            test,
        )
        for train, test in log.halves()
    ]
    for value, accuracy, check in product((1.0, 5.0, 20.0), (1.0, 0.9, 0.75), (0.0, 0.01, 0.05, 0.2)):
        search_got, fixed_got, cascade_got, gain = [], [], [], np.zeros((2, len(log.classes)))
        for model, train, test in learned:
            plan = model.plan(value, Verifier.accurate(accuracy), check)
            got = simulate(plan, log.classes[test], log.outcomes[test], log.costs[test], value)
            search_got.append(got.surplus)
            fixed = best_fixed(log.outcomes[train], log.costs[train], value)
            fixed_got.append(value * log.outcomes[test, fixed] - log.costs[test, fixed])
            cascade_got.append(log.cascade(value, accuracy, check)[test])
            gain[:, test] += got.surplus - fixed_got[-1], np.ones(len(test))
        found, fixed_mean, cascade = np.concatenate(search_got), np.mean(fixed_got), np.mean(cascade_got)
        cell = (value, accuracy, check)
        assert found.mean() >= fixed_mean - found.std() / np.sqrt(found.size), cell
        # Task by task, where most of the noise cancels; a task is in several halves, and counts once.
        error = np.sqrt(((gain[0] - gain[1] * (found.mean() - fixed_mean)) ** 2).sum()) / found.size
        assert found.mean() - fixed_mean >= -2 * error, cell
        if accuracy == 1.0 and check == 0.0 and cascade > fixed_mean:
            assert found.mean() >= cascade, cell  # asked for: 98% of it
            assert value > 1.0
