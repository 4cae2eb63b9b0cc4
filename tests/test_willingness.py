"""The law of V from choices and stated values: recovered, as sure as it says, and silent on what cannot be known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize

from walras.equation import DEFER
from walras.errors import QuantityError, RecordError, SettingsError
from walras.estimate.type_laws import Atoms, Exponential, LogNormal, Uniform
from walras.estimate.willingness import (
    Evidence,
    bootstrap_laws,
    choices_to_evidence,
    fit_law,
    turnbull,
)

CUTS = np.array([0.0, 0.8, 1.6, 3.0, 6.0, np.inf])
NAMES = ("basic", "plus", "pro")
QUALITY, PRICE = np.array([0.4, 0.7, 0.9]), np.array([0.2, 0.5, 1.0])


def censored(value: np.ndarray, cuts: np.ndarray = CUTS, tenant: np.ndarray | None = None) -> Evidence:
    cell = np.searchsorted(cuts, value) - 1
    return Evidence(cuts[cell], cuts[cell + 1], tenant)


def sample(family: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if family == "lognormal":
        return 2.0 * np.exp(0.7 * rng.standard_normal(n))
    return rng.exponential(2.0, n) if family == "exponential" else rng.uniform(0.5, 7.0, n)


TRUTH = {"lognormal": (2.0, 0.7), "exponential": (2.0,), "uniform": (0.5, 7.0)}


# --- what a choice reveals ------------------------------------------------------------------------------------------


def best_tier(theta: np.ndarray, quality: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Code of what each type takes: nothing first among ties."""
    utility = np.column_stack((np.zeros(theta.size), theta[:, None] * quality - price))
    return utility.argmax(axis=1) + DEFER


def test_cut_offs_of_a_menu() -> None:
    evidence = choices_to_evidence(np.array([DEFER, 0, 1, 2]), QUALITY, PRICE, NAMES)
    np.testing.assert_allclose(evidence.low, [0.0, 0.5, 1.0, 2.5])
    np.testing.assert_allclose(evidence.high, [0.5, 1.0, 2.5, np.inf])


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), tiers=st.integers(1, 6))
def test_a_type_lies_where_its_choice_says(seed: int, tiers: int) -> None:
    rng = np.random.default_rng(seed)
    quality, price = rng.uniform(0.05, 1.0, tiers), rng.uniform(0.0, 2.0, tiers)
    theta = np.append(rng.exponential(2.0, 40), 1e4)
    chosen = best_tier(theta, quality, price)
    evidence = choices_to_evidence(chosen, quality, price, [f"t{k}" for k in range(tiers)])
    assert ((evidence.low <= theta) & (theta <= evidence.high)).all()
    # And not only there: whoever is strictly inside takes the same.
    inside = np.where(np.isinf(evidence.high), evidence.low + 1.0, (evidence.low + evidence.high) / 2)
    np.testing.assert_array_equal(best_tier(inside, quality, price), chosen)


@pytest.mark.parametrize(
    ("quality", "price", "chosen", "says"),
    [
        ([0.4, 0.5, 0.9], [0.2, 0.9, 1.0], 1, "row 2.*'plus' was taken.*best for no type"),
        ([0.4, 0.4, 0.9], [0.2, 0.3, 1.0], 1, "'plus' was taken"),
        ([0.4, 0.6, 0.8], [0.2, 0.4, 0.6], 1, "'plus' was taken"),  # three lines through one point
        ([0.4, 0.7, 0.9], [0.0, 0.4, 1.0], DEFER, "'nothing' was taken"),
        ([0.4, 0.7, 0.9], [0.2, 0.5, 1.0], 3, "no tier 3.*0 to 2"),
    ],
)
def test_a_choice_that_no_type_makes_is_named(
    quality: list[float], price: list[float], chosen: int, says: str
) -> None:
    with pytest.raises(RecordError, match=says):
        choices_to_evidence(np.array([2, chosen]), np.array(quality), np.array(price), NAMES)


