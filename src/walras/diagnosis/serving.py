"""A replay from end to end: what traffic waits for, at this rate and at others, and what the engine's resources are worth. SIMULATED."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from walras.engine.externality import ResourcePrices, resource_prices
from walras.engine.generated import Lengths
from walras.engine.profiles import Profile
from walras.engine.replay import Intervals, Replay, Served
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.engine.steps import StepTimes
from walras.engine.traces import Trace
from walras.errors import RecordError, SettingsError
from walras.supply.scheduling import run_at_prices

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Resource = Literal["prefill", "decode", "kv"]

KEPT = 1 << 20
"""Latencies kept as they are; more than these are counted in bins."""
BIN, LEAST_S, BINS = math.log1p(1e-3), 1e-6, 32_000
"""A bin is 0.1% wide; the first ends at LEAST_S, the last beyond a year."""
INTERVALS, MOST_INTERVALS = 1000, 1_000_000
"""Intervals of a replay where nobody says how long one is, about; and the most there may be."""
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
WIDEST = 64.0
"""A sweep looks for the knee up to so many times the rate, and down to its inverse."""
SWEPT = 20_000
"""Requests of each run of a sweep, at most."""
MIDDLE = 0.9
"""Rates are taken between the tenth and the last tenth of the requests to end: a trace begins with nothing and ends with stragglers."""
PRICED_S = 5.0
"""Seconds of an interval that a schedule reads its rates from, where nobody asks for intervals."""
SURE = 2.0
"""Standard errors that a price must be above 0 to count."""


# --- traffic ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests to replay, in pieces that can be had again and again."""

    name: str
    pieces: Callable[[], Iterator[Requests]]
    lengths: Lengths
    """Like those of the requests."""
    prefix_tokens: int
    """Tokens that one prefix id names; 0: there are none."""
    trace: Trace | None = None
    """Where it was read; None: it is generated."""
    speed: float = 1.0
    """Arrivals come so many times as fast; think time stays."""
    most: int | None = None
    """Only so many requests, from the first."""
    delay_price: float | None = None
    """USD per second of each request's delay, or their mean where the trace has its own; None: unknown."""

    def __iter__(self) -> Iterator[Requests]:
        left = self.most
        for piece in self.pieces():
            if left is not None:
                if left == 0:
                    return
                piece = _first(piece, left)  # noqa: PLW2901 - a piece is cut and changed before it is handed on
                left -= len(piece)
            yield self._as_asked(piece)

    def _as_asked(self, piece: Requests) -> Requests:
        # A trace may count from any day; a replay begins with its first request, which follows none.
        begin = 0.0 if self.trace is None else float(piece.arrival_s[0])
        if self.speed == 1 and self.delay_price is None and begin == 0:
            return piece
        arrival = (piece.arrival_s - begin) / self.speed
        if piece.after is not None:
            arrival = np.where(piece.after < 0, arrival, piece.arrival_s)
        price = piece.delay_price
        if price is None and self.delay_price is not None:
            price = np.full(len(piece), self.delay_price)
        return dataclasses.replace(piece, arrival_s=arrival, delay_price=price)

    def faster(self, factor: float, most: int) -> Traffic:
        """The same at `factor` times its rate, at most `most` requests of it."""
        fewer = most if self.most is None else min(most, self.most)
        return dataclasses.replace(self, speed=self.speed * factor, most=fewer)

    def named(self, rows: IntArray) -> list[str]:
        """What requests are called: their names, else rows of the trace, else places, from 1."""
        trace = self.trace
        if trace is None:
            return [str(row + 1) for row in rows.tolist()]
        names = trace.requests.names
        return [str(name) for name in (trace.rows[rows] if names is None else names[rows]).tolist()]

    def in_file(self, error: RecordError) -> RecordError:
        return error if self.trace is None else self.trace.in_file(error)


def _first(requests: Requests, count: int) -> Requests:
    """The first rows; what follows a row comes after it, so sessions stay whole up to there."""
    if count >= len(requests):
        return requests
    cut = {
        column.name: value[:count]
        for column in dataclasses.fields(requests)
        if (value := getattr(requests, column.name)) is not None
    }
    if requests.prefix_offsets is not None and requests.prefix_ids is not None:
        cut["prefix_offsets"] = requests.prefix_offsets[: count + 1]
        cut["prefix_ids"] = requests.prefix_ids[: requests.prefix_offsets[count]]
    return Requests(**cut)


