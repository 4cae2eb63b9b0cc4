"""The one rule, in one place. [Z-1]

    spend next on  argmax_i [ V·ΔQ_i − π_C·ΔC_i − π_L·ΔL_i − π_R·ΔR_i ]

Every layer offers uses in physical amounts; this module prices them and chooses. Price discovery (`market.shadow`)
and the live decision call the same functions, so they cannot drift apart. Shapes: N tasks, I uses; one live
request is N = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from walras.errors import QuantityError
from walras.prices import Constraint, Layer, Numeraire, Prices
from walras.quantities import USD, IntArray, Tasks, Uses
from walras.risk import FloatArray

DEFER = -1
"""The use that is no use: spend nothing, get nothing (defer, or ask)."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What a constraint's price is levied on: `per_use` (M, I) for the M tasks in scope."""

    per_use: FloatArray
    tasks: IntArray | None
    """Rows in scope, (M,); None when all N are."""
    offset: float = 0.0
    """What was taken off every `per_use` (an SLA's bound): round-off is as large as before it was."""

    @classmethod
    def of(cls, constraint: Constraint, tasks: Tasks, uses: Uses) -> Charge:
        members = constraint.scope.members(tasks)
        rows = None if members is None else np.flatnonzero(members)
        if rows is not None:
            tasks, uses = tasks.take(rows), uses.take(rows)
        per_use = constraint.charge(uses)
        # What is not allowed may be unknown (NaN); nobody pays for it.
        per_use = per_use if uses.allowed.all() else np.where(uses.allowed, per_use, 0.0)
        return cls(per_use, rows, constraint.bound if constraint.layer == "latency" else 0.0)


def surplus(
    tasks: Tasks,
    uses: Uses,
    declared: Sequence[tuple[str, float]] = ((USD, 1.0),),
    numeraire: Numeraire = "usd",
) -> FloatArray:
    """V·ΔQ − ΔC − λ₀·ΔL − ρ₀·ΔR − ρ_irr·ΔR_irr in USD at declared prices alone, (N, I); −∞ where not allowed.

    In the paper's pure form (`numeraire="compute"`) nothing is declared and this is V·ΔQ [Z-3].
    """
    worth = tasks.value[:, None] * uses.quality
    if numeraire == "usd":
        for resource, price in declared:
            if price:
                worth = worth - price * uses.amount(resource)
        # A column nobody filled is a broadcast zero (zero strides): skip the pass over it.
        for price_of, amount in (
            (tasks.latency_price, uses.seconds),
            (tasks.risk_price, uses.risk),
            (tasks.irreversible_price, uses.irreversible_risk),
        ):
            empty = amount.strides == (0, 0) and not amount[:1, :1].any()
            if not empty and price_of.any():
                worth = worth - price_of[:, None] * amount
    return np.where(uses.allowed, worth, -np.inf)


def after_charges(
    worth: FloatArray, charges: Sequence[Charge], multipliers: Sequence[float] | FloatArray
) -> FloatArray:
    """`worth` − Σ_k μ_k · charge_k, (N, I): what is left once each constraint has been paid."""
    left = worth.copy()
    for charge, mu in zip(charges, multipliers, strict=True):
        if not mu:
            continue
        if charge.tasks is None:
            left -= mu * charge.per_use
        else:
            left[charge.tasks] -= mu * charge.per_use
    return left


def net_value(tasks: Tasks, uses: Uses, prices: Prices) -> FloatArray:
    """[Z-1] V·ΔQ − π_C·ΔC − π_L·ΔL − π_R·ΔR, (N, I), in units of account; −∞ where not allowed [Z-LEX]."""
    worth = surplus(tasks, uses, prices.declared, prices.numeraire)
    charges = [Charge.of(p.constraint, tasks, uses) for p in prices.discovered]
    priced: FloatArray = after_charges(worth, charges, [p.multiplier for p in prices.discovered])
    return priced / prices.unit


@dataclass(frozen=True, slots=True)
class Terms:
    """The four terms of [Z-1] for each use, (N, I), in USD: net value = value − compute − latency − risk."""

    value: FloatArray
    """V·ΔQ."""
    compute: FloatArray
    """π_C·ΔC, with every other resource at its price."""
    latency: FloatArray
    """π_L·ΔL: own delay at λ₀, and what SLAs charge."""
    risk: FloatArray
    """π_R·ΔR and ρ_irr·ΔR_irr."""


def terms(tasks: Tasks, uses: Uses, prices: Prices) -> Terms:
    """[Z-1] taken apart: what each use is worth and what it pays under each price. Same sum as `net_value`."""
    own: dict[Layer, FloatArray] = {
        "compute": np.zeros(uses.shape),
        "latency": np.zeros(uses.shape),
        "risk": np.zeros(uses.shape),
    }
    if prices.numeraire == "usd":
        for resource, usd in prices.declared:
            own["compute"] = own["compute"] + usd * uses.amount(resource)
        own["latency"] = tasks.latency_price[:, None] * uses.seconds
        own["risk"] = tasks.risk_price[:, None] * uses.risk
        own["risk"] = own["risk"] + tasks.irreversible_price[:, None] * uses.irreversible_risk
    for price in prices.discovered:
        charge, layer = Charge.of(price.constraint, tasks, uses), price.constraint.layer
        own[layer] = -after_charges(-own[layer], [charge], [price.multiplier])
    return Terms(tasks.value[:, None] * uses.quality, own["compute"], own["latency"], own["risk"])


@dataclass(frozen=True, slots=True)
class Choice:
    """What the rule picked."""

    use: IntArray
    """Column of the chosen use, `DEFER` where none is worth its price, (N,)."""
    value: FloatArray
    """Net value of the choice, (N,); 0 where deferred."""


