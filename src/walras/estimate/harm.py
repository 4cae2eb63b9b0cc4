"""Risk of a wrong action: how likely, how bad, and by which measure. [Z-6, Z-K]

P(wrong | model, class) is a Beta posterior whose prior comes from the model's other classes and the class's other
models; the loss given wrong is heavy-tailed and known by class (what is moved is lost, whoever moves it). Both are put
together as equally likely scenarios, which `risk.py` values: expectation, CVaR, or max–min where judges disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaln, expit, logit

from walras.errors import QuantityError, RecordError
from walras.estimate.usage import UsageModel, pool_classes
from walras.quantities import IntArray
from walras.risk import FloatArray, MaxMin

STRENGTHS = np.geomspace(1.0, 4096.0, 25)
"""Prior strengths tried, in rows; the one under which the counts are likeliest is taken."""
SEVERITIES = 512
"""Steps of the loss's quantile function from which scenarios are averaged."""


@dataclass(frozen=True, slots=True)
class HarmModel:
    """Wrong actions of I models on C classes; the last row, C, is for a class never seen."""

    alpha: FloatArray
    """Beta posterior of the probability of a wrong action, (C + 1, I)."""
    beta: FloatArray
    loss: FloatArray
    """Mean loss of a wrong action, USD, (C + 1,); 1 where losses are not known and risk is a probability."""
    loss_se: FloatArray
    below: FloatArray
    """∫₀ᵛ of the loss's quantile function at even steps of v from 0 to 1, (C + 1, SEVERITIES + 1)."""

    @classmethod
    def fit(
        cls,
        wrong: FloatArray,
        classes: IntArray,
        n_classes: int,
        loss_usd: FloatArray | None = None,
        *,
        models: Sequence[str] | None = None,
    ) -> HarmModel:
        """Learn from outcomes.

        Args:
            wrong: 1 where the action was wrong, 0 where not, NaN where unknown, (N, I).
            classes: (N,) in 0…C−1, −1 where unknown.
            loss_usd: USD lost where wrong, NaN where unknown, (N, I); None makes risk a probability.
            models: names of the columns, for messages.

        Raises:
            RecordError: no outcome is known, one is neither 0 nor 1, or losses are asked for and none is known.
        """
        names = models or [f"model {i}" for i in range(wrong.shape[1])]
        known = ~np.isnan(wrong)
        if not known.any():
            raise RecordError("no outcome says whether an action was wrong")
        bad = np.argwhere(known & (wrong != 0) & (wrong != 1))
        if bad.size:
            row, column = bad[0]
            raise RecordError(
                f"'{names[column]}' was wrong to degree {wrong[row, column]:g}; it is 0 or 1",
                row=int(row) + 1,
            )
        at = np.where((classes >= 0) & (classes < n_classes), classes, n_classes)
        alpha, beta = _posterior(np.where(known, wrong, 0.0), known.astype(np.float64), at, n_classes)
        if loss_usd is None:
            unit = np.tile(np.linspace(0, 1, SEVERITIES + 1), (n_classes + 1, 1))
            return cls(alpha, beta, np.ones(n_classes + 1), np.zeros(n_classes + 1), unit)
        return cls(alpha, beta, *_severity(np.where(wrong == 1, loss_usd, np.nan), classes, n_classes))

    def rate(self, classes: IntArray) -> tuple[FloatArray, FloatArray]:
        """P(wrong) and its standard error, both (M, I). −1 is a class never seen."""
        a, b = self.alpha[classes], self.beta[classes]
        mean = a / (a + b)
        return mean, np.sqrt(mean * (1 - mean) / (a + b + 1))

    def expected_loss(self, classes: IntArray) -> tuple[FloatArray, FloatArray]:
        """Expected loss of an action and its standard error, both (M, I): USD, or a probability without losses."""
        rate, rate_se = self.rate(classes)
        loss, loss_se = self.loss[classes, None], self.loss_se[classes, None]
        return rate * loss, np.sqrt((rate_se * loss) ** 2 + (rate * loss_se) ** 2 + (rate_se * loss_se) ** 2)

    def losses(
        self, classes: IntArray, scenarios: int = 100, *, rng: np.random.Generator | None = None
    ) -> FloatArray:
        """Loss by equally likely scenario, (M, I, S), for `Uses.losses`; the mean is the expected loss exactly.

        Scenario s is the mean of the s-th slice of the loss's distribution, so the worst scenarios are last, for every
        task at once: things go wrong together, and the tails of a portfolio add up. With `rng` each task gets its own
        order (its uses keep theirs together): tasks go wrong independently.
        """
        if scenarios < 1:
            raise QuantityError(f"there must be at least one scenario, got {scenarios}")
        rows, which = np.unique(classes, return_inverse=True)
        rate = self.rate(rows)[0][:, :, None]
        # Losing nothing comes first: a share 1 − p of each distribution lies at 0.
        edges = np.clip((np.linspace(0, 1, scenarios + 1) - (1 - rate)) / rate, 0.0, 1.0)
        steps = np.linspace(0, 1, SEVERITIES + 1)
        so_far = np.stack(
            [np.interp(edge, steps, self.below[row]) for edge, row in zip(edges, rows, strict=True)]
        )
        table = np.diff(so_far, axis=2) * rate * scenarios
        losses: FloatArray = table[which]
        if rng is None:
            return losses
        order = rng.permuted(np.tile(np.arange(scenarios), (len(classes), 1)), axis=1)
        return np.take_along_axis(losses, order[:, None, :], axis=2)


