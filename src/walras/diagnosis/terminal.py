"""The audit for a terminal: one screen that leads with the answer."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from walras.diagnosis.audit import Audit
from walras.diagnosis.case import Case
from walras.diagnosis.contract import LAYERS, declared_price
from walras.market.shadow import Clearing, Usage

NAMES_SHOWN = 6
"""Rows of a table before the rest is left to --json and --html."""


def usd(amount: float) -> str:
    """Dollars with digits that can be read: $1,234 · $0.42 · $0.000329."""
    size = abs(amount)
    if size >= 1000:
        text = f"{size:,.0f}"
    elif size >= 1:
        text = f"{size:.2f}"
    else:
        text = f"{size:.3g}" if size >= 1e-12 else "0"
    return f"{'−' if amount < 0 and text != '0' else ''}${text}"


def audit_screen(audit: Audit, title: str) -> RenderableType:
    """The whole report."""
    parts: list[RenderableType] = [
        *_headline(audit, title),
        *prices_tables(audit.case, audit.clearing, audit),
    ]
    parts += [
        _changes(audit),
        _lost(audit),
        _compared(audit),
        _trust(audit),
        certificate_line(audit.clearing),
    ]
    return Group(*parts, *_notes(audit.case))


def prices_screen(case: Case, clearing: Clearing, title: str) -> RenderableType:
    """Prices and certificate only."""
    return Group(
        _title(case, title), *prices_tables(case, clearing, None), certificate_line(clearing), *_notes(case)
    )


def _title(case: Case, title: str) -> Text:
    n, i = case.uses.shape
    line = Text.assemble(("Walras ", "bold"), (title, "bold"), f" · {n:,} tasks × {i} models")
    if case.synthetic:
        line.append(" · SYNTHETIC LOG", style="bold yellow")
    return line


def _headline(audit: Audit, title: str) -> list[RenderableType]:
    regret, what = audit.regret, _policy_name(audit.case)
    low, high = regret.overall.ci
    bound = "" if audit.case.complete else "at least "
    lines: list[RenderableType] = [
        _title(audit.case, title),
        Text.from_markup(
            f"{what} lost [bold red]{bound}{usd(regret.overall.mean)} per task[/] ({usd(low)} to {usd(high)}), "
            f"[bold]{usd(float(regret.per_task.sum()))}[/] in all, against the ex-post best at these prices."
        ),
    ]
    if audit.attainable_gain:
        gain = audit.attainable_gain
        had = f"{usd(gain.mean)} per task of it ({usd(gain.ci[0])} to {usd(gain.ci[1])}) can be had"
        if gain.ci[0] <= 0:
            had = f"what can be had of it is not distinguishable from 0 ({usd(gain.ci[0])} to {usd(gain.ci[1])})"
        lines.append(
            Text.from_markup(
                f"Hindsight includes luck: [bold]{had}[/] by a policy that knows only class and value."
            )
        )
    return lines


def _policy_name(case: Case) -> str:
    if case.baseline == "realised":
        return "The choices in the log"
    if case.baseline == "best fixed":
        return f"{escape(case.uses.names[int(case.chosen[0])])} for every task (best fixed)"
    return f"{escape(case.baseline)} for every task"


def _table(*columns: str, title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for k, column in enumerate(columns):
        table.add_column(
            column, justify="left" if k == 0 else "right", style=None if k else "cyan", overflow="fold"
        )
    return table


def prices_tables(case: Case, clearing: Clearing, audit: Audit | None) -> list[RenderableType]:
    """One line per constraint: what it allows, what is used, what it is worth."""
    names = dict(zip(LAYERS, ("money", "λ₀", "ρ₀"), strict=True))
    declared = ", ".join(f"{names[layer]} {declared_price(case, layer):g}" for layer in LAYERS)
    line = Text(f"Declared prices: {declared} (settings, not discovered)", style="dim")
    if not clearing.usage:
        return [Text(), Text("No constraint declared: nothing is scarce, so every μ is 0."), line]
    table = _table("constraint", "best", "audited", "price μ", "95%", "attainable μ", "", title="\nPrices")
    for k, usage in enumerate(clearing.usage[:NAMES_SHOWN]):
        today = f"{audit.realised.usage[k].used:.3g}" if audit else ""
        interval = "{:.3g} to {:.3g}".format(*audit.intervals[k]) if audit else ""
        without_luck = f"{audit.attainable.multipliers[k]:.3g}" if audit and audit.attainable else ""
        table.add_row(
            escape(usage.constraint.name),
            f"{usage.used:.3g}",
            today,
            f"{usage.multiplier:.4g}",
            interval,
            without_luck,
            _meaning(usage),
        )
    more = len(clearing.usage) - NAMES_SHOWN
    rest = [Text(f"… and {more} more (--json has all)", style="dim")] if more > 0 else []
    return [table, *rest, line]


def _meaning(usage: Usage) -> str:
    mu, c = usage.multiplier, usage.constraint
    if mu == 0:
        return "slack: free"
    served = f", {usage.service_rate:.0%} served" if c.layer == "latency" else ""
    one_more = {
        "budget": f"one more {c.resource} buys {usd(mu)} net",
        "mean_sla": f"a second of delay costs {usd(mu)}",
        "quantile_sla": f"a breach costs {usd(mu)}",
        "risk_envelope": f"one more of risk buys {usd(mu)} net",
        "portfolio_envelope": f"one more of tail loss buys {usd(mu)} net",
    }[c.kind]
    return one_more + served


def _changes(audit: Audit) -> RenderableType:
    if not audit.changes:
        why = "no switch by class gains with 95% confidence on held-out tasks"
        if not audit.case.complete:
            why = "unknown: the log does not say what the other models would have given"
        return Text.assemble(("\nChanges worth making: ", "bold"), why)
    table = _table(
        "who", "from", "to", "tasks", "gain per task", "in all", title="\nThe changes worth most (held out)"
    )
    for c in audit.changes:
        who = " / ".join(part for part in (c.tenant, c.task_class) if part) or "all"
        gain = f"{usd(c.per_task.mean)} ({usd(c.per_task.ci[0])} to {usd(c.per_task.ci[1])})"
        table.add_row(escape(who), escape(c.from_use), escape(c.to_use), f"{c.tasks:,}", gain, usd(c.total))
    return table


def _lost(audit: Audit) -> RenderableType:
    regret = audit.regret
    parts = [
        f"{f.label} {f.name} {usd(f.per_task.mean)} on {f.tasks:,} tasks" for f in regret.failures if f.tasks
    ]
    line = Text.assemble(
        ("\nWhere it is lost: ", "bold"), "; ".join(parts) or "nowhere", " (per task of the log)"
    )
    groups = sorted((*regret.by_tenant, *regret.by_class), key=lambda row: -row.total)[:3]
    if groups:
        line.append("\n  most in " + ", ".join(f"{g.name} {usd(g.total)}" for g in groups))
    if regret.value_correlation is not None and regret.top_decile_share is not None:
        line.append(
            f"\n  regret and V: Spearman {regret.value_correlation:.2f}; the top tenth by V holds "
            f"{regret.top_decile_share:.0%} of it (P2)"
        )
    return line


def _compared(audit: Audit) -> RenderableType:
    table = _table("surplus, USD per task", "mean", "95%", "", title="")
    real = audit.realised.surplus
    table.add_row(
        "audited", usd(real.mean), f"{usd(real.ci[0])} to {usd(real.ci[1])}", _policy_name(audit.case)
    )
    if audit.best_fixed:
        fixed = audit.best_fixed
        outside = "" if fixed.feasible else " (breaks a constraint)"
        table.add_row(
            "best fixed", usd(fixed.surplus), "", escape(audit.case.uses.names[fixed.use]) + outside
        )
    if audit.attainable:
        p = audit.attainable.surplus
        table.add_row(
            "attainable", usd(p.mean), f"{usd(p.ci[0])} to {usd(p.ci[1])}", "cross-fitted, held out"
        )
    if audit.oracle is not None:
        table.add_row("oracle", usd(audit.oracle), "", "ex post: luck included")
    table.add_row("oracle, may defer", usd(audit.oracle_with_defer), "", "ex post: luck included")
    return table


def _trust(audit: Audit) -> RenderableType:
    moved = [
        f"{s.name}: regret {usd(s.regret)}" + ("".join(f", μ {mu:.3g}" for mu in s.multipliers[:3]))
        for s in audit.scenarios[1:]
    ]
    return Text.assemble(
        ("\nHow it moves with its inputs\n", "bold"), "\n".join(f"  {line}" for line in moved)
    )


def certificate_line(clearing: Clearing) -> RenderableType:
    """The certificate in one line."""
    c, r = clearing.certificate, clearing.rounded
    text = f"gap {c.gap:.1g} USD per task, violation {c.max_violation:.1g}, slackness {c.slackness:.1g}"
    if r.split_tasks:
        text += f"; {r.split_tasks} split tasks rounded: gap {r.gap:.1g}, violation {r.max_violation:.1g}"
    return Text.assemble(("Certificate: ", "bold"), text, f" ({clearing.passes} passes)")


def _notes(case: Case) -> list[RenderableType]:
    return [Text(f"note: {note}", style="dim") for note in case.notes]
