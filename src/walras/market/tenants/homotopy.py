"""A path of economies from one that is solved to the one that is asked about, followed round its turns.

At t the economy is t times the given one and 1 − t times an artificial tenant, which owns a unit of everything, spends
the shares c of its income, and bears the losses of firms that run every activity a little (y_a = (1−t) b_a / loss_a):

    q·(B(q)y + (1−t) − t z(q)) = c·m,   m = (1−t) Σq + q·B(q)y,   loss_a(q) y_a = (1−t) b_a,   Σq = 1.

Where no prices make every activity lose, as where one undoes another, B is B − (1−t)w: activities wear goods out until
the end of the path.

All are excess demands that obey Walras' law, so at every t < 1 the artificial tenant and the barrier keep prices and
losses positive. At t = 0, c and b are chosen so that the start is the one equilibrium. For almost every start the
solutions are then a curve without end but at t = 1 (Sard's theorem; Smale 1976 for exchange, Chow, Mallet-Paret and Yorke
1978 for random starts): pseudo-arclength steps follow it, also where t turns back, and it ends at an equilibrium.

Guaranteed, up to the step control, where demand is twice differentiable at positive prices, every tenant has income at
all prices that can be approached, and nothing can be made from nothing. Kinks in demand make the curve only piecewise smooth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from walras.market.tenants.newton import GOOD, NIL, Point, Problem, newton
from walras.risk import FloatArray

MAX_STEPS = 3_000
CORRECTED = 1e-8
"""Residual at which a corrector step is good enough to go on."""
TRY_NEWTON = 0.1
"""1 − t at which the end is tried first; then at ever smaller ones."""
SHALLOW = 1e-2
"""Least loss at the deepest prices below which activities are made to wear goods out."""
CUTS = 50
"""Rounds of cutting planes for the losses of sectors, whose inputs respond to prices."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where the path begins: q (M,) > 0, y (K,) > 0; losses are > 0 at q."""

    q: FloatArray
    y: FloatArray
    share: FloatArray
    """c, (M,) of the artificial tenant's income."""
    barrier: FloatArray
    """b, (K,)."""
    wear: float
    """w ≥ 0 of every good per unit of activity."""

    @classmethod
    def at(cls, problem: Problem, q: FloatArray, wear: float = 0.0) -> Start:
        columns = problem.columns(q) - wear
        loss = -(q @ columns)
        level = 0.5 / max(1.0, float(np.abs(columns.sum(axis=1)).max(initial=0.0)), float(loss.sum()))
        y = np.full(loss.size, level)
        income = q * (1 + columns @ y)
        return cls(q, y, income / income.sum(), loss * y, wear)


def begin(problem: Problem, toward: FloatArray | None = None) -> Start | None:
    """A start at positive prices where every activity loses; None where some make goods from nothing.

    The deepest such prices, or as near to `toward` (M,) > 0 as leaves every activity a hundredth of that loss.
    """
    wear, (middle, depth) = 0.0, _deepest(problem, 0.0)
    if depth <= SHALLOW:
        if depth < -NIL:
            return None
        wear = 2 * SHALLOW
        middle, depth = _deepest(problem, wear)
    if middle is None:
        return None
    if toward is None:
        return Start.at(problem, middle, wear)
    share = 1.0
    while share > 1e-6:
        q = (1 - share) * middle + share * toward / toward.sum()
        if (q > 0).all() and wear - (q @ problem.columns(q)).max(initial=-np.inf) >= 0.01 * depth:
            return Start.at(problem, q, wear)
        share *= 0.8
    return Start.at(problem, middle, wear)


def _deepest(problem: Problem, wear: float) -> tuple[FloatArray | None, float]:
    """max s: q ≥ s, loss_a(q) ≥ s, Σq = 1. A sector's loss is the least over techniques: cut where it is violated."""
    n = problem.size[0]
    q = np.full(n, 1 / n)
    cuts = problem.columns(q) - wear
    if not cuts.size:
        return q, 1 / n
    for _ in range(CUTS):
        above = np.vstack(
            (np.column_stack((cuts.T, np.ones(cuts.shape[1]))), np.column_stack((-np.eye(n), np.ones(n))))
        )
        found = linprog(
            np.append(np.zeros(n), -1.0),
            A_ub=above,
            b_ub=np.zeros(len(above)),
            A_eq=[np.append(np.ones(n), 0.0)],
            b_eq=[1.0],
            bounds=[(0, None)] * n + [(None, None)],
        )
        if found.x is None:
            return None, 0.0
        q, depth = np.maximum(found.x[:n], 1e-12), float(found.x[n])
        now = problem.columns(q) - wear
        if depth <= 0 or (-(q @ now)).min(initial=np.inf) >= 0.5 * depth:
            return q / q.sum(), depth
        cuts = np.column_stack((cuts, now))
    return None, 0.0


