"""Capacity: the best fleet against all fleets, marginal values, the command's contract, and what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from engines import flat_steps
from logs import walras
from walras.engine.requests import Requests
from walras.engine.settings import Disaggregation, EngineSettings, Routing
from walras.errors import InfeasibleError, SettingsError
from walras.supply.capacity import Fleet, Planner, Shop

BURST = 240
SHOP = Shop(10.0, kv_usd_h=1.0, kv_unit_blocks=40, link_usd_h=0.5, link_unit_bytes_s=1e4)


def planner(seed: int, shop: Shop = SHOP) -> Planner:
    """An engine short of everything, and requests that keep it busy."""
    rng = np.random.default_rng(seed)
    requests = Requests(
        np.sort(rng.uniform(0, 60, BURST)),
        rng.integers(16, 600, BURST),
        rng.integers(1, 60, BURST),
        delay_price=rng.lognormal(0, 1, BURST),
    )
    settings = EngineSettings(
        kv_blocks=60,
        max_batched_tokens=512,
        max_sequences=16,
        workers=2,
        prefix_caching=False,
        disaggregation=Disaggregation(1, 1.0, 1e4),
    )
    return Planner(settings, flat_steps(512, 16, 0.01, 0.0002), Routing.least_loaded(), requests, shop)


@pytest.mark.parametrize(("seed", "apart"), [(0, False), (0, True), (1, True), (2, False), (3, True)])
def test_no_fleet_within_the_budget_is_much_faster(seed: int, apart: bool) -> None:
    """Two roads: exchanges of one resource for another, and every fleet there is."""
    plan, budget = planner(seed), 52.0
    found = plan.best(budget, apart=apart)
    splits = range(1, 5) if apart else (0,)
    every = (
        fleet
        for workers, prefill, kv, link in product(range(1, 6), splits, range(12), (1, 2, 4, 8, 16))
        if (fleet := Fleet(workers, prefill, kv, link if apart else 1)).possible
        if plan.shop.usd_h(fleet) <= budget
    )
    assert plan.shop.usd_h(found) <= budget
    assert plan.latency(found) <= 1.03 * min(map(plan.latency, every))


def test_no_exchange_makes_it_faster() -> None:
    """[Z-9] in whole units: whatever is sold, what its money buys saves less."""
    plan, budget = planner(4), 60.0
    found = plan.best(budget, apart=True)
    for sold in found.resources:
        left = found.plus(sold, -1)
        if not (left.possible and left.prefill):
            continue
        for bought in found.resources:
            other = left.plus(bought)
            if bought != sold and plan.shop.usd_h(other) <= budget:
                assert plan.latency(other) >= plan.latency(found)


def test_a_change_is_the_difference_of_two_replays() -> None:
    plan = planner(5)
    fleet = Fleet(3, 1, 2, 2)
    for units in (1, -1):
        for change in plan.changes(fleet, units):
            assert change.latency == pytest.approx(plan.latency(change.fleet) - plan.latency(fleet))
            assert change.usd_h == pytest.approx(plan.shop.usd_h(change.fleet) - plan.shop.usd_h(fleet))
            assert change.usd_h * units > 0
            assert change.error > 0 or change.latency == 0
    assert {c.resource for c in plan.changes(fleet)} == {"prefill", "decode", "kv", "link"}
    # Without the last prefill worker it would be an engine of the other kind.
    assert {c.resource for c in plan.changes(fleet, -1)} == {"decode", "kv", "link"}


def test_what_is_not_for_sale_is_not_bought() -> None:
    plan = planner(6, Shop(10.0))
    found = plan.best(45.0, apart=True)
    assert (found.kv_units, found.link_units) == (0, 1)
    assert {change.resource for change in plan.changes(found)} == {"prefill", "decode"}


def test_more_money_is_never_slower() -> None:
    plan = planner(7)
    latency = [plan.latency(fleet) for _, fleet in plan.curve(np.array([70.0, 5.0, 30.0, 50.0]), apart=True)]
    assert len(latency) == 3  # 5 USD buy nothing
    assert latency == sorted(latency, reverse=True)


def test_a_budget_that_buys_nothing_is_named() -> None:
    with pytest.raises(InfeasibleError, match="raise it to 20") as caught:
        planner(8, Shop(10.0)).best(19.0, apart=True)
    assert caught.value.least == 20.0


@pytest.mark.parametrize(
    ("prices", "key"),
    [
        ({"worker_usd_h": 0.0}, "worker_usd_h"),
        ({"worker_usd_h": float("nan")}, "worker_usd_h"),
        ({"worker_usd_h": 1.0, "kv_usd_h": -1.0, "kv_unit_blocks": 1}, "kv_usd_h"),
        ({"worker_usd_h": 1.0, "kv_usd_h": 1.0}, "kv_unit_blocks"),
        ({"worker_usd_h": 1.0, "link_usd_h": 1.0, "link_unit_bytes_s": 0.0}, "link_unit_bytes_s"),
    ],
)
def test_a_price_that_cannot_be_is_named(prices: dict[str, float], key: str) -> None:
    with pytest.raises(SettingsError, match=key):
        Shop(**prices)


# --- the command --------------------------------------------------------------------------------------------------------

ASKED = ("capacity", "--generate", "poisson:8", "--requests", "300", "--worker-usd-h", "20")


def test_the_command_says_where_the_next_dollar_goes(tmp_path: Path) -> None:
    page = tmp_path / "capacity.html"
    shown = walras(*ASKED, "--budget-usd-h", "60", "--link-usd-h", "1", "--html", str(page))
    assert shown.code == 0, shown.err
    assert "SIMULATED" in shown.out
    assert "The next dollar goes to" in " ".join(shown.out.split())
    assert "Equimarginal [Z-9]" in shown.out
    assert "What other budgets buy" in page.read_text(encoding="utf-8")


def test_the_command_prints_plain_data() -> None:
    shown = walras(*ASKED, "--budget-usd-h", "60", "--lambda0", "0.01", "--kv-usd-h", "2", "--json")
    data = shown.data
    assert data["simulated"] is True
    assert data["unit"] == "usd"
    assert [plan["latency"] for plan in data["plans"]] == sorted(plan["latency"] for plan in data["plans"])
    assert {plan["kind"] for plan in data["plans"]} == {"together", "apart"}
    for plan in data["plans"]:
        assert plan["fleet"]["usd_h"] <= 60
        for change in plan["next_unit"]:
            assert change["latency_saved_per_usd_h"] == pytest.approx(-change["latency"] / change["usd_h"])
            assert change["delay_saved_usd_h"] == pytest.approx(-change["latency"] * data["requests_per_h"])


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--budget-usd-h", "10"), "raise it to 20", 5),
        (("--budget-usd-h", "nan"), "--budget-usd-h", 4),
        (("--budget-usd-h", "60", "--link-usd-h", "-1"), "link_usd_h", 4),
        (("--budget-usd-h", "60", "--profile", "nobody"), "nobody", 4),
    ],
)
def test_the_command_refuses_in_words(options: tuple[str, ...], words: str, code: int) -> None:
    shown = walras(*ASKED, *options)
    assert shown.code == code
    assert words in " ".join(shown.err.split())
    assert "Traceback" not in shown.err


def test_nobody_can_put_script_on_the_page(tmp_path: Path) -> None:
    trace = tmp_path / "<script>alert(1)</script>".replace("/", "_")
    trace = trace.with_suffix(".csv")
    rows = "".join(f"{k * 0.1:.1f},100,10\n" for k in range(60))
    trace.write_text(f"arrival_s,input_tokens,output_tokens\n{rows}", encoding="utf-8")
    page = tmp_path / "page.html"
    shown = walras(
        "capacity",
        str(trace),
        "--budget-usd-h",
        "25",
        "--worker-usd-h",
        "20",
        "--kind",
        "together",
        "--html",
        str(page),
    )
    assert shown.code == 0, shown.err
    assert "<script>alert" not in page.read_text(encoding="utf-8")
