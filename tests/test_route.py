"""Routing by estimates at prices: [Z-4] by hand, and everything that moves a request moves it through a price."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import write_jsonl
from routers import sure_log
from walras.demand.explore import Softmax, Thompson
from walras.demand.route import Exploring, Routing, ask_of, route
from walras.equation import DEFER
from walras.errors import QuantityError, RecordError, SettingsError
from walras.estimate.estimates import ALSO, Estimates, Live, fit_estimates
from walras.estimate.price_table import load_price_table
from walras.prices import Constraint, Price, Prices, Scope
from walras.records import read_log
from walras.records.asks import Asked
from walras.risk import CVaR, FloatArray, risk_of
from walras.settings import Economy
from walras.simulate import write_sample

ON = dt.date(2025, 6, 1)
"""A day on which gpt-4o costs 2.5 in, 1.25 cached, 10 out, and gpt-4o-mini 0.15, 0.075, 0.6 USD per million tokens."""


def learned(path: Path, **options: Any) -> Estimates:
    return fit_estimates(read_log([path], losses=True, also=("prompt", *ALSO), **options))


def sure(folder: Path, models: Mapping[str, Mapping[str, float]], requests: int = 40) -> Estimates:
    return learned(sure_log(folder / "sure.jsonl", models, requests))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routers")


@pytest.fixture(scope="module")
def sample(folder: Path) -> Estimates:
    write_sample(folder / "sample.parquet", 300, seed=0)
    return learned(folder / "sample.parquet")


GOLDEN = {
    "cheap": {"quality": 0.7, "cost_usd": 1.0, "risk": 0.05, "latency_s": 1.0},
    "frontier": {"quality": 0.9, "cost_usd": 5.0, "risk": 0.01, "latency_s": 4.0},
}
"""The worked example of [Z §2]."""


@pytest.fixture(scope="module")
def golden(folder: Path) -> Estimates:
    return sure(folder, GOLDEN)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Estimates:
    """Of a log with quality and cost only."""
    models = {"a": {"quality": 0.5, "cost_usd": 1.0}, "b": {"quality": 0.9, "cost_usd": 2.0}}
    return sure(tmp_path_factory.mktemp("bare"), models)


def one(estimates: Estimates, economy: Economy, prompt: str = "", **said: Any) -> Routing:
    said = {"task_class": "all", **said}
    return route(estimates, ask_of(estimates, [Asked("r", prompt, **said)]), economy)


def many(asked: Sequence[Mapping[str, Any]]) -> list[Asked]:
    return [Asked(**{"request_id": f"r{k}", "prompt": "", **row}) for k, row in enumerate(asked)]


def expected_spend(routing: Routing) -> float:
    """Mean USD over the draws, not over one of them."""
    i = len(routing.uses.names)
    return float((routing.drawn.probability[:, :i] * routing.uses.amounts[:, :, 0]).sum(axis=1).mean())


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rho0", "chosen", "worth"),
    [
        (10, 0, "cheap", (6, 4)),
        (100, 0, "frontier", (69, 85)),
        (19.999, 0, "cheap", (12.9993, 12.9991)),
        (20.001, 0, "frontier", (13.0007, 13.0009)),
        # The cheap model loses a further 2 by wrong actions, and the crossover falls from 20 to 10.
        (9.999, 50, "cheap", (3.4993, 3.4991)),
        (10.001, 50, "frontier", (3.5007, 3.5009)),
    ],
)
def test_golden_crossover(
    golden: Estimates, value: float, rho0: float, chosen: str, worth: tuple[float, float]
) -> None:
    routing = one(golden, Economy(value=value, rho0=rho0))
    assert routing.model(0) == chosen
    np.testing.assert_allclose(routing.values, [worth], atol=1e-6)


@given(
    value=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    lambda0=st.floats(0, 0.1),
    rho0=st.floats(0, 5),
    mu=st.floats(0, 20),
    defer=st.booleans(),
)
def test_the_rule_by_hand(
    sample: Estimates, value: list[float], lambda0: float, rho0: float, mu: float, defer: bool
) -> None:
    """V·q̂ − (1 + μ)·c − λ₀·l − ρ₀·r from what the estimates offer, its four terms, and the best of it."""
    classes = (*sample.quality.classes, "never seen")
    asked = many([{"value_usd": v, "task_class": classes[k]} for k, v in enumerate(value)])
    economy = Economy(lambda0=lambda0, rho0=rho0, defer=defer)
    prices = Prices((Price(Constraint("budget", 0.01), mu),))
    ask = ask_of(sample, asked)
    routing = route(sample, ask, economy, prices=prices)
    offered = sample.offer(ask.requests).uses
    terms = (
        np.array(value)[:, None] * offered.quality,
        (1 + mu) * offered.amounts[:, :, 0],
        lambda0 * offered.seconds,
        rho0 * offered.risk,
    )
    worth = terms[0] - terms[1] - terms[2] - terms[3]
    np.testing.assert_allclose(routing.values, worth, rtol=1e-9, atol=1e-12)
    for got, term in zip(
        (routing.terms.value, routing.terms.compute, routing.terms.latency, routing.terms.risk),
        terms,
        strict=True,
    ):
        np.testing.assert_allclose(got, term, rtol=1e-9, atol=1e-15)
    best = worth.max(axis=1)
    got = np.where(routing.drawn.use == DEFER, 0.0, worth[np.arange(len(value)), routing.drawn.use])
    np.testing.assert_allclose(got, np.maximum(best, 0.0) if defer else best, rtol=1e-7, atol=1e-9)


def test_errors_of_the_value_are_those_of_quality_and_money(sample: Estimates) -> None:
    prices = Prices((Price(Constraint("budget", 0.01), 3.0),))
    ask = ask_of(sample, many([{"value_usd": 2.0}]))
    routing, offered = route(sample, ask, Economy(), prices=prices), sample.offer(ask.requests)
    by_hand = np.sqrt((2.0 * offered.quality_error) ** 2 + (4.0 * offered.usd_error) ** 2)
    np.testing.assert_allclose(routing.value_error, by_hand)
    assert (offered.quality_error > 0).all()
    assert (offered.usd_error > 0).all()


def test_a_request_alone_and_in_a_batch_gets_the_same(sample: Estimates) -> None:
    prompts = ["", "Sum 1 and 2.", "Write a poem about tax.\n" * 40, "日本語", "x" * 20_000]
    asked = many([{"prompt": text, "value_usd": 0.1 * (1 + k)} for k, text in enumerate(prompts)])
    batch = route(sample, ask_of(sample, asked), Economy())
    for k, request in enumerate(asked):
        alone = route(sample, ask_of(sample, [request]), Economy())
        assert alone.model(0) == batch.model(k)
        np.testing.assert_allclose(alone.values[0], batch.values[k], rtol=1e-6)


def test_deferring_when_nothing_is_worth_its_price(golden: Estimates) -> None:
    assert one(golden, Economy(value=1, rho0=0)).model(0) == "defer"
    assert one(golden, Economy(value=1.5, rho0=0)).model(0) == "cheap"
    forced = one(golden, Economy(value=1, rho0=0, defer=False))
    assert forced.model(0) == "cheap"
    assert forced.shares == {"cheap": 1.0, "frontier": 0.0, "defer": 0.0}


# --- what a request is worth, and what is forbidden -------------------------------------------------------------------


def test_whose_value_counts(golden: Estimates) -> None:
    """The request's own, else its class's, else its tenant's, else everybody's."""
    economy = Economy.model_validate(
        {"value": 1, "tenants": {"acme": {"value": 2}}, "classes": {"all": {"value": 3}}}
    )
    asked = many(
        [
            {"value_usd": 4.0, "tenant": "acme", "task_class": "all"},
            {"tenant": "acme", "task_class": "all"},
            {"tenant": "acme", "task_class": "other"},
            {"tenant": "other"},
            {},
            {"value_usd": 0.0},
        ]
    )
    assert route(golden, ask_of(golden, asked), economy).tasks.value.tolist() == [4, 3, 2, 1, 1, 0]


def test_a_request_without_a_value_is_named(golden: Estimates) -> None:
    asked = many([{"value_usd": 1.0}, {"request_id": "lost"}])
    with pytest.raises(SettingsError, match=r"value: request 'lost' has no value.*--value"):
        route(golden, ask_of(golden, asked), Economy())


def test_settings_of_a_tenant_who_does_not_ask(golden: Estimates) -> None:
    """Its limits hold for nobody here, and nobody is charged for them."""
    economy = Economy.model_validate({"value": 100, "tenants": {"acme": {"budget_usd": 0, "value": 3}}})
    assert one(golden, economy).model(0) == "frontier"
    assert one(golden, economy, tenant="other").model(0) == "frontier"
    assert one(golden, economy, tenant="acme").model(0) == "defer"


@pytest.mark.parametrize("kind", ["tenants", "classes"])
def test_no_price_buys_a_forbidden_model(golden: Estimates, kind: str) -> None:
    economy = Economy.model_validate({"value": 1e6, kind: {"strict": {"forbidden_models": ["frontier"]}}})
    key = {"tenants": "tenant", "classes": "task_class"}[kind]
    asked = many([{key: "strict"}, {key: "other"}, {}])
    routing = route(golden, ask_of(golden, asked), economy)
    assert [routing.model(row) for row in range(3)] == ["cheap", "frontier", "frontier"]
    assert routing.values[0, 1] == -np.inf
    exploring = Exploring(Softmax(1e9), cap=1e9, floor=0.2)
    assert route(golden, ask_of(golden, asked), economy, exploring=exploring).drawn.probability[0, 1] == 0


def test_everything_forbidden(golden: Estimates) -> None:
    tables = {"classes": {"all": {"forbidden_models": ["cheap", "frontier"]}}, "value": 9}
    assert one(golden, Economy.model_validate(tables)).model(0) == "defer"
    with pytest.raises(QuantityError, match="may not defer"):
        one(golden, Economy.model_validate(tables | {"defer": False}))


def test_a_forbidden_model_that_does_not_exist(golden: Estimates) -> None:
    economy = Economy.model_validate({"value": 9, "tenants": {"acme": {"forbidden_models": ["fronteer"]}}})
    with pytest.raises(SettingsError, match=r"tenants\.acme\.forbidden_models.*did you mean 'frontier'"):
        one(golden, economy)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_falling_budget_only_raises_a_price(sample: Estimates) -> None:
    """Spend falls to within each budget, the price of money never falls, and every choice is the best at that price."""
    rng = np.random.default_rng(0)
    names = sample.quality.classes
    asked = many(
        [
            {"value_usd": float(v), "task_class": names[k % len(names)]}
            for k, v in enumerate(rng.lognormal(-1, 1, 240))
        ]
    )
    ask = ask_of(sample, asked)
    free = route(sample, ask, Economy())
    last, dear = -1.0, 1.0
    for share in (1.1, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01, 0.0):
        budget = share * expected_spend(free)
        routing = route(sample, ask, Economy(budget_usd=budget))
        (price,) = routing.prices.discovered
        assert expected_spend(routing) <= budget * (1 + 1e-6) + 1e-12
        assert price.multiplier >= last - 1e-9
        last = price.multiplier
        assert (last > 0) == (share < 1)
        at = np.maximum(routing.drawn.use, 0)[:, None]
        got = np.where(routing.drawn.use == DEFER, 0.0, np.take_along_axis(routing.values, at, 1)[:, 0])
        best = np.maximum(routing.values.max(axis=1), 0.0)
        np.testing.assert_allclose(got, best, atol=1e-6 * np.abs(routing.terms.value).max())
        now = routing.shares["large"] + routing.shares["frontier"]
        assert now <= dear + 1e-9
        dear = now
    assert routing.shares["defer"] == 1.0


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0, 1.7, 3.0, 4.9])
def test_requests_that_look_alike_keep_to_the_budget(golden: Estimates, budget: float) -> None:
    """All are tied at the price that binds; the market's mixture, not an even draw, keeps to the bound."""
    asked = many([{"value_usd": 100.0, "task_class": "all"}] * 400)
    routing = route(golden, ask_of(golden, asked), Economy(budget_usd=budget, rho0=0))
    assert expected_spend(routing) == pytest.approx(budget, rel=1e-6, abs=1e-9)
    paid = np.where(routing.drawn.use == DEFER, 0.0, routing.uses.amounts[0, routing.drawn.use, 0])
    assert paid.mean() == pytest.approx(budget, abs=4 * 5 / 2 / 400**0.5)


