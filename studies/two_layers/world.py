"""What comes, what it is worth, and through what it goes: real arrivals, real outcomes, and how the two are coupled.

Arrivals and lengths are of one hour of a production trace, outcomes and list prices of RouterBench. Nothing says which prompt of the one
goes with which row of the other, nor how long the models of RouterBench take: `Coupling` states what was assumed. SIMULATED.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing, Schedule
from walras.engine.steps import StepTimes
from walras.engine.traces import read_trace
from walras.estimate.class_means import class_means

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MODELS = (
    "mistralai/mistral-7b-chat",
    "mistralai/mixtral-8x7b-chat",
    "zero-one-ai/Yi-34B-Chat",
    "gpt-4-1106-preview",
)
TRACES = {"azure": "azure_code_2023.parquet", "mooncake": "mooncake_conversation.parquet"}
ENGINES = {
    "sized": (
        "rtxpro6000-llama3.1-8b",
        "rtxpro6000-qwen3-30b-a3b-dp2",
        "h100-qwen3-32b-tp8",
        "h200-deepseek-r1-fp8-tp8",
    ),
    "alike": ("h100-qwen3-32b-tp8",) * 4,
    "reversed": (
        "h200-deepseek-r1-fp8-tp8",
        "h100-qwen3-32b-tp8",
        "rtxpro6000-qwen3-30b-a3b-dp2",
        "rtxpro6000-llama3.1-8b",
    ),
}
"""Profiles that stand in for the models, in their order: of about their size, all the same, or the other way round."""
WORKERS = 6
"""Most replicas in all."""
CHARS_PER_TOKEN = 4.0
LONGEST = 60_000
"""Tokens; 1% of Mooncake's prompts are longer and left out, so that every engine can hold a few of the longest."""
BINS = 5
"""Of prompt lengths, by which answers' lengths are believed."""


@dataclass(frozen=True, slots=True)
class Coupling:
    """What the data do not say."""

    engines: str = "sized"
    """A key of `ENGINES`."""
    pairing: str = "random"
    """Rows of RouterBench meet prompts of the trace at `random`, or by `rank` of their length."""
    avoidable: float = 1.0
    """Share of the list price that is not spent when a request is not sent."""
    planned: bool = True
    """Replicas in proportion to what the isolated router sends; else one for each model."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Rows of RouterBench on which all models are known: (R,) or (R, M)."""

    quality: FloatArray
    task_class: IntArray
    prompt_chars: FloatArray
    train: NDArray[np.bool_]
    """The half that is learned from."""
    list_usd: FloatArray
    """(M, 2) USD per prompt and output token: least squares on what was paid, at four characters a token."""


@dataclass(frozen=True, slots=True)
class Window:
    """N requests as they come, and what the router believes of each."""

    arrival_s: FloatArray
    prompt: IntArray
    output: IntArray
    answers: IntArray
    """(N, K) equally likely lengths of the answer, as believed from the prompt's length."""
    task_class: IntArray
    outcome: FloatArray
    """(N, M) 0 or 1."""
    q: FloatArray
    """(N, M) as learned on the other half of the rows."""
    q_true: FloatArray
    """(N, M) mean outcome of the class on the judged half, from which the rows are drawn: nobody at work sees it."""
    value: FloatArray
    """(N,) USD for a right answer."""
    delay_price: FloatArray
    """(N,) USD per second."""
    list_usd: FloatArray
    """(M, 2)."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    def believed_usd(self, n: int) -> FloatArray:
        """(M,) list price of request n with the answer that is believed."""
        price = self.list_usd
        return np.asarray(price[:, 0] * self.prompt[n] + price[:, 1] * self.answers[n].mean())

    @property
    def usd(self) -> FloatArray:
        """(N, M) at list prices."""
        price = self.list_usd
        return self.prompt[:, None] * price[None, :, 0] + self.output[:, None] * price[None, :, 1]


@dataclass(frozen=True, slots=True)
class Plant:
    """An engine for each model."""

    settings: tuple[EngineSettings, ...]
    steps: tuple[StepTimes, ...]

    @property
    def replicas(self) -> tuple[int, ...]:
        return tuple(one.workers for one in self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def with_priority(self) -> Plant:
        """Whoever's delay costs most for what he takes goes first in line."""
        pairs = zip(self.settings, self.steps, strict=True)
        settings = (replace(one, schedule=Schedule.of("priced", steps, one)) for one, steps in pairs)
        return Plant(tuple(settings), self.steps)

    def replay(self, m: int, requests: Requests | None = None, interval_s: float | None = None) -> Replay:
        return Replay(
            self.settings[m], self.steps[m], Routing.least_loaded(), requests, interval_s=interval_s
        )

    def alone_s(self, prompt: IntArray, output: IntArray) -> FloatArray:
        """(N, M) seconds of each request in an engine that nobody else uses."""
        apart = 1e4 * np.arange(len(prompt), dtype=np.float64)
        one = Requests(apart, prompt, output)
        return np.stack([self.replay(m, one).run().served().latency_s for m in range(len(self))], axis=1)


