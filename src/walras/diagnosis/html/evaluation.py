"""The sections of the evaluation report, in reading order."""

from __future__ import annotations

from importlib.metadata import version

from walras.diagnosis.evaluate import Evaluation, Halves, Spread
from walras.diagnosis.html.evaluation_figures import (
    ahead,
    calibration_plot,
    coverage,
    gap_closed,
    give_or_take,
    off_policy_estimates,
    picks,
    usd_give_or_take,
)
from walras.diagnosis.html.text import header, notes_on_log, section, small, table
from walras.diagnosis.routing_report import verdict
from walras.diagnosis.words import count, interval, number, percent, usd
from walras.estimate.empirical_likelihood import Estimate
from walras.estimate.off_policy import OffPolicy


def evaluation_report(found: Evaluation, title: str) -> str:
    """All of it; what the log cannot tell is left out, or said to be unknown."""
    parts = [headline(found, title)]
    if found.halves:
        gaps = gap_closed(found.halves, found.apart).html(heading=True, numbers_shown=True)
        parts.append(section("How much of what could be gained it gains", gaps, "[Z §3.1]"))
    both = f'<div class="pair">{calibration_plot(found).html(heading=True)}{coverage(found.calibration).html(heading=True)}</div>'
    parts.append(section("Whether its predictions hold", both))
    parts.append(section("Who gets the requests", picks(found).html(heading=True)))
    parts.append(section("What it still leaves", regret(found), "[Z-4]"))
    if found.off_policy:
        parts.append(section("What the logged choices say", logged(found, found.off_policy), "[OP-1]"))
    parts.append(section("Why to believe it", notes(found)))
    return "".join(parts) + f"<footer>Walras {version('walras')}</footer>"


# --- the answer -----------------------------------------------------------------------------------------------------


def headline(found: Evaluation, title: str) -> str:
    points = []
    if found.halves:
        points.append(("How much there is to gain.", _room(found.halves)))
        points.append(("On prompts that are new.", _new_prompts(found)))
    if found.off_policy and found.gain and found.halves:
        points.append(("From the logged choices alone.", _against_logged(found.gain, found.off_policy) + "."))
    points.append(("How far to trust what it predicts.", _trust(found)))
    size = f"{count(found.tasks, 'tasks')} × {count(len(found.models), 'models')}"
    return header(f"{title} · {size}", _answer(found), points, synthetic=found.synthetic)


def _answer(found: Evaluation) -> str:
    """One sentence: whether a learned router helps, and by how much."""
    if found.halves:
        lead, fixed = ahead(found.halves), _over_fixed(found.halves)
        text = (
            f"A router learned from this log {verdict(lead)} class means "
            f"(<em>{give_or_take(lead, 100, ' points')}</em> of the gap) "
            f"and {verdict(fixed)} one model for all (<em>{usd_give_or_take(fixed)}</em> per task)"
        )
        if found.apart and verdict(ahead(found.apart)) != verdict(lead):
            text += f"; on prompts unlike any it has seen, it {verdict(ahead(found.apart))} class means"
        return text + "."
    if found.gain and found.off_policy:
        return _against_logged(found.gain, found.off_policy, mark="em") + "."
    return "This log does not say whether a learned router would help."


def _against_logged(gain: Estimate, policy: OffPolicy, mark: str = "span") -> str:
    low, high = gain.interval
    does = (
        "earns more than" if low > 0 else "earns less than" if high < 0 else "is not shown to earn more than"
    )
    return (
        f"A router learned from this log {does} the logged choices: <{mark}>{usd(gain.value)} per task</{mark}> "
        f"({policy.level:.0%} interval <span class='whole'>{interval(gain.interval)}</span>)"
    )


def _over_fixed(halves: Halves) -> Spread:
    """USD per task over the model that did best on the half learned from."""
    return Spread(halves.policy.by_seed - halves.fixed.by_seed)


