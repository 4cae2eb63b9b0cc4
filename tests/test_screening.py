"""The menu over a grid of types: the programme against closed forms and other roads, and what a cap on tiers does to it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from walras.demand.few_tiers import CappedMenu, cap
from walras.demand.menu import design
from walras.demand.offerings import Offerings
from walras.demand.screening import Grid, Screening, _repair, certified, screen
from walras.errors import InfeasibleError, QuantityError, RecordError, SettingsError
from walras.estimate.type_laws import Atoms

SEEDS = st.integers(0, 2**32 - 1)
Economy = tuple[Grid, Any, Any, Any]
"""Types, and quality, seconds and cost of the offerings."""


def economy(seed: int, *, most_types: int = 12, usd: float = 1.0) -> Economy:
    """Random types and offerings, in units of `usd`; one in five has no price of delay at all."""
    rng = np.random.default_rng(seed)
    t, o = int(rng.integers(1, most_types)), int(rng.integers(1, 6))
    chance = rng.dirichlet(np.ones(t))
    if t > 2 and rng.random() < 0.3:
        chance[0], chance[1] = 0.0, chance[0] + chance[1]
    delay = rng.uniform(0, 0.3, t) * (rng.random() < 0.8)
    types = Grid(rng.uniform(0, 5, t) * usd, delay * usd, chance)
    return types, rng.uniform(0.1, 1, o), rng.uniform(0, 20, o), rng.uniform(0, 1.5, o) ** 2 * usd


def line(value: Any, chance: Any) -> Grid:
    return Grid(np.asarray(value, dtype=float), np.zeros(len(value)), np.asarray(chance, dtype=float))


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "profit", "rent", "low_quality"),
    [
        (0.25, 2 / 3, 1 / 6, 2 / 3),
        (0.4, 0.6 * (1 / 3) ** 2 / 2 + 0.4 * 2, 0.4 / 3, 1 / 3),
        (0.6, 1.2, 0.0, 0.0),
    ],
)
def test_two_types(high: float, profit: float, rent: float, low_quality: float) -> None:
    """Mussa and Rosen (1978): θ 1 and 2, c = q²/2. The low type gets q = 1 − h/(1 − h), the high one 2 and that as rent."""
    quality = np.arange(1, 16) / 6
    found = screen(line([1, 2], [1 - high, high]), quality, np.zeros(15), quality**2 / 2)
    assert found.value == pytest.approx(profit, abs=1e-9)
    assert found.certificate.information_rent == pytest.approx(rent, abs=1e-9)
    assert found.lottery @ quality == pytest.approx([low_quality, 2], abs=1e-9)
    assert found.payment == pytest.approx([low_quality, 4 - low_quality], abs=1e-9)
    menu = cap(found, 2)
    assert menu.loss_to_cap <= 1e-9  # the optimum is pure
    assert [tier.price for tier in menu.tiers][-1] == pytest.approx(4 - low_quality)


def test_uniform_types_at_the_expected_rate() -> None:
    """θ uniform on [0, 1], c = q²/2: profit 1/12 (Mussa and Rosen 1978).

    T midpoints have φ_t = 2θ_t − 1 + 1/(2T), so profit is above by E[φ⁺]/(2T) = 1/(8T), less O(1/T²) that qualities T apart
    cost: the error halves when both grids double.
    """
    errors = []
    for t in (20, 40, 80):
        quality = np.arange(1, t + 1) / t
        found = screen(
            line((np.arange(t) + 0.5) / t, np.full(t, 1 / t)), quality, np.zeros(t), quality**2 / 2
        )
        errors.append(found.value - 1 / 12)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.025)
    assert 80 * errors[2] == pytest.approx(1 / 8, rel=0.02)


FAST_OR_GOOD = np.array([0.5, 1.0]), np.array([0.0, 10.0]), np.array([0.1, 0.2])
PATIENT_OR_HURRIED = np.array([12.0, 8.0]), np.array([0.0, 0.6])


def test_fast_or_good_by_hand() -> None:
    """Patient (12, 0): fast 6, good 12 USD. Hurried (8, 0.6): fast 4, good 2. The patient would gain 2 by taking fast at 4.

    Half and half: 0.5·(12 − 2 − 0.2) + 0.5·(4 − 0.1) = 6.85 beats selling only good at 12, 5.9. Among three patient in four
    the rent of 1.5 exceeds the 0.975 that fast earns, and the hurried get nothing.
    """
    types = Grid(*PATIENT_OR_HURRIED, np.array([0.5, 0.5]))
    found = screen(types, *FAST_OR_GOOD, names=("fast", "good"))
    assert found.value == pytest.approx(6.85)
    assert found.utility == pytest.approx([2, 0])
    menu = cap(found, 2)
    assert [(t.name, t.price, t.share, t.rent) for t in menu.tiers] == [
        ("fast", pytest.approx(4), 0.5, pytest.approx(0)),
        ("good", pytest.approx(10), 0.5, pytest.approx(2)),
    ]
    assert menu.takes.tolist() == [1, 0]
    assert menu.latency_prices == ((0.6, 0.6), (0.0, 0.0))
    assert [(t.type_from, t.type_to, t.seconds, t.cost) for t in menu.tiers] == [
        (8, 8, 0, 0.1),
        (12, 12, 10, 0.2),
    ]
    assert cap(found, 1).value == pytest.approx(5.9)
    patient = screen(Grid(*PATIENT_OR_HURRIED, np.array([0.75, 0.25])), *FAST_OR_GOOD)
    assert patient.value == pytest.approx(8.85)
    assert patient.utility == pytest.approx([0, 0])


def test_welfare_by_hand() -> None:
    """The same two: the best for both is 0.5·11.8 + 0.5·3.9 = 7.85, and leaves 1 of rent, so 6.85 can be recovered."""
    types = Grid(*PATIENT_OR_HURRIED, np.array([0.5, 0.5]))
    for recover in (0.0, 3.0, 6.849):
        found = screen(types, *FAST_OR_GOOD, objective="welfare", recover=recover)
        assert found.value == pytest.approx(7.85)
        assert found.certificate.profit == pytest.approx(6.85)  # the least rent
        assert cap(found, 2).value == pytest.approx(7.85)
        assert found.recovery_price == pytest.approx(0, abs=1e-9)


# --- other roads ------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_one_dimension_is_design(seed: int) -> None:
    """Without prices of delay: dynamic programming on the revenue curve finds the same, capped or not."""
    rng = np.random.default_rng(seed)
    t, o = int(rng.integers(1, 12)), int(rng.integers(1, 7))
    law = Atoms(np.sort(rng.uniform(0, 10, t)), rng.dirichlet(np.ones(t)))
    quality = rng.uniform(0.05, 1, o)
    cost = rng.uniform(0, 3, o) * quality
    offerings = Offerings(tuple(f"model {i}" for i in range(o)), quality, cost)
    found = screen(line(law.value, law.probability), quality, np.zeros(o), cost)
    assert found.value == pytest.approx(design(law, offerings, tiers=50).value, abs=1e-9)
    for tiers in (1, 2, 3):
        assert cap(found, tiers).value == pytest.approx(design(law, offerings, tiers=tiers).value, abs=1e-9)


def every_row(types: Grid, quality: Any, seconds: Any, cost: Any, recover: float | None) -> float:
    """The programme with all T·(T − 1) rows at once, in its first form."""
    worth, f = types.worth(quality, seconds), types.probability
    t, o = worth.shape
    rows, right = [], []
    for i in range(t):
        lottery = np.zeros((t, o + 1))
        lottery[i, :o] = 1
        rows, right = [*rows, lottery.ravel()], [*right, 1.0]
        for k in range(t):
            lie = np.zeros((t, o + 1))
            lie[k, :o] = worth[i] - worth[k]
            lie[k, o] += 1
            lie[i, o] -= 1
            rows, right = [*rows, lie.ravel()], [*right, 0.0]
    welfare = np.column_stack((f[:, None] * (worth - cost), np.zeros(t))).ravel()
    rent = np.column_stack((np.zeros((t, o)), f)).ravel()
    if recover is not None:
        rows, right = [*rows, rent - welfare], [*right, -recover]
    goal = welfare if recover is not None else welfare - rent
    answer = linprog(-goal, A_ub=np.array(rows), b_ub=right, method="highs")
    assert answer.status == 0
    return -float(answer.fun)


@given(SEEDS, st.floats(0, 0.999))
@settings(max_examples=25, deadline=None)
def test_few_rows_do_what_all_do(seed: int, share: float) -> None:
    types, *offered = economy(seed)
    best = screen(types, *offered)
    assert best.value == pytest.approx(every_row(types, *offered, None), abs=1e-7)
    recover = share * best.value
    found = screen(types, *offered, objective="welfare", recover=recover)
    assert found.value == pytest.approx(every_row(types, *offered, recover), abs=1e-6)


def best_posted(
    types: Grid, quality: Any, seconds: Any, cost: Any, tiers: int, recover: float | None
) -> float:
    """The best `tiers` posted prices, by branch and bound over who takes what."""
    worth, f = types.worth(quality, seconds), types.probability
    t, o = worth.shape
    top = max(float(worth.max()), 0.0) + 1
    takes, utility = np.arange(t * o).reshape(t, o), t * o + 2 * o + np.arange(t)
    price, offered = t * o + np.arange(o), t * o + o + np.arange(o)
    rows, right = [], []

    def row(bound: float, *terms: tuple[Any, float]) -> None:
        rows.append(np.zeros(t * o + 2 * o + t))
        right.append(bound)
        for at, weight in terms:
            rows[-1][at] += weight

    row(tiers, (offered, 1))
    for i in range(t):
        row(1, (takes[i], 1))
        row(0, (utility[i], 1), (takes[i], -top))
        for j in range(o):
            row(0, (takes[i, j], 1), (offered[j], -1))
            row(-worth[i, j], (utility[i], -1), (price[j], -1))
            row(2 * top, (utility[i], 1), (price[j], 1), (takes[i, j], 2 * top - worth[i, j]))
    welfare, rent = np.zeros((2, t * o + 2 * o + t))
    welfare[takes] = f[:, None] * (worth - cost)
    rent[utility] = f
    if recover is not None:
        rows.append(rent - welfare)
        right.append(-recover)
    whole, high = np.zeros(welfare.size), np.full(welfare.size, top)
    whole[takes], whole[offered], high[takes], high[offered] = 1, 1, 1, 1
    answer = milp(
        rent - welfare if recover is None else -welfare,
        constraints=LinearConstraint(np.array(rows), -np.inf, right),
        integrality=whole,
        bounds=Bounds(0, high),
        options={"mip_rel_gap": 1e-9},
    )
    assert answer.status == 0
    return -float(answer.fun)


@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_cap_finds_the_optimum(tiers: int) -> None:
    """Of 15 small economies: all, for profit; with cost recovery, a search may miss by little, and seldom does."""
    short = []
    for seed in range(15):
        types, *offered = economy(seed, most_types=9)
        found = screen(types, *offered)
        menu = cap(found, tiers)
        best = best_posted(types, *offered, tiers, None)
        assert menu.value == pytest.approx(best, abs=1e-5)
        recover = 0.6 * menu.value
        menu = cap(screen(types, *offered, objective="welfare", recover=recover), tiers)
        best = best_posted(types, *offered, tiers, recover)
        short.append((best - menu.value) / max(best, 1.0))
    assert max(short) < 0.02
    assert np.mean(np.array(short) > 1e-5) <= 1 / 15


# --- what must hold of every menu -------------------------------------------------------------------------------------


def check_lotteries(found: Screening) -> None:
    """IC and IR one pair at a time, from what is published: each type's lottery and payment."""
    types, scale = found.types, min(1.0, float(found.types.value.max() * found.quality.max()) or 1.0)
    utility, payment = found.utility, found.payment
    for t in range(len(types)):
        worth = types.value[t] * found.quality - types.latency_price[t] * found.seconds
        assert utility[t] >= -1e-9 * scale
        assert (found.lottery @ worth - payment - utility[t]).max() <= 1e-9 * scale
    assert found.lottery.min() >= 0
    assert found.lottery.sum(axis=1).max() <= 1 + 1e-12
    assert utility.min() <= 1e-9 * scale  # IR binds
    assert abs(found.gap) <= 1e-7 * scale
    assert found.certificate.worst_ic_violation <= 1e-9