def plant(engines: str, replicas: tuple[int, ...]) -> Plant:
    settings, steps = [], []
    for name, workers in zip(ENGINES[engines], replicas, strict=True):
        profile = load_profile(name)
        limits = profile.limits
        settings.append(
            EngineSettings(
                kv_blocks=limits.kv_tokens // 16,
                max_batched_tokens=limits.step_tokens,
                max_sequences=limits.most_sequences,
                prefix_caching=False,
                schedule_ahead=bool(limits.steps_ahead),
                workers=workers,
            )
        )
        steps.append(profile.steps())
    return Plant(tuple(settings), tuple(steps))


def folder() -> Path:
    return Path(os.environ["WALRAS_DATA"])


@lru_cache(maxsize=1)
def outcomes() -> Outcomes:
    """RouterBench, split in two halves once and for all."""
    table = pq.read_table(folder() / "routing" / "routerbench_subset.parquet").to_pydict()
    rows = sorted(set(table["request_id"]))
    at = {row: k for k, row in enumerate(rows)}
    kinds = sorted(set(table["benchmark"]))
    quality, usd, said = (np.full((len(rows), len(MODELS)), np.nan) for _ in range(3))
    chars, kind = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    for k, model in enumerate(table["model"]):
        if model not in MODELS:
            continue
        row, m = at[table["request_id"][k]], MODELS.index(model)
        found = table["quality"][k]
        quality[row, m] = np.nan if found is None else found
        usd[row, m], said[row, m] = table["cost_usd"][k], table["response_chars"][k]
        chars[row], kind[row] = table["prompt_chars"][k], kinds.index(table["benchmark"][k])
    known = np.isfinite(quality).all(axis=1) & np.isfinite(usd).all(axis=1) & np.isfinite(said).all(axis=1)
    price = np.stack(
        [
            np.linalg.lstsq(np.stack((chars, said[:, m]), axis=1)[known] / CHARS_PER_TOKEN, usd[known, m])[0]
            for m in range(len(MODELS))
        ]
    )
    train = np.random.default_rng(20_240_312).random(int(known.sum())) < 0.5
    return Outcomes(quality[known], kind[known], chars[known], train, price)


@lru_cache(maxsize=2)
def trace(name: str) -> Requests:
    """An hour of requests, without prefixes: each engine computes each prompt whole."""
    requests = read_trace(folder() / "serving" / TRACES[name]).requests
    fits = requests.input_tokens + requests.output_tokens < LONGEST
    return Requests(requests.arrival_s[fits], requests.input_tokens[fits], requests.output_tokens[fits])


@lru_cache(maxsize=4)
def _believed_answers(name: str) -> tuple[FloatArray, IntArray]:
    """Bounds of the bins of prompt lengths, and 16 equally likely answers in each, from the first half hour."""
    requests = trace(name)
    half = len(requests) // 2
    prompt, output = requests.input_tokens[:half], requests.output_tokens[:half]
    bounds = np.quantile(prompt, np.linspace(0, 1, BINS + 1)[1:-1])
    of = np.searchsorted(bounds, prompt)
    levels = (np.arange(16) + 0.5) / 16
    return bounds, np.stack(
        [np.quantile(output[of == k], levels, method="nearest").astype(np.int64) for k in range(BINS)]
    )