def test_a_budget_in_all_is_a_budget_each(golden: Estimates) -> None:
    asked = ask_of(golden, many([{"value_usd": 100.0}] * 10))
    each, whole = (
        route(golden, asked, Economy.model_validate({key: bound}))
        for key, bound in (("budget_usd", 2.0), ("budget_total_usd", 20.0))
    )
    assert whole.prices.discovered[0].multiplier == pytest.approx(each.prices.discovered[0].multiplier)
    assert expected_spend(whole) == pytest.approx(2.0)


def test_a_mean_sla_and_a_quantile_sla_are_kept(sample: Estimates) -> None:
    asked = ask_of(sample, many([{"value_usd": 0.5 + 0.01 * k} for k in range(120)]))
    free = route(sample, asked, Economy())
    mean = route(sample, asked, Economy(sla_s=5.0))

    def served_mean(routing: Routing, column: FloatArray) -> float:
        p = routing.drawn.probability[:, : column.shape[1]]
        return float((p * column).sum() / p.sum())

    assert served_mean(free, free.uses.seconds) > 5.0
    assert served_mean(mean, mean.uses.seconds) <= 5.0 * (1 + 1e-6)
    late = route(sample, asked, Economy(sla_s=10.0, sla_quantile=0.9))
    assert served_mean(late, late.uses.late_share(10.0)) <= 0.1 * (1 + 1e-6)
    assert ((late.uses.late_share(10.0) > 0) & (late.uses.late_share(10.0) < 1)).any()
    assert late.prices.discovered[0].multiplier > 0


