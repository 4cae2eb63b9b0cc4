"""Checking a menu: closed forms by hand, every lie found, and brute force over types × tiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walras.demand.check import Checked, check
from walras.demand.menu import Tier, certify, design
from walras.demand.offerings import Offerings, Quadratic
from walras.demand.screening import Grid
from walras.errors import SettingsError
from walras.estimate.type_laws import Atoms, Exponential, LogNormal, TypeLaw, Uniform
from walras.records.menus import read_menu

INF, NAN = float("inf"), float("nan")

# Two equally likely types, 2 and 3, and c(q) = q²/2: q_L = θ_L − (θ_H − θ_L) = 1, q_H = 3, p_L = 2·1, p_H = 2 + 3·(3 − 1).
TWO = Atoms(np.array([2.0, 3.0]), np.array([0.5, 0.5]))
LOW, HIGH = Tier("low", 1.0, 2.0, 2.0, 2.0), Tier("high", 3.0, 8.0, 3.0, 3.0)

# Types uniform on [0, 1]: of N = 2 tiers, q_k = 2k/(2N + 1) and t_k = (N + k)/(2N + 1) (Bergemann et al. 2012, section 4).
UNIFORM = (Tier("plain", 0.4, 0.24, 0.6, 0.8), Tier("best", 0.8, 0.56, 0.8, 1.0))


def rows(checked: Checked) -> list[tuple[str | None, str | None, float, float]]:
    return [(lie.own, lie.takes, lie.theta, lie.gain) for lie in checked.lies]


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_two_types(ranges: bool) -> None:
    tiers = (LOW, HIGH) if ranges else tuple(replace(t, type_from=NAN, type_to=NAN) for t in (HIGH, LOW))
    found = check(tiers, TWO, Quadratic())
    low, high = found.tiers
    whole = found.certificate
    assert found.holds
    assert found.self_selected is not ranges
    assert (low.type_from, low.type_to, low.share, low.rent) == (2.0, 2.0, 0.5, 0.0)  # IR binds
    assert (high.type_from, high.type_to, high.share) == (
        3.0,
        3.0,
        0.5,
    )  # indifferent, and takes the better one
    assert high.rent == pytest.approx(3 * 1 - 2)  # (θ_H − θ_L)·q_L
    assert (whole.worst_ic_violation, whole.worst_ir_violation) == (0.0, 0.0)
    assert whole.information_rent == pytest.approx(0.5)
    assert whole.revenue == pytest.approx(5.0)
    assert whole.profit == pytest.approx(2.5)
    assert whole.welfare == pytest.approx(3.0)
    (down,) = found.downgraded  # the low type would get q = 2: 2·2 − 2 = 2 USD, not 2·1 − 1/2
    assert (down.tier, down.share) == ("low", 0.5)
    assert down.welfare_lost == pytest.approx(0.25)


def test_indifference_is_not_left_to_rounding() -> None:
    for scale in np.geomspace(1e-3, 1, 200):
        tiers = [replace(t, price=t.price * scale, type_from=NAN, type_to=NAN) for t in (LOW, HIGH)]
        law = Atoms(TWO.value * scale, TWO.probability)
        assert [tier.share for tier in check(tiers, law).tiers] == [0.5, 0.5]


def test_a_dearer_high_tier_sends_the_high_type_to_the_low_one() -> None:
    found = check((LOW, replace(HIGH, price=8.5)), TWO)
    assert rows(found) == [("high", "low", 3.0, pytest.approx(0.5))]
    dearer = check((LOW, replace(HIGH, price=9.25)), TWO)
    assert rows(dearer) == [
        ("high", "low", 3.0, pytest.approx(1.25)),
        ("high", None, 3.0, pytest.approx(0.25)),
    ]
    assert dearer.certificate.worst_ic_violation == pytest.approx(1.25)
    assert dearer.certificate.worst_ir_violation == pytest.approx(0.25)
    free = check([replace(tier, type_from=NAN, type_to=NAN) for tier in dearer.tiers], TWO)
    assert free.holds
    assert free.untaken == ("high",)
    assert free.certificate.revenue == pytest.approx(2.0)


def test_uniform() -> None:
    found = check(UNIFORM, Uniform(0, 1), Quadratic())
    whole = found.certificate
    assert found.holds
    assert whole.worst_ic_violation < 1e-15
    assert [tier.rent for tier in found.tiers] == pytest.approx([0.04, 0.16])
    assert (whole.information_rent, whole.revenue) == (pytest.approx(0.04), pytest.approx(0.16))
    assert (whole.profit, whole.welfare) == (pytest.approx(0.08), pytest.approx(0.12))
    # Most welfare: the same qualities from 0.2 and from 0.6 on.
    assert found.reference is not None
    assert [tier.type_from for tier in found.reference.tiers] == pytest.approx([0.2, 0.6])
    assert [(d.tier, d.share) for d in found.downgraded] == [
        (None, pytest.approx(0.4)),
        ("plain", pytest.approx(0.2)),
    ]
    assert [d.welfare_lost for d in found.downgraded] == pytest.approx([0.032, 0.008])
    assert found.downgraded_share == pytest.approx(0.6)
    assert found.welfare_lost == pytest.approx(found.reference.certificate.welfare - whole.welfare)


@pytest.mark.parametrize("law", [Uniform(0, 1), None])
def test_one_price_raised_by_a_dime(law: TypeLaw | None) -> None:
    plain, best = UNIFORM
    found = check((plain, replace(best, price=0.66)), law)
    assert rows(found) == [
        ("best", "plain", 0.8, pytest.approx(0.1)),
        ("best", None, 0.8, pytest.approx(0.02)),
    ]
    assert not found.holds
    found = check((replace(plain, price=0.34), best), law)
    assert rows(found) == [
        ("plain", None, 0.6, pytest.approx(0.1)),
        ("plain", "best", 0.8, pytest.approx(0.1)),
    ]


@pytest.mark.parametrize("law", [Uniform(0, 1), None])
def test_types_meant_to_take_nothing_may_want_a_tier(law: TypeLaw | None) -> None:
    plain, best = UNIFORM
    found = check((replace(plain, price=0.2), replace(best, price=0.5)), law)
    assert rows(found) == [
        (None, "plain", 0.6, pytest.approx(0.04)),
        ("plain", "best", 0.8, pytest.approx(0.02)),
    ]


def test_types_above_all_ranges() -> None:
    assert check(UNIFORM).holds
    assert rows(check(UNIFORM, Exponential(1.0)))[0] == (None, "plain", INF, INF)
    assert rows(check(UNIFORM, Uniform(0, 2)))[0] == (None, "best", 2.0, pytest.approx(2 * 0.8 - 0.56))


def test_an_unbounded_range_is_checked_by_its_slope() -> None:
    plain, best = UNIFORM
    swapped = check((replace(plain, type_from=0.8, type_to=INF), replace(best, type_from=0.6, type_to=0.8)))
    assert ("plain", "best", INF, INF) in rows(swapped)
    assert check((plain, replace(best, type_to=INF))).holds
    # Beyond the support there is nobody: the same range is empty there, and finite within.
    assert check((plain, replace(best, type_to=INF)), Uniform(0, 1)).tiers[1].type_to == 1.0


def test_the_designed_menu_holds() -> None:
    for law in (Exponential(0.4), LogNormal(0.3, 1.2), Uniform(0.2, 1)):
        menu = design(law, Quadratic(), tiers=4)
        found = check(menu.tiers, law, Quadratic())
        assert found.holds
        for name in ("information_rent", "revenue", "profit", "welfare"):
            assert getattr(found.certificate, name) == pytest.approx(getattr(menu.certificate, name))
        best = design(law, Quadratic(), objective="welfare", tiers=4)
        same = check(best.tiers, law, Quadratic())
        assert same.downgraded == ()
        assert (same.downgraded_share, same.welfare_lost) == (0, 0)


def test_a_menu_of_nothing() -> None:
    found = check((), Uniform(0, 1))
    assert found.holds
    assert found.certificate.welfare == 0


# --- a public price list ----------------------------------------------------------------------------------------------

LIST = "model,quality,price_usd\nnano,0.30,0.001\nsmall,0.55,0.006\nmiddle,0.60,0.012\nlarge,0.80,0.020\n"


def test_a_price_list_without_types(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text(LIST)
    found = check(read_menu(path))
    assert found.self_selected
    assert found.holds
    # Upgrades cost 1/300, 5/250 and 14/250 USD per unit; "middle" lies above the line from small to large.
    assert [tier.type_from for tier in found.tiers] == pytest.approx([1 / 300, 0.02, NAN, 0.056], nan_ok=True)
    assert [tier.type_to for tier in found.tiers] == pytest.approx([0.02, 0.056, NAN, INF], nan_ok=True)
    assert found.untaken == ("middle",)
    whole = found.certificate
    assert np.isnan([whole.information_rent, whole.revenue, whole.profit, whole.welfare]).all()
    assert found.reference is None
    assert np.isnan(found.welfare_lost)

    law = Exponential(0.03)
    known = check(read_menu(path), law)
    s = np.exp(-np.array([1 / 300, 0.02, 0.056]) / 0.03)
    assert known.certificate.revenue == pytest.approx(
        s @ [0.001, 0.005, 0.014]
    )  # upgrades, to all at or above
    # E[(θ − t)⁺] = mean·S(t), so each upgrade leaves its Δq·mean·S(t).
    assert known.certificate.information_rent == pytest.approx(0.03 * s @ [0.3, 0.25, 0.25])
    assert np.isnan([known.certificate.profit, known.certificate.welfare]).all()
    assert known.tiers[2].share == 0
    assert known.untaken == ("middle",)


def test_delay_counts_as_price(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text(
        "name,quality,price,seconds,cost\nslow,0.5,0.1,10,0.05\nfast,0.5,0.2,1,0.08\nbest,0.9,0.5,20,0.3\n"
    )
    assert check(read_menu(path)).untaken == ("fast",)  # at no price of delay its speed is worth nothing
    law = Uniform(0, 2)
    found = check(read_menu(path), law, latency_price=0.02)
    slow, fast, best = found.tiers
    assert found.untaken == ("slow",)  # 0.1 + 0.2 against 0.2 + 0.02
    assert np.isnan(slow.type_from)
    assert (fast.type_from, best.type_from) == (pytest.approx(0.44), pytest.approx(0.68 / 0.4))
    rent = 0.5 * (0.44 + 1.7) / 2 - 0.22
    assert fast.rent == pytest.approx(rent)
    own = check(
        read_menu(path),
        law,
        Offerings(("x",), np.array([0.9]), np.array([0.3]), latency_price=0.02),
        latency_price=0.02,
    )
    assert own.certificate == found.certificate  # the menu's own costs come first
    with pytest.raises(
        SettingsError, match=r"delay costs users 0.03 USD/s, but the technology counts 0.02 USD/s"
    ):
        check(
            read_menu(path),
            law,
            Offerings(("x",), np.array([0.9]), np.array([0.3]), latency_price=0.02),
            latency_price=0.03,
        )


def test_without_a_technology_the_tiers_at_cost_are_the_reference() -> None:
    # Sold at cost each, users above 0.1/0.5 = 0.2 are worth serving; the price of 0.4 keeps out those below 0.8.
    tier = Tier("one", 0.5, 0.4, NAN, NAN, cost=0.1)
    found = check([tier], Uniform(0, 1))
    (down,) = found.downgraded
    assert (down.tier, down.share) == (None, pytest.approx(0.6))
    assert down.welfare_lost == pytest.approx(0.6 * (0.5 * 0.5 - 0.1))
    assert found.certificate.profit == pytest.approx(0.2 * 0.3)


def test_costs_come_from_the_technology() -> None:
    there = Offerings(
        ("a", "b"), np.array([0.4, 0.8]), np.array([0.1, 0.3]), np.array([1.0, 5.0]), latency_price=0.01
    )
    found = check([Tier("a", 0.4, 0.2, NAN, NAN, 1.0)], Uniform(0, 1), there, latency_price=0.01)
    assert found.tiers[0].cost == pytest.approx(0.1)
    with pytest.raises(SettingsError, match=r"quality_cost: nothing there reaches quality 0.9 of tier 'z'"):
        check([Tier("z", 0.9, 0.2, NAN, NAN)], Uniform(0, 1), there, latency_price=0.01)


def test_users_who_differ_in_what_delay_costs_them(tmp_path: Path) -> None:
    path = tmp_path / "menu.csv"
    header = "name,quality,price,seconds,type,latency_price\n"
    path.write_text(header + "patient,0.5,0.4,10,1,0\nhurried,0.5,0.45,0,1,0.01\n")
    assert check(read_menu(path)).holds
    path.write_text(header + "patient,0.5,0.4,10,1,0\nhurried,0.5,0.55,0,1,0.01\n")
    found = check(read_menu(path))
    assert {row[:2]: row[3] for row in rows(found)} == pytest.approx(
        {("hurried", None): 0.05, ("hurried", "patient"): 0.05}
    )
    path.write_text(header + "patient,0.5,0.2,10,1,0\nhurried,0.5,0.45,0,1,0.01\n")
    found = check(read_menu(path))
    assert rows(found) == [("hurried", "patient", 1.0, pytest.approx(0.15))]
    assert found.lies[0].latency_price == 0.01
    with pytest.raises(SettingsError, match="differ in what delay costs them"):
        check(read_menu(path), Uniform(0, 1))


def test_no_single_type_has_weight_in_a_continuous_law() -> None:
    """Else nobody would be meant for anything, and any menu too dear for the rest would hold."""
    dear = replace(HIGH, price=9.25)
    assert not check((LOW, dear)).holds
    with pytest.raises(
        SettingsError, match=r"types: tier 'low' is meant for a single type, and in uniform:0:4"
    ):
        check((LOW, dear), Uniform(0, 4))


def test_types_on_a_grid_and_one_for_each_tier(tmp_path: Path) -> None:
    path = tmp_path / "menu.csv"
    header = "name,quality,price,seconds,cost,type,latency_price\n"
    path.write_text(header + "patient,0.5,0.2,10,0.1,1,0\nhurried,0.5,0.45,0,0.3,1,0.01\n")
    grid = Grid(np.array([1.0, 1.0, 1.0]), np.array([0.0, 0.01, 0.1]), np.array([0.5, 0.25, 0.25]))
    found = check(read_menu(path), grid)
    assert rows(found) == [
        ("hurried", "patient", 1.0, pytest.approx(0.15)),
        (None, "hurried", 1.0, pytest.approx(0.05)),  # the most impatient, whom no tier is meant for
    ]
    assert [lie.latency_price for lie in found.lies] == [0.01, 0.1]
    assert [tier.share for tier in found.tiers] == [0.5, 0.25]
    whole = found.certificate
    assert whole.information_rent == pytest.approx(0.5 * 0.3 + 0.25 * 0.05)
    assert whole.revenue == pytest.approx(0.5 * 0.2 + 0.25 * 0.45)
    assert whole.profit == pytest.approx(0.5 * 0.1 + 0.25 * 0.15)
    assert whole.welfare == pytest.approx(whole.information_rent + whole.profit)


def test_ranges_that_stand_apart_name_all_types_there_are() -> None:
    apart = (Tier("a", 0.4, 0.2, 1.0, 2.0), Tier("b", 0.8, 0.2 + 0.4 * 2.5, 2.5, 3.0))
    assert check(apart).holds
    law = Atoms(np.array([0.2, 1.0, 2.0, 2.2, 2.5, 3.0]), np.full(6, 1 / 6))
    found = check(apart, law)
    assert rows(found) == [
        (None, "a", 2.2, pytest.approx(0.4 * 2.2 - 0.2)),
        (None, "b", 2.2, pytest.approx(0.8 * 2.2 - 1.2)),
    ]


# --- brute force ------------------------------------------------------------------------------------------------------

amounts = st.floats(0, 2).map(lambda x: round(x, 3))


@st.composite
def menus(draw: st.DrawFn) -> tuple[list[Tier], Atoms, float]:
    """Tiers of any price, ranges over runs of atoms with gaps or none at all, a law of atoms, and λ₀."""
    types = sorted(draw(st.sets(amounts, min_size=1, max_size=8)))
    weights = np.array(
        draw(st.lists(st.integers(1, 9), min_size=len(types), max_size=len(types))), dtype=float
    )
    law = Atoms(np.array(types), weights / weights.sum())
    k = draw(st.integers(1, 4))
    quality = sorted(draw(st.sets(st.integers(1, 100), min_size=k, max_size=k)))
    ends = sorted(draw(st.lists(amounts, min_size=2 * k, max_size=2 * k, unique=True)))
    free = draw(st.booleans())
    tiers = [
        Tier(f"t{i}", q / 100, draw(amounts), *((NAN, NAN) if free else ends[2 * i : 2 * i + 2]), draw(amounts), draw(amounts))
        for i, q in enumerate(quality)
    ]  # fmt: skip
    return tiers, law, draw(st.sampled_from([0.0, 0.1]))


def utility(theta: float, tier: Tier | None, delay: float) -> float:
    return 0.0 if tier is None else theta * tier.quality - delay * tier.seconds - tier.price


def meant(theta: float, tiers: Sequence[Tier], delay: float) -> Tier | None:
    if np.isnan(tiers[0].type_from):
        options = [None, *tiers]
        best = max(utility(theta, tier, delay) for tier in options)
        return [tier for tier in options if utility(theta, tier, delay) >= best - 1e-9][-1]
    return next((tier for tier in tiers if tier.type_from <= theta <= tier.type_to), None)


@given(menus())
def test_every_type_against_every_tier(case: tuple[list[Tier], Atoms, float]) -> None:
    tiers, law, delay = case
    found = check(tiers, law, latency_price=delay)
    ic = ir = rent = revenue = profit = welfare = 0.0
    shares = dict.fromkeys([tier.name for tier in tiers], 0.0)
    best: dict[tuple[str | None, str | None], float] = {}
    for theta, p in zip(law.value.tolist(), law.probability.tolist(), strict=True):
        own = meant(theta, tiers, delay)
        at = utility(theta, own, delay)
        for tier in (None, *tiers):
            gain = utility(theta, tier, delay) - at
            if gain > 1e-9:
                pair = (own and own.name, tier and tier.name)
                best[pair] = max(best.get(pair, 0.0), gain)
            ic, ir = (max(ic, gain), ir) if tier else (ic, max(ir, gain))
        rent += p * at
        if own is not None:
            shares[own.name] += p
            revenue += p * own.price
            profit += p * (own.price - own.cost)
            welfare += p * (theta * own.quality - delay * own.seconds - own.cost)
    whole = found.certificate
    assert whole.worst_ic_violation == pytest.approx(ic, abs=1e-9)
    assert whole.worst_ir_violation == pytest.approx(ir, abs=1e-9)
    assert {(lie.own, lie.takes): lie.gain for lie in found.lies} == pytest.approx(best)
    assert [lie.gain for lie in found.lies] == sorted((lie.gain for lie in found.lies), reverse=True)
    assert {tier.name: tier.share for tier in found.tiers} == pytest.approx(shares)
    assert found.untaken == tuple(name for name, share in shares.items() if share == 0)
    if all(shares.values()):
        again = certify(found.tiers, law, delay)
        assert again.worst_ic_violation == pytest.approx(whole.worst_ic_violation, abs=1e-12)
        assert again.worst_ir_violation == pytest.approx(whole.worst_ir_violation, abs=1e-12)
    sums = (whole.information_rent, whole.revenue, whole.profit, whole.welfare)
    assert sums == pytest.approx((rent, revenue, profit, welfare), abs=1e-9)


@given(
    menus(),
    st.lists(st.tuples(amounts, st.sampled_from([0.0, 0.1, 0.5])), min_size=1, max_size=9, unique=True),
)
def test_every_type_of_a_grid_takes_its_best(
    case: tuple[list[Tier], Atoms, float], types: list[tuple[float, float]]
) -> None:
    tiers, p = [replace(tier, type_from=NAN, type_to=NAN) for tier in case[0]], 1 / len(types)
    found = check(tiers, Grid(*map(np.array, zip(*types, strict=True)), np.full(len(types), p)))
    own = [meant(theta, tiers, delay) for theta, delay in types]
    rents = [utility(theta, tier, delay) for (theta, delay), tier in zip(types, own, strict=True)]
    assert found.holds
    assert found.certificate.information_rent == pytest.approx(p * sum(rents), abs=1e-9)
    assert found.certificate.revenue == pytest.approx(p * sum(tier.price for tier in own if tier), abs=1e-9)
    for tier in found.tiers:
        its = [
            (v, rent)
            for (v, _), mine, rent in zip(types, own, rents, strict=True)
            if mine and mine.name == tier.name
        ]
        assert tier.share == pytest.approx(p * len(its))
        assert (tier.name in found.untaken) is not bool(its)
        if its:
            assert (tier.type_from, tier.type_to) == (min(its)[0], max(its)[0])
            assert tier.rent == pytest.approx(np.mean([rent for _, rent in its]), abs=1e-9)


@given(menus())
def test_downgrades_type_by_type(case: tuple[list[Tier], Atoms, float]) -> None:
    tiers, law, delay = case
    found = check(tiers, law, latency_price=delay)
    assert found.reference is not None
    share: dict[str | None, float] = {}
    lost: dict[str | None, float] = {}
    for theta, p in zip(law.value.tolist(), law.probability.tolist(), strict=True):
        own = meant(theta, tiers, delay)
        other = next((t for t in found.reference.tiers if t.type_from <= theta <= t.type_to), None)
        if (other.quality if other else 0.0) <= (own.quality if own else 0.0):
            continue
        worth = [utility(theta, t, delay) + (t.price - t.cost if t else 0.0) for t in (other, own)]
        name = own.name if own else None
        share[name] = share.get(name, 0.0) + p
        lost[name] = lost.get(name, 0.0) + p * (worth[0] - worth[1])
    assert {d.tier: d.share for d in found.downgraded} == pytest.approx(share)
    assert {d.tier: d.welfare_lost for d in found.downgraded} == pytest.approx(lost, abs=1e-9)


@given(menus(), st.sampled_from([Uniform(0, 1.5), Exponential(0.7), LogNormal(0.5, 0.8), None]))
def test_no_type_of_a_continuum_gains_more(
    case: tuple[list[Tier], Atoms, float], law: TypeLaw | None
) -> None:
    """Ranges that touch; types drawn within them and below gain at most what is said, and near it somewhere."""
    tiers, _, delay = case
    tiers = [replace(tier, cost=NAN) for tier in tiers]  # no reference, which takes longest
    if not np.isnan(tiers[0].type_from):
        cuts = [tier.type_from for tier in tiers]
        highs = [*cuts[1:], max(tiers[-1].type_to, 1.6)]
        tiers = [replace(tier, type_to=high) for tier, high in zip(tiers, highs, strict=True)]
    found = check(tiers, law, latency_price=delay)
    top = min(1.5, max((tier.type_to for tier in found.tiers if tier.type_to == tier.type_to), default=1.5))
    theta = np.linspace(1e-9, top - 1e-9, 500)
    worth = np.array([theta * 0, *(theta * t.quality - delay * t.seconds - t.price for t in found.tiers)])
    own = np.zeros(theta.size, dtype=np.int64)
    for k, tier in enumerate(found.tiers, start=1):
        own[(theta >= tier.type_from) & (theta <= tier.type_to)] = k
    gain = worth - worth[own, np.arange(theta.size)]
    ir, ic = max(0.0, float(gain[0].max())), max(0.0, float(gain[1:].max()))
    assert ic <= found.certificate.worst_ic_violation + 1e-9
    assert ir <= found.certificate.worst_ir_violation + 1e-9
    if isinstance(law, Uniform):
        assert found.certificate.worst_ic_violation <= ic + 1.5 / 499 + 1e-9  # slopes are at most 1
        assert found.certificate.worst_ir_violation <= ir + 1.5 / 499 + 1e-9
    if found.self_selected:
        assert found.certificate.worst_ic_violation < 1e-12
