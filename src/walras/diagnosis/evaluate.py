"""Would a router learned from this log have helped? Fit on one half, judge on the other, over several splits. [Z §3.1]

Where every model's outcome is known, each policy's surplus on the held-out half is exact, and so is its regret. Where only the
chosen model's is, surplus is estimated from logged propensities, or refused [OP-1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from walras.diagnosis.case import MOSTLY, Case, build_case
from walras.diagnosis.regret import Mean, bootstrap_mean
from walras.equation import choose, surplus
from walras.errors import RecordError, SettingsError
from walras.estimate.class_means import class_means
from walras.estimate.empirical_likelihood import Estimate as Difference
from walras.estimate.estimates import Estimates, fit_estimates, requests_of
from walras.estimate.near import families
from walras.estimate.off_policy import Logged, OffPolicy, compare, evaluate_policy
from walras.estimate.quality import Requests
from walras.estimate.shrinkage import fit_ridge
from walras.quantities import BoolArray, IntArray, Uses
from walras.records import UNKNOWN, Log
from walras.risk import FloatArray
from walras.settings import Economy

LEVELS = (0.8, 0.9, 0.95)
"""Levels of the intervals whose coverage is measured."""
BINS = 10
LEAST = 40
"""Requests below which a half is too small to learn from or to judge on."""

OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the splits."""

    by_seed: FloatArray

    @property
    def mean(self) -> float:
        return float(self.by_seed.mean())

    @property
    def sd(self) -> float:
        """Over the splits; they share requests, so this is not a standard error over new logs."""
        return float(self.by_seed.std(ddof=1)) if self.by_seed.size > 1 else float("nan")


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well q̂ says what happens, over all held-out outcomes of all splits."""

    error: Spread
    """Expected calibration error: mean |q̂ − outcome| of `BINS` equal bins, weighted by size (Naeini et al. 2015)."""
    predicted: FloatArray
    """Mean q̂ of each bin, NaN where empty, (BINS,)."""
    observed: FloatArray
    count: IntArray
    coverage: Mapping[float, Spread]
    """Share of outcomes inside the conformal interval, by nominal level."""


@dataclass(frozen=True, slots=True)
class Halves:
    """Surplus per task on the held-out halves, USD, over the splits."""

    policy: Spread
    category_mean: Spread
    fixed: Spread
    """The model that did best on the half learned from."""
    best_fixed: Spread
    """The model that turned out best on the held-out half, which nobody knows beforehand."""
    oracle: Spread
    """The ex-post best use of each request. Every outcome is one draw, so it includes luck nobody can have."""
    ceiling: Spread
    """Gap closed, among half of the models, by a policy that knows how the other half did on the very request: an
    estimate, from below, of the part of the gap that is not luck. A share of 1; no bound. 0 where neither half has
    two models."""

    def closed(self, policy: Spread) -> Spread:
        """(policy − best fixed)/(oracle − best fixed), a share of 1."""
        room = self.oracle.by_seed - self.best_fixed.by_seed
        gain = policy.by_seed - self.best_fixed.by_seed
        return Spread(np.divide(gain, room, out=np.zeros_like(gain), where=room > 0))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `walras evaluate` reports; the parts a log cannot give are None."""

    tasks: int
    models: tuple[str, ...]
    classes: int
    left_out: int
    synthetic: bool
    halves: Halves | None
    apart: Halves | None
    """The same with near-duplicate prompts kept in one half: what is left for prompts that are really new."""
    near_duplicates: float
    """Share of requests with a near-duplicate in the log."""
    regret: Mean | None
    """Oracle less policy, USD per task, over the requests."""
    picks: Mapping[str, float]
    """Share of held-out requests each model gets."""
    calibration: Calibration
    off_policy: OffPolicy | None
    gain: Difference | None
    """Policy less the logged choices, USD per task, off policy."""
    notes: tuple[str, ...]


