"""Do the estimates still hold on a newer log? Its outcomes, in order of time, through the drift monitor."""

from __future__ import annotations

import numpy as np

from walras.estimate.drift import Drift, DriftMonitor
from walras.estimate.estimates import Estimates, requests_of
from walras.quantities import Labels
from walras.records import Log
from walras.risk import FloatArray

SURE = 2.0
"""Standard errors of a class mean that are the estimates' own error, and no drift."""


def watch_log(estimates: Estimates, log: Log, *, alpha: float = 0.05) -> Drift:
    """What the known outcomes of `log`, and the classes of its requests, say of the estimates.

    Args:
        alpha: probability of any false alarm over the whole log.
    """
    model = estimates.quality
    order = np.arange(len(log)) if log.time is None else np.argsort(log.time, kind="stable")
    log = log.take(order, np.arange(len(log.models)))
    requests = requests_of(log)
    one_class = not model.classes
    classes = model.classes or ("all",)
    mix = np.bincount(model.near.classes, minlength=len(classes))[: len(classes)]
    error = model.means.error[: len(classes)].T
    monitor = DriftMonitor(
        alpha, model.models, classes, tolerance=np.minimum(SURE * error, 0.5), mix=None if one_class else mix
    )
    labels = Labels(np.zeros(len(log), dtype=np.int64), classes) if one_class else requests.task_class
    predicted = _in_columns_of(log, estimates, model.predict(requests).mean)
    row, column = np.nonzero(~np.isnan(log.per_use["quality"]))
    monitor.update_batch(
        Labels(column, log.models),
        labels.take(row),
        predicted[row, column],
        log.per_use["quality"][row, column],
        time=None if log.time is None else log.time[row],
    )
    monitor.update_requests(labels, time=log.time)
    return monitor.report()


def _in_columns_of(log: Log, estimates: Estimates, predicted: FloatArray) -> FloatArray:
    """q̂ in the log's order of models, (N, M); a model the estimates do not know has none to be judged by."""
    columns = np.zeros((len(log), len(log.models)))
    for k, name in enumerate(log.models):
        if name in estimates.models:
            columns[:, k] = predicted[:, estimates.models.index(name)]
    return columns
