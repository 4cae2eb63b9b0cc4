"""The best menu: closed forms, quantisers, ironing, cost recovery, and laws that hold for any types and offerings. [Z-5] [Z-IR]"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from walras.demand.menu import Menu, certify, design
from walras.demand.offerings import Offerings, Quadratic
from walras.demand.quantise import virtual_value
from walras.errors import InfeasibleError, QuantityError, SettingsError
from walras.estimate.type_laws import Atoms, Exponential, LogNormal, TypeLaw, Uniform
from walras.risk import FloatArray

LAWS = (Uniform(0, 1), Uniform(1, 3), Exponential(0.5), LogNormal(0.3, 0.8))


def atoms(value: list[float], probability: list[float]) -> Atoms:
    return Atoms(np.array(value), np.array(probability))


def column(menu: Menu, name: str) -> FloatArray:
    return np.array([getattr(tier, name) for tier in menu.tiers])


# --- closed forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_share", [0.6, 0.8, 0.95])
def test_two_types(low_share: float) -> None:
    """Maskin and Riley (1984), Mussa and Rosen (1978): no distortion at the top, rent to the high type alone."""
    menu = design(atoms([1, 2], [low_share, 1 - low_share]), Quadratic())
    q_low = 1 - (1 - low_share) / low_share
    assert column(menu, "quality") == pytest.approx([q_low, 2])
    assert column(menu, "price") == pytest.approx([q_low, 4 - q_low])
    assert column(menu, "rent") == pytest.approx([0, q_low])
    assert menu.certificate.information_rent == pytest.approx((1 - low_share) * q_low)
    assert menu.loss_to_cap == pytest.approx(0, abs=1e-12)


def test_two_types_low_one_shut_out() -> None:
    """With half of each the low type's virtual value, 1 − 1·(½/½), is 0: it is not served."""
    menu = design(atoms([1, 2], [0.5, 0.5]), Quadratic())
    assert [(t.quality, t.price, t.type_from) for t in menu.tiers] == [(2, 4, 2)]
    assert menu.certificate.information_rent == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 20])
def test_uniform_types_in_n_tiers(n: int) -> None:
    """Bergemann, Shen, Xu and Yeh (2012): n tiers lose a share 1/(2n+1)² of profit, and of welfare."""
    k = np.arange(1, n + 1)
    left = 1 - 1 / (2 * n + 1) ** 2
    profit = design(Uniform(0, 1), Quadratic(), tiers=n)
    assert profit.value == pytest.approx(left / 12, abs=1e-13)
    assert column(profit, "quality") == pytest.approx(2 * k / (2 * n + 1), abs=1e-9)
    assert column(profit, "type_from") == pytest.approx((1 + (2 * k - 1) / (2 * n + 1)) / 2, abs=1e-9)
    assert profit.loss_to_cap == pytest.approx(1 / 12 / (2 * n + 1) ** 2, abs=2e-8)
    welfare = design(Uniform(0, 1), Quadratic(), objective="welfare", tiers=n)
    assert welfare.value == pytest.approx(left / 6, abs=1e-13)
    assert column(welfare, "type_from") == pytest.approx((2 * k - 1) / (2 * n + 1), abs=1e-9)
    assert column(welfare, "price") == pytest.approx(
        column(welfare, "cost"), abs=1e-9
    )  # c(q): nobody is shut out


def test_many_tiers_are_the_closed_form() -> None:
    """Uniform: q = 2θ − 1 from θ = ½ at p(q) = q/2 + q²/4. Exponential: q = θ − m from θ = m at p(q) = m·q + q²/2."""
    uniform = design(Uniform(0, 1), Quadratic(), tiers=100)
    q = column(uniform, "quality")
    assert uniform.tiers[0].type_from == pytest.approx(0.5, abs=0.01)
    assert column(uniform, "price") == pytest.approx(q / 2 + q**2 / 4, abs=1e-4)
    m = 0.5
    exponential = design(Exponential(m), Quadratic(), tiers=100)
    q = column(exponential, "quality")[:80]  # the last tiers cover the long tail
    assert exponential.tiers[0].type_from == pytest.approx(m, abs=0.02)
    assert column(exponential, "price")[:80] == pytest.approx(m * q + q**2 / 2, abs=2e-3)
    c = exponential.certificate
    whole = m**2 / np.e  # ∫ ½(θ − m)² dF, and as much again in rent
    assert exponential.bound == pytest.approx(whole, rel=1e-5)
    assert (c.profit, c.information_rent) == pytest.approx((whole, whole), rel=1e-3)


