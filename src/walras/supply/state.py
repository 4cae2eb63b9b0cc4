"""An engine as its gauges and counters tell it, one worker at a moment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from walras.errors import QuantityError

if TYPE_CHECKING:
    from walras.engine.replay import Replay


@dataclass(frozen=True, slots=True)
class EngineState:
    """One worker. Gauges are of the moment, rates and means over a recent window.

    Raises:
        QuantityError: a number that is negative or not finite, or a share above 1.
    """

    at_s: float
    """When it was read: seconds since 1970 of a live engine, since the beginning of a replay."""
    running: float
    """Sequences in the batch."""
    waiting: float
    """Requests in line."""
    kv_use: float
    """Share of the KV blocks that sequences hold, 0 to 1."""
    arrivals_per_s: float
    prompt_tokens_per_s: float
    """Computed, not found in memory."""
    output_tokens_per_s: float
    hit_share: float
    """Of the prompt tokens, found in memory, 0 to 1."""
    preemptions_per_s: float
    mean_prompt_tokens: float
    """Of a request, found in memory or not."""
    mean_output_tokens: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (np.isfinite(value) and value >= 0):
                raise QuantityError(f"engine state: {field.name} is {value}; it must be finite and ≥ 0")
        for name in ("kv_use", "hit_share"):
            if getattr(self, name) > 1:
                raise QuantityError(
                    f"engine state: {name} is {getattr(self, name)}; a share is 1 at most (a percentage?)"
                )


def state_of(replay: Replay, worker: int, window_s: float) -> EngineState:
    """What the gauges of a replay's worker say now, rates over the last `window_s` (less near its beginning). SIMULATED.

    Rates end with the last whole interval of the replay; a worker that has not yet seen one has rates 0.
    """
    from walras.engine.externality import gauges  # noqa: PLC0415 - the service reads states, and needs no simulated engine

    if not 0 <= worker < replay.settings.workers:
        raise QuantityError(f"there is no worker {worker}; workers are 0 to {replay.settings.workers - 1}")
    running, waiting, kv_use = gauges(replay)
    past = replay.intervals()
    if not past.end_s.size:
        return EngineState(
            replay.now_s, running[worker], waiting[worker], kv_use[worker], 0, 0, 0, 0, 0, 0, 0
        )
    step = float(past.end_s[0]) if past.end_s.size == 1 else float(past.end_s[1] - past.end_s[0])
    last = min(len(past.end_s), max(1, round(window_s / step)))
    seconds = last * step

    def per_s(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
        return float(counts[-last:, worker].sum()) / seconds

    inside = past.running[:, worker] + past.waiting[:, worker]
    before = float(inside[-last - 1]) if len(inside) > last else 0.0
    finished, computed, found = per_s(past.finished), per_s(past.prompt_tokens), per_s(past.hit_tokens)
    arrivals = max(0.0, finished + (float(inside[-1]) - before) / seconds)
    output = per_s(past.output_tokens)
    return EngineState(
        at_s=replay.now_s,
        running=float(running[worker]),
        waiting=float(waiting[worker]),
        kv_use=float(kv_use[worker]),
        arrivals_per_s=arrivals,
        prompt_tokens_per_s=computed,
        output_tokens_per_s=output,
        hit_share=found / (found + computed) if found + computed > 0 else 0.0,
        preemptions_per_s=per_s(past.preemptions),
        mean_prompt_tokens=(found + computed) / arrivals if arrivals > 0 else 0.0,
        mean_output_tokens=output / finished if finished > 0 else 0.0,
    )
