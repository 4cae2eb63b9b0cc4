"""Menus for people and for programs: what a customer reads, what the operator must know, and what holds of it. [Z-5]"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from walras.demand.check import Checked
from walras.demand.few_tiers import CappedMenu
from walras.demand.menu import Certificate, Menu, Tier
from walras.demand.menu_spread import MenuSpread
from walras.demand.offerings import Offerings
from walras.diagnosis.published import Published
from walras.diagnosis.terminal import table
from walras.diagnosis.words import count, interval, number, percent, usd

LIES_SHOWN = 6
RANGES_SHOWN = 3


# --- a menu that was designed -----------------------------------------------------------------------------------------


def menu_data(found: Published) -> dict[str, Any]:
    """Everything about a designed menu; USD per request. What is unbounded or unknown is null once it is JSON."""
    menu, made = found.menu, found.made
    return {
        "objective": menu.objective,
        "types": found.whose.spec,
        "quality_cost": made.spec,
        "lambda0": made.technology.latency_price,
        "synthetic": found.synthetic,
        "tiers": [_tier_data(found, k) for k in range(len(menu.tiers))],
        "certificate": {
            **asdict(menu.certificate),
            "bound": menu.bound,
            "loss_to_cap": menu.loss_to_cap,
            "loss_to_cap_share": _share(menu.loss_to_cap, menu.bound),
            "recovery_price": menu.recovery_price,
            "ironed": list(menu.ironed) if isinstance(menu, Menu) else None,
        },
        "downgraded": None if found.checked is None else _downgraded_data(found.checked),
        "law": _law_data(found),
        "spread": None if found.spread is None else _spread_data(found.spread),
        "offerings": _offerings_data(found),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _tier_data(found: Published, k: int) -> dict[str, Any]:
    tier, menu = found.menu.tiers[k], found.menu
    latency = menu.latency_prices[k] if isinstance(menu, CappedMenu) else None
    return _plain_tier(tier) | {"latency_price": list(latency) if latency else None}


def _plain_tier(tier: Tier) -> dict[str, Any]:
    data = asdict(tier)
    return {
        "name": data.pop("name"),
        "quality": data.pop("quality"),
        "price": data.pop("price"),
        "type_from": data.pop("type_from"),
        "type_to": data.pop("type_to"),
        **data,
    }


def _downgraded_data(checked: Checked) -> dict[str, Any]:
    return {
        "share": checked.downgraded_share,
        "welfare_lost": checked.welfare_lost,
        "by_tier": [asdict(part) for part in checked.downgraded],
    }


def _law_data(found: Published) -> dict[str, Any] | None:
    fitted = found.whose.fitted
    if fitted is None:
        return None
    return {
        "family": fitted.family,
        "parameters": [
            {"name": name, "estimate": float(e), "se": float(se), "interval": [float(x) for x in ends]}
            for name, e, se, ends in zip(
                fitted.names, fitted.estimate, fitted.standard_error, fitted.interval, strict=True
            )
        ],
        "goodness": None if fitted.goodness is None else asdict(fitted.goodness),
        "note": fitted.note,
    }


def _spread_data(spread: MenuSpread) -> dict[str, Any]:
    return {**asdict(spread), "note": spread.note}


def _offerings_data(found: Published) -> list[dict[str, Any]] | None:
    technology = found.made.technology
    if not isinstance(technology, Offerings):
        return None
    errors = found.made.errors
    return [
        {
            "name": name,
            "quality": float(technology.quality[i]),
            "quality_error": float(errors[0][i]) if errors else None,
            "cost": float(technology.cost[i]),
            "cost_error": float(errors[1][i]) if errors else None,
            "seconds": float(technology.seconds[i]),
            "idle": name in found.idle,
        }
        for i, name in enumerate(technology.names)
    ]


def menu_screen(found: Published, title: str) -> RenderableType:
    """What a customer reads first, what the operator must know below it."""
    menu = found.menu
    head = Text.assemble(("Walras ", "bold"), (title, "bold"))
    head.append(f" · types {found.whose.spec} · quality {found.made.spec} · most {menu.objective}")
    if found.synthetic:
        head.append(" · SYNTHETIC LOG", style="bold yellow")
    if not menu.tiers:
        return Group(
            head,
            Text("Nobody is worth serving: every offering costs more than anyone would pay.", style="bold"),
        )
    rows = [_customer_row(menu, k) for k in range(len(menu.tiers))]
    customer = ("tier", "quality", "answer in", "price", "for requests worth, per unit of quality", "")
    parts: list[RenderableType] = [head, table("Menu", customer, rows)]
    parts.append(
        table(
            "For the operator",
            ("tier", "share", "cost", "margin", "mean rent"),
            [*map(_operator_row, menu.tiers)],
        )
    )
    parts += [Text(), *_outcome(menu)]
    if found.checked is not None:
        parts += _downgraded(found.checked)
    parts += _law(found)
    if found.idle:
        parts.append(
            Text(
                f"Never worth a tier: {', '.join(found.idle)} (others, or a mixture of them, give as much for less).",
                style="dim",
            )
        )
    parts.append(_certificate(menu.certificate))
    return Group(*parts)


def _customer_row(menu: Menu | CappedMenu, k: int) -> tuple[str, ...]:
    tier = menu.tiers[k]
    latency = ""
    if isinstance(menu, CappedMenu):
        low, high = menu.latency_prices[k]
        latency = f"delay costs {usd(low) if low == high else interval((low, high))}/s"
    seconds = f"{number(tier.seconds)} s" if tier.seconds else ""
    return escape(tier.name), number(tier.quality), seconds, usd(tier.price), _types(tier), latency


def _types(tier: Tier) -> str:
    if math.isinf(tier.type_to):
        return f"{usd(tier.type_from)} and more"
    return usd(tier.type_from) if tier.type_to == tier.type_from else interval((tier.type_from, tier.type_to))


def _operator_row(tier: Tier) -> tuple[str, ...]:
    known = not math.isnan(tier.cost)
    cost, margin = (usd(tier.cost), usd(tier.price - tier.cost)) if known else ("", "")
    return escape(tier.name), percent(tier.share), cost, margin, usd(tier.rent) if tier.share else ""


def _outcome(menu: Menu | CappedMenu) -> list[RenderableType]:
    c = menu.certificate
    served = sum(tier.share for tier in menu.tiers)
    lines = [
        Text.from_markup(
            f"Per request: revenue {usd(c.revenue)}, profit [bold]{usd(c.profit)}[/], users' rent {usd(c.information_rent)}, "
            f"welfare [bold]{usd(c.welfare)}[/]; {percent(min(served, 1.0))} served."
        )
    ]
    what = "profit" if menu.objective == "revenue" else "welfare"
    share = _share(menu.loss_to_cap, menu.bound)
    lost = (
        f"{usd(menu.loss_to_cap)} of it at most ({percent(share)})"
        if share > 1e-4
        else "next to nothing of it"
    )
    size = "1 tier loses" if len(menu.tiers) == 1 else f"{len(menu.tiers)} tiers lose"
    lines.append(Text(f"No menu of any size makes more {what} than {usd(menu.bound)}: {size} {lost}."))
    if menu.objective == "welfare" and menu.recovery_price > 0:
        left = 1 - menu.recovery_price
        paid = f"a dollar of it costs {usd(1 / left - 1)} of welfare" if left else "it is all there is"
        lines.append(Text(f"Profit that must be left: {paid} (κ = {number(menu.recovery_price)})."))
    if isinstance(menu, Menu) and menu.ironed:
        shown = ", ".join(interval(pair) for pair in menu.ironed[:RANGES_SHOWN])
        more = len(menu.ironed) - RANGES_SHOWN
        rest = f", and {count(more, 'ranges')} more (--json has all)" if more > 0 else ""
        lines.append(Text(f"Types bunched because their virtual value falls (ironing): {shown}{rest}."))
    return list(lines)


def _downgraded(checked: Checked) -> list[RenderableType]:
    if not checked.downgraded_share > 1e-9:
        return []
    where = ", ".join(
        f"{d.tier or 'not served'} {percent(d.share)} ({usd(d.welfare_lost)})"
        for d in checked.downgraded
        if d.share > 1e-9
    )
    return [
        Text(
            f"Downgraded on purpose, so that others pay: {percent(checked.downgraded_share)} of the requests, for "
            f"{usd(checked.welfare_lost)} of welfare per request. By what they get: {where}."
        )
    ]


def _law(found: Published) -> list[RenderableType]:
    fitted, spread = found.whose.fitted, found.spread
    if fitted is None:
        return []
    said = ", ".join(
        f"{name} {number(float(e))} ({number(float(low))} to {number(float(high))})"
        for name, e, (low, high) in zip(fitted.names, fitted.estimate, fitted.interval, strict=True)
    )
    parts: list[RenderableType] = [
        Text(f"\nTypes: {fitted.family}, {said}, from {count(fitted.observations, 'observations')}.")
    ]
    if fitted.goodness is not None:
        g = fitted.goodness
        parts.append(
            Text(
                f"Fit: {g.statistic} {number(g.value)}, p {'=' if g.p_value > 1e-6 else '<'} {number(max(g.p_value, 1e-6))}."
            )
        )
    if fitted.note:
        parts.append(Text(fitted.note, style="dim"))
    if spread is not None:
        rows = [
            (escape(t.name), interval(t.quality, number), interval(t.price), interval(t.type_from))
            for t in spread.tiers
        ]
        parts += [
            table(
                f"How the menu moves with that error ({spread.level:.0%})",
                ("tier", "quality", "price", "from type"),
                rows,
            ),
            Text(
                f"Where another law within that error is the true one, this menu misses {usd(spread.regret)} per request on "
                f"average ({percent(spread.regret_share)}), and {usd(spread.regret_high)} at the {spread.level:.0%} quantile."
            ),
        ]
        if spread.note:
            parts.append(Text(spread.note, style="dim"))
    return parts


def _certificate(certificate: Certificate) -> Text:
    holds = max(certificate.worst_ic_violation, certificate.worst_ir_violation) <= 1e-9
    said = (
        f"Certificate: no type gains more than {certificate.worst_ic_violation:.1e} USD by any misreport (IC), nor loses more than "
        f"{certificate.worst_ir_violation:.1e} by taking part (IR)."
    )
    return Text("\n" + said, style="green" if holds else "red")


# --- a menu that was checked --------------------------------------------------------------------------------------------


def check_data(checked: Checked) -> dict[str, Any]:
    """What a check found, USD per request."""
    return {
        "holds": checked.holds,
        "tolerance": checked.tolerance,
        "self_selected": checked.self_selected,
        "tiers": [_plain_tier(tier) for tier in checked.tiers],
        "certificate": asdict(checked.certificate),
        "lies": [asdict(lie) for lie in checked.lies],
        "untaken": list(checked.untaken),
        "downgraded": None if checked.reference is None else _downgraded_data(checked),
    }


def check_screen(checked: Checked, title: str) -> RenderableType:
    """The verdict, then who would lie, then who pays for whom."""
    head = Text.assemble(("Walras ", "bold"), (title, "bold"))
    if checked.holds:
        verdict = Text(
            "Holds: nobody gains by taking a tier meant for others, and nobody loses by taking part.",
            style="bold green",
        )
    else:
        worst = checked.lies[0]
        verdict = Text(
            f"Does not hold: {_lie(worst.own)} of type {_amount(worst.theta)} gain {_amount(worst.gain)} by taking {worst.takes or 'nothing'}.",
            style="bold red",
        )
    parts: list[RenderableType] = [head, verdict]
    if checked.self_selected:
        parts.append(
            Text(
                "The menu does not say whom a tier is meant for; each user takes what is best, so there is nothing to lie about.",
                style="dim",
            )
        )
    rows = [
        (
            escape(tier.name),
            number(tier.quality),
            usd(tier.price),
            "" if np.isnan(tier.type_from) else _types(tier),
            "" if np.isnan(tier.share) else percent(tier.share),
            "" if np.isnan(tier.rent) else usd(tier.rent),
        )
        for tier in checked.tiers
    ]
    parts.append(table("Tiers", ("tier", "quality", "price", "taken by types", "share", "mean rent"), rows))
    if checked.lies:
        lies = [
            (escape(_lie(x.own)), escape(x.takes or "nothing"), _amount(x.theta), _amount(x.gain))
            for x in checked.lies[:LIES_SHOWN]
        ]
        parts.append(table("Lies that pay", ("meant for", "takes", "type", "gains"), lies))
        if len(checked.lies) > LIES_SHOWN:
            parts.append(Text(f"… and {len(checked.lies) - LIES_SHOWN} more (--json has all)", style="dim"))
    if checked.untaken:
        parts.append(Text(f"Taken by nobody: {', '.join(checked.untaken)}.", style="yellow"))
    c = checked.certificate
    if not math.isnan(c.information_rent):
        known = "" if math.isnan(c.profit) else f", profit {usd(c.profit)}, welfare {usd(c.welfare)}"
        parts.append(
            Text(f"\nPer request: revenue {usd(c.revenue)}, users' rent {usd(c.information_rent)}{known}.")
        )
    parts += _downgraded(checked)
    parts.append(_certificate(c))
    return Group(*parts)


def _lie(tier: str | None) -> str:
    return f"users of {tier}" if tier else "users meant to take nothing"


def _amount(amount: float) -> str:
    return "without bound" if math.isinf(amount) else usd(amount)
