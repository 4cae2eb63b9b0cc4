"""Prices from constraints: multipliers with a certificate. [Z-3] [Z-CS]

`discover` takes tasks, uses and constraints and returns the prices at which every task, choosing for itself by [Z-1],
meets the constraints at the highest total surplus. Discrete uses clear only in the mixture (a few tasks split
between two uses), so the certificate is about the convexified market, and what rounding those few tasks costs is
reported apart [Z-W1].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from walras.equation import DEFER
from walras.errors import InfeasibleError, NotCleared
from walras.market.clearing import Certificate, Clearing, Rounded, Usage, measure_usage
from walras.market.dual import Answer, Goal, Unbounded, Unstable, solve, tables
from walras.market.envelopes import (
    MAX_CUTS,
    at_their_densities,
    broken_envelopes,
    least_envelope,
    same_envelope,
)
from walras.market.family import Terms, discover_family, family_of
from walras.market.memory import Memory
from walras.market.mix import Mix
from walras.market.planes import planes_of
from walras.prices import Constraint, Numeraire, Price, Prices
from walras.quantities import USD, Tasks, Uses
from walras.risk import FloatArray

GAP_TOLERANCE = 1e-6
"""Largest certified gap, relative to |objective| or to 1e-3 of the mean worth at stake, whichever is larger."""
ROUND_OFF = 1e-9
"""Slack below this share of what a row sums up is round-off: the row binds."""


OnPass = Callable[[int, float], None]
"""Called after each pass with its number and the gap so far in USD per task (∞ while there is no bound)."""


def discover(
    tasks: Tasks,
    uses: Uses,
    constraints: Sequence[Constraint] = (),
    *,
    defer: bool = True,
    numeraire: Numeraire = "usd",
    declared: Sequence[tuple[str, float]] = ((USD, 1.0),),
    start: FloatArray | None = None,
    on_pass: OnPass | None = None,
) -> Clearing:
    """Discover the price of every constraint.

    Args:
        tasks, uses: N tasks and their I uses.
        constraints: K rows; their prices come back in the same order.
        defer: whether a task may get no use at all, at surplus 0.
        numeraire: `usd`, or the paper's pure form `compute`.
        declared: USD per unit of each resource.
        start: multipliers of a neighbouring problem, (K,), to start from.

    Raises:
        InfeasibleError: no allocation meets the constraints; names one and the least bound that would do.
        NumeraireError: `numeraire="compute"` and no budget binds.
        NotCleared: the certificate did not reach `GAP_TOLERANCE`; carries the best one.
    """
    family = family_of(constraints)
    if family:
        return discover_family(
            tasks, uses, constraints, family, Terms(tuple(declared), numeraire, defer), start, on_pass
        )
    began = time.perf_counter()
    total = float(tasks.weight.sum())
    report = None if on_pass is None else (lambda number, gap, _mu: on_pass(number, gap / total))
    rows = [c for c in constraints if c.kind != "portfolio_envelope"]
    cuts: list[tuple[int, Constraint]] = []
    """Portfolio envelopes are met by linear pieces: (position in `constraints`, envelope with a density)."""
    passes = 0
    for _ in range(MAX_CUTS):
        pieces = [*rows, *(cut for _, cut in cuts)]
        market = Memory(*planes_of(tasks, uses, pieces, declared, numeraire), defer)
        if start is not None and start.size < len(pieces):
            start = np.append(start, np.zeros(len(pieces) - start.size))
        try:
            answer = solve(market, start=start, on_pass=report)
        except Unbounded:
            raise _why_infeasible(market, tasks, uses, pieces) from None
        except Unstable:
            raise NotCleared("no box of prices was found that holds the answer", certificate=None) from None
        passes, start = passes + answer.passes, answer.multipliers
        broken = _broken(tasks, uses, constraints, market, answer)
        if not broken:
            break
        cuts += broken
    answer = _zero_slack_prices(market, answer)
    if cuts or any(c.kind == "portfolio_envelope" for c in constraints):
        constraints = at_their_densities(tasks, uses, constraints, Mix.of(market, answer))
    prices = Prices(_prices(constraints, rows, cuts, answer.multipliers), tuple(declared), numeraire)
    if numeraire == "compute":
        prices.normalised()  # raises when compute has no price
    usage = _usage(tasks, uses, market, answer, prices, rows)
    certificate = _certificate(market, answer, usage)
    check_certificate(certificate, passes)
    rounded = _round(market, answer)
    return Clearing(
        prices, certificate, rounded, usage, passes, time.perf_counter() - began, market, answer
    )  # fmt: skip


def check_certificate(certificate: Certificate, passes: int) -> None:
    """
    Raises:
        NotCleared: the gap or a violation is above `GAP_TOLERANCE`.
    """
    if certificate.relative_gap > GAP_TOLERANCE or certificate.max_violation > GAP_TOLERANCE:
        raise NotCleared(
            f"prices were not certified: gap {certificate.gap:.2e} USD per task, violation "
            f"{certificate.max_violation:.1e} after {passes} passes",
            certificate=certificate,
        )


def _broken(
    tasks: Tasks, uses: Uses, constraints: Sequence[Constraint], market: Memory, answer: Answer
) -> list[tuple[int, Constraint]]:
    """The linear pieces of portfolio envelopes that an answer does not meet."""
    if all(c.kind != "portfolio_envelope" for c in constraints):
        return []
    return broken_envelopes(tasks, uses, constraints, Mix.of(market, answer))


# --- feasibility ------------------------------------------------------------------------------------------------


def _why_infeasible(
    market: Memory, tasks: Tasks, uses: Uses, constraints: Sequence[Constraint]
) -> InfeasibleError | NotCleared:
    """The first row that cannot be met beside those before it, hard ones first, and the least bound that would do."""
    rows, k = market.rows, len(constraints)
    met: list[int] = []
    for row in sorted(range(k), key=lambda j: not constraints[j].hard):
        of_row, free = np.eye(k)[row], np.zeros(k)
        free[met] = 1.0
        for sign in (1.0, -1.0) if rows.exactly[row] else (1.0,):
            answer = solve(market, goal=Goal(0.0, sign * of_row, free))
            used, weight = float(answer.usage[row]), _scope_weight(market, row)
            room = ROUND_OFF * (abs(used) + abs(rows.limits[row]) + rows.offset[row] * weight)
            if sign * (used - rows.limits[row]) <= room:
                continue
            given = met
            least = used / weight + rows.offset[row]
            if constraints[row].kind == "portfolio_envelope":
                # That was the least of one linear piece; with the bound, all pieces of the envelope would move.
                given = [j for j in met if not same_envelope(constraints[j], constraints[row])]
                least = least_envelope(market, tasks, uses, constraints[row], given, Mix.of(market, answer))
            return _infeasible(constraints[row], [constraints[j] for j in given], least, most=sign < 0)
        met.append(row)
    return NotCleared("prices grow without end, although the constraints can be met", certificate=None)


def _scope_weight(market: Memory, row: int) -> float:
    planes = market.planes
    if not market.rows.scoped[row]:
        return planes.total_weight()
    inside = (planes.member >> np.uint64(row)) & np.uint64(1)
    return float(np.sum(planes.weight * inside)) or 1.0


def _infeasible(
    row: Constraint, met: Sequence[Constraint], bound: float, *, most: bool = False
) -> InfeasibleError:
    given = f" given {' and '.join(dict.fromkeys(c.name for c in met))}" if met else ""
    shown = f"{'most' if most else 'least'} bound that would do is {bound if most else _round_up(bound):.4g}"
    raised = "lower it" if most else "raise it, or let tasks be deferred"
    return InfeasibleError(
        f"infeasible: {row.name} cannot be met{given}; the {shown} "
        f"({'a hard constraint: it is not relaxed' if row.hard else raised})",
        constraint=row.name,
        bound=row.bound,
        least=bound,
    )


def _round_up(bound: float) -> float:
    """To four digits, so that the number people read is one that works."""
    if bound <= 0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(bound)) - 3)
    return float(np.ceil(bound / unit * (1 - 1e-12)) * unit)


def _prices(
    constraints: Sequence[Constraint],
    rows: Sequence[Constraint],
    cuts: Sequence[tuple[int, Constraint]],
    multipliers: FloatArray,
) -> tuple[Price, ...]:
    """One price per constraint; an envelope's pieces add up to one price with their mean density."""
    plain = iter(multipliers[: len(rows)])
    out = []
    for position, constraint in enumerate(constraints):
        if constraint.kind != "portfolio_envelope":
            out.append(Price(constraint, float(next(plain))))
            continue
        mine = [
            (m, cut.density)
            for m, (p, cut) in zip(multipliers[len(rows) :], cuts, strict=True)
            if p == position
        ]
        total = float(sum(m for m, _ in mine))
        if total > 0:
            mean = sum(m * np.asarray(density) for m, density in mine) / total
            constraint = replace(constraint, density=tuple(map(float, mean)))  # noqa: PLW2901
        out.append(Price(constraint, total))
    return tuple(out)


