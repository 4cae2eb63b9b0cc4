"""What a use of the engine costs everyone else: the delay of others, measured by running the same future twice. [Z §3.3] [FM-5]

    cost to others = Σ_{j≠i} λ_j·seconds of j in the engine with i − the same without i,        over a horizon

Both futures see the same arrivals, so that the difference is the effect of i alone. What i delays beyond the horizon is not counted,
and in a closed loop a later call is not a delay: a price found here is a lower bound where either matters. One future is one draw:
`externality` takes the mean over several, each a stretch of the trace from another time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from walras.engine.generated import Lengths
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.errors import SettingsError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def gauges(replay: Replay) -> tuple[IntArray, IntArray, FloatArray]:
    """Each (W,): sequences running, requests in line, and the share of KV blocks that sequences hold, now."""
    free = replay.free_blocks
    workers = replay._state.workers
    return workers["running"].copy(), workers["waiting"].copy(), 1.0 - free / replay.settings.kv_blocks


def cost_to_others(replay: Replay, requests: Requests, horizon_s: float) -> FloatArray:
    """(N,) what each of the requests would cost others within the horizon from now, if it alone came as well.

    In USD where requests have prices of delay, else in seconds. The replay itself stays where it is.
    """
    return _with_one_more(replay, requests, horizon_s)[0]


@dataclass(frozen=True, slots=True)
class Externality:
    """What N requests cost others, each alone, in F futures drawn again; and what each itself got. SIMULATED."""

    costs: FloatArray
    """(F, N) in USD where requests have prices of delay, else in seconds."""
    cached_tokens: FloatArray
    """(F, N) of its prompt, found in memory. NaN, here and below, where it did not end within the horizon."""
    queue_s: FloatArray
    prefill_s: FloatArray
    """(F, N) from the step that first computes for it to its first token."""
    decode_s: FloatArray
    """(F, N) from there to its last."""
    worker: IntArray
    """(N,) that served it in the first future in which it ended; −1: in none."""

    @property
    def mean(self) -> FloatArray:
        """(N,)"""
        return np.asarray(self.costs.mean(axis=0))

    @property
    def error(self) -> FloatArray:
        """(N,) standard errors of the means."""
        return np.asarray(self.costs.std(axis=0, ddof=1) / np.sqrt(len(self.costs)))


def futures(
    trace: Requests, count: int, now_s: float, horizon_s: float, random: np.random.Generator
) -> list[Requests | None]:
    """`count` futures from now: stretches of the trace from other times, bursts and all; None where nobody arrives.

    One begins in each of as many equal parts of the trace, at random, and goes on at the trace's beginning where it ends. A prefix that
    fewer than one request in a hundred has gets a new name, so that nobody is served from the memory of what is already there: no
    stretch brings a request twice.
    """
    begin, span = float(trace.arrival_s[0]), float(trace.arrival_s[-1] - trace.arrival_s[0])
    span += span / max(len(trace) - 1, 1)
    common = _common(trace)
    drawn: list[Requests | None] = []
    for start in (np.arange(count) + random.uniform(size=count)) / count * span:
        turns = np.arange(int(np.ceil((start + horizon_s) / span)))
        times = (trace.arrival_s - begin + span * turns[:, None]).ravel() - start
        rows = np.flatnonzero((times >= 0) & (times < horizon_s))
        drawn.append(
            _again(trace, rows % len(trace), now_s + times[rows], common, len(drawn)) if rows.size else None
        )
    return drawn


def _common(trace: Requests) -> IntArray:
    """Prefix ids that at least one request in a hundred has."""
    if trace.prefix_ids is None:
        return np.empty(0, np.int64)
    ids, counts = np.unique(trace.prefix_ids, return_counts=True)
    return ids[counts >= 0.01 * len(trace)]


def _again(trace: Requests, rows: IntArray, arrival_s: FloatArray, common: IntArray, draw: int) -> Requests:
    """Rows of a trace at other times, with new names for the prefixes that are not common."""
    again = _rows(trace, rows, arrival_s)
    if again.prefix_ids is None or trace.prefix_ids is None:
        return again
    ids, names = again.prefix_ids, int(trace.prefix_ids.max(initial=0)) + 1
    return replace(again, prefix_ids=np.where(np.isin(ids, common), ids, ids + (draw + 1) * names))


def _rows(requests: Requests, rows: IntArray, arrival_s: FloatArray) -> Requests:
    """Rows that arrive by themselves then."""
    offsets, ids = requests.prefix_offsets, requests.prefix_ids
    if offsets is not None and ids is not None:
        lengths = np.diff(offsets)[rows]
        ends = np.cumsum(lengths)
        ids = ids[np.repeat(offsets[rows] - ends + lengths, lengths) + np.arange(lengths.sum())]
        offsets = np.append(0, ends)
    columns = {key: getattr(requests, key) for key in ("delay_price", "tenant", "value", "expected_output")}
    return Requests(
        arrival_s,
        requests.input_tokens[rows],
        requests.output_tokens[rows],
        offsets,
        ids,
        **{key: column[rows] for key, column in columns.items() if column is not None},
    )


def externality(
    replay: Replay, requests: Requests, coming: Sequence[Requests | None], horizon_s: float
) -> Externality:
    """What each of the requests, all arriving now or later, costs others in each of the futures `coming`.

    The replay itself, which must have no arrivals of its own to come, stays where it is.
    """
    costs, own = np.empty((len(coming), len(requests))), np.empty((len(coming), len(requests), 5))
    for f, future in enumerate(coming):
        start = replay.snapshot()
        if future is not None:
            start.feed(future)
        costs[f], own[f] = _with_one_more(start, requests, horizon_s)
    ended = ~np.isnan(own[:, :, 4])
    first = own[ended.argmax(axis=0), np.arange(len(requests)), 4]
    worker = np.where(ended.any(axis=0), first, -1).astype(np.int64)
    return Externality(costs, own[:, :, 0], own[:, :, 1], own[:, :, 2], own[:, :, 3], worker)


def _with_one_more(replay: Replay, requests: Requests, horizon_s: float) -> tuple[FloatArray, FloatArray]:
    """(N,) the cost to others of each request; (N, 5) its own tokens found in memory, seconds in line, of prefill, of decoding, and
    worker: NaN where it has not ended within the horizon."""
    now, number = replay.now_s, replay.fed
    base = replay.snapshot().run(now + horizon_s).delay_cost(now)
    costs, own = np.empty(len(requests)), np.full((len(requests), 5), np.nan)
    for row in range(len(requests)):
        branch = replay.branch(add=_one(requests, row)).run(now + horizon_s)
        costs[row] = branch.delay_cost(now, without=[number]) - base
        of = branch.served()
        for k in np.flatnonzero(of.request == number):
            prefill_s = of.ttft_s[k] - of.queue_s[k]
            decode_s = of.latency_s[k] - of.ttft_s[k]
            own[row] = of.cached_tokens[k], of.queue_s[k], prefill_s, decode_s, of.worker[k]
    return costs, own


def _one(requests: Requests, row: int) -> Requests:
    return _rows(requests, np.array([row]), requests.arrival_s[row : row + 1])


@dataclass(frozen=True, slots=True)
class ResourcePrices:
    """Cost to others of one unit more: mean over the probes, and standard error of it. USD, or seconds of others' delay. SIMULATED."""

    prefill_token: float
    """Of a prompt that is not in memory."""
    decode_token: float
    """Its share of the steps it takes part in; the memory it holds is charged apart."""
    kv_block_s: float
    """Of a KV block held for a second."""
    errors: tuple[float, float, float]
    """Standard errors of the three."""
    probes: int
    horizon_s: float


