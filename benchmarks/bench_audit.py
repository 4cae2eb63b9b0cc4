"""What the whole command costs: time and peak memory of `walras prices` and `walras audit`, reading included.

make bench            # or: python benchmarks/bench_audit.py; rewrites its section of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from page import write_section


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
    parser.add_argument("--quick", action="store_true", help="a small size only, nothing written")
    quick = parser.parse_args().quick
    table = command_table([2_000] if quick else [2_000, 100_000, 300_000, 1_000_000])
    if quick:
        return
    write_section(
        "audit",
        "## The whole command\n\n"
        "The synthetic sample (5 models), three constraints, each command in a process of its own, reading included.\n\n"
        + "\n".join(table),
    )


if __name__ == "__main__":
    main()
