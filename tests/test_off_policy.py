"""Off-policy evaluation [OP-1]: laws, a case counted out in full, refusals, and whether 95% intervals cover 95%."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.optimize import brentq
from scipy.stats import f as fisher

from walras.errors import QuantityError, RecordError
from walras.estimate import off_policy
from walras.estimate.empirical_likelihood import Estimate
from walras.estimate.off_policy import Logged, OffPolicy, SupportError, compare, evaluate_policy

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
seeds = st.integers(0, 2**32)
ESTIMATORS = ("ips", "snips", "dr", "switch_dr")


def drawn(rng: np.random.Generator, probabilities: Floats) -> Ints:
    """One action a row."""
    below = np.cumsum(probabilities, axis=1)[:, :-1] < rng.random(len(probabilities))[:, None]
    return below.sum(axis=1)


def a_log(seed: int, n: int = 400, actions: int = 3) -> tuple[Logged, Floats, Floats]:
    """(log with full probabilities, policy, some model)."""
    rng = np.random.default_rng(seed)
    p = 0.5 * rng.dirichlet(np.ones(actions), n) + 0.5 / actions
    action = drawn(rng, p)
    reward = rng.normal(action, 1.0)
    policy = rng.dirichlet(np.ones(actions), n)
    return Logged(action, p[np.arange(n), action], reward, p), policy, rng.normal(0, 1, (n, actions))


def one_hot(column: Ints, actions: int) -> Floats:
    return np.eye(actions)[column]


def assert_same(a: Estimate, b: Estimate, times: float = 1.0, plus: float = 0.0) -> None:
    """b = times · a + plus, errors included."""
    ends = sorted(times * end + plus for end in a.interval)
    assert_allclose(b.value, times * a.value + plus, atol=1e-9)
    assert_allclose(b.se, abs(times) * a.se, atol=1e-9)
    assert_allclose(b.interval, ends, atol=1e-5 * abs(times) * a.se + 1e-9)


# --- laws -------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_of_the_logging_policy_it_is_the_mean_reward(seed: int) -> None:
    logged, _, model = a_log(seed)
    answer = evaluate_policy(logged, logged.probabilities, model)
    mean, n = logged.reward.mean(), logged.reward.size
    for name in ("ips", "snips"):
        assert_allclose(answer.estimates[name].value, mean)
        assert_allclose(answer.estimates[name].se, logged.reward.std(ddof=1) / n**0.5)
    assert_allclose([answer.overlap.ess, answer.overlap.expected_ess], n)
    assert answer.overlap.mean_weight_z == 0
    assert_allclose(compare(logged, logged.probabilities).interval, 0, atol=1e-9)


@given(seed=seeds)
def test_dr_with_a_perfect_model_and_no_noise_is_the_truth(seed: int) -> None:
    logged, policy, model = a_log(seed)
    exact = replace(logged, reward=model[np.arange(len(model)), logged.action])
    answer = evaluate_policy(exact, policy, model)
    for name in ("dr", "switch_dr"):
        assert_allclose(answer.estimates[name].value, (policy * model).sum(axis=1).mean(), atol=1e-12)
    flat = np.broadcast_to(model[0], model.shape)
    same = evaluate_policy(
        replace(logged, reward=flat[0][logged.action]), np.broadcast_to(policy[0], policy.shape), flat
    )
    assert_allclose(same.estimates["dr"].interval, policy[0] @ flat[0], atol=1e-12)
    assert same.estimates["dr"].se == 0


@given(seed=seeds)
def test_dr_with_an_empty_model_is_ips(seed: int) -> None:
    logged, policy, model = a_log(seed)
    answer = evaluate_policy(logged, policy, 0 * model)
    assert_same(answer.estimates["ips"], answer.estimates["dr"])


@given(seed=seeds, times=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]), plus=st.floats(-10, 10))
def test_units_do_not_matter(seed: int, times: float, sign: int, plus: float) -> None:
    """All are scale equivariant; all but IPS are translation equivariant (the model moves with the rewards)."""
    logged, policy, model = a_log(seed)
    times *= sign
    scaled = replace(logged, reward=times * logged.reward)
    moved = replace(logged, reward=times * logged.reward + plus)
    a = evaluate_policy(logged, policy, model)
    assert_same(a.estimates["ips"], evaluate_policy(scaled, policy).estimates["ips"], times)
    b = evaluate_policy(moved, policy, times * model + plus)
    for name in ("snips", "dr", "switch_dr"):
        assert_same(a.estimates[name], b.estimates[name], times, plus)
    assert a.recommended == b.recommended


@given(seed=seeds, share=st.floats(0.3, 0.9))
def test_snips_forgives_propensities_that_are_off_by_a_factor(seed: int, share: float) -> None:
    logged, policy, _ = a_log(seed)
    logged = replace(logged, probabilities=None)
    off = replace(logged, propensity=share * logged.propensity)
    a, b = evaluate_policy(logged, policy), evaluate_policy(off, policy)
    assert_same(a.estimates["snips"], b.estimates["snips"])
    assert_same(a.estimates["ips"], b.estimates["ips"], 1 / share)
    assert_allclose(a.overlap.ess, b.overlap.ess)
    assert_allclose(a.overlap.carriers, b.overlap.carriers)


@given(seed=seeds)
def test_order_and_names_do_not_matter(seed: int) -> None:
    logged, policy, model = a_log(seed)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(policy)), rng.permutation(policy.shape[1])
    shuffled = Logged(
        np.argsort(columns)[logged.action][rows],
        logged.propensity[rows],
        logged.reward[rows],
        logged.probabilities[rows][:, columns],
    )
    a = evaluate_policy(logged, policy, model)
    b = evaluate_policy(shuffled, policy[rows][:, columns], model[rows][:, columns])
    for name in ESTIMATORS:
        assert_same(a.estimates[name], b.estimates[name])


@given(seed=seeds)
def test_an_action_split_in_two_changes_nothing(seed: int) -> None:
    """Action 0 becomes two that do the same, each with half its probability in log and policy."""
    logged, policy, model = a_log(seed)
    half = (np.random.default_rng(seed).random(len(policy)) < 0.5) & (logged.action == 0)

    def split(table: Floats) -> Floats:
        return np.column_stack((table[:, 0] / 2, table[:, 1:], table[:, 0] / 2))

    p = split(logged.probabilities)
    action = np.where(half, 3, logged.action)
    a = evaluate_policy(logged, policy, model)
    b = evaluate_policy(
        Logged(action, p[np.arange(len(p)), action], logged.reward, p),
        split(policy),
        np.column_stack((model, model[:, 0])),
    )
    for name in ESTIMATORS:
        assert_same(a.estimates[name], b.estimates[name])


@given(seed=seeds, level=st.floats(0.5, 0.98))
def test_more_confidence_is_a_wider_interval(seed: int, level: float) -> None:
    logged, policy, model = a_log(seed)
    narrow = evaluate_policy(logged, policy, model, level).estimates
    wide = evaluate_policy(logged, policy, model, level + 0.01).estimates
    for name in ESTIMATORS:
        assert wide[name].interval[0] < narrow[name].interval[0] < narrow[name].value
        assert narrow[name].value < narrow[name].interval[1] < wide[name].interval[1]


@given(seed=seeds)
def test_a_gain_is_measured_row_by_row(seed: int) -> None:
    """A policy that all but repeats the log differs little from it, though both are uncertain."""
    logged, policy, model = a_log(seed)
    near = 0.95 * logged.probabilities + 0.05 * policy
    value = evaluate_policy(logged, near, model)
    for gain, name in ((compare(logged, near, model), "dr"), (compare(logged, near), "snips")):
        assert_allclose(gain.value, value.estimates[name].value - logged.reward.mean(), atol=1e-9)
    assert compare(logged, near).se < 0.3 * value.estimates["snips"].se


# --- second roads -----------------------------------------------------------------------------------------------


def test_counted_out_over_every_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over all 216 logs of 3 rows, each with its probability: IPS and DR hit the truth, se² the variance."""
    monkeypatch.setattr(off_policy, "LEAST_ESS", 0.0)
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    pi = np.array([[0.2, 0.2, 0.6], [0.7, 0.2, 0.1]])
    reward = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]])
    model = np.array([[0.3, 0.1, -0.7], [2.0, 1.0, -1.0]])  # wrong on purpose
    single = list(product((0, 1), (0, 1, 2)))
    rows = []
    for log in product(single, repeat=3):
        x, a = np.array(log).T
        chance = np.prod(p[x, a] / 2)
        estimates = evaluate_policy(Logged(a, p[x, a], reward[x, a], p[x]), pi[x], model[x]).estimates
        gain = compare(Logged(a, p[x, a], reward[x, a], p[x]), pi[x], model[x])
        rows.append(
            [chance]
            + [v for e in (estimates["ips"], estimates["dr"], gain) for v in (e.value, e.value**2, e.se**2)]
        )
    chance, *columns = np.array(rows).T
    assert_allclose(chance.sum(), 1)
    ips, ips2, ips_var, dr, dr2, dr_var, gain, gain2, gain_var = (chance @ column for column in columns)
    truth = (pi * reward).sum() / 2
    assert_allclose([ips, dr, gain], [truth, truth, truth - (p * reward).sum() / 2])
    assert_allclose([ips_var, dr_var, gain_var], [ips2 - ips**2, dr2 - dr**2, gain2 - gain**2])


