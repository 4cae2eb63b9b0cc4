"""The kernels against plain numpy, written out again: sums, choices, curvature, and what a box of prices decides."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from economies import SEEDS, economies, price_vectors
from markets import (
    KINDS,
    Floats,
    allowed,
    charge,
    chosen,
    net,
    random_market,
    scope,
    stake,
    totals,
    weights,
    worth,
)
from walras.equation import Charge, after_charges, choose, surplus
from walras.errors import QuantityError
from walras.market import memory, sweep
from walras.market.memory import Memory
from walras.market.planes import Planes, Rows, planes_of, tables

STYLES = ("smooth", "ties", "twins", "dominated")
SIZES = (1, 2, 7, 30, sweep.TILE - 1, sweep.TILE, sweep.TILE + 1, 2 * sweep.TILE, 2 * sweep.TILE + 91)


@st.composite
def markets(draw: st.DrawFn, styles: Sequence[str] = STYLES, sizes: Sequence[int] = SIZES) -> Memory:
    """Any market, in either precision and layout."""
    kinds = tuple(draw(st.lists(st.sampled_from(KINDS), max_size=4)))
    return random_market(
        draw(SEEDS),
        draw(st.sampled_from(sizes)),
        draw(st.integers(1, 4)),
        kinds,
        draw(st.sampled_from(styles)),
        defer=draw(st.booleans()),
        scoped=tuple(k for k in range(len(kinds)) if draw(st.booleans())),
        masked=draw(st.sampled_from((0.0, 0.2))),
        number=draw(st.sampled_from((np.float64, np.float32))),
        order=draw(st.sampled_from(("C", "F"))),
    )


def prices(market: Memory, seed: int) -> Floats:
    """Some at 0, which the kernels skip, and some below, as those of rows met exactly may be."""
    rng = np.random.default_rng(seed)
    k = len(market.rows)
    return rng.gamma(1.0, 2.0, k) * rng.choice([0.0, 1.0, 1.0, -0.5], k)


def margins(market: Memory, mu: Floats, scale: float) -> Floats:
    """By how much the best choice of each task beats the next, deferring included, (N,)."""
    values = net(market, mu, scale)
    if market.defer:
        values = np.column_stack((values, np.zeros(len(market))))
    values = np.sort(np.column_stack((values, np.full((len(market), 1), -np.inf))), axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(values[:, -1]), values[:, -1] - values[:, -2], np.inf)


def of_choices(market: Memory, use: Any, keep: Any = None) -> tuple[float, Floats, Floats]:
    mass = weights(market) if keep is None else weights(market) * keep
    return totals(market, np.arange(len(market)), use, mass)


def close(a: Any, b: Any, market: Memory, tolerance: float = 1e-12) -> None:
    """To round-off of sums as large as the largest that this market can have."""
    largest = max(stake(market), *(float(weights(market) @ np.abs(charge(market, k)).max(axis=1)) for k in range(len(market.rows))), 1.0)  # fmt: skip
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=tolerance * largest)


@settings(max_examples=150)
@given(markets(), SEEDS, st.sampled_from((1.0, 0.0)))
def test_best_responses_and_their_sums(market: Memory, seed: int, scale: float) -> None:
    """`pick` takes a best use and `respond` adds up just what `pick` takes; but for round-off, numpy takes the same."""
    mu = prices(market, seed)
    use = market.choices(mu, scale)
    values = net(market, mu, scale)
    got = np.where(use >= 0, values[np.arange(len(market)), np.maximum(use, 0)], 0.0)
    best = np.maximum(values.max(axis=1), 0.0) if market.defer else values.max(axis=1)
    np.testing.assert_allclose(got, best, rtol=1e-9, atol=1e-11)
    clear = margins(market, mu, scale) > 1e-9
    event(f"all clear: {clear.all()}")
    assert (use[clear] == chosen(market, mu, scale)[clear]).all()
    assert market.defer or (use >= 0).all()

    sums = market.sums(mu, scale, 0.0, np.ones(len(market.rows)), moments=True)
    worth_, usage, served = of_choices(market, use)
    close(sums.worth, worth_, market)
    close(sums.usage, usage, market)
    close(sums.served, served, market)
    assert (sums.curvature == 0).all()
    taken = np.array(
        [
            np.where(use >= 0, charge(market, k)[np.arange(len(market)), np.maximum(use, 0)], 0.0)
            for k in range(len(market.rows))
        ]
    ).reshape(len(market.rows), len(market))
    np.testing.assert_allclose(sums.moments, (weights(market) ** 2 * taken) @ taken.T, rtol=1e-9, atol=1e-9)


@given(markets(styles=("ties",)), SEEDS)
def test_ties_go_to_deferring_and_then_to_the_first_use(market: Memory, seed: int) -> None:
    """At prices of 0 and 1 all numbers are exact, so ties are real ones."""
    mu = np.random.default_rng(seed).integers(0, 2, len(market.rows)) * 1.0
    event(f"ties: {(margins(market, mu, 1.0) == 0).any()}")
    assert (market.choices(mu) == chosen(market, mu)).all()


def test_a_use_as_good_as_nothing_is_deferred_and_of_twins_the_first_is_taken() -> None:
    market = bare([[1.0, 1.0], [3.0, 3.0], [2.0, 2.5]], [[[1.0, 1.0], [2.0, 2.0], [1.0, 1.5]]])
    assert market.choices(np.array([1.0])).tolist() == [-1, 0, 0]
    assert replace(market, defer=False).choices(np.array([1.0])).tolist() == [0, 0, 0]


def bare(
    quality: Any, planes: Any, *, limits: Any = None, declared: Any = None, defer: bool = True, **rows: Any
) -> Memory:
    """A market from plain tables: one row on each plane, V = 1, nothing declared."""
    quality = np.array(quality, dtype=float)
    amounts = tuple(np.array(plane, dtype=float) for plane in planes)
    n, k = quality.shape[0], len(amounts)
    table: dict[str, Any] = {
        "plane": np.arange(k),
        "level": np.full(k, np.nan),
        "offset": np.zeros(k),
        "limits": np.zeros(k) if limits is None else np.array(limits, dtype=float),
        "exactly": np.zeros(k, dtype=np.bool_),
        "scoped": np.zeros(k, dtype=np.bool_),
    }
    member = rows.pop("member", np.zeros(1, dtype=np.uint64))
    declared = tuple(np.zeros(1) for _ in amounts) if declared is None else declared
    planes_ = Planes(np.ones(n), quality, amounts, declared, np.ones(1), member)
    return Memory(planes_, Rows(**(table | rows)), defer)


@settings(max_examples=100)
@given(markets(styles=("smooth", "dominated")), SEEDS, st.sampled_from((0.02, 0.3, 3.0)))
def test_curvature_is_how_densely_tasks_are_about_to_change(
    market: Memory, seed: int, bandwidth: float
) -> None:
    """Each task with a margin below bandwidth · Σ_k yardstick_k·|d_k| adds d·dᵀ / (2·bandwidth·Σ…)."""
    mu, k = prices(market, seed), len(market.rows)
    yardstick = np.random.default_rng(seed + 1).random(k) + 0.1
    charges = np.array([charge(market, j) for j in range(k)]).reshape(k, *market.planes.quality.shape)
    want = np.zeros((k, k))
    values = net(market, mu)
    for x, w in enumerate(weights(market)):
        options = [(v, charges[:, x, i]) for i, v in enumerate(values[x]) if np.isfinite(v)]
        options += [(0.0, np.zeros(k))] * market.defer
        if len(options) < 2:
            continue
        options.sort(key=lambda option: -option[0])
        (best, first), (second, other) = options[:2]
        if len(options) > 2 and second - options[2][0] < 1e-9:
            return  # which of two equals comes second is a matter of round-off
        d = first - other
        reach = bandwidth * float(yardstick @ np.abs(d))
        if abs(best - second - reach) < 1e-9 * (1 + reach):
            return  # so is whether it is within reach
        if best - second < reach:
            want += w * np.outer(d, d) / (2 * reach)
    sums = market.sums(mu, 1.0, bandwidth, yardstick)
    event(f"some: {bool(want.any())}")
    np.testing.assert_allclose(sums.curvature, want, rtol=1e-7, atol=1e-8 * (1 + np.abs(want).max(initial=0)))
    plain = market.sums(mu, 1.0, 0.0, yardstick)
    assert plain.worth == sums.worth
    assert (plain.usage == sums.usage).all()


@settings(max_examples=150)
@given(markets(), SEEDS, st.sampled_from((1.0, 0.0)), st.sampled_from((0.0, 1e-3, 0.05, 1.0)))
def test_what_a_box_decides_is_decided_everywhere_in_it(
    market: Memory, seed: int, scale: float, size: float
) -> None:
    """Anywhere in the box, corners too: the decided choose what they were counted with; theirs and the others' sums are all."""
    rng, k = np.random.default_rng(seed), len(market.rows)
    middle, radius = prices(market, seed), size * rng.random(k) * rng.choice([1.0, 1.0, 0.0], k)
    sums, near = market.screen(middle, radius, scale)
    assert near.ids is not None
    assert (np.diff(near.ids) > 0).all()
    decided = np.ones(len(market), dtype=np.bool_)
    decided[near.ids] = False
    event(f"decided: {'all' if decided.all() else 'some' if decided.any() else 'none'}")
    use = market.choices(middle, scale)
    want = of_choices(market, use, decided)
    close(sums.worth, want[0], market)
    close(sums.usage, want[1], market)
    close(sums.served, want[2], market)
    for _ in range(6):
        at = middle + radius * (rng.choice([-1.0, 1.0], k) if rng.random() < 0.5 else rng.uniform(-1, 1, k))
        there = market.choices(at, scale)
        assert (there[decided] == use[decided]).all()
        # Not only by the kernel's own reckoning.
        values = net(market, at, scale)[decided]
        own = use[decided]
        got = np.where(own >= 0, values[np.arange(own.size), np.maximum(own, 0)], 0.0)
        best = np.maximum(values.max(axis=1, initial=-np.inf), 0.0 if market.defer else -np.inf)
        assert (got >= best - 1e-11 * (1 + np.abs(best))).all()
        part, whole = near.sums(at, scale, 0.0, radius), market.sums(at, scale, 0.0, radius)
        close(sums.worth + part.worth, whole.worth, market)
        close(sums.usage + part.usage, whole.usage, market)
        close(sums.served + part.served, whole.served, market)