def test_the_loss_falls_with_the_square_of_the_tiers() -> None:
    """Bergemann et al. (2012): Θ(1/n²) for any law with two moments."""
    for law in LAWS:
        loss = [design(law, Quadratic(), tiers=n).loss_to_cap for n in (10, 20, 40)]
        assert [a / b for a, b in pairwise(loss)] == pytest.approx([4, 4], rel=0.15)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_tiers_are_a_lloyd_max_quantiser(law: TypeLaw, kappa: float) -> None:
    """Each quality is the mean virtual value of its types; each cut-off's is midway between two qualities."""
    menu = design(law, Quadratic(), objective="revenue" if kappa else "welfare", tiers=4)
    t, q = column(menu, "type_from"), np.append(0, column(menu, "quality"))
    inner = t > law.support[0]
    midway = (q[1:] + q[:-1]) / 2
    assert virtual_value(law, kappa, t)[inner] == pytest.approx(midway[inner], abs=1e-8)
    for low, high, quality in zip(t, [*t[1:], np.inf], q[1:], strict=True):
        mass = quad(lambda x: float(law.density(np.array(x))), low, min(high, law.support[1]))[0]
        part = quad(
            lambda x: float(virtual_value(law, kappa, np.array(x)) * law.density(np.array(x))),
            low,
            min(high, law.support[1], 60.0),
        )[0]
        assert part / mass == pytest.approx(quality, abs=1e-6)


# --- ironing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bimodal:
    """Uniform on [0, 3] with probability ¾, on (3, 8] with ¼: the irregular law of Hartline, Mechanism Design and
    Approximation, chapter 3. φ falls at 3, from 2 to −2."""

    spec: str = "bimodal"
    atoms: None = None
    support: tuple[float, float] = (0.0, 8.0)

    def density(self, t: FloatArray) -> FloatArray:
        return np.where(t < 3, 0.25, 0.05)

    def moment_above(self, t: FloatArray, power: int) -> FloatArray:
        k, t = power + 1, np.clip(t, 0, 8)
        return (0.25 * (3**k - np.minimum(t, 3) ** k) + 0.05 * (8**k - np.maximum(t, 3) ** k)) / k

    def grid(self, n: int = 2000) -> FloatArray:
        return np.linspace(0, 8, n, endpoint=False)


def test_an_irregular_law_is_ironed() -> None:
    """The chord of the revenue curve touches S(4 − 4S) and S(8 − 20S): slope 3 − √5, from 2.382 to 4.382."""
    menu = design(Bimodal(), Quadratic(), tiers=40)
    step = 8 / 20_000
    assert menu.ironed == (
        pytest.approx((1.5 * 3 - (3 + np.sqrt(5)) / 2 + 0.5, 5.5 - np.sqrt(5) / 2), abs=step),
    )
    low, high = menu.ironed[0]
    cut = column(menu, "type_from")
    assert not ((cut > low + 0.02) & (cut < high - 0.02)).any(), "nobody inside the range is told apart"
    bunched = next(t for t in menu.tiers if t.type_from <= 3 < t.type_to)
    assert bunched.quality == pytest.approx(3 - np.sqrt(5), abs=0.01)
    assert menu.value == pytest.approx(menu.bound, rel=1e-3)


def test_three_types_of_which_two_are_bunched() -> None:
    """By hand: φ = 4 − .6/.4, 5 − .5/.1, 6 = 2.5, 0, 6; the first two pool to 2."""
    menu = design(atoms([4, 5, 6], [0.4, 0.1, 0.5]), Quadratic())
    assert [(t.type_from, t.type_to, t.quality, t.price) for t in menu.tiers] == [
        (4, 5, pytest.approx(2), pytest.approx(8)),
        (6, 6, pytest.approx(6), pytest.approx(32)),
    ]
    assert menu.ironed == ((4.0, 6.0),)


@pytest.mark.parametrize(("sigma", "irons"), [(1.3, False), (2.0, True)])
def test_a_spread_out_lognormal_is_irregular(sigma: float, irons: bool) -> None:
    assert bool(design(LogNormal(1, sigma), Quadratic()).ironed) is irons


# --- cost recovery ------------------------------------------------------------------------------------------------------


