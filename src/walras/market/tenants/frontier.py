"""What a serving engine can make in a second: prefill and decode tokens, as the corners of its production frontier. [Z §3.3]

A step with n decoding sequences and p new prompt tokens takes T(n, p) seconds and makes p prefill and n decode tokens, so an engine
that repeats it makes (p, n) / T a second; alternating between steps reaches every mixture of such pairs. The frontier is the upper right
of their convex hull: what an operator of this engine can offer, and what one kind of token costs in the other.
"""

from __future__ import annotations

import numpy as np

from walras.engine.settings import EngineSettings
from walras.engine.steps import StepTimes
from walras.errors import QuantityError
from walras.risk import FloatArray

STEPS = 65
"""Sizes that are tried of each: none, and so many up to the most."""


def engine_frontier(settings: EngineSettings, steps: StepTimes, context_tokens: float) -> FloatArray:
    """(V, 2) prefill and decode tokens a second of one worker at each corner, the most prefill first.

    Args:
        context_tokens: KV tokens of a decoding sequence, mean; memory limits how many there are.

    Raises:
        QuantityError: a context that is not above 0, or of which memory does not hold one.
    """
    memory = settings.kv_blocks * settings.block_tokens
    if not 0 < context_tokens <= memory:
        raise QuantityError(
            f"a context of {context_tokens:g} tokens, and memory for {memory:,}: need one above 0 that fits"
        )
    budget = settings.max_batched_tokens
    most = int(min(settings.max_sequences, memory // context_tokens, budget))
    points = []
    for n in np.unique(np.linspace(0, most, STEPS).astype(int)):
        for p in np.unique(np.linspace(0, budget - n, STEPS).astype(int)):
            if n or p:
                seconds = steps.step_s(int(p), int(n), int(n * context_tokens), p * context_tokens / 2)
                points.append((p / seconds, n / seconds))
    return _corners(np.array(points))


def _corners(points: FloatArray) -> FloatArray:
    """Corners of the upper right of the convex hull of (P, 2), by falling first coordinate (Andrew's monotone chain)."""
    order = points[np.lexsort((points[:, 1], points[:, 0]))[::-1]]
    kept: list[FloatArray] = []
    for point in order:
        if kept and point[1] <= kept[-1][1]:
            continue
        while len(kept) > 1 and _turns_in(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return np.array(kept)


def _turns_in(a: FloatArray, b: FloatArray, c: FloatArray) -> bool:
    """Whether b lies on or below the line from a to c."""
    return float((c[0] - a[0]) * (b[1] - a[1]) - (c[1] - a[1]) * (b[0] - a[0])) >= 0
