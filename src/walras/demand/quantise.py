"""The best few cut-offs and qualities: a quantiser of the ironed virtual value. [Z-5] [Z-IR]

At weight κ of profit a menu without a cap is worth E[max_q φ̄_κ(θ)·q − c(q)], and N tiers do as well as N levels can stand for
φ̄_κ (Bergemann, Shen, Xu and Yeh 2012). Cut-offs can only be best at corners of the concave hull of the curve E[φ_κ; θ ≥ t]
against S(t), which is ironing; of a handful of offerings, only where φ̄_κ crosses what some upgrade costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression, root

from walras.demand.offerings import Technology
from walras.estimate.type_laws import TypeLaw
from walras.quantities import IntArray
from walras.risk import FloatArray

Cuts = tuple[FloatArray, FloatArray]
"""Cut-offs and qualities of tiers, ascending, (K,) each."""
FINE = 20_000
"""Cells in which φ is ironed to value a menu without a cap on its tiers, and to bracket where an upgrade pays."""


def weighted_virtual(law: TypeLaw, kappa: float, t: FloatArray) -> FloatArray:
    """E[φ_κ; θ ≥ t] = (1 − κ)·E[θ; θ ≥ t] + κ·t·S(t), same shape: the curve that is ironed, against S. [Z-IR]"""
    curve: FloatArray = (1 - kappa) * law.moment_above(t, 1) + kappa * t * law.moment_above(t, 0)
    return curve


@dataclass(frozen=True, slots=True)
class Curve:
    """What ironing needs of a law, whatever κ is: cells that hold types, ascending, the last on to the top of the support."""

    law: TypeLaw
    grid: FloatArray
    """Least type of each cell, (G,)."""
    served: FloatArray
    """S(t) there, (G,)."""
    worth: FloatArray
    """E[θ; θ ≥ t], (G,)."""

    @classmethod
    def of(cls, law: TypeLaw, grid: FloatArray) -> Curve:
        served = np.minimum.accumulate(law.moment_above(grid, 0))  # round-off in a tail may raise it
        filled = np.diff(served, append=0.0) < 0
        grid = grid[filled]
        return cls(law, grid, served[filled], law.moment_above(grid, 1))

    def cells(self, kappa: float) -> tuple[FloatArray, FloatArray]:
        """(mass, mean φ_κ) of each cell, (G,) and (G,)."""
        mass = -np.diff(self.served, append=0.0)
        total = (1 - kappa) * self.worth + kappa * self.grid * self.served
        return mass, -np.diff(total, append=0.0) / mass

    def hull(self, kappa: float) -> tuple[IntArray, FloatArray, FloatArray]:
        """Corners of the concave hull of E[φ_κ; θ ≥ t] against S(t): (cell at which each lies, mass from it on, ironed φ_κ), (H,)."""
        mass, mean = self.cells(kappa)
        pooled = isotonic_regression(mean, weights=mass)
        first = pooled.blocks[:-1].astype(np.int64)
        return first, np.add.reduceat(mass, first), pooled.x[first]

    def ironed(self, kappa: float) -> tuple[tuple[float, float], ...]:
        """Bunched ranges that hold more types than round-off in a tail does."""
        first, mass, _ = self.hull(kappa)
        ends = np.append(self.grid[first], self.law.support[1])
        pooled = (np.diff(first, append=self.grid.size) > 1) & (mass > 1e-6)
        return tuple((float(ends[h]), float(ends[h + 1])) for h in np.flatnonzero(pooled))


def virtual_value(law: TypeLaw, kappa: float, t: FloatArray) -> FloatArray:
    """φ_κ(t) = t − κ·(1 − F)/f of a continuous law, same shape; −∞ where f is 0. [Z-IR]"""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        hazard = law.moment_above(t, 0) / law.density(t)
    value: FloatArray = t - kappa * hazard if kappa else t
    return value


def quantise(curve: Curve, technology: Technology, kappa: float, tiers: int) -> Cuts:
    """Cut-offs and qualities of the best menu at weight κ, ascending, (K,) each, K ≤ `tiers`."""
    steps, law = technology.upgrades(), curve.law
    corners = curve.grid[curve.hull(kappa)[0]] if steps is None else _sold_from(curve, kappa, steps)
    corners = np.unique(corners[np.isfinite(corners)])
    t = _best_cutoffs(law, technology, kappa, corners, tiers)
    if steps is None and law.atoms is None:
        t = _polish(law, technology, kappa, t)
    t, quality = _served(t, _qualities(law, technology, kappa, t))
    if steps is not None:  # among hardly any types, sums do not tell one corner from another
        steps = np.diff(technology.cost_of(quality), prepend=0.0) / np.diff(quality, prepend=0.0)
        t = _sold_from(curve, kappa, steps)
        apart = t < np.append(t[1:], np.inf)
        t, quality = t[apart], quality[apart]
    return t, quality


def _sold_from(curve: Curve, kappa: float, steps: FloatArray) -> FloatArray:
    """The least type whose ironed φ_κ exceeds what an upgrade costs per unit, ∞ where there is none, (S,)."""
    law, grid = curve.law, curve.grid
    first, _, slope = curve.hull(kappa)
    at = np.append(first, grid.size)[np.searchsorted(slope, steps, side="right")]
    sold = at < grid.size
    if law.atoms is not None:
        cut: FloatArray = np.append(grid, np.inf)[at]
        return cut
    top = min(law.support[1], 2 * float(grid[-1]))
    edges, low, high = np.concatenate(([law.support[0]], grid, [top])), at, np.where(sold, at + 2, at + 1)
    for reach in 2 ** np.arange(10):  # in a thin tail round-off misplaces corners
        low = np.where(virtual_value(law, kappa, edges[low]) > steps, np.maximum(low - reach, 0), low)
        short = virtual_value(law, kappa, edges[high]) < steps
        high = np.where(short, np.minimum(high + reach, edges.size - 1), high)
    below, above = edges[low], edges[high]
    for _ in range(60):
        middle = (below + above) / 2
        short = virtual_value(law, kappa, middle) < steps
        below, above = np.where(short, middle, below), np.where(short, above, middle)
    return np.where(sold, above, np.inf)


def _bins(law: TypeLaw, kappa: float, t: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(mass, E[φ_κ]) from each cut-off to the next, (K,) each; the last goes on to the top."""
    return -np.diff(law.moment_above(t, 0), append=0.0), -np.diff(weighted_virtual(law, kappa, t), append=0.0)


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
    """The best cut-offs among `corners`, (G,), by dynamic programming from the top type down. O(tiers · G · log G)."""
    g = corners.size
    if not g:
        return corners
    above = np.append(law.moment_above(corners, 0), 0.0)
    total = np.append(weighted_virtual(law, kappa, corners), 0.0)
    rows, best = np.arange(g), np.zeros(g + 1)  # of all types from each corner on

    def with_next(at: IntArray, following: IntArray) -> FloatArray:
        one = _worth(technology, above[at] - above[following], total[at] - total[following])[1]
        value: FloatArray = one + best[following]
        return value

    chosen = [np.full(g, g)]
    best[:g] = with_next(rows, chosen[0])
    for _ in range(1, min(tiers, g)):
        chosen.append(_argmax_by_row(with_next, g))
        best[:g] = with_next(rows, chosen[-1])
    at, path = int(best[:g].argmax()), []
    while chosen and at < g:
        path.append(at)
        at = int(chosen.pop()[at])
    return corners[path]


