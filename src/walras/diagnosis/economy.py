"""A cleared economy in plain words: what is scarce and what it is worth, who pays for whom, and why to believe it. [Z-GE] [OP-6]"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from walras.diagnosis.terminal import table
from walras.diagnosis.words import count, number, percent
from walras.errors import WalrasError
from walras.market.tenants.all_equilibria import Enclosed, all_equilibria
from walras.market.tenants.certificate import Certificate, certify
from walras.market.tenants.economy import Economy, Tenant
from walras.market.tenants.fairness import Envy, Shares, envy, shares
from walras.market.tenants.fisher import solve as solve_fisher
from walras.market.tenants.solve import Equilibrium, Solver, clear, fisher_market, is_fisher
from walras.risk import FloatArray

MORE = 1e-6
"""Share by which a good is made less scarce, to see what that brings."""
PAIRS = 24
"""Tenants up to which each is taken out in turn."""
ROWS = 12
"""Rows of a table on a screen; --json has all."""


@dataclass(frozen=True, slots=True)
class Fairness:
    """What tenants with budgets alone have, beside what other rules would give them."""

    shares: Shares
    envy: Envy


@dataclass(frozen=True, slots=True)
class View:
    """One economy and what was found of it. Money is in USD where tenants have budgets, else in shares of Σ prices = 1."""

    name: str
    economy: Economy
    found: list[Equilibrium]
    enclosed: Enclosed | None
    """What `--all` proved; None: one equilibrium was asked for."""
    brings: FloatArray
    """(G, N) what a unit more of each good is worth to each tenant, equivalent variation at the first equilibrium; NaN where
    nobody owns it."""
    costs: FloatArray | None
    """(N, N) what the presence of the row's tenant costs the column's, equivalent variation at the first equilibrium; below 0 it
    gains. NaN on the diagonal and where the market cannot do without. None: too many tenants."""
    fairness: Fairness | None
    """None: not a market of budgets spent on a supply."""

    @property
    def in_usd(self) -> bool:
        return bool(np.isfinite(self.found[0].usd)) if self.found else False

    def scale(self, found: Equilibrium) -> float:
        """USD, or 1, per unit of normalised price."""
        return found.usd if np.isfinite(found.usd) else 1.0


def view(
    name: str,
    economy: Economy,
    *,
    every: bool,
    solver: Solver,
    work: int,
    on_step: Callable[[str], None],
) -> View:
    """Clear one economy and look around its equilibrium.

    Raises:
        NotCleared, InfeasibleError, QuantityError: as `clear` and `all_equilibria`.
    """
    enclosed = None
    if every:
        on_step(f"searching for all equilibria of {name}")
        enclosed = all_equilibria(economy, work=work)
        found = [_proved(economy, enclosed, k) for k in range(len(enclosed.equilibria))]
    else:
        on_step(f"clearing {name}")
        found = [clear(economy, solver=solver)]
    n_goods, n_tenants = len(economy.goods), len(economy.tenants)
    brings, costs, fairness = np.full((n_goods, n_tenants), np.nan), None, None
    if found:
        on_step(f"{name}: what a unit more would bring")
        brings = _brings(economy, found[0])
        if n_tenants <= PAIRS:
            on_step(f"{name}: who pays for whom")
            costs = _costs(economy, found[0])
        if not economy.n_activities and is_fisher(economy):
            fairness = _fairness(economy)
    return View(name, economy, found, enclosed, brings, costs, fairness)


def _fairness(economy: Economy) -> Fairness:
    market = fisher_market(economy)
    cleared = solve_fisher(market)
    return Fairness(shares(market, cleared), envy(market, cleared))


def _proved(economy: Economy, enclosed: Enclosed, k: int) -> Equilibrium:
    one = enclosed.equilibria[k]
    x = economy.demands(one.prices)
    return Equilibrium(
        prices=one.prices,
        usd=economy.usd(one.prices),
        activities=one.activities,
        allocation=x,
        certificate=certify(economy, one.prices, one.activities, x),
        solver="branch and bound with interval Newton",
        why="Every equilibrium at positive prices was enclosed; Krawczyk's test proves each, and that it is alone in its box.",
        evaluations=enclosed.boxes,
    )


# --- around the equilibrium ---------------------------------------------------------------------------------------------


def _brings(economy: Economy, base: Equilibrium) -> FloatArray:
    """(G, N) equivalent variation of a unit more of each good, in the hands of those who own it now."""
    found = np.full((len(economy.goods), len(economy.tenants)), np.nan)
    there = economy.owned.sum(axis=0)
    for j in np.flatnonzero(there > 0):
        more = np.ones(len(economy.goods))
        more[j] += MORE
        other = replace(
            economy,
            supply=economy.supply * more,
            tenants=tuple(replace(t, endowment=t.endowment * more) for t in economy.tenants),
        )
        found[j] = _gains(base, other, range(len(economy.tenants))) / (MORE * there[j])
    return found


def _costs(economy: Economy, base: Equilibrium) -> FloatArray:
    """(N, N) what each tenant's presence costs each other one."""
    n = len(economy.tenants)
    found = np.full((n, n), np.nan)
    for i in range(n) if n > 1 else ():
        others = [j for j in range(n) if j != i]
        try:
            without = replace(economy, tenants=tuple(economy.tenants[j] for j in others))
        except WalrasError:  # nobody else owns what it owns: there is no market without it
            continue
        found[i, others] = _gains(base, without, others)
    return found


