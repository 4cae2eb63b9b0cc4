"""One budget for every tenant: as many rows as there are tenants, for the price of one. [Z-3]

At given prices of the rows that concern everybody, tenants have nothing to do with one another: each has a price ν of
its own budget, found on its own tasks. D as a function of ν is convex and made of straight pieces, so the tangents on both sides
of the minimum meet below it, and at it when both are the last ones: the minimum is found exactly, and what the two
sides choose, mixed, spends the budget to the cent. A pass therefore clears all tenants inside, and `dual.solve` sees
only the few rows that are left, with the curvature that remains when tenants' prices follow (Schur's complement).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from walras.market import sweep
from walras.market.dual import Unbounded
from walras.market.memory import Memory, Sums, in_threads
from walras.market.planes import Planes, Rows
from walras.quantities import IntArray
from walras.risk import FloatArray

CHUNKS = 64
"""Units of work, of about equally many tasks."""
STEPS = 200
"""Tangents of one tenant; far more than its halvings could be."""


@dataclass(frozen=True, slots=True)
class Family:
    """A row for every group of tasks, charging the same plane: at most limits[g] for group g."""

    group: IntArray
    """(N,) which group a task is in, −1 for none."""
    plane: int
    limits: FloatArray
    """(G,) totals."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """All groups at some prices of the other rows."""

    low: FloatArray
    """(G,) prices just below each group's own, at which it wants too much (the same where its budget is slack)."""
    high: FloatArray
    """(G,) and just above."""
    share: FloatArray
    """(G,) how much of what it wants at `low` it gets, the rest being what it wants at `high`."""
    price: FloatArray
    """(G,) its own price."""
    usage: FloatArray
    """(G,) what it takes of its limit."""
    served: FloatArray
    """(G,) weight of its tasks that get a use."""