def test_cost_recovery_has_the_price_of_ramsey() -> None:
    """Uniform types, no cap: q = (1 + κ)θ − κ, with κ such that the profit is what must be recovered."""

    def profit(kappa: float) -> float:
        return quad(
            lambda x: (2 * x - 1) * ((1 + kappa) * x - kappa) - ((1 + kappa) * x - kappa) ** 2 / 2,
            kappa / (1 + kappa),
            1,
        )[0]

    kappa = brentq(lambda k: profit(k) - 0.05, 0, 1)
    menu = design(Uniform(0, 1), Quadratic(), objective="welfare", tiers=100, recover=0.05)
    assert menu.recovery_price == pytest.approx(kappa, abs=1e-3)
    assert menu.certificate.profit == pytest.approx(0.05, abs=1e-10)
    assert 0 <= menu.loss_to_cap < 2e-5


def test_more_than_anybody_pays_cannot_be_recovered() -> None:
    with pytest.raises(InfeasibleError, match=r"cost recovery: .* the most is 0.0823045"):
        design(Uniform(0, 1), Quadratic(), objective="welfare", recover=0.09)


def test_recovery_binds_on_few_types_too() -> None:
    law = atoms([1, 2, 4], [0.5, 0.3, 0.2])
    free = design(law, Quadratic(), objective="welfare")
    best = design(law, Quadratic())
    wanted = (free.certificate.profit + best.certificate.profit) / 2
    menu = design(law, Quadratic(), objective="welfare", recover=wanted)
    assert wanted - 1e-9 <= menu.certificate.profit
    assert best.certificate.welfare <= menu.certificate.welfare <= free.certificate.welfare
    assert menu.value <= menu.bound + 1e-12


def test_all_that_can_be_recovered_is() -> None:
    """At the most, the multiplier has no bound, and the bound of welfare stays what a menu without a cap has."""
    best = design(Uniform(0, 1), Quadratic())
    menu = design(Uniform(0, 1), Quadratic(), objective="welfare", recover=best.value)
    assert menu.certificate.profit == pytest.approx(best.value, abs=1e-12)
    assert menu.value <= menu.bound < design(Uniform(0, 1), Quadratic(), objective="welfare").bound


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1))
def test_few_types_recover_what_they_must(seed: int, part: float) -> None:
    """Profit jumps from one menu to the next: one tier of one model is the best of all that recover, more are no worse."""
    rng = np.random.default_rng(seed)
    law = Atoms(np.sort(rng.uniform(0.1, 2, 8)), rng.dirichlet(np.ones(8)))
    models = Offerings(("a", "b", "c"), rng.uniform(0.1, 1, 3), rng.uniform(0, 0.05, 3))
    one = Offerings(("a",), models.quality[:1], models.cost[:1])
    recover = part * design(law, one, tiers=1).value
    served = law.moment_above(law.value, 0)
    margin = law.value * one.quality[0] - one.cost[0]
    welfare = one.quality[0] * law.moment_above(law.value, 1) - one.cost[0] * served
    best = welfare[margin * served >= recover - 1e-12].max()
    assert design(law, one, objective="welfare", recover=recover).value == pytest.approx(best, abs=1e-12)
    before = -np.inf
    for tiers in (1, 2, 3):
        menu = design(law, models, objective="welfare", tiers=tiers, recover=recover)
        assert menu.certificate.profit >= recover - 1e-9
        assert before - 1e-12 <= menu.value <= menu.bound
        before = menu.value


# --- offerings ------------------------------------------------------------------------------------------------------------


def test_tiers_are_the_models_worth_offering() -> None:
    models = Offerings(
        ("small", "odd", "large", "worse"),
        np.array([0.5, 0.6, 0.9, 0.85]),
        np.array([0.01, 0.2, 0.25, 0.4]),
        np.array([1.0, 2, 3, 4]),
    )
    menu = design(Uniform(0, 2), models, objective="welfare")
    assert [t.name for t in menu.tiers] == ["small", "large"]
    assert column(menu, "type_from") == pytest.approx([0.01 / 0.5, 0.24 / 0.4])
    assert column(menu, "price") == pytest.approx([0.01, 0.25])
    assert column(menu, "seconds") == pytest.approx([1, 3])
    assert menu.loss_to_cap == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("scale", [0.1, 10, 1000])