def test_a_dominated_tier_that_nobody_takes_does_no_harm() -> None:
    evidence = choices_to_evidence(
        np.array([0, 2]), np.array([0.4, 0.5, 0.9]), np.array([0.2, 0.9, 1.0]), NAMES
    )
    np.testing.assert_allclose(evidence.high, [1.6, np.inf])


@pytest.mark.parametrize("price", [[0.2, -0.5, 1.0], [0.2, np.nan, 1.0], [0.2, 0.5]])
def test_tiers_that_are_no_menu(price: list[float]) -> None:
    with pytest.raises(QuantityError, match="menu"):
        choices_to_evidence(np.array([0]), QUALITY, np.array(price), NAMES)


# --- maximum likelihood ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lognormal", "exponential", "uniform"])
@pytest.mark.parametrize("exact", [True, False])
def test_known_parameters_are_recovered(family: str, exact: bool) -> None:
    value = sample(family, 4000, seed=1)
    evidence = Evidence.exact(value) if exact else censored(value)
    fitted = fit_law(evidence, family, draws=40)
    np.testing.assert_allclose(fitted.estimate, TRUTH[family], atol=4 * fitted.standard_error.max())
    assert (fitted.standard_error < 0.06 * np.array(TRUTH[family]).max()).all()
    assert fitted.goodness is not None
    assert fitted.goodness.p_value > 0.01


@pytest.mark.parametrize(
    ("family", "fit"),
    [
        ("lognormal", lambda x: stats.lognorm.fit(x, floc=0)[::-2]),
        ("exponential", lambda x: stats.expon.fit(x, floc=0)[1:]),
        ("uniform", lambda x: np.cumsum(stats.uniform.fit(x))),
    ],
)
def test_exact_data_fit_as_scipy_fits_them(family: str, fit: object) -> None:
    value = sample(family, 300, seed=2)
    fitted = fit_law(Evidence.exact(value), family, draws=2)
    np.testing.assert_allclose(fitted.estimate, fit(value), rtol=1e-6)


@pytest.mark.parametrize(("family", "law"), [("lognormal", stats.lognorm), ("exponential", stats.expon)])
def test_exact_and_censored_types_fit_as_scipy_fits_them(family: str, law: object) -> None:
    value = sample(family, 120, seed=3)
    low, high = censored(value).low, censored(value).high
    low[:50] = high[:50] = value[:50]
    fitted = fit_law(Evidence(low, high), family, draws=2)
    data = stats.CensoredData(
        uncensored=value[:50],
        left=high[50:][low[50:] == 0],
        right=low[50:][np.isinf(high[50:])],
        interval=np.column_stack((low, high))[50:][(low[50:] > 0) & np.isfinite(high[50:])],
    )
    theirs = law.fit(data, floc=0)
    np.testing.assert_allclose(
        fitted.estimate, theirs[::-2] if family == "lognormal" else theirs[1:], rtol=1e-3
    )
    there = law(*theirs)
    exact = there.logpdf(value[:50]).sum()
    by_hand = exact + np.log(there.cdf(high[50:]) - there.cdf(low[50:])).sum()
    assert fitted.log_likelihood == pytest.approx(by_hand, abs=1e-4)
    assert fitted.goodness is None
    assert "not tested" in fitted.note


