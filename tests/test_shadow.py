"""Prices from constraints [Z-3]: against an independent planner, with every line of the certificate recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from economies import (
    KINDS,
    SEEDS,
    Economy,
    amount_of,
    economies,
    in_scope,
    is_sla,
    lagrangian,
    least_tail,
    objective_of,
    planner,
    pure,
    random_columns,
    random_economy,
    random_shares,
    scenario_means,
    shares_of,
    tail,
    tight_economy,
    total,
    used_of,
    with_row,
    worth_of,
)
from walras.equation import DEFER, choose, equimarginal_residual, net_value
from walras.errors import InfeasibleError, NotCleared, NumeraireError, QuantityError
from walras.market import dual, shadow
from walras.market.alike import Split
from walras.market.clearing import Clearing, Rounded, round_off
from walras.market.dual import Answer
from walras.market.envelopes import _plain
from walras.market.memory import Memory
from walras.market.shadow import discover
from walras.prices import Constraint, Prices, Scope
from walras.quantities import Tasks, Uses
from walras.risk import CVaR, Expectation, MaxMin, risk_of

EXACT = 1e-8
"""How far two exact solvers may be apart, relative to the worth at stake."""


@pytest.fixture(params=["screened", "whole"], scope="module")
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways through the solver: everything to HiGHS at once, or boxes of prices around the optimum.

    Test economies are small, so the limits that choose between the two are made small too. `whole`, which changes
    nothing, comes last and so stays for the tests that do not ask.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "screened":
            patch.setattr(dual, "FEW", 1)
            patch.setattr(dual, "FEW_A_ROW", 0)
        yield request.param


def cleared(economy: Economy, **options: object) -> Clearing:
    return discover(
        economy.tasks,
        economy.uses,
        economy.rows,
        defer=economy.defer,
        declared=economy.declared,
        **options,
    )


def priced_rows(economy: Economy, clearing: Clearing) -> Economy:
    """The economy with its rows as the prices carry them (portfolio envelopes have got their density)."""
    return replace(economy, rows=tuple(price.constraint for price in clearing.prices.discovered))


def check_certificate(economy: Economy, clearing: Clearing, optimum: float) -> None:
    """Everything a clearing claims, recomputed from the physical columns."""
    tol = EXACT * economy.scale
    certificate = clearing.certificate
    shares = shares_of(clearing.mix, economy.uses.shape)

    # The allocation is one: whole tasks, nothing masked, nobody deferred who may not.
    everything = np.bincount(clearing.mix.task, weights=clearing.mix.share, minlength=len(economy.tasks))
    assert everything == pytest.approx(1.0)
    assert (clearing.mix.share > 0).all()
    assert (shares[~economy.uses.allowed] == 0).all()
    assert economy.defer or (clearing.mix.use != DEFER).all()

    # It is worth what is said, the best there is, and the bound bounds.
    assert certificate.objective == pytest.approx(objective_of(economy, shares), abs=tol)
    assert certificate.objective == pytest.approx(optimum, abs=tol)
    net, dual = lagrangian(priced_rows(economy, clearing), clearing.multipliers)
    assert certificate.dual == pytest.approx(dual, abs=tol)
    assert certificate.dual >= optimum - tol
    assert certificate.gap >= optimum - objective_of(economy, shares) - tol
    assert certificate.gap <= tol

    # Every constraint is met, and what is idle is free [Z-CS].
    for usage, row, mu in zip(clearing.usage, economy.rows, clearing.multipliers, strict=True):
        inside = in_scope(row, economy.tasks)
        everybody = economy.tasks.weight[inside].sum()
        served = total(economy, shares, np.ones(shares.shape), inside)
        assert usage.multiplier == mu >= 0
        assert usage.service_rate == pytest.approx(served / everybody if everybody else 0.0)
        if is_sla(row) and not served:
            continue  # no one is served, so no one is late; whatever its price
        used = used_of(economy, row, shares)
        assert usage.used == pytest.approx(used, rel=1e-9, abs=1e-9)
        assert used <= row.bound + 1e-8 * (row.bound + 1e-3)
        if used < row.bound - 1e-6 * (row.bound + 1e-3):
            assert mu == 0.0
    assert certificate.max_violation <= 1e-6
    assert certificate.slackness <= tol

    # At these prices each task, choosing alone, would choose what it got [Z-2].
    mass = np.where(shares > 0, shares * np.where(shares > 0, net, 0.0), 0.0).sum(axis=1)
    best = np.maximum(net.max(axis=1), 0.0) if economy.defer else net.max(axis=1)
    assert float(economy.tasks.weight @ (best - mass)) / economy.weight <= 2 * tol


def check_rounding(economy: Economy, clearing: Clearing) -> None:
    """The allocation without mixtures: its own gap and violation, recomputed."""
    rounded, use = clearing.rounded, clearing.use
    shares = shares_of(clearing.mix, economy.uses.shape)
    deferred = 1.0 - shares.sum(axis=1)
    for task, column in enumerate(use):
        assert (deferred[task] if column == DEFER else shares[task, column]) > 0
    whole = pure(use, economy.uses.shape)
    assert rounded.split_tasks == ((shares > 0).sum(axis=1) + (deferred > 1e-13) > 1).sum()
    assert rounded.objective == pytest.approx(objective_of(economy, whole), abs=EXACT * economy.scale)
    assert rounded.gap == pytest.approx(
        abs(clearing.certificate.dual - rounded.objective), abs=EXACT * economy.scale
    )
    assert use.dtype.kind == "i"
    over = 0.0
    for row in economy.rows:
        if row.kind != "portfolio_envelope":
            over = max(over, used_of(economy, row, whole) - row.bound)
    if over > 1e-6:
        assert rounded.max_violation > 0
    if rounded.split_tasks == 0:
        assert over <= 1e-6
        assert rounded.max_violation <= 1e-6


@settings(max_examples=300)
@given(economies())
def test_agrees_with_an_independent_planner(path: str, economy: Economy) -> None:
    optimum = planner(economy)
    assert optimum is not None  # by construction some allocation meets every constraint
    clearing = cleared(economy)
    event(f"prices > 0: {(clearing.multipliers > 0).sum()}")
    event(f"split tasks: {clearing.rounded.split_tasks > 0}")
    check_certificate(economy, clearing, optimum.value)
    check_rounding(economy, clearing)


@settings(max_examples=100)
@given(economies(kinds=("budget",), scopes=(Scope(),), defer=True, styles=("smooth", "ties"), max_rows=1))
def test_rounding_one_budget_overspends_nothing_and_loses_at_most_one_task(
    path: str, economy: Economy
) -> None:
    """With one budget at most one task is split (but for ties), and one of its two uses is within what is left."""
    clearing = cleared(economy)
    event(f"split: {clearing.rounded.split_tasks}")
    assert clearing.rounded.max_violation <= 1e-9
    whole = pure(clearing.use, economy.uses.shape)
    for row in economy.rows:
        assert used_of(economy, row, whole) <= row.bound * (1 + 1e-9)
    if clearing.rounded.split_tasks <= 1:
        worth = np.where(economy.uses.allowed, worth_of(economy), 0.0)
        spread = np.maximum(worth.max(axis=1), 0.0) - np.minimum(worth.min(axis=1), 0.0)
        assert clearing.rounded.gap <= (economy.tasks.weight * spread).max() / economy.weight + 1e-9


def test_rounding_survives_a_thousand_ties() -> None:
    """Pass or fail, and one price a model: hundreds of tasks are alike, and nobody may defer."""
    n = 2000
    passed = np.random.default_rng(0).random((n, 4)) < [0.4, 0.6, 0.7, 0.8]
    uses = Uses(("a", "b", "c", "d"), passed.astype(float), np.tile([[0.25], [0.5], [1.0], [2.0]], (n, 1, 1)))
    clearing = discover(Tasks(np.full(n, 5.0)), uses, [Constraint("budget", 0.3)], defer=False)
    assert clearing.multipliers[0] > 0
    assert clearing.rounded.split_tasks <= 1
    assert clearing.rounded.gap <= 5.0 / n
    assert clearing.rounded.max_violation <= 1e-9


def split_in_two(charge: list[list[float]], limit: float) -> tuple[Memory, Answer]:
    """Two tasks, each split between a use worth 3 and one worth 2, under one row."""
    two = _plain(np.array([[3.0, 2.0], [3.0, 2.0]]), [np.array(charge)], [limit], np.ones(2))
    split = Split(np.arange(2), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.full(4, 0.5))
    used = np.array([np.sum(charge) / 2])
    return two, Answer(
        np.ones(1), 5.0, 5.0, used, np.full(1, 2.0), used, ((1.0, np.ones(1)),), split, 1, 1, 5.0
    )


def round_split(market: Memory, answer: Answer) -> Rounded:
    rounded = round_off(market.rows, market.weight, answer, market)
    assert rounded is not None
    return rounded


def test_rounding_takes_the_best_that_fits_and_counts_what_it_took() -> None:
    rounded = round_split(*split_in_two([[1.0, 0.0], [1.0, 0.0]], 1.0))
    assert rounded.given.tolist() == [0, 1]
    assert (rounded.objective, rounded.gap) == (2.5, 0.0)
    assert rounded.max_violation == 0.0
    assert rounded.split_tasks == 2


def test_rounding_overshoots_least_where_nothing_fits() -> None:
    rounded = round_split(*split_in_two([[4.0, 2.0], [4.0, 2.0]], 3.0))
    assert rounded.given.tolist() == [1, 1]
    assert rounded.gap == 0.5
    assert rounded.max_violation == pytest.approx((4.0 - 3.0) / 6.0)  # of the 6 units that the mixture takes


def test_masked_cells_need_not_be_known(path: str) -> None:
    """NaN in a use that is not allowed reaches neither the choice nor the prices [Z-LEX]."""
    economy = random_economy(5, 12, 3)
    assert not economy.uses.allowed.all()
    reference = random_shares(np.random.default_rng(0), economy, thrift=1.0)
    for kind in KINDS:
        economy = with_row(economy, kind, Scope(), reference, 0.0)
    known = replace(
        economy.uses,
        **{
            name: np.nan_to_num(getattr(economy.uses, name), nan=1e6)
            for name in ("quality", "amounts", "seconds", "risk", "irreversible_risk")
        },
        late={s: np.nan_to_num(share, nan=1.0) for s, share in economy.uses.late.items()},
    )
    with_nan, without = cleared(economy), cleared(replace(economy, uses=known))
    assert np.isnan(economy.uses.quality).any()
    assert (with_nan.multipliers > 0).any()
    assert with_nan.certificate == without.certificate
    assert (with_nan.multipliers == without.multipliers).all()


@settings(max_examples=60)
@given(economies(min_rows=1), st.floats(0, 20))
def test_any_start_ends_at_the_same_answer(path: str, economy: Economy, mu: float) -> None:
    start = np.full(len(economy.rows), mu)
    cold, warm = cleared(economy), cleared(economy, start=start)
    check_certificate(economy, warm, cold.certificate.objective)


def test_each_pass_reports_how_far_there_is_to_go(path: str) -> None:
    economy = tight_economy(3)
    seen: list[tuple[int, float]] = []
    clearing = cleared(economy, on_pass=lambda number, gap, mu: seen.append((number, gap)))
    assert all(a < b for (a, _), (b, _) in pairwise(seen))
    assert clearing.passes <= len(seen)
    assert seen[-1][1] == pytest.approx(0.0, abs=EXACT * economy.scale)


def test_without_constraints_everybody_gets_the_best_at_declared_prices() -> None:
    economy = random_economy(9, 20, 4)
    clearing = cleared(economy)
    best = choose(np.where(economy.uses.allowed, worth_of(economy), -np.inf))
    assert (clearing.use == best.use).all()
    assert clearing.multipliers.size == 0
    assert clearing.certificate.gap == 0.0
    assert clearing.certificate.objective == pytest.approx(
        float(economy.tasks.weight @ best.value) / economy.weight
    )


@pytest.mark.parametrize("kind", KINDS)
def test_slack_constraints_cost_exactly_nothing(path: str, kind: str) -> None:
    """[Z-CS] beside one that binds: μ is 0.0, not 1e-12."""
    binding = tight_economy(11)
    free = cleared(binding)
    used = shares_of(free.mix, binding.uses.shape)
    both = with_row(binding, kind, Scope(), used, 0.1)
    clearing = cleared(both)
    assert clearing.multipliers[0] > 0
    assert clearing.multipliers[1] == 0.0
    assert clearing.certificate.objective == pytest.approx(free.certificate.objective, rel=1e-9)


def test_a_scope_that_holds_no_task_binds_nobody(path: str) -> None:
    """An idle tenant, or an hour without a request."""
    economy = tight_economy(4, 40)
    alone = cleared(economy)
    idle = Scope(window=(1e6, 2e6))
    rows = (
        *economy.rows,
        Constraint("budget", 0.1, idle),
        Constraint("mean_sla", 0.1, idle),
        Constraint("quantile_sla", 0.1, idle, seconds=1.0),
        Constraint("risk_envelope", 0.1, idle),
    )
    clearing = cleared(replace(economy, rows=rows))
    assert clearing.multipliers == pytest.approx([*alone.multipliers, 0, 0, 0, 0])
    assert clearing.certificate.objective == pytest.approx(alone.certificate.objective)
    assert [usage.service_rate for usage in clearing.usage[1:]] == [0.0] * 4


def test_a_row_may_concern_only_tasks_without_a_near_tie(path: str) -> None:
    """The reduced programme then has nothing to move in that row; its coefficients must not blow up."""
    n = 40
    rng = np.random.default_rng(0)
    columns = random_columns(rng, n, 2, "smooth")
    time = np.arange(n, dtype=float)
    quality, amounts = columns["quality"], columns["amounts"][:, :, :1]
    quality[:5] = [0.0, 1.0]  # the first five have a use that is best at any price
    amounts[:5] = [[0.7], [0.1]]
    uses = Uses(("a", "b"), quality, amounts)
    tasks = Tasks(np.full(n, 8.0), time=time)
    rows = (Constraint("budget", 0.1, Scope(window=(0.0, 5.0))), Constraint("budget", 0.5))
    economy = Economy(tasks, uses, rows)
    optimum = planner(economy)
    assert optimum is not None
    check_certificate(economy, cleared(economy), optimum.value)


def test_without_tasks_there_is_nothing_to_price() -> None:
    with pytest.raises(QuantityError, match="no tasks"):
        discover(Tasks(np.zeros(0)), Uses(("a",), np.zeros((0, 1)), np.zeros((0, 1, 1))), [])


def test_an_sla_met_exactly_is_met() -> None:
    """0.1 + 0.2 s is not later than 0.3 s, though the sum of floats is a bit more."""
    uses = Uses(("only",), np.ones((3, 1)), np.ones((3, 1, 1)), seconds=np.full((3, 1), 0.1 + 0.2))
    tasks = Tasks(np.full(3, 5.0))
    for defer in (True, False):
        clearing = discover(tasks, uses, [Constraint("mean_sla", 0.3)], defer=defer)
        assert clearing.certificate.objective == pytest.approx(4.0)
        assert (clearing.use == 0).all()


# --- the price is the slope ---------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    economies(kinds=("budget", "tools", "risk_envelope"), max_rows=3),
    st.sampled_from((1e-1, 1e-3)),
    st.data(),
)
def test_envelope_theorem(economy: Economy, step: float, data: st.DataObject) -> None:
    """A multiplier lies between the one-sided slopes of optimal surplus against its bound, whatever else binds.

    Surplus is concave in the bound, so a difference quotient of any length on either side brackets it.
    """
    assume(economy.rows)
    k = data.draw(st.integers(0, len(economy.rows) - 1))
    row, mu = economy.rows[k], cleared(economy).multipliers[k]
    here = planner(economy)
    assert here is not None
    h = step * (row.bound + 0.1)
    # Bounds are per task in scope and surplus is per task: the slope counts only those in scope.
    part = economy.tasks.weight[in_scope(row, economy.tasks)].sum() / economy.weight

    def with_bound(bound: float) -> Economy:
        return replace(economy, rows=(*economy.rows[:k], replace(row, bound=bound), *economy.rows[k + 1 :]))

    tol = EXACT * economy.scale / h
    more = planner(with_bound(row.bound + h))
    assert more is not None
    assert (more.value - here.value) / h <= mu * part + tol
    if row.bound >= h:
        less = planner(with_bound(row.bound - h))
        left = np.inf if less is None else (here.value - less.value) / h
        event(f"kink: {left > mu * part + tol}")
        assert mu * part <= left + tol


# --- hard rows and infeasible ones --------------------------------------------------------------------------------


def least_of(economy: Economy, row: Constraint) -> float | None:
    """The smallest bound of `row` that the economy's rows leave possible, by the planner; serves everybody."""
    inside = in_scope(row, economy.tasks)
    amounts = np.where(inside[:, None], amount_of(row, economy.uses), 0.0)
    plan = planner(economy, -amounts)
    return None if plan is None else -plan.value * economy.weight / economy.tasks.weight[inside].sum()