def test_live_prices_are_charged_as_they_are(sample: Estimates) -> None:
    """Whatever the settings of the market were: money, a quantile SLA, a portfolio envelope; and no limit is priced anew."""
    prices = Prices(
        (
            Price(Constraint("budget", 0.01), 4.0),
            Price(Constraint("quantile_sla", 0.1, seconds=20.0), 0.5),
            Price(
                Constraint("portfolio_envelope", 0.01, measure=CVaR(0.5), density=tuple(np.arange(16) / 120)),
                2.0,
            ),
        )
    )
    ask = ask_of(sample, many([{"value_usd": 1.0, "task_class": sample.quality.classes[0]}]))
    routing = route(sample, ask, Economy(budget_usd=1e-9), prices=prices)
    assert routing.prices == prices
    offered = sample.offer(ask.requests, late_at=(20.0,)).uses
    np.testing.assert_allclose(routing.terms.compute, 5.0 * offered.amounts[:, :, 0])
    np.testing.assert_allclose(routing.terms.latency, 0.5 * (offered.late[20.0] - 0.1))
    tail = sample.losses_of(ask.requests) @ (np.arange(16) / 120)
    np.testing.assert_allclose(routing.terms.risk, offered.risk + 2.0 * tail)


def test_a_price_of_one_tenant_is_paid_by_it_alone(golden: Estimates) -> None:
    prices = Prices((Price(Constraint("budget", 1.0, Scope(tenant="acme")), 9.0),))
    asked = many([{"tenant": "acme"}, {"tenant": "other"}, {}])
    routing = route(golden, ask_of(golden, asked), Economy(value=100), prices=prices)
    np.testing.assert_allclose(routing.terms.compute[:, 0], [10.0, 1.0, 1.0])
    alone = route(golden, ask_of(golden, asked[2:]), Economy(value=100), prices=prices)
    np.testing.assert_allclose(alone.terms.compute[:, 0], [1.0])


