"""How much a use takes: output tokens, reasoning tokens, or USD, by model and class, with the whole distribution.

Amounts are heavy-tailed, and what is paid is the mean, never the median. Three parts, all shrunk by how much of what
they say is noise, so that few rows never blow up and many rows have the last word:

- the mean of each (model, class), pooled towards the model's mean (empirical Bayes; Efron & Morris 1975);
- a slope on the prompt's length, pooled the same way (a prompt is paid by the token, so cost is linear in it);
- the shape, as amount over mean: the class's own rows mixed with the model's, and above a threshold a generalised
  Pareto tail (Pickands 1975). How far the model's rows count is chosen by two-fold pinball loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from walras.errors import QuantityError, RecordError
from walras.estimate.price_table import Rates
from walras.quantities import IntArray
from walras.risk import FloatArray

BODY = 65
"""Points that hold the shape below the tail, evenly spaced in probability."""
TAIL_SHARE = 0.1
"""Share of rows above the threshold; more where that would be fewer than `LEAST_TAIL` rows."""
LEAST_TAIL = 10.0
TAIL_PRIOR = 20.0
"""Rows' worth of belief that a tail is exponential. Its index stays in [0, ½]: no bound, but a variance."""
MIXES = (10.0, 40.0, 160.0, 640.0, 2560.0)
"""How many rows the model's shape may weigh against the class's own."""
EVERYBODY = 10.0
"""How many rows the shape of all models together weighs against one model's own."""
USUAL_ROWS = 4.0
"""Rows' worth of belief that a class is as noisy as is usual."""
SLICES = 512
"""Values that stand for a model's rows in the shapes of its classes."""
SCORED = np.array([0.25, 0.5, 0.75, 0.9, 0.97])
"""Levels at which shapes are compared."""


