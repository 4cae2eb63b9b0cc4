"""Planes and rows: the market of the equation, in the form the kernels read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from economies import LATE, SEEDS, Economy, economies, price_vectors, random_economy
from markets import allowed, charge, net, random_market, scope, worth
from walras.equation import Charge, after_charges, surplus
from walras.errors import QuantityError, SettingsError
from walras.market.memory import Memory
from walras.market.planes import MAX_ROWS, Planes, planes_of
from walras.prices import Constraint, Scope
from walras.quantities import Labels, Tasks, Uses
from walras.risk import CVaR


def as_market(economy: Economy, numeraire: Any = "usd") -> Memory:
    planes, rows = planes_of(economy.tasks, economy.uses, economy.rows, economy.declared, numeraire)
    return Memory(planes, rows, economy.defer)


@settings(max_examples=150)
@given(economies(min_rows=0, max_rows=5), SEEDS, st.sampled_from(("usd", "compute")))
def test_net_values_by_both_roads(economy: Economy, seed: int, numeraire: Any) -> None:
    """Worth, each row's charges and net values at prices are those of `equation`; limits those of the constraints."""
    vector = price_vectors(economy, np.random.default_rng(seed))
    mu = np.array([price.multiplier for price in vector.discovered])
    market = as_market(economy, numeraire)
    tasks, uses = economy.tasks, economy.uses
    plain = surplus(tasks, uses, economy.declared, numeraire)
    charges = [Charge.of(row, tasks, uses) for row in economy.rows]
    assert (allowed(market) == uses.allowed).all()
    np.testing.assert_allclose(worth(market), np.where(uses.allowed, plain, 0.0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(net(market, mu), after_charges(plain, charges, mu), rtol=1e-11, atol=1e-11)
    for k, (row, own) in enumerate(zip(economy.rows, charges, strict=True)):
        table, members = np.zeros(uses.shape), row.scope.members(tasks)
        table[slice(None) if own.tasks is None else own.tasks] = own.per_use
        np.testing.assert_allclose(charge(market, k), table, rtol=1e-12, atol=1e-15)
        assert (scope(market, k) == (1.0 if members is None else members)).all()
        everybody = tasks.weight.sum() if members is None else tasks.weight[members].sum()
        assert market.rows.limits[k] == pytest.approx(
            0.0 if row.layer == "latency" else row.bound * everybody
        )
    assert market.weight == pytest.approx(tasks.weight.sum())


def plain_economy(n: int = 6, i: int = 3, number: Any = np.float64, order: Any = "C") -> tuple[Tasks, Uses]:
    """Two resources that lie apart in memory, everything allowed."""
    rng = np.random.default_rng(0)
    by_resource = rng.random((2, n, i)).astype(number)
    uses = Uses(
        names=tuple(f"use{c}" for c in range(i)),
        quality=np.array(rng.random((n, i)), dtype=number, order=order),
        amounts=np.moveaxis(by_resource, 0, 2),
        resources=("usd", "tools"),
        seconds=np.array(rng.random((n, i)) * 4, dtype=number, order=order),
        risk=np.array(rng.random((n, i)), dtype=number, order=order),
    )
    return Tasks(rng.random(n) * 9, weight=np.arange(1.0, n + 1)), uses


ROWS = (
    Constraint("budget", 0.5),
    Constraint("budget", 0.7, resource="tools"),
    Constraint("mean_sla", 2.0),
    Constraint("quantile_sla", 0.1, seconds=LATE),
    Constraint("risk_envelope", 0.3),
)


@pytest.mark.parametrize("number", [np.float64, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_nothing_is_copied_that_is_in_the_right_form(number: Any, order: Any) -> None:
    tasks, uses = plain_economy(number=number, order=order)
    planes, rows = planes_of(tasks, uses, ROWS)
    assert len(planes.amounts) == 4  # both latency rows charge one plane
    assert rows.plane[2] == rows.plane[3]
    sources = (uses.quality, uses.amount("usd"), uses.risk, uses.amount("tools"), uses.seconds)
    for plane, source in zip((planes.quality, *planes.amounts), sources, strict=True):
        assert plane.dtype == number
        assert np.shares_memory(plane, source)
    assert np.shares_memory(planes.value, tasks.value)
    assert np.shares_memory(planes.weight, tasks.weight)


@pytest.mark.parametrize("order", ["C", "F"])
def test_nothing_is_copied_on_the_way_into_the_kernels(order: Any) -> None:
    """`Uses` and `Tasks` broadcast their columns, which makes them read-only: no reason to copy them."""
    tasks, uses = plain_economy(order=order)
    width, _, value, quality, amounts, _, weight, _ = Memory(*planes_of(tasks, uses, ROWS))._columns
    assert width == 3
    sources = (uses.quality, uses.amount("usd"), uses.risk, uses.amount("tools"), uses.seconds)
    shared = [np.shares_memory(a, b) for a, b in zip((quality, *amounts[:4]), sources, strict=True)]
    assert shared == [True] * 5
    assert np.shares_memory(value, tasks.value)
    assert np.shares_memory(weight, tasks.weight)


def test_one_plane_in_double_makes_all_of_them_double() -> None:
    tasks, uses = plain_economy(number=np.float32)
    mixed = replace(uses, risk=uses.risk.astype(np.float64))
    planes, _ = planes_of(tasks, mixed, ROWS)
    assert {plane.dtype for plane in (planes.quality, *planes.amounts)} == {np.dtype(np.float64)}
    # What no row and no price reads does not count.
    planes, _ = planes_of(replace(tasks, risk_price=np.zeros(1)), mixed, ROWS[:3])
    assert {plane.dtype for plane in (planes.quality, *planes.amounts)} == {np.dtype(np.float32)}


def test_a_column_that_is_the_same_for_all_is_one_number() -> None:
    tasks, uses = plain_economy()
    one = Tasks(tasks.value, latency_price=np.array([0.5]), weight=np.array([2.0]))
    planes, rows = planes_of(one, uses, ROWS)
    assert planes.weight.tolist() == [2.0]
    assert [usd.size for usd in planes.declared] == [1] * 4
    assert planes.member.tolist() == [0]
    assert planes.total_weight() == 12.0
    assert rows.limits[0] == pytest.approx(0.5 * 12.0)


def test_what_is_not_charged_is_not_carried() -> None:
    """Only planes with a price or a row; without any, none."""
    tasks, uses = plain_economy()
    free = replace(tasks, risk_price=np.zeros(1))
    planes, rows = planes_of(free, uses, (), declared=(("usd", 0.0),))
    assert planes.amounts == ()
    assert len(rows) == 0
    planes, _ = planes_of(free, uses, (), declared=(("tools", 2.0), ("usd", 1.0)))
    assert len(planes.amounts) == 2
    planes, _ = planes_of(tasks, uses, (), numeraire="compute")
    assert planes.amounts == ()


def test_masked_uses_are_nan_and_the_caller_keeps_his_numbers() -> None:
    tasks, uses = plain_economy()
    known = uses.quality.copy()
    hidden = np.ones(uses.shape, dtype=np.bool_)
    hidden[2, 1] = False
    masked = replace(uses, allowed=hidden)
    planes, _ = planes_of(tasks, masked, ROWS)
    assert np.isnan(planes.quality[2, 1])
    assert np.isnan(planes.quality).sum() == 1
    assert (uses.quality == known).all()


def test_a_lateness_that_is_estimated_is_its_own_plane() -> None:
    tasks, uses = plain_economy()
    late = np.full(uses.shape, 0.25)
    planes, rows = planes_of(
        tasks, replace(uses, late={LATE: late}), (ROWS[3], replace(ROWS[3], seconds=1.0))
    )
    assert np.shares_memory(planes.amounts[rows.plane[0]], late)
    assert np.isnan(rows.level[0])
    assert rows.level[1] == 1.0
    assert rows.offset.tolist() == [0.1, 0.1]


# --- parts ---------------------------------------------------------------------------------------------------------


def columns(planes: Planes) -> list[Any]:
    return [planes.value, planes.quality, *planes.amounts, *planes.declared, planes.weight, planes.member]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("number", [np.float64, np.float32])
def test_some_tasks_of_many(order: str, number: Any) -> None:
    planes = random_market(3, 50, 3, ("money", "mean"), scoped=(1,), order=order, number=number).planes
    rows = np.array([7, 3, 3, 49])
    taken, part = planes.take(rows), planes.part(10, 30)
    for column, own, piece in zip(columns(planes), columns(taken), columns(part), strict=True):
        assert own.dtype == column.dtype
        if column.size == 1:
            assert own is column
            assert piece is column
            continue
        np.testing.assert_array_equal(own, column[rows])
        np.testing.assert_array_equal(piece, column[10:30])
        assert not np.shares_memory(own, column)
        assert np.shares_memory(piece, column)
        if column.ndim == 2:  # a copy keeps the layout, so that it is read as fast
            assert own.flags.c_contiguous == column.flags.c_contiguous
    assert len(planes.take(rows[:0])) == 0
    assert planes.take(rows[:0]).width == 3
    assert len(part) == 20
    assert planes.nbytes == sum(column.nbytes for column in columns(planes))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("seed", range(6))
def test_parts_put_together_are_the_whole(order: str, seed: int) -> None:
    planes = random_market(seed, 60, 3, ("money", "mean"), scoped=(1,), order=order).planes
    again = Planes.concatenate(
        [planes.part(0, 1), planes.part(1, 1), planes.part(1, 40), planes.part(40, 60)]
    )
    for column, own in zip(columns(planes), columns(again), strict=True):
        np.testing.assert_array_equal(own, column)
        assert own.flags.c_contiguous == column.flags.c_contiguous
    assert again.total_weight() == pytest.approx(planes.total_weight())


def test_parts_with_a_number_of_their_own_become_a_column() -> None:
    one = random_market(1, 4, 2, ("money",)).planes
    parts = [replace(one, weight=np.array([2.0])), replace(one, weight=np.array([3.0])), one]
    both = Planes.concatenate(parts)
    assert both.weight.tolist() == [2.0] * 4 + [3.0] * 4 + np.broadcast_to(one.weight, 4).tolist()
    assert both.declared[0].tolist() == [1.0]
    assert Planes.concatenate(parts[:1]).weight.tolist() == [2.0]


# --- what cannot be ------------------------------------------------------------------------------------------------


def test_no_more_rows_than_bits() -> None:
    tasks, uses = plain_economy()
    tasks = replace(tasks, tenant=Labels(np.arange(6) % 2, ("a", "b")))
    rows = [Constraint("budget", 0.5, Scope(tenant="a"))] * MAX_ROWS
    planes, table = planes_of(tasks, uses, rows)
    assert len(table) == MAX_ROWS
    assert planes.member.tolist() == [2**64 - 1, 0] * 3
    with pytest.raises(SettingsError, match="65 constraints at once; at most 64"):
        planes_of(tasks, uses, [*rows, rows[0]])


def test_a_resource_nobody_knows() -> None:
    tasks, uses = plain_economy()
    with pytest.raises(QuantityError, match="no resource 'gpu'; there are usd, tools"):
        planes_of(tasks, uses, [Constraint("budget", 0.5, resource="gpu")])
    with pytest.raises(QuantityError, match="no resource 'gpu'"):
        planes_of(tasks, uses, (), declared=(("gpu", 1.0),))


def test_scopes_and_envelopes_need_their_columns() -> None:
    tasks, uses = plain_economy()
    for scoped, what in (
        (Scope(tenant="a"), "tenant"),
        (Scope(task_class="x"), "class"),
        (Scope(window=(0, 1)), "time"),
    ):
        with pytest.raises(SettingsError, match=what):
            planes_of(tasks, uses, [Constraint("budget", 0.5, scoped)])
    economy = random_economy(3, 8, 3, losses=True)
    with pytest.raises(QuantityError, match="losses by scenario and a density"):
        planes_of(economy.tasks, economy.uses, [Constraint("portfolio_envelope", 1.0, measure=CVaR(0.5))])


def test_a_label_that_no_task_carries_has_no_members() -> None:
    tasks, uses = plain_economy()
    tasks = replace(tasks, tenant=Labels(np.arange(6) % 2, ("a", "b")))
    planes, rows = planes_of(tasks, uses, [Constraint("budget", 0.5, Scope(tenant="c"))])
    assert rows.scoped.tolist() == [True]
    assert rows.limits.tolist() == [0.0]
    assert (planes.member == 0).all()