@settings(max_examples=120)
@given(economies(defer=False, min_rows=0, max_rows=2), st.sampled_from(KINDS), st.data())
def test_the_least_bound_is_the_least(path: str, economy: Economy, kind: str, data: st.DataObject) -> None:
    """Alone, and beside rows that can be met: it is named, that least will do, and 0.1 % less will not."""
    scope = data.draw(st.sampled_from((Scope(), Scope(tenant="a"))))
    row = {
        "budget": Constraint("budget", 0.0, scope),
        "tools": Constraint("budget", 0.0, scope, resource="tools"),
        "mean_sla": Constraint("mean_sla", 0.0, scope),
        "quantile_sla": Constraint("quantile_sla", 1e-6, scope, seconds=2.0),
        "risk_envelope": Constraint("risk_envelope", 0.0, scope),
    }[kind]
    assume(in_scope(row, economy.tasks).any())
    least = least_of(economy, row)
    assert least is not None
    assume(least > 1e-3 and (kind != "quantile_sla" or least < 0.999))

    def at(bound: float) -> Economy:
        return replace(economy, rows=(*economy.rows, replace(row, bound=bound)))

    with pytest.raises(InfeasibleError) as caught:
        cleared(at(0.5 * least))
    error = caught.value
    assert error.constraint == at(0.5 * least).rows[-1].name
    assert error.constraint in str(error)
    assert error.bound == 0.5 * least
    assert error.least == pytest.approx(least, rel=1e-7)
    clearing = cleared(at(error.least))
    assert clearing.certificate.max_violation <= 1e-6
    with pytest.raises(InfeasibleError):
        cleared(at(0.999 * error.least))