@dataclass
class Blocks:
    """Implements `dual.Market`; tasks are kept sorted by group."""

    planes: Planes
    rows: Rows
    """The rows besides."""
    family: Family
    defer: bool = True
    screens: bool = False
    last: Cleared | None = field(default=None, repr=False)
    """Of the latest pass: where the next one starts."""
    _cleared: dict[bytes, Cleared] = field(default_factory=dict, repr=False)
    """Of every pass, by its prices."""

    def __post_init__(self) -> None:
        self.order = np.argsort(self.family.group, kind="stable")
        """Where each task, as sorted here, stands in the market."""
        counts = np.bincount(self.family.group + 1, minlength=self.family.limits.size + 1)
        self.starts = np.concatenate(([0], np.cumsum(counts)))
        """Group g has the tasks starts[g + 1] … starts[g + 2] − 1; those of no group come first."""
        if (np.diff(self.order) != 1).any():
            self.planes = self.planes.take(self.order)

    def __len__(self) -> int:
        return len(self.planes)

    @property
    def width(self) -> int:
        return self.planes.width

    @property
    def weight(self) -> float:
        return self.planes.total_weight()

    def gather(self) -> Memory:
        """Its tasks, without the groups' limits."""
        return self._memory

    def sample(self, n: int) -> Blocks:  # noqa: ARG002 - the protocol's argument
        """The same market: a sample would leave small groups without a task."""
        return self

    def screen(self, price: FloatArray, radius: FloatArray, scale: float) -> tuple[Sums, Blocks]:  # noqa: ARG002 - as above
        """Nobody is decided: what a task chooses hangs on its group's price, which moves with all others."""
        return Sums.zero(len(self.rows)), self

    def sums(
        self,
        price: FloatArray,
        scale: float,
        bandwidth: float,
        yardstick: FloatArray,
        *,
        moments: bool = False,
    ) -> Sums:
        """What everybody chooses when every group is within its limit."""
        if moments:  # asked for at no prices, to learn how large charges are
            return self._memory.sums(price, scale, bandwidth, yardstick, moments=True)
        k, groups = len(self.rows), self.family.limits.size
        start = np.zeros(groups) if self.last is None else self.last.price
        out = {name: np.zeros(groups) for name in ("low", "high", "share", "price", "usage", "served")}

        def chunk(first: int, end: int) -> Sums:
            flat, curvature = np.zeros(2 * k + 3), np.zeros((k, k))
            _clear(
                self._memory._columns, self._with_family, self.starts, self.family.limits, price, scale, self.defer,
                bandwidth, yardstick, first, end, start, *out.values(), flat, curvature,
            )  # fmt: skip
            return Sums(float(flat[0]), flat[1 : 1 + k], flat[2 + k : 2 + 2 * k], curvature, np.zeros((0, 0)))

        parts = in_threads(chunk, self._chunks)
        stuck = np.flatnonzero(np.isnan(out["share"]))
        if stuck.size:
            raise GroupUnbounded(int(stuck[0]), float(out["usage"][stuck[0]]))
        self.last = Cleared(**out)
        self._cleared[price.tobytes()] = self.last
        return sum(parts, Sums.zero(k))

    def responses(self, price: FloatArray) -> list[tuple[FloatArray, IntArray]]:
        """Everybody's uses at `price`, which a pass has been made at, in the market's order, as (share (N,), use (N,)):
        what groups want just below their own prices, and just above."""
        cleared, group = self.at(price), self.family.group
        share = np.append(cleared.share, 1.0)[group]
        below = self._picked(price, cleared.low)
        if (share == 1.0).all():
            return [(share, below)]
        return [(share, below), (1.0 - share, self._picked(price, cleared.high))]

    def within_limits(self, price: FloatArray) -> IntArray:
        """One use for each task, (N,), such that every group is within its limit."""
        return self._picked(price, self.at(price).high)

    def at(self, price: FloatArray) -> Cleared:
        """How groups cleared in the pass at `price`."""
        return self._cleared[price.tobytes()]

    # --- inside ----------------------------------------------------------------------------------------------------

    @cached_property
    def _memory(self) -> Memory:
        return Memory(self.planes, self.rows, self.defer)

    @cached_property
    def _with_family(self) -> tuple[NDArray[Any], ...]:
        """The rows with the family's as the last one."""
        rows = self.rows
        return (
            np.append(rows.plane, self.family.plane),
            np.append(rows.level, np.nan),
            np.append(rows.offset, 0.0),
            np.append(rows.scoped, False),
        )

    @cached_property
    def _chunks(self) -> list[tuple[int, int]]:
        """Ranges of groups (0: those of none) with about equally many tasks."""
        n = self.starts.size - 1
        marks = np.searchsorted(self.starts, np.linspace(0, len(self), min(CHUNKS, n) + 1)[1:-1])
        edges = np.unique(np.concatenate(([0], np.clip(marks, 0, n), [n])))
        return [(int(a), int(b)) for a, b in pairwise(edges)]

    def _picked(self, price: FloatArray, own: FloatArray) -> IntArray:
        """Best responses when each group pays `own` (G,) besides, in the market's order: by the code that cleared it, so
        that what ties, ties."""
        use = np.empty(len(self), dtype=np.int64)

        def chunk(first: int, end: int) -> None:
            columns = self._memory._columns
            _pick(
                columns, self._with_family, self.starts, price, self.defer, first, end, own, self.order, use
            )

        in_threads(chunk, self._chunks)
        return use


class GroupUnbounded(Unbounded):
    """No price brings a group within its limit."""

    def __init__(self, group: int, least: float) -> None:
        super().__init__(group, least)
        self.group, self.least = group, least


# --- kernels -----------------------------------------------------------------------------------------------------

respond_in: Any = sweep.respond_in
room: Any = sweep.room
inside: Any = sweep.inside


@sweep.compiled
def _before(u, b, columns, rows, prices, scale, lo, n, plane):
    """Net values before a group's own price, into u (I, n), and what that price is charged on, into b (I, n)."""
    width, strides, value, quality, amounts, declared, _, member = columns
    of, level, offset, scoped = rows
    for i in range(width):
        own, start = u[i], lo * strides[0, 0] + i * strides[0, 1]
        for j in range(n):
            own[j] = scale * value[lo + j] * quality[start + j * strides[0, 0]]
    for p in range(strides.shape[0] - 1):
        usd, common = declared[p], 0.0
        for k in range(prices.size):
            if of[k] == p and np.isnan(level[k]) and not scoped[k]:
                common += prices[k]
        for i in range(width):
            own, start, step = u[i], lo * strides[1 + p, 0] + i * strides[1 + p, 1], strides[1 + p, 0]
            a, charged = amounts[p], b[i]
            for j in range(n):
                own[j] -= (scale * usd[lo + j if usd.size > 1 else 0] + common) * a[start + j * step]
            if p == plane:
                for j in range(n):
                    charged[j] = a[start + j * step]
    for k in range(prices.size):
        linear, p = np.isnan(level[k]), of[k]
        for i in range(width):
            own, start, step, a = (
                u[i],
                lo * strides[1 + p, 0] + i * strides[1 + p, 1],
                strides[1 + p, 0],
                amounts[p],
            )
            if linear and not scoped[k]:
                for j in range(n):
                    own[j] += prices[k] * offset[k]
            else:
                for j in range(n):
                    if not scoped[k] or inside(member, k, lo + j):
                        x = a[start + j * step]
                        own[j] -= prices[k] * ((x if linear else (1.0 if x > level[k] else 0.0)) - offset[k])


