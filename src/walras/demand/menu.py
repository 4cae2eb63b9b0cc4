"""The menu: tiers among which users tell, by choosing, what their requests are worth. [Z-5] [Z-IR]

A tier is a quality and a price. A user of type θ takes the tier with the greatest θ·q − p, or nothing. A menu is a stack of
upgrades: whoever is at or above the cut-off t_k pays t_k per unit for the quality q_k − q_{k−1}, so that p_k = p_{k−1} +
t_k·(q_k − q_{k−1}), no user gains by posing as another, and the lowest type served pays all it has. What is left to
choose is cut-offs and qualities. Tier k is worth to the operator

    A_k·q_k − m_k·c(q_k),   A_k = ∫ φ_κ dF over its users,   m_k their mass,   φ_κ(θ) = θ − κ·(1 − F)/f,

with κ = 1 for profit (Myerson's virtual value) and κ = μ/(1 + μ) for welfare with a cost-recovery row of multiplier μ
(Ramsey and Boiteux). So the best menu of N tiers is the best N-level quantiser of φ_κ: `demand.quantise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from walras.demand.offerings import Technology
from walras.demand.quantise import FINE, Curve, Cuts, quantise, unlimited
from walras.errors import InfeasibleError, SettingsError
from walras.estimate.type_laws import TypeLaw, check_scale
from walras.quantities import IntArray
from walras.risk import FloatArray

Objective = Literal["welfare", "revenue"]
MOST_TIERS = 100
NOBODY = 1e-12
"""A share that is round-off."""


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


def value_of(objective: Objective, certificate: Certificate) -> float:
    """What is to be made as large as possible, USD per request."""
    return certificate.profit if objective == "revenue" else certificate.welfare


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
        return value_of(self.objective, self.certificate)

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
        SettingsError: a number of tiers or of dollars that makes no sense, or types of no sensible size.
    """
    if not 1 <= tiers <= MOST_TIERS:
        raise SettingsError(f"{tiers} tiers", key="tiers", hint=f"from 1 to {MOST_TIERS}; people read 3 to 5")
    if not 0 <= recover < np.inf:
        raise SettingsError(f"{recover} USD to recover", key="recover", hint="finite and ≥ 0")
    check_scale(law)
    curve = Curve.of(law, law.grid() if technology.upgrades() is None else law.grid(FINE))
    if objective == "revenue":
        kappa, found = 1.0, quantise(curve, technology, 1.0, tiers)
    else:
        kappa, found = _recovering(curve, technology, tiers, recover)
    menu_tiers = _tiers(law, technology, *found)
    certificate = certify(menu_tiers, law, technology.latency_price)
    fine = Curve.of(law, law.grid(FINE))
    bound = _most(fine, technology, objective, kappa, recover)
    return Menu(
        menu_tiers,
        law,
        objective,
        certificate,
        max(bound, value_of(objective, certificate)),  # they may be equal but for round-off
        kappa,
        fine.ironed(kappa) if kappa else (),
    )


# --- cost recovery ----------------------------------------------------------------------------------------------------