@np.errstate(all="ignore")  # far out numbers may overflow: such points are refused
def follow(problem: Problem, start: Start) -> tuple[Point, int]:
    """The equilibrium at the end of the path and the steps it took; the caller looks at the residual."""
    v = np.concatenate((start.q, start.y, [0.0]))
    tangent, length, due = np.append(np.zeros(v.size - 1), 1.0), 0.05, TRY_NEWTON
    best, n = Point(start.q, start.y, np.inf), start.q.size
    for step in range(MAX_STEPS):
        tangent = _tangent(problem, start, v, tangent)
        while True:
            to, tries = _corrected(problem, start, v + length * tangent, tangent)
            if to is not None and np.linalg.norm(to - v) < 3 * length:
                break
            length /= 2
            if length < 1e-13:  # a kink too sharp to go round
                end = newton(problem, v[:n], v[n:-1])
                return (end if end.residual < best.residual else best), step
        # A step beyond the end is not taken: the end between is tried, and then the way goes on in smaller steps.
        over = to[-1] >= 1
        tried = v + (to - v) * (1 - v[-1]) / (to[-1] - v[-1]) if over else to
        if over or 1 - to[-1] < due:
            end = newton(problem, np.maximum(tried[:n], NIL / n), np.maximum(tried[n:-1], 0.0))
            best = end if end.residual < best.residual else best
            due = min(due, 1 - v[-1]) / 4
        if best.residual <= GOOD or 1 - v[-1] < NIL:
            return best, step
        v, length = (
            (v, length / 4) if over else (to, length * (2.0 if tries <= 3 else 0.7 if tries > 5 else 1.0))
        )
        length = min(length, 1.0)
    return best, MAX_STEPS


def _values(problem: Problem, start: Start, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The path's equations (M + K,) and their slopes (M + K, M + K + 1) at v = (q, y, t)."""
    n = start.q.size
    q, y, t = v[:n], v[n:-1], float(v[-1])
    columns, z = problem.columns(q) - start.wear * (1 - t), problem.excess(q)
    loss, made, worn = -(q @ columns), columns @ y, start.wear * y.sum()
    net = made + (1 - t) - t * z
    income = (1 - t) * q.sum() + q @ made
    goods = q * net - start.share * income + q.sum() - 1
    by_q = np.diag(net) + q[:, None] * (problem.bend(q, y) - t * problem.slope(q)) + 1
    by_q -= np.outer(start.share, (1 - t) + made)
    by_y = q[:, None] * columns + np.outer(start.share, loss)
    by_t = q * (worn - 1 - z) + start.share * q.sum() * (1 - worn)
    slopes = np.block([
        [by_q, by_y, by_t[:, None]],
        [-y[:, None] * columns.T, np.diag(loss), (start.barrier - start.wear * q.sum() * y)[:, None]],
    ])  # fmt: skip
    return np.concatenate((goods, loss * y - (1 - t) * start.barrier)), slopes


def _tangent(problem: Problem, start: Start, v: FloatArray, before: FloatArray) -> FloatArray:
    """The unit tangent that goes on as before."""
    _, slopes = _values(problem, start, v)
    along = np.linalg.lstsq(np.vstack((slopes, before)), np.append(np.zeros(len(slopes)), 1.0), rcond=None)[0]
    return np.asarray(along / np.linalg.norm(along))


def _corrected(
    problem: Problem, start: Start, v: FloatArray, tangent: FloatArray
) -> tuple[FloatArray | None, int]:
    """Newton back to the path, at right angles to the tangent; None where it leaves positive prices or diverges."""
    n = start.q.size
    for tries in range(8):
        if (v[:-1] <= 0).any():
            return None, tries
        values, slopes = _values(problem, start, v)
        if not (np.isfinite(values).all() and np.isfinite(slopes).all()):
            return None, tries
        if np.abs(values).max() <= CORRECTED * min(1.0, float(v[:n].min()) * n):
            return v, tries
        matrix = np.vstack((slopes, tangent))
        v = v - np.linalg.lstsq(matrix, np.append(values, 0.0), rcond=None)[0]
    return None, 8