@settings(max_examples=50)
@given(markets(), SEEDS)
def test_boxes_within_boxes_keep_count(market: Memory, seed: int) -> None:
    """A smaller box on what a larger one left: ids are those of the whole market, and sums add up."""
    rng, k = np.random.default_rng(seed), len(market.rows)
    middle, radius = prices(market, seed), 0.5 * rng.random(k)
    outer, near = market.screen(middle, radius, 1.0)
    inner, nearer = near.screen(middle + 0.5 * radius, 0.3 * radius, 1.0)
    assert near.ids is not None
    assert nearer.ids is not None
    assert np.isin(nearer.ids, near.ids).all()
    assert (nearer.planes.value == market.planes.value[nearer.ids]).all()
    np.testing.assert_array_equal(nearer.planes.quality, market.planes.quality[nearer.ids])
    at = middle + 0.5 * radius
    sums = outer + inner + nearer.sums(at, 1.0, 0.0, radius)
    whole = market.sums(at, 1.0, 0.0, radius)
    close(sums.worth, whole.worth, market)
    close(sums.usage, whole.usage, market)
    close(sums.served, whole.served, market)


def test_a_box_is_not_only_right_but_tight() -> None:
    """Two uses change places at μ = 1: a box that ends before it decides, one that reaches it does not."""
    market = bare([[1.0, 2.0]], [[[0.0, 1.0]]], defer=False)
    for radius, left in ((0.49, 0), (0.51, 1)):
        assert len(market.screen(np.array([0.5]), np.array([radius]), 1.0)[1]) == left
    # Deferring is a choice like any other: this use stops paying at μ = 2.
    alone = bare([[2.0]], [[[1.0]]])
    for radius, left in ((0.99, 0), (1.01, 1)):
        assert len(alone.screen(np.array([1.0]), np.array([radius]), 1.0)[1]) == left
        assert len(replace(alone, defer=False).screen(np.array([1.0]), np.array([radius]), 1.0)[1]) == 0
    # An offset counts: what is served is charged 1 − 3, so that it stops paying when μ falls to −1.
    credited = bare([[-2.0]], [[[1.0]]], offset=np.array([3.0]))
    for radius, left in ((0.99, 0), (1.01, 1)):
        assert len(credited.screen(np.array([2.0]), np.array([radius]), 1.0)[1]) == left