PAIRS = [
    (a, b)
    for a in ("budget", "risk_envelope", "mean_sla")
    for b in ("budget", "risk_envelope", "mean_sla")
    if a != b
]


@settings(max_examples=40)
@given(SEEDS, st.sampled_from(PAIRS), st.booleans())
def test_a_hard_row_is_never_the_one_to_relax(
    path: str, seed: int, pair: tuple[str, str], hard_first: bool
) -> None:
    """Each of two rows can be met alone and both together cannot; the soft one is named, wherever it stands [Z-LEX]."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    uses = Uses(
        ("cheap", "safe", "fast"),
        rng.random((n, 3)),
        1.0 + rng.random((n, 3, 1)) - [[1.0], [0.0], [0.0]],
        risk=1.0 + rng.random((n, 3)) - [0.0, 1.0, 0.0],
        seconds=1.0 + rng.random((n, 3)) - [0.0, 0.0, 1.0],
    )
    least = {
        "budget": uses.amounts[:, 0, 0].mean(),
        "risk_envelope": uses.risk[:, 1].mean(),
        "mean_sla": uses.seconds[:, 2].mean(),
    }
    hard, soft = (Constraint(kind, float(least[kind]) * 1.01, hard=kind == pair[0]) for kind in pair)
    rows = (hard, soft) if hard_first else (soft, hard)
    economy = Economy(Tasks(np.full(n, 9.0)), uses, rows, defer=False)
    with pytest.raises(InfeasibleError) as caught:
        cleared(economy)
    assert caught.value.constraint == soft.name
    assert f"given {hard.name}" in str(caught.value)
    for alone in rows:
        assert cleared(replace(economy, rows=(alone,))).certificate.max_violation <= 1e-9


def test_a_hard_row_that_cannot_be_met_says_it_is_not_relaxed() -> None:
    uses = Uses(("only",), np.ones((2, 1)), np.full((2, 1, 1), 3.0))
    with pytest.raises(InfeasibleError, match="a hard constraint: it is not relaxed") as caught:
        discover(Tasks(np.full(2, 9.0)), uses, [Constraint("budget", 1.0, hard=True)], defer=False)
    assert caught.value.least == pytest.approx(3.0)


def test_a_task_without_an_allowed_use_is_named_when_it_may_not_defer() -> None:
    uses = Uses(
        ("a", "b"), np.ones((2, 2)), np.ones((2, 2, 1)), allowed=np.array([[True, True], [False, False]])
    )
    with pytest.raises(QuantityError, match="task 1 has no allowed use and may not defer"):
        discover(Tasks(np.ones(2)), uses, defer=False)
    assert (discover(Tasks(np.full(2, 3.0)), uses).use == [0, DEFER]).all()


# --- portfolio envelopes [Z-K] -----------------------------------------------------------------------------------

BELIEFS = MaxMin(((0.5, 0.3, 0.2, 0.0, 0.0, 0.0), (0.0, 0.1, 0.2, 0.3, 0.2, 0.2), (1 / 6,) * 6))
measures = st.sampled_from((CVaR(0.0), CVaR(0.5), CVaR(0.7), CVaR(0.95), BELIEFS))


@settings(max_examples=120)
@given(
    economies(losses=True, max_rows=1, min_rows=0, kinds=("budget", "mean_sla", "risk_envelope")),
    measures,
    st.sampled_from((Scope(), Scope(), Scope(tenant="a"))),
    st.sampled_from((0.0, 0.1, 2.0)),
    SEEDS,
)
def test_portfolio_envelope(
    path: str, economy: Economy, measure: CVaR | MaxMin, scope: Scope, slack: float, seed: int
) -> None:
    """The cutting planes reach the Rockafellar–Uryasev optimum, and the price says which scenarios it fears."""
    reference = random_shares(np.random.default_rng(seed), economy, thrift=0.8)
    economy = replace(economy, rows=())
    economy = with_row(economy, "budget", Scope(), reference, 0.05)
    economy = with_row(economy, "portfolio_envelope", scope, reference, slack, measure=measure)
    optimum = planner(economy)
    assert optimum is not None
    clearing = cleared(economy)
    event(f"binds: {clearing.multipliers[-1] > 0}")
    check_certificate(economy, clearing, optimum.value)
    check_rounding(economy, clearing)
    envelope, shares = economy.rows[-1], shares_of(clearing.mix, economy.uses.shape)
    assert tail(scenario_means(economy, envelope, shares), measure) <= envelope.bound * (1 + 1e-8) + 1e-12

    price = clearing.prices.discovered[-1]
    density = np.array(price.constraint.density)
    assert density.min() >= 0
    assert density.sum() == pytest.approx(1.0)
    if isinstance(measure, CVaR):
        assert density.max() <= 1 / ((1 - measure.alpha) * density.size) + 1e-9
    values = net_value(economy.tasks, economy.uses, clearing.prices)
    residual = equimarginal_residual(values, shares / np.maximum(shares.sum(axis=1), 1)[:, None])
    if economy.defer:
        assert residual == pytest.approx(0.0, abs=1e-6 * economy.scale)
    assert Prices.from_json(clearing.prices.to_json()) == clearing.prices


@settings(max_examples=60)
@given(economies(losses=True, defer=False, min_rows=0, max_rows=0, max_tasks=8), measures)
def test_the_least_portfolio_envelope_is_the_least(economy: Economy, measure: CVaR | MaxMin) -> None:
    envelope = Constraint("portfolio_envelope", 0.0, measure=measure)
    least = least_tail(economy, measure)
    assume(least > 1e-3)
    with pytest.raises(InfeasibleError) as caught:
        cleared(replace(economy, rows=(replace(envelope, bound=0.5 * least),)))
    assert caught.value.least == pytest.approx(least, rel=1e-6)
    cleared(replace(economy, rows=(replace(envelope, bound=caught.value.least),)))
    with pytest.raises(InfeasibleError):
        cleared(replace(economy, rows=(replace(envelope, bound=0.999 * least),)))


@settings(max_examples=40)
@given(economies(losses=True, defer=False, min_rows=0, max_rows=0, max_tasks=8), measures, SEEDS)
def test_the_least_portfolio_envelope_beside_a_budget(
    economy: Economy, measure: CVaR | MaxMin, seed: int
) -> None:
    reference = random_shares(np.random.default_rng(seed), economy, thrift=1.0)
    economy = with_row(economy, "budget", Scope(), reference, 0.0)
    envelope = Constraint("portfolio_envelope", 0.5 * least_tail(economy, measure), measure=measure)
    assume(envelope.bound > 1e-3)

    def at(bound: float) -> Economy:
        return replace(economy, rows=(*economy.rows, replace(envelope, bound=bound)))

    with pytest.raises(InfeasibleError, match="given budget") as caught:
        cleared(at(envelope.bound))
    assert caught.value.constraint == envelope.name
    least = caught.value.least
    assert 2 * envelope.bound * (1 - 1e-9) <= least <= used_of(economy, envelope, reference) * (1 + 1e-9)
    cleared(at(least))
    with pytest.raises(InfeasibleError):
        cleared(at(0.999 * least))


@settings(max_examples=60)
@given(economies(losses=True, min_rows=0, max_rows=0), measures, SEEDS)
def test_an_envelope_per_use_is_conservative(economy: Economy, measure: CVaR | MaxMin, seed: int) -> None:
    """Each use's own tail, summed, is an upper bound on the portfolio's: tails need not come together."""
    uses = economy.uses.with_risk(measure)
    economy = replace(economy, uses=uses)
    economy = with_row(
        economy,
        "risk_envelope",
        Scope(),
        random_shares(np.random.default_rng(seed), economy, thrift=0.8),
        0.0,
    )
    row = economy.rows[0]
    shares = shares_of(cleared(economy).mix, uses.shape)
    portfolio = tail(scenario_means(economy, row, shares), measure)
    assert portfolio <= used_of(economy, row, shares) + 1e-9
    assert portfolio <= row.bound * (1 + 1e-6) + 1e-9


def test_a_portfolio_envelope_needs_losses() -> None:
    uses = Uses(("only",), np.ones((2, 1)), np.ones((2, 1, 1)))
    row = Constraint("portfolio_envelope", 1.0, measure=Expectation())
    with pytest.raises(InfeasibleError, match="no losses by scenario"):
        discover(Tasks(np.full(2, 9.0)), uses, [row])


# --- the paper's pure form ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(economies(kinds=("budget",), max_rows=1, scopes=(Scope(),)))
def test_compute_as_numeraire(economy: Economy) -> None:
    """π_C = μ_C and nothing is declared: V·Q is maximised within the budget; with slack there is no price to use."""
    assume(economy.rows)
    value = economy.tasks.value[:, None] * economy.uses.quality
    plan = planner(economy, value)
    assert plan is not None
    without = planner(replace(economy, rows=()), value)
    assert without is not None
    binds = without.value > plan.value + 1e-6 * economy.scale
    event(f"binds: {binds}")

    def pure_form() -> Clearing:
        return discover(economy.tasks, economy.uses, economy.rows, defer=economy.defer, numeraire="compute")

    if not binds:
        # V·Q is as high as without a budget; whether a μ of 0 is reported depends on a tie only.
        try:
            clearing = pure_form()
        except NumeraireError:
            return
        assert clearing.certificate.objective == pytest.approx(plan.value, abs=EXACT * economy.scale)
        return
    clearing = pure_form()
    assert clearing.certificate.objective == pytest.approx(plan.value, abs=EXACT * economy.scale)
    prices = clearing.prices
    assert prices.compute_price == prices.multiplier("compute") == clearing.multipliers[0] > 0
    assert prices.normalised().unit == prices.compute_price


def test_compute_is_no_numeraire_when_its_budget_is_slack() -> None:
    economy = random_economy(1, 6, 3)
    with pytest.raises(NumeraireError, match="compute has no price"):
        discover(economy.tasks, economy.uses, [Constraint("budget", 1e3)], numeraire="compute")
    with pytest.raises(NumeraireError):
        discover(economy.tasks, economy.uses, numeraire="compute")


def test_prices_that_are_not_certified_are_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    economy = tight_economy(3)
    honest = dual.solve

    def careless(*args: object, **options: object) -> Answer:
        answer = honest(*args, **options)
        return replace(answer, dual=1.01 * answer.dual)

    monkeypatch.setattr(shadow, "solve", careless)
    with pytest.raises(NotCleared) as caught:
        cleared(economy)
    certificate = caught.value.certificate
    assert certificate.dual == pytest.approx(1.01 * certificate.objective)
    assert certificate.gap == pytest.approx(0.01 * certificate.objective)


def test_risk_of_the_mean_is_what_the_solver_reports() -> None:
    """`Usage.used` of a portfolio envelope is its measure of the mean loss, as `risk_of` has it."""
    economy = random_economy(8, 12, 3, losses=True)
    reference = random_shares(np.random.default_rng(8), economy, thrift=1.0)
    economy = with_row(economy, "portfolio_envelope", Scope(), reference, 0.0, measure=CVaR(0.5))
    clearing = cleared(economy)
    losses = scenario_means(economy, economy.rows[0], shares_of(clearing.mix, economy.uses.shape))
    assert clearing.usage[0].used == pytest.approx(float(risk_of(losses, CVaR(0.5))))
