"""Linear models that shrink by as much as their own evidence asks: empirical-Bayes ridge (MacKay 1992).

Each column of the outcome has its own shrinkage, found by maximising the marginal likelihood. A column whose features
do not clearly explain more than noise is predicted as exactly 0, so that a model of noise cannot be mistaken for
knowledge; what it may hide all the same is part of the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from walras.quantities import BoolArray
from walras.risk import FloatArray

LEAST_EVIDENCE = 3.0
"""Log marginal likelihood that features must add before they are used: e³ ≈ 20 to 1, a strong case (Jeffreys)."""
_RATIOS = np.concatenate(([0.0], np.logspace(-6, 6, 97)))


@dataclass(frozen=True, slots=True)
class Ridge:
    """Weights of p features on P outcomes, and how sure they are."""

    weights: FloatArray
    """(p, P)."""
    used: BoolArray
    """Whether the evidence for them is strong; where it is not, 0 is predicted, (P,)."""
    likely: FloatArray
    """How far they count in the error: 1 where used, else one less the likelihood of nothing over theirs, (P,)."""
    noise: FloatArray
    """Residual variance of each outcome, (P,)."""
    ratio: FloatArray
    """Prior variance of a weight over `noise` that the outcomes make likeliest, (P,)."""
    basis: FloatArray
    """Eigenvectors of FᵀF, (p, p)."""
    power: FloatArray
    """Its eigenvalues, (p,)."""
    spread: FloatArray
    """Posterior variance of a weight along each eigenvector, as far as it counts, (p, P)."""

    def predict(self, features: FloatArray) -> FloatArray:
        """(N, P)."""
        predicted: FloatArray = features @ (self.weights * self.used)
        return predicted

    def variance(self, features: FloatArray) -> FloatArray:
        """Posterior mean square of what is left when the prediction is taken away, (N, P)."""
        variance: FloatArray = (features @ self.basis) ** 2 @ self.spread
        if not self.used.all():
            variance += self.likely * (features @ (self.weights * ~self.used)) ** 2
        return variance


def fit_ridge(features: FloatArray, outcomes: FloatArray, least_evidence: float = LEAST_EVIDENCE) -> Ridge:
    """Fit `outcomes` (N, P), of mean 0, on `features` (N, p)."""
    n = max(len(features), 1)
    power, basis = np.linalg.eigh(features.T @ features)
    power = np.maximum(power, 0.0)
    onto = basis.T @ (features.T @ outcomes)
    scale = power.mean()
    ratios = _RATIOS / scale if scale > 0 else _RATIOS[:1]
    explained = (ratios[:, None] / (1.0 + ratios[:, None] * power)) @ onto**2
    square = np.maximum((outcomes**2).sum(axis=0), 1e-200)
    noise = np.maximum(square - explained, 1e-12 * square) / n
    evidence = -0.5 * n * np.log(noise) - 0.5 * np.log1p(ratios[:, None] * power).sum(axis=1, keepdims=True)
    best = evidence.argmax(axis=0)
    gain = evidence.max(axis=0) - evidence[0]
    used = gain >= least_evidence
    ratio = ratios[best]
    likely = np.where(used, 1.0, -np.expm1(-gain))
    left = noise[best, np.arange(best.size)]
    shrunk = ratio / (1.0 + ratio * power[:, None])
    return Ridge(
        weights=basis @ (shrunk * onto),
        used=used,
        likely=likely,
        noise=left,
        ratio=ratio,
        basis=basis,
        power=power,
        spread=shrunk * left * likely,
    )
