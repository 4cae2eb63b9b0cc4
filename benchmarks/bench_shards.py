"""Markets larger than memory, and markets on several workers: seconds, memory and bytes next to the exactness.

    python benchmarks/bench_shards.py           # 100M tasks, about 13 GB in the temporary folder, deleted afterwards
    python benchmarks/bench_shards.py --quick

Every run is a process of its own, so that its peak memory is its own. Kernels are loaded before the clock starts.
The page cache is emptied of the files before what is called cold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from page import write_section
from walras.market.cluster import Cluster
from walras.market.dual import Answer, Market, solve
from walras.market.memory import Memory, Sums
from walras.market.planes import Planes, Rows
from walras.market.shards import Shards, write_shard

USES = tuple(f"m{i}" for i in range(8))
PLANES = ("usd", "seconds", "risk")
DECLARED = (1.0, 0.0, 0.0)
SHARD = 2_500_000
TASK = 4 * (1 + len(USES) * (1 + len(PLANES)))
"""Bytes a task."""


def planes(n: int, seed: int) -> Planes:
    rng, one = np.random.default_rng(seed), np.float32
    shape = (len(USES), n)

    def lognormal(*size: int) -> np.ndarray:
        normal = rng.standard_normal(size, dtype=one)
        return np.exp(normal, out=normal)

    amounts = (
        one(0.1) * lognormal(*shape),
        lognormal(*shape),
        one(0.05) * rng.standard_exponential(shape, one),
    )
    return Planes(
        lognormal(n),
        rng.random(shape, one).T,
        tuple(amount.T for amount in amounts),
        tuple(np.array([usd]) for usd in DECLARED),
        np.ones(1),
        np.zeros(1, dtype=np.uint64),
    )


def rows(n: int) -> Rows:
    """A budget, a mean SLA and a risk envelope; all bind."""
    no = np.zeros(3, dtype=bool)
    return Rows(
        np.arange(3), np.full(3, np.nan), np.array([0, 1.2, 0]), np.array([0.04 * n, 0, 0.03 * n]), no, no
    )


base = cache(planes)


def write(path: Path, n: int, seed: int) -> None:
    """The same draws for all shards, each column turned by a stretch of its own, so that no task comes twice: drawing all
    of them afresh would take longer than everything that is measured."""
    drawn, rng = base(SHARD, 0), np.random.default_rng(seed)

    def turned(plane: np.ndarray) -> np.ndarray:
        return np.array([np.roll(column, rng.integers(SHARD))[:n] for column in plane.T]).T

    write_shard(
        path,
        replace(
            drawn,
            value=drawn.value[:n],
            quality=turned(drawn.quality),
            amounts=tuple(turned(amount) for amount in drawn.amounts),
        ),
        USES,
        PLANES,
    )


def generate(folder: Path, n: int, extension: str) -> float:
    """Shards with n tasks in all; seconds."""
    began = time.perf_counter()
    folder.mkdir()
    sizes = [min(SHARD, n - at) for at in range(0, n, SHARD)]
    # Spawned: a forked child would inherit threads it does not have.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(
            pool.map(
                write,
                [folder / f"{i:03}.{extension}" for i in range(len(sizes))],
                sizes,
                range(len(sizes)),
            )
        )
    return time.perf_counter() - began


# --- what the children do -----------------------------------------------------------------------------------------


class Timed(Shards):
    """Shards that know how long their passes took."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: list[float] = []
        self.left: list[int] = []
        self.sampled = 0.0

    def screen(self, price: Any, radius: Any, scale: float) -> tuple[Sums, Memory]:
        began = time.perf_counter()
        sums, near = super().screen(price, radius, scale)
        self.seconds.append(time.perf_counter() - began)
        self.left.append(len(near))
        return sums, near

    def sample(self, n: int) -> Memory:
        began = time.perf_counter()
        sample = super().sample(n)
        self.sampled += time.perf_counter() - began
        return sample


class Peak(threading.Thread):
    """Most memory of this process that is not pages of a file, MB, looked at fifty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = 0.0

    def run(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, status("RssAnon"))
            time.sleep(0.02)


def status(key: str) -> float:
    """A line of this process's status, MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def found(answer: Answer) -> dict[str, Any]:
    return {
        "prices": answer.multipliers.tolist(),
        "gap": abs(answer.dual - answer.objective) / abs(answer.objective),
        "passes": answer.passes,
        "steps": answer.steps,
    }


def timed(market: Market, **options: Any) -> dict[str, Any]:
    began = time.perf_counter()
    answer = solve(market, **options)
    return {"seconds": time.perf_counter() - began, **found(answer)}


def child_read(paths: list[Path], _: int) -> dict[str, Any]:
    """The files as fast as they come, into one buffer."""
    buffer = bytearray(16 << 20)
    began = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - began}


def child_solve(paths: list[Path], n: int) -> dict[str, Any]:
    solve(Memory(planes(20_000, 0), rows(20_000)))
    base = status("VmRSS")
    watch = Peak()
    watch.start()
    market = Timed(paths, rows(n), PLANES, DECLARED)
    answer = timed(market)
    return answer | {
        "pass": market.seconds,
        "left": market.left,
        "sample": market.sampled,
        "peak": status("VmHWM"),
        "anonymous": watch.anonymous,
        "base": base,
    }


