"""The page of `walras clear`: what is scarce, who pays for whom, and why to believe it."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from walras.diagnosis.economy import (
    FAIR_HEAD,
    View,
    certificate_text,
    fair_rows,
    headline,
    in_words,
    money,
    price_head,
    price_rows,
    tenant_head,
    tenant_rows,
)
from walras.diagnosis.html.plot import BEST, Figure, bar_layout, bar_trace
from walras.diagnosis.html.text import esc, header, label, section, table
from walras.diagnosis.words import number

MOST = 24
"""Bars of a figure, and tenants of a table of pairs."""


def economy_report(views: list[View]) -> str:
    """All of it, an economy after the other."""
    return "".join(map(_one, views)) + f"<footer>Walras {version('walras')}</footer>"


def _one(view: View) -> str:
    points = [(f"{k + 1}.", esc(text)) for k, text in enumerate(in_words(view))]
    parts = [header(f"clears {view.name}", esc(headline(view)), points, synthetic=False)]
    if not view.found:
        return parts[0]
    rows = [tuple(map(esc, row)) for row in price_rows(view)]
    parts.append(
        section(
            "What each good is worth", _worth(view).html() + table(tuple(map(esc, price_head(view))), rows)
        )
    )
    head = tuple(map(esc, tenant_head(view)))
    takes = table(head, [tuple(map(esc, row)) for row in tenant_rows(view)])
    said = "<p>Units on top of what the tenant owns; below 0 it gives. The last column is what its presence costs all others.</p>"
    parts.append(section("What each tenant takes", said + takes))
    if view.costs is not None and len(view.economy.tenants) > 1:
        parts.append(section("Who pays for whom", _pairs(view), "[OP-6]"))
    if view.fairness is not None:
        said = (
            "<p>Each tenant’s own utility beside what another rule would give it: 1/N of everything, its budget’s share of everything, or one "
            "queue with admission in which all goods have one price. Envy is what it would gain by another’s bundle, scaled to its own "
            "budget.</p>"
        )
        fair = table(FAIR_HEAD, [tuple(map(esc, row)) for row in fair_rows(view)])
        parts.append(section("Is it fair?", said + fair))
    if view.economy.n_activities:
        head = ("", *price_head(view)[1 : 1 + len(view.found)])
        levels = [
            (esc(name), *(number(float(found.activities[a])) for found in view.found))
            for a, name in enumerate(view.economy.making)
        ]
        parts.append(section("Production", table(head, levels)))
    proofs = "".join(f"<li>{esc(certificate_text(found.certificate))}</li>" for found in view.found)
    parts.append(section("Why to believe it", f"<p>{esc(view.found[0].why)}</p><ul>{proofs}</ul>", "[Z-GE]"))
    return "".join(parts)


def _worth(view: View) -> Figure:
    found, economy = view.found[0], view.economy
    worth = found.prices * economy.owned.sum(axis=0)
    order = [int(j) for j in np.argsort(-worth) if worth[j] > 0][:MOST]
    names = [label(economy.goods[j]) for j in order]
    values = [float(worth[j]) * view.scale(found) for j in order]
    said = [f"{name}: {money(view, value)}" for name, value in zip(names, values, strict=True)]
    unit = "USD" if view.in_usd else "worth, where prices sum to 1"
    return Figure(
        id=f"worth-{abs(hash(view.name)) % 10**8}",
        title="What all of each good is worth",
        caption="Price × amount owned, at the first equilibrium.",
        data=(bar_trace(values, names, BEST, said),),
        layout=bar_layout(names, unit, dollars=view.in_usd),
        head=("good", "worth"),
        rows=tuple((esc(economy.goods[j]), money(view, v)) for j, v in zip(order, values, strict=True)),
    )


def _pairs(view: View) -> str:
    """Rows cost, columns bear."""
    assert view.costs is not None
    names = [esc(tenant.name) for tenant in view.economy.tenants]
    rows = [
        (name, *(money(view, float(cost)) if np.isfinite(cost) else "" for cost in row))
        for name, row in zip(names, view.costs, strict=True)
    ]
    said = (
        "<p>What the presence of the row’s tenant costs the column’s: how much more income the latter would need at these prices to be "
        "as well off as in a market without the former (equivalent variation). Below 0 it gains.</p>"
    )
    return said + table(("", *names), rows)
