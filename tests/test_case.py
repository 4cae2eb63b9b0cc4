"""From a log and settings to the economy that is audited: what is worth what, what is open, what is left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from logs import random_log
from walras.diagnosis.case import Case, best_fixed, build_case, by_label
from walras.equation import DEFER
from walras.errors import RecordError, SettingsError
from walras.market.shadow import discover
from walras.prices import Constraint, Scope
from walras.quantities import Labels
from walras.records import UNKNOWN, Log
from walras.settings import Economy, Resource, TaskClass, Tenant


def clear(case: Case) -> Any:
    return discover(case.tasks, case.uses, case.constraints, defer=case.economy.defer)


def with_gaps(log: Log, name: str, tasks: Any, model: int) -> Log:
    """The log with `name` unknown on `tasks` for one model."""
    column = log.per_use[name].copy()
    column[tasks, model] = np.nan
    return replace(log, per_use={**log.per_use, name: column})


def without(log: Log, *names: str) -> Log:
    return replace(log, per_use={k: v for k, v in log.per_use.items() if k not in names})


# --- worth --------------------------------------------------------------------------------------------------------


def test_a_declared_value_holds_for_everybody_and_says_so() -> None:
    case = build_case(random_log(0), Economy(value=2.0))
    assert (case.tasks.value == 2.0).all()
    assert any("the log's own values are not used" in note for note in case.notes)


def test_the_log_s_values_are_used_when_nothing_is_declared() -> None:
    log = random_log(0)
    case = build_case(log, Economy())
    assert_array_equal(case.tasks.value, log.value)
    assert case.notes == ()


def test_a_value_column_wins_where_it_is_filled() -> None:
    log = random_log(0)
    assert log.value is not None
    value = log.value.copy()
    value[::2] = np.nan
    case = build_case(replace(log, value=value), Economy(value=2.0, value_column="worth"))
    assert_array_equal(case.tasks.value[::2], 2.0)
    assert_array_equal(case.tasks.value[1::2], value[1::2])


def test_a_class_is_more_special_than_a_tenant_and_a_tenant_than_everybody() -> None:
    log = random_log(0)
    economy = Economy(
        value=1.0,
        lambda0=0.1,
        rho0=2.0,
        tenants={"tenant0": Tenant(value=5.0, lambda0=0.5, rho0=3.0)},
        classes={"class1": TaskClass(value=7.0, rho0=4.0)},
    )
    tasks = build_case(log, economy).tasks
    assert log.tenant is not None
    assert log.task_class is not None
    in_tenant, in_class = log.tenant.equal("tenant0"), log.task_class.equal("class1")
    assert (in_tenant & in_class).any()
    assert_array_equal(tasks.value, np.where(in_class, 7.0, np.where(in_tenant, 5.0, 1.0)))
    assert_array_equal(tasks.risk_price, np.where(in_class, 4.0, np.where(in_tenant, 3.0, 2.0)))
    assert_array_equal(tasks.latency_price, np.where(in_tenant, 0.5, 0.1))


def test_defaults_of_the_declared_prices() -> None:
    tasks = build_case(random_log(0), Economy(value=1.0)).tasks
    assert (tasks.latency_price == 0).all()
    assert (tasks.risk_price == 1).all()


def test_a_tenant_s_value_leaves_the_others_theirs() -> None:
    log = random_log(0)
    case = build_case(log, Economy(tenants={"tenant0": Tenant(value=5.0)}))
    assert log.tenant is not None
    mine = log.tenant.equal("tenant0")
    assert_array_equal(case.tasks.value, np.where(mine, 5.0, log.value))
    assert any(f"not used on {mine.sum()} tasks" in note for note in case.notes)


def test_only_a_tenant_s_value_is_not_enough() -> None:
    economy = Economy(tenants={"tenant0": Tenant(value=1.0)})
    with pytest.raises(SettingsError, match=r"\d+ of 300 tasks have no value"):
        build_case(replace(random_log(0), value=None), economy)


# --- [Z-LEX] ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 1e12])
@pytest.mark.parametrize("defer", [True, False])
def test_no_price_buys_a_forbidden_model(value: float, defer: bool) -> None:
    log = random_log(1)
    economy = Economy(
        value=value,
        defer=defer,
        budget_usd=0.1,
        tenants={"tenant0": Tenant(forbidden_models=("large",))},
        classes={"class2": TaskClass(forbidden_models=("medium",))},
    )
    case = build_case(log, economy)
    mix = clear(case).mix
    assert log.tenant is not None
    assert log.task_class is not None
    for members, model in ((log.tenant.equal("tenant0"), 2), (log.task_class.equal("class2"), 1)):
        assert not case.uses.allowed[members, model].any()
        assert not (members[mix.task] & (mix.use == model) & (mix.share > 0)).any()
        assert ((mix.use == model) & ~members[mix.task]).any(), "others do buy it"


def test_a_tenant_for_whom_all_is_forbidden_gets_nothing() -> None:
    economy = Economy(value=1e9, tenants={"tenant0": Tenant(forbidden_models=("small", "medium", "large"))})
    case = build_case(random_log(1), economy)
    mix = clear(case).mix
    assert case.tasks.tenant is not None
    mine = case.tasks.tenant.equal("tenant0")
    assert_array_equal(mix.use[mine[mix.task]], DEFER)
    can_be_solved = case.uses.quality.any(axis=1)
    assert (mix.use[(~mine & can_be_solved)[mix.task]] != DEFER).all()


def test_a_forbidden_baseline_is_refused() -> None:
    economy = Economy(value=1.0, baseline="large", tenants={"tenant0": Tenant(forbidden_models=("large",))})
    with pytest.raises(SettingsError, match="baseline large: it is forbidden"):
        build_case(random_log(1), economy)


# --- budgets of tenants, resources --------------------------------------------------------------------------------


def test_budgets_given_as_sums_are_means_over_their_scope() -> None:
    log = random_log(2)
    economy = Economy(value=1.0, budget_total_usd=9.0, tenants={"tenant1": Tenant(budget_total_usd=3.0)})
    case = build_case(log, economy)
    assert log.tenant is not None
    members = int(log.tenant.equal("tenant1").sum())
    assert case.constraints == (
        Constraint("budget", 9.0 / 300),
        Constraint("budget", 3.0 / members, Scope(tenant="tenant1")),
    )


def test_a_budget_given_as_a_sum_is_for_the_tasks_that_are_audited() -> None:
    log = with_gaps(random_log(2), "quality", np.arange(60), 0)
    case = build_case(log, Economy(value=1.0, budget_total_usd=9.0))
    assert (len(case.tasks), case.left_out) == (240, 60)
    assert case.constraints == (Constraint("budget", 9.0 / 240),)


def test_each_tenant_has_its_own_price() -> None:
    economy = Economy(
        value=1.0, tenants={"tenant0": Tenant(budget_usd=0.02), "tenant1": Tenant(budget_usd=9.0)}
    )
    cleared = clear(build_case(random_log(2), economy))
    poor, rich = cleared.usage
    assert poor.used == pytest.approx(0.02, rel=1e-6)
    assert poor.multiplier > 0
    assert (rich.used < 9, rich.multiplier) == (True, 0.0)


def test_a_resource_has_a_price_and_a_cap() -> None:
    log = random_log(3)
    gpu = log.per_use["latency_s"] * 2
    log = replace(log, per_use={**log.per_use, "gpu_s": gpu})
    economy = Economy(
        value=1.0, resources={"gpu": Resource(column="gpu_s", price_usd=0.001, limit=6.0, hard=True)}
    )
    case = build_case(log, economy)
    assert case.uses.resources == ("usd", "gpu")
    assert_array_equal(case.uses.amount("gpu"), gpu)
    cleared = discover(case.tasks, case.uses, case.constraints, declared=economy.declared())
    (usage,) = cleared.usage
    assert usage.constraint.hard
    assert usage.used == pytest.approx(6.0, rel=1e-6)
    assert usage.multiplier > 0
    mix = cleared.mix
    on = mix.use != DEFER
    assert (mix.share[on] * gpu[mix.task[on], mix.use[on]]).sum() / 300 == pytest.approx(6.0, rel=1e-6)


# --- what is left out ---------------------------------------------------------------------------------------------


def test_incomplete_tasks_are_left_out_when_most_are_complete() -> None:
    case = build_case(with_gaps(random_log(4), "cost_usd", np.arange(100), 1), Economy(value=1.0))
    assert (len(case.tasks), case.left_out, case.complete) == (200, 100, True)
    assert any("100 tasks left out" in note for note in case.notes)


def test_a_production_log_keeps_its_gaps() -> None:
    log = random_log(4)
    rows = np.arange(300)
    quality = np.full((300, 3), np.nan)
    quality[rows, log.chosen] = log.per_use["quality"][rows, log.chosen]
    quality[:30] = log.per_use["quality"][:30]
    case = build_case(replace(log, per_use={**log.per_use, "quality": quality}), Economy(value=1.0))
    assert (len(case.tasks), case.left_out, case.complete) == (300, 0, False)
    assert_array_equal(case.uses.allowed, ~np.isnan(quality))
    assert case.baseline == "realised"
    assert any("only 10% of the tasks have every model's outcome" in note for note in case.notes)


def test_in_a_production_log_a_choice_without_outcome_is_left_out() -> None:
    log = random_log(4)
    quality = np.full((300, 3), np.nan)
    quality[:, 0] = 1.0  # only the small model was ever graded
    case = build_case(replace(log, per_use={**log.per_use, "quality": quality}), Economy(value=1.0))
    assert case.uses.names == ("small",)
    # Where another model was chosen nobody knows what came of it: that is not the same as deferring.
    assert len(case.tasks) == (log.chosen == 0).sum()
    assert case.left_out == (log.chosen != 0).sum()
    assert (case.chosen == 0).all()
    assert any("no complete record: medium, large" in note for note in case.notes)
    assert any("what the chosen model gave is unknown" in note for note in case.notes)


def test_a_log_without_a_single_whole_record() -> None:
    log = with_gaps(random_log(4), "quality", slice(150), slice(None))
    log = with_gaps(log, "cost_usd", slice(150, None), slice(None))
    with pytest.raises(RecordError, match="no record has all of quality, cost_usd"):
        build_case(log, Economy(value=1.0))


# --- what is audited ----------------------------------------------------------------------------------------------


def test_the_log_s_choices_are_audited_when_it_has_them() -> None:
    log = random_log(5)
    chosen = log.chosen.copy()
    chosen[:7] = UNKNOWN
    case = build_case(replace(log, chosen=chosen), Economy(value=1.0))
    assert case.baseline == "realised"
    assert_array_equal(case.chosen, np.where(np.arange(300) < 7, DEFER, log.chosen))
    assert any("7 tasks have no chosen model" in note for note in case.notes)


def test_the_best_fixed_model_stands_in_for_choices_that_are_not_recorded() -> None:
    log = replace(random_log(5), chosen=np.full(300, UNKNOWN))
    case = build_case(log, Economy(value=1.0))
    assert case.baseline == "best fixed"
    surplus = 1.0 * log.per_use["quality"] - log.per_use["cost_usd"] - log.per_use["risk"]
    assert (case.chosen == surplus.mean(axis=0).argmax()).all()
    assert any("stands in" in note for note in case.notes)


def test_a_named_model_is_audited() -> None:
    case = build_case(random_log(5), Economy(value=1.0, baseline="medium"))
    assert (case.baseline, set(case.chosen.tolist())) == ("medium", {1})


def test_best_fixed_meets_the_constraints_if_any_model_does() -> None:
    log = without(random_log(5), "risk", "latency_s")
    dear, cheap = (build_case(log, Economy(value=100.0, budget_usd=b)) for b in (1e-6, 0.02))
    found = [best_fixed(c.tasks, c.uses, c.constraints, c.economy) for c in (dear, cheap)]
    assert found[0] is not None
    assert found[1] is not None
    # Nobody fits 1e-6 USD, so the best of all is named, and said to break the budget; 0.02 USD buys only the small one.
    assert (found[0].use, found[0].feasible) == (2, False)
    assert (found[1].use, found[1].feasible) == (0, True)
    assert_allclose(
        found[1].surplus, (100 * log.per_use["quality"] - log.per_use["cost_usd"]).mean(axis=0)[0]
    )


def test_best_fixed_in_the_pure_form_is_quality_alone() -> None:
    case = build_case(random_log(5), Economy(value=2.0, budget_usd=9.0, numeraire="compute"))
    fixed = best_fixed(case.tasks, case.uses, case.constraints, case.economy)
    assert fixed is not None
    assert_allclose(fixed.surplus, 2.0 * case.uses.quality.mean(axis=0).max())


def test_no_model_for_everybody() -> None:
    economy = Economy(
        value=1.0,
        tenants={
            "tenant0": Tenant(forbidden_models=("small", "medium")),
            "tenant1": Tenant(forbidden_models=("large",)),
        },
    )
    log = replace(random_log(5), chosen=np.full(300, UNKNOWN))
    with pytest.raises(
        SettingsError,
        match="neither says what was chosen nor has one model with a complete record on every task",
    ):
        build_case(log, economy)


# --- groups -------------------------------------------------------------------------------------------------------


def test_labels_that_do_not_occur_are_no_group() -> None:
    labels = Labels(np.array([0, 2, 0, -1]), ("a", "b", "c"))
    groups = {name: mask.tolist() for name, mask in by_label(labels)}
    assert groups == {"a": [True, False, True, False], "c": [False, True, False, False]}
    assert by_label(None) == []


def test_taking_tasks_takes_everything_with_them() -> None:
    case = build_case(random_log(6), Economy(value=1.0))
    some = case.take(np.array([5, 3]))
    assert_array_equal(some.chosen, case.chosen[[5, 3]])
    assert_array_equal(some.uses.quality, case.uses.quality[[5, 3]])
    assert_array_equal(some.tasks.value, case.tasks.value[[5, 3]])