@dataclass(frozen=True, slots=True)
class UsageModel:
    """Distributions of an amount for C classes × I models; the last row, C, is for a class never seen.

    Arrays only, so that it is stored and loaded without running code (`artefact`).
    """

    level: FloatArray
    """Mean at the class's own mean length, (C + 1, I)."""
    level_var: FloatArray
    slope: FloatArray
    """Change of the mean per unit of length, (C + 1, I)."""
    slope_var: FloatArray
    centre: FloatArray
    """Mean length, (C + 1, I)."""
    least: FloatArray
    """Smallest amount seen, (I,): no mean is below it."""
    body: FloatArray
    """Amount over mean at even steps of probability from 0 to 1 − `tail_share`, (C + 1, I, BODY)."""
    tail_share: FloatArray
    """Probability above the threshold, (I,)."""
    tail_scale: FloatArray
    """Scale of the generalised Pareto tail, in means, (C + 1, I)."""
    tail_index: FloatArray
    """Its index ξ, (I,): 0 is exponential, higher is heavier."""

    @classmethod
    def fit(
        cls,
        amount: FloatArray,
        classes: IntArray,
        n_classes: int,
        length: FloatArray | None = None,
        *,
        models: Sequence[str] | None = None,
    ) -> UsageModel:
        """Learn from `amount` (N, I), NaN where unknown.

        Args:
            classes: (N,) in 0…C−1, −1 where unknown; such rows inform the model's pool only.
            length: prompt length in any one unit, (N,), NaN where unknown.
            models: names of the columns, for messages.

        Raises:
            RecordError: a negative or infinite amount, or a model with none known.
        """
        names = models or [f"model {i}" for i in range(amount.shape[1])]
        _check(amount, names)
        classes = np.where((classes >= 0) & (classes < n_classes), classes, n_classes)
        x = np.zeros(len(classes)) if length is None else np.asarray(length, dtype=np.float64)
        columns = [_Column.read(column, classes, x, n_classes) for column in amount.T]
        spread = _usual_spread(columns)
        means = [column.mean(spread) for column in columns]
        level, level_var, slope, slope_var, centre = (
            np.stack(part, axis=1) for part in zip(*means, strict=True)
        )
        least = np.array([column.amount.min() for column in columns])
        ratios = [
            column.ratio(level[:, i], slope[:, i], centre[:, i], least[i]) for i, column in enumerate(columns)
        ]
        everybody = equal_slices(np.concatenate([*ratios, _EXPONENTIAL]), _weights(ratios, _EXPONENTIAL))
        groups = [
            _Ratios.of(r, c.classes, n_classes, everybody) for r, c in zip(ratios, columns, strict=True)
        ]
        mix = min(MIXES, key=lambda rows: sum(group.loss(rows) for group in groups))
        body, share, scale, index = zip(*(group.shape(mix) for group in groups), strict=True)
        return cls(
            *(level, level_var, slope, slope_var, centre, least),
            *(np.stack(body, axis=1), np.array(share), np.stack(scale, axis=1), np.array(index)),
        )

    @property
    def n_classes(self) -> int:
        return len(self.level) - 1

    def mean(self, classes: IntArray, length: FloatArray | None = None) -> FloatArray:
        """Expected amount, (M, I). A class that is −1 or unknown gets the model's pool."""
        level = self.level[classes]
        if length is not None:
            away = length[:, None] - self.centre[classes]
            level = level + self.slope[classes] * np.where(np.isnan(away), 0.0, away)
        at_least: FloatArray = np.maximum(level, self.least)
        return at_least

    def predict(self, classes: IntArray, length: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Expected amount and its standard error, both (M, I), in the unit of the amounts.

        Args:
            classes: (M,) in 0…C−1; −1 for a class never seen (its error includes how much classes differ).
        """
        level, variance = self.level[classes], self.level_var[classes]
        if length is not None:
            away = length[:, None] - self.centre[classes]
            away = np.where(np.isnan(away), 0.0, away)
            level = level + self.slope[classes] * away
            variance = variance + self.slope_var[classes] * away * away
        return np.maximum(level, self.least), np.sqrt(variance)

    def quantile(self, level: float, classes: IntArray, length: FloatArray | None = None) -> FloatArray:
        """Amount that is not exceeded with probability `level`, (M, I)."""
        if not 0 <= level < 1:
            raise QuantityError(f"a quantile's level must be in [0, 1), got {level}")
        share = self.tail_share
        at = np.minimum(level / (1 - share), 1.0) * (BODY - 1)
        low = np.minimum(at.astype(np.int64), BODY - 2)
        column = np.arange(len(share))
        below, above = self.body[:, column, low], self.body[:, column, low + 1]
        ratio = below + (at - low) * (above - below)
        beyond = np.minimum((1 - level) / share, 1.0)
        ratio = ratio + self.tail_scale * _excess(beyond, self.tail_index)
        return self.mean(classes, length) * ratio[classes]

    def exceed(
        self, threshold: float | FloatArray, classes: IntArray, length: FloatArray | None = None
    ) -> FloatArray:
        """P(amount > threshold), (M, I). `threshold` is one number or (M, I)."""
        mean = self.mean(classes, length)
        ratio = np.divide(threshold, mean, out=np.full(mean.shape, np.inf), where=mean > 0)
        body = self.body[classes]
        step = np.clip((body <= ratio[:, :, None]).sum(axis=2) - 1, 0, BODY - 2)[:, :, None]
        below = np.take_along_axis(body, step, axis=2)[:, :, 0]
        width = np.take_along_axis(body, step + 1, axis=2)[:, :, 0] - below
        part = np.clip(np.divide(ratio - below, width, out=np.ones_like(ratio), where=width > 0), 0.0, 1.0)
        left = 1 - (1 - self.tail_share) * (step[:, :, 0] + part) / (BODY - 1)
        over = np.maximum(ratio - body[:, :, -1], 0.0) / np.maximum(self.tail_scale[classes], 1e-300)
        inside = np.where(ratio < body[:, :, 0], 1.0, left)
        beyond: FloatArray = np.where(over > 0, self.tail_share * _survival(over, self.tail_index), inside)
        return beyond


def cost_from_tokens(
    rates: Rates,
    *,
    input_tokens: FloatArray,
    output_tokens: FloatArray,
    cached_input_tokens: FloatArray | float = 0.0,
    reasoning_tokens: FloatArray | float = 0.0,
    output_tokens_se: FloatArray | float = 0.0,
) -> tuple[FloatArray, FloatArray]:
    """Expected USD of each request on each model and its standard error, both (M, I).

    A bill is linear in tokens, so expected tokens give the expected bill; median tokens would not.

    Args:
        input_tokens: (M,), or (M, I) where models count tokens differently; cached ones included.
        output_tokens: expected, (M, I), reasoning included.
        cached_input_tokens: (M, I): a session's prefix is warm only on the model that served it last, so leaving that
            model pays for the whole prefix again [Z §3.1]. More than the input counts as the input.
        reasoning_tokens: expected, (M, I); matters only where reasoning has a price of its own.
        output_tokens_se: standard error of `output_tokens`, (M, I).
    """
    sent = (
        input_tokens
        if input_tokens.ndim == 2
        else np.broadcast_to(input_tokens[:, None], output_tokens.shape)
    )
    usd = rates.usd(
        input_tokens=sent,
        cached_input_tokens=np.minimum(cached_input_tokens, sent),
        output_tokens=output_tokens,
        reasoning_tokens=np.minimum(reasoning_tokens, output_tokens),
    )
    se: FloatArray = np.broadcast_to(rates.output / 1e6 * output_tokens_se, usd.shape)
    return usd, se


# --- fitting: one column (model) at a time --------------------------------------------------------------------------


def _check(amount: FloatArray, names: Sequence[str]) -> None:
    bad = np.argwhere(np.isinf(amount) | (amount < 0))
    if bad.size:
        row, column = bad[0]
        raise RecordError(
            f"an amount of '{names[column]}' is {amount[row, column]:g}; it must be finite and ≥ 0",
            row=int(row) + 1,
        )
    unknown = np.flatnonzero(np.isnan(amount).all(axis=0))
    if unknown.size:
        raise RecordError(
            f"nothing is known of how much '{names[unknown[0]]}' uses",
            hint="log its cost_usd or its tokens, or leave the model out",
        )


@dataclass(frozen=True, slots=True)
class _Column:
    """What is known of one model: (n,) rows."""

    amount: FloatArray
    classes: IntArray
    length: FloatArray
    count: FloatArray
    """Rows by class, (C + 1,); the last are of unknown class."""
    centre: FloatArray
    raw: FloatArray
    """Mean amount by class, (C + 1,); the overall mean where there are no rows."""
    slopes: tuple[FloatArray, FloatArray]
    """Least-squares slope on length by class and the sum of squares behind it, (C + 1,)."""

    @classmethod
    def read(cls, column: FloatArray, classes: IntArray, length: FloatArray, n_classes: int) -> _Column:
        known = ~np.isnan(column)
        y, c, x = column[known], classes[known], length[known]
        count: FloatArray = np.bincount(c, minlength=n_classes + 1).astype(np.float64)
        centre, raw = _class_mean(x, c, n_classes), _class_mean(y, c, n_classes)
        away = np.where(np.isnan(x), 0.0, x - centre[c])
        squares: FloatArray = np.bincount(c, weights=away**2, minlength=n_classes + 1).astype(np.float64)
        joint = np.bincount(c, weights=away * (y - raw[c]), minlength=n_classes + 1).astype(np.float64)
        slope = np.divide(joint, squares, out=np.zeros_like(joint), where=squares > 0)
        return cls(y, c, x, count, centre, raw, (slope, squares))

    @property
    def within(self) -> tuple[FloatArray, FloatArray]:
        """Sum of squares around the line of each class, and its degrees of freedom, (C + 1,)."""
        slope, squares = self.slopes
        away = (self.amount - self.raw[self.classes]) ** 2
        left = np.bincount(self.classes, weights=away, minlength=len(self.raw)) - slope**2 * squares
        return np.maximum(left, 0.0), self.count - (self.count > 0) - (squares > 0)

    def mean(self, usual: float) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Level, its variance, slope, its variance, centre of length: each (C + 1,)."""
        overall = float(self.amount.mean())
        left, freedom = self.within
        # Each class has its own noise: one that never loses anything is sure of it, whatever the others lose. Where it
        # has few rows the usual relative variance speaks, at the larger of its mean and everybody's: rows that happen to
        # agree are no certainty, and one wild row is no class apart.
        typical = usual * np.maximum(self.raw, overall) ** 2
        by_class = (left + USUAL_ROWS * typical) / (np.maximum(freedom, 0.0) + USUAL_ROWS)
        noise = float(self.count @ by_class / self.count.sum())
        precision = np.divide(self.count, by_class, out=np.zeros_like(by_class), where=by_class > 0)[:-1]
        level, level_var = pool_classes(self.raw[:-1], precision, overall, noise / len(self.amount))
        slope, squares = self.slopes
        whole = squares.sum()
        line = float((slope * squares).sum() / whole) if whole > 0 else 0.0
        line_var = noise / whole if whole > 0 else 0.0
        # Positive-part shrinkage to no slope at all, then class by class to the common one.
        line *= max(1 - line_var / line**2, 0.0) if line else 0.0
        own, own_var = pool_classes(
            slope[:-1],
            np.divide(squares, by_class, out=np.zeros_like(squares), where=by_class > 0)[:-1],
            line,
            line_var,
        )
        return level, level_var, own, own_var, self.centre

    def ratio(self, level: FloatArray, slope: FloatArray, centre: FloatArray, least: float) -> FloatArray:
        """Amount over its expected amount, (n,)."""
        c = self.classes
        away = self.length - centre[c]
        mean = np.maximum(level[c] + slope[c] * np.where(np.isnan(away), 0.0, away), least)
        return np.divide(self.amount, mean, out=np.ones_like(mean), where=mean > 0)


def _class_mean(values: FloatArray, classes: IntArray, n_classes: int) -> FloatArray:
    """Mean of the known `values` by class, (C + 1,); the overall mean for classes without any, and in the last place."""
    known = ~np.isnan(values)
    count = np.bincount(classes[known], minlength=n_classes + 1)
    total = np.bincount(classes[known], weights=values[known], minlength=n_classes + 1)
    overall = total.sum() / max(count.sum(), 1)
    mean = np.where(count > 0, total / np.maximum(count, 1), overall)
    mean[-1] = overall
    return mean


def pool_classes(
    own: FloatArray, precision: FloatArray, pool: float, pool_var: float, doubt: float = 1.0
) -> tuple[FloatArray, FloatArray]:
    """Estimates (C,) with these precisions drawn towards `pool`, and the pool itself last: values and variances.

    The spread between classes is the one under which their differences are as large as they should be (Paule & Mandel
    1982), give or take `doubt` standard errors of what noise alone makes of it: differences must show themselves before
    they are believed, and must be excluded before they leave the error.
    """
    total, squares, k = float(precision.sum()), float((precision**2).sum()), int((precision > 0).sum())
    slack = doubt * np.sqrt(2.0 * max(k - 1, 0))
    away = (own - pool)[precision > 0] ** 2
    believed, possible = (
        _spread_between(away, 1.0 / precision[precision > 0], k - 1 + d) for d in (slack, -slack)
    )
    trust = believed * precision / (believed * precision + 1)
    value = np.append(pool + trust * (own - pool), pool)
    shared = pool_var + possible * (squares / total**2 if total else 0.0)
    noise = np.divide(trust**2, precision, out=np.zeros_like(trust), where=precision > 0)
    variance = np.append(noise + (1 - trust) ** 2 * (possible + shared), possible + shared)
    return value, variance


def _spread_between(away: FloatArray, noise: FloatArray, wanted: float) -> float:
    """The variance τ ≥ 0 between classes with Σ away/(noise + τ) = `wanted`; 0 where noise alone is enough.

    At most one class, or one that is wanted to differ less than it may, tells nothing: then their mean square away.
    """
    if away.size < 2:
        return 0.0
    most = float(away.sum())
    if wanted <= 0:
        return most / away.size
    low, high = 0.0, most / wanted
    if float((away / noise).sum()) <= wanted:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((away / (noise + middle)).sum()) > wanted else (low, middle)
    return high


def _usual_spread(columns: Sequence[_Column]) -> float:
    """Relative variance of an amount around its class mean, over all models; 1 (an exponential) before any is known."""
    squares = freedom = 0.0
    for column in columns:
        left, free = column.within
        paid = column.raw > 0
        squares += float((left[paid] / column.raw[paid] ** 2).sum())
        freedom += float(np.maximum(free[paid], 0.0).sum())
    return float((squares + 1.0) / (freedom + 1.0))


def equal_slices(sample: FloatArray, weight: FloatArray | None = None, count: int = SLICES) -> FloatArray:
    """Means of the sample's `count` equally likely slices, ascending, (count,): few values with the same mean."""
    order = np.argsort(sample)
    weight = np.ones(len(sample)) if weight is None else weight[order]
    share = np.concatenate(([0.0], np.cumsum(weight)))
    total = np.concatenate(([0.0], np.cumsum(weight * sample[order])))
    edges = np.interp(np.linspace(0.0, share[-1], count + 1), share, total)
    means: FloatArray = np.diff(edges) * count / share[-1]
    return means


_EXPONENTIAL = -np.log1p(-(np.arange(SLICES) + 0.5) / SLICES)
"""What is believed of amount over mean before any row is seen."""


def _weights(ratios: Sequence[FloatArray], prior: FloatArray) -> FloatArray:
    """1 for each row of each model; the prior's values weigh one row together."""
    return np.concatenate((np.ones(sum(len(r) for r in ratios)), np.full(len(prior), 1 / len(prior))))


@dataclass(frozen=True, slots=True)
class _Ratios:
    """Amounts over their means of one model, by class: where shapes come from."""

    ratio: FloatArray
    classes: IntArray
    by_class: list[FloatArray]
    """Rows of each class, C + 1 of them; the last, which stands for a class never seen, is empty."""
    everybody: FloatArray
    """All models' slices, (SLICES,)."""

    @classmethod
    def of(cls, ratio: FloatArray, classes: IntArray, n_classes: int, everybody: FloatArray) -> _Ratios:
        order = np.argsort(classes, kind="stable")
        parts = np.split(ratio[order], np.searchsorted(classes[order], np.arange(1, n_classes + 1)))
        return cls(ratio, classes, [*parts[:n_classes], ratio[:0]], everybody)

    def mixtures(self, mix: float) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
        """For each class: sorted values, their weights (sum 1), and the level at which each stands."""
        weight = np.concatenate((np.ones(len(self.ratio)), np.full(SLICES, EVERYBODY / SLICES)))
        pool = equal_slices(np.concatenate((self.ratio, self.everybody)), weight)
        for own in self.by_class:
            value = np.concatenate((own, pool))
            weight = np.concatenate((np.ones(len(own)), np.full(SLICES, mix / SLICES)))
            order = np.argsort(value)
            weight = weight[order] / weight.sum()
            yield value[order], weight, np.cumsum(weight) - weight / 2

    def loss(self, mix: float) -> float:
        """Two-fold pinball loss of shapes with this `mix`; 0 where there are too few rows to tell."""
        if len(self.ratio) < 40:
            return 0.0
        loss, n_classes = 0.0, len(self.by_class) - 1
        for fold in (0, 1):
            train = np.arange(len(self.ratio)) % 2 == fold
            half = _Ratios.of(self.ratio[train], self.classes[train], n_classes, self.everybody)
            table = np.stack([np.interp(SCORED, level, value) for value, _, level in half.mixtures(mix)])
            miss = self.ratio[~train][:, None] - table[self.classes[~train]]
            loss += float(np.mean(np.maximum(SCORED * miss, (SCORED - 1) * miss)))
        return loss

    def shape(self, mix: float) -> tuple[FloatArray, float, FloatArray, float]:
        """Body (C + 1, BODY), share above the threshold, tail scale (C + 1,), tail index."""
        share = float(np.clip(LEAST_TAIL / len(self.ratio), TAIL_SHARE, 0.5))
        levels = np.linspace(0.0, 1 - share, BODY)
        body, excess = np.empty((len(self.by_class), BODY)), np.empty(len(self.by_class))
        for row, (value, weight, level) in enumerate(self.mixtures(mix)):
            body[row] = np.interp(levels, level, value)
            excess[row] = (weight * np.maximum(value - body[row, -1], 0.0)).sum() / share
        # One index for the model: excesses over each row's own class threshold, in units of the class's mean excess.
        over = (self.ratio - body[self.classes, -1]) / np.maximum(excess[self.classes], 1e-300)
        over = np.sort(over[over > 1e-9])
        index = _tail_index(over) * len(over) / (len(over) + TAIL_PRIOR)
        return body, share, excess * (1 - index), index


def _tail_index(over: FloatArray) -> float:
    """ξ of a generalised Pareto from its sorted excesses, in [0, ½]: probability-weighted moments (Hosking & Wallis 1987)."""
    if len(over) < 3:
        return 0.0
    left = 1 - (np.arange(1, len(over) + 1) - 0.35) / len(over)
    mean, weighted = over.mean(), (left * over).mean()
    return float(np.clip(2 - mean / max(mean - 2 * weighted, 1e-300), 0.0, 0.5))


def _excess(beyond: FloatArray, index: FloatArray) -> FloatArray:
    """Generalised Pareto quantile where a share `beyond` is left, in scales."""
    heavy = index > 1e-6
    safe = np.where(heavy, index, 1.0)
    power: FloatArray = np.where(heavy, (beyond**-safe - 1) / safe, -np.log(beyond))
    return power


def _survival(over: FloatArray, index: FloatArray) -> FloatArray:
    """Generalised Pareto survival at `over` scales above the threshold."""
    heavy = index > 1e-6
    safe = np.where(heavy, index, 1.0)
    left: FloatArray = np.where(heavy, (1 + safe * over) ** (-1 / safe), np.exp(-over))
    return left
