"""What quality costs to make: the technology a menu is drawn from. [Z-5]

Tasks differ in what they are worth, not in what they cost, so a technology is one convex curve c(q) through the origin
(nothing costs nothing): q²/2, or the lower hull of what models, policies or reasoning efforts give and take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.optimize import isotonic_regression

from walras.errors import QuantityError
from walras.estimate.type_laws import TypeLaw
from walras.quantities import IntArray
from walras.risk import FloatArray

NOTHING = 1e-12
"""Quality that is none: what it costs per unit says nothing."""


class Technology(Protocol):
    """c(q): full cost in USD per request at quality q, delay at its declared price included."""

    @property
    def latency_price(self) -> float:
        """λ₀, what everybody's delay costs them, USD per second."""

    def best(self, value: FloatArray) -> FloatArray:
        """argmax_q value·q − c(q), the least such q; same shape."""

    def cost_of(self, quality: FloatArray) -> FloatArray:
        """c(q), same shape; ∞ where no mixture of what is there reaches q."""

    def upgrades(self) -> FloatArray | None:
        """Full cost per unit of quality of every step from one quality worth offering, or none, to another; None: any."""

    def most_above(self, law: TypeLaw, t: float) -> float:
        """An upper bound of E[max_q θ·q − c(q); θ ≥ t], USD per request."""

    def at(self, quality: float) -> tuple[str, float]:
        """What gives this quality ("" where it has no name), and its seconds."""


@dataclass(frozen=True, slots=True)
class Quadratic:
    """c(q) = q²/2, the textbook case (Mussa and Rosen 1978), whose menus are known in closed form."""

    latency_price: float = 0.0

    def best(self, value: FloatArray) -> FloatArray:
        return np.maximum(value, 0.0)

    def cost_of(self, quality: FloatArray) -> FloatArray:
        cost: FloatArray = np.square(quality) / 2
        return cost

    def upgrades(self) -> None:
        return None

    def most_above(self, law: TypeLaw, t: float) -> float:
        return float(law.moment_above(np.array(t), 2)) / 2

    def at(self, quality: float) -> tuple[str, float]:  # noqa: ARG002 - any quality can be made, at once
        return "", 0.0


@dataclass(frozen=True, slots=True)
class Offerings:
    """What is there: models, policies or efforts. Only those on the lower hull through the origin can be optimal."""

    names: tuple[str, ...]
    quality: FloatArray
    """Mean quality, in [0, 1], (I,)."""
    cost: FloatArray
    """What one request costs the operator at current prices, USD, ≥ 0, (I,)."""
    seconds: FloatArray = field(default_factory=lambda: np.zeros(1))
    """Mean seconds until the answer, (I,)."""
    latency_price: float = 0.0
    """λ₀, the price of delay that all users share, USD per second."""
    hull: IntArray = field(init=False)
    """Offerings on the hull, in ascending quality: the others are never worth offering."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", np.broadcast_to(self.seconds, (len(self.names),)))
        check_columns(self.names, quality=self.quality, cost=self.cost, seconds=self.seconds)
        if self.quality.max() > 1:
            raise QuantityError(
                f"offerings: quality of '{self.names[int(self.quality.argmax())]}' is above 1"
            )
        object.__setattr__(self, "hull", _lower_hull(self.quality, self.full))

    @property
    def full(self) -> FloatArray:
        """The operator's cost and the user's delay, USD, (I,)."""
        return self.cost + self.latency_price * self.seconds

    def _corners(self) -> tuple[FloatArray, FloatArray]:
        return np.append(0.0, self.quality[self.hull]), np.append(0.0, self.full[self.hull])

    def best(self, value: FloatArray) -> FloatArray:
        q, c = self._corners()
        slopes = np.diff(c) / np.diff(q)
        quality: FloatArray = q[np.searchsorted(slopes, value, side="left")]
        return quality

    def cost_of(self, quality: FloatArray) -> FloatArray:
        q, c = self._corners()
        return np.where(quality > q[-1], np.inf, np.interp(quality, q, c))

    def upgrades(self) -> FloatArray:
        q, c = self._corners()
        low, high = np.triu_indices(q.size, 1)
        slopes: FloatArray = (c[high] - c[low]) / (q[high] - q[low])
        return slopes

    def most_above(self, law: TypeLaw, t: float) -> float:
        return float(self.quality.max() * law.moment_above(np.array(t), 1))

    def at(self, quality: float) -> tuple[str, float]:
        i = int(self.hull[np.abs(self.quality[self.hull] - quality).argmin()])
        return self.names[i], float(self.seconds[i])


def check_columns(names: Sequence[str], **columns: FloatArray) -> None:
    """Raises QuantityError unless there are offerings and each column is finite, ≥ 0 and (I,)."""
    for name, column in columns.items():
        if column.shape != (len(names),) or not names:
            raise QuantityError(
                f"offerings: {name} has shape {column.shape}, expected ({len(names)},), one or more"
            )
        bad = np.flatnonzero(~(np.isfinite(column) & (column >= 0)))
        if bad.size:
            raise QuantityError(
                f"offerings: {name} of '{names[bad[0]]}' is {column[bad[0]]}; it must be finite and ≥ 0"
            )


def _lower_hull(quality: FloatArray, cost: FloatArray) -> IntArray:
    """Corners of the greatest convex curve below (0, 0) and the points, but for the origin, ascending."""
    order = np.lexsort((cost, quality))
    order = order[quality[order] > NOTHING]
    if not order.size:
        raise QuantityError("offerings: none has any quality")
    order = order[np.append(True, np.diff(quality[order]) > 0)]  # the cheapest of equals
    width = np.diff(quality[order], prepend=0.0)
    slopes = np.diff(cost[order], prepend=0.0) / width
    # The slopes of a greatest convex minorant are the isotonic regression of the slopes (Barlow et al. 1972).
    blocks = isotonic_regression(slopes, weights=width).blocks
    corners: IntArray = order[blocks[1:] - 1].astype(np.int64)
    return corners