def check_posted(menu: CappedMenu, tiers: int) -> None:
    """Each type's best response, from the published tiers alone, and what the certificate says it brings."""
    assert len(menu.tiers) <= tiers
    types, f = menu.types, menu.types.probability
    utility = np.zeros(len(types))
    profit = 0.0
    for t in range(len(types)):
        offers = [
            types.value[t] * x.quality - types.latency_price[t] * x.seconds - x.price for x in menu.tiers
        ]
        took = menu.takes[t]
        utility[t] = offers[took] if took >= 0 else 0.0
        assert max([0.0, *offers]) - utility[t] <= 1e-9
        if took >= 0 and f[t] > 0:
            tier, (least, most) = menu.tiers[took], menu.latency_prices[took]
            assert tier.type_from <= types.value[t] <= tier.type_to
            assert least <= types.latency_price[t] <= most
            profit += f[t] * (tier.price - tier.cost)
    certificate = menu.certificate
    assert certificate.worst_ic_violation <= 1e-9
    assert certificate.worst_ir_violation <= 1e-9
    assert profit == pytest.approx(certificate.profit, abs=1e-9)
    assert certificate.welfare == pytest.approx(certificate.profit + f @ utility, abs=1e-9)
    assert certificate.information_rent == pytest.approx(sum(x.share * x.rent for x in menu.tiers), abs=1e-9)
    served = (menu.takes >= 0) & (f > 0)
    if served.any():
        assert utility[served].min() <= 1e-9  # IR binds at some type that is served
    for k, tier in enumerate(menu.tiers):
        assert tier.share == pytest.approx(f[menu.takes == k].sum())
        assert tier.share > 0


