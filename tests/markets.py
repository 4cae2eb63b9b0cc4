"""Random markets on bare planes, and their sums written out again in plain numpy: the second road for kernels and prices.

Nothing here calls `walras.market.sweep` or `walras.market.dual`; the planner is HiGHS on all N·I shares at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

from walras.market.dual import Answer
from walras.market.memory import Memory
from walras.market.mix import Mix
from walras.market.planes import Planes, Rows

Floats = npt.NDArray[np.float64]

STYLES = ("smooth", "ties", "twins", "dominated", "slack", "zero")
KINDS = ("money", "mean", "quantile", "risk", "late")
PLANE = {"money": 0, "mean": 1, "quantile": 1, "risk": 2, "late": 3}


# --- sums, written out ------------------------------------------------------------------------------------------


def allowed(market: Memory) -> npt.NDArray[np.bool_]:
    return ~np.isnan(market.planes.quality)


def weights(market: Memory) -> Floats:
    return np.broadcast_to(market.planes.weight, len(market)).astype(float)


def worth(market: Memory) -> Floats:
    """USD at declared prices, (N, I); 0 where not allowed."""
    p = market.planes
    out = p.value[:, None] * p.quality.astype(float)
    for usd, amount in zip(p.declared, p.amounts, strict=True):
        out = out - np.broadcast_to(usd, len(market))[:, None] * amount.astype(float)
    return np.where(allowed(market), out, 0.0)


def scope(market: Memory, k: int) -> Floats:
    """1 for tasks in row k's scope, (N,)."""
    if not market.rows.scoped[k]:
        return np.ones(len(market))
    bits = np.broadcast_to(market.planes.member, len(market))
    return (
        np.array([(int(b) >> k) % 2 for b in bits], dtype=float)
        if len(market) < 2000
        else ((bits & np.uint64(1 << k)) != 0).astype(float)
    )


def charge(market: Memory, k: int) -> Floats:
    """What row k charges each use, its offset taken off, (N, I); 0 where not allowed."""
    rows = market.rows
    amount = market.planes.amounts[rows.plane[k]].astype(float)
    if not np.isnan(rows.level[k]):
        amount = np.where(amount > rows.level[k], 1.0, 0.0)
    return np.where(allowed(market), scope(market, k)[:, None] * (amount - rows.offset[k]), 0.0)


def net(market: Memory, mu: Floats, scale: float = 1.0) -> Floats:
    """What each use is worth after all charges, (N, I); −∞ where not allowed. Deferring is worth 0."""
    left = scale * worth(market)
    for k, price in enumerate(mu):
        left = left - price * charge(market, k)
    return np.where(allowed(market), left, -np.inf)


def dual_at(market: Memory, mu: Floats) -> float:
    best = net(market, mu).max(axis=1)
    if market.defer:
        best = np.maximum(best, 0.0)
    return float(weights(market) @ best + np.asarray(mu) @ market.rows.limits)


def chosen(market: Memory, mu: Floats, scale: float = 1.0) -> npt.NDArray[np.int64]:
    """The best use of each task, −1 where it defers: ties go to deferring, then to the first use."""
    left = net(market, mu, scale)
    use = left.argmax(axis=1)
    best = left.max(axis=1)
    return np.where(best > (0.0 if market.defer else -np.inf), use, -1)


def totals(market: Memory, task: Any, use: Any, mass: Any) -> tuple[float, Floats, Floats]:
    """Worth, usage (K,) and weight served in scope (K,) of an allocation; `mass` is weight times share."""
    on = np.asarray(use) >= 0
    task, use, mass = np.asarray(task)[on], np.asarray(use)[on], np.asarray(mass)[on]
    k = range(len(market.rows))
    usage = np.array([float(charge(market, j)[task, use] @ mass) for j in k])
    served = np.array([float(scope(market, j)[task] @ mass) for j in k])
    return float(worth(market)[task, use] @ mass), usage, served


# --- random markets ---------------------------------------------------------------------------------------------


