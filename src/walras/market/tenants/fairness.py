"""How fair a clearing of tenants with budgets looks: envy, shares, gains over other rules, what each costs the others.

Every view compares what a tenant got with what it might have had, by its own utility; none compares two tenants'
utilities. In a competitive equilibrium nobody envies a bundle scaled to its budget, and nobody does worse than with its
budget's share of everything (Varian 1974). The price of admission in one queue is the degenerate case: one price [Z-GE].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from walras.equation import DEFER
from walras.errors import QuantityError
from walras.market.tenants import spending
from walras.market.tenants.fisher import SHARPEST, FisherEquilibrium, FisherMarket, Scaled, solve
from walras.market.tenants.menus import MenuClearing, RequestMenus, clear_menus
from walras.quantities import IntArray
from walras.risk import FloatArray

LOOKED_AT = 256
"""Others whose bundles each tenant looks at, at most, unless said otherwise."""
SOFT = 30.0
"""Sharpness at which the curvature of piecewise utilities is measured: prices some per cent around."""


@dataclass(frozen=True, slots=True)
class Envy:
    """What tenants would gain by the bundle they like best among those looked at, scaled to their own budget."""

    gain: FloatArray
    """(N,) relative to their own utility; ≤ 0: no envy. NaN for tenants without a budget."""
    whom: IntArray
    """(N,) whose bundle that is."""
    looked_at: IntArray
    """The tenants whose bundles were looked at: all, or a sample."""


@dataclass(frozen=True, slots=True)
class Shares:
    """A tenant's utility beside what it would have otherwise, (N,) each; NaN for tenants without a budget.

    Where money may be kept, utility is in USD, and parts of everything are paid for at the equilibrium's prices (a tenant that
    cannot pay for 1/N has less than nothing then: NaN).
    """

    utility: FloatArray
    of_all: FloatArray
    """Relative to having all there is, and its money: its egalitarian share."""
    over_equal_split: FloatArray
    """Relative to 1/N of everything."""
    over_budget_split: FloatArray
    """Relative to its budget's share of everything; ≥ 1 in an equilibrium."""
    over_one_price: FloatArray
    """Relative to one queue with admission: all goods at one price for each unit of `load`, which rises until nothing is
    asked for beyond its supply."""
    one_price: float
    """That price, USD a unit of load."""


@dataclass(frozen=True, slots=True)
class Externality:
    """What a tenant costs the others: their best Σ B log U − money kept without it, less what they have with it (the
    Clarke pivot). USD × log utility: to first order the USD that it pays.
    """

    first_order: FloatArray
    """(N,) what it pays, which is never too little."""
    second_order: FloatArray
    """(N,) the same less half of how its bundle would bend prices; for piecewise utilities an estimate at a bandwidth."""
    tenants: IntArray
    """(M,) those for which the market was cleared again without them."""
    exact: FloatArray
    """(M,)."""
    least: FloatArray
    """(M,) its bundle at the prices without it, which is never too much."""
    error: float
    """Gaps of the two clearings, together: USD × log utility."""


def envy(
    market: FisherMarket, cleared: FisherEquilibrium, *, look_at: int = LOOKED_AT, seed: int = 0
) -> Envy:
    """Every tenant's, towards all others or a sample drawn evenly."""
    scaled, bundle, kept = _bundles(market, cleared.allocation, cleared.kept)
    tenants, n = scaled.tenants, len(scaled.tenants)
    rng = np.random.default_rng(seed)
    others = np.arange(n) if n <= look_at else np.sort(rng.choice(n, look_at, replace=False))
    most, whom = np.empty(n), np.empty(n, dtype=np.int64)
    tenants.in_chunks(
        lambda lo, hi: spending.envy(*tenants.columns, bundle, kept, others, lo, hi, most, whom)
    )
    at = np.arange(len(market))[scaled.rows]
    gain, of = np.full(len(market), np.nan), np.full(len(market), -1)
    gain[at], of[at] = np.expm1(most), at[whom]
    return Envy(gain, of, at[others])


