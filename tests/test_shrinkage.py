"""Ridge by its own evidence: against brute force, against what is known of its limits, and over many draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from walras.estimate.shrinkage import LEAST_EVIDENCE, Ridge, fit_ridge

seeds = st.integers(0, 2**32)
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(seed: int, n: int, p: int, columns: int = 1, signal: float = 1.0, noise: float = 1.0) -> Drawn:
    """(features (n, p), true function (n, columns), outcomes)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (n, p)) * rng.uniform(0.5, 2, p)
    true = features @ rng.normal(0, signal / np.sqrt(p), (p, columns))
    return features, true, true + rng.normal(0, noise, (n, columns))


def log_likelihood(features: np.ndarray, outcome: np.ndarray, noise: float, ratio: float) -> float:
    """Of the outcomes, the weights integrated out, by their n × n covariance."""
    covariance = noise * (np.eye(len(features)) + ratio * features @ features.T)
    return float(multivariate_normal.logpdf(outcome, np.zeros(len(outcome)), covariance))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("n", "p"), [(60, 8), (30, 60)])
def test_evidence_is_as_high_as_a_search_can_find(seed: int, n: int, p: int) -> None:
    features, _, outcomes = draw(seed, n, p, signal=[0.0, 0.3, 1.0, 5.0][seed % 4])
    fitted = fit_ridge(features, outcomes)
    y = outcomes[:, 0]
    ratios = np.logspace(-6, 2, 41) * n * p / (features**2).sum()
    start = max((log_likelihood(features, y, y.var(), r), r) for r in (ratios / n))[1]
    found = minimize(
        lambda t: -log_likelihood(features, y, np.exp(t[0]), np.exp(t[1])),
        (np.log(y.var()), np.log(start)),
        method="Nelder-Mead",
        options={"xatol": 1e-4, "fatol": 1e-6, "maxiter": 2000},
    )
    nothing = log_likelihood(features, y, (y**2).mean(), 0.0)
    best = max(-found.fun, nothing)
    got = log_likelihood(features, y, fitted.noise[0], fitted.ratio[0])
    if fitted.used[0]:
        assert got >= best - 0.05 - 0.005 * p  # the grid is a third apart
        assert got >= nothing + LEAST_EVIDENCE - 1e-6
    else:
        assert best < nothing + LEAST_EVIDENCE + 0.1
        assert_allclose(fitted.predict(features), 0)


@given(seed=seeds, shape=st.sampled_from([(40, 5), (20, 30), (10, 10)]))
def test_weights_and_variance_by_inverting_the_posterior(seed: int, shape: tuple[int, int]) -> None:
    n, p = shape
    features, _, outcomes = draw(seed, n, p, columns=3, signal=2.0)
    fitted = fit_ridge(features, outcomes)
    new = np.random.default_rng(seed).normal(0, 1, (7, p))
    for k in np.flatnonzero(fitted.used):
        precision = features.T @ features + np.eye(p) / fitted.ratio[k]
        weights = np.linalg.solve(precision, features.T @ outcomes[:, k])
        assert_allclose(fitted.weights[:, k], weights, rtol=1e-6, atol=1e-9)
        assert_allclose(fitted.predict(new)[:, k], new @ weights, rtol=1e-6, atol=1e-9)
        variance = fitted.noise[k] * np.einsum("np,pq,nq->n", new, np.linalg.inv(precision), new)
        assert_allclose(fitted.variance(new)[:, k], variance, rtol=1e-6)


def test_columns_are_fitted_one_by_one() -> None:
    features, _, outcomes = draw(0, 80, 6, columns=5, signal=1.0)
    outcomes[:, 2] = np.random.default_rng(1).normal(0, 1, 80)
    together = fit_ridge(features, outcomes)
    for k in range(5):
        alone = fit_ridge(features, outcomes[:, [k]])
        assert_allclose(together.predict(features)[:, [k]], alone.predict(features), atol=1e-12)
        assert_allclose(together.variance(features)[:, [k]], alone.variance(features), atol=1e-12)
        assert together.used[k] == alone.used[0]


