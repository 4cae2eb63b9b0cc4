"""Who goes first and who is let in: at quoted prices, beside FCFS, shortest first and fair shares. SIMULATED.

    WALRAS_DATA=FOLDER python benchmarks/bench_scheduling.py --write    # ten minutes; docs/benchmarks.md and docs/congestion.svg
    ... --seeds 2                                                       # a first look

Azure code and Mooncake conversation at 0.9 of the rate that one worker sustains. Neither trace has tenants: who sends what, what
an answer is worth and what a second costs are drawn anew with each seed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from page import PAGE, write_section
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Order, Schedule
from walras.engine.steps import StepTimes
from walras.engine.traces import read_trace
from walras.supply.scheduling import EVERY_S, WINDOW_S, run_at_prices

PROFILE, BLOCK, CHUNK, INTERVAL_S = "h100-qwen3-32b-tp8", 16, 512, 5.0
TRACES = {"Azure code": ("azure_code_2023", 0), "Mooncake": ("mooncake_conversation", CHUNK)}
LOAD, TENANTS, DELAY_PRICE, PATIENCE_S = 0.9, 8, 0.01, 60.0
"""On average: USD per second (a person at 36 USD an hour), and seconds of that which an answer is worth."""
SPREADS = (0.0, 0.5, 1.0, 1.5)
FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0)
FEWER = 5
"""Seeds at most of the tables on beliefs and on spreads."""
SPAN_S, GRID_S = 60.0, 10.0
"""Fairness is judged over windows of so many seconds, beginning every so many."""
FIGURE = PAGE.with_name("congestion.svg")


# --- the traffic ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    settings: EngineSettings
    steps: StepTimes
    requests: Requests
    """Of the trace, as it is."""
    sustained: float
    """Requests per second."""

    @classmethod
    def of(cls, data: Path, trace: str, chunk: int) -> Engine:
        profile = load_profile(PROFILE)
        settings = EngineSettings(
            profile.limits.kv_tokens // BLOCK,
            prefix_tokens=chunk,
            max_batched_tokens=profile.limits.step_tokens,
            max_sequences=profile.limits.most_sequences,
            schedule_ahead=profile.limits.steps_ahead > 0,
        )
        steps = profile.steps(settings.max_batched_tokens, settings.max_sequences)
        requests = read_trace(data / f"{trace}.parquet").requests
        at_once = replace(requests, arrival_s=np.zeros(len(requests)))
        ends = np.sort(Replay(settings, steps, None, at_once, interval_s=None).run().served().end_s)
        first, last = int(0.1 * len(ends)), int(0.9 * len(ends))
        return cls(settings, steps, requests, (last - first) / (ends[last] - ends[first]))

    def at_load(self, load: float) -> Requests:
        """The trace, its arrivals so many times as fast that the mean rate is this share of what is sustained."""
        arrival = self.requests.arrival_s
        rate = len(arrival) / arrival[-1]
        return replace(self.requests, arrival_s=arrival * rate / (load * self.sustained))

    def run(self, policy: Policy, requests: Requests) -> Replay:
        schedule = policy.change(
            Schedule.of(
                policy.order, self.steps, self.settings, admission=policy.admission, aging=policy.aging
            )
        )
        settings = replace(self.settings, schedule=schedule)
        replay = Replay(settings, self.steps, None, requests, interval_s=INTERVAL_S)
        return run_at_prices(replay, change=policy.change) if policy.priced else replay.run()


@dataclass(frozen=True)
class Policy:
    order: Order
    admission: bool = False
    priced: bool = False
    """Reads prices while it runs."""
    aging: float = 0.0
    change: Callable[[Schedule], Schedule] = lambda schedule: schedule


POLICIES = {
    "FCFS": Policy("fcfs"),
    "shortest first": Policy("shortest"),
    "fair shares (VTC)": Policy("vtc"),
    "λ over own seconds, no prices": Policy("priced"),
    "priority": Policy("priced", priced=True),
    "admission, own delay only": Policy("fcfs", admission=True),
    "admission": Policy("fcfs", admission=True, priced=True),
    "shortest first and admission": Policy("shortest", admission=True, priced=True),
    "priority and admission": Policy("priced", admission=True, priced=True),
}
BOTH = "priority and admission"


def drawn(requests: Requests, spread: float, seed: int) -> Requests:
    """With tenants, the k-th of a size in proportion to 1/k, and λ and V that are lognormal: `spread` is the sd in log between
    tenants, and half of it within them. Means over the requests are the same at every spread."""
    rng, n = np.random.default_rng(seed), len(requests)
    share = 1 / np.arange(1, TENANTS + 1)
    tenant = rng.choice(TENANTS, n, p=share / share.sum())
    of_tenant = np.exp(spread * rng.standard_normal((2, TENANTS)))
    own = np.exp(spread / 2 * rng.standard_normal((2, n)))
    delay_price, value = of_tenant[:, tenant] * own
    return replace(
        requests,
        tenant=tenant,
        delay_price=DELAY_PRICE * delay_price / delay_price.mean(),
        value=DELAY_PRICE * PATIENCE_S * value / value.mean(),
        expected_output=np.full(n, requests.output_tokens.mean()),
    )


# --- what came of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    utility: np.ndarray
    """(N,) USD: V − λ·L, 0 for the turned away."""
    latency_s: np.ndarray
    """Of those served."""
    tenant_p95_s: np.ndarray
    tenant_utility: np.ndarray
    """(tenants,) a request's mean."""
    longest_wait_s: float
    away: float
    """Share of the requests."""
    jain: float
    apart: float

    @property
    def welfare(self) -> float:
        return float(self.utility.mean())


