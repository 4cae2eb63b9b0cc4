"""Routing as screening at live prices: learned estimates become uses, and the one rule chooses. [Z-4]

    m*(x) = argmax_m [ V(x)·q̂_m(x) − c_m − λ·l_m(x) − ρ·r_m(x) ]

Nothing here prefers a model. A reasoning effort is a use (`gpt-5@high`), a warm prefix cache makes staying cheaper because it
is cheaper, and a tight budget moves requests to cheaper models because its price has risen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from walras.demand.explore import Exploration, Greedy, Policy, Wallet, explore, uniforms
from walras.demand.search import Plan, Verifier, full_prices, plan_search
from walras.equation import DEFER, Terms, net_value, terms
from walras.errors import RecordError, SettingsError, nearest
from walras.estimate.estimates import Estimates, Live
from walras.estimate.quality import Requests
from walras.estimate.text import read_texts
from walras.market.clearing import Clearing
from walras.market.shadow import discover
from walras.prices import Constraint, Prices, Scope
from walras.quantities import Labels, Tasks, Uses
from walras.records.asks import Asked
from walras.risk import FloatArray
from walras.settings import Economy, Group


@dataclass(frozen=True, slots=True)
class Ask:
    """N requests with what each is worth and what is warm for them."""

    ids: tuple[str, ...]
    requests: Requests
    value: FloatArray | None = None
    """V by request, USD per unit of quality, NaN where the settings say, (N,)."""
    cached: FloatArray | None = None
    """Prompt tokens that each model holds in its prefix cache for this session, (N, I)."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Exploring:
    """How far to try what does not look best; nothing by default."""

    policy: Policy = field(default_factory=Greedy)
    cap: float = 0.0
    """Most expected regret of a request, USD."""
    floor: float = 0.0
    """Least probability of every open use."""
    seed: int = 0
    wallet: Wallet | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """N decisions, and all that went into them."""

    ids: tuple[str, ...]
    tasks: Tasks
    uses: Uses
    prices: Prices
    terms: Terms
    """V·ΔQ, π_C·ΔC, π_L·ΔL, π_R·ΔR of every use, (N, I), USD."""
    values: FloatArray
    """Their sum [Z-1], (N, I); −∞ where not allowed."""
    quality_error: FloatArray
    value_error: FloatArray
    """Standard error of each value from those of q̂ and of the money, (N, I), USD."""
    drawn: Exploration

    def model(self, row: int) -> str:
        """What request `row` gets; `defer` for nothing."""
        use = int(self.drawn.use[row])
        return "defer" if use == DEFER else self.uses.names[use]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the requests that each use gets."""
        names = [self.model(row) for row in range(len(self.ids))]
        return {name: names.count(name) / max(len(names), 1) for name in (*self.uses.names, "defer")}


def route(
    estimates: Estimates,
    ask: Ask,
    economy: Economy,
    *,
    prices: Prices | None = None,
    live: Live | None = None,
    exploring: Exploring | None = None,
) -> Routing:
    """Choose a use for each request.

    Args:
        prices: live ones. Without them the limits of the settings, if any, are priced over these requests.
        live: list prices of the day and load of the engines; warm caches are in `ask`.

    Raises:
        SettingsError: a request without a value, or settings that name a model the router does not know.
        InfeasibleError: no routing of these requests meets the limits.
    """
    tasks, uses, quality_error, usd_error = _offer(estimates, ask, economy, live, prices or Prices())
    mix = None
    if prices is None:
        clearing = _clear(tasks, uses, economy)
        prices, mix = clearing.prices, _mixed(clearing, uses.shape, economy.defer)
    values, parts = net_value(tasks, uses, prices), terms(tasks, uses, prices)
    # One unit of money costs what compute pays per USD; both errors are independent guesses.
    per_usd = np.divide(
        parts.compute, uses.amounts[:, :, 0], out=np.ones_like(values), where=uses.amounts[:, :, 0] > 0
    )
    error = np.hypot(tasks.value[:, None] * quality_error / prices.unit, per_usd * usd_error)
    how = exploring or Exploring()
    drawn = explore(
        values,
        how.policy,
        uniforms(how.seed, ask.ids),
        errors=error,
        greedy=mix,
        defer=economy.defer,
        cap=how.cap,
        floor=how.floor,
        wallet=how.wallet,
    )
    return Routing(ask.ids, tasks, uses, prices, parts, values, quality_error, error, drawn)


def _clear(tasks: Tasks, uses: Uses, economy: Economy) -> Clearing:
    """Prices of the limits of the settings, if any, over these requests."""
    sizes = {s: float(len(tasks) if (m := s.members(tasks)) is None else m.sum()) for s in _scopes(economy)}
    return discover(
        tasks,
        uses,
        economy.constraints(sizes),
        defer=economy.defer,
        numeraire=economy.numeraire,
        declared=economy.declared(),
    )


def _mixed(clearing: Clearing, shape: tuple[int, int], defer: bool) -> FloatArray | None:
    """Probability of each use, deferring last where it is open, (N, K), where a limit binds; None where none does.

    Requests that look alike are all tied at a binding limit, and only the market's own mixture meets it.
    """
    if not clearing.multipliers.any():
        return None
    out, mix = np.zeros((shape[0], shape[1] + defer)), clearing.mix
    out[mix.task, np.where(mix.use == DEFER, shape[1], mix.use)] = mix.share
    return out


def search(estimates: Estimates, ask: Ask, routing: Routing, verifier: Verifier, verifier_usd: float) -> Plan:
    """Try, verify, escalate or stop, for each request, at the same prices. Beliefs are those of the request's class.

    Args:
        verifier_usd: what one verification costs, USD; it is paid at the price of money.

    Raises:
        SettingsError: the log's outcomes were not right or wrong, or too few were known together.
    """
    if estimates.joint is None:
        what = "the router was fitted on a log whose outcomes are not 0 or 1, or hardly known together"
        raise SettingsError(
            what, key="--verifier-accuracy", hint="search needs to know how often answers are right"
        )
    prices = routing.prices
    return plan_search(
        estimates.joint,
        routing.uses.names,
        routing.tasks.value / prices.unit,
        full_prices(routing.tasks, routing.uses, prices),
        verifier,
        verifier_usd * prices.compute_price / prices.unit,
        classes=estimates.quality.class_codes(ask.requests.task_class),
    )


def _offer(
    estimates: Estimates, ask: Ask, economy: Economy, live: Live | None, prices: Prices
) -> tuple[Tasks, Uses, FloatArray, FloatArray]:
    """What the requests are worth and what each use would do for them."""
    for kind, name, model in economy.forbidden_models():
        if model not in estimates.models:
            hint = nearest(model, estimates.models)
            what = f"the router knows no model '{model}'"
            raise SettingsError(what, key=f"{kind}.{name}.forbidden_models", hint=hint)
    live = replace(live or Live(), cached=ask.cached)
    charged = [price.constraint for price in prices.discovered]
    _refuse_unknown(estimates, economy, live, charged)
    tasks = _tasks(ask, economy)
    resources = {name: resource.column for name, resource in economy.resources.items()}
    late_at = {g.sla_s for g in _groups(economy) if g.sla_s and g.sla_quantile is not None}
    late_at |= {row.seconds for row in charged if row.kind == "quantile_sla"}
    offered = estimates.offer(ask.requests, live, resources=resources, late_at=sorted(late_at))
    requests = ask.requests
    barred = economy.forbidden(estimates.models, len(ask), requests.facts.get("tenant"), requests.task_class)
    uses = replace(offered.uses, allowed=~barred)
    if economy.needs_losses or any(row.kind == "portfolio_envelope" for row in charged):
        uses = replace(uses, losses=estimates.losses_of(requests))
    if economy.needs_losses and economy.risk_over == "use":
        uses = uses.with_risk(economy.measure)
    return tasks, uses, offered.quality_error, offered.usd_error


def _groups(economy: Economy) -> tuple[Group, ...]:
    return economy, *economy.tenants.values(), *economy.classes.values()


def _refuse_unknown(estimates: Estimates, economy: Economy, live: Live, charged: list[Constraint]) -> None:
    """What has a price must have been in the log: no model takes 0 seconds for want of a column."""
    groups, kinds, known = _groups(economy), {row.kind for row in charged}, estimates.amounts
    seconds = "latency_s" in known or live.running is not None or live.waiting is not None
    risk = "risk" in known or estimates.harm is not None or economy.needs_losses
    for column, asked, has in (
        ("latency_s", any(g.sla_s is not None or g.lambda0 for g in groups) or "mean_sla" in kinds, seconds),
        ("risk", any(g.risk is not None for g in groups) or "risk_envelope" in kinds, risk),
        ("irreversible_risk", any(g.rho_irr for g in groups), "irreversible_risk" in known),
    ):
        if asked and not has:
            what = f"it has a price, but the router was fitted on a log without '{column}'"
            raise SettingsError(what, key=column, hint="fit again on one that has it for every model")


def _tasks(ask: Ask, economy: Economy) -> Tasks:
    requests, n = ask.requests, len(ask)
    tenant = requests.facts.get("tenant", Labels.none(n))

    def declared(key: str, default: float) -> FloatArray:
        return economy.per_task(key, default, n, tenant, requests.task_class)

    value = declared("value", np.nan)
    if ask.value is not None:
        value = np.where(np.isnan(ask.value), value, ask.value)
    missing = np.flatnonzero(np.isnan(value))
    if missing.size:
        hint = "declare --value USD, or give the request a value_usd"
        raise SettingsError(f"request '{ask.ids[missing[0]]}' has no value", key="value", hint=hint)
    return Tasks(
        value=value,
        latency_price=declared("lambda0", 0.0),
        risk_price=declared("rho0", 1.0),
        irreversible_price=declared("rho_irr", 0.0),
        tenant=tenant,
        task_class=requests.task_class,
    )


def _scopes(economy: Economy) -> list[Scope]:
    tenants = [Scope(tenant=name) for name in economy.tenants]
    return [Scope(), *tenants, *(Scope(task_class=name) for name in economy.classes)]


def ask_of(estimates: Estimates, asked: Sequence[Asked]) -> Ask:
    """Requests as they were read, as columns.

    Raises:
        SettingsError: a warm cache on a model the router does not know.
    """
    names = dict.fromkeys(name for one in asked for name in one.facts or {})
    facts = {name: _labels([(one.facts or {}).get(name) for one in asked]) for name in names}
    tenants = [one.tenant for one in asked]
    if any(tenant is not None for tenant in tenants):
        facts["tenant"] = _labels(tenants)
    cached = np.zeros((len(asked), len(estimates.models)))
    for row, one in enumerate(asked):
        for model, tokens in (one.cached_tokens or {}).items():
            cached[row, estimates.column_of(model)] = tokens
    return Ask(
        ids=tuple(one.request_id for one in asked),
        requests=Requests(
            read_texts([one.prompt for one in asked]),
            _labels([one.task_class for one in asked]),
            facts,
            _vectors([one.embedding for one in asked]),
            _numbers([one.certainty for one in asked]),
        ),
        value=_numbers([one.value_usd for one in asked]),
        cached=cached if cached.any() else None,
    )


def _numbers(given: Sequence[float | None]) -> FloatArray:
    """(N,), NaN where a request has none."""
    return np.array([np.nan if number is None else number for number in given])


def _vectors(given: Sequence[tuple[float, ...] | None]) -> FloatArray | None:
    """(N, D), NaN where a request has none."""
    size = next((len(v) for v in given if v is not None), 0)
    if not size:
        return None
    odd = next((v for v in given if v is not None and len(v) != size), None)
    if odd is not None:
        raise RecordError(f"has {len(odd)} numbers in one request and {size} in another", field="embedding")
    return np.array([[np.nan] * size if v is None else v for v in given], dtype=np.float64)


def _labels(values: Sequence[str | None]) -> Labels:
    names = tuple(dict.fromkeys(value for value in values if value is not None))
    at = {name: code for code, name in enumerate(names)}
    return Labels(np.array([-1 if v is None else at[v] for v in values], dtype=np.int64), names)