# --- certificate --------------------------------------------------------------------------------------------------


def _zero_slack_prices(market: Memory, answer: Answer) -> Answer:
    """Multipliers of rows with slack set to exactly 0 [Z-CS], and the bound recomputed at what remains."""
    rows, zero = market.rows, np.zeros(len(market.rows))
    slack = (rows.limits - answer.usage > ROUND_OFF * _size(market, answer)) & ~rows.exactly
    # A scope without tasks has no use for a price, such as one it was started from.
    idle = rows.scoped & ~np.array(
        [((market.planes.member >> np.uint64(k)) & np.uint64(1)).any() for k in range(zero.size)],
        dtype=np.bool_,
    )
    mu = np.where(slack | idle, 0.0, answer.multipliers)
    if (mu == answer.multipliers).all():
        return answer
    part = market.sums(mu, 1.0, 0.0, zero)
    dual = part.worth + float(mu @ (rows.limits - part.usage))
    return replace(answer, multipliers=mu, dual=dual)


def _size(market: Memory, answer: Answer) -> FloatArray:
    """(K,) what a row's slack is small or large against: its limit, or what it sums up, an SLA's bound included."""
    size = answer.size + market.rows.offset * market.weight
    return np.maximum(np.abs(market.rows.limits), size) + 1e-300


