"""Few tiers, each one offering at one price, for users who differ in two ways: found by search below a proven bound. [Z-5]

`demand.screening` has the best menu of lotteries, which is nobody's price list. Which offerings to keep and what to charge is a
hard combinatorial problem, so `cap` climbs from several starts, and the programme's optimum bounds what it misses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from walras.demand.menu import Certificate, Objective, Tier, value_of
from walras.demand.screening import ROUND_OFF, Grid, Screening, certified, largest_worth
from walras.errors import InfeasibleError, SettingsError
from walras.quantities import IntArray
from walras.risk import FloatArray

ALL_GROUPS = 5
"""Up to so many tiers every set of them is repriced together; beyond, each one, and those above it in quality or speed."""
JOLTS, CLIMBS = 16, 16
"""Places to which a price or a type is moved to leave a local optimum (all of them, of few types); those moves of types
that are followed up, best first."""


@dataclass(frozen=True, slots=True)
class CappedMenu:
    """At most N tiers, each one offering at one price, found by search; `loss_to_cap` says how good it must be."""

    tiers: tuple[Tier, ...]
    """Ascending in quality, then in seconds; `type_from` and `type_to` span the V of those who take it."""
    latency_prices: tuple[tuple[float, float], ...]
    """Least and greatest λ among those who take each tier, USD per second."""
    types: Grid
    takes: IntArray
    """The tier each type takes, −1 for none, (T,). Ties go the operator's way."""
    objective: Objective
    certificate: Certificate
    bound: float
    """Profit or welfare that no menu, of whatever size, exceeds, USD per request."""
    recovery_price: float
    """κ of the menu of lotteries."""

    @property
    def value(self) -> float:
        """Profit or welfare, USD per request."""
        return value_of(self.objective, self.certificate)

    @property
    def loss_to_cap(self) -> float:
        """What few pure tiers lose at most, and the search with them, USD per request."""
        return max(self.bound - self.value, 0.0)


def cap(screening: Screening, tiers: int) -> CappedMenu:
    """The best menu found of at most `tiers` tiers; with more tiers it is never worse.

    Raises:
        InfeasibleError: no menu found of so few tiers recovers the cost; names the most profit found.
        SettingsError: fewer than one tier.
    """
    if tiers < 1:
        raise SettingsError(f"{tiers} tiers", key="tiers", hint="at least 1; people read 3 to 5")
    market = _Market.of(screening)
    prices = _best_prices(market, screening, tiers)
    if screening.objective == "welfare":
        _, profit = market.totals(prices)
        if profit < screening.recover - market.slack:
            raise InfeasibleError(
                f"cost recovery: no menu found of {tiers} tiers makes {screening.recover:g} USD per request; the most "
                f"is {profit:.6g}",
                constraint="cost recovery",
                bound=screening.recover,
                least=profit,
            )
    return _published(screening, market, prices)


Score = Callable[[FloatArray, FloatArray], FloatArray]
"""What is maximised, from (welfare, profit)."""


