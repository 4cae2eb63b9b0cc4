"""Prompts as a few dozen numbers that a linear model can use. Learned without looking at any outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from walras.estimate.text import BUCKETS, CUES, Texts
from walras.risk import FloatArray

WAVES = 128
"""Random Fourier features of the cues: a smooth function of length and structure (Rahimi & Recht 2007)."""
TOPICS = 64
"""Directions of the n-grams, by latent semantic analysis (Deerwester et al. 1990)."""
LEAST_SPREAD = 1e-3
FAR = 3.0
"""A cue counts up to this many standard deviations from its mean: a strange prompt is not a new continent."""


@dataclass(frozen=True, slots=True)
class Reader:
    """How a prompt is turned into features."""

    rarity: NDArray[np.float32]
    """Inverse document frequency of each n-gram, (BUCKETS,)."""
    directions: NDArray[np.float32]
    """(BUCKETS, K), K ≤ TOPICS."""
    waves: FloatArray
    """(len(CUES), WAVES)."""
    phases: FloatArray
    """(WAVES,)."""

    @classmethod
    def of(cls, texts: Texts, seed: int = 0) -> Reader:
        """Learn from N logged prompts."""
        rng = np.random.default_rng(seed)
        often = np.bincount(texts.grams, minlength=BUCKETS)
        # What occurs once cannot be learned from, what occurs everywhere tells nothing apart.
        rarity = np.where(often > 1, np.log((1.0 + len(texts)) / (1.0 + often)), 0.0).astype(np.float32)
        return cls(
            rarity=rarity,
            directions=_principal(_weighted(texts, rarity), rng),
            waves=rng.standard_normal((len(CUES), WAVES)),
            phases=rng.uniform(0.0, 2.0 * np.pi, WAVES),
        )

    def topics(self, texts: Texts) -> FloatArray:
        """Place along each direction of the n-grams, (N, K)."""
        if len(texts) == 1:  # a sparse matrix costs more to set up than this sum
            weight = np.sqrt(texts.counts) * self.rarity[texts.grams]
            length = float(np.sqrt(weight @ weight)) or 1.0
            one: FloatArray = ((weight / length) @ self.directions[texts.grams])[None].astype(np.float64)
            return one
        placed: FloatArray = np.asarray(_weighted(texts, self.rarity) @ self.directions, dtype=np.float64)
        return placed

    def waved(self, cues: FloatArray, mean: FloatArray, scale: FloatArray) -> FloatArray:
        """Fourier features of cues standardised by `mean` and `scale` (see `standard`), (N, WAVES)."""
        z = np.minimum(np.maximum((cues - mean) * scale, -FAR), FAR)
        features: FloatArray = np.cos(
            z @ self.waves / np.sqrt(max(int(np.count_nonzero(scale)), 1)) + self.phases
        )
        return features


def standard(cues: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean of each cue over prompts (N, C), and 1 over its spread; 0 for a cue without spread, which is left out."""
    if not len(cues):
        return np.zeros((2, cues.shape[1]))[0], np.zeros(cues.shape[1])
    spread = cues.std(axis=0)
    return cues.mean(axis=0), np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > LEAST_SPREAD)


def _weighted(texts: Texts, rarity: NDArray[np.float32]) -> Any:
    """Damped counts times rarity, each prompt of length 1, sparse (N, BUCKETS)."""
    weight = np.sqrt(texts.counts) * rarity[texts.grams]
    row = np.repeat(np.arange(len(texts)), np.diff(texts.start))
    length = np.sqrt(np.bincount(row, weights=weight**2, minlength=len(texts)))
    unit = (weight / np.maximum(length, 1e-12)[row]).astype(np.float32)
    return sparse.csr_matrix((unit, texts.grams, texts.start), shape=(len(texts), BUCKETS))


def _principal(matrix: Any, rng: np.random.Generator) -> NDArray[np.float32]:
    """The first right singular vectors of the centred rows, (BUCKETS, K): randomised SVD (Halko et al. 2011)."""
    n = matrix.shape[0]
    k = min(TOPICS, max(n // 8, 1))
    mean: Any = np.asarray(matrix.mean(axis=0), dtype=np.float32).ravel()
    span: Any = rng.standard_normal((BUCKETS, k + 8)).astype(np.float32)
    for _ in range(3):
        left, _ = np.linalg.qr(matrix @ span - mean @ span)
        span, _ = np.linalg.qr(matrix.T @ left - np.outer(mean, left.sum(axis=0)))
    _, _, right = np.linalg.svd(matrix @ span - mean @ span, full_matrices=False)
    directions: NDArray[np.float32] = (span @ right[:k].T).astype(np.float32)
    return directions
