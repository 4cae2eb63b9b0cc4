"""Regret [Z-4]: it adds up to the dollar, splits into two failure modes, and its interval holds the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import spearmanr

from logs import random_log
from walras.diagnosis import regret as regret_module
from walras.diagnosis.case import Case, build_case
from walras.diagnosis.regret import bootstrap_mean, measure_regret
from walras.equation import DEFER
from walras.errors import InfeasibleError
from walras.prices import Constraint
from walras.records import UNKNOWN, Log
from walras.settings import Economy, Resource, TaskClass, Tenant

ROWS: dict[str, dict[str, object]] = {
    "none": {},
    "budget": {"budget_usd": 0.03},
    "mean SLA": {"sla_s": 3.0},
    "quantile SLA": {"sla_s": 5.0, "sla_quantile": 0.9},
    "risk": {"risk": 0.02},
    "CVaR of each use": {"risk": 0.06, "risk_measure": "cvar", "risk_alpha": 0.75},
    "CVaR of the portfolio": {
        "risk": 0.03, "risk_measure": "cvar", "risk_alpha": 0.5, "risk_over": "portfolio",
    },
    "tenants": {"tenants": {"tenant0": Tenant(budget_usd=0.03, sla_s=4.0), "tenant1": Tenant(risk=0.02)}},
    "class": {"budget_usd": 0.1, "classes": {"class1": TaskClass(sla_s=5.0, sla_quantile=0.75)}},
    "resource": {
        "budget_usd": 0.05,
        "resources": {"gpu": Resource(column="latency_s", price_usd=0.002, limit=3.0)},
    },
    "everything": {"budget_usd": 0.05, "sla_s": 4.0, "risk": 0.03, "lambda0": 0.003, "rho0": 0.5},
}  # fmt: skip


def charged(case: Case, row: Constraint) -> float:
    """Mean over all tasks of what the audited choices take out of a row beyond what it allows, written out again."""
    n = len(case.tasks)
    served = case.chosen != DEFER
    at = (np.arange(n), np.maximum(case.chosen, 0))
    inside = np.ones(n, dtype=bool)
    for labels, name in (
        (case.tasks.tenant, row.scope.tenant),
        (case.tasks.task_class, row.scope.task_class),
    ):
        if name is not None:
            assert labels is not None
            inside &= labels.equal(name)
    match row.kind:
        case "budget":
            taken = case.uses.amount(row.resource)[at] * served - row.bound
        case "mean_sla":
            taken = (case.uses.seconds[at] - row.bound) * served
        case "quantile_sla":
            taken = ((case.uses.seconds[at] > row.seconds) - row.bound) * served
        case "risk_envelope":
            taken = case.uses.risk[at] * served - row.bound
        case _:
            assert case.uses.losses is not None
            taken = case.uses.losses[at] @ np.array(row.density) * served - row.bound
    return float((taken * inside).sum() / n)


@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from(sorted(ROWS)),
    defer=st.booleans(),
    n=st.sampled_from([10, 80]),
    deferred=st.sampled_from([0.0, 0.3]),
    rule=st.booleans(),
)
@settings(max_examples=120)
def test_mean_regret_is_surplus_not_earned_plus_overdraft(
    seed: int, rows: str, defer: bool, n: int, deferred: float, rule: bool
) -> None:
    """mean regret = (optimum − realised surplus) + Σ μ·(used − bound) + rule breaking, the identity of `regret`."""
    log = random_log(seed % 1000, n)
    chosen = np.where(np.random.default_rng(seed).random(n) < deferred, UNKNOWN, log.chosen)
    assume((chosen != UNKNOWN).any())
    settings_ = ROWS[rows] | ({"classes": {"class0": TaskClass(forbidden_models=("large",))}} if rule else {})
    case = build_case(replace(log, chosen=chosen), Economy(defer=defer, **settings_))
    try:
        cleared = case.clear()
    except InfeasibleError:
        assume(False)
    event(rows, payload=bool((cleared.multipliers > 0).any()))
    found = measure_regret(case, cleared.prices)
    at = (np.arange(n), np.maximum(case.chosen, 0))
    worth = (
        case.tasks.value * case.uses.quality[at]
        - case.uses.amount("usd")[at]
        - case.tasks.latency_price * case.uses.seconds[at]
        - case.tasks.risk_price * case.uses.risk[at]
        - sum(price * case.uses.amount(r)[at] for r, price in case.economy.declared() if r != "usd")
    )
    realised = np.where(case.chosen == DEFER, 0.0, worth).mean()
    overdraft = sum(p.multiplier * charged(case, p.constraint) for p in cleared.prices.discovered)
    assert (found.per_task >= 0).all()
    scale = cleared.certificate.scale
    assert found.overall.mean == pytest.approx(
        cleared.certificate.objective - realised + overdraft + found.rule_breaking, rel=1e-6, abs=2e-6 * scale
    )
    assert (found.rule_breaking > 0) <= (found.rule_breakers > 0) <= (rule or not defer)


@pytest.mark.parametrize(
    "rows", ["budget", "mean SLA", "quantile SLA", "risk", "CVaR of each use", "everything"]
)
def test_the_rows_above_bind(rows: str) -> None:
    cleared = build_case(random_log(0), Economy(**ROWS[rows])).clear()
    assert (cleared.multipliers > 0).any()


@given(seed=st.integers(0, 999), rows=st.sampled_from(sorted(ROWS)))
@settings(max_examples=30)
def test_groups_and_failures_hold_all_regret(seed: int, rows: str) -> None:
    case = build_case(random_log(seed, 100), Economy(**ROWS[rows]))
    found = measure_regret(case, case.clear().prices)
    total = found.per_task.sum()
    for groups in (found.by_tenant, found.by_class, found.by_value_decile):
        assert sum(g.tasks for g in groups) == 100
        assert_allclose(sum(g.total for g in groups), total)
        assert_allclose([g.regret.mean * g.tasks for g in groups], [g.total for g in groups])
    one, two = found.failures
    assert (one.label, two.label) == ("FM-1", "FM-2")
    assert_allclose(one.total + two.total, total)
    assert_allclose(one.per_task.mean + two.per_task.mean, found.overall.mean)
    assert one.tasks + two.tasks == (found.per_task > 0).sum()
    assert len(found.by_value_decile) == 10
    assert {g.tasks for g in found.by_value_decile} == {10}


def two_tasks(chosen: list[int]) -> Log:
    """Task 0: both models solve it. Task 1: only the dear one does."""
    log = random_log(0, 2, models=("cheap", "dear"), classes=1, tenants=1)
    quality, cost = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[0.1, 0.5], [0.1, 0.5]])
    return replace(log, per_use={"quality": quality, "cost_usd": cost}, losses=None, chosen=np.array(chosen))


@pytest.mark.parametrize(
    ("chosen", "over", "under"),
    [
        ([0, 1], 0.0, 0.0),  # right twice
        ([1, 1], 0.4, 0.0),  # FM-1: the cheap one would have done
        ([0, 0], 0.0, 0.6),  # FM-2: 0.1 spent for nothing, where 0.5 would have bought 1
        ([1, 0], 0.4, 0.6),
        ([UNKNOWN, 1], 0.0, 0.9),  # not served although it was worth it
    ],
)
def test_failure_modes(chosen: list[int], over: float, under: float) -> None:
    case = build_case(two_tasks(chosen), Economy(value=1.0))
    found = measure_regret(case, case.clear().prices)
    assert_allclose([f.total for f in found.failures], [over, under], atol=1e-12)
    assert [f.tasks for f in found.failures] == [int(over > 0), int(under > 0)]


def test_a_task_served_for_nothing_is_over_routed() -> None:
    case = build_case(two_tasks([0, 0]), Economy(value=0.3))  # at V = 0.3 task 1 is better deferred
    found = measure_regret(case, case.clear().prices)
    assert_allclose([f.total for f in found.failures], [0.1, 0.0], atol=1e-12)


def test_breaking_an_absolute_rule_earns_no_negative_regret() -> None:
    economy = Economy(value=1.0, tenants={"tenant0": Tenant(forbidden_models=("dear",))})
    case = build_case(two_tasks([0, 1]), economy)
    assert_allclose(measure_regret(case, case.clear().prices).per_task, [0, 0])


def test_the_signature_of_p2() -> None:
    case = build_case(random_log(3), Economy())
    found = measure_regret(case, case.clear().prices)
    value = case.tasks.value
    assert found.value_correlation == pytest.approx(spearmanr(value, found.per_task).statistic)
    top = np.argsort(value)[-30:]
    assert found.top_decile_share == pytest.approx(found.per_task[top].sum() / found.per_task.sum())


def test_without_different_values_p2_says_nothing() -> None:
    case = build_case(random_log(3), Economy(value=1.0))
    found = measure_regret(case, case.clear().prices)
    assert (found.value_correlation, found.top_decile_share, found.by_value_decile) == (None, None, ())


def test_few_different_values_make_few_deciles() -> None:
    log = random_log(3)
    case = build_case(replace(log, value=np.where(np.arange(300) < 200, 1.0, 2.0)), Economy())
    found = measure_regret(case, case.clear().prices)
    assert sum(row.tasks for row in found.by_value_decile) == 300
    assert len(found.by_value_decile) <= 2


# --- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "blocks"), [(100, 2_000), (1_000, 100)])
def test_the_interval_covers_the_true_mean(n: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 draws of n from an exponential law with mean 1: about 95% of the intervals hold 1 (± 3 s.e., and skew)."""
    monkeypatch.setattr(regret_module, "BLOCKS", blocks)
    rng = np.random.default_rng(0)
    covered = 0
    for draw in range(300):
        low, high = bootstrap_mean(rng.exponential(size=n), seed=draw).ci
        covered += low <= 1.0 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_the_interval_is_as_wide_as_it_should_be() -> None:
    values = np.random.default_rng(0).normal(5, 2, 40_000)
    mean = bootstrap_mean(values)
    low, high = mean.ci
    assert mean.mean == values.mean()
    assert high - low == pytest.approx(2 * 1.96 * 2 / np.sqrt(40_000), rel=0.1)