def test_the_last_bit_of_membership_is_a_row_like_any_other() -> None:
    """64 rows on one plane, each scoped to the tasks with its bit."""
    n, k = 64, 64
    member = np.uint64(1) << np.arange(n, dtype=np.uint64)
    rows = {
        "plane": np.zeros(k, dtype=np.int64),
        "level": np.full(k, np.nan),
        "offset": np.zeros(k),
        "limits": np.zeros(k),
        "exactly": np.zeros(k, dtype=np.bool_),
        "scoped": np.ones(k, dtype=np.bool_),
        "member": member,
    }
    market = bare(np.full((n, 1), 10.0), [np.arange(1.0, n + 1)[:, None]], **rows)
    sums = market.sums(np.zeros(k), 1.0, 0.0, np.ones(k))
    assert sums.usage.tolist() == list(range(1, n + 1))
    assert sums.served.tolist() == [1.0] * k
    mu = np.zeros(k)
    mu[63] = 1.0
    assert market.choices(mu).tolist() == [0] * 63 + [-1]
    _, near = market.screen(np.zeros(k), np.full(k, 0.5), 1.0)
    assert near.ids is not None
    assert near.ids.tolist() == list(range(19, 64))  # 10 − 0.5·amount ≤ 0
    everybody = replace(market, planes=replace(market.planes, member=member[63:]))
    assert everybody.sums(np.zeros(k), 1.0, 0.0, np.ones(k)).usage.tolist() == [0.0] * 63 + [n * (n + 1) / 2]


