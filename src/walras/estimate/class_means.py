"""What a use gives to a class of tasks, estimated from other tasks of that class.

The mean of a class with few tasks is noise; the mean over all tasks ignores the class. Partial pooling sits between
the two: each class mean is pulled towards the overall mean by how much of the difference is noise (empirical Bayes,
with the between-class variance by the method of moments; Efron & Morris 1975). When classes say nothing, it is the overall mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from walras.quantities import IntArray
from walras.risk import FloatArray


@dataclass(frozen=True, slots=True)
class ClassMeans:
    """Partially pooled means of M columns for C classes, and one more row for a class never seen."""

    mean: FloatArray
    """(C + 1, M)."""
    error: FloatArray
    """Posterior standard deviation of `mean`, (C + 1, M)."""


def pooled_class_means(values: FloatArray, classes: IntArray, n_classes: int) -> FloatArray:
    """Partially pooled means of `values` (N, …) by class, (C, …).

    Args:
        classes: class of each row, (N,), in 0…C−1. A class without rows gets the overall mean.
    """
    flat = values.reshape(values.shape[0], -1)
    return class_means(flat, classes, n_classes).mean[:-1].reshape(n_classes, *values.shape[1:])


def class_means(values: FloatArray, classes: IntArray, n_classes: int) -> ClassMeans:
    """Partially pooled means of `values` (N, M) by class, with their errors; NaN is unknown.

    Args:
        classes: class of each row, (N,), in 0…C−1; a row of another class (−1) counts towards the overall mean only.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    n, total = known.sum(axis=0), filled.sum(axis=0)
    overall = np.divide(total, n, out=np.zeros(values.shape[1]), where=n > 0)
    # Around the overall mean, so that a tight column far from 0 does not lose its variance to round-off.
    away = np.where(known, values - overall, 0.0)
    named = classes >= 0
    count = _sum_by_class(known[named], classes[named], n_classes)
    sums = _sum_by_class(away[named], classes[named], n_classes)
    squares = _sum_by_class(away[named] ** 2, classes[named], n_classes)
    mean = np.divide(sums, count, out=np.zeros_like(sums), where=count > 0)
    seen, rows = (count > 0).sum(axis=0), count.sum(axis=0)
    degrees = np.maximum(rows - seen, 1)
    within = np.maximum((squares - count * mean**2).sum(axis=0), 0.0) / degrees
    spread = (count * mean**2).sum(axis=0)
    balance = rows - np.divide((count**2).sum(axis=0), rows, out=np.zeros_like(rows), where=rows > 0)
    between = np.divide(
        np.maximum(spread - (seen - 1) * within, 0.0), balance, out=np.zeros_like(rows), where=balance > 0
    )
    between[(seen < 2) | (rows <= seen)] = 0.0
    signal = count * between
    trust = np.divide(signal, signal + within, out=np.zeros_like(signal), where=signal + within > 0)
    spread_all = (away**2).sum(axis=0)
    overall_error = np.divide(spread_all, np.maximum(n - 1, 1) * n, out=np.zeros_like(total), where=n > 0)
    own = np.divide(within, count, out=np.zeros_like(signal), where=count > 0)
    # How far to pull is itself an estimate, and a poor one where classes are few: Morris (1983).
    pull = overall_error + 2.0 / np.maximum(seen - 3, 1) * mean**2
    error = np.sqrt(trust * own + (1.0 - trust) ** 2 * pull)
    unseen = np.sqrt(between + overall_error)
    return ClassMeans(np.vstack((overall + trust * mean, overall)), np.vstack((error, unseen)))


def _sum_by_class(flat: FloatArray, classes: IntArray, n_classes: int) -> FloatArray:
    return np.stack(
        [np.bincount(classes, weights=column, minlength=n_classes) for column in flat.T], axis=1
    ).astype(np.float64)