def child_cluster(paths: list[Path], n: int) -> dict[str, Any]:
    began = time.perf_counter()
    with Cluster(paths, rows(n), PLANES, DECLARED, workers=2) as market:
        opened = time.perf_counter() - began
        solve(market)  # workers load their kernels
        before = len(market.traffic)
        answer = timed(market)
        passes = market.traffic[before:]
        killed: list[Any] = []

        def kill(*_: object) -> None:
            if not killed:
                killed.append(market.crew.workers[1])
                importlib.import_module("ray").kill(killed[0])

        survived = timed(market, on_pass=kill)
    return answer | {
        "opened": opened,
        "sent": [p.sent for p in passes],
        "received": [p.received for p in passes],
        "survived": survived,
    }


def child(
    kind: str, folder: Path, n: int, shards: int | None = None, *, cold: bool = False
) -> dict[str, Any]:
    """What `child_<kind>` says about the first files of `folder`, in a process of its own."""
    paths = sorted(folder.iterdir())[:shards]
    if cold:
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", kind, str(n), *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# --- the tables -----------------------------------------------------------------------------------------------------


def section(*, quick: bool = False) -> str:
    """Everything measured, as Markdown."""
    n, parquet, spread = (2 * SHARD, SHARD, 2 * SHARD) if quick else (40 * SHARD, 4 * SHARD, 8 * SHARD)
    with tempfile.TemporaryDirectory(prefix="walras-shards-") as folder:
        arrow = Path(folder) / "arrow"
        wrote = generate(arrow, n, "arrow")
        lines = [
            f"{n:,} tasks × {len(USES)} uses × 3 rows, float32, {n * TASK / 1e9:.1f} GB of Arrow shards of {SHARD:,} tasks, "
            f"generated in {wrote:.0f} s. {machine()}",
            "",
            "| shards | tasks | page cache | plain read, s | pass, s | pass / read | sample, s | whole search, s | passes | left by the first | gap, relative | peak RSS, MB | of it not file pages, MB |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for cold in (True, False):
            lines.append(row("Arrow", arrow, n, cold=cold))
            print(lines[-1], file=sys.stderr, flush=True)
        there = cluster_lines(arrow, spread)
        for path in arrow.iterdir():
            path.unlink()
        generate(Path(folder) / "parquet", parquet, "parquet")
        for cold in (True, False):
            lines.append(row("Parquet", Path(folder) / "parquet", parquet, cold=cold))
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join([*lines, "", *there]) + "\n"


def row(name: str, folder: Path, n: int, *, cold: bool) -> str:
    read = child("read", folder, n, cold=cold)["seconds"]
    got = child("solve", folder, n, cold=cold)
    each = float(np.mean(got["pass"]))
    return (
        f"| {name} | {n:,} | {'cold' if cold else 'warm'} | {read:.1f} | {each:.1f} | {each / read:.2f} | "
        f"{got['sample']:.1f} | {got['seconds']:.1f} | {got['passes']} | {got['left'][0] / n:.2%} | {got['gap']:.0e} | {got['peak']:,.0f} | "
        f"{got['anonymous']:,.0f} |"
    )


def cluster_lines(folder: Path, n: int) -> list[str]:
    if importlib.util.find_spec("ray") is None:
        return ["Ray is not installed: the cluster was not measured."]
    shards = n // SHARD
    one, two = child("solve", folder, n, shards), child("cluster", folder, n, shards)
    survived = two["survived"]
    own = np.array(one["prices"])
    sent, received = np.array(two["sent"]), np.sort(two["received"])
    return [
        f"Ray on this machine, 2 workers, {n:,} tasks in {shards} shards, which the workers hold in memory:",
        "",
        "| | one process, streaming | 2 workers | 2 workers, one killed after the first screen |",
        "| --- | ---: | ---: | ---: |",
        f"| search, s | {one['seconds']:.2f} | {two['seconds']:.2f} | {survived['seconds']:.2f} |",
        f"| time / one process | 1 | {two['seconds'] / one['seconds']:.2f} | {survived['seconds'] / one['seconds']:.2f} |",
        f"| relative difference of prices | – | {differ(two['prices'], own):.0e} | {differ(survived['prices'], own):.0e} |",
        f"| same digits as undisturbed | – | – | {'yes' if survived['prices'] == two['prices'] else 'no'} |",
        f"| gap, relative | {one['gap']:.0e} | {two['gap']:.0e} | {survived['gap']:.0e} |",
        "",
        f"Starting Ray and its workers and loading the shards took {two['opened']:.0f} s. Of {sent.size} passes over parts or "
        f"all of the data, the median sent {np.median(sent):,.0f} bytes down and {np.median(received):,.0f} up to both "
        f"workers together; the most were {sent.max():,} and {received[-2]:,}, apart from the last few tasks, {received[-1]:,}.",
    ]


def differ(prices: list[float], own: np.ndarray) -> float:
    return float(np.abs(np.array(prices) / own - 1).max())


def machine() -> str:
    return f"Machine: {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only, nothing written")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, n, *paths = options.child
        work = {"read": child_read, "solve": child_solve, "cluster": child_cluster}[kind]
        print(json.dumps(work([Path(p) for p in paths], int(n))))
        return
    written = section(quick=options.quick)
    if options.quick:
        print(written)
    else:
        write_section("shards", written)


if __name__ == "__main__":
    main()
