"""The linear programme under the prices, on bare arrays: both ways through the solver against plain linear algebra."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csc_array, eye_array, kron, vstack

from economies import SEEDS
from walras.equation import DEFER, Charge
from walras.market import programme as solver
from walras.market.programme import Mix, Programme, clear


@pytest.fixture(params=["sifted", "whole"], scope="module")
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """As in test_shadow; `whole`, which changes nothing, comes last and so stays for the tests that do not ask."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sifted":
            patch.setattr(solver, "SMALL", 8)
            patch.setattr(solver, "NEAR_TIES", 1.0)
        yield request.param


def random_programme(seed: int, n: int, i: int, k: int, coarse: bool) -> Programme:
    """Charges ≥ 0 with room left, so that deferring is feasible; every second one holds for some tasks only."""
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(0, 4, shape) / 2) if coarse else rng.random
    worth = draw((n, i)) * 4 - 1
    worth[rng.random((n, i)) < 0.15] = -np.inf
    charges, limits = [], []
    for j in range(k):
        rows = np.flatnonzero(rng.random(n) < 0.6) if j % 2 else None
        per_use = draw((n if rows is None else rows.size, i))
        charges.append(Charge(per_use, rows))
        limits.append(rng.random() * per_use.mean(axis=1).sum() if per_use.size else 0.0)
    weight = np.ones(n) if coarse else rng.random(n) + 0.5
    return Programme(worth, charges, np.array(limits), weight)


programmes = st.builds(
    random_programme, SEEDS, st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.booleans()
)


def dense(programme: Programme) -> np.ndarray:
    """Charges of all rows on all tasks and uses, (K, N, I)."""
    out = np.zeros((len(programme.charges), *programme.worth.shape))
    for k, charge in enumerate(programme.charges):
        for at in range(charge.per_use.shape[0]):
            out[k, at if charge.tasks is None else charge.tasks[at]] = charge.per_use[at]
    return out


def optimum(programme: Programme) -> float:
    n, i = programme.worth.shape
    known = np.flatnonzero(np.isfinite(programme.worth))
    weight = np.repeat(programme.weight, i)[known]
    one_each = kron(eye_array(n), np.ones((1, i)), format="csc")[:, known]
    answer = linprog(
        -programme.worth.ravel()[known] * weight,
        A_ub=vstack([csc_array(dense(programme).reshape(-1, n * i)[:, known] * weight), one_each]),
        b_ub=np.concatenate((programme.limits, np.ones(n))),
        method="highs-ipm",
    )
    assert answer.status == 0, answer.message
    return -float(answer.fun)


@settings(max_examples=200)
@given(programmes)
def test_clear_is_optimal_and_proves_it(path: str, programme: Programme) -> None:
    if not np.isfinite(programme.worth).any():
        return
    best = optimum(programme)
    scale = float(
        programme.weight @ np.abs(np.where(np.isfinite(programme.worth), programme.worth, 0)).max(axis=1)
    )
    tolerance = 1e-8 * max(scale, 1e-6)
    solution = clear(programme)
    event(f"prices > 0: {(solution.multipliers > 0).sum()}")
    assert solution.objective == pytest.approx(best, abs=tolerance)
    assert best - tolerance <= solution.dual <= best + tolerance
    assert (solution.multipliers >= 0).all()
    # The bound, written out: what each task keeps at these prices, and what the limits are worth.
    charges, mu = dense(programme), solution.multipliers
    kept = np.maximum((programme.worth - np.tensordot(mu, charges, 1)).max(axis=1), 0.0)
    assert solution.dual == pytest.approx(programme.weight @ kept + mu @ programme.limits, abs=tolerance)
    # The allocation, written out.
    mix = solution.mix
    assert np.bincount(mix.task, weights=mix.share) == pytest.approx(np.ones(programme.weight.size))
    assert len({*zip(mix.task, mix.use, strict=True)}) == mix.task.size
    assert (np.diff(mix.task) >= 0).all()
    served = mix.use != DEFER
    mass = (programme.weight[mix.task] * mix.share)[served]
    usage = (charges[:, mix.task[served], mix.use[served]] * mass).sum(axis=1)
    assert solution.usage == pytest.approx(usage, abs=1e-9)
    assert (usage <= programme.limits + 1e-8 * (1 + programme.limits)).all()
    worth = (programme.worth[mix.task[served], mix.use[served]] * mass).sum()
    assert solution.objective == pytest.approx(worth, abs=tolerance)
    # A vertex splits no more tasks than there are constraints, however many tie.
    assert (np.bincount(mix.task) > 1).sum() <= len(programme.charges)


