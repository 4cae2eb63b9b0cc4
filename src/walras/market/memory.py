"""A market held in memory: passes over its planes, on one thread or several."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from walras.errors import QuantityError
from walras.market import sweep
from walras.market.planes import Plane, Planes, Rows
from walras.quantities import IntArray
from walras.risk import FloatArray

BLOCKS, SMALLEST, LARGEST = 64, 1 << 12, 1 << 16
"""Units of work, and their size in tasks: the sums of blocks are added in order, so threads change no digit."""
WORTH_A_THREAD = 1 << 20
"""Amounts below which a second thread costs more than it brings."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What best responses at some prices add up to."""

    worth: float
    """USD at declared prices."""
    usage: FloatArray
    """(K,) charges of each row."""
    served: FloatArray
    """(K,) weight of the tasks in each row's scope that get a use."""
    curvature: FloatArray
    """(K, K) estimated Hessian of the dual."""
    moments: FloatArray
    """(K, K) Σ weight²·charge·chargeᵀ; empty unless asked for."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.worth + other.worth,
            self.usage + other.usage,
            self.served + other.served,
            self.curvature + other.curvature,
            self.moments + other.moments,
        )

    @classmethod
    def zero(cls, k: int) -> Sums:
        return cls(0.0, np.zeros(k), np.zeros(k), np.zeros((k, k)), np.zeros((0, 0)))

    @classmethod
    def of(
        cls, flat: FloatArray, curvature: FloatArray | None = None, moments: FloatArray | None = None
    ) -> Sums:
        k = flat.size // 2
        return cls(
            float(flat[0]),
            flat[1 : 1 + k],
            flat[1 + k :],
            np.zeros((k, k)) if curvature is None else curvature,
            np.zeros((0, 0)) if moments is None else moments,
        )


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def in_threads(work: Callable[[int, int], Any], ranges: list[tuple[int, int]]) -> list[Any]:
    """`work` on every range, on as many threads as there are cores; results in order."""
    return list(_pool().map(lambda ends: work(*ends), ranges))


@dataclass(frozen=True)
class Memory:
    """Implements `dual.Market` on planes in this process."""

    planes: Planes
    rows: Rows
    defer: bool = True
    screens: ClassVar[bool] = True
    ids: IntArray | None = None
    """Which task of the whole market each one is, (N,); None when this is the whole."""

    def __len__(self) -> int:
        return len(self.planes)

    @property
    def width(self) -> int:
        return self.planes.width

    @property
    def weight(self) -> float:
        """Of all tasks."""
        return self.planes.total_weight()

    def sums(
        self,
        price: FloatArray,
        scale: float,
        bandwidth: float,
        yardstick: FloatArray,
        *,
        moments: bool = False,
    ) -> Sums:
        """Best responses at `price`; see `sweep.respond`."""
        k = len(self.rows)

        def block(lo: int, hi: int) -> Sums:
            flat, curvature = np.zeros(2 * k + 1), np.zeros((k, k))
            second = np.zeros((k, k) if moments else (0, 0))
            stuck = sweep.respond(
                self._columns, self._rows, price, scale, self.defer, bandwidth, yardstick, lo, hi, flat, curvature, second
            )  # fmt: skip
            if stuck:
                self._raise_stuck()
            return Sums.of(flat, curvature, second)

        total = sum(self._blocks(block), Sums.zero(k) if not moments else _zero_moments(k))
        if not (np.isfinite(total.worth) and np.isfinite(total.usage).all()):
            raise self._not_finite(self._first_bad())
        return total

    def screen(self, price: FloatArray, radius: FloatArray, scale: float) -> tuple[Sums, Memory]:
        """Sums over the tasks that choose alike within `radius` of `price`, and the market of the others."""

        def block(lo: int, hi: int) -> tuple[FloatArray, IntArray, Planes]:
            flat, listed = np.zeros(2 * len(self.rows) + 1), np.empty(hi - lo + 1, dtype=np.int64)
            count, bad = sweep.screen(
                self._columns, self._rows, price, radius, scale, self.defer, lo, hi, flat, listed
            )
            if bad >= 0:
                raise self._not_finite(bad)
            near = listed[:count].copy()
            # Copied now, while the block is in the cache.
            return flat, near, self.planes.part(lo, hi).take(near - lo)

        done = self._blocks(block)
        sums = Sums.of(np.sum([flat for flat, _, _ in done], axis=0))
        rows = np.concatenate([near for _, near, _ in done])
        ids = rows if self.ids is None else self.ids[rows]
        done.reverse()
        planes = Planes.concatenate(done.pop()[2] for _ in range(len(done)))
        return sums, Memory(planes, self.rows, self.defer, ids)

    def sample(self, n: int) -> Memory:
        """n tasks, one drawn from each of n equal stretches, standing for the whole weight."""
        size = len(self)
        rows = ((np.arange(n) + np.random.default_rng(size).random(n)) * (size / n)).astype(np.int64)
        part = self.planes.take(rows)
        weight = part.weight * (self.planes.total_weight() / part.total_weight())
        planes = Planes(part.value, part.quality, part.amounts, part.declared, weight, part.member)
        return Memory(planes, self.rows, self.defer, rows if self.ids is None else self.ids[rows])

    def gather(self) -> Memory:
        """The same market, in this process."""
        return self

    def responses(self, price: FloatArray) -> list[tuple[FloatArray, NDArray[np.int64]]]:
        """Everybody's uses at `price` as (share (N,), use (N,))."""
        return [(np.ones(len(self)), self.choices(price))]

    def choices(self, price: FloatArray, scale: float = 1.0) -> NDArray[np.int64]:
        """The best response of each task, (N,)."""
        use = np.empty(len(self), dtype=np.int64)

        def block(lo: int, hi: int) -> None:
            sweep.pick(self._columns, self._rows, price, scale, self.defer, lo, hi, use[lo:hi])

        self._blocks(block)
        return use

    # --- inside ----------------------------------------------------------------------------------------------------

    @cached_property
    def _columns(self) -> tuple[Any, ...]:
        p = self.planes
        # Kernels are compiled for a number of planes; rounding it up to a power of two keeps them few.
        room = 4
        while room < len(p.amounts):
            room *= 2
        spare = room - len(p.amounts)
        nothing = np.empty(0, dtype=p.quality.dtype)
        planes = [_flat(plane) for plane in (p.quality, *p.amounts)]
        return (
            p.width,
            np.array([strides for _, strides in planes]),
            _plain(p.value, np.float64),
            planes[0][0],
            (*(flat for flat, _ in planes[1:]), *[nothing] * spare),
            (*(_plain(usd, np.float64) for usd in p.declared), *[np.zeros(1)] * spare),
            _plain(p.weight, np.float64),
            _plain(p.member, np.uint64),
        )

    @cached_property
    def _rows(self) -> tuple[Any, ...]:
        return self.rows.plane, self.rows.level, self.rows.offset, self.rows.scoped

    def _blocks(self, work: Callable[[int, int], Any]) -> list[Any]:
        n = len(self)
        if n * self.width * (1 + len(self.planes.amounts)) < WORTH_A_THREAD:
            return [work(0, n)]
        block = min(max(n // BLOCKS, SMALLEST), LARGEST)
        return in_threads(work, [(lo, min(n, lo + block)) for lo in range(0, n, block)])

    def _first_bad(self) -> int:
        """The first task with an amount that is not finite, of the uses it may be given."""
        p = self.planes
        allowed = ~np.isnan(p.quality)
        bad = ~np.isfinite(p.value)
        for plane in (p.quality, *p.amounts):
            bad |= (~np.isfinite(plane) & allowed).any(axis=1)
        return int(np.argmax(bad))

    def _not_finite(self, task: int) -> QuantityError:
        p = self.planes
        at = task if self.ids is None else int(self.ids[task])
        allowed = ~np.isnan(p.quality[task])
        for name, column in (("quality", p.quality), *((f"plane {j}", a) for j, a in enumerate(p.amounts))):
            bad = np.flatnonzero(~np.isfinite(column[task]) & allowed)
            if bad.size:
                return QuantityError(
                    f"{name} of task {at}, use {bad[0]} is not finite: {column[task, bad[0]]}"
                )
        return QuantityError(f"the value or a price of task {at} is not finite")

    def _raise_stuck(self) -> None:
        none = np.flatnonzero(np.isnan(self.planes.quality).all(axis=1))
        task = int(none[0]) if self.ids is None else int(self.ids[none[0]])
        raise QuantityError(f"task {task} has no allowed use and may not defer ({none.size} such tasks)")


def _zero_moments(k: int) -> Sums:
    zero = Sums.zero(k)
    return Sums(zero.worth, zero.usage, zero.served, zero.curvature, np.zeros((k, k)))


def _flat(plane: Plane) -> tuple[Plane, tuple[int, int]]:
    """A plane as one long array, and the steps from task to task and from use to use."""
    n, width = plane.shape
    if plane.flags.c_contiguous and width > 1:
        return _plain(plane, plane.dtype).reshape(-1), (width, 1)
    return _plain(plane.T, plane.dtype).reshape(-1), (1, n)


def _plain(column: NDArray[Any], number: Any) -> NDArray[Any]:
    """Contiguous and writeable: kernels are compiled once for that and not for each way an array can be. A copy only if
    it is not."""
    return np.require(column, dtype=number, requirements=["C", "W"])