def outcome(replay: Replay, true: Requests) -> Outcome:
    """Judged by the true λ and V, whatever the engine was told."""
    served, n = replay.served(), len(true)
    assert true.tenant is not None
    assert true.value is not None
    assert true.delay_price is not None
    assert len(served) + len(replay.turned_away()) == n
    utility, tenants = np.zeros(n), true.tenant[served.request]
    utility[served.request] = true.value[served.request]
    utility[served.request] -= true.delay_price[served.request] * served.latency_s
    by_tenant = [served.latency_s[tenants == k] for k in range(TENANTS)]
    jain, apart = fairness(replay, true)
    return Outcome(
        utility=utility,
        latency_s=served.latency_s,
        tenant_p95_s=np.array([np.quantile(of, 0.95) if len(of) else np.nan for of in by_tenant]),
        tenant_utility=np.array([utility[true.tenant == k].mean() for k in range(TENANTS)]),
        longest_wait_s=float(served.queue_s.max()),
        away=1 - len(served) / n,
        jain=jain,
        apart=apart,
    )


def fairness(replay: Replay, requests: Requests) -> tuple[float, float]:
    """Over windows, and tenants that had someone in line all through: mean of Jain's index of the service they got (1 for a prompt
    token, 2 for an output token, counted when a request begins), and the largest difference between two of them."""
    served = replay.served()
    begin = served.arrival_s + served.queue_s
    assert requests.tenant is not None
    tenant = requests.tenant[served.request]
    service = (requests.input_tokens + 2 * requests.output_tokens)[served.request]
    grid = np.arange(0.0, served.end_s.max() + GRID_S, GRID_S)
    got, line = np.zeros((2, TENANTS, len(grid)))
    for k in range(TENANTS):
        mine = tenant == k
        order = np.argsort(begin[mine])
        sums = np.append(0, np.cumsum(service[mine][order]))
        started = np.searchsorted(begin[mine][order], grid, "right")
        got[k] = sums[started]
        line[k] = np.searchsorted(np.sort(served.arrival_s[mine]), grid, "right") - started
    steps, jains, apart = int(SPAN_S / GRID_S), [], 0.0
    for at in range(len(grid) - steps):
        there = (line[:, at : at + steps + 1] > 0).all(axis=1)
        if there.sum() > 1:
            mine = got[there, at + steps] - got[there, at]
            jains.append(mine.sum() ** 2 / (len(mine) * (mine**2).sum()) if mine.any() else 1.0)
            apart = max(apart, float(mine.max() - mine.min()))
    return (float(np.mean(jains)), apart) if jains else (np.nan, np.nan)


