"""Prices as the minimum of the dual: a few sweeps over the data, each worth more than the last. [Z-3] [Z-CS]

    D(μ) = Σ_x w_x max_i (worth_xi − Σ_k μ_k·charge_kxi) + Σ_k μ_k·limit_k

is convex in a handful of prices and bounds the programme from above. `solve` goes down in three moves:

1. *Aim.* On a sample, safeguarded Newton steps; the curvature is how densely tasks are about to change their use. How far
   the sample's prices may be off follows from its own noise.
2. *Screen.* One pass over everything sorts out the tasks that choose alike at every price in that box, rigorously. In the
   box their part of D is a plane, so from here on only the few others are looked at: aim and screen again among
   them, until a few hundred are left.
3. *Settle.* Those are a small linear programme with the rest as constants. Its prices lie in the box, so they are the
   prices of the whole, its shares are an allocation within all rows, and the gap between the two is the certificate.
   Where masses of tasks tie exactly no box leaves few of them; then best responses at several prices of the box are
   mixed instead (Dantzig and Wolfe 1960).

A box that turns out too small is only a wasted pass: the minimum on its border says so, and a larger one is screened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, hstack, vstack

from walras.market.alike import ROUND_OFF, Alike, Split
from walras.market.memory import Memory, Sums
from walras.market.planes import Rows, tables
from walras.risk import FloatArray

SAMPLE = 32.0
"""The sample that aims the first screen has this many times √N tasks: what it costs and what it saves then balance."""
FEW = 64
FEW_A_ROW = 16
"""Tasks left at which the small programme is written down: so many, and so many more for each row."""
CONFIDENCE = 3.0
"""Standard errors of the sample's prices that the first box reaches."""
TRUST = 0.01
"""Relative size of the first box around prices that were given, unless said otherwise."""
TIED = 1e-9
"""Relative size of a box in which whatever is left undecided ties."""
ALIKE = 300_000
"""Tied tasks that are compared with one another."""
KINDS = 20_000
"""Tasks that are not alike, at most, in the small programme."""
SOME = 1_000
"""Tasks looked at for a row that nobody uses at declared prices."""
WIDE = 1e-4
"""Relative size of the first box in which best responses are mixed: wide enough to hold them, small enough for the gap."""
MAX_STEPS = 60
MAX_BOXES = 60
WHOLE = 200_000
"""Uses up to which the whole programme is written down when boxes have failed."""
FURTHEST = 1e13
"""Prices this many times what could matter mean that a row cannot be met."""


class Market(Protocol):
    """Tasks to be asked for their best responses, wherever they are."""

    @property
    def rows(self) -> Rows: ...
    @property
    def defer(self) -> bool: ...
    @property
    def width(self) -> int: ...
    @property
    def screens(self) -> bool:
        """Whether tasks can be told apart one by one; not where groups of them clear inside a pass."""
        ...

    @property
    def weight(self) -> float: ...
    def __len__(self) -> int: ...
    def sums(
        self,
        price: FloatArray,
        scale: float,
        bandwidth: float,
        yardstick: FloatArray,
        *,
        moments: bool = False,
    ) -> Sums: ...
    def screen(self, price: FloatArray, radius: FloatArray, scale: float) -> tuple[Sums, Market]: ...
    def sample(self, n: int) -> Market: ...
    def gather(self) -> Memory: ...


@dataclass(frozen=True, slots=True)
class Goal:
    """What is maximised: worth, or (worth 0, fixed e_k) the least use of row k."""

    worth: float
    fixed: FloatArray
    """(K,) multipliers that every use pays besides the prices looked for."""
    free: FloatArray
    """(K,) 1 where a price is looked for, 0 where the row is not asked to hold."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Multipliers and the allocation that proves them; totals."""

    multipliers: FloatArray
    dual: float
    objective: float
    usage: FloatArray
    served: FloatArray
    """(K,) weight of the tasks in each row's scope that get a use."""
    size: FloatArray
    """(K,) about Σ weight·|charge|: what a row's slack is small or large against."""
    at: tuple[tuple[float, FloatArray | None], ...]
    """The allocation: this share of best responses at these prices (None: nobody served), apart from the tasks in
    `split`."""
    split: Split
    passes: int
    """Passes over all of the data."""
    steps: int
    """Passes over parts of it, too."""
    scale: float
    """USD that best responses are worth at declared prices (by a sample, where there was one)."""
    near: Memory | None = field(default=None, repr=False)
    """The tasks of `split.among`, in that order."""


