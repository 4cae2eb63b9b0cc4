"""Laws of clearing [Z-GE] on random economies: Walras' law, certificates by a second road, both welfare theorems. SIMULATED."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, root

from walras.market.tenants.certificate import certify, support, walras_law
from walras.market.tenants.economy import Economy, Sector, Tenant
from walras.market.tenants.solve import Equilibrium, clear
from walras.market.tenants.utility import CES, Demand, Linear, QuasiLinear, Term, Utility
from walras.risk import FloatArray

ECONOMIES = 1_000
ALL_KINDS = "cobb-douglas", "leontief", "ces", "subsistence", "linear", "quasi-linear"
GAP = 1e-9
SEEDS = st.integers(0, 10**9)


def random_utility(rng: np.random.Generator, n: int, kind: str) -> Utility:
    wants = rng.random(n) * (rng.random(n) < 0.8)
    wants[rng.integers(n)] += 0.2
    if kind == "linear":
        return Linear(wants)
    if kind == "quasi-linear":
        money = int(rng.integers(n))
        exponents = rng.choice([-2.0, -1.0, 0.3, 0.6], n)
        terms = (
            Term(g, float(wants[g] * np.sign(e)), float(e)) for g, e in enumerate(exponents) if g != money
        )
        return QuasiLinear(money, tuple(term for term in terms if term.coefficient))
    if kind == "subsistence":
        return CES(wants, float(rng.choice([0.0, 0.5, 1.0])), rng.random(n) * 0.02)
    elasticity = {"cobb-douglas": 1.0, "leontief": 0.0}.get(
        kind, float(rng.choice([0.2, 0.5, 0.8, 1.5, 3.0]))
    )
    return CES(wants, elasticity)


def random_economy(seed: int, kinds: Sequence[str] = ALL_KINDS, *, production: bool | None = None) -> Economy:
    """Up to 7 tenants that own a little of everything, 2 to 6 goods, and in half of them activities that lose at some
    prices, so that nothing comes from nothing: an equilibrium exists."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    unit = 10.0 ** rng.integers(-3, 4, n)
    tenants = tuple(
        Tenant(
            f"t{i}",
            in_units(random_utility(rng, n, str(rng.choice(kinds))), unit),
            unit * random_stock(rng, n),
        )
        for i in range(rng.integers(1, 8))
    )
    makes = bool(rng.random() < 0.5) if production is None else production
    prices = rng.random(n) + 0.1
    made = [random_column(rng, prices) for _ in range(int(rng.integers(1, 6)) if makes else 0)]
    columns = unit[:, None] * np.array(made).reshape(-1, n).T
    sectors = (random_sector(rng, prices, unit),) if makes and rng.random() < 0.4 else ()
    goods = tuple(f"good {j}" for j in range(n))
    return Economy(goods, tenants, activities=columns, sectors=sectors)


def random_stock(rng: np.random.Generator, n: int) -> FloatArray:
    return 0.05 + 3 * rng.random(n) * (rng.random(n) < 0.5)


def random_column(rng: np.random.Generator, prices: FloatArray) -> FloatArray:
    """Some inputs, one output, and a loss at these prices."""
    output = int(rng.integers(prices.size))
    column = -rng.random(prices.size) * (rng.random(prices.size) < 0.6)
    column[output] = 0.0
    column[output - 1] -= 0.1
    column[output] = -(prices @ column) / prices[output] * rng.choice([0.6, 0.9, 0.99])
    return column


def random_sector(rng: np.random.Generator, prices: FloatArray, unit: FloatArray) -> Sector:
    output = int(rng.integers(prices.size))
    delta = rng.random(prices.size)
    delta[output] = 0.0
    made = Sector.of_production(
        "sector", output, 1.0, delta / delta.sum(), float(rng.choice([0.0, 0.5, 1.0, 2.0]))
    )
    inputs = in_units(made.inputs, unit)
    assert isinstance(inputs, CES)
    return Sector(
        "sector", output, inputs, 1.05 * prices[output] / unit[output] / inputs.price_index(prices / unit)
    )