def window(
    name: str, coupling: Coupling, rate: float, count: int, seed: int, *, train: bool = False
) -> Window:
    """`count` requests in a row, at `rate` a second in the mean: of the half hour and rows to learn from, or of those judged.

    V is lognormal (σ = 1), its median five times what a mean request costs with the dearest model; a second of delay costs a share of V
    that is lognormal too (σ = 0.5): V is gone, in the median, after 20 times what a mean request takes alone on the slowest engine.
    """
    requests, rows = trace(name), outcomes()
    random = np.random.default_rng((seed, train))
    half = len(requests) // 2
    first = int(random.integers(0, half - count)) + (0 if train else half)
    at = slice(first, first + count)
    arrival = requests.arrival_s[at] - requests.arrival_s[first]
    mean_rate = (count - 1) / max(float(arrival[-1]), 1e-9)
    prompt, output = requests.input_tokens[at], requests.output_tokens[at]
    drawn = random.choice(np.flatnonzero(rows.train == train), count)
    if coupling.pairing == "rank":
        drawn = drawn[np.argsort(rows.prompt_chars[drawn], kind="stable")]
        drawn = drawn[np.argsort(np.argsort(prompt, kind="stable"), kind="stable")]
    kinds = rows.task_class[drawn]
    judged = ~rows.train
    learned = class_means(
        rows.quality[rows.train], rows.task_class[rows.train], int(rows.task_class.max()) + 1
    )
    true = np.stack(
        [
            rows.quality[judged & (rows.task_class == k)].mean(axis=0)
            for k in range(int(rows.task_class.max()) + 1)
        ]
    )
    median, alone = scale_of(name)
    value = median * np.exp(random.normal(0, 1.0, count))
    impatience = np.exp(random.normal(0, 0.5, count)) / (20 * alone)
    bounds, answers = _believed_answers(name)
    return Window(
        arrival_s=arrival * mean_rate / rate,
        prompt=prompt,
        output=output,
        answers=answers[np.searchsorted(bounds, prompt)],
        task_class=kinds,
        outcome=rows.quality[drawn],
        q=learned.mean[kinds],
        q_true=true[kinds],
        value=value,
        delay_price=value * impatience,
        list_usd=rows.list_usd,
    )


@lru_cache(maxsize=4)
def scale_of(name: str) -> tuple[float, float]:
    """Median V in USD, and seconds of a mean request alone on the slowest engine of `sized`; of the first half hour."""
    requests, rows = trace(name), outcomes()
    some = np.random.default_rng(0).choice(len(requests) // 2, 300)
    prompt, output = requests.input_tokens[some], requests.output_tokens[some]
    usd = prompt.mean() * rows.list_usd[:, 0] + output.mean() * rows.list_usd[:, 1]
    alone = plant("sized", (1,) * len(MODELS)).alone_s(prompt, output).mean(axis=0)
    return 5.0 * float(usd.max()), float(alone.max())


def saturation_rate(settings: Plant, stream: Window, choice: IntArray) -> float:
    """Largest rate of the whole stream at which every engine keeps up with what `choice` (N,) sends it."""
    rates = [len(stream) / one for one in busy_s(settings, stream, choice) if one > 0]
    return float(min(rates))


def busy_s(settings: Plant, stream: Window, choice: IntArray) -> FloatArray:
    """(M,) seconds for which each engine works on its part of the stream, all of it waiting from the start."""
    out = np.zeros(len(settings))
    for m in range(len(settings)):
        mine = np.flatnonzero(choice == m)
        if mine.size:
            all_at_once = Requests(np.zeros(len(mine)), stream.prompt[mine], stream.output[mine])
            out[m] = settings.replay(m, all_at_once).run().served().end_s.max()
    return out


def sized_for(engines: str, stream: Window, choice: IntArray, planned: bool) -> tuple[Plant, float]:
    """Replicas for what `choice` sends, and the rate at which the first engine is full: load 1."""
    single = plant(engines, (1,) * len(MODELS))
    if not planned:
        return single, saturation_rate(single, stream, choice)
    need = busy_s(single, stream, choice)
    options = [n for n in product(range(1, WORKERS), repeat=len(MODELS)) if sum(n) <= WORKERS]
    # Of the plants that carry most for each replica, the one that carries most.
    best = max(
        options,
        key=lambda n: (
            round(min(np.divide(n, need, where=need > 0, out=np.full(len(n), np.inf))) / sum(n), 6),
            sum(n),
        ),
    )
    chosen = plant(engines, best)
    return chosen, saturation_rate(chosen, stream, choice)