@pytest.mark.parametrize(
    ("economy", "prices", "column"),
    [
        ({"sla_s": 1}, None, "latency_s"),
        ({"sla_s": 1, "sla_quantile": 0.9}, None, "latency_s"),
        ({"lambda0": 0.1}, None, "latency_s"),
        ({"tenants": {"acme": {"lambda0": 0.1}}}, None, "latency_s"),
        ({"risk": 0.1}, None, "risk"),
        ({"rho_irr": 1}, None, "irreversible_risk"),
        ({"risk_measure": "cvar"}, None, "risk_scenarios or loss_usd"),
        ({}, Constraint("mean_sla", 1.0), "latency_s"),
        ({}, Constraint("quantile_sla", 0.1, seconds=1.0), "latency_s"),
        ({}, Constraint("risk_envelope", 1.0), "risk"),
    ],
)
def test_what_was_never_logged_has_no_price(
    bare: Estimates, economy: dict[str, Any], prices: Constraint | None, column: str
) -> None:
    """A router that never saw seconds must not say that its models take none."""
    with pytest.raises(SettingsError, match=column):
        route(
            bare,
            ask_of(bare, many([{}])),
            Economy.model_validate({"value": 9} | economy),
            prices=prices and Prices((Price(prices, 1.0),)),
        )


