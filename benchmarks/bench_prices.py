"""What price discovery costs: beside other solvers, beside reading the data once, and how it grows.

    python benchmarks/bench_prices.py            # a quarter of an hour; --quick for a first look, nothing written

Instances are random (seeded) routing problems: heavy-tailed costs, delays and risks of 8 models, and three rows that
bind, a budget, a mean SLA and a risk envelope. Numbers are float32, so that every solver reads exactly the same ones.
Peers get the sparse programme with one row per task, as a user would write it, each in a process of its own.
HiGHS is part of scipy; `pip install ortools highspy` adds PDLP, and HiGHS without crossover.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, kron, vstack
from scipy.sparse import eye as sparse_eye

from page import spread, write_section
from walras.equation import Charge, surplus
from walras.market.blocks import Blocks, Family
from walras.market.dual import Answer, solve
from walras.market.memory import Memory
from walras.market.planes import Planes, Rows
from walras.market.shadow import discover
from walras.prices import Constraint
from walras.quantities import Tasks, Uses

MODELS = 8
BUDGET, SLA, RISK = 0.04, 1.2, 0.03
ROWS = (Constraint("budget", BUDGET), Constraint("mean_sla", SLA), Constraint("risk_envelope", RISK))


# --- instances --------------------------------------------------------------------------------------------------


def market(n: int, seed: int = 0, *, models: int = MODELS, order: str = "F") -> Memory:
    """`order` F: one column per use, as a columnar store has them; C: a task's uses side by side."""
    rng = np.random.default_rng(seed)

    def plane(draw: Callable[..., np.ndarray], scale: float = 1.0, *, log: bool = False) -> np.ndarray:
        flat = np.empty(n * models, dtype=np.float32)  # drawn in place: no copy of the data is ever held
        draw(out=flat, dtype=np.float32)
        if log:
            np.exp(flat, out=flat)
        flat *= np.float32(scale)
        return flat.reshape(models, n).T if order == "F" else flat.reshape(n, models)

    quality = plane(rng.random)
    cost = plane(rng.standard_normal, 0.1, log=True)
    seconds = plane(rng.standard_normal, log=True)
    risk = plane(rng.standard_exponential, 0.05)
    one, none = np.ones(1), np.zeros(1)
    planes = Planes(
        rng.lognormal(0, 1, n), quality, (cost, seconds, risk), (one, none, one), one, np.zeros(1, np.uint64)
    )
    return Memory(planes, rows((BUDGET * n, 0.0, RISK * n), offset=(0.0, SLA, 0.0)))


def rows(limits: Any, offset: Any = 0.0, first: int = 0) -> Rows:
    """Row k charges plane first + k."""
    k = len(limits)
    no = np.zeros(k, dtype=np.bool_)
    return Rows(
        first + np.arange(k), np.full(k, np.nan), np.zeros(k) + offset, np.array(limits, float), no, no
    )


def economy(of: Memory, number: Any = np.float32) -> tuple[Tasks, Uses]:
    """The same instance as the public interface takes it."""
    p = of.planes
    quality, cost, seconds, risk = (plane.astype(number, copy=False) for plane in (p.quality, *p.amounts))
    names = tuple(f"m{i}" for i in range(of.width))
    return Tasks(value=p.value), Uses(names, quality, cost[:, :, None], seconds=seconds, risk=risk)


def tenants(n: int, groups: int) -> Blocks:
    """A budget for each of the tenants, some of them a hundred times the size of others, instead of one for all."""
    m, rng = market(n), np.random.default_rng(groups)
    group = (groups * rng.random(n) ** 2).astype(np.int64)
    others = rows((0.0, RISK * n), offset=(SLA, 0.0), first=1)
    return Blocks(m.planes, others, Family(group, 0, BUDGET * np.bincount(group, minlength=groups)))


def many_rows(n: int, k: int) -> Memory:
    """k rows, each with a plane of its own, and four fifths of what would be used at no price."""
    rng = np.random.default_rng(k)
    planes = np.empty((1 + k, MODELS * n), dtype=np.float32)
    rng.random(out=planes[0], dtype=np.float32)
    for plane in planes[1:]:
        rng.standard_normal(out=plane, dtype=np.float32)
        np.exp(plane, out=plane)
    quality, *amounts = planes.reshape(1 + k, MODELS, n).transpose(0, 2, 1)
    one, none = np.ones(1), np.zeros(1)
    columns = Planes(
        rng.lognormal(0, 1, n), quality, tuple(amounts), (none,) * k, one, np.zeros(1, np.uint64)
    )
    free = Memory(columns, rows(np.zeros(k))).sums(np.zeros(k), 1.0, 0.0, np.zeros(k)).usage
    return Memory(columns, rows(0.8 * free))