def _last_arrival(requests: Requests) -> float:
    """Of those that arrive by themselves, of which there is always one: the first row follows none."""
    alone = requests.arrival_s if requests.after is None else requests.arrival_s[requests.after < 0]
    return float(alone[-1])


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Latencies:
    """Seconds of any number of requests in bounded memory: exact up to KEPT, then in bins of 0.1%."""

    count: int = 0
    total: float = 0.0
    most: float = 0.0
    _kept: list[FloatArray] = field(default_factory=list)
    _bins: IntArray | None = None

    def add(self, seconds: FloatArray) -> None:
        if not seconds.size:
            return
        self.count += seconds.size
        self.total += float(seconds.sum())
        self.most = max(self.most, float(seconds.max()))
        self._kept.append(seconds)
        if self._bins is not None or self.count > KEPT:
            if self._bins is None:
                self._bins = np.zeros(BINS, np.int64)
            place = np.log(np.maximum(np.concatenate(self._kept), LEAST_S) / LEAST_S) / BIN
            self._bins += np.bincount(np.minimum(np.ceil(place).astype(np.int64), BINS - 1), minlength=BINS)
            self._kept = []

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def quantiles(self, shares: FloatArray) -> FloatArray:
        """Seconds that these shares of the requests do not exceed; NaN where there are no requests."""
        if not self.count:
            return np.full(len(shares), np.nan)
        if self._bins is None:
            self._kept = [np.concatenate(self._kept)]
            return np.asarray(np.quantile(self._kept[0], shares), dtype=np.float64)
        at = np.searchsorted(np.cumsum(self._bins), shares * self.count, side="left")
        middle = LEAST_S * np.exp(BIN * (np.minimum(at, BINS - 1) - 0.5))
        return np.asarray(np.where(at == 0, 0.0, np.minimum(middle, self.most)), dtype=np.float64)

    def quantile(self, share: float) -> float:
        return float(self.quantiles(np.array([share]))[0])


@dataclass(frozen=True, slots=True)
class Timeline:
    """T intervals of all workers together: states at the end of each, counts over each."""

    interval_s: float
    end_s: FloatArray
    running: IntArray
    waiting: IntArray
    kv_use: FloatArray
    """Share of all KV blocks that sequences hold."""
    output_tokens: IntArray
    prompt_tokens: IntArray
    hit_tokens: IntArray
    preemptions: IntArray
    finished: IntArray

    def __len__(self) -> int:
        return len(self.end_s)

    @classmethod
    def of(cls, interval_s: float, pieces: list[Intervals]) -> Timeline:
        columns = {}
        for key in (f.name for f in dataclasses.fields(Intervals)):
            whole = np.concatenate([getattr(piece, key) for piece in pieces])
            columns[key] = (
                whole if key == "end_s" else whole.mean(axis=1) if key == "kv_use" else whole.sum(axis=1)
            )
        return cls(interval_s, **columns)

    def table(self) -> pa.Table:
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "interval_s"}
        return pa.table(columns | {"simulated": np.ones(len(self), np.bool_)})


@dataclass(frozen=True, slots=True)
class Engine:
    """What traffic is replayed through."""

    settings: EngineSettings
    profile: Profile
    steps: StepTimes
    routing: Routing


@dataclass(slots=True)
class Played:
    """What became of traffic in an engine. SIMULATED."""

    requests: int = 0
    cpu_s: float = 0.0
    """Of this machine, for the replay alone."""
    last_arrival_s: float = 0.0
    end_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    turned_away: int = 0
    queue: Latencies = field(default_factory=Latencies)
    ttft: Latencies = field(default_factory=Latencies)
    tpot: Latencies = field(default_factory=Latencies)
    """Of requests with more than one token."""
    latency: Latencies = field(default_factory=Latencies)
    ends: Latencies = field(default_factory=Latencies)
    """When requests ended, from the beginning."""
    timeline: Timeline | None = None

    def _add(self, served: Served) -> None:
        if not len(served):
            return
        self.end_s = max(self.end_s, float(served.end_s.max()))
        self.cached_tokens += int(served.cached_tokens.sum())
        self.preemptions += int(served.preemptions.sum())
        self.queue.add(served.queue_s)
        self.ttft.add(served.ttft_s)
        self.tpot.add(served.tpot_s[served.tpot_s > 0])
        self.latency.add(served.latency_s)
        self.ends.add(served.end_s)

    @property
    def kv_hit_ratio(self) -> float:
        """Share of the prompt tokens that were in memory."""
        return self.cached_tokens / self.input_tokens

    @property
    def arrivals_per_s(self) -> float:
        return self.requests / self.last_arrival_s if self.last_arrival_s > 0 else math.inf

    @property
    def steady_s(self) -> tuple[float, float]:
        """From when to when the middle of the requests ended: without the start, and without the last few."""
        begin, end = self.ends.quantiles(np.array([1 - MIDDLE, MIDDLE])).tolist()
        return begin, end

    @property
    def completed_per_s(self) -> float:
        """Requests that ended per second, over their middle."""
        begin, end = self.steady_s
        return (2 * MIDDLE - 1) * self.requests / (end - begin) if end > begin else self.requests / self.end_s

    @property
    def input_tokens_per_s(self) -> float:
        return self.input_tokens / self.requests * self.completed_per_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.requests * self.completed_per_s


