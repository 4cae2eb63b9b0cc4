"""Prices while requests stream in: dual descent that is paced, guarded and certified as it goes. [Z-1] [Z-3] [Z-CS]

Each request takes its best response at the prices of the moment, and what it asks for moves them:

    i_t   = argmax_i (worth_ti − Σ_k μ_k·charge_kti), or deferring at 0
    μ_k  ← max(0, μ_k + η_k·(charge_k,i_t − r_k)),        η_k = STEP·w̄ / (s̄_k²·√clock)

This is dual sub-gradient descent (Agrawal and Devanur 2014; Balseiro, Lu and Mirrokni 2020, 2023) with AdaGrad's step
(Duchi, Hazan and Singer 2011) in the row's own unit: w̄ is the mean worth of a request's best use and s̄_k² the mean
square of what a row is charged, so decisions do not depend on units. r_k is the pace: what is left, less a small
reserve, per request still to come. The clock counts requests; it stops at `window`, and from then on the market forgets.
Prices that are given set it forward, to (STEP·trust)², so that they move slowly.

Prices alone keep a budget on average. The guard keeps it always: what does not fit into a hard row is not offered.
Prices move by what a request *would* have taken, so that a closed guard raises them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from walras.errors import QuantityError
from walras.market.planes import Planes, Rows
from walras.quantities import IntArray
from walras.risk import FloatArray

STEP = 0.1
"""The first step, as a share of the price at which a row would take all of the mean worth."""
LOOK = 8
"""Requests that ask for a use before prices first move: one odd charge is no scale."""
POINTS = 128
"""Most points of the trajectory; a full one keeps every second and goes on at twice the spacing."""

_ROW = np.dtype(
    [
        ("limit", np.float64),  # per request
        ("tolerance", np.float64),
        ("hard", np.bool_),
        ("price", np.float64),
        ("room", np.float64),  # what the guard still lets through
        ("spent", np.float64),
        ("square", np.float64),  # mean square of charge less limit
        ("excess", np.float64),  # charges less what was meant to be spent, since prices moved last
    ]
)
_TALLY = np.dtype(
    [
        ("horizon", np.float64),  # ∞: none
        ("window", np.float64),  # ∞: none
        ("requests", np.int64),
        ("asked", np.int64),  # for a use, at the prices
        ("served", np.int64),
        ("guarded", np.int64),
        ("clock", np.float64),
        ("stake", np.float64),  # mean worth of the best use
        # Weighted sums over requests; a weight halves about every 0.7 windows.
        ("weight", np.float64),
        ("weight2", np.float64),
        ("worth", np.float64),
        ("gap", np.float64),
        ("gap2", np.float64),
        ("points", np.int64),
        ("spacing", np.int64),
    ]
)

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(kernel: Kernel) -> Kernel:
    """Exact arithmetic, unlike `sweep`: a request alone and one in a batch must come out the same, bit for bit."""
    return cast(Kernel, njit(nogil=True, cache=True, error_model="numpy")(kernel))


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Spent beside allowed at T moments, the last one now."""

    requests: IntArray
    """Seen by then, (T,)."""
    spent: FloatArray
    """(T, K)."""
    allowed: FloatArray
    """limit · requests, (T, K): the even pace. The guard's own bound is in `OnlineMarket`."""


@dataclass(frozen=True, slots=True)
class OnlineCertificate:
    """An estimate, not a proof. With a window, of about the last one.

    `dual` is the mean of max_i(net value) + μ·limit, each at the prices set before the request came. Where requests are
    independent draws of one kind, its expectation is at least the best that any policy can reach per request, and so
    `gap` is too large rather than too small. Where they drift, it promises nothing.
    """

    requests: int
    served: int
    guarded: int
    """Requests whose use the guard changed or refused; many mean that prices lag."""
    objective: float
    """Worth collected, USD per request."""
    dual: float
    """USD per request."""
    gap: float
    """dual − objective."""
    standard_error: float
    """Of the gap, as if requests were independent; NaN before the second."""
    spent: FloatArray
    """(K,) so far."""
    trajectory: Trajectory = field(repr=False)


