"""Budgets of many tenants: the same answer as with a row for each, and every tenant within its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from economies import SEEDS
from walras.equation import DEFER
from walras.errors import InfeasibleError, SettingsError
from walras.market import family
from walras.market.clearing import Clearing
from walras.market.shadow import discover
from walras.prices import Constraint, Scope
from walras.quantities import Labels, Tasks, Uses


def economy(
    seed: int, n: int, tenants: int, *, ties: bool = False, single: bool = False
) -> tuple[Tasks, Uses, list[Constraint]]:
    """A budget for each tenant, some of them slack, some tasks of no tenant; two rows for everybody."""
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(1, 5, shape) / 4) if ties else rng.random
    number = np.float32 if single else np.float64
    uses = Uses(
        ("a", "b", "c"),
        draw((n, 3)).astype(number),
        (0.2 * draw((n, 3, 1))).astype(number),
        seconds=(2 * draw((n, 3))).astype(number),
    )
    tasks = Tasks(
        rng.lognormal(0, 1, n) if not ties else np.ones(n),
        weight=rng.integers(1, 4, n).astype(float),
        tenant=Labels(rng.integers(-1, tenants, n), tuple(f"t{g}" for g in range(tenants))),
    )
    own = [Constraint("budget", rng.uniform(0.005, 0.2), Scope(tenant=f"t{g}")) for g in range(tenants)]
    return tasks, uses, [Constraint("mean_sla", 0.7), *own, Constraint("budget", 0.05)]


def two_ways(
    monkeypatch: pytest.MonkeyPatch, tasks: Tasks, uses: Uses, rows: list[Constraint]
) -> tuple[Clearing, Clearing]:
    monkeypatch.setattr(family, "ENOUGH", 1)
    blocks = discover(tasks, uses, rows)
    monkeypatch.setattr(family, "ENOUGH", 1000)
    return blocks, discover(tasks, uses, rows)


@pytest.mark.parametrize("single", [False, True])
@settings(max_examples=40)
@given(
    seed=SEEDS, n=st.integers(1, 80), tenants=st.integers(1, 6), ties=st.booleans(), plain=st.integers(0, 2)
)
def test_agrees_with_a_row_for_each_tenant(
    single: bool, seed: int, n: int, tenants: int, ties: bool, plain: int
) -> None:
    tasks, uses, rows = economy(seed, n, tenants, ties=ties, single=single)
    rows = [r for r in rows if r.scope.tenant or plain == 2 or (plain == 1 and r.kind == "budget")]
    with pytest.MonkeyPatch.context() as patch:
        blocks, dense = two_ways(patch, tasks, uses, rows)
    event(f"prices > 0: {int((blocks.multipliers > 0).sum())}")
    scale = 1e-7 * max(dense.certificate.scale, 1e-3)
    assert blocks.certificate.objective == pytest.approx(dense.certificate.objective, abs=scale)
    assert blocks.certificate.dual >= dense.certificate.objective - scale
    assert blocks.certificate.gap <= scale
    assert blocks.certificate.slackness <= 1e-6 * max(dense.certificate.scale, 1e-3)
    for usage in blocks.usage:
        assert usage.excess <= 1e-6


@given(seed=SEEDS)
@settings(max_examples=20)
def test_what_is_said_of_the_allocation_is_so(seed: int) -> None:
    tasks, uses, rows = economy(seed, 300, 40)
    cleared = discover(tasks, uses, rows)
    mix = cleared.mix
    assert np.bincount(mix.task, weights=mix.share) == pytest.approx(np.ones(len(tasks)))
    on = mix.use != DEFER
    mass = (tasks.weight[mix.task] * mix.share)[on]
    worth = tasks.value[:, None] * uses.quality - uses.amounts[:, :, 0]
    got = float(mass @ worth[mix.task[on], mix.use[on]]) / tasks.weight.sum()
    assert cleared.certificate.objective == pytest.approx(got, rel=1e-9)
    # After rounding no tenant is over its budget.
    use, served = cleared.use, cleared.use != DEFER
    spent = np.zeros(len(tasks))
    spent[served] = uses.amounts[served, use[served], 0]
    for row in rows[1:-1]:
        inside = tasks.tenant.equal(row.scope.tenant)
        if inside.any():
            assert np.average(spent[inside], weights=tasks.weight[inside]) <= row.bound * (1 + 1e-9)
    whole = worth[np.flatnonzero(served), use[served]]
    assert cleared.rounded.objective == pytest.approx(
        float(tasks.weight[served] @ whole) / tasks.weight.sum(), rel=1e-9
    )


def test_order_of_the_tasks_is_nobodys_business() -> None:
    tasks, uses, rows = economy(1, 2000, 50)
    order = np.random.default_rng(0).permutation(2000)
    one = discover(tasks, uses, rows)
    other = discover(tasks.take(order), uses.take(order), rows)
    assert other.certificate.objective == pytest.approx(one.certificate.objective, rel=1e-9)
    assert other.multipliers == pytest.approx(one.multipliers, rel=1e-3, abs=1e-6)


def test_a_tenant_that_cannot_do_with_so_little_is_named() -> None:
    tasks, uses, rows = economy(1, 2000, 40)
    rows = [replace(r, bound=1.0) if r.scope.tenant else r for r in rows[1:-1]]
    rows[7] = replace(rows[7], bound=1e-4)
    inside = tasks.tenant.equal("t7")
    least = np.average(uses.amounts[inside, :, 0].min(axis=1), weights=tasks.weight[inside])
    with pytest.raises(InfeasibleError, match="tenant t7") as caught:
        discover(tasks, uses, rows, defer=False)
    assert caught.value.least == pytest.approx(least)


def test_more_rows_than_fit_are_refused_with_the_number() -> None:
    tasks, uses, rows = economy(1, 100, 40)
    more = [Constraint("budget", 0.1, Scope(window=(float(t), t + 1.0))) for t in range(70)]
    with pytest.raises(SettingsError, match="72 constraints"):
        discover(replace(tasks, time=np.zeros(100)), uses, [*rows, *more])