def ambiguous_losses(
    judges: Sequence[HarmModel], classes: IntArray, scenarios: int = 100
) -> tuple[FloatArray, MaxMin]:
    """Losses (M, I, J·S) under J judges who disagree, and the ambiguity set over them. [Z-K]

    Each judge's scenarios stand side by side and each belief trusts one judge, so `risk_of(losses, set)` is the worst
    judge's expected loss, use by use.
    """
    blocks = [judge.losses(classes, scenarios) for judge in judges]
    trust = np.kron(np.eye(len(judges)), np.full((1, scenarios), 1 / scenarios))
    return np.concatenate(blocks, axis=2), MaxMin(tuple(tuple(row) for row in trust.tolist()))


def _severity(
    lost: FloatArray, classes: IntArray, n_classes: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean loss of a wrong action, its standard error, and what lies below each share of it, from losses (N, I)."""
    usage = UsageModel.fit(
        lost.reshape(-1, 1), np.repeat(classes, lost.shape[1]), n_classes, models=("a wrong action",)
    )
    every = np.append(np.arange(n_classes), -1)
    middle = (np.arange(SEVERITIES) + 0.5) / SEVERITIES
    heights = np.stack([usage.quantile(float(v), every)[:, 0] for v in middle], axis=1)
    below = np.concatenate((np.zeros((n_classes + 1, 1)), np.cumsum(heights, axis=1)), axis=1)
    mean, error = (column[:, 0] for column in usage.predict(every))
    whole = below[:, -1]
    scale = np.divide(mean, whole, out=np.zeros_like(whole), where=whole > 0)
    return mean, error, below * scale[:, None]


def _posterior(
    wrong: FloatArray, known: FloatArray, classes: IntArray, n_classes: int
) -> tuple[FloatArray, FloatArray]:
    """Beta parameters (C + 1, I): a model's rate, the class's odds against it, then the cell's own counts."""
    tries, hits = known.sum(axis=0), wrong.sum(axis=0)
    overall = (hits.sum() + 0.5) / (tries.sum() + 1)
    strength = _strength(hits, tries, np.full_like(hits, overall)) if len(hits) > 1 else 1.0
    rate = (hits + strength * overall) / (tries + strength)
    rate_var = rate * (1 - rate) / (tries + strength + 1)
    effect, effect_var = _class_odds(wrong - known * rate, known * rate * (1 - rate), classes, n_classes)
    prior = expit(logit(rate) + effect[:, None])
    cell_hits, cell_tries = (_by_class(column, classes, n_classes) for column in (wrong, known))
    own = _strength(cell_hits[:-1].ravel(), cell_tries[:-1].ravel(), prior[:-1].ravel())
    # What the prior mean itself is unsure of makes it weaker.
    spread = prior * (1 - prior)
    variance = spread / (own + 1) + spread**2 * effect_var[:, None] + rate_var
    weight = np.maximum(spread / variance - 1, 0.5)
    cell_hits[-1], cell_tries[-1] = 0.0, 0.0
    return weight * prior + cell_hits, weight * (1 - prior) + cell_tries - cell_hits


def _class_odds(
    surprise: FloatArray, spread: FloatArray, classes: IntArray, n_classes: int
) -> tuple[FloatArray, FloatArray]:
    """Log odds of a class against its models' rates, shrunk, and their variances, (C + 1,); last the unseen class's.

    One step from the models' rates. Outcomes of one request are alike across models: the noise is measured by request.
    """
    by_request, expected = surprise.sum(axis=1), spread.sum(axis=1)
    alike = max(float((by_request**2).sum() / expected.sum()), 1.0)
    total = np.bincount(classes, weights=by_request, minlength=n_classes + 1)[:-1]
    scale = np.bincount(classes, weights=expected, minlength=n_classes + 1)[:-1]
    raw = np.divide(total, scale, out=np.zeros_like(total), where=scale > 0)
    return pool_classes(raw, scale / alike, 0.0, 0.0, doubt=0.0)


def _by_class(values: FloatArray, classes: IntArray, n_classes: int) -> FloatArray:
    sums = [np.bincount(classes, weights=column, minlength=n_classes + 1) for column in values.T]
    return np.stack(sums, axis=1).astype(np.float64)


def _strength(hits: FloatArray, tries: FloatArray, mean: FloatArray) -> float:
    """Strength of the Beta prior with these means under which the counts are likeliest (beta-binomial)."""
    a, b = STRENGTHS[:, None] * mean, STRENGTHS[:, None] * (1 - mean)
    likelihood = (betaln(a + hits, b + tries - hits) - betaln(a, b)).sum(axis=1)
    # Of strengths that are equally likely but for round-off the greatest, whatever the order of the counts.
    best = float(likelihood.max())
    return float(STRENGTHS[likelihood >= best - 1e-9 * (1 + abs(best))].max())
