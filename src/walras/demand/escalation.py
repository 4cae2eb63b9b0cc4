"""Does trying in turn pay? Plans of `demand.search` fitted to a log, replayed on it, and the cost at which they stop paying.

A log has every model's outcome on each task but no verifier's verdicts, so here the verifier is SIMULATED: what it says is
drawn from its sensitivity and specificity alone (in expectation, so nothing is drawn). A real verifier errs more on hard
tasks and repeats its errors; what is found here is then too good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from walras.demand.search import STOP, VERIFY, Plan, Verifier, plan_search
from walras.equation import DEFER
from walras.errors import QuantityError
from walras.estimate.class_means import pooled_class_means
from walras.estimate.outcomes import Joint, fit_joint
from walras.quantities import IntArray
from walras.risk import FloatArray

# --- replay on a log, with a verifier that is simulated --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SimulatedReplay:
    """What a plan gets on logged outcomes. The outcomes and costs are logged; the verifier is SIMULATED.

    Expectations over the verifier's errors are exact (every branch, by its probability), so nothing is drawn.
    """

    simulated_verifier: Verifier
    """How it errs: independently of the task, of the model and of its own other verdicts. Real ones do worse."""
    surplus: FloatArray
    """V·quality − spending, USD, (N,)."""
    quality: FloatArray
    """Expected quality of the answer kept, (N,); 0 where none is."""
    spending: FloatArray
    """Models and verifier, USD, (N,)."""
    opened: FloatArray
    """P(the model is opened), (N, I)."""
    verified: FloatArray
    """Expected number of verifications, (N,)."""

    def __str__(self) -> str:
        n = len(self.surplus)
        error = self.surplus.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
        return (
            f"SIMULATED verifier ({self.simulated_verifier}) on {n:,} logged tasks: surplus ${self.surplus.mean():,.4g} "
            f"± ${error:,.2g} per task, quality {self.quality.mean():.1%}, spending ${self.spending.mean():,.4g}, "
            f"{self.verified.mean():.2f} verifications"
        )


def simulate(
    plan: Plan,
    rows: IntArray,
    outcomes: FloatArray,
    costs: FloatArray,
    value: FloatArray | float,
    *,
    verifier: Verifier | None = None,
) -> SimulatedReplay:
    """Replay a plan on logged outcomes with a simulated verifier.

    Args:
        rows: the plan's row for each task, (N,).
        outcomes: 1 right, 0 wrong, all models known, (N, I).
        costs: κ_m as it came out, USD, (N, I).
        value: V, USD per right answer, (N,) or one for all.
        verifier: how the simulated verifier errs; by default as the plan expects.

    Raises:
        QuantityError: shapes that do not fit, or outcomes other than 0 and 1.
    """
    _check_log(outcomes, costs, plan.names)
    if len(rows) != len(outcomes):
        raise QuantityError(
            f"replay: {len(rows)} rows for {len(outcomes)} tasks; each needs one row of the plan"
        )
    verifier = plan.verifier if verifier is None else verifier
    n, task = len(rows), np.arange(len(rows))
    reach = np.zeros((n, plan.kind.shape[1]))
    reach[:, 0] = 1.0
    quality, verified, opened = np.zeros(n), np.zeros(n), np.zeros(outcomes.shape)
    for t in range(reach.shape[1]):
        kind, use, here = plan.kind[rows, t], plan.use[rows, t], reach[:, t]
        right = np.where(use == DEFER, 0.0, outcomes[task, np.maximum(use, 0)])
        opened[task, np.maximum(use, 0)] += np.where(kind != STOP, here, 0.0)
        going = np.where(kind == VERIFY, here, 0.0)
        quality += (here - going) * right
        verified += going
        if going.any():
            passing = np.where(right > 0, verifier.sensitivity, verifier.given_wrong)
            reach[:, 2 * t + 1], reach[:, 2 * t + 2] = going * passing, going * (1 - passing)
    spending = (opened * costs).sum(axis=1) + verified * plan.verifier_cost[rows]
    return SimulatedReplay(verifier, value * quality - spending, quality, spending, opened, verified)


# --- plans from a log -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """What was learned from some tasks of a log, and the tasks it may be judged on."""

    joint: Joint
    costs: FloatArray
    """Mean κ_m by class, USD, (C, I)."""
    learned_from: IntArray
    judged_on: IntArray


@dataclass(frozen=True, slots=True)
class Gain:
    """What a plan gains over the best fixed model, out of sample, with a SIMULATED verifier."""

    mean: float
    """USD per task."""
    error: float
    """Standard error over tasks."""


@dataclass(frozen=True, slots=True)
class Escalation:
    """What a log says about using models in turn; `plan` makes a decision of it at any V, verifier and price."""

    names: tuple[str, ...]
    outcomes: FloatArray
    costs: FloatArray
    classes: IntArray
    whole: _Part
    folds: tuple[_Part, ...]

    @property
    def joint(self) -> Joint:
        """The joint law of outcomes, from the whole log."""
        return self.whole.joint

    def plan(self, value: float, verifier: Verifier, verifier_cost: float = 0.0) -> Plan:
        """The plan of each class, (C rows): arguments as in `search.plan_search`."""
        return self._plan(self.whole, value, verifier, verifier_cost)

    def gain(self, value: float, verifier: Verifier, verifier_cost: float = 0.0) -> Gain:
        """Cross-fitted gain over the best fixed model: each fold is replayed under what the other folds teach.

        Near break-even its sign is a matter of luck, so it is reported and decides nothing: a rule that drops
        the plan where this is not positive was measured, and lost more than it saved (docs/benchmarks.md).
        """
        gains = np.empty(len(self.outcomes))
        for part in self.folds:
            on = part.judged_on
            plan = self._plan(part, value, verifier, verifier_cost)
            got = simulate(plan, self.classes[on], self.outcomes[on], self.costs[on], value).surplus
            rest = part.learned_from
            fixed = best_fixed(self.outcomes[rest], self.costs[rest], value)
            gains[on] = got - _fixed_surplus(self.outcomes[on], self.costs[on], value, fixed)
        return Gain(float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(gains.size)))

    def _plan(self, part: _Part, value: float, verifier: Verifier, verifier_cost: float) -> Plan:
        return plan_search(part.joint, self.names, value, part.costs, verifier, verifier_cost)


def best_fixed(outcomes: FloatArray, costs: FloatArray, value: float) -> int:
    """The model with the highest mean surplus on a log; `DEFER` where none is worth its cost."""
    mean = (value * outcomes - costs).mean(axis=0)
    return int(mean.argmax()) if mean.max() > 0 else DEFER


def _fixed_surplus(outcomes: FloatArray, costs: FloatArray, value: float, use: int) -> FloatArray:
    if use == DEFER:
        return np.zeros(len(outcomes))
    surplus: FloatArray = value * outcomes[:, use] - costs[:, use]
    return surplus


def fit_escalation(
    outcomes: FloatArray,
    costs: FloatArray,
    names: tuple[str, ...],
    classes: IntArray,
    n_classes: int,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Escalation:
    """Learn from a log in which every model ran.

    Args:
        outcomes: 1 right, 0 wrong, (N, I).
        costs: κ_m of each run, USD, (N, I); plans use its partially pooled class means.
        classes: class of each task, (N,), in 0…`n_classes`−1.
        folds: parts for cross-fitting; the tasks are dealt to them at random by `seed`.

    Raises:
        QuantityError: fewer tasks than folds, or columns that do not fit.
    """
    n = len(outcomes)
    if n < folds or folds < 2:
        raise QuantityError(
            f"escalation: {n} tasks for {folds} folds; at least 2 folds and a task in each are needed"
        )
    _check_log(outcomes, costs, names)
    dealt = np.random.default_rng(seed).permutation(n) % folds

    def learn(rows: IntArray, rest: IntArray) -> _Part:
        joint = fit_joint(outcomes[rows], classes[rows], n_classes)
        return _Part(joint, pooled_class_means(costs[rows], classes[rows], n_classes), rows, rest)

    everything = np.arange(n)
    parts = (learn(np.flatnonzero(dealt != f), np.flatnonzero(dealt == f)) for f in range(folds))
    return Escalation(names, outcomes, costs, classes, learn(everything, everything), tuple(parts))


# --- where escalation stops paying ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BreakEven:
    """The dearest verifier that search still pays for, USD per verification, by split, V and accuracy, (S, V, A)."""

    values: tuple[float, ...]
    accuracies: tuple[float, ...]
    priced: FloatArray
    """Largest cost at which the plan made from one half of the log buys a verification."""
    held_out: FloatArray
    """Largest cost up to there at which that plan beats the best fixed model on the other half (SIMULATED verifier)."""


GRID = 33
"""Costs tried at once; four rounds of them find the break-even to a millionth of V."""


def break_even(
    outcomes: FloatArray,
    costs: FloatArray,
    names: tuple[str, ...],
    values: tuple[float, ...],
    accuracies: tuple[float, ...],
    *,
    splits: int = 10,
    seed: int = 0,
) -> BreakEven:
    """Up to which cost a verifier of each accuracy is worth having, and how sure that is: over random halves.

    One class for all tasks, so that without a verifier the plan is the best fixed model and nothing else is compared.

    Args:
        outcomes, costs: as in `fit_escalation`.
        values: V, USD per right answer.
        accuracies: sensitivity = specificity, in [0.5, 1].
    """
    _check_log(outcomes, costs, names)
    rng, half = np.random.default_rng(seed), len(outcomes) // 2
    if half < 1 or splits < 1:
        raise QuantityError(
            f"break-even: {len(outcomes)} tasks and {splits} splits; two halves of a task each are needed"
        )
    worth = np.array(values)
    priced, held_out = np.zeros((2, splits, len(values), len(accuracies)))
    for s in range(splits):
        order = rng.permutation(len(outcomes))
        here, there = order[:half], order[half:]
        joint = fit_joint(outcomes[here], np.zeros(half, dtype=np.int64), 1)
        mean = costs[here].mean(axis=0)
        fixed = [best_fixed(outcomes[here], costs[here], v) for v in values]
        base = [
            _fixed_surplus(outcomes[there], costs[there], v, use).mean()
            for v, use in zip(values, fixed, strict=True)
        ]
        for a, accuracy in enumerate(accuracies):
            many = _Many(joint, names, mean, Verifier.accurate(accuracy))
            priced[s, :, a] = most = many.most(worth)
            tried = most[:, None] * np.linspace(0.0, 1.0, GRID)
            gains = many.replayed(worth, tried, outcomes[there], costs[there]) - np.array(base)[:, None]
            held_out[s, :, a] = np.where(gains > 0, tried, 0.0).max(axis=1)
    return BreakEven(values, accuracies, priced, held_out)


@dataclass(frozen=True, slots=True)
class _Many:
    """One plan for each V and each cost of the verifier, made together."""

    joint: Joint
    names: tuple[str, ...]
    costs: FloatArray
    verifier: Verifier

    def plan(self, values: FloatArray, tried: FloatArray) -> Plan:
        """Rows V × costs, for `tried` (V, P)."""
        g = tried.size
        value = np.repeat(values, tried.shape[1])
        costs = np.broadcast_to(self.costs, (g, self.costs.size))
        one = np.zeros(g, dtype=np.int64)
        return plan_search(self.joint, self.names, value, costs, self.verifier, tried.ravel(), classes=one)

    def most(self, values: FloatArray) -> FloatArray:
        """The largest cost at which a verification is bought, (V,): what search is worth falls in it."""
        low, high = np.zeros(values.size), values.copy()
        row = np.arange(values.size)
        for _ in range(4):
            tried = np.linspace(low, high, GRID, axis=1)
            buys = (self.plan(values, tried).kind[:, 0] == VERIFY).reshape(tried.shape)
            last = np.where(buys.any(axis=1), GRID - 1 - buys[:, ::-1].argmax(axis=1), 0)
            low, high = tried[row, last], tried[row, np.minimum(last + 1, GRID - 1)]
        return low

    def replayed(
        self, values: FloatArray, tried: FloatArray, outcomes: FloatArray, costs: FloatArray
    ) -> FloatArray:
        """Mean surplus on a log, (V, P)."""
        plan, n = self.plan(values, tried), len(outcomes)
        means = [
            simulate(plan, np.full(n, g), outcomes, costs, value).surplus.mean()
            for g, value in enumerate(np.repeat(values, tried.shape[1]))
        ]
        return np.reshape(means, tried.shape)


def _check_log(outcomes: FloatArray, costs: FloatArray, names: tuple[str, ...]) -> None:
    n, i = len(outcomes), len(names)
    if outcomes.shape != costs.shape or outcomes.shape != (n, i):
        raise QuantityError(f"log: outcomes {outcomes.shape} and costs {costs.shape} must be ({n}, {i})")
    if not np.isin(outcomes, (0.0, 1.0)).all():
        raise QuantityError("log: every outcome must be 0 or 1; leave out tasks that some model did not run")
    if not (costs >= 0).all() or not np.isfinite(costs).all():
        raise QuantityError("log: every cost must be finite and ≥ 0")
