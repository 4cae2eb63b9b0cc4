"""How fast the replay is: requests per CPU-second beside DynoSim, ten million requests, and one branch.

    WALRAS_DATA=FOLDER python benchmarks/bench_replay.py --dynosim VENV    # six minutes; --write for the page
    ... --rounds 1 --scale 0.01                                            # a first look

VENV is a virtual environment with `ai-dynamo` in it (1.6.1 on the page); without it the comparison is left out. Every run is a
process of its own, the two simulators take turns, and CPU seconds are the process's own, all threads together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from page import spread, write_section
from walras.engine.generated import Lengths, Poisson, Sessions, generate
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay, Served, stream
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.engine.steps import StepTimes
from walras.engine.traces import read_trace

BLOCKS, BLOCK, CHUNK, SEQUENCES, BUDGET = 16_384, 64, 512, 256, 8_192
"""DynoSim's defaults for a worker, and the tokens that an id of Mooncake's trace names."""
CASES = tuple((workers, routing) for workers in (4, 16) for routing in ("round-robin", "kv"))
SHIPPED = "h100-80gb-llama2-70b-tp8"
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
LOADS = {"independent requests": 10_000_000, "agents' sessions": 1_000_000}
"""The largest size of each."""
BRANCHES, HORIZON_S = 50, 60.0

PEER = """
import json, resource, sys, time
import dynamo._core as core

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def replay(until_ms):
    before = cpu()
    result = core.run_mocker_trace_replay(
        [sys.argv[1]], replay_mode="offline", trace_block_size=512, num_workers=int(sys.argv[2]),
        router_mode=sys.argv[3], max_sim_time_ms=until_ms)
    return cpu() - before, result.summary

replay(1.0)
start = cpu()
read, _ = replay(1.0)
whole, summary = replay(None)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(dict(
    start=start, read=read, replay=whole - read, peak_mb=int(peak.split()[1]) / 1024,
    served=summary["completed_requests"], hit=summary["prefix_cache_reused_ratio"],
    ttft=summary["mean_ttft_ms"], ttft_p95=summary["p95_ttft_ms"],
    tpot=summary["mean_tpot_ms"], tpot_p95=summary["p95_tpot_ms"])))
"""
"""A call that stops after a millisecond of the trace tells what reading it costs; the first such call warms up."""


# --- a run ------------------------------------------------------------------------------------------------------------


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mb() -> float:
    """Of this process: the kernel's ru_maxrss would begin at what the parent had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def fresh(run: Callable[..., Any], *args: Any) -> Any:
    """`run` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
        return one.submit(run, *args).result()


@dataclass(frozen=True)
class Run:
    """CPU seconds of a simulator's stages, and what it found. Milliseconds, MB."""

    start: float
    """Before that: imports, compiled code loaded, the trace read for a first time."""
    read: float
    """The trace, from JSON Lines."""
    replay: float
    """With the summary."""
    peak_mb: float
    served: int
    hit: float
    """Share of all prompt tokens that were found in memory."""
    ttft: float
    ttft_p95: float
    tpot: float
    """Over requests with more than one output token."""
    tpot_p95: float
    digest: str = ""
    """Of every column of every request."""

    @property
    def per_s(self) -> float:
        """Requests per CPU-second, from the file to the summary."""
        return self.served / (self.read + self.replay)

    @property
    def replay_per_s(self) -> float:
        return self.served / self.replay


def digest(served: Served) -> str:
    found = hashlib.sha256()
    for key in Served.__slots__:
        found.update(getattr(served, key).tobytes())
    return found.hexdigest()


def peer_steps() -> StepTimes:
    """DynoSim's default step times, in seconds: 16.5 + 0.0152·T + 4.21e-7·T² ms for T new prompt tokens, and for
    decoding at KV use u 5.74 + 54.01·u ms (it takes 25.74·u² off, and step times here are affine in KV tokens)."""
    tokens = np.arange(BUDGET + SEQUENCES + 1.0)
    n = np.arange(SEQUENCES + 1)
    decode_s, prefill_s = 5.74e-3, (16.50142 + 1.518344e-2 * tokens + 4.209989e-7 * tokens**2) * 1e-3
    return StepTimes(
        overhead_s=decode_s,
        dense_s=np.where(tokens > SEQUENCES, prefill_s - decode_s, 0.0),
        decode_s=np.zeros(len(n)),
        decode_kv_s=np.where(n > 0, 54.01e-3 / (BLOCKS * BLOCK), 0.0),
        prefill_pair_s=0.0,
        mixed_s=np.where(n > 0, decode_s, 0.0),
    )