# --- measuring --------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rounds(works: list[Callable[[], Any]], times: int) -> np.ndarray:
    """Seconds, (times, works): in turns, so that a slow spell of the machine meets all of them."""
    return np.array([[seconds_of(work) for work in works] for _ in range(times)])


def read_once(of: Memory) -> Callable[[], float]:
    """One numpy sum over every byte of the data."""
    p = of.planes
    return lambda: sum(float(c.sum()) for c in (p.value, p.quality, *p.amounts))


def gap(answer: Answer) -> float:
    return (answer.dual - answer.objective) / abs(answer.objective)


def excess(of: Memory, answer: Answer) -> float:
    """By how much a row is exceeded at most, relative to what it sums up."""
    return max(float(((answer.usage - of.rows.limits) / answer.size).max()), 0.0)


def tiny(share: float) -> str:
    return "< 1e-15" if abs(share) < 1e-15 else f"{abs(share):.0e}"


def power(x: list[int], y: np.ndarray) -> tuple[float, float]:
    """The exponent of y ∝ x^e by least squares on logarithms, and its standard error."""
    u, v = np.log(x) - np.log(x).mean(), np.log(y)
    slope = float(u @ v / (u @ u))
    left = v - v.mean() - slope * u
    return slope, float(np.sqrt(left @ left / (u.size - 2) / (u @ u)))


