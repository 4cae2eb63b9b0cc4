"""Clear an economy: a solver by structure, said aloud, and an equilibrium with its certificate. [Z-GE]"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linprog, nnls

from walras.errors import InfeasibleError, NotCleared, QuantityError, SettingsError
from walras.market.tenants.certificate import Certificate, certify
from walras.market.tenants.conditions import Conditions
from walras.market.tenants.economy import Economy
from walras.market.tenants.fisher import FisherMarket
from walras.market.tenants.fisher import solve as solve_fisher
from walras.market.tenants.homotopy import begin, follow
from walras.market.tenants.newton import GOOD, Point, newton
from walras.market.tenants.tatonnement import tatonnement
from walras.market.tenants.utility import CES, Linear
from walras.risk import FloatArray

Solver = Literal["auto", "newton", "homotopy", "tatonnement", "fisher"]
STARTS = 3
"""Starts from which the homotopy is tried: a path may end at a kink of demand, and another then go round it."""
MANY = 50
"""Tenants above which a Fisher market is left to the solver made for many."""
AT_SCALE = 1e-6
"""The tolerance of a Fisher market of many tenants, where a tighter one is not asked of the solver."""
TOLERANCE = 1e-9
"""Largest gap of a certificate, as a share."""
EVALUATIONS = 5_000
"""Tâtonnement stops after as many questions."""


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """Prices that clear, and what everybody does at them."""

    prices: FloatArray
    """(G,), Σ = 1."""
    usd: float
    """USD per unit of these prices, where budgets buy a supply; NaN without budgets."""
    activities: FloatArray
    """(A,) levels, sectors last."""
    allocation: FloatArray
    """(N, G) units."""
    certificate: Certificate
    solver: str
    why: str
    """Why this solver, what it guarantees, and whether there may be other equilibria."""
    evaluations: int
    """How often all tenants were asked for their demand."""


def clear(
    economy: Economy,
    *,
    solver: Solver = "auto",
    start: FloatArray | None = None,
    tolerance: float = TOLERANCE,
) -> Equilibrium:
    """An equilibrium of the economy; there may be others.

    Args:
        solver: "auto" takes Newton, and the homotopy path where Newton stalls; for Fisher markets of many tenants, their
            own solver.
        start: prices (G,) > 0 to begin at; equal worth of every good by default.
        tolerance: largest gap of the certificate; at least 1e-6 in Fisher markets of many tenants.

    Raises:
        InfeasibleError: something can be made from nothing, or a tenant cannot pay for its subsistence.
        NotCleared: no solver reached the tolerance; carries the best certificate.
    """
    ways = {"newton": _newton, "homotopy": _homotopy, "tatonnement": _tatonnement}
    if solver not in ("auto", "fisher", *ways):
        raise SettingsError(
            f"no solver is called '{solver}'", key="solver", hint="auto, fisher, " + ", ".join(ways)
        )
    if solver == "fisher" or (solver == "auto" and len(economy.tenants) > MANY and is_fisher(economy)):
        return _fisher(economy, start, tolerance)
    problem = Conditions.of(economy)
    q = _start(economy, problem, start)
    for name in ("newton", "homotopy") if solver == "auto" else (solver,):
        point, how = ways[name](economy, problem, q, start)
        found = _equilibrium(economy, problem, point, name, f"{structure(economy)} {how}")
        if np.isfinite(point.residual) and found.certificate.worst <= tolerance:
            _check_fed(economy, found)
            return found
    raise NotCleared(
        f"the market did not clear: {found.solver} left a gap of {found.certificate.worst:.1e}"
        f" (asked: {tolerance:.0e}). {found.why}",
        certificate=found.certificate,
    )


def structure(economy: Economy) -> str:
    """What is known beforehand of an economy's equilibria, in a sentence."""
    n_linear = int(np.unique(Conditions.of(economy).eaters[:, 0]).size)
    ces = [t.utility for t in economy.tenants if isinstance(t.utility, CES)]
    substitutes = len(ces) + n_linear == len(economy.tenants) and all(
        u.elasticity >= 1 and not u.subsistence.any() for u in ces
    )
    if is_fisher(economy):
        return (
            "Budgets spent on a supply (a Fisher market): utilities are unique, prices up to kinks of demand."
        )
    if not economy.n_activities and substitutes:
        return "Exchange where all goods are gross substitutes: no other equilibrium, up to ties."
    kind = "Production" if economy.n_activities else "Exchange"
    return f"{kind} without gross substitutes throughout: there may be other equilibria."


def is_fisher(economy: Economy) -> bool:
    """Whether tenants have budgets alone and buy at constant shares of utility: Eisenberg and Gale's programme."""
    alone = not economy.n_activities and not any(t.endowment.any() for t in economy.tenants)
    return alone and all(
        isinstance(t.utility, Linear) or (isinstance(t.utility, CES) and not t.utility.subsistence.any())
        for t in economy.tenants
    )


def _start(economy: Economy, problem: Conditions, start: FloatArray | None) -> FloatArray:
    """Scaled prices (M,) to begin at."""
    n, _ = problem.size
    if start is None:
        return np.full(n, 1 / n)
    if start.shape != (len(economy.goods),):
        raise QuantityError(f"{start.size} prices to start from for {len(economy.goods)} goods")
    bad = ~(np.isfinite(start) & (start > 0))
    if bad.any():
        good = int(np.argmax(bad))
        raise QuantityError(
            f"the price of '{economy.goods[good]}' to start from must be > 0, not {start[good]}"
        )
    return problem.unfolded(start, np.zeros(economy.n_activities), np.zeros_like(economy.owned))[0]