@pytest.mark.parametrize("law", [Uniform(0, 2), Exponential(1), LogNormal(1, 0.79), LogNormal(1, 2)])
def test_most_welfare_sells_at_cost_however_little_that_is(law: TypeLaw, scale: float) -> None:
    """Cut-offs are at c/q and between models at Δc/Δq, even where hardly any types are."""
    models = Offerings(("a", "b", "c"), np.array([0.5, 0.7, 0.9]), np.array([0.1, 0.4, 5]) / scale / 100)
    menu = design(law, models, objective="welfare")
    assert column(menu, "price") == pytest.approx(column(menu, "cost"), rel=1e-9)
    assert menu.recovery_price == 0
    assert menu.loss_to_cap == pytest.approx(0, abs=1e-6 * menu.bound)


def test_delay_that_all_users_mind_is_not_charged_twice() -> None:
    """With λ₀ = 0.1 USD/s a model of 3 s costs its user 0.3 besides the price, and the price is what is left."""
    models = Offerings(("a", "b"), np.array([0.5, 0.9]), np.array([0.01, 0.1]), np.array([3.0, 5]), 0.1)
    menu = design(Uniform(0, 4), models, objective="welfare")
    assert column(menu, "price") == pytest.approx([0.01, 0.1])
    assert column(menu, "type_from") == pytest.approx([0.31 / 0.5, (0.6 - 0.31) / 0.4])
    assert certify(menu.tiers, menu.law, 0.1).worst_ir_violation <= 1e-12


def _brute(law: Atoms, models: Offerings, tiers: int, profit: bool) -> float:
    v, f, best = law.value, law.probability, 0.0
    order = np.argsort(models.quality)
    for n in range(1, tiers + 1):
        for cut in combinations(range(v.size), n):
            for sel in combinations(order, n):
                q, c = np.append(0, models.quality[[*sel]]), np.append(0, models.cost[[*sel]])
                got = [v[i] * f[i:].sum() if profit else (v[i:] * f[i:]).sum() for i in cut]
                mass = [f[i:].sum() for i in cut]
                best = max(best, float(np.diff(q) @ got - np.diff(c) @ mass))
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans())
def test_no_menu_of_as_many_tiers_is_better(seed: int, tiers: int, profit: bool) -> None:
    rng = np.random.default_rng(seed)
    law = Atoms(np.sort(rng.uniform(0.05, 2, 6)), rng.dirichlet(np.ones(6)))
    models = Offerings(("a", "b", "c", "d"), rng.uniform(0.1, 1, 4), rng.uniform(0, 0.6, 4))
    menu = design(law, models, objective="revenue" if profit else "welfare", tiers=tiers)
    assert menu.value == pytest.approx(_brute(law, models, tiers, profit), abs=1e-12)


# --- laws ---------------------------------------------------------------------------------------------------------------


def _utility(menu: Menu, theta: FloatArray) -> FloatArray:
    """The best any type can get from the tiers, or from none, (T,)."""
    lines = theta[:, None] * column(menu, "quality") - column(menu, "price")
    return np.maximum(lines.max(axis=1, initial=0), 0)


@st.composite
def economies(draw: st.DrawFn) -> tuple[TypeLaw, Offerings | Quadratic]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 30))
    laws: list[TypeLaw] = [
        Atoms(
            np.sort(rng.choice(10_000, n, replace=False)) / 1000.0,
            rng.dirichlet(np.ones(n) * 0.5) * 0.99 + 0.01 / n,
        ),
        Uniform(a := float(rng.uniform(0, 2)), a + float(rng.uniform(0.1, 3))),
        Exponential(float(rng.uniform(0.1, 2))),
        LogNormal(float(rng.uniform(0.1, 2)), float(rng.uniform(0.2, 1.5))),
    ]
    i = draw(st.integers(1, 8))
    models = Offerings(tuple("abcdefgh"[:i]), rng.uniform(0.05, 1, i), rng.uniform(0, 1, i))
    return laws[draw(st.integers(0, 3))], draw(st.sampled_from([models, Quadratic()]))


