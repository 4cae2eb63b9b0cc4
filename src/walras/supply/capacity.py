"""Where the next dollar of hardware goes: latency per dollar, made equal across prefill, decoding, KV memory and links. [Z-9]

    (−∂L/∂x_i) / κ_i   equal for every resource i that is bought and can be bought less of,   least L for Σ κ_i·x_i ≤ B

L is the mean price of delay × seconds in the engine of the requests of a trace, replayed through each fleet that is considered
(SIMULATED). Resources come in units, so the equality holds to within one unit: no exchange of one unit of a resource for what its money
buys of another lowers L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.engine.steps import StepTimes
from walras.errors import InfeasibleError, SettingsError

FloatArray = NDArray[np.float64]
Resource = Literal["workers", "prefill", "decode", "kv", "link"]
BATCHES = 40
"""Of consecutive requests, whose means tell the error of a mean."""
CENT = 1e-9


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is bought of one engine."""

    workers: int
    prefill: int = 0
    """Workers that only prefill, the others only decode; 0: all do both."""
    kv_units: int = 0
    """Of KV memory in each worker, on top of its own."""
    link_units: int = 1
    """Of bandwidth from each worker that prefills."""

    @property
    def decode(self) -> int:
        """Workers that only decode."""
        return self.workers - self.prefill if self.prefill else 0

    @property
    def resources(self) -> tuple[Resource, ...]:
        """That its latency can depend on."""
        return ("prefill", "decode", "kv", "link") if self.prefill else ("workers", "kv")

    def plus(self, resource: Resource, units: int = 1) -> Fleet:
        """With so many units more; fewer where negative."""
        match resource:
            case "workers" | "decode":
                return replace(self, workers=self.workers + units)
            case "prefill":
                return replace(self, workers=self.workers + units, prefill=self.prefill + units)
            case "kv":
                return replace(self, kv_units=self.kv_units + units)
            case "link":
                return replace(self, link_units=self.link_units + units)

    @property
    def possible(self) -> bool:
        return self.workers > self.prefill >= 0 and self.kv_units >= 0 and self.link_units >= 1


@dataclass(frozen=True, slots=True)
class Shop:
    """What a unit of each resource is, and costs. None: not for sale.

    Raises:
        SettingsError: a price or a unit that is not finite and above 0.
    """

    worker_usd_h: float
    kv_usd_h: float | None = None
    """Of one unit more in one worker."""
    kv_unit_blocks: int = 0
    link_usd_h: float | None = None
    """Of one unit of one link."""
    link_unit_bytes_s: float = 0.0

    def __post_init__(self) -> None:
        numbers = {"worker_usd_h": self.worker_usd_h}
        if self.kv_usd_h is not None:
            numbers |= {"kv_usd_h": self.kv_usd_h, "kv_unit_blocks": self.kv_unit_blocks}
        if self.link_usd_h is not None:
            numbers |= {"link_usd_h": self.link_usd_h, "link_unit_bytes_s": self.link_unit_bytes_s}
        for key, number in numbers.items():
            if not (np.isfinite(number) and number > 0):
                raise SettingsError(f"{number} is not finite and above 0", key=key)

    def sells(self, resource: Resource) -> bool:
        """Whether more of it can be bought."""
        return {"kv": self.kv_usd_h, "link": self.link_usd_h}.get(resource, 0.0) is not None

    def usd_h(self, fleet: Fleet) -> float:
        """What a fleet costs an hour."""
        kv, link = self.kv_usd_h or 0.0, self.link_usd_h or 0.0
        per_worker = self.worker_usd_h + kv * fleet.kv_units
        return fleet.workers * per_worker + link * fleet.link_units * fleet.prefill


@dataclass(frozen=True, slots=True)
class Change:
    """What one unit more, or less, of a resource does. SIMULATED."""

    resource: Resource
    fleet: Fleet
    usd_h: float
    """That this fleet costs more; below 0 with a unit less."""
    latency: float
    """Change of the mean, seconds or USD."""
    error: float
    """Its standard error, from means over batches of consecutive requests."""

    @property
    def per_usd_h(self) -> float:
        """Latency saved per dollar an hour. [Z-9]"""
        return -self.latency / self.usd_h

    @property
    def per_usd_h_error(self) -> float:
        """Standard error of that."""
        return self.error / abs(self.usd_h)


