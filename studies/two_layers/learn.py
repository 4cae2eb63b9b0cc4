"""What the router has learned before the window that is judged: how long answers take, and what a second of delay costs. SIMULATED.

Beliefs change what is sent where, and so what is learned next. Both the router alone and the board learn in `ROUNDS` rounds on the first
half hour and keep, of all rounds, the beliefs that did best there: a round may be worse than the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from two_layers.play import (
    PENALTY,
    RATIOS,
    Decide,
    Pool,
    Run,
    Seconds,
    live_seconds,
    play,
    static_seconds,
    welfare,
)
from two_layers.policies import Beliefs, board, isolated
from two_layers.world import Coupling, FloatArray, IntArray, Plant, Window, plant, scale_of, sized_for, window
from walras.estimate.latency import LatencyModel

COUNT = 600
"""Requests of a learning run."""
TRIED = 0.25
"""Share of them that go to a model at random, so that the log knows every model."""
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything of a cell but its window."""

    plant: Plant
    rate: float
    """Requests a second."""
    beliefs: Beliefs
    learned: tuple[float, float]
    """Welfare over ΣV on the learning run, of the router alone and of the board."""


@cache
def setting(trace: str, coupling: Coupling, load: float, sla: float) -> Setting:
    """Learn from the first half hour of the trace and the first half of the rows.

    Args:
        sla: times what a mean request takes alone on the slowest engine.
    """
    sla_s = sla * scale_of(trace)[1]
    stream = window(trace, coupling, 1.0, COUNT, 0, train=True)
    single = plant(coupling.engines, (1,) * stream.outcome.shape[1])
    idle = alone_seconds(single, stream)
    beliefs = Beliefs(sla_s, coupling.avoidable, idle, np.ones((len(single), 1)), 0.0)
    alone = isolated(beliefs)
    wants = np.array([alone(Pool.of(single), stream, n) for n in range(COUNT)])
    engines, full = sized_for(coupling.engines, stream, wants, coupling.planned)
    stream = replace(stream, arrival_s=stream.arrival_s / (load * full))
    beliefs, first = best_round(engines, stream, beliefs, isolated, static_round)
    beliefs, second = best_round(engines, stream, beliefs, board, board_round)
    return Setting(engines, load * full, beliefs, (first, second))


def alone_seconds(engines: Plant, stream: Window) -> Seconds:
    takes = engines.alone_s(stream.prompt, stream.output)
    tokens = [
        np.repeat(c[:, None], takes.shape[1], axis=1).astype(float) for c in (stream.prompt, stream.output)
    ]
    return static_seconds(LatencyModel.fit(takes, *tokens))


Round = Callable[[Plant, Window, Beliefs, Run, FloatArray], Beliefs]


def best_round(
    engines: Plant, stream: Window, beliefs: Beliefs, policy: Callable[[Beliefs], Decide], learn: Round
) -> tuple[Beliefs, float]:
    """The beliefs of the round that did best, and its welfare over ΣV."""
    kept, most = beliefs, -np.inf
    for _ in range(ROUNDS):
        run, table = noted(engines, stream, policy(beliefs), gauges=policy is board)
        got = float(welfare(stream, run, beliefs.sla_s, beliefs.avoidable).sum() / stream.value.sum())
        if got > most:
            kept, most = beliefs, got
        beliefs = learn(engines, stream, beliefs, run, table)
    return kept, most


def noted(engines: Plant, stream: Window, decide: Decide, *, gauges: bool) -> tuple[Run, FloatArray]:
    """The policy with now and then a model at random; and what each request would take by the gauges, where they are
    looked at, (N, M), were its answer known."""
    random, believed = np.random.default_rng(7), np.empty((len(stream), len(engines)))
    ones = np.ones((len(engines), 1))

    def tries(pool: Pool, stream: Window, n: int) -> int:
        if gauges:
            seconds = live_seconds(engines, pool.models(), ones)
            believed[n] = seconds.of(int(stream.prompt[n]), stream.output[n : n + 1], np.inf)[0]
        if random.random() < TRIED:
            return int(random.integers(len(engines)))
        return decide(pool, stream, n)

    return play(engines, stream, tries), believed


def static_round(engines: Plant, stream: Window, beliefs: Beliefs, run: Run, _: FloatArray) -> Beliefs:
    def by_model(column: FloatArray | IntArray) -> FloatArray:
        return np.where(run.choice[:, None] == np.arange(len(engines)), column[:, None], np.nan)

    log = LatencyModel.fit(by_model(run.latency_s), by_model(stream.prompt), by_model(stream.output))
    return replace(beliefs, static=static_seconds(log))


def board_round(engines: Plant, stream: Window, beliefs: Beliefs, run: Run, believed: FloatArray) -> Beliefs:
    """How far off the gauges were, and what a second of delay costs by the SLA."""
    levels = (np.arange(RATIOS) + 0.5) / RATIOS
    took = [run.latency_s[run.choice == m] / believed[run.choice == m, m] for m in range(len(engines))]
    ratio = np.stack([np.quantile(of, levels) for of in took])
    return replace(beliefs, ratio=ratio, late_price=late_price(stream, run, beliefs.sla_s))


def late_price(stream: Window, run: Run, sla_s: float) -> float:
    """Mean of penalty × density of latency at the SLA, over those answered, USD per second: within 20% of it."""
    answered = run.choice >= 0
    near = answered & (np.abs(run.latency_s - sla_s) < 0.2 * sla_s)
    return float(PENALTY * stream.value[near].sum() / (0.4 * sla_s) / max(answered.sum(), 1))