def test_a_log_in_exact_proportion_gives_the_truth() -> None:
    """Each action as often as its probability says: weights average 1 in each row's kind, so SNIPS is exact as well."""
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    pi = np.array([[0.2, 0.2, 0.6], [0.7, 0.2, 0.1]])
    reward = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]])
    x = np.array([0, 1]).repeat(300)
    a = np.concatenate([np.arange(3).repeat(np.rint(300 * row).astype(int)) for row in p])
    answer = evaluate_policy(Logged(a, p[x, a], reward[x, a]), pi[x], reward[x] ** 2)
    for name in ("ips", "snips", "dr"):
        assert_allclose(answer.estimates[name].value, (pi * reward).sum() / 2)
    assert_allclose(answer.overlap.mean_weight, 1)
    assert_allclose(answer.overlap.ess, 600 / ((pi**2 / p).sum() / 2))
    assert_allclose(answer.overlap.max_weight, 7)


def likelihood_ratio(g: Floats) -> float:
    """−2 log of the empirical likelihood ratio of E[g] = 0, by its dual: Σ g/(1 + λg) = 0."""
    low, high = -1 / g.max(), -1 / g.min()
    pad = 1e-10 * (high - low)
    root = brentq(lambda x: (g / (1 + x * g)).sum(), low + pad, high - pad, xtol=1e-14)
    return float(2 * np.log1p(root * g).sum())


