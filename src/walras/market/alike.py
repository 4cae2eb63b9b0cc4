"""Tasks that are the same bit for bit, taken together: masses of exact ties are one column of a small programme."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from walras.market.memory import Memory
from walras.quantities import IntArray
from walras.risk import FloatArray

ROUND_OFF = 1e-12
"""A share below this is none."""


@dataclass(frozen=True, slots=True)
class Split:
    """What the few tasks get that the prices leave undecided; what is missing to a share of 1 is deferred."""

    among: IntArray
    """The tasks in question."""
    task: IntArray
    use: IntArray
    share: FloatArray

    @classmethod
    def none(cls) -> Split:
        nothing = np.zeros(0, dtype=np.int64)
        return cls(nothing, nothing, nothing, np.zeros(0))


@dataclass(frozen=True, slots=True)
class Alike:
    """Tasks that are the same bit for bit, taken together: they tie for ever, and one column does for all."""

    kind: IntArray
    """(N,) which kind each task is of."""
    first: IntArray
    """(M,) one task of each kind."""
    weight: FloatArray
    """(M,) of all tasks of a kind."""
    each: FloatArray
    """(N,) weight of each task."""

    @classmethod
    def of(cls, market: Memory) -> Alike:
        p, n = market.planes, len(market)
        columns = [p.value, p.quality, *p.amounts, *p.declared, p.member]
        raw = [np.ascontiguousarray(c).view(np.uint8).reshape(n, -1) for c in columns if c.size >= n > 1]
        key = np.ascontiguousarray(np.concatenate(raw, axis=1)) if raw else np.zeros((n, 1), dtype=np.uint8)
        whole = key.view(np.dtype((np.void, key.shape[1]))).ravel()
        _, first, kind = np.unique(whole, return_index=True, return_inverse=True)
        each = np.broadcast_to(p.weight, n)
        return cls(kind, first, np.bincount(kind, weights=each).astype(np.float64), each)

    def split(
        self, ids: IntArray | None, kind: IntArray, use: IntArray, shares: FloatArray, defer: bool
    ) -> Split:
        """A kind's shares (kinds ascending) dealt to its tasks one after another: at most one a use is split."""
        order = np.argsort(self.kind, kind="stable")
        starts = np.concatenate(([0], np.cumsum(np.bincount(self.kind, minlength=self.first.size))))
        task, to, share = [], [], []
        for m in range(self.first.size):
            mine = order[starts[m] : starts[m + 1]]
            own = np.flatnonzero((kind == m) & (shares > ROUND_OFF))
            ends = np.cumsum(shares[own])
            if not defer:
                ends /= ends[-1]
            upto = np.cumsum(self.each[mine]) / self.weight[m]
            upto[-1] = 1.0
            below = np.concatenate(([0.0], upto[:-1]))
            for at, (high, low) in enumerate(zip(ends, [0.0, *ends][:-1], strict=True)):
                got = np.clip(np.minimum(upto, high) - np.maximum(below, low), 0.0, None) / (upto - below)
                some = got > ROUND_OFF
                task.append(mine[some])
                to.append(np.full(int(some.sum()), use[own[at]]))
                share.append(np.minimum(got[some], 1.0))
        if not task:
            nothing = np.zeros(0, dtype=np.int64)
            return Split(np.arange(self.kind.size) if ids is None else ids, nothing, nothing, np.zeros(0))
        tasks = np.concatenate(task)
        everyone = np.arange(self.kind.size) if ids is None else ids
        return Split(everyone, everyone[tasks], np.concatenate(to), np.concatenate(share))