class Planner:
    """Fleets for one trace; each is replayed once. SIMULATED.

    Args:
        requests: at prices of delay, or latency is in seconds.
        settings: of the engine; workers, KV blocks and links are those of the fleet.

    Raises:
        RecordError: a request that no worker of this engine can serve.
    """

    def __init__(
        self,
        settings: EngineSettings,
        steps: StepTimes,
        routing: Routing,
        requests: Requests,
        shop: Shop,
        on_replay: Callable[[int], None] = lambda _: None,
    ) -> None:
        requests.check_fits(settings)
        self._settings, self._steps, self._routing = settings, steps, routing
        self._requests, self.shop, self._on_replay = requests, shop, on_replay
        self._seen: dict[Fleet, FloatArray] = {}

    @property
    def replays(self) -> int:
        """Fleets replayed so far."""
        return len(self._seen)

    def engine(self, fleet: Fleet) -> EngineSettings:
        """The settings of a fleet's engine."""
        base = self._settings
        apart = base.disaggregation if fleet.prefill else None
        if apart is not None:
            link = (
                fleet.link_units * self.shop.link_unit_bytes_s if self.shop.sells("link") else apart.bandwidth
            )
            apart = replace(apart, prefill_workers=fleet.prefill, bandwidth=link)
        blocks = base.kv_blocks + fleet.kv_units * self.shop.kv_unit_blocks
        return replace(base, workers=fleet.workers, kv_blocks=blocks, disaggregation=apart)

    def batches(self, fleet: Fleet) -> FloatArray:
        """(BATCHES,) mean latency of consecutive requests, weighted by their prices of delay."""
        if fleet not in self._seen:
            replay = Replay(
                self.engine(fleet), self._steps, self._routing, self._requests, interval_s=None
            ).run()
            served = replay.served()
            cost = served.delay_price * served.latency_s
            self._seen[fleet] = np.array([part.mean() for part in np.array_split(cost, BATCHES)])
            self._on_replay(self.replays)
        return self._seen[fleet]

    def latency(self, fleet: Fleet) -> float:
        """Mean over the requests, USD, or seconds where they have no prices of delay."""
        return float(self.batches(fleet).mean())

    def changes(self, fleet: Fleet, units: Literal[1, -1] = 1) -> list[Change]:
        """One unit more, or less, of each resource where that can be, the most latency per dollar first. [Z-9]"""
        before, found = self.batches(fleet), []
        for resource in fleet.resources:
            if units > 0:
                other = fleet.plus(resource) if self.shop.sells(resource) else None
            else:
                other = next(self._sold(fleet, resource), None)
            if other is None:
                continue
            gained = self.batches(other) - before
            error = float(gained.std(ddof=1) / np.sqrt(BATCHES))
            usd_h = self.shop.usd_h(other) - self.shop.usd_h(fleet)
            found.append(Change(resource, other, usd_h, float(gained.mean()), error))
        return sorted(found, key=lambda change: -change.per_usd_h)

    def best(self, budget_usd_h: float, *, apart: bool, start: Fleet | None = None) -> Fleet:
        """The fleet that no exchange within the budget makes faster.

        Args:
            apart: prefill and decoding on workers of their own.
            start: an affordable fleet to begin with, else the smallest.

        Raises:
            InfeasibleError: the smallest fleet costs more.
            SettingsError: `apart` without settings for it.
        """
        if apart and self._settings.disaggregation is None:
            raise SettingsError("the engine has no links between workers", key="apart", hint="give kv_bytes")
        fleet = start or (Fleet(2, 1) if apart else Fleet(1))
        if self.shop.usd_h(fleet) > budget_usd_h + CENT:
            least = self.shop.usd_h(fleet)
            raise InfeasibleError(
                f"{fleet.workers} worker(s) cost {least:g} USD an hour, and the budget is {budget_usd_h:g}: raise it to {least:g}",
                constraint="budget",
                bound=budget_usd_h,
                least=least,
            )
        while True:
            better = min(self._within(fleet, budget_usd_h), key=self._rank, default=fleet)
            if self._rank(better) >= self._rank(fleet):
                return fleet
            fleet = better

    def _rank(self, fleet: Fleet) -> tuple[float, float]:
        """Faster first; of equally fast ones the cheaper."""
        return self.latency(fleet), self.shop.usd_h(fleet)

    def _within(self, fleet: Fleet, budget_usd_h: float) -> Iterator[Fleet]:
        """Fleets one purchase, one sale or one exchange away."""
        for bought in fleet.resources:
            yield from self._bought(fleet, bought, budget_usd_h)
        for sold in fleet.resources:
            kept = list(self._sold(fleet, sold))
            yield from kept[:1]
            for bought in fleet.resources:
                # As little sold as buys one unit.
                for left in kept if bought != sold else ():
                    more = list(self._bought(left, bought, budget_usd_h))
                    yield from more
                    if more:
                        break

    def _sold(self, fleet: Fleet, resource: Resource) -> Iterator[Fleet]:
        """With one unit less, two less, …, as long as it stays an engine of its kind."""
        left = fleet.plus(resource, -1)
        while left.possible and bool(left.prefill) == bool(fleet.prefill):
            yield left
            left = left.plus(resource, -1)

    def _bought(self, fleet: Fleet, resource: Resource, budget_usd_h: float) -> Iterator[Fleet]:
        """With one unit more, and with all that the budget allows."""
        if not self.shop.sells(resource):
            return
        one = fleet.plus(resource)
        unit = self.shop.usd_h(one) - self.shop.usd_h(fleet)
        units = int((budget_usd_h - self.shop.usd_h(fleet) + CENT) // unit)
        if units >= 1:
            yield one
        if units > 1:
            yield fleet.plus(resource, units)

    def curve(self, budgets_usd_h: FloatArray, *, apart: bool) -> list[tuple[float, Fleet]]:
        """The best fleet for each budget that buys one, from the least budget on, each from the last one's."""
        found: list[tuple[float, Fleet]] = []
        for budget in np.sort(budgets_usd_h).tolist():
            try:
                start = found[-1][1] if found else None
                found.append((budget, self.best(budget, apart=apart, start=start)))
            except InfeasibleError:
                continue
        return found
