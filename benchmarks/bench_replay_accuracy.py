"""How near the replay comes to measured engines: vLLM runs request by request, and closed loops at several batch sizes.

    WALRAS_DATA=FOLDER python benchmarks/bench_replay_accuracy.py    # half a minute; --quick prints and writes nothing
    WALRAS_DATA=FOLDER python benchmarks/bench_replay_accuracy.py --profiles    # fits the shipped profiles anew

Layers were timed by themselves; whole runs are what they are tested on. One number is fitted to runs, how unequal contexts
are, and always to other runs than the one it is tested on. Rewrites its section of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from page import write_section
from walras.engine.fitting import Loads, StepRows, calibrate, fit_closed_loop, fit_steps
from walras.engine.layers import Shape, fit_layers
from walras.engine.profiles import SHIPPED, Limits, Profile, save_profiles
from walras.engine.replay import Intervals, Replay, Served
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings

LLAMA, QWEN = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507"
LAYERS_FROM = "LLMServingSim (casys-kaist, MIT), profiler/perf: layers timed on {gpu}, bf16, vLLM 0.19"
SPLITWISE_FROM = (
    "splitwise-sim (Mutinifni, MIT), data/perf_model.csv: prompt and token times of {model} on {hardware}"
)
SILICON_FROM = "aiconfigurator (ai-dynamo, Apache-2.0), silicon_sample.csv: mean TTFT and TPOT of {model} on {system}, {backend} {version}"
SPREADS = np.linspace(0.0, 0.5, 11)
BARS = {"TPOT, mean": 0.03, "TTFT, mean": 0.10, "TPOT, p95": 0.15, "TTFT, p95": 0.15}


# --- what the layer files leave out: public facts of the same source ----------------------------------------------------

EXPERTS = ([0, 4, 8, 16, 32, 64], [25.0, 41.0, 50.0, 131.0, 240.0, 431.0])
"""µs of Qwen's 64 experts on one of two GPUs (moe.csv, ep 2), by how many of them some token touches."""
EXPERT_TOKENS = ([64, 256, 512, 1024, 2048, 4096], [0.0, 14.0, 37.0, 75.0, 134.0, 252.0])
"""µs more, by tokens; the last goes on with the slope before it."""
COLLECTIVE_US, COLLECTIVE_US_BYTE = 13.0, 30e-6
"""Two GPUs over PCIe 5 (hardware.yaml): all-reduce, all-gather and reduce-scatter, bytes of one GPU."""


def collective_s(tokens: np.ndarray, hidden: int) -> np.ndarray:
    """Seconds of one collective over so many tokens' hidden states in bf16."""
    return (COLLECTIVE_US + COLLECTIVE_US_BYTE * 2 * hidden * tokens) * 1e-6


def all_reduces(tokens: np.ndarray) -> np.ndarray:
    """Llama 8B on two GPUs: two in each of 32 layers."""
    return 64 * collective_s(tokens, 4096)


def experts(tokens: np.ndarray) -> np.ndarray:
    """Qwen's experts in each of 48 layers, and three collectives: tokens and their routes to the experts, tokens back."""
    touched = 64 * (1 - (1 - 8 / 128) ** tokens)
    us = np.interp(touched, *EXPERTS) + np.interp(tokens, *EXPERT_TOKENS)
    return 48 * (us * 1e-6 + 2 * collective_s(tokens / 2, 2048) + collective_s(tokens / 2, 128))