def shares(market: FisherMarket, cleared: FisherEquilibrium, *, load: FloatArray | None = None) -> Shares:
    """What everybody has beside what other rules would give.

    Args:
        load: what a unit of each good counts in one queue, (G,) > 0; by default 1/supply, its share of capacity.
    """
    n, total = len(market), float(market.budgets.sum())
    own = utilities(market, cleared.allocation, cleared.kept)

    def of(part: FloatArray, cost: float) -> FloatArray:
        """Utility from a part (N,) of everything, where all of it costs so much."""
        kept = np.where(np.isfinite(market.worth), market.budgets - part * cost, 0.0)
        return utilities(market, part[:, None] * market.supply, kept)

    cost = float(cleared.prices @ market.supply)
    price, allocation, kept = one_price(market, load)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Shares(
            own,
            own / of(np.ones(n), 0.0),
            own / of(np.full(n, 1.0 / n), cost),
            own / of(market.budgets / total, cost),
            own / utilities(market, allocation, kept),
            price,
        )


def utilities(market: FisherMarket, allocation: FloatArray, kept: FloatArray) -> FloatArray:
    """(N,) of bundles (N, G) and money kept (N,); NaN for tenants without a budget."""
    scaled, bundle, money = _bundles(market, allocation, kept)
    tenants, logs = scaled.tenants, np.empty(len(scaled.tenants))
    tenants.in_chunks(
        lambda lo, hi: spending.utilities(
            tenants.taste, tenants.sigma, tenants.keep, bundle, money, lo, hi, logs
        )
    )
    out = np.full(len(market), np.nan)
    out[scaled.rows] = np.exp(logs + scaled.log_unit)
    return out


def one_price(market: FisherMarket, load: FloatArray | None = None) -> tuple[float, FloatArray, FloatArray]:
    """The price of a unit of load at which nothing is over-asked, what tenants then buy, (N, G), and keep, (N,)."""
    weight = 1.0 / market.supply if load is None else np.asarray(load, dtype=np.float64)
    if weight.shape != market.supply.shape or not (np.isfinite(weight) & (weight > 0)).all():
        raise QuantityError("load: one number > 0 for each good")
    scaled = Scaled.of(market)
    tenants, relative = scaled.tenants, weight[scaled.goods] / scaled.unit

    def demand(price: float) -> float:
        return float(tenants.buy(price * relative, SHARPEST)[0].sum(axis=0).max())

    # Without money kept demand is in inverse proportion to the price; with it, it falls faster.
    high = float(market.budgets.sum())
    high *= demand(high)
    if np.isfinite(tenants.keep).any():
        high = _least(lambda price: demand(price) <= 1.0, high)
    bought, kept = tenants.buy(high * relative, SHARPEST)
    found = np.zeros(market.weights.shape)
    money, at = np.zeros(len(market)), np.arange(len(market))[scaled.rows]
    found[np.ix_(at, scaled.goods)] = bought * market.supply[scaled.goods]
    money[at] = kept * float(market.budgets.sum())
    return high, found, money


def _least(holds: Callable[[float], bool], at: float) -> float:
    """The least price from which on `holds` is true, to the last digits but one; 0 is never tried."""
    low, high = at, at
    while not holds(high):
        low, high = high, 2.0 * high
    while low > 1e-300 and holds(low):
        low, high = 0.5 * low, low
    while high - low > 1e-14 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def externalities(
    market: FisherMarket,
    cleared: FisherEquilibrium,
    *,
    tenants: IntArray | None = None,
    sample: int = 16,
    seed: int = 0,
) -> Externality:
    """Of everybody to second order; exactly, by clearing again from these prices, of `tenants` or of a sample."""
    paid = cleared.allocation @ cleared.prices
    scaled = Scaled.of(market)
    bend = scaled.curvature(cleared.prices, SOFT)
    x = cleared.allocation[:, scaled.goods]
    ridge = 1e-12 * np.trace(bend) * np.eye(scaled.goods.size)
    halves = 0.5 * np.einsum("ij,ij->i", x @ np.linalg.pinv(bend + ridge, hermitian=True), x)
    payers = np.arange(len(market))[scaled.rows]
    if tenants is None:
        drawn = np.random.default_rng(seed).choice(payers, min(sample, payers.size), replace=False)
        tenants = np.sort(drawn) if payers.size > 1 else drawn[:0]
    exact, least, gap = np.empty(tenants.size), np.empty(tenants.size), 0.0
    logs = utilities(market, cleared.allocation, cleared.kept)
    for at, i in enumerate(tenants):
        budgets = market.budgets.copy()
        budgets[i] = 0.0
        others = np.delete(np.arange(len(market)), i)
        others = others[market.budgets[others] > 0]
        without = solve(replace(market, budgets=budgets), start=cleared.prices)
        have = float(market.budgets[others] @ np.log(logs[others]) - cleared.kept[others].sum())
        exact[at] = without.certificate.objective - have
        least[at] = float(cleared.allocation[i] @ without.prices)
        gap = max(gap, abs(without.certificate.gap) * float(budgets.sum()))
    gap += abs(cleared.certificate.gap) * float(market.budgets.sum())
    return Externality(paid, paid - halves, tenants, exact, least, gap)


