"""Tenants whose demand is the best use of each of their own requests, cleared against an operator's capacity. [Z-1] [Z-GE]

A tenant has requests, each with a menu of uses, and perhaps a budget of USD for what uses cost outside. At prices p of the
operator's resources it takes from each menu what is worth most after p·amounts, or nothing, within its budget:

    max Σ_x (value_x·quality − cost − p·amounts)    subject to    Σ_x cost ≤ budget.

The operator sells what it has, or chooses on its production frontier what to make: the convex hull of a table of vertices,
of which it may throw away. Prices minimise the dual of the sum of all (dual decomposition), found by
`market.dual`; tenants' own multipliers are found inside a pass (`market.blocks`), and the operator is one more task whose
uses give instead of taking.

Menus are discrete, so it is the market of mixtures that clears. Apart from it stands what is left when each request gets
one use, beside the loss that Shapley and Folkman's lemma allows (Starr 1969): an extreme mixture splits at most one request
for each resource and each tenant's budget that has a price, and nobody loses more than all of a request by that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import nnls

from walras.equation import DEFER
from walras.errors import NotCleared, QuantityError
from walras.market.blocks import Blocks, Family
from walras.market.dual import Answer, Unbounded, Unstable
from walras.market.dual import solve as solve_dual
from walras.market.memory import Memory, in_threads
from walras.market.planes import Plane, Planes, Rows
from walras.quantities import IntArray
from walras.risk import FloatArray

SAMPLE = 48.0
"""Requests that aim are so many times √N."""
SMALL = 512
"""Requests up to which the operator's choice needs no aim of its own."""
MOVES, BANDWIDTH = 12, 0.03
"""Steps of that aim, and how far around the prices its curvature is measured."""
BLOCK = 1 << 17
"""Requests that are handled at once when choices are added up."""
WIDTH = 4.0
"""How many times 1/√n of the sample the first box of prices reaches."""


