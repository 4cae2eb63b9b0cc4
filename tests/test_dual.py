"""Prices as the minimum of the dual, on bare planes: against HiGHS on everything at once, and against the dual written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from economies import SEEDS
from markets import KINDS, STYLES, charge, check, dual_at, planner, random_market, stake, totals
from walras.errors import InfeasibleError, QuantityError
from walras.market import dual
from walras.market.dual import Goal, Unbounded, solve
from walras.market.memory import Memory
from walras.market.mix import Mix
from walras.market.planes import Planes, Rows
from walras.market.shadow import discover
from walras.prices import Constraint
from walras.quantities import Tasks, Uses


@pytest.fixture(params=["screened", "whole"], scope="module")
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """As in test_shadow; `whole`, which changes nothing, comes last and so stays for the tests that do not ask."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "screened":
            patch.setattr(dual, "FEW", 1)
            patch.setattr(dual, "FEW_A_ROW", 0)
        yield request.param


@st.composite
def markets(draw: st.DrawFn, *, exactly: bool = True, styles: Any = STYLES, max_tasks: int = 40) -> Memory:
    """A small market that some allocation clears: tightly, or with a little room."""
    kinds = tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)))
    some = range(len(kinds))
    return random_market(
        draw(SEEDS),
        draw(st.integers(1, max_tasks)),
        draw(st.integers(1, 4)),
        kinds,
        draw(st.sampled_from(styles)),
        defer=draw(st.booleans()),
        exactly=(draw(st.sampled_from(some)),) if exactly and draw(st.integers(0, 3)) == 0 else (),
        scoped=tuple(k for k in some if draw(st.booleans())),
        room=draw(st.sampled_from((0.01, 0.0, 0.1))),
    )


def bare(value: Any, quality: Any, planes: Any, limits: Any, *, defer: bool = True, **more: Any) -> Memory:
    """A market from plain tables: nothing declared, by default one row on each plane."""
    k, n = len(limits), len(value)
    table: dict[str, Any] = {
        "plane": np.arange(k),
        "level": np.full(k, np.nan),
        "offset": np.zeros(k),
        "limits": np.array(limits, dtype=float),
        "exactly": np.zeros(k, dtype=np.bool_),
        "scoped": np.zeros(k, dtype=np.bool_),
    }
    rows = Rows(**{name: np.array(more.get(name, column)) for name, column in table.items()})
    free = tuple(np.zeros(1) for _ in planes)
    member = more.get("member", np.zeros(1, dtype=np.uint64))
    amounts = tuple(np.array(plane, dtype=float) for plane in planes)
    return Memory(
        Planes(
            np.array(value, dtype=float), np.array(quality, dtype=float), amounts, free, np.ones(n), member
        ),
        rows,
        defer,
    )


# --- against HiGHS -------------------------------------------------------------------------------------------------


@settings(max_examples=250)
@given(markets())
def test_agrees_with_everything_at_once(path: str, market: Memory) -> None:
    best = planner(market)
    assert best is not None  # by construction some allocation meets all rows
    answer = solve(market)
    event(f"prices other than 0: {(answer.multipliers != 0).sum()}")
    event(f"split: {answer.split.share.size > 0}")
    check(market, answer, best)


@settings(max_examples=60)
@given(markets(), st.sampled_from((0.0, 1.0, 10.0)))
def test_any_start_ends_at_the_same_answer(path: str, market: Memory, times: float) -> None:
    cold = solve(market)
    warm = solve(market, start=times * cold.multipliers)
    check(market, warm, cold.objective)


@settings(max_examples=60)
@given(markets(exactly=False))
def test_the_least_use_of_a_row(path: str, market: Memory) -> None:
    """The goal with worth 0: what infeasibility is explained by."""
    k = len(market.rows)
    free = np.ones(k)
    free[0] = 0.0
    answer = solve(market, goal=Goal(0.0, np.eye(k)[0], free))
    kept = np.arange(1, k)
    rest = Rows(
        *(
            getattr(market.rows, name)[kept]
            for name in ("plane", "level", "offset", "limits", "exactly", "scoped")
        )
    )
    shifted = replace(market.planes, member=market.planes.member >> np.uint64(1))
    best = planner(Memory(shifted, rest, market.defer), -charge(market, 0))
    assert best is not None
    size = float(np.abs(charge(market, 0)).max(axis=1) @ np.broadcast_to(market.planes.weight, len(market)))
    assert answer.usage[0] == pytest.approx(-best, abs=1e-8 * size + 1e-12)
    assert (
        answer.usage[1:] <= market.rows.limits[1:] + 1e-8 * (size + np.abs(market.rows.limits[1:]) + 10)
    ).all()