@pytest.mark.parametrize(("n", "p"), [(200, 3), (200, 100), (50, 200)])
def test_features_of_noise_are_left_out(n: int, p: int) -> None:
    rng = np.random.default_rng(7)
    used = [fit_ridge(rng.normal(0, 1, (n, p)), rng.normal(0, 1, (n, 1))).used[0] for _ in range(200)]
    assert np.mean(used) <= 0.05


def test_what_is_left_out_is_predicted_as_exactly_nothing() -> None:
    rng = np.random.default_rng(8)
    features = rng.normal(0, 1, (100, 20))
    fitted = fit_ridge(features, rng.normal(0, 1, (100, 30)))
    assert not fitted.used.all()
    assert_array_equal(fitted.predict(features)[:, ~fitted.used], 0.0)


@pytest.mark.parametrize("p", [1, 5, 20])
def test_a_strong_signal_is_fitted_as_by_least_squares(p: int) -> None:
    features, _, outcomes = draw(p, 400, p, columns=3, signal=20.0, noise=0.5)
    fitted = fit_ridge(features, outcomes)
    least_squares = np.linalg.lstsq(features, outcomes, rcond=None)[0]
    assert_allclose(fitted.weights, least_squares, atol=2e-3 * np.abs(least_squares).max())
    assert_allclose(fitted.noise, 0.25, rtol=0.2)


def test_shrinking_beats_both_extremes() -> None:
    """As many features as half the rows, and as much signal as noise: neither zero nor least squares is best."""
    lost = np.zeros(3)
    for seed in range(60):
        features, true, outcomes = draw(seed, 60, 30, signal=0.7)
        least_squares = np.linalg.lstsq(features, outcomes, rcond=None)[0]
        for k, guess in enumerate(
            (fit_ridge(features, outcomes).predict(features), 0.0, features @ least_squares)
        ):
            lost[k] += ((guess - true) ** 2).mean()
    assert lost[0] < 0.8 * lost[1:].min()


@pytest.mark.parametrize(
    ("n", "p", "signal"), [(100, 3, 1), (100, 3, 5), (100, 40, 1), (100, 40, 5), (40, 100, 5)]
)
def test_errors_tell_how_far_off_the_prediction_is(n: int, p: int, signal: float) -> None:
    """95 % intervals for the function itself, at new points."""
    inside = []
    for seed in range(40):
        features, true, outcomes = draw(seed, 2 * n, p, columns=5, signal=signal)
        fitted = fit_ridge(features[:n], outcomes[:n])
        off = np.abs(fitted.predict(features[n:]) - true[n:])
        inside.append((off <= 1.96 * np.sqrt(fitted.variance(features[n:]))).mean())
    assert 0.90 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize("p", [3, 40])
@pytest.mark.parametrize("signal", [0.0, 0.2, 0.3, 0.4])
def test_what_is_left_out_is_still_in_the_error(p: int, signal: float) -> None:
    """Columns that 0 is predicted for: a weak signal among them shows in their error, pure noise hardly does."""
    off, error = [], []
    for seed in range(60):
        features, true, outcomes = draw(seed, 200, p, columns=5, signal=signal)
        fitted = fit_ridge(features[:100], outcomes[:100])
        off.append((true[100:] ** 2).mean(axis=0)[~fitted.used])
        error.append(fitted.variance(features[100:]).mean(axis=0)[~fitted.used])
    variance = np.concatenate(error).mean()
    if signal:
        assert 1 / 3 < variance / np.concatenate(off).mean() < 1
    else:
        assert variance < 0.25 * p / 100  # a quarter of what least squares would add