def in_units(utility: Utility, unit: FloatArray) -> Utility:
    """The same wants where goods are counted in units so many times smaller."""
    if isinstance(utility, Linear):
        return Linear(utility.weights / unit)
    if isinstance(utility, CES):
        need = utility.subsistence * unit if utility.subsistence.size > 1 else utility.subsistence
        return CES(utility.shares * unit ** (1 - utility.elasticity), utility.elasticity, need)
    assert isinstance(utility, QuasiLinear)
    per = unit[utility.money]
    terms = (
        Term(t.good, t.coefficient * per * unit[t.good] ** -t.exponent, t.exponent) for t in utility.terms
    )
    return QuasiLinear(utility.money, tuple(terms))


def check(economy: Economy, found: Equilibrium) -> None:
    """The certificate's numbers again, tenant by tenant and good by good."""
    p, x, y, sure = found.prices, found.allocation, found.activities, found.certificate
    assert sure.worst <= GAP
    assert sure.walras_law <= 1e-10
    assert sure.pareto_gap <= GAP
    assert p.sum() == pytest.approx(1.0)
    assert (p >= 0).all()
    assert (x >= 0).all()
    assert (y >= 0).all()
    there = economy.owned.sum(axis=0) + np.maximum(economy.techniques(p), 0.0) @ y
    left = economy.owned.sum(axis=0) + economy.techniques(p) @ y - x.sum(axis=0)
    assert (left >= -GAP * there).all()
    assert left @ p == pytest.approx(0.0, abs=GAP * (p @ there))
    for tenant, own in zip(economy.tenants, x, strict=True):
        income = float(p @ tenant.endowment)
        assert p @ own == pytest.approx(income, rel=GAP)
        best = tenant.utility.demand(p, income)
        if np.isfinite(best).all():
            at_best = tenant.utility.utility(best)
            assert tenant.utility.utility(own) == pytest.approx(at_best, rel=1e-6, abs=1e-9)


# --- Walras' law and certificates -------------------------------------------------------------------------------


def test_walras_law_at_random_prices() -> None:
    """p·z(p) = 0 far from any equilibrium, in each of 1,000 economies."""
    assert max(walras_law(random_economy(seed), seed=seed, draws=2) for seed in range(ECONOMIES)) < 1e-10


@settings(max_examples=40)
@given(seed=SEEDS)
def test_random_economies_clear(seed: int) -> None:
    economy = random_economy(seed)
    check(economy, clear(economy))


@pytest.mark.big
def test_a_thousand_economies_clear() -> None:
    for seed in range(ECONOMIES):
        economy = random_economy(seed)
        check(economy, clear(economy))


