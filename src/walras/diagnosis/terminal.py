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
from walras.diagnosis.regret import Mean
from walras.diagnosis.sensitivity import SAMPLE
from walras.diagnosis.shard_prices import ShardPrices
from walras.diagnosis.words import count, interval, number, usd
from walras.market.clearing import Clearing, Usage

WIDE = 100
"""Columns of a terminal from which a table shows everything."""
NAMES_SHOWN = 6
"""Rows of a table before the rest is left to --json and --html."""


def audit_screen(audit: Audit, title: str, width: int) -> RenderableType:
    """The whole report, for a terminal of `width` columns."""
    parts: list[RenderableType] = [
        *_headline(audit, title),
        *prices_tables(audit.case, audit.clearing, audit, width),
    ]
    parts += [
        _changes(audit, width),
        _lost(audit),
        _compared(audit),
        _trust(audit),
        certificate_line(audit.clearing),
    ]
    return Group(*parts, *_notes(audit.case))


def prices_screen(case: Case, clearing: Clearing, title: str, width: int) -> RenderableType:
    """Prices and certificate only."""
    return Group(
        _title(case, title),
        *prices_tables(case, clearing, None, width),
        certificate_line(clearing),
        *_notes(case),
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
    if audit.gain_surplus and audit.gain_limits:
        lines.append(Text.from_markup(_within_reach(audit.gain_surplus, audit.gain_limits)))
    if regret.rule_breakers:
        text = f"{regret.rule_breakers:,} of these choices broke an absolute rule [Z-LEX], for {usd(regret.rule_breaking)} per task."
        lines.append(Text(text, style="red"))
    return lines


def _within_reach(earned: Mean, limits: Mean) -> str:
    """What a policy without hindsight would change, in words: surplus, and apart from it what it frees or takes."""
    sign = "more" if earned.mean >= 0 else "less"
    text = (
        "Hindsight includes luck: a policy that knows only class and value earns "
        f"[bold]{usd(abs(earned.mean))} per task {sign}[/] ({interval(earned.ci)})"
    )
    if abs(limits.mean) > 1e-3 * abs(earned.mean):
        does = "frees" if limits.mean > 0 else "takes"
        text += f" and {does} limits worth {usd(abs(limits.mean))} to it"
    return text + "."


def _policy_name(case: Case) -> str:
    if case.baseline == "realised":
        return "The choices in the log"
    if case.baseline == "best fixed":
        return f"{escape(case.uses.names[int(case.chosen[0])])} for every task (best fixed)"
    return f"{escape(case.baseline)} for every task"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Names left, numbers right, and what has no heading left again; columns without a cell are left out."""
    drawn = Table(
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
        drawn.add_column(
            columns[k], justify="left" if left else "right", style=None if k else "cyan", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*(row[k] for k in shown))
    return drawn


def prices_tables(case: Case, clearing: Clearing, audit: Audit | None, width: int) -> list[RenderableType]:
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
        wide = (spread, _meaning(usage)) if width >= WIDE or not audit else ("", "")
        rows.append((name, best, today, mu, wide[0], without_luck, wide[1]))
    prices = table("Prices", ("constraint", "best", "audited", "price μ", "95%", "attainable μ", ""), rows)
    more = len(clearing.usage) - NAMES_SHOWN
    rest = [Text(f"… and {more} more (--json has all)", style="dim")] if more > 0 else []
    return [prices, *rest, line]


def _meaning(usage: Usage) -> str:
    mu, c = usage.multiplier, usage.constraint
    if mu == 0:
        return "slack: free"
    served = f", {usage.service_rate:.0%} served" if c.layer == "latency" else ""
    one_more = {
        "budget": f"+1 {c.resource} buys {usd(mu)}",
        "mean_sla": f"a second costs {usd(mu)}",
        "quantile_sla": f"a breach costs {usd(mu)}",
        "risk_envelope": f"+1 of risk buys {usd(mu)}",
        "portfolio_envelope": f"+1 of tail loss buys {usd(mu)}",
    }[c.kind]
    return one_more + served


def _changes(audit: Audit, width: int) -> RenderableType:
    if not audit.changes:
        why = "no switch by class gains with 95% confidence on held-out tasks"
        if not audit.case.complete:
            why = "unknown: the log does not say what the other models would have given"
        return Text.assemble(("\nChanges worth making: ", "bold"), why)
    rows = []
    for c in audit.changes:
        who = " / ".join(part for part in (c.tenant, c.task_class) if part) or "all"
        switch = f"{escape(c.from_use)} → {escape(c.to_use)}"
        gain = f"{usd(c.per_task.mean)} ({interval(c.per_task.ci)})"
        earned = usd(c.surplus) if width >= WIDE else ""
        rows.append((escape(who), switch, f"{c.tasks:,}", gain, earned, usd(c.total)))
    return table(
        "Changes worth most (held out; freed limits count)",
        ("who", "switch, mostly", "tasks", "gain per task", "of it surplus", "in all"),
        rows,
    )


def _lost(audit: Audit) -> RenderableType:
    regret = audit.regret
    parts = [
        f"{f.label} {f.name} {usd(f.per_task.mean)} ({count(f.tasks, 'tasks')})"
        for f in regret.failures
        if f.tasks
    ]
    line = Text.assemble(("\nWhere it is lost, per task of the log: ", "bold"), "; ".join(parts) or "nowhere")
    groups = [("tenant", row) for row in regret.by_tenant] + [("class", row) for row in regret.by_class]
    most = sorted(groups, key=lambda group: -group[1].total)[:3]
    if most:
        line.append("\n  in all: " + ", ".join(f"{kind} {row.name} {usd(row.total)}" for kind, row in most))
    if regret.value_correlation is not None and regret.top_decile_share is not None:
        seen = "P2" if regret.value_correlation > 0 and regret.top_decile_share > 0.1 else "P2 not seen"
        line.append(
            f"\n  regret and V: Spearman {number(regret.value_correlation)}; the top tenth by V holds "
            f"{regret.top_decile_share:.0%} ({seen})"
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
        rows.append(
            ("attainable", usd(policy.mean), interval(policy.ci), "held out" + _over(audit.attainable.usage))
        )
    if audit.oracle is not None:
        rows.append(("oracle", usd(audit.oracle), "", luck))
    rows.append(("oracle, may defer", usd(audit.oracle_with_defer), "", luck))
    return table("Surplus at declared prices, per task", ("", "mean", "95%", ""), rows)


def _over(usage: Sequence[Usage]) -> str:
    """Which limits are missed by more than a percent, if any."""
    missed = [f"{u.constraint.layer} limit missed by {u.excess:.0%}" for u in usage if u.excess > 0.01]
    return "; " + ", ".join(missed) if missed else ""


def _trust(audit: Audit) -> RenderableType:
    found = {s.name: s for s in audit.scenarios}
    lines = []
    for what in ("V", "ρ"):
        pair = [found[name] for name in (f"{what} − 50%", f"{what} + 50%") if name in found]
        if len(pair) == 2:
            prices = [
                f"{number(a)} to {number(b)}" for a, b in zip(*(s.multipliers for s in pair), strict=True)
            ]
            lines.append(
                f"  {what} ± 50%: " + "; ".join([f"{usd(pair[0].regret)} to {usd(pair[1].regret)}", *prices])
            )
    lines += [
        f"  {s.name}: " + "; ".join([usd(s.regret), *map(number, s.multipliers)])
        for s in audit.scenarios
        if s.name.startswith("quality")
    ]
    n = len(audit.case.tasks)
    on = f", on {SAMPLE:,} tasks" if n > SAMPLE else ""
    head = f"\nIf the inputs are wrong (regret; then each μ{on})\n"
    return Text.assemble((head, "bold"), "\n".join(lines))


def shard_prices_screen(found: ShardPrices, title: str) -> RenderableType:
    """Prices of a market in shards, and what it took to find them."""
    size = f"{count(found.tasks, 'tasks')} × {count(found.uses, 'models')}"
    rows = [
        (escape(u.constraint.name), number(u.used), f"{u.multiplier:.4g}", _meaning(u)) for u in found.usage
    ]
    prices = table("Prices", ("constraint", "best", "price μ", ""), rows)
    took = f"{count(found.passes, 'passes')} over all of it and {found.steps - found.passes} over parts"
    if found.bytes_per_pass is not None:
        took += f", {found.bytes_per_pass:,} bytes a pass"
    return Group(
        Text.assemble(("Walras ", "bold"), (title, "bold"), f" · {size}"),
        prices if rows else Text("No constraint declared: nothing is scarce, so every μ is 0."),
        certificate_line(found),
        Text(f"Engine {found.engine}: {took}, {found.seconds:.1f} s", style="dim"),
    )


def _small(error: float) -> str:
    """An error in one digit; below 1e-12 it is round-off, which differs between processors."""
    return "0" if error < 1e-12 else f"{error:.1g}"


def certificate_line(clearing: Clearing | ShardPrices) -> RenderableType:
    """The certificate in one line."""
    c, r = clearing.certificate, clearing.rounded
    text = f"gap {_small(c.gap)} USD per task, violation {_small(c.max_violation)}"
    if r is None:
        text += "; not rounded"
    elif r.split_tasks:
        text += f"; {count(r.split_tasks, 'split tasks')} rounded: gap {_small(r.gap)}, violation {_small(r.max_violation)}"
    return Text.assemble(("Certificate: ", "bold"), text)


def _notes(case: Case) -> list[RenderableType]:
    return [Text(f"note: {note}", style="dim") for note in case.notes]
