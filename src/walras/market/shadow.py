"""Prices from constraints: multipliers with a certificate. [Z-3] [Z-CS]

`discover` takes tasks, uses and constraints and returns the prices at which every task, choosing for itself by [Z-1],
meets the constraints at the highest total surplus. Discrete uses clear only in the mixture (a few tasks split
between two uses), so the certificate is about the convexified market, and what rounding those few tasks costs is
reported apart [Z-W1].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from walras.errors import InfeasibleError, NotCleared, QuantityError
from walras.market.clearing import (
    Certificate,
    Clearing,
    certificate_of,
    measure_usage,
    round_off,
    size_of,
    usage_of,
)
from walras.market.dual import Answer, Goal, Market, Progress, Unbounded, Unstable, solve
from walras.market.envelopes import (
    MAX_CUTS,
    at_their_densities,
    broken_envelopes,
    least_envelope,
    same_envelope,
)
from walras.market.family import Terms, discover_family, family_of
from walras.market.gpu import Device
from walras.market.memory import Memory
from walras.market.mix import Mix
from walras.market.planes import Rows, planes_of
from walras.prices import Constraint, Numeraire, Price, Prices
from walras.quantities import USD, Tasks, Uses
from walras.risk import FloatArray

GAP_TOLERANCE = 1e-6
"""Largest certified gap, relative to |objective| or to 1e-3 of the mean worth at stake, whichever is larger."""
ROUND_OFF = 1e-9
"""Slack below this share of what a row sums up is round-off: the row binds."""


OnPass = Callable[[int, float, FloatArray], None]
"""Called after each pass with its number, the gap so far in USD per task (∞ while there is no bound) and the prices."""


def discover(  # noqa: PLR0913 - what is given, then how to look
    tasks: Tasks,
    uses: Uses,
    constraints: Sequence[Constraint] = (),
    *,
    defer: bool = True,
    numeraire: Numeraire = "usd",
    declared: Sequence[tuple[str, float]] = ((USD, 1.0),),
    start: FloatArray | None = None,
    on_pass: OnPass | None = None,
    xp: Any = None,
) -> Clearing:
    """Discover the price of every constraint.

    Args:
        tasks, uses: N tasks and their I uses.
        constraints: K rows; their prices come back in the same order.
        defer: whether a task may get no use at all, at surplus 0.
        numeraire: `usd`, or the paper's pure form `compute`.
        declared: USD per unit of each resource.
        start: multipliers of a neighbouring problem, (K,), to start from.
        xp: cupy, to pass over the data on a device (`gpu.cuda`).

    Raises:
        QuantityError: there are no tasks.
        InfeasibleError: no allocation meets the constraints; names one and the least bound that would do.
        NumeraireError: `numeraire="compute"` and no budget binds.
        NotCleared: the certificate did not reach `GAP_TOLERANCE`; carries the best one.
    """
    if not len(tasks):
        raise QuantityError("there are no tasks, so there is nothing to price")
    family = family_of(constraints)
    if family:
        return discover_family(
            tasks, uses, constraints, family, Terms(tuple(declared), numeraire, defer), start, on_pass
        )
    began = time.perf_counter()
    total = float(tasks.weight.sum())
    report = None if on_pass is None else (lambda number, gap, mu: on_pass(number, gap / total, mu))
    rows = [c for c in constraints if c.kind != "portfolio_envelope"]
    cuts: list[tuple[int, Constraint]] = []
    """Portfolio envelopes are met by linear pieces: (position in `constraints`, envelope with a density)."""
    passes = 0
    for _ in range(MAX_CUTS):
        pieces = [*rows, *(cut for _, cut in cuts)]
        market = Memory(*planes_of(tasks, uses, pieces, declared, numeraire), defer)
        if xp is not None:
            market = Device(market.planes, market.rows, defer, xp=xp)
        if start is not None and start.size < len(pieces):
            start = np.append(start, np.zeros(len(pieces) - start.size))
        try:
            answer = solve(market, start=start, on_pass=report)
        except (Unbounded, Unstable):
            unmet = _why_infeasible(market, tasks, uses, pieces)
            if unmet is not None:
                raise unmet from None
            # Bounds that are just met, to the last digit, are missed by round-off.
            market = replace(market, rows=_with_round_off(market.rows, market.weight))
            answer = _solve_again(market, report)
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
    plain = usage_of(rows, answer, _scope_weights(market))
    usage = tuple(
        measure_usage(tasks, uses, p.constraint, Mix.of(market, answer), p.multiplier)
        if p.constraint.kind == "portfolio_envelope"
        else next(plain)
        for p in prices.discovered
    )
    certificate = certificate_of(market.rows, market.weight, answer, usage)
    check_certificate(certificate, passes)
    rounded = round_off(market.rows, market.weight, answer, market)
    assert rounded is not None  # the market is at hand
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


@dataclass(frozen=True, slots=True)
class Unmet:
    """A row that cannot be met beside those in `met`, and the allocation that comes nearest."""

    row: int
    met: list[int]
    bound: float
    """The least bound that would do; the most, if `most`."""
    most: bool
    answer: Answer


def first_unmet(market: Market, constraints: Sequence[Constraint], weight: FloatArray) -> Unmet | None:
    """The first row that cannot be met beside those before it, hard ones first; `weight` (K,) is that of each scope."""
    rows, k = market.rows, len(constraints)
    met: list[int] = []
    for row in sorted(range(k), key=lambda j: not constraints[j].hard):
        of_row, free = np.eye(k)[row], np.zeros(k)
        free[met] = 1.0
        for sign in (1.0, -1.0) if rows.exactly[row] else (1.0,):
            try:
                answer = solve(market, goal=Goal(0.0, sign * of_row, free))
            except (Unbounded, Unstable):
                return None
            used = float(answer.usage[row])
            room = ROUND_OFF * (abs(used) + abs(rows.limits[row]) + rows.offset[row] * weight[row])
            if sign * (used - rows.limits[row]) > room:
                return Unmet(row, met, used / weight[row] + rows.offset[row], sign < 0, answer)
        met.append(row)
    return None


def why_infeasible(
    market: Market, constraints: Sequence[Constraint], weight: FloatArray
) -> InfeasibleError | NotCleared:
    """What to tell people when prices grow without end."""
    unmet = first_unmet(market, constraints, weight)
    return NOT_SO if unmet is None else _infeasible(constraints, unmet)


NOT_SO = NotCleared("no prices were found, and no constraint that cannot be met", certificate=None)


def _with_round_off(rows: Rows, weight: float) -> Rows:
    return replace(rows, limits=rows.limits + ROUND_OFF * (np.abs(rows.limits) + rows.offset * weight))


def _solve_again(market: Memory, report: Progress | None) -> Answer:
    try:
        return solve(market, on_pass=report)
    except (Unbounded, Unstable):
        raise NOT_SO from None


def _why_infeasible(
    market: Memory, tasks: Tasks, uses: Uses, constraints: Sequence[Constraint]
) -> InfeasibleError | None:
    """What is to be told; None where every row can be met."""
    unmet = first_unmet(market, constraints, _scope_weights(market))
    if unmet is None:
        return None
    envelope = constraints[unmet.row]
    if envelope.kind == "portfolio_envelope":
        # That was the least of one linear piece; with the bound, all pieces of the envelope would move.
        met = [j for j in unmet.met if not same_envelope(constraints[j], envelope)]
        mix = Mix.of(market, unmet.answer)
        least = least_envelope(market, tasks, uses, envelope, met, mix)
        unmet = replace(unmet, met=met, bound=least)
    return _infeasible(constraints, unmet)


def _scope_weights(market: Memory) -> FloatArray:
    return np.array([_scope_weight(market, k) for k in range(len(market.rows))])


def _scope_weight(market: Memory, row: int) -> float:
    planes = market.planes
    if not market.rows.scoped[row]:
        return planes.total_weight()
    inside = (planes.member >> np.uint64(row)) & np.uint64(1)
    return float(np.sum(planes.weight * inside)) or 1.0


def _infeasible(constraints: Sequence[Constraint], unmet: Unmet) -> InfeasibleError:
    row, bound = constraints[unmet.row], unmet.bound
    names = dict.fromkeys(constraints[j].name for j in unmet.met)
    given = f" given {' and '.join(names)}" if names else ""
    which, shown = ("most", bound) if unmet.most else ("least", _round_up(bound))
    what_to_do = "lower it" if unmet.most else "raise it, or let tasks be deferred"
    return InfeasibleError(
        f"infeasible: {row.name} cannot be met{given}; the {which} bound that would do is {shown:.4g} "
        f"({'a hard constraint: it is not relaxed' if row.hard else what_to_do})",
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
    slack = (rows.limits - answer.usage > ROUND_OFF * size_of(rows, market.weight, answer)) & ~rows.exactly
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
