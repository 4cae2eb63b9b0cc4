"""Fisher markets: tenants with budgets share what there is of each good; prices at which it clears, and the proof. [Z-GE]

The competitive equilibrium of a Fisher market maximises Σ B_i log U_i (Eisenberg and Gale 1959), and its prices minimise

    D(p) = Σ_j s_j p_j − Σ_i B_i log C_i(p) + Σ_i (B_i log B_i − B_i)

with C_i(p) what a unit of utility costs tenant i. D is convex in G prices, however many tenants there are, and bounds the
maximum from above: `solve` goes down by Newton's steps, each one pass over the tenants. Perfect substitutes, and money
kept (which then counts against B log U: Cole et al. 2017), make D piecewise. There the path of soft minima
of sharpness 1/τ is followed to τ = 0: tenants whose choice no longer hangs on prices are set aside, so that nearly all
of the path is walked among the few that tie; at its end ties say which prices stand in which ratio, budgets say how high,
and prices come out exact. `proportional` is the other road.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from walras.errors import NotCleared, QuantityError
from walras.market.memory import in_threads
from walras.market.tenants import spending
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

CHUNK = 1 << 13
"""Tenants a unit of work; sums of chunks are added in order, so threads change no digit."""
SAMPLE = 32.0
"""Tenants that aim are so many times √N."""
FIRST, FASTER = 4.0, 6.0
"""Sharpness of the first soft minimum, and how much each is sharper than the one before."""
SURE = 60.0
"""A tenant whose best good leads by this many τ in log worth per price is set aside."""
SHARPEST = 1e16
"""What stands for a hard minimum: closer ties than that are ties."""
NOISE = 1e-13
"""Round-off of D, relative."""
UNIT = 1e-9
"""An elasticity this near 1 is taken for 1: shares change by less, and round-off would count for more."""
MAX_STEPS = 60
RIDGES = (1e-14, 1e-11, 1e-8, 1e-5, 1e-2)
"""Added to the curvature, relative to its trace, one after another until a step leads down: a few Leontief tenants leave most
directions without any."""
TRACE = 1e-7
"""A share of a budget below this goes to the first good when ties are resolved, if the good can do without."""


@dataclass(frozen=True, slots=True)
class FisherMarket:
    """N tenants, G goods. Shorter arrays of length 1 hold for every tenant."""

    budgets: FloatArray
    """B, ≥ 0, USD, (N,)."""
    weights: FloatArray
    """(N, G) ≥ 0. Perfect substitutes: utility per unit. Otherwise CES shares α, only their ratios count; Leontief: the
    amounts used together, likewise."""
    supply: FloatArray
    """s, > 0, units, (G,)."""
    elasticity: FloatArray = field(default_factory=lambda: np.array([np.inf]))
    """σ ≥ 0 between goods, (N,): 0 Leontief, 1 Cobb–Douglas (and within 1e-9 of it), ∞ perfect substitutes."""
    worth: FloatArray = field(default_factory=lambda: np.array([np.inf]))
    """Where a tenant may keep its money, which is worth 1 a USD to it: USD that a unit of utility is worth, (N,); ∞ where
    money is of no use. Utility is then in USD: worth · u(x) + money kept."""
    goods: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = self.budgets.shape[0]
        if self.weights.shape != (n, self.supply.size) or not n:
            raise QuantityError(
                f"weights have shape {self.weights.shape}; {n} budgets and {self.supply.size} supplies need "
                f"({n}, {self.supply.size})"
            )
        for name in ("budgets", "weights", "supply", "elasticity", "worth"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.float64))
        for name in ("elasticity", "worth"):
            column = getattr(self, name)
            if column.shape not in ((1,), (n,)):
                raise QuantityError(f"{name} has shape {column.shape}; expected (1,) or ({n},)")
            object.__setattr__(self, name, np.broadcast_to(column, n))
        self._check()

    def _check(self) -> None:
        self._least("budget", self.budgets, finite=True)
        self._least("elasticity", self.elasticity, finite=False)
        self._least("worth of utility", self.worth, finite=False, above=True)
        bad = ~(np.isfinite(self.weights) & (self.weights >= 0))
        if bad.any():
            i, j = (int(k) for k in np.argwhere(bad)[0])
            raise QuantityError(
                f"{self.tenant(i)}: the weight of {self.good(j)} is {self.weights[i, j]}; it must be finite and ≥ 0"
            )
        short = np.flatnonzero(~(np.isfinite(self.supply) & (self.supply > 0)))
        if short.size:
            raise QuantityError(
                f"the supply of {self.good(int(short[0]))} is {self.supply[short[0]]}; it must be finite and > 0 "
                "(leave out a good that there is nothing of)"
            )
        idle = np.flatnonzero(~self.weights.any(axis=1))
        if idle.size:
            raise QuantityError(
                f"{self.tenant(int(idle[0]))} wants nothing: all its weights are 0 (leave it out, or say what it wants)"
            )
        if not self.budgets.any():
            raise QuantityError("every tenant's budget is 0: nobody can pay, so no price is defined")

    def _least(self, name: str, column: FloatArray, *, finite: bool, above: bool = False) -> None:
        bad = np.isnan(column) | (column < 0) | (finite & np.isinf(column)) | (above & (column == 0))
        if bad.any():
            i = int(np.argmax(bad))
            least = "> 0" if above else "≥ 0"
            raise QuantityError(
                f"{self.tenant(i)}: the {name} is {column[i]}; it must be {'finite and ' * finite}{least}"
            )

    def __len__(self) -> int:
        return int(self.budgets.size)

    def good(self, j: int) -> str:
        return f"good '{self.goods[j]}'" if self.goods else f"good {j}"

    def tenant(self, i: int) -> str:
        return f"tenant '{self.tenants[i]}'" if self.tenants else f"tenant {i}"


@dataclass(frozen=True, slots=True)
class FisherCertificate:
    """How well an equilibrium is proved."""

    objective: float
    """Σ B log U − money kept, of the allocation cut to what there is; USD × log utility."""
    dual: float
    """D(p), which no allocation exceeds."""
    gap: float
    """dual − objective, per USD of budget: about the mean relative utility that could be missing."""
    excess: float
    """Largest demand beyond a supply, relative to it."""
    idle: float
    """Σ_j p_j · unused_j relative to all that is spent: 0 when only free goods are left over."""
    utility_gap: float
    """Largest share of what its budget could buy at these prices that a tenant misses: its bang-per-buck gap."""
    utility_tenant: int
    """Whose that is."""
    budget: float
    """Largest |spent + kept − budget| of a tenant, relative to its budget."""

    @property
    def worst(self) -> float:
        return max(abs(self.gap), self.excess, self.idle, self.utility_gap, self.budget)


@dataclass(frozen=True, slots=True)
class FisherEquilibrium:
    """Prices, who gets what, and the proof."""

    prices: FloatArray
    """USD a unit, (G,)."""
    allocation: FloatArray
    """Units, (N, G)."""
    kept: FloatArray
    """USD not spent, (N,); 0 where money is of no use."""
    certificate: FisherCertificate
    unwanted: tuple[int, ...]
    """Goods that no tenant with a budget wants: their price is 0."""
    solver: str
    """Which, and why."""
    passes: float
    """Passes over the tenants; parts counted as parts."""
    seconds: float


# --- scaled --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tenants:
    """The columns of `spending`, in scaled units."""

    taste: FloatArray
    sigma: FloatArray
    keep: FloatArray
    budget: FloatArray

    def __len__(self) -> int:
        return int(self.budget.size)

    @property
    def columns(self) -> tuple[FloatArray, ...]:
        return self.taste, self.sigma, self.keep, self.budget

    def take(self, rows: IntArray) -> Tenants:
        return Tenants(*(column[rows] for column in self.columns))

    def buy(self, p: FloatArray, cap: float) -> tuple[FloatArray, FloatArray]:
        """Bundles (N, G), and money kept (N,)."""
        bought, kept = np.empty(self.taste.shape), np.empty(len(self))
        q = np.log(np.maximum(p, 1e-300))
        self.in_chunks(lambda lo, hi: spending.bundles(*self.columns, p, q, cap, lo, hi, bought, kept))
        return bought, kept

    def in_chunks(self, work: Callable[[int, int], Any]) -> list[Any]:
        n = len(self)
        if n <= CHUNK:
            return [work(0, n)]
        return in_threads(work, [(lo, min(n, lo + CHUNK)) for lo in range(0, n, CHUNK)])


@dataclass(frozen=True, slots=True)
class Found:
    """Prices and bundles in scaled units, and what proves them."""

    p: FloatArray
    bought: FloatArray
    kept: FloatArray
    certificate: FisherCertificate


@dataclass(frozen=True, slots=True)
class Scaled:
    """A market of the tenants with a budget and the goods they want, its supplies and its sum of budgets set to 1."""

    market: FisherMarket
    rows: IntArray | slice
    goods: IntArray
    tenants: Tenants
    base: FloatArray
    """(N,) the log by which utilities then are too small."""

    @classmethod
    def of(cls, market: FisherMarket) -> Scaled:
        pays = market.budgets > 0
        rows = slice(None) if pays.all() else np.flatnonzero(pays)
        goods = np.flatnonzero((market.weights[rows] > 0).any(axis=0))
        return cls(market, rows, goods, *_scaled(market, rows, goods))

    @property
    def unit(self) -> FloatArray:
        """(G,) USD a unit that a scaled price of 1 stands for."""
        return np.asarray(float(self.market.budgets.sum()) / self.market.supply[self.goods])

    def equilibrium(self, found: Found, solver: str, passes: float, seconds: float) -> FisherEquilibrium:
        """In USD and units, with all tenants and goods."""
        market, total = self.market, float(self.market.budgets.sum())
        prices, kept = np.zeros(market.supply.size), np.zeros(len(market))
        prices[self.goods] = found.p * self.unit
        kept[self.rows] = found.kept * total
        if self.goods.size == prices.size and isinstance(self.rows, slice):
            allocation = found.bought * market.supply
        else:
            allocation, at = np.zeros(market.weights.shape), np.arange(len(market))[self.rows]
            allocation[np.ix_(at, self.goods)] = found.bought * market.supply[self.goods]
        unwanted = tuple(int(j) for j in np.setdiff1d(np.arange(prices.size), self.goods))
        return FisherEquilibrium(
            prices, allocation, kept, self._in_usd(found.certificate), unwanted, solver, passes, seconds
        )

    @property
    def log_unit(self) -> FloatArray:
        """(N,) the log of what a scaled utility of 1 stands for: USD where money may be kept."""
        keep = self.tenants.keep
        return np.where(np.isfinite(keep), np.log(self.market.budgets.sum()) + keep, self.base)

    def curvature(self, prices: FloatArray, cap: float) -> FloatArray:
        """(G, G) of the dual at prices in USD, with perfect substitutes and money at an elasticity of `cap`."""
        search = _Search(
            self.tenants, np.zeros(self.goods.size), len(self.tenants), np.zeros(0, dtype=np.bool_)
        )
        here, total = search.at(prices[self.goods] / self.unit, cap), float(self.market.budgets.sum())
        return np.asarray(here.curvature * total / np.outer(self.unit, self.unit))

    def _in_usd(self, scaled: FisherCertificate) -> FisherCertificate:
        total = float(self.market.budgets.sum())
        shift = total * float(self.tenants.budget @ self.log_unit)
        return replace(scaled, objective=scaled.objective * total + shift, dual=scaled.dual * total + shift)


def _scaled(market: FisherMarket, rows: IntArray | slice, goods: IntArray) -> tuple[Tenants, FloatArray]:
    """Some tenants of a market with its supplies and its sum of budgets set to 1, and the log (N,) by which their utilities
    then are too small."""
    sigma, total = market.elasticity[rows], float(market.budgets.sum())
    sigma = np.where(np.abs(sigma - 1.0) <= UNIT, 1.0, sigma)
    weights = market.weights if isinstance(rows, slice) else market.weights[rows]
    taste, base, supply = np.empty((sigma.size, goods.size)), np.empty(sigma.size), market.supply[goods]
    keep, budget = np.log(market.worth[rows]), market.budgets[rows] / total
    tenants = Tenants(taste, sigma, keep, budget)
    tenants.in_chunks(
        lambda lo, hi: spending.scale(weights, sigma, goods, supply, np.log(supply), lo, hi, taste, base)
    )
    keep += base - np.log(total)
    return tenants, base


# --- one pass --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    p: FloatArray
    value: float
    """D up to a constant."""
    demand: FloatArray
    curvature: FloatArray

    @property
    def slope(self) -> FloatArray:
        return 1.0 - self.demand

    @property
    def residual(self) -> float:
        """Largest excess spending, or demand for what is free."""
        over = np.where(self.p > 0, np.abs(self.p * self.slope), 0.0)
        return float(max(over.max(), np.where(self.p > 0, 0.0, self.demand - 1.0).max(initial=0.0)))


@dataclass(slots=True)
class _Search:
    """A market being cleared: the tenants still looked at, and what the others spend whatever happens."""

    live: Tenants
    fixed: FloatArray
    """(G,) spending of tenants set aside."""
    whole: int
    """Tenants a pass is counted against."""
    corner: BoolArray
    """(G,) goods whose price may be 0: only complements want them."""
    passes: float = 0.0

    def at(self, p: FloatArray, cap: float) -> _Point:
        g, live, q = p.size, self.live, np.log(np.maximum(p, 1e-300))

        def chunk(lo: int, hi: int) -> tuple[FloatArray, FloatArray, FloatArray]:
            sums, demand, curvature = np.zeros(2), np.zeros(g), np.zeros((g, g))
            spending.respond(*live.columns, p, q, cap, lo, hi, sums, demand, curvature)
            return sums, demand, curvature

        parts = live.in_chunks(chunk)
        self.passes += len(live) / self.whole
        curvature = sum((part[2] for part in parts), np.zeros((g, g)))
        curvature = np.tril(curvature) + np.tril(curvature, -1).T
        with np.errstate(divide="ignore", invalid="ignore"):
            per_price = np.where(self.fixed > 0, self.fixed / p, 0.0)
            curvature[np.diag_indices(g)] += np.where(self.fixed > 0, per_price / p, 0.0)
        value = float(p.sum() - self.fixed @ q - sum(part[0][0] for part in parts))
        return _Point(p, value, sum((part[1] for part in parts), per_price), curvature)

    def descend(self, p: FloatArray, cap: float, *, last: bool) -> _Point:
        """Newton's steps from `p` with soft minima of this sharpness: until they are small beside 1/cap, or, `last`, until
        nothing is gained any more."""
        here = self.at(p, cap)
        for _ in range(MAX_STEPS):
            for ridge in RIDGES:
                step = self._step(here, ridge)
                there = self._along(here, step, cap)
                if there is not None:
                    break
            else:
                break
            size = float((np.abs(step) / np.maximum(here.p, 1e-6)).max())
            better = there.residual < 0.5 * here.residual
            here = there
            if not last and size <= 0.02 / cap:
                break
            if last and (here.residual <= 1e-15 or (not better and size <= 1e-9)):
                break
        return here

    def _step(self, here: _Point, ridge: float) -> FloatArray:
        """Newton's within bounds: no price below 0, and those that cannot be 0 neither far down nor far up at once."""
        low = np.where(self.corner, -here.p, -0.8 * here.p)
        high = np.maximum(4.0 * here.p, 1e-3 / here.p.size)
        scale = np.maximum(here.p, 1e-3 / here.p.size)
        hessian = here.curvature * np.outer(scale, scale)
        hessian[np.diag_indices(scale.size)] += ridge * np.trace(hessian) + 1e-300
        slope, low, high = here.slope * scale, low / scale, high / scale
        step = -np.linalg.solve(hessian, slope)
        if (step < low).any() or (step > high).any():
            # Least squares within bounds: |Rᵀd + R⁻¹slope|² is the same quadratic.
            root = np.linalg.cholesky(hessian)
            step = lsq_linear(root.T, -np.linalg.solve(root, slope), (low, high), method="bvls").x
        return np.asarray(step * scale)

    def _along(self, here: _Point, step: FloatArray, cap: float) -> _Point | None:
        """As far along a step as D falls enough; None where it does not."""
        part = 1.0
        for _ in range(40):
            there = self.at(np.maximum(here.p + part * step, 0.0), cap)
            promised = part * float(here.slope @ step)
            if there.value <= here.value + 1e-4 * promised and promised < 0:
                return there
            if promised >= 100 * NOISE:
                return None
            close = abs(promised) <= 100 * NOISE and there.value <= here.value + NOISE * (1 + abs(here.value))
            if close and there.residual < here.residual:
                return there
            part *= 0.5 if part > 0.2 else 0.2
            if np.abs(part * step).max() <= 1e-17:
                break
        return None

    def set_aside(self, p: FloatArray, lead: float) -> None:
        """Stop looking at perfect substitutes' buyers whose first choice leads by `lead`."""
        first, ahead = _leads(self.live, p)
        sure = (ahead > lead) & np.isinf(self.live.sigma)
        spent = np.bincount(first[sure], weights=self.live.budget[sure], minlength=p.size + 1)
        self.fixed = self.fixed + spent[: p.size]
        self.live = self.live.take(np.flatnonzero(~sure))


