"""The live market: what each model would give and take, priced at the last certified prices. [Z-1] [Z-3] [Z-CS]

A request must be decided in microseconds and priced as exactly as a log. What a model takes is affine in the prompt's tokens, and the
terms of [Z-1] are linear in amounts, so `equation.terms` at two lengths gives the coefficients of all: they are compiled once
for each (version of the prices, tenant, class, kind), and a decision evaluates them. Prices are found again in the background (`clearer`, a
process of its own) from the latest requests; until they are certified, the last ones hold, and their age is shown.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import msgspec
import numpy as np

from walras.equation import terms
from walras.errors import SettingsError
from walras.gateway.offers import MTOK, Asked, Experience, expected, tasks_of, uses_of
from walras.prices import Prices
from walras.quantities import USD, Uses
from walras.settings import Economy, Kind
from walras.supply.engines import EngineNow, Load, engine_json

Clock = Callable[[], int]
"""Nanoseconds since 1970."""


class Alternative(msgspec.Struct, frozen=True):
    """One use of a request, taken apart. USD."""

    use: str
    value: float
    compute: float
    latency: float
    risk: float
    congestion: float = 0.0
    """The part of `compute` that is the delay of others in the use's engine, at the prices of its resources."""

    @property
    def net(self) -> float:
        """[Z-1] V·ΔQ − π_C·ΔC − π_L·ΔL − π_R·ΔR."""
        return self.value - self.compute - self.latency - self.risk


class Decision(msgspec.Struct, frozen=True):
    """What a request is given, best first, and what each use was worth."""

    ranked: tuple[Alternative, ...]
    """Uses that may be taken, the best first."""
    version: int
    """Of the prices."""
    scarcity: float
    """μ of the key's or tenant's own budget, on top of the board's prices."""

    @property
    def surplus(self) -> float:
        """Net value of the best use, USD; 0 where none is worth its price."""
        return max(self.ranked[0].net, 0.0) if self.ranked else 0.0


@dataclass(frozen=True, slots=True)
class _Compiled:
    """Coefficients of the terms of each use: value per USD of V, the rest USD; `slope`s per million input tokens."""

    names: tuple[str, ...]
    quality: tuple[float, ...]
    compute: tuple[float, ...]
    compute_slope: tuple[float, ...]
    latency: tuple[float, ...]
    risk: tuple[float, ...]
    usd: tuple[float, ...]
    usd_slope: tuple[float, ...]
    second: float
    """What one second of delay costs."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the board shows."""

    version: int
    prices: Prices
    certificate: dict[str, float] | None
    """None until a first clearing; prices are then those declared."""
    cleared_ns: int
    requests: int
    """That the prices were found from."""
    problem: str | None
    """Why the last clearing failed, where it did; the prices before it still hold."""
    engines: tuple[EngineNow, ...] = ()
    """With the prices of their resources, as they were read last."""


