"""An allocation: which task gets which use, in what share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from walras.equation import DEFER
from walras.market.blocks import Blocks
from walras.market.dual import Answer
from walras.market.memory import Memory
from walras.quantities import IntArray
from walras.risk import FloatArray


@dataclass(slots=True)
class Mix:
    """A (mixed) allocation as (task, use, share) triples sorted by task; shares of a task sum to 1."""

    task: IntArray
    use: IntArray
    """Column, or `DEFER`."""
    share: FloatArray

    @classmethod
    def pure(cls, use: IntArray) -> Mix:
        return cls(np.arange(use.size), use, np.ones(use.size))

    @classmethod
    def of(cls, market: Memory | Blocks, answer: Answer) -> Mix:
        """The allocation of an answer, spelled out for all N tasks."""
        n = len(market)
        task: list[IntArray] = []
        use: list[IntArray] = []
        share: list[FloatArray] = []
        for part, price in answer.at:
            responses = [(np.ones(n), np.full(n, DEFER))] if price is None else market.responses(price)
            for some, choices in responses:
                task.append(np.arange(n))
                use.append(choices)
                share.append(part * some)
        split = answer.split
        if split.among.size:
            keep = np.ones(n, dtype=np.bool_)
            keep[split.among] = False
            given = np.bincount(split.task, weights=split.share, minlength=n).astype(np.float64)
            deferred = 1.0 - given[split.among]
            task = [*(t[keep] for t in task), split.task, split.among]
            use = [*(u[keep] for u in use), split.use, np.full(split.among.size, DEFER)]
            share = [*(s[keep] for s in share), split.share, deferred]
        return cls.merged(np.concatenate(task), np.concatenate(use), np.concatenate(share))

    @classmethod
    def merged(cls, task: IntArray, use: IntArray, share: FloatArray) -> Mix:
        """Triples in any order, some of the same task and use, made into a mix; shares made to sum to exactly 1."""
        keep = share > 1e-12
        task, use, share = task[keep], use[keep], share[keep]
        width = int(use.max(initial=DEFER)) + 2
        keys = task * width + (use + 1)
        if (np.diff(keys) <= 0).any():
            keys, at = np.unique(keys, return_inverse=True)
            share = np.bincount(at, weights=share).astype(np.float64)
        tasks = keys // width
        return cls(tasks, keys % width - 1, share / np.bincount(tasks, weights=share)[tasks])
