"""How the answer moves with its inputs: each line against the same question asked directly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from logs import random_log
from walras.diagnosis import sensitivity
from walras.diagnosis.case import Case, build_case
from walras.diagnosis.regret import measure_regret
from walras.diagnosis.sensitivity import multiplier_intervals, scenarios, surplus_curve
from walras.errors import InfeasibleError
from walras.settings import Economy


def case_of(seed: int = 0, n: int = 200, **settings: object) -> Case:
    return build_case(random_log(seed, n), Economy(**settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("as declared", {"value": 2.0}),
        ("V − 50%", {"value": 1.0}),
        ("V + 50%", {"value": 3.0}),
        ("ρ − 50%", {"value": 2.0, "rho0": 0.5}),
        ("ρ + 50%", {"value": 2.0, "rho0": 1.5}),
    ],
)
def test_a_scenario_is_another_audit(name: str, settings: dict[str, float]) -> None:
    moved = {s.name: s for s in scenarios(case_of(value=2.0, budget_usd=0.05))}[name]
    other = case_of(**settings, budget_usd=0.05)
    cleared = other.clear()
    assert moved.surplus == pytest.approx(cleared.certificate.objective, rel=1e-9)
    assert moved.multipliers == pytest.approx(cleared.multipliers, rel=1e-6)
    assert moved.regret == pytest.approx(measure_regret(other, cleared.prices).overall.mean, rel=1e-6)


def test_without_risk_rho_moves_nothing() -> None:
    log = random_log(0)
    log = replace(log, per_use={k: v for k, v in log.per_use.items() if k != "risk"}, losses=None)
    found = {s.name: s for s in scenarios(build_case(log, Economy(value=2.0, budget_usd=0.05)))}
    declared = found["as declared"]
    for name in ("ρ − 50%", "ρ + 50%"):
        assert replace(found[name], name="as declared") == declared
    assert found["V + 50%"].surplus > declared.surplus


@pytest.mark.parametrize(
    "settings", [{}, {"defer": False}, {"sla_s": 4.0}, {"budget_usd": 0.05, "risk": 0.02}]
)
def test_the_curve_is_concave_with_the_price_as_its_slope(settings: dict[str, object]) -> None:
    case = case_of(value=2.0, **settings)
    curve = surplus_curve(case, spent=0.1)
    step, rise = np.diff(curve.budget), np.diff(curve.surplus)
    assert curve.budget.size >= 10
    assert (step > 0).all()
    slack = 1e-9 * np.abs(curve.surplus).max()
    assert (rise <= curve.multiplier[:-1] * step + slack).all()
    assert (rise >= curve.multiplier[1:] * step - slack).all()
    free = replace(case, constraints=tuple(c for c in case.constraints if c.kind != "budget"))
    assert curve.surplus[-1] == pytest.approx(free.clear().certificate.objective, rel=1e-9)
    assert curve.multiplier[-1] == 0, "beyond what anybody needs money is free"
    for row in case.constraints:
        if row.kind == "budget":
            assert row.bound in curve.budget


def test_without_deferring_the_curve_starts_at_the_least() -> None:
    case = case_of(value=2.0, defer=False)
    least = case.uses.amount("usd").min(axis=1).mean()
    budget = surplus_curve(case, spent=0.1).budget
    assert least <= budget[0] <= least + 0.01 * (budget[-1] - least)


def test_intervals_hold_the_price_and_shrink_with_the_log() -> None:
    width = {}
    for n in (200, 3200):
        case = case_of(n=n, value=2.0, budget_usd=0.05)
        mu = case.clear().multipliers
        ((low, high),) = multiplier_intervals(case, mu.tolist())
        assert 0 <= low <= mu[0] <= high
        width[n] = high - low
    assert width[3200] < 0.6 * width[200]


def test_no_interval_reaches_below_zero() -> None:
    spent = case_of(value=2.0).clear().mix
    need = case_of(value=2.0).uses.amount("usd")[spent.task, spent.use][spent.use >= 0].sum() / 200
    found = []
    for share in (
        0.9,
        0.95,
        0.98,
        1.0,
        1.02,
        1.05,
    ):  # budgets that some resamples find scarce and others do not
        case = case_of(value=2.0, budget_usd=share * need)
        ((low, high),) = multiplier_intervals(case, case.clear().multipliers.tolist())
        assert 0 <= low <= high
        found.append((low, high))
    assert any(low == 0 < high for low, high in found)


def test_the_interval_holds_the_price_of_the_population() -> None:
    truth = case_of(seed=99, n=8_000, value=2.0, budget_usd=0.05).clear().multipliers[0]
    held = 0
    for seed in range(12):
        case = case_of(seed, value=2.0, budget_usd=0.05)
        ((low, high),) = multiplier_intervals(case, case.clear().multipliers.tolist(), seed)
        held += low <= truth <= high
    assert held >= 9, "about 11 of 12"


def test_a_sample_that_does_not_fit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound just above the least for the whole log can be below the least for a sample of it."""
    monkeypatch.setattr(sensitivity, "SAMPLE", 50)
    least = case_of(value=2.0).uses.amount("usd").min(axis=1).mean()
    refused = 0
    for seed in range(6):
        case = case_of(value=2.0, defer=False, budget_usd=least * 1.001)
        monkeypatch.setattr(sensitivity, "sample", lambda c, seed=seed: sample_of(c, seed))
        try:
            sample_of(case, seed).clear()
        except InfeasibleError:
            refused += 1
        assert len(scenarios(case)) == 6
        assert surplus_curve(case, spent=0.1).budget.size > 0
    assert refused > 0, "the case this test is about did occur"


def sample_of(case: Case, seed: int) -> Case:
    return case.take(np.random.default_rng(seed).choice(len(case.tasks), 50, replace=False))


def test_the_pure_form_has_a_curve_and_leaves_out_what_has_no_prices() -> None:
    case = case_of(value=2.0, budget_usd=0.05, numeraire="compute")
    curve = surplus_curve(case, spent=0.1)
    assert curve.budget.size > 3
    assert (curve.multiplier > 0).all(), "a slack budget makes no price here"
    assert {s.name for s in scenarios(case)} >= {"as declared", "V − 50%", "V + 50%"}