def test_late_is_later_than_the_level() -> None:
    """Not as late as it; and one plane may be charged both ways by two rows."""
    level = {
        "plane": np.zeros(2, dtype=np.int64),
        "level": np.array([2.0, np.nan]),
        "offset": np.array([0.25, 0.0]),
    }
    market = bare(np.full((3, 1), 9.0), [[[1.0], [2.0], [2.5]], np.zeros((3, 1))], **level)
    sums = market.sums(np.zeros(2), 1.0, 0.0, np.ones(2))
    assert sums.usage.tolist() == [1 - 3 * 0.25, 5.5]
    np.testing.assert_allclose(net(market, np.array([4.0, 1.0]))[:, 0], [9.0, 8.0, 3.5])
    assert market.sums(np.array([30.0, 0.0]), 1.0, 0.0, np.ones(2)).usage.tolist() == [-0.5, 3.0]


@settings(max_examples=100)
@given(economies(min_rows=0, max_rows=3), SEEDS)
def test_the_kernels_choose_by_the_equation(economy: Any, seed: int) -> None:
    """The same rule in two places: best values agree, and so do choices wherever they are clear."""
    vector = price_vectors(economy, np.random.default_rng(seed))
    mu = np.array([price.multiplier for price in vector.discovered])
    market = Memory(*planes_of(economy.tasks, economy.uses, economy.rows, economy.declared), economy.defer)
    charges = [Charge.of(row, economy.tasks, economy.uses) for row in economy.rows]
    values = after_charges(surplus(economy.tasks, economy.uses, economy.declared), charges, mu)
    choice, use = choose(values, defer=economy.defer), market.choices(mu)
    got = np.where(use >= 0, values[np.arange(use.size), np.maximum(use, 0)], 0.0)
    np.testing.assert_allclose(got, choice.value, rtol=1e-9, atol=1e-9)
    clear = margins(market, mu, 1.0) > 1e-8
    assert (use[clear] == choice.use[clear]).all()