@dataclass(frozen=True, slots=True)
class _Market:
    """Types before posted prices. Column 0 is nothing, at price 0; a price of ∞ takes an offering off the menu."""

    worth: FloatArray
    """(T, 1 + O)."""
    surplus: FloatArray
    """worth − cost, (T, 1 + O)."""
    probability: FloatArray
    quality: FloatArray
    """(1 + O,)."""
    seconds: FloatArray
    slack: float
    """USD: round-off."""

    @classmethod
    def of(cls, screening: Screening) -> _Market:
        quality, seconds, cost = (
            np.append(0.0, column) for column in (screening.quality, screening.seconds, screening.cost)
        )
        worth = screening.types.worth(quality, seconds)
        slack = ROUND_OFF * largest_worth(screening.types, screening.quality)
        return cls(worth, worth - cost, screening.types.probability, quality, seconds, slack)

    def choose(self, prices: FloatArray) -> IntArray:
        """The column each type takes, (T,)."""
        u = self.worth - prices
        tied = u >= u.max(axis=1, keepdims=True) - self.slack
        column: IntArray = np.where(tied, self.surplus, -np.inf).argmax(axis=1)
        return column

    def totals(self, prices: FloatArray) -> tuple[float, float]:
        """(welfare, profit), USD per request."""
        on = np.flatnonzero(np.isfinite(prices))
        u, w = self._best(on, prices)
        return float(self.probability @ w), float(self.probability @ (w - u))

    def _best(self, columns: IntArray, prices: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(utility, surplus) of each type at the best of these columns."""
        u = self.worth[:, columns] - prices[columns]
        best = u.max(axis=1)
        return best, np.where(u >= best[:, None] - self.slack, self.surplus[:, columns], -np.inf).max(axis=1)

    def shift(self, prices: FloatArray, group: IntArray, score: Score) -> FloatArray:
        """Prices after the best common change of a group's prices, or without the group where that is better.

        Exact: who takes from the group at a change δ is who gains at least δ by it. Between two such gains the takers
        stay and profit grows with δ, so the best δ is one of the gains; of those that tie, who is worth more comes first.
        """
        rest = np.setdiff1d(np.flatnonzero(np.isfinite(prices)), group, assume_unique=True)
        (u_in, w_in), (u_out, w_out) = self._best(group, prices), self._best(rest, prices)
        order = np.lexsort((w_out - w_in, u_out - u_in))
        f, delta = self.probability[order], (u_in - u_out)[order]
        more = f * (w_in - w_out)[order]
        welfare = float(self.probability @ w_out) + np.append(0.0, np.cumsum(more))
        rent = np.cumsum(f * delta) - delta * np.cumsum(f)
        profit = welfare - float(self.probability @ u_out) - np.append(0.0, rent)
        best = int(score(welfare, profit).argmax())
        changed = prices.copy()
        changed[group] = np.inf if best == 0 else prices[group] + delta[best - 1]
        return changed

    def tighten(self, prices: FloatArray) -> FloatArray:
        """The highest prices at which all take what they take."""
        tight, _ = self.supporting(self.choose(prices))
        return tight

    def supporting(self, takes: IntArray) -> tuple[FloatArray, bool]:
        """The highest prices at which each type takes its column (T,), by shortest paths, and whether any prices do.

        What nobody takes is off the menu.
        """
        there = self.probability > 0
        used = np.unique(takes[there])
        used = used[used > 0]
        columns = np.append(0, used)
        steps = np.empty((used.size, columns.size))
        for k, j in enumerate(used):
            mine = self.worth[there & (takes == j)]
            steps[k] = (mine[:, [j]] - mine[:, columns]).min(axis=0)
        path = steps[:, 0]
        for _ in used:
            path = np.minimum(path, (steps[:, 1:] + path).min(axis=1))
        full = np.full(self.quality.shape, np.inf)
        full[columns] = np.append(0.0, path)
        settled = bool((path <= (steps[:, 1:] + path).min(axis=1) + self.slack).all()) if used.size else True
        return full, settled

    def groups(self, prices: FloatArray) -> list[IntArray]:
        """Sets of offerings on the menu that are repriced together."""
        on = np.flatnonzero(np.isfinite(prices))[1:]
        if on.size <= ALL_GROUPS:
            sets = [on[[bool(bits >> k & 1) for k in range(on.size)]] for bits in range(1, 1 << on.size)]
            return sorted(sets, key=len)
        better, faster = on[np.argsort(self.quality[on])], on[np.argsort(-self.seconds[on])]
        return [on[[k]] for k in range(on.size)] + [
            by[k:] for k in range(on.size - 1) for by in (better, faster)
        ]

    def climb(self, prices: FloatArray, score: Score) -> FloatArray:
        """Prices that no common change of any group of them betters."""
        prices = self.tighten(prices)
        value = self.value(prices, score)
        while True:
            before = value
            for group in self.groups(prices):
                if not np.isfinite(prices[group]).all():
                    continue
                changed = self.tighten(self.shift(prices, group, score))
                if (reached := self.value(changed, score)) > value + self.slack:
                    prices, value = changed, reached
            if value <= before:
                return prices

    def value(self, prices: FloatArray, score: Score) -> float:
        welfare, profit = self.totals(prices)
        return float(score(np.array(welfare), np.array(profit)))


def _offered(prices: FloatArray) -> list[int]:
    """Columns on the menu, nothing aside."""
    return [int(o) for o in np.flatnonzero(np.isfinite(prices)) if o]


def _with(prices: FloatArray, offering: int, price: float) -> FloatArray:
    changed = prices.copy()
    changed[offering] = price
    return changed


def _best_prices(market: _Market, screening: Screening, tiers: int) -> FloatArray:
    """Prices (1 + O,) of the best menu found. What is found for N does not depend on what is asked beyond N."""
    recover = screening.recover

    def final(welfare: FloatArray, profit: FloatArray) -> FloatArray:
        if screening.objective == "revenue":
            return profit
        # With profit ≥ recover ≥ 0 welfare is ≥ 0: what does not recover ranks below, by what it lacks.
        return np.where(profit >= recover - market.slack, welfare, profit - recover)

    def value(prices: FloatArray) -> float:
        return market.value(prices, final)

    kappa = screening.recovery_price
    pool: list[FloatArray] = []
    for weight in sorted({kappa, (1 + kappa) / 2, 1.0}):

        def weighted(welfare: FloatArray, profit: FloatArray, weight: float = weight) -> FloatArray:
            return (1 - weight) * welfare + weight * profit

        for start in _starts(market, screening):
            pool += _thinned(market, market.climb(start, weighted), weighted)
    best = market.tighten(np.append(0.0, np.full(screening.cost.size, np.inf)))
    for n in range(1, min(tiers, screening.cost.size) + 1):
        found = [market.climb(prices, final) for prices in pool if len(_offered(prices)) == n]
        best = max([best, *found], key=value)
        best = _exchanged(market, best, n, final)
    return best


def _starts(market: _Market, screening: Screening) -> list[FloatArray]:
    """First prices of all offerings: as the lotteries pay for each, and at cost."""
    f = screening.types.probability
    usual = np.where(screening.lottery.sum(axis=1) > 0.5, screening.lottery.argmax(axis=1), -1)
    asked = market.worth[:, 1:] - screening.utility[:, None]
    lotteries = np.zeros(screening.cost.size)
    for o in range(screening.cost.size):
        mine = (usual == o) & (f > 0)
        lotteries[o] = f[mine] @ asked[mine, o] / f[mine].sum() if mine.any() else asked[:, o].max()
    return [np.append(0.0, lotteries), np.append(0.0, screening.cost)]


def _thinned(market: _Market, prices: FloatArray, score: Score) -> list[FloatArray]:
    """Menus that lose, one after another, the tier whose loss costs least."""
    menus = [prices]
    while len(_offered(prices)) > 1:
        fewer = [_with(prices, o, np.inf) for o in _offered(prices)]
        prices = market.climb(max(fewer, key=lambda menu: market.value(menu, score)), score)
        menus.append(prices)
    return menus


def _exchanged(market: _Market, prices: FloatArray, n: int, score: Score) -> FloatArray:
    """The menu after all betterments by one offering exchanged (below n tiers, added), one price or one type moved."""

    def value(menu: FloatArray) -> float:
        return market.value(menu, score)

    while True:
        on = _offered(prices)
        off = set(range(1, prices.size)) - set(on)
        bases = [prices] if len(on) < n else [_with(prices, o, np.inf) for o in on]
        tried = [
            market.shift(_with(base, o, 0.0), np.array([o]), score) for base in bases for o in sorted(off)
        ]
        tried += [_answered(market, menu, score) for o in on for menu in _jolted(market, prices, o)]
        moved = [menu for base in [prices, *bases] for menu in _reassigned(market, base)]
        moved = [menu for menu in moved if len(_offered(menu)) <= n]
        tried += sorted(moved, key=value, reverse=True)[:CLIMBS]
        best = max((market.climb(menu, score) for menu in tried), key=value, default=prices)
        if value(best) <= value(prices) + market.slack:
            return prices
        prices = best


def _jolted(market: _Market, prices: FloatArray, offering: int) -> list[FloatArray]:
    """Menus with one price moved to where some type starts to take it."""
    others = np.flatnonzero(np.isfinite(_with(prices, offering, np.inf)))
    switch = np.unique(market.worth[:, offering] - (market.worth[:, others] - prices[others]).max(axis=1))
    return [_with(prices, offering, float(switch[k])) for k in _even(switch.size)]


def _answered(market: _Market, prices: FloatArray, score: Score) -> FloatArray:
    """Every price moved in turn, to its best."""
    for o in _offered(prices):
        prices = market.shift(prices, np.array([o]), score)
    return prices


def _reassigned(market: _Market, prices: FloatArray) -> list[FloatArray]:
    """Menus that support what all take now, but for one type. They lower prices that need not be high to recover."""
    takes, there = market.choose(prices), np.flatnonzero(market.probability)
    menus = []
    for t in there[_even(there.size)]:
        for o in range(prices.size):
            other = takes.copy()
            other[t] = o
            menu, supported = market.supporting(other)
            if supported:
                menus.append(menu)
    return menus


def _even(size: int) -> IntArray:
    """At most `JOLTS` places out of `size`, evenly spread."""
    return np.linspace(0, size - 1, min(JOLTS, size)).astype(np.int64)


def _published(screening: Screening, market: _Market, prices: FloatArray) -> CappedMenu:
    types, f = screening.types, screening.types.probability
    on = np.unique(market.choose(prices)[f > 0])
    on = on[on > 0]  # at the highest prices a tie may have left a tier to nobody
    prices = np.where(np.isin(np.arange(prices.size), np.append(0, on)), prices, np.inf)
    taken = market.choose(prices)
    on = on[np.lexsort((market.seconds[on], market.quality[on]))]
    rows = np.arange(len(types))
    utility = (market.worth - prices)[rows, taken]
    cost = np.append(0.0, screening.cost)
    tiers, latency_prices = [], []
    for o in on:
        mine = (taken == o) & (f > 0)
        share = float(f[mine].sum())
        tiers.append(
            Tier(
                name=screening.names[o - 1],
                quality=float(market.quality[o]),
                price=float(prices[o]),
                type_from=float(types.value[mine].min()),
                type_to=float(types.value[mine].max()),
                seconds=float(market.seconds[o]),
                cost=float(cost[o]),
                share=share,
                rent=float(f[mine] @ utility[mine]) / share,
            )
        )
        latency_prices.append(
            (float(types.latency_price[mine].min()), float(types.latency_price[mine].max()))
        )
    place = np.full(prices.size, -1)
    place[on] = np.arange(on.size)
    return CappedMenu(
        tuple(tiers),
        tuple(latency_prices),
        types,
        place[taken],
        screening.objective,
        certified(types, market.quality[taken], market.seconds[taken], cost[taken], utility),
        screening.bound,
        screening.recovery_price,
    )
