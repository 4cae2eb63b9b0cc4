"""What streaming prices cost and lose: decisions a second, regret against the offline optimum, overspending.

    python benchmarks/bench_online.py            # a few minutes; --quick for a first look

Streams are generated and seeded, but for the arrivals and token counts of the Azure hour (`WALRAS_DATA`, or
../shared/data). Peers are re-implementations of ours, on the same streams in the same run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numba import njit

from page import write_section
from walras.market.dual import solve
from walras.market.memory import Memory
from walras.market.online import OnlineMarket
from walras.market.planes import Planes, Rows

DATA = Path(os.environ.get("WALRAS_DATA") or Path(__file__).parents[2] / "shared" / "data")
AZURE = DATA / "serving" / "azure_code_2023.parquet"
MODELS = 8
HISTORY = 10_000
"""Requests of the past from which warm prices and the peers' first ones come."""
WINDOW = 1_000
"""Requests between two bisections of the global price."""
CYCLES = 3


@dataclass(frozen=True)
class Stream:
    """Requests in order, what may be charged per request, and a past of the same kind."""

    planes: Planes
    rows: Rows
    past: Planes

    @property
    def limits(self) -> np.ndarray:
        """(K,) per request."""
        return self.rows.limits / len(self.planes)

    def only(self, k: int) -> Stream:
        """With one row and no others."""
        one = Rows(*(np.asarray(getattr(self.rows, name))[k : k + 1] for name in self.rows.__slots__))
        return Stream(self.planes, one, self.past)


# --- streams ----------------------------------------------------------------------------------------------------


def planes_from(value: np.ndarray, quality: np.ndarray, *amounts: np.ndarray) -> Planes:
    """Amounts are USD (declared at 1), seconds and risk."""
    quality, *amounts = (np.ascontiguousarray(a, dtype=np.float32) for a in (quality, *amounts))
    declared = (np.ones(1), np.zeros(1), np.zeros(1))
    return Planes(value, quality, tuple(amounts), declared, np.ones(1), np.zeros(1, dtype=np.uint64))


def rows_of(n: int, budget: float, sla: float, risk: float) -> Rows:
    none = np.zeros(3, dtype=np.bool_)
    return Rows(
        np.arange(3),
        np.full(3, np.nan),
        np.array([0.0, sla, 0.0]),
        np.array([budget, 0.0, risk]) * n,
        none,
        none,
    )


def generated(
    n: int, rng: np.random.Generator, at: np.ndarray | None = None, cost: np.ndarray | float = 1.0
) -> Planes:
    """Random requests; `at` (n,) is the time of day in days, for those that follow one; `cost` multiplies USD."""
    shape, value = (n, MODELS), rng.lognormal(0, 1, n)
    quality, usd, seconds = rng.random(shape), 0.1 * rng.lognormal(0, 1, shape), rng.lognormal(0, 1, shape)
    if at is not None:
        value *= np.exp(0.7 * np.sin(2 * np.pi * at))
        usd *= np.exp(0.4 * np.cos(2 * np.pi * at))[:, None]
    return planes_from(value, quality, usd * np.reshape(cost, (-1, 1)), seconds, rng.exponential(0.05, shape))


def iid(n: int, rng: np.random.Generator) -> Stream:
    return Stream(generated(n, rng), rows_of(n, 0.04, 1.2, 0.03), generated(HISTORY, rng))


def diurnal(n: int, rng: np.random.Generator) -> Stream:
    """Three days in which value and cost rise and fall; the past is a whole day."""
    past = generated(HISTORY, rng, rng.random(HISTORY))
    return Stream(generated(n, rng, CYCLES * np.arange(n) / n), rows_of(n, 0.04, 1.2, 0.03), past)


