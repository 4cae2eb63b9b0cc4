"""What a policy could have reached: honest where there is nothing to learn, close to the oracle where all is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from logs import random_log
from walras.diagnosis.attainable import (
    FOLDS,
    Attainable,
    Gain,
    attainable_gain,
    attainable_policy,
    best_changes,
)
from walras.diagnosis.case import Case, Fixed, best_fixed, build_case
from walras.diagnosis.regret import Mean, measure_regret
from walras.equation import DEFER
from walras.quantities import Labels
from walras.records import Log
from walras.settings import Economy, Tenant


def policy_of(case: Case, seed: int = 0) -> Attainable:
    policy = attainable_policy(case, seed)
    assert policy is not None
    return policy


def fixed_of(case: Case) -> Fixed:
    fixed = best_fixed(case.tasks, case.uses, case.constraints, case.economy)
    assert fixed is not None
    return fixed


def telling_log(n: int = 300) -> Log:
    """A class tells which model solves the task: class k needs model k, and nothing else does."""
    log = random_log(0, n)
    assert log.task_class is not None
    quality = (log.task_class.codes[:, None] == np.arange(3)).astype(float)
    return replace(log, per_use={"quality": quality, "cost_usd": np.full((n, 3), 0.1)}, losses=None)


def test_where_the_class_tells_all_it_is_the_oracle() -> None:
    case = build_case(telling_log(), Economy(value=1.0))
    fixed, policy, oracle = (
        fixed_of(case).surplus,
        policy_of(case).surplus.mean,
        case.clear().certificate.objective,
    )
    assert oracle == pytest.approx(0.9)
    assert fixed < 0.4
    assert policy == pytest.approx(oracle)


def test_where_labels_are_noise_it_is_no_better_than_one_model() -> None:
    """Averaged over 12 logs: what it seems to gain by class is not there on held-out tasks."""
    gains = []
    for seed in range(12):
        case = build_case(random_log(seed, 300, classes=6, informative=0.0), Economy(value=0.3))
        gains.append(policy_of(case).surplus.mean - fixed_of(case).surplus)
        assert gains[-1] < case.clear().certificate.objective - fixed_of(case).surplus
    gain, error = np.mean(gains), np.std(gains, ddof=1) / np.sqrt(12)
    assert gain <= 2 * error
    assert gain >= -0.05 * 0.3, "nor does it throw much away"


def test_where_nothing_is_to_be_gained_hardly_a_log_proposes_a_change() -> None:
    """40 classes whose labels say nothing, 5 equal models: without a correction for picking the best of 40, most logs would."""
    proposed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n = 40 * 50
        shares = np.zeros((n, 6))
        shares[np.arange(n), rng.integers(0, 5, n)] = 1.0
        case = _exchangeable(rng, n)
        value = case.uses.quality
        gain = (shares[:, :5] * value).sum(axis=1) - value[np.arange(n), case.chosen]
        policy = Attainable(Mean(0.0, (0.0, 0.0)), (), shares, np.zeros(0))
        proposed += bool(best_changes(case, policy, Gain(gain, np.zeros(n))))
    assert proposed <= 6, "2 are expected of 40 at 95%, and 6 or more happen once in fifty times"


def _exchangeable(rng: np.random.Generator, n: int) -> Case:
    classes = np.arange(n) % 40
    log = replace(
        random_log(0, n, classes=40),
        models=tuple("abcde"),
        per_use={"quality": rng.integers(0, 2, (n, 5)).astype(float), "cost_usd": np.zeros((n, 5))},
        task_class=Labels(classes, tuple(f"class{k}" for k in range(40))),
        chosen=np.zeros(n, dtype=np.int64),
        tenant=None,
        losses=None,
    )
    return build_case(log, Economy(value=1.0))


def test_only_switches_that_gain_for_sure_are_proposed() -> None:
    case = build_case(replace(telling_log(), tenant=None), Economy(value=1.0))
    policy = policy_of(case)
    sign = np.where(np.random.default_rng(0).random(300) < 0.5, 1.0, -1.0)
    nothing = np.zeros(300)
    assert best_changes(case, policy, Gain(0.01 * sign, nothing)) == []
    sure = best_changes(case, policy, Gain(1 + sign, nothing))
    assert len(sure) == 3, "the three worth most of the six there are"
    assert [c.total for c in sure] == sorted((c.total for c in sure), reverse=True)
    assert all(c.per_task.ci[0] > 0 for c in sure)


def test_a_planted_waste_is_found() -> None:
    log = telling_log()
    assert log.task_class is not None
    chosen = log.task_class.codes.copy()
    wasted = log.task_class.equal("class1")
    chosen[wasted] = 2  # class1 needs the medium model and gets the large one
    case = build_case(replace(log, chosen=chosen, tenant=None), Economy(value=1.0))
    prices = case.clear().prices
    policy = policy_of(case)
    gain = attainable_gain(case, prices, policy)
    (change,) = best_changes(case, policy, gain)
    assert (change.tenant, change.task_class) == (None, "class1")
    assert (change.from_use, change.to_use, change.tasks) == ("large", "medium", int(wasted.sum()))
    assert change.per_task.mean == pytest.approx(1.0)
    assert change.total == pytest.approx(wasted.sum())


@given(seed=st.integers(0, 999), k=st.integers(0, FOLDS - 1))
@settings(max_examples=15)
def test_held_out_outcomes_are_never_used(seed: int, k: int) -> None:
    """Whatever happened on a fold, its own shares stay as they were; other folds may learn from it."""
    log = random_log(seed, 100)
    economy = Economy(budget_usd=0.05)
    before = build_case(log, economy)
    fold = np.random.default_rng(seed).permutation(100) % FOLDS  # as `attainable_policy` draws them
    mine = fold == k
    rng = np.random.default_rng(seed + 1)
    changed = {name: column.copy() for name, column in log.per_use.items()}
    for column in changed.values():
        column[mine] = rng.permuted(column[mine], axis=1) * rng.random()
    after = build_case(replace(log, per_use=changed), economy)
    old, new = policy_of(before, seed), policy_of(after, seed)
    assert_array_equal(new.shares[mine], old.shares[mine])
    assert new.surplus != old.surplus


def test_other_folds_do_learn() -> None:
    log = random_log(1, 100)
    fold = np.random.default_rng(0).permutation(100) % FOLDS
    quality = log.per_use["quality"].copy()
    quality[fold == 0] = (1.0, 0.0, 0.0)
    economy = Economy(value=0.3)
    old = policy_of(build_case(log, economy))
    new = policy_of(build_case(replace(log, per_use={**log.per_use, "quality": quality}), economy))
    assert (new.shares[fold != 0] != old.shares[fold != 0]).any()


@given(seed=st.integers(0, 999))
@settings(max_examples=15)
def test_where_nothing_is_scarce_its_gain_is_a_part_of_the_regret(seed: int) -> None:
    case = build_case(random_log(seed, 100), Economy())
    prices = case.clear().prices
    policy = policy_of(case)
    assert_allclose(policy.shares.sum(axis=1), 1.0)
    assert (policy.shares >= 0).all()
    assert (
        attainable_gain(case, prices, policy).surplus <= measure_regret(case, prices).per_task + 1e-9
    ).all()


@given(seed=st.integers(0, 999), budget=st.sampled_from([0.01, 0.03, 0.05]))
@settings(max_examples=15)
def test_its_gain_counts_what_it_frees_at_its_own_price(seed: int, budget: float) -> None:
    """Mean gain = surplus gained − μ·(spent more), by hand, with the policy's μ."""
    case = build_case(random_log(seed, 100), Economy(budget_usd=budget, rho0=0.0))
    policy = policy_of(case)
    gain = attainable_gain(case, case.clear().prices, policy)
    at = (np.arange(100), case.chosen)
    cost = case.uses.amount("usd")
    realised = (case.tasks.value * case.uses.quality[at] - cost[at]).mean()
    spent = (policy.shares[:, :-1] * cost).sum() / 100
    freed = cost[at].mean() - spent
    assert gain.surplus.mean() == pytest.approx(policy.surplus.mean - realised)
    assert gain.limits.mean() == pytest.approx(policy.multipliers[0] * freed)
    assert policy.usage[0].used == pytest.approx(spent)