@settings(max_examples=10)
@given(seed=SEEDS)
def test_the_fallback_alone_clears(seed: int) -> None:
    economy = random_economy(seed)
    found = clear(economy, solver="homotopy")
    assert found.solver == "homotopy"
    check(economy, found)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_gross_substitutes_have_one_equilibrium_that_every_solver_finds(seed: int) -> None:
    """Newton, homotopy, tâtonnement, and scipy's root on excess demand written down anew."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    shares, owned = rng.random((4, n)) + 0.05, rng.random((4, n)) + 0.05
    sigma = rng.choice([1.0, 1.5, 2.5], 4)
    tenants = (Tenant(f"t{i}", CES(shares[i], float(sigma[i])), owned[i]) for i in range(4))
    economy = Economy(tuple(f"g{j}" for j in range(n)), tuple(tenants))

    def excess(logs: FloatArray) -> FloatArray:
        p = np.append(np.exp(logs), 1.0)
        spent = shares * p ** (1 - sigma[:, None])
        return ((owned @ p)[:, None] * spent / spent.sum(axis=1, keepdims=True) / p - owned).sum(axis=0)[:-1]

    prices = np.append(np.exp(root(excess, np.zeros(n - 1), tol=1e-13).x), 1.0)
    for solver in ("newton", "homotopy", "tatonnement"):
        found = clear(economy, solver=solver)  # type: ignore[arg-type]
        assert found.prices == pytest.approx(prices / prices.sum(), rel=1e-7)
        assert (found.certificate.index, found.certificate.stable) == (1, True)
        assert "no other equilibrium" in found.why


@settings(max_examples=15)
@given(seed=SEEDS)
def test_no_bundle_in_the_budget_is_better(seed: int) -> None:
    """Second road to the utility gap: utilities are concave, so if moving any small part of the spending elsewhere gains
    nothing, nothing does; and the least expenditure on what is reached is the income."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 5))
    p, income = rng.random(n) + 0.2, float(rng.random() + 0.3)
    for kind in ("cobb-douglas", "ces", "quasi-linear", "linear", "leontief"):
        utility = random_utility(rng, n, kind)
        x = utility.demand(p, income)
        assert p @ x == pytest.approx(income)
        ours = utility.utility(x)
        parts = 10.0 ** -rng.uniform(0, 6, 150)[:, None]
        elsewhere = rng.dirichlet(np.full(n, 0.3), 150) * income / p
        tried = [utility.utility(bundle) for bundle in (1 - parts) * x + parts * elsewhere]
        assert max(tried) <= ours + 1e-12 * abs(ours)
        assert max(tried) > ours - 0.05 * abs(ours)
        assert utility.expenditure(p, ours) == pytest.approx(income, rel=1e-9)
        for bundle in elsewhere[:20]:
            assert utility.expenditure(p, utility.utility(bundle)) <= income * (1 + 1e-9)


@settings(max_examples=25)
@given(seed=SEEDS)
def test_slopes_are_those_of_excess_demand(seed: int) -> None:
    economy = random_economy(seed, ("cobb-douglas", "leontief", "ces", "subsistence", "quasi-linear"))
    p = np.random.default_rng(seed).dirichlet(np.full(len(economy.goods), 5.0)) / economy.owned.sum(axis=0)
    steps = np.diag(1e-5 * p)
    ahead = np.array([economy.excess_demand(p + h) for h in steps])
    back = np.array([economy.excess_demand(p - h) for h in steps])
    slopes = (ahead - back).T / 2e-5  # per relative change of a price
    size = economy.demands(p).sum(axis=0)[:, None] + economy.owned.sum(axis=0)[:, None]
    kinked = np.abs(ahead.T + back.T - 2 * economy.excess_demand(p)[:, None]) > 1e-7 * size
    assert np.all((np.abs(slopes - economy.jacobian(p) * p) < 1e-4 * size) | kinked.any())
    technique = np.array([economy.profits(p + h) - economy.profits(p - h) for h in steps]) / (
        2e-5 * p[:, None]
    )
    assert technique == pytest.approx(
        economy.techniques(p), rel=1e-6, abs=1e-9 * np.abs(economy.techniques(p)).max(initial=0)
    )


def test_units_do_not_matter() -> None:
    economy = random_economy(7, production=False)
    unit = 10.0 ** np.arange(-3, len(economy.goods) - 3)
    tenants = (Tenant(t.name, in_units(t.utility, unit), t.endowment * unit) for t in economy.tenants)
    there = clear(Economy(economy.goods, tuple(tenants))).prices * unit
    assert there / there.sum() == pytest.approx(clear(economy).prices, rel=1e-9)