def _leads(tenants: Tenants, p: FloatArray) -> tuple[IntArray, FloatArray]:
    """Each tenant's best good (G: keeping its money), and how far it leads in log worth per price."""
    first, lead = np.empty(len(tenants), dtype=np.int64), np.empty(len(tenants))
    q = np.log(p)
    tenants.in_chunks(lambda lo, hi: spending.leads(tenants.taste, tenants.keep, q, first, lead, lo, hi))
    return first, lead


# --- solve -----------------------------------------------------------------------------------------------------------


def solve(
    market: FisherMarket, *, tolerance: float = 1e-6, start: FloatArray | None = None
) -> FisherEquilibrium:
    """The competitive equilibrium, with its certificate.

    Args:
        tolerance: what `certificate.worst` must reach; usually it comes out many digits smaller.
        start: prices of a neighbouring market, (G,).

    Raises:
        NotCleared: it did not.
    """
    began = time.perf_counter()
    scaled = Scaled.of(market)
    tenants = scaled.tenants
    if (tenants.sigma == 1.0).all() and np.isinf(tenants.keep).all():
        p, cap, passes = tenants.budget @ tenants.taste, 1.0, 1.0
        solver = "Cobb–Douglas: prices in closed form"
    else:
        given = None if start is None else np.maximum(start[scaled.goods] / scaled.unit, 0.0)
        p, cap, passes, solver = _clear(tenants, given, SURE)
    found = _finish(tenants, p, cap)
    if not found.certificate.worst <= tolerance:  # somebody was set aside who should not have been
        p, cap, more, solver = _clear(tenants, None, 100 * SURE)
        found, passes = _finish(tenants, p, cap), passes + more
    answer = scaled.equilibrium(found, solver, passes + 2.0, time.perf_counter() - began)
    if not answer.certificate.worst <= tolerance:
        raise NotCleared(
            f"the Fisher market was not cleared to {tolerance:g}: its certificate reached {answer.certificate.worst:.2g}",
            certificate=answer.certificate,
        )
    return answer


