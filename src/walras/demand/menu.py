"""The menu: tiers among which users tell, by choosing, what their requests are worth. [Z-5] [Z-IR]

A tier is a quality and a price. A user of type θ takes the tier with the greatest θ·q − p, or nothing. A menu is a stack of
upgrades: whoever is at or above the cut-off t_k pays t_k per unit for the quality q_k − q_{k−1}, so that p_k = p_{k−1} +
t_k·(q_k − q_{k−1}), no user gains by posing as another, and the lowest type served pays all it has. What is left to
choose is cut-offs and qualities. Tier k is worth to the operator

    A_k·q_k − m_k·c(q_k),   A_k = ∫ φ_κ dF over its users,   m_k their mass,   φ_κ(θ) = θ − κ·(1 − F)/f,

with κ = 1 for profit (Myerson's virtual value) and κ = μ/(1 + μ) for welfare with a cost-recovery row of multiplier μ
(Ramsey and Boiteux). So the best menu of N tiers is the best N-level quantiser of φ_κ (Bergemann, Shen, Xu and Yeh 2012):
found exactly by dynamic programming over cut-offs at the corners of the concave hull of the curve A(S), which is ironing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import brentq, isotonic_regression, root

from walras.demand.offerings import Technology
from walras.errors import InfeasibleError, SettingsError
from walras.estimate.type_laws import TypeLaw
from walras.quantities import IntArray
from walras.risk import FloatArray

Objective = Literal["welfare", "revenue"]

CANDIDATES = 300
"""Most cut-offs searched at once; a continuous law's are polished afterwards, many atoms' shifted one by one."""
FINE = 20_000
"""Cells of the quadrature that values a menu without a cap on its tiers."""
MOST_TIERS = 100


@dataclass(frozen=True, slots=True)
class Tier:
    """One line of the menu."""

    name: str
    quality: float
    price: float
    """USD per request."""
    type_from: float
    """The least type meant to take it, USD per unit of quality."""
    type_to: float
    """The greatest (of a continuous law: the next tier's least); may be ∞."""
    seconds: float = 0.0
    cost: float = float("nan")
    """What a request costs the operator, USD; NaN where unknown."""
    share: float = float("nan")
    """Of all requests."""
    rent: float = float("nan")
    """Mean of θ·q − λ₀·L − p over those who take it, USD: what their secret is worth to them."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What holds of a menu, computed from its tiers alone. USD per request of the whole population."""

    worst_ic_violation: float
    """The most any type gains by posing as one that takes another tier, USD; 0 where none does."""
    worst_ir_violation: float
    """The most any type loses by taking the tier meant for it, USD."""
    information_rent: float
    revenue: float
    profit: float
    welfare: float


@dataclass(frozen=True, slots=True)
class Menu:
    """The best menu found, and how much better any menu could be."""

    tiers: tuple[Tier, ...]
    """Ascending in quality and price; none where nobody is worth serving."""
    law: TypeLaw
    objective: Objective
    certificate: Certificate
    bound: float
    """Profit or welfare that no menu, of whatever size, exceeds, USD per request."""
    recovery_price: float
    """κ = μ/(1 + μ): the weight of profit against welfare; 1 where profit is the objective."""
    ironed: tuple[tuple[float, float], ...]
    """Ranges of types that are bunched because φ_κ falls there."""

    @property
    def value(self) -> float:
        """Profit or welfare, USD per request."""
        return self.certificate.profit if self.objective == "revenue" else self.certificate.welfare

    @property
    def loss_to_cap(self) -> float:
        """What the cap on tiers costs at most, USD per request."""
        return max(self.bound - self.value, 0.0)


def design(
    law: TypeLaw,
    technology: Technology,
    *,
    objective: Objective = "revenue",
    tiers: int = 4,
    recover: float = 0.0,
) -> Menu:
    """The best menu of at most `tiers` tiers.

    Args:
        objective: "revenue" for most profit (revenue less cost); "welfare" for most welfare with profit ≥ `recover`.
        recover: what must come in above the tiers' own costs, USD per request: fixed costs, capacity already paid.

    Raises:
        InfeasibleError: no menu recovers that much.
        SettingsError: a number of tiers or of dollars that makes no sense.
    """
    if not 1 <= tiers <= MOST_TIERS:
        raise SettingsError(f"{tiers} tiers", key="tiers", hint=f"from 1 to {MOST_TIERS}; people read 3 to 5")
    if not 0 <= recover < np.inf:
        raise SettingsError(f"{recover} USD to recover", key="recover", hint="finite and ≥ 0")
    kappa = 1.0 if objective == "revenue" else _recovery_price(law, technology, tiers, recover)
    found = _quantise(law, technology, kappa, tiers)
    menu_tiers = _tiers(law, technology, *found)
    hull = _Hull.of(law, kappa, law.grid(FINE))
    bound = hull.unlimited(technology)
    if objective == "welfare" and kappa > 0:  # a dual bound: (1 − κ)·welfare + κ·profit, and profit ≥ recover
        bound = (bound - kappa * recover) / (1 - kappa)
    return Menu(
        menu_tiers,
        law,
        objective,
        certify(menu_tiers, law, technology.latency_price),
        bound,
        kappa,
        hull.ironed,
    )


# --- cut-offs and qualities -------------------------------------------------------------------------------------------


def weighted_virtual(law: TypeLaw, kappa: float, t: FloatArray) -> FloatArray:
    """E[φ_κ; θ ≥ t] = (1 − κ)·E[θ; θ ≥ t] + κ·t·S(t), same shape: the curve that is ironed, against S. [Z-IR]"""
    curve: FloatArray = (1 - kappa) * law.moment_above(t, 1) + kappa * t * law.moment_above(t, 0)
    return curve


@dataclass(frozen=True, slots=True)
class _Hull:
    """Corners of the concave hull of E[φ_κ; θ ≥ t] against S(t): the only places where a cut-off can be best."""

    law: TypeLaw
    kappa: float
    t: FloatArray
    """Corners, ascending, (H,); the last cell goes on to the top of the support."""
    mass: FloatArray
    """Of the cell from each corner to the next, (H,)."""
    slope: FloatArray
    """Ironed φ_κ of the cell, non-decreasing, (H,)."""
    bunched: IntArray
    """Grid cells that were pooled into each, (H,)."""

    @classmethod
    def of(cls, law: TypeLaw, kappa: float, grid: FloatArray) -> _Hull:
        ends = np.append(law.moment_above(grid, 0), 0.0)
        total = np.append(weighted_virtual(law, kappa, grid), 0.0)
        mass = -np.diff(ends)
        keep = mass > 0
        keep_grid, mass, part = grid[keep], mass[keep], -np.diff(total)[keep]
        pooled = isotonic_regression(part / mass, weights=mass)
        first = pooled.blocks[:-1].astype(np.int64)
        return cls(
            law,
            kappa,
            keep_grid[first],
            np.add.reduceat(mass, first),
            pooled.x[first],
            np.diff(pooled.blocks).astype(np.int64),
        )

    @property
    def ironed(self) -> tuple[tuple[float, float], ...]:
        """Bunched ranges that hold more types than round-off in a tail does."""
        top = np.append(self.t[1:], self.law.support[1])
        pooled = (self.bunched > 1) & (self.mass > 1e-6) & (self.kappa > 0)
        return tuple((float(self.t[h]), float(top[h])) for h in np.flatnonzero(pooled))

    def unlimited(self, technology: Technology) -> float:
        """E[max_q φ̄_κ·q − c(q)] from above, USD per request: the best menu without a cap.

        Exact for atoms. Within a cell of a continuous law the integrand is convex in φ̄, which lies between the means of
        the neighbouring cells, so the chord over that range is above it (Edmundson 1956, Madansky 1959).
        """

        def worth(value: FloatArray) -> FloatArray:
            q = technology.best(value)
            return value * q - technology.cost_of(q)

        if self.law.atoms is not None:
            return float(self.mass @ worth(self.slope))
        top = self.law.support[1]
        mass, slope, bunched = self.mass, self.slope, self.bunched > 1
        corners, tail = np.append(self.t, top), 0.0
        if np.isinf(top):
            mass, slope, bunched, corners = mass[:-1], slope[:-1], bunched[:-1], self.t
            tail = technology.most_above(self.law, float(self.t[-1]))
        ends = virtual_value(self.law, self.kappa, corners)
        low, high = np.minimum(ends[:-1], slope), np.maximum(ends[1:], slope)
        flat = bunched | (high <= low)
        share = np.where(flat, 0.0, (slope - low) / np.where(flat, 1.0, high - low))
        chord = (1 - share) * worth(low) + share * worth(high)
        return float(mass @ np.where(flat, worth(slope), chord)) + tail


def virtual_value(law: TypeLaw, kappa: float, t: FloatArray) -> FloatArray:
    """φ_κ(t) = t − κ·(1 − F)/f of a continuous law, same shape; −∞ where f is 0. [Z-IR]"""
    with np.errstate(divide="ignore", invalid="ignore"):
        hazard = law.moment_above(t, 0) / law.density(t)
    value: FloatArray = t - kappa * hazard if kappa else t
    return value


def _quantise(
    law: TypeLaw, technology: Technology, kappa: float, tiers: int
) -> tuple[FloatArray, FloatArray]:
    """Cut-offs and qualities of the best menu at weight κ, ascending, (K,) each, K ≤ `tiers`."""
    steps = technology.upgrades()
    hull = _Hull.of(law, kappa, law.grid(CANDIDATES if steps is None else FINE))
    corners = hull.t
    if steps is not None:  # an upgrade is sold from where φ_κ first exceeds what it costs
        first = np.unique(np.searchsorted(hull.slope, steps, side="right"))
        corners = corners[first[first < corners.size]]
    thinned = corners
    if corners.size > CANDIDATES:
        thinned = corners[np.linspace(0, corners.size - 1, CANDIDATES).astype(np.int64)]
    t = _best_cutoffs(law, technology, kappa, thinned, tiers)
    if thinned.size < corners.size:
        t = _shift(law, technology, kappa, t, corners)
    if law.atoms is None:
        t = _polish(law, technology, kappa, t)
    return _served(t, _qualities(law, technology, kappa, t))


def _bins(law: TypeLaw, kappa: float, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(mass, E[φ_κ]) of low ≤ θ < high, broadcast; `high` may be ∞."""

    def both(t: FloatArray) -> tuple[FloatArray, FloatArray]:
        there = np.isfinite(t)
        at = np.where(there, t, 0.0)
        return (
            np.where(there, law.moment_above(at, 0), 0.0),
            np.where(there, weighted_virtual(law, kappa, at), 0.0),
        )

    (s0, r0), (s1, r1) = both(low), both(high)
    return s0 - s1, r0 - r1


def _worth(technology: Technology, mass: FloatArray, part: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(quality, USD) of the best tier for bins of this mass and E[φ_κ]; nothing for an empty bin."""
    filled = mass > 0
    quality = technology.best(np.where(filled, part, 0.0) / np.where(filled, mass, 1.0))
    quality = np.where(filled, quality, 0.0)
    worth: FloatArray = part * quality - mass * technology.cost_of(quality)
    return quality, worth


def _best_cutoffs(
    law: TypeLaw, technology: Technology, kappa: float, corners: FloatArray, tiers: int
) -> FloatArray:
    """The best cut-offs among `corners`, by dynamic programming from the top type down. O(tiers · G²)."""
    g = corners.size
    if not g:
        return corners
    ends = np.append(corners, np.inf)
    mass, part = _bins(law, kappa, corners[:, None], ends[None, :])
    _, worth = _worth(technology, np.triu(mass, 1), np.triu(part, 1))
    above = np.triu(np.ones((g, g + 1), dtype=np.bool_), 1)
    worth = np.where(above, worth, -np.inf)
    best = np.append(worth[:, g], 0.0)  # of all types from each corner on, in one tier
    chosen = np.full((min(tiers, g), g), g)
    for k in range(1, len(chosen)):
        split = worth + best
        chosen[k] = split.argmax(axis=1)
        best[:g] = split[np.arange(g), chosen[k]]
    at, path = int(best[:g].argmax()), []
    for k in reversed(range(len(chosen))):
        path.append(at)
        at = int(chosen[k][at])
        if at == g:
            break
    return corners[path]


def _shift(
    law: TypeLaw, technology: Technology, kappa: float, t: FloatArray, corners: FloatArray
) -> FloatArray:
    """Each cut-off in turn moved to its best corner between its neighbours, until none moves."""
    t = t.copy()
    while True:
        before = t.copy()
        for k in range(t.size):
            low, high = t[k - 1] if k else -np.inf, t[k + 1] if k + 1 < t.size else np.inf
            open_to = corners[(corners > low) & (corners < high)]
            worth = _worth(technology, *_bins(law, kappa, open_to, np.array(high)))[1]
            if k:
                worth = worth + _worth(technology, *_bins(law, kappa, np.array(low), open_to))[1]
            t[k] = open_to[worth.argmax()]
        if np.array_equal(t, before):
            return t


def _qualities(law: TypeLaw, technology: Technology, kappa: float, t: FloatArray) -> FloatArray:
    return _worth(technology, *_bins(law, kappa, t, np.append(t[1:], np.inf)))[0]


def _value(law: TypeLaw, technology: Technology, kappa: float, t: FloatArray) -> float:
    return float(_worth(technology, *_bins(law, kappa, t, np.append(t[1:], np.inf)))[1].sum())


def _served(t: FloatArray, quality: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Without tiers that give nothing, or no more than the one below."""
    more = np.diff(quality, prepend=0.0) > 1e-12 * max(1.0, float(quality.max(initial=0.0)))
    return t[more], quality[more]


def _polish(law: TypeLaw, technology: Technology, kappa: float, t: FloatArray) -> FloatArray:
    """Cut-offs off the grid, where φ_κ(t_k)·(q_k − q_{k−1}) = c(q_k) − c(q_{k−1}); unchanged where that fails."""
    t = _served(t, _qualities(law, technology, kappa, t))[0]
    scale = float(law.moment_above(np.zeros(()), 1))
    free = t > law.support[0]  # where all are served the first cut-off is the least type

    def whole(x: FloatArray) -> FloatArray:
        out = t.copy()
        out[free] = x * scale
        return out

    def residual(x: FloatArray) -> FloatArray:
        at = whole(x)
        q = np.append(0.0, _qualities(law, technology, kappa, at))
        step = np.diff(technology.cost_of(q))
        left: FloatArray = (virtual_value(law, kappa, at) * np.diff(q) - step)[free] / scale
        return left

    if not free.any():
        return t
    with np.errstate(all="ignore"):
        found = whole(root(residual, t[free] / scale, tol=1e-15).x)
    inside = bool(np.isfinite(found).all() and found[0] >= law.support[0] and (np.diff(found) > 0).all())
    if inside and _value(law, technology, kappa, found) >= _value(law, technology, kappa, t):
        return found
    return t


def _recovery_price(law: TypeLaw, technology: Technology, tiers: int, recover: float) -> float:
    """Least κ at which the best menu makes at least `recover` of profit: [0, 1]."""

    def missing(kappa: float) -> float:
        found = _tiers(law, technology, *_quantise(law, technology, kappa, tiers))
        return recover - certify(found, law, technology.latency_price).profit

    slack = 1e-12 * max(recover, float(law.moment_above(np.zeros(()), 1)))
    if missing(0.0) <= slack:
        return 0.0
    if missing(1.0) > slack:
        most = recover - missing(1.0)
        raise InfeasibleError(
            f"cost recovery: no menu of {tiers} tiers makes {recover:g} USD per request; the most is {most:.6g}",
            constraint="cost recovery",
            bound=recover,
            least=most,
        )
    kappa, step = float(brentq(missing, 0.0, 1.0, xtol=1e-13)), 1e-12
    while missing(kappa) > slack:  # profit jumps where types or offerings are few: the side that recovers
        kappa, step = min(kappa + step, 1.0), 2 * step
    return kappa


# --- from cut-offs to tiers, and what holds of them -----------------------------------------------------------------


def _tiers(law: TypeLaw, technology: Technology, t: FloatArray, quality: FloatArray) -> tuple[Tier, ...]:
    """Priced so that each cut-off type is indifferent, and the least one served pays all it has."""
    full = np.cumsum(t * np.diff(quality, prepend=0.0))
    top = [*t[1:], law.support[1]]
    if law.atoms is not None:
        top = [*(_below(law.atoms, float(high)) for high in t[1:]), law.support[1]]
    out = []
    for k, q in enumerate(quality):
        name, seconds = technology.at(float(q))
        delay = technology.latency_price * seconds
        tier = Tier(
            name=name or f"tier {k + 1}",
            quality=float(q),
            price=float(full[k]) - delay,
            type_from=float(t[k]),
            type_to=float(top[k]),
            seconds=seconds,
            cost=float(technology.cost_of(np.array(q))) - delay,
        )
        out.append(taken(tier, law, technology.latency_price))
    return tuple(out)


def part_of(law: TypeLaw, low: float, high: float, power: int) -> float:
    """E[θ^power] over low ≤ θ ≤ high, closed: it matters for atoms."""
    top = np.nextafter(high, np.inf) if law.atoms is not None else high
    above = float(law.moment_above(np.array(top), power)) if np.isfinite(top) else 0.0
    return float(law.moment_above(np.array(low), power)) - above


def taken(tier: Tier, law: TypeLaw, latency_price: float) -> Tier:
    """The tier with its share of requests, and the mean rent of those who take it."""
    share, worth = (part_of(law, tier.type_from, tier.type_to, power) for power in (0, 1))
    full = tier.price + latency_price * tier.seconds
    rent = tier.quality * worth / share - full if share > 0 else float("nan")
    return replace(tier, share=share, rent=rent)


def certify(tiers: Sequence[Tier], law: TypeLaw, latency_price: float = 0.0) -> Certificate:
    """Every IC and IR constraint of a menu, and what it brings: from its tiers and their ranges of types alone.

    θ·q − p is linear in θ, so a range is checked whole by checking its two ends, closed.
    """
    q = np.array([0.0, *(tier.quality for tier in tiers)])  # the first is taking nothing
    full = np.array([0.0, *(tier.price + latency_price * tier.seconds for tier in tiers)])
    ic, ir = 0.0, 0.0
    for k, theta in _ends(tiers, law):
        if np.isinf(theta):  # a steeper line overtakes in the end
            ic = max(ic, np.inf if q.max() > q[k] else 0.0)
            continue
        utility = theta * q - full
        ic = max(ic, float(utility[1:].max()) - float(utility[k])) if k else max(ic, float(utility.max()))
        ir = max(ir, -float(utility[k]))
    tiers = [taken(tier, law, latency_price) for tier in tiers]
    filled = [tier for tier in tiers if tier.share > 0]
    rent = sum(tier.share * tier.rent for tier in filled)
    revenue = sum(tier.share * tier.price for tier in filled)
    profit = revenue - sum(tier.share * tier.cost for tier in filled)
    return Certificate(ic, ir, rent, revenue, profit, rent + profit)


def _ends(tiers: Sequence[Tier], law: TypeLaw) -> list[tuple[int, float]]:
    """(line, θ) at the ends of every range of types: line 0 is taking nothing, line k tier k.

    What an unserved range could gain rises with θ, so only its upper end counts.
    """
    ends: list[tuple[int, float]] = []
    served_to = law.support[0] if law.atoms is None else -np.inf
    for k, tier in enumerate(tiers, start=1):
        unserved = tier.type_from if law.atoms is None else _below(law.atoms, tier.type_from)
        if unserved > served_to:
            ends.append((0, unserved))
        ends += [(k, tier.type_from), (k, tier.type_to)]
        served_to = tier.type_to
    if law.support[1] > served_to:
        ends.append((0, law.support[1]))
    return ends


def _below(atoms: FloatArray, t: float) -> float:
    """The greatest atom below t; −∞ where there is none."""
    i = int(np.searchsorted(atoms, t, side="left"))
    return float(atoms[i - 1]) if i else -np.inf