@given(SEEDS, st.sampled_from([1e-4, 1.0, 300.0]), st.floats(0, 0.999))
@settings(max_examples=15, deadline=None)
def test_laws(seed: int, usd: float, share: float) -> None:
    types, *offered = economy(seed, most_types=15, usd=usd)
    best = screen(types, *offered)
    recover = max(share * cap(best, 1).value, 0.0)
    for found in (best, screen(types, *offered, objective="welfare", recover=recover)):
        check_lotteries(found)
        before = -np.inf
        for tiers in (1, 2, 5):
            menu = cap(found, tiers)
            check_posted(menu, tiers)
            assert before - 1e-12 * usd <= menu.value <= found.bound + 1e-9 * usd
            assert menu.loss_to_cap == pytest.approx(max(found.bound - menu.value, 0))
            before = menu.value
            if found.objective == "welfare":
                assert menu.certificate.profit >= recover - 1e-9 * usd
    assert found.certificate.welfare >= best.certificate.welfare - 1e-9 * usd
    assert found.certificate.profit >= recover - 1e-9 * usd
    assert best.certificate.profit >= found.certificate.profit - 1e-9 * usd


@given(SEEDS, st.floats(0.05, 0.95), st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_multiplier_prices_recovery(seed: int, share: float, other: float) -> None:
    """W(R) is concave and μ its slope downwards: W(R′) ≤ W(R) − μ·(R′ − R) wherever R′ is."""
    types, *offered = economy(seed)
    most = screen(types, *offered).value
    here = screen(types, *offered, objective="welfare", recover=share * most)
    there = screen(types, *offered, objective="welfare", recover=other * most)
    assert there.value <= here.value - here.multiplier * (other - share) * most + 1e-7


def test_lattice_of_100() -> None:
    """Few rows are asked for, all are checked; lotteries are needed, and three tiers lose some to them."""
    value, delay = np.linspace(0.5, 10, 10), np.linspace(0, 0.2, 10)
    chance, patience = np.exp(-value / 4), np.exp(-delay / 0.08)
    types = Grid.product(value, chance / chance.sum(), delay, patience / patience.sum())
    quality, seconds = (grid.ravel() for grid in np.meshgrid([0.3, 0.5, 0.7, 0.9], [1.0, 10.0, 30.0]))
    found = screen(types, quality, seconds, 3 * quality**3 / seconds**0.3)
    check_lotteries(found)
    assert found.rows < 100 * 99 / 5
    assert (found.lottery.max(axis=1) < 0.99).any()
    menu = cap(found, 3)
    check_posted(menu, 3)
    assert len(menu.tiers) == 3
    assert 0 < menu.loss_to_cap < 0.1 * found.value


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_repair_of_noisy_lotteries(seed: int) -> None:
    """Lotteries off by 1e-6, as from a solver of that tolerance, close cycles of lies that gain: none is left."""
    types, quality, seconds, cost = economy(seed)
    found = screen(types, quality, seconds, cost, objective="welfare")
    noise = np.random.default_rng(seed).uniform(0, 1e-6, found.lottery.shape)
    lottery, utility = _repair(types, found.lottery * (1 - 1e-5) + noise, quality, seconds)
    certificate = certified(types, lottery @ quality, lottery @ seconds, lottery @ cost, utility)
    assert certificate.worst_ic_violation <= 1e-9
    assert certificate.worst_ir_violation == 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "delay", "chance", "message"),
    [
        ([1, 2], [0, 0], [0.5, 0.4], "column 'probability': probabilities sum to 0.9, not 1"),
        ([1, -2], [0, 0], [0.5, 0.5], "row 2, column 'value': -2"),
        ([1, 2], [np.nan, 0], [0.5, 0.5], "row 1, column 'latency_price': nan"),
        ([1, 2], [0, 0], [1.5, -0.5], "row 2, column 'probability': -0.5"),
        ([2, 1, 2], [3, 3, 3], [0.2, 0.3, 0.5], "row 3: the same type as row 1"),
        ([], [], [], "empty support"),
    ],
)
def test_bad_types(value: Any, delay: Any, chance: Any, message: str) -> None:
    with pytest.raises(RecordError, match=re.escape(message)):
        Grid(*(np.array(column, dtype=float) for column in (value, delay, chance)))