class OnlineMarket:
    """K rows, each "at most" so much per request, and the prices that keep to them.

    The guard, for each hard row:

    - with a horizon of N requests, the total never exceeds limit·N + tolerance, at any moment;
    - without one, no stretch of n requests in a row exceeds limit·n + tolerance (a token bucket, half full at first).

    It looks at each request by itself, also within a micro-batch, and is exact up to round-off in the sums. A charge
    that is negative (an SLA's, when it is early) is always let through and makes room, without a horizon at most
    `tolerance` of it. What is guarded are the charges handed in: if they are estimates, so is the guard.

    Not safe to share between threads. The same requests in the same order give the same bits.
    """

    def __init__(
        self,
        limits: ArrayLike,
        *,
        horizon: int | None = None,
        window: int | None = None,
        start: ArrayLike | None = None,
        trust: int = 300,
        hard: ArrayLike | None = None,
        tolerance: ArrayLike | None = None,
    ) -> None:
        """
        Args:
            limits: per request, (K,), in each row's unit; 0 for an SLA, whose charge is amount − bound.
            horizon: requests that share the budgets limit·horizon.
            window: requests after which old ones are as good as forgotten. Needed where there is no horizon.
            start: prices to begin with, (K,), such as those of `dual.solve` on a log.
            trust: requests that it should take to overturn them. The whole horizon suits a log of like days; less is
                safer against news.
            hard: which rows are guarded, (K,); all of them by default. The others are kept by prices alone.
            tolerance: the guard's, (K,), in each row's unit. By default 0 with a horizon, and limit·window without.

        Raises:
            QuantityError: a wrong shape, a number that is negative or not finite, neither horizon nor window, or a
                hard row without horizon whose tolerance is 0: nothing would ever fit.
        """
        limit = _column("limit", limits, None)
        rows = np.zeros(limit.size, dtype=_ROW)
        for name, count in (("horizon", horizon), ("window", window), ("trust", trust)):
            if count is not None and count < 1:
                raise QuantityError(f"{name} must be at least 1, not {count}")
        if horizon is None and window is None:
            raise QuantityError("an online market needs a horizon, a window, or both")
        rows["limit"] = limit
        rows["hard"] = True if hard is None else _shaped("hard", np.asarray(hard, dtype=np.bool_), limit.size)
        rows["price"] = 0.0 if start is None else _column("start", start, limit.size)
        if tolerance is not None:
            rows["tolerance"] = _column("tolerance", tolerance, limit.size)
        elif horizon is None and window is not None:
            rows["tolerance"] = limit * window
        if horizon is None:
            shut = np.flatnonzero(rows["hard"] & (rows["tolerance"] == 0))
            if shut.size:
                raise QuantityError(f"row {shut[0]} is hard and has no horizon: it needs a tolerance above 0")
            rows["room"] = rows["tolerance"] / 2
        else:
            rows["room"] = limit * horizon + rows["tolerance"]
        self._rows, self._tally = rows, np.zeros(1, dtype=_TALLY)
        self._tally["horizon"] = np.inf if horizon is None else horizon
        self._tally["window"] = np.inf if window is None else window
        self._tally["clock"] = 0.0 if start is None else (STEP * trust) ** 2
        self._tally["spacing"] = 1
        self._trail = np.zeros((POINTS, 1 + limit.size))

    def __len__(self) -> int:
        """K, the number of rows."""
        return int(self._rows.size)

    @property
    def prices(self) -> FloatArray:
        """(K,) USD per unit of each row."""
        prices: FloatArray = self._rows["price"].copy()
        return prices

    def decide(self, worth: ArrayLike, charges: ArrayLike) -> int:
        """The use of one request, −1 to defer; its charges are spent and prices learn from it.

        Args:
            worth: USD at declared prices, (I,); NaN or −∞ where a use is not allowed.
            charges: of each row, offset taken off, (K, I); 0 where a row does not concern the request.

        Raises:
            QuantityError: a wrong shape, or an allowed use with a number that is not finite; nothing has changed.
        """
        own = np.asarray(worth, dtype=np.float64, order="C")
        charge = np.asarray(charges, dtype=np.float64, order="C")
        if own.ndim != 1 or charge.shape != (len(self), own.size):
            raise QuantityError(
                f"request {self._tally['requests'][0]}: worth {own.shape} and charges {charge.shape} "
                f"should be (I,) and ({len(self)}, I)"
            )
        use = int(_decide(own, charge, self._rows, self._tally, self._trail))
        if use == _BAD:
            named = {"worth": own, **{f"charge of row {k}": c for k, c in enumerate(charge)}}
            raise _not_finite(int(self._tally["requests"][0]), own > -np.inf, named)
        return use

    def decide_batch(self, planes: Planes, rows: Rows, *, batch: int = 1) -> IntArray:
        """The uses of N requests in order, (N,), as N calls of `decide` would choose them; one pass, nothing copied.

        Args:
            planes: C-contiguous and of one float type; others are copied. Every weight is 1.
            rows: what each row charges. Their limits are totals of another market and are not read.
            batch: requests between two moves of the prices, which also move after the last; 1 is what `decide` does.

        Raises:
            QuantityError: as for `decide`; or a row that is "exactly" or charges no plane; nothing has changed.
        """
        if len(rows) != len(self):
            raise QuantityError(f"{len(rows)} rows for a market of {len(self)}")
        if batch < 1:
            raise QuantityError(f"batch must be at least 1, not {batch}")
        _check(planes, rows)
        columns, rules = _columns(planes), (rows.plane, rows.level, rows.offset, rows.scoped)
        bad = int(_first_bad(columns))
        if bad >= 0:
            quality = planes.quality[bad]
            named = {"quality": quality, **{f"plane {p}": a[bad] for p, a in enumerate(planes.amounts)}}
            raise _not_finite(bad, ~np.isnan(quality), named)
        use = np.empty(len(planes), dtype=np.int64)
        _decide_all(columns, rules, batch, self._rows, self._tally, self._trail, use)
        return use

    @property
    def certificate(self) -> OnlineCertificate:
        """How it went so far. Raises QuantityError before the first request."""
        t, spent = self._tally[0], self._rows["spent"].copy()
        if not t["requests"]:
            raise QuantityError("no request has been seen: there is nothing to certify")
        mean, objective = float(t["gap"] / t["weight"]), float(t["worth"] / t["weight"])
        variance = max(float(t["gap2"] / t["weight"]) - mean**2, 0.0)
        share = float(t["weight2"] / t["weight"] ** 2)  # 1/n, when all weights are 1
        now = np.concatenate(([t["requests"]], spent))
        trail = np.vstack((self._trail[: t["points"]], now))
        trail = trail[: -1 if len(trail) > 1 and trail[-2, 0] == now[0] else None]
        return OnlineCertificate(
            requests=int(t["requests"]),
            served=int(t["served"]),
            guarded=int(t["guarded"]),
            objective=objective,
            dual=objective + mean,
            gap=mean,
            standard_error=float(np.sqrt(variance * share / (1 - share))) if share < 1 else np.nan,
            spent=spent,
            trajectory=Trajectory(
                trail[:, 0].astype(np.int64), trail[:, 1:], trail[:, :1] * self._rows["limit"]
            ),
        )