def _clear(tenants: Tenants, start: FloatArray | None, sure: float) -> tuple[FloatArray, float, float, str]:
    """Prices, the sharpness they were found at, passes, and what was done."""
    n, g = tenants.taste.shape
    sharp = bool(np.isinf(tenants.sigma).any() or np.isfinite(tenants.keep).any())
    steepest = float(np.where(np.isinf(tenants.sigma), 1.0, tenants.sigma).max())
    final = max(min(max(1e8, 1e5 * n), 1e10), 100 * steepest) if sharp else steepest
    fixed = tenants.sigma == 0
    corner = (
        np.asarray((tenants.taste[fixed] > 0).any(axis=0)) if fixed.any() else np.zeros(g, dtype=np.bool_)
    )
    others = tenants.sigma > 0
    if corner.any() and others.any():
        corner[_wants(tenants, others)] = False
    p, aimed, extra = start, FIRST, 0.0
    few = int(SAMPLE * np.sqrt(n))
    if start is not None and sharp:
        aimed = min(final, 1e3)
    elif start is None:
        p = _first_prices(tenants)
        if n > 8 * few:
            rows = ((np.arange(few) + np.random.default_rng(n).random(few)) * (n / few)).astype(np.int64)
            part = tenants.take(rows)
            part = Tenants(part.taste, part.sigma, part.keep, part.budget / part.budget.sum())
            aim = _Search(part, np.zeros(g), n, corner)
            aimed = min(final, 0.5 * np.sqrt(few) * g)
            p = _follow(aim, p, FIRST, aimed, sure, last=False)
            extra = aim.passes
    assert p is not None
    p = np.where(corner, p, np.maximum(p, 1e-12))
    search = _Search(tenants, np.zeros(g), n, corner)
    if extra and sharp and (p > 0).all():
        search.set_aside(p, 2 * sure / aimed)
    p = _follow(search, p, min(aimed, final), final, sure, last=True)
    how = "Newton on the dual in prices"
    why = (
        "smooth utilities"
        if not sharp
        else "piecewise: soft minima sharpened along a path, ties resolved at its end"
    )
    return p, final, search.passes + extra, f"{how} ({why}; {n} tenants, {g} prices)"


