"""What another policy would have earned, from a log of choices made with known probabilities. [OP-1]

A log has one reward a row: that of the action taken. With the probability p the action was taken with, and π the
probability the evaluated policy would have given it, the weight w = π/p makes the log speak for that policy:

    IPS        mean of w·r                                           (Horvitz & Thompson 1952)
    SNIPS      Σ w·r / Σ w                                           (Hájek; Swaminathan & Joachims 2015)
    DR         mean of Σ_a π_a·q̂_a + w·(r − q̂)                       (Dudík, Langford & Li 2011)
    switch-DR  DR, but where w > τ the model is believed alone       (Wang, Agarwal & Dudík 2017)

Intervals. Weights are skewed, so normal intervals miss the truth too often, and nearly always on one side. The
intervals here are empirical likelihood (Owen 1988), with Fisher's F for χ² and Bartlett's correction (DiCiccio, Hall &
Romano 1991): asymmetric, inside the range of the scores, and as wide as the data ask. For SNIPS the likelihood is that of
E[w·(r − v)] = 0, so a ratio needs no linearisation; its standard error is the delta method's. They speak for
independent rows, each drawn from the population that the policy is to serve.

The threshold τ minimises estimated variance + bias², where bias is that paper's bound: the mass of the policy above τ
times the furthest a true mean can lie from the model, given that rewards stay in the range logged. What is left of that
bound also widens the interval (Armstrong & Kolesár 2018), so it is valid, and too wide where the model is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from walras.errors import QuantityError, RecordError, SupportError
from walras.estimate.empirical_likelihood import Estimate, mean_of, ratio_of, standard_error, widened
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

Estimator = Literal["ips", "snips", "dr", "switch_dr"]

LEAST_ESS = 100.0
"""Effective rows below which no estimate is given: 95% intervals were seen to cover as little as 88% there."""
LEAST_CARRIERS = 10.0
"""Rows that carry the variance; with fewer, 95% intervals were seen to cover 90 to 95%."""
UNSEEN = 0.01
"""Share of the policy's mass that may fall on actions a log without full probabilities happens not to show."""
THIN = 0.01
"""A propensity below this is thin: one such row weighs as much as a hundred."""
TINY = 1e-9
"""Probabilities below this are 0."""


@dataclass(frozen=True, slots=True)
class Logged:
    """What was done and what came of it, N rows. Deferring is one more action, with a column of its own.

    Raises:
        RecordError: a column of another length, or a value that cannot be; names the row (1 = first).
    """

    action: IntArray
    """Column of the action taken, (N,), 0…A−1."""
    propensity: FloatArray
    """Probability it was taken with, (N,), in (0, 1]."""
    reward: FloatArray
    """What it earned, USD, (N,)."""
    probabilities: FloatArray | None = None
    """Probability of every action in every row, (N, A), if the logging policy is known."""
    task_class: IntArray | None = None
    """Class of each row, (N,), ≥ 0: only to find actions never tried in a class, where `probabilities` is None."""

    names: tuple[str, ...] | None = None
    """What the actions are called in messages."""

    def name(self, action: int) -> str:
        """An action, for people."""
        return f"action {action}" if self.names is None else f"'{self.names[action]}'"

    def __post_init__(self) -> None:
        n = self.action.size
        if self.action.shape != (n,) or not np.issubdtype(self.action.dtype, np.integer):
            raise RecordError("must be whole numbers, one a row: columns of the policy", field="action")
        if n == 0:
            raise RecordError("the log has no rows", hint="nothing can be said of any policy")
        for name in ("propensity", "reward", "task_class"):
            column = getattr(self, name)
            if column is not None and column.shape != (n,):
                raise RecordError(f"has shape {column.shape}, the actions ({n},)", field=name)
        _refuse_rows(self.action < 0, "action", self.action, "an action is a column, ≥ 0")
        p = self.propensity
        why = "the probability of an action that was taken is above 0, at most 1: log it when choosing"
        _refuse_rows(~((p >= TINY) & (p <= 1)), "propensity", p, why)
        _refuse_rows(~np.isfinite(self.reward), "reward", self.reward, "drop rows whose outcome is unknown")
        if self.task_class is not None:
            _refuse_rows(self.task_class < 0, "task_class", self.task_class, "a class is a number ≥ 0")
        if self.probabilities is not None:
            _check_probabilities(self.probabilities, n, "probabilities of the log")
            _check_actions(self.action, self.probabilities.shape[1])
            own = _at(self.probabilities, self.action)
            why = "it is not what `probabilities` says of the action taken"
            _refuse_rows(~np.isclose(own, p, rtol=1e-6, atol=0), "propensity", p, why)


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far the log can speak for the policy."""

    rows: int
    ess: float
    """Kish's effective sample size, (Σw)²/Σw²: this many rows of the policy's own would say about as much."""
    expected_ess: float | None
    """The same with every action a row could have shown, in place of the one it did: heavy weights that happen not to
    have been drawn count too. None where the log has no full probabilities."""
    carriers: float
    """(Σw²)²/Σw⁴, expected where it can be: how many rows carry the variance. Errors are themselves estimated from these."""
    max_weight: float
    mean_weight: float
    """1 within its error when the propensities logged are the true ones."""
    mean_weight_z: float
    """(mean weight − 1) in standard errors; beyond ±3 the propensities are wrong, or rare heavy rows were not drawn."""
    never_logged: float
    """Share of the policy's mass on actions never seen in the log (in their class)."""
    thin: float
    """Share of the policy's mass on actions with a propensity below `THIN`; estimated by w where others are unknown."""