def interval_of(traffic: Traffic, wanted_s: float | None) -> float:
    """Seconds of an interval: as wanted, or a round number that cuts the arrivals in about INTERVALS."""
    piece = next(iter(traffic))
    more = 1.0 if traffic.trace or not traffic.most else max(1.0, traffic.most / len(piece))
    last_s = _last_arrival(piece) * more
    if wanted_s is None:
        least = last_s / INTERVALS
        scale = 10.0 ** math.floor(math.log10(least)) if least > 0 else 0.0
        return max(0.1, next((k * scale for k in (1, 2, 5) if k * scale >= least), 10 * scale))
    if not (math.isfinite(wanted_s) and wanted_s > 0 and last_s / wanted_s <= MOST_INTERVALS):
        raise SettingsError(
            f"{wanted_s:g} s",
            key="--interval",
            hint=f"more than 0, and at most {MOST_INTERVALS:,} intervals",
        )
    return wanted_s


def warm_up(engine: Engine) -> None:
    """Compile what a replay runs, so that its processor seconds are its own."""
    one = np.ones(1, np.int64)
    Replay(engine.settings, engine.steps, engine.routing, Requests(np.zeros(1), one, one)).run().served()


def play(
    engine: Engine,
    traffic: Traffic,
    *,
    interval_s: float | None = None,
    sink: Callable[[pa.Table], None] | None = None,
    on_requests: Callable[[int], None] = lambda _: None,
) -> Played:
    """Replay all of it; `sink` gets what became of each request, as tables.

    Raises:
        RecordError: a request that this engine can never serve; names the trace's row and column.
    """
    schedule = engine.settings.schedule
    priced = schedule.admission or schedule.order == "priced"
    every_s = interval_s or (PRICED_S if priced else None)
    replay = Replay(engine.settings, engine.steps, engine.routing, interval_s=every_s)
    found, intervals, open_ = Played(), [], _Open()

    def run(until_s: float = math.inf) -> None:
        if priced:
            run_at_prices(replay, until_s)
        else:
            replay.run(until_s)

    def take() -> None:
        served = replay.take()
        found._add(served)
        on_requests(len(served))
        if interval_s is not None:
            intervals.append(replay.take_intervals())
        if sink is not None and len(served):
            sink(_table(traffic, served, open_.close(served.request)))

    for piece in traffic:
        if sink is not None:
            open_.add(piece, found.requests)
        found.requests += len(piece)
        found.input_tokens += int(piece.input_tokens.sum())
        found.output_tokens += int(piece.output_tokens.sum())
        found.last_arrival_s = _last_arrival(piece)
        begin = time.process_time()
        try:
            replay.feed(piece)
        except RecordError as error:
            raise traffic.in_file(error) from error
        # The next piece may begin at the very time at which this one ends.
        run(float(np.nextafter(found.last_arrival_s, -np.inf)))
        found.cpu_s += time.process_time() - begin
        take()
    begin = time.process_time()
    run()
    found.cpu_s += time.process_time() - begin
    take()
    found.turned_away = len(replay.turned_away())
    if interval_s is not None:
        found.timeline = Timeline.of(interval_s, intervals)
    return found


@dataclass(slots=True)
class _Open:
    """Lengths of the requests that have been fed and not ended."""

    columns: IntArray = field(default_factory=lambda: np.empty((3, 0), np.int64))
    """Places, prompt tokens, output tokens."""

    def add(self, piece: Requests, first: int) -> None:
        new = [np.arange(first, first + len(piece)), piece.input_tokens, piece.output_tokens]
        self.columns = np.concatenate([self.columns, np.stack(new)], axis=1)

    def close(self, requests: IntArray) -> IntArray:
        """(2, N) lengths of these, which are open no more."""
        at = np.searchsorted(self.columns[0], requests)
        found = self.columns[1:, at]
        self.columns = np.delete(self.columns, at, axis=1)
        return found