@pytest.mark.parametrize("family", ["lognormal", "exponential"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_narrow_cells_are_as_good_as_exact_types(family: str, scale: float) -> None:
    value = scale * sample(family, 200, seed=4)
    narrow = fit_law(Evidence(value * (1 - 1e-6), value * (1 + 1e-6)), family, draws=2)
    exact = fit_law(Evidence.exact(value), family, draws=2)
    np.testing.assert_allclose(narrow.estimate, exact.estimate, rtol=1e-5)


def test_a_cell_forty_standard_deviations_out_still_has_a_likelihood() -> None:
    value = np.append(sample("lognormal", 2000, seed=4), 1e200) ** 0.02
    narrow = fit_law(Evidence(value * (1 - 1e-6), value * (1 + 1e-6)), "lognormal", draws=2)
    assert np.log(1e4 / narrow.law.median) / narrow.law.sigma > 40
    exact = fit_law(Evidence.exact(value), "lognormal", draws=2)
    np.testing.assert_allclose(narrow.estimate, exact.estimate, rtol=1e-4)
    in_cells = exact.log_likelihood + np.log(2e-6 * value).sum()
    assert narrow.log_likelihood == pytest.approx(in_cells, rel=1e-5)


def test_ends_of_a_uniform_law_from_three_cells_in_closed_form() -> None:
    """Shares 0.25, 0.5, 0.25 of cells cut at 2 and 4 have density 1/4: from 1 to 5."""
    low, high = np.repeat([0.0, 2.0, 4.0], (25, 50, 25)), np.repeat([2.0, 4.0, np.inf], (25, 50, 25))
    fitted = fit_law(Evidence(low, high), "uniform", draws=2)
    np.testing.assert_allclose(fitted.estimate, (1.0, 5.0), rtol=1e-6)
    assert fitted.log_likelihood == pytest.approx(50 * np.log(0.25) + 50 * np.log(0.5))


def test_a_uniform_law_does_not_begin_below_zero() -> None:
    """Half in a cell as wide as another that holds a quarter: from 0, and 1/4 above 2 makes b = 2/(1 − 1/4)."""
    low, high = np.repeat([0.0, 1.0, 2.0], (50, 25, 25)), np.repeat([1.0, 2.0, np.inf], (50, 25, 25))
    fitted = fit_law(Evidence(low, high), "uniform", draws=2)
    assert fitted.estimate[0] == 0.0
    assert fitted.estimate[1] == pytest.approx(8 / 3, rel=1e-6)


def test_empty_cells_beyond_a_uniform_law_test_nothing() -> None:
    fitted = fit_law(censored(np.linspace(1.0, 5.9, 60)), "uniform", draws=2)
    assert "3 cells apart" in fitted.note
    assert fitted.goodness is None


def test_one_exact_type_makes_a_mean() -> None:
    assert fit_law(Evidence.exact(np.full(30, 2.0)), "exponential", draws=2).estimate == pytest.approx(2.0)


def test_choices_from_two_menus_beat_every_other_uniform_law() -> None:
    value = sample("uniform", 400, seed=5)
    first, second = censored(value[:200]), censored(value[200:], np.array([0.0, 1.1, 2.5, 6.5, np.inf]))
    low, high = np.append(first.low, second.low), np.append(first.high, second.high)
    fitted = fit_law(Evidence(low, high), "uniform", draws=2)
    for bottom in np.linspace(0.0, 0.79, 60):
        for top in np.linspace(6.51, 9.0, 60):
            inside = np.minimum(high, top) - np.maximum(low, bottom)
            assert np.log(inside / (top - bottom)).sum() <= fitted.log_likelihood + 1e-9


def test_an_empirical_law_is_its_observations() -> None:
    value = np.repeat([1.0, 2.0, 4.0], (10, 20, 10))
    fitted = fit_law(Evidence.exact(value), "empirical", draws=400)
    assert isinstance(fitted.law, Atoms)
    np.testing.assert_allclose(fitted.law.value, [1.0, 2.0, 4.0])
    np.testing.assert_allclose(fitted.law.probability, [0.25, 0.5, 0.25])
    assert fitted.estimate == pytest.approx(2.25)
    assert fitted.standard_error == pytest.approx(value.std() / np.sqrt(40), rel=0.12)


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "exact", "n", "draws"),
    [("lognormal", True, 300, 200), ("uniform", True, 60, 200), ("exponential", False, 150, 120)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(family: str, exact: bool, n: int, draws: int) -> None:
    """95% in 100 SIMULATED replications: 87 to 100 allows for 3.5 standard errors and a percentile bootstrap's bias."""
    truth, covered = np.array(TRUTH[family]), []
    for seed in range(100):
        value = sample(family, n, seed)
        laws = list(bootstrap_laws(Evidence.exact(value) if exact else censored(value), family, draws, seed))
        points = np.array([(law.median, law.sigma) if family == "lognormal" else ends(law) for law in laws])
        low, high = np.quantile(points, (0.025, 0.975), axis=0)
        covered.append((low <= truth) & (truth <= high))
    assert (np.mean(covered, axis=0) >= 0.87).all()


def ends(law: Uniform | Exponential) -> tuple[float, ...]:
    return (law.low, law.high) if isinstance(law, Uniform) else (law.mean,)


def test_errors_are_those_of_the_bootstrap() -> None:
    evidence = censored(sample("lognormal", 100, seed=15))
    fitted = fit_law(evidence, "lognormal", draws=50, seed=2)
    laws = bootstrap_laws(evidence, "lognormal", 50, 2)
    sigma = np.sort([law.sigma for law in laws])
    assert fitted.standard_error[1] == pytest.approx(np.std(sigma, ddof=1))
    assert sigma[1] < fitted.interval[1, 0] < sigma[2]  # 1.2 of 49 steps up
    assert sigma[-3] < fitted.interval[1, 1] < sigma[-2]


def test_tenants_who_are_alike_within_say_less_than_their_requests() -> None:
    """40 tenants of one type each, 10 requests: resampling tenants covers the truth, resampling requests does not."""
    clustered, alone = [], []
    for seed in range(60):
        value, tenant = np.repeat(sample("exponential", 40, seed), 10), np.repeat(np.arange(40), 10)
        for codes, found in ((tenant, clustered), (None, alone)):
            means = [
                law.mean for law in bootstrap_laws(censored(value, tenant=codes), "exponential", 60, seed)
            ]
            low, high = np.quantile(means, (0.025, 0.975))
            found.append((high - low, low <= 2.0 <= high))
    width, covers = np.mean(clustered, axis=0)
    narrow, seldom = np.mean(alone, axis=0)
    assert width / narrow == pytest.approx(np.sqrt(10), rel=0.15)
    assert covers >= 0.83
    assert seldom <= 0.65


def test_requests_of_no_tenant_are_each_their_own() -> None:
    value = sample("lognormal", 100, seed=6)
    none, each = (
        list(bootstrap_laws(Evidence.exact(value, tenant), "lognormal", 50))
        for tenant in (np.full(100, -1), np.arange(100))
    )
    assert none == each


def test_the_same_seed_gives_the_same_laws() -> None:
    evidence = censored(sample("lognormal", 100, seed=7))
    first, again, other = (list(bootstrap_laws(evidence, "lognormal", 5, seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_rare_cell_is_drawn_again_and_said() -> None:
    low, high = np.repeat([0.0, 1.0, 2.0], (30, 30, 1)), np.repeat([1.0, 2.0, np.inf], (30, 30, 1))
    fitted = fit_law(Evidence(low, high), "lognormal", draws=60)
    assert "drawn again: a cell holds few" in fitted.note
    assert np.isfinite(fitted.interval).all()


# --- goodness of fit ------------------------------------------------------------------------------------------------


def test_turnbull_of_one_menu_is_the_observed_shares() -> None:
    value = sample("lognormal", 500, seed=8)
    found = turnbull(censored(value))
    np.testing.assert_allclose(found.mass, np.histogram(value, CUTS)[0] / 500, rtol=1e-12)


def test_turnbull_of_right_censored_types_is_kaplan_and_meier() -> None:
    rng = np.random.default_rng(9)
    value, limit = sample("exponential", 80, seed=9), rng.exponential(3.0, 80)
    seen = value <= limit
    low = np.where(seen, value, limit)
    found = turnbull(Evidence(low, np.where(seen, value, np.inf)))
    theirs = stats.ecdf(stats.CensoredData(uncensored=low[seen], right=low[~seen])).cdf
    at = found.high[np.isfinite(found.high)]
    np.testing.assert_allclose(np.cumsum(found.mass)[: at.size], theirs.evaluate(at), atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_turnbull_beats_every_law_a_general_optimiser_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 5, 12).astype(float)
    high = low + rng.integers(0, 4, 12)
    found = turnbull(Evidence(low, high))
    # Between integers lie 8 gaps, and the integers themselves: masses on all of these can express any law.
    point, left = np.arange(9.0), np.arange(8.0)
    inside = np.hstack(
        [
            np.where(
                low[:, None] == high[:, None],
                point == low[:, None],
                (low[:, None] < point) & (point <= high[:, None]),
            ),
            (low[:, None] <= left) & (left + 1 <= high[:, None]),
        ]
    ).astype(float)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        mass = np.exp(x - x.max())
        mass /= mass.sum()
        pull = (inside / (inside @ mass)[:, None]).sum(axis=0)
        return -float(np.log(inside @ mass).sum()), mass * (low.size - pull)

    theirs = -minimize(loss, np.zeros(17), jac=True, method="BFGS").fun
    assert found.log_likelihood >= theirs - 1e-5
    assert found.log_likelihood <= theirs + 0.02  # theirs can only near a mass of 0
    assert found.gap <= 1e-5
    assert found.mass.sum() == pytest.approx(1.0)


def test_p_values_are_even_where_the_family_is_right_and_small_where_it_is_not() -> None:
    chosen, stated, wrong = [], [], []
    for seed in range(40):
        for found, evidence in (
            (chosen, censored(sample("exponential", 300, seed))),
            (stated, Evidence.exact(sample("exponential", 60, seed))),
            (wrong, censored(sample("lognormal", 300, seed))),
        ):
            found.append(fit_law(evidence, "exponential", draws=60, seed=seed).goodness.p_value)
    assert stats.kstest(chosen, "uniform").pvalue > 0.005
    assert stats.kstest(stated, "uniform").pvalue > 0.005
    assert np.median(wrong) < 1e-6


def test_large_samples_are_tested_by_smaller_ones() -> None:
    """KS is scaled by √n: what n = 20,000 observations show stays seen, and what is right stays likely."""
    right = [
        fit_law(Evidence.exact(sample("exponential", 20_000, seed)), "exponential", draws=40).goodness
        for seed in range(8)
    ]
    assert np.mean([found.p_value for found in right]) == pytest.approx(0.5, abs=0.3)
    bent = sample("exponential", 20_000, 1) ** 1.04  # beyond reach of 2,000
    assert fit_law(Evidence.exact(bent), "exponential", draws=40).goodness.p_value < 0.03
    few = fit_law(Evidence.exact(bent[:2000]), "exponential", draws=40).goodness
    assert few.p_value > 0.03


def test_g2_is_twice_the_missing_likelihood_by_hand() -> None:
    value = sample("exponential", 400, seed=10)
    fitted = fit_law(censored(value), "exponential", draws=2)
    count = np.histogram(value, CUTS)[0]
    expected = 400 * -np.diff(np.exp(-CUTS / fitted.law.mean))
    assert fitted.goodness.statistic == "G²"
    assert fitted.goodness.degrees == 3
    assert fitted.goodness.value == pytest.approx(2 * float(count @ np.log(count / expected)), abs=1e-8)


# --- what cannot be known -------------------------------------------------------------------------------------------


def test_what_choices_do_not_say_is_said() -> None:
    fitted = fit_law(censored(sample("lognormal", 100, seed=11), CUTS[[0, 1, 3, 5]]), "lognormal", draws=5)
    assert fitted.goodness is None
    for part in (
        "3 cells apart",
        "nothing about the shape",
        "no upper bound",
        "nothing is left to test whether types are lognormal",
    ):
        assert part in fitted.note
    value = sample("lognormal", 100, seed=11)
    first, second = (
        censored(value[:50]),
        censored(value[50:], CUTS[[0, 2, 4, 5]] + 0.1 * (CUTS[[0, 2, 4, 5]] > 0)),
    )
    both = Evidence(np.append(first.low, second.low), np.append(first.high, second.high))
    assert "Cells overlap" in fit_law(both, "lognormal", draws=5).note
    brackets = fit_law(Evidence(value * 0.9, value * 1.3), "lognormal", draws=5)
    assert brackets.goodness is None
    assert "too few to test the fit" in brackets.note
    few = Evidence.exact(sample("lognormal", 60, seed=12), np.repeat(np.arange(6), 10))
    assert "Only 6 tenants" in fit_law(few, "lognormal", draws=5).note


@pytest.mark.parametrize(
    ("low", "high", "family", "says"),
    [
        ([1.0] * 19, [1.0] * 19, "exponential", "19 observations are too few"),
        (
            [3.0] * 30,
            [np.inf] * 30,
            "lognormal",
            "agree on one cell, 3 to inf.*not identified.*at least 3 cells",
        ),
        ([3.0] * 30, [np.inf] * 30, "exponential", "not identified"),
        ([0.0] * 30, [2.0] * 30, "exponential", "agree on one cell, 0 to 2"),
        ([0.0] * 15 + [2.0] * 15, [2.0] * 15 + [np.inf] * 15, "lognormal", "tell only 2 cells apart"),
        ([0.0] * 15 + [2.0] * 15, [2.0] * 15 + [np.inf] * 15, "uniform", "not identified"),
        ([1.0] * 30, [1.0] * 30, "lognormal", "not identified"),
        ([0.0] * 30, [0.0] * 30, "exponential", "not identified"),
        # The likelihood grows without end as sigma goes to 0, and to ∞.
        ([1.0] * 30, [1.0, np.inf] * 15, "lognormal", "not identified"),
        ([1.0, 1.0, 0.5] * 10, [1.0, np.inf, 1.0] * 10, "lognormal", "not identified"),
        ([0.0, 0.0, 2.0, 3.0] * 8, [2.0, 3.0, np.inf, np.inf] * 8, "lognormal", "not identified"),
        ([1.0, np.nan] * 15, [1.0] * 30, "lognormal", "row 2, column 'low': nan"),
        ([1.0] * 30, [1.0, np.nan] * 15, "lognormal", "row 2, column 'high': nan"),
        ([1.0] * 30, [2.0, 0.5] * 15, "lognormal", "row 2, column 'high': 0.5"),
        ([1.0, -1.0] * 15, [1.0] * 30, "lognormal", "row 2, column 'low': -1"),
        ([1.0] * 30, [1.0, 2.0] * 15, "empirical", "row 2: .*between two values"),
        ([1.0, 0.0] * 15, [1.0, 0.0] * 15, "lognormal", "row 2.*no type at 0"),
    ],
)
def test_evidence_that_cannot_speak(low: list[float], high: list[float], family: str, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        fit_law(Evidence(np.array(low), np.array(high)), family, draws=5)


def test_settings_that_make_no_sense() -> None:
    exact = Evidence.exact(sample("lognormal", 30, seed=13))
    mixed = Evidence(exact.low, np.where(np.arange(30) < 9, np.inf, exact.low))
    with pytest.raises(SettingsError, match="did you mean 'lognormal'"):
        fit_law(exact, "log-normal")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="some types are exact and some are not"):
        fit_law(mixed, "uniform")
    with pytest.raises(SettingsError, match="draws"):
        fit_law(exact, "lognormal", draws=1)
    with pytest.raises(QuantityError, match="tenant"):
        Evidence.exact(exact.low, np.zeros(3, dtype=np.int64))
    with pytest.raises(RecordError, match="one tenant"):
        fit_law(Evidence.exact(exact.low, np.zeros(30, dtype=np.int64)), "lognormal")


def test_fitted_laws_have_their_families() -> None:
    value = sample("uniform", 40, seed=14)
    for family, kind in (("lognormal", LogNormal), ("exponential", Exponential), ("uniform", Uniform)):
        laws = bootstrap_laws(Evidence.exact(value), family, 3)
        assert [type(law) for law in laws] == [kind] * 3