# --- warm caches, list prices, efforts, load --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Estimates:
    """gpt-4o is a little better; what it costs more is more than that, unless its cache is warm."""
    tokens = {"input_tokens": 8000.0, "output_tokens": 500.0}
    return sure(
        tmp_path_factory.mktemp("chatting"),
        {
            "gpt-4o": {"quality": 0.9, "cost_usd": 0.025, **tokens},
            "gpt-4o-mini": {"quality": 0.8, "cost_usd": 0.0015, **tokens},
        },
    )


@pytest.mark.parametrize("list_prices", [False, True])
@pytest.mark.parametrize("value", [0.15, 0.18, 0.2])
def test_staying_wins_just_when_the_cache_saves_more_than_the_gap(
    chatting: Estimates, list_prices: bool, value: float
) -> None:
    """Leaving a warm model costs (2.5 − 1.25) USD per million tokens of its prefix: no bonus, a bill [Z §3.1]."""
    live, economy = Live(load_price_table(), ON, list_prices), Economy(value=value)

    def routed(cached: Mapping[str, float] | None) -> Routing:
        ask = ask_of(chatting, many([{"task_class": "all", "cached_tokens": cached}]))
        return route(chatting, ask, economy, live=live)

    cold = routed(None)
    assert cold.model(0) == "gpt-4o-mini"
    gap = float(cold.values[0, 1] - cold.values[0, 0])
    assert gap == pytest.approx(0.0235 - 0.1 * value)
    enough = gap / 1.25e-6
    assert 2000 < enough < 8000
    assert routed({"gpt-4o": enough - 1}).model(0) == "gpt-4o-mini"
    assert routed({"gpt-4o": enough + 1}).model(0) == "gpt-4o"
    saved = cold.values - routed({"gpt-4o": 1000.0}).values
    np.testing.assert_allclose(saved, [[-1000 * 1.25e-6, 0.0]], atol=1e-12)
    # A cache that is warm on both is no reason to stay on the dearer one.
    both = routed({"gpt-4o": enough + 1, "gpt-4o-mini": enough + 1})
    assert both.values[0, 1] == pytest.approx(cold.values[0, 1] + (enough + 1) * 0.075e-6)


def test_a_cache_is_of_one_request(chatting: Estimates) -> None:
    asked = many(
        [{"cached_tokens": {"gpt-4o": 7900}}, {}, {"cached_tokens": {"gpt-4o-mini": 7900, "gpt-4o": 0}}]
    )
    routing = route(chatting, ask_of(chatting, asked), Economy(value=0.15), live=Live(load_price_table(), ON))
    assert [routing.model(row) for row in range(3)] == ["gpt-4o", "gpt-4o-mini", "gpt-4o-mini"]


def test_a_cache_never_pays_back_more_than_the_bill(chatting: Estimates) -> None:
    for list_prices in (False, True):
        ask = ask_of(chatting, many([{"cached_tokens": {"gpt-4o": 1e12}}]))
        routing = route(chatting, ask, Economy(value=1), live=Live(load_price_table(), ON, list_prices))
        assert routing.uses.amounts[0, 0, 0] >= 0.0
    assert routing.uses.amounts[0, 0, 0] == pytest.approx(8000 * 1.25e-6 + 500 * 10e-6)


def test_list_prices_are_those_of_the_day(chatting: Estimates) -> None:
    ask = ask_of(chatting, many([{}]))

    def usd(on: dt.date) -> list[float]:
        live = Live(load_price_table(), on, list_prices=True)
        return list(route(chatting, ask, Economy(value=1), live=live).uses.amounts[0, :, 0])

    assert usd(ON) == pytest.approx([8000 * 2.5e-6 + 500 * 10e-6, 8000 * 0.15e-6 + 500 * 0.6e-6])
    assert usd(dt.date(2024, 7, 20))[0] == pytest.approx(8000 * 5e-6 + 500 * 15e-6)
    with pytest.raises(SettingsError, match="'gpt-4o' has no price on 2020-01-01"):
        usd(dt.date(2020, 1, 1))


def test_list_prices_need_tokens_and_a_table(golden: Estimates, tmp_path: Path) -> None:
    ask = ask_of(golden, many([{}]))
    with pytest.raises(SettingsError, match="need a price table and a day"):
        route(golden, ask, Economy(value=1), live=Live(list_prices=True))
    with pytest.raises(SettingsError, match="without 'output_tokens'"):
        route(golden, ask, Economy(value=1), live=Live(load_price_table(), ON, list_prices=True))
    warm = ask_of(golden, many([{"cached_tokens": {"cheap": 10}}]))
    with pytest.raises(SettingsError, match="no price of 'cheap'"):
        route(golden, warm, Economy(value=1), live=Live(load_price_table(), ON))


