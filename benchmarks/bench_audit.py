"""What an audit costs: price discovery beside HiGHS on the same programme, and time and memory of the whole command.

    make bench            # or: python benchmarks/bench_audit.py; rewrites docs/benchmarks.md

Ratios are within one run on one machine. Instances are random (seeded) routing problems: heavy-tailed costs, delays and
risks, 8 models, three rows that bind. HiGHS gets the sparse programme with one row per task, as a user would write it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, kron, vstack
from scipy.sparse import eye as sparse_eye

from walras.equation import Charge, surplus
from walras.market.shadow import discover
from walras.prices import Constraint
from walras.quantities import Tasks, Uses

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MODELS = 8
ROWS = (Constraint("budget", 0.04), Constraint("mean_sla", 1.2), Constraint("risk_envelope", 0.03))


def instance(n: int, seed: int) -> tuple[Tasks, Uses]:
    rng = np.random.default_rng(seed)
    shape = (n, MODELS)
    cost = 0.1 * rng.lognormal(0, 1, shape)
    uses = Uses(
        names=tuple(f"m{i}" for i in range(MODELS)),
        quality=rng.random(shape),
        amounts=cost[:, :, None],
        seconds=rng.lognormal(0, 1, shape),
        risk=rng.exponential(0.05, shape),
    )
    return Tasks(value=rng.lognormal(0, 1, n)), uses


def highs(tasks: Tasks, uses: Uses, method: str) -> tuple[float, float]:
    """Seconds and objective (USD per task) of the full programme, shares of all N × I uses."""
    n, i = uses.shape
    worth = surplus(tasks, uses).ravel()
    rows = [Charge.of(c, tasks, uses).per_use.ravel() for c in ROWS]
    matrix = vstack([csr_matrix(np.array(rows)), kron(sparse_eye(n), np.ones((1, i)))]).tocsc()
    limits = np.concatenate(([c.per_task_limit * n for c in ROWS], np.ones(n)))
    began = time.perf_counter()
    answer = linprog(-worth, A_ub=matrix, b_ub=limits, bounds=(0, None), method=method)
    return time.perf_counter() - began, -answer.fun / n


def solver_table(sizes: list[int], peer_sizes: list[int], seeds: int) -> list[str]:
    lines = [
        "| tasks | Walras, s | passes | certified gap, USD per task | HiGHS IPM / Walras | HiGHS simplex / Walras | objectives differ by |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for n in sizes:
        ours, passes, gaps, ratios, differ = [], [], [], {"highs-ipm": [], "highs-ds": []}, []
        for seed in range(seeds if n <= 100_000 else 1):
            tasks, uses = instance(n, seed)
            cleared = discover(tasks, uses, ROWS)
            ours.append(cleared.seconds)
            passes.append(cleared.passes)
            gaps.append(cleared.certificate.gap)
            for method, found in ratios.items():
                if n in peer_sizes and (method == "highs-ipm" or n <= min(peer_sizes)):
                    seconds, objective = highs(tasks, uses, method)
                    found.append(seconds / cleared.seconds)
                    differ.append(abs(objective - cleared.certificate.objective))
        lines.append(
            f"| {n:,} | {spread(ours)} | {spread(passes, '.0f')} | {max(gaps):.0e} | {spread(ratios['highs-ipm'])} | "
            f"{spread(ratios['highs-ds'])} | {f'{max(differ):.0e}' if differ else '–'} |"
        )
        print(lines[-1], flush=True)
    return lines


def spread(values: list[float], digits: str = ".2g") -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:{digits}}"
    return f"{np.median(values):{digits}} ({min(values):{digits}}–{max(values):{digits}})"


def command_table(sizes: list[int]) -> list[str]:
    lines = [
        "| tasks | rows of the log | `walras prices`, s | peak memory, MB | `walras audit`, s | peak memory, MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            log = Path(folder) / f"sample-{n}.parquet"
            run("sample", "-o", str(log), "--tasks", str(n))
            prices, audit = (
                run(verb, str(log), "--budget-usd", "0.01", "--sla-s", "15", "--risk", "0.005", "--json")
                for verb in ("prices", "audit")
            )
            peaks.append(audit[1])
            lines.append(
                f"| {n:,} | {5 * n:,} | {prices[0]:.1f} | {prices[1]:.0f} | {audit[0]:.1f} | {audit[1]:.0f} |"
            )
            print(lines[-1], flush=True)
    if len(sizes) > 1:
        per_million = np.polyfit(np.array(sizes) / 1e6, peaks, 1)
        lines += [
            "",
            f"A line through the audit's peaks: {per_million[1]:.0f} MB + {per_million[0]:,.0f} MB per million tasks.",
        ]
    return lines


def run(*arguments: str) -> tuple[float, float]:
    """Seconds and peak resident memory (MB) of one `walras` command in a process of its own."""
    began = time.perf_counter()
    walras = Path(sys.executable).with_name("walras")
    process = subprocess.Popen([walras, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"walras {' '.join(arguments)} failed with status {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only, nothing written")
    quick = parser.parse_args().quick
    # The commands first: a child's peak memory counts what its parent held when it was forked.
    command = command_table([2_000] if quick else [2_000, 100_000, 300_000, 1_000_000])
    solver = solver_table(
        [3_000] if quick else [3_000, 10_000, 100_000, 1_000_000], [3_000] if quick else [3_000, 10_000], 3
    )
    if quick:
        return
    machine = json.dumps(
        {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    )
    PAGE.write_text(
        "# Benchmarks\n\n"
        "Written by `make bench`. Machines are shared and noisy: read the ratios, not the seconds. Medians, with the "
        f"range over seeds in brackets. Machine: `{machine}`.\n\n"
        "## Price discovery beside HiGHS\n\n"
        "Random routing problems, 8 models, a budget, a mean SLA and a risk envelope, all binding. HiGHS solves the same "
        "linear programme in full (through scipy; simplex on the smallest size only).\n\n"
        + "\n".join(solver)
        + "\n\n## The whole command\n\n"
        "The synthetic sample (5 models), three constraints, each command in a process of its own, reading included.\n\n"
        + "\n".join(command)
        + "\n",
        encoding="utf-8",
    )
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
