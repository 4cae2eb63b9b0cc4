"""Load that is made up: arrivals, lengths, and sessions whose next call waits for the last answer. SIMULATED.

Everything comes in chunks, so that ten million requests need the memory of one chunk, and the same seed gives the same requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from walras.engine.requests import Requests
from walras.errors import SettingsError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CHUNK = 65_536
"""Requests of a chunk."""


class Arrivals(Protocol):
    """A stream of arrivals."""

    def times(self, random: np.random.Generator) -> Iterator[FloatArray]:
        """Arrival times in seconds from 0, without end, in order, a piece at a time."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals, `rate` a second."""

    rate: float

    def __post_init__(self) -> None:
        _positive(rate=self.rate)

    def times(self, random: np.random.Generator) -> Iterator[FloatArray]:
        return Bursty(self.rate, 1.0).times(random)


@dataclass(frozen=True, slots=True)
class Bursty:
    """Independent gaps with a gamma law: standard deviation `cv` times the mean; 1 is Poisson, more comes in bursts."""

    rate: float
    cv: float

    def __post_init__(self) -> None:
        _positive(rate=self.rate, cv=self.cv)

    def times(self, random: np.random.Generator) -> Iterator[FloatArray]:
        shape, last = self.cv**-2, 0.0
        while True:
            piece = last + np.cumsum(random.gamma(shape, 1 / (self.rate * shape), CHUNK))
            last = float(piece[-1])
            yield piece