# --- engines whose layers were timed, and runs of them ------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A model on GPUs whose layers were timed, and a run of it, if there is one."""

    name: str
    gpu: str
    model: str
    tp: int
    shape: Shape
    limits: Limits
    run: str | None = None
    complete: bool = True
    """Whether layers and what is added are all that takes time."""

    def profile(self, root: Path, spread: float) -> Profile:
        tables = []
        for kind in ("dense", "attention", "per_sequence"):
            table = pq.read_table(root / f"serving/gpu_profile_{kind}_us.parquet")
            mine = [
                pc.equal(table[key], value)
                for key, value in (("gpu", self.gpu), ("model", self.model), ("tp", self.tp))
            ]
            tables.append(table.filter(pc.and_(pc.and_(mine[0], mine[1]), mine[2])))
        source = LAYERS_FROM.format(gpu=self.gpu)
        return fit_layers(
            self.name,
            source,
            (tables[0], tables[1], tables[2]),
            replace(self.shape, spread=spread),
            self.limits,
        )


ENGINES = (
    Engine(
        "rtx4090-llama3.1-8b", "RTX4090", LLAMA, 1, Shape(32, 8, 128),
        Limits(2587 * 16, 256, 2048), "rtx4090_llama31_8b_tp1",
    ),
    Engine(
        "rtxpro6000-llama3.1-8b", "RTXPRO6000", LLAMA, 1, Shape(32, 8, 188),
        Limits(560_000, 128, 2048), "rtxpro6000_llama31_8b_tp1",
    ),
    Engine(
        "rtxpro6000-llama3.1-8b-tp2", "RTXPRO6000", LLAMA, 2, Shape(32, 4, 188, more_s=all_reduces),
        Limits(1_240_000, 256, 2048),
    ),
    Engine(
        "rtxpro6000-qwen3-30b-a3b-dp2", "RTXPRO6000", QWEN, 1, Shape(48, 4, 188, ranks=2, more_s=experts),
        Limits(1_170_000, 256, 4096), "rtxpro6000_qwen3_30b_a3b", complete=False,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A measured run: 300 requests, and the engine's own log once a second."""

    requests: dict[str, np.ndarray]
    series: dict[str, np.ndarray]

    @classmethod
    def read(cls, root: Path, name: str) -> Run:
        return cls(
            *(
                _columns(root / f"serving/vllm_measured_{kind}.parquet", name)
                for kind in ("requests", "timeseries")
            )
        )

    def asked(self) -> Requests:
        q = self.requests
        return Requests(q["arrival_s"], q["input_tokens"], q["output_tokens"])

    def latencies(self) -> dict[str, np.ndarray]:
        """As the engine was asked: time to the first token counts from arrival at the service."""
        q = self.requests
        seen = q["queued_s"] - q["arrival_s"]
        return {
            "TPOT": q["decode_s"] / (q["output_tokens"] - 1),
            "TTFT": seen + q["queue_s"] + q["prefill_s"],
            "queue": seen + q["queue_s"],
        }


def _columns(path: Path, run: str) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    table = table.filter(pc.equal(table["run"], run))
    return {key: table[key].to_numpy() for key in table.column_names if key not in ("run", "request_id")}


def settings_of(profile: Profile) -> EngineSettings:
    """vLLM as it ran, with blocks of 16 tokens."""
    limits = profile.limits
    return EngineSettings(
        kv_blocks=limits.kv_tokens // 16,
        max_batched_tokens=limits.step_tokens,
        max_sequences=limits.most_sequences,
        schedule_ahead=bool(limits.steps_ahead),
    )


def replayed(profile: Profile, run: Run, **changes: Any) -> tuple[Served, Intervals]:
    """The run's requests through the engine of the profile. SIMULATED."""
    settings = replace(settings_of(profile), **changes)
    replay = Replay(settings, profile.steps(), None, run.asked()).run()
    return replay.served(), replay.intervals()


def errors(run: Run, served: Served, intervals: Intervals) -> dict[str, float]:
    """Relative errors of means and 95th percentiles; KV use in points of the memory, the mean over seconds."""
    got = {"TPOT": served.tpot_s, "TTFT": served.ttft_s, "queue": served.queue_s}
    found = {}
    for key, real in run.latencies().items():
        found[f"{key}, mean"] = got[key].mean() / real.mean() - 1
        found[f"{key}, p95"] = np.percentile(got[key], 95) / np.percentile(real, 95) - 1
    kv = run.series["kv_cache_pct"]
    if kv.any():
        at = np.interp(run.series["t"], intervals.end_s, 100 * intervals.kv_use[:, 0])
        found["KV use"] = float(np.abs(at - kv).mean())
        found["KV use within 5"] = float((np.abs(at - kv) <= 5).mean())
    return found


def tpot_off(profile: Profile, run: Run) -> float:
    return errors(run, *replayed(profile, run))["TPOT, mean"]


def spread_of(root: Path, engines: Sequence[Engine]) -> float:
    """The one number fitted to runs: least squared error of mean TPOT on them."""
    runs = [(engine, Run.read(root, str(engine.run))) for engine in engines]
    loss = [
        sum(tpot_off(engine.profile(root, spread), run) ** 2 for engine, run in runs) for spread in SPREADS
    ]
    return float(SPREADS[int(np.argmin(loss))])


def calibrated(root: Path, engine: Engine, spread: float) -> Profile:
    """The engine's profile with what its own run says the layers left out."""
    run = Run.read(root, str(engine.run))
    profile = engine.profile(root, spread)
    return calibrate(profile, settings_of(profile), run.asked(), float(run.latencies()["TPOT"].mean()))


# --- whole steps of Splitwise, closed loops of aiconfigurator -----------------------------------------------------------


def splitwise(root: Path) -> list[Profile]:
    """Prompt steps and token steps, one profile for each model, machine and degree; two GPUs ran out of memory in part."""
    rows = pq.read_table(root / "serving/gpu_profile_splitwise.parquet").to_pylist()
    memory = {("llama2-70b", 4): 520_000, ("llama2-70b", 8): 1_460_000, ("bloom-176b", 8): 66_000}
    found = []
    for model, hardware, tp in sorted({(r["model"], r["hardware"], r["tensor_parallel"]) for r in rows}):
        if (model, tp) not in memory:
            continue
        steps = []
        for r in rows:
            if (r["model"], r["hardware"], r["tensor_parallel"]) == (model, hardware, tp):
                batch, prompt, out = r["batch_size"], r["prompt_tokens"], r["output_tokens"]
                pairs = batch * prompt * (prompt + 1) / 2
                steps.append((batch * prompt, pairs, 0, 0, r["prompt_ms"], (batch, prompt, 0)))
                steps.append((0, 0, batch, batch * (prompt + out / 2), r["token_ms"], (batch, prompt, out)))
        *columns, content = zip(*steps, strict=True)
        prefill, pair, sequences, kv, ms = (np.asarray(column, dtype=np.float64) for column in columns)
        _, group = np.unique(np.asarray(content), axis=0, return_inverse=True)
        source = SPLITWISE_FROM.format(model=model, hardware=hardware)
        measured = StepRows(prefill, pair, sequences, kv, ms / 1000, group.reshape(-1))
        limits = Limits(memory[model, tp], 64, 8192, steps_ahead=0)
        found.append(fit_steps(f"{hardware}-{model}-tp{tp}", source, measured, limits))
    return found


SAME = (
    "backend", "backend_version", "model_path", "system", "precision", "gemm_quant_mode", "moe_quant_mode",
    "tp_size", "pp_size", "moe_tp_size", "moe_ep_size",
)  # fmt: skip
SHIP = {
    ("vllm", "openai/gpt-oss-120b", "h200_sxm", 4.0): "h200-gpt-oss-120b-tp4",
    ("vllm", "meta-llama/Llama-3.1-70B", "h100_sxm", 8.0): "h100-llama3.1-70b-fp8-tp8",
    ("vllm", "Qwen/Qwen3-32B", "h100_sxm", 8.0): "h100-qwen3-32b-tp8",
    ("vllm", "moonshotai/Kimi-K2.5", "h200_sxm", 8.0): "h200-kimi-k2.5-int4-tp8",
    ("sglang", "deepseek-ai/DeepSeek-R1", "h200_sxm", 8.0): "h200-deepseek-r1-fp8-tp8",
}
LEAST_POINTS, LEAST_SIZES, MOST_USERS = 8, 4, 128
TURNS, SHORTEST = 6, 0.8
"""Requests of a simulated user; and how much shorter than the nominal ones lengths may be, as load generators draw them."""


@dataclass(frozen=True)
class Loop:
    """All points of one model, engine version and degree of parallelism."""

    backend: str
    version: str
    model: str
    system: str
    tp: float
    loads: Loads

    @property
    def held_out(self) -> bool:
        """Half of the (model, system) pairs: nothing was chosen by looking at them."""
        return zlib.crc32(f"{self.model}|{self.system}".encode()) % 2 == 0


def loops(root: Path) -> list[Loop]:
    """Of the aggregated engines without data parallelism, those with enough points."""
    table = pq.read_table(root / "serving/silicon_ttft_tpot.parquet")
    points: dict[tuple[Any, ...], dict[tuple[float, ...], set[tuple[float, float]]]] = {}
    for r in table.to_pylist():
        if (
            r["mode"] == "agg"
            and r["batch_size"]
            and r["silicon_tpot_ms"]
            and (r["attention_dp_size"] or 1) == 1
        ):
            loop = points.setdefault(tuple(r[key] for key in SAME), {})
            at = loop.setdefault((r["isl"], r["osl"], r["batch_size"]), set())
            at.add((r["silicon_ttft_ms"] / 1000, r["silicon_tpot_ms"] / 1000))
    found = []
    for key, loop in points.items():
        rows = np.array([(*at, *np.median(list(seen), axis=0)) for at, seen in sorted(loop.items())])
        if len(rows) >= LEAST_POINTS and len(np.unique(rows[:, 2])) >= LEAST_SIZES:
            first, out = rows[:, 3], rows[:, 4]
            found.append(
                Loop(key[0], key[1] or "?", key[2], key[3], key[7], Loads(*rows[:, :3].T, out, first))
            )
    return found


def closed_loop(profile: Profile, loads: Loads, row: int) -> tuple[float, float]:
    """Mean TPOT and TTFT of a replay of one point; SIMULATED."""
    users, rng = int(loads.batch[row]), np.random.default_rng(row)
    lengths = [
        rng.integers(max(1, int(SHORTEST * most)), int(most) + 1, users * TURNS)
        for most in (loads.input_tokens[row], loads.output_tokens[row])
    ]
    after = np.arange(users * TURNS) - users
    requests = Requests(np.zeros(users * TURNS), *lengths, after=np.maximum(after, -1))
    settings = EngineSettings(
        kv_blocks=1 << 18,
        max_batched_tokens=profile.limits.step_tokens,
        max_sequences=max(2, users),
        schedule_ahead=True,
        prefix_caching=False,
    )
    steps = profile.steps(most_sequences=max(2, users))
    served = Replay(settings, steps, None, requests, interval_s=None).run().served()
    return float(served.tpot_s.mean()), float(served.ttft_s.mean())


def fit_through_replay(loop: Loop, loads: Loads, name: str) -> tuple[Profile, float]:
    """Fitted once by formula, and once more after the replay showed by how much the formula is off at each point."""
    source = SILICON_FROM.format(
        model=loop.model, system=loop.system, backend=loop.backend, version=loop.version
    )
    most = int((loads.batch * (loads.input_tokens + loads.output_tokens)).max())
    limits = Limits(most, int(max(2, loads.batch.max())), 8192)
    profile, outside = fit_closed_loop(name, source, loads, limits)
    error = profile.error
    tpot, ttft = loads.tpot_s.copy(), loads.ttft_s.copy()
    for row in np.flatnonzero(loads.batch <= MOST_USERS):
        got = closed_loop(profile, loads, row)
        tpot[row] *= loads.tpot_s[row] / got[0]
        ttft[row] *= np.clip(loads.ttft_s[row] / (got[1] + outside), 0.7, 1.4)
    profile, outside = fit_closed_loop(name, source, replace(loads, tpot_s=tpot, ttft_s=ttft), limits)
    return replace(profile, error=error), outside


def loop_errors(loop: Loop) -> list[tuple[float, float]]:
    """(TPOT, TTFT) relative errors at the middle batch size, fitted to the others."""
    sizes = np.unique(loop.loads.batch)
    out = loop.loads.batch == sizes[len(sizes) // 2]
    if loop.loads.batch[out][0] > MOST_USERS:
        return []
    train = loop.loads.take(~out)
    profile, _ = fit_through_replay(loop, train, "")
    small = np.flatnonzero(train.batch <= MOST_USERS)
    waits = train.ttft_s[small] - np.array([closed_loop(profile, train, row)[1] for row in small])
    found = []
    for row in np.flatnonzero(out):
        tpot, ttft = closed_loop(profile, loop.loads, row)
        alike = train.input_tokens[small] == loop.loads.input_tokens[row]
        outside = np.median(waits[alike] if alike.any() else waits)
        found.append((tpot / loop.loads.tpot_s[row] - 1, (ttft + outside) / loop.loads.ttft_s[row] - 1))
    return found


# --- tables -------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(value: float) -> str:
    return f"{100 * value:+.1f}%"


def run_tables(root: Path) -> tuple[str, list[Profile]]:
    """Errors on each run with the spread fitted to the others; and the profiles that all runs give together."""
    measured = [engine for engine in ENGINES if engine.run]
    head = ["run", "spread (fitted on the others)", *BARS, "queue, mean", "KV use, points"]
    rows = []
    for engine in measured:
        others = [other for other in measured if other is not engine and other.complete]
        spread, run = spread_of(root, others), Run.read(root, str(engine.run))
        off = errors(run, *replayed(engine.profile(root, spread), run))
        rows.append(_row(engine.name, f"{spread:.2f}", off))
    rows.append(["*the bar*", "", *(f"{bar:.0%}" for bar in BARS.values()), "", "5"])
    spread = spread_of(root, [engine for engine in measured if engine.complete])
    own = {engine.name: calibrated(root, engine, spread) for engine in measured if not engine.complete}
    for engine in measured:
        if engine.name in own:
            run = Run.read(root, str(engine.run))
            more = 1000 * (own[engine.name].overhead_s - engine.profile(root, spread).overhead_s)
            name = f"{engine.name}, {more:.1f} ms a step fitted to **its own** mean TPOT"
            rows.append(_row(name, f"{spread:.2f}", errors(run, *replayed(own[engine.name], run))))
    first = measured[0]
    run, profile = Run.read(root, str(first.run)), first.profile(root, spread)
    without: dict[str, Callable[[], tuple[Served, Intervals]]] = {
        "composing steps ahead": lambda: replayed(profile, run, schedule_ahead=False),
        "reuse of a preempted request's blocks": lambda: replayed(profile, run, prefix_caching=False),
        "room for whole prompts": lambda: replayed(profile, run, reserve_prompt=False),
        "unequal contexts": lambda: replayed(first.profile(root, 0.0), run),
    }
    rows += [_row(f"{first.name} without {what}", "", errors(run, *go())) for what, go in without.items()]
    found = [own.get(engine.name) or engine.profile(root, spread) for engine in ENGINES]
    return table(head, rows), found


def _row(name: str, spread: str, off: dict[str, float]) -> list[str]:
    kv = (
        f"{off['KV use']:.1f}; {off['KV use within 5']:.0%} of seconds within 5"
        if "KV use" in off
        else "not recorded"
    )
    return [name, spread, *(percent(off[key]) for key in BARS), percent(off["queue, mean"]), kv]


def profiles(root: Path, layered: Sequence[Profile]) -> list[Profile]:
    """Those that ship with Walras."""
    found = [*layered, *splitwise(root)]
    for loop in loops(root):
        name = SHIP.get((loop.backend, loop.model, loop.system, loop.tp))
        if name and name not in [profile.name for profile in found]:
            found.append(fit_through_replay(loop, loop.loads, name)[0])
    return found


def profile_table(found: Sequence[Profile]) -> str:
    rows = [
        [
            f"`{p.name}`",
            f"{p.error.median:.1%}",
            f"{p.error.p95:.0%}",
            str(p.error.rows),
            p.error.held_out_by,
            p.source,
        ]
        for p in found
    ]
    return table(["profile", "median error", "p95", "points", "held out by", "fitted to"], rows)


def loop_table(root: Path) -> str:
    rows = []
    every = loops(root)
    for what, keep in (("chosen on", False), ("held out", True)):
        for backend in ("vllm", "sglang", "trtllm"):
            mine = [loop for loop in every if loop.held_out is keep and loop.backend == backend]
            off = np.abs([one for loop in mine for one in loop_errors(loop)])
            if off.size:
                rows.append([
                    what, backend, str(len(mine)), str(len(off)),
                    f"{np.median(off[:, 0]):.1%}", f"{(off[:, 0] <= 0.03).mean():.0%}",
                    f"{np.median(off[:, 1]):.1%}", f"{(off[:, 1] <= 0.10).mean():.0%}",
                ])  # fmt: skip
    head = [
        "(model, system)",
        "engine",
        "configurations",
        "points",
        "TPOT off, median",
        "within 3%",
        "TTFT off, median",
        "within 10%",
    ]
    return table(head, rows)


PAGE = """\
## Replay: accuracy

Three measured vLLM 0.19 runs of 300 chat requests (LLMServingSim's, MIT), replayed. Step times are added up from the times of
single layers; nothing in them is fitted to a run but the *spread* of contexts, and that to the other runs only. TTFT counts
from arrival, waiting included: at full load it is a difference of large numbers, and an error in TPOT grows in it. Errors of
means and of 95th percentiles:

{runs}

The run on two data-parallel ranks misses the bars, because no layer file times what keeps the ranks in step: a constant per
step, which one number fitted to the run itself puts right (in sample, so it proves only that the rest holds). The last rows
leave parts of the engine out.

Mean latencies of closed loops (aiconfigurator's measurements, Apache-2.0; aggregated serving, no data parallelism, at least
{points_least} points and {sizes_least} batch sizes). A profile is fitted to all batch sizes but the middle one, and tested on that one by
a replay with so many users. Everything about the method was chosen on one half of the (model, system) pairs:

{points}

TTFT is the replay's and what a first token waits for outside of the engine (load generator, network, tokenizer): the median of
what is missing at the other batch sizes with prompts of that length. Where it misses its bar, it is at engines whose settings
(chunk size, order of prompts and answers) were not recorded, and at batches whose prompts come in bursts.

Profiles that ship with Walras, with the relative error on measurements left out of the fit:

{profiles}

`KV length`: a layer at KV lengths left out. `content`: steps of other contents. `batch size`: mean time per output token at the
inner batch sizes, each left out in turn.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the runs only; print, and write nothing")
    parser.add_argument(
        "--profiles", action="store_true", help="write the shipped profiles anew, and nothing else"
    )
    options = parser.parse_args()
    root = Path(os.environ["WALRAS_DATA"])
    runs, layered = run_tables(root)
    if options.quick:
        print(runs)
        return
    found = profiles(root, layered)
    if options.profiles:
        save_profiles(found, SHIPPED)
        return
    text = PAGE.format(
        runs=runs,
        points=loop_table(root),
        profiles=profile_table(found),
        points_least=LEAST_POINTS,
        sizes_least=LEAST_SIZES,
    )
    write_section("replay-accuracy", text)


if __name__ == "__main__":
    main()
