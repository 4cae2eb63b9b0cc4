"""Requests through the engines, one decision at a time. SIMULATED."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from two_layers.world import FloatArray, IntArray, Plant, Window
from walras.engine.externality import gauges
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.steps import StepTimes
from walras.estimate.latency import LatencyModel
from walras.supply.resource_prices import EngineModel
from walras.supply.state import EngineState, state_of

DEFER = -1
PENALTY = 0.5
"""Share of V that is lost when the answer comes after the SLA."""
GAUGE_S, GAUGE_WINDOW_S = 0.5, 5.0
"""Counters are read so often, and rates are over so long."""
RATIOS = 32
LAST = 64
"""Requests over which the router takes means."""
LEAST_RATE = 1e-6
"""Requests a second of an engine that has none: its prices are those of the one that comes."""


@dataclass
class Pool:
    """The engines in the middle of a run, with what each was sent."""

    plant: Plant
    replays: list[Replay]
    sent: list[list[int]]
    """By engine, the requests in the order in which they were sent."""
    lengths: list[tuple[float, float]] = field(default_factory=list)
    """Prompt tokens and expected output tokens of all that was sent."""
    read: tuple[tuple[float, int], list[EngineModel]] | None = None
    """The last reading of the gauges, by time and number sent."""

    @classmethod
    def of(cls, plant: Plant) -> Pool:
        return cls(
            plant,
            [plant.replay(m, None, GAUGE_S) for m in range(len(plant))],
            [[] for _ in range(len(plant))],
        )

    def run(self, until_s: float = np.inf) -> None:
        for replay in self.replays:
            replay.run(until_s)

    def send(self, m: int, n: int, stream: Window) -> None:
        one = slice(n, n + 1)
        self.replays[m].feed(
            Requests(
                stream.arrival_s[one],
                stream.prompt[one],
                stream.output[one],
                delay_price=stream.delay_price[one],
                expected_output=stream.answers[n].mean(keepdims=True),
            )
        )
        self.sent[m].append(n)
        self.lengths.append((float(stream.prompt[n]), float(stream.answers[n].mean())))

    def models(self) -> list[EngineModel]:
        """Each engine by the gauges of the replica that has least to do, where the next request goes."""
        now = (self.replays[0].now_s, len(self.lengths))
        if self.read is None or self.read[0] != now:
            states = [self.known(least(replay)) for replay in self.replays]
            models = [
                EngineModel.of(state, replay.settings, replay.steps)
                for state, replay in zip(states, self.replays, strict=True)
            ]
            self.read = (now, models)
        return self.read[1]

    def known(self, state: EngineState) -> EngineState:
        """Gauges with the mean lengths of the router's own books: an engine that was idle for a while says nothing of those to come."""
        if not self.lengths:
            return state
        prompt, output = np.mean(self.lengths[-LAST:], axis=0)
        arrivals = max(state.prompt_tokens_per_s / prompt, LEAST_RATE)
        return replace(
            state,
            arrivals_per_s=arrivals,
            prompt_tokens_per_s=arrivals * prompt,
            mean_prompt_tokens=prompt,
            mean_output_tokens=output,
        )


def least(replay: Replay) -> EngineState:
    running, waiting, _ = gauges(replay)
    return state_of(replay, int(np.argmin(running + waiting)), GAUGE_WINDOW_S)


