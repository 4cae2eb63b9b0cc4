"""Tâtonnement with step control: a price rises with excess demand, p ← p + η z(p), on the simplex. [G-11]

η is halved while z changes by more than half of itself over the step, so that the steps keep to the flow dp/dt = z(p). The
flow converges where all goods are gross substitutes (Arrow, Block and Hurwicz 1959), and need not elsewhere: Scarf's
example goes in circles for ever.
"""

from __future__ import annotations

import numpy as np

from walras.market.tenants.conditions import Conditions
from walras.market.tenants.newton import Point
from walras.risk import FloatArray

FAITHFUL = 0.5
"""Largest |z(next) − z| / |z| over a step."""
LEAST_SHARE = 0.1
"""A price falls at most to this share of itself in one step."""


def tatonnement(problem: Conditions, q: FloatArray, *, tolerance: float, evaluations: int) -> Point:
    """From q (M,), until excess demand is within the tolerance or the evaluations are spent; the caller looks at which."""
    none = np.zeros(0)
    z, step = problem.excess(q), 0.1
    best = Point(q, none, np.inf)
    while problem.evaluations < evaluations:
        residual = float(np.maximum(z, -q).max())
        best = min(best, Point(q, none, residual), key=lambda at: at.residual)
        if residual <= tolerance and float(np.minimum(q, np.abs(z)).max()) <= tolerance:
            break
        to = np.maximum(q + step * z, LEAST_SHARE * q)
        to /= to.sum()
        after = problem.excess(to)
        if not np.linalg.norm(after - z) <= FAITHFUL * np.linalg.norm(z):
            step /= 2
            continue
        q, z, step = to, after, 1.3 * step
    return best