def bartlett(g: Floats) -> float:
    d = g - g.mean()
    kurtosis, skewness = (d**4).mean() / (d**2).mean() ** 2, (d**3).mean() / (d**2).mean() ** 1.5
    return float(1 + (kurtosis / 2 - skewness**2 / 3) / g.size)


@given(seed=seeds, level=st.sampled_from([0.8, 0.95, 0.99]))
def test_the_ends_of_intervals_are_at_the_threshold_of_the_likelihood(seed: int, level: float) -> None:
    logged, policy, model = a_log(seed)
    at = np.arange(len(policy))
    w = policy[at, logged.action] / logged.propensity
    r = logged.reward
    answer = evaluate_policy(logged, policy, model, level)
    scores = {
        "ips": w * r,
        "dr": (policy * model).sum(axis=1) + w * (r - model[at, logged.action]),
    }
    for name, y in scores.items():
        for end in answer.estimates[name].interval:
            c = fisher.ppf(level, 1, y.size - 1) * bartlett(y)
            assert_allclose(likelihood_ratio(y - end), c, rtol=1e-5)
    snips = answer.estimates["snips"]
    for end in snips.interval:
        c = fisher.ppf(level, 1, r.size - 1) * bartlett(w * (r - snips.value))
        assert_allclose(likelihood_ratio(w * (r - end)), c, rtol=1e-4)


