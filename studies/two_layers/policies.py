"""Who decides what: alone at list prices, at the board, and between the two. SIMULATED.

    value of m = V·q̂ − money − λ·l − penalty·V·P(late) − cost to others

Policies differ in the last three terms only. The one that defers gets nothing and takes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from two_layers.play import DEFER, LAST, PENALTY, Decide, Pool, Seconds, live_seconds
from two_layers.world import FloatArray, Window
from walras.supply.resource_prices import CALIBRATION, EngineModel, amounts_of, quote

HORIZON_S = 300.0
"""What a request delays later than that is not charged."""


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What was learned on the first half hour, at the load and the SLA of the cell."""

    sla_s: float
    avoidable: float
    static: Seconds
    ratio: FloatArray
    """(M, S) of true seconds to those believed from gauges."""
    late_price: float
    """USD per second: by how much the expected penalties of a request in flight grow, with its delay."""


def best(values: FloatArray) -> int:
    m = int(np.argmax(values))
    return m if values[m] > 0 else DEFER


def net(
    stream: Window, n: int, seconds: Seconds, beliefs: Beliefs, money: float
) -> tuple[FloatArray, FloatArray]:
    """(M,) net values before what others are charged, and expected seconds."""
    takes, late = seconds.of(int(stream.prompt[n]), stream.answers[n], beliefs.sla_s)
    value = stream.value[n] * (stream.q[n] - PENALTY * late)
    return value - money * stream.believed_usd(n) - stream.delay_price[n] * takes, takes


def isolated(beliefs: Beliefs) -> Decide:
    """The router alone: list prices, and seconds as they were in the log."""

    def decide(_: Pool, stream: Window, n: int) -> int:
        return best(net(stream, n, beliefs.static, beliefs, 1.0)[0])

    return decide


def selfish(beliefs: Beliefs) -> Decide:
    """Sees the engines, and charges nothing for what others wait."""

    def decide(pool: Pool, stream: Window, n: int) -> int:
        seconds = live_seconds(pool.plant, pool.models(), beliefs.ratio)
        return best(net(stream, n, seconds, beliefs, beliefs.avoidable)[0])

    return decide


def board(beliefs: Beliefs) -> Decide:
    """Sees the engines, and charges each use what it is quoted to cost others."""

    def decide(pool: Pool, stream: Window, n: int) -> int:
        models = pool.models()
        value, _ = net(stream, n, live_seconds(pool.plant, models, beliefs.ratio), beliefs, beliefs.avoidable)
        prompt, answer = float(stream.prompt[n]), float(stream.answers[n].mean())
        for m, model in enumerate(models):
            value[m] -= charge(model, prompt, answer, delay_price(pool, stream, m, beliefs))
        return best(value)

    return decide


def charge(model: EngineModel, prompt: Any, answer: Any, price: float) -> Any:
    """What a request is quoted to cost others, USD; numbers, or arrays of requests."""
    prefill_s = model.line_token_s * prompt + model.pair_s * prompt * prompt / 2
    amounts = amounts_of(model.settings, prompt, answer, prefill_s=prefill_s, decode_s=answer * model.token_s)
    return quote(model.prices(price, HORIZON_S, CALIBRATION), amounts)


def delay_price(pool: Pool, stream: Window, m: int, beliefs: Beliefs) -> float:
    """Mean price of delay of those sent to the engine lately, and what their SLA adds."""
    sent = pool.sent[m][-LAST:]
    if not sent:
        return float(stream.delay_price[: n_seen(pool)].mean()) if n_seen(pool) else 0.0
    return float(stream.delay_price[sent].mean()) + beliefs.late_price


def n_seen(pool: Pool) -> int:
    return sum(len(sent) for sent in pool.sent)
