"""The synthetic day: who asks for what, and what each model would give. All of it is drawn from the tables below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


# ---- Parameters: all made up, with prices and speeds in the range of public price lists and benchmarks ----


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    strength: float  # on the scale of difficulty
    tuned_for: str  # the class where it gets TUNING extra strength
    rash: float  # of its failures, the share that ends in a wrong action; the others stop in time
    input_usd: float  # USD per million tokens, as are the next two
    cached_usd: float
    output_usd: float
    reasoning: float  # median reasoning tokens per answer token at difficulty 0
    first_token_s: float  # with an empty queue and an empty prompt
    prefill_s: float  # seconds per uncached input token
    decode_s: float  # seconds per output token, unloaded
    queue_s: float  # median wait at half utilisation
    utilisation: float  # at the day's mean load; the peak must stay below 1


# fmt: off
MODELS = (
    #      name        skill tuned for        rash  in     cached out    reason first prefill decode queue busy
    _Model("nano",     0.0,  "",              0.40, 0.05,  0.005, 0.40,  0.0,   0.20, 8e-6,   0.004, 0.3,  0.30),
    _Model("small",    0.9,  "extraction",    0.32, 0.25,  0.025, 2.00,  0.3,   0.30, 1.5e-5, 0.006, 0.5,  0.35),
    _Model("medium",   1.6,  "data-analysis", 0.24, 1.00,  0.10,  5.00,  0.7,   0.45, 3e-5,   0.010, 0.8,  0.40),
    _Model("large",    2.3,  "code-review",   0.16, 3.00,  0.30,  15.00, 1.2,   0.80, 6e-5,   0.015, 1.2,  0.45),
    _Model("frontier", 3.2,  "",              0.08, 10.00, 1.00,  50.00, 2.0,   1.50, 1.2e-4, 0.022, 2.0,  0.52),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class _Class:
    name: str
    checkable: bool  # quality is 0 or 1
    difficulty: float  # mean, on the scale of strength
    value_usd: float  # median V
    value_spread: float  # standard deviation of log V, as are the other spreads
    input_tokens: float  # median
    input_spread: float
    answer_tokens: float  # median, reasoning apart
    answer_spread: float
    cached: float  # mean share of the prompt that was seen before
    stake: float  # median loss from one wrong action, in units of V; 0 = the class only reads


# fmt: off
CLASSES = (
    #      name             check  hard  V      spread input   spread answer spread cached stake
    _Class("chat",          False, -0.6, 0.02,  1.5,   1_200,  1.0,   300,   0.7,   0.50,  0.0),
    _Class("extraction",    True,  -0.4, 0.015, 1.8,   5_000,  0.9,   200,   0.6,   0.30,  0.0),
    _Class("code-edit",     True,  1.2,  1.00,  1.4,   10_000, 0.9,   900,   0.8,   0.60,  0.2),
    _Class("code-review",   False, 0.6,  0.40,  1.2,   8_000,  0.9,   500,   0.6,   0.50,  0.0),
    _Class("data-analysis", True,  0.9,  0.50,  1.3,   6_000,  1.0,   700,   0.8,   0.40,  0.0),
    _Class("transfer",      True,  0.2,  0.80,  1.5,   2_000,  0.6,   200,   0.5,   0.40,  0.8),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class _Tenant:
    name: str
    share: float  # of requests
    mix: tuple[float, ...]  # shares of CLASSES
    habit: str  # the model used by default; "" = softmax over the expected net value
    temperature: float  # of the softmax, in units of V


# fmt: off
TENANTS = (
    #       name           share mix: chat, extr, edit, review, data, transfer habit       temp
    _Tenant("support",     0.40, (0.60, 0.25, 0.00, 0.00, 0.05, 0.10),         "",         0.10),
    _Tenant("engineering", 0.30, (0.20, 0.05, 0.40, 0.25, 0.10, 0.00),         "frontier", 0.0),
    _Tenant("backoffice",  0.20, (0.10, 0.45, 0.00, 0.05, 0.20, 0.20),         "nano",     0.0),
    _Tenant("research",    0.10, (0.25, 0.15, 0.15, 0.10, 0.35, 0.00),         "",         0.30),
)
# fmt: on

SCENARIOS = 16
DAY_S = 86_400.0
# Arrival rate at t over its mean: 1 + Σ amplitude·cos(2π·cycles·(t − peak)/day); amplitude, cycles a day, peak s.
DIURNAL = ((0.60, 1, 14 * 3600.0), (0.15, 2, 10.5 * 3600.0))

# A spread is a standard deviation: of a normal draw, or of the log of a lognormal one.
DIFFICULTY_SPREAD = 1.0  # inside a class
SIGNAL_SPREAD = 0.7  # error of the softmax tenants' view of difficulty
DISCRIMINATION = 1.5  # logits of success per unit of (strength − difficulty)
TUNING = 0.7  # extra strength in the class a model was tuned for
FIT_SPREAD = 0.4  # how well one model happens to suit one task, in units of strength
GRADE_SPREAD = 0.7  # noise of a graded score, in logits
REASONING_BY_DIFFICULTY = 0.25  # log of reasoning tokens per unit of difficulty
REASONING_SPREAD = 0.5  # from one answer to the next
CACHE_HIT = 0.8  # probability that a model still holds the shared prefix
CACHE_CONCENTRATION = 4.0  # of the beta law of the shared share
EXPLORE = 0.10  # share of every tenant's traffic routed at random, which leaves overlap to learn from
QUEUE_SPREAD = 1.4
SPEED_SPREAD = 0.2  # of one answer's tokens per second
WORDING_SPREAD = 0.2  # how much longer or shorter one model answers the same task
LOAD_SLOWDOWN = 0.6  # extra time per token at full utilisation
STAKE_SPREAD = 1.2
# Spreads of what a scenario does to everything, to a class, to a model, and to one row alone.
SHOCK_ALL, SHOCK_CLASS, SHOCK_MODEL, SHOCK_ROW = 0.9, 0.4, 0.5, 0.5


# Every block of this many tasks has its own random stream, so batches of any size hold the same log.
BLOCK_TASKS = 8192


# ---- Arrivals: a Poisson process with a diurnal rate, given how many requests the day has ----


def block_times(tasks: int, rng: np.random.Generator) -> Floats:
    """Where each block starts and ends, as a share of the day's expected requests.

    Given their number, Poisson arrivals are uniform order statistics, whose n + 1 gaps are exponentials over
    their sum. So a block's span is a gamma draw, and each block fills in its own gaps without knowing the others.
    """
    gaps = np.minimum(BLOCK_TASKS, tasks - np.arange(0, tasks, BLOCK_TASKS)).astype(np.float64)
    gaps[-1] += 1  # from the last arrival to midnight
    ends = np.cumsum(rng.gamma(gaps))
    return np.concatenate([[0.0], ends / ends[-1]])


def arrivals(rng: np.random.Generator, count: int, start: float, end: float, *, last: bool) -> Floats:
    gaps = np.cumsum(rng.exponential(size=count + last))
    share = start + (end - start) * gaps[:count] / gaps[-1]
    minutes = np.linspace(0.0, DAY_S, 1441)
    times: Floats = np.interp(share, diurnal_share(minutes), minutes)
    return times


def diurnal_load(t: Floats) -> Floats:
    """Arrival rate relative to the day's mean."""
    load = np.ones_like(t)
    for amplitude, cycles, peak in DIURNAL:
        load += amplitude * np.cos(2 * np.pi * cycles / DAY_S * (t - peak))
    return load


