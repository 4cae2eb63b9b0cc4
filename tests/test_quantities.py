"""The columns: what they refuse, and that reshaping them keeps each cell with its task and use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from economies import LATE, SEEDS, STYLES, random_economy
from walras.equation import DEFER
from walras.errors import QuantityError
from walras.quantities import Labels, Tasks, Uses, whole_plans

COLUMNS = ("quality", "amounts", "seconds", "risk", "irreversible_risk", "losses")


def uses(**columns: Any) -> Uses:
    """Three tasks, two uses, all cells known, unless said otherwise."""
    plain = {"names": ("small", "large"), "quality": np.ones((3, 2)), "amounts": np.ones((3, 2, 1))}
    return Uses(**plain | columns)


def spoiled(column: str, value: float) -> dict[str, Any]:
    shape = {"amounts": (3, 2, 1), "losses": (3, 2, 4)}.get(column, (3, 2))
    cells = np.ones(shape)
    cells[1, 1] = value
    return {column: cells} if column != "late" else {"late": {2.0: cells}}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [*COLUMNS, "late"])
def test_an_unknown_cell_is_named_unless_it_is_masked(column: str, value: float) -> None:
    name = "late[2]" if column == "late" else column
    with pytest.raises(QuantityError) as caught:
        uses(**spoiled(column, value))
    assert str(caught.value) == f"uses: {name} of task 1, use 'large' is not finite"
    masked = np.array([[True, True], [True, False], [True, True]])
    assert not uses(**spoiled(column, value), allowed=masked).allowed[1, 1]
    with pytest.raises(QuantityError, match="task 1, use 'large'"):
        uses(**spoiled(column, value), allowed=np.roll(masked, 1, axis=0))  # the mask is of another task


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"names": ("one",)}, "1 names for 2 columns"),
        ({"quality": np.ones(3)}, "quality has shape"),
        ({"amounts": np.ones((3, 2))}, "amounts has shape"),
        ({"amounts": np.ones((3, 2, 2))}, "amounts has shape"),
        ({"seconds": np.ones((2, 2))}, "seconds has shape"),
        ({"risk": np.ones(3)}, "risk has shape"),
        ({"irreversible_risk": np.ones((3, 3))}, "irreversible_risk has shape"),
        ({"allowed": np.ones((2, 2), dtype=np.bool_)}, "allowed has shape"),
        ({"losses": np.ones((3, 1, 4))}, "losses has shape"),
        ({"late": {2.0: np.ones((2, 2))}}, r"late\[2\] has shape"),
    ],
)
def test_columns_of_another_shape_are_refused(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(QuantityError, match=says):
        uses(**columns)


@pytest.mark.parametrize("column", ["value", "latency_price", "risk_price", "irreversible_price", "weight"])
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_what_a_task_is_worth_must_be_finite_and_not_negative(column: str, bad: float) -> None:
    columns = {"value": np.ones(3)} | {column: np.array([1.0, 1.0, bad])}
    with pytest.raises(QuantityError, match=f"{column} of task 2 is {bad}"):
        Tasks(**columns)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"value": np.ones((3, 2))}, "value has shape"),
        ({"latency_price": np.ones(2)}, "latency_price has shape"),
        ({"time": np.zeros(2)}, "time has shape"),
        ({"tenant": Labels(np.zeros(2, dtype=np.int64), ("a",))}, "tenant has shape"),
        ({"task_class": Labels.none(4)}, "class has shape"),
        ({"weight": np.array([1.0, 0.0, 1.0])}, "every weight must be > 0"),
    ],
)
def test_tasks_refuse_columns_that_do_not_fit(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(QuantityError, match=says):
        Tasks(**{"value": np.ones(3)} | columns)


def test_one_number_stands_for_all_tasks() -> None:
    tasks = Tasks(np.ones(3), risk_price=np.full(1, 2.0))
    assert len(tasks) == 3
    assert tasks.risk_price.tolist() == [2.0, 2.0, 2.0]
    assert tasks.latency_price.tolist() == [0.0, 0.0, 0.0]
    assert tasks.weight.tolist() == [1.0, 1.0, 1.0]


def test_labels() -> None:
    labels = Labels(np.array([1, -1, 0, 1]), ("a", "b"))
    assert labels.equal("b").tolist() == [True, False, False, True]
    assert labels.equal("c").tolist() == [False] * 4  # a name nobody has is not the absent one
    assert labels.take(np.array([2, 1])).codes.tolist() == [0, -1]
    assert not Labels.none(2).equal("a").any()


@given(SEEDS, st.sampled_from(STYLES), st.data())
def test_take_keeps_each_cell_with_its_task(seed: int, style: str, data: st.DataObject) -> None:
    economy = random_economy(seed, 6, 3, style, losses=True)
    rows = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9)))
    tasks, some = economy.tasks.take(rows), economy.uses.take(rows)
    assert some.shape == (rows.size, 3)
    for at, row in enumerate(rows):
        for column in (*COLUMNS, "allowed"):
            assert np.array_equal(
                getattr(some, column)[at], getattr(economy.uses, column)[row], equal_nan=column != "allowed"
            )
        for seconds, share in economy.uses.late.items():
            assert np.array_equal(some.late[seconds][at], share[row], equal_nan=True)
        for column in ("value", "latency_price", "risk_price", "irreversible_price", "weight", "time"):
            assert getattr(tasks, column)[at] == getattr(economy.tasks, column)[row]
        assert tasks.tenant.codes[at] == economy.tasks.tenant.codes[row]
        assert tasks.task_class.codes[at] == economy.tasks.task_class.codes[row]


@given(SEEDS, st.data())
def test_pick_is_the_chosen_use_or_nothing(seed: int, data: st.DataObject) -> None:
    economy = random_economy(seed, 5, 3, losses=True)
    allowed = economy.uses.allowed
    use = np.array([data.draw(st.sampled_from([DEFER, *np.flatnonzero(allowed[task])])) for task in range(5)])
    picked = economy.uses.pick(use)
    assert picked.shape == (5, 1)
    for task, column in enumerate(use):
        for name in COLUMNS:
            got = getattr(picked, name)[task, 0]
            want = getattr(economy.uses, name)[task, column] if column != DEFER else np.zeros_like(got)
            assert np.array_equal(got, want)
        for seconds, share in economy.uses.late.items():
            assert picked.late[seconds][task, 0] == (share[task, column] if column != DEFER else 0.0)


def test_pick_refuses_a_use_whose_outcome_is_unknown() -> None:
    economy = uses(
        quality=np.array([[1.0, np.nan]] * 3), allowed=np.array([[True, False]] * 3), seconds=np.ones((3, 2))
    )
    with pytest.raises(QuantityError, match="quality of task 2"):
        economy.pick(np.array([0, DEFER, 1]))


def test_amounts_by_name() -> None:
    both = uses(amounts=np.stack([np.ones((3, 2)), np.full((3, 2), 7.0)], axis=2), resources=("usd", "gpu_s"))
    assert (both.amount("gpu_s") == 7.0).all()
    with pytest.raises(QuantityError, match="no resource 'gpu'; there are usd, gpu_s"):
        both.amount("gpu")


def test_lateness_is_estimated_where_it_can_be_and_certain_elsewhere() -> None:
    late = np.full((3, 2), 0.25)
    table = uses(seconds=np.tile([2.0, 3.0], (3, 1)), late={2.0: late})
    assert (table.late_share(2.0) == late).all()
    assert (table.late_share(2.5) == [0.0, 1.0]).all()
    assert (table.late_share(3.0) == 0.0).all()  # as late as allowed is not late


@given(SEEDS, st.integers(1, 5))
def test_whole_plans_add_up_the_steps(seed: int, n: int) -> None:
    economy = random_economy(seed, 4, n, losses=True)
    plans = whole_plans(economy.uses)
    for task in range(4):
        for k in range(n):
            steps = slice(0, k + 1)
            assert plans.allowed[task, k] == economy.uses.allowed[task, steps].all()
            if plans.allowed[task, k]:
                for name in COLUMNS:
                    want = getattr(economy.uses, name)[task, steps].sum(axis=0)
                    assert np.allclose(getattr(plans, name)[task, k], want)
    assert not plans.late  # chances of being late do not add up
    assert replace(economy.uses, late={LATE: np.zeros((4, n))}).late  # though the steps may have had some
