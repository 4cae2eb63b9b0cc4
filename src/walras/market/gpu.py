"""The one pass over all of the data, on a CUDA device. [Z-3]

Only `screen` goes over everything, so only it moves: the planes are copied to the device once, a pass brings back a few
sums and the undecided tasks, and the rest of the search stays where it was. Written against the array interface that
numpy and cupy share, so the tests run it on numpy; arithmetic is float64, as in `sweep`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from walras.errors import SettingsError
from walras.market.memory import Memory, Sums
from walras.market.sweep import ROUND_OFF
from walras.risk import FloatArray

BLOCK = 1 << 20
"""Tasks at a time: what lies on the device beside the data is a few blocks."""


def cuda() -> ModuleType:
    """cupy, on a machine that has a device.

    Raises:
        SettingsError: there is no cupy or no device.
    """
    try:
        import cupy  # noqa: PLC0415 - an extra
    except ImportError:
        raise SettingsError("the GPU engine needs cupy: pip install 'walras[gpu]'", key="--engine") from None
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        devices = 0
    if not devices:
        raise SettingsError("no CUDA device was found; use --engine memory", key="--engine")
    module: ModuleType = cupy
    return module


@dataclass(frozen=True)
class Device(Memory):
    """A market whose screens run on the device `xp` computes on."""

    xp: Any = np

    @cached_property
    def _on_device(self) -> tuple[Any, ...]:
        """(value, quality, amounts, declared, weight, member), planes as (I, N)."""
        p, to = self.planes, self.xp.asarray
        planes = tuple(to(np.ascontiguousarray(a.T)) for a in p.amounts)
        quality = to(np.ascontiguousarray(p.quality.T))
        return to(p.value), quality, planes, tuple(to(d) for d in p.declared), to(p.weight), to(p.member)

    def screen(self, price: FloatArray, radius: FloatArray, scale: float) -> tuple[Sums, Memory]:
        """See `Memory.screen`."""
        flat = np.zeros(2 * len(self.rows) + 1)
        near = []
        for lo in range(0, len(self), BLOCK):
            part, undecided = self._block(price, radius, scale, lo, min(lo + BLOCK, len(self)))
            flat += part
            near.append(undecided + lo)
        rows = np.concatenate(near)
        ids = rows if self.ids is None else self.ids[rows]
        return Sums.of(flat), Memory(self.planes.take(rows), self.rows, self.defer, ids)

    def _block(
        self, price: FloatArray, radius: FloatArray, scale: float, lo: int, hi: int
    ) -> tuple[FloatArray, Any]:
        xp, rows, n = self.xp, self.rows, hi - lo
        value, quality, amounts, declared, weight, member = self._on_device

        def own(column: Any) -> Any:
            return column if column.size == 1 else column[lo:hi]

        q = quality[:, lo:hi].astype(xp.float64)
        worth = own(value) * q
        for usd, amount in zip(declared, amounts, strict=True):
            worth = worth - own(usd) * amount[:, lo:hi]
        allowed = ~xp.isnan(q)
        inside, charges = [], []
        for k in range(len(rows)):
            amount = amounts[int(rows.plane[k])][:, lo:hi].astype(xp.float64)
            level = float(rows.level[k])
            charge = (amount if np.isnan(level) else (amount > level).astype(xp.float64)) - float(
                rows.offset[k]
            )
            bit = (own(member) >> np.uint64(k)) & np.uint64(1) if rows.scoped[k] else xp.ones(1)
            inside.append(xp.broadcast_to(bit, (n,)).astype(xp.float64))
            charges.append(xp.where(allowed, charge * inside[-1], 0.0))
        net = scale * worth
        for k in range(len(rows)):
            net = net - float(price[k]) * charges[k]
        bad = xp.flatnonzero((~xp.isfinite(net) & allowed).any(axis=0))
        if bad.size:
            raise self._not_finite(lo + int(bad[0]))
        net = xp.where(allowed, net, -xp.inf)
        first, best = net.argmax(axis=0), net.max(axis=0)
        served = best > 0.0 if self.defer else xp.isfinite(best)
        best = xp.maximum(best, 0.0) if self.defer else best

        def of_first(plane: Any) -> Any:
            return xp.where(served, xp.take_along_axis(plane, first[None], axis=0)[0], 0.0)

        reach, sway = xp.zeros_like(net), xp.zeros(n)
        for k in range(len(rows)):
            chosen = of_first(charges[k])
            reach = reach + float(radius[k]) * xp.abs(charges[k] - chosen)
            sway = sway + float(radius[k]) * xp.abs(chosen)
        terms = xp.abs(best) + 2.0 * xp.abs(of_first(scale * worth) - best)
        floor = best - ROUND_OFF * terms
        rivals = ((net + reach >= floor) & (reach > 0.0)).any(axis=0)
        if self.defer:
            rivals = rivals | ((sway >= floor) & (sway > 0.0))
        decided = ~rivals & (served | self.defer)
        mass = xp.where(decided & served, own(weight), 0.0)
        gained = xp.where(mass > 0, of_first(xp.where(allowed, worth, 0.0)), 0.0)
        sums = [(mass * gained).sum()]
        sums += [(mass * of_first(c)).sum() for c in charges] + [(mass * i).sum() for i in inside]
        undecided = xp.flatnonzero(~decided)
        get = getattr(xp, "asnumpy", np.asarray)
        return np.array([float(s) for s in sums]), get(undecided)
