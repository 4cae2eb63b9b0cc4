"""What an uncertain loss is worth: expectation, CVaR, max–min. [Z-K]

All three are coherent risk measures, and a coherent measure of a loss over S scenarios is one sentence:
the worst expectation over a set of scenario weights,

    risk(loss) = max_{w ∈ W} Σ_s w_s · loss_s.

The measures differ only in W, so one method does the work: `density`, the worst w for given losses. It is also
the measure's (sub)gradient, which is how a risk envelope on the whole portfolio is priced (`market.shadow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from walras.errors import QuantityError

FloatArray = NDArray[np.float64]


class RiskMeasure(Protocol):
    """A coherent risk measure over S scenarios."""

    def density(self, losses: FloatArray) -> FloatArray:
        """Worst-case scenario weights, same shape as `losses` (…, S); each row ≥ 0 and sums to 1."""
        ...


@dataclass(frozen=True, slots=True)
class Expectation:
    """Risk-neutral: all scenarios weigh 1/S."""

    def density(self, losses: FloatArray) -> FloatArray:
        return np.full(losses.shape, 1.0 / losses.shape[-1])


@dataclass(frozen=True, slots=True)
class CVaR:
    """Mean of the worst 1 − α share of equally likely scenarios (Rockafellar & Uryasev 2000).

    α = 0 is the expectation; α → 1 the worst scenario. No weight exceeds 1/((1 − α)·S).
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            raise QuantityError(f"CVaR level must be in [0, 1), got {self.alpha}")

    def density(self, losses: FloatArray) -> FloatArray:
        n = losses.shape[-1]
        cap = 1.0 / ((1.0 - self.alpha) * n)
        # The worst scenario takes as much weight as allowed, then the next, until the weights sum to one.
        by_rank = np.diff(np.minimum(cap * np.arange(n + 1), 1.0))
        worst_first = np.argsort(-losses, axis=-1, kind="stable")
        weights = np.empty_like(losses)
        np.put_along_axis(weights, worst_first, np.broadcast_to(by_rank, losses.shape), axis=-1)
        return weights


@dataclass(frozen=True, slots=True)
class MaxMin:
    """Worst expectation over a finite ambiguity set: `beliefs` has one scenario distribution a row, shape (D, S)."""

    beliefs: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.beliefs or len({len(row) for row in self.beliefs}) != 1:
            raise QuantityError("an ambiguity set needs at least one distribution, all of one length")
        table = np.asarray(self.beliefs, dtype=np.float64)
        bad = np.flatnonzero((table < 0).any(axis=1) | (np.abs(table.sum(axis=1) - 1.0) > 1e-9))
        if bad.size:
            raise QuantityError(f"belief {bad[0] + 1} of the ambiguity set is not a probability distribution")

    def density(self, losses: FloatArray) -> FloatArray:
        table = np.asarray(self.beliefs, dtype=np.float64)
        if table.shape[1] != losses.shape[-1]:
            raise QuantityError(
                f"the ambiguity set has {table.shape[1]} scenarios, the losses have {losses.shape[-1]}"
            )
        worst = np.argmax(losses @ table.T, axis=-1)
        weights: FloatArray = table[worst]
        return weights


def risk_of(losses: FloatArray, measure: RiskMeasure) -> FloatArray:
    """Risk of each loss distribution, in the losses' unit. `losses` (…, S) → (…)."""
    if losses.shape[-1] == 0 or not np.isfinite(losses).all():
        raise QuantityError("scenario losses must be finite and there must be at least one scenario")
    value: FloatArray = np.einsum("...s,...s->...", losses, measure.density(losses))
    return value