def _bundles(
    market: FisherMarket, allocation: FloatArray, kept: FloatArray
) -> tuple[Scaled, FloatArray, FloatArray]:
    """In scaled units, of the tenants with a budget."""
    scaled = Scaled.of(market)
    bundle = allocation[scaled.rows][:, scaled.goods] / market.supply[scaled.goods]
    return scaled, bundle, kept[scaled.rows] / float(market.budgets.sum())


# --- requests' menus ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accounts:
    """What tenants get and pay in a clearing of request menus, one use a request; (T,) USD a period."""

    worth: FloatArray
    """Σ value·quality − cost outside."""
    payment: FloatArray
    """Prices × amounts: to first order what a tenant costs the others, and never too little."""

    @property
    def surplus(self) -> FloatArray:
        return self.worth - self.payment


@dataclass(frozen=True, slots=True)
class MenuExternality:
    """What some tenants cost the others: the welfare of these without a tenant, less what they have with it; USD a period."""

    tenants: IntArray
    exact: FloatArray
    """(M,) by clearing again without each."""
    first_order: FloatArray
    """(M,) their payments."""
    least: FloatArray
    """(M,) what they take at the prices without them."""
    error: FloatArray
    """(M,) USD: gaps of the two clearings, and what whole uses leave of a priced budget, at its price."""


def accounts(menus: RequestMenus, cleared: MenuClearing) -> Accounts:
    taken = _taken_by(menus, cleared.whole.use)
    return Accounts(taken[0], cleared.prices @ taken[2:])


def menu_externalities(
    menus: RequestMenus, supply: FloatArray, cleared: MenuClearing, tenants: IntArray
) -> MenuExternality:
    """Of these tenants; exact in the market of mixtures, from the prices with them."""
    taken = _taken_by(menus, cleared.whole.use)
    exact, least, error = np.empty(tenants.size), np.empty(tenants.size), np.empty(tenants.size)
    for at, i in enumerate(tenants):
        others = np.flatnonzero(menus.tenant != i)
        without = clear_menus(menus.take(others), supply, start=cleared.prices)
        exact[at] = without.welfare - (cleared.welfare - taken[0, i])
        least[at] = without.prices @ taken[2:, i]
        error[at] = abs(cleared.gap * cleared.bound) + abs(without.gap * without.bound)
        if menus.budgets is not None:
            error[at] += cleared.budget_prices[i] * (menus.budgets[i] - taken[1, i])
    return MenuExternality(tenants, exact, cleared.prices @ taken[2:, tenants], least, error)


def _taken_by(menus: RequestMenus, use: IntArray) -> FloatArray:
    """Worth, USD spent outside and amounts of each resource, by tenant, (2 + R, T)."""
    on = np.flatnonzero(use != DEFER)
    given, tenant = use[on], menus.tenant[on]
    cost = menus.cost[on, given].astype(np.float64)
    columns = [
        menus.value[on] * menus.quality[on, given] - cost,
        cost,
        *(a[on, given] for a in menus.amounts),
    ]
    size = int(menus.tenant.max()) + 1 if menus.budgets is None else menus.budgets.size
    return np.array([np.bincount(tenant, weights=column, minlength=size) for column in columns])
