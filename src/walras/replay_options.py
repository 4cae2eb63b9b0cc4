"""What the options of `walras replay` mean: whose requests, through what engine, by what routing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from walras.diagnosis.serving import Engine, Traffic
from walras.engine.fitting import read_profile
from walras.engine.generated import CHUNK, Arrivals, Bursty, Diurnal, Lengths, Poisson, Sessions, generate
from walras.engine.requests import Requests
from walras.engine.settings import Disaggregation, EngineSettings, Order, Routing, Schedule, Speculation
from walras.engine.steps import StepTimes
from walras.engine.traces import read_trace
from walras.errors import SettingsError, nearest

PROFILE = "h100-qwen3-32b-tp8"
REQUESTS = 10_000
LENGTHS = "lognormal:1024:256"
LENGTHS_CV = 1.0
BLOCK_TOKENS = 16
KV_BYTES = 131_072.0
"""Of a token, for Llama 3.1 8B in 16 bits: 2 · 32 layers · 8 KV heads · 128 numbers."""
LINK_BYTES_PER_S = 50e9
"""400 Gbit/s."""
ACCEPTANCE, DRAFT_COST = 0.7, 0.05
SYSTEM_TOKENS, SESSION_PREFIX = 1024, 64
"""Of generated sessions: tokens that all of them begin with, and tokens that one prefix id names."""
SPECS = {
    "poisson": "poisson:RATE",
    "bursty": "bursty:RATE:CV",
    "diurnal": "diurnal:RATE:DEPTH[:PERIOD_S]",
    "sessions": "sessions:RATE[:CALLS[:THINK_S]]",
}
COUNTS = {"poisson": (1, 1), "bursty": (2, 2), "diurnal": (2, 3), "sessions": (1, 3)}
"""Least and most numbers of each."""


# --- requests -----------------------------------------------------------------------------------------------------------


def read_traffic(
    path: Path,
    *,
    model: str | None,
    session_every_s: float,
    speed: float,
    most: int | None,
    price: float | None,
    order: Order = "fcfs",
    admission: bool = False,
) -> Traffic:
    """The requests of a trace or a log, with what their schedule looks at."""
    needed = ("tenant",) * (order == "vtc") + ("value",) * admission
    scheduled = order != "fcfs" or admission
    trace = read_trace(path, model=model, session_every_s=session_every_s, scheduled=scheduled, needed=needed)
    if trace.requests.delay_price is not None:
        price = float(trace.requests.delay_price.mean())
    return Traffic(
        name=path.name,
        pieces=lambda: iter([trace.requests]),
        lengths=Lengths.like(trace.requests),
        prefix_tokens=trace.prefix_tokens,
        trace=trace,
        speed=speed,
        most=most,
        delay_price=price,
    )


def generated_traffic(
    spec: str, lengths: str | None, *, speed: float, most: int | None, price: float | None, seed: int
) -> Traffic:
    """Requests that are made up: arrivals as `spec` says, prompts and answers as long as `lengths` says."""
    kind, numbers = _numbers(spec)
    drawn, count = read_lengths(lengths or LENGTHS, seed), most or REQUESTS
    if kind == "sessions":
        rate, calls, think_s = (*numbers, *(8.0, 10.0)[len(numbers) - 1 :])
        longest = int((drawn.input_tokens + drawn.output_tokens).max()) + SYSTEM_TOKENS
        sessions = Sessions(calls, think_s, drawn, SYSTEM_TOKENS, max(200_000, longest))
        pieces = _SessionPieces(sessions, Poisson(rate), count, seed)
        return Traffic(spec, pieces, drawn, SESSION_PREFIX, speed=speed, most=count, delay_price=price)
    made: dict[str, type[Arrivals]] = {"poisson": Poisson, "bursty": Bursty, "diurnal": Diurnal}
    arrivals = made[kind](*numbers)
    return Traffic(
        name=spec,
        pieces=lambda: generate(arrivals, drawn, count, seed),
        lengths=drawn,
        prefix_tokens=0,
        speed=speed,
        most=count,
        delay_price=price,
    )


@dataclass(frozen=True, slots=True)
class _SessionPieces:
    """Sessions in pieces that hold at least `count` calls together."""

    sessions: Sessions
    starts: Poisson
    count: int
    seed: int

    def __call__(self) -> Iterator[Requests]:
        per_piece = max(1, min(CHUNK, math.ceil(self.count / self.sessions.calls)))
        first, left = 0, self.count
        for times in self.starts.times(np.random.default_rng(self.seed)):
            for begin in range(0, len(times), per_piece):
                starts = times[begin : begin + per_piece]
                piece = self.sessions.starting(starts, self.seed, SESSION_PREFIX, first)
                yield piece
                first, left = first + len(starts), left - len(piece)
                if left <= 0:
                    return


def _numbers(spec: str) -> tuple[str, tuple[float, ...]]:
    kind, *rest = spec.split(":")
    if kind not in SPECS:
        raise SettingsError(f"no load '{kind}'", key="--generate", hint=nearest(kind, SPECS))
    numbers = _floats(rest)
    least, most = COUNTS[kind]
    if numbers is None or not least <= len(numbers) <= most:
        raise SettingsError(f"'{spec}' is not {SPECS[kind]}", key="--generate")
    return kind, numbers


def read_lengths(spec: str, seed: int) -> Lengths:
    """Prompts and answers as long as `lognormal:PROMPT:ANSWER[:CV]` says, or as in a trace."""
    if not spec.startswith("lognormal:"):
        return Lengths.like(read_trace(Path(spec)).requests)
    numbers = _floats(spec.split(":")[1:])
    if numbers is None or len(numbers) not in (2, 3):
        raise SettingsError(f"'{spec}' is not lognormal:PROMPT:ANSWER[:CV], nor a trace", key="--lengths")
    prompt, answer, cv = (*numbers, LENGTHS_CV)[:3]
    return Lengths.lognormal(prompt, answer, cv, seed)


def _floats(texts: list[str]) -> tuple[float, ...] | None:
    try:
        return tuple(map(float, texts))
    except ValueError:
        return None


# --- the engine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of the engine; None: as the profile has it."""

    profile: str
    routing: str
    workers: int | None
    prefill_workers: int | None
    decode_workers: int | None
    kv_blocks: int | None
    block_tokens: int
    max_batched_tokens: int | None
    max_sequences: int | None
    chunked_prefill: bool
    prefix_caching: bool
    kv_bytes: float
    link_bytes_per_s: float
    drafts: int | None
    acceptance: float
    draft_cost: float
    schedule: Order = "fcfs"
    admission: bool = False