# --- middle sizes --------------------------------------------------------------------------------------------------

ROWS: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (("money",), ()),
    (("money", "mean"), ()),
    (("money", "quantile", "risk"), (1,)),
    (("money", "mean", "quantile", "risk", "late"), (0, 2)),
    (("money", "money", "mean", "mean", "risk", "late", "quantile", "money"), (1, 3, 5, 7)),
)


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("kinds", "scoped"), ROWS)
def test_thousands_of_tasks(kinds: tuple[str, ...], scoped: tuple[int, ...], order: str, defer: bool) -> None:
    n = 3_000 if order == "C" else 30_000
    market = random_market(7, n, 4, kinds, defer=defer, scoped=scoped, room=0.03, order=order)
    answer = solve(market)
    check(market, answer)
    assert (answer.multipliers > 0).any()
    # Screening, not the whole programme: few tasks are left to be split.
    assert answer.split.among.size <= dual.FEW + dual.FEW_A_ROW * len(kinds)
    assert answer.passes <= 6


def windows(n: int, k: int) -> Memory:
    """A budget for each hour, some tight."""
    rng = np.random.default_rng(1)
    hour = rng.integers(0, k, n).astype(np.uint64)
    return bare(
        rng.gamma(1.0, 6.0, n),
        rng.random((n, 4)),
        [rng.gamma(1.0, 1.0, (n, 4))],
        rng.random(k) * n / k * 0.6,
        plane=np.zeros(k, dtype=np.int64),
        scoped=np.ones(k, dtype=np.bool_),
        member=np.uint64(1) << hour,
    )


@pytest.mark.parametrize(("n", "k"), [(8_000, 24), (8_000, 40)])
def test_a_budget_for_each_hour(n: int, k: int) -> None:
    market = windows(n, k)
    answer = solve(market)
    check(market, answer)
    assert (answer.multipliers > 0).sum() >= k // 2
    # Hours have nothing to do with one another: each alone has the same price.
    for j in (0, k - 1):
        own = np.flatnonzero(market.planes.member == np.uint64(1 << j))
        p = market.planes.take(own)
        alone = bare(p.value, p.quality, p.amounts, market.rows.limits[[j]])
        assert solve(alone).multipliers[0] == pytest.approx(answer.multipliers[j], rel=1e-9)


# --- degenerate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_many_copies_of_five_tasks(k: int, defer: bool) -> None:
    """Five types, exact ties by the ten thousand; the five as a weighted market have the same answer."""
    n, rng = 100_000, np.random.default_rng(2)
    kind = rng.integers(0, 5, n)
    quality, planes, value = (
        rng.random((5, 3)),
        [rng.random((5, 3)) * 2 for _ in range(k)],
        rng.random(5) * 5 + 2,
    )
    limits = [(0.5 * p.min(axis=1) + 0.5 * p.mean(axis=1))[kind].sum() for p in planes]
    market = bare(value[kind], quality[kind], [p[kind] for p in planes], limits, defer=defer)
    answer = solve(market)
    mix = check(market, answer)
    five = bare(value, quality, planes, limits, defer=defer)
    few = replace(five, planes=replace(five.planes, weight=np.bincount(kind).astype(float)))
    assert answer.objective == pytest.approx(planner(few), rel=1e-9)
    assert (np.bincount(mix.task) > 1).sum() <= 3 * 5 * (k + 1)


@pytest.mark.parametrize(("i", "k"), [(3, 1), (4, 2)])
def test_one_value_and_coarse_numbers(i: int, k: int) -> None:
    """Tens of thousands of tasks of one V; quality in tenths, which floats cannot hold, costs in quarters."""
    n, rng = 30_000, np.random.default_rng(2)
    quality = rng.integers(0, 11, (n, i)) / 10
    planes = [rng.integers(0, 9, (n, i)) / 4 for _ in range(k)]
    limits = [0.6 * p.min(axis=1).sum() + 0.4 * p.mean(axis=1).sum() for p in planes]
    market = bare(np.full(n, 5.0), quality, planes, limits)
    check(market, solve(market))


def test_ties_at_a_price_of_nothing_are_settled_as_the_certificate_says() -> None:
    """Uses alike in all but risk tie where risk is free; the allocation must be the one whose risk is reported."""
    market = random_market(10049, 337, 3, ("risk",), "ties", room=0.1)
    answer = solve(market)
    assert answer.multipliers.tolist() == [0.0]
    check(market, answer)


