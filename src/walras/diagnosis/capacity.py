"""Which fleet a budget buys, and where the next dollar goes: the question and its answer. SIMULATED. [Z-9]"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from walras.diagnosis.serving import Engine, Traffic
from walras.diagnosis.serving_report import profile_data, profile_text, seconds_text
from walras.diagnosis.terminal import table
from walras.diagnosis.words import count, number, usd
from walras.engine.requests import Requests
from walras.errors import InfeasibleError
from walras.supply.capacity import Change, Fleet, Planner, Resource, Shop

SHARES = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Budgets of the curve, in shares of the one that is asked about."""
HOUR_S = 3600.0
NAMES: dict[Resource, str] = {
    "workers": "workers",
    "prefill": "prefill workers",
    "decode": "decode workers",
    "kv": "KV memory",
    "link": "links",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The best fleet of one kind."""

    apart: bool
    """Prefill and decoding on workers of their own."""
    fleet: Fleet
    usd_h: float
    latency: float
    """Mean over the requests, seconds or USD."""
    next_unit: list[Change]
    """One unit more of each resource, the best first."""
    last_unit: list[Change]
    """One unit less of each."""
    curve: list[tuple[float, Fleet, float]]
    """(USD an hour, best fleet, its latency)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Everything that `walras capacity` found."""

    traffic: Traffic
    engine: Engine
    shop: Shop
    budget_usd_h: float
    requests: int
    per_h: float
    """Requests an hour."""
    plans: list[Plan]
    """The faster first."""
    replays: int

    @property
    def in_usd(self) -> bool:
        """Whether delay has a declared price."""
        return self.traffic.delay_price is not None


def plan_capacity(
    traffic: Traffic,
    engine: Engine,
    requests: Requests,
    shop: Shop,
    budget_usd_h: float,
    kinds: tuple[bool, ...],
    on_replay: Callable[[int], None],
) -> Capacity:
    """The best fleet of each kind (apart or not) that the budget buys.

    Raises:
        InfeasibleError: it buys none of any kind.
    """
    planner = Planner(engine.settings, engine.steps, engine.routing, requests, shop, on_replay)
    plans, refused = [], None
    for apart in kinds:
        try:
            plans.append(_plan(planner, budget_usd_h, apart))
        except InfeasibleError as error:
            refused = refused or error
    if refused is not None and not plans:
        raise refused
    span = max(float(np.ptp(requests.arrival_s)), 1e-9)
    return Capacity(
        traffic=traffic,
        engine=engine,
        shop=shop,
        budget_usd_h=budget_usd_h,
        requests=len(requests),
        per_h=len(requests) / span * HOUR_S,
        plans=sorted(plans, key=lambda plan: plan.latency),
        replays=planner.replays,
    )


def _plan(planner: Planner, budget_usd_h: float, apart: bool) -> Plan:
    curve = planner.curve(budget_usd_h * np.array(SHARES), apart=apart)
    fleet = next((fleet for budget, fleet in curve if budget == budget_usd_h), None)
    fleet = planner.best(budget_usd_h, apart=apart, start=fleet)
    return Plan(
        apart=apart,
        fleet=fleet,
        usd_h=planner.shop.usd_h(fleet),
        latency=planner.latency(fleet),
        next_unit=planner.changes(fleet),
        last_unit=planner.changes(fleet, -1),
        curve=[(budget, bought, planner.latency(bought)) for budget, bought in curve],
    )


# --- for programs -------------------------------------------------------------------------------------------------------


def capacity_data(found: Capacity) -> dict[str, Any]:
    """What `walras capacity --json` prints. Latency is in seconds, or in USD where delay has a price."""
    return {
        "simulated": True,
        "traffic": found.traffic.name,
        "requests": found.requests,
        "requests_per_h": found.per_h,
        "unit": "usd" if found.in_usd else "s",
        "budget_usd_h": found.budget_usd_h,
        "plans": [_plan_data(found, plan) for plan in found.plans],
        "replays": found.replays,
        "profile": profile_data(found.engine.profile),
    }


def _plan_data(found: Capacity, plan: Plan) -> dict[str, Any]:
    return {
        "kind": _kind(plan),
        "fleet": _fleet_data(found, plan.fleet),
        "latency": plan.latency,
        "next_unit": [_change_data(found, change) for change in plan.next_unit],
        "last_unit": [_change_data(found, change) for change in plan.last_unit],
        "curve": [
            {"budget_usd_h": budget, "latency": latency, "fleet": _fleet_data(found, fleet)}
            for budget, fleet, latency in plan.curve
        ],
    }


def _fleet_data(found: Capacity, fleet: Fleet) -> dict[str, Any]:
    return {
        "workers": fleet.workers,
        "prefill_workers": fleet.prefill,
        "decode_workers": fleet.decode,
        "kv_blocks": found.engine.settings.kv_blocks + fleet.kv_units * found.shop.kv_unit_blocks,
        "link_bytes_per_s": fleet.link_units * found.shop.link_unit_bytes_s
        if found.shop.link_usd_h and fleet.prefill
        else None,
        "usd_h": found.shop.usd_h(fleet),
    }


def _change_data(found: Capacity, change: Change) -> dict[str, Any]:
    data = {
        "resource": change.resource,
        "usd_h": change.usd_h,
        "latency": change.latency,
        "error": change.error,
        "latency_saved_per_usd_h": change.per_usd_h,
    }
    if found.in_usd:
        data["delay_saved_usd_h"] = -change.latency * found.per_h
    return data


# --- words --------------------------------------------------------------------------------------------------------------


def _kind(plan: Plan) -> str:
    return "apart" if plan.apart else "together"


def fleet_text(found: Capacity, fleet: Fleet) -> str:
    """3 workers that prefill, 2 that decode, 10,000 KV blocks more in each."""
    text = (
        f"{fleet.prefill} to prefill, {fleet.decode} to decode"
        if fleet.prefill
        else count(fleet.workers, "workers")
    )
    if fleet.kv_units:
        text += f", {fleet.kv_units * found.shop.kv_unit_blocks:,} KV blocks more in each"
    if fleet.prefill and found.shop.link_usd_h:
        text += f", links of {number(fleet.link_units * found.shop.link_unit_bytes_s / 1e9)} GB/s"
    return text


def latency_text(found: Capacity, latency: float) -> str:
    sign = "−" if latency < 0 else ""
    return sign + (usd(abs(latency)) if found.in_usd else seconds_text(abs(latency)))


def answer(found: Capacity) -> str:
    """Two sentences: the fleet, and where the next dollar goes."""
    plan = found.plans[0]
    said = (
        f"{usd(found.budget_usd_h)} an hour buy {fleet_text(found, plan.fleet)}: "
        f"{latency_text(found, plan.latency)} a request in the mean."
    )
    if not plan.next_unit:
        return said
    change = plan.next_unit[0]
    if change.latency + 2 * change.error >= 0:
        return f"{said} Nothing that is for sale makes it faster beyond twice the error."
    said += f" The next dollar goes to {NAMES[change.resource]} and saves {_saved(found, change.per_usd_h)}"
    if not found.in_usd:
        return f"{said} a request."
    pays = "pays" if change.per_usd_h * found.per_h > 1 else "does not pay"
    return f"{said} of delay: it {pays}."


def _saved(found: Capacity, per_usd_h: float) -> str:
    """What a dollar saves: dollars of delay, or seconds of each request for a dollar an hour."""
    return latency_text(found, per_usd_h * (found.per_h if found.in_usd else 1.0))


def change_rows(found: Capacity, plan: Plan) -> list[tuple[str, str, str, str]]:
    """(resource, USD an hour of a unit, what its last unit saves for a dollar, what one more would)."""
    last = {change.resource: change for change in plan.last_unit}
    more = {change.resource: change for change in plan.next_unit}
    rows = []
    for resource in plan.fleet.resources:
        some = more.get(resource) or last.get(resource)
        if some is not None:
            saved = [_per_dollar(found, changes.get(resource)) for changes in (last, more)]
            rows.append((NAMES[resource], usd(abs(some.usd_h)), saved[0], saved[1]))
    return rows


def _per_dollar(found: Capacity, change: Change | None) -> str:
    if change is None:
        return ""
    return f"{_saved(found, change.per_usd_h)} ± {_saved(found, change.per_usd_h_error)}"


CHANGE_HEAD = ("", "unit, an hour", "a dollar saved at the last", "and at the next")


def curve_rows(found: Capacity) -> list[tuple[str, str, str]]:
    """(budget, fleet, latency), both kinds, by budget."""
    points = sorted(
        ((point, plan) for plan in found.plans for point in plan.curve),
        key=lambda pair: (pair[0][0], pair[0][2]),
    )
    return [
        (usd(budget), fleet_text(found, fleet), latency_text(found, latency))
        for (budget, fleet, latency), _ in points
    ]


CURVE_HEAD = ("an hour", "best fleet", "a request")


def equal_text(plan: Plan) -> str:
    """How near [Z-9] holds: no next unit may save more for a dollar than the last unit of another."""
    over = [
        more.per_usd_h - less.per_usd_h
        for more in plan.next_unit
        for less in plan.last_unit
        if more.resource != less.resource
    ]
    if not over or max(over) <= 0:
        return (
            "Equimarginal [Z-9]: no unit more of one saves more for a dollar than the last unit of another."
        )
    return "Equimarginal [Z-9]: only up to whole units; no exchange of what their money buys makes it faster."


# --- for people ---------------------------------------------------------------------------------------------------------


def capacity_screen(found: Capacity) -> RenderableType:
    """The answer first, then why, then what other budgets buy."""
    head = Text.assemble(("Walras ", "bold"), (f"capacity for {found.traffic.name}", "bold"))
    head.append(f" · {count(found.requests, 'requests')}")
    head.append(" · SIMULATED", style="bold yellow")
    parts: list[RenderableType] = [head, Text(answer(found), style="bold")]
    for plan in found.plans:
        title = f"{fleet_text(found, plan.fleet)}: {latency_text(found, plan.latency)} a request"
        parts += [table(title, CHANGE_HEAD, change_rows(found, plan)), Text(equal_text(plan), style="dim")]
    parts.append(table("What other budgets buy", CURVE_HEAD, curve_rows(found)))
    said = f"{count(found.replays, 'fleets')} replayed. {profile_text(found.engine.profile)}."
    return Group(*parts, Text(), Text(said, style="dim"))