@dataclass(frozen=True, slots=True)
class OffPolicy:
    """What a policy would have earned, by every estimator that the inputs allow."""

    estimates: Mapping[Estimator, Estimate]
    overlap: Overlap
    recommended: Estimator
    reason: str
    level: float
    switch_weight: float | None
    """τ of switch-DR; infinite where nothing is switched (always, if the log has only the propensities of what was
    taken), None without a model."""
    switch_bias: float | None
    """Bound on the bias that switching brings, USD per row."""

    @property
    def best(self) -> Estimate:
        """The recommended estimate."""
        return self.estimates[self.recommended]


def evaluate_policy(
    logged: Logged, policy: FloatArray, model: FloatArray | None = None, level: float = 0.95
) -> OffPolicy:
    """Value of `policy` in USD per row, on the requests of the log.

    Args:
        policy: probability of each action in each row, (N, A); one-hot for a deterministic policy. It must not have
            been fitted on these rows.
        model: reward expected of each action in each row, USD, (N, A). It must be cross-fitted: what it says of a row
            may not come from that row, or DR believes its own noise and its errors are too small.
        level: of the intervals.

    Raises:
        SupportError: the policy wants actions that the log never or hardly took.
        QuantityError: `policy` is not a table of probabilities, or `model` has another shape.
    """
    w = _weights(logged, policy, model, level)
    overlap = _overlap(logged, policy, w)
    _refuse_without_support(logged, policy, w, overlap)
    r = logged.reward
    estimates: dict[Estimator, Estimate] = {
        "ips": mean_of(w * r, level),
        "snips": ratio_of(w, r, level),
    }
    tau = bias = None
    if model is not None:
        base, correction = _doubly_robust(logged, policy, model, w)
        estimates["dr"] = mean_of(base + correction, level)
        tau, bias = _switch(logged, policy, model, w, base, correction)
        kept = mean_of(base + np.where(w <= tau, correction, 0.0), level)
        estimates["switch_dr"] = widened(kept, bias, level)
    recommended, reason = _recommend(estimates, overlap, tau, bias)
    return OffPolicy(estimates, overlap, recommended, reason, level, tau, bias)


def compare(
    logged: Logged, policy: FloatArray, model: FloatArray | None = None, level: float = 0.95
) -> Estimate:
    """What `policy` would have earned more than the choices in the log did, USD per row, row by row.

    By DR where there is a `model`, by SNIPS where not. Arguments and errors are those of `evaluate_policy`.
    """
    w = _weights(logged, policy, model, level)
    _refuse_without_support(logged, policy, w, _overlap(logged, policy, w))
    r = logged.reward
    if model is not None:
        base, correction = _doubly_robust(logged, policy, model, w)
        return mean_of(base + correction - r, level)
    v = float(w @ r / w.sum())
    return mean_of(v + w * (r - v) / w.mean() - r, level)


# --- scores -----------------------------------------------------------------------------------------------------


def _weights(logged: Logged, policy: FloatArray, model: FloatArray | None, level: float) -> FloatArray:
    """π/p of the actions taken, (N,), once all arguments are known to fit each other."""
    _check_probabilities(policy, logged.action.size, "probabilities of the policy")
    _check_actions(logged.action, policy.shape[1])
    if logged.probabilities is not None and logged.probabilities.shape != policy.shape:
        raise QuantityError(
            f"the policy has {policy.shape[1]} actions, the log {logged.probabilities.shape[1]}"
        )
    if model is not None and (model.shape != policy.shape or not np.isfinite(model).all()):
        raise QuantityError(
            f"the model must be finite, of shape {policy.shape} as the policy; got {model.shape}"
        )
    if not 0 < level < 1:
        raise QuantityError(f"the level of an interval is inside (0, 1), got {level}")
    return _at(policy, logged.action) / logged.propensity