def rare_region(rng: np.random.Generator, n: int, *, astray: float = 0.0) -> tuple[Logged, Floats, Floats]:
    """In 2% of rows the policy wants what the log does with 1%. There the model is off by `astray`."""
    quality, cost = np.linspace(0.2, 0.8, 4), np.linspace(0.0, 0.3, 4)
    rare = rng.random(n) < 0.02
    p = np.where(rare[:, None], [0.5, 0.01, 0.3, 0.19], 0.25)
    policy = np.full((n, 4), 0.1 / 3)
    policy[:, 1] = 0.9
    a = drawn(rng, p)
    r = (rng.random(n) < quality[a]) - cost[a]
    model = np.broadcast_to(quality - cost, (n, 4)) + astray * rare[:, None]
    return Logged(a, p[np.arange(n), a], r, p), policy, model


def test_the_threshold_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate tried one by one, with variance and bound as in Wang, Agarwal & Dudík (2017)."""
    monkeypatch.setattr(off_policy, "LEAST_ESS", 0.0)
    switched = 0
    for seed in range(40):
        logged, policy, model = rare_region(np.random.default_rng(seed), 1000)
        n, r, at = len(policy), logged.reward, np.arange(len(policy))
        w = policy[at, logged.action] / logged.propensity
        furthest = np.maximum(r.max() - model, model - r.min())
        risks = {}
        for tau in [0.0, *np.unique(w)[:-1], np.inf]:
            kept = (w <= tau) * w * (r - model[at, logged.action])
            variance = ((policy * model).sum(axis=1) + kept).var(ddof=1) / n
            bias = (policy * furthest * (policy / logged.probabilities > tau)).sum() / n
            risks[tau] = (variance + bias**2, bias)
        answer = evaluate_policy(logged, policy, model)
        least = min(risk for risk, _ in risks.values())
        assert_allclose(risks[answer.switch_weight], (least, answer.switch_bias))
        if np.isinf(answer.switch_weight):
            assert answer.estimates["switch_dr"] == answer.estimates["dr"]
        else:
            switched += 1
            assert answer.estimates["switch_dr"].se < answer.estimates["dr"].se
        blind = evaluate_policy(replace(logged, probabilities=None), policy, model)
        assert blind.estimates["switch_dr"] == answer.estimates["dr"]
    assert switched > 3


# --- overlap ----------------------------------------------------------------------------------------------------


def test_wrong_propensities_are_noticed() -> None:
    logged, policy, _ = a_log(0, n=2000)
    right = evaluate_policy(replace(logged, probabilities=None), policy)
    assert abs(right.overlap.mean_weight_z) < 3
    assert "weights average" not in right.reason
    wrong = evaluate_policy(replace(logged, probabilities=None, propensity=np.full(2000, 0.2)), policy)
    assert wrong.overlap.mean_weight_z > 3
    assert "weights average" in wrong.reason


def test_heavy_rows_that_were_not_drawn_count() -> None:
    """With full probabilities the effective size knows of weights that luck kept out of the log."""
    n = 4000
    rng = np.random.default_rng(0)
    rare = np.arange(n) < 40
    p = np.where(rare[:, None], [0.998, 0.002], [0.5, 0.5])
    a = np.where(rare, 0, drawn(rng, p))
    logged = Logged(a, p[np.arange(n), a], rng.normal(0, 1, n), p)
    policy = one_hot(np.ones(n, dtype=np.int64), 2)
    overlap = evaluate_policy(logged, policy).overlap
    assert overlap.ess > 1900
    assert_allclose(overlap.expected_ess, n**2 / (40 / 0.002 + 3960 / 0.5))
    assert_allclose(overlap.thin, 40 / n)
    assert_allclose(overlap.carriers, (40 / 0.002 + 3960 / 0.5) ** 2 / (40 / 0.002**3 + 3960 / 0.5**3))
    assert "carry the variance" in evaluate_policy(logged, policy).reason


def test_recommended_and_why() -> None:
    logged, policy, _ = a_log(1)
    columns = np.broadcast_to(np.arange(3.0), policy.shape)
    plain = evaluate_policy(logged, policy)
    assert (plain.recommended, plain.best) == ("snips", plain.estimates["snips"])
    assert set(plain.estimates) == {"ips", "snips"}
    assert evaluate_policy(logged, policy, columns).recommended == "dr"
    astray = evaluate_policy(logged, policy, columns * -9)
    assert astray.recommended == "snips"
    assert "more noise" in astray.reason


# --- refusals ---------------------------------------------------------------------------------------------------


def test_an_action_the_log_never_takes_is_refused() -> None:
    n = 1000
    p = np.tile([0.5, 0.5, 0.0], (n, 1))
    p[:100] = [0.4, 0.4, 0.2]
    rng = np.random.default_rng(0)
    a = drawn(rng, p)
    logged = Logged(a, p[np.arange(n), a], rng.normal(0, 1, n), p)
    policy = np.tile([0.5, 0.5, 0.0], (n, 1))
    policy[:100] = [0.0, 0.0, 1.0]
    assert evaluate_policy(logged, policy).overlap.never_logged == 0
    policy[100:400] = [0.0, 0.0, 1.0]
    for question in (evaluate_policy, compare):
        with pytest.raises(
            SupportError, match=r"30\.00%, to action 2 .*take action 2 with a probability of 0\.03 or more"
        ) as error:
            question(logged, policy)
    assert error.value.action == 2
    assert_allclose(error.value.mass, 0.3)


def test_an_action_never_logged_in_its_class_is_refused() -> None:
    n = 1000
    rng = np.random.default_rng(0)
    task_class = (np.arange(n) < 300).astype(np.int64)
    a = np.where(task_class == 1, 0, rng.integers(0, 2, n))
    logged = Logged(a, np.where(task_class == 1, 1.0, 0.5), rng.normal(0, 1, n))
    policy = one_hot(np.where(np.arange(n) < 200, 1, 0), 2)
    assert evaluate_policy(logged, policy).overlap.never_logged == 0  # somewhere it was taken
    with pytest.raises(SupportError, match=r"20\.00%, to action 1"):
        evaluate_policy(replace(logged, task_class=task_class), policy)
    few = one_hot(np.where(np.arange(n) < 9, 1, 0), 2)
    assert_allclose(evaluate_policy(replace(logged, task_class=task_class), few).overlap.never_logged, 0.009)


@pytest.mark.parametrize("known", [True, False])
def test_too_few_effective_rows_are_refused(known: bool) -> None:
    n = 500
    rng = np.random.default_rng(0)
    p = np.tile([0.9, 0.1], (n, 1))
    a = np.where(np.arange(n) % 10 == 0, 1, 0)
    logged = Logged(a, p[np.arange(n), a], rng.normal(0, 1, n), p if known else None)
    policy = one_hot(np.ones(n, dtype=np.int64), 2)
    with pytest.raises(SupportError, match=r"worth 50\.0 rows .*log 1,000 rows .*action 1 about 2\.0 times"):
        evaluate_policy(logged, policy)
    twice = Logged(*(np.tile(column, 2) for column in (a, logged.propensity, logged.reward)))
    assert_allclose(evaluate_policy(twice, np.tile(policy, (2, 1))).overlap.ess, 100)


def test_a_policy_that_never_does_what_was_done_is_refused() -> None:
    a = np.zeros(300, dtype=np.int64)
    logged = Logged(a, np.full(300, 0.5), np.ones(300), np.full((300, 2), 0.5))
    with pytest.raises(SupportError, match=r"worth 0\.0 rows .*action 1, 100\.00%"):
        evaluate_policy(logged, one_hot(a + 1, 2))


GOOD: dict[str, Any] = {
    "action": np.array([0, 1, 1]),
    "propensity": np.array([0.5, 0.5, 0.5]),
    "reward": np.array([1.0, 2.0, 3.0]),
    "probabilities": np.full((3, 2), 0.5),
    "task_class": np.array([0, 0, 1]),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("propensity", [0.5, 0.0, 0.5], r"row 2, column 'propensity': 0 cannot be"),
        ("propensity", [0.5, 0.5, -0.1], r"row 3, column 'propensity': -0\.1"),
        ("propensity", [1.5, 0.5, 0.0], r"row 1, column 'propensity': 1\.5 cannot be \(2 such rows\)"),
        ("propensity", [0.5, np.nan, 0.5], r"row 2, column 'propensity': nan"),
        ("propensity", [0.5, 0.5, 0.4], r"row 3, .*it is not what `probabilities` says"),
        ("propensity", [0.5, 0.5], r"column 'propensity': has shape \(2,\)"),
        ("reward", [1.0, np.inf, 0.0], r"row 2, column 'reward': inf"),
        ("reward", [np.nan, 1.0, 0.0], r"row 1, column 'reward': nan"),
        ("action", [0, -1, 1], r"row 2, column 'action': -1"),
        ("action", [0, 1, 2], r"row 3, column 'action': 2 cannot be .*columns are 0 to 1"),
        ("action", [0.0, 1.0, 1.0], r"column 'action': must be whole numbers"),
        ("task_class", [0, 1, -1], r"row 3, column 'task_class': -1"),
    ],
)
def test_what_cannot_be_is_named(field: str, value: list[float], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        Logged(**(GOOD | {field: np.array(value)}))


def test_no_rows() -> None:
    none = np.zeros(0)
    with pytest.raises(RecordError, match="no rows"):
        Logged(none.astype(np.int64), none, none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, m: (p[:-1], m, 0.95), "one row for each of the 400"),
        (lambda p, m: (p * 0.9, m, 0.95), r"row 1 is not ≥ 0 with sum 1 \(400 such rows\); it sums to 0\.9"),
        (lambda p, m: (p + np.array([0.5, -0.5, 0.0]), m, 0.95), "row 1 is not ≥ 0"),
        (lambda p, m: (np.where(np.arange(400)[:, None] == 3, np.nan, p), m, 0.95), "row 4 is not ≥ 0"),
        (lambda p, m: (np.column_stack((p, 0 * p[:, 0])), m, 0.95), "the policy has 4 actions, the log 3"),
        (lambda p, m: (p, m[:, :2], 0.95), r"the model must be finite, of shape \(400, 3\)"),
        (lambda p, m: (p, np.where(m == m[0, 0], np.nan, m), 0.95), "the model must be finite"),
        (lambda p, m: (p, m, 1.0), "level"),
    ],
)
def test_policies_and_models_that_do_not_fit(change: Callable[..., Any], message: str) -> None:
    logged, _, model = a_log(0)
    with pytest.raises(QuantityError, match=message):
        evaluate_policy(logged, *change(np.full((400, 3), 1 / 3), model))


# --- coverage ---------------------------------------------------------------------------------------------------


def cross_fitted(
    rng: np.random.Generator, action: Ints, reward: Floats, kind: Ints, shape: tuple[int, int], folds: int = 5
) -> Floats:
    """Mean reward by kind of request and action, from the other folds, with three rows' worth of the mean of all."""
    kinds, actions = shape
    cell, fold = kind * actions + action, rng.integers(0, folds, action.size)
    model = np.empty((action.size, actions))
    for k in range(folds):
        others = fold != k
        count = np.bincount(cell[others], minlength=kinds * actions)
        total = np.bincount(cell[others], weights=reward[others], minlength=kinds * actions)
        mean = (total + 3 * reward[others].mean()) / (count + 3)
        model[~others] = mean.reshape(shape)[kind[~others]]
    return model


