"""Newton on the complementarity conditions, in the form of Fischer (1992): φ(a, b) = √(a² + b²) − a − b = 0.

φ is 0 exactly where a ≥ 0, b ≥ 0 and ab = 0, and ½‖φ‖² is smooth (De Luca, Facchinei and Kanzow 1996), so that a line
search on it is safe. Locally quadratic at regular equilibria; from afar it may stall, and then says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from walras.risk import FloatArray

DONE = 1e-14
"""Largest |φ| at which there is nothing left to gain."""
GOOD = 1e-10
"""Largest |φ| of an answer, as a share of what there is of each good."""
NIL = 1e-12
"""A price this small, as a share of all, is 0."""
MAX_STEPS = 100
LEAST_SHARE = 0.1
"""A price falls at most to this share of itself in one step, so that none reaches 0 before its time."""


class Problem(Protocol):
    """M goods, K activities: excess demand z(q) (M,), its slopes (M, M), columns B(q) (M, K) and Σ y ∂B/∂q (M, M); q·z(q) = 0."""

    @property
    def size(self) -> tuple[int, int]:
        """(M, K)."""
        ...

    def excess(self, q: FloatArray) -> FloatArray: ...
    def slope(self, q: FloatArray) -> FloatArray: ...
    def columns(self, q: FloatArray) -> FloatArray: ...
    def bend(self, q: FloatArray, y: FloatArray) -> FloatArray: ...
    def cornered(self, q: FloatArray) -> bool:
        """Whether a tenant has next to no income and wants what is next to free."""
        ...


@dataclass(frozen=True, slots=True)
class Point:
    """Scaled prices (M,) and levels (K,), and how far they are from the conditions."""

    q: FloatArray
    y: FloatArray
    residual: float


@np.errstate(all="ignore")  # far out numbers may overflow: such points are refused
def newton(problem: Problem, q: FloatArray, y: FloatArray) -> Point:
    """Damped Newton steps from (q, y); the caller looks at the residual."""
    f = _Fischer.at(problem, q, y)
    best = f
    for _ in range(MAX_STEPS):
        if f.residual <= DONE or not np.isfinite(f.merit):
            break
        jacobian = f.jacobian(problem)
        if not np.isfinite(jacobian).all():
            break
        step = np.asarray(np.linalg.lstsq(jacobian, -f.value, rcond=None)[0], dtype=np.float64)
        found = _search(problem, f, step)
        if found is None:
            break
        f = found
        best = f if f.residual < best.residual else best
    return _settled(problem, best)


def _settled(problem: Problem, f: _Fischer) -> Point:
    """Prices that only round-off keeps from 0 are 0, unless somebody would then buy without end.

    Excess demand may also vanish on the way to prices that leave a tenant no income, where its demand jumps: no
    equilibrium. Scarf's example has such corners.
    """
    y = np.maximum(f.y, 0.0)
    if (f.q > NIL).all():
        return Point(f.q, y, f.residual)
    zeroed = _Fischer.at(problem, np.where(f.q <= NIL, 0.0, f.q), y)
    if np.isfinite(zeroed.residual) and zeroed.residual <= max(f.residual, GOOD):
        return Point(zeroed.q, y, zeroed.residual)
    return Point(f.q, y, np.inf if problem.cornered(f.q) else f.residual)


def _search(problem: Problem, f: _Fischer, step: FloatArray) -> _Fischer | None:
    """The first halving of the step that lessens the merit enough; None if none does."""
    n = f.q.size
    share = 1.0
    while share > 1e-10:
        q = np.maximum(f.q + share * step[:n], LEAST_SHARE * f.q)
        to = _Fischer.at(problem, q, f.y + share * step[n:])
        if to.merit <= (1 - 1e-4 * share) * f.merit:
            return to
        share /= 2
    return None


@dataclass(frozen=True, slots=True)
class _Fischer:
    q: FloatArray
    y: FloatArray
    slack: FloatArray
    """(M + K,) excess supply, then losses."""
    value: FloatArray
    """(M + K + 1,) φ of each condition, and Σq − 1."""

    @classmethod
    def at(cls, problem: Problem, q: FloatArray, y: FloatArray) -> _Fischer:
        columns = problem.columns(q)
        slack = np.concatenate((columns @ y - problem.excess(q), -(q @ columns)))
        have = np.concatenate((q, y))
        value = np.append(np.hypot(have, slack) - have - slack, q.sum() - 1)
        return cls(q, y, slack, value)

    @property
    def merit(self) -> float:
        merit = float(self.value @ self.value)
        return merit if np.isfinite(merit) else np.inf

    @property
    def residual(self) -> float:
        return float(np.abs(self.value).max())

    def jacobian(self, problem: Problem) -> FloatArray:
        """∂value/∂(q, y), (M + K + 1, M + K)."""
        n, columns = self.q.size, problem.columns(self.q)
        have = np.concatenate((self.q, self.y))
        size = np.maximum(np.hypot(have, self.slack), np.finfo(float).tiny)
        inner = np.block([
            [problem.bend(self.q, self.y) - problem.slope(self.q), columns],
            [-columns.T, np.zeros((columns.shape[1],) * 2)],
        ])  # fmt: skip
        rows = (self.slack / size - 1)[:, None] * inner
        rows[np.diag_indices(have.size)] += have / size - 1
        return np.vstack((rows, np.arange(have.size) < n))