def _doubly_robust(
    logged: Logged, policy: FloatArray, model: FloatArray, w: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The two parts of a row's score: Σ_a π_a·q̂_a, what the model expects, and w·(r − q̂), what it missed; (N,) each."""
    expected: FloatArray = np.einsum("na,na->n", policy, model)
    return expected, w * (logged.reward - _at(model, logged.action))


def _switch(
    logged: Logged,
    policy: FloatArray,
    model: FloatArray,
    w: FloatArray,
    base: FloatArray,
    correction: FloatArray,
) -> tuple[float, float]:
    """(τ, bound on the bias) with the least variance + bias²; candidates are 0, the weights in the log, and ∞."""
    if logged.probabilities is None:
        # The mass above τ would have to be told by the very weights above τ, and (Σ w·furthest)², the price of dropping
        # them, is at least Σ (w·(r − q̂))², about what that saves: there is nothing to switch.
        return float("inf"), 0.0
    n, order = w.size, np.argsort(w)
    centred = base - base.mean()
    first = np.concatenate(([0.0], np.cumsum(correction[order])))
    second = np.concatenate(([0.0], np.cumsum((correction * (correction + 2 * centred))[order])))
    variance = (second + centred @ centred - first**2 / n) / (n * (n - 1))

    # A true mean lies in the range of rewards: so far may it be from the model.
    wanted, r = policy > 0, logged.reward
    furthest = np.maximum(r.max() - model, model - r.min())
    ratio = policy[wanted] / np.maximum(logged.probabilities[wanted], TINY)
    mass = (policy * furthest)[wanted]
    by_ratio = np.argsort(ratio)
    above = np.concatenate((np.cumsum(mass[by_ratio][::-1])[::-1], [0.0]))
    taus = np.concatenate(([0.0], w[order]))
    bias = above[np.searchsorted(ratio[by_ratio], taus, side="right")] / n

    # Of rows with the same weight all are kept or none: only the last of them is a candidate.
    last = np.append(np.diff(taus) > 0, True)
    risk = np.where(last, variance + bias**2, np.inf)
    best = int(np.argmin(risk))
    if best == n or risk[best] >= variance[n]:
        return float("inf"), 0.0
    return float(taus[best]), float(bias[best])


# --- overlap and support ----------------------------------------------------------------------------------------


def _overlap(logged: Logged, policy: FloatArray, w: FloatArray) -> Overlap:
    n, p = w.size, logged.probabilities
    mean, se = float(w.mean()), standard_error(w)
    off = 0.0 if abs(mean - 1.0) <= TINY else mean - 1.0
    if p is None:
        thin, expected, second, fourth = w[logged.propensity < THIN].sum(), None, w @ w, (w**4).sum()
    else:
        thin, possible = policy[p < THIN].sum(), p >= TINY
        ratio, chance = policy[possible] / p[possible], p[possible]
        ratio /= ratio.max() or 1.0
        second, fourth = chance @ ratio**2, chance @ ratio**4
        expected = float((chance @ ratio) ** 2 / second) if second else 0.0
    return Overlap(
        rows=n,
        ess=float(w.sum() ** 2 / (w @ w)) if w.any() else 0.0,
        expected_ess=expected,
        carriers=float(second**2 / fourth) if fourth else 0.0,
        max_weight=float(w.max()),
        mean_weight=mean,
        mean_weight_z=off / se if se else float(np.copysign(np.inf, off)) if off else 0.0,
        never_logged=float(_never_logged(logged, policy).sum()),
        thin=float(thin / n),
    )


def _never_logged(logged: Logged, policy: FloatArray) -> FloatArray:
    """Share of the policy's mass on each action where the log never takes it, (A,)."""
    n, actions = policy.shape
    if logged.probabilities is not None:
        return np.asarray(np.where(logged.probabilities >= TINY, 0.0, policy).sum(axis=0) / n)
    classes = np.zeros(n, dtype=np.int64) if logged.task_class is None else logged.task_class
    wanted = np.zeros((int(classes.max()) + 1, actions))
    np.add.at(wanted, classes, policy)
    wanted[classes, logged.action] = 0.0
    return np.asarray(wanted.sum(axis=0) / n)


def _refuse_without_support(logged: Logged, policy: FloatArray, w: FloatArray, overlap: Overlap) -> None:
    """An estimate is refused where the log says nothing, or too little for an interval to hold."""
    if overlap.never_logged > (UNSEEN if logged.probabilities is None else TINY):
        raise _never_taken(logged, _never_logged(logged, policy), overlap.rows)
    # What is drawn is a poor judge of what could be: to refuse only logs that show their heavy rows would be to keep
    # those with unseen ones. So the expected size decides where it is known, unless luck left next to nothing.
    least, expected = (
        (LEAST_ESS, LEAST_ESS) if overlap.expected_ess is None else (LEAST_ESS / 10, overlap.expected_ess)
    )
    if expected < LEAST_ESS:
        raise _too_seldom(logged, policy, w, expected, LEAST_ESS)
    if overlap.ess < least:
        raise _too_seldom(logged, policy, w, overlap.ess, least)


def _never_taken(logged: Logged, by_action: FloatArray, n: int) -> SupportError:
    action, mass, total = int(np.argmax(by_action)), float(by_action.max()), float(by_action.sum())
    # An action with mass m, taken with probability ε where it is wanted, adds m/ε to the mean of w²: the effective
    # size, n over that mean, then stays above the least one only with ε ≥ m · least / n.
    least = mass * LEAST_ESS / n
    how = (
        f"with a probability of {least:.2g} or more"
        if least < 1
        else f"in {np.ceil(n * least):,.0f} rows or more"
    )
    return SupportError(
        f"the policy gives {total:.2%} of its choices to actions that the log never takes there; most of it, "
        f"{mass:.2%}, to {logged.name(action)}",
        action=action,
        mass=mass,
        hint=f"log some exploration: take {logged.name(action)} {how} where the policy wants it",
    )


def _too_seldom(logged: Logged, policy: FloatArray, w: FloatArray, ess: float, least: float) -> SupportError:
    n, p = policy.shape[0], logged.probabilities
    if p is None:
        load = np.bincount(logged.action, weights=w**2, minlength=policy.shape[1])
    else:
        load = np.divide(policy**2, p, out=np.zeros_like(policy), where=p >= TINY).sum(axis=0)
    action = int(np.argmax(load)) if load.any() else int(np.argmax(policy.sum(axis=0)))
    mass, more = float(policy[:, action].mean()), least / max(ess, 1.0)
    return SupportError(
        f"the {n:,} rows of the log are worth {ess:.1f} rows of this policy, and {least:g} are needed; weights "
        f"are largest for {logged.name(action)}, {mass:.2%} of the policy's choices",
        action=action,
        mass=mass,
        hint=f"log {np.ceil(n * more):,.0f} rows like these, or take {logged.name(action)} about {more:.1f} times as often "
        "where the policy wants it",
    )


def _recommend(
    estimates: Mapping[Estimator, Estimate], overlap: Overlap, tau: float | None, bias: float | None
) -> tuple[Estimator, str]:
    """The estimator to believe, and why. One is left for another only if that is clearly better: to take
    whichever claims the smaller error is to believe whichever is luckier."""
    cautions = ""
    if abs(overlap.mean_weight_z) > 3:
        cautions += (
            f"; but weights average {overlap.mean_weight:.3g} instead of 1, {overlap.mean_weight_z:+.1f} standard "
            "errors off: the propensities are wrong, or rare heavy rows were not drawn"
        )
    if overlap.carriers < LEAST_CARRIERS:
        cautions += f"; but {overlap.carriers:.1f} rows carry the variance: errors may be too small"
    if tau is None or bias is None:
        return "snips", "there is no reward model; dividing by the weights takes out their luck" + cautions
    name: Estimator = "switch_dr" if np.isfinite(tau) else "dr"
    if np.hypot(estimates[name].se, bias) > 1.1 * estimates["snips"].se:
        return "snips", "the reward model adds more noise than it takes out" + cautions
    if name == "switch_dr":
        why = f"rows with weights above {tau:.3g} add more variance than the model can add bias"
    else:
        why = "the reward model takes out noise, and the weights take out its bias"
    return name, why + cautions


# --- what cannot be ---------------------------------------------------------------------------------------------


def _at(table: FloatArray, column: IntArray) -> FloatArray:
    """table[n, column[n]], (N,)."""
    return np.asarray(np.take_along_axis(table, column[:, None], axis=1)[:, 0])


def _check_actions(action: IntArray, actions: int) -> None:
    _refuse_rows(action >= actions, "action", action, f"columns are 0 to {actions - 1}")


def _check_probabilities(table: FloatArray, n: int, what: str) -> None:
    if table.ndim != 2 or table.shape[0] != n:
        raise QuantityError(
            f"{what} have shape {table.shape}; there must be one row for each of the {n} logged"
        )
    bad = np.flatnonzero(~((table >= 0).all(axis=1) & (np.abs(table.sum(axis=1) - 1.0) <= 1e-6)))
    if bad.size:
        raise QuantityError(
            f"{what}: row {bad[0] + 1} is not ≥ 0 with sum 1 ({bad.size} such rows); it sums to "
            f"{table[bad[0]].sum():g}. A deterministic policy is one-hot; deferring has a column of its own"
        )


def _refuse_rows(bad: BoolArray, field: str, values: FloatArray | IntArray, why: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        more = f" ({rows.size} such rows)" if rows.size > 1 else ""
        raise RecordError(f"{values[rows[0]]:g} cannot be{more}", row=int(rows[0]) + 1, field=field, hint=why)