# --- memory: blocks and threads ------------------------------------------------------------------------------------


def everything(market: Memory) -> list[Any]:
    """All that passes over a market return."""
    mu, k = prices(market, 3), len(market.rows)
    sums = market.sums(mu, 1.0, 0.1, np.ones(k), moments=True)
    part, near = market.screen(mu, np.full(k, 0.1), 1.0)
    found = [
        sums.worth,
        sums.usage,
        sums.served,
        sums.curvature,
        sums.moments,
        part.worth,
        part.usage,
        part.served,
    ]
    found += [near.ids, near.planes.value, near.planes.quality, *near.planes.amounts, market.choices(mu)]
    return found


@pytest.mark.parametrize("order", ["C", "F"])
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    market = random_market(1, 5000, 3, ("money", "quantile", "mean"), scoped=(2,), masked=0.1, order=order)
    alone = everything(market)
    for name, value in (("WORTH_A_THREAD", 0), ("BLOCKS", 16), ("SMALLEST", 300), ("LARGEST", 1000)):
        monkeypatch.setattr(memory, name, value)
    runs = []
    for threads in (1, 2, 5, 5):
        with ThreadPoolExecutor(threads) as pool:
            monkeypatch.setattr(memory, "_pool", lambda pool=pool: pool)
            runs.append(everything(market))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            np.testing.assert_array_equal(a, b)
    # In one piece sums differ by round-off, and choices and lists not at all.
    for a, b in zip(alone[:8], runs[0][:8], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9)
    for a, b in zip(alone[8:], runs[0][8:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_cover_everybody_once(monkeypatch: pytest.MonkeyPatch) -> None:
    market = random_market(2, 1001, 2, ("money",))
    monkeypatch.setattr(memory, "WORTH_A_THREAD", 0)
    for name, value in (("BLOCKS", 4), ("SMALLEST", 100), ("LARGEST", 300)):
        monkeypatch.setattr(memory, name, value)
    parts = market._blocks(lambda lo, hi: (lo, hi))
    assert parts == [(0, 250), (250, 500), (500, 750), (750, 1000), (1000, 1001)]


@pytest.mark.parametrize("number", [np.float64, np.float32])
@pytest.mark.parametrize("where", ["quality", "plane 2"])
def test_what_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch, number: Any, where: str) -> None:
    """The task, the use and the column; also from within a block, and among what a box has left."""
    market = random_market(5, 700, 3, ("money", "risk"), masked=0.1, number=number)
    p = market.planes
    assert allowed(market)[613, 1]
    column = p.quality if where == "quality" else p.amounts[2]
    column[613, 1] = np.inf
    everywhere = np.full(2, 100.0)
    with pytest.raises(QuantityError, match=rf"{where} of task 613, use 1 is not finite: -?inf"):
        market.screen(np.ones(2), everywhere, 1.0)
    if where != "quality":
        column[613, 1] = np.nan
        with pytest.raises(QuantityError, match=f"{where} of task 613, use 1 is not finite: nan"):
            market.screen(np.ones(2), everywhere, 1.0)
    for name, value in (("WORTH_A_THREAD", 0), ("BLOCKS", 4), ("SMALLEST", 100), ("LARGEST", 300)):
        monkeypatch.setattr(memory, name, value)
    with pytest.raises(QuantityError, match=f"{where} of task 613, use 1"):
        market.screen(np.ones(2), everywhere, 1.0)
    part = Memory(p.take(np.arange(600, 700)), market.rows, market.defer, np.arange(600, 700))
    with pytest.raises(QuantityError, match=f"{where} of task 613, use 1"):
        part.screen(np.ones(2), everywhere, 1.0)


def test_a_value_or_a_price_that_is_not_finite_is_named() -> None:
    market = random_market(5, 40, 3, ("money", "mean"), masked=0.0)
    for column in (market.planes.value, market.planes.declared[1]):
        kept, column[17] = column[17], np.nan
        with pytest.raises(QuantityError, match="the value or a price of task 17 is not finite"):
            market.screen(np.ones(2), np.ones(2), 1.0)
        column[17] = kept
    assert len(market.screen(np.ones(2), np.zeros(2), 1.0)[1]) == 0


def test_who_may_not_defer_and_has_nothing_is_named() -> None:
    market = bare([[1.0], [np.nan], [2.0], [np.nan]], [np.ones((4, 1))], defer=False)
    with pytest.raises(QuantityError, match=r"task 1 has no allowed use and may not defer \(2 such tasks\)"):
        market.sums(np.zeros(1), 1.0, 0.0, np.ones(1))
    assert replace(market, defer=True).sums(np.zeros(1), 1.0, 0.0, np.ones(1)).worth == 3.0
    part = Memory(market.planes.take(np.array([2, 3])), market.rows, False, np.array([2, 3]))
    with pytest.raises(QuantityError, match="task 3 has no allowed use"):
        part.sums(np.zeros(1), 1.0, 0.0, np.ones(1))


@given(markets(sizes=(40, 300, 603)), st.integers(1, 40))
def test_a_sample_stands_for_the_whole_weight(market: Memory, n: int) -> None:
    part = market.sample(n)
    assert len(part) == n
    assert part.weight == pytest.approx(market.weight)
    again = market.sample(n)
    np.testing.assert_array_equal(part.planes.value, again.planes.value)
    assert part.rows is market.rows


@given(markets(), SEEDS)
def test_precisions_agree_on_numbers_that_both_can_hold(market: Memory, seed: int) -> None:
    """Data in float32 is computed with in float64."""
    p = market.planes
    double = replace(
        market,
        planes=replace(
            p, quality=p.quality.astype(np.float64), amounts=tuple(a.astype(np.float64) for a in p.amounts)
        ),
    )
    mu = prices(market, seed)
    one, two = market.sums(mu, 1.0, 0.0, mu), double.sums(mu, 1.0, 0.0, mu)
    clear = margins(market, mu, 1.0).min(initial=np.inf) > 1e-9
    assert clear <= (market.choices(mu) == double.choices(mu)).all()
    close(one.worth - mu @ one.usage, two.worth - mu @ two.usage, market)
    if clear:
        close(one.usage, two.usage, market)
        close(one.served, two.served, market)


@given(markets(), SEEDS)
def test_scope_and_worth_of_the_helpers_are_those_of_the_tables(market: Memory, seed: int) -> None:
    """`dual.tables`, which few tasks are written down with."""
    table, charges, inside = tables(market.planes, market.rows)
    np.testing.assert_allclose(np.where(allowed(market), table, 0.0), worth(market), rtol=1e-12, atol=1e-12)
    assert np.isneginf(table[~allowed(market)]).all()
    for k in range(len(market.rows)):
        np.testing.assert_allclose(charges[k], charge(market, k), rtol=1e-12)
        assert (inside[k] == scope(market, k)).all()