def test_the_interval_of_a_constant_is_a_point() -> None:
    assert bootstrap_mean(np.full(10, 3.0)).ci == (3.0, 3.0)
    assert bootstrap_mean(np.array([3.0])).ci == (3.0, 3.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap_mean(values, 1) == bootstrap_mean(values, 1)
    assert bootstrap_mean(values, 1) != bootstrap_mean(values, 2)


def test_a_choice_that_breaks_a_rule_is_counted_and_no_negative_regret() -> None:
    """Task 1 needs the dear model, which its class may not have: it got it all the same, and 0.5 of surplus."""
    economy = Economy(value=1.0, classes={"class0": TaskClass(forbidden_models=("dear",))})
    case = build_case(two_tasks([0, 1]), economy)
    found = measure_regret(case, case.clear().prices)
    assert_allclose(found.per_task, [0, 0])
    assert (found.rule_breakers, found.rule_breaking) == (1, pytest.approx(0.25))


def test_the_top_tenth_is_a_tenth_whatever_ties() -> None:
    """20 tasks worth 1, 15 of them with the regret: a tenth of the log holds a tenth of what all alike hold."""
    log = random_log(0, 20, models=("cheap", "dear"), classes=1, tenants=1)
    quality = np.column_stack((np.zeros(20), np.ones(20)))
    log = replace(
        log,
        per_use={"quality": quality, "cost_usd": np.zeros((20, 2))},
        losses=None,
        chosen=np.zeros(20, dtype=np.int64),
        value=np.array([1.0] * 4 + [0.5] * 16),
    )
    case = build_case(log, Economy())
    found = measure_regret(case, case.clear().prices)
    # The two tasks of the top tenth are half of the four that tie at V = 1.
    assert found.top_decile_share == pytest.approx(2.0 / (4 + 8))
