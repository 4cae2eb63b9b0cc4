"""Intervals for means of skewed scores: empirical likelihood (Owen 1988), with Fisher's F for χ² and Bartlett's correction.

Asymmetric, inside the range of the scores, and as wide as the data ask. They speak for independent rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import f as fisher
from scipy.stats import norm

from walras.equation import ROUND_OFF
from walras.risk import FloatArray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean in USD per row, with its error."""

    value: float
    se: float
    """Standard error."""
    interval: tuple[float, float]


def mean_of(scores: FloatArray, level: float) -> Estimate:
    """Mean of independent scores (N,)."""
    value, se = float(scores.mean()), standard_error(scores)
    if not se:
        return Estimate(value, 0.0, (value, value))
    c = _threshold(scores - value, level)
    low, high = _tilted(-scores, c) @ scores, _tilted(scores, c) @ scores
    return Estimate(value, se, (float(low), float(high)))


def ratio_of(w: FloatArray, r: FloatArray, level: float) -> Estimate:
    """Σ w·r / Σ w. Its ends are where the mean of w·(r − v) just is compatible with 0 (Dinkelbach's iteration)."""
    says = w > 0  # the other rows say nothing of a ratio, and must not count as rows
    w, r = w[says], r[says]
    value = float(w @ r / w.sum())
    influence = w * (r - value) / w.mean()
    se = standard_error(influence)
    if not se:
        return Estimate(value, 0.0, (value, value))
    c = _threshold(influence, level)
    ends = []
    for sign in (-1.0, 1.0):
        v = value
        for _ in range(50):
            p = _tilted(sign * w * (r - v), c)
            last, v = v, float(p @ (w * r) / (p @ w))
            if abs(v - last) <= 1e-6 * se:
                break
        ends.append(v)
    return Estimate(value, se, (ends[0], ends[1]))


def standard_error(scores: FloatArray) -> float:
    """Of a mean; 0 where scores differ by round-off only."""
    deviation = float(scores.std(ddof=1)) if scores.size > 1 else 0.0
    return 0.0 if deviation <= ROUND_OFF * float(np.abs(scores).max()) else deviation / scores.size**0.5


def _threshold(deviations: FloatArray, level: float) -> float:
    """How far −2 log of the likelihood ratio of a mean may rise: F(1, N−1), times Bartlett's factor."""
    n = deviations.size
    m2, m3, m4 = ((deviations**k).mean() for k in (2, 3, 4))
    bartlett = 1.0 + (m4 / m2**2 / 2 - m3**2 / m2**3 / 3) / n
    return float(fisher.ppf(level, 1, n - 1) * bartlett)


def _tilted(scores: FloatArray, c: float) -> FloatArray:
    """The probabilities p (N,) with the largest Σ p·scores among those with −2 Σ log(N·p) ≤ c.

    They are p ∝ 1/(η − scores) for one η above every score, so one root in log(η − max) is all there is to find.
    """
    n = scores.size
    below = (scores.max() - scores) / scores.std()

    def excess(log_eta: float) -> float:
        gap = np.exp(log_eta) + below
        return float(2 * (np.log(gap).sum() + n * np.log((1 / gap).mean())) - c)

    low = high = np.log(n / c) / 2  # the root for many rows
    while excess(low) <= 0:
        low -= 1
    while excess(high) > 0:
        high += 1
    p: FloatArray = 1 / (np.exp(brentq(excess, low, high, xtol=1e-9)) + below)
    p /= p.sum()
    return p


def widened(estimate: Estimate, bias: float, level: float) -> Estimate:
    """The interval of an estimate that may be off by up to `bias`: the quantile of |t + bias/se| for that of |t|."""
    low, high = estimate.interval
    more, z = bias, float(norm.ppf(0.5 + level / 2))
    if estimate.se and bias:
        t = bias / estimate.se

        def missing(x: float) -> float:
            return float(norm.cdf(x - t) - norm.cdf(-x - t) - level)

        more = (brentq(missing, z - 1e-6, z + t + 1e-6) - z) * estimate.se
    return Estimate(estimate.value, estimate.se, (low - more, high + more))
