"""Budgets under concurrency: 256 streams of heavy-tailed length against one budget, with failures, cuts and clients that leave.

    python benchmarks/bench_budgets.py [--litellm VENV] [--seeds N] [--litellm-seeds N] [--write]

The provider (`gateway/provider.py`) keeps its own bill. LiteLLM is run as bench_gateway.py does.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench_gateway import DEPLOYMENT, GATEWAY_CORE, LITELLM, LOAD_CORE, free_port, run_litellm
from gateway.provider import CUT, FAIL, INPUT_NANO, MEDIAN, MOST_TOKENS, OUTPUT_NANO, SIGMA, TOKEN_S, Provider
from page import spread, write_section
from walras.gateway.metering import STEP

CLIENTS = 256
BUDGET_NANO = 1_000_000_000
LEAVE = 0.10
"""Share of calls whose client leaves, after a lognormal number of events."""
KILLED_AT = 0.4
"""Share of the budget that is spent when the gateway is killed."""
FIRST_S, LAST_S = 0.25, 4.0
"""Seconds that a client waits after it was refused, doubled each time."""
MOST_S, CALL_S = 240.0, 120.0
"""Of one run, and of one call."""
BILL_S = 0.5
"""Seconds between two bills of the provider, where it sends any."""
PROMPT = "The quick brown fox jumps over the lazy dog near the river bank. " * 12
WALRAS = Path(sys.executable).with_name("walras")
ECONOMY = f"""\
value = 1.0
[upstreams.mock]
kind = "openai"
base_url = "{{url}}/v1"
[models.simulated]
upstream = "mock"
input_usd = {INPUT_NANO / 1e3}
output_usd = {OUTPUT_NANO / 1e3}
quality = 0.8
"""


@dataclass
class Found:
    """What one run came to; nano-USD, and calls by what became of them."""

    billed: int = 0
    at_first: int | None = None
    """Billed when a call was first refused; None where none was."""
    booked: int = 0
    """What the gateway says was spent."""
    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    balanced: bool | None = None
    """What `walras ledger verify` says; None where there is no ledger."""
    settled: Counter[str] = field(default_factory=Counter)
    """Nano-USD that its books charged at first, by how sure they were."""
    capped: int = 0
    """Calls settled at what was reserved, because nobody knows what they cost."""


@dataclass
class Load:
    """Clients that call until they are refused with nothing under way any more."""

    port: int
    key: str
    provider: Provider
    rng: random.Random
    calls: int = 0
    unsure: dict[str, str] = field(default_factory=dict)
    """Calls that were not answered whole: what their prompt begins with, by the gateway's id."""
    found: Found = field(default_factory=Found)
    ends: float = field(default_factory=lambda: time.monotonic() + MOST_S)

    async def run(self) -> None:
        began = time.monotonic()
        await asyncio.gather(*(self._client() for _ in range(CLIENTS)))
        self.found.seconds = time.monotonic() - began
        while self.provider.open:
            await asyncio.sleep(0.1)
        self.found.billed = self.provider.billed

    async def _client(self) -> None:
        refused, idle = 0, 0
        while idle < 2 and time.monotonic() < self.ends:
            leaves = round(self.rng.lognormvariate(3, 1.5)) if self.rng.random() < LEAVE else None
            try:
                what = await self._call(leaves)
            except (OSError, asyncio.IncompleteReadError):
                what = "no answer"
            self.found.calls[what] += 1
            if what == "refused":
                if self.found.at_first is None:
                    self.found.at_first = self.provider.billed
                idle = 0 if self.provider.open else idle + 1
                wait = min(FIRST_S * 2**refused, LAST_S)
                refused += 1
            else:
                refused, idle, wait = 0, 0, 0.0 if what in {"whole", "length", "left"} else FIRST_S
            await asyncio.sleep(wait * self.rng.uniform(0.5, 1.0))

    async def _call(self, leaves: int | None) -> str:
        """One stream, read to its end or to its `leaves`-th event."""
        self.calls += 1
        name = f"call-{self.calls}"
        async with asyncio.timeout(CALL_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(_post("/v1/chat/completions", self.key, _asked(name)))
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split()[1])
                told = self._read(reader, leaves) if status == 200 else _refusal(status, reader)
                what = await told
                if what != "whole":
                    self.unsure[_header(head, b"x-request-id")] = name
                return what
            finally:
                writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, leaves: int | None) -> str:
        events, last = 0, b""
        while data := await reader.read(65536):
            events, last = events + data.count(b"data: "), (last + data)[-2000:]
            if leaves is not None and events >= leaves:
                return "left"
        if b"[DONE]" not in last:
            return "broken off"
        return "length" if b'"length"' in last else "whole"