# --- magnitudes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defer", [True, False])
def test_heavy_tails(defer: bool) -> None:
    n, rng = 20_000, np.random.default_rng(3)
    cost = rng.pareto(1.1, (n, 4)) + 0.01
    limits = [0.1 * n if defer else 1.05 * cost.min(axis=1).sum()]
    market = bare(rng.pareto(1.1, n) + 0.1, rng.random((n, 4)), [cost], limits, defer=defer)
    check(market, solve(market))


@pytest.mark.parametrize("per_task", [1e-6, 1e-3, 0.1, 1.0])
def test_amounts_over_twelve_orders_of_magnitude(per_task: float) -> None:
    n, rng = 20_000, np.random.default_rng(4)
    wide = 10.0 ** rng.uniform(-6, 6, (n, 4))
    market = bare(rng.gamma(1.0, 6.0, n), rng.random((n, 4)), [wide], [per_task * n])
    check(market, solve(market))


@pytest.mark.parametrize("times", [1e-9, 1e9])
@pytest.mark.parametrize("row", [0, 1])
def test_units_of_a_row_do_not_matter(row: int, times: float) -> None:
    market = random_market(5, 5000, 4, ("money", "mean", "risk"))
    p, rows = market.planes, market.rows
    amounts, declared = list(p.amounts), list(p.declared)
    amounts[row], declared[row] = amounts[row] * times, declared[row] / times
    limits, offset = rows.limits.copy(), rows.offset.copy()
    limits[row] *= times
    offset[row] *= times
    other = replace(
        market,
        planes=replace(p, amounts=tuple(amounts), declared=tuple(declared)),
        rows=replace(rows, limits=limits, offset=offset),
    )
    here, there = solve(market), solve(other)
    check(other, there)
    assert (here.multipliers[:2] > 0).all()
    expected = here.multipliers.copy()
    expected[row] /= times
    assert there.multipliers == pytest.approx(expected, rel=1e-9)
    assert there.objective == pytest.approx(here.objective, rel=1e-9)


@pytest.mark.parametrize("times", [1e-3, 1e9])
def test_more_of_the_same_tasks_changes_no_price(times: float) -> None:
    """Weights and limits times a number; and money in another unit scales all prices."""
    market = random_market(5, 5000, 4, ("money", "mean", "risk"))
    here, p = solve(market), market.planes
    more = replace(
        market,
        planes=replace(p, weight=p.weight * times),
        rows=replace(market.rows, limits=market.rows.limits * times),
    )
    assert solve(more).multipliers == pytest.approx(here.multipliers, rel=1e-9)
    dear = replace(
        market, planes=replace(p, value=p.value * times, declared=tuple(d * times for d in p.declared))
    )
    assert solve(dear).multipliers == pytest.approx(here.multipliers * times, rel=1e-9)


# --- feasible by little, and not at all ----------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0.05, 0.01, 1e-3, 0.0])
def test_a_bound_that_is_only_just_possible(spare: float) -> None:
    """Nobody may defer, and the budget is hardly more than what the cheapest uses take. A sample of it may be impossible."""
    n, rng = 20_000, np.random.default_rng(0)
    quality, cost = rng.random((n, 3)), rng.gamma(1.0, 1.0, (n, 3))
    market = bare(np.full(n, 5.0), quality, [cost], [cost.min(axis=1).sum() * (1 + spare)], defer=False)
    answer = solve(market)
    check(market, answer)
    assert answer.multipliers[0] > 0


def test_what_cannot_be_met(path: str) -> None:
    n, rng = 300, np.random.default_rng(0)
    quality, cost = rng.random((n, 3)), rng.gamma(1.0, 1.0, (n, 3))
    value, least = np.full(n, 5.0), float(cost.min(axis=1).sum())
    with pytest.raises(Unbounded):
        solve(bare(value, quality, [cost], [0.999 * least], defer=False))
    with pytest.raises(Unbounded):
        solve(bare(value, quality, [cost], [-1.0]))
    # Exactly two different totals of one plane; or more than there is.
    twice = {"plane": np.zeros(2, dtype=np.int64), "exactly": np.ones(2, dtype=np.bool_)}
    for defer in (True, False):
        with pytest.raises(Unbounded):
            solve(bare(value, quality, [cost, cost], [1.2 * least, 1.3 * least], defer=defer, **twice))
        with pytest.raises(Unbounded):
            solve(bare(value, quality, [cost], [1.01 * cost.max(axis=1).sum()], defer=defer, exactly=[True]))
    check(bare(value, quality, [cost], [0.0]), solve(bare(value, quality, [cost], [0.0])), 0.0)