@dataclass(frozen=True, slots=True)
class Switching:
    """Poisson arrivals at one rate after the other, each for an exponential time of mean `dwell_s` (an MMPP)."""

    rates: tuple[float, ...]
    dwell_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.dwell_s) or not self.rates:
            raise SettingsError("one mean time for each rate", key="dwell_s")
        _positive(**{f"dwell_s[{k}]": dwell for k, dwell in enumerate(self.dwell_s)})
        if not (np.isfinite(self.rates).all() and min(self.rates) >= 0 and max(self.rates) > 0):
            raise SettingsError("finite, none below 0, one above", key="rates")

    def times(self, random: np.random.Generator) -> Iterator[FloatArray]:
        start, at = 0.0, 0
        while True:
            dwell = random.exponential(self.dwell_s[at])
            count = random.poisson(self.rates[at] * dwell)
            yield start + np.sort(random.uniform(0, dwell, count))
            start, at = start + dwell, (at + 1) % len(self.rates)


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson arrivals whose rate swings around `rate` by the share `depth` in each `period_s`, lowest at 0."""

    rate: float
    depth: float
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        _positive(rate=self.rate, period_s=self.period_s)
        if not 0 <= self.depth <= 1:
            raise SettingsError(f"{self.depth} is no share", key="depth", hint="0 to 1")

    def times(self, random: np.random.Generator) -> Iterator[FloatArray]:
        for piece in Poisson(self.rate * (1 + self.depth)).times(random):
            swing = 1 - self.depth * np.cos(2 * np.pi * piece / self.period_s)
            yield piece[random.uniform(0, 1 + self.depth, len(piece)) < swing]


@dataclass(frozen=True, slots=True)
class Lengths:
    """A pool of (prompt, answer) lengths, drawn from together with replacement."""

    input_tokens: IntArray
    output_tokens: IntArray

    def __post_init__(self) -> None:
        if len(self.input_tokens) != len(self.output_tokens) or not len(self.input_tokens):
            raise SettingsError("as many prompts as answers, at least one", key="lengths")

    @classmethod
    def like(cls, requests: Requests) -> Lengths:
        """As in a trace."""
        return cls(requests.input_tokens, requests.output_tokens)

    @classmethod
    def lognormal(cls, input_mean: float, output_mean: float, cv: float, seed: int = 0) -> Lengths:
        """Independent, with these means and standard deviation `cv` times the mean, before rounding up to tokens."""
        _positive(input_mean=input_mean, output_mean=output_mean, cv=cv)
        random, sigma = np.random.default_rng(seed), float(np.sqrt(np.log1p(cv * cv)))
        draws = np.exp(random.normal(-sigma * sigma / 2, sigma, (2, CHUNK)))
        return cls(
            np.ceil(input_mean * draws[0]).astype(np.int64), np.ceil(output_mean * draws[1]).astype(np.int64)
        )


def generate(
    arrivals: Arrivals, lengths: Lengths, count: int, seed: int, chunk: int = CHUNK
) -> Iterator[Requests]:
    """`count` independent requests, `chunk` at a time."""
    random, pool = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    stream, ready, left = arrivals.times(random), np.empty(0), count
    while left > 0:
        size = min(chunk, left)
        pieces, have = [ready], len(ready)
        while have < size:
            pieces.append(next(stream))
            have += len(pieces[-1])
        ready = np.concatenate(pieces)
        rows = pool.integers(0, len(lengths.input_tokens), size)
        yield Requests(ready[:size], lengths.input_tokens[rows], lengths.output_tokens[rows])
        ready, left = ready[size:], left - size


@dataclass(frozen=True, slots=True)
class Sessions:
    """Agents at work: each call's prompt is the conversation so far and what a tool or a user adds.

    A session has a geometric number of calls; between an answer and the next call passes an exponential time. All sessions begin with
    the same `system_tokens`.
    """

    calls: float
    """Mean calls of a session, ≥ 1."""
    think_s: float
    """Mean seconds between an answer and the next call."""
    added: Lengths
    """Tokens added before a call, and tokens of its answer."""
    system_tokens: int = 0
    longest: int = 200_000
    """A session ends before its prompt and answer exceed this."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.calls) and self.calls >= 1):
            raise SettingsError(f"{self.calls} calls", key="calls", hint="a mean of at least 1")
        if not (np.isfinite(self.think_s) and self.think_s >= 0):
            raise SettingsError(f"{self.think_s} seconds", key="think_s", hint="0 or more")
        most = int((self.added.input_tokens + self.added.output_tokens).max()) + self.system_tokens
        if self.system_tokens < 0 or most > self.longest:
            raise SettingsError(
                f"a first call may need {most} tokens, more than {self.longest}",
                key="longest",
                hint="raise it",
            )

    def starting(self, starts_s: FloatArray, seed: int, prefix_tokens: int, first: int = 0) -> Requests:
        """The calls of the sessions that start at these times (in order), with prefix ids for chunks of `prefix_tokens`.

        Sessions are numbered from `first`, so that chunks of a stream do not share conversations. Times that are all 0 make a closed
        loop of so many clients.
        """
        random, n = np.random.default_rng((seed, first)), len(starts_s)
        per = random.geometric(1 / self.calls, n)
        rows = random.integers(0, len(self.added.input_tokens), int(per.sum()))
        gaps = random.exponential(self.think_s, len(rows)) if self.think_s > 0 else np.zeros(len(rows))
        added, answered = self.added.input_tokens[rows], self.added.output_tokens[rows]
        session, begins = np.repeat(np.arange(n), per), np.cumsum(per) - per
        said = np.cumsum(added + answered)
        before = said - added - answered
        prompt = self.system_tokens + before - np.repeat(before[begins], per) + added
        # Prompts only grow, so what is too long is the end of its session.
        keep = np.flatnonzero(prompt + answered <= self.longest)
        place = keep - begins[session[keep]]
        after = np.where(place == 0, -1, np.arange(len(keep)) - 1)
        arrival = np.where(place == 0, starts_s[session[keep]], gaps[keep])
        offsets, ids = self._prefixes(prompt[keep], first + session[keep], prefix_tokens)
        return Requests(arrival, prompt[keep], answered[keep], offsets, ids, after=after)

    def _prefixes(self, prompt: IntArray, session: IntArray, tokens: int) -> tuple[IntArray, IntArray]:
        """Ids of the full chunks of each prompt: those of the system prompt are everyone's, the others a session's."""
        chunks, common = prompt // tokens, self.system_tokens // tokens
        offsets = np.concatenate([[0], np.cumsum(chunks)])
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], chunks)
        own = (np.repeat(session, chunks) + 1) * (self.longest // tokens + 1) + place
        return offsets, np.where(place < common, place, own)


def _positive(**numbers: float) -> None:
    for key, number in numbers.items():
        if not (np.isfinite(number) and number > 0):
            raise SettingsError(f"{number} is not finite and above 0", key=key)