def read_engine(options: EngineOptions, prefix_tokens: int) -> Engine:
    """The engine that the options describe, with the limits of its profile where they say nothing."""
    profile = read_profile(options.profile)
    limits, block = profile.limits, options.block_tokens
    workers, apart = _workers(options)
    settings = EngineSettings(
        kv_blocks=options.kv_blocks or max(1, limits.kv_tokens // block),
        block_tokens=block,
        prefix_tokens=prefix_tokens,
        max_batched_tokens=options.max_batched_tokens or limits.step_tokens,
        max_sequences=options.max_sequences or limits.most_sequences,
        chunked_prefill=options.chunked_prefill,
        prefix_caching=options.prefix_caching,
        schedule_ahead=limits.steps_ahead > 0,
        workers=workers,
        disaggregation=apart,
        speculation=None
        if options.drafts is None
        else Speculation(options.drafts, options.acceptance, options.draft_cost),
    )
    steps = profile.steps(settings.max_batched_tokens, settings.max_sequences)
    schedule = Schedule.of(options.schedule, steps, settings, admission=options.admission)
    settings = replace(settings, schedule=schedule)
    return Engine(settings, profile, steps, _routing(options.routing, steps, settings))


def _workers(options: EngineOptions) -> tuple[int, Disaggregation | None]:
    """How many there are, and how those that prefill are told from those that decode."""
    prefill, decode = options.prefill_workers, options.decode_workers
    if prefill is None and decode is None:
        return options.workers or 1, None
    if prefill is None or decode is None:
        raise SettingsError(
            "one without the other", key="--prefill-workers, --decode-workers", hint="give both"
        )
    if options.workers not in {None, prefill + decode}:
        raise SettingsError(
            f"{options.workers}, but {prefill} prefill and {decode} decode",
            key="--workers",
            hint="leave it out",
        )
    return prefill + decode, Disaggregation(prefill, options.kv_bytes, options.link_bytes_per_s)


def _routing(name: str, steps: StepTimes, settings: EngineSettings) -> Routing:
    if name == "priced":
        return Routing.priced(steps, settings)
    if name == "kv":
        return Routing.kv(settings.block_tokens)
    return Routing.least_loaded() if name == "least-loaded" else Routing.round_robin()