def test_the_least_bound_is_named_among_many_tasks_and_will_do() -> None:
    n, rng = 20_000, np.random.default_rng(0)
    cost = rng.gamma(1.0, 1.0, (n, 3))
    tasks, uses = Tasks(np.full(n, 5.0)), Uses(("a", "b", "c"), rng.random((n, 3)), cost[:, :, None])
    least = float(cost.min(axis=1).mean())
    row = Constraint("budget", 0.5 * least)
    with pytest.raises(InfeasibleError, match="budget") as caught:
        discover(tasks, uses, [row], defer=False)
    assert caught.value.constraint == row.name
    assert caught.value.least == pytest.approx(least, rel=1e-9)
    clearing = discover(tasks, uses, [replace(row, bound=caught.value.least)], defer=False)
    assert clearing.certificate.max_violation <= 1e-6


def test_rows_that_contradict_one_another_are_named_among_many_tasks() -> None:
    n, rng = 2_000, np.random.default_rng(0)
    cost = rng.random((n, 3))
    tasks, uses = Tasks(np.full(n, 5.0)), Uses(("a", "b", "c"), rng.random((n, 3)), cost[:, :, None])
    rows = [Constraint("budget", 0.3, exactly=True), Constraint("budget", 0.4, exactly=True)]
    with pytest.raises(
        InfeasibleError, match=r"exactly budget 0.4 usd/task cannot be met given exactly budget 0.3"
    ) as caught:
        discover(tasks, uses, rows)
    assert caught.value.least == pytest.approx(0.3, rel=1e-6)


# --- little and bad input ------------------------------------------------------------------------------------------


def test_without_rows_everybody_gets_the_best() -> None:
    market = random_market(1, 5000, 3, ())
    answer = solve(market)
    assert (answer.dual, answer.multipliers.size, answer.passes) == (answer.objective, 0, 1)
    check(market, answer)
    assert answer.objective == pytest.approx(dual_at(market, np.zeros(0)))


@pytest.mark.parametrize("defer", [True, False])
def test_without_tasks_nothing_costs_anything(path: str, defer: bool) -> None:
    answer = solve(bare(np.zeros(0), np.zeros((0, 2)), [np.zeros((0, 2))], [1.0], defer=defer))
    assert answer.multipliers.tolist() == [0.0]
    assert answer.objective == answer.dual == 0.0


def test_nothing_is_allowed() -> None:
    market = bare(np.ones(300), np.full((300, 2), np.nan), [np.ones((300, 2))], [1.0])
    answer = solve(market)
    assert (answer.objective, answer.dual) == (0.0, 0.0)
    assert (Mix.of(market, answer).use == -1).all()
    with pytest.raises(QuantityError, match="task 0 has no allowed use"):
        solve(replace(market, defer=False))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_named_wherever_it_stands(bad: float) -> None:
    market = random_market(5, 3000, 3, ("money", "risk"), masked=0.0)
    market.planes.amounts[2][2345, 1] = bad
    with pytest.raises(QuantityError, match="plane 2 of task 2345, use 1 is not finite"):
        solve(market)


def test_a_row_nobody_is_charged_by_has_no_price() -> None:
    market = random_market(5, 3000, 3, ("money", "risk", "late"), scoped=(1,))
    nobody = replace(market, planes=replace(market.planes, member=np.zeros(1, dtype=np.uint64)))
    nobody.planes.amounts[3][:] = 0.0
    nobody.rows.limits[:] = [0.3 * market.rows.limits[0], 0.0, 1.0]
    nobody.rows.offset[2] = 0.0
    answer = solve(nobody)
    check(nobody, answer)
    assert answer.multipliers[0] > 0
    assert answer.multipliers[1:].tolist() == [0.0, 0.0]


# --- laws ----------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bits() -> None:
    markets = [random_market(9, 20_000, 4, ("money", "mean", "risk"), scoped=(1,)) for _ in range(2)]
    one, two = (solve(market) for market in markets)
    assert (one.multipliers == two.multipliers).all()
    assert (one.dual, one.objective, one.steps) == (two.dual, two.objective, two.steps)
    np.testing.assert_array_equal(one.split.share, two.split.share)