def known(values: list[float], digits: str) -> str:
    """The mean of the seeds that have a window to judge by."""
    found = [value for value in values if np.isfinite(value)]
    return f"{np.mean(found):{digits}}" if found else "–"


def interval(values: list[float] | np.ndarray, digits: str = ".3f") -> str:
    """The mean, and its 95% interval over seeds."""
    mean, n = np.mean(values), len(values)
    if n < 2:
        return f"{mean:{digits}}"
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return f"{mean:{digits}} ± {half:{digits}}"


def signed(values: list[float] | np.ndarray, digits: str = ".2f") -> str:
    return interval(values, "+" + digits).replace("± +", "± ")


# --- tables -----------------------------------------------------------------------------------------------------------


def policies_table(engine: Engine, seeds: int) -> list[str]:
    lines = [
        "| | welfare, USD a request | against FCFS | p50 s | p95 s | p95 by tenant, s | longest wait, s | tenants worse off | Jain | apart, k tokens | turned away |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    traffic = [drawn(engine.at_load(LOAD), 1.0, seed) for seed in range(seeds)]
    fcfs = [outcome(engine.run(POLICIES["FCFS"], one), one) for one in traffic]
    for name, policy in (*POLICIES.items(), ("priority, aging", aged(engine))):
        found = fcfs if name == "FCFS" else [outcome(engine.run(policy, one), one) for one in traffic]
        gain = [a.welfare - b.welfare for a, b in zip(found, fcfs, strict=True)]
        worse = [
            float((a.tenant_utility < b.tenant_utility - 1e-9).mean())
            for a, b in zip(found, fcfs, strict=True)
        ]
        p50, p95 = (np.mean([np.quantile(one.latency_s, q) for one in found]) for q in (0.5, 0.95))
        low, high = (np.mean([of(one.tenant_p95_s) for one in found]) for of in (np.nanmin, np.nanmax))
        cells = [
            interval([one.welfare for one in found]),
            "–" if name == "FCFS" else signed(gain, ".3f"),
            f"{p50:.1f}",
            f"{p95:.1f}",
            f"{low:.0f}–{high:.0f}",
            f"{np.mean([one.longest_wait_s for one in found]):.0f}",
            f"{np.mean(worse):.0%}",
            known([one.jain for one in found], ".2f"),
            known([one.apart / 1000 for one in found], ".0f"),
            f"{np.mean([one.away for one in found]):.1%}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def aged(engine: Engine) -> Policy:
    """Priority under which a median request gains its own rank in a minute."""
    schedule = Schedule.of("priced", engine.steps, engine.settings)
    takes = float(np.asarray(schedule.prompt_token)) * np.median(engine.requests.input_tokens)
    takes += float(np.asarray(schedule.output_token)) * engine.requests.output_tokens.mean()
    return replace(POLICIES["priority"], aging=float(DELAY_PRICE / takes / 60))


@dataclass(frozen=True)
class Case:
    """A trace with its tenants, and what FCFS makes of it."""

    engine: Engine
    true: Requests
    fcfs: float

    @classmethod
    def of(cls, engine: Engine, seeds: int, spread: float = 1.0) -> list[Case]:
        traffic = [drawn(engine.at_load(LOAD), spread, seed) for seed in range(seeds)]
        return [cls(engine, one, outcome(engine.run(POLICIES["FCFS"], one), one).welfare) for one in traffic]


def gains(
    cases: list[Case],
    policy: Policy,
    told: Callable[[Requests, np.random.Generator], Requests] = lambda true, _: true,
) -> list[float]:
    """Welfare per request over FCFS, by seed; the engine is told what `told` makes of the truth."""
    said = [told(case.true, np.random.default_rng(1000 + seed)) for seed, case in enumerate(cases)]
    return [
        outcome(case.engine.run(policy, one), case.true).welfare - case.fcfs
        for case, one in zip(cases, said, strict=True)
    ]


def spread_table(engines: dict[str, Engine], seeds: int) -> list[str]:
    names = ("shortest first", "priority", "admission", BOTH)
    lines = [f"| trace | spread | {' | '.join(names)} |", "|---|---:|" + "---:|" * len(names)]
    for (trace, engine), spread in ((item, spread) for item in engines.items() for spread in SPREADS):
        cases = Case.of(engine, seeds, spread)
        cells = [interval(gains(cases, POLICIES[name])) for name in names]
        lines.append(f"| {trace} | {spread:g} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def scaled(factor: float) -> Callable[[Requests, np.random.Generator], Requests]:
    """Answers expected so many times as long, or as short, as they are, by a coin for each request."""

    def told(true: Requests, rng: np.random.Generator) -> Requests:
        error = factor ** rng.choice([-1.0, 1.0], len(true))
        return replace(true, expected_output=np.maximum(1.0, true.output_tokens * error))

    return told


def misreported(sd: float) -> Callable[[Requests, np.random.Generator], Requests]:
    """Each tenant's λ wrong by a lognormal factor."""

    def told(true: Requests, rng: np.random.Generator) -> Requests:
        assert true.tenant is not None
        assert true.delay_price is not None
        return replace(
            true, delay_price=true.delay_price * np.exp(sd * rng.standard_normal(TENANTS))[true.tenant]
        )

    return told


def alike(true: Requests, _: np.random.Generator) -> Requests:
    """Nobody's λ and V are known: every request has the median's."""
    n = len(true)
    return replace(true, delay_price=np.full(n, DELAY_PRICE), value=np.full(n, DELAY_PRICE * PATIENCE_S))


def belief_table(engines: dict[str, Engine], seeds: int) -> list[str]:
    beliefs = {
        "λ and V known, answers at their mean": lambda true, _: true,
        "answers' lengths known": scaled(1.0),
        "answers' lengths wrong ×2 or ÷2": scaled(2.0),
        "λ of each tenant wrong, sd 0.7 in log": misreported(0.7),
        "λ of each tenant wrong, sd 1.4 in log": misreported(1.4),
        "λ and V unknown": alike,
    }
    names = ("priority", BOTH)
    head = " | ".join(f"{trace}, {name}" for trace in engines for name in names)
    lines = [f"| told | {head} |", "|---|" + "---:|" * (len(engines) * len(names))]
    cases = [Case.of(engine, seeds) for engine in engines.values()]
    for belief, told in beliefs.items():
        cells = [interval(gains(of, POLICIES[name], told)) for of in cases for name in names]
        lines.append(f"| {belief} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def boast_table(engines: dict[str, Engine], seeds: int) -> list[str]:
    """One tenant says its λ is several times what it is."""
    lines = ["| trace | says λ | to itself, USD a request | to the others |", "|---|---:|---:|---:|"]
    for trace, engine in engines.items():
        for factor in (2.0, 5.0):
            own, others = [], []
            for seed in range(seeds):
                true = drawn(engine.at_load(LOAD), 1.0, seed)
                assert true.tenant is not None
                assert true.delay_price is not None
                mine = true.tenant == seed % TENANTS
                said = replace(true, delay_price=true.delay_price * np.where(mine, factor, 1.0))
                honest, boast = (
                    outcome(engine.run(POLICIES["priority"], one), true).utility for one in (true, said)
                )
                own.append(float((boast - honest)[mine].mean()))
                others.append(float((boast - honest)[~mine].mean()))
            lines.append(f"| {trace} | ×{factor:g} | {signed(own, '.4f')} | {signed(others, '.4f')} |")
            print(lines[-1], flush=True)
    return lines


def quote_table(engines: dict[str, Engine], seeds: int) -> list[str]:
    """Admission, each request charged so many times its quote."""
    lines = ["| trace | order | " + " | ".join(f"{factor:g}×" for factor in FACTORS) + " |"]
    lines.append("|---|---|" + "---:|" * len(FACTORS))
    for (trace, engine), name in ((item, name) for item in engines.items() for name in ("admission", BOTH)):
        cells, cases = [], Case.of(engine, seeds)
        for factor in FACTORS:

            def charged(schedule: Schedule, factor: float = factor) -> Schedule:
                return replace(schedule, quote=factor * np.asarray(schedule.quote))

            cells.append(interval(gains(cases, replace(POLICIES[name], change=charged))))
        lines.append(f"| {trace} | {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


# --- P3: one tenant's long contexts, and the others -------------------------------------------------------------------

VOLUMES = (0.0, 0.1, 0.2, 0.3, 0.4)
"""Work that the tenant would send if it cost nothing, as a share of the engine's time."""
BASE, LONG_PROMPT, LONG_CV, LONG_ANSWER = 0.3, 32_000, 0.5, 200
LONG_VALUE, LONG_SPREAD = 0.5, 1.0
"""USD per engine second of the median request of the long-context tenant, and sd in log."""
CERTAIN, DEAREST, FLATS = 1e9, 1e-4, (5e-6, 1e-5, 2e-5, 4e-5, 8e-5)
"""USD that an answer to the others is worth; the dearest flat price looked at, and those of which one is best, USD per token."""


def with_long(engine: Engine, volume: float, seed: int) -> tuple[Requests, np.ndarray]:
    """Azure's hour begun at a random place, and a tenant that sends long prompts; and which are its own. Its requests are worth
    something to it; the others' are answered whatever it takes."""
    rng, base = np.random.default_rng(seed), engine.at_load(BASE)
    span, n = float(base.arrival_s[-1]), len(base)
    arrival = (base.arrival_s + rng.uniform(0, span)) % span
    sigma = np.sqrt(np.log1p(LONG_CV**2))
    schedule = Schedule.of("fcfs", engine.steps, engine.settings)
    prompt_s, answer_s = (
        float(np.asarray(schedule.prompt_token_s)),
        float(np.asarray(schedule.output_token_s)),
    )
    count = rng.poisson(volume * span / (LONG_PROMPT * prompt_s + LONG_ANSWER * answer_s))
    prompts = np.exp(np.log(LONG_PROMPT) - sigma**2 / 2 + sigma * rng.standard_normal(count))
    prompts = np.clip(prompts, 8_000, 120_000).astype(np.int64)
    work = prompts * prompt_s + LONG_ANSWER * answer_s
    value = LONG_VALUE * work * np.exp(LONG_SPREAD * rng.standard_normal(count))
    times = np.concatenate([arrival, rng.uniform(0, span, count)])
    order = np.argsort(times, kind="stable")
    requests = Requests(
        times[order],
        np.concatenate([base.input_tokens, prompts])[order],
        np.concatenate([base.output_tokens, np.full(count, LONG_ANSWER)])[order],
        delay_price=np.full(n + count, DELAY_PRICE),
        tenant=(np.arange(n + count) >= n).astype(np.int64)[order],
        value=np.concatenate([np.full(n, CERTAIN), value])[order],
    )
    return requests, order >= n


def flat(usd_per_token: float) -> Policy:
    """The same price for every token at every moment."""

    def by_token(schedule: Schedule) -> Schedule:
        return replace(
            schedule,
            prompt_token=1.0,
            pair=0.0,
            line=0.0,
            output_token=1.0,
            held_token=0.0,
            quote=usd_per_token,
        )

    return replace(POLICIES["admission"], change=by_token)


@dataclass(frozen=True)
class Fingerprint:
    """(volumes, seeds) of one way of pricing."""

    p95_s: np.ndarray
    """Of the others."""
    sent: np.ndarray
    """Share of its requests that the tenant sends."""
    welfare: np.ndarray
    """USD per second: the tenant's value less everybody's delay."""

    def slopes(self) -> np.ndarray:
        """(seeds,) seconds of the others' p95 for 10% of the engine's time more."""
        x = np.array(VOLUMES) * 10
        return np.array([np.polyfit(x, column, 1)[0] for column in self.p95_s.T])


def fingerprint(
    engine: Engine, policy: Policy, seeds: int, volumes: tuple[float, ...] = VOLUMES
) -> Fingerprint:
    p95, sent, welfare = np.zeros((3, len(volumes), seeds))
    for v, volume in enumerate(volumes):
        for seed in range(seeds):
            requests, long = with_long(engine, volume, seed)
            replay = engine.run(policy, requests)
            served = replay.served()
            mine = long[served.request]
            p95[v, seed] = np.quantile(served.latency_s[~mine], 0.95)
            sent[v, seed] = mine.sum() / max(long.sum(), 1)
            assert requests.value is not None
            total = requests.value[served.request][mine].sum() - DELAY_PRICE * served.latency_s.sum()
            welfare[v, seed] = total / requests.arrival_s[-1]
    return Fingerprint(p95, sent, welfare)


def matched(engine: Engine, congestion: Fingerprint, seeds: int) -> float:
    """The flat price, USD per token, at which the tenant sends as much of its largest volume as at congestion prices."""
    low, high, wanted = 0.0, DEAREST, congestion.sent[-1, :seeds].mean()
    for _ in range(10):
        middle = (low + high) / 2
        sent = fingerprint(engine, flat(middle), seeds, VOLUMES[-1:]).sent.mean()
        low, high = (middle, high) if sent > wanted else (low, middle)
    return high


def fingerprints(engine: Engine, seeds: int) -> dict[str, Fingerprint]:
    """Nothing, a flat price with as much sent, the flat price that is best with hindsight, and congestion prices."""
    congestion = fingerprint(engine, POLICIES["admission"], seeds)
    same = matched(engine, congestion, min(seeds, 3))
    few = {usd: fingerprint(engine, flat(usd), min(seeds, 3)).welfare.sum() for usd in FLATS}
    best = max(few, key=lambda usd: few[usd])
    return {
        "no price": fingerprint(engine, flat(0.0), seeds),
        f"flat, as much sent: {1e6 * same:.1f} USD per M tokens": fingerprint(engine, flat(same), seeds),
        f"flat, best in hindsight: {1e6 * best:.1f}": fingerprint(engine, flat(best), seeds),
        "congestion": congestion,
    }


def fingerprint_table(found: dict[str, Fingerprint]) -> list[str]:
    lines = [
        "| prices | "
        + " | ".join(f"{volume:.0%}" for volume in VOLUMES)
        + " | slope, s per 10% | sent, at most volume | welfare there, USD a second |",
        "|---|" + "---:|" * (len(VOLUMES) + 3),
    ]
    for name, one in found.items():
        cells = [interval(row, ".1f") for row in one.p95_s]
        cells += [interval(one.slopes(), ".2f"), f"{one.sent[-1].mean():.0%}", interval(one.welfare[-1])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    nothing, same, best, congestion = (one.slopes() for one in found.values())
    lines.append("")
    lines.append(
        f"Slope under congestion prices, less that without a price: {signed(congestion - nothing)} s per 10%; less that of the flat price "
        f"with as much sent: {signed(congestion - same)}; less that of the best flat price: {signed(congestion - best)}."
    )
    return lines


# --- the figure -------------------------------------------------------------------------------------------------------

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #333 } .grid { stroke: #ddd } .axis { stroke: #888 }
  path { fill: none; stroke-width: 2; stroke-linejoin: round }
  .s0 { stroke: #6b7280 } .s1 { stroke: #c2410c } .s2 { stroke: #1d63c4 }
  .b0 { fill: #6b7280 } .b1 { fill: #c2410c } .b2 { fill: #1d63c4 } .band { opacity: .13; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd } .grid { stroke: #444 } .axis { stroke: #999 }
    .s0 { stroke: #a3aab5 } .s1 { stroke: #fb8b4d } .s2 { stroke: #6ba6f5 }
    .b0 { fill: #a3aab5 } .b1 { fill: #fb8b4d } .b2 { fill: #6ba6f5 } .band { opacity: .2 }
  }
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 380, 58, 134, 46, 52
LABELS = ("no price", "flat, as much sent", "congestion")


def figure(p95_s: list[np.ndarray]) -> str:
    """The others' p95, (volumes, seeds) for each label, against the tenant's volume: mean over seeds, and its 95% interval."""
    n = p95_s[0].shape[1]
    t = stats.t.ppf(0.975, n - 1) / np.sqrt(n) if n > 1 else 0.0
    means = [one.mean(axis=1) for one in p95_s]
    halves = [t * one.std(axis=1, ddof=min(1, n - 1)) for one in p95_s]
    most = max((m + h).max() for m, h in zip(means, halves, strict=True))
    step = 10.0 ** np.floor(np.log10(most))
    step = step / 2 if most / step < 4 else step
    top = step * np.ceil(most / step)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / VOLUMES[-1] * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - max(y, 0.0) / top * (HEIGHT - TOP - BOTTOM),
        )

    def line(ys: np.ndarray) -> str:
        return " L".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in zip(VOLUMES, ys, strict=True)))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t">',
        "<title id=\"t\">Other tenants' p95 latency against one tenant's volume of long prompts, under flat and under congestion prices"
        "</title>",
        f"<style>{STYLE}</style>",
        f'<text x="{LEFT}" y="20">p95 latency of tenants who send no long prompts, seconds (SIMULATED)</text>',
        f'<text x="{LEFT}" y="37">mean over {n} seeds; shaded: 95% interval of the mean</text>',
    ]
    for tick in np.arange(0.0, top + step / 2, step):
        x, y = at(0.0, tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in VOLUMES:
        x, y = at(tick, 0.0)
        parts.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{tick:.0%}</text>')
    (x, y), (right, _) = at(0.0, 0.0), at(VOLUMES[-1], 0.0)
    parts += [
        f'<line class="axis" x1="{x:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text x="{(x + right) / 2:.1f}" y="{HEIGHT - 10}" text-anchor="middle">long prompts that one tenant would send for '
        "nothing, of the engine's time</text>",
    ]
    for k, (name, mean, half) in enumerate(zip(LABELS, means, halves, strict=True)):
        back = " L".join(reversed(line(mean - half).split(" L")))
        x, y = at(VOLUMES[-1], mean[-1])
        parts += [
            f'<path class="band b{k}" d="M{line(mean + half)} L{back} Z"/>',
            f'<path class="s{k}" d="M{line(mean)}"/>',
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{name}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


# --- the page ---------------------------------------------------------------------------------------------------------


def section(engines: dict[str, Engine], seeds: int) -> tuple[str, str]:
    policies = {name: policies_table(engine, seeds) for name, engine in engines.items()}
    found = fingerprints(engines["Azure code"], seeds)
    prints = fingerprint_table(found)
    print("\n".join(prints), flush=True)
    quotes, fewer = quote_table(engines, seeds), min(seeds, FEWER)
    beliefs, boasts = belief_table(engines, fewer), boast_table(engines, fewer)
    spreads = spread_table(engines, fewer)
    tables = [f"**{name}**\n\n{chr(10).join(lines)}" for name, lines in policies.items()]
    sustained = " and ".join(f"{engine.sustained:.1f} ({name})" for name, engine in engines.items())
    written = f"""\
## Scheduling at quoted prices

**SIMULATED**: one worker of `{PROFILE}`, arrivals of the traces at {LOAD:g} of the rate it sustains when all requests wait from the
beginning, {sustained} requests per second. The traces name no tenants: {TENANTS} are drawn, the k-th of a size in proportion to 1/k, with
lognormal V and λ (sd in log 1 between tenants, 0.5 within), on average {DELAY_PRICE:g} USD a second and {DELAY_PRICE * PATIENCE_S:g} USD an answer. Utility is
V − λ·latency, 0 for who is turned away. Engines know a prompt, what of it is in memory, λ, V, and of answers the trace's mean
length; *priority* and *admission* also read live prices every {EVERY_S:g} s over {WINDOW_S:g} s. Mean and 95% interval of {seeds} seeds (tenants, V and λ
drawn anew); gains are paired.

{(2 * chr(10)).join(tables)}

*λ over own seconds* is priority without prices: engine seconds from step times alone. *Admission, own delay only* quotes nothing for
others. *Aging*: a median request gains its own rank in a minute. *Tenants worse off* than under FCFS, by mean utility. *Jain* is the mean over
windows of {SPAN_S:.0f} s of Jain's index of service (1 a prompt token, 2 an output token) among tenants that had someone in line all through;
*apart* the largest difference between two of them in a window.

### Is the quote the right one?

Gain over FCFS, USD a request, of admission that charges so many times the quote; 0: own delay only. Were quotes exact and requests
the only ones to decide, 1× would be best.

{chr(10).join(quotes)}

### Wrong beliefs

Gain over FCFS, USD a request, where the engine is told something else than what is true. {fewer} seeds here and in the next two tables.

{chr(10).join(beliefs)}

One tenant boasts (priority; USD a request, against its telling the truth): priority at a λ that is only said, not charged, invites it.

{chr(10).join(boasts)}

### How much heterogeneity it takes

Gain over FCFS, USD a request, by the sd in log of V and λ between tenants; their means stay.

{chr(10).join(spreads)}

### One tenant's long prompts, and the others

Azure code at {BASE:g} of what is sustained, begun at a random place of the hour, everyone at {DELAY_PRICE:g} USD a second. One tenant would send prompts of
{LONG_PROMPT:,} tokens on average (Poisson, cv {LONG_CV:g}, {LONG_ANSWER} output tokens), worth {LONG_VALUE:g} USD per engine second in the median (lognormal, sd {LONG_SPREAD:g} in log).
It sends a request if that is worth its own delay and its price. The others send what they send. p95 of the others' latency, s, by what the
tenant would send for nothing, as a share of the engine's time (fingerprint P3); 95% intervals over {seeds} seeds.

{chr(10).join(prints)}

![The others' p95 against one tenant's long prompts](congestion.svg)
"""
    return written, figure([one.p95_s for name, one in found.items() if "hindsight" not in name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--write", action="store_true", help="rewrite the section of docs/benchmarks.md, and the figure"
    )
    options = parser.parse_args()
    if "WALRAS_DATA" not in os.environ:
        raise SystemExit("WALRAS_DATA is not set: it names the folder of the shared data sets")
    data = Path(os.environ["WALRAS_DATA"]) / "serving"
    began = time.process_time()
    engines = {name: Engine.of(data, *of) for name, of in TRACES.items()}
    written, drawing = section(engines, options.seeds)
    print(written, f"{time.process_time() - began:.0f} CPU seconds")
    if options.write:
        FIGURE.write_text(drawing, encoding="utf-8")
        write_section("scheduling", written)


if __name__ == "__main__":
    main()