def _wants(tenants: Tenants, rows: BoolArray) -> BoolArray:
    """(G,) goods that some of these tenants want."""
    one = tenants.sigma == 1.0
    wants = np.where(one[:, None], tenants.taste > 0, np.isfinite(tenants.taste))
    wanted: BoolArray = np.asarray(wants[rows].any(axis=0))
    return wanted


def _first_prices(tenants: Tenants) -> FloatArray:
    """What tenants would spend if each divided its budget by its shares at equal prices."""
    some = tenants.take(np.arange(0, len(tenants), max(1, len(tenants) // 4096)))
    bought, kept = np.empty(some.taste.shape), np.empty(len(some))
    g = some.taste.shape[1]
    even = np.full(g, 1.0 / g)
    never = np.full(len(some), np.inf)
    spending.bundles(
        some.taste, some.sigma, never, some.budget, even, np.log(even), 2.0, 0, len(some), bought, kept
    )
    p = bought.sum(axis=0)
    return np.asarray(np.maximum(p / p.sum(), 1e-6))


def _follow(
    search: _Search, p: FloatArray, cap: float, final: float, sure: float, *, last: bool
) -> FloatArray:
    """Prices at the end of the path of soft minima, from sharpness `cap` to `final`."""
    before: tuple[FloatArray, float] | None = None
    while True:
        end = cap >= final
        here = search.descend(p, cap, last=last and end)
        if end:
            return here.p
        sharper = min(final, cap * FASTER)
        p = here.p
        if before is not None and (p > 0).all() and (before[0] > 0).all():
            # Near its end the path is straight in τ = 1/cap: go on along it.
            ahead = (1 / cap - 1 / sharper) / (1 / before[1] - 1 / cap)
            p = p * np.clip(p / before[0], 0.5, 2.0) ** min(ahead, 1.0)
        before = here.p, cap
        if (here.p > 0).all():
            search.set_aside(here.p, sure / cap)
        cap = sharper


# --- finish ----------------------------------------------------------------------------------------------------------


def _finish(tenants: Tenants, p: FloatArray, cap: float) -> Found:
    """What tenants buy at these prices; where all are perfect substitutes, with ties resolved exactly."""
    exact = _exact(tenants, p, cap) if np.isinf(tenants.sigma).all() else None
    if exact is not None and exact.certificate.worst <= 1e-9:
        return exact
    bought, kept = tenants.buy(p, cap)
    found = Found(p, bought, kept, judge(tenants, p, bought, kept))
    return found if exact is None or found.certificate.worst < exact.certificate.worst else exact


def _exact(tenants: Tenants, p: FloatArray, cap: float) -> Found | None:
    """With every tie held as an equation; None where none of the ways to hold them asks nobody for less than nothing."""
    ties = _Ties.of(tenants, p, cap)
    for _ in range(3 * p.size):
        exact = ties.resolve()
        if exact is not None:
            return Found(*exact, judge(tenants, *exact))
    return None


@dataclass(slots=True)
class _Ties:
    """Tenants that spend on several goods hold prices in ratio; there are as many such ratios as goods, less the groups
    that they join. Money is a good of price 1, the last one."""

    rows: IntArray
    """The tenants that tie."""
    spent: FloatArray
    """(R, G + 1) what each spends."""
    taste: FloatArray
    """(R, G + 1)."""
    others: FloatArray
    """(G + 1,) spending of all other tenants."""
    first: IntArray
    budget: FloatArray
    q: FloatArray
    barred: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, tenants: Tenants, p: FloatArray, cap: float) -> _Ties:
        g = p.size
        first, lead = _leads(tenants, p)
        rows = np.flatnonzero(lead < spending.GONE / cap)
        bought, kept = tenants.take(rows).buy(p, cap)
        spent = np.column_stack((bought * p, kept))
        alone = np.ones(len(tenants), dtype=np.bool_)
        alone[rows] = False
        others = np.bincount(first[alone], weights=tenants.budget[alone], minlength=g + 1).astype(np.float64)
        taste = np.column_stack((tenants.taste[rows], -tenants.keep[rows]))
        share = spent / tenants.budget[rows].clip(1e-300)[:, None]
        small = (share < TRACE) & (spent < 1e-3 * (others + spent.sum(axis=0)))
        main = spent.argmax(axis=1)
        spent[np.arange(rows.size), main] += np.where(small, spent, 0.0).sum(axis=1)
        spent[small] = 0.0
        return cls(rows, spent, taste, others, first, tenants.budget, np.append(np.log(p), 0.0))

    def resolve(self) -> tuple[FloatArray, FloatArray, FloatArray] | None:
        """Prices, bundles and money kept with every ratio held and every good cleared; None where a tenant would have to
        spend less than nothing, which bars that tie."""
        links = self._forest()
        q = self._prices(links)
        p, spent = np.exp(q), self.spent.copy()
        missing = p - self.others - spent.sum(axis=0)
        join = np.zeros((q.size, len(links)))
        for at, (_, j, k) in enumerate(links):
            join[j, at], join[k, at] = -1.0, 1.0
        if links:
            moved = np.linalg.lstsq(join[:-1], missing[:-1], rcond=None)[0]
            for amount, (r, j, k) in zip(moved, links, strict=True):
                spent[r, j] -= amount
                spent[r, k] += amount
        low = spent.min(initial=0.0)
        if low < -1e-15:
            r, j = (int(x) for x in np.unravel_index(spent.argmin(), spent.shape))
            self._bar(r, j)
            return None
        return self._bundles(p, np.maximum(spent, 0.0))

    def _bar(self, r: int, j: int) -> None:
        """Tenant r does not tie for good j: what it spent there goes to its first."""
        self.barred.add((r, j))
        share = np.where([(r, k) in self.barred for k in range(self.q.size)], -1.0, self.spent[r])
        self.spent[r, int(share.argmax())] += self.spent[r, j]
        self.spent[r, j] = 0.0

    def _forest(self) -> list[tuple[int, int, int]]:
        """Ties (tenant, good, good) that join all goods that any tie joins, none twice; those most spent on first."""
        main = self.spent.argmax(axis=1)
        r, k = np.nonzero((self.spent > 0) & (np.arange(self.q.size) != main[:, None]))
        root, links = list(range(self.q.size)), []

        def top(j: int) -> int:
            while root[j] != j:
                j = root[j]
            return j

        for at in np.argsort(-self.spent[r, k], kind="stable"):
            j, other = int(main[r[at]]), int(k[at])
            if top(j) != top(other):
                root[top(j)] = top(other)
                links.append((int(r[at]), j, other))
        return links

    def _prices(self, links: Sequence[tuple[int, int, int]]) -> FloatArray:
        """Ratios from ties; levels from what is spent in each group of goods."""
        g = self.q.size - 1
        q, group = np.zeros(g + 1), np.full(g + 1, -1)
        near: list[list[tuple[int, float]]] = [[] for _ in range(g + 1)]
        for r, j, k in links:
            up = float(self.taste[r, k] - self.taste[r, j])
            near[j].append((k, up))
            near[k].append((j, -up))
        total = self.others + self.spent.sum(axis=0)
        for start in range(g, -1, -1):  # money first: its price is given
            if group[start] >= 0:
                continue
            group[start], todo, q[start] = start, [start], 0.0
            while todo:
                j = todo.pop()
                for k, up in near[j]:
                    if group[k] < 0:
                        group[k], q[k] = start, q[j] + up
                        todo.append(k)
            own = group == start
            if start < g:
                q[own] += np.log(total[own].sum() / np.exp(q[own]).sum())
        return q

    def _bundles(self, p: FloatArray, spent: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        g = p.size - 1
        bought, kept = np.zeros((self.budget.size, g)), np.zeros(self.budget.size)
        buys = self.first < g
        bought[buys, self.first[buys]] = self.budget[buys] / p[self.first[buys]]
        kept[~buys] = self.budget[~buys]
        bought[self.rows], kept[self.rows] = spent[:, :g] / p[:g], spent[:, g]
        return p[:g], bought, kept


def judge(tenants: Tenants, p: FloatArray, bought: FloatArray, kept: FloatArray) -> FisherCertificate:
    demand = np.asarray(sum(tenants.in_chunks(lambda lo, hi: bought[lo:hi].sum(axis=0))))
    shrink = 1.0 / np.maximum(demand, 1.0)
    q = np.log(np.maximum(p, 1e-300))

    def chunk(lo: int, hi: int) -> tuple[FloatArray, FloatArray]:
        sums, worst = np.zeros(3), np.array([0.0, 0.0, -1.0, -1.0])
        spending.judge(*tenants.columns, p, q, SHARPEST, bought, kept, shrink, lo, hi, sums, worst)
        return sums, worst

    parts = tenants.in_chunks(chunk)
    objective, costs, constant = np.sum([sums for sums, _ in parts], axis=0)
    worst = max((worst for _, worst in parts), key=lambda w: float(w[0]))
    dual = float(p.sum() - costs + constant)
    spent = 1.0 - float(kept.sum())
    return FisherCertificate(
        objective=float(objective),
        dual=dual,
        gap=dual - float(objective),
        excess=float(np.max(demand - 1.0, initial=0.0)),
        idle=float(p @ np.maximum(1.0 - demand, 0.0)) / max(spent, 1e-300),
        utility_gap=float(worst[0]),
        utility_tenant=int(worst[2]),
        budget=max(float(w[1]) for _, w in parts),
    )
