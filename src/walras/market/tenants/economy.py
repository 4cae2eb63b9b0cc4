"""Tenants, goods and activities: an economy, its excess demand at any prices, and what is wrong with it. [Z-GE]

Prices are (G,) ≥ 0 and only their ratios matter. A tenant's income is the worth of its endowment, and its share of the
operator's revenue where budgets in USD are spent on a supply: budgets only say who may spend how much of that revenue,
so that Walras' law holds at any prices, and prices in USD follow from the level at which the budgets buy the supply.

Activities have constant returns: column a is the net output of good after good per unit, inputs negative. A sector is an
activity whose inputs respond to prices, a CES production function at least cost. Disposal is free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from walras.errors import QuantityError
from walras.market.tenants.utility import CES, Fault, Utility, ces_demand, ces_jacobian, unit_demand
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who demands: what it wants, what it owns, what it may spend."""

    name: str
    utility: Utility
    endowment: FloatArray
    """(G,) units ≥ 0."""
    budget: float = 0.0
    """USD to spend on the economy's supply."""


@dataclass(frozen=True, slots=True)
class Sector:
    """Firms that make one good from others at constant returns: Q = CES of the inputs, at least cost."""

    name: str
    output: int
    """The good made."""
    inputs: CES
    """Input per unit of cost: like a consumer's demand."""
    cost: float
    """What a unit costs at input prices of 1."""

    @classmethod
    def of_production(
        cls, name: str, output: int, phi: float, delta: FloatArray, elasticity: float
    ) -> Sector:
        """Q = φ [Σ δ_f F_f^((σ−1)/σ)]^(σ/(σ−1)), its limits at σ = 1 (φ Π F^δ) and σ = 0 (φ min F/δ). `delta` (G,)."""
        weights = delta if elasticity in (0, 1) else delta**elasticity
        total = float(weights.sum())
        if elasticity == 1:
            share = delta[delta > 0]
            return cls(name, output, CES(delta, elasticity), float(np.prod(share**-share)) / phi)
        return cls(name, output, CES(weights, elasticity), total ** (1 / (1 - elasticity)) / phi)

    def unit_cost(self, p: FloatArray) -> float:
        return self.cost * self.inputs.price_index(p)

    def _inputs_at(self, p: FloatArray) -> FloatArray:
        inputs: FloatArray = unit_demand(self.inputs.shares[None], np.array([self.inputs.elasticity]), p)[0]
        return inputs

    def technique(self, p: FloatArray) -> FloatArray:
        """(G,) net output per unit at least cost: the slope of profit in prices."""
        net = -self._inputs_at(p) * self.unit_cost(p)
        net[self.output] += 1.0
        return net

    def bend(self, p: FloatArray) -> FloatArray:
        """∂technique/∂p, (G, G): σ c (diag(d/p) − d dᵀ) for input d per unit of cost c."""
        sigma, c = self.inputs.elasticity, self.unit_cost(p)
        d = self._inputs_at(p)
        return np.asarray(sigma * c * (np.diag(d / p) - np.outer(d, d)))