def test_a_users_demand_is_as_good_as_ours() -> None:
    rng = np.random.default_rng(5)
    shares = rng.dirichlet(np.ones(3), 3)
    owned = rng.random((3, 3))

    def economy(utilities: Sequence[Utility]) -> Economy:
        tenants = (Tenant(f"t{i}", u, owned[i]) for i, u in enumerate(utilities))
        return Economy(("a", "b", "c"), tuple(tenants))

    ours = clear(economy([CES(a, 1.0) for a in shares]))
    theirs = clear(economy([Demand(lambda p, income, a=a: a * income / p) for a in shares]))  # type: ignore[misc]
    assert theirs.prices == pytest.approx(ours.prices, abs=1e-9)
    assert np.isnan(theirs.certificate.utility_gap)
    assert np.isnan(theirs.certificate.pareto_gap)
    mixed = clear(
        economy([CES(shares[0], 1.0), Linear(shares[1]), Demand(lambda p, income: shares[2] * income / p)])
    )
    assert mixed.certificate.worst <= GAP


def test_many_budgets_go_to_the_fisher_solver() -> None:
    """Mixed tastes, 80 tenants: the same prices as the general solver's."""
    rng = np.random.default_rng(8)
    tastes = [random_utility(rng, 4, str(rng.choice(["linear", "ces", "leontief"]))) for _ in range(80)]
    tenants = (Tenant(f"t{i}", u, np.zeros(4), float(rng.random())) for i, u in enumerate(tastes))
    economy = Economy(("a", "b", "c", "d"), tuple(tenants), supply=rng.random(4) + 0.5)
    fisher, general = clear(economy), clear(economy, solver="newton")
    assert (fisher.solver, general.solver) == ("fisher", "newton")
    assert fisher.prices == pytest.approx(general.prices, rel=1e-6)
    assert fisher.prices * fisher.usd @ economy.supply == pytest.approx(
        sum(t.budget for t in economy.tenants)
    )
    assert fisher.certificate.worst <= 1e-6


@pytest.mark.parametrize("sigma", [1 - 1e-9, 1 + 1e-9, 1e-9])
def test_ces_runs_into_its_limits(sigma: float) -> None:
    limit = CES(np.array([1.0, 2.0, 0.0]), float(round(sigma)))
    near = CES(limit.shares, sigma)
    p = np.array([0.3, 0.1, 0.6])
    x = near.demand(p, 2.0)
    assert x == pytest.approx(limit.demand(p, 2.0), rel=1e-7)
    assert near.price_index(p) == pytest.approx(limit.price_index(p), rel=1e-7)
    assert near.utility(x) == pytest.approx(limit.utility(limit.demand(p, 2.0)), rel=1e-7)


def test_a_certificate_sees_what_is_wrong() -> None:
    economy = random_economy(11, ("ces",), production=True)
    found = clear(economy)
    p, y, x = found.prices, found.activities, found.allocation
    assert certify(economy, p, y, x * 1.01).relative_excess > 1e-3
    assert certify(economy, p, y, x * 0.99).utility_gap == pytest.approx(0.01, rel=1e-6)
    assert certify(economy, p, y, x * 0.99).idle_worth > 1e-4
    tilted = p * np.linspace(0.8, 1.2, p.size)
    assert certify(economy, tilted, y, x).budget_residual > 1e-3
    assert certify(economy, tilted, y + 1.0, x).profit_gap > 1e-3
    swapped = x[::-1].copy()
    assert certify(economy, p, y, swapped).worst > 1e-3


# --- welfare theorems -------------------------------------------------------------------------------------------


def planner(economy: Economy, utilities: FloatArray) -> float:
    """The largest share of everything owned that can be freed with everybody at least at `utilities`: a linear programme
    in x, y and the share, for linear and Leontief tenants."""
    n_tenants, n = economy.owned.shape
    n_eaten, n_made = n_tenants * n, economy.n_activities
    keep = np.zeros((n, n_eaten + n_made + 1))
    keep[:, :n_eaten] = np.tile(np.eye(n), n_tenants)
    keep[:, n_eaten:-1] = -economy.activities
    keep[:, -1] = economy.owned.sum(axis=0)
    rows, least = [], []
    for i, tenant in enumerate(economy.tenants):
        own = slice(i * n, (i + 1) * n)
        if isinstance(tenant.utility, Linear):
            rows.append(np.zeros(n_eaten + n_made + 1))
            rows[-1][own] = -tenant.utility.weights
            least.append(-utilities[i])
        else:
            assert isinstance(tenant.utility, CES)
            for good in range(n):
                rows.append(np.zeros(n_eaten + n_made + 1))
                rows[-1][i * n + good] = -1.0
                least.append(-utilities[i] * tenant.utility.weights[good])
    found = linprog(
        -np.eye(n_eaten + n_made + 1)[-1],
        A_ub=np.vstack((keep, rows)),
        b_ub=np.concatenate((economy.owned.sum(axis=0), least)),
    )
    return float(-found.fun)