def coverage(replays: list[Estimate], truth: float) -> tuple[float, float]:
    """(share of intervals that hold the truth, their mean width)."""
    low, high = np.array([replay.interval for replay in replays]).T
    return float(((low <= truth) & (truth <= high)).mean()), float((high - low).mean())


def assert_covered(answers: list[OffPolicy], truth: float) -> dict[str, float]:
    """93 to 97% for every estimator and for whatever was recommended; returns mean widths."""
    widths = {}
    for name in ESTIMATORS:
        share, widths[name] = coverage([answer.estimates[name] for answer in answers], truth)
        assert 0.93 <= share <= 0.97, (name, share)
    share, _ = coverage([answer.best for answer in answers], truth)
    assert 0.93 <= share <= 0.97, ("recommended", share)
    return widths


@pytest.mark.data
def test_coverage_on_routerbench(data_dir: Any) -> None:
    """500 logs of 1,500 requests, drawn from all requests as the population; V = 0.01 USD, no deferring.

    The log explores: softmax of category means, mixed with 20% of anything. The policy is the best of each category.
    """
    columns = ["request_id", "benchmark", "model", "quality", "cost_usd"]
    table = pq.read_table(data_dir / "routing/routerbench_subset.parquet", columns=columns)
    (_, row), (_, kind), (models, column) = (
        np.unique(table[name].to_numpy(), return_inverse=True) for name in columns[:3]
    )
    surplus = np.full((row.max() + 1, models.size), np.nan)
    surplus[row, column] = 0.01 * table["quality"].to_numpy() - table["cost_usd"].to_numpy()
    kind_of = np.zeros(len(surplus), dtype=np.int64)
    kind_of[row] = kind
    complete = np.isfinite(surplus).all(axis=1)
    surplus, kind_of = surplus[complete], kind_of[complete]
    assert surplus.shape == (3150, 11)

    shape = (3, 11)
    mean = np.array([surplus[kind_of == k].mean(axis=0) for k in range(3)])
    greedy = np.exp((mean - mean.max(axis=1, keepdims=True)) / 0.003)
    p = 0.8 * greedy / greedy.sum(axis=1, keepdims=True) + 0.2 / 11
    policy = one_hot(mean.argmax(axis=1), 11)
    truth = float((policy[kind_of] * surplus).sum(axis=1).mean())
    behaviour = float((p[kind_of] * surplus).sum(axis=1).mean())

    rng = np.random.default_rng(0)
    answers, gains = [], []
    for _ in range(500):
        i = rng.integers(0, len(surplus), 1500)
        k = kind_of[i]
        a = drawn(rng, p[k])
        logged = Logged(a, p[k, a], surplus[i, a], p[k])
        model = cross_fitted(rng, a, logged.reward, k, shape)
        answers.append(evaluate_policy(logged, policy[k], model))
        gains.append(compare(logged, policy[k], model))
    widths = assert_covered(answers, truth)
    assert widths["dr"] < 0.6 * widths["ips"]
    assert 0.93 <= coverage(gains, truth - behaviour)[0] <= 0.97


