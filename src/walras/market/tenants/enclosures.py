"""Bounds that no rounding can break: intervals, and what a tenant demands anywhere in a box of prices. [Z-GE]

A box is given by log price ratios D_kj = ln(p_k/p_j): demand depends on nothing else. An operation is done in ordinary
arithmetic and its result moved outwards by more than its rounding error: IEEE 754 promises half a unit in the last
place, 2⁻⁵³, for + − × ÷, and 2⁻⁵² is taken; numpy's exp and log promise 4 units, and 32 are taken. Parameters count as
the exact numbers their doubles are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from walras.market.tenants.utility import CES, QuasiLinear
from walras.quantities import BoolArray
from walras.risk import FloatArray

UNIT = 2.0**-52
"""Twice the relative error of one operation."""
CURVED = 2.0**-47
"""Relative widening of exp and log: 32 units in the last place."""
TINY = 1e-300
"""More than what a product can lose below the smallest normal number."""
LARGEST = float(np.finfo(np.float64).max)
"""The largest double: a lower bound that overflowed is at least this."""
LONGEST, HALVINGS = 1024.0, 64
"""Where ln of the value of a short income is looked for, and how finely."""


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """An array of closed intervals, their ends infinite where nothing is known. A NaN end bounds nothing."""

    lo: FloatArray
    hi: FloatArray

    @classmethod
    def thin(cls, value: Any) -> Interval:
        value = np.asarray(value, dtype=np.float64)
        return cls(value, value)

    def __getitem__(self, at: Any) -> Interval:
        return Interval(self.lo[at], self.hi[at])

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __add__(self, other: Interval) -> Interval:
        return Interval(_lower(self.lo + other.lo), _upper(self.hi + other.hi))

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        zero = self._zero | other._zero
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            if self._positive and other._positive:
                low = np.fmax(_lower(self.lo * other.lo) - TINY, 0.0)
                return Interval(low, np.where(zero, 0.0, _upper(self.hi * other.hi) + TINY))
            ends = [a * b for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        # fmin passes over the NaN of 0 · ∞: another pair of ends gives the 0.
        low = np.fmin(np.fmin(ends[0], ends[1]), np.fmin(ends[2], ends[3]))
        high = np.fmax(np.fmax(ends[0], ends[1]), np.fmax(ends[2], ends[3]))
        return Interval(np.where(zero, 0.0, _lower(low) - TINY), np.where(zero, 0.0, _upper(high) + TINY))

    def over(self, other: Interval) -> Interval:
        """Quotient by a number > 0."""
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            low, high = 1 / other.hi, 1 / np.maximum(other.lo, 0.0)
        return self * Interval(np.maximum(_lower(low) - TINY, 0.0), _upper(high) + TINY)

    def sum(self, axis: int) -> Interval:
        """Rounding: less than n units of the sum of sizes, whatever the order of summation."""
        n, low, high = self.lo.shape[axis], self.lo.sum(axis), self.hi.sum(axis)
        if self._positive:
            return Interval(_lower(low, n * UNIT), _upper(high, n * UNIT))
        lost = [
            n * UNIT * size + TINY * (size > 0)
            for size in (np.abs(self.lo).sum(axis), np.abs(self.hi).sum(axis))
        ]
        return Interval(low - lost[0], high + lost[1])

    def exp(self) -> Interval:
        with np.errstate(over="ignore", under="ignore"):
            low, high = np.exp(self.lo), np.exp(self.hi)
            return Interval(np.maximum(_lower(low, CURVED) - TINY, 0.0), _upper(high, CURVED) + TINY)

    def log(self) -> Interval:
        """Of what is > 0 in it."""
        with np.errstate(divide="ignore"):
            low, high = np.log(np.maximum(self.lo, 0.0)), np.log(np.maximum(self.hi, TINY))
        return Interval(_lower(low, CURVED), _upper(high, CURVED))

    def clip(self, low: float, high: float) -> Interval:
        """The part within [low, high], where the number is known to be."""
        return Interval(np.clip(self.lo, low, high), np.clip(self.hi, low, high))

    @property
    def transposed(self) -> Interval:
        """Its last two axes swapped."""
        return Interval(np.swapaxes(self.lo, -1, -2), np.swapaxes(self.hi, -1, -2))

    def meet(self, other: Interval) -> Interval:
        """What is in both."""
        return Interval(np.maximum(self.lo, other.lo), np.minimum(self.hi, other.hi))

    def hull(self, other: Interval, where: Any) -> Interval:
        """Widened to hold `other` too, where told."""
        return Interval(
            np.where(where, np.minimum(self.lo, other.lo), self.lo),
            np.where(where, np.maximum(self.hi, other.hi), self.hi),
        )

    def where(self, told: Any, other: Interval) -> Interval:
        """This where told, else `other`."""
        return Interval(np.where(told, self.lo, other.lo), np.where(told, self.hi, other.hi))

    @property
    def _positive(self) -> bool:
        return bool((self.lo >= 0).all())

    @property
    def _zero(self) -> BoolArray:
        zero: BoolArray = (self.lo == 0) & (self.hi == 0)
        return zero


def _lower(x: FloatArray, by: float = UNIT) -> FloatArray:
    """Below x by 2 `by` of its size; 0 stays 0, since a sum computed as 0 is 0."""
    below: FloatArray = np.minimum(x * (1 - np.copysign(2 * by, x)), LARGEST)
    return below


def _upper(x: FloatArray, by: float = UNIT) -> FloatArray:
    above: FloatArray = np.maximum(x * (1 + np.copysign(2 * by, x)), -LARGEST)
    return above


@dataclass(frozen=True, slots=True, eq=False)
class Ratios:
    """Price ratios over N boxes: `log` is ln(p_k/p_j) and `ratio` p_k/p_j, both (N, G, G)."""

    log: Interval
    ratio: Interval

    def income(self, endowment: FloatArray) -> Interval:
        """Income in units of each good, (N, G)."""
        return (Interval.thin(endowment[:, None]) * self.ratio).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class Demanded:
    """What tenants demand together over N boxes."""

    amount: Interval
    """(N, G) units."""
    slopes: Callable[[], Interval]
    """∂ amount_j / ∂ ln p_i, endowment income included, (N, G, G)."""
    least_free: Interval
    """The least income left to one of them after subsistence, in units of some good, (N,): < 0 is no equilibrium."""


def demand_of_ces(tenants: Sequence[CES], endowments: FloatArray, at: Ratios) -> Demanded:
    """x_j = γ_j + Σ_k (w_k − γ_k) t_kj, where t_kj is what one unit of good k buys of j besides subsistence:

        t_kj = α_j (p_k/p_j)^σ / Σ_i α_i (p_i/p_k)^(1−σ) = s_j p_k/p_j,   s_j = α_j / Σ_i α_i (p_i/p_j)^(1−σ),

    the first for σ ≤ 1, the second for σ > 1: so that t rises in p_k/p_j through every place where it stands.
    ∂x_j/∂ln p_i = (w_i − γ_i) t_ij − (x_j − γ_j) (σ δ_ij + (1−σ) s_i). Endowments are (H, G).
    """
    n = endowments.shape[1]
    need = Interval.thin([t.subsistence + np.zeros(n) for t in tenants])
    left = Interval.thin(endowments) - need
    shares = Interval.thin([t.shares for t in tenants])
    elasticity = np.array([t.elasticity for t in tenants])
    sigma = Interval.thin(elasticity[:, None, None])
    rest = Interval.thin(1.0) - sigma
    log, ratio = at.log[:, None], at.ratio[:, None]
    unit = (shares[:, :, None] * (rest * log).exp()).sum(2)
    share = shares.over(unit).clip(0.0, 1.0)
    by_share = share[:, :, None] * ratio
    by_power = (shares[:, None] * (sigma * log).exp()).over(unit[..., None])
    paid = left[:, :, None] * by_share.where((elasticity > 1)[:, None, None], by_power)
    more = paid.sum(2)

    def slopes() -> Interval:
        own = Interval.thin(elasticity[:, None, None] * np.eye(n))
        return (paid.transposed - more[..., None] * (own + rest * share[:, :, None])).sum(1)

    free = (left[:, :, None] * ratio).sum(2)
    return Demanded(
        (need + more).sum(1), slopes, Interval(free.lo.min(axis=(1, 2)), free.hi.min(axis=(1, 2)))
    )


def demand_of_quasi_linear(tenant: QuasiLinear, endowment: FloatArray, at: Ratios) -> Demanded:
    """x_j = (e^v p_j/(p_m a_j))^(−η_j) with a_j = c_j e_j, η_j = 1/(1 − e_j), m the money; of m, what income is left.

    v = 0 while income suffices; else no money is kept and v > 0 spends it all.
    """
    m, j, n = tenant.money, [term.good for term in tenant.terms], endowment.size
    if not j:
        return demand_of_ces([CES(np.eye(n)[m], 1.0)], endowment[None], at)
    one, exponents = Interval.thin(1.0), Interval.thin([term.exponent for term in tenant.terms])
    eta, a = one.over(one - exponents), Interval.thin([term.coefficient for term in tenant.terms]) * exponents
    log_price, free = at.log[:, j, m], at.income(endowment)
    income = free[:, m]
    log_spent = (one - eta) * log_price + eta * a.log()
    v = _short_by(log_spent, eta, income)
    x = (-(eta * (v[:, None] + (log_price - a.log())))).exp()
    kept = (income - log_spent.exp().sum(1)).clip(0.0, np.inf)
    amount = _columns([(j, x), ([m], kept[:, None])], n)
    return Demanded(
        amount, lambda: _quasi_linear_slopes(tenant, endowment, at, (eta, v, x, log_spent)), income
    )


def _quasi_linear_slopes(
    tenant: QuasiLinear,
    endowment: FloatArray,
    at: Ratios,
    state: tuple[Interval, Interval, Interval, Interval],
) -> Interval:
    """∂x_j/∂ln p_i, (N, G, G), from η, v, x and the log of spending in money; at a kink all slopes between the two sides.

    With money kept, ∂v = 0. Without, ∂v/∂ln p_i = (b_i (1 − η_i) − θ_i) / Σ b_j η_j for budget shares b, income shares θ.
    """
    eta, v, x, log_spent = state
    m, j, n = tenant.money, [term.good for term in tenant.terms], endowment.size
    others = [i for i in range(n) if i != m]
    one, unsure, short = Interval.thin(1.0), (v.hi > 0)[:, None], (v.lo > 0)[:, None]
    free = at.income(endowment)
    theta = Interval.thin(endowment).over(free).clip(0.0, 1.0)
    spent = (log_spent - eta * v[:, None]).exp()
    b = spent.over(free[:, m, None]).clip(0.0, 1.0)
    pull = (b * eta).sum(1).clip(float(eta.lo.min()), float(eta.hi.max()))[:, None]
    dv = (_columns([(j, b * (one - eta))], n) - theta).over(pull)
    dv = dv.where(short, dv.hull(Interval.thin(0.0), unsure).where(unsure, Interval.thin(0.0)))
    own = Interval.thin(np.eye(n)[j])
    terms = -((eta * x)[:, :, None] * (own + dv[:, None, :]))
    left = Interval.thin(endowment) * at.ratio[:, :, m] - _columns([(j, spent * (one - eta))], n)
    money = left.hull(Interval.thin(0.0), unsure).where(~short, Interval.thin(0.0))
    rows = _columns([(j, terms.transposed), ([m], money[:, :, None])], n).transposed
    to_money = -rows[:, :, others].sum(2)
    return _columns([(others, rows[:, :, others]), ([m], to_money[:, :, None])], n)


def _short_by(log_spent: Interval, eta: Interval, income: Interval) -> Interval:
    """v ≥ 0 at which Σ_j spending_j e^(−η_j v) is the income, (N,); 0 where it is less at v = 0."""

    def spent(v: FloatArray) -> Interval:
        return (log_spent - eta * Interval.thin(v[:, None])).exp().sum(1)

    def last(holds: Any) -> tuple[FloatArray, FloatArray]:
        low, high = np.zeros(income.lo.shape), np.full(income.lo.shape, LONGEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            yes = holds(middle)
            low, high = np.where(yes, middle, low), np.where(yes, high, middle)
        return low, high

    start = np.zeros(income.lo.shape)
    may = spent(start).hi > income.lo
    if not may.all():
        low, high = start.copy(), start.copy()
        if may.any():
            short = _short_by(log_spent[may], eta, income[may])
            low[may], high[may] = short.lo, short.hi
        return Interval(low, high)
    low, _ = last(lambda v: spent(v).lo >= income.hi)
    _, high = last(lambda v: spent(v).hi > income.lo)
    high = np.where(spent(start + LONGEST).hi > income.lo, np.inf, high)
    return Interval(low, high)


def _columns(parts: list[tuple[list[int], Interval]], n: int) -> Interval:
    """Zeros (…, n) but for the given positions."""
    shape = (*parts[0][1].lo.shape[:-1], n)
    low, high = np.zeros(shape), np.zeros(shape)
    for at, part in parts:
        low[..., at], high[..., at] = part.lo, part.hi
    return Interval(low, high)
