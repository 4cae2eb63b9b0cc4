"""Effort set task by task, as tiers a menu can price. [OP-3]

A reasoning effort is a use (`gpt-5@high`), and a router that knows how hard a task looks, or how sure a first look was, gives
each task its own. What a user is offered is then no effort but a policy, "route as if quality were worth v": the user who
pays for a greater v gets more effort where effort helps. Swept over v, the policies trace the frontier of mean quality and mean
cost that `menu.design` prices in place of single models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from walras.demand.offerings import Offerings
from walras.equation import DEFER, choose
from walras.errors import QuantityError, RecordError, SettingsError
from walras.estimate.estimates import fit_estimates, requests_of
from walras.quantities import USD, IntArray, Uses
from walras.records import Log
from walras.risk import FloatArray


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies worth offering: those on the lower hull through the origin, in ascending quality."""

    offerings: Offerings
    """Mean realised quality and cost of each, (J,)."""
    value: FloatArray
    """v that each was made with, USD per unit of quality, (J,)."""
    quality_error: FloatArray
    """Standard errors of the means over requests, as if those were independent, (J,)."""
    cost_error: FloatArray
    shares: FloatArray
    """Share of requests that get each use, (J, I); the rest get nothing."""


def policies(
    quality_hat: FloatArray,
    cost_hat: FloatArray,
    quality: FloatArray,
    cost: FloatArray,
    values: FloatArray,
    *,
    seconds: FloatArray | None = None,
) -> Policies:
    """What "route at value v", argmax_i v·q̂_i − ĉ_i or nothing, gives and takes on requests nobody learned from.

    Args:
        quality_hat, cost_hat: what was believed of each use beforehand, (N, I), held out or `cross_fitted`.
        quality, cost: what each use gave and took in fact, USD of full cost, (N, I).
        values: v of the policies tried, USD per unit of quality, > 0, (K,).
        seconds: how long each use took, (N, I); none where not given.

    Raises:
        QuantityError: shapes that differ, a figure that is not finite, fewer than two requests, or no policy with any quality.
    """
    tables = {"quality_hat": quality_hat, "cost_hat": cost_hat, "quality": quality, "cost": cost}
    for name, table in tables.items():
        if table.ndim != 2 or table.shape != quality.shape or len(table) < 2:
            raise QuantityError(
                f"policies: {name} has shape {table.shape}, quality {quality.shape}; both need (N, I), N ≥ 2"
            )
        if not np.isfinite(table).all():
            row, use = np.argwhere(~np.isfinite(table))[0]
            raise QuantityError(
                f"policies: {name} of request {row}, use {use} is {table[row, use]}: leave such requests out"
            )
    if values.ndim != 1 or not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise QuantityError("policies: values must be one or more finite numbers > 0")
    n, i = quality.shape
    taken = np.stack([choose(v * quality_hat - cost_hat).use for v in values])
    slow = np.zeros_like(quality) if seconds is None else seconds
    got = np.stack([_of(table, taken) for table in (quality, cost, slow)])
    mean, error = got.mean(axis=2), got.std(axis=2, ddof=1) / np.sqrt(n)
    names = tuple(f"routed at {v:.3g}" for v in values)
    hull = Offerings(names, *mean[:2]).hull
    return Policies(
        offerings=Offerings(tuple(names[k] for k in hull), *mean[:, hull]),
        value=values[hull],
        quality_error=error[0, hull],
        cost_error=error[1, hull],
        shares=np.stack([(taken[hull] == use).mean(axis=1) for use in range(i)], axis=1),
    )


def _of(table: FloatArray, taken: IntArray) -> FloatArray:
    """Figures (N, I) at the uses `taken` (K, N), (K, N); 0 where none was."""
    rows = np.arange(len(table))
    return np.where(taken == DEFER, 0.0, table[rows, np.maximum(taken, 0)])


def cross_fitted(
    log: Log, folds: int = 5, seed: int = 0, *, family: IntArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """q̂ and ĉ (USD) of every use, (N, I): `cross_fitted_uses` where money is the only price."""
    uses = cross_fitted_uses(log, folds, seed, family=family)
    return uses.quality, uses.amount(USD)


def cross_fitted_uses(
    log: Log,
    folds: int = 5,
    seed: int = 0,
    *,
    family: IntArray | None = None,
    resources: Mapping[str, str] | None = None,
) -> Uses:
    """What each request's uses look like beforehand, N × I: by estimates fitted on the other folds.

    Args:
        family: requests that the folds must not tell apart (`near.families`), codes, (N,). Without it requests are
            split one by one, and a near-duplicate in another fold makes q̂ look better than it is on new prompts.
        resources: resource → column of the log, for amounts besides money.

    Raises:
        SettingsError: fewer than 2 folds, or a resource that the log lacks.
        RecordError: fewer families than folds, or a model whose outcomes are all in one fold; see `fit_estimates`.
    """
    n, everyone = len(log), np.arange(len(log.models))
    if folds < 2:
        raise SettingsError(f"{folds} folds", key="folds", hint="2 or more")
    family = np.unique(np.arange(n) if family is None else family, return_inverse=True)[1]
    families = int(family.max(initial=-1)) + 1
    if families < folds:
        raise RecordError(f"{families} requests that differ are too few for {folds} folds")
    requests = requests_of(log)
    fold = (np.random.default_rng(seed).permutation(families) % folds)[family]
    parts = []
    for k in range(folds):
        rest = np.flatnonzero(fold != k)
        estimates = fit_estimates(log.take(rest, everyone), requests.take(rest), seed=seed)
        parts.append(estimates.offer(requests.take(np.flatnonzero(fold == k)), resources=resources).uses)
    back = np.argsort(np.argsort(fold, kind="stable"))
    columns = ("quality", "amounts", "seconds", "risk", "irreversible_risk")
    whole: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])[back] for name in columns
    }
    return Uses(parts[0].names, resources=parts[0].resources, **whole)