@sweep.compiled
def _choose(best, paid, first, u, b, own, defer, n):
    """What each of n tasks chooses at a group's price: its net value, what the price is charged on, and the use."""
    for j in range(n):
        best[j] = 0.0 if defer else -np.inf
        paid[j] = 0.0
        first[j] = -1.0
    for i in range(u.shape[0]):
        value, charged, here = u[i], b[i], float(i)
        for j in range(n):
            x, y, old, use, a = value[j] - own * charged[j], best[j], paid[j], first[j], charged[j]
            more = x > y
            best[j] = x if more else y
            paid[j] = a if more else old
            first[j] = here if more else use


@sweep.compiled
def _at(best, paid, first, u, b, mass, own, defer, n):
    """What a group's choices are worth at its price, all charges paid, and how much of its limit they take."""
    _choose(best, paid, first, u, b, own, defer, n)
    value, used = 0.0, 0.0
    for j in range(n):
        value += mass[j] * best[j]
        used += mass[j] * paid[j]
    return value, used


@sweep.compiled
def _tally(sums, share, first, columns, rows, lo, n):
    """Add `share` of what n tasks choose to the sums."""
    _, strides, value, quality, amounts, declared, weight, member = columns
    plane, level, offset, scoped = rows
    n_rows = plane.size
    for j in range(n):
        if first[j] < 0.0:
            continue
        task, i = lo + j, int(first[j])
        mass = share * weight[task if weight.size > 1 else 0]
        worth = value[task] * quality[task * strides[0, 0] + i * strides[0, 1]]
        for p in range(strides.shape[0] - 1):
            usd = declared[p][task if declared[p].size > 1 else 0]
            if usd != 0.0:
                worth -= usd * amounts[p][task * strides[1 + p, 0] + i * strides[1 + p, 1]]
        sums[0] += mass * worth
        for k in range(n_rows):
            if not scoped[k] or inside(member, k, task):
                a = np.float64(
                    amounts[plane[k]][task * strides[1 + plane[k], 0] + i * strides[1 + plane[k], 1]]
                )
                if not np.isnan(level[k]):
                    a = 1.0 if a > level[k] else 0.0
                sums[1 + k] += mass * (a - offset[k])
                sums[1 + n_rows + k] += mass


@sweep.compiled
def _own_price(best, paid, first, u, b, mass, limit, start, defer, n):
    """The price of one group: prices below and above it, how much of the choices below it gets, and itself.

    D of the group at a price ν is the value of its choices + ν·limit, its slope what is left of the limit. A share of NaN:
    no price is high enough; the last number is then the least that the group can take.
    """
    low, high = start, start
    value, used = _at(best, paid, first, u, b, mass, start, defer, n)
    left, f = limit - used, value + start * limit
    unit = max(0.25 * abs(value) / max(abs(used), 1e-300), 1e-12)
    before, after, f_low, f_high = left, left, f, f
    if left >= 0.0:
        step = 0.02 * start
        while True:
            if low == 0.0:
                return 0.0, 0.0, 1.0, 0.0
            low = max(low - step, 0.0)
            value, used = _at(best, paid, first, u, b, mass, low, defer, n)
            before, f_low = limit - used, value + low * limit
            if before < 0.0:
                break
            high, after, f_high, step = low, before, f_low, 8.0 * step
    else:
        step = 0.02 * start if start > 0.0 else unit
        for _ in range(60):
            low, before, f_low, high = high, after, f_high, high + step
            value, used = _at(best, paid, first, u, b, mass, high, defer, n)
            after, f_high, step = limit - used, value + high * limit, 4.0 * step
            if after >= 0.0:
                break
        if after < 0.0:
            return low, high, np.nan, used
    own = high
    for turn in range(STEPS):
        own = min(max(((f_high - after * high) - (f_low - before * low)) / (before - after), low), high)
        meet, last = f_low + before * (own - low), high - low <= 4e-16 * high
        if turn % 2 == 0 and not last:
            # Where what is used would be right if it changed evenly: nearer, until only a few tasks are left between.
            middle, margin = low + (high - low) * before / (before - after), 0.05 * (high - low)
            own, meet = min(max(middle, low + margin), high - margin), -np.inf
        value, used = _at(best, paid, first, u, b, mass, own, defer, n)
        left, f = limit - used, value + own * limit
        if last or f - meet <= 1e-14 * (abs(f) + abs(value)):
            break
        if left < 0.0:
            low, before, f_low = own, left, f
        else:
            high, after, f_high = own, left, f
    return low, high, after / (after - before), own