def _gains(base: Equilibrium, other: Economy, tenants: Iterable[int]) -> FloatArray:
    """Equivalent variation of each of `tenants`, who are those of `other` in order: e(p, u′) − e(p, u). NaN where it does not clear."""
    scale = base.usd if np.isfinite(base.usd) else 1.0
    try:
        there = clear(other, start=np.maximum(base.prices, 1e-12))
    except WalrasError:
        return np.full(len(other.tenants), np.nan)
    rows = zip(tenants, other.tenants, there.allocation, strict=True)
    gained = [_variation(tenant, base, i, x) for i, tenant, x in rows]
    return scale * np.array(gained)


def _variation(tenant: Tenant, base: Equilibrium, i: int, x: FloatArray) -> float:
    now, then = (tenant.utility.utility(bundle) for bundle in (base.allocation[i], x))
    costs = [tenant.utility.expenditure(base.prices, u) for u in (now, then)]
    return costs[1] - costs[0]


# --- for programs -------------------------------------------------------------------------------------------------------


def economy_data(views: list[View]) -> dict[str, Any]:
    """What `walras clear --json` prints. Lists go by `goods`, `tenants` and `activity_names`, in the order of the file."""
    first = views[0]
    data: dict[str, Any] = {
        **_labels(first),
        "equilibria": [_equilibrium_data(view, k) for view in views for k in range(len(view.found))],
        "complete": all(view.enclosed.complete for view in views if view.enclosed)
        if first.enclosed
        else None,
        "undecided": [box for view in views if view.enclosed for box in view.enclosed.undecided],
        "solver": " · ".join(dict.fromkeys(found.solver for view in views for found in view.found)),
        "evaluations": sum(_evaluations(view) for view in views),
        "one_unit_more": [{"economy": view.name, **_brings_data(view)} for view in views],
        "who_pays_for_whom": [{"economy": view.name, "costs": view.costs} for view in views],
        "fairness": [_fairness_data(view) for view in views],
    }
    plain: dict[str, Any] = _plain(data)
    return plain


