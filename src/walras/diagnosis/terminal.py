"""The audit for a terminal: one screen that leads with the answer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from walras.diagnosis.audit import Audit
from walras.diagnosis.case import Case
from walras.diagnosis.contract import LAYERS, declared_price
from walras.diagnosis.words import count, interval, number, usd
from walras.market.shadow import Clearing, Usage

NAMES_SHOWN = 6
"""Rows of a table before the rest is left to --json and --html."""


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
    line = Text.assemble(
        ("Walras ", "bold"), (title, "bold"), f" · {count(n, 'tasks')} × {count(i, 'models')}"
    )
    if case.synthetic:
        line.append(" · SYNTHETIC LOG", style="bold yellow")
    return line


def _headline(audit: Audit, title: str) -> list[RenderableType]:
    regret, what = audit.regret, _policy_name(audit.case)
    bound = "" if audit.case.complete else "at least "
    lines: list[RenderableType] = [
        _title(audit.case, title),
        Text.from_markup(
            f"{what} lost [bold red]{bound}{usd(regret.overall.mean)} per task[/] ({interval(regret.overall.ci)}), "
            f"[bold]{usd(float(regret.per_task.sum()))}[/] in all, against the ex-post best at these prices."
        ),
    ]
    if audit.attainable_gain:
        gain = audit.attainable_gain
        what = f"gain {usd(gain.mean)} per task" if gain.ci[0] > 0 else "not gain with 95% confidence"
        limits = ", limits counted at its own prices (attainable μ)" if audit.case.constraints else ""
        lines.append(
            Text.from_markup(
                f"Hindsight includes luck: a policy that knows only class and value would [bold]{what}[/] "
                f"({interval(gain.ci)}){limits}."
            )
        )
    return lines


def _policy_name(case: Case) -> str:
    if case.baseline == "realised":
        return "The choices in the log"
    if case.baseline == "best fixed":
        return f"{escape(case.uses.names[int(case.chosen[0])])} for every task (best fixed)"
    return f"{escape(case.baseline)} for every task"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Names left, numbers right, and what has no heading left again; columns without a cell are left out."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    shown = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    for k in shown:
        left = k == 0 or not columns[k]
        table.add_column(
            columns[k], justify="left" if left else "right", style=None if k else "cyan", overflow="fold"
        )
    for row in rows:
        table.add_row(*(row[k] for k in shown))
    return table


def prices_tables(case: Case, clearing: Clearing, audit: Audit | None) -> list[RenderableType]:
    """One line per constraint: what it allows, what is used, what it is worth."""
    names = dict(zip(LAYERS, ("money", "λ₀", "ρ₀"), strict=True))
    declared = ", ".join(f"{names[layer]} {declared_price(case, layer):g}" for layer in LAYERS)
    line = Text(f"Declared prices: {declared} (settings, not discovered)", style="dim")
    if not clearing.usage:
        return [Text(), Text("No constraint declared: nothing is scarce, so every μ is 0."), line]
    rows = []
    for k, usage in enumerate(clearing.usage[:NAMES_SHOWN]):
        name, best, mu = escape(usage.constraint.name), number(usage.used), f"{usage.multiplier:.4g}"
        today = number(audit.realised.usage[k].used) if audit else ""
        spread = interval(audit.intervals[k], number) if audit else ""
        without_luck = number(float(audit.attainable.multipliers[k])) if audit and audit.attainable else ""
        rows.append((name, best, today, mu, spread, without_luck, _meaning(usage)))
    table = _table("Prices", ("constraint", "best", "audited", "price μ", "95%", "attainable μ", ""), rows)
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
    rows = []
    for c in audit.changes:
        who = " / ".join(part for part in (c.tenant, c.task_class) if part) or "all"
        gain = f"{usd(c.per_task.mean)} ({interval(c.per_task.ci)})"
        rows.append((escape(who), escape(c.from_use), escape(c.to_use), f"{c.tasks:,}", gain, usd(c.total)))
    return _table(
        "The changes worth most (held out)",
        ("who", "from", "mostly to", "tasks", "gain per task", "in all"),
        rows,
    )


def _lost(audit: Audit) -> RenderableType:
    regret = audit.regret
    parts = [
        f"{f.label} {f.name} {usd(f.per_task.mean)} on {count(f.tasks, 'tasks')}"
        for f in regret.failures
        if f.tasks
    ]
    line = Text.assemble(
        ("\nWhere it is lost: ", "bold"), "; ".join(parts) or "nowhere", " (per task of the log)"
    )
    groups = [("tenant", row) for row in regret.by_tenant] + [("class", row) for row in regret.by_class]
    most = sorted(groups, key=lambda group: -group[1].total)[:3]
    if most:
        line.append(
            "\n  most in " + ", ".join(f"{kind} {row.name} ({usd(row.total)} in all)" for kind, row in most)
        )
    if regret.value_correlation is not None and regret.top_decile_share is not None:
        line.append(
            f"\n  regret and V: Spearman {regret.value_correlation:.2f}; the top tenth by V holds "
            f"{regret.top_decile_share:.0%} of it (P2)"
        )
    return line


def _compared(audit: Audit) -> RenderableType:
    luck, real = "ex post: luck included", audit.realised.surplus
    rows = [("audited", usd(real.mean), interval(real.ci), _policy_name(audit.case))]
    if audit.best_fixed:
        fixed = audit.best_fixed
        outside = "" if fixed.feasible else " (breaks a constraint)"
        rows.append(
            ("best fixed", usd(fixed.surplus), "", escape(audit.case.uses.names[fixed.use]) + outside)
        )
    if audit.attainable:
        policy = audit.attainable.surplus
        rows.append(("attainable", usd(policy.mean), interval(policy.ci), "cross-fitted, held out"))
    if audit.oracle is not None:
        rows.append(("oracle", usd(audit.oracle), "", luck))
    rows.append(("oracle, may defer", usd(audit.oracle_with_defer), "", luck))
    return _table("Surplus at declared prices, per task", ("", "mean", "95%", ""), rows)


def _trust(audit: Audit) -> RenderableType:
    moved = [
        f"{s.name}: regret {usd(s.regret)}" + "".join(f", {mu:.3g}" for mu in s.multipliers[:NAMES_SHOWN])
        for s in audit.scenarios
        if s.name != "as declared"
    ]
    return Text.assemble(
        ("\nHow it moves with its inputs (regret, then each μ in the order above)\n", "bold"),
        "\n".join(f"  {line}" for line in moved),
    )


def certificate_line(clearing: Clearing) -> RenderableType:
    """The certificate in one line."""
    c, r = clearing.certificate, clearing.rounded
    text = f"gap {c.gap:.1g} USD per task, violation {c.max_violation:.1g}, slackness {c.slackness:.1g}"
    if r.split_tasks:
        text += f"; {count(r.split_tasks, 'split tasks')} rounded: gap {r.gap:.1g}, violation {r.max_violation:.1g}"
    return Text.assemble(("Certificate: ", "bold"), text, f" ({count(clearing.passes, 'passes')})")


def _notes(case: Case) -> list[RenderableType]:
    return [Text(f"note: {note}", style="dim") for note in case.notes]
