"""All equilibria of small economies: bounds that hold, goldens found and proved, nothing lost, nothing claimed too much."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import DataDir
from walras.errors import QuantityError
from walras.market.tenants.all_equilibria import Enclosed, all_equilibria
from walras.market.tenants.economy import Economy, Sector, Tenant
from walras.market.tenants.enclosures import (
    CURVED,
    Interval,
    Ratios,
    demand_of_ces,
    demand_of_quasi_linear,
)
from walras.market.tenants.read import read_economies
from walras.market.tenants.solve import clear
from walras.market.tenants.utility import CES, Demand, Linear, QuasiLinear, Utility
from walras.risk import FloatArray

KEHOE_SHARES = (
    (0.52, 0.4, 0.04, 0.04),
    (0.86, 0.1, 0.02, 0.02),
    (0.5, 0.2, 0.2975, 0.0025),
    (0.06, 0.25, 0.0025, 0.6875),
)
KEHOE_ACTIVITIES = ((6.0, -1.0, -4.0, -1.0), (-1.0, 3.0, -1.0, -1.0))
KEHOE = (  # prices of goods 1 and 3, of sum 1; that of good 2 is 1/4 (equilibrium/kehoe1985.json)
    (0.15942206404630765, 0.03865148277471786),
    (0.25, 0.25),
    (0.2751362066303906, 0.30865114880424477),
)


def ces(shares: object, elasticity: float, owned: object, name: str = "a") -> Tenant:
    return Tenant(name, CES(np.array(shares, dtype=float), elasticity), np.array(owned, dtype=float))


def goods(n: int) -> tuple[str, ...]:
    return tuple(f"x{k + 1}" for k in range(n))


def kehoe() -> Economy:
    owned = np.diag([5.0, 5.0, 40.0, 40.0])
    tenants = (ces(s, 1.0, w, f"t{i}") for i, (s, w) in enumerate(zip(KEHOE_SHARES, owned, strict=True)))
    return Economy(goods(4), tuple(tenants), np.array(KEHOE_ACTIVITIES).T)


def holds(bounds: FloatArray, point: FloatArray, slack: float = 0.0) -> bool:
    return bool((bounds[..., 0] - slack <= point).all() and (point <= bounds[..., 1] + slack).all())


def accounted(found: Enclosed, prices: FloatArray, slack: float = 1e-10) -> bool:
    """That a known equilibrium was proved or is within what was left open."""
    known = [e.price_bounds for e in found.equilibria] + list(found.undecided)
    return any(holds(bounds, prices, slack) for bounds in known)


# --- bounds -------------------------------------------------------------------------------------------------------

number = st.floats(-1e200, 1e200)
pair = st.tuples(number, number).map(sorted)
OPERATIONS: dict[
    str, tuple[Callable[[Interval, Interval], Interval], Callable[[Fraction, Fraction], Fraction]]
] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "subtract": (lambda a, b: a - b, lambda a, b: a - b),
    "multiply": (lambda a, b: a * b, lambda a, b: a * b),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=pair, b=pair)
@example(a=[0.0, 5e-324], b=[0.0, 5e-324])
@example(a=[-1e-200, 1.0], b=[1e-200, 1e-200])
@example(a=[-1.0, -1.0], b=[1 + 2**-52, 1 + 2**-52])
@settings(max_examples=40)
def test_exact_results_lie_within_the_interval(name: str, a: list[float], b: list[float]) -> None:
    on_intervals, exactly = OPERATIONS[name]
    result = on_intervals(Interval(*np.array(a)[:, None]), Interval(*np.array(b)[:, None]))
    for x in a:
        for y in b:
            exact = exactly(Fraction(x), Fraction(y))
            low, high = result.lo[0], result.hi[0]
            assert low == -np.inf or Fraction(float(low)) <= exact
            assert high == np.inf or Fraction(float(high)) >= exact


@given(st.lists(number, min_size=1, max_size=9), st.floats(1e-200, 1e200))
@settings(max_examples=40)
def test_sums_and_quotients_lie_within_the_interval(values: list[float], by: float) -> None:
    total = Interval.thin(values).sum(0)
    exact = sum(map(Fraction, values))
    assert Fraction(float(total.lo)) <= exact <= Fraction(float(total.hi))
    share = Interval.thin([abs(values[0])]).over(Interval.thin([by]))
    quotient = Fraction(abs(values[0])) / Fraction(by)
    assert Fraction(float(share.lo[0])) <= quotient
    assert share.hi[0] == np.inf or Fraction(float(share.hi[0])) >= quotient


def test_exp_and_log_of_numpy_err_less_than_a_quarter_of_what_is_allowed() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-650, 650, 1500), rng.normal(0, 1, 1000), rng.normal(0, 1e-8, 500)])
    y = np.concatenate([np.exp(rng.uniform(-600, 600, 1000)), 1 + rng.normal(0, 1e-3, 1000)])
    with localcontext() as context:
        context.prec = 40
        for got, exact in (
            *zip(np.exp(x), (Decimal(float(v)).exp() for v in x), strict=True),
            *zip(np.log(y), (Decimal(float(v)).ln() for v in y), strict=True),
        ):
            assert abs(Decimal(float(got)) - exact) <= Decimal(CURVED / 4) * abs(exact)


def random_tenants(
    rng: np.random.Generator, n: int, count: int, elasticity: tuple[float, float]
) -> list[Tenant]:
    """Some want few goods, some own few, some have subsistence."""
    tenants = []
    for i in range(count):
        shares, owned = rng.random(n) * (rng.random(n) < 0.8), rng.random(n) * (rng.random(n) < 0.7)
        shares[rng.integers(n)] += 0.1
        owned[i % n] += 0.5
        need = rng.random() * owned * (rng.random() < 0.3)
        drawn = float(rng.choice([0.0, 1.0, rng.uniform(0, 4)]))
        tenants.append(Tenant(f"t{i}", CES(shares, float(np.clip(drawn, *elasticity)), need), owned))
    return tenants


def quasi_linear(rng: np.random.Generator, n: int) -> QuasiLinear:
    terms = []
    for k in range(2, n + 1):
        exponent = rng.uniform(-3, 0.8)
        terms.append(f"{'-' if exponent < 0 else '+'} {rng.uniform(0.2, 3):.3f} x{k}^({exponent:.3f})")
    return QuasiLinear.parse("x1 " + " ".join(terms), goods(n))


@given(st.integers(0, 10**9), st.integers(2, 4), st.floats(-6, 1.5))
@settings(max_examples=35)
def test_bounds_over_a_box_hold_demand_and_its_slopes_anywhere_in_it(seed: int, n: int, width: float) -> None:
    rng = np.random.default_rng(seed)
    centre, radius = rng.normal(0, 2, n), 10**width
    low, high = centre - radius, centre + radius
    log = Interval((low[:, None] - high)[None], (high[:, None] - low)[None])
    ratios = Ratios(log, log.exp())
    owned = rng.random((3, n)) * rng.choice([1.0, 1e-3], (3, 1))
    for i, tenant in enumerate(random_tenants(rng, n, 2, (0.0, 4.0))):
        assert isinstance(tenant.utility, CES)
        own = tenant.endowment + owned[i]
        check_bounds(
            rng, tenant.utility, own, (low, high), demand_of_ces([tenant.utility], own[None], ratios)
        )
    utility = quasi_linear(rng, n)
    check_bounds(rng, utility, owned[2], (low, high), demand_of_quasi_linear(utility, owned[2], ratios))


def check_bounds(rng, utility: Utility, owned: FloatArray, box, demanded) -> None:
    """At random points of the box, against closed forms of `utility` (which err by 1e-9 at most)."""
    slopes = demanded.slopes()
    for _ in range(3):
        p = np.exp(rng.uniform(*box))
        x = utility.demand(p, float(p @ owned))
        by_price, by_income = utility.slopes(p, float(p @ owned))
        by_log = (by_price + np.outer(by_income, owned)) * p
        size = 1e-9 * (np.abs(by_log).max() + x.max() + np.abs(by_price * p).max())
        assert holds(np.stack([demanded.amount.lo[0], demanded.amount.hi[0]], -1), x, 1e-9 * x.max())
        assert holds(np.stack([slopes.lo[0], slopes.hi[0]], -1), by_log, size)


# --- goldens ------------------------------------------------------------------------------------------------------


def test_kehoes_three_are_all_found_and_proved() -> None:
    found = all_equilibria(kehoe())
    assert found.complete
    assert found.volume == 0
    assert [e.index for e in found.equilibria] == [1, -1, 1]
    for e, (first, third) in zip(found.equilibria, KEHOE, strict=True):
        np.testing.assert_allclose(e.prices[[0, 1, 2]], [first, 0.25, third], atol=1e-8)
        assert holds(e.price_bounds, e.prices)
        assert np.ptp(e.price_bounds, axis=1).max() < 1e-10
        np.testing.assert_allclose(
            kehoe().excess_demand(e.prices), kehoe().activities @ e.activities, atol=1e-9
        )


@pytest.mark.data
def test_the_economies_of_the_literature(data_dir: DataDir) -> None:
    def found(name: str) -> Enclosed:
        (economy,) = read_economies(data_dir / f"equilibrium/{name}.json").values()
        return all_equilibria(economy)

    mwg, scarf, three = found("mwg15b2"), found("scarf1960"), found("kehoe1985")
    assert all(each.complete for each in (mwg, scarf, three))
    assert mwg.index_sum == scarf.index_sum == three.index_sum == 1
    ratios = sorted((e.prices[0] / e.prices[1], e.index) for e in mwg.equilibria)
    np.testing.assert_allclose(ratios, [(0.5, 1), (1, -1), (2, 1)], atol=1e-8)
    np.testing.assert_allclose([e.prices for e in scarf.equilibria], [[1 / 3] * 3], atol=1e-8)
    np.testing.assert_allclose([e.prices[[0, 2]] for e in three.equilibria], KEHOE, atol=1e-8)


# --- laws ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**9), st.integers(2, 4))
@settings(max_examples=8)
def test_gross_substitutes_have_one_equilibrium_and_newton_finds_it(seed: int, n: int) -> None:
    """σ ≥ 1, every good owned and wanted by all: unique (Arrow, Block and Hurwicz 1959)."""
    rng = np.random.default_rng(seed)
    tenants = (
        ces(rng.random(n) + 0.05, 1 + 2 * rng.random(), rng.random(n) + 0.05, f"t{i}") for i in range(n)
    )
    economy = Economy(goods(n), tuple(tenants))
    found = all_equilibria(economy)
    assert found.complete
    (only,) = found.equilibria
    assert only.index == 1
    assert holds(only.price_bounds, clear(economy).prices, 1e-9)


@given(st.integers(0, 10**9), st.integers(2, 4), st.integers(0, 2))
@settings(max_examples=8)
def test_what_newton_finds_is_among_them(seed: int, n: int, n_activities: int) -> None:
    """Any elasticities, activities, goods left over; where all is proved, indices sum to 1 and agree with `clear`."""
    rng = np.random.default_rng(seed)
    tenants = random_tenants(rng, n, n + 1, (0.0, 4.0))
    tenants[0] = ces(np.ones(n), 0.5, np.full(n, 0.3), "all")
    activities = np.zeros((n, n_activities))
    for a in range(n_activities):  # from earlier goods one later good, so never something from nothing
        made = int(rng.integers(1, n))
        activities[:made, a] = -rng.uniform(0, 0.5, made)
        activities[[0, made], a] = -0.3, rng.uniform(0.3, 1.5)
    economy = Economy(goods(n), tuple(tenants), activities)
    found = all_equilibria(economy, work=20_000)
    one = clear(economy)
    assert accounted(found, one.prices, 1e-9)
    if found.complete:
        assert found.index_sum == 1
        here = min(found.equilibria, key=lambda e: float(np.abs(e.prices - one.prices).max()))
        assert here.index == one.certificate.index
        np.testing.assert_allclose(here.activities, one.activities, atol=1e-7)


@given(st.integers(0, 10**9))
@example(0)
@settings(max_examples=8)
def test_two_goods_are_counted_by_a_fine_scan_too(seed: int) -> None:
    """Complements that each mostly want their own good: one or three equilibria (three from seed 0), seen as changes of sign."""
    rng = np.random.default_rng(seed)
    own = rng.uniform(0.95, 0.999, 2)
    elasticity = rng.uniform(0.12, 0.3)
    economy = Economy(
        goods(2),
        (
            ces([own[0], 1 - own[0]], elasticity, [1, 0], "a"),
            ces([1 - own[1], own[1]], elasticity, [0, 1], "b"),
        ),
    )
    found = all_equilibria(economy)
    ratio = np.exp(np.linspace(-60.0001, 60, 20_000))
    weight = ratio ** (1 - elasticity)
    sold = (1 - own[0]) / (own[0] * weight + 1 - own[0])
    bought = (1 - own[1]) * weight / ((1 - own[1]) * weight + own[1]) / ratio
    signs = np.sign(bought - sold)
    assert found.complete
    assert len(found.equilibria) == np.count_nonzero(np.diff(signs))
    assert found.index_sum == 1


@given(st.integers(1, 188))
@settings(max_examples=6)
def test_stopped_early_it_has_lost_none_of_kehoes(work: int) -> None:
    found = all_equilibria(kehoe(), work=work)
    for first, third in KEHOE:
        assert accounted(found, np.array([first, 0.25, third, 0.75 - first - third]))
    assert found.complete == (len(found.undecided) == 0)


def test_stopped_early_says_so() -> None:
    found = all_equilibria(kehoe(), work=20)
    assert not found.complete
    assert found.volume > 0


# --- what is special ----------------------------------------------------------------------------------------------


def test_a_continuum_is_not_certified() -> None:
    found = all_equilibria(Economy(goods(2), (ces([1, 1], 0.0, [1, 1]),)), work=3000)
    assert not found.equilibria
    assert not found.complete
    assert accounted(found, np.array([0.3, 0.7]))


def test_a_good_left_over_costs_nothing() -> None:
    """Leontief users of 7 of 10 units of capacity; and a good nobody wants."""
    economy = Economy(goods(2), (ces([1, 1], 0.0, [1, 5], "a"), ces([1, 2], 0.0, [3, 5], "b")))
    found = all_equilibria(economy)
    assert found.complete
    np.testing.assert_allclose([e.prices for e in found.equilibria], [[1.0, 0.0]], atol=1e-12)
    junk = Economy(goods(3), (ces([1, 1, 0], 1.0, [1, 0, 5], "a"), ces([1, 2, 0], 0.5, [0, 3, 5], "b")))
    (only,) = all_equilibria(junk).equilibria
    assert only.prices[2] == 0
    np.testing.assert_allclose(junk.excess_demand(only.prices)[:2], 0, atol=1e-10)


def test_an_activity_that_only_turns_one_free_good_into_another_is_left_open() -> None:
    """Of good 2 there is none until the activity makes it of good 3, of which there is too much: how much runs is free."""
    economy = Economy(goods(3), (ces([1, 1, 0], 0.0, [1, 0, 5]),), np.array([[0.0, 1.0, -1.0]]).T)
    found = all_equilibria(economy)
    assert not found.complete
    assert accounted(found, np.array([1.0, 0.0, 0.0]))


def test_an_idle_activity_that_breaks_even_is_left_open() -> None:
    """At the equilibrium (1/2, 1/2) of exchange, swapping good 1 for good 2 neither gains nor loses."""
    tenants = (ces([1, 1], 1.0, [1, 0], "a"), ces([1, 1], 1.0, [0, 1], "b"))
    found = all_equilibria(Economy(goods(2), tenants, np.array([[-1.0, 1.0]]).T))
    assert not found.complete
    assert accounted(found, np.array([0.5, 0.5]))


def test_an_activity_twice_changes_no_prices() -> None:
    twice = Economy(goods(4), kehoe().tenants, np.array([*KEHOE_ACTIVITIES, KEHOE_ACTIVITIES[0]]).T)
    found = all_equilibria(twice)
    assert found.complete
    np.testing.assert_allclose([e.prices[[0, 2]] for e in found.equilibria], KEHOE, atol=1e-8)


def test_only_within_the_box_of_prices() -> None:
    box = np.array([[0.2, 1.0], [0.0, 1.0], [0.0, 1.0], [0.2, 1.0]])
    found = all_equilibria(kehoe(), box=box)
    assert found.complete
    np.testing.assert_allclose([e.prices for e in found.equilibria], [[0.25] * 4], atol=1e-8)


def test_what_cannot_be_bounded_is_refused_by_name() -> None:
    owned = np.ones(2)
    for utility, said in (
        (Linear(owned), "'lena'.*Linear"),
        (Demand(lambda p, m: m * owned / p.sum()), "'lena'.*Demand"),
    ):
        with pytest.raises(QuantityError, match=said):
            all_equilibria(Economy(goods(2), (Tenant("lena", utility, owned),)))
    sector = Sector.of_production("mill", 1, 1.0, np.array([1.0, 0.0]), 1.0)
    with pytest.raises(QuantityError, match="sector 'mill'"):
        all_equilibria(Economy(goods(2), (ces([1, 1], 1.0, owned),), sectors=(sector,)))
    with pytest.raises(QuantityError, match="7 goods"):
        all_equilibria(Economy(goods(7), (ces(np.ones(7), 1.0, np.ones(7)),)))
    with pytest.raises(QuantityError, match="box"):
        all_equilibria(kehoe(), box=np.ones((3, 2)))