Decide = Callable[[Pool, Window, int], int]


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a window."""

    choice: IntArray
    """(N,) model, or DEFER."""
    latency_s: FloatArray
    """(N,) 0 where deferred."""


def play(plant: Plant, stream: Window, decide: Decide, around: tuple[int, int, Decide] | None = None) -> Run:
    """Each request, as it comes, goes where `decide` says; the run ends when all are answered.

    Args:
        around: so many first and so many last requests go where another one says, so that engines are neither empty nor left to themselves.
    """
    pool = Pool.of(plant)
    choice = np.full(len(stream), DEFER)
    before, after, other = around or (0, 0, decide)
    for n in range(len(stream)):
        pool.run(float(stream.arrival_s[n]))
        who = decide if before <= n < len(stream) - after else other
        choice[n] = who(pool, stream, n)
        if choice[n] != DEFER:
            pool.send(int(choice[n]), n, stream)
    pool.run()
    return Run(choice, latencies(pool, len(stream)))


def latencies(pool: Pool, count: int) -> FloatArray:
    latency = np.zeros(count)
    for replay, sent in zip(pool.replays, pool.sent, strict=True):
        served = replay.served()
        latency[np.asarray(sent, np.int64)[served.request]] = served.latency_s
    return latency


def welfare(stream: Window, run: Run, sla_s: float, avoidable: float, *, luck: bool = False) -> FloatArray:
    """(N,) V·outcome − avoidable money − λ·latency − penalty if late, USD; 0 where deferred.

    Without `luck` the mean outcome of the class on the judged half stands in for the row's own: rows are drawn from their class at random
    and no policy sees more than the class, so that the expectation is the same and the noise of coin throws is gone.
    """
    rows, m = np.arange(len(stream)), np.maximum(run.choice, 0)
    late = run.latency_s > sla_s
    worth = (
        stream.value * ((stream.outcome if luck else stream.q_true)[rows, m] - PENALTY * late)
        - avoidable * stream.usd[rows, m]
        - stream.delay_price * run.latency_s
    )
    return np.where(run.choice == DEFER, 0.0, worth)


def bounds(stream: Window, plant: Plant, sla_s: float, avoidable: float) -> tuple[float, float]:
    """Two upper bounds on welfare, USD: of whoever knows outcomes beforehand, and in the mean over draws of the rows of whoever knows
    only what outcomes are likely.

    Nobody is answered faster than alone (a step with more in it is not shorter), so that each request's best net value with nobody else
    there is a bound. Without the outcome, the best is by its mean given the class, and an expectation of a maximum over what is seen is
    not above that, since a row is drawn from its class at random.
    """
    alone = plant.alone_s(stream.prompt, stream.output)
    takes = avoidable * stream.usd + stream.delay_price[:, None] * alone
    takes += PENALTY * stream.value[:, None] * (alone > sla_s)
    known = (stream.value[:, None] * stream.outcome - takes).max(axis=1)
    likely = (stream.value[:, None] * stream.q_true - takes).max(axis=1)
    return float(np.maximum(known, 0).sum()), float(np.maximum(likely, 0).sum())


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long answers are believed to take: base + prompt·tokens + output·tokens, times a ratio drawn from `ratio`."""

    base: FloatArray
    """(M,)"""
    prompt: FloatArray
    output: FloatArray
    ratio: FloatArray
    """(M, S) equally likely ratios of true to believed."""

    def of(self, prompt: int, answers: IntArray, sla_s: float) -> tuple[FloatArray, FloatArray]:
        """(M,) expected seconds, and probability to be later than the SLA."""
        plain = (self.base + self.prompt * prompt)[:, None] + self.output[:, None] * answers[None, :]
        every = plain[:, :, None] * self.ratio[:, None, :]
        return every.mean(axis=(1, 2)), (every > sla_s).mean(axis=(1, 2))

    def mean(self, prompt: IntArray, answer: FloatArray) -> FloatArray:
        """(J, M) expected seconds of J requests."""
        plain = self.base + self.prompt * prompt[:, None] + self.output * answer[:, None]
        return np.asarray(plain * self.ratio.mean(axis=1))


def static_seconds(model: LatencyModel) -> Seconds:
    """Learned from a log, whatever the engine does now."""
    base, prompt, output, _ = model.coefficients.T
    return Seconds(base, prompt, output, model.noise)


def live_seconds(plant: Plant, models: list[EngineModel], ratio: FloatArray) -> Seconds:
    """From gauges: what waits is computed first, then the prompt; then each token takes a step of the batch as it is, of which prompts
    of others take their share."""
    base, prompt, output = np.array(
        [_live(one, steps) for one, steps in zip(models, plant.steps, strict=True)]
    ).T
    return Seconds(base, prompt, output, ratio)


def _live(model: EngineModel, steps: StepTimes) -> tuple[float, float, float]:
    state, settings = model.state, model.settings
    most, n = settings.max_sequences, min(round(state.running), settings.max_sequences - 1)
    token_s = model.prefill_s + model.pair_s * state.mean_prompt_tokens / 2
    prefill = min(0.9, state.prompt_tokens_per_s * token_s)
    kv = state.kv_use * settings.kv_blocks * settings.block_tokens
    step_s = steps.step_s(0, n + 1, int(kv * (n + 1) / max(n, 1)), 0.0) / (1 - prefill)
    behind = state.waiting * state.mean_prompt_tokens * token_s
    if state.running >= most or state.kv_use > 0.9:
        behind = max(behind, (state.waiting + 1) * state.mean_output_tokens * step_s / max(n, 1))
    return behind + step_s, token_s, step_s
