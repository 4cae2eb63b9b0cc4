"""Quoted resource prices against what requests cost others when the future is run with and without them. SIMULATED.

    python benchmarks/bench_externality.py --probes FOLDER --write

States come from the replay of a real trace, futures are stretches of it from other times. What is calibrated is calibrated on the
first half of each trace (--calibrate), also with its arrivals made more or less even, and judged on the second. The folder keeps what
requests cost; states are read anew each time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.stats import rankdata

from page import write_section
from walras.engine.externality import externality, futures
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.engine.steps import StepTimes
from walras.engine.traces import read_trace
from walras.supply.resource_prices import (
    CALIBRATION,
    Amounts,
    Calibration,
    EngineModel,
    amounts_of,
    expected_amounts,
    quote,
)
from walras.supply.state import EngineState, state_of

TRACES = {"Azure code": "azure_code_2023.parquet", "Mooncake conversation": "mooncake_conversation.parquet"}
LOADS = (0.3, 0.6, 0.8, 0.95)
PROFILE = "rtxpro6000-llama3.1-8b"
OTHER = "h100-80gb-llama2-70b-tp8"
HORIZON_S, WINDOW_S = 300.0, 900.0
FUTURES = 20
TESTED, TRAINED = 260, {"Azure code": 100, "Mooncake conversation": 120}
"""Requests of each trace and load."""
OUTSIDE, OTHERS, CUT = {"Azure code": 60, "Mooncake conversation": 100}, 60, 50
"""The same with four workers, with the other profile, and of the look twice as far ahead."""
ALTERED = 60
"""The same of a trace with arrivals that are not its own."""
BINS_S = (5, 10, 30)
"""Over which the unevenness of arrivals is measured."""
QUANTUM_S = 3.0
"""Mooncake's arrivals come in batches this far apart, where the trace was rounded."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is probed."""

    trace: str
    half: str
    load: float
    requests: int
    profile: str = PROFILE
    workers: int = 1
    horizon_s: float = HORIZON_S
    arrivals: str = "own"
    """Or "even", "mixed" (half of them even), "bursty" (as Azure code's first half)."""

    @property
    def seed(self) -> int:
        other = 10_000 * ("own", "even", "mixed", "bursty").index(self.arrivals)
        return (
            other + 1000 * (self.half == "test") + 100 * (self.trace == "Azure code") + round(100 * self.load)
        )

    @property
    def file(self) -> str:
        name = f"{self.trace}-{self.half}-{self.load}-{self.profile}-{self.workers}-{self.horizon_s:g}-{self.requests}"
        return f"{name}{self.arrivals.replace('own', '')}".replace(" ", "_") + ".npz"


@dataclass(frozen=True, slots=True)
class Probes:
    """R requests, each in a state of its own."""

    lengths: Any
    """(R, 2) tokens of prompt and answer."""
    costs: Any
    """(F, R) seconds of others' delay."""
    own: Any
    """(4, R) mean tokens found in memory, seconds in line, of prefill, of decoding."""
    worker: Any
    """(R,) that served it."""
    capacity: float
    """Requests a second that the engine sustains."""

    @property
    def truth(self) -> Any:
        return self.costs.mean(axis=0)


# --- probing ----------------------------------------------------------------------------------------------------------


def engine_of(profile: str, workers: int) -> tuple[EngineSettings, StepTimes]:
    of = load_profile(profile)
    settings = EngineSettings(
        of.limits.kv_tokens // 16,
        prefix_tokens=512,
        max_batched_tokens=of.limits.step_tokens,
        max_sequences=of.limits.most_sequences,
        schedule_ahead=of.limits.steps_ahead > 0,
        workers=workers,
    )
    return settings, of.steps()


