"""The audit: one log and the operator's settings in; prices, regret and misallocation in dollars out.

The steps, in order: make the economy (`case`), discover the prices (`market.shadow`), measure regret at them (`regret`), find
what a policy could have reached (`attainable`), and ask how all of it moves with the inputs (`sensitivity`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from walras.diagnosis.attainable import Attainable, Change, attainable_gain, attainable_policy, best_changes
from walras.diagnosis.case import Case, Fixed, best_fixed, build_case
from walras.diagnosis.regret import Mean, Regret, bootstrap_mean, measure_regret
from walras.diagnosis.sensitivity import Curve, Scenario, multiplier_intervals, scenarios, surplus_curve
from walras.equation import DEFER, choose, surplus
from walras.errors import InfeasibleError
from walras.market.clearing import Clearing, Usage, measure_usage
from walras.market.mix import Mix
from walras.market.shadow import OnPass
from walras.quantities import USD
from walras.records import Log
from walras.risk import FloatArray
from walras.settings import Economy

OnStep = Callable[[str], None]
"""Called with a few words before each step, for progress."""


@dataclass(frozen=True, slots=True)
class Realised:
    """The audited choices at declared prices, per task."""

    surplus: Mean
    value: float
    """V·ΔQ, USD."""
    cost: float
    """USD."""
    latency_s: float
    """Mean seconds over served tasks; NaN where the log has none."""
    risk: float
    """Mean risk; NaN where the log has none."""
    quality: float
    served: float
    """Share of tasks that were served."""
    usage: tuple[Usage, ...]
    shares: FloatArray
    """Share of tasks by use, (I + 1,); the last is deferring."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Everything the reports say."""

    case: Case
    clearing: Clearing
    oracle: float | None
    """Ex-post optimal surplus within the constraints when every task is served; None if that is impossible."""
    oracle_with_defer: float
    best_fixed: Fixed | None
    attainable: Attainable | None
    gain_surplus: Mean | None
    """What replacing the audited choices by the attainable policy gains at declared prices, USD per task …"""
    gain_limits: Mean | None
    """… and what that frees (below 0: takes) of the limits, at the policy's own prices; see `attainable.Gain`."""
    realised: Realised
    regret: Regret
    changes: tuple[Change, ...]
    scenarios: tuple[Scenario, ...]
    intervals: tuple[tuple[float, float], ...]
    """95% interval of each multiplier."""
    curve: Curve
    shares: dict[str, FloatArray]
    """Share of tasks by use, (I + 1,): `chosen`, at `declared prices`, at `discovered prices`."""
    seconds: float


def price_log(
    log: Log, economy: Economy, on_pass: OnPass | None = None, *, xp: Any = None
) -> tuple[Case, Clearing]:
    """Prices and certificate only: what `walras prices` prints. `xp`: cupy, to search on a device."""
    case = build_case(log, economy, audited=False)
    return case, case.clear(on_pass=on_pass, xp=xp)


def audit_log(log: Log, economy: Economy, *, seed: int = 0, on_step: OnStep = lambda _: None) -> Audit:
    """Audit a log.

    Raises:
        RecordError, SettingsError, InfeasibleError, NotCleared: see `build_case` and `market.shadow.discover`.
    """
    began = time.perf_counter()
    on_step("discovering prices")
    case = build_case(log, economy)
    clearing = case.clear()
    on_step("bounds with and without deferring")
    with_defer, without = _oracles(case, clearing)
    on_step("regret")
    regret = measure_regret(case, clearing.prices, seed)
    realised = _realised(case, seed)
    on_step("what a policy could have reached")
    policy = attainable_policy(case, seed) if case.complete else None
    gain = attainable_gain(case, clearing.prices, policy) if policy else None
    changes = best_changes(case, policy, gain) if policy and gain else []
    on_step("sensitivity")
    intervals = multiplier_intervals(case, clearing.multipliers.tolist(), seed) if case.constraints else []
    moved = scenarios(case, lambda name: on_step(f"sensitivity: {name}"))
    on_step("surplus against budget")
    curve = surplus_curve(case, realised.cost)
    return Audit(
        case=case,
        clearing=clearing,
        oracle=without,
        oracle_with_defer=with_defer,
        best_fixed=best_fixed(case.tasks, case.uses, case.constraints, economy),
        attainable=policy,
        gain_surplus=bootstrap_mean(gain.surplus, seed) if gain else None,
        gain_limits=bootstrap_mean(gain.limits, seed) if gain else None,
        realised=realised,
        regret=regret,
        changes=tuple(changes),
        scenarios=tuple(moved),
        intervals=tuple(intervals),
        curve=curve,
        shares=_shares(case, clearing),
        seconds=time.perf_counter() - began,
    )


def _oracles(case: Case, clearing: Clearing) -> tuple[float, float | None]:
    """Ex-post optimal surplus within the constraints, with deferring and without."""
    mine = clearing.certificate.objective
    try:
        other: float | None = case.clear(defer=not case.economy.defer).certificate.objective
    except InfeasibleError:
        other = None
    if case.economy.defer:
        return mine, other
    assert other is not None, "deferring only adds options"
    return other, mine


def _realised(case: Case, seed: int) -> Realised:
    picked = case.uses.pick(case.chosen)
    got = surplus(case.tasks, picked, case.economy.declared(), case.economy.numeraire)[:, 0]
    served = case.chosen != DEFER
    mix = Mix.pure(case.chosen)
    return Realised(
        surplus=bootstrap_mean(got, seed),
        value=float((case.tasks.value * picked.quality[:, 0]).mean()),
        cost=float(picked.amount(USD).mean()),
        latency_s=float(picked.seconds[served].mean())
        if served.any() and "latency_s" in case.measured
        else math.nan,
        risk=float(picked.risk.mean()) if "risk" in case.measured else math.nan,
        quality=float(picked.quality.mean()),
        served=float(served.mean()),
        usage=tuple(measure_usage(case.tasks, case.uses, c, mix) for c in case.constraints),
        shares=_share_of(mix, case),
    )


def _shares(case: Case, clearing: Clearing) -> dict[str, FloatArray]:
    worth = surplus(case.tasks, case.uses, case.economy.declared(), case.economy.numeraire)
    return {
        "chosen": _share_of(Mix.pure(case.chosen), case),
        "declared prices": _share_of(Mix.pure(choose(worth, defer=case.economy.defer).use), case),
        "discovered prices": _share_of(clearing.mix, case),
    }


def _share_of(mix: Mix, case: Case) -> FloatArray:
    n, i = case.uses.shape
    shares: FloatArray = (
        np.bincount(np.where(mix.use == DEFER, i, mix.use), weights=mix.share, minlength=i + 1) / n
    )
    return shares