TIE = 1e-9
"""Values that differ by less than this share of what is compared are tied, when ties are broken at random."""
ROUND_OFF = 1e-12
"""Below this share of the largest term in a sum, a number is round-off."""


def choose(values: FloatArray, *, defer: bool = True, rng: np.random.Generator | None = None) -> Choice:
    """argmax_i of net values (N, I). With `defer`, a task whose best use is not worth more than 0 gets none.

    Ties go to the first use, deferring before any, or to a random one of the tied when `rng` is given: at a binding
    constraint the market clears only in the mixture, so a live engine must randomise ties [Z-W1].

    Raises:
        QuantityError: a task has no allowed use and may not defer.
    """
    use = np.argmax(values, axis=1) if rng is None else _random_best(values, defer, rng)
    value = np.where(use == DEFER, 0.0, np.take_along_axis(values, np.maximum(use, 0)[:, None], axis=1)[:, 0])
    if defer:
        stop = ~(value > 0) if rng is None else use == DEFER
        return Choice(np.where(stop, DEFER, use), np.where(stop, 0.0, value))
    stuck = np.flatnonzero(~np.isfinite(value))
    if stuck.size:
        raise QuantityError(f"task {stuck[0]} has no allowed use and may not defer ({stuck.size} such tasks)")
    return Choice(use, value)


def _random_best(values: FloatArray, defer: bool, rng: np.random.Generator) -> IntArray:
    """A use within `TIE` of the best, drawn evenly, (N,); deferring is one of the uses where it is open.

    The width of a tie is measured on the smallest value in the row that is not itself round-off: one absurd use, −10⁹,
    must not make the others look alike.
    """
    open_to = np.column_stack((values, np.zeros(len(values)))) if defer else values
    size = np.where(np.isfinite(open_to), np.abs(open_to), 0.0)
    real = size > ROUND_OFF * size.max(axis=1, keepdims=True)
    width = TIE * np.where(real, size, np.inf).min(axis=1, keepdims=True)
    tied = open_to >= open_to.max(axis=1, keepdims=True) - np.where(np.isfinite(width), width, 0.0)
    drawn = np.argmax(np.where(tied, rng.random(open_to.shape), -1.0), axis=1)
    return np.where(drawn == values.shape[1], DEFER, drawn)


def marginal_values(totals: FloatArray) -> FloatArray:
    """Net value of each next step on the concave envelope of a chain of whole plans, (N, n).

    `totals` (N, n) is the net value of doing steps 1…k (doing none is worth 0). On a concave chain these are plain
    differences. Elsewhere a step that pays only together with later ones is pooled with them (pool adjacent
    violators), so that a marginal rule neither stops short of a far better plan nor goes past the best one.
    """
    n_tasks, n = totals.shape
    out = np.empty((n_tasks, n))
    for row, total in enumerate(totals):
        # Upper hull of the points (0, 0), (1, total_1), …: keep a stack of hull corners.
        points = np.concatenate(([0.0], total))
        corners = [0]
        for k in range(1, n + 1):
            if not np.isfinite(points[k]):
                continue
            while len(corners) > 1 and _slope(points, corners[-1], k) >= _slope(
                points, corners[-2], corners[-1]
            ):
                corners.pop()
            corners.append(k)
        slopes = np.full(n, -np.inf)
        for a, b in pairwise(corners):
            slopes[a:b] = _slope(points, a, b)
        out[row] = slopes
    return out


def _slope(points: FloatArray, a: int, b: int) -> float:
    return float((points[b] - points[a]) / (b - a))


def choose_increments(totals: FloatArray) -> IntArray:
    """How many steps of a chain to buy, (N,): go on while the next step's marginal value is positive. [Z-2]

    Equals the best whole plan, argmax over k = 0…n of its net value, also on chains that are not concave.
    """
    steps: IntArray = (marginal_values(totals) > 0).sum(axis=1)
    return steps


def equimarginal_residual(values: FloatArray, shares: FloatArray, *, defer: bool = True) -> FloatArray:
    """[Z-2] violation of the first-order conditions, (N,) in units of account; 0 at an optimum.

    `values` (N, I) are net values at prices and `shares` (N, I) how much of each use is given, 0 ≤ Σ_i ≤ 1. The
    residual is what the task loses against its best response: the value of the best use (or of deferring) minus
    the value got. It is 0 exactly when every use with a share has the highest value and every use without one has less.
    """
    best = choose(values, defer=defer).value
    got = np.where(shares > 0, shares * np.where(shares > 0, values, 0.0), 0.0).sum(axis=1)
    if not defer and not np.allclose(shares.sum(axis=1), 1.0):
        raise QuantityError("shares must sum to 1 where a task may not defer")
    residual: FloatArray = best - got
    return residual


def cobb_douglas(alpha: FloatArray, full_price: FloatArray, budget: float) -> FloatArray:
    """[Z-CD] tokens t_i = (α_i/Σα)·B/p_i that maximise A·Π t_i^α_i subject to Σ p_i·t_i ≤ B, (I,).

    `full_price` p_i = ΔC_i + λ·ΔL_i + ρ·ΔR_i in USD per token. A use with α_i = 0 gets none at any price; one with
    α_i > 0 is a complement of the rest and is never cut to zero.
    """
    if (alpha < 0).any() or not alpha.any():
        raise QuantityError("Cobb–Douglas exponents must be ≥ 0 and not all 0")
    if not (full_price > 0).all() or budget < 0:
        raise QuantityError("Cobb–Douglas needs full prices > 0 and a budget ≥ 0")
    tokens: FloatArray = alpha / alpha.sum() * budget / full_price
    return tokens