def test_it_keeps_to_a_budget_on_average() -> None:
    spent = []
    for seed in range(8):
        case = build_case(random_log(seed, 300), Economy(value=2.0, budget_usd=0.05))
        policy = policy_of(case)
        assert policy.multipliers[0] > 0
        spent.append(policy.usage[0].used)
    assert np.mean(spent) == pytest.approx(0.05, rel=0.05)


def test_it_obeys_absolute_rules() -> None:
    case = build_case(
        random_log(2), Economy(value=1e6, tenants={"tenant0": Tenant(forbidden_models=("large",))})
    )
    policy = policy_of(case)
    assert case.tasks.tenant is not None
    mine = case.tasks.tenant.equal("tenant0")
    assert policy.shares[mine, 2].max() == 0
    assert policy.shares[~mine, 2].max() > 0
    assert np.isfinite(policy.surplus.mean)


def test_it_serves_everybody_when_it_must() -> None:
    case = build_case(random_log(2), Economy(value=0.001, defer=False))
    assert policy_of(case).shares[:, DEFER].max() == 0
    assert policy_of(replace(case, economy=Economy(value=0.001))).shares[:, DEFER].min() == 1


def test_too_few_tasks_to_say() -> None:
    assert attainable_policy(build_case(random_log(0, 2 * FOLDS - 1), Economy())) is None
    assert attainable_policy(build_case(random_log(0, 2 * FOLDS), Economy())) is not None


def test_a_bound_no_estimate_can_meet_says_nothing() -> None:
    """Means by class cannot be below the cheapest mean, though luckier single tasks can: no policy, not an error."""
    case = build_case(random_log(3), Economy(value=1.0))
    least = case.uses.amount("usd").min(axis=1).mean()
    case = build_case(random_log(3), Economy(value=1.0, defer=False, budget_usd=least * 1.0001))
    assert case.clear().certificate.max_violation <= 1e-6
    assert attainable_policy(case) is None