def engine_of(which: str, workers: int) -> tuple[EngineSettings, StepTimes]:
    """DynoSim's default engine, or that of a shipped profile, in blocks of 16."""
    if which == "as DynoSim":
        limits = {"max_batched_tokens": BUDGET, "max_sequences": SEQUENCES}
        return EngineSettings(BLOCKS, BLOCK, CHUNK, workers=workers, **limits), peer_steps()
    profile = load_profile(which)
    settings = EngineSettings(
        profile.limits.kv_tokens // 16,
        prefix_tokens=CHUNK,
        max_batched_tokens=profile.limits.step_tokens,
        max_sequences=profile.limits.most_sequences,
        schedule_ahead=profile.limits.steps_ahead > 0,
        workers=workers,
    )
    return settings, profile.steps()


def routing_of(which: str, block: int) -> Routing:
    if which == "round-robin":
        return Routing.round_robin()
    # A cached block costs nothing to hold. At this token price it does, as in DynoSim as long as nobody uses it.
    return (
        Routing.kv(block)
        if which == "kv"
        else Routing(token_delay_s=1 / block, block_price=1.0, token_price=-1 / block)
    )


def warm_up(engine: EngineSettings, steps: StepTimes, routing: Routing) -> None:
    """Load what has been compiled."""
    few = Requests(np.arange(4.0), np.full(4, CHUNK + 1), np.full(4, 2), np.arange(5), np.arange(4))
    Replay(engine, steps, routing, few).run().intervals()


def walras(path: Path, workers: int, routing: str, which: str = "as DynoSim") -> Run:
    engine, steps = engine_of(which, workers)
    rule = routing_of(routing, engine.block_tokens)
    warm_up(engine, steps, rule)
    read_trace(path)
    started = cpu_s()
    requests = read_trace(path).requests
    read = cpu_s()
    replay = Replay(engine, steps, rule, requests).run()
    served, _ = replay.served(), replay.intervals()
    hit = served.cached_tokens.sum() / requests.input_tokens.sum()
    ttft, tpot = 1e3 * served.ttft_s, 1e3 * served.tpot_s[requests.output_tokens > 1]
    found = [float(of) for x in (ttft, tpot) for of in (x.mean(), np.quantile(x, 0.95))]
    done = cpu_s()
    stages = (started, read - started, done - read)
    return Run(*stages, peak_mb(), len(served), float(hit), *found, digest(served))


