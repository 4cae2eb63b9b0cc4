"""What durability costs: entries a second, seconds until a record is safe, and what 100 kills lose.

    python benchmarks/bench_ledger.py            # about two minutes; --quick for a first look, --write for the page

Each request is a hold and an entry of 31 fields with five alternatives, both awaited until durable, as a gateway does. Writers and
the ledger's thread share one process and its lock.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from page import write_section
from walras.ledger import Alternative, Store, open_store, pack, recover, verify

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from ledgers import NOON, entry, hold, live_and_die, postgres_binaries, postgres_server

FIVE = pack([Alternative(f"model-{k}", 210_000_000, 800, 50, 7, 210_000_000 - 857) for k in range(5)])


@dataclass
class Run:
    """Latencies in seconds, of holds and of entries."""

    seconds: float
    cpu: float
    holds: list[float]
    entries: list[float]

    def row(self) -> str:
        def ms(values: list[float]) -> str:
            p50, p99 = np.quantile(values, [0.5, 0.99]) * 1e3
            return f"{p50:.2f} / {p99:.2f}"

        n = len(self.entries)
        return f"{n / self.seconds:,.0f} | {ms(self.holds)} | {ms(self.entries)} | {self.cpu / n * 1e6:.0f}"


async def drive(store: Store, first: int, n: int, clients: int) -> Run:
    """`n` requests by so many clients at once."""
    template = entry("", alternatives=FIVE)
    numbers = iter(range(first, first + n))
    run = Run(0.0, 0.0, [], [])

    async def client() -> None:
        for k in numbers:
            name = f"req-{k:016x}"
            await asyncio.sleep(0)  # what is in the journal is waited for by nobody
            begin = time.perf_counter()
            await store.written(store.hold(hold(name, at_ns=NOON + k * 1_000)))
            held = time.perf_counter()
            await store.written(
                store.close(msgspec.structs.replace(template, request_id=name, at_ns=NOON + k * 1_000))
            )
            run.entries.append(time.perf_counter() - held)
            run.holds.append(held - begin)

    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    run.seconds, run.cpu = time.perf_counter() - begin, time.process_time() - cpu
    return run


def measured(store: Store, scale: float) -> Iterator[tuple[int, Run]]:
    """At three concurrencies, the last one long enough to be called sustained."""
    first = 0
    for clients, n in ((1, 5_000), (32, 50_000), (256, 400_000)):
        yield clients, asyncio.run(drive(store, first, int(n * scale), clients))
        first += n


def table(name: str, store: Store, scale: float) -> list[str]:
    lines = []
    for clients, run in measured(store, scale):
        lines.append(f"| {name} | {clients} | {run.row()} |")
        print(lines[-1], flush=True)
    seen = verify(store)
    assert seen.ok, seen.violations
    bytes_each = store.size() / seen.entries
    lines.append(f"| {name}, bytes on disk per request | | {bytes_each:,.0f} | | | |")
    print(lines[-1], flush=True)
    return lines


def kills(url: str, lives: int) -> str:
    """Kill -9 a writer again and again; everything it ever acknowledged must be there, whole, and balance."""
    held, settled, luck = set[str](), set[str](), random.Random(1)
    for life in range(lives):
        holds, entries = live_and_die(url, life, luck.uniform(0.0, 0.3), "journal")
        held |= holds
        settled |= entries
    store = open_store(url)
    recover(store)
    rows = {row.entry.request_id for row in store.entries(limit=10**9)}
    seen = verify(store)
    store.stop()
    lost, torn = len((held | settled) - rows), len(seen.violations)
    said = f"{lives} kills: {len(settled):,} entries acknowledged, {lost} lost, {torn} identities broken, {seen.to_reconcile} settled at their cap."
    print(said, flush=True)
    assert not lost
    assert not torn
    return said


@contextmanager
def opened(url: str, **options: Any) -> Iterator[Store]:
    store = open_store(url, **options)
    yield store
    store.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="rewrite the section of docs/benchmarks.md")
    options = parser.parse_args()
    scale, lives = (0.1, 10) if options.quick else (1.0, 100)
    lines = [
        "| store | clients | requests/s | hold durable, ms p50 / p99 | entry durable, ms p50 / p99 | CPU µs a request |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with opened(f"{folder}/journal.db", durable="journal") as store:
            lines += table("SQLite with its journal, as the service has it", store, scale)
        with opened(f"{folder}/normal.db") as store:
            lines += table("SQLite, each waits for its commit", store, scale)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        with opened(f"{folder}/full.db", durable="full") as store:
            lines += table("SQLite, synced at each commit", store, scale / 5)
        lines += [
            "",
            kills(f"{folder}/killed.db", lives),
            f"Peak memory grew by {grown:.0f} MB, this benchmark's own lists included.",
        ]
    binaries = postgres_binaries()
    if binaries is not None:
        with postgres_server(binaries, "on") as url, opened(url) as store:
            lines[-3:-3] = table("PostgreSQL, same machine", store, scale / 5)
    if options.write:
        write_section("ledger", "## The ledger\n\n" + __doc__.split("\n\n")[2] + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