def _plain(value: Any) -> Any:
    """Arrays as lists."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _labels(view: View) -> dict[str, Any]:
    return {
        "goods": list(view.economy.goods),
        "tenants": [tenant.name for tenant in view.economy.tenants],
        "activity_names": list(view.economy.making),
    }


def _evaluations(view: View) -> int:
    return view.enclosed.boxes if view.enclosed else sum(found.evaluations for found in view.found)


def _brings_data(view: View) -> dict[str, Any]:
    return {
        "by_good": {
            good: float(np.nansum(row)) if np.isfinite(row).any() else None
            for good, row in zip(view.economy.goods, view.brings, strict=True)
        },
        "by_good_and_tenant": view.brings,
    }


def _fairness_data(view: View) -> dict[str, Any]:
    """By tenant; relative to what the other rule would give it."""
    if view.fairness is None:
        return {"economy": view.name}
    found = view.fairness.shares
    keys = ("utility", "of_all", "over_equal_split", "over_budget_split", "over_one_price", "one_price")
    return {
        "economy": view.name,
        **{key: getattr(found, key) for key in keys},
        "envy": view.fairness.envy.gain,
        "envies": view.fairness.envy.whom,
    }


def _equilibrium_data(view: View, k: int) -> dict[str, Any]:
    found, economy = view.found[k], view.economy
    scale = view.scale(found)
    data: dict[str, Any] = {
        "economy": view.name,
        **_labels(view),
        "normalisation": "usd" if view.in_usd else "sum=1",
        "prices": found.prices * scale,
        "activities": found.activities,
        "allocation": found.allocation,
        "incomes": economy.incomes(found.prices) * scale,
        "certificate": certificate_data(found.certificate),
        "solver": found.solver,
        "why": found.why,
        "evaluations": found.evaluations,
    }
    if view.enclosed:
        one = view.enclosed.equilibria[k]
        data["price_bounds"], data["activity_bounds"] = one.price_bounds * scale, one.activity_bounds
    return data


def certificate_data(certificate: Certificate) -> dict[str, Any]:
    """Every gap, as `Certificate` says what it is."""
    keys = (
        "excess_demand",
        "relative_excess",
        "idle_worth",
        "utility_gap",
        "utility_gaps",
        "profit_gap",
        "budget_residual",
        "walras_law",
        "pareto_gap",
        "index",
        "regular",
        "stable",
        "worst",
    )
    return {key: getattr(certificate, key) for key in keys}


# --- words --------------------------------------------------------------------------------------------------------------


def money(view: View, amount: float) -> str:
    """USD, or a plain number where prices sum to 1."""
    sign = "−" if amount < 0 else ""
    return f"{sign}{'$' if view.in_usd else ''}{number(abs(amount))}"


def headline(view: View) -> str:
    """How many equilibria, and whether that is all."""
    if view.enclosed is None:
        return "One equilibrium found; --all looks for every other."
    what = count(len(view.found), "equilibria") if len(view.found) != 1 else "1 equilibrium"
    if view.enclosed.complete:
        return f"{what}, and proved that there is no other at positive prices (indices sum to {view.enclosed.index_sum})."
    return f"{what} proved; {count(len(view.enclosed.undecided), 'boxes')} of prices were left undecided, so there may be others."


def in_words(view: View) -> list[str]:
    """What each scarce resource is worth, what one more unit would bring, and who pays for whom."""
    if not view.found:
        return []
    found, economy = view.found[0], view.economy
    scale = view.scale(found)
    worth = found.prices * economy.owned.sum(axis=0)
    free = [economy.goods[j] for j in np.flatnonzero((found.prices < 1e-9) & (economy.owned.sum(axis=0) > 0))]
    j = int(np.argmax(worth))
    said = [
        f"{economy.goods[j]} is what matters most: all of it is worth {percent(float(worth[j] / worth.sum()))} of everything owned, "
        f"a unit {money(view, float(found.prices[j]) * scale)}."
    ]
    if np.isfinite(view.brings[j]).any():
        gains = view.brings[j]
        i, k = int(np.nanargmax(gains)), int(np.nanargmin(gains))
        text = f"A unit of {economy.goods[j]} more would bring {money(view, float(np.nansum(gains)))}: "
        text += f"{economy.tenants[i].name} gains {money(view, float(gains[i]))}"
        if gains[k] < 0:
            text += f", {economy.tenants[k].name} loses {money(view, -float(gains[k]))} because prices move"
        said.append(f"{text}.")
    if free:
        said.append(f"Nobody competes for {', '.join(free)}: the price is 0, and some is left over.")
    return said + _payers(view)


def _payers(view: View) -> list[str]:
    """Whose presence costs the others most, and who bears it."""
    if view.costs is None or not np.isfinite(view.costs).any():
        return []
    total = np.nansum(view.costs, axis=1)
    i = int(np.argmax(total))
    tenants = view.economy.tenants
    if total[i] <= 0:
        return ["No tenant costs the others anything together: each brings more than it takes."]
    j = int(np.nanargmax(view.costs[i]))
    said = f"{tenants[i].name} costs the others most, {money(view, float(total[i]))} in all; {tenants[j].name} bears {money(view, float(view.costs[i, j]))} of it."
    k = int(np.argmin(total))
    if total[k] < 0:
        said += f" {tenants[k].name} brings them {money(view, -float(total[k]))}."
    return [said]


def certificate_text(certificate: Certificate) -> str:
    """One line."""
    index = "not regular" if certificate.index is None else f"index {certificate.index:+d}"
    stable = {None: "no law of tâtonnement", True: "stable", False: "tâtonnement does not return to it"}
    return (
        f"excess demand {certificate.relative_excess:.1e}, utility gap {certificate.utility_gap:.1e}, profit gap "
        f"{certificate.profit_gap:.1e}, budgets {certificate.budget_residual:.1e}, Walras’ law elsewhere {certificate.walras_law:.1e}, "
        f"Pareto gap {certificate.pareto_gap:.1e}; {index}, {stable[certificate.stable]}"
    )


def price_head(view: View) -> tuple[str, ...]:
    names = [f"price {k + 1}" for k in range(len(view.found))] if len(view.found) > 1 else ["price"]
    return ("good", *names, "owned", "share of worth", "a unit more brings")


def price_rows(view: View) -> list[tuple[str, ...]]:
    economy, first = view.economy, view.found[0]
    owned = economy.owned.sum(axis=0)
    worth = first.prices * owned
    return [
        (
            good,
            *(money(view, float(found.prices[j]) * view.scale(found)) for found in view.found),
            number(float(owned[j])) if owned[j] else "",
            percent(float(worth[j] / worth.sum())) if owned[j] else "",
            money(view, float(np.nansum(view.brings[j]))) if np.isfinite(view.brings[j]).any() else "",
        )
        for j, good in enumerate(economy.goods)
    ]


def tenant_head(view: View) -> tuple[str, ...]:
    return ("tenant", "income", *view.economy.goods, "costs the others")


def tenant_rows(view: View) -> list[tuple[str, ...]]:
    """What each takes, less what it owns, in units: below 0 it gives."""
    economy, found = view.economy, view.found[0]
    incomes = economy.incomes(found.prices) * view.scale(found)
    costs = np.full(len(economy.tenants), np.nan) if view.costs is None else _total(view.costs)
    return [
        (
            tenant.name,
            money(view, float(incomes[i])),
            *(_signed(float(amount)) for amount in found.allocation[i] - tenant.endowment),
            money(view, float(costs[i])) if np.isfinite(costs[i]) else "",
        )
        for i, tenant in enumerate(economy.tenants)
    ]


FAIR_HEAD = (
    "tenant",
    "of all there is",
    "over an equal split",
    "over its budget’s share",
    "over one queue",
    "envy",
)


def fair_rows(view: View) -> list[tuple[str, ...]]:
    """Utility beside what other rules would give: 1.2× is a fifth more."""
    if view.fairness is None:
        return []
    found = view.fairness.shares
    columns = (found.over_equal_split, found.over_budget_split, found.over_one_price)
    return [
        (
            tenant.name,
            percent(float(found.of_all[i])),
            *(f"{number(float(column[i]))}×" for column in columns),
            percent(_envy(float(view.fairness.envy.gain[i]))),
        )
        for i, tenant in enumerate(view.economy.tenants)
        if tenant.budget
    ]


def _envy(gain: float) -> float:
    """0 for what is round-off."""
    return gain if gain > 1e-9 else 0.0


def _total(costs: FloatArray) -> FloatArray:
    """(N,) over the others; NaN where none is known."""
    known = np.isfinite(costs).any(axis=1)
    return np.where(known, np.nansum(costs, axis=1), np.nan)


def _signed(amount: float) -> str:
    if abs(amount) < 1e-9:
        return "0"
    return f"{'−' if amount < 0 else '+'}{number(abs(amount))}"


# --- for people ---------------------------------------------------------------------------------------------------------


def economy_screen(views: list[View]) -> RenderableType:
    """The answer first; then prices, tenants and certificates."""
    return Group(*(part for view in views for part in _screen(view)))


def _screen(view: View) -> list[RenderableType]:
    economy = view.economy
    size = f" · {count(len(economy.tenants), 'tenants')} · {count(len(economy.goods), 'goods')}"
    parts: list[RenderableType] = [
        Text.assemble(("Walras ", "bold"), (view.name, "bold"), size),
        Text(headline(view), style="bold"),
        *map(Text, in_words(view)),
    ]
    if not view.found:
        return parts
    parts.append(table("Prices", price_head(view), _shown(price_rows(view))))
    parts.append(
        table("What each takes on top of what it owns", tenant_head(view), _shown(tenant_rows(view)))
    )
    if view.fairness is not None:
        parts.append(table("Is it fair? Utility beside other rules", FAIR_HEAD, _shown(fair_rows(view))))
    if view.economy.n_activities:
        levels = [
            (name, *(number(float(found.activities[a])) for found in view.found))
            for a, name in enumerate(economy.making)
        ]
        parts.append(table("Production", ("", *price_head(view)[1 : 1 + len(view.found)]), _shown(levels)))
    parts.append(Text())
    for k, found in enumerate(view.found):
        which = f"Equilibrium {k + 1}: " if len(view.found) > 1 else "Certificate: "
        parts.append(Text(which + certificate_text(found.certificate) + ".", style="dim"))
    parts += [Text(f"{view.found[0].why} {_evaluations(view):,} evaluations.", style="dim"), Text()]
    return parts


def _shown(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    shown = [tuple(map(escape, row)) for row in rows[:ROWS]]
    if len(rows) > ROWS:
        rest = len(rows) - ROWS
        shown.append((f"… {rest} more: --json or --html", *[""] * (len(rows[0]) - 1)))
    return shown