@dataclass(frozen=True, slots=True)
class RequestMenus:
    """N requests of T tenants × I uses × R resources. Planes are float32 or float64, all alike."""

    tenant: IntArray
    """(N,) 0 … T − 1. Where requests come tenant by tenant, nothing is copied."""
    value: FloatArray
    """USD per unit of quality, ≥ 0, (N,)."""
    quality: Plane
    """(N, I), NaN where a use is not allowed."""
    cost: Plane
    """USD paid outside, ≥ 0, (N, I)."""
    amounts: tuple[Plane, ...]
    """Units of each resource, ≥ 0, R of (N, I)."""
    resources: tuple[str, ...]
    budgets: FloatArray | None = None
    """USD, (T,); None: tenants pay what they find worth it."""
    tenants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n, shape = self.value.size, self.quality.shape
        if n == 0 or self.tenant.shape != (n,) or shape[0] != n:
            raise QuantityError(
                f"{n} values, {self.tenant.size} tenants and {shape[0]} menus: there must be one for each request"
            )
        named = dict(
            zip(("quality", "cost", *self.resources), (self.quality, self.cost, *self.amounts), strict=False)
        )
        if len(self.resources) != len(self.amounts):
            raise QuantityError(
                f"{len(self.resources)} resources are named, and {len(self.amounts)} have amounts"
            )
        for name, plane in named.items():
            if plane.shape != shape or plane.dtype != self.quality.dtype:
                raise QuantityError(
                    f"{name} is {plane.shape} {plane.dtype}; the quality is {shape} {self.quality.dtype}"
                )
        if self.tenant.min() < 0 or (self.budgets is not None and self.tenant.max() >= self.budgets.size):
            at = int(
                np.argmax(
                    (self.tenant < 0) | (self.tenant >= (0 if self.budgets is None else self.budgets.size))
                )
            )
            raise QuantityError(f"request {at} is of tenant {self.tenant[at]}, who has no budget")
        self._check(named)

    def _check(self, planes: dict[str, Plane]) -> None:
        bad = ~(np.isfinite(self.value) & (self.value >= 0))
        if bad.any():
            at = int(np.argmax(bad))
            raise QuantityError(
                f"{self.name(at)}, request {at}: its value is {self.value[at]}; it must be finite and ≥ 0"
            )
        if self.budgets is not None:
            poor = ~(np.isfinite(self.budgets) & (self.budgets >= 0))
            if poor.any():
                i = int(np.argmax(poor))
                raise QuantityError(
                    f"{self._tenant(i)}: its budget is {self.budgets[i]}; it must be finite and ≥ 0"
                )
        for name, plane in planes.items():

            def first(lo: int, hi: int, name: str = name, plane: Plane = plane) -> int:
                here, allowed = plane[lo:hi], ~np.isnan(self.quality[lo:hi])
                fine = np.isfinite(here) & (here >= 0) if name != "quality" else ~np.isinf(here)
                wrong = (~fine & allowed).any(axis=1)
                return lo + int(np.argmax(wrong)) if wrong.any() else -1

            found = [at for at in _in_blocks(self.value.size, first) if at >= 0]
            if found:
                at = found[0]
                raise QuantityError(
                    f"{self.name(at)}, request {at}: {name} is {plane[at].tolist()}; it must be finite"
                    f"{'' if name == 'quality' else ' and ≥ 0'}"
                )

    def __len__(self) -> int:
        return int(self.value.size)

    def name(self, request: int) -> str:
        """Whose it is."""
        return self._tenant(int(self.tenant[request]))

    def _tenant(self, i: int) -> str:
        return f"tenant '{self.tenants[i]}'" if self.tenants else f"tenant {i}"

    def take(self, rows: IntArray) -> RequestMenus:
        """Some requests, copied."""
        return RequestMenus(
            self.tenant[rows], self.value[rows], self.quality[rows], self.cost[rows],
            tuple(a[rows] for a in self.amounts), self.resources, self.budgets, self.tenants,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WholeUses:
    """Every request with one use or none."""

    use: IntArray
    """(N,), `DEFER` where none."""
    welfare: float
    """USD a period."""
    loss: float
    """What the mixtures' bound exceeds it by, relative to the bound."""
    excess: float
    """Largest demand beyond what is produced, relative to it, before requests were dropped; 0 after."""
    dropped: int
    """Requests dropped so that what is produced suffices."""
    over_budget: float
    """Largest excess of a tenant over its budget, relative to it."""
    allowed_loss: float
    """What Shapley and Folkman's lemma allows the best such allocation to lose, relative to the bound."""
    split: int
    """Of how many requests at most."""


@dataclass(frozen=True, slots=True)
class MenuClearing:
    """Prices at which tenants' best uses and the operator's best production meet, in mixtures."""

    prices: FloatArray
    """USD a unit of each resource, (R,)."""
    budget_prices: FloatArray
    """What a further USD of its budget is worth to each tenant, (T,); 0 where it is not used up."""
    production: FloatArray
    """(R,) units."""
    mixture: FloatArray
    """(V,) of the frontier's vertices; (1,) where capacity is given."""
    used: FloatArray
    """(R,) units that tenants take."""
    welfare: float
    """Σ value·quality − cost, USD a period."""
    bound: float
    """Which no allocation exceeds."""
    gap: float
    """bound − welfare, relative to the bound."""
    excess: float
    """Largest demand beyond production, relative to it."""
    slackness: float
    """Σ price · unused, relative to the bound: 0 when only free resources are left over."""
    whole: WholeUses
    passes: int
    seconds: float
    answer: Answer = field(repr=False)


def clear_menus(
    menus: RequestMenus, supply: FloatArray, *, start: FloatArray | None = None, tolerance: float = 1e-9
) -> MenuClearing:
    """Clear the market.

    Args:
        supply: capacity (R,), or the vertices of a production frontier (V, R); units a period, ≥ 0.
        start: prices of a neighbouring market, (R,).
        tolerance: largest gap relative to welfare.

    Raises:
        NotCleared: no box of prices was found that holds the answer.
    """
    began = time.perf_counter()
    frontier, n = _frontier(menus, supply), len(menus)
    passes, trust = 0, WIDTH / np.sqrt(SAMPLE * np.sqrt(n))
    if start is None and n > 8 * SAMPLE * np.sqrt(n):
        part, weight = _sample(menus)
        start = _clear_part(part, frontier, weight).multipliers
    if frontier.shape[0] > 1 and n > SMALL:
        start, trust, passes = _make(menus, frontier, 1.0, start, trust)
    market = _market(menus, frontier, 1.0)
    answer = _solve(market, start, tolerance, trust)
    p = answer.multipliers
    own = np.zeros(0 if menus.budgets is None else menus.budgets.size)
    if isinstance(market, Blocks):
        own = market.at(p).price
    mixture = _mixture(answer, frontier, len(menus))
    made = mixture @ frontier
    used = answer.usage if frontier.shape[0] == 1 else answer.usage + made
    scale = np.maximum(made, 1e-300)
    bound = answer.dual
    return MenuClearing(
        p, own, made, mixture, used, answer.objective, bound,
        gap=(bound - answer.objective) / max(abs(bound), 1e-300),
        excess=float(np.max((used - made) / scale, initial=0.0)),
        slackness=float(p @ np.maximum(made - used, 0.0)) / max(abs(bound), 1e-300),
        whole=_whole(menus, market, p, own, made, bound),
        passes=passes + _passes(market, answer),
        seconds=time.perf_counter() - began,
        answer=answer,
    )  # fmt: skip


def _clear_part(part: RequestMenus, frontier: FloatArray, weight: float) -> Answer:
    """Prices of a sample, each of whose requests stands for `weight`."""
    start, trust = None, 0.01
    if frontier.shape[0] > 1 and len(part) > SMALL:
        start, trust, _ = _make(part, frontier, weight, None, trust)
    return _solve(_market(part, frontier, weight), start, 1e-6, trust)


def _make(
    menus: RequestMenus, frontier: FloatArray, weight: float, start: FloatArray | None, trust: float
) -> tuple[FloatArray | None, float, int]:
    """Prices near those at which the operator would make what it makes: how far they may be off, and passes.

    What is made is held fixed, cleared, and moved to where the prices and how they bend say that profit ends: Newton's
    steps in the mixture of vertices, whose value is concave. At the end two or more vertices tie, a kink as large as the
    market, which steps in prices alone would cross to and fro.
    """
    shares, passes, moved = np.full(frontier.shape[0], 1.0 / frontier.shape[0]), 0, np.inf
    for _ in range(MOVES):
        market = _market(menus, (shares @ frontier)[None], weight)
        answer = _solve(market, start, 1e-7, trust)
        p, passes = answer.multipliers, passes + _passes(market, answer)
        if start is not None:
            moved = float((np.abs(p - start) / np.maximum(np.maximum(p, start), 1e-300)).max(initial=0.0))
            trust = min(max(2.0 * moved, 1e-6), 0.05)
        start, gain = p, frontier @ p
        if gain.max() - gain @ shares <= 1e-7 * gain.max() or moved <= 1e-6:
            break
        bend = market.sums(p, 1.0, BANDWIDTH, np.maximum(p, 1e-3 * p.max())).curvature
        passes += 1
        shares = _better(frontier, shares, p, bend)
    return start, trust, passes


def _better(frontier: FloatArray, shares: FloatArray, p: FloatArray, bend: FloatArray) -> FloatArray:
    """argmax over mixtures of p·(more made) − ½ (more made)·bend⁻¹·(more made), (V,)."""
    floor = np.maximum(p, 1e-3 * p.max())
    bent = bend * np.outer(floor, floor)
    root = np.linalg.cholesky(bent + (1e-9 * np.trace(bent) + 1e-300) * np.eye(p.size))
    # As least squares over λ ≥ 0, with a heavy row that makes them sum to 1.
    moves = np.linalg.solve(root, floor[:, None] * frontier.T)
    wanted = moves @ shares + root.T @ (p / floor)
    heavy = 1e4 * float(np.abs(moves).max())
    found = nnls(np.vstack((moves, np.full(shares.size, heavy))), np.append(wanted, heavy))[0]
    return np.asarray(found / found.sum())


def _passes(market: Memory | Blocks, answer: Answer) -> int:
    return answer.passes if market.screens else answer.steps


def _frontier(menus: RequestMenus, supply: FloatArray) -> FloatArray:
    """(V, R), checked."""
    table = np.atleast_2d(np.asarray(supply, dtype=np.float64))
    if table.ndim != 2 or table.shape[1] != len(menus.resources):
        raise QuantityError(
            f"supply has shape {np.shape(supply)}; expected (R,) or (V, R) for R = {len(menus.resources)}"
        )
    bad = np.argwhere(~(np.isfinite(table) & (table >= 0)))
    if bad.size:
        v, r = (int(k) for k in bad[0])
        raise QuantityError(
            f"supply of '{menus.resources[r]}', row {v}, is {table[v, r]}; it must be finite and ≥ 0"
        )
    gone = ~table.any(axis=0)
    if gone.any():
        raise QuantityError(
            f"there is nothing of '{menus.resources[int(np.argmax(gone))]}' (leave it out, and what needs it)"
        )
    return table


def _sample(menus: RequestMenus) -> tuple[RequestMenus, float]:
    """Requests from all over, and for how many each stands."""
    n = int(SAMPLE * np.sqrt(len(menus)))
    rows = ((np.arange(n) + np.random.default_rng(n).random(n)) * (len(menus) / n)).astype(np.int64)
    return menus.take(rows), len(menus) / n


def _market(menus: RequestMenus, frontier: FloatArray, weight: float) -> Memory | Blocks:
    """The dual's market: rows are resources; the operator's frontier, if it has a choice, is the last task."""
    r, chooses = len(menus.resources), frontier.shape[0] > 1
    quality, cost, amounts = menus.quality, menus.cost, menus.amounts
    value, mass, tenant = menus.value, np.array([weight]), menus.tenant
    if chooses:
        width = max(quality.shape[1], frontier.shape[0])
        some = np.where(np.arange(width) < frontier.shape[0], 0.0, np.nan)
        quality = _with_row(quality, some, width)
        cost = _with_row(cost, np.zeros(width), width)
        given = (np.append(-frontier[:, k], np.zeros(width - frontier.shape[0])) for k in range(r))
        amounts = tuple(_with_row(a, y, width) for a, y in zip(amounts, given, strict=True))
        value, tenant = np.append(value, 0.0), np.append(tenant, -1)
        mass = mass if weight == 1.0 else np.append(np.full(len(menus), weight), 1.0)
    none = np.zeros(1)
    planes = Planes(value, quality, (*amounts, cost), (*[none] * r, np.ones(1)), mass, np.zeros(1, np.uint64))
    no = np.zeros(r, dtype=np.bool_)
    limits = np.zeros(r) if chooses else frontier[0].copy()
    rows = Rows(np.arange(r), np.full(r, np.nan), np.zeros(r), limits, no, no)
    if menus.budgets is None:
        return Memory(planes, rows)
    return Blocks(planes, rows, Family(tenant, r, menus.budgets))


def _with_row(plane: Plane, last: FloatArray, width: int) -> Plane:
    """A plane with one row more, in rows of `width`: NaN quality says that the rest is not allowed."""
    wider = np.full((plane.shape[0] + 1, width), np.nan, dtype=plane.dtype)
    wider[:-1, : plane.shape[1]] = plane
    wider[-1] = last
    return wider


def _solve(
    market: Memory | Blocks, start: FloatArray | None, tolerance: float, trust: float = 0.01
) -> Answer:
    try:
        return solve_dual(market, start=start, tolerance=tolerance, trust=min(trust, 0.5))
    except (Unbounded, Unstable):
        raise NotCleared("no box of prices was found that clears the requests", certificate=None) from None


def _mixture(answer: Answer, frontier: FloatArray, operator: int) -> FloatArray:
    """(V,) shares of the vertices that the operator produces at; what is missing to 1 is not produced."""
    shares = np.zeros(frontier.shape[0])
    if shares.size == 1:
        return np.ones(1)
    if operator in answer.split.among:
        own = answer.split.task == operator
        np.add.at(shares, answer.split.use[own], answer.split.share[own])
        return shares
    for share, p in answer.at:
        if p is not None and (frontier @ p).max() > 0:
            shares[int((frontier @ p).argmax())] += share
    return shares


# --- one use each ------------------------------------------------------------------------------------------------------


def _in_blocks(n: int, work: Callable[[int, int], Any]) -> list[Any]:
    return in_threads(work, [(lo, min(n, lo + BLOCK)) for lo in range(0, n, BLOCK)])


@dataclass(frozen=True, slots=True)
class _Taken:
    """What uses add up to."""

    worth: FloatArray
    """(N,) USD, value·quality − cost, 0 where none."""
    spent: FloatArray
    """(N,) USD paid outside."""
    usage: FloatArray
    """(R,)."""


def _taken(menus: RequestMenus, use: IntArray) -> _Taken:
    worth, spent = np.zeros(use.size), np.zeros(use.size)

    def block(lo: int, hi: int) -> FloatArray:
        on = lo + np.flatnonzero(use[lo:hi] != DEFER)
        spent[on] = menus.cost[on, use[on]]
        worth[on] = menus.value[on] * menus.quality[on, use[on]] - spent[on]
        return np.array([float(a[on, use[on]].sum(dtype=np.float64)) for a in menus.amounts])

    return _Taken(worth, spent, np.sum(_in_blocks(use.size, block), axis=0))


def _whole(
    menus: RequestMenus,
    market: Memory | Blocks,
    p: FloatArray,
    own: FloatArray,
    made: FloatArray,
    bound: float,
) -> WholeUses:
    """Best uses at the prices, tenants at the price just above their own; then as few and as cheap requests dropped as
    bring every resource within what is made."""
    n = len(menus)
    use = market.within_limits(p) if isinstance(market, Blocks) else market.choices(p)
    use = use[:n].copy()
    taken = _taken(menus, use)
    room = np.maximum(made, 1e-300)
    excess = float(np.max((taken.usage - made) / room, initial=0.0))
    dropped = 0
    for r in np.flatnonzero(taken.usage > made):
        dropped += _drop(menus, use, taken.worth, p, int(r), made)
    taken = _taken(menus, use) if dropped else taken
    best = np.concatenate(_in_blocks(n, lambda lo, hi: _best_worth(menus, lo, hi)))
    priced = int((p > 0).sum())
    split, allowed = priced, priced * float(best.max(initial=0.0))
    over = 0.0
    if menus.budgets is not None:
        largest = np.zeros(menus.budgets.size)
        np.maximum.at(largest, menus.tenant, best)
        split, allowed = split + int((own > 0).sum()), allowed + float(largest[own > 0].sum())
        spent = np.bincount(menus.tenant, weights=taken.spent, minlength=menus.budgets.size)
        over = float(np.max((spent - menus.budgets) / np.maximum(menus.budgets, 1e-300), initial=0.0))
    welfare, size = float(taken.worth.sum()), max(abs(bound), 1e-300)
    return WholeUses(use, welfare, (bound - welfare) / size, excess, dropped, over, allowed / size, split)


def _best_worth(menus: RequestMenus, lo: int, hi: int) -> FloatArray:
    """The most a request could be worth, not below 0, (hi − lo,)."""
    worth = menus.value[lo:hi, None] * menus.quality[lo:hi] - menus.cost[lo:hi]
    return np.asarray(np.fmax.reduce(worth, axis=1, initial=0.0), dtype=np.float64)


def _drop(
    menus: RequestMenus, use: IntArray, worth: FloatArray, p: FloatArray, r: int, made: FloatArray
) -> int:
    """Drop requests until resource r suffices: those that lose least, after what they free at the prices, a unit of it."""
    on = np.flatnonzero(use != DEFER)
    amounts = [a[on, use[on]].astype(np.float64) for a in menus.amounts]
    over = float(amounts[r].sum()) - made[r]
    takes = amounts[r] > 0
    if over <= 0:
        return 0
    on, own = on[takes], [a[takes] for a in amounts]
    lost = worth[on] - sum(price * a for price, a in zip(p, own, strict=True))
    order = np.argsort(lost / own[r], kind="stable")
    count = int(np.searchsorted(np.cumsum(own[r][order]), over)) + 1
    use[on[order[:count]]] = DEFER
    return min(count, on.size)