def half_of(trace: str, half: str) -> Requests:
    """The first or second half hour. Mooncake's batches are spread over the time until the next one."""
    requests = read_trace(Path(os.environ["WALRAS_DATA"]) / "serving" / TRACES[trace]).requests
    arrival = requests.arrival_s.copy()
    if trace == "Mooncake conversation":
        batch, first = np.unique(arrival, return_index=True)
        gap = np.diff(np.append(batch, batch[-1] + QUANTUM_S))
        rank = np.repeat(batch, np.diff(np.append(first, len(arrival))))
        inside = np.random.default_rng(0).uniform(size=len(arrival))
        arrival = np.sort(rank + inside * gap[np.searchsorted(batch, rank)])
    middle = int(np.searchsorted(arrival, arrival[-1] / 2))
    low, high = (0, middle) if half == "train" else (middle, len(arrival))
    return rows_of(requests, low, high, arrival[low:high] - arrival[low])


def rows_of(requests: Requests, low: int, high: int, arrival_s: Any) -> Requests:
    offsets, ids = requests.prefix_offsets, requests.prefix_ids
    if offsets is not None and ids is not None:
        ids = ids[offsets[low] : offsets[high]]
        offsets = offsets[low : high + 1] - offsets[low]
    return Requests(
        arrival_s, requests.input_tokens[low:high], requests.output_tokens[low:high], offsets, ids
    )


def capacity_of(settings: EngineSettings, steps: StepTimes, requests: Requests) -> float:
    """Requests a second where all of them wait from the beginning."""
    at_once = rows_of(requests, 0, len(requests), np.zeros(len(requests)))
    end = Replay(settings, steps, routing_of(settings), at_once, interval_s=None).run().served().end_s
    return len(requests) / float(end.max())


def routing_of(settings: EngineSettings) -> Routing:
    return Routing.kv(settings.block_tokens) if settings.workers > 1 else Routing.round_robin()


def traffic_of(cell: Cell, requests: Requests, rate: float) -> Requests:
    """The half at so many requests a second."""
    arrival = requests.arrival_s * (len(requests) / float(requests.arrival_s[-1]) / rate)
    random, many = np.random.default_rng(cell.seed + 1), len(requests)
    even = np.sort(random.uniform(0, arrival[-1], many))
    if cell.arrivals == "even":
        arrival = even
    elif cell.arrivals == "mixed":
        arrival = np.sort(np.where(random.uniform(size=many) < 0.5, arrival, even))
    elif cell.arrivals == "bursty":
        other = half_of("Azure code", "train").arrival_s
        turn, inside = np.divmod(even, other[-1])
        arrival = turn * other[-1] + np.interp(inside, np.linspace(0, other[-1], len(other)), other)
    return rows_of(requests, 0, many, arrival)


