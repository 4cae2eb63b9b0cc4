"""Which models get a task right together: hard tasks fail for all of them.

A task is of one of a few hidden types (of difficulty, and of what each model is good at); given its type the models'
outcomes are independent (latent classes, Lazarsfeld & Henry 1968). That is I numbers for each type instead of 2^I for
each pattern, so it serves two models as well as twenty. A class of tasks (a repository, a tenant) has its own mixture of
the types, pulled towards the overall one by as much as its tasks leave open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, gammaln, logit, logsumexp

from walras.errors import QuantityError
from walras.quantities import IntArray
from walras.risk import FloatArray

MOST_TYPES = 6
"""A logit of difficulty is well covered by fewer; the information criterion seldom asks for more than four."""
STRENGTHS = np.geomspace(1.0, 1e5, 21)
"""How many tasks the overall mixture weighs beside those of a class: from next to nothing to all there is."""


@dataclass(frozen=True, slots=True)
class Joint:
    """The joint law of I binary outcomes of one task, for each of C classes of tasks."""

    weight: FloatArray
    """P(type) by class, (C, K)."""
    right: FloatArray
    """P(the model is right | type), (K, I)."""
    error: FloatArray
    """Standard error of `quality`, (C, I); 0 where the law is declared and not estimated."""

    def __post_init__(self) -> None:
        c, i = self.weight.shape[0], self.right.shape[-1]
        if self.weight.ndim != 2 or self.right.ndim != 2 or self.weight.shape[1] != self.right.shape[0]:
            raise QuantityError(
                f"joint: weight has shape {self.weight.shape} and right {self.right.shape}; "
                "expected (classes, types) and (types, models)"
            )
        if self.error.shape != (c, i):
            raise QuantityError(f"joint: error has shape {self.error.shape}, expected ({c}, {i})")
        if not ((self.right >= 0) & (self.right <= 1)).all():
            raise QuantityError("joint: every P(right | type) must lie in [0, 1]")
        if not (self.weight >= 0).all() or not (np.abs(self.weight.sum(axis=1) - 1) < 1e-9).all():
            raise QuantityError("joint: the weights of the types must be ≥ 0 and sum to 1 in each class")

    @classmethod
    def declared(cls, weight: FloatArray, right: FloatArray) -> Joint:
        """A law that is known: `weight` (C, K), `right` (K, I). One type: the outcomes are independent."""
        return cls(weight, right, np.zeros((weight.shape[0], right.shape[-1])))

    @property
    def quality(self) -> FloatArray:
        """P(right) by class, (C, I)."""
        mean: FloatArray = self.weight @ self.right
        return mean

    def patterns(self, which: FloatArray) -> FloatArray:
        """P of each row of `which` (P, I), outcomes 0 or 1, by class, (C, P)."""
        given = np.where(which[:, None] > 0, self.right, 1.0 - self.right).prod(axis=2)
        probability: FloatArray = self.weight @ given.T
        return probability


def fit_joint(right: FloatArray, classes: IntArray, n_classes: int, *, most_types: int = MOST_TYPES) -> Joint:
    """The joint law of outcomes from a log.

    The types are found by expectation–maximisation, their number by Akaike's criterion; how far a
    class keeps to itself, by the marginal likelihood of the classes' mixtures (empirical Bayes).

    Args:
        right: 1 the model was right, 0 it was wrong, NaN not run, (N, I). What is missing is taken to be missing for
            reasons the class tells. Fractional quality is refused: what a verifier's pass says about it depends on
            its whole law, not only on its mean; set a bar that counts as right.
        classes: class of each task, (N,), in 0…`n_classes`−1. A class without tasks gets the overall mixture.

    Raises:
        QuantityError: outcomes that are not 0, 1 or NaN, a model without any, or classes out of range.
    """
    seen = ~np.isnan(right)
    if right.ndim != 2 or not np.isin(right[seen], (0.0, 1.0)).all():
        raise QuantityError("outcomes must be (tasks, models) of 0, 1 or NaN; set a bar that counts as right")
    if not seen.any(axis=0).all():
        raise QuantityError(f"model {int(np.argmin(seen.any(axis=0)))} has no outcome; leave it out")
    if classes.shape != right.shape[:1] or (
        classes.size and not 0 <= classes.min() <= classes.max() < n_classes
    ):
        raise QuantityError(f"classes must be one code in 0…{n_classes - 1} for each of {len(right)} tasks")
    # The same patterns come again and again: the sums run over the different ones.
    patterns, inverse, count = np.unique(
        np.where(seen, right, -1.0), axis=0, return_inverse=True, return_counts=True
    )
    known, won = (patterns >= 0).astype(np.float64), np.maximum(patterns, 0.0)
    likely = _types(won, known, count.astype(np.float64), 1)
    for k in range(2, most_types + 1):
        more = _types(won, known, count.astype(np.float64), k)
        if more.criterion >= likely.criterion:
            break
        likely = more
    by_class = np.zeros((n_classes, likely.weight.size))
    np.add.at(by_class, classes, likely.member[inverse.reshape(-1)])
    strength = max(STRENGTHS, key=lambda s: _evidence(by_class, s * likely.weight))
    weight = by_class + strength * likely.weight
    weight /= weight.sum(axis=1, keepdims=True)
    quality = weight @ likely.right
    runs = np.zeros((n_classes, right.shape[1]))
    np.add.at(runs, classes, seen.astype(np.float64))
    # What a class borrows counts as runs of its own, up to all there are.
    known_from = np.minimum(runs + strength, seen.sum(axis=0))
    return Joint(weight, likely.right, np.sqrt(quality * (1 - quality) / (known_from + 1)))


@dataclass(frozen=True, slots=True)
class _Types:
    weight: FloatArray
    right: FloatArray
    member: FloatArray
    """P(type | pattern), (P, K)."""
    criterion: float


def _types(won: FloatArray, known: FloatArray, count: FloatArray, k: int) -> _Types:
    """K types by expectation–maximisation; each P(right) has one task of prior weight at the model's mean."""
    mean = (count @ won + 0.5) / (count @ known + 1.0)
    # The start orders the types by difficulty, the same for all models: no draw, so the same answer every time.
    ease = np.linspace(-2.5, 2.5, k)
    right = expit(logit(mean) + (ease - ease.mean())[:, None])
    weight = np.full(k, 1.0 / k)
    for _ in range(2000):
        given = won @ np.log(right).T + (known - won) @ np.log1p(-right).T + np.log(weight)
        likelihood = logsumexp(given, axis=1)
        member = np.exp(given - likelihood[:, None])
        mass = count[:, None] * member
        new = (mass.T @ won + mean) / (mass.T @ known + 1.0)
        weight = (mass.sum(axis=0) + 1.0 / k) / (count.sum() + 1.0)
        moved, right = float(np.abs(new - right).max()), new
        if moved < 1e-6:
            break
    parameters = k * right.shape[1] + k - 1
    return _Types(weight, right, member, float(2 * parameters - 2 * count @ likelihood))


def _evidence(by_class: FloatArray, prior: FloatArray) -> float:
    """log marginal likelihood of the classes' counts of types under a Dirichlet prior (Pólya), up to a constant."""
    total = gammaln(prior.sum()) - gammaln(prior.sum() + by_class.sum(axis=1))
    return float((total + (gammaln(prior + by_class) - gammaln(prior)).sum(axis=1)).sum())