def test_efforts_are_uses(tmp_path: Path) -> None:
    """gpt-5@low and gpt-5@high are one price list and two uses: the dearer thought is bought where it is worth it."""
    estimates = sure(
        tmp_path,
        {
            "gpt-5@low": {"quality": 0.6, "cost_usd": 1.0, "input_tokens": 1000, "output_tokens": 1000},
            "gpt-5@high": {"quality": 0.9, "cost_usd": 1.0, "input_tokens": 1000, "output_tokens": 10_000},
        },
    )
    live = Live(load_price_table(), dt.date(2025, 9, 1), list_prices=True)
    rate = load_price_table().price("gpt-5", dt.date(2025, 9, 1)).output
    crossover = 9000 * rate / 1e6 / 0.3
    asked = ask_of(estimates, many([{"value_usd": 0.99 * crossover}, {"value_usd": 1.01 * crossover}]))
    routing = route(estimates, asked, Economy(), live=live)
    assert [routing.model(row) for row in range(2)] == ["gpt-5@low", "gpt-5@high"]
    np.testing.assert_allclose(np.diff(routing.uses.amounts[0, :, 0]), 9000 * rate / 1e6)


def test_a_model_without_reasoning_may_leave_it_out(tmp_path: Path) -> None:
    """A column that says nothing of one model is not learned; it stops nobody from routing."""
    tokens = {"input_tokens": 100.0, "output_tokens": 100.0}
    estimates = sure(
        tmp_path,
        {
            "gpt-4o": {"quality": 0.5, "cost_usd": 1.0, **tokens},
            "gpt-5": {"quality": 0.9, "cost_usd": 2.0, "reasoning_tokens": 50.0, "latency_s": 3.0, **tokens},
        },
    )
    assert set(estimates.amounts) == {"cost_usd", "input_tokens", "output_tokens"}
    assert one(estimates, Economy(value=10)).model(0) == "gpt-5"
    with pytest.raises(SettingsError, match=r"without 'latency_s'.*for every model"):
        one(estimates, Economy(value=10, lambda0=1))


def test_load_makes_a_model_slow_and_its_requests_go_elsewhere(sample: Estimates) -> None:
    ask = ask_of(sample, many([{"value_usd": 1.0}]))
    busy = sample.models.index("large")
    seconds = []
    for load in (0.0, 4.0, 16.0, 400.0):
        running = np.ones(len(sample.models))
        running[busy] += load
        live = Live(running=running, waiting=np.where(running > 1, load, 0.0))
        routing = route(sample, ask, Economy(lambda0=0.001), live=live)
        seconds.append(routing.uses.seconds[0])
        np.testing.assert_array_equal(np.delete(seconds[-1], busy), np.delete(seconds[0], busy))
    assert (np.diff([s[busy] for s in seconds]) > 0).all()
    calm = route(sample, ask, Economy(lambda0=0.001), live=Live(running=np.ones(len(sample.models))))
    assert calm.model(0) == "large"
    assert routing.model(0) != "large"


# --- exploring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Softmax(0.05), Thompson()])
def test_propensities_are_what_is_drawn(sample: Estimates, policy: Softmax | Thompson) -> None:
    """They sum to 1, and over many ids each use is drawn as often as they say."""
    n = 4000
    ask = ask_of(sample, many([{"value_usd": 0.2}] * n))
    drawn = route(sample, ask, Economy(), exploring=Exploring(policy, cap=np.inf)).drawn
    np.testing.assert_allclose(drawn.probability.sum(axis=1), 1.0, atol=1e-9)
    p = drawn.probability[0]
    assert (p[p < 1e-12] == 0).all()
    assert 0.02 < p.max() < 0.98
    at = np.where(drawn.use == DEFER, len(sample.models), drawn.use)
    np.testing.assert_array_equal(drawn.propensity, p[at])
    share = np.bincount(at, minlength=p.size) / n
    assert np.abs(share - p).max() < 4 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("cap", [0.0, 1e-4, 0.003, 0.05])
