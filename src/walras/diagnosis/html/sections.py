"""The sections of the audit report, in reading order: each takes the audit and returns HTML."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from walras.diagnosis.audit import Audit
from walras.diagnosis.case import Case
from walras.diagnosis.html.figures import (
    audited_name,
    benchmarks,
    budget_curve,
    budget_row,
    choice_shares,
    over,
    regret_by_group,
    regret_by_value,
)
from walras.diagnosis.html.text import esc, header, line, notes_on_log, section, small, summands, table
from walras.diagnosis.regret import overdrafts
from walras.diagnosis.sensitivity import SAMPLE
from walras.diagnosis.words import Format, as_declared, count, interval, number, percent, usd
from walras.market.clearing import Usage
from walras.prices import Constraint, Scope
from walras.quantities import USD
from walras.risk import FloatArray

SYMBOL = {"compute": "μ_C", "latency": "μ_L", "risk": "μ_R"}


def report(audit: Audit, title: str) -> str:
    """All of it."""
    return "".join(
        (
            headline(audit, title),
            prices(audit),
            changes(audit),
            section("What more budget would buy", _curve(audit), "[Z-3]"),
            losses(audit),
            section("Who gets which model", choice_shares(audit).html()),
            section("How good could it get", benchmarks(audit).html(numbers_shown=True)),
            accounts(audit),
            sensitivity(audit),
            trust(audit),
        )
    )


def _curve(audit: Audit) -> str:
    if not audit.curve.budget.size:
        return "<p>Unknown: at no budget that was tried do prices exist.</p>"
    return budget_curve(audit).html()


# --- the answer ---------------------------------------------------------------------------------------------------


def headline(audit: Audit, title: str) -> str:
    n, i = audit.case.uses.shape
    points = (
        ("Against what.", _against(audit)),
        ("What is attainable.", _attainable(audit)),
        ("How sure the prices are.", _certified(audit)),
    )
    what = f"audit of {title} · {n:,} tasks × {i} models"
    return header(what, _answer(audit), points, synthetic=audit.case.synthetic)


def _answer(audit: Audit) -> str:
    case, regret, n = audit.case, audit.regret, f"{len(audit.case.tasks):,}"
    who = f"Sending every task to {esc(case.uses.names[int(case.chosen[0])])} loses"
    if case.baseline == "realised":
        who = "Today’s choices lost"
    total = float(regret.per_task.sum())
    if not total and not case.complete:
        return f"{who} <em>nothing that this log could show</em>, on {n} tasks."
    if not total:
        return f"{who} <em>nothing</em>: each of {n} tasks got its best use."
    least = "" if case.complete else "at least "
    return f"{who} {least}<em>{usd(regret.overall.mean)} per task</em>, {usd(total)} over {n} tasks."


def _against(audit: Audit) -> str:
    """What regret is measured against, and its two parts in words."""
    best, regret = audit.clearing.certificate.objective, audit.regret.overall
    at = ", at prices under which your limits are kept" if audit.case.constraints else ""
    text = f"The best choice for each task in hindsight{at} (95% interval {interval(regret.ci)} per task)."
    missed, overdrawn = best - audit.realised.surplus.mean, sum(overdrafts(audit.case, audit.clearing.prices))
    if abs(overdrawn) <= 1e-3 * regret.mean:
        return text
    if missed < 0:
        return f"{text} {usd(-missed)} more is earned than your limits allow, by overdrawing them by {usd(overdrawn)} at their prices."
    if overdrawn > 0:
        return f"{text} Of it, {usd(overdrawn)} is limits overdrawn, at their prices, and {usd(missed)} surplus not earned."
    return f"{text} The best earns {usd(missed)} more; {usd(-overdrawn)} of that is the price of limits left unused here."


def _attainable(audit: Audit) -> str:
    earned, limits = audit.gain_surplus, audit.gain_limits
    if earned is None or limits is None:
        return f"Unknown: {_why_unknown(audit)}."
    if not audit.regret.overall.mean:
        return "Nothing is left to gain."
    text = (
        f"A policy that knows only a task’s class and value earns {usd(abs(earned.mean))} "
        f"{'more' if earned.mean >= 0 else 'less'} per task (95% interval {interval(earned.ci)}), on tasks it was not fitted on"
    )
    if abs(limits.mean) > 1e-3 * abs(earned.mean):
        does = "frees" if limits.mean > 0 else "takes"
        text += f", and {does} limits that are worth {usd(abs(limits.mean))} per task to it"
    return text + ". What hindsight adds to that takes better signals, or luck."


def _why_unknown(audit: Audit) -> str:
    """Why there is no attainable policy."""
    if not audit.case.complete:
        return "the log does not say what the other models would have given, so the loss is a lower bound"
    return "the log is too small, or no policy fitted on a part of it keeps your limits"


def _certified(audit: Audit) -> str:
    c = audit.clearing.certificate
    gap = f" by more than {usd(c.gap)} per task" if c.gap > 1e-9 else ""
    if not audit.case.constraints:
        return f"No limit is declared, so no price had to be found. Certified: nothing beats the best found{gap}."
    kept = "keeps every limit"
    if c.max_violation > 1e-9:
        kept = f"misses no limit by more than {percent(c.max_violation)}"
    return (
        f"Certified: the allocation found {kept}, and no other that does beats it{gap}. "
        "How far another sample would move the prices stands below them."
    )


# --- prices -------------------------------------------------------------------------------------------------------


def prices(audit: Audit) -> str:
    who = "today" if audit.case.baseline == "realised" else f"with {esc(audited_name(audit.case))}"
    head = ("limit", "bound", "used by the best", f"used {who}", "price", "in words")
    rows = [_price_row(audit, k) for k in range(len(audit.clearing.usage))]
    found = (
        table(head, rows, (0, 5))
        if rows
        else "<p>No limit is declared, so nothing is scarce and no price is discovered.</p>"
    )
    body = (
        found
        + "<h3>Declared by you, not discovered</h3>"
        + table(("price", "per unit", "in words"), _declared(audit), (0, 2))
    )
    return section("What each limit is worth", body, "[Z-3]")


def _price_row(audit: Audit, k: int) -> tuple[str, ...]:
    best, today, pair = audit.clearing.usage[k], audit.realised.usage[k], audit.intervals[k]
    c = best.constraint
    lines = [esc(c.unit), f"95%: {interval(pair, number)}" if np.isfinite(pair[1]) else "interval unknown"]
    if audit.attainable:
        lines.append(f"without hindsight {number(float(audit.attainable.multipliers[k]))}")
    excess = f'<span class="over">{over(today)}</span>' if over(today) else ""
    return (
        f"{esc(_limit_name(c))} {small(SYMBOL[c.layer] + ' · absolute' * c.hard)}",
        _amount(c, c.bound, as_declared),
        _amount(c, best.used) + _served(best),
        _amount(c, today.used) + excess + _served(today),
        f"<b>{number(best.multiplier)}</b>" + "".join(map(line, lines)),
        _in_words(best),
    )


def _limit_name(c: Constraint) -> str:
    what = {
        "budget": "budget" if c.resource == USD else c.resource,
        "mean_sla": "mean latency",
        "quantile_sla": f"answers later than {as_declared(c.seconds)} s",
        "risk_envelope": "risk",
        "portfolio_envelope": "tail risk of all tasks together",
    }[c.kind]
    return what if c.scope == Scope() else f"{what}, {c.scope}"


def _amount(c: Constraint, x: float, form: Format = number) -> str:
    match c.kind:
        case "budget":
            return f"${form(x)}" if c.resource == USD else form(x)
        case "mean_sla":
            return f"{form(x)} s"
        case "quantile_sla":
            return percent(x)
        case _:
            return form(x)


def _served(usage: Usage) -> str:
    """The service rate beside an SLA: deferring must not fake it."""
    served = line(f"{percent(usage.service_rate)} served")
    return served if usage.constraint.layer == "latency" else ""


def _in_words(usage: Usage) -> str:
    c, worth = usage.constraint, usd(usage.multiplier)
    if not usage.multiplier:
        return "not binding: costs nothing"
    more = {
        "budget": "one more dollar of budget" if c.resource == USD else f"one more unit of {esc(c.resource)}",
        "mean_sla": "one more second allowed to one task",
        "quantile_sla": "one more late answer allowed",
        "risk_envelope": "one more unit of risk allowed",
        "portfolio_envelope": "one more dollar of tail loss allowed",
    }[c.kind]
    return f"{more} buys {worth} of net surplus"


def _declared(audit: Audit) -> list[tuple[str, str, str]]:
    case = audit.case
    if case.economy.numeraire == "compute":
        return [
            (f"money, λ₀, ρ₀ {small('[Z-3] pure form')}", "0", "only limits make prices: numéraire compute")
        ]
    budget = budget_row(audit)
    full = (
        f"; with the budget’s price, a dollar spent must earn {usd(1 + budget.multiplier)}"
        if budget and budget.multiplier
        else ""
    )
    rows = [(f"money {small('1')}", "$1 per $1", f"money counts itself{full}")]
    rows.append(
        (
            f"delay {small('λ₀')}",
            f"{_range(case.tasks.latency_price)} per second",
            "what a second of a task’s own delay costs",
        )
    )
    rows.append(
        (
            f"risk {small('ρ₀')}",
            f"{_range(case.tasks.risk_price)} per unit",
            "1 where risk is dollars of expected loss: risk-neutral",
        )
    )
    rows += [
        (esc(name), f"{usd(price)} per unit", "what a unit costs")
        for name, price in case.economy.declared()
        if name != USD
    ]
    return rows


def _range(column: FloatArray) -> str:
    low, high = float(column.min()), float(column.max())
    return f"${as_declared(low)}" if low == high else f"${as_declared(low)} to ${as_declared(high)}"


# --- changes, losses ----------------------------------------------------------------------------------------------


def changes(audit: Audit) -> str:
    if not audit.changes:
        why = "No switch for a whole tenant and class gains with 95% confidence on held-out tasks."
        if audit.attainable is None:
            why = f"None can be named: {_why_unknown(audit)}."
        return section("The changes worth most", f"<p>{why}</p>")
    rows = [
        (
            esc(" / ".join(part for part in (c.tenant, c.task_class) if part) or "all tasks"),
            esc(c.from_use),
            f"{small('mostly')} {esc('no model (defer)' if c.to_use == 'defer' else c.to_use)}",
            f"{c.tasks:,}",
            f"{usd(c.per_task.mean)} {small(f'({interval(c.per_task.ci)})')}",
            usd(c.surplus),
            f"<b>{usd(c.total)}</b>",
        )
        for c in audit.changes
    ]
    head = (
        "tasks of",
        "from",
        "to",
        "tasks",
        "gain per task (95%, all groups at once)",
        "of it surplus",
        "gain over the log",
    )
    why = "<p>What a policy that knows only class and value does instead, scored on tasks it was not fitted on. A gain is surplus plus what the switch frees (or takes) of each limit, at the price the limit has without hindsight; a large overrun is valued too high by a marginal price.</p>"
    return section("The changes worth most", table(head, rows, (0, 1, 2)) + why)


def losses(audit: Audit) -> str:
    regret = audit.regret
    meaning = {
        "FM-1": "used more, at full price, than the best use would have",
        "FM-2": "used less, and gave up more than was saved",
    }
    body = "<ul>" + "".join(
        f"<li><b>{f.name.capitalize()}</b> {small(f.label)}: {f.tasks:,} tasks {meaning[f.label]}. "
        f"{usd(f.per_task.mean)} per task of the log ({interval(f.per_task.ci)}), {usd(f.total)} in all.</li>"
        for f in regret.failures
        if f.tasks
    )
    body += f"<li>{_value_sentence(audit)}</li></ul>"
    if regret.by_value_decile:
        body += regret_by_value(audit).html(heading=True)
    for what, rows in (("tenant", regret.by_tenant), ("class", regret.by_class)):
        if rows:
            body += regret_by_group(what, rows).html(heading=True)
    return section("Where it was lost", body, "[Z-4]")


def _value_sentence(audit: Audit) -> str:
    regret = audit.regret
    if not regret.by_value_decile:
        worth = float(audit.case.tasks.value[0])
        return f"Every task has the same value ({usd(worth)}), so there is no regret by value to show."
    if regret.value_correlation is None or regret.top_decile_share is None:
        return "All tasks lost the same, so regret says nothing about value."
    rho = regret.value_correlation
    moves = (
        "rises with value" if rho > 0.1 else "falls with value" if rho < -0.1 else "hardly moves with value"
    )
    seen = rho > 0 and regret.top_decile_share > 0.1
    mark = "P2: a cost-minimising router loses on valuable requests" if seen else "P2 not seen"
    return (
        f"<b>Regret {moves}</b> (Spearman {number(rho)}): the tenth of tasks with the highest value holds "
        f"{percent(regret.top_decile_share)} of it. {small(mark)}"
    )


# --- accounts -----------------------------------------------------------------------------------------------------


def accounts(audit: Audit) -> str:
    """The realised vector, and regret as surplus not earned plus limits overdrawn."""
    vector = f"<h3>A task, on average {small('[Z-1]')}</h3>" + _vector(audit)
    identity = f"<h3>Regret, accounted for</h3>{_identity(audit)}"
    return section("What a task gives and takes", vector + identity)


def _vector(audit: Audit) -> str:
    chosen, real = audit.regret.chosen, audit.realised
    means = [float(t.mean()) for t in (chosen.value, -chosen.compute, -chosen.latency, -chosen.risk)]
    names = (
        ("quality, at its value", "V·ΔQ", f"mean quality {number(real.quality)}"),
        ("compute, at its full price", "π_C·ΔC", f"{usd(real.cost)} paid"),
        ("delay", "π_L·ΔL", f"{number(real.latency_s)} s"),
        ("risk", "π_R·ΔR", f"{number(real.risk)} of risk"),
        ("net value at the discovered prices", "", ""),
    )
    amounts = summands([*means, sum(means)])
    rows = [
        (f"{name} {small(sign)}", physical, dollars)
        for (name, sign, physical), dollars in zip(names, amounts, strict=True)
    ]
    return table(("", "amount", "USD per task"), rows)


def _identity(audit: Audit) -> str:
    case, certificate, mean = audit.case, audit.clearing.certificate, audit.regret.overall.mean
    who = "today’s choices" if case.baseline == "realised" else esc(audited_name(case))
    rows = [
        ("best surplus within the limits", "", certificate.objective),
        (f"less the surplus of {who}", "", -audit.realised.surplus.mean),
    ]
    parts = overdrafts(case, audit.clearing.prices)
    for best, used, part in zip(audit.clearing.usage, audit.realised.usage, parts, strict=True):
        name = f"{esc(_limit_name(used.constraint))}: price × (used − bound)"
        rows.append((name, _product(case, used, best.multiplier), part))
    if audit.regret.rule_breaking:
        broke = count(audit.regret.rule_breakers, "choices")
        name = f"gained by breaking an absolute rule ({broke}), and not set off {small('[Z-LEX]')}"
        rows.append((name, "", audit.regret.rule_breaking))
    rows.append(("mean regret", "", mean))
    amounts = summands([row[2] for row in rows])
    cells = [(name, how, amount) for (name, how, _), amount in zip(rows, amounts, strict=True)]
    return table(("", "how", "USD per task"), cells)


def _product(case: Case, used: Usage, price: float) -> str:
    """price × (used − bound) in numbers, per task of the log."""
    c = used.constraint
    if not price:
        return "price 0"
    if c.kind == "portfolio_envelope":
        return f"{number(price)} × (losses, weighted as at the optimum, − {as_declared(c.bound)})"
    text = f"{number(price)} × ({number(used.used)} − {as_declared(c.bound)})"
    if c.layer == "latency":
        text += f" × {percent(used.service_rate)} served"
    members = c.scope.members(case.tasks)
    return text if members is None else f"{text} × {percent(float(members.mean()))} in scope"


# --- sensitivity, trust -------------------------------------------------------------------------------------------


def sensitivity(audit: Audit) -> str:
    names = [
        f"{SYMBOL[u.constraint.layer]} {small(esc(_limit_name(u.constraint)))}" for u in audit.clearing.usage
    ]
    rows = [
        (esc(s.name), *map(number, s.multipliers), usd(s.surplus), usd(s.regret)) for s in audit.scenarios
    ]
    prices = [interval(pair, number) for pair in audit.intervals]
    rows.append(("another log like this one, 95%", *prices, "", interval(audit.regret.overall.ci)))
    text = "Values V, declared risk prices ρ and recorded qualities may be wrong; this is the answer if they were."
    if len(audit.case.tasks) > SAMPLE:
        text += f" Computed on a sample of {SAMPLE:,} tasks."
    head = ("if", *names, "best surplus per task", "regret per task")
    return section("If the inputs are wrong", f"<p>{text}</p>" + table(head, rows))


def trust(audit: Audit) -> str:
    notes = notes_on_log(audit.case.notes, synthetic=audit.case.synthetic)
    body = f"{notes}<h3>Certificate</h3>{_certificate(audit)}{METHOD}"
    walras = (
        f"Walras {version('walras')} · {audit.clearing.passes} passes over the log · {audit.seconds:.1f} s"
    )
    return section("Why to believe it", body) + f"<footer>{walras}</footer>"


def _certificate(audit: Audit) -> str:
    c, r = audit.clearing.certificate, audit.clearing.rounded
    facts = (
        ("duality gap", c.gap, "USD per task between the allocation found and a bound on any other"),
        ("violation", c.max_violation, "largest excess over a bound, relative to it"),
        ("slackness", c.slackness, "largest price × unused amount: prices belong to limits that bind [Z-CS]"),
        ("split tasks", r.split_tasks, "shared between two uses, which is how discrete choices clear [Z-W1]"),
        ("gap after rounding", r.gap, "USD per task, once every split task is given to one use"),
        ("violation after rounding", r.max_violation, "relative to the bound"),
    )
    rows = [(name, f"{x:.2g}", meaning) for name, x, meaning in facts]
    return table(("", "", "what it is"), rows, (0, 2))


METHOD = f"""<h3>Method</h3>
<p>Prices are the multipliers of the programme <i>most net surplus within your limits</i> {small("[Z-3]")}: each task, choosing for
itself by V·ΔQ − π_C·ΔC − π_L·ΔL − π_R·ΔR {small("[Z-1]")}, then keeps the limits and reaches the optimum. Net surplus is
quality at its value less money, delay and risk at their declared prices. Regret is the net value, at the discovered
prices, of a task’s best use less that of the use it got {small("[Z-4]")}. The attainable policy is cross-fitted on five folds and
scored on the fold it has not seen. Intervals are bootstraps over tasks.</p>"""
