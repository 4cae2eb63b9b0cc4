"""Equilibrium as complementarity: excess supply B(p)y − z(p) ≥ 0 ⟂ p ≥ 0, and losses −B(p)ᵀp ≥ 0 ⟂ y ≥ 0. [Z-GE]

Two rewritings make one smooth square problem of every economy, and neither changes its equilibria:

- A linear tenant, whose demand is a set, becomes a tenant that buys one good, its own utility, made from goods by
  activities of its own: w_c units of utility out of one unit of good c. What it eats is what those activities take in.
- Goods are counted in shares of what there is (or of what could be made), so that tokens and GPU-hours weigh alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from walras.market.tenants.economy import Economy, Sector, Tenant
from walras.market.tenants.utility import CES, Demand, Linear, QuasiLinear
from walras.quantities import IntArray
from walras.risk import FloatArray

CORNER = 1e-8
"""Share of all income, and of all worth, next to nothing: above the gap that an equilibrium may leave."""


@dataclass(slots=True)
class Conditions:
    """The scaled problem in q = p·(units of each good), levels y; M goods and K activities of the unfolded economy."""

    whole: Economy
    """With linear tenants unfolded."""
    n_goods: int
    """Of the economy as it was given; its goods come first."""
    n_activities: int
    """Of the economy as it was given; the linear tenants' activities come after its fixed ones."""
    eaters: IntArray
    """(E, 2) tenant and good of each activity of a linear tenant."""
    units: FloatArray
    """(M,) units of a good counted as one."""
    levels: FloatArray
    """(K,) units of activity counted as one."""
    evaluations: int = field(default=0)
    """How often demand was asked."""

    @classmethod
    def of(cls, economy: Economy) -> Conditions:
        whole, eaters = _unfold(economy)
        units = _units(whole)
        size = np.abs(whole.techniques(1 / units) / units[:, None]).max(axis=0, initial=0.0)
        levels = 1 / np.where(size > 0, size, 1.0)
        return cls(whole, len(economy.goods), economy.activities.shape[1], eaters, units, levels)

    @property
    def size(self) -> tuple[int, int]:
        """(M, K)."""
        return self.units.size, self.levels.size

    def excess(self, q: FloatArray) -> FloatArray:
        """z, (M,)."""
        self.evaluations += 1
        return self.whole.excess_demand(q / self.units) / self.units

    def slope(self, q: FloatArray) -> FloatArray:
        """∂z/∂q, (M, M)."""
        return self.whole.jacobian(q / self.units) / np.outer(self.units, self.units)

    def columns(self, q: FloatArray) -> FloatArray:
        """B, (M, K)."""
        return self.whole.techniques(q / self.units) / self.units[:, None] * self.levels

    def bend(self, q: FloatArray, y: FloatArray) -> FloatArray:
        """Σ y ∂B/∂q, (M, M)."""
        return self.whole.bend(q / self.units, y * self.levels) / np.outer(self.units, self.units)

    def cornered(self, q: FloatArray) -> bool:
        """Whether a tenant has next to no income and wants what is next to free."""
        incomes = self.whole.incomes(q / self.units)
        poor = np.flatnonzero(incomes <= CORNER * incomes.sum())
        return any((self.whole.tenants[i].utility.wanted(q.size) & (q <= CORNER)).any() for i in poor)

    def folded(self, q: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Prices (G,) that sum to 1, activities (A,) and allocation (N, G) of the economy as it was given."""
        p = (q / self.units)[: self.n_goods]
        x = self.whole.demands(q / self.units)[:, : self.n_goods]
        real = np.maximum(y, 0.0) * self.levels
        fixed, n_eaten = self.n_activities, len(self.eaters)
        np.add.at(x, (self.eaters[:, 0], self.eaters[:, 1]), real[fixed : fixed + n_eaten])
        activities = np.concatenate((real[:fixed], real[fixed + n_eaten :]))
        return p / p.sum(), activities, x

    def unfolded(self, p: FloatArray, y: FloatArray, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The inverse of `folded`: q, with a linear tenant's price of utility at its best good, and y."""
        tenant, good = self.eaters[:, 0], self.eaters[:, 1]
        prices = np.full(self.units.size, np.inf)
        prices[: self.n_goods] = p
        weight = self.whole.activities[:, self.n_activities :].max(axis=0, initial=0.0)
        _, own = np.unique(tenant, return_inverse=True)
        np.minimum.at(prices, self.n_goods + own, p[good] / weight)
        split = self.n_activities
        levels = np.concatenate((y[:split], x[tenant, good], y[split:])) / self.levels
        return prices * self.units / float(np.sum(prices * self.units)), levels


def _unfold(economy: Economy) -> tuple[Economy, IntArray]:
    """The economy with a good and activities for each linear tenant, and who eats what by them."""
    linear = [(i, t.utility) for i, t in enumerate(economy.tenants) if isinstance(t.utility, Linear)]
    if not linear:
        return economy, np.zeros((0, 2), dtype=np.int64)
    n_goods, more = len(economy.goods), len(linear)
    eaters, columns, tenants = [], [], [_wider(t, more) for t in economy.tenants]
    for k, (i, utility) in enumerate(linear):
        own = np.zeros(n_goods + more)
        own[n_goods + k] = 1.0
        tenants[i] = Tenant(tenants[i].name, CES(own, 1.0), tenants[i].endowment, tenants[i].budget)
        for good in np.flatnonzero(utility.weights):
            column = utility.weights[good] * own
            column[good] = -1.0
            columns.append(column)
            eaters.append((i, good))
    fixed = np.vstack((economy.activities, np.zeros((more, economy.activities.shape[1]))))
    whole = Economy(
        (*economy.goods, *(f"utility of {economy.tenants[i].name}" for i, _ in linear)),
        tuple(tenants),
        activities=np.column_stack((fixed, *columns)),
        sectors=tuple(
            Sector(s.name, s.output, CES(_padded(s.inputs.shares, more), s.inputs.elasticity), s.cost)
            for s in economy.sectors
        ),
        supply=_padded(economy.supply, more),
    )
    return whole, np.array(eaters, dtype=np.int64)


def _wider(tenant: Tenant, more: int) -> Tenant:
    """The tenant among `more` further goods that it neither owns nor wants."""
    utility = tenant.utility
    if isinstance(utility, CES):
        need = (
            utility.subsistence
            if utility.subsistence.size > 1
            else utility.subsistence * np.ones(tenant.endowment.size)
        )
        utility = CES(_padded(utility.shares, more), utility.elasticity, _padded(need, more))
    elif not isinstance(utility, Linear | QuasiLinear):
        own, n = utility, tenant.endowment.size
        utility = Demand(lambda p, income: _padded(own.demand(p[:n], income), more))
    return Tenant(tenant.name, utility, _padded(tenant.endowment, more), tenant.budget)


def _padded(values: FloatArray, more: int) -> FloatArray:
    return np.concatenate((values, np.zeros(more)))


def _units(economy: Economy) -> FloatArray:
    """(M,) of each good what is owned, or else what the rest could make of it."""
    units = economy.owned.sum(axis=0)
    columns = economy.techniques(1 / np.where(units > 0, units, 1.0))
    for _ in range(units.size):
        if (units > 0).all():
            break
        with np.errstate(over="ignore"):
            reach = np.where(columns < 0, units[:, None] / np.maximum(-columns, 1e-300), np.inf).min(
                axis=0, initial=np.inf
            )
        made = (np.maximum(columns, 0.0) * np.where(np.isfinite(reach), reach, 1.0)).max(axis=1, initial=0.0)
        units = np.where(units > 0, units, made)
    return np.where(units > 0, units, 1.0)