def _usage(
    tasks: Tasks, uses: Uses, market: Memory, answer: Answer, prices: Prices, rows: Sequence[Constraint]
) -> tuple[Usage, ...]:
    """What is used of each constraint; of the plain rows it is known, envelopes are measured."""
    plain, out = iter(range(len(rows))), []
    for price in prices.discovered:
        constraint = price.constraint
        if constraint.kind == "portfolio_envelope":
            mix = Mix.of(market, answer)
            out.append(measure_usage(tasks, uses, constraint, mix, price.multiplier))
            continue
        k = next(plain)
        weight, served = _scope_weight(market, k), float(answer.served[k])
        if constraint.layer == "latency":
            # Charged against its bound and per served task; the bound is added back for people.
            used = answer.usage[k] / served + constraint.bound if served else math.nan
        else:
            used = answer.usage[k] / weight
        out.append(Usage(constraint, float(used), price.multiplier, served / weight))
    return tuple(out)


def _certificate(market: Memory, answer: Answer, usage: Sequence[Usage]) -> Certificate:
    total, mu = market.weight, answer.multipliers
    slack = market.rows.limits - answer.usage
    # dual = Σ w·best + μ·limit and objective = Σ w·got + μ·usage: what is left of the gap besides the slack.
    residual = answer.dual - answer.objective - float(mu @ slack)
    return Certificate(
        objective=answer.objective / total,
        dual=answer.dual / total,
        gap=abs(answer.dual - answer.objective) / total,
        max_violation=max((u.excess for u in usage), default=0.0),
        residual=abs(residual) / total,
        slackness=float(np.max(np.abs(mu * slack), initial=0.0)) / total,
        scale=market.stake() / total,
    )


GREEDY = 2_000
"""Split tasks rounded one by one, each with an eye on the rows; the others are dealt out evenly first."""


def _round(market: Memory, answer: Answer) -> Rounded:
    """Give every split task to one of its uses: the best that still fits, else the one that overshoots least."""
    split = _split_tasks(market, answer)
    tasks = np.unique(split.task)
    worth, charges, _ = tables(market.planes.take(tasks), market.rows)
    weight = np.broadcast_to(market.planes.weight, len(market))[tasks]
    row = np.searchsorted(tasks, split.task)
    mass = weight[row] * split.share
    on = split.use != DEFER
    limits = market.rows.limits
    used = answer.usage - charges[:, row[on], split.use[on]] @ mass[on]
    objective = answer.objective - float(worth[row[on], split.use[on]] @ mass[on])
    room = _size(market, answer)
    starts = np.concatenate((np.flatnonzero(np.diff(row, prepend=-1)), [row.size]))
    given = np.full(tasks.size, DEFER, dtype=np.int64)
    for at in range(tasks.size):
        own = slice(starts[at], starts[at + 1])
        options = split.use[own]
        served = options != DEFER
        charge = weight[at] * np.where(served, charges[:, at, options], 0.0)
        value = weight[at] * np.where(served, worth[at, options], 0.0)
        if at < tasks.size - GREEDY:
            # The golden ratio deals shares out evenly, whatever the order of the tasks.
            best = int(np.searchsorted(np.cumsum(split.share[own]), (at * 0.6180339887498949) % 1.0))
            best = min(best, options.size - 1)
        else:
            excess = (np.maximum(used[:, None] + charge - limits[:, None], 0.0) / room[:, None]).sum(axis=0)
            best = int(np.lexsort((-value, excess))[0])
        given[at] = options[best]
        used += charge[:, best]
        objective += float(value[best])
    total = market.weight
    over = np.where(market.rows.exactly, np.abs(used - limits), used - limits) / room
    violation = float(np.max(over, initial=0.0))
    return Rounded(
        objective / total, abs(answer.dual - objective) / total, violation, tasks.size, tasks, given
    )  # fmt: skip


def _split_tasks(market: Memory, answer: Answer) -> Mix:
    """The triples of the tasks that have more than one use."""
    if len(answer.at) > 1:
        mix = Mix.of(market, answer)
    else:
        among = answer.split.among
        deferred = 1.0 - np.bincount(
            np.searchsorted(among, answer.split.task), weights=answer.split.share, minlength=among.size
        )
        mix = Mix.merged(
            np.concatenate((answer.split.task, among)),
            np.concatenate((answer.split.use, np.full(among.size, DEFER))),
            np.concatenate((answer.split.share, deferred)),
        )
    many = np.unique(mix.task, return_counts=True)
    keep = np.isin(mix.task, many[0][many[1] > 1])
    return Mix(mix.task[keep], mix.use[keep], mix.share[keep])
