"""What a use gives to a class of tasks, estimated from other tasks of that class.

The mean of a class with few tasks is noise; the mean over all tasks ignores the class. Partial pooling sits between
the two: each class mean is pulled towards the overall mean by how much of the difference is noise (empirical Bayes,
with the between-class variance by the method of moments; Efron & Morris 1975). When classes say nothing, it is the overall mean.
"""

from __future__ import annotations

import numpy as np

from walras.quantities import IntArray
from walras.risk import FloatArray


def pooled_class_means(values: FloatArray, classes: IntArray, n_classes: int) -> FloatArray:
    """Partially pooled means of `values` (N, …) by class, (C, …).

    Args:
        classes: class of each row, (N,), in 0…C−1. A class without rows gets the overall mean.
    """
    n = values.shape[0]
    flat = values.reshape(n, -1)
    count = np.bincount(classes, minlength=n_classes).astype(np.float64)[:, None]
    total = _sum_by_class(flat, classes, n_classes)
    overall = flat.mean(axis=0)
    mean = np.divide(total, count, out=np.broadcast_to(overall, total.shape).copy(), where=count > 0)
    seen = (count > 0).sum()
    if seen < 2 or n <= seen:
        return np.broadcast_to(overall, mean.shape).reshape(n_classes, *values.shape[1:]).copy()
    within = (_sum_by_class(flat**2, classes, n_classes) - count * mean**2).sum(axis=0) / (n - seen)
    within = np.maximum(within, 0.0)
    spread = (count * (mean - overall) ** 2).sum(axis=0)
    between = np.maximum((spread - (seen - 1) * within) / (n - (count**2).sum() / n), 0.0)
    signal = count * between
    noise = np.broadcast_to(within, signal.shape)
    trust = np.divide(signal, signal + noise, out=np.zeros_like(signal), where=signal + noise > 0)
    pooled: FloatArray = overall + trust * (mean - overall)
    return pooled.reshape(n_classes, *values.shape[1:])


def _sum_by_class(flat: FloatArray, classes: IntArray, n_classes: int) -> FloatArray:
    return np.stack(
        [np.bincount(classes, weights=column, minlength=n_classes) for column in flat.T], axis=1
    ).astype(np.float64)
