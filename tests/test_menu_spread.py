"""How a menu moves with the error of the law: regret is never negative, and errors shrink as data grow."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walras.demand.menu import Menu, Tier, design
from walras.demand.menu_spread import menu_spread, outcome
from walras.demand.offerings import Offerings, Quadratic
from walras.errors import InfeasibleError, QuantityError, SettingsError
from walras.estimate.type_laws import Atoms, Exponential, LogNormal, TypeLaw, Uniform
from walras.estimate.willingness import Evidence, bootstrap_laws, fit_law

MODELS = Offerings(
    ("nano", "medium", "frontier"),
    np.array([0.4, 0.7, 0.9]),
    np.array([0.01, 0.1, 0.5]),
    np.array([1.0, 2.0, 3.0]),
    0.02,
)


@st.composite
def laws(draw: st.DrawFn, most: int = 8) -> Atoms:
    """Types on a grid that the laws of one example share, so that cut-offs of one fall on atoms of another."""
    value = draw(st.lists(st.integers(0, 24), min_size=1, max_size=most, unique=True))
    mass = np.array(draw(st.lists(st.integers(1, 9), min_size=len(value), max_size=len(value))), dtype=float)
    return Atoms(np.sort(np.array(value, dtype=float)) / 8, mass / mass.sum())


technologies = st.sampled_from((Quadratic(), MODELS))


def by_choice(tiers: tuple[Tier, ...], law: Atoms, latency_price: float) -> tuple[float, float, float]:
    """(revenue, profit, welfare) when every type looks at every tier, the slow way; of equals it takes the best."""
    revenue = profit = welfare = 0.0
    for theta, mass in zip(law.value, law.probability, strict=True):
        best, taken = 0.0, None
        for tier in tiers:
            utility = theta * tier.quality - latency_price * tier.seconds - tier.price
            if utility >= best - 1e-10:
                best, taken = utility, tier
        if taken is not None:
            revenue += mass * taken.price
            profit += mass * (taken.price - taken.cost)
            welfare += mass * (best + taken.price - taken.cost)
    return revenue, profit, welfare


@settings(deadline=None, max_examples=60)
@given(law=laws(), other=laws(), technology=technologies, tiers=st.integers(1, 4))
def test_posted_tiers_bring_what_users_choosing_among_them_bring(
    law: Atoms, other: Atoms, technology: Quadratic | Offerings, tiers: int
) -> None:
    menu = design(law, technology, tiers=tiers)
    found = outcome(menu.tiers, other)
    slow = by_choice(menu.tiers, other, technology.latency_price)
    np.testing.assert_allclose((found.revenue, found.profit, found.welfare), slow, atol=1e-8)


@pytest.mark.parametrize("law", [Uniform(0.5, 3.0), Exponential(1.0), LogNormal(1.0, 0.6)])
@pytest.mark.parametrize("technology", [Quadratic(), MODELS])
def test_under_its_own_law_a_menu_brings_what_its_certificate_says(
    law: TypeLaw, technology: Quadratic | Offerings
) -> None:
    menu = design(law, technology)
    found = outcome(menu.tiers, law)
    said = menu.certificate
    np.testing.assert_allclose(
        (found.revenue, found.profit, found.welfare), (said.revenue, said.profit, said.welfare), rtol=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(law=laws(), others=st.lists(laws(), min_size=2, max_size=4), technology=technologies)
def test_no_law_is_served_better_by_the_menu_of_another(
    law: Atoms, others: list[Atoms], technology: Quadratic | Offerings
) -> None:
    design_once = partial(design, technology=technology, tiers=3)
    menu = design_once(law)
    spread = menu_spread(design_once, menu, others)
    for other in others:
        assert outcome(design_once(other).tiers, other).profit >= outcome(menu.tiers, other).profit - 1e-12
    assert spread.regret <= spread.best.profit[1] - spread.posted.profit[0] + 1e-12
    assert menu_spread(design_once, menu, [law, law]).regret == 0.0


def test_welfare_bought_with_costs_not_recovered_is_regretted() -> None:
    law = Exponential(1.0)
    recover = 0.8 * design(law, MODELS).certificate.profit
    design_once = partial(design, technology=MODELS, objective="welfare", recover=recover)
    own, generous = design_once(law), design(law, MODELS, objective="welfare")
    spread = menu_spread(design_once, generous, [law, law])
    given_away = generous.certificate.welfare - own.certificate.welfare
    short = own.certificate.profit - generous.certificate.profit
    mu = own.recovery_price / (1 - own.recovery_price)
    assert given_away > 0
    assert spread.regret == pytest.approx(mu * short - given_away)
    assert spread.regret > 0


def test_regret_in_closed_form() -> None:
    """One model at no cost, types uniform: posting 1/2 where types go up to 2 brings 3/8, and 1/2 was to be had."""
    free = Offerings(("model",), np.array([1.0]), np.array([0.0]))
    design_once = partial(design, technology=free, tiers=1)
    menu = design_once(Uniform(0.0, 1.0))
    spread = menu_spread(design_once, menu, [Uniform(0.0, 1.0), Uniform(0.0, 2.0)], level=0.5)
    assert menu.tiers[0].price == pytest.approx(0.5)
    assert spread.regret == pytest.approx((0.5 - 0.375) / 2, abs=1e-9)
    assert spread.regret_share == pytest.approx(0.0625 / 0.375, abs=1e-8)
    assert spread.regret_high == pytest.approx(0.0625, abs=1e-9)
    assert spread.regret_share_high == pytest.approx(0.0625 / 0.375, abs=1e-8)
    np.testing.assert_allclose(spread.tiers[0].price, (0.625, 0.875), atol=1e-6)
    np.testing.assert_allclose(spread.best.profit, (0.3125, 0.4375), atol=1e-9)
    np.testing.assert_allclose(spread.posted.profit, (0.25 + 0.125 / 4, 0.25 + 0.375 / 4), atol=1e-9)


def test_a_hundred_times_the_data_narrow_prices_tenfold_and_regret_a_hundredfold() -> None:
    rng, width, regret = np.random.default_rng(1), [], []
    design_once = partial(design, technology=MODELS, tiers=3)
    for n in (100, 10_000):
        evidence = Evidence.exact(LogNormal(2.0, 0.6).median * np.exp(0.6 * rng.standard_normal(n)))
        menu = design_once(fit_law(evidence, "lognormal", draws=2).law)
        spread = menu_spread(design_once, menu, bootstrap_laws(evidence, "lognormal", 40))
        width.append([tier.price[1] - tier.price[0] for tier in spread.tiers])
        regret.append(spread.regret)
        for tier, posted in zip(spread.tiers, menu.tiers, strict=True):
            assert tier.price[0] < posted.price < tier.price[1]
    np.testing.assert_allclose(np.divide(*width), 10.0, rtol=0.45)
    assert 30 < regret[0] / regret[1] < 330


def test_profit_that_jumps_makes_no_regret_negative() -> None:
    """Of few types a menu that misses the recovery may be worth more at μ than the one that makes it."""
    rng = np.random.default_rng(106)
    drawn = rng.choice(np.round(rng.uniform(0.1, 2, 6), 2), 60)
    models = Offerings(("a", "b", "c"), np.array([0.4, 0.7, 0.9]), np.array([0.01, 0.1, 0.3]))
    law, laws = Atoms.empirical(drawn), list(bootstrap_laws(Evidence.exact(drawn), "empirical", 40, 106))
    recover = design(law, models, tiers=3).value * rng.uniform(0.1, 0.9)
    design_once = partial(design, technology=models, tiers=3, objective="welfare", recover=recover)
    menu, more = design_once(law), []
    for other in laws:
        with contextlib.suppress(InfeasibleError):
            best = design_once(other)
            more.append(
                outcome(menu.tiers, other).at(best.recovery_price)
                - outcome(best.tiers, other).at(best.recovery_price)
            )
    assert np.mean(more) > 1e-3
    assert menu_spread(design_once, menu, laws).regret >= 0


# --- menus that differ in more than numbers -------------------------------------------------------------------------

LOW, HIGH = Atoms(np.array([1.0]), np.ones(1)), Atoms(np.array([1.0, 3.0]), np.array([0.7, 0.3]))


def test_resamples_with_other_numbers_of_tiers_are_counted_and_left_out() -> None:
    design_once = partial(design, technology=Quadratic(), tiers=3)
    three = Atoms(np.array([2.0, 3.0, 4.0]), np.array([0.5, 0.3, 0.2]))
    menu = design_once(HIGH)
    spread = menu_spread(design_once, menu, [HIGH, HIGH, LOW, three])
    assert [len(design_once(law).tiers) for law in (HIGH, LOW, three)] == [2, 1, 3]
    assert (spread.resamples, spread.fewer, spread.more) == (4, 1, 1)
    assert "4 resamples 1 have fewer tiers and 1 have more" in spread.note
    for tier, own in zip(spread.tiers, menu.tiers, strict=True):
        assert tier.price == (own.price, own.price)
    assert np.isnan(menu_spread(design_once, menu, [LOW, LOW]).tiers[0].price).all()


def test_laws_under_which_nothing_recovers_costs_are_counted() -> None:
    most = design(HIGH, Quadratic()).certificate.profit
    design_once = partial(design, technology=Quadratic(), objective="welfare", recover=0.9 * most)
    menu = design_once(HIGH)
    spread = menu_spread(design_once, menu, [HIGH, HIGH, LOW])
    assert (spread.resamples, spread.infeasible) == (2, 1)
    assert "no menu recovers its costs" in spread.note
    with pytest.raises(InfeasibleError, match="cost recovery"):
        menu_spread(design_once, menu, [LOW, LOW])


def test_a_menu_without_tiers_brings_nothing() -> None:
    dear = Offerings(("model",), np.array([0.5]), np.array([9.0]))
    design_once = partial(design, technology=dear)
    spread = menu_spread(design_once, design_once(LOW), [LOW, HIGH])
    assert (spread.tiers, spread.regret, spread.posted.revenue) == ((), 0.0, (0.0, 0.0))
    assert np.isnan(spread.regret_share)


def test_what_cannot_be_compared_is_refused() -> None:
    design_once = partial(design, technology=Quadratic())
    menu = design_once(HIGH)
    with pytest.raises(SettingsError, match="laws"):
        menu_spread(design_once, menu, [HIGH])
    with pytest.raises(SettingsError, match="level"):
        menu_spread(design_once, menu, [HIGH, LOW], level=95)
    unknown: Menu = replace(menu, tiers=(replace(menu.tiers[0], cost=float("nan")),))
    with pytest.raises(QuantityError, match=r"'tier 1'.*cost"):
        menu_spread(design_once, unknown, [HIGH, LOW])
