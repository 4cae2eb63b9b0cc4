"""Priority and admission at quoted prices: the order of an engine's line follows what its resources cost now. [Z §3.3]

Of two requests that wait, j before k costs λ_k·S_j of delay and k before j costs λ_j·S_k, where S is the engine time that a request
takes: so the one with the larger λ/S goes first (Cox and Smith's cμ rule). S in engine seconds is what the request takes at the
quoted prices, Q, over what an engine second costs at them: prices say how prompt, answer and memory weigh against each other, and
their level, which every request shares, drops out. Turned away is what is worth less than its own delay and its quote:

    V − λ·(S of those ahead in line + own seconds) − Q < 0

Prices are read at intervals, so S, Q and the order of those who come are as old as the last reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from walras.engine.replay import Replay
from walras.engine.settings import EngineSettings, Schedule, work_s
from walras.engine.steps import FloatArray, StepTimes
from walras.errors import SettingsError
from walras.supply.resource_prices import Amounts, ResourcePrices, live_prices, quote
from walras.supply.state import EngineState, state_of

EVERY_S, WINDOW_S = 10.0, 60.0
MOST_PREFILL = 0.9
"""Share of an engine's time for prompts, at most: what slows the answers that run beside them."""


def schedule_at(
    states: Sequence[EngineState],
    prices: Sequence[ResourcePrices],
    settings: EngineSettings,
    steps: StepTimes,
    before: Schedule,
) -> Schedule:
    """`before` with the numbers of these states and prices, one of each for each worker."""
    found = [_numbers(*one, settings, steps) for one in zip(states, prices, strict=True)]
    columns: dict[str, Any] = {key: np.array([numbers[key] for numbers in found]) for key in found[0]}
    return replace(before, **columns)


def _numbers(
    state: EngineState, prices: ResourcePrices, settings: EngineSettings, steps: StepTimes
) -> dict[str, float]:
    """The numbers of a schedule at one worker: what a mean request takes is its engine seconds, `quote` the USD of one of them."""
    n = min(max(round(state.running), 1), settings.max_sequences)
    kv = state.kv_use * settings.kv_blocks * settings.block_tokens
    prompt_s, output_s = work_s(steps, settings, n, kv)
    step_s = steps.step_s(0, n, round(kv), 0.0)
    token_s = step_s / (1 - min(MOST_PREFILL, state.prompt_tokens_per_s * prompt_s))
    seconds = {
        "prompt_token_s": prompt_s,
        "pair_s": steps.prefill_pair_s,
        "output_token_s": output_s,
        "token_s": token_s,
    }
    whole, answer = state.mean_prompt_tokens, state.mean_output_tokens
    new = whole * (1 - state.hit_share)
    pairs = new * (whole - new + 0.5 * (new + 1))
    held = (whole + answer / 2) / settings.block_tokens * answer * token_s
    work = prompt_s * new + steps.prefill_pair_s * pairs + output_s * answer
    usd = quote(prices, Amounts(new, answer, held, 0.0, pairs))
    if not (usd > 0 and work > 0 and prices.prefill_token + prices.decode_token > 0):
        free = {"line": 0.0, "held_token": 0.0, "quote": 0.0}
        return {
            "prompt_token": prompt_s,
            "pair": steps.prefill_pair_s,
            "output_token": output_s,
            **free,
            **seconds,
        }
    level = usd / work
    return {
        "prompt_token": prices.prefill_token / level,
        "pair": prices.attention_pair / level,
        "line": prices.line_s2 * (prices.line_token_s / prompt_s) ** 2 / level if prompt_s > 0 else 0.0,
        "output_token": prices.decode_token / level,
        "held_token": prices.kv_block_s / settings.block_tokens * token_s / level,
        "quote": level,
        **seconds,
    }


def live_schedule(replay: Replay, delay_price: FloatArray, window_s: float = WINDOW_S) -> Schedule:
    """The schedule of a replay at the prices of this moment. SIMULATED.

    Args:
        delay_price: (W,) USD that a second of delay costs the others at a worker, on average.
        window_s: over which rates are taken; the replay needs intervals no longer than that.
    """
    settings, steps = replay.settings, replay.steps
    states = [state_of(replay, w, window_s) for w in range(settings.workers)]
    prices = [
        live_prices(state, settings, steps, float(price))
        for state, price in zip(states, delay_price, strict=True)
    ]
    return schedule_at(states, prices, settings, steps, replay.schedule)


def run_at_prices(
    replay: Replay,
    until_s: float = math.inf,
    *,
    every_s: float = EVERY_S,
    window_s: float = WINDOW_S,
    change: Callable[[Schedule], Schedule] = lambda schedule: schedule,
) -> Replay:
    """Run a replay whose schedule follows live prices, read every `every_s`, at the mean price of delay of those at the worker. SIMULATED.

    Args:
        change: what is made of each new schedule, to see what follows from other prices.

    Raises:
        SettingsError: a time that is not more than 0.
    """
    for key, seconds in (("every_s", every_s), ("window_s", window_s)):
        if not (math.isfinite(seconds) and seconds > 0):
            raise SettingsError(f"{seconds} seconds", key=key, hint="more than 0")
    delay = np.zeros(replay.settings.workers)
    while replay.now_s < until_s and not replay.over:
        now = replay.delay_price
        delay = np.where(np.isnan(now), delay, now)  # of those who were there last, while nobody is
        replay.reschedule(change(live_schedule(replay, delay, window_s)))
        replay.run(min(replay.now_s + every_s, until_s))
    return replay.run(until_s)
