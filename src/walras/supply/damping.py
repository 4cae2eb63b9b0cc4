"""Routing by prices that are old and noisy, without a herd. [Z §3.3]

Whoever reads the same old price sends to the same engine, until its price, when it is read at last, sends everybody elsewhere. Two ways
out, which go together:

- `nowcast`: a router knows what it has sent since the reading, and adds it.
- `temperature`, `shares` and `Turns`: what it cannot know it spreads, in logit shares exp(−cost / T), taken in turns.

How wide is a matter of age. M like engines get `a` requests a second, a request more in one of them raises its cost by g, requests stay S
seconds, and costs are d seconds old. The deviation y of an engine's load from the mean then follows, near balance,

    y′(t) = −y(t) / S − k · y(t − d),        k = a·g / (M·T)

Its solutions die out for k ≤ 1/S, whatever d is (Hayes 1950), and for k·d ≤ 1/e, where without the first term none of them
oscillates (Győri and Ladas 1991); a cold T swings for ever. So T = g·(a/M)·min(e·d, S) is enough: what a reading's age of the herd, or,
for an old reading, all that an engine holds, adds to its cost. Costs with errors of standard deviation σ add √6·σ/π: shares then
are about the odds that an engine is the cheapest.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from walras.errors import QuantityError
from walras.supply.resource_prices import EngineModel
from walras.supply.state import EngineState

FloatArray = NDArray[np.float64]


def temperature(
    age_s: float, *, arrivals_per_s: float, slope: float, stay_s: float, engines: int, error: float = 0.0
) -> float:
    """T in USD, for costs of that age.

    Args:
        arrivals_per_s: of all engines together that are not in the costs: none where a router sends alone and nowcasts.
        slope: g, USD by which one request more in an engine raises its cost.
        stay_s: S, seconds of a request in an engine.
        error: standard deviation of the costs' errors, USD.

    Raises:
        QuantityError: a number that is negative or not finite, or no engine.
    """
    given = {
        "age_s": age_s,
        "arrivals_per_s": arrivals_per_s,
        "slope": slope,
        "stay_s": stay_s,
        "error": error,
    }
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise QuantityError(f"{name} is {value}; it must be finite and ≥ 0")
    if engines < 1:
        raise QuantityError(f"{engines} engines; there must be one at least")
    herd = slope * arrivals_per_s / engines * min(math.e * age_s, stay_s)
    return herd + math.sqrt(6) / math.pi * error


def shares(costs: FloatArray, temperature: float) -> FloatArray:
    """(M,) of requests by engine: exp(−cost / T) over their sum; at T = 0 all to the cheapest, evenly among equals."""
    ahead = costs - costs.min()
    with np.errstate(over="ignore"):  # far too dear for so cold a temperature
        weights = np.exp(-ahead / temperature) if temperature > 0 else (ahead == 0).astype(np.float64)
    return np.asarray(weights / weights.sum())


class Turns:
    """Engines in turns by shares: what follows shares closely is steadier than drawing by them, and at even shares it is round-robin.

    An engine is never ahead of the sum of its shares by a request: the one that is chosen has most credit, at least 1 / M, and pays 1.
    """

    def __init__(self, engines: int) -> None:
        self._credit = np.zeros(engines)

    def take(self, shares: FloatArray) -> int:
        """The engine whose turn it is, where each gets these shares (M,)."""
        self._credit += shares
        engine = int(np.argmax(self._credit))
        self._credit[engine] -= 1.0
        return engine


def stay(read: EngineModel) -> float:
    """Seconds of a mean request in the engine, once it is its turn."""
    prompt = read.state.mean_prompt_tokens
    return (
        read.line_token_s + read.pair_s * prompt / 2
    ) * prompt + read.state.mean_output_tokens * read.token_s


def nowcast(read: EngineModel, sent_s: FloatArray, size: FloatArray, now_s: float) -> EngineState:
    """The state now, by an older reading and what one router alone has sent since.

    The line moves up by one in `request_s`; of those in the engine e^(−t/S) are left after t seconds.

    Args:
        sent_s: when it sent what came after the reading, in order.
        size: the prompt of each over the mean prompt, for a longer one holds up the line longer.

    Raises:
        QuantityError: a request sent before the reading, or after now.
    """
    state, settings = read.state, read.settings
    if not now_s >= state.at_s or (sent_s.size and not (state.at_s <= sent_s[0] and sent_s[-1] <= now_s)):
        raise QuantityError(f"what was sent since {state.at_s:g} s must have been sent by {now_s:g} s")
    line, at = state.waiting, state.at_s
    for sent, more in zip(sent_s, size, strict=True):
        line, at = max(0.0, line - _moved(sent - at, read)) + more, float(sent)
    line = max(0.0, line - _moved(now_s - at, read))
    stay_s = stay(read)
    inside = (state.running + state.waiting) * _left(now_s - state.at_s, stay_s)
    inside += sum(_left(now_s - float(sent), stay_s) for sent in sent_s)
    running = min(max(inside - line, 0.0), float(settings.max_sequences))
    held = state.mean_prompt_tokens + state.mean_output_tokens / 2
    memory = settings.kv_blocks * settings.block_tokens
    kv_use = min(max(state.kv_use + (running - state.running) * held / memory, 0.0), 1.0)
    return dataclasses.replace(state, at_s=now_s, running=running, waiting=float(line), kv_use=kv_use)


def _moved(seconds: float, read: EngineModel) -> float:
    return seconds / read.request_s if read.request_s > 0 else math.inf


def _left(seconds: float, stay_s: float) -> float:
    return math.exp(-seconds / stay_s) if stay_s > 0 else float(seconds <= 0)