def test_bad_shapes_and_settings() -> None:
    with pytest.raises(QuantityError, match=re.escape("latency_price has shape (1,), expected (2,)")):
        Grid(np.ones(2), np.zeros(1), np.full(2, 0.5))
    types, one = line([1.0], [1.0]), np.ones(1)
    with pytest.raises(QuantityError, match=re.escape("seconds has shape (2,), expected (1,)")):
        screen(types, one, np.ones(2), one)
    with pytest.raises(QuantityError, match="cost of 'small' is -1"):
        screen(types, one, one, -one, names=("small",))
    with pytest.raises(SettingsError, match="recover"):
        screen(types, one, one, one, objective="welfare", recover=-1.0)
    with pytest.raises(SettingsError, match="0 tiers"):
        cap(screen(types, one, one, one), 0)
    many = Grid(np.arange(2001.0), np.zeros(2001), np.full(2001, 1 / 2001))
    with pytest.raises(QuantityError, match="2,001 types that mind delay are too many"):
        screen(many, one, one, one)


def test_recovery_that_no_menu_makes() -> None:
    types = Grid(*PATIENT_OR_HURRIED, np.array([0.5, 0.5]))
    with pytest.raises(
        InfeasibleError, match=r"cost recovery: no menu makes 7 USD .* the most is 6\.85"
    ) as caught:
        screen(types, *FAST_OR_GOOD, objective="welfare", recover=7.0)
    assert caught.value.constraint == "cost recovery"
    assert caught.value.least == pytest.approx(6.85)
    two = screen(types, *FAST_OR_GOOD, objective="welfare", recover=6.5)
    with pytest.raises(InfeasibleError, match=r"of 1 tiers makes 6\.5 USD .* is 5\.9"):
        cap(two, 1)
    assert cap(two, 2).certificate.profit == pytest.approx(6.85)


@pytest.mark.parametrize("cost", [3.0, 1e12, 1e300])
def test_nobody_worth_serving(cost: float) -> None:
    types = line([1.0, 2.0], [0.5, 0.5])
    found = screen(types, np.ones(1), np.zeros(1), np.full(1, cost), objective="welfare")
    assert found.value == 0
    menu = cap(found, 3)
    assert menu.tiers == ()
    assert menu.takes.tolist() == [-1, -1]
    assert menu.value == 0