def diurnal_share(t: Floats) -> Floats:
    """Share of the day's requests expected by t: the integral of the load."""
    area = t.copy()
    for amplitude, cycles, peak in DIURNAL:
        w = 2 * np.pi * cycles / DAY_S
        area += amplitude / w * (np.sin(w * (t - peak)) + np.sin(w * peak))
    return area / DAY_S


# ---- One block: tasks down, models across ----


@dataclass(frozen=True, slots=True)
class _Tasks:
    """Shape (n, 1) each, to stand against the models' (5,)."""

    time_s: Floats
    tenant: Ints
    kind: Ints
    difficulty: Floats
    value: Floats

    def of_class(self, parameter: str) -> Floats:
        return _column(CLASSES, parameter)[self.kind]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Shape (n, 5) each."""

    input: Ints
    cached: Ints
    output: Ints
    reasoning: Ints


def _column(rows: Sequence[_Model | _Class | _Tenant], parameter: str) -> Floats:
    return np.array([getattr(row, parameter) for row in rows], dtype=np.float64)


def draw_block(
    rng: np.random.Generator, first: int, times: Floats, shocks: Floats, schema: pa.Schema
) -> pa.RecordBatch:
    tasks = _draw_tasks(rng, times)
    tokens = _draw_tokens(rng, tasks)
    logit = _success_logit(tasks, tasks.difficulty)
    logit = logit + DISCRIMINATION * FIT_SPREAD * rng.standard_normal(logit.shape)
    stake = tasks.of_class("stake") * tasks.value * _noise(rng, STAKE_SPREAD, tasks.value.shape)
    risk = stake * _column(MODELS, "rash") * _sigmoid(-logit)
    propensity = _propensity(rng, tasks, stake)
    picked = (np.cumsum(propensity, axis=1)[:, :-1] < rng.random(tasks.value.shape)).sum(axis=1)
    by_task = np.repeat(np.arange(len(times)), len(MODELS))
    columns = {
        "request_id": _request_ids(first, len(times)).take(by_task),
        "time_s": times[by_task],
        "tenant": _names(TENANTS, tasks.tenant.ravel()[by_task]),
        "class": _names(CLASSES, tasks.kind.ravel()[by_task]),
        "value_usd": tasks.value.ravel()[by_task],
        "model": _names(MODELS, np.tile(np.arange(len(MODELS)), len(times))),
        "chosen": (picked[:, None] == np.arange(len(MODELS))).ravel(),
        "propensity": propensity.ravel(),
        "quality": _quality(rng, tasks, logit).ravel(),
        "cost_usd": _cost(tokens.input, tokens.cached, tokens.output).ravel(),
        "latency_s": _latency(rng, tasks, tokens).ravel(),
        "risk": risk.ravel(),
        "risk_scenarios": _scenarios(rng, tasks, risk, shocks),
        "input_tokens": tokens.input.ravel(),
        "cached_input_tokens": tokens.cached.ravel(),
        "output_tokens": tokens.output.ravel(),
        "reasoning_tokens": tokens.reasoning.ravel(),
    }
    return pa.record_batch(columns, schema=schema)


def _names(rows: Sequence[_Model | _Class | _Tenant], codes: Ints) -> pa.StringArray:
    return pa.array([row.name for row in rows], pa.string()).take(codes)


def _request_ids(first: int, count: int) -> pa.StringArray:
    return pa.array([f"req-{number:07d}" for number in range(first, first + count)], pa.string())


def _noise(rng: np.random.Generator, spread: float | Floats, shape: tuple[int, ...]) -> Floats:
    """A lognormal factor with median 1."""
    return np.exp(spread * rng.standard_normal(shape))


def _whole(x: Floats) -> Ints:
    return x.astype(np.int64)


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def _draw_tasks(rng: np.random.Generator, times: Floats) -> _Tasks:
    n = len(times)
    tenant = np.searchsorted(np.cumsum(_column(TENANTS, "share"))[:-1], rng.random(n), side="right")
    mix = np.cumsum([row.mix for row in TENANTS], axis=1)[:, :-1]
    kind = (rng.random((n, 1)) >= mix[tenant]).sum(axis=1)
    difficulty = _column(CLASSES, "difficulty")[kind] + DIFFICULTY_SPREAD * rng.standard_normal(n)
    value = _column(CLASSES, "value_usd")[kind] * _noise(rng, _column(CLASSES, "value_spread")[kind], (n,))
    return _Tasks(times[:, None], tenant[:, None], kind[:, None], difficulty[:, None], value[:, None])


def _draw_tokens(rng: np.random.Generator, tasks: _Tasks) -> _Tokens:
    n = (len(tasks.value), 1)
    n_m = (len(tasks.value), len(MODELS))
    prompt = tasks.of_class("input_tokens") * _noise(rng, tasks.of_class("input_spread"), n)
    prompt = np.broadcast_to(np.floor(1 + prompt), n_m)
    seen = tasks.of_class("cached") * CACHE_CONCENTRATION
    share = rng.beta(seen, CACHE_CONCENTRATION - seen) * (rng.random(n_m) < CACHE_HIT)
    answer = tasks.of_class("answer_tokens") * _noise(rng, tasks.of_class("answer_spread"), n)
    answer = np.floor(1 + answer * _noise(rng, WORDING_SPREAD, n_m))
    pace = np.exp(REASONING_BY_DIFFICULTY * tasks.difficulty) * _noise(rng, REASONING_SPREAD, n_m)
    reasoning = np.floor(_column(MODELS, "reasoning") * answer * pace)
    return _Tokens(_whole(prompt), _whole(share * prompt), _whole(answer + reasoning), _whole(reasoning))


def _success_logit(tasks: _Tasks, difficulty: Floats) -> Floats:
    tuned = np.array([[m.tuned_for == c.name for m in MODELS] for c in CLASSES])
    strength = _column(MODELS, "strength") + TUNING * tuned[tasks.kind.ravel()]
    return DISCRIMINATION * (strength - difficulty)


def _quality(rng: np.random.Generator, tasks: _Tasks, logit: Floats) -> Floats:
    success = rng.random(logit.shape) < _sigmoid(logit)
    grade = np.round(_sigmoid(logit + GRADE_SPREAD * rng.standard_normal(logit.shape)), 2)
    return np.where(tasks.of_class("checkable") > 0, success, grade)


def _cost(prompt: Floats | Ints, cached: Floats | Ints, output: Floats | Ints) -> Floats:
    i, c, o = (_column(MODELS, price) * 1e-6 for price in ("input_usd", "cached_usd", "output_usd"))
    return (prompt - cached) * i + cached * c + output * o


def _latency(rng: np.random.Generator, tasks: _Tasks, tokens: _Tokens) -> Floats:
    busy = _column(MODELS, "utilisation") * diurnal_load(tasks.time_s)
    queue = _column(MODELS, "queue_s") * busy / (1 - busy) * _noise(rng, QUEUE_SPREAD, busy.shape)
    prefill = _column(MODELS, "prefill_s") * (tokens.input - tokens.cached)
    decode = _column(MODELS, "decode_s") * tokens.output
    slow = (1 + LOAD_SLOWDOWN * busy) * _noise(rng, SPEED_SPREAD, busy.shape)
    return queue + slow * (_column(MODELS, "first_token_s") + prefill + decode)


def _propensity(rng: np.random.Generator, tasks: _Tasks, stake: Floats) -> Floats:
    """What the logged policy does, shape (n, 5): a habit or a softmax, and a little exploration."""
    seen = tasks.difficulty + SIGNAL_SPREAD * rng.standard_normal(tasks.value.shape)
    success = _sigmoid(_success_logit(tasks, seen))
    output = tasks.of_class("answer_tokens") * (1 + _column(MODELS, "reasoning"))
    prompt = tasks.of_class("input_tokens")
    cost = _cost(prompt, tasks.of_class("cached") * prompt, output)
    net = success - (cost + stake * _column(MODELS, "rash") * (1 - success)) / tasks.value
    habits = np.array([[m.name == t.habit for m in MODELS] for t in TENANTS])[tasks.tenant.ravel()]
    # A tenant with a habit has no temperature; 1 stands in, and its softmax is not used.
    temperature = np.array([t.temperature or 1.0 for t in TENANTS])[tasks.tenant]
    weight = np.exp((net - net.max(axis=1, keepdims=True)) / temperature)
    softmax = weight / weight.sum(axis=1, keepdims=True)
    policy = np.where(habits.any(axis=1, keepdims=True), habits, softmax)
    return EXPLORE / len(MODELS) + (1 - EXPLORE) * policy


# ---- Risk in joint scenarios ----


def scenario_shocks(rng: np.random.Generator) -> Floats:
    """How hard each scenario hits each class and model, shape (6, 5, 16).

    Normal scores in random order, not normal draws: with 16 scenarios only, every seed then has the same tail.
    """
    scores = np.array([NormalDist().inv_cdf((s + 0.5) / SCENARIOS) for s in range(SCENARIOS)])

    def shuffled(count: int) -> Floats:
        return rng.permuted(np.tile(scores, (count, 1)), axis=1)

    by_class, by_model = shuffled(len(CLASSES))[:, None, :], shuffled(len(MODELS))[None, :, :]
    return np.exp(SHOCK_ALL * shuffled(1) + SHOCK_CLASS * by_class + SHOCK_MODEL * by_model)


def _scenarios(rng: np.random.Generator, tasks: _Tasks, risk: Floats, shocks: Floats) -> pa.ListArray[Any]:
    """Loss per row and scenario; rows are scaled so that their mean is `risk`."""
    loss = np.zeros((*risk.shape, SCENARIOS), dtype=np.float64)
    acts = np.flatnonzero(risk[:, 0])
    weight = shocks[tasks.kind.ravel()[acts]]
    weight = weight * _noise(rng, SHOCK_ROW, weight.shape)
    loss[acts] = weight * (risk[acts, :, None] / weight.mean(axis=2, keepdims=True))
    offsets = pa.array(np.arange(0, loss.size + 1, SCENARIOS), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(loss.ravel()))