# --- checking ---------------------------------------------------------------------------------------------------


def _shaped(name: str, column: NDArray[Any], size: int | None) -> NDArray[Any]:
    if column.ndim != 1 or column.size != (size or column.size) or not column.size:
        raise QuantityError(
            f"{name} has shape {column.shape}; it should be ({size or 'K'},), one for each row"
        )
    return column


def _column(name: str, values: ArrayLike, size: int | None) -> FloatArray:
    """One number ≥ 0 for each row, (K,)."""
    column = _shaped(name, np.asarray(values, dtype=np.float64), size)
    bad = np.flatnonzero(~(np.isfinite(column) & (column >= 0)))
    if bad.size:
        raise QuantityError(f"{name} of row {bad[0]} must be finite and at least 0, not {column[bad[0]]}")
    return column


def _check(planes: Planes, rows: Rows) -> None:
    """Whether a stream can have these columns and rows: a kernel would read past the end of others."""
    bad = np.flatnonzero(rows.exactly)
    if bad.size:
        raise QuantityError(f"row {bad[0]} asks for equality; an online row is 'at most'")
    bad = np.flatnonzero((rows.plane < 0) | (rows.plane >= len(planes.amounts)) | ~np.isfinite(rows.offset))
    if bad.size:
        raise QuantityError(f"row {bad[0]} charges a plane that is not there, or its offset is not finite")
    bad = np.flatnonzero(planes.weight != 1)
    if bad.size:
        raise QuantityError(f"request {bad[0]} has a weight that is not 1")
    n, shape = len(planes), planes.quality.shape
    for p, amount in enumerate(planes.amounts):
        if amount.shape != shape:
            raise QuantityError(f"plane {p} is {amount.shape}; quality is {shape}")
    for name, column in (
        ("value", planes.value),
        ("member", planes.member),
        *(("declared", d) for d in planes.declared),
    ):
        if column.shape != (n,) and (name == "value" or column.shape != (1,)):
            raise QuantityError(f"{name} is {column.shape} for {n} requests")