def _argmax_by_row(value: Callable[[IntArray, IntArray], FloatArray], g: int) -> IntArray:
    """argmax over i < j ≤ g of value(i, j) for each i < g, (g,).

    A bin is worth the maximum of lines in its slopes, and slopes ascend, so the argmax does not fall with i (Monge; Wu 1991):
    rows halfway between known ones are searched between their argmaxes.
    """
    found = np.full(g + 1, g)
    step = 1 << g.bit_length()
    while step:
        rows = np.arange(step - 1, g, 2 * step)
        low = np.maximum(rows + 1, np.where(rows >= step, found[rows - step], 0))
        width = found[np.minimum(rows + step, g)] + 1 - low
        start = np.cumsum(width) - width
        at = np.repeat(rows, width)
        column = np.arange(at.size) + np.repeat(low - start, width)
        worth = value(at, column)
        if rows.size:
            peak = np.flatnonzero(worth == np.repeat(np.maximum.reduceat(worth, start), width))[::-1]
            found[at[peak]] = column[peak]
        step //= 2
    return found[:g]


def _qualities(law: TypeLaw, technology: Technology, kappa: float, t: FloatArray) -> FloatArray:
    return _worth(technology, *_bins(law, kappa, t))[0]


def _served(t: FloatArray, quality: FloatArray) -> Cuts:
    """Without tiers that give nothing, or no more than one below: as round-off has it where there are hardly any types."""
    below = np.maximum.accumulate(np.append(0.0, quality[:-1]))
    more = quality - below > 1e-12 * float(quality.max(initial=0.0))
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

    def worth(at: FloatArray) -> float:
        return float(_worth(technology, *_bins(law, kappa, at))[1].sum())

    if not free.any():
        return t
    with np.errstate(all="ignore"):
        found = whole(root(residual, t[free] / scale, tol=1e-15).x)
    inside = bool(np.isfinite(found).all() and found[0] >= law.support[0] and (np.diff(found) > 0).all())
    return found if inside and worth(found) >= worth(t) else t


def unlimited(curve: Curve, technology: Technology, kappa: float) -> float:
    """E[max_q φ̄_κ·q − c(q)] from above, USD per request: the best menu without a cap. Exact for atoms.

    Of a continuous law the curve lies below its tangents where φ rises through a cell, below the chord where it falls:
    that polygon is ironed, and what lies above the curve gives every menu more.
    """

    def worth(value: FloatArray) -> FloatArray:
        q = technology.best(value)
        return value * q - technology.cost_of(q)

    law, grid = curve.law, curve.grid
    mass, mean = curve.cells(kappa)
    outside = 0.0
    if law.atoms is None:
        top = law.support[1]
        outside = (1 - float(curve.served[0])) * float(worth(grid[0]))  # below the grid, where φ_κ(θ) ≤ θ
        if np.isinf(top):
            outside += technology.most_above(law, float(grid[-1]))
            mass, mean, grid, top = mass[:-1], mean[:-1], grid[:-1], grid[-1]
        ends = virtual_value(law, kappa, np.append(grid, top))
        rises = (ends[:-1] < mean) & (mean < ends[1:])
        share = np.where(rises, mean - ends[:-1], 0.5) / np.where(rises, np.diff(ends), 1.0)
        slopes = np.column_stack((ends[:-1], ends[1:]))
        mean = np.where(rises[:, None], slopes, mean[:, None]).ravel()
        mass = np.column_stack((mass * (1 - share), mass * share)).ravel()
        mass, mean = mass[mass > 0], mean[mass > 0]
    return float(mass @ worth(isotonic_regression(mean, weights=mass).x)) + outside