@dataclass(slots=True)
class Board:
    """Prices and expectations, and every decision made with them. Used from one thread."""

    economy: Economy
    clock: Clock = time.time_ns
    standing: Standing = field(init=False)
    loads: dict[str, Load] = field(init=False, default_factory=dict)
    """What a request adds to the delay of others, by model that an engine runs."""
    _experience: dict[tuple[str, str], Experience] = field(init=False, default_factory=dict)
    _compiled: dict[tuple[str, str, Kind], _Compiled] = field(init=False, default_factory=dict)
    _by_kind: dict[Kind, tuple[str, ...]] = field(init=False)
    _window: deque[Asked] = field(init=False)
    _watchers: list[Callable[[Standing], None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not self.economy.models:
            raise SettingsError(
                "there are none to serve with", key="models", hint="a table [models.NAME] for each"
            )
        models = self.economy.models.items()
        self._by_kind = {kind: tuple(n for n, m in models if m.kind == kind) for kind in get_args(Kind)}
        self._window = deque(maxlen=self.economy.gateway.window)
        prices = Prices(declared=self.economy.declared())
        self.standing = Standing(1, prices, None, self.clock(), 0, None)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self.economy.models)

    def of(self, kind: Kind) -> tuple[str, ...]:
        """The models that make this."""
        return self._by_kind[kind]

    def watch(self, watcher: Callable[[Standing], None]) -> Callable[[], None]:
        """Call `watcher` at every new standing; returns what ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    # --- deciding ---------------------------------------------------------------------------------------------------

    def value_of(self, tenant: str, task_class: str) -> float:
        """V that the settings declare, USD per unit of quality; 0 where they do not."""
        for group in (self.economy.classes.get(task_class), self.economy.tenants.get(tenant), self.economy):
            if group is not None and group.value is not None:
                return group.value
        return 0.0

    def decide(
        self,
        value: float,
        tokens: float,
        *,
        tenant: str = "",
        task_class: str = "",
        kind: Kind = "chat",
        scarcity: float = 0.0,
        without: Sequence[str] = (),
        deadline: float | None = None,
    ) -> Decision:
        """Rank the uses of one request.

        Args:
            value: V, USD per unit of quality.
            tokens: of the prompt.
            scarcity: μ of a budget that only this key or tenant has: a dollar costs 1 + μ_C + this.
            without: uses that have failed, or whose upstream is down.
            deadline: seconds; uses expected to take longer are not open.
        """
        c = self._coefficients(tenant, task_class, kind)
        ranked = []
        for i, name in enumerate(c.names):
            if name in without or (deadline is not None and self._of(name, task_class).seconds > deadline):
                continue
            usd = c.usd[i] + c.usd_slope[i] * tokens
            compute = c.compute[i] + c.compute_slope[i] * tokens + scarcity * usd
            load, others = self.loads.get(name), 0.0
            if load is not None:
                seen = self._of(name, task_class)
                others = load.congestion(tokens, seen.output_tokens, seen.seconds)
                compute += others
            ranked.append(Alternative(name, value * c.quality[i], compute, c.latency[i], c.risk[i], others))
        ranked.sort(key=lambda a: a.compute + a.latency + a.risk - a.value)
        return Decision(tuple(ranked), self.standing.version, scarcity)

    def price(
        self,
        offered: Sequence[tuple[str, float, float, float, float]],
        value: float,
        tenant: str,
        task_class: str,
    ) -> Decision:
        """Rank uses that somebody else offers, as (name, quality, USD, seconds, risk): agents and schedulers ask this.

        Raises:
            QuantityError: an amount that cannot be.
        """
        names, *amounts = zip(*offered, strict=True)
        quality, usd, seconds, risk = (np.array([column], dtype=np.float64) for column in amounts)
        uses = Uses(names=names, quality=quality, amounts=usd[:, :, None], seconds=seconds, risk=risk)
        parts = terms(
            tasks_of(self.economy, [Asked(value, 0.0, tenant, task_class)]), uses, self.standing.prices
        )
        columns = (parts.value, parts.compute, parts.latency, parts.risk)
        found = [Alternative(name, *(float(c[0, i]) for c in columns)) for i, name in enumerate(names)]
        return Decision(tuple(sorted(found, key=lambda a: -a.net)), self.standing.version, 0.0)

    def delay_price(self, tenant: str, task_class: str, kind: Kind = "chat") -> float:
        """What a second of its own costs a request, USD: λ₀ and what mean SLAs charge. [Z-3]"""
        return self._coefficients(tenant, task_class, kind).second

    def others_delay_price(self) -> float:
        """What a second of delay costs others, USD: the mean over the latest requests; as the settings declare before any."""
        latest = self._window or (Asked(0.0, 0.0, "", ""),)
        return sum(self.delay_price(a.tenant, a.task_class, a.kind) for a in latest) / len(latest)

    def asked(self, value: float, tokens: float, tenant: str, task_class: str, kind: Kind = "chat") -> None:
        """A request that prices are to be found from."""
        self._window.append(Asked(value, tokens, tenant, task_class, kind))

    def came_back(self, use: str, task_class: str, output_tokens: float, seconds: float) -> None:
        """What a use took in fact."""
        self._of(use, task_class).seen(output_tokens, seconds)

    def judged(self, use: str, task_class: str, quality: float) -> None:
        """How good an answer turned out to be, 0 to 1."""
        self._of(use, task_class).judged(quality)

    def expected(self, use: str, task_class: str) -> Experience:
        """What is expected of a use now."""
        return self._of(use, task_class)

    def _of(self, use: str, task_class: str) -> Experience:
        found = self._experience.get((use, task_class))
        if found is None:
            found = self._experience[use, task_class] = expected(
                self.economy, self._experience, use, task_class
            )
        return found

    def _coefficients(self, tenant: str, task_class: str, kind: Kind) -> _Compiled:
        found = self._compiled.get((tenant, task_class, kind))
        if found is None:
            found = self._compiled[tenant, task_class, kind] = self._compile(tenant, task_class, kind)
        return found

    def _compile(self, tenant: str, task_class: str, kind: Kind) -> _Compiled:
        two = [Asked(1.0, tokens, tenant, task_class, kind) for tokens in (0.0, float(MTOK))]
        tasks, uses = tasks_of(self.economy, two), uses_of(self.economy, two, self._experience)
        parts = terms(tasks, uses, self.standing.prices)
        usd = uses.amount(USD)
        open_to = np.flatnonzero(uses.allowed[0])

        def row(column: Any) -> tuple[float, ...]:
            return tuple(column[open_to].tolist())

        return _Compiled(
            tuple(uses.names[i] for i in open_to),
            row(parts.value[0]),
            row(parts.compute[0]),
            row((parts.compute[1] - parts.compute[0]) / MTOK),
            row(parts.latency[0]),
            row(parts.risk[0]),
            row(usd[0]),
            row((usd[1] - usd[0]) / MTOK),
            self._second(tenant, task_class),
        )

    def _second(self, tenant: str, task_class: str) -> float:
        """The latency term of a second more: two uses that differ in nothing else, priced by the same equation."""
        two = [(str(s), 0.0, 0.0, float(s), 0.0) for s in (0, 1)]
        zero, one = sorted(self.price(two, 0.0, tenant, task_class).ranked, key=lambda a: a.use)
        return one.latency - zero.latency

    # --- new prices -------------------------------------------------------------------------------------------------

    def latest(self) -> tuple[list[Asked], dict[tuple[str, str], Experience]]:
        """What prices are to be found from: the latest requests, and what is expected of the models."""
        return list(self._window), self._experience

    def post(self, standing: Standing) -> None:
        """Decide by `standing` from now on; engines are as they are."""
        self._compiled.clear()
        self._tell(replace(standing, engines=self.standing.engines))

    def congested(self, engines: tuple[EngineNow, ...]) -> None:
        """Charge what these engines' resources cost from now on."""
        loads = {e.engine: e.load for e in engines}
        models = self.economy.models.items()
        self.loads = {
            name: loads[m.engine] for name, m in models if m.engine is not None and m.engine in loads
        }
        self._tell(replace(self.standing, engines=engines))

    def _tell(self, standing: Standing) -> None:
        self.standing = standing
        for watcher in list(self._watchers):
            watcher(standing)


def standing_json(standing: Standing, now_ns: int) -> dict[str, Any]:
    """What `GET /v1/prices` answers."""
    return {
        "version": standing.version,
        "price_vector": json.loads(standing.prices.to_json()),
        "prices": [
            {
                "constraint": p.constraint.name,
                "layer": p.constraint.layer,
                "multiplier": p.multiplier,
                "unit": p.constraint.unit,
            }
            for p in standing.prices.discovered
        ],
        "certificate": standing.certificate,
        "requests": standing.requests,
        "cleared_at": standing.cleared_ns / 1e9,
        "age_s": max(now_ns - standing.cleared_ns, 0) / 1e9,
        "problem": standing.problem,
        "engines": [engine_json(e, now_ns / 1e9) for e in standing.engines],
    }