def shocked(n: int, rng: np.random.Generator) -> Stream:
    """Everything costs twice as much from the middle on; the past is before."""
    cost = np.where(np.arange(n) < n // 2, 1.0, 2.0)
    return Stream(generated(n, rng, cost=cost), rows_of(n, 0.04, 1.2, 0.03), generated(HISTORY, rng))


def adversarial(n: int, rng: np.random.Generator) -> Stream:
    """The iid stream, least valuable requests first."""
    stream = iid(n, rng)
    return Stream(
        stream.planes.take(np.argsort(stream.planes.value, kind="stable")), stream.rows, stream.past
    )


def azure(_: int, rng: np.random.Generator) -> Stream:
    """The Azure hour: arrivals and tokens are real; models, prices, delays, qualities and values are generated.

    Value grows with the answer; delay with the model, the tokens and how many arrived within the last minute. The past
    is the same hour with other generated values: favourable to prices that never move.
    """
    table = pq.read_table(AZURE).sort_by("arrival_s")
    arrival, tokens_in, tokens_out = (
        table[c].to_numpy().astype(np.float64) for c in ("arrival_s", "input_tokens", "output_tokens")
    )
    n = arrival.size
    lately = (np.arange(n) + 1 - np.searchsorted(arrival, arrival - 60.0)) / (n * 60.0 / arrival[-1])
    size = np.linspace(0, 1, MODELS)  # small to large models
    usd = (tokens_in[:, None] + 4 * tokens_out[:, None]) * 1e-6 * 0.1 * 60.0**size

    def hour() -> Planes:
        value = 0.02 * rng.lognormal(0, 1, n) * np.sqrt(tokens_out / tokens_out.mean())
        quality = 1 / (1 + np.exp(-(3 * size + rng.normal(0, 1, (n, 1)) + rng.normal(0, 0.5, (n, MODELS)))))
        seconds = (0.2 + 0.01 * tokens_out[:, None] * (0.3 + size)) * (0.5 + 0.5 * lately[:, None])
        risk = (1 - quality) * rng.exponential(0.05, (n, 1))
        return planes_from(value, quality, usd, seconds * rng.lognormal(0, 0.3, (n, MODELS)), risk)

    return Stream(hour(), rows_of(n, 0.001, 0.45, 0.004), hour())


STREAMS: dict[str, Callable[[int, np.random.Generator], Stream]] = {
    "iid": iid,
    "diurnal (generated)": diurnal,
    "shocked (generated)": shocked,
    "adversarial order (generated)": adversarial,
}


# --- who decides ------------------------------------------------------------------------------------------------


def first_prices(stream: Stream) -> np.ndarray:
    """Optimal prices of the past."""
    limits, rows = stream.limits * len(stream.past), stream.rows
    return solve(
        Memory(stream.past, Rows(rows.plane, rows.level, rows.offset, limits, rows.exactly, rows.scoped))
    ).multipliers


def ours(stream: Stream, **how: Any) -> np.ndarray:
    market = OnlineMarket(stream.limits, horizon=len(stream.planes), **how)
    return market.decide_batch(stream.planes, stream.rows)


def warm(stream: Stream, **how: Any) -> np.ndarray:
    return ours(stream, start=first_prices(stream), **how)


def trusted(stream: Stream, **how: Any) -> np.ndarray:
    return warm(stream, trust=len(stream.planes), **how)


def fixed_threshold(stream: Stream) -> np.ndarray:
    """Prices of the past, for ever; a request is turned away once a budget is gone."""
    worth, charge = tables(stream.planes, stream.rows)
    use = np.empty(len(worth), dtype=np.int64)
    follow(
        worth,
        charge,
        first_prices(stream),
        stream.rows.limits,
        np.zeros(len(stream.rows)),
        0,
        len(worth),
        use,
    )
    return use


def global_price(stream: Stream) -> np.ndarray:
    """CLEAR-like: one price on all charges, each in units of its limit; bisected on the last window, with no memory.

    The least price at which no row would have spent more, per request, than is left of it.
    """
    worth, charge = tables(stream.planes, stream.rows)
    before = tables(stream.past, stream.rows)
    n, use, spent = len(worth), np.empty(len(worth), dtype=np.int64), np.zeros(len(stream.rows))
    unit = 1 / (stream.limits + stream.rows.offset)
    for lo in range(0, n, WINDOW):
        hi, left = min(lo + WINDOW, n), (stream.rows.limits - spent) / (n - lo)
        seen = before if lo == 0 else (worth[lo - WINDOW : lo], charge[:, lo - WINDOW : lo])
        follow(worth, charge, bisect(*seen, unit, left) * unit, stream.rows.limits, spent, lo, hi, use)
    return use


def tables(planes: Planes, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Worth (N, I) and charges (K, N, I), float64."""
    worth = planes.value[:, None] * planes.quality - planes.amounts[0].astype(np.float64)
    return worth, np.array(
        [planes.amounts[p].astype(np.float64) - o for p, o in zip(rows.plane, rows.offset, strict=True)]
    )


@njit(cache=True)
def follow(worth, charge, price, limits, spent, lo, hi, use):
    """Best responses at `price` for the requests lo…hi − 1, none once a budget is spent; adds to `spent`."""
    for j in range(lo, hi):
        best, use[j] = 0.0, -1
        for k in range(price.size):
            if limits[k] > 0 and spent[k] >= limits[k]:
                best = np.inf
        for i in range(worth.shape[1]):
            net = worth[j, i]
            for k in range(price.size):
                net -= price[k] * charge[k, j, i]
            if net > best:
                best, use[j] = net, i
        if use[j] >= 0:
            for k in range(price.size):
                spent[k] += charge[k, j, use[j]]


@njit(cache=True)
def bisect(worth, charge, unit, left):
    n, none, use = len(worth), np.zeros(left.size), np.empty(len(worth), dtype=np.int64)
    low, high = 0.0, 16 * np.abs(worth).max()
    for _ in range(40):
        middle = (low + high) / 2
        spent = np.zeros(left.size)
        follow(worth, charge, middle * unit, none, spent, 0, n, use)
        low, high = (low, middle) if (spent <= np.maximum(left, 0.0) * n).all() else (middle, high)
    return high


Methods = dict[str, Callable[[Stream], np.ndarray]]
OURS: Methods = {"Walras, cold": ours, "warm": warm, "trusted": trusted}
ALL: Methods = {**OURS, "fixed threshold": fixed_threshold, "CLEAR-like": global_price}
SOFT: Methods = {
    name: lambda stream, decide=decide: decide(stream, hard=stream.rows.offset == 0)
    for name, decide in OURS.items()
}


# --- tables -----------------------------------------------------------------------------------------------------


def judged(stream: Stream, use: np.ndarray, optimum: float) -> tuple[float, float]:
    """Regret in % of the offline objective; worst overspending in % of a row's limit and offset over all requests."""
    served = np.flatnonzero(use >= 0)
    planes, rows, taken = stream.planes, stream.rows, use[use >= 0]
    amounts = [a[served, taken].astype(np.float64) for a in planes.amounts]
    worth = float(planes.value[served] @ planes.quality[served, taken].astype(np.float64) - amounts[0].sum())
    over = [
        ((amounts[p] - o).sum() - limit) / (limit + o * len(planes))
        for p, o, limit in zip(rows.plane, rows.offset, rows.limits, strict=True)
    ]
    return 100 * (1 - worth / optimum), 100 * max(0.0, *over)


Make = Callable[[int, np.random.Generator], Stream]


def quality_table(cases: list[tuple[str, Make, int]], seeds: int, methods: Methods) -> list[str]:
    lines = [
        f"| stream | requests | {' | '.join(methods)} |",
        f"| --- | ---: | {' | '.join(['---:'] * len(methods))} |",
    ]
    for name, make, n in cases:
        found: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
        for seed in range(seeds):
            stream = make(n, np.random.default_rng(seed))
            optimum = solve(Memory(stream.planes, stream.rows)).objective
            for method, decide in methods.items():
                found[method].append(judged(stream, decide(stream), optimum))
        cells = []
        for pairs in found.values():
            regret, over = np.array(pairs).T
            cells.append(f"{regret.mean():.2f} ± {regret.std(ddof=1):.2f} ({over.max():.2g})")
        lines.append(f"| {name} | {len(stream.planes):,} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def speed_table(n: int, repeats: int = 5) -> list[str]:
    stream = iid(n, np.random.default_rng(0))
    planes, rows = stream.planes, stream.rows
    ours(stream)  # compiled now
    in_batch, reading, each = [], [], []
    for _ in range(repeats):
        began = time.perf_counter()
        ours(stream)
        in_batch.append(time.perf_counter() - began)
        began = time.perf_counter()
        for plane in (planes.quality, *planes.amounts):
            plane.sum()
        reading.append(time.perf_counter() - began)
    worth, charge = tables(planes.part(0, 20_000), rows)
    charge = np.ascontiguousarray(charge.transpose(1, 0, 2))
    market = OnlineMarket(stream.limits, horizon=n)
    for one, charges in zip(worth, charge, strict=True):
        began = time.perf_counter()
        market.decide(one, charges)
        each.append(time.perf_counter() - began)
    seconds = float(np.median(in_batch))
    lines = [
        "| | |",
        "| --- | ---: |",
        f"| decisions a second in one batch of {n:,}, one core | {n / seconds / 1e6:.1f} million |",
        f"| the same pass, times a numpy sum over the same bytes | {seconds / np.median(reading):.0f} |",
        f"| one `decide` call, median (99th percentile) | {1e6 * np.median(each):.1f} µs "
        f"({1e6 * np.percentile(each, 99):.1f}) |",
    ]
    print("\n".join(lines), flush=True)
    return lines


def certificate_table(cases: list[tuple[str, Make, int]], seeds: int) -> list[str]:
    lines = [
        "| stream | requests | true gap, % | estimated gap, % | its standard error, % | truth above estimate + 2 s.e. |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, make, n in cases:
        found = []
        for seed in range(seeds):
            stream = make(n, np.random.default_rng(seed))
            optimum = solve(Memory(stream.planes, stream.rows)).objective / n
            market = OnlineMarket(stream.limits, horizon=n)
            market.decide_batch(stream.planes, stream.rows)
            seen = market.certificate
            found.append(np.array([optimum - seen.objective, seen.gap, seen.standard_error]) / optimum * 100)
        true, estimate, error = np.transpose(found)
        above = int((true > estimate + 2 * error).sum())
        lines.append(
            f"| {name} | {n:,} | {true.mean():.3f} | {estimate.mean():.3f} | {error.mean():.3f} | {above} of {seeds} |"
        )
        print(lines[-1], flush=True)
    return lines


def section(*, quick: bool = False) -> str:
    """The Markdown of this benchmark."""
    sizes, seeds = ([2_000], 2) if quick else ([10_000, 100_000, 1_000_000], 5)
    middle = sizes[len(sizes) // 2]
    speed = speed_table(100_000 if quick else 1_000_000)
    hour: list[tuple[str, Make, int]] = (
        [("Azure hour (values generated)", azure, 0)] if AZURE.exists() else []
    )
    cases = [(name, make, n) for name, make in STREAMS.items() for n in sizes] + hour
    some = [(name, make, middle) for name, make in STREAMS.items()] + hour
    budget = [(name, lambda n, rng, make=make: make(n, rng).only(0), n) for name, make, n in some]
    quality, soft = quality_table(cases, seeds, ALL), quality_table(some, seeds, SOFT)
    alone = quality_table(budget, seeds, ALL)
    certificate = certificate_table([case for case in cases if case[1] in (iid, diurnal)], seeds)
    return "\n".join(
        [
            "## Prices while requests stream in",
            "",
            f"{MODELS} models, float32, three rows: a budget, a mean SLA, a risk envelope; all binding.",
            "",
            *speed,
            "",
            f"Regret in % of the offline optimum, which knows the whole stream: mean ± sd over {seeds} seeds, and in "
            "brackets the worst overspending of any row and seed, in % of what it allows. *Warm* starts from the optimal "
            f"prices of {HISTORY:,} past requests (Azure: the same hour, with other values), and so do the peers; "
            "*trusted* also says that they may be trusted for the whole horizon. The peers are our re-implementations: "
            "*fixed threshold* keeps the past's prices and stops when a budget is gone; *CLEAR-like* has one price for all "
            f"rows, bisected every {WINDOW:,} requests on the last {WINDOW:,} for the rate that is left.",
            "",
            *quality,
            "",
            "The same with the SLA kept by its price alone, not guarded at every moment:",
            "",
            *soft,
            "",
            "The same with the budget alone, where one price is all there is to find:",
            "",
            *alone,
            "",
            "The online certificate (cold). It promises to cover the truth only where requests are independent draws of one "
            "kind; on a daily cycle it does not:",
            "",
            *certificate,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only, nothing written")
    quick = parser.parse_args().quick
    written = section(quick=quick)
    if quick:
        print(written)
    else:
        write_section("online", written)


if __name__ == "__main__":
    main()
