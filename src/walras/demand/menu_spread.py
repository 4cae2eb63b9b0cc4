"""How far a menu may be off because the law of types behind it is an estimate. [Z-IR]

Every resampled law gets its own best menu, and the menu that was posted is valued under that law too. Its cut-offs do not
move, for they are where two tiers are worth the same to a user, whatever other users are like. The error is that of
sampling within one family: whether the family is right is what `willingness.Goodness` tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from walras.demand.menu import Menu, Tier
from walras.errors import InfeasibleError, QuantityError, SettingsError
from walras.estimate.type_laws import TypeLaw
from walras.risk import FloatArray

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What tiers bring when users choose among them, USD per request of the whole population."""

    revenue: float
    profit: float
    welfare: float

    def at(self, recovery_price: float) -> float:
        """The objective in its own USD: profit at κ = 1, else welfare with a dollar of profit at μ = κ/(1 − κ)."""
        if recovery_price == 1:
            return self.profit
        return self.welfare + recovery_price / (1 - recovery_price) * self.profit


def outcome(tiers: Sequence[Tier], law: TypeLaw) -> Outcome:
    """What a menu's tiers bring under any law, in closed form: a stack of upgrades, each sold from its cut-off on.

    Args:
        tiers: ascending, each `type_from` the type indifferent to the one below, as `design` leaves them.

    Raises:
        QuantityError: a tier whose cost is unknown.
    """
    for tier in tiers:
        if np.isnan(tier.cost):
            raise QuantityError(f"tier '{tier.name}' has no cost, so its profit is unknown: give its cost")
    t = np.array([tier.type_from for tier in tiers])
    served, worth = law.moment_above(t, 0), law.moment_above(t, 1)
    quality, price, cost = (
        np.diff([getattr(tier, name) for tier in tiers], prepend=0.0) for name in ("quality", "price", "cost")
    )
    revenue = float(price @ served)
    profit = revenue - float(cost @ served)
    return Outcome(revenue, profit, profit + float(quality @ (worth - t * served)))


@dataclass(frozen=True, slots=True)
class TierSpread:
    """Percentile intervals of one tier, by rank, over the resamples with as many tiers as the menu."""

    name: str
    quality: Interval
    price: Interval
    type_from: Interval


@dataclass(frozen=True, slots=True)
class OutcomeSpread:
    """Percentile intervals over the resamples, USD per request."""

    revenue: Interval
    profit: Interval
    welfare: Interval


@dataclass(frozen=True, slots=True)
class MenuSpread:
    """How a menu moves with the error of the law."""

    level: float
    tiers: tuple[TierSpread, ...]
    """NaN where no resample has as many tiers."""
    best: OutcomeSpread
    """Of each law's own best menu."""
    posted: OutcomeSpread
    """Of this menu under each law: what it may bring in fact."""
    regret: float
    """Mean over laws of what the best menu would have brought more than this one, USD per request."""
    regret_high: float
    """Its `level` quantile, USD per request."""
    regret_share: float
    """`regret` over the mean of what the best menus bring; NaN where they bring nothing."""
    regret_share_high: float
    resamples: int
    """Laws under which there is a menu, R."""
    fewer: int
    """Of these, with fewer tiers than the menu."""
    more: int
    infeasible: int
    """Laws under which no menu recovers what it must; not among the R."""

    @property
    def note(self) -> str:
        """What the intervals leave out; empty where nothing."""
        parts = []
        if self.fewer + self.more:
            parts.append(
                f"Of {self.resamples} resamples {self.fewer} have fewer tiers and {self.more} have more: "
                "the intervals of tiers leave these out."
            )
        if self.infeasible:
            parts.append(f"Under {self.infeasible} further resamples no menu recovers its costs.")
        return " ".join(parts)


def menu_spread(
    design_once: Callable[[TypeLaw], Menu], menu: Menu, laws: Iterable[TypeLaw], level: float = 0.95
) -> MenuSpread:
    """Redesign under every law (bootstrap draws, as of `estimate.willingness.bootstrap_laws`) and compare.

    Regret is at the prices of the law's own best menu: where welfare is sought and cost must be recovered, a dollar of
    profit that the posted menu misses counts at that menu's multiplier μ.

    Args:
        design_once: as `menu` was designed: same technology, objective and cap on tiers.

    Raises:
        SettingsError: fewer than two laws, or a level outside (0, 1).
        InfeasibleError: under no law is there a menu.
    """
    if not 0 < level < 1:
        raise SettingsError(f"a level of {level:g}", key="level", hint="between 0 and 1; 0.95 is usual")
    tiers, best, posted, prices = [], [], [], []
    infeasible, reason = 0, None
    for law in laws:  # one at a time: a law may be a large sample
        try:
            found = design_once(law)
        except InfeasibleError as error:
            infeasible, reason = infeasible + 1, error
            continue
        tiers.append(found.tiers)
        best.append(outcome(found.tiers, law))
        posted.append(outcome(menu.tiers, law))
        prices.append(found.recovery_price)
    if reason is not None and not tiers:
        raise reason
    if len(tiers) + infeasible < 2:
        problem = f"{len(tiers) + infeasible} laws show no spread"
        raise SettingsError(problem, key="laws", hint="200 bootstrap draws are usual")
    most = np.array([b.at(kappa) for b, kappa in zip(best, prices, strict=True)])
    kept = np.array([p.at(kappa) for p, kappa in zip(posted, prices, strict=True)])
    regret = np.maximum(most - kept, 0.0)  # where profit jumps, what recovers is not the best at μ
    whole = float(most.mean()) or np.nan
    high = float(np.quantile(regret, level))
    count = np.array([len(each) for each in tiers])
    return MenuSpread(
        level=level,
        tiers=_tiers(menu, [each for each in tiers if len(each) == len(menu.tiers)], level),
        best=_spread(best, level),
        posted=_spread(posted, level),
        regret=float(regret.mean()),
        regret_high=high,
        regret_share=float(regret.mean()) / whole,
        regret_share_high=high / whole,
        resamples=len(tiers),
        fewer=int((count < len(menu.tiers)).sum()),
        more=int((count > len(menu.tiers)).sum()),
        infeasible=infeasible,
    )


def _tiers(menu: Menu, alike: Sequence[Sequence[Tier]], level: float) -> tuple[TierSpread, ...]:
    def over(k: int, name: str) -> Interval:
        return _interval(np.array([getattr(each[k], name) for each in alike]), level)

    return tuple(
        TierSpread(tier.name, over(k, "quality"), over(k, "price"), over(k, "type_from"))
        for k, tier in enumerate(menu.tiers)
    )


def _spread(outcomes: Sequence[Outcome], level: float) -> OutcomeSpread:
    def over(name: str) -> Interval:
        return _interval(np.array([getattr(each, name) for each in outcomes]), level)

    return OutcomeSpread(over("revenue"), over("profit"), over("welfare"))


def _interval(values: FloatArray, level: float) -> Interval:
    if not values.size:
        return np.nan, np.nan
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