@pytest.mark.parametrize("n", [500, 20_000])
def test_the_order_of_tasks_does_not_matter(n: int) -> None:
    market = random_market(9, n, 4, ("money", "mean", "risk"), scoped=(1,))
    order = np.random.default_rng(0).permutation(n)
    other = replace(market, planes=market.planes.take(order))
    here, there = solve(market), solve(other)
    assert (here.multipliers > 0).any()
    assert there.multipliers == pytest.approx(here.multipliers, rel=1e-9, abs=1e-12)
    assert there.objective == pytest.approx(here.objective, rel=1e-11)


def test_either_layout_and_precision_has_the_same_prices() -> None:
    rows = {"kinds": ("money", "mean"), "scoped": (1,), "masked": 0.1}
    plain = solve(random_market(9, 5000, 4, **rows))
    turned = solve(random_market(9, 5000, 4, order="F", **rows))
    assert turned.multipliers == pytest.approx(plain.multipliers, rel=1e-12)
    single = random_market(9, 5000, 4, number=np.float32, **rows)
    answer = solve(single)
    check(single, answer)
    assert answer.multipliers == pytest.approx(plain.multipliers, rel=1e-3)


@settings(max_examples=60)
@given(markets(exactly=False), st.data(), st.sampled_from((1e-1, 1e-3)))
def test_a_price_is_the_slope_of_the_optimum(
    path: str, market: Memory, data: st.DataObject, step: float
) -> None:
    """Between the one-sided slopes against the row's limit, which a concave optimum has on either side."""
    k = data.draw(st.integers(0, len(market.rows) - 1))
    answer, rows = solve(market), market.rows
    h = step * (abs(float(rows.limits[k])) + 1.0)
    tol = 1e-7 * stake(market) / h

    def at(limit: float) -> float | None:
        limits = rows.limits.copy()
        limits[k] = limit
        return planner(replace(market, rows=replace(rows, limits=limits)))

    here, more, less = at(rows.limits[k]), at(rows.limits[k] + h), at(rows.limits[k] - h)
    assert here is not None
    assert more is not None
    assert (more - here) / h <= answer.multipliers[k] + tol
    if less is not None:
        event("both sides")
        assert answer.multipliers[k] <= (here - less) / h + tol


@settings(max_examples=30)
@given(SEEDS, st.booleans())
def test_the_more_there_is_the_less_it_costs(path: str, seed: int, defer: bool) -> None:
    """One budget: its price falls as it grows, and ends at exactly 0."""
    market = random_market(seed, 60, 3, ("money",), room=0.0, defer=defer)
    prices = []
    for extra in (0.0, 0.1, 0.3, 0.6, 1.0, 100.0):
        limits = market.rows.limits + extra * 10
        prices.append(solve(replace(market, rows=replace(market.rows, limits=limits))).multipliers[0])
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(prices))
    assert prices[-1] == 0.0


def test_each_pass_reports_the_gap_so_far() -> None:
    market, seen = random_market(9, 20_000, 4, ("money", "mean")), []
    answer = solve(market, on_pass=lambda number, gap, mu: seen.append((number, gap, mu.size)))
    numbers = [number for number, _, _ in seen]
    assert numbers == sorted(numbers)
    assert seen[-1][1] == pytest.approx(answer.dual - answer.objective)
    assert {size for _, _, size in seen} == {2}
    assert all(gap >= -1e-9 * abs(answer.dual) for _, gap, _ in seen)


@given(markets(exactly=False, styles=("smooth", "twins")), SEEDS)
def test_no_prices_are_better_than_those_found(path: str, market: Memory, seed: int) -> None:
    """D is convex: around its minimum it is nowhere lower."""
    answer, rng = solve(market), np.random.default_rng(seed)
    assume(np.isfinite(answer.dual))
    for size in (1e-6, 1e-3, 0.1, 10.0):
        near = np.maximum(answer.multipliers + size * rng.normal(size=len(market.rows)), 0.0)
        assert dual_at(market, near) >= answer.dual - 1e-9 * stake(market)


@given(markets())
def test_totals_of_a_mix_are_those_of_the_answer(market: Memory) -> None:
    answer = solve(market)
    mix = Mix.of(market, answer)
    mass = np.broadcast_to(market.planes.weight, len(market))[mix.task] * mix.share
    objective, usage, served = totals(market, mix.task, mix.use, mass)
    assert answer.objective == pytest.approx(objective, rel=1e-9, abs=1e-9 * stake(market))
    np.testing.assert_allclose(answer.usage, usage, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(answer.served, served, rtol=1e-9, atol=1e-8)