def test_a_cap_on_regret_is_kept(sample: Estimates, cap: float) -> None:
    ask = ask_of(sample, many([{"value_usd": 0.02 * k} for k in range(200)]))
    exploring = Exploring(Softmax(np.inf), cap=cap)
    routing = route(sample, ask, Economy(), exploring=exploring)
    open_to = np.column_stack((routing.values, np.zeros(200)))
    by_hand = open_to.max(axis=1) - (routing.drawn.probability * open_to).sum(axis=1)
    assert (by_hand <= cap + 1e-12).all()
    np.testing.assert_allclose(routing.drawn.regret, by_hand, atol=1e-12)
    if cap:
        assert (routing.drawn.propensity < 1).any()


def test_a_draw_hangs_on_seed_and_id_alone(sample: Estimates) -> None:
    asked = many([{"value_usd": 0.2}] * 300)

    def models(asked: list[Asked], seed: int) -> dict[str, str]:
        exploring = Exploring(Softmax(0.2), cap=np.inf, seed=seed)
        routing = route(sample, ask_of(sample, asked), Economy(), exploring=exploring)
        return {name: routing.model(row) for row, name in enumerate(routing.ids)}

    first = models(asked, 7)
    assert models(asked[::-1], 7) == first
    assert models(asked[40:41], 7) == {"r40": first["r40"]}
    assert models(asked, 8) != first
    assert len(set(first.values())) > 2


def test_exploring_at_a_binding_budget_pays_regret_at_its_price(golden: Estimates) -> None:
    """The mixture that meets the budget costs no regret; what is tried beyond it does."""
    asked = ask_of(golden, many([{"value_usd": 100.0}] * 50))
    economy = Economy(budget_usd=2.0, rho0=0)
    greedy = route(golden, asked, economy)
    np.testing.assert_allclose(greedy.drawn.regret, 0.0, atol=1e-6)
    floored = route(golden, asked, economy, exploring=Exploring(cap=np.inf, floor=0.1))
    assert (floored.drawn.probability.min(axis=1) >= 0.1 - 1e-12).all()
    assert (floored.drawn.regret > 0.1).all()


# --- what estimates offer besides -------------------------------------------------------------------------------------


def test_other_resources_are_amounts_with_prices_and_limits(folder: Path) -> None:
    path = sure_log(
        folder / "gpu.jsonl",
        {
            "cheap": {"quality": 0.7, "cost_usd": 1.0, "gpu_s": 1.0},
            "frontier": {"quality": 0.9, "cost_usd": 5.0, "gpu_s": 8.0},
        },
    )
    estimates = learned(path, extra=["gpu_s"])
    table = {"value": 100, "resources": {"gpu": {"column": "gpu_s", "price_usd": 2.0}}}
    routing = one(estimates, Economy.model_validate(table))
    np.testing.assert_allclose(routing.uses.amount("gpu"), [[1.0, 8.0]])
    np.testing.assert_allclose(routing.values, [[70 - 1 - 2, 90 - 5 - 16]])
    table["resources"]["gpu"]["limit"] = 1.0
    limited = one(estimates, Economy.model_validate(table))
    assert limited.model(0) == "cheap"
    assert limited.prices.discovered[0].multiplier > 0


def test_a_resource_that_was_not_logged(golden: Estimates) -> None:
    economy = Economy.model_validate({"value": 1, "resources": {"gpu": {"column": "gpu_s"}}})
    with pytest.raises(SettingsError, match=r"resources\.gpu: .*without 'gpu_s'.*fit again"):
        one(golden, economy)


def test_scenarios_are_learned_by_class(sample: Estimates, folder: Path) -> None:
    """Their mean is the risk that was logged; the tail measure of [Z-K] is taken of them, use by use."""
    log = read_log([folder / "sample.parquet"], losses=True)
    assert log.losses is not None
    assert log.task_class is not None
    name = "transfer"
    ask = ask_of(sample, many([{"task_class": name, "value_usd": 1.0}]))
    losses = sample.losses_of(ask.requests)
    assert losses.shape == (1, len(log.models), log.losses.shape[2])
    own = log.losses[log.task_class.equal(name)].mean(axis=0)
    np.testing.assert_allclose(losses[0].mean(axis=1), own.mean(axis=1), rtol=0.35)
    plain = route(sample, ask, Economy())
    tail = route(sample, ask, Economy(risk_measure="cvar", risk_alpha=0.9))
    np.testing.assert_allclose(tail.uses.risk, risk_of(losses, CVaR(0.9)))
    assert (tail.terms.risk > plain.terms.risk).all()
    kept = route(sample, ask, Economy(risk_measure="cvar", risk_alpha=0.9, risk_over="portfolio"))
    np.testing.assert_array_equal(kept.uses.risk, plain.uses.risk)