def child(*arguments: Any, **environment: str) -> Any:
    """What a function of `CHILDREN` returns in a process of its own."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, env=os.environ | environment, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- peers ------------------------------------------------------------------------------------------------------

PEERS = {
    "highs": ("HiGHS IPM", "scipy"),
    "highs_no_crossover": ("HiGHS IPM, no crossover", "highspy"),
    "pdlp": ("PDLP", "ortools"),
}
"""Name, and the package it comes with."""


def programme(tasks: Tasks, uses: Uses) -> tuple[np.ndarray, Any, np.ndarray]:
    """max worth·x with matrix·x ≤ limits, x ≥ 0: the K rows, and one for each task."""
    n, i = uses.shape
    charged = csr_matrix(np.array([Charge.of(c, tasks, uses).per_use.ravel() for c in ROWS], dtype=float))
    matrix = vstack([charged, kron(sparse_eye(n), np.ones((1, i)))]).tocsc()
    limits = np.concatenate(([c.per_task_limit * n for c in ROWS], np.ones(n)))
    return surplus(tasks, uses).ravel().astype(float), matrix, limits


def highs(worth: np.ndarray, matrix: Any, limits: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    began = time.perf_counter()
    answer = linprog(-worth, A_ub=matrix, b_ub=limits, bounds=(0, None), method="highs-ipm")
    return time.perf_counter() - began, answer.x, -answer.ineqlin.marginals


def highs_no_crossover(
    worth: np.ndarray, matrix: Any, limits: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    import highspy  # noqa: PLC0415 — optional

    model, lp = highspy.Highs(), highspy.HighsLp()
    for option, value in (("output_flag", False), ("solver", "ipm"), ("run_crossover", "off")):
        model.setOptionValue(option, value)
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = -worth, np.zeros(worth.size), np.full(worth.size, np.inf)
    lp.row_lower_, lp.row_upper_ = np.full(limits.size, -np.inf), limits
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    model.passModel(lp)
    seconds = seconds_of(model.run)
    found = model.getSolution()
    return seconds, np.array(found.col_value), -np.array(found.row_dual)


def pdlp(worth: np.ndarray, matrix: Any, limits: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    from ortools.pdlp import solvers_pb2  # noqa: PLC0415 — optional
    from ortools.pdlp.python import pdlp as solver  # noqa: PLC0415

    lp = solver.QuadraticProgram()
    lp.resize_and_initialize(worth.size, limits.size)
    lp.objective_vector, lp.constraint_matrix = -worth, matrix
    lp.constraint_lower_bounds, lp.constraint_upper_bounds = np.full(limits.size, -np.inf), limits
    lp.variable_lower_bounds, lp.variable_upper_bounds = np.zeros(worth.size), np.full(worth.size, np.inf)
    settings = solvers_pb2.PrimalDualHybridGradientParams(num_threads=os.cpu_count())
    began = time.perf_counter()
    found = solver.primal_dual_hybrid_gradient(lp, settings)
    return time.perf_counter() - began, found.primal_solution, -found.dual_solution


def peer(name: str, n: str, seed: str) -> dict[str, Any]:
    """Seconds, the largest excess of x over a row relative to it, objective and prices of a peer."""
    worth, matrix, limits = programme(*economy(market(int(n), int(seed)), np.float64))
    solver = {"highs": highs, "highs_no_crossover": highs_no_crossover, "pdlp": pdlp}[name]
    seconds, x, prices = solver(worth, matrix, limits)
    k = len(ROWS)
    over = (matrix @ x - limits) / np.concatenate((abs(matrix[:k]) @ x, limits[k:]))
    return {
        "seconds": seconds,
        "excess": max(float(over.max()), 0.0),
        "objective": float(worth @ x),
        "prices": prices[:k].tolist(),
    }


def dual_at(of: Memory, prices: list[float]) -> float:
    """The bound that some prices prove: computed anew, from the data."""
    mu = np.maximum(prices, 0.0)
    here = of.sums(mu, 1.0, 0.0, np.zeros(mu.size))
    return here.worth + float(mu @ (of.rows.limits - here.usage))


def peer_table(sizes: list[int], seeds: int, found: dict[str, Any]) -> list[str]:
    lines = [
        "| tasks | solver | seconds | certified gap | rows exceeded by | takes × `solve` | takes × `discover` |",
        "| ---: | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    left_out = sorted({package for _, package in PEERS.values() if importlib.util.find_spec(package) is None})
    peers = {key: title for key, (title, package) in PEERS.items() if package not in left_out}
    for n in sizes:
        runs: dict[str, list[dict[str, float]]] = {key: [] for key in ("solve", "discover", *peers)}
        for seed in range(seeds if n <= 10_000 else max(seeds - 1, 1)):
            m = market(n, seed)
            tasks, uses = economy(m)
            answer, cleared = solve(m), discover(tasks, uses, ROWS)
            works = [lambda m=m: solve(m), lambda t=tasks, u=uses: discover(t, u, ROWS)]
            before = rounds(works, 5)
            for key in peers:
                theirs = child("peer", key, n, seed)
                after = rounds(works, 5)  # ours beside the peer's, in time
                ours = np.median(np.concatenate((before, after)), axis=0)
                before = after
                for name, own in zip(("solve", "discover"), ours, strict=True):
                    runs[name].append({"seconds": float(own)})
                bound = dual_at(m, theirs["prices"])
                runs[key].append(
                    theirs
                    | {"gap": (bound - theirs["objective"]) / abs(theirs["objective"])}
                    | {"solve": theirs["seconds"] / ours[0], "discover": theirs["seconds"] / ours[1]}
                )
            c = cleared.certificate
            runs["solve"][-1] |= {"gap": gap(answer), "excess": excess(m, answer)}
            runs["discover"][-1] |= {"gap": c.relative_gap, "excess": c.max_violation}
        titles = {"solve": "Walras, `solve`", "discover": "Walras, `discover`"} | peers
        for key, title in titles.items():
            own = runs[key]
            worst = {what: max(abs(r[what]) for r in own if what in r) for what in ("gap", "excess")}
            ratios = [spread([r[ours] for r in own if ours in r], ",.0f") for ours in ("solve", "discover")]
            seconds = spread([r["seconds"] for r in own])
            lines.append(
                f"| {n:,} | {title} | {seconds} | {tiny(worst['gap'])} | {tiny(worst['excess'])} | {' | '.join(ratios)} |"
            )
            print(lines[-1], flush=True)
            if key in peers and n == sizes[-1]:
                found[key] = [r["solve"] for r in own]
            found["gap"] = max(found.get("gap", 0.0), worst["gap"] if key == "solve" else 0.0)
    if left_out:
        lines += ["", f"Left out: solvers of {' and '.join(left_out)} (`pip install {' '.join(left_out)}`)."]
    return lines


# --- compiling --------------------------------------------------------------------------------------------------


def first_call() -> dict[str, float]:
    m = market(2_000)
    return {"first": seconds_of(lambda: solve(m)), "second": seconds_of(lambda: solve(m))}


def compiling() -> str:
    with tempfile.TemporaryDirectory() as folder:
        cold, cached = (child("first_call", NUMBA_CACHE_DIR=folder) for _ in range(2))
    return (
        f"Kernels are compiled once for each machine: the first call ever takes {cold['first']:.0f} s, the first of a "
        f"process after that {cached['first']:.1f} s; all other times here are of later calls."
    )


# --- beside one reading of the data -----------------------------------------------------------------------------


def resident(what: str) -> int:
    """Bytes: VmRSS, held now; VmHWM, the most since `forget`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def peak(work: Callable[[], Answer], before: int) -> tuple[Answer, float]:
    """What `work` returns, and how far memory rose above `before` meanwhile."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    answer = work()
    return answer, resident("VmHWM") - before


def large(n: str, order: str, times: str) -> dict[str, Any]:
    solve(market(50_000, order=order))  # kernels are there, and the pool of threads
    m = market(int(n), order=order)
    before, size = resident("VmRSS"), m.planes.nbytes
    answer, extra = peak(lambda: solve(m), before)
    near, moved = solve(m.sample(20_000)).multipliers, 1.01 * answer.multipliers
    starts: dict[str, dict[str, Any]] = {
        "cold": {},
        "sample": {"start": near, "trust": 0.05},  # so far off are the prices of 20,000 tasks
        "moved": {"start": moved},
    }
    peaks = {key: peak(lambda s=start: solve(m, **s), before) for key, start in starts.items()}
    peaks["cold"] = answer, extra
    works = [read_once(m), lambda: solve(m.sample(20_000))]
    works += [lambda s=start: solve(m, **s) for start in starts.values()]
    read, of_sample, *best = rounds(works, int(times)).min(axis=0)
    return {
        "bytes": size,
        "read": read,
        "off": float(np.abs(near / answer.multipliers - 1).max()),
        "solving the sample": of_sample / read,
        **{key: seconds / read for key, seconds in zip(starts, best, strict=True)},
        **{f"{key} gap": gap(a) for key, (a, _) in peaks.items()},
        **{f"{key} passes": a.passes for key, (a, _) in peaks.items()},
        **{f"{key} extra": above / size for key, (_, above) in peaks.items()},
    }


def large_table(n: int, times: int, found: dict[str, Any]) -> list[str]:
    lines = [
        "| columns | start | passes | × one numpy sum | certified gap | memory above the data |",
        "| :--- | :--- | ---: | ---: | ---: | ---: |",
    ]
    starts = {"cold": "none", "sample": "prices of a sample", "moved": "prices 1% off"}
    for order, title in (("F", "one per use"), ("C", "a task's uses side by side")):
        got = child("large", n, order, times)
        for key, start in starts.items():
            lines.append(
                f"| {title} | {start} | {got[f'{key} passes']} | {got[key]:.1f} | {tiny(got[f'{key} gap'])} | "
                f"{got[f'{key} extra']:.1%} |"
            )
            print(lines[-1], flush=True)
        if order == "F":
            found |= {f"large {key}": value for key, value in got.items()}
    return lines


# --- growth -----------------------------------------------------------------------------------------------------


def growth_table(
    sizes: list[int], widths: list[int], at: int, times: int, found: dict[str, Any]
) -> list[str]:
    lines = ["| | seconds at each | exponent |", "| :--- | :--- | ---: |"]
    for what, values, make in (
        ("tasks", sizes, market),
        ("models", widths, lambda i: market(at, models=i)),
    ):
        markets = [make(value) for value in values]
        works = [lambda m=m: solve(m) for m in markets]
        rounds(works, 1)
        best = rounds(works, times).min(axis=0)
        slope, error = power(values, best)
        each = ", ".join(f"{value:,}: {s:.2g}" for value, s in zip(values, best, strict=True))
        lines.append(f"| {what} | {each} | {slope:.2f} ± {error:.2f} |")
        print(lines[-1], flush=True)
        found[f"exponent {what}"], found[f"exponent {what} se"] = slope, error
    return lines


def rows_table(n: int, counts: list[int], times: int, found: dict[str, Any]) -> list[str]:
    lines = [
        "| rows | that bind | data, MB | cold, ns per byte | from prices 1% off, ns per byte | passes | certified gap |",
        "| ---: | ---: | ---: | ---: | ---: | :---: | ---: |",
    ]
    colds, warms = [], []
    for k in counts:
        m = many_rows(n, k)
        answer = solve(m)
        near = 1.01 * answer.multipliers
        cold, warm = rounds([lambda m=m: solve(m), lambda m=m, s=near: solve(m, start=s)], times).min(axis=0)
        again = solve(m, start=near)
        size = m.planes.nbytes
        colds.append(cold / size)
        warms.append(warm / size)
        lines.append(
            f"| {k} | {int((answer.multipliers > 0).sum())} | {size / 1e6:.0f} | {cold / size * 1e9:.2f} | "
            f"{warm / size * 1e9:.2f} | {answer.passes}, {again.passes} | {tiny(max(gap(answer), gap(again)))} |"
        )
        print(lines[-1], flush=True)
    found["rows cold"], found["rows warm"] = max(colds) / min(colds), max(warms) / min(warms)
    return lines


def tenants_table(n: int, counts: list[int], times: int, found: dict[str, Any]) -> list[str]:
    lines = [
        "| tenants | seconds | passes | certified gap | budgets with a price |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    markets = [tenants(n, groups) for groups in counts]

    def fresh(m: Blocks) -> Answer:
        m.last = None  # or the prices of the call before would be where this one starts
        return solve(m)

    answers = [fresh(m) for m in markets]
    best = rounds([lambda m=m: fresh(m) for m in markets], times).min(axis=0)
    for groups, m, answer, seconds in zip(counts, markets, answers, best, strict=True):
        priced = np.nan if m.last is None else int((m.last.price > 0).sum())
        lines.append(f"| {groups:,} | {seconds:.2f} | {answer.steps} | {tiny(gap(answer))} | {priced:,} |")
        print(lines[-1], flush=True)
    found["tenants"] = (best.max() - best.min()) / (best.max() + best.min())
    return lines


# --- the certificate --------------------------------------------------------------------------------------------


def certificate_table(sizes: list[int], seeds: int) -> list[str]:
    lines = [
        "| tasks | mixture: gap | row exceeded by | rounded: gap | row exceeded by | tasks that were split |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for n in sizes:
        cleared = [discover(*economy(market(n, seed)), ROWS) for seed in range(seeds)]
        mixed, rounded = [c.certificate for c in cleared], [c.rounded for c in cleared]
        gaps = [r.gap / abs(c.objective) for r, c in zip(rounded, mixed, strict=True)]
        lines.append(
            f"| {n:,} | {tiny(max(c.relative_gap for c in mixed))} | {tiny(max(c.max_violation for c in mixed))} | "
            f"{tiny(max(gaps))} | {tiny(max(r.max_violation for r in rounded))} | {spread([r.split_tasks for r in rounded], '.0f')} |"
        )
        print(lines[-1], flush=True)
    return lines


# --- the page ---------------------------------------------------------------------------------------------------


def targets(found: dict[str, Any], n: int, most: int) -> list[str]:
    """Each claim beside what was measured."""
    lines = ["| | target | measured | |", "| :--- | ---: | ---: | :--- |"]

    def line(what: str, target: str, key: str, digits: str, met: Callable[[float], bool]) -> None:
        if key not in found:  # a peer may be left out
            return
        values = np.atleast_1d(found[key]).tolist()
        shown = spread(values, digits) if digits else tiny(values[0])
        verdict = {len(values): "met", 0: "**not met**"}.get(sum(map(met, values)), "within the noise")
        lines.append(f"| {what} | {target} | {shown} | {verdict} |")

    line(f"HiGHS IPM / `solve`, {n:,} tasks", "≥ 1,000", "highs", ",.0f", lambda x: x >= 1000)
    line(
        "HiGHS IPM without crossover / `solve`", "≥ 1,000", "highs_no_crossover", ",.0f", lambda x: x >= 1000
    )
    line("PDLP / `solve`", "≥ 300", "pdlp", ",.0f", lambda x: x >= 300)
    line("certified gap there", "≤ 1e-7", "gap", "", lambda x: x <= 1e-7)
    line(f"cold / numpy sum, {most:,} tasks", "≤ 10", "large cold", ".2g", lambda x: x <= 10)
    line("from a sample's prices / numpy sum", "≤ 5", "large sample", ".2g", lambda x: x <= 5)
    line("from prices 1% off / numpy sum", "≤ 5", "large moved", ".2g", lambda x: x <= 5)
    found["large gap"], found["large extra"] = (
        max(found[f"large {start} {what}"] for start in ("cold", "sample", "moved"))
        for what in ("gap", "extra")
    )
    line("certified gap there", "≤ 1e-6", "large gap", "", lambda x: x <= 1e-6)
    line("memory above the data, at most", "≤ 10%", "large extra", ".1%", lambda x: x <= 0.1)
    line("exponent in tasks", "≤ 1 (linear)", "exponent tasks", ".2f", lambda x: x <= 1.05)
    line("exponent in models", "≤ 1 (linear)", "exponent models", ".2f", lambda x: x <= 1.05)
    line("time per byte, most / least over 1–16 rows, cold", "≤ 2", "rows cold", ".2g", lambda x: x <= 2)
    line("the same, from prices 1% off", "≤ 2", "rows warm", ".2g", lambda x: x <= 2)
    line("time, 32 to 10,000 tenants' budgets", "± 25%", "tenants", ".0%", lambda x: x <= 0.25)
    return lines


def section(quick: bool = False) -> str:
    found: dict[str, Any] = {}
    sizes, most, at = ([3_000], 300_000, 100_000) if quick else ([10_000, 100_000], 10_000_000, 1_000_000)
    times = 3 if quick else 7
    growing = [10_000, 30_000, 100_000] if quick else [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]
    compiled = compiling()
    print(compiled, flush=True)
    tables = [
        large_table(most, times, found),
        growth_table(growing, [2, 4, 8, 16, 32], at, times, found),
        rows_table(at, [1, 2, 4, 8, 16], times, found),
        tenants_table(at, [32, 100, 1_000] if quick else [32, 100, 1_000, 10_000], 3, found),
        certificate_table([*sizes, at], 3),
        peer_table(sizes, 1 if quick else 3, found),
    ]
    over_data, growth, dense, blocks, certified, peers = ("\n".join(table) for table in tables)
    summary = "" if quick else "\n".join(targets(found, sizes[-1], most))
    return f"""\