@settings(max_examples=60, deadline=None)
@given(economies(), st.sampled_from(["revenue", "welfare"]), st.integers(1, 6))
def test_laws_of_every_menu(
    economy: tuple[TypeLaw, Offerings | Quadratic], objective: str, tiers: int
) -> None:
    law, technology = economy
    menu = design(law, technology, objective=objective, tiers=tiers)  # type: ignore[arg-type]
    c = menu.certificate
    assert len(menu.tiers) <= tiers
    assert c.worst_ic_violation <= 1e-9
    assert c.worst_ir_violation <= 1e-9
    assert c.welfare == pytest.approx(c.information_rent + c.profit)
    assert c.profit >= -1e-12
    assert menu.value <= menu.bound
    if menu.tiers:
        least = menu.tiers[0]
        assert least.type_from * least.quality == pytest.approx(least.price), (
            "IR binds at the lowest type served"
        )
    top = law.support[1] if np.isfinite(law.support[1]) else 20.0
    theta = law.atoms if law.atoms is not None else np.linspace(law.support[0], top, 500)
    rent = _utility(menu, theta)
    assert (np.diff(rent) >= -1e-12).all(), "rent rises with the type"
    for t, got in zip(theta, rent, strict=True):  # nobody gains by posing as another
        own = next((x for x in reversed(menu.tiers) if x.type_from <= t), None)
        assert got <= (t * own.quality - own.price if own else 0) + 1e-9
    more = design(law, technology, objective=objective, tiers=tiers + 1)  # type: ignore[arg-type]
    assert more.value >= menu.value - 1e-12, "more tiers never do worse"


@settings(max_examples=20, deadline=None)
@given(economies())
def test_each_objective_is_best_at_its_own(economy: tuple[TypeLaw, Offerings | Quadratic]) -> None:
    profit, welfare = (design(*economy, objective=o).certificate for o in ("revenue", "welfare"))  # type: ignore[arg-type]
    assert profit.profit >= welfare.profit - 1e-12
    assert welfare.welfare >= profit.welfare - 1e-12


@pytest.mark.parametrize("sigma", [0.3, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_nothing_beats_what_is_said_to_be_the_most(sigma: float, share: float) -> None:
    """Of one model: every price there is, on a fine grid, under a regular law and an irregular one."""
    law, model = LogNormal(1, sigma), Offerings(("a",), np.array([0.8]), np.array([0.1]))
    t = np.geomspace(1e-3, 1e6, 2_000_001)
    served = law.moment_above(t, 0)
    profit, welfare = (0.8 * t - 0.1) * served, 0.8 * law.moment_above(t, 1) - 0.1 * served
    best = design(law, model)
    assert profit.max() <= best.bound <= profit.max() * (1 + 1e-4)
    recover = share * best.value
    menu = design(law, model, objective="welfare", recover=recover)
    most = welfare[profit >= recover].max()
    assert most * (1 - 1e-12) <= menu.bound <= most * (1 + 1e-4)


def test_a_heavy_tailed_sample_is_cut_where_it_is_best() -> None:
    """All cut-offs, layer by layer, in the plainest form of the dynamic programme."""
    law = Atoms.empirical(np.random.default_rng(0).lognormal(0, 2, 1000))
    s, r = (np.append(law.moment_above(law.value, k), 0) for k in (0, 1))
    part, mass = r[:, None] - r, s[:, None] - s
    later = np.triu(np.ones(part.shape, dtype=bool), 1)
    worth = np.where(later, part**2 / np.where(later, 2 * mass, 1), -np.inf)
    best = np.zeros(s.size)
    for tiers in (1, 2, 3, 4):
        best = np.append((worth[:-1] + best).max(axis=1), 0)
        menu = design(law, Quadratic(), objective="welfare", tiers=tiers)
        assert menu.value == pytest.approx(best.max(), rel=1e-12)


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": 0}, "0 tiers"),
        ({"tiers": 101}, "from 1 to 100"),
        ({"recover": -1.0}, "-1.0 USD to recover"),
        ({"law": Uniform(0, 1e300)}, r"types of uniform:0:1e\+300 are too large"),
        ({"law": LogNormal(1, 30)}, "too large"),
        ({"law": Exponential(1e-200)}, "too small"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        design(**{"law": Uniform(0, 1), "technology": Quadratic(), **options})


@pytest.mark.parametrize(
    ("quality", "cost", "message"),
    [
        ([0.5, 1.5], [0.1, 0.2], "quality of 'b' is above 1"),
        ([0.5, np.nan], [0.1, 0.2], "quality of 'b' is nan"),
        ([0.5, 0.6], [-0.1, 0.2], "cost of 'a' is -0.1"),
        ([0.0, 0.0], [0.1, 0.2], "none has any quality"),
        ([0.5], [0.1], r"quality has shape \(1,\), expected \(2,\)"),
    ],
)
def test_offerings_that_cannot_be(quality: list[float], cost: list[float], message: str) -> None:
    with pytest.raises(QuantityError, match=message):
        Offerings(("a", "b"), np.array(quality), np.array(cost))