class Unbounded(Exception):
    """Prices grow without end: the rows cannot be met together."""


class Unstable(Exception):
    """No box was found that holds the prices."""


Progress = Callable[[int, float, FloatArray], None]
"""Called with the number of the pass, the gap so far (∞ while unknown) and the prices."""


@dataclass(slots=True)
class _Point:
    """D, its slope and curvature at some prices, all tasks counted."""

    mu: FloatArray
    dual: float
    slope: FloatArray
    curvature: FloatArray
    objective: float
    usage: FloatArray
    served: FloatArray
    moments: FloatArray


@dataclass(slots=True)
class _Search:
    """What the moves share: the goal, the yardstick of prices, and the allocations seen so far."""

    rows: Rows
    goal: Goal
    yardstick: FloatArray = field(default_factory=lambda: np.zeros(0))
    """(K,) prices that would matter: a hundredth of them is a small price."""
    steps: int = 0
    passes: int = 0
    columns: list[_Point] = field(default_factory=list)
    """Best responses of everybody at some prices: allocations that can be mixed."""

    size: FloatArray = field(default_factory=lambda: np.zeros(0))
    """(K,) about what a row sums up, signs left aside."""
    scale: float = 0.0
    """USD at stake in all, against which a gap is small."""

    def close(self, dual: float, objective: float, tolerance: float) -> bool:
        return dual - objective <= tolerance * max(abs(objective), 1e-3 * self.scale, 1e-300)

    def gap_so_far(self, defer: bool) -> float:
        """Of the best prices seen, certified by serving a part of everybody; ∞ where nobody may be deferred."""
        if not self.columns or not defer or (self.rows.limits < 0).any():
            return np.inf
        used = np.maximum(self.columns[-1].usage, 1e-300)
        part = min(1.0, float((self.rows.limits / used).min()))
        return min(c.dual for c in self.columns) - part * self.columns[-1].objective

    def at(
        self, market: Market, fixed: Sums, mu: FloatArray, bandwidth: float, *, moments: bool = False
    ) -> _Point:
        goal, limits = self.goal, self.rows.limits
        scale = np.maximum(np.abs(mu), 0.01 * self.yardstick) if self.yardstick.size else np.ones(mu.size)
        part = market.sums(mu + goal.fixed, goal.worth, bandwidth, scale * goal.free, moments=moments)
        self.steps += 1
        usage = part.usage + fixed.usage
        objective = goal.worth * (part.worth + fixed.worth) - float(goal.fixed @ usage)
        slope = (limits - usage) * goal.free
        dual = objective + float(mu @ slope)
        if self.size.size:
            # A row that is met to the last digit has no slope, or round-off would drive its price away.
            slope = np.where(np.abs(slope) <= ROUND_OFF * self.size, 0.0, slope)
        return _Point(
            mu, dual, slope, part.curvature, objective, usage, part.served + fixed.served, part.moments
        )  # fmt: skip


def solve(
    market: Market,
    *,
    goal: Goal | None = None,
    start: FloatArray | None = None,
    trust: float = TRUST,
    tolerance: float = 1e-9,
    on_pass: Progress | None = None,
) -> Answer:
    """Prices of all rows, with an allocation and a bound.

    Args:
        goal: surplus by default.
        start: prices of a neighbouring problem, (K,).
        trust: how far they may be off, relative to themselves. A pass is lost if they are further off.
        tolerance: largest gap relative to |objective|; usually it comes out many digits smaller.

    Raises:
        Unbounded: the rows cannot be met together.
    """
    k = len(market.rows)
    goal = goal or Goal(1.0, np.zeros(k), np.ones(k))
    search = _Search(market.rows, goal)
    if k == 0:
        here = search.at(market, Sums.zero(0), np.zeros(0), 0.0)
        answer = Answer(
            here.mu, here.dual, here.dual, here.usage, here.served, here.usage, ((1.0, here.mu),), Split.none(), 1, 1, abs(here.dual)
        )  # fmt: skip
    elif not market.screens:
        answer = _descend(search, market, start, tolerance)
    elif len(market) <= FEW + FEW_A_ROW * k:
        answer = _all_at_once(search, market.gather())
    else:
        mu, radius = _aim(search, market, start, trust)
        answer = _narrow(search, market, mu, radius, tolerance, on_pass)
    if on_pass:
        on_pass(answer.steps, answer.dual - answer.objective, answer.multipliers)
    return answer