def visited(cell: Cell, capacity: float) -> Iterator[tuple[int, Replay, Requests, np.random.Generator]]:
    """The rows that are probed, in order; the replay when each comes, without it; the traffic; and what draws the rest."""
    settings, steps = engine_of(cell.profile, cell.workers)
    requests = traffic_of(cell, half_of(cell.trace, cell.half), cell.load * capacity)
    random = np.random.default_rng(cell.seed)
    chosen = np.sort(
        random.choice(np.arange(len(requests) // 10, len(requests)), cell.requests, replace=False)
    )
    replay, fed = Replay(settings, steps, routing_of(settings)), 0
    for row in chosen.tolist():
        if row > fed:
            replay.feed(rows_of(requests, fed, row, requests.arrival_s[fed:row]))
        fed = row
        yield row, replay.run(float(requests.arrival_s[row])), requests, random


def probe(cell: Cell) -> tuple[Probes, float]:
    """And the CPU seconds it took."""
    began = time.process_time()
    settings, steps = engine_of(cell.profile, cell.workers)
    capacity = capacity_of(settings, steps, half_of(cell.trace, cell.half))
    lengths, costs, own, worker = [], [], [], []
    for row, replay, requests, random in visited(cell, capacity):
        now = replay.now_s
        coming = futures(requests, FUTURES, now, cell.horizon_s, random)
        of = externality(replay, rows_of(requests, row, row + 1, np.array([now])), coming, cell.horizon_s)
        lengths.append([requests.input_tokens[row], requests.output_tokens[row]])
        costs.append(of.costs[:, 0])
        got = (of.cached_tokens, of.queue_s, of.prefill_s, of.decode_s)
        own.append([_mean(column[:, 0]) for column in got])
        worker.append(max(int(of.worker[0]), 0))
    columns = (np.array(lengths), np.array(costs).T, np.array(own).T, np.array(worker))
    return Probes(*columns, capacity), time.process_time() - began


def long_run(cell: Cell, capacity: float) -> list[EngineState]:
    """By worker: rates and means over the whole half, which is what futures are drawn from."""
    settings, steps = engine_of(cell.profile, cell.workers)
    requests = traffic_of(cell, half_of(cell.trace, cell.half), cell.load * capacity)
    whole = Replay(settings, steps, routing_of(settings), requests).run()
    late = whole.now_s / float(requests.arrival_s[-1])  # the last ones end after the last arrival
    rates = ("arrivals_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "preemptions_per_s")
    states = [state_of(whole, worker, whole.now_s) for worker in range(cell.workers)]
    return [replace(of, **{rate: late * getattr(of, rate) for rate in rates}) for of in states]


def states_of(cell: Cell, probes: Probes, *, recent: bool = False) -> list[EngineState]:
    """Of the worker that each request went to, when it came; rates of the long run, or `recent`."""
    found, rates = [], long_run(cell, probes.capacity)
    for (_, replay, *_), worker in zip(visited(cell, probes.capacity), probes.worker.tolist(), strict=True):
        now = state_of(replay, worker, WINDOW_S)
        gauges = {name: getattr(now, name) for name in ("at_s", "running", "waiting", "kv_use")}
        found.append(now if recent else replace(rates[worker], **gauges))
    return found


def _mean(column: Any) -> float:
    there = column[~np.isnan(column)]
    return float(there.mean()) if there.size else np.nan


def probed(cell: Cell, folder: Path | None) -> Probes:
    """From the folder, where it is there already."""
    path = None if folder is None else folder / cell.file
    if path is not None and path.exists():
        with np.load(path) as kept:
            return Probes(
                *(kept[name] for name in ("lengths", "costs", "own", "worker")), float(kept["capacity"])
            )
    found, cpu_s = probe(cell)
    print(f"{cell.file} {cpu_s:.0f} CPU s", flush=True)
    if path is not None:
        np.savez(path, **{name: getattr(found, name) for name in Probes.__slots__})
    return found


Models = Sequence[tuple[EngineModel, Amounts, Amounts]]

# --- quoting ----------------------------------------------------------------------------------------------------------


def models_of(
    cell: Cell, probes: Probes, *, recent: bool = False
) -> list[tuple[EngineModel, Amounts, Amounts]]:
    """For each request the engine when it came, what it took in the end, and what was expected."""
    settings, steps = engine_of(cell.profile, cell.workers)
    found = []
    states = states_of(cell, probes, recent=recent)
    for state, (prompt, answer), own in zip(states, probes.lengths, probes.own.T, strict=True):
        cached, _, prefill_s, decode_s = (float(value) for value in own)
        ante = expected_amounts(state, settings, steps, float(prompt), cached_tokens=np.nan_to_num(cached))
        bill = ante
        if not np.isnan(decode_s):
            bill = amounts_of(
                settings, prompt, answer, cached_tokens=cached, prefill_s=prefill_s, decode_s=decode_s
            )
        found.append((EngineModel.of(state, settings, steps), bill, ante))
    return found


def quotes(models: Models, of: Calibration, horizon_s: float, which: int = 1, more: Any = 1.0) -> Any:
    """(R,) seconds of others' delay; `which`: 1 the bill, 2 ex ante; `more`: (R,) times what comes while there is a line."""
    each = np.broadcast_to(of.behind * more, len(models))
    return np.array(
        [
            quote(model[0].prices(1.0, horizon_s, replace(of, behind=behind)), model[which])
            for model, behind in zip(models, each.tolist(), strict=True)
        ]
    )


def off(quoted: Any, truth: Any) -> float:
    """Squared logs: of the ratio of means (thrice), and of each request, a tenth of the mean added to both."""
    mean = truth.mean()
    each = np.log((quoted + 0.1 * mean) / (np.maximum(truth, 0) + 0.1 * mean))
    return float(3 * np.log(quoted.mean() / mean) ** 2 + np.mean(each**2))


Pairs = dict[Cell, tuple[Models, Any]]


def misfit(values: Any, pairs: Pairs, bursts: dict[Cell, Any] | None = None) -> float:
    """Of all cells, with these constants; the last value is the power of the bursts, where there are some."""
    names = Calibration.__slots__
    if (np.asarray(values[: len(names)]) < 0).any():
        return np.inf
    of, total = Calibration(*map(float, values[: len(names)])), 0.0
    for cell, (models, truth) in pairs.items():
        more = 1.0 if bursts is None else bursts[cell] ** values[-1]
        total += off(quotes(models, of, HORIZON_S, more=more), truth)
    return total


def fitted(pairs: Pairs, bursts: dict[Cell, Any] | None = None) -> Any:
    """The constants that fit best, and the misfit."""
    start = [getattr(CALIBRATION, name) for name in Calibration.__slots__] + [0.1] * (bursts is not None)
    return minimize(misfit, start, (pairs, bursts), "Nelder-Mead", options={"maxfev": 200, "xatol": 1e-3})


def bursts_of(cell: Cell, probes: Probes, bin_s: int) -> Any:
    """(R,) Morisita's index of the arrivals that came to the worker in the window: pairs in one bin over those of even arrivals."""
    found = []
    for (_, replay, *_), worker in zip(visited(cell, probes.capacity), probes.worker.tolist(), strict=True):
        past = replay.intervals()
        inside = past.running[:, worker] + past.waiting[:, worker]
        came = (past.finished[:, worker] + np.diff(inside, prepend=0))[-round(WINDOW_S) :]
        bins = len(came) // bin_s
        n = came[len(came) - bins * bin_s :].reshape(bins, bin_s).sum(axis=1)
        found.append(bins * (n * (n - 1)).sum() / max(n.sum() * (n.sum() - 1), 1) if n.sum() > 1 else 1.0)
    return np.array(found)


def calibrate(found: dict[Cell, Probes]) -> None:
    """Print the constants that fit the first halves best."""
    pairs = {cell: (models_of(cell, of), of.truth) for cell, of in found.items() if cell in trained()}
    of = Calibration(*map(float, fitted(pairs).x))
    print(of)
    each = [
        np.abs(quotes(models, of, HORIZON_S) / np.where(truth > 0, truth, np.nan) - 1)
        for models, truth in pairs.values()
    ]
    print(f"median |quote / truth − 1| = {np.nanmedian(np.concatenate(each)):.2f}")


# --- tables -----------------------------------------------------------------------------------------------------------


def spearman(a: Any, b: Any) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def interval(a: Any, b: Any, statistic: Any) -> tuple[float, float]:
    """95%, by drawing stretches of ten consecutive requests: those close in time share a backlog."""
    random, length = np.random.default_rng(0), len(a)
    starts = random.integers(0, length, (1000, length // 10))
    rows = (starts[:, :, None] + np.arange(10)).reshape(1000, -1) % length
    low, high = np.quantile([statistic(a[of], b[of]) for of in rows], [0.025, 0.975])
    return float(low), float(high)


def ratio(a: Any, b: Any) -> float:
    return float(a.mean() / b.mean())


def ceiling(costs: Any) -> float:
    """The Spearman that the true mean itself would have with a mean over so few futures: from two halves of them."""
    half = spearman(costs[::2].mean(axis=0), costs[1::2].mean(axis=0))
    return float(np.sqrt(2 * half / (1 + half)))


def cell_text(quoted: Any, truth: Any) -> str:
    (s_low, s_high), (r_low, r_high) = (interval(quoted, truth, of) for of in (spearman, ratio))
    return (
        f"{spearman(quoted, truth):.2f} [{s_low:.2f}, {s_high:.2f}] | "
        f"{ratio(quoted, truth):.2f} [{r_low:.2f}, {r_high:.2f}]"
    )


def flat_prices(probes: Sequence[Probes]) -> Any:
    """(2,) the price of a prompt token and of an answer token that fit best, all loads weighing alike."""
    rows = np.concatenate([of.lengths / of.truth.mean() for of in probes])
    return nnls(rows, np.concatenate([of.truth / of.truth.mean() for of in probes]))[0]


HEAD = [
    "| trace | load | requests | truth, s | ± | bill: Spearman | ratio of means | ex ante: Spearman | ratio | recent rates: ratio | ceiling |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def judged(cell: Cell, probes: Probes, models: Models) -> str:
    truth = probes.truth
    bill, ante = (quotes(models, CALIBRATION, cell.horizon_s, which) for which in (1, 2))
    recent = quotes(models_of(cell, probes, recent=True), CALIBRATION, cell.horizon_s)
    error = np.median(probes.costs.std(axis=0, ddof=1) / np.sqrt(FUTURES) / np.maximum(truth, 1e-9))
    return (
        f"| {cell.trace} | {cell.load} | {len(truth)} | {truth.mean():.3g} | {error:.0%} | {cell_text(bill, truth)} | "
        f"{spearman(ante, truth):.2f} | {ratio(ante, truth):.2f} | {ratio(recent, truth):.2f} | {ceiling(probes.costs):.2f} |"
    )


def missed(test: dict[Cell, Probes], models: dict[Cell, Models]) -> str:
    """Which of the loads miss a target."""
    found = []
    for cell, probes in test.items():
        quoted, truth = quotes(models[cell], CALIBRATION, cell.horizon_s), probes.truth
        if spearman(quoted, truth) < 0.9 or not 0.8 <= ratio(quoted, truth) <= 1.25:
            found.append(f"{cell.trace} at {cell.load}")
    return f"Missed: {', '.join(found)}." if found else "Both are met at every load."


def fit_table(train: dict[Cell, Probes], models: dict[Cell, Models]) -> list[str]:
    """What was fitted, and what it is where its trace with such arrivals was left out."""
    lines = [
        "| trace | arrivals | load | requests | bursts | Spearman | ratio of means | left out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs = {cell: (models[cell], train[cell].truth) for cell in trained()}
    kinds = dict.fromkeys((cell.trace, cell.arrivals) for cell in train)
    for kind in kinds:
        rest = {cell: pair for cell, pair in pairs.items() if (cell.trace, cell.arrivals) != kind}
        other = Calibration(*map(float, fitted(rest).x))
        for cell, probes in train.items():
            if (cell.trace, cell.arrivals) == kind:
                own, left = (quotes(models[cell], of, HORIZON_S) for of in (CALIBRATION, other))
                lines.append(
                    f"| {cell.trace} | {cell.arrivals} | {cell.load} | {cell.requests} | "
                    f"{bursts_of(cell, probes, 10).mean():.2f} | {spearman(own, probes.truth):.2f} | "
                    f"{ratio(own, probes.truth):.2f} | {ratio(left, probes.truth):.2f} |"
                )
    return lines


def bursts_table(train: dict[Cell, Probes], models: dict[Cell, Models]) -> list[str]:
    """What knowing the bursts would gain."""
    pairs = {cell: (models[cell], train[cell].truth) for cell in trained()}
    lines = ["| gauge | misfit | its power |", "|---|---|---|", f"| none | {fitted(pairs).fun:.2f} | |"]
    for bin_s in BINS_S:
        with_it = fitted(pairs, {cell: bursts_of(cell, train[cell], bin_s) for cell in pairs})
        lines.append(f"| bursts over {bin_s} s | {with_it.fun:.2f} | {with_it.x[-1]:.2f} |")
    return lines


def flat_table(test: dict[Cell, Probes], train: dict[Cell, Probes]) -> list[str]:
    lines = [
        "| trace | load | one price at each load: Spearman | ratio of means | one for all loads: Spearman | ratio of means |",
        "|---|---|---|---|---|---|",
    ]
    for cell, probes in test.items():
        same = [of for other, of in train.items() if other.trace == cell.trace]
        own = [of for other, of in train.items() if (other.trace, other.load) == (cell.trace, cell.load)]
        flat = [probes.lengths @ flat_prices(of) for of in (own, same)]
        lines.append(
            f"| {cell.trace} | {cell.load} | {' | '.join(cell_text(of, probes.truth) for of in flat)} |"
        )
    return lines


def cut_table(cells: dict[Cell, Probes]) -> list[str]:
    lines = ["| trace | load | requests | 300 s ahead | 600 s ahead | cut off |", "|---|---|---|---|---|---|"]
    for cell, probes in cells.items():
        if cell.horizon_s == HORIZON_S:
            twice = cells[replace(cell, horizon_s=2 * HORIZON_S)].truth.mean()
            once = probes.truth.mean()
            lines.append(
                f"| {cell.trace} | {cell.load} | {cell.requests} | {once:.3g} | {twice:.3g} | {1 - once / twice:.0%} |"
            )
    return lines


# --- the page ---------------------------------------------------------------------------------------------------------


def section(found: dict[Cell, Probes]) -> str:
    models = {cell: models_of(cell, of) for cell, of in found.items()}

    def rows(those: dict[Cell, Probes]) -> str:
        return "\n".join([*HEAD, *(judged(cell, of, models[cell]) for cell, of in those.items())])

    plain = {cell: of for cell, of in found.items() if cell.profile == PROFILE and cell.workers == 1}
    train = {cell: of for cell, of in plain.items() if cell.half == "train"}
    test = {cell: of for cell, of in plain.items() if cell.half == "test" and cell.requests == TESTED}
    cut = {cell: of for cell, of in plain.items() if cell.requests == CUT}
    workers = {cell: of for cell, of in found.items() if cell.workers > 1}
    others = {cell: of for cell, of in found.items() if cell.profile != PROFILE}
    own = {cell: of for cell, of in train.items() if cell.arrivals == "own"}
    capacities = ", ".join(
        f"{cell.trace} {of.capacity:.3g}" for cell, of in test.items() if cell.load == LOADS[0]
    )
    return f"""\
## Resource prices

Quotes from an engine's gauges (`walras.supply`) against what the request cost the others: seconds of their delay within {HORIZON_S:.0f} s, run
with and without it, mean over {FUTURES} futures. SIMULATED: `{PROFILE}`, one worker, {sum(cell.requests for cell in test):,} requests of the second
half of each trace. A future is a stretch of the same half from another time, so its bursts stay, and it does not depend on how
busy the engine is now; prefixes are not shared with the past but for those that one request in a hundred has. Mooncake's batches, 3 s
apart where the trace was rounded, are spread over the time between. Load is the rate of arrivals over that at which the engine serves
the whole half when all of it waits from the beginning ({capacities} requests/s). Gauges are those of the request's arrival,
rates those of the whole half, as futures are drawn from all of it: the quote is given them, as if a longer past had shown them. *Recent rates* are those
of the last {WINDOW_S:.0f} s (less near the beginning), which the futures do not follow. Intervals are 95%, by stretches of ten consecutive requests.

{rows(test)}

*±* is the median standard error of a request's truth. *Ceiling* is the Spearman that the mean over all futures would have with that over
{FUTURES}, from two halves of them: no quote can be expected above it. *Bill* is with the amounts known at the end, *ex ante* with an answer of
mean length. The targets are a Spearman of 0.9 and a ratio of means within 0.8 to 1.25. {missed(test, models)}

Not untouched: this half was seen twice before. A formula of five constants with recent rates missed every load on Azure code (1.55, 2.23, 1.36,
1.36) and Mooncake at 0.95 (1.39). One of two constants, fitted on first halves, was worse where Azure is busy (1.37, 3.02, 2.86, 2.60; Mooncake 1.09, 0.82,
0.72, 1.63). Rates told why: Azure's first half begins quietly and its second busily, so that recent rates gave loads of 0.45 and 0.73 where futures had
0.6. With the rates of the futures, form and constants were chosen on first halves anew, and these rows computed once.

What it was fitted on: the first halves, and, to tell bursts from all else that differs between traces, the same requests at other times: *even*, as
Poisson's; *mixed*, half of them even; *bursty*, at the rate of Azure code's first half. *Bursts* is Morisita's index: pairs of arrivals
within the same 10 s, over those of even arrivals. *Left out* is the ratio where the constants were fitted without that trace with those arrivals. Mooncake's
bursty at 0.95 was not fitted: there most lines are about as long as the horizon, after which no delay is counted, and a quote does not know of it.

{chr(10).join(fit_table(train, models))}

Would a gauge of the bursts tell more? The constant of the line times a power of it, fitted as well, on the same:

{chr(10).join(bursts_table(train, models))}

The best price per prompt token and per answer token, fitted on the first half of the trace, beside it:

{chr(10).join(flat_table(test, own))}

What lies beyond the horizon, the same requests once more, twice as far:

{chr(10).join(cut_table(cut))}

Four workers, KV-aware routing, each quoted by the worker it went to; constants as for one. One request more changes where all later
ones go, so the truth itself is mostly noise, and others wait less than the quote says, as they go elsewhere:

{rows(workers)}

{OTHER}, not calibrated on:

{rows(others)}
"""


def trained() -> list[Cell]:
    """What is calibrated on. Of 120 requests at the least load none had a very long prompt: there it is 260."""
    chat = "Mooncake conversation"
    many = {(chat, LOADS[0]): TESTED}
    found = [
        Cell(trace, "train", load, many.get((trace, load), TRAINED[trace]))
        for trace in TRACES
        for load in LOADS
    ]
    altered = [("Azure code", "even"), ("Azure code", "mixed"), (chat, "bursty")]
    found += [Cell(trace, "train", load, ALTERED, arrivals=how) for trace, how in altered for load in LOADS]
    return found[:-1]


def cells() -> list[Cell]:
    """All that is probed."""
    chat = "Mooncake conversation"
    found = [*trained(), Cell(chat, "train", LOADS[-1], ALTERED, arrivals="bursty")]
    found += [Cell(trace, "test", load, TESTED) for trace in TRACES for load in LOADS]
    found += [Cell(trace, "test", 0.6, OUTSIDE[trace], workers=4) for trace in TRACES]
    found += [Cell(chat, "test", 0.8, OUTSIDE[chat], workers=4)]
    found += [Cell(trace, "test", 0.6, OTHERS, profile=OTHER) for trace in TRACES]
    for horizon_s in (HORIZON_S, 2 * HORIZON_S):
        found += [Cell(chat, "test", load, CUT, horizon_s=horizon_s) for load in (0.8, 0.95)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--probes", type=Path, metavar="FOLDER", help="keep probes here, and take them from here"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--calibrate", action="store_true", help="print the constants that fit the first halves"
    )
    parser.add_argument("--write", action="store_true", help="rewrite the section of docs/benchmarks.md")
    options = parser.parse_args()
    if "WALRAS_DATA" not in os.environ:
        raise SystemExit("WALRAS_DATA is not set: it names the folder of the shared data sets")
    wanted = trained() if options.calibrate else cells()
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawned) as pool:
        found = dict(zip(wanted, pool.map(partial(probed, folder=options.probes), wanted), strict=True))
    if options.calibrate:
        calibrate(found)
        return
    written = section(found)
    print(written)
    if options.write:
        write_section("externality", written)


if __name__ == "__main__":
    main()