async def _refusal(status: int, reader: asyncio.StreamReader) -> str:
    """A clean refusal is a 429 that says why in OpenAI's shape."""
    if status != 429:
        return str(status)
    body = await reader.read()
    said = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])  # chunked or not
    return "refused" if said["error"]["message"] else "429"


def _asked(name: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{name} {PROMPT}"}]
    body = {"model": "simulated", "max_tokens": MOST_TOKENS, "messages": messages}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def _post(path: str, key: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close"
    return f"{head}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


def _header(head: bytes, name: bytes) -> str:
    return head.lower().partition(b"\r\n" + name + b":")[2].split(b"\r\n")[0].strip().decode()


# --- Walras -------------------------------------------------------------------------------------------------------------


class Service:
    """`walras serve`, which may be killed and started again on the same state and port."""

    def __init__(self, folder: Path, provider_url: str) -> None:
        self.port, self.data, self.settings = free_port(), folder / "data", folder / "economy.toml"
        self.settings.write_text(ECONOMY.format(url=provider_url))
        made = _walras("keys", "create", "--data", self.data, "--tenant", "bench", "--period", "none", "--json",
                       "--budget-usd", str(BUDGET_NANO / 1e9))  # fmt: skip
        self.key = str(made["key"])
        admin = _walras(
            "keys", "create", "--data", self.data, "--tenant", "ops", "--scope", "admin", "--json"
        )
        self.admin = str(admin["key"])
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = ["taskset", "-c", GATEWAY_CORE, WALRAS, "serve", "--ready-json", "--port", str(self.port)]
        process = subprocess.Popen(
            [*command, "--settings", self.settings, "--data", self.data], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("walras serve did not start")
        return process

    async def kill_and_start(self, provider: Provider) -> None:
        """kill -9 in the middle, and on."""
        while provider.billed < KILLED_AT * BUDGET_NANO:
            await asyncio.sleep(0.01)
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
        self.process = await asyncio.to_thread(self._start)

    async def reconcile(self, load: Load) -> None:
        """Tell it again and again what the provider billed for calls that were not answered whole."""
        told = dict[str, str]()
        while True:
            await asyncio.sleep(BILL_S)
            for request_id, name in tuple(load.unsure.items()):
                usd = f"{load.provider.bills.get(name, 0) / 1e9:.9f}"
                said = {"request_id": request_id, "charged_usd": usd}
                known = told.get(request_id) == usd or name not in load.provider.bills
                if not known and await _told(self.port, self.admin, said):
                    told[request_id] = usd

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def look(self, found: Found) -> None:
        """What its ledger says, once it has stopped."""
        seen = _walras("ledger", "verify", "--data", self.data, "--json")
        found.balanced = seen["ok"] and not seen["open_nano"]
        found.booked, found.capped = seen["paid_nano"], seen["to_reconcile"]
        with sqlite3.connect(self.data / "ledger.sqlite") as db:
            rows = db.execute("SELECT settled, sum(charged_nano) FROM entries GROUP BY 1").fetchall()
        db.close()
        found.settled = Counter({str(how): nano for how, nano in rows})


def _walras(*arguments: str | Path) -> dict[str, Any]:
    told = subprocess.run([WALRAS, *arguments], capture_output=True, check=False)
    return dict(json.loads(told.stdout))


async def _told(port: int, key: str, said: dict[str, str]) -> bool:
    """Whether a correction was taken; one of an entry that is still to be written is not."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_post("/v1/reconcile", key, said))
            return int((await reader.readuntil(b"\r\n\r\n")).split()[1]) == 200
        finally:
            writer.transport.abort()
    except (OSError, asyncio.IncompleteReadError):
        return False


async def with_walras(seed: int, killed: bool, reconciled: bool) -> Found:
    provider = Provider(seed)
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, backlog=1024)
    with tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        service = await asyncio.to_thread(Service, Path(folder), url)
        load = Load(service.port, service.key, provider, random.Random(seed))
        billing = asyncio.create_task(service.reconcile(load)) if reconciled else None
        try:
            killing = [service.kill_and_start(provider)] if killed else []
            await asyncio.gather(load.run(), *killing)
            if billing is not None:
                await asyncio.sleep(4 * BILL_S)
                billing.cancel()
        finally:
            await asyncio.to_thread(service.stop)
        service.look(load.found)
    server.close()
    return load.found


# --- LiteLLM ------------------------------------------------------------------------------------------------------------


async def with_litellm(venv: Path, seed: int, unreserved: bool) -> Found:
    provider = Provider(seed)
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, backlog=1024)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    deployment = DEPLOYMENT.format(
        group="simulated", name="simulated", url=url, cheap=INPUT_NANO / 1e9, dear=OUTPUT_NANO / 1e9
    )
    config = LITELLM.format(
        deployments=deployment, routing="simple-shuffle", retries=2, unreserved=str(unreserved).lower()
    )
    budgets = dict.fromkeys(("sk-first", "sk-bench"), BUDGET_NANO / 1e9)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        at, _ = run_litellm(stack, Path(folder), venv, config, budgets)
        port = int(at.rpartition(":")[2])
        await _answers(Load(port, "sk-first", provider, random.Random(seed)))
        provider.billed = 0
        load = Load(port, "sk-bench", provider, random.Random(seed))
        await load.run()
        await asyncio.sleep(5)  # its callbacks come after the answers
        load.found.booked = _booked(Path(folder) / "spent.sqlite", "sk-bench")
    server.close()
    return load.found


async def _answers(load: Load) -> None:
    """Wait until it serves, and has done what it does once."""
    while time.monotonic() < load.ends:
        with suppress(OSError, asyncio.IncompleteReadError):
            if await load._call(None) == "whole":
                return
        await asyncio.sleep(1.0)
    raise RuntimeError("LiteLLM does not answer")


def _booked(path: Path, key: str) -> int:
    hashed = hashlib.sha256(key.encode()).hexdigest()
    db = sqlite3.connect(path)
    rows = db.execute("SELECT usd FROM spent WHERE key = ?", (hashed,)).fetchall()
    db.close()
    return sum(round(usd * 1e9) for (usd,) in rows)


# --- telling ------------------------------------------------------------------------------------------------------------

WAYS = (
    ("Walras", False, False),
    ("Walras, told the bill", False, True),
    ("Walras, killed", True, False),
    ("Walras, killed, told the bill", True, True),
)
HEAD = (
    "spent, of the budget, when a call was first refused",
    "at the end",
    "most beyond the budget: USD",
    "of the budget",
    "metering steps",
    "spent by its own books, of the budget",
    "answered whole",
    "ended as if at their length",
    "refused with 429",
    "seconds",
)
LEGEND = f"""\
{CLIENTS} clients stream from one gateway process with one budget of {BUDGET_NANO / 1e9:g} USD until they are refused while nothing is under way; who is
refused waits {FIRST_S:g} s, then twice that, up to {LAST_S:g}; after {MOST_S:g} s no call is begun. A SIMULATED provider keeps the bill: lognormal lengths (median {MEDIAN}, σ {SIGMA}, at most {MOST_TOKENS},
which clients ask for), a token each {TOKEN_S * 1e3:g} ms a stream, {INPUT_NANO / 1e3:g} and {OUTPUT_NANO / 1e3:g} USD per million tokens; {FAIL:.0%} of calls fail with 500,
{CUT:.0%} of streams are cut in the middle, {LEAVE:.0%} of clients leave in the middle. **What it made is what was spent**, whoever read it; a
metering step is {STEP} tokens, {STEP * OUTPUT_NANO / 1e9:g} USD. Medians of {{seeds}} seeds, and the range.

**Walras** takes a stream that was cut, or whose client left, to have cost all that was reserved, until it is told better: *told the
bill*, it hears at `POST /v1/reconcile` every {BILL_S:g} s what the provider billed for calls that were not answered whole. *Killed*: kill -9 at {KILLED_AT:.0%} of the
budget, started again on the same state; both lives count together.
"""
LITELLM_LEGEND = """\
**LiteLLM** {version} has a key with the same budget. Its own code checks it, reserves `max_tokens` before the call and settles after it; a hook
keeps the key and takes the spend log, since its database cannot be had here. *Unreserved* has its option `disable_budget_reservation`.
{seeds} seeds.
"""


def row(name: str, runs: list[Found]) -> str:
    """The median and range over the seeds; overspending is the worst."""
    worst = max(0, *(f.billed - BUDGET_NANO for f in runs))
    calls = [spread([f.calls[what] for f in runs], ",.0f") for what in ("whole", "length", "refused")]
    cells = [
        _share([f.at_first for f in runs if f.at_first is not None]),
        _share([f.billed for f in runs]),
        f"{worst / 1e9:.4f}",
        f"{worst / BUDGET_NANO:.2%}",
        f"{worst / (STEP * OUTPUT_NANO):.1f}",
        _share([f.booked for f in runs]),
        *calls,
        spread([f.seconds for f in runs], ".0f"),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _share(nano: list[int]) -> str:
    return spread([100 * n / BUDGET_NANO for n in nano], ".1f") + " %"


def told(name: str, runs: list[Found]) -> str:
    """What the table has no room for."""
    other = sum((f.calls for f in runs), Counter())
    rest = ", ".join(
        f"{n:,} {what}" for what, n in sorted(other.items()) if what not in {"whole", "length", "refused"}
    )
    balanced = [f.balanced for f in runs if f.balanced is not None]
    ledger = ""
    if balanced:
        sure = sum((f.settled for f in runs), Counter[str]())
        how = ", ".join(
            f"{nano / BUDGET_NANO / len(runs):.1%} {word}" for word, nano in sorted(sure.items()) if nano
        )
        ledger = f" Of the budget its books first charged {how}; {sum(f.capped for f in runs):,} calls are still at what was reserved."
        ledger += f" The ledger balanced in {sum(balanced)} of {len(balanced)} runs."
    return f"- {name}: other calls, all seeds: {rest}.{ledger}"


def _version(venv: Path) -> str:
    return next(venv.glob("lib/*/site-packages/litellm-*.dist-info")).stem.partition("-")[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litellm", type=Path, help="virtual environment that holds LiteLLM")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--litellm-seeds", type=int, default=2, help="a run of it takes five minutes")
    parser.add_argument("--write", action="store_true", help="put the table on the page of benchmarks")
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(LOAD_CORE)})
    runs: dict[str, list[Found]] = {}
    for name, killed, reconciled in WAYS:
        runs[name] = [uvloop.run(with_walras(seed, killed, reconciled)) for seed in range(options.seeds)]
        print(row(name, runs[name]), flush=True)
    if options.litellm:
        for name, unreserved in (("LiteLLM", False), ("LiteLLM, unreserved", True)):
            runs[name] = [
                uvloop.run(with_litellm(options.litellm, seed, unreserved))
                for seed in range(options.litellm_seeds)
            ]
            print(row(name, runs[name]), flush=True)
    lines = [f"## Budgets\n\n{LEGEND.format(seeds=options.seeds)}"]
    if options.litellm:
        lines.append(LITELLM_LEGEND.format(version=_version(options.litellm), seeds=options.litellm_seeds))
    lines += ["| | " + " | ".join(HEAD) + " |", "|---|" + "---:|" * len(HEAD)]
    lines += [row(name, found) for name, found in runs.items()]
    text = "\n".join([*lines, "", *(told(name, found) for name, found in runs.items())])
    print(text)
    if options.write:
        write_section("budgets", text)


if __name__ == "__main__":
    main()