def _newton(
    economy: Economy, problem: Conditions, q: FloatArray, start: FloatArray | None
) -> tuple[Point, str]:
    del economy
    columns, z = problem.columns(q), problem.excess(q)
    y = nnls(columns, z)[0] if columns.size and np.isfinite(z).all() else np.zeros(problem.size[1])
    point = newton(problem, q, y)
    begun = "equal worth of every good" if start is None else "the given prices"
    return (
        point,
        f"Newton on the complementarity conditions from {begun}: quadratic nearby, not guaranteed from afar.",
    )


def _homotopy(
    economy: Economy, problem: Conditions, q: FloatArray, start: FloatArray | None
) -> tuple[Point, str]:
    _refuse_free_lunch(economy, problem)
    toward = q if start is not None or not problem.size[1] else None
    point, steps, rng = Point(q, np.zeros(problem.size[1]), np.inf), 0, np.random.default_rng(0)
    for _ in range(STARTS):
        begun = begin(problem, toward)
        if begun is None:
            return point, "No prices make every activity lose: nowhere to start."
        found, more = follow(problem, begun)
        point, steps = (found if found.residual < point.residual else point), steps + more
        if point.residual <= GOOD:
            break
        toward = rng.dirichlet(np.ones(q.size))
    return point, (
        f"Homotopy: a path of economies followed for {steps} steps; for almost every start it ends at an equilibrium where"
        " demand is smooth and every tenant has income."
    )


def _tatonnement(
    economy: Economy, problem: Conditions, q: FloatArray, start: FloatArray | None
) -> tuple[Point, str]:
    del start
    if problem.size[1]:
        kind = "activities" if economy.n_activities else "linear tenants, whose demand jumps"
        raise SettingsError(
            f"tâtonnement has no law of motion for {kind}", key="solver", hint="use newton or homotopy"
        )
    point = tatonnement(problem, q, tolerance=GOOD / 10, evaluations=EVALUATIONS)
    if problem.cornered(point.q):
        point = Point(point.q, point.y, np.inf)
    return point, "Tâtonnement: sure to converge where all goods are gross substitutes, and only there."


def fisher_market(economy: Economy) -> FisherMarket:
    """The same economy as columns.

    Raises:
        SettingsError: it is no Fisher market.
    """
    if not is_fisher(economy):
        raise SettingsError(
            "this is no Fisher market: tenants with budgets alone and homothetic utilities, no activities",
            key="solver",
            hint="use auto",
        )
    utilities = [t.utility for t in economy.tenants]
    return FisherMarket(
        np.array([t.budget for t in economy.tenants]),
        np.array([u.weights for u in utilities if isinstance(u, Linear | CES)]),
        economy.supply,
        np.array([u.elasticity if isinstance(u, CES) else np.inf for u in utilities]),
        goods=economy.goods,
        tenants=tuple(t.name for t in economy.tenants),
    )


def _fisher(economy: Economy, start: FloatArray | None, tolerance: float) -> Equilibrium:
    found = solve_fisher(fisher_market(economy), tolerance=max(tolerance, AT_SCALE), start=start)
    p, y = found.prices / found.prices.sum(), np.zeros(0)
    certificate = certify(economy, p, y, found.allocation)
    why = f"{structure(economy)} {found.solver}."
    asked = int(np.ceil(found.passes))
    return Equilibrium(p, economy.usd(p), y, found.allocation, certificate, "fisher", why, asked)


def _equilibrium(economy: Economy, problem: Conditions, point: Point, name: str, why: str) -> Equilibrium:
    p, y, x = problem.folded(point.q, point.y)
    certificate = certify(economy, p, y, x)
    return Equilibrium(p, economy.usd(p), y, x, certificate, name, why, problem.evaluations)


def _check_fed(economy: Economy, found: Equilibrium) -> None:
    """Nobody's income is below what its subsistence costs at the prices found."""
    p, incomes = found.prices, economy.incomes(found.prices)
    for tenant, income in zip(economy.tenants, incomes, strict=True):
        if not isinstance(tenant.utility, CES):
            continue
        cost = tenant.utility.committed(p)
        if income < cost * (1 - TOLERANCE):
            good = int(np.argmax(tenant.utility.subsistence * p))
            usd = found.usd if np.isfinite(found.usd) else 1.0
            unit = "USD" if np.isfinite(found.usd) else "(prices sum to 1)"
            raise InfeasibleError(
                f"tenant '{tenant.name}' cannot pay for its subsistence at the prices that clear: it costs {cost * usd:.4g}"
                f" {unit}, most of it for '{economy.goods[good]}', and its income is {income * usd:.4g}",
                constraint=f"subsistence of {tenant.name}",
                bound=float(income * usd),
                least=float(cost * usd),
            )


def _refuse_free_lunch(economy: Economy, problem: Conditions) -> None:
    """No levels y ≥ 0 make something out of nothing: then no prices could clear."""
    n, k = problem.size
    if not k:
        return
    columns = problem.columns(np.full(n, 1 / n))
    found = linprog(-columns.sum(axis=0), A_ub=-columns, b_ub=np.zeros(n), bounds=(0, 1))
    if found.x is not None and float((columns @ found.x).sum()) > 1e-9:
        fixed = problem.n_activities
        used = [economy.making[a] for a in np.flatnonzero(found.x[:fixed] > 1e-9)] or list(economy.making)
        good = economy.goods[int(np.argmax((columns @ found.x)[: len(economy.goods)]))]
        raise InfeasibleError(
            f"'{good}' can be made from nothing by {', '.join(repr(name) for name in used)}: no prices clear",
            constraint="production",
            bound=None,
            least=None,
        )
