"""How well an equilibrium is proved, from the economy and the answer alone; and what supports an allocation. [Z-W1/W2]

Gaps are shares, so that they can be compared: of what there is of a good, of a tenant's income, of the worth of all
incomes. Nothing here is taken from the solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from walras.errors import NotCleared, QuantityError
from walras.market.tenants.conditions import Conditions
from walras.market.tenants.economy import Economy
from walras.market.tenants.homotopy import begin, follow
from walras.market.tenants.newton import GOOD, newton
from walras.market.tenants.utility import Demand, Linear
from walras.risk import FloatArray

DRAWS = 8
"""Random prices at which Walras' law is checked."""
NIL = 1e-9
"""Scaled prices, levels and slacks below this are 0."""
INDEXED = 100
"""Linear tenants up to which the index is computed: each adds a good and its activities to a dense matrix."""
SINGULAR = 1e-9
"""Least singular value, relative to the largest, of an equilibrium that counts as regular."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is true of prices, activities and allocation."""

    excess_demand: float
    """Largest amount by which demand exceeds supply, in units of that good."""
    relative_excess: float
    """The same as a share of the good's supply, the largest of all goods."""
    idle_worth: float
    """Worth of what is left over, as a share of all income: 0 where only free goods are."""
    utility_gap: float
    """Largest share of its income that a tenant could have saved and been as well off; NaN where only user-defined
    demands are."""
    utility_gaps: FloatArray
    """(N,) the same for each tenant; NaN for a user-defined demand, whose utility is not known."""
    profit_gap: float
    """Largest profit of an activity, run until it takes or makes all there is of some good, or loss of one in use, as a share
    of all income."""
    budget_residual: float
    """Largest |spent − income| / income of a tenant."""
    walras_law: float
    """Largest |p·z(p)| / (p·owned) at random prices, off equilibrium."""
    pareto_gap: float
    """At most this share of all income's worth could be freed with everybody as well off, at these prices; NaN where a
    utility is not known."""
    index: int | None
    """sign det of minus the Jacobian, activities in use bordering it; the indices of all equilibria of a regular economy sum
    to +1. None where the equilibrium is not regular."""
    regular: bool | None
    """Locally unique: the Jacobian has full rank, and what is free or idle is so by a margin. None: not looked at, above
    `INDEXED` linear tenants."""
    growth: float | None
    """Largest real part of an eigenvalue of dp/dt = z(p) around here, over the largest modulus: below 0 tâtonnement returns
    (in these units of the goods). None where activities or linear tenants leave no such law."""

    @property
    def worst(self) -> float:
        """The largest of the gaps that an exact equilibrium has not."""
        known = () if np.isnan(self.utility_gap) else (self.utility_gap,)
        gaps = np.array(
            [self.relative_excess, self.idle_worth, self.profit_gap, self.budget_residual, *known]
        )
        return float(gaps.max()) if np.isfinite(gaps).all() else np.inf

    @property
    def stable(self) -> bool | None:
        """Tâtonnement returns here from nearby; None where there is none."""
        return None if self.growth is None else self.growth < -NIL


@np.errstate(all="ignore")  # of an answer that is none, numbers may be none either
def certify(economy: Economy, p: FloatArray, y: FloatArray, x: FloatArray, *, seed: int = 0) -> Certificate:
    """Prices p (G,), activities y (A,) and allocation x (N, G), whoever found them."""
    techniques = economy.techniques(p)
    income, spent = economy.incomes(p), x @ p
    everything = float(income.sum())
    supply = economy.owned.sum(axis=0) + techniques @ y
    excess = x.sum(axis=0) - supply
    there = economy.owned.sum(axis=0) + np.maximum(techniques, 0.0) @ y
    utility_gaps, least = _utility_gaps(economy, p, x, income)
    has_income = income > 0
    index, regular = _index(economy, p, y, x)
    return Certificate(
        excess_demand=float(np.maximum(0.0, excess.max())),
        relative_excess=float(np.maximum(0.0, (excess / np.where(there > 0, there, 1.0)).max())),
        idle_worth=float(np.abs(p * excess).max()) / everything,
        utility_gap=float(np.nanmax(utility_gaps)) if np.isfinite(utility_gaps).any() else np.nan,
        utility_gaps=utility_gaps,
        profit_gap=_profit_gap(economy, p, y, everything),
        budget_residual=float(np.max(np.abs(spent - income)[has_income] / income[has_income], initial=0.0)),
        walras_law=walras_law(economy, seed=seed),
        pareto_gap=float(np.maximum(0.0, p @ supply - least.sum())) / everything,
        index=index,
        regular=regular,
        growth=_growth(economy, p),
    )