def small(seed: int) -> Economy:
    """Linear and Leontief tenants, fixed activities, goods in units of one."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 5))
    kinds = rng.choice(["linear", "leontief"], 4)
    tenants = (
        Tenant(f"t{i}", random_utility(rng, n, str(k)), random_stock(rng, n)) for i, k in enumerate(kinds)
    )
    made = -rng.random((n, 2))
    made[rng.integers(n, size=2), np.arange(2)] = 0.8 * n / 2
    losing = np.minimum(1.0, 0.9 / np.maximum(made.max(axis=0) / -np.minimum(made, 0.0).sum(axis=0), 1e-9))
    columns = np.where(made > 0, made * losing, made)
    return Economy(tuple(f"g{j}" for j in range(n)), tuple(tenants), activities=columns)


@settings(max_examples=12)
@given(seed=SEEDS)
def test_first_welfare_theorem(seed: int) -> None:
    """A planner frees nothing of an equilibrium, and of another allocation exactly what `support` says."""
    economy = small(seed)
    found = clear(economy)
    reached = np.array([t.utility.utility(x) for t, x in zip(economy.tenants, found.allocation, strict=True)])
    assert planner(economy, reached) == pytest.approx(0.0, abs=1e-7)
    share = np.random.default_rng(seed).dirichlet(np.ones(len(economy.tenants)))
    split = np.outer(share, economy.owned.sum(axis=0))
    reached = np.array([t.utility.utility(x) for t, x in zip(economy.tenants, split, strict=True)])
    assert support(economy, split).waste == pytest.approx(planner(economy, reached), abs=1e-7)


@settings(max_examples=12)
@given(seed=SEEDS)
def test_second_welfare_theorem(seed: int) -> None:
    """An efficient allocation, made by other owners, is what everybody buys after the transfers that `support` names."""
    economy = random_economy(seed, ("cobb-douglas", "leontief", "ces", "quasi-linear"))
    rng = np.random.default_rng(seed)
    dealt = rng.dirichlet(np.ones(len(economy.tenants)), len(economy.goods)).T * economy.owned.sum(axis=0)
    dealt = 0.9 * dealt + 0.1 * economy.owned
    other = Economy(
        economy.goods,
        tuple(Tenant(t.name, t.utility, own) for t, own in zip(economy.tenants, dealt, strict=True)),
        activities=economy.activities,
        sectors=economy.sectors,
    )
    efficient = clear(other).allocation
    held = support(economy, efficient)
    assert held.waste == pytest.approx(0.0, abs=1e-8)
    assert held.utility_gap < 1e-8
    assert held.transfers.sum() == pytest.approx(0.0, abs=1e-8 * (efficient @ held.prices).sum())
    for tenant, own, transfer in zip(economy.tenants, efficient, held.transfers, strict=True):
        income = float(held.prices @ tenant.endowment + transfer)
        assert income == pytest.approx(held.prices @ own, rel=1e-7)
        bought = tenant.utility.demand(held.prices, income)
        if np.isfinite(bought).all() and income > 1e-6 * (held.prices @ economy.owned.sum(axis=0)):
            best = tenant.utility.utility(bought)
            assert tenant.utility.utility(own) == pytest.approx(best, rel=1e-6, abs=1e-8)