def test_losses_in_fact_stand_in_for_scenarios(tmp_path: Path) -> None:
    """Where the log has only what wrong actions cost: 1 in 20 costs 10 USD with `cheap`, 1 in 100 with `safe`."""
    rows = [
        {
            "request_id": f"r{k}", "model": model, "class": "all", "quality": 1.0, "cost_usd": 0.1,
            "loss_usd": 10.0 if k % every == 0 else 0.0,
        }
        for k in range(600)
        for model, every in (("cheap", 20), ("safe", 100))
    ]  # fmt: skip
    estimates = learned(write_jsonl(tmp_path / "losses.jsonl", rows))
    ask = ask_of(estimates, many([{"task_class": "all", "value_usd": 1.0}]))
    plain = route(estimates, ask, Economy())
    np.testing.assert_allclose(plain.uses.risk, [[0.5, 0.1]], rtol=0.2)
    tail = route(estimates, ask, Economy(risk_measure="cvar", risk_alpha=0.95))
    np.testing.assert_allclose(tail.uses.risk, [[10.0, 2.0]], rtol=0.2)
    assert plain.model(0) == "safe"
    assert tail.model(0) == "defer"


def test_models_the_router_does_not_know(golden: Estimates) -> None:
    with pytest.raises(SettingsError, match=r"does not know the model 'fronteer'.*did you mean 'frontier'"):
        ask_of(golden, many([{"cached_tokens": {"fronteer": 1}}]))


def test_vectors_of_requests_have_one_length(golden: Estimates) -> None:
    with pytest.raises(RecordError, match="3 numbers in one request and 2 in another"):
        ask_of(golden, many([{"embedding": (1.0, 2.0)}, {}, {"embedding": (1.0, 2.0, 3.0)}]))


def test_certainty_decides_how_much_effort(tmp_path: Path) -> None:
    """Little effort is right as often as the first look was sure, much effort always: worth 0.5 USD below half."""
    rows = [
        {
            "request_id": f"r{k}", "model": effort, "class": "all", "certainty": k % 11 / 10,
            "quality": 1.0 if effort == "high" else k % 11 / 10, "cost_usd": 0.6 if effort == "high" else 0.1,
        }
        for k in range(220)
        for effort in ("low", "high")
    ]  # fmt: skip
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    asked = many([{"certainty": c, "task_class": "all"} for c in (0.0, 0.45, 0.55, 1.0, None)])
    estimates = learned(log)
    routing = route(estimates, ask_of(estimates, asked), Economy(value=1.0))
    np.testing.assert_allclose(routing.uses.quality[:, 0], [0.0, 0.45, 0.55, 1.0, 0.5], atol=0.005)
    assert [routing.model(row) for row in range(4)] == ["high", "high", "low", "low"]
    blind = learned(write_jsonl(log, [{k: v for k, v in row.items() if k != "certainty"} for row in rows]))
    unread = route(blind, ask_of(blind, asked), Economy(value=1.0))
    np.testing.assert_allclose(unread.uses.quality[:, 0], 0.5)


def test_a_longer_prompt_costs_what_it_cost_in_the_log(tmp_path: Path) -> None:
    """Money is linear in the prompt's bytes here; by its length alone a request moves to the flat-rate model."""
    rows = [
        {
            "request_id": f"r{k}", "model": model, "class": "all", "quality": 0.8, "prompt": "é" * 10 * k,
            "cost_usd": 1e-4 * 20 * k if model == "metered" else 0.1,
        }
        for k in range(100)
        for model in ("metered", "flat")
    ]  # fmt: skip
    estimates = learned(write_jsonl(tmp_path / "log.jsonl", rows))
    asked = many([{"prompt": "x" * n, "task_class": "all", "value_usd": 1.0} for n in (100, 900, 1100, 1900)])
    routing = route(estimates, ask_of(estimates, asked), Economy())
    np.testing.assert_allclose(
        routing.uses.amounts[:, :, 0], [[1e-4 * n, 0.1] for n in (100, 900, 1100, 1900)], atol=0.002
    )
    assert [routing.model(row) for row in range(4)] == ["metered", "metered", "flat", "flat"]