@given(seed=seeds, by=st.sampled_from([1e-6, 0.01, 37.0, 1e6]), signal=st.sampled_from([0.0, 0.4, 3.0]))
def test_units_do_not_matter(seed: int, by: float, signal: float) -> None:
    features, _, outcomes = draw(seed, 50, 7, columns=2, signal=signal)
    one = fit_ridge(features, outcomes)
    for other, size in ((fit_ridge(features, by * outcomes), by), (fit_ridge(by * features, outcomes), 1.0)):
        at = features if size == by else by * features
        assert_array_equal(other.used, one.used)
        assert_allclose(other.predict(at), size * one.predict(features), rtol=1e-6, atol=1e-9 * size)
        assert_allclose(other.variance(at), size**2 * one.variance(features), rtol=1e-6, atol=1e-12 * size**2)


@given(seed=seeds)
def test_turning_the_features_changes_nothing(seed: int) -> None:
    features, _, outcomes = draw(seed, 50, 6, columns=2)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(0, 1, (6, 6)))[0]
    one, other = fit_ridge(features, outcomes), fit_ridge(features @ turn, outcomes)
    assert_allclose(other.predict(features @ turn), one.predict(features), atol=1e-8)
    assert_allclose(other.variance(features @ turn), one.variance(features), atol=1e-8)


@given(seed=seeds)
def test_a_feature_twice_is_as_good_as_once(seed: int) -> None:
    """Features that say the same leave a direction without any evidence: the prior alone holds it."""
    features, _, outcomes = draw(seed, 60, 5, signal=3.0)
    once, twice = fit_ridge(features, outcomes), fit_ridge(np.hstack((features, features)), outcomes)
    new = np.random.default_rng(seed).normal(0, 1, (9, 5))
    off = np.abs(twice.predict(np.hstack((new, new))) - once.predict(new))
    error = np.sqrt(once.variance(new))
    assert (off <= 0.2 * error + 1e-9).all()
    assert_allclose(np.sqrt(twice.variance(np.hstack((new, new)))), error, rtol=0.1)


def whole(fitted: Ridge, p: int, columns: int) -> None:
    new = np.ones((4, p))
    assert fitted.predict(new).shape == fitted.variance(new).shape == (4, columns)
    assert np.isfinite(fitted.predict(new)).all()
    assert (fitted.variance(new) >= 0).all()


@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize("p", [1, 10])
def test_few_rows(n: int, p: int) -> None:
    features, _, outcomes = draw(3, n, p, columns=2)
    fitted = fit_ridge(features, outcomes)
    whole(fitted, p, 2)
    if n < 2:
        assert not fitted.used.any()


def test_nothing_to_explain_and_nothing_to_explain_it_with() -> None:
    features, _, outcomes = draw(4, 50, 5, columns=2)
    for some, left in (
        (features, np.zeros_like(outcomes)),
        (np.zeros_like(features), outcomes),
        (np.zeros_like(features), np.zeros_like(outcomes)),
        (features, np.full_like(outcomes, 1e-180)),
    ):
        fitted = fit_ridge(some, left)
        whole(fitted, 5, 2)
        assert_allclose(fitted.predict(features), 0, atol=1e-100)


def test_outcomes_that_the_features_explain_entirely() -> None:
    features, true, _ = draw(5, 50, 5, columns=2, signal=1.0)
    fitted = fit_ridge(features, true)
    assert fitted.used.all()
    assert_allclose(fitted.predict(features), true, atol=0.02)


@pytest.mark.parametrize("least", [0.0, 1.0, 3.0, 10.0])
def test_asking_for_more_evidence_uses_less(least: float) -> None:
    features, _, outcomes = draw(6, 80, 4, columns=200, signal=0.35)
    fitted, plain = fit_ridge(features, outcomes, least), fit_ridge(features, outcomes, 0.0)
    assert_array_equal(plain.predict(features)[:, fitted.used], fitted.predict(features)[:, fitted.used])
    gain = [
        log_likelihood(features, y, noise, ratio) - log_likelihood(features, y, (y**2).mean(), 0.0)
        for y, noise, ratio in zip(outcomes.T, plain.noise, plain.ratio, strict=True)
    ]
    assert_array_equal(fitted.used, np.array(gain) >= least - 1e-9)