def evaluate_log(log: Log, economy: Economy, *, seeds: int = 10, on_step: OnStep | None = None) -> Evaluation:
    """Learn and judge on `seeds` random halves.

    Raises:
        RecordError: too few requests, one model only, or a log that is neither complete nor has propensities.
        SupportError: the logged choices say too little about the learned policy's.
        SettingsError: a task without a value, or limits, which one half cannot price for the other.
    """
    groups = (economy, *economy.tenants.values(), *economy.classes.values())
    if economy.constraints({}) or any(group.budget_total_usd is not None for group in groups):
        what = "compares policies at declared prices; `walras audit` and `walras route` price limits"
        raise SettingsError(f"evaluate {what}", key="budget, sla or risk")
    if len(log.models) < 2:
        raise RecordError(f"the log has one model only, {log.models[0]}: there is nothing to route between")
    economy = economy.model_copy(update={"defer": False, "baseline": None})
    step = on_step or (lambda _: None)
    complete: BoolArray = np.logical_and.reduce(
        [~np.isnan(log.per_use[name]) for name in ("quality", "cost_usd")]
    ).all(axis=1)
    if complete.mean() >= MOSTLY:
        return _judge_complete(log, economy, complete, seeds, step)
    return _judge_logged(log, economy, step)


# --- every outcome is known -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Study:
    """A log whose outcomes are all known, ready to be split."""

    log: Log
    case: Case
    true: FloatArray
    """Surplus of every use, (N, I)."""
    requests: Requests


def _judge_complete(log: Log, economy: Economy, complete: BoolArray, seeds: int, step: OnStep) -> Evaluation:
    whole = log.take(np.flatnonzero(complete), np.arange(len(log.models)))
    if len(whole) < 2 * LEAST:
        raise RecordError(f"{len(whole)} complete requests are too few to split: {2 * LEAST} are needed")
    case = build_case(whole, economy, audited=False)
    if case.uses.shape != whole.per_use["quality"].shape:
        raise RecordError(
            "what is priced is unknown for some outcomes", hint=f"leave them out: {case.notes[0]}"
        )
    study = _Study(whole, case, surplus(case.tasks, case.uses, economy.declared()), requests_of(whole))
    if not np.isfinite(study.true).all(axis=0).any():
        raise SettingsError(
            "leaves no model for every request, so no fixed one to compare with", key="forbidden_models"
        )
    family = families(study.requests.texts)
    rows, per_request = [], np.full((seeds, len(whole)), np.nan)
    tally = _Tally()
    picks = np.zeros(len(whole.models))
    for seed in range(seeds):
        step(f"split {seed + 1} of {seeds}")
        train, test = _split(np.arange(len(whole)), seed)
        row, regret, chosen = _judge_half(study, train, test, seed, tally)
        rows.append(row)
        per_request[seed, test] = regret
        picks += np.bincount(chosen, minlength=picks.size) / test.size / seeds
    twins = family.size > np.unique(family).size
    apart = []
    for seed in range(seeds if twins else 0):
        step(f"split {seed + 1} of {seeds}, near-duplicates together")
        apart.append(_judge_half(study, *_split(family, seed), seed, _Tally())[0])
    held_out = ~np.isnan(per_request).all(axis=0)
    notes = list(case.notes)
    if len(whole.models) < 3:
        notes.append("of two models, one's outcome cannot help to choose: what is not luck is not estimated")
    logged = None
    if _has_propensities(whole):
        try:
            logged = _off_policy(whole, economy, step)
        except RecordError as error:
            notes.append(f"nothing is estimated off policy: {error}")
    return Evaluation(
        tasks=len(whole),
        models=whole.models,
        classes=len(whole.task_class.names) if whole.task_class else 0,
        left_out=len(log) - len(whole),
        synthetic=log.synthetic,
        halves=_halves(rows),
        apart=_halves(apart) if apart else None,
        near_duplicates=float(np.mean(np.bincount(family)[family] > 1)),
        regret=bootstrap_mean(np.nanmean(per_request[:, held_out], axis=0)),
        picks=dict(zip(whole.models, picks.tolist(), strict=True)),
        calibration=tally.calibration(),
        off_policy=logged[0] if logged else None,
        gain=logged[1] if logged else None,
        notes=tuple(notes),
    )