## Price discovery

Random routing problems: {MODELS} models; a budget, a mean SLA and a risk envelope, all binding; float32. The certified gap
is (the dual at the solver's prices − its objective) / |objective|, the dual computed by us from the data.

{summary}

### Beside other solvers

Peers solve the same programme with one row per task and their default tolerances, construction not counted. `solve` reads
the columns in memory; `discover` is the public call with everything it does around that: checks, certificate, rounding.
Ours are medians of ten calls right before and after the peer's run. {compiled}

{peers}

### Beside reading the data

{most:,} tasks, {found["large bytes"] / 1e9:.2f} GB. The time of `solve` beside that of one numpy sum over the same bytes
({found["large read"]:.3f} s), each the best of {times} taken in turns; the sum runs on one thread, `solve` on all cores. The
sample has 20,000 tasks, and its prices are up to {found["large off"]:.1%} off; solving it takes
{found["large solving the sample"]:.2f} sums more. Memory: the peak during the call above what was resident before,
relative to the data, in a process of its own.

{over_data}

### Growth

Cold `solve`, best of {times}; models at {at:,} tasks. Log-log fits, ± standard error.

{growth}

Rows that each charge a plane of their own, {at:,} tasks, best of {times}:

{dense}

A budget for each tenant instead of one for all, beside the mean SLA and the risk envelope, {at:,} tasks, best of 3
(sorting the tasks by tenant not counted; tenants differ in size, the largest by far the most):

{blocks}

### The certificate

`discover`: the mixture that the gap is proved for, and the allocation after every split task was given to one use. Worst of 3
seeds; gaps relative to the objective; an excess is relative to the row.

{certified}
"""


CHILDREN = {"peer": peer, "first_call": first_call, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only, nothing written")
    parser.add_argument("--child", nargs="+", metavar="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, *values = arguments.child
        print(json.dumps(CHILDREN[name](*values)))
        return
    written = section(arguments.quick)
    if arguments.quick:
        print(written)
    else:
        write_section("prices", written)


if __name__ == "__main__":
    main()