def columns(rng: np.random.Generator, n: int, i: int, style: str) -> tuple[Floats, Floats, list[Floats]]:
    """Value, quality and four planes: money, seconds, risk (some of it negative), probability to be late."""
    if style == "ties":
        value = rng.integers(0, 8, n) * 2.0
        quality = rng.integers(0, 5, (n, i)) / 4
        planes = [rng.integers(0, 5, (n, i)) / 2, rng.integers(0, 9, (n, i)) / 2]
        planes += [rng.integers(-1, 4, (n, i)) / 4, rng.integers(0, 5, (n, i)) / 4]
    else:
        value, quality = rng.gamma(1.0, 6.0, n), rng.random((n, i))
        planes = [
            rng.random((n, i)) * 2,
            rng.random((n, i)) * 4,
            rng.random((n, i)) * 1.2 - 0.2,
            rng.random((n, i)),
        ]
    if style == "twins":
        same, like = rng.integers(0, (n + 2) // 3, n), rng.integers(0, i, i)
        value, quality = value[same], quality[same][:, like]
        planes = [plane[same][:, like] for plane in planes]
    if style == "dominated":
        quality[:, 0] = 1.0
        for plane in planes:
            plane[:, 0] = 0.0
    return value, quality, planes


def random_market(
    seed: int,
    n: int,
    i: int,
    kinds: tuple[str, ...],
    style: str = "smooth",
    *,
    defer: bool = True,
    exactly: tuple[int, ...] = (),
    scoped: tuple[int, ...] = (),
    room: float = 0.0,
    masked: float = 0.1,
    number: Any = np.float64,
    order: str = "C",
) -> Memory:
    """A market whose rows some allocation meets: with `room` to spare, or, `exactly`, just so.

    Tasks carry bits of rows without a scope too: those must not be looked at. What is not allowed is not known.
    """
    rng = np.random.default_rng(seed)
    value, quality, planes = columns(rng, n, i, style)
    holes = rng.random((n, i)) < masked
    holes[np.arange(n), rng.integers(0, i, n)] &= defer
    for column in (quality, *planes):
        column[holes] = np.nan
    same = rng.random() < 0.3
    coarse = style in ("ties", "twins")
    weight = np.array([1.5]) if same else rng.integers(1, 4, n) / 2.0 if coarse else rng.random(n) + 0.5
    k = len(kinds)
    declared = (
        np.ones(1),
        rng.integers(0, 2, n) / 4.0,
        np.array([0.5]),
        np.zeros(1),
    )
    member = rng.integers(0, 2**63, n, dtype=np.uint64) * np.uint64(2) + rng.integers(
        0, 2, n, dtype=np.uint64
    )
    offset = np.array([{"mean": 1.5, "quantile": 0.25, "late": 0.25}.get(kind, 0.0) for kind in kinds])
    rows = Rows(
        np.array([PLANE[kind] for kind in kinds], dtype=np.int64),
        np.array([1.0 if kind == "quantile" else np.nan for kind in kinds], dtype=float),
        offset * rng.choice([1.0, 0.5, 1.5]) if k else offset,
        np.zeros(k),
        np.array([j in exactly for j in range(k)], dtype=np.bool_),
        np.array([j in scoped for j in range(k)], dtype=np.bool_),
    )

    def plane(column: Floats) -> Any:
        return np.array(column, dtype=number, order=order)

    parts = Planes(value, plane(quality), tuple(map(plane, planes)), declared, weight, member)
    market = Memory(parts, rows, defer)
    # A reference allocation: some tasks the thriftiest use, some a random one, some none.
    need = np.where(holes, np.inf, np.nan_to_num(planes[0]) + 0.3 * np.nan_to_num(planes[1]))
    use = np.where(
        rng.random(n) < 0.7, need.argmin(axis=1), np.where(holes, -1.0, rng.random((n, i))).argmax(axis=1)
    )
    if defer:
        use = np.where(holes.all(axis=1) | (rng.random(n) < 0.2), -1, use)
    _, usage, _ = totals(market, np.arange(n), use, weights(market))
    size = np.array([float(weights(market) @ np.abs(charge(market, j)).max(axis=1)) for j in range(k)])
    limits = np.where(rows.exactly, usage, usage + (5.0 if style == "slack" else room) * size)
    if style == "zero" and defer:
        limits = np.where(rows.exactly, usage, np.maximum(usage, 0.0) * (rng.random(k) < 0.5))
        if rows.exactly.any():
            limits = usage
    rows.limits[:] = limits
    return market


# --- the planner ------------------------------------------------------------------------------------------------


def planner(market: Memory, gain: Floats | None = None) -> float | None:
    """The optimum over all shares at once (of worth unless `gain`); None where there is none."""
    n, k = len(market), len(market.rows)
    task, use = np.nonzero(allowed(market))
    mass = weights(market)[task]
    line = (worth(market) if gain is None else gain)[task, use] * mass
    if not task.size:
        ok = (market.rows.limits >= 0) | (market.rows.exactly & (market.rows.limits == 0))
        return 0.0 if ok.all() and market.defer else None
    charges = np.array([charge(market, j)[task, use] * mass for j in range(k)]).reshape(k, task.size)
    norm = np.maximum(np.abs(charges).max(axis=1, initial=0.0), 1e-30)
    ones: Any = csr_matrix((np.ones(task.size), (task, np.arange(task.size))), shape=(n, task.size))
    exactly = market.rows.exactly
    matrix, bound = charges / norm[:, None], market.rows.limits / norm
    less, equal = [csr_matrix(matrix[~exactly])], [csr_matrix(matrix[exactly])]
    (less if market.defer else equal).append(ones)
    top = float(np.abs(line).max()) or 1.0
    for method in ("highs-ds", "highs-ipm"):
        answer = linprog(
            -line / top,
            A_ub=vstack(less),
            b_ub=np.concatenate((bound[~exactly], np.ones(n if market.defer else 0))),
            A_eq=vstack(equal),
            b_eq=np.concatenate((bound[exactly], np.ones(0 if market.defer else n))),
            bounds=(0, None),
            method=method,
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if answer.status in (0, 2):
            break
    if answer.status == 2:
        return None
    assert answer.status == 0, answer.message
    return float(line @ answer.x)


def stake(market: Memory) -> float:
    """Σ of the largest |worth| of each task: what an error in USD is to be measured against."""
    return float(weights(market) @ np.abs(worth(market)).max(axis=1)) or 1.0


def check(market: Memory, answer: Answer, optimum: float | None = None, exact: float = 1e-9) -> Mix:
    """Everything an answer claims, computed again from the columns; errors relative to what is at stake."""
    rows, tol = market.rows, exact * stake(market)
    mix = Mix.of(market, answer)
    n = len(market)
    # An allocation: whole tasks, nothing that is not allowed, nobody deferred who may not.
    assert np.abs(np.bincount(mix.task, weights=mix.share, minlength=n) - 1.0).max(initial=0.0) < 1e-9
    assert (mix.share > 0).all()
    on = mix.use >= 0
    assert allowed(market)[mix.task[on], mix.use[on]].all()
    assert market.defer or on.all()
    # What it is worth and takes, as said.
    objective, usage, served = totals(market, mix.task, mix.use, weights(market)[mix.task] * mix.share)
    size = np.array(
        [float(weights(market) @ np.abs(charge(market, k)).max(axis=1)) for k in range(len(rows))]
    )
    size = size + np.abs(rows.limits)
    assert abs(answer.objective - objective) <= tol, (answer.objective, objective, tol)
    assert (np.abs(answer.usage - usage) <= 1e-9 * size + 1e-300).all(), (answer.usage, usage)
    assert (np.abs(answer.served - served) <= 1e-9 * weights(market).sum()).all()
    # Within the rows.
    over = np.where(rows.exactly, np.abs(usage - rows.limits), usage - rows.limits)
    assert (over <= 1e-8 * size + 1e-300).all(), (over, size)
    # The bound, evaluated at the prices; and weak duality.
    mu = answer.multipliers
    assert ((mu >= 0) | rows.exactly).all()
    assert np.isfinite(mu).all()
    written = dual_at(market, mu)
    assert abs(answer.dual - written) <= tol, (answer.dual, written, tol)
    assert written >= objective - tol
    # What is idle is free [Z-CS].
    assert (mu * np.where(rows.exactly, 0.0, rows.limits - usage) <= 2 * tol).all()
    # The gap that is left.
    assert answer.dual - answer.objective <= tol, (answer.dual, answer.objective, tol)
    if optimum is not None:
        assert abs(objective - optimum) <= 10 * tol, (objective, optimum)
        assert abs(answer.dual - optimum) <= 10 * tol, (answer.dual, optimum)
        assert answer.dual - answer.objective >= optimum - objective - tol
    return mix