def skewed_economy() -> tuple[Floats, Floats, Floats, Ints]:
    """(mean reward, logging probabilities, policy, kind) of 20,000 requests, 4 actions; weights reach hundreds."""
    rng = np.random.default_rng(5)
    shape = (20_000, 4)
    trait = rng.normal(size=(shape[0], 1))
    p = np.exp(rng.normal(0, 0.8, shape))
    reward = np.exp(0.3 * trait + 0.2 * rng.normal(size=shape)) + 0.3 * np.arange(4)
    policy = np.exp(reward + rng.normal(0, 0.5, shape))
    kind = np.digitize(trait[:, 0], [-1, 0, 1])
    return reward, p / p.sum(axis=1, keepdims=True), policy / policy.sum(axis=1, keepdims=True), kind


def test_coverage_with_skewed_weights_and_rewards() -> None:
    reward, p, policy, kind = skewed_economy()
    truth = float((policy * reward).sum(axis=1).mean())
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(1000):
        i = rng.integers(0, len(reward), 1500)
        a = drawn(rng, p[i])
        r = reward[i, a] * rng.gamma(2.0, 0.5, a.size)
        model = cross_fitted(rng, a, r, kind[i], (4, 4))
        answers.append(evaluate_policy(Logged(a, p[i, a], r, p[i]), policy[i], model))
    assert np.mean([answer.overlap.max_weight for answer in answers]) > 10
    widths = assert_covered(answers, truth)
    assert widths["dr"] < 0.8 * widths["ips"]


def test_coverage_where_it_switches_and_the_model_is_wrong_there() -> None:
    """Above the threshold the model is believed and is 0.3 USD off: only the allowance for bias keeps the promise."""
    quality, cost = np.linspace(0.2, 0.8, 4), np.linspace(0.0, 0.3, 4)
    truth = float(np.array([0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3]) @ (quality - cost))
    rng = np.random.default_rng(0)
    answers = [evaluate_policy(*rare_region(rng, 1500, astray=0.3)) for _ in range(500)]
    switched = [answer for answer in answers if answer.recommended == "switch_dr"]
    assert Counter(answer.recommended for answer in answers)["switch_dr"] > 50
    share, width = coverage([answer.estimates["switch_dr"] for answer in switched], truth)
    assert share >= 0.93
    assert width < 0.7 * coverage([answer.estimates["dr"] for answer in switched], truth)[1]