def _room(halves: Halves) -> str:
    ours, by_class = (give_or_take(halves.closed(p), 100, "%") for p in (halves.policy, halves.category_mean))
    splits = count(halves.policy.by_seed.size, "splits")
    return (
        f"Of the gap between the best fixed model, known only afterwards, and hindsight, the router closes {ours} and class "
        f"means {by_class}. Hindsight includes luck; a low estimate of what is not luck is "
        f"{give_or_take(halves.ceiling, 100, '%')}. After ± stands one standard deviation over {splits}."
    )


def _new_prompts(found: Evaluation) -> str:
    if not found.apart:
        return "No near-duplicate prompts were found in the log."
    lead = ahead(found.apart)
    return (
        f"{percent(found.near_duplicates)} of the requests have a near-duplicate in the log. With those kept in one half, so "
        f"that every held-out prompt is new, the router {verdict(lead)} class means "
        f"({give_or_take(lead, 100, ' points')})."
    )


def _trust(found: Evaluation) -> str:
    bins = found.calibration
    meant = _listed([f"{level:.0%}" for level in bins.coverage])
    held = _listed([f"{share.mean:.1%}" for share in bins.coverage.values()])
    return (
        f"Predicted quality is off by {number(bins.error.mean)} on average over the bins (expected calibration error). "
        f"Intervals meant to hold {meant} of the outcomes hold {held}."
    )


def _listed(texts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


# --- regret, off policy, notes --------------------------------------------------------------------------------------


def regret(found: Evaluation) -> str:
    if not found.regret:
        return "<p>Unknown: only what the chosen model gave is in the log, not what the best would have.</p>"
    return (
        "<p>Against the best use of each held-out request in hindsight, the learned router leaves "
        f"<b>{usd(found.regret.mean)} per task</b> (95% interval {interval(found.regret.ci)}). Every outcome is one draw, "
        "so this includes luck that nobody can have.</p>"
    )


def logged(found: Evaluation, policy: OffPolicy) -> str:
    """The estimates, and how far the log can speak for the router."""
    exact = found.halves.policy if found.halves else None
    gain = f"<p>{_against_logged(found.gain, policy, mark='b')}.</p>" if found.gain else ""
    estimates = off_policy_estimates(policy, exact).html(heading=True)
    return f"{gain}{estimates}<h3>Overlap of the router’s choices with the logged ones</h3>{_overlap(policy)}"


def _overlap(policy: OffPolicy) -> str:
    o = policy.overlap
    doubt = (
        ' <span class="over">not 1: the propensities are wrong, or rare heavy rows were not drawn</span>'
        if abs(o.mean_weight_z) > 3
        else ""
    )
    facts = [
        (
            "effective rows",
            f"{number(o.ess)} of {o.rows:,}",
            "rows of the router’s own that would say as much",
        ),
        (
            "rows that carry the variance",
            number(o.carriers),
            "few of them, and errors are uncertain themselves",
        ),
        ("largest weight", number(o.max_weight), "how many rows one row speaks for"),
        ("mean weight", f"{o.mean_weight:.3f}", f"1 if the propensities are the true ones{doubt}"),
        ("never logged", percent(o.never_logged), "of the router’s choices: the log is silent there"),
        ("hardly logged", percent(o.thin), "of the router’s choices: taken with a propensity below 1%"),
    ]
    if o.expected_ess is not None:
        expected = (
            "the same, expected",
            number(o.expected_ess),
            "over all choices the logged policy could have drawn",
        )
        facts.insert(1, expected)
    return table(("", "", "what it is"), facts, (0, 2))


def notes(found: Evaluation) -> str:
    texts = list(found.notes)
    if found.left_out:
        texts.insert(0, f"{count(found.left_out, 'requests')} left out: not every model’s outcome is known")
    return notes_on_log(texts, synthetic=found.synthetic) + METHOD


METHOD = f"""<h3>Method</h3>
<p>The router learns on one half of the requests what each model gives and takes, and picks on the other half, for each
request, the use with the most V·ΔQ − π_C·ΔC − π_L·ΔL − π_R·ΔR {small("[Z-4]")} at declared prices. Where every model’s outcome
is known, what the picks earn is counted; where only the chosen one’s is, it is estimated from the logged probabilities
{small("[OP-1]")}. Class means do the same with the mean of each model in the request’s class. Intervals of quality are conformal;
that of regret is a bootstrap over requests.</p>"""