def resource_prices(
    replay: Replay,
    lengths: Lengths,
    until_s: float,
    *,
    probes: int = 64,
    horizon_s: float = 60.0,
    seed: int = 0,
) -> ResourcePrices:
    """Prices of the three resources over the time from now until `until_s`, through which the replay is run.

    At random times the future is run again with a prompt more, with that prompt and an answer, and with a quarter of the free memory
    taken out. Prompt and answer are as long as `lengths` draws them.

    Raises:
        SettingsError: no time to probe, or fewer than two probes.
    """
    if not (np.isfinite(until_s) and until_s > replay.now_s and horizon_s > 0):
        raise SettingsError(f"{until_s} s from {replay.now_s:g} s on", key="until_s", hint="a time after now")
    if probes < 2:
        raise SettingsError(f"{probes} tell no error", key="probes", hint="at least 2")
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(replay.now_s, until_s, probes))
    rows = random.integers(0, len(lengths.input_tokens), probes)
    found = np.empty((probes, 3))
    for k, (time, row) in enumerate(zip(times, rows, strict=True)):
        replay.run(float(time))
        prompt, answer = int(lengths.input_tokens[row]), int(lengths.output_tokens[row])
        found[k] = _probe(replay, prompt, answer, horizon_s)
    replay.run(until_s)
    prefill, decode, kv = (float(mean) for mean in found.mean(axis=0))
    errors = (float(error) for error in found.std(axis=0, ddof=1) / np.sqrt(probes))
    return ResourcePrices(prefill, decode, kv, (next(errors), next(errors), next(errors)), probes, horizon_s)


def _probe(replay: Replay, prompt: int, answer: int, horizon_s: float) -> tuple[float, float, float]:
    """Cost to others of a prefill token, of a decode token, and of a block held for a second, at this moment."""
    now, block, kv = replay.now_s, replay.settings.block_tokens, 0.0
    out = replay.free_blocks // 4
    if out.any():
        base = replay.snapshot().run(now + horizon_s).delay_cost(now)
        tight = replay.branch(block=out.tolist()).run(now + horizon_s).delay_cost(now)
        kv = (tight - base) / (float(out.sum()) * horizon_s)
    extra = Requests(np.full(2, now), np.full(2, prompt), np.array([1, answer + 1]))
    (short, whole), own = _with_one_more(replay, extra, horizon_s)
    brief, long = np.where(np.isnan(own[:, 1]), horizon_s, own[:, 1:4].sum(axis=1))
    held = kv * prompt / block * brief
    more = kv * (prompt / block * (long - brief) + answer / 2 / block * (long - brief))
    return (short - held) / prompt, (whole - short - more) / answer, kv