def _table(traffic: Traffic, served: Served, lengths: IntArray) -> pa.Table:
    """What became of each request, as columns."""
    columns = {
        "request": traffic.named(served.request),
        "arrival_s": served.arrival_s,
        "input_tokens": lengths[0],
        "output_tokens": lengths[1],
    }
    same = (
        "queue_s",
        "ttft_s",
        "tpot_s",
        "latency_s",
        "end_s",
        "cached_tokens",
        "preemptions",
        "worker",
        "prefill_worker",
    )
    columns |= {key: getattr(served, key) for key in same}
    return pa.table(columns | {"simulated": np.ones(len(served), np.bool_)})


# --- prices of resources ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worth:
    """What using the engine costs others, per unit and in all. SIMULATED. [Z §3.3]"""

    prices: ResourcePrices
    unit: Literal["s", "usd"]
    """Seconds of others' delay, or USD where a price of delay was given."""
    per_s: dict[Resource, float]
    """Price × units used per second of the replay."""

    @property
    def short(self) -> Resource | None:
        """What is dearest in all; None where nothing delays anybody."""
        most = max(self.per_s, key=lambda resource: self.per_s[resource])
        return most if self.per_s[most] > 0 else None

    @property
    def sure(self) -> bool:
        """Whether the price of what is short is clearly above its error."""
        return self.short is not None and self.price(self.short) > SURE * self.error(self.short)

    def price(self, resource: Resource) -> float:
        return {
            "prefill": self.prices.prefill_token,
            "decode": self.prices.decode_token,
            "kv": self.prices.kv_block_s,
        }[resource]

    def error(self, resource: Resource) -> float:
        return dict(zip(("prefill", "decode", "kv"), self.prices.errors, strict=True))[resource]


def worth(
    engine: Engine, traffic: Traffic, played: Played, probes: int, horizon_s: float, seed: int
) -> Worth:
    """Prices over the traffic's first piece, found by running futures twice; and which resource is short."""
    piece = next(iter(traffic))
    replay = Replay(engine.settings, engine.steps, engine.routing, piece, interval_s=None)
    # Requests that all come at once leave no time between arrivals: then the time in which they are served.
    until_s = _last_arrival(piece) or played.end_s
    prices = resource_prices(replay, traffic.lengths, until_s, probes=probes, horizon_s=horizon_s, seed=seed)
    used: dict[Resource, float] = {
        "prefill": played.input_tokens_per_s * (1 - played.kv_hit_ratio),
        "decode": played.output_tokens_per_s,
        "kv": _held(engine, played),
    }
    found = Worth(prices, "s" if traffic.delay_price is None else "usd", {})
    per_s = {resource: found.price(resource) * amount for resource, amount in used.items()}
    return dataclasses.replace(found, per_s=per_s)


def _held(engine: Engine, played: Played) -> float:
    """KV blocks that requests held, mean over their middle."""
    timeline, (begin, end) = played.timeline, played.steady_s
    if timeline is None or not len(timeline):
        return 0.0
    middle = (begin <= timeline.end_s) & (timeline.end_s <= end)
    use = timeline.kv_use[middle] if middle.any() else timeline.kv_use
    return float(use.mean()) * engine.settings.kv_blocks * engine.settings.workers


# --- load against latency ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sweep:
    """The same traffic at several rates, slowest first. SIMULATED."""

    factors: tuple[float, ...]
    """Times the traffic's own rate."""
    runs: tuple[Played, ...]

    @property
    def knee(self) -> int:
        """Where completed requests per second, over mean latency, are most: Kleinrock's power."""
        return int(np.argmax([run.completed_per_s / run.latency.mean for run in self.runs]))

    @property
    def bracketed(self) -> bool:
        """Whether there are slower and faster runs than the one at the knee."""
        return 0 < self.knee < len(self.runs) - 1


def sweep(engine: Engine, traffic: Traffic, on_factor: Callable[[float], None] = lambda _: None) -> Sweep:
    """Replay up to SWEPT requests at 0.25 to 2 times their rate, and further out until the knee is between two rates."""
    runs: dict[float, Played] = {}

    def run(factor: float) -> None:
        on_factor(factor)
        runs[factor] = play(engine, traffic.faster(factor, SWEPT))

    def so_far() -> Sweep:
        factors = tuple(sorted(runs))
        return Sweep(factors, tuple(runs[factor] for factor in factors))

    for factor in FACTORS:
        run(factor)
    while not (found := so_far()).bracketed:
        beyond = found.factors[-1] * 2 if found.knee else found.factors[0] / 2
        if not 1 / WIDEST <= beyond <= WIDEST:
            break
        run(beyond)
    return found