def dynosim(venv: Path, path: Path, workers: int, routing: str) -> Run:
    mode = {"round-robin": "round_robin", "kv": "kv_router"}[routing]
    done = subprocess.run(
        [str(venv / "bin" / "python"), "-c", PEER, str(path), str(workers), mode],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"DYN_LOG": "off"},  # else it logs every request it routes
    )
    if done.returncode:
        raise SystemExit(f"DynoSim failed:\n{done.stderr[-2000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


# --- side by side -----------------------------------------------------------------------------------------------------


def as_json_lines(data: Path, folder: Path) -> Path:
    """Mooncake's trace as DynoSim reads it."""
    path = folder / "mooncake.jsonl"
    rows = pq.read_table(data / "mooncake_conversation.parquet").to_pylist()
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {
                "timestamp": round(1000 * row["arrival_s"]),
                "input_length": row["input_tokens"],
                "output_length": row["output_tokens"],
                "hash_ids": row["hash_ids"],
            }
            file.write(json.dumps(line) + "\n")
    return path


Runs = dict[tuple[int, str], list[Run]]


def side_by_side(path: Path, venv: Path | None, rounds: int) -> tuple[Runs, Runs]:
    ours: Runs = {case: [] for case in CASES}
    theirs: Runs = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            ours[case].append(fresh(walras, path, *case))
            if venv is not None:
                theirs[case].append(dynosim(venv, path, *case))
            said = [
                f"{runs[-1].per_s:,.0f} ({runs[-1].replay_per_s:,.0f})"
                for runs in (ours[case], theirs[case])
                if runs
            ]
            print(
                f"{case}: requests per CPU-second, whole (replay alone): {' against '.join(said)}", flush=True
            )
    return ours, theirs


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """For processes begun meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        yield
        del os.environ["NUMBA_CACHE_DIR"]


def speed_table(ours: Runs, theirs: Runs) -> list[str]:
    lines = [
        "| workers, routing | Walras, from file to summary | DynoSim | ratio | Walras, replay alone | DynoSim | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for (workers, routing), runs in ours.items():
        cells = []
        for rate in (lambda run: run.per_s, lambda run: run.replay_per_s):
            left, right = ([rate(run) for run in of] for of in (runs, theirs[workers, routing]))
            ratios = [a / b for a, b in zip(left, right, strict=False)]
            cells += [
                spread(left, ",.0f"),
                spread(right, ",.0f"),
                f"**{spread(ratios, '.1f')}×**" if ratios else "–",
            ]
        lines.append(f"| {workers}, {routing} | {' | '.join(cells)} |")
    return lines


def found_table(ours: Runs, theirs: Runs, alike: dict[int, Run]) -> list[str]:
    """What the two say about the same hour."""
    lines = [
        "| workers, routing | | hit ratio | TTFT, mean ms | TTFT, p95 | TPOT, mean ms | TPOT, p95 | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, runs in ours.items():
        sides = {"Walras": runs, "DynoSim": theirs[case]}
        if case[1] == "kv":
            sides["Walras, unused cache priced as DynoSim does"] = [alike[case[0]]]
        for who, side in sides.items():
            if side:
                columns = [(100, "hit", ".2f"), (1, "ttft", ".1f"), (1, "ttft_p95", ".0f")]
                columns += [(1, "tpot", ".2f"), (1, "tpot_p95", ".2f"), (1, "peak_mb", ".0f")]
                cells = [
                    varied([scale * getattr(run, key) for run in side], digits)
                    for scale, key, digits in columns
                ]
                lines.append(f"| {case[0]}, {case[1]} | {who} | {cells[0]}% | {' | '.join(cells[1:])} |")
    return lines


def agreement(ours: Runs, theirs: Runs, alike: dict[int, Run]) -> str:
    """How far the two are apart, and why."""
    if not all(theirs.values()):
        return ""

    def apart(pairs: list[tuple[Run, list[Run]]]) -> str:
        hits = max(abs(run.hit - np.mean([peer.hit for peer in peers])) for run, peers in pairs)
        ttft = max(abs(run.ttft / np.mean([peer.ttft for peer in peers]) - 1) for run, peers in pairs)
        return f"{100 * hits:.2f} points of hit ratio and {ttft:.1%} of mean TTFT"

    by_turns, kv = (
        apart([(ours[workers, routing][0], theirs[workers, routing]) for workers in alike])
        for routing in ("round-robin", "kv")
    )
    priced = apart([(run, theirs[workers, "kv"]) for workers, run in alike.items()])
    return f"""\
Round-robin, the two are at most {by_turns} apart. TPOT differs more: step times here are affine in KV tokens, and DynoSim's are concave.
KV-aware they are {kv} apart, because Walras's router takes a cached block to cost nothing to hold, and DynoSim's only one that some
sequence uses now. With an unused one priced as DynoSim does they are {priced} apart; the rest is that DynoSim also counts it as held
for as long as its request is in flight. DynoSim's KV-aware figures differ from run to run. """


def varied(values: list[float], digits: str) -> str:
    """`spread`, where there is any to see."""
    alike = f"{min(values):{digits}}" == f"{max(values):{digits}}"
    return f"{values[0]:{digits}}" if alike else spread(values, digits)


# --- ten million requests ---------------------------------------------------------------------------------------------


def generated(which: str, count: int, lengths: Lengths) -> Iterator[Requests]:
    """SIMULATED load for 4 workers, a chunk at a time; sessions come to a little more than `count` calls."""
    if which == "independent requests":
        yield from generate(Poisson(12.0), lengths, count, seed=1)
        return
    added = Lengths.lognormal(1500, 200, 1.0, seed=1)
    sessions = Sessions(calls=20, think_s=5.0, added=added, system_tokens=4096, longest=100_000)
    random, start, first = np.random.default_rng(1), 0.0, 0
    while count > 0:
        starts = start + np.cumsum(random.exponential(20.0, 100))
        calls = sessions.starting(starts, 1, CHUNK, first)
        start, first, count = float(starts[-1]), first + len(starts), count - len(calls)
        yield calls


@dataclass(frozen=True)
class Long:
    """A long replay: CPU µs a request, and peak memory."""

    served: int
    replay_us: float
    generate_us: float
    peak_mb: float
    ttft_ms: float


def long_replay(which: str, count: int, data: Path) -> Long:
    engine, steps = engine_of(SHIPPED, 4)
    routing = Routing.least_loaded() if which == "independent requests" else Routing.kv(16)
    lengths = Lengths.like(read_trace(data / "azure_code_2023.parquet").requests)
    warm_up(engine, steps, routing)
    made = 0.0

    def chunks() -> Iterator[Requests]:
        nonlocal made
        source = generated(which, count, lengths)
        while True:
            before = cpu_s()
            chunk = next(source, None)
            made += cpu_s() - before
            if chunk is None:
                return
            yield chunk

    served, ttft_s, began = 0, 0.0, cpu_s()
    for piece in stream(engine, steps, chunks(), routing):
        served += len(piece)
        ttft_s += float(piece.ttft_s.sum())
    took = cpu_s() - began - made
    assert served >= count
    return Long(served, 1e6 * took / served, 1e6 * made / served, peak_mb(), 1e3 * ttft_s / served)


def long_table(data: Path, scale: float) -> list[str]:
    lines = [
        "| generated load (SIMULATED) | requests | CPU µs a request | CPU µs to generate one | peak MB | mean TTFT, ms |",
        "|---|---|---|---|---|---|",
    ]
    for which, largest in LOADS.items():
        for size in SIZES:
            if size <= largest:
                of = fresh(long_replay, which, int(size * scale), data)
                cells = [
                    f"{value:{d}}"
                    for value, d in zip(astuple(of), (",", ".2f", ".2f", ".0f", ".0f"), strict=True)
                ]
                lines.append(f"| {which} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    return lines


# --- a branch ---------------------------------------------------------------------------------------------------------


def branches(
    path: Path, which: str, workers: int, routing: str
) -> tuple[float, list[float], list[float], int]:
    """CPU ms of a whole replay, of snapshots in its middle, of branches run for a minute, and how many these serve."""
    engine, steps = engine_of(which, workers)
    rule, requests = routing_of(routing, engine.block_tokens), read_trace(path).requests
    warm_up(engine, steps, rule)
    begin = time.process_time()
    Replay(engine, steps, rule, requests).run().served()
    whole = time.process_time() - begin
    middle = float(requests.arrival_s[-1]) / 2
    replay = Replay(engine, steps, rule, requests).run(middle)
    copies, runs, served = [], [], []
    for row in np.random.default_rng(0).integers(0, len(requests), BRANCHES):
        begin = time.process_time()
        replay.snapshot()
        copied = time.process_time()
        branch = replay.branch(add=one_more(requests, row, middle)).run(middle + HORIZON_S)
        served.append(len(branch.served()))
        runs.append(time.process_time() - copied)
        copies.append(copied - begin)
    return 1e3 * whole, [1e3 * s for s in copies], [1e3 * s for s in runs], int(np.median(served))


def one_more(requests: Requests, row: int, at_s: float) -> Requests:
    """One of the trace's requests once more, now."""
    tokens = (requests.input_tokens[[row]], requests.output_tokens[[row]])
    if requests.prefix_offsets is None or requests.prefix_ids is None:
        return Requests(np.array([at_s]), *tokens)
    ids = requests.prefix_ids[requests.prefix_offsets[row] : requests.prefix_offsets[row + 1]]
    return Requests(np.array([at_s]), *tokens, np.array([0, len(ids)]), ids)


def branch_table(data: Path) -> list[str]:
    lines = [
        "| trace | workers, routing | requests served in the minute | snapshot, ms | branch and its minute, ms p50 | p95 "
        "| share of a whole replay |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [
        ("Mooncake conversation", "mooncake_conversation.parquet", "as DynoSim", workers, "kv")
        for workers in (4, 16)
    ]
    cases += [("Azure code", "azure_code_2023.parquet", SHIPPED, 4, "round-robin")]
    for title, name, which, workers, routing in cases:
        whole, copies, runs, served = fresh(branches, data / name, which, workers, routing)
        p50, p95 = np.quantile(runs, [0.5, 0.95])
        cells = f"{served} | {np.median(copies):.2f} | {p50:.2f} | {p95:.2f} | {p50 / whole:.1%}"
        lines.append(f"| {title} | {workers}, {routing} | {cells} |")
        print(lines[-1], flush=True)
    return lines


# --- the page ---------------------------------------------------------------------------------------------------------


def section(data: Path, venv: Path | None, rounds: int, scale: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = as_json_lines(data, Path(folder))
        with nothing_compiled():
            compiled = fresh(walras, path, *CASES[0])
        fresh(walras, path, *CASES[0])  # compiles for all that follow, where nobody has
        ours, theirs = side_by_side(path, venv, rounds)
        alike = {workers: fresh(walras, path, workers, "kv as DynoSim") for workers in (4, 16)}
        shipped = fresh(walras, path, 4, "kv", SHIPPED)
        parquet = fresh(walras, data / "mooncake_conversation.parquet", *CASES[0])
    for runs in ours.values():
        assert len({run.digest for run in runs}) == 1
    assert compiled.digest == parquet.digest == ours[CASES[0]][0].digest
    same = sum(len(runs) for runs in ours.values()) + 2
    every = [run for runs in ours.values() for run in runs]
    tables = ("\n".join(of) for of in (speed_table(ours, theirs), found_table(ours, theirs, alike)))
    speed, found = tables
    return f"""\
## Serving replay

Mooncake conversation, an hour of {every[0].served:,} requests; Walras and DynoSim (`ai-dynamo`) take turns, {rounds} rounds.
Requests per CPU-second of the process, all threads; medians with ranges, ratios within a round.

{speed}

Both read the same JSON Lines and end with a summary. A worker is DynoSim's default in both: {BLOCKS:,} blocks of {BLOCK} tokens, steps of at most
{BUDGET:,} tokens and {SEQUENCES} sequences, chunked prefill, prefix caching, its default step times. DynoSim runs with its default arguments, its
log turned off. What differs: Walras keeps prefixes in chunks of {CHUNK} tokens, as the trace names them, and DynoSim in
blocks; DynoSim's summary has the time of every token, Walras the columns of every request and of every second. *Replay alone* leaves the
reading out, for DynoSim by a call that stops after the first millisecond of the trace. From Parquet Walras makes
{parquet.per_s:,.0f} from file to summary; with the shipped profile `{SHIPPED}`, 4 workers, KV-aware, {shipped.replay_per_s:,.0f} for the replay alone.

Not in these figures: what comes before, a first reading of the trace included. Walras: {spread([run.start for run in every], ".1f")} CPU seconds with its compiled code in the cache
and {compiled.start:.0f} the first time, when it is compiled{"" if venv is None else f"; DynoSim: {spread([run.start for runs in theirs.values() for run in runs], '.2f')}"}.

{found}

{agreement(ours, theirs, alike)}Walras gave the same figures to the bit in all {same} runs, one of them with code compiled anew.

### Ten million requests

Four workers of `{SHIPPED}`: independent requests as long as Azure's code requests, 12 a second, to the least loaded; agents' sessions of 20
calls on average, prompts that grow, KV-aware. A chunk at a time, each size in a process of its own; most of the memory is its libraries'.

{chr(10).join(long_table(data, scale))}

### A branch

A snapshot in the middle of the hour, one request more, and the next {HORIZON_S:.0f} seconds: {BRANCHES} branches, CPU milliseconds.

{chr(10).join(branch_table(data))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dynosim", type=Path, metavar="VENV", help="virtual environment with ai-dynamo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="size of the generated loads, 1 for ten million"
    )
    parser.add_argument("--write", action="store_true", help="rewrite the section of docs/benchmarks.md")
    options = parser.parse_args()
    if options.write and options.dynosim is None:
        parser.error("--write needs --dynosim: the page has the comparison")
    if "WALRAS_DATA" not in os.environ:
        raise SystemExit("WALRAS_DATA is not set: it names the folder of the shared data sets")
    data = Path(os.environ["WALRAS_DATA"]) / "serving"
    written = section(data, options.dynosim, options.rounds, options.scale)
    print(written)
    if options.write:
        write_section("replay", written)


if __name__ == "__main__":
    main()
