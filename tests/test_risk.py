"""Expectation, CVaR and max–min [Z-K]: against their other definitions, and the axioms of coherence."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from economies import SEEDS
from walras.errors import QuantityError
from walras.quantities import Uses
from walras.risk import CVaR, Expectation, MaxMin, RiskMeasure, risk_of

S = 6
losses = hnp.arrays(
    np.float64, st.integers(1, 12), elements=st.integers(-20, 20).map(lambda cents: cents / 4)
)
"""One loss distribution; quarters, so that equal losses are frequent and sums exact."""
pairs = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[hnp.arrays(np.float64, n, elements=st.integers(-20, 20).map(lambda c: c / 4))] * 2)
)
levels = st.sampled_from((0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)) | st.floats(0, 0.999)


def beliefs(n: int, seed: int, count: int = 3) -> tuple[tuple[float, ...], ...]:
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.ones(n), count)
    table[0] = np.eye(n)[rng.integers(n)]  # one belief is certain of one scenario
    return tuple(tuple(map(float, row)) for row in table)


def measures(n: int, alpha: float, seed: int) -> list[RiskMeasure]:
    return [Expectation(), CVaR(alpha), MaxMin(beliefs(n, seed))]


@given(losses, levels)
def test_cvar_lies_between_the_mean_and_the_worst(loss: np.ndarray, alpha: float) -> None:
    value = risk_of(loss, CVaR(alpha))
    assert loss.mean() - 1e-12 <= value <= loss.max() + 1e-12
    assert risk_of(loss, Expectation()) == pytest.approx(loss.mean(), abs=1e-12)
    assert risk_of(loss, CVaR(0.0)) == pytest.approx(loss.mean(), abs=1e-12)
    assert risk_of(loss, CVaR(1 - 1e-9)) == pytest.approx(loss.max(), abs=1e-12)


@given(losses, levels)
def test_cvar_is_rockafellar_and_uryasevs_minimum(loss: np.ndarray, alpha: float) -> None:
    """min_t t + mean(max(loss − t, 0))/(1 − α): convex in t with kinks at the losses, so one of those is best."""
    at_kinks = [t + np.maximum(loss - t, 0.0).mean() / (1 - alpha) for t in loss]
    assert risk_of(loss, CVaR(alpha)) == pytest.approx(min(at_kinks), rel=1e-9, abs=1e-9)


def test_cvar_by_hand() -> None:
    """By hand: the worst quarter of eight equally likely losses is the mean of the worst two."""
    loss = np.array([1.0, 7.0, 3.0, 5.0, 8.0, 2.0, 4.0, 6.0])
    assert risk_of(loss, CVaR(0.75)) == 7.5
    assert risk_of(loss, CVaR(0.5)) == 6.5
    # α = 0.6 takes 3.2 scenarios: the worst three, and a fifth of the fourth.
    assert risk_of(loss, CVaR(0.6)) == pytest.approx((8 + 7 + 6 + 0.2 * 5) / 3.2)


@given(losses, SEEDS)
def test_max_min_is_the_worst_expectation_over_the_beliefs(loss: np.ndarray, seed: int) -> None:
    ambiguity = beliefs(loss.size, seed)
    worst = max(sum(p * x for p, x in zip(belief, loss, strict=True)) for belief in ambiguity)
    assert risk_of(loss, MaxMin(ambiguity)) == pytest.approx(worst, abs=1e-12)


@given(st.integers(1, 7), st.integers(0, 6), SEEDS)
def test_cvar_is_max_min_over_the_tails(n: int, k: int, seed: int) -> None:
    """Where (1 − α)·S is whole, CVaR is max–min over all sets of that many scenarios: the two roads meet."""
    size = n - min(k, n - 1)
    alpha = 1 - size / n
    tails = tuple(tuple(float(s in tail) / size for s in range(n)) for tail in combinations(range(n), size))
    loss = np.random.default_rng(seed).normal(size=n)
    assert risk_of(loss, CVaR(alpha)) == pytest.approx(risk_of(loss, MaxMin(tails)), abs=1e-9)


@given(pairs, levels, SEEDS, st.floats(0, 50), st.floats(-50, 50))
def test_coherent(both: tuple[np.ndarray, np.ndarray], alpha: float, seed: int, k: float, c: float) -> None:
    a, b = both
    for measure in measures(a.size, alpha, seed):
        risk = float(risk_of(a, measure))
        assert risk_of(a + c, measure) == pytest.approx(risk + c, abs=1e-9)  # translation
        assert risk_of(k * a, measure) == pytest.approx(k * risk, abs=1e-9)  # positive homogeneity
        assert risk_of(np.maximum(a, b), measure) >= risk - 1e-9  # monotone
        assert risk_of(a + b, measure) <= risk + float(risk_of(b, measure)) + 1e-9  # diversification


@given(pairs, levels, SEEDS)
def test_density_is_the_worst_weighting(both: tuple[np.ndarray, np.ndarray], alpha: float, seed: int) -> None:
    """A distribution, within what the measure allows, and a subgradient: no other loss finds it too mild."""
    a, b = both
    for measure in measures(a.size, alpha, seed):
        weights = measure.density(a)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1.0)
        if isinstance(measure, CVaR):
            assert weights.max() <= 1 / ((1 - alpha) * a.size) + 1e-12
        assert weights @ a == pytest.approx(risk_of(a, measure), abs=1e-12)
        assert weights @ b <= risk_of(b, measure) + 1e-9


@given(st.integers(1, 4), st.integers(1, 3), levels, SEEDS)
def test_tables_are_row_by_row(n: int, i: int, alpha: float, seed: int) -> None:
    table = np.random.default_rng(seed).normal(size=(n, i, S))
    for measure in measures(S, alpha, seed):
        whole = risk_of(table, measure)
        assert whole.shape == (n, i)
        for task in range(n):
            for use in range(i):
                assert whole[task, use] == pytest.approx(risk_of(table[task, use], measure), abs=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 1.5, float("nan")])
def test_a_level_outside_the_unit_interval_is_refused(alpha: float) -> None:
    with pytest.raises(QuantityError, match="CVaR level"):
        CVaR(alpha)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ((), "at least one"),
        (((0.5, 0.5), (1.0,)), "all of one length"),
        (((0.5, 0.5), (0.7, 0.7)), "belief 2"),
        (((1.5, -0.5),), "belief 1"),
    ],
)
def test_an_ambiguity_set_must_hold_distributions(table: tuple[tuple[float, ...], ...], says: str) -> None:
    with pytest.raises(QuantityError, match=says):
        MaxMin(table)


def test_beliefs_and_losses_must_be_about_the_same_scenarios() -> None:
    with pytest.raises(QuantityError, match="2 scenarios, the losses have 3"):
        risk_of(np.ones((1, 3)), MaxMin(((0.5, 0.5),)))


@pytest.mark.parametrize("loss", [np.empty((2, 0)), np.array([1.0, np.nan]), np.array([np.inf, 0.0])])
def test_losses_must_be_there_and_finite(loss: np.ndarray) -> None:
    with pytest.raises(QuantityError, match="scenario losses"):
        risk_of(loss, Expectation())


@given(levels, SEEDS)
def test_with_risk_values_each_use_by_its_own_losses(alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss = rng.gamma(1.0, 1.0, (3, 2, S))
    allowed = np.array([[True, True], [False, True], [True, False]])
    loss[~allowed] = np.nan
    uses = Uses(("a", "b"), np.ones((3, 2)), np.zeros((3, 2, 1)), losses=loss, allowed=allowed)
    priced = uses.with_risk(CVaR(alpha))
    for task, use in np.argwhere(allowed):
        assert priced.risk[task, use] == pytest.approx(risk_of(loss[task, use], CVaR(alpha)))
    assert np.isfinite(priced.risk).all()
    # Taken each for itself, tails never cancel: the sum of the uses' risks bounds the risk of the sum.
    together = risk_of(loss[allowed].sum(axis=0), CVaR(alpha))
    assert together <= priced.risk[allowed].sum() + 1e-9


def test_with_risk_needs_losses() -> None:
    with pytest.raises(QuantityError, match="needs losses by scenario"):
        Uses(("a",), np.ones((1, 1)), np.zeros((1, 1, 1))).with_risk(CVaR(0.9))