@dataclass(frozen=True, slots=True)
class Economy:
    """N tenants, G goods, A activities.

    Raises:
        QuantityError: the columns do not fit, or no prices could clear: names tenant and good.
    """

    goods: tuple[str, ...]
    tenants: tuple[Tenant, ...]
    activities: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    """(G, A₀) net output per unit."""
    activity_names: tuple[str, ...] = ()
    sectors: tuple[Sector, ...] = ()
    """They come after the activities: A = A₀ + sectors."""
    supply: FloatArray = field(default_factory=lambda: np.zeros(0))
    """(G,) what the operator sells for the tenants' budgets."""
    owned: FloatArray = field(init=False, repr=False)
    """(N, G) endowment and, for its budget, the tenant's share of the supply's worth."""
    _ces: IntArray = field(init=False, repr=False)
    _columns: tuple[FloatArray, FloatArray, FloatArray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n_goods = len(self.goods)

        def put(name: str, value: object) -> None:  # frozen, but not yet made
            object.__setattr__(self, name, value)

        if self.activities.size == 0:
            put("activities", np.zeros((n_goods, 0)))
        if self.supply.size == 0:
            put("supply", np.zeros(n_goods))
        _check_shapes(self)
        if not self.activity_names:
            put("activity_names", tuple(f"activity {a + 1}" for a in range(self.activities.shape[1])))
        budgets = np.array([t.budget for t in self.tenants])
        _check_money(self, budgets)
        share = budgets / (budgets.sum() or 1.0)
        put("owned", np.array([t.endowment for t in self.tenants]) + np.outer(share, self.supply))
        _check_owned(self)
        ces = [(i, t.utility) for i, t in enumerate(self.tenants) if isinstance(t.utility, CES)]
        put("_ces", np.array([i for i, _ in ces], dtype=np.int64))
        shares = np.array([u.shares for _, u in ces]).reshape(-1, n_goods)
        needs = np.array([u.subsistence + np.zeros(n_goods) for _, u in ces]).reshape(-1, n_goods)
        put("_columns", (shares, np.array([u.elasticity for _, u in ces]), needs))

    @property
    def n_activities(self) -> int:
        return int(self.activities.shape[1]) + len(self.sectors)

    @property
    def making(self) -> tuple[str, ...]:
        """Names of the activities and sectors, (A,)."""
        return self.activity_names + tuple(s.name for s in self.sectors)

    @property
    def _others(self) -> list[int]:
        return [i for i, t in enumerate(self.tenants) if not isinstance(t.utility, CES)]

    def incomes(self, p: FloatArray) -> FloatArray:
        """(N,) in the unit of the prices."""
        incomes: FloatArray = self.owned @ p
        return incomes

    def usd(self, p: FloatArray) -> float:
        """USD per unit of these prices, where the budgets buy the supply; NaN without budgets."""
        spent = sum(t.budget for t in self.tenants)
        return spent / float(self.supply @ p) if spent else np.nan

    def demands(self, p: FloatArray) -> FloatArray:
        """(N, G) what each tenant buys at p; one of its demands where several are best (`Linear`)."""
        incomes, x = self.incomes(p), np.empty_like(self.owned)
        x[self._ces] = ces_demand(*self._columns, p, incomes[self._ces])
        for i in self._others:
            x[i] = self.tenants[i].utility.demand(p, float(incomes[i]))
            if np.isnan(x[i]).any():
                good = self.goods[int(np.argmax(np.isnan(x[i])))]
                raise QuantityError(
                    f"tenant '{self.tenants[i].name}': its demand for '{good}' is NaN at prices {p.tolist()}"
                )
        return x

    def excess_demand(self, p: FloatArray) -> FloatArray:
        """z(p) = Σ demand − Σ owned, (G,), before any production; p·z(p) = 0 at any p > 0."""
        return np.asarray(self.demands(p).sum(axis=0) - self.owned.sum(axis=0))

    def jacobian(self, p: FloatArray) -> FloatArray:
        """∂z/∂p, (G, G)."""
        incomes = self.incomes(p)
        total = ces_jacobian(*self._columns, self.owned[self._ces], p)
        for i in self._others:
            own, by_income = self.tenants[i].utility.slopes(p, float(incomes[i]))
            total = total + own + np.outer(by_income, self.owned[i])
        return total

    def techniques(self, p: FloatArray) -> FloatArray:
        """B(p), (G, A): net output per unit of each activity at its least cost."""
        return np.column_stack([self.activities, *(s.technique(p) for s in self.sectors)])

    def profits(self, p: FloatArray) -> FloatArray:
        """(A,) profit per unit, in the unit of the prices."""
        return np.asarray(p @ self.techniques(p))

    def bend(self, p: FloatArray, y: FloatArray) -> FloatArray:
        """Σ_a y_a ∂B_a/∂p, (G, G): what changing prices do to inputs at given activity."""
        total = np.zeros((len(self.goods), len(self.goods)))
        for level, sector in zip(y[self.activities.shape[1] :], self.sectors, strict=True):
            total += level * sector.bend(p)
        return total


# --- what cannot be an economy ----------------------------------------------------------------------------------


def _check_shapes(economy: Economy) -> None:
    goods, n_goods = economy.goods, len(economy.goods)
    if not goods or not economy.tenants:
        raise QuantityError("an economy needs at least one good and one tenant")
    for kind, names in (("good", goods), ("tenant", [t.name for t in economy.tenants])):
        twice = {n for n in names if list(names).count(n) > 1} if len(set(names)) < len(names) else set()
        if twice:
            raise QuantityError(f"{kind} '{min(twice)}' is there twice: names must differ")
    for tenant in economy.tenants:
        _check_amounts(f"tenant '{tenant.name}': endowment", tenant.endowment, goods)
        _refuse(f"tenant '{tenant.name}'", tenant.utility.faults(n_goods), goods)
    _check_amounts("the supply", economy.supply, goods)
    if economy.activities.shape[0] != n_goods:
        raise QuantityError(f"activities have {economy.activities.shape[0]} rows for {n_goods} goods")
    if not np.isfinite(economy.activities).all():
        row, column = np.argwhere(~np.isfinite(economy.activities))[0]
        raise QuantityError(f"activity {column + 1}: its amount of '{goods[row]}' is not a finite number")
    idle = ~economy.activities.any(axis=0)
    if idle.any():
        raise QuantityError(
            f"activity {int(np.argmax(idle)) + 1} neither needs nor makes anything: leave it out"
        )
    n_named = len(economy.activity_names)
    if n_named and n_named != economy.activities.shape[1]:
        raise QuantityError(f"{n_named} activity names for {economy.activities.shape[1]} activities")
    for sector in economy.sectors:
        _refuse(f"sector '{sector.name}'", sector.inputs.faults(n_goods), goods)
        if not 0 <= sector.output < n_goods:
            raise QuantityError(f"sector '{sector.name}' makes a good beyond the {n_goods} there are")
        if sector.inputs.shares[sector.output] > 0:
            raise QuantityError(
                f"sector '{sector.name}' needs its own output '{goods[sector.output]}' as input"
            )
        if not (np.isfinite(sector.cost) and sector.cost > 0):
            raise QuantityError(f"sector '{sector.name}': its unit cost must be > 0, not {sector.cost}")


def _check_amounts(what: str, amounts: FloatArray, goods: Sequence[str]) -> None:
    if amounts.shape != (len(goods),):
        raise QuantityError(f"{what} has {amounts.size} amounts for {len(goods)} goods")
    bad: BoolArray = ~(np.isfinite(amounts) & (amounts >= 0))
    if bad.any():
        good = int(np.argmax(bad))
        raise QuantityError(f"{what} of '{goods[good]}' must be a number ≥ 0, not {amounts[good]}")


def _refuse(who: str, faults: Iterator[Fault], goods: Sequence[str]) -> None:
    for problem, good in faults:
        raise QuantityError(
            f"{who}, good '{goods[good]}': {problem}" if good is not None else f"{who}: {problem}"
        )


def _check_money(economy: Economy, budgets: FloatArray) -> None:
    bad = ~(np.isfinite(budgets) & (budgets >= 0))
    if bad.any():
        tenant = economy.tenants[int(np.argmax(bad))]
        raise QuantityError(
            f"tenant '{tenant.name}': its budget must be a number of USD ≥ 0, not {tenant.budget}"
        )
    if budgets.any() and not economy.supply.any():
        tenant = economy.tenants[int(np.argmax(budgets > 0))]
        raise QuantityError(f"tenant '{tenant.name}' has a budget, but there is no supply to spend it on")
    if economy.supply.any() and not budgets.any():
        good = economy.goods[int(np.argmax(economy.supply > 0))]
        raise QuantityError(f"there is a supply of '{good}', but no tenant has a budget to buy it with")


def _check_owned(economy: Economy) -> None:
    """Somebody owns something; each good that is wanted can be had; subsistence can be paid at some prices."""
    owned, goods = economy.owned, economy.goods
    if not owned.any():
        names = ", ".join(f"'{t.name}'" for t in economy.tenants[:3])
        raise QuantityError(f"no tenant owns anything, of '{goods[0]}' or any other good ({names}, …)")
    made: BoolArray = np.asarray((economy.activities > 0).any(axis=1))
    made[[s.output for s in economy.sectors]] = True
    for good in np.flatnonzero(~made & ~owned.any(axis=0)):
        wanting = [t.name for t in economy.tenants if t.utility.wanted(len(goods))[good]]
        who = f"tenant '{wanting[0]}' wants it" if wanting else "leave it out"
        raise QuantityError(f"nobody owns the good '{goods[good]}', and no activity makes it: {who}")
    for i, tenant in enumerate(economy.tenants):
        if not isinstance(tenant.utility, CES):
            continue
        over = tenant.utility.subsistence - owned[i]
        if (over >= 0).all() and (over > 0).any():
            raise QuantityError(
                f"tenant '{tenant.name}' can pay for its subsistence at no prices: of '{goods[int(np.argmax(over))]}' it needs"
                f" {over.max():.4g} more than it owns or its budget stands for, and of no other good less"
            )
    _check_subsistence(economy, made)


def _check_subsistence(economy: Economy, made: BoolArray) -> None:
    needs = np.array([
        t.utility.subsistence + np.zeros(len(economy.goods)) if isinstance(t.utility, CES) else np.zeros(len(economy.goods))
        for t in economy.tenants
    ])  # fmt: skip
    over = np.where(made, 0.0, needs.sum(axis=0) - economy.owned.sum(axis=0))
    if (over > 0).any():
        good = int(np.argmax(over))
        tenant = economy.tenants[int(np.argmax(needs[:, good]))]
        raise QuantityError(
            f"subsistence takes {over[good]:.4g} more of '{economy.goods[good]}' than there is: tenant '{tenant.name}' alone"
            f" needs {needs[:, good].max():.4g}"
        )