def _not_finite(request: int, allowed: NDArray[np.bool_], named: dict[str, NDArray[Any]]) -> QuantityError:
    for name, column in named.items():
        bad = np.flatnonzero(~np.isfinite(column) & allowed)
        if bad.size:
            return QuantityError(f"{name} of request {request}, use {bad[0]} is not finite: {column[bad[0]]}")
    return QuantityError(f"the value or a declared price of request {request} is not finite")


def _columns(planes: Planes) -> tuple[Any, ...]:
    """What the kernels read. They are compiled for a number of planes: a power of two keeps them few."""
    count = len(planes.amounts)
    spare = max(4, 1 << (count - 1).bit_length()) - count
    kind = np.result_type(planes.quality, *planes.amounts)
    return (
        count,
        np.ascontiguousarray(planes.value, dtype=np.float64),
        np.ascontiguousarray(planes.quality, dtype=kind),
        (*(np.ascontiguousarray(a, dtype=kind) for a in planes.amounts), *[np.empty((0, 0), kind)] * spare),
        (*(np.ascontiguousarray(d, dtype=np.float64) for d in planes.declared), *[np.zeros(1)] * spare),
        np.ascontiguousarray(planes.member, dtype=np.uint64),
    )


@compiled
def _first_bad(columns: Any) -> int:
    """The first request with a number that is not finite in a use that is allowed, or −1."""
    n_planes, value, quality, amounts, declared, _ = columns
    n, width = quality.shape
    of_use = np.empty(width)
    for j in range(n):
        check = value[j] * 0.0
        for i in range(width):
            of_use[i] = quality[j, i] * 0  # NaN where it is not finite
        for p in range(n_planes):
            check += declared[p][0 if declared[p].size == 1 else j] * 0.0
            a = amounts[p]
            for i in range(width):
                of_use[i] += a[j, i] * 0
        for i in range(width):
            check += 0.0 if np.isnan(quality[j, i]) else of_use[i]
        if check != 0.0:
            return j
    return -1


# --- one request ------------------------------------------------------------------------------------------------

_BAD = -2
"""What `_decide` returns where a number is not finite."""


@compiled
def _decide(worth: FloatArray, charge: FloatArray, row: Any, tally: Any, trail: FloatArray) -> int:
    check = 0.0
    for i in range(worth.size):
        if worth[i] > -np.inf:
            check += worth[i] * 0.0
            for k in range(row.size):
                check += charge[k, i] * 0.0
    if check != 0.0:
        return _BAD
    use = _serve(worth, charge, np.empty(worth.size), row, tally, trail)
    _move(row, tally[0])
    return use


@compiled
def _decide_all(
    columns: Any, rules: Any, batch: int, row: Any, tally: Any, trail: FloatArray, use: IntArray
) -> None:
    """`_serve` for all requests in order; `rules` = (plane, level, offset, scoped)."""
    n_planes, value, quality, amounts, declared, member = columns
    plane, level, offset, scoped = rules
    n, width = quality.shape
    worth, net, charge = np.empty(width), np.empty(width), np.empty((row.size, width))
    for j in range(n):
        for i in range(width):
            worth[i] = value[j] * quality[j, i]
        for p in range(n_planes):
            usd, a = declared[p][0 if declared[p].size == 1 else j], amounts[p]
            if usd != 0.0:
                for i in range(width):
                    worth[i] -= usd * a[j, i]
        for k in range(row.size):
            a, own, bar, off = amounts[plane[k]], charge[k], level[k], offset[k]
            if scoped[k] and not (member[0 if member.size == 1 else j] >> np.uint64(k)) & np.uint64(1):
                own[:] = 0.0
            elif np.isnan(bar):
                for i in range(width):
                    own[i] = a[j, i] - off
            else:
                for i in range(width):
                    own[i] = (1.0 if a[j, i] > bar else 0.0) - off
        use[j] = _serve(worth, charge, net, row, tally, trail)
        if (j + 1) % batch == 0 or j + 1 == n:
            _move(row, tally[0])