def _split(family: IntArray, seed: int) -> tuple[IntArray, IntArray]:
    """Two random halves, (train, test), that no family straddles."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(int(family.max()) + 1)
    size = np.bincount(family)[order]
    first = order[np.cumsum(size) <= family.size // 2]
    inside = np.isin(family, first)
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def _judge_half(
    study: _Study, train: IntArray, test: IntArray, seed: int, tally: _Tally
) -> tuple[tuple[float, ...], FloatArray, IntArray]:
    """Surplus per task of each policy on the held-out half, the policy's regret on each request, and its choices."""
    everyone = np.arange(len(study.log.models))
    estimates = fit_estimates(study.log.take(train, everyone), study.requests.take(train), seed=seed)
    chosen, believed = _choices(study, estimates, test)
    true, at = study.true[test], np.arange(test.size)
    best = true.max(axis=1)
    by_class = _priced(study, test, _class_means(study, train, test))
    tally.add(believed.quality, study.case.uses.quality[test], estimates, study.requests.take(test), seed)
    means = (
        true[at, chosen].mean(),
        true[at, by_class].mean(),
        true[:, study.true[train].mean(axis=0).argmax()].mean(),
        true.mean(axis=0).max(),
        best.mean(),
        _ceiling(study, train, test, believed, seed),
    )
    return tuple(map(float, means)), best - true[at, chosen], chosen


def _choices(study: _Study, estimates: Estimates, rows: IntArray) -> tuple[IntArray, Uses]:
    """The learned policy: [Z-4] on estimated amounts."""
    uses = _believed(estimates, study.requests.take(rows), study.case.economy)
    return _priced(study, rows, uses), uses


def _believed(estimates: Estimates, requests: Requests, economy: Economy) -> Uses:
    """What the learned policy expects of each model, with risk measured as the settings say."""
    resources = {name: r.column for name, r in economy.resources.items()}
    uses = estimates.offer(requests, resources=resources).uses
    if economy.needs_losses:
        uses = replace(uses, losses=estimates.losses_of(requests))
        uses = uses.with_risk(economy.measure) if economy.risk_over == "use" else uses
    return uses


def _priced(study: _Study, rows: IntArray, uses: Uses, shut: BoolArray | None = None) -> IntArray:
    """The best use of each request at declared prices, (M,), models that are `shut` (I,) left out."""
    allowed = study.case.uses.allowed[rows]
    uses = replace(uses, allowed=allowed if shut is None else allowed & ~shut)
    worth = surplus(study.case.tasks.take(rows), uses, study.case.economy.declared())
    return choose(worth, defer=False).use


def _class_means(study: _Study, train: IntArray, test: IntArray) -> Uses:
    """What every gateway could do: means by class, not pooled, as in a spreadsheet."""
    labels = study.log.task_class
    classes = np.zeros(len(study.log), dtype=np.int64) if labels is None else labels.codes + 1
    n, uses = int(classes.max()) + 1, study.case.uses
    count = np.bincount(classes[train], minlength=n)

    def means(column: FloatArray) -> FloatArray:
        flat = np.ascontiguousarray(column[train]).reshape(train.size, -1)
        out = np.tile(flat.mean(axis=0), (n, 1))
        for c in np.flatnonzero(count):
            out[c] = flat[classes[train] == c].mean(axis=0)
        return out[classes[test]].reshape(test.size, *column.shape[1:])

    return Uses(names=uses.names, resources=uses.resources, **uses.each(means))