def test_the_sifting_path_is_taken_and_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other path would pass every test above by itself: here the reduced programme must be a small part."""
    widths: list[int] = []
    honest = solver._reduced_lp

    def watched(programme: Programme, columns: solver._Columns, feasible: Mix) -> tuple[np.ndarray, Mix]:
        widths.append(columns.keys.size)
        return honest(programme, columns, feasible)

    monkeypatch.setattr(solver, "_reduced_lp", watched)
    programme = random_programme(1, 3000, 4, 2, coarse=False)
    solution = clear(programme)
    assert solution.dual == pytest.approx(optimum(programme), rel=1e-9)
    assert solution.objective == pytest.approx(solution.dual, rel=1e-9)
    assert widths[0] <= solver.SMALL  # prices of a sample first
    assert len(widths) >= 2
    assert max(widths[1:]) < 3000 * 5 / 2  # of 15 000 columns, deferring included


@given(programmes, SEEDS)
def test_charges_of_pairs_are_those_of_the_table(programme: Programme, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, i = programme.worth.shape
    task = rng.integers(0, n, 30)
    use = rng.integers(-1, i, 30)
    table = dense(programme)
    for k in range(len(programme.charges)):
        want = [0.0 if u == DEFER else table[k, t, u] for t, u in zip(task, use, strict=True)]
        assert programme.charge_at(k, task, use).tolist() == want
    want = [0.0 if u == DEFER else programme.worth[t, u] for t, u in zip(task, use, strict=True)]
    assert programme.worth_at(task, use).tolist() == want


@given(programmes, SEEDS)
def test_a_sample_is_the_programme_on_some_tasks(programme: Programme, seed: int) -> None:
    n = programme.weight.size
    rows = np.flatnonzero(np.random.default_rng(seed).random(n) < 0.5)
    if not rows.size:
        return
    part = programme.sample(rows)
    assert (part.worth == programme.worth[rows]).all()
    assert np.array_equal(dense(part), dense(programme)[:, rows])
    for k, charge in enumerate(programme.charges):
        scope = np.arange(n) if charge.tasks is None else charge.tasks
        inside = np.intersect1d(scope, rows)
        share = programme.weight[inside].sum() / programme.weight[scope].sum() if scope.size else 0.0
        assert part.limits[k] == pytest.approx(programme.limits[k] * share)
    everything = programme.sample(np.arange(n))
    filled = [charge.tasks is None or charge.tasks.size > 0 for charge in programme.charges]
    assert everything.limits[filled] == pytest.approx(programme.limits[filled])


@given(programmes)
def test_sums_over_a_mix(programme: Programme) -> None:
    """Half of everyone's first use, half deferred."""
    n = programme.weight.size
    programme = replace(programme, worth=np.nan_to_num(programme.worth, neginf=-1.0))
    mix = Mix(np.repeat(np.arange(n), 2), np.tile([DEFER, 0], n), np.full(2 * n, 0.5))
    half = 0.5 * programme.weight
    assert mix.objective(programme) == pytest.approx(half @ programme.worth[:, 0])
    table = dense(programme)[:, :, 0]
    assert mix.usage(programme) == pytest.approx(table @ half)
    assert mix.magnitude(programme) == pytest.approx(np.abs(table) @ half)
    shifted = replace(programme, charges=[replace(charge, offset=2.0) for charge in programme.charges])
    scopes = [
        programme.weight.sum() if charge.tasks is None else programme.weight[charge.tasks].sum()
        for charge in programme.charges
    ]
    assert mix.magnitude(shifted) == pytest.approx(np.abs(table) @ half + 2.0 * np.array(scopes))


def test_an_allocation_nobody_pays_for_has_no_prices() -> None:
    programme = Programme(
        np.array([[1.0, 3.0], [2.0, -np.inf]]),
        [Charge(np.ones((2, 2)), None), Charge(np.full((1, 2), 5.0), np.array([1]))],
        np.array([2.0, 5.0]),
        np.ones(2),
    )
    solution = clear(programme)
    assert solution.multipliers.tolist() == [0.0, 0.0]
    assert solution.mix.use.tolist() == [1, 0]
    assert (solution.objective, solution.dual) == (5.0, 5.0)
    tighter = clear(replace(programme, limits=np.array([1.5, 5.0])))
    assert tighter.multipliers.tolist() == [2.0, 0.0]  # half of the second task's worth of 2 must go
    assert tighter.objective == pytest.approx(4.0)