def _all_at_once(search: _Search, market: Memory) -> Answer:
    low, high = _natural(search)
    search.scale = abs(search.at(market, Sums.zero(low.size), np.zeros(low.size), 0.0).objective)
    answer, _ = _settle(search, market, _Box(low, high, market, Sums.zero(low.size)), np.inf)
    if answer is None:
        raise Unstable
    return answer


def _natural(search: _Search) -> tuple[FloatArray, FloatArray]:
    """Where prices end by themselves: at 0 for "at most", nowhere for "exactly"; rows not asked for have price 0."""
    free = search.goal.free > 0
    return np.where(search.rows.exactly & free, -np.inf, 0.0), np.where(free, np.inf, 0.0)


# --- aim --------------------------------------------------------------------------------------------------------


def _aim(
    search: _Search, market: Market, start: FloatArray | None, trust: float = TRUST
) -> tuple[FloatArray, FloatArray]:
    """Prices near the optimum and how far they may be off, from a sample (or a given start)."""
    n = int(SAMPLE * np.sqrt(len(market))) if start is None else SOME
    sample = market.sample(n) if len(market) > 4 * n else market
    none = Sums.zero(len(search.rows))
    zero = np.zeros(len(search.rows))
    # What a row charges, typically, against what is at stake: the price at which it would matter.
    free = search.at(sample, none, zero, 0.0, moments=True)
    weight = market.weight
    typical = np.sqrt(np.maximum(np.diag(free.moments), 0.0) * len(sample)) / weight
    if (typical == 0).any():
        # Nobody takes any of it as long as nothing has a price; but somebody could.
        some = sample.sample(min(len(sample), SOME)).gather().planes
        _, charges, _ = tables(some.part(0, min(len(some), SOME)), search.rows)
        typical = np.where(typical > 0, typical, np.abs(charges).max(axis=2).mean(axis=1))
    search.scale = abs(free.objective)
    search.size = typical * weight
    worth = max(search.scale / weight, float(np.abs(search.goal.fixed) @ typical)) or 1.0
    search.yardstick = np.where(typical > 0, worth / np.maximum(typical, 1e-300), 0.0)
    if start is not None:
        mu = np.where(search.goal.free > 0, start, 0.0)
        return mu, trust * np.maximum(np.abs(mu), 0.1 * search.yardstick)
    low, high = _natural(search)
    try:
        mu = zero
        if len(sample) > 16 * FEW:
            first = sample.sample(len(sample) // 8)  # most of the way, at an eighth of the price
            mu = _newton(search, first, none, mu, low, high, 0.3 / np.sqrt(len(first)))[0].mu
        best, step = _newton(search, sample, none, mu, low, high, 0.3 / np.sqrt(len(sample)))
    except Unbounded:
        # A sample may be unable to meet what everybody can just meet: ask everybody.
        sample = market
        best, step = _newton(search, market, none, zero, low, high, 0.3 / np.sqrt(len(market)))
    if sample is market:
        return best.mu, 4.0 * step
    noisy = search.at(sample, none, best.mu, 0.05, moments=True)
    inverse = np.linalg.pinv(noisy.curvature, rcond=1e-8, hermitian=True)
    noise = noisy.moments - np.outer(noisy.usage, noisy.usage) / len(sample)
    error = np.sqrt(np.maximum(np.diag(inverse @ noise @ inverse), 0.0))
    blind = np.diag(noisy.curvature) <= 0
    error = np.where(blind, 0.02 * search.yardstick, error)
    return best.mu, CONFIDENCE * error + 4.0 * step


def _newton(
    search: _Search,
    market: Market,
    fixed: Sums,
    mu: FloatArray,
    low: FloatArray,
    high: FloatArray,
    enough: FloatArray | float,
    reach: float = 1.0,
) -> tuple[_Point, FloatArray]:
    """Go down from `mu` within [low, high] until a step is `enough`, relative to prices; the best point and that step.

    Newton's step in a trust region. A step that fails shrinks the region, and so does the bandwidth of the
    curvature follow the steps, down to where single tasks show.
    """
    free = search.goal.free > 0
    bandwidth = min(reach, 0.2)
    finest = 4.0 * reach / max(len(market), 1)  # one task more or less
    best = search.at(market, fixed, mu, bandwidth)
    trust, step, overshot = 1.0, np.zeros(mu.size), 0.0
    for _ in range(MAX_STEPS):
        scale = np.maximum(np.maximum(np.abs(best.mu), 0.1 * search.yardstick), 1e-300)
        if overshot:
            step = step * overshot
        else:
            room = trust * scale * free
            step = _newton_step(
                best, np.maximum(low - best.mu, -room), np.minimum(high - best.mu, room), scale
            )
        promised = -(best.slope @ step + 0.5 * step @ best.curvature @ step)
        size = float(np.max(np.abs(step) / scale))
        if size <= finest or promised <= 1e-13 * abs(best.dual) or (np.abs(step) <= enough * scale).all():
            break
        bandwidth = min(max(2.0 * size, 2 * finest), bandwidth if overshot else 0.5)
        here = search.at(market, fixed, best.mu + step, bandwidth)
        if search.passes:  # everybody is counted: an allocation that can be mixed
            search.columns.append(here)
        known = free & (search.yardstick > 0)
        if (np.abs(here.mu) > FURTHEST * search.yardstick)[known].any():
            raise Unbounded
        if here.dual < best.dual:
            gained, best, overshot = best.dual - here.dual, here, 0.0
            trust = min(max(trust, 2.0 * size if gained > 0.5 * promised else size), 8.0)
        else:
            # D rises at the far end: where along the step a line through both slopes meets 0.
            fall, rise = float(best.slope @ step), float(here.slope @ step)
            overshot = min(max(fall / min(fall - rise, -1e-300), 0.05), 0.75) if rise > 0 else 0.25
            trust = size
    return best, np.abs(step)


def _newton_step(point: _Point, low: FloatArray, high: FloatArray, scale: FloatArray) -> FloatArray:
    """argmin of slope·d + ½·d·curvature·d over low ≤ d ≤ high, (K,)."""
    held = (low >= high) | (scale <= 0)
    held |= ((low >= 0) & (point.slope >= 0)) | ((high <= 0) & (point.slope <= 0))
    d = np.zeros(low.size)
    for _ in range(2 * low.size + 1):
        on = np.flatnonzero(~held)
        if not on.size:
            break
        # In units of the scale, so that a little ridge means the same for every row.
        unit = scale[on]
        hessian = point.curvature[np.ix_(on, on)] * np.outer(unit, unit)
        slope = (point.slope + point.curvature @ np.where(held, d, 0.0))[on] * unit
        ridge = 1e-9 * np.trace(hessian) + 1e-14 * np.abs(slope).max() + 1e-300
        full = np.linalg.solve(hessian + ridge * np.eye(on.size), -slope) * unit
        clipped = np.clip(full, low[on], high[on])
        out = clipped != full
        d[on] = clipped
        if not out.any():
            break
        # Hold the one that is furthest out, relative to its room, and solve for the others again.
        worst = np.argmax(np.abs(full - clipped) / np.maximum(unit, 1e-300))
        held[on[worst]] = True
    return d


def _descend(search: _Search, market: Market, start: FloatArray | None, tolerance: float) -> Answer:
    """Without screening: down to the minimum, and best responses around it mixed, in boxes that grow until it fits."""
    mu, _ = _aim(search, market, start)
    search.passes = 1
    natural, ceiling = _natural(search)
    none = Sums.zero(mu.size)
    best, step = _newton(search, market, none, mu, natural, ceiling, 1e-5)
    mu, radius = best.mu, np.maximum(64.0 * step, WIDE * np.maximum(np.abs(best.mu), search.yardstick))
    for _ in range(20):
        box = _Box(np.maximum(mu - radius, natural), np.minimum(mu + radius, ceiling), market, none)
        answer, mu = _mix(search, box, mu, tolerance)
        if answer is not None:
            return answer
        radius = 8.0 * radius
    raise Unstable


# --- screen -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Box:
    """Prices between `low` and `high`; the tasks that choose alike in all of it are in `fixed`, the others in `near`."""

    low: FloatArray
    high: FloatArray
    near: Market
    fixed: Sums

    def border(self, mu: FloatArray, slope: FloatArray, natural: FloatArray) -> bool:
        """Whether D would go on falling outside the box; `natural` (K,) is where prices end by themselves."""
        reach = 1e-9 * (self.high - self.low)
        up = (mu >= self.high - reach) & (slope < 0)
        down = (mu <= self.low + reach) & (slope > 0) & (self.low > natural)
        return bool((up | down).any())


def _narrow(
    search: _Search,
    market: Market,
    mu: FloatArray,
    radius: FloatArray,
    tolerance: float,
    on_pass: Progress | None,
) -> Answer:
    k = mu.size
    few = FEW + FEW_A_ROW * k
    natural, ceiling = _natural(search)
    boxes = [_Box(natural, ceiling, market, Sums.zero(k))]
    grow, tied = 1.0, False
    smallest = 1e-12 * np.maximum(np.abs(mu), search.yardstick) * search.goal.free
    for _ in range(MAX_BOXES):
        around = boxes[-1]
        radius = np.maximum(radius, smallest)
        low, high = np.maximum(mu - radius, around.low), np.minimum(mu + radius, around.high)
        middle, half = (low + high) / 2, (high - low) / 2
        part, near = around.near.screen(middle + search.goal.fixed, half, search.goal.worth)
        search.steps += 1
        search.passes += around.near is market
        box = _Box(low, high, near, around.fixed + part)
        if on_pass:
            on_pass(search.steps, search.gap_so_far(market.defer), mu)
        scale = np.maximum(np.maximum(np.abs(mu), 0.1 * search.yardstick), 1e-300)
        reach = float(np.max(half / scale))
        if len(near) <= few:
            answer, mu = _settle(search, near.gather(), box, tolerance)
        elif reach <= TIED or tied:
            tied = True
            # Masses of tasks tie: taken together where they are the same, else mixed.
            answer = None
            if len(near) <= ALIKE:
                answer, mu = _settle(search, near.gather(), box, tolerance)
            if answer is None:
                answer, mu = _mix(search, box, mu, tolerance)
        else:
            # A box a sixteenth as wide leaves a sixteenth of the tasks; the last one, about as many as are wanted.
            next_box = half * max(0.5 * few / len(near), 1 / 16)
            best, step = _newton(
                search, near, box.fixed, np.clip(mu, low, high), low, high, 0.2 * next_box / scale, reach
            )
            if box.border(best.mu, best.slope, natural):
                answer, mu = None, best.mu
            else:
                boxes.append(box)
                mu, radius = best.mu, np.minimum(np.maximum(4.0 * step, next_box), half / 4)
                continue
        if answer is not None:
            return answer
        # The minimum lies outside: a larger box around where it was last seen, and larger still every time.
        if (np.abs(mu) > FURTHEST * search.yardstick)[search.yardstick > 0].any():
            raise Unbounded
        grow *= 8.0
        radius = grow * np.maximum(
            half, 1e-6 * np.maximum(np.abs(mu), 0.1 * search.yardstick) * search.goal.free
        )
        while len(boxes) > 1 and ((mu - half < boxes[-1].low) | (mu + half > boxes[-1].high)).any():
            boxes.pop()
    if len(market) * market.width <= WHOLE:
        return _all_at_once(search, market.gather())
    raise Unstable


# --- settle -----------------------------------------------------------------------------------------------------


def _settle(search: _Search, near: Memory, box: _Box, tolerance: float) -> tuple[Answer | None, FloatArray]:
    """The programme on the tasks of the box, the others being constants: exact, when its prices lie inside."""
    goal, fixed = search.goal, box.fixed
    alike = Alike.of(near)
    if alike.first.size > KINDS and np.isfinite(box.high).all():
        return None, (box.low + box.high) / 2
    worth, charges, inside = tables(near.planes.take(alike.first), near.rows)
    weight = alike.weight
    allowed = np.isfinite(worth)
    net = np.where(allowed, goal.worth * np.where(allowed, worth, 0.0), -np.inf)
    net -= np.tensordot(goal.fixed, charges, 1)
    task, use = np.nonzero(_in_reach(box, net, charges))
    gain, used = net[task, use] * weight[task], charges[:, task, use] * weight[task]
    pairs = (np.ones(task.size), (task, np.arange(task.size)))
    one_each: Any = csr_matrix(pairs, shape=(weight.size, task.size))
    room = search.rows.limits - fixed.usage
    # What is left of an SLA's charge when seconds equal the bound is round-off, not something to be scaled up.
    least = search.rows.offset * float(weight.max(initial=0.0))
    shares, mu = _master(search, box, room, gain, used, one_each, whole=not near.defer, least=least)
    if shares is None:
        return None, mu
    here = search.at(near, fixed, mu, 0.0)
    answer = Answer(
        multipliers=mu,
        dual=here.dual,
        objective=float(gain @ shares) + goal.worth * fixed.worth - float(goal.fixed @ fixed.usage),
        usage=fixed.usage + used @ shares,
        served=fixed.served + inside[:, task] @ (weight[task] * shares),
        size=search.size if search.size.size else np.abs(used) @ shares,
        at=((1.0, mu),),
        split=alike.split(near.ids, task, use, shares, near.defer),
        passes=search.passes,
        steps=search.steps,
        scale=search.scale,
        near=near,
    )
    return (answer if search.close(answer.dual, answer.objective, tolerance) else None), mu


def _in_reach(box: _Box, net: FloatArray, charges: FloatArray) -> NDArray[np.bool_]:
    """Which uses could be best somewhere in the box, (N, I): the others need no column."""
    allowed = np.isfinite(net)
    if box.near.defer:
        # What earns nothing and frees nothing is never used; and one absurd amount would spoil the programme's scale.
        exactly = box.near.rows.exactly
        allowed &= (net > 0) | (charges < 0).any(axis=0) | (charges[exactly] != 0).any(axis=0)
    if not np.isfinite(box.high).all():
        return allowed
    middle, half = (box.low + box.high) / 2, (box.high - box.low) / 2
    value = np.where(allowed, net - np.tensordot(middle, charges, 1), -np.inf)
    first = value.argmax(axis=1)[:, None]
    best = np.take_along_axis(value, first, axis=1)
    of_best = np.take_along_axis(charges, first[None], axis=2)
    if box.near.defer:
        of_best = np.where(best >= 0, of_best, 0.0)
        best = np.maximum(best, 0.0)
    reach = np.tensordot(half, np.abs(charges - of_best), 1)
    reached: NDArray[np.bool_] = allowed & (value >= best - reach - 1e-12 * np.abs(best))
    return reached


def _mix(search: _Search, box: _Box, mu: FloatArray, tolerance: float) -> tuple[Answer | None, FloatArray]:
    """Shares of best responses at several prices of the box, more of them until bound and allocation meet."""
    k = mu.size
    best = search.at(box.near, box.fixed, np.clip(mu, box.low, box.high), 0.0)
    points = [*search.columns[-4 * k - 16 :], best]
    offers: list[tuple[float, FloatArray, FloatArray, FloatArray | None]]
    offers = [(c.objective, c.usage, c.served, c.mu) for c in points]
    if box.near.defer and (search.rows.limits >= 0).all():
        offers.append((0.0, np.zeros(k), np.zeros(k), None))
    while len(offers) < 40 * (k + 4):
        gain, used = np.array([o[0] for o in offers]), np.array([o[1] for o in offers]).T
        all_of_one: Any = csr_matrix(np.ones((1, gain.size)))
        shares, mu = _master(search, box, search.rows.limits, gain, used, all_of_one, whole=True)
        objective = -np.inf if shares is None else float(gain @ shares)
        if shares is not None and search.close(best.dual, objective, tolerance):
            keep = np.flatnonzero(shares > ROUND_OFF)
            answer = Answer(
                multipliers=best.mu,
                dual=best.dual,
                objective=objective,
                usage=used @ shares,
                served=np.sum([shares[c] * offers[c][2] for c in keep], axis=0),
                size=search.size,
                at=tuple((float(shares[c]), offers[c][3]) for c in keep),
                split=Split.none(),
                passes=search.passes,
                steps=search.steps,
                scale=search.scale,
            )
            return answer, mu
        if any(o[3] is not None and (mu == o[3]).all() for o in offers):
            break  # nothing new in this box
        here = search.at(box.near, box.fixed, mu, 0.0)
        offers.append((here.objective, here.usage, here.served, here.mu))
        best = min(best, here, key=lambda c: c.dual)
    return None, mu


def _master(
    search: _Search,
    box: _Box,
    room: FloatArray,
    gain: FloatArray,
    used: FloatArray,
    ones: Any,
    *,
    whole: bool,
    least: FloatArray | float = 0.0,
) -> tuple[FloatArray | None, FloatArray]:
    """max gain·share with used·share within `room`, shares ≤ 1 (= 1 if `whole`) by row of `ones`.

    `least` (K,) is the size below which a row's coefficients are round-off. A row may be exceeded at the price at the top of the box and tightened for the one at its bottom, so that no prices
    outside can come out. If either is used, the minimum is on the border: no shares, and the prices there.

    Raises:
        Unbounded: there is no such bound on prices, and no allocation.
    """
    asked = np.flatnonzero(search.goal.free > 0)
    exactly, low, high = search.rows.exactly[asked], box.low[asked], box.high[asked]
    # Rows and gains are scaled to order one: HiGHS's tolerances are absolute.
    row_scale = np.maximum(
        np.abs(used[asked]).max(axis=1, initial=0.0), np.broadcast_to(least, used.shape[0])[asked]
    )
    row_scale = np.where(row_scale > 0, row_scale, np.maximum(np.abs(room[asked]), 1.0))
    gain_scale = float(np.abs(gain).max(initial=0.0)) or 1.0
    over, under = np.flatnonzero(np.isfinite(high)), np.flatnonzero((low > 0) | (exactly & np.isfinite(low)))
    eye = np.eye(asked.size)
    matrix = np.column_stack((used[asked] / row_scale[:, None], -eye[:, over], eye[:, under]))
    # Exceeding a row must cost more than HiGHS's tolerance, also where the box ends next to 0.
    dear = np.maximum(high * row_scale / gain_scale, 1e-6)
    cost = np.concatenate((gain / gain_scale, -dear[over], (low * row_scale)[under] / gain_scale))
    limits, at_most = room[asked] / row_scale, ~exactly
    ones = hstack([ones, csr_matrix((ones.shape[0], over.size + under.size))])
    equal: Any = [csr_matrix(matrix[exactly])] if exactly.any() else []
    less: Any = [csr_matrix(matrix[at_most])]
    (equal if whole else less).append(ones)
    programme: dict[str, Any] = {
        "A_ub": vstack(less),
        "b_ub": np.concatenate((limits[at_most], np.ones(0 if whole else ones.shape[0]))),
        "A_eq": vstack(equal) if equal else None,
        "b_eq": np.concatenate((limits[exactly], np.ones(ones.shape[0] if whole else 0))) if equal else None,
        "bounds": (0, None),
        "method": "highs-ds",
        "options": {
            "primal_feasibility_tolerance": 1e-10,
            "dual_feasibility_tolerance": 1e-10,
            "presolve": False,
        },
    }
    if not cost.size:  # nobody can do anything
        if (limits[at_most] < 0).any() or limits[exactly].any():
            raise Unbounded
        return cost, np.zeros(search.goal.free.size)
    answer = linprog(-cost, **programme)
    if answer.status == 4:  # numbers too far apart for the simplex method on its own
        answer = linprog(-cost, **programme | {"method": "highs", "options": {}})
    if answer.status == 2 and not over.size:
        raise Unbounded
    if answer.x is None:
        raise Unstable
    price = np.zeros(asked.size)
    price[at_most] = -answer.ineqlin.marginals[: at_most.sum()]
    price[exactly] = -answer.eqlin.marginals[: exactly.sum()]
    price *= gain_scale / row_scale
    mu = np.zeros(search.goal.free.size)
    mu[asked] = np.clip(price, low, high)
    shares, slack = np.maximum(answer.x[: gain.size], 0.0), answer.x[gain.size :]
    size = 1e-9 * (1 + np.abs(limits[np.concatenate((over, under))]))
    return (None if (slack > size).any() else shares), mu