def _ceiling(study: _Study, train: IntArray, test: IntArray, believed: Uses, seed: int) -> float:
    """Gap closed among one half of the models by a policy that knows how the other half did on the very request.

    Both ways, averaged. The halves are disjoint: a model judged by all others would be picked just where it failed alone.
    """
    labels, quality = study.log.task_class, study.case.uses.quality
    classes = np.zeros(len(study.log), dtype=np.int64) if labels is None else labels.codes
    means = class_means(quality[train], classes[train], int(classes.max()) + 1).mean[classes]
    beyond = quality - means
    size = np.bincount(classes[train] + 1, minlength=int(classes.max()) + 2)
    group = np.where(size[classes + 1] >= LEAST, classes, -1)  # small classes share one model
    order = np.random.default_rng(seed).permutation(quality.shape[1])
    parts = order[: order.size // 2], order[order.size // 2 :]
    closed = []
    for known, open_to in (parts, parts[::-1]):
        true = study.true[test][:, open_to]
        fixed, best = true.mean(axis=0).max(), true.max(axis=1).mean()
        if open_to.size < 2 or not np.isfinite(fixed) or best <= fixed:
            continue  # nothing to choose between, or nothing to compare with
        found = means[test]
        for g in np.unique(group[test]):
            here, there = train[group[train] == g] if g >= 0 else train, np.flatnonzero(group[test] == g)
            ridge = fit_ridge(beyond[np.ix_(here, known)], beyond[np.ix_(here, open_to)])
            found[np.ix_(there, open_to)] += ridge.predict(beyond[np.ix_(test[there], known)])
        shut = np.ones(quality.shape[1], dtype=np.bool_)
        shut[open_to] = False
        chosen = _priced(study, test, replace(believed, quality=found), shut)
        closed.append((study.true[test, chosen].mean() - fixed) / (best - fixed))
    return float(np.mean(closed)) if closed else 0.0


def _halves(rows: list[tuple[float, ...]]) -> Halves:
    return Halves(*(Spread(column) for column in np.array(rows).T))


# --- how well q̂ says what happens -------------------------------------------------------------------------------------


class _Tally:
    """Predictions against outcomes, split by split."""

    def __init__(self) -> None:
        self.error: list[float] = []
        self.sums = np.zeros((3, BINS))
        self.covered: dict[float, list[float]] = {level: [] for level in LEVELS}

    def add(
        self, predicted: FloatArray, outcome: FloatArray, estimates: Estimates, requests: Requests, seed: int
    ) -> None:
        """One split's held-out half, (M, I); NaN outcomes are unknown."""
        known = ~np.isnan(outcome)
        bins = np.minimum((predicted[known] * BINS).astype(np.int64), BINS - 1)
        weights = (None, predicted[known], outcome[known])
        sums = np.stack([np.bincount(bins, weights=w, minlength=BINS) for w in weights])
        self.sums += sums
        self.error.append(float(np.abs(sums[1] - sums[2]).sum() / max(sums[0].sum(), 1)))
        found, lot = estimates.quality.predict(requests), np.random.default_rng(seed).random(len(requests))
        for level in LEVELS:
            low, high = estimates.quality.interval(found, level, lot)
            inside = (outcome >= low) & (outcome <= high)
            self.covered[level].append(float(inside[known].mean()))

    def calibration(self) -> Calibration:
        count = self.sums[0]
        predicted, observed = np.divide(self.sums[1:], count, out=np.full((2, BINS), np.nan), where=count > 0)
        return Calibration(
            error=Spread(np.array(self.error)),
            predicted=predicted,
            observed=observed,
            count=count.astype(np.int64),
            coverage={level: Spread(np.array(shares)) for level, shares in self.covered.items()},
        )


# --- only what was chosen is known ------------------------------------------------------------------------------------


def _has_propensities(log: Log) -> bool:
    return "propensity" in log.per_use and bool((log.chosen != UNKNOWN).any())


def _judge_logged(log: Log, economy: Economy, step: OnStep) -> Evaluation:
    if not _has_propensities(log):
        what = "most outcomes are unknown, and the log has no propensities: nothing can be said of another policy"
        raise RecordError(
            what, hint="log `chosen` and `propensity`, and explore a little: `walras route --explore`"
        )
    policy, gain, tally, picks = _off_policy(log, economy, step)
    return Evaluation(
        tasks=len(log),
        models=log.models,
        classes=len(log.task_class.names) if log.task_class else 0,
        left_out=0,
        synthetic=log.synthetic,
        halves=None,
        apart=None,
        near_duplicates=float("nan"),
        regret=None,
        picks=picks,
        calibration=tally.calibration(),
        off_policy=policy,
        gain=gain,
        notes=("only the chosen model's outcome is known: regret against the best is unknown",),
    )


def _off_policy(
    log: Log, economy: Economy, step: OnStep
) -> tuple[OffPolicy, Difference, _Tally, dict[str, float]]:
    """Two-fold: each half is judged by what the other half taught; all requests speak at once."""
    rows = np.flatnonzero(log.chosen != UNKNOWN)
    taken = log.chosen[rows]
    known = ~np.isnan(log.per_use["quality"][rows, taken]) & ~np.isnan(log.per_use["cost_usd"][rows, taken])
    rows, taken = rows[known], taken[known]
    if rows.size < 2 * LEAST:
        raise RecordError(
            f"{rows.size} requests with a known outcome are too few to split: {2 * LEAST} are needed"
        )
    log = log.take(rows, np.arange(len(log.models)))
    case = build_case(log, economy, audited=False)
    if len(case.tasks) != len(log):
        raise RecordError(
            "what is priced is unknown for some chosen outcomes", hint="leave those requests out"
        )
    at, requests = np.arange(len(log)), requests_of(log)
    # Of the use that was taken, forbidden now or not.
    reward = surplus(case.tasks, case.uses.pick(taken), economy.declared())[:, 0]
    policy, model = np.zeros(case.uses.shape), np.zeros(case.uses.shape)
    tally, everyone = _Tally(), np.arange(len(log.models))
    first, second = _split(np.arange(len(log)), 0)
    for train, test in ((first, second), (second, first)):
        step("off-policy evaluation")
        estimates = fit_estimates(log.take(train, everyone), requests.take(train))
        uses = _believed(estimates, requests.take(test), economy)
        uses = replace(
            uses, allowed=~economy.forbidden(log.models, len(log), log.tenant, log.task_class)[test]
        )
        worth = surplus(case.tasks.take(test), uses, economy.declared())
        policy[test, choose(worth, defer=False).use] = 1.0
        model[test] = np.where(np.isfinite(worth), worth, 0.0)
        tally.add(uses.quality, log.per_use["quality"][test], estimates, requests.take(test), 0)
    propensity = log.per_use["propensity"]
    whole = None if np.isnan(propensity).any() else propensity
    _check_propensities(log, propensity[at, taken], whole)
    classes = None if log.task_class is None else log.task_class.codes + 1
    logged = Logged(taken, propensity[at, taken], reward, whole, classes, log.models)
    picks = dict(zip(log.models, policy.mean(axis=0).tolist(), strict=True))
    return evaluate_policy(logged, policy, model), compare(logged, policy, model), tally, picks


def _check_propensities(log: Log, taken: FloatArray, whole: FloatArray | None) -> None:
    """What was taken had a chance, and a request's chances sum to 1 where all are recorded."""
    bad = np.flatnonzero(~(taken > 0))
    if bad.size:
        how = "unknown" if np.isnan(taken[bad[0]]) else f"{taken[bad[0]]:g}"
        what = f"of request '{log.ids[bad[0]]}' is {how} for the model that was chosen ({bad.size} such requests)"
        raise RecordError(what, field="propensity", hint="log the probability it was drawn with, above 0")
    if whole is None:
        return
    total = whole.sum(axis=1)
    bad = np.flatnonzero(np.abs(total - 1) > 1e-6)
    if bad.size:
        what = f"of request '{log.ids[bad[0]]}' sums to {total[bad[0]]:g} over the models ({bad.size} such requests)"
        raise RecordError(
            what, field="propensity", hint="it must be 1; or leave it null but for the chosen model"
        )