def walras_law(economy: Economy, *, seed: int = 0, draws: int = DRAWS) -> float:
    """Largest |p·z(p)| / (p·owned) at random prices on the simplex of scaled goods."""
    owned = economy.owned.sum(axis=0)
    unit = np.where(owned > 0, owned, 1.0)
    worst = np.float64(0.0)
    for q in np.random.default_rng(seed).dirichlet(np.ones(unit.size), draws):
        p = q / unit
        worst = np.maximum(worst, np.abs(p @ economy.excess_demand(p)) / (p @ owned))
    return float(worst)


def _utility_gaps(
    economy: Economy, p: FloatArray, x: FloatArray, income: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """1 − e(p, u(x))/income, (N,), and the least expenditures e, (N,)."""
    least = np.array([
        t.utility.expenditure(p, t.utility.utility(np.maximum(x[i], 0.0))) for i, t in enumerate(economy.tenants)
    ])  # fmt: skip
    gaps = np.where(
        income > 0, 1 - least / np.where(income > 0, income, 1.0), np.where(np.isnan(least), np.nan, 0.0)
    )
    return np.maximum(gaps, 0.0), least


def _profit_gap(economy: Economy, p: FloatArray, y: FloatArray, everything: float) -> float:
    profit = economy.profits(p)
    if not profit.size:
        return 0.0
    problem = Conditions.of(economy)
    full = problem.levels[
        np.r_[: problem.n_activities, problem.n_activities + len(problem.eaters) : problem.size[1]]
    ]
    gained, lost = np.maximum(profit, 0.0) * full, np.abs(profit * y)
    return float(np.maximum(gained, lost).max(initial=0.0)) / everything


def _index(economy: Economy, p: FloatArray, y: FloatArray, x: FloatArray) -> tuple[int | None, bool | None]:
    """The index of Kehoe (1980) and whether the equilibrium is regular."""
    if _n_linear(economy) > INDEXED:
        return None, None
    problem = Conditions.of(economy)
    q, level = problem.unfolded(p, y, x)
    used = np.maximum(q, np.finfo(float).tiny)
    columns = problem.columns(used)
    supply_over, loss = columns @ level - problem.excess(used), -(q @ columns)
    dear, run = q > NIL, level > NIL
    clear_cut = bool((supply_over[~dear] > NIL).all() and (loss[~run] > NIL).all())
    dear[np.argmax(q)] = False
    inner = (problem.bend(used, level) - problem.slope(used))[np.ix_(dear, dear)]
    border = columns[np.ix_(dear, run)]
    matrix = np.block([[inner, border], [-border.T, np.zeros((border.shape[1],) * 2)]])
    if not matrix.size:
        return 1, clear_cut
    # The index does not depend on units: in the tenants' own each row and column weighs alike.
    size = np.sqrt(np.maximum(np.abs(matrix).max(axis=0) * np.abs(matrix).max(axis=1), np.finfo(float).tiny))
    values = np.linalg.svd(matrix / size / size[:, None], compute_uv=False)
    if not clear_cut or not values[-1] > SINGULAR * values[0]:
        return None, False
    return int(np.linalg.slogdet(matrix)[0]), True


def _n_linear(economy: Economy) -> int:
    return sum(isinstance(t.utility, Linear) for t in economy.tenants)


def _growth(economy: Economy, p: FloatArray) -> float | None:
    if economy.n_activities or _n_linear(economy) or not (p > 0).all() or p.size < 2:
        return None
    # dp/dt = z(p) keeps |p|, so what matters is what happens at right angles to p.
    across = np.linalg.svd(p[None], full_matrices=True)[2][1:]
    rates = np.linalg.eigvals(across @ economy.jacobian(p) @ across.T)
    return float(rates.real.max() / max(np.abs(rates).max(), np.finfo(float).tiny))


# --- the second welfare theorem ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Support:
    """Prices at which an allocation is what everybody would buy, once incomes are put right. [Z-W2]"""

    prices: FloatArray
    """(G,), Σ = 1."""
    transfers: FloatArray
    """(N,) to each tenant, in the unit of the prices; they sum to 0 where the allocation is efficient."""
    waste: float
    """Share of every good that is owned that could be freed with everybody as well off, by the best prices: 0 proves the
    allocation efficient, more proves it is not."""
    utility_gap: float
    """Largest share of p·x that a tenant could have saved and been as well off."""


@dataclass(slots=True)
class _Compensated:
    """Tenants at given utilities: their least-cost demand against what is owned, all of it cut by the same share.

    Its solution minimises p·owned − Σ e_i(p, u_i) over prices at which no activity gains: the dual of the question how
    much of everything could be freed. The shape of `Conditions`, as far as Newton looks.
    """

    problem: Conditions
    utilities: FloatArray

    @property
    def size(self) -> tuple[int, int]:
        return self.problem.size

    def _spending(self, q: FloatArray) -> FloatArray:
        p = q / self.problem.units
        tenants = self.problem.whole.tenants
        return np.array(
            [t.utility.expenditure(p, float(u)) for t, u in zip(tenants, self.utilities, strict=True)]
        )

    def _owned(self) -> FloatArray:
        return np.asarray(self.problem.whole.owned.sum(axis=0) / self.problem.units)

    def waste(self, q: FloatArray) -> float:
        owned = self._owned()
        return 1 - float(self._spending(q).sum()) / float(q @ owned)

    def excess(self, q: FloatArray) -> FloatArray:
        p, whole = q / self.problem.units, self.problem.whole
        bought = sum(
            (t.utility.demand(p, float(e)) for t, e in zip(whole.tenants, self._spending(q), strict=True)),
            start=np.zeros(p.size),
        )
        return bought / self.problem.units - (1 - self.waste(q)) * self._owned()

    def slope(self, q: FloatArray) -> FloatArray:
        p, whole, owned = q / self.problem.units, self.problem.whole, self._owned()
        spending = self._spending(q)
        total, bought = np.zeros((p.size, p.size)), np.zeros(p.size)
        for tenant, e in zip(whole.tenants, spending, strict=True):
            own, by_income = tenant.utility.slopes(p, float(e))
            x = tenant.utility.demand(p, float(e))
            total += own + np.outer(by_income, x)
            bought += x / self.problem.units
        worth = float(q @ owned)
        share = bought / worth - spending.sum() * owned / worth**2
        return total / np.outer(self.problem.units, self.problem.units) - np.outer(owned, share)

    def columns(self, q: FloatArray) -> FloatArray:
        return self.problem.columns(q)

    def bend(self, q: FloatArray, y: FloatArray) -> FloatArray:
        return self.problem.bend(q, y)

    def cornered(self, q: FloatArray) -> bool:  # noqa: ARG002 - utilities are given, whatever incomes are
        return False


def support(economy: Economy, allocation: FloatArray) -> Support:
    """Supporting prices and transfers of a feasible allocation (N, G); `waste` says whether it is efficient.

    Raises:
        QuantityError: the shape does not fit, or a tenant's utility is not known.
        NotCleared: no prices were found to 1e-10.
    """
    if allocation.shape != economy.owned.shape:
        raise QuantityError(
            f"the allocation is {allocation.shape}, the economy {economy.owned.shape}: tenants by goods"
        )
    for tenant in economy.tenants:
        if isinstance(tenant.utility, Demand):
            raise QuantityError(
                f"tenant '{tenant.name}' has a demand function but no utility: nothing to hold it to"
            )
    utilities = np.array([t.utility.utility(x) for t, x in zip(economy.tenants, allocation, strict=True)])
    problem = Conditions.of(economy)
    held = _Compensated(problem, utilities)
    n, k = problem.size
    at = newton(held, np.full(n, 1 / n), np.zeros(k))
    begun = None if at.residual <= GOOD else begin(held)
    if begun is not None:
        at, _ = follow(held, begun)
    if not at.residual <= GOOD:
        raise NotCleared(
            f"no supporting prices found: the best miss by {at.residual:.1e} of supply", certificate=at
        )
    p = (at.q / problem.units)[: len(economy.goods)]
    p = p / p.sum()
    worth = allocation @ p
    least = np.array(
        [t.utility.expenditure(p, float(u)) for t, u in zip(economy.tenants, utilities, strict=True)]
    )
    gap = float(np.max(1 - least[worth > 0] / worth[worth > 0], initial=0.0))
    return Support(p, worth - economy.incomes(p), held.waste(at.q), gap)