@sweep.compiled
def _clear(
    columns, rows, starts, limits, price, scale, defer, bandwidth, yardstick, first_group, end, start,
    low, high, share, own, usage, served, sums, curvature,
):  # fmt: skip
    """Clear the groups first_group − 1 … end − 2 (−1: the tasks of none) and add them to the sums.

    `sums` = [worth, charge of each row and the family, weight served in each row's scope and the family].
    """
    k, width, weight = price.size, columns[0], columns[6]
    prices, measure = np.zeros(k + 1), np.zeros(k + 1)
    prices[:k], measure[:k] = price, yardstick
    space, hessian, none, here = (
        room(columns, k + 1),
        np.zeros((k + 1, k + 1)),
        np.zeros((0, 0)),
        np.zeros(2 * k + 3),
    )
    most = 0
    for at in range(first_group, end):
        most = max(most, starts[at + 1] - starts[at])
    u, b = np.empty((width, most)), np.empty((width, most))
    mass, best, paid, first = np.empty(most), np.empty(most), np.empty(most), np.empty(most)
    for at in range(first_group, end):
        lo, n, g = starts[at], starts[at + 1] - starts[at], at - 1
        if n == 0:
            if g >= 0:
                share[g] = 1.0
            continue
        _before(u, b, columns, rows, price, scale, lo, n, rows[0][k])
        for j in range(n):
            mass[j] = weight[lo + j if weight.size > 1 else 0]
        here[:] = 0.0
        prices[k] = 0.0
        if g < 0:
            _choose(best, paid, first, u, b, 0.0, defer, n)
            _tally(here, 1.0, first, columns, rows, lo, n)
        else:
            low[g], high[g], share[g], own[g] = _own_price(
                best, paid, first, u, b, mass, limits[g], start[g], defer, n
            )
            if np.isnan(share[g]):
                usage[g] = own[g]
                return
            prices[k] = own[g]
            _choose(best, paid, first, u, b, low[g], defer, n)
            _tally(here, share[g], first, columns, rows, lo, n)
            if share[g] < 1.0:
                _choose(best, paid, first, u, b, high[g], defer, n)
                _tally(here, 1.0 - share[g], first, columns, rows, lo, n)
            usage[g], served[g] = here[1 + k], here[2 + 2 * k]
        sums += here
        if bandwidth == 0.0 or k == 0:
            continue
        measure[k] = max(prices[k], 0.01 * abs(here[0]) / max(abs(here[1 + k]), 1e-300))
        hessian[:] = 0.0
        respond_in(
            space, columns, rows, prices, scale, defer, bandwidth, measure, lo, lo + n, here, hessian, none
        )
        # The group's own price follows the others: what curvature is left is Schur's complement.
        follows = prices[k] > 0.0 and hessian[k, k] > 0.0
        for i in range(k):
            for j in range(k):
                curvature[i, j] += hessian[i, j]
                if follows:
                    curvature[i, j] -= hessian[i, k] * hessian[k, j] / hessian[k, k]


@sweep.compiled
def _pick(columns, rows, starts, price, defer, first_group, end, own, order, use):
    """What the tasks of the groups first_group − 1 … end − 2 choose when their group pays own[g], into use[order]."""
    width, most = columns[0], 0
    for at in range(first_group, end):
        most = max(most, starts[at + 1] - starts[at])
    u, b = np.empty((width, most)), np.empty((width, most))
    best, paid, first = np.empty(most), np.empty(most), np.empty(most)
    for at in range(first_group, end):
        lo, n = starts[at], starts[at + 1] - starts[at]
        _before(u, b, columns, rows, price, 1.0, lo, n, rows[0][price.size])
        _choose(best, paid, first, u, b, own[at - 1] if at > 0 else 0.0, defer, n)
        for j in range(n):
            use[order[lo + j]] = int(first[j])