def _brings(
    law: TypeLaw, technology: Technology, t: FloatArray, quality: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(welfare, profit) of upgrades to each quality, sold from t on, USD per request; broadcast, qualities last."""
    served, worth = law.moment_above(t, 0), law.moment_above(t, 1)
    more = np.diff(quality, prepend=0.0)
    cost = np.diff(technology.cost_of(quality), prepend=0.0) * served
    return more * worth - cost, more * t * served - cost


def _recovering(curve: Curve, technology: Technology, tiers: int, recover: float) -> tuple[float, Cuts]:
    """κ, and cut-offs and qualities of the menu with most welfare whose profit is at least `recover`.

    Where types or offerings are few, profit jumps past `recover` at κ. Then the menus on both sides of the jump are moved to
    less profit, or more, and fewer tiers are tried too: more tiers must not be worse.
    """

    def brings(found: Cuts) -> tuple[float, float]:
        welfare, profit = _brings(curve.law, technology, *found)
        return float(welfare.sum()), float(profit.sum())

    def best(kappa: float) -> Cuts:
        return quantise(curve, technology, kappa, tiers)

    low = best(0.0)
    slack = 1e-12 * max(recover, brings(low)[0])
    if brings(low)[1] >= recover - slack:
        return 0.0, low
    high = best(1.0)
    most = brings(high)[1]
    if most < recover - slack:
        raise InfeasibleError(
            f"cost recovery: no menu of {tiers} tiers makes {recover:g} USD per request; the most is {most:.6g}",
            constraint="cost recovery",
            bound=recover,
            least=most,
        )
    if most <= recover + slack:
        return 1.0, high
    if curve.law.atoms is None or technology.upgrades() is None:  # profit moves with κ, mostly without a jump
        kappa = float(brentq(lambda weight: recover - brings(best(weight))[1], 0.0, 1.0, xtol=1e-14))
        found = best(kappa)
        if abs(brings(found)[1] - recover) <= slack:
            return kappa, found
    kappa, low, high = _sides(best, brings, low, high, recover - slack)
    others = [_settled(curve.law, technology, side, recover, slack) for side in (low, high)]
    if tiers > 1:
        with suppress(InfeasibleError):
            others.append(_recovering(curve, technology, tiers - 1, recover)[1])
    able = [high, *(other for other in others if brings(other)[1] >= recover - slack)]
    return kappa, max(able, key=brings)


def _sides(
    best: Callable[[float], Cuts],
    brings: Callable[[Cuts], tuple[float, float]],
    low: Cuts,
    high: Cuts,
    recover: float,
) -> tuple[float, Cuts, Cuts]:
    """κ at which profit jumps past `recover`, and the menus below and above the jump: where both are worth the same, and none more."""
    while True:
        (w0, p0), (w1, p1) = brings(low), brings(high)
        mu = max(w0 - w1, 0.0) / (p1 - p0)
        kappa = mu / (1 + mu)
        found = best(kappa)
        welfare, profit = brings(found)
        if welfare + mu * profit <= (w1 + mu * p1) * (1 + 1e-12):
            return kappa, low, high
        low, high = (low, found) if profit >= recover else (found, high)


def _settled(law: TypeLaw, technology: Technology, found: Cuts, recover: float, slack: float) -> Cuts:
    """Each cut-off in turn moved to where welfare is greatest with profit ≥ `recover`, or else profit; until none moves."""
    t, quality = found
    grid = np.union1d(law.grid(), t)
    welfare, profit = _brings(law, technology, grid[:, None], quality)  # (G, K)
    at, best = np.searchsorted(grid, t), -np.inf
    while True:
        before = best
        for k in range(t.size):
            low, high = at[k - 1] + 1 if k else 0, at[k + 1] if k + 1 < t.size else grid.size
            rest = np.delete(np.arange(t.size), k)
            w, p = (table[low:high, k] + table[at[rest], rest].sum() for table in (welfare, profit))
            score = np.where(p >= recover, w, p - recover)  # what recovers has welfare ≥ 0
            if score.max() > best + slack:
                at[k], best = low + int(score.argmax()), float(score.max())
        if best == before:
            return grid[at], quality


def _most(curve: Curve, technology: Technology, objective: Objective, kappa: float, recover: float) -> float:
    """Profit or welfare that no menu exceeds, of whatever size, USD per request.

    Under cost recovery any weight κ < 1 gives a bound of welfare, (best weighted sum − κ·`recover`)/(1 − κ). It is least at the
    weight of a menu without a cap, which is that of the capped one where the cap does not bind.
    """
    if objective == "revenue" or not kappa:
        return unlimited(curve, technology, kappa)
    rough = Curve.of(curve.law, curve.law.grid())

    def dual(weight: float, curve: Curve = rough) -> float:
        return (unlimited(curve, technology, weight) - weight * recover) / (1 - weight)

    least = float(minimize_scalar(dual, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-4}).x)
    return min(dual(weight, curve) for weight in (least, kappa) if weight < 1)


# --- from cut-offs to tiers, and what holds of them -----------------------------------------------------------------


def _tiers(law: TypeLaw, technology: Technology, t: FloatArray, quality: FloatArray) -> tuple[Tier, ...]:
    """Priced so that each cut-off type is indifferent, and the least one served pays all it has."""
    full = np.cumsum(t * np.diff(quality, prepend=0.0))
    inner = t[1:] if law.atoms is None else law.atoms[np.searchsorted(law.atoms, t[1:]) - 1]
    top = np.append(inner, law.support[1])
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


def end_of(tier: Tier, law: TypeLaw) -> float:
    """Where its half-open range of types ends: ranges of atoms are closed."""
    return tier.type_to if law.atoms is None else float(np.nextafter(tier.type_to, np.inf))


def between(law: TypeLaw, low: float, high: float, power: int) -> float:
    """E[θ^power; low ≤ θ < high]; `high` may be ∞."""
    above = float(law.moment_above(np.array(high), power)) if np.isfinite(high) else 0.0
    return float(law.moment_above(np.array(low), power)) - above


def taken(tier: Tier, law: TypeLaw, latency_price: float) -> Tier:
    """The tier with its share of requests, and the mean rent of those who take it; NaN where it is nobody's but for round-off."""
    share, worth = (between(law, tier.type_from, end_of(tier, law), power) for power in (0, 1))
    full = tier.price + latency_price * tier.seconds
    rent = tier.quality * worth / share - full if share > NOBODY else float("nan")
    return replace(tier, share=share, rent=rent)


def certify(tiers: Sequence[Tier], law: TypeLaw, latency_price: float = 0.0) -> Certificate:
    """Every IC and IR constraint of a menu, and what it brings: from its tiers and their ranges of types alone.

    θ·q − p is linear in θ, so a range is checked whole by checking its two ends, closed.
    """
    ranges = [(tier.type_from, tier.type_to) for tier in tiers]
    ends = [(0, theta) for theta in unserved(ranges, law.support, law.atoms)]
    ends += [(k, theta) for k, pair in enumerate(ranges, start=1) for theta in pair]
    own, theta = np.array(ends).reshape(-1, 2).T
    quality = np.array([tier.quality for tier in tiers])
    full = np.array([0.0, *(tier.price + latency_price * tier.seconds for tier in tiers)])
    gain = gains(quality, full, own.astype(np.int64), theta)
    parts = [between(law, t.type_from, end_of(t, law), power) for power in (0, 1) for t in tiers]
    share, worth = np.array(parts).reshape(2, -1)
    rent = float(quality @ worth - full[1:] @ share)
    revenue = float(np.array([tier.price for tier in tiers]) @ share)
    cost = np.where(share > 0, [tier.cost for tier in tiers], 0.0)
    profit = revenue - float(cost @ share)
    ic, ir = (max(float(part.max(initial=0.0)), 0.0) for part in (gain[:, 1:], gain[:, 0]))
    return Certificate(ic, ir, rent, revenue, profit, rent + profit)


def gains(quality: FloatArray, full: FloatArray, own: IntArray, theta: FloatArray) -> FloatArray:
    """What type p, meant for line own[p], gains by each line, USD, (P, K + 1): 0 is taking nothing, k tier k.

    Args:
        quality: of tiers, K.
        full: price and delay of lines, (K + 1,), or (P, K + 1) where types differ in what delay costs them.
        theta: (P,); at ∞ a steeper line gains without end.
    """
    q, rows = np.append(0.0, quality), np.arange(own.size)
    full = np.broadcast_to(full, (own.size, q.size))
    steeper, finite = q - q[own, None], np.isfinite(theta)[:, None]
    at_end = np.where(finite, theta[:, None], 0.0) * steeper
    without_end = np.where(steeper == 0, 0.0, np.copysign(np.inf, steeper))
    gain: FloatArray = np.where(finite, at_end, without_end) - (full - full[rows, own][:, None])
    return gain


def unserved(
    ranges: Sequence[tuple[float, float]], support: tuple[float, float], atoms: FloatArray | None
) -> list[float]:
    """The greatest type of every stretch that no range covers: what there is to gain rises with θ."""
    if atoms is not None:
        free = np.ones(atoms.size, dtype=np.bool_)
        for low, high in ranges:
            free &= (atoms < low) | (atoms > high)
        return [float(theta) for theta in atoms[free & ~np.append(free[1:], False)]]
    floor, top = support
    out = []
    for low, high in sorted(ranges):
        if low > floor:
            out.append(low)
        floor = max(floor, high)
    return [*out, top] if top > floor else out