@compiled
def _serve(
    worth: FloatArray, charge: FloatArray, net: FloatArray, row: Any, tally: Any, trail: FloatArray
) -> int:
    """Decide on one request, spend its charges, learn from what it asked for."""
    now = tally[0]
    net[:] = worth
    for k in range(row.size):
        price, own = row[k].price, charge[k]
        for i in range(worth.size):
            net[i] -= price * own[i]
    asked, best, top = -1, 0.0, 0.0
    for i in range(worth.size):
        x, y = net[i], worth[i]
        top = y if y > top else top
        asked = i if x > best else asked
        best = x if x > best else best
    if now.horizon == np.inf:
        for k in range(row.size):
            row[k].room = min(row[k].room + row[k].limit, row[k].tolerance)
    use = asked
    if asked >= 0 and not _fits(charge, row, asked):
        use = _best_that_fits(net, charge, row)
        now.guarded += 1
    dual = best
    for k in range(row.size):
        dual += row[k].price * row[k].limit
    _learn(charge, row, now, asked, top)
    got = 0.0
    if use >= 0:
        got = worth[use]
        now.served += 1
        for k in range(row.size):
            row[k].spent += charge[k, use]
            row[k].room -= charge[k, use]
    _record(row, now, trail, dual, got)
    return use


@compiled
def _fits(charge: FloatArray, row: Any, i: int) -> bool:
    """Whether the guard lets use i through."""
    for k in range(row.size):
        if row[k].hard and charge[k, i] > 0.0 and charge[k, i] > row[k].room:
            return False
    return True


@compiled
def _best_that_fits(net: FloatArray, charge: FloatArray, row: Any) -> int:
    use, best = -1, 0.0
    for i in range(net.size):
        if net[i] > best and _fits(charge, row, i):
            use, best = i, net[i]
    return use


@compiled
def _learn(charge: FloatArray, row: Any, now: Any, asked: int, top: float) -> None:
    """Note how large worth and charges are, and by how much what was asked for exceeds the pace."""
    now.requests += 1
    now.asked += asked >= 0
    now.clock = min(now.clock + (now.asked >= LOOK), now.window)
    age = min(now.requests, now.window)
    now.stake += (top - now.stake) / age
    for k in range(row.size):
        own = row[k]
        paid = charge[k, asked] if asked >= 0 else 0.0
        own.square += ((paid - own.limit) ** 2 - own.square) / age
        own.excess += paid - own.limit - _ahead(own, now)


@compiled
def _ahead(own: Any, now: Any) -> Any:
    """How much more than the limit to spend per request from here on, since so much is left.

    A hard row keeps back one standard deviation of what the rest of the horizon may ask for, so that the guard is
    seldom needed; without a horizon its bucket is kept half full.
    """
    if now.horizon == np.inf:
        return (own.room - own.tolerance / 2) / now.window
    left = max(now.horizon - now.requests + 1.0, 1.0)
    reserve = np.sqrt(own.square * left) if own.hard else 0.0
    return (own.room - own.tolerance - reserve) / left - own.limit


@compiled
def _move(row: Any, now: Any) -> None:
    """μ_k ← max(0, μ_k + η_k·excess_k)"""
    for k in range(row.size):
        own = row[k]
        if now.asked >= LOOK and own.square > 0.0:
            eta = STEP * now.stake / (own.square * np.sqrt(now.clock))
            own.price = max(0.0, own.price + eta * own.excess)
        own.excess = 0.0


@compiled
def _record(row: Any, now: Any, trail: FloatArray, dual: float, got: float) -> None:
    """Add the request to the certificate's sums and, when it is time, a point to the trajectory."""
    keep, gap = 1.0 - 1.0 / now.window, dual - got
    now.weight = now.weight * keep + 1.0
    now.weight2 = now.weight2 * keep * keep + 1.0
    now.worth = now.worth * keep + got
    now.gap = now.gap * keep + gap
    now.gap2 = now.gap2 * keep + gap * gap
    if now.requests % now.spacing == 0:
        if now.points == trail.shape[0]:
            now.points //= 2
            for p in range(now.points):
                trail[p] = trail[2 * p + 1]
            now.spacing *= 2
            if now.requests % now.spacing:
                return
        trail[now.points, 0] = now.requests
        for k in range(row.size):
            trail[now.points, 1 + k] = row[k].spent
        now.points += 1
