"""The gateway beside a bare pass-through, LiteLLM and Portkey: requests a second, what it adds to an answer, CPU, memory.

    python benchmarks/bench_gateway.py [--litellm VENV] [--portkey FOLDER] [--write]

Every contender is pinned to one core and answers from the same compiled mock provider; that mock and the load (wrk) have
another core. Needs gcc, taskset and wrk. LiteLLM is run from a virtual environment of its own that holds `litellm[proxy]`,
opentelemetry-sdk, opentelemetry-exporter-otlp and httptools; Portkey from a folder where `npm install @portkey-ai/gateway` was run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from page import spread, write_section

HERE = Path(__file__).parent / "gateway"
GATEWAY_CORE, LOAD_CORE = "0", "1"
TICKS_US = 1e6 / os.sysconf("SC_CLK_TCK")
TTFT_SAMPLES = 200
ECONOMY = """\
value = 0.02
[gateway]
budget_usd = 1000000
[upstreams.mock]
kind = "openai"
base_url = "{url}/v1"
"""
MODEL = """\
[models.{name}]
upstream = "mock"
input_usd = {cheap}
output_usd = {dear}
quality = {quality}
seconds = {seconds}
"""
MODELS = (
    ("small", 0.1, 0.4, 0.4, 1),
    ("medium", 0.5, 2, 0.6, 2),
    ("large", 2, 8, 0.75, 4),
    ("largest", 5, 25, 0.85, 8),
)
"""Name, USD per million input and output tokens, quality, seconds."""
LITELLM = """\
model_list:
{deployments}
router_settings:
  routing_strategy: {routing}
  num_retries: {retries}
  disable_cooldowns: true
litellm_settings:
  telemetry: false
  budget_exceeded_status_code: 429
  callbacks: litellm_hooks.log
general_settings:
  master_key: sk-master
  custom_auth: litellm_hooks.authenticate
  custom_auth_run_common_checks: true
  disable_budget_reservation: {unreserved}
"""
DEPLOYMENT = """\
  - model_name: {group}
    litellm_params:
      model: openai/{name}
      api_base: {url}/v1
      api_key: none
      input_cost_per_token: {cheap:.9f}
      output_cost_per_token: {dear:.9f}
"""


@dataclass
class Contender:
    """What is measured, and by its name what came of it, a value a round."""

    name: str
    url: str
    process: subprocess.Popen[Any]
    key: str = "none"
    headers: str = ""
    found: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failed: int = 0
    streams: bool = True

    def tree(self) -> list[int]:
        """Its process and all below it."""
        pids, at = [self.process.pid], 0
        while at < len(pids):
            for children in Path(f"/proc/{pids[at]}/task").glob("*/children"):
                pids += map(int, children.read_text().split())
            at += 1
        return pids

    def cpu_us(self) -> float:
        total = 0.0
        for pid in self.tree():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) * TICKS_US
        return total

    def rss_mb(self) -> list[float]:
        """Of the process that serves, and of all below it."""
        told = [Path(f"/proc/{pid}/status").read_text() for pid in self.tree()]
        sizes = [int(status.split("VmRSS:")[1].split()[0]) / 1024 for status in told]
        return [sizes[0], sum(sizes[1:])]

    def drained(self) -> None:
        """Wait until it has finished what it was left with."""
        for _ in range(100):
            before = self.cpu_us()
            time.sleep(0.1)
            if self.cpu_us() - before < 2.1 * TICKS_US:
                return

    def request(self, stream: bool) -> bytes:
        """As `load.lua` sends it."""
        prompt = "The quick brown fox jumps over the lazy dog near the river bank. " * 12
        body: dict[str, Any] = {"model": "auto", "max_tokens": 256}
        body["messages"] = [{"role": "user", "content": prompt}]
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body, separators=(",", ":")).encode()
        host = self.url.removeprefix("http://")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {self.key}\r\n"
        head += "".join(f"{h}\r\n" for h in self.headers.split(";") if h)
        return f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


# --- measuring --------------------------------------------------------------------------------------------------------


def load(contender: Contender, clients: int, seconds: int, stream: bool) -> int:
    """wrk for so long; what it and the kernel saw goes to `found`. How many requests were answered."""
    env = os.environ | {"MODEL": "auto", "KEY": contender.key, "HEADERS": contender.headers}
    command = [
        "taskset",
        "-c",
        LOAD_CORE,
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
    ]
    command += ["-s", str(HERE / "load.lua"), f"{contender.url}/v1/chat/completions"]
    before = contender.cpu_us()
    run = subprocess.run(command, env=env | {"STREAM": str(int(stream))}, capture_output=True, check=True)
    told = json.loads(run.stdout.splitlines()[-1])
    kind = f"{'stream' if stream else 'plain'} {clients}"
    n = max(told["requests"], 1)
    contender.failed += told["failed"]
    contender.found[f"{kind} rps"].append((told["requests"] - told["failed"]) / told["seconds"])
    contender.found[f"{kind} p50"].append(told["p50_us"] / 1e3)
    contender.found[f"{kind} cpu"].append((contender.cpu_us() - before) / n)
    contender.drained()
    return int(told["requests"] - told["failed"])


def first_bytes(contender: Contender) -> None:
    """Milliseconds until the first event of a stream: one client, one connection, a stream after the other."""
    host, port = contender.url.removeprefix("http://").split(":")
    request, times = contender.request(stream=True), []
    with socket.create_connection((host, int(port)), timeout=30) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(TTFT_SAMPLES):
            began, seen, first = time.perf_counter(), b"", None
            s.sendall(request)
            while not seen.endswith(b"0\r\n\r\n"):
                data = s.recv(65536)
                if not data:
                    raise RuntimeError(f"{contender.name} closed the connection: {seen[:300]!r}")
                seen += data
                if first is None and b"data:" in seen:
                    first = time.perf_counter()
            if first is None or seen.count(b"data:") < 65:
                raise RuntimeError(f"{contender.name} did not answer with a stream: {seen[:300]!r}")
            times.append((first - began) * 1e3)
    contender.found["ttft"].append(float(np.median(times)))


def measure(contenders: list[Contender], rounds: int, seconds: int, clients: list[int]) -> None:
    """Round after round, each contender in turn."""
    for contender in contenders:
        load(contender, 8, 2, stream=False)  # caches warm, code compiled
        contender.found.clear()
    for k in range(rounds):
        for stream in (False, True):
            for c in clients:
                for contender in contenders:
                    if contender.streams or not stream:
                        load(contender, c, seconds, stream)
        for contender in contenders:
            if contender.streams:
                first_bytes(contender)
            for what, size in zip(("rss", "helpers"), contender.rss_mb(), strict=True):
                contender.found[what].append(size)
            rps = contender.found["plain 32 rps"][-1]
            print(
                f"round {k + 1}: {contender.name}: {rps:,.0f}/s at 32, {contender.found['rss'][-1]:.0f} MB",
                flush=True,
            )


# --- contenders -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(core: str, *command: str | Path, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    process = subprocess.Popen(["taskset", "-c", core, *map(str, command)], **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str, key: str = "none", headers: str = "", within_s: float = 120.0) -> None:
    """Wait until a call succeeds."""
    end = time.monotonic() + within_s
    extra = [a for h in headers.split(";") if h for a in ("-H", h)]
    command = [
        "curl",
        "-sf",
        "-m",
        "5",
        f"{url}/v1/chat/completions",
        "-H",
        f"authorization: Bearer {key}",
        *extra,
    ]
    command += [
        "-H",
        "content-type: application/json",
        "-d",
        '{"model":"auto","messages":[{"role":"user","content":"x"}]}',
    ]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        if time.monotonic() > end:
            raise RuntimeError(f"{url} does not answer")
        time.sleep(0.25)


def start(stack: ExitStack, folder: Path, litellm: Path | None, portkey: Path | None) -> list[Contender]:
    mock_binary = folder / "mock"
    subprocess.run(["gcc", "-O2", "-o", mock_binary, HERE / "mock.c"], check=True)
    port = free_port()
    mock_url = f"http://127.0.0.1:{port}"
    contenders = [
        Contender("mock alone", mock_url, stack.enter_context(running(LOAD_CORE, mock_binary, str(port))))
    ]
    contenders.append(start_bare(stack, mock_url))
    contenders.append(start_walras(stack, folder, mock_url))
    if litellm is not None:
        contenders.append(start_litellm(stack, folder, mock_url, litellm))
    if portkey is not None:
        contenders.append(start_portkey(stack, folder, mock_url, portkey))
    for c in contenders:
        answers(c.url, c.key, c.headers)
    return contenders


def start_bare(stack: ExitStack, mock_url: str) -> Contender:
    command = [sys.executable, HERE / "bare.py", f"{mock_url}/v1"]
    process = stack.enter_context(running(GATEWAY_CORE, *command, stdout=subprocess.PIPE))
    assert process.stdout is not None
    return Contender("bare pass-through", f"http://127.0.0.1:{int(process.stdout.readline())}", process)


def start_walras(stack: ExitStack, folder: Path, mock_url: str) -> Contender:
    """Four models at the mock, a key with a budget inside the budget of all: everything that is on by default."""
    models = "".join(MODEL.format(name=n, cheap=a, dear=b, quality=q, seconds=s) for n, a, b, q, s in MODELS)
    settings, data = folder / "economy.toml", folder / "data"
    settings.write_text(ECONOMY.format(url=mock_url) + models)
    walras = [Path(sys.executable).with_name("walras")]
    made = subprocess.run(
        [
            *walras,
            "keys",
            "create",
            "--data",
            data,
            "--tenant",
            "bench",
            "--budget-usd",
            "100000",
            "--period",
            "day",
            "--json",
        ],
        capture_output=True,
        check=True,
    )
    command = [*walras, "serve", "--settings", settings, "--data", data, "--port", "0", "--ready-json"]
    process = stack.enter_context(running(GATEWAY_CORE, *command, stdout=subprocess.PIPE))
    assert process.stdout is not None
    return Contender(
        "Walras", json.loads(process.stdout.readline())["url"], process, json.loads(made.stdout)["key"]
    )


def grown(walras: Contender, requests: int) -> str:
    """What so many requests leave in memory: the process that serves, and all below it."""
    before, answered, failed = walras.rss_mb(), 0, walras.failed
    while answered < requests:
        answered += load(walras, 32, 10, stream=False)
        serving, helpers = walras.rss_mb()
        print(f"{answered:,} requests: {serving:.0f} MB, helpers {helpers:.0f} MB", flush=True)
    return (
        f"After {answered:,} more plain requests by 32 clients, {walras.failed - failed} failed, the process that serves has {serving:.0f} MB; "
        f"it had {before[0]:.0f} MB before them. Its helpers have {helpers:.0f} MB, and had {before[1]:.0f} MB."
    )


def start_litellm(stack: ExitStack, folder: Path, mock_url: str, venv: Path) -> Contender:
    """The same four models behind the name `auto`, the cheapest taken; a key found by its hash, with a budget; a row of spend a request."""
    deployments = "".join(
        DEPLOYMENT.format(group="auto", name=name, url=mock_url, cheap=cheap / 1e6, dear=dear / 1e6)
        for name, cheap, dear, _, _ in MODELS
    )
    config = LITELLM.format(
        deployments=deployments, routing="cost-based-routing", retries=0, unreserved=False
    )
    url, process = run_litellm(stack, folder, venv, config, {"sk-bench": 100_000.0})
    return Contender("LiteLLM, tuned", url, process, "sk-bench")


def run_litellm(
    stack: ExitStack, folder: Path, venv: Path, config: str, budgets: dict[str, float]
) -> tuple[str, subprocess.Popen[Any]]:
    """Its proxy with `gateway/litellm_hooks.py`: its URL and process. Budgets are USD by key."""
    port = free_port()
    (folder / "litellm.yaml").write_text(config)
    shutil.copy(HERE / "litellm_hooks.py", folder)
    env = os.environ | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "PYTHONPATH": str(folder),
        "BENCH_KEYS": json.dumps({hashlib.sha256(k.encode()).hexdigest(): usd for k, usd in budgets.items()}),
    }
    command = [venv / "bin/litellm", "--config", folder / "litellm.yaml", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1"]
    log = stack.enter_context((folder / "litellm.log").open("wb"))
    process = stack.enter_context(
        running(GATEWAY_CORE, *command, env=env, cwd=folder, stdout=log, stderr=log)
    )
    return f"http://127.0.0.1:{port}", process


def start_portkey(stack: ExitStack, folder: Path, mock_url: str, home: Path) -> Contender:
    port = free_port()
    script = home / "node_modules/@portkey-ai/gateway/build/start-server.js"
    log = stack.enter_context((folder / "portkey.log").open("wb"))
    process = stack.enter_context(
        running(GATEWAY_CORE, "node", script, f"--port={port}", "--headless", stdout=log, stderr=log)
    )
    headers = f"x-portkey-provider:openai;x-portkey-custom-host:{mock_url}/v1"
    return Contender("Portkey", f"http://127.0.0.1:{port}", process, headers=headers, streams=False)


# --- telling ----------------------------------------------------------------------------------------------------------


def report(contenders: list[Contender], clients: list[int], rounds: int) -> str:
    by = {c.name: c for c in contenders}
    mock, walras, bare = by["mock alone"], by["Walras"], by["bare pass-through"]

    def added(c: Contender, what: str) -> str:
        values = [a - b for a, b in zip(c.found[what], mock.found[what], strict=True)]
        return "–" if c is mock else spread(values)

    def mid(c: Contender, what: str) -> float:
        return float(np.median(c.found[what]))

    lines = [
        f"## Gateway\n\nMedians of {rounds} interleaved rounds, with the range; one worker on one core, the load (wrk) and a "
        "compiled mock provider on another. Requests per second by clients at once; milliseconds added to the mock's own "
        "median by one client; CPU of all its processes by request. **Walras** has on: authentication, "
        "routing by price over four models, escrow of three nested budgets, a durable hold and entry of each request in its SQLite ledger, "
        "metrics, time-outs, cancellation, clearing of prices in the background. The **bare pass-through** is the same server and "
        "client and nothing else. **LiteLLM** is tuned (opentelemetry and httptools installed) and has on: a key found by its hash, its "
        "budget reserved before the call and settled after it by LiteLLM's own code, cost-based routing over the same four models, "
        "a row a request in SQLite (WAL). Its database cannot be had here (its engine is downloaded when it is set up), so a hook keeps the "
        "keys in memory and writes the rows where its own queue would. **Portkey** has none of these. At c=256 LiteLLM may need longer than a run for a single answer.\n",
        "| plain | "
        + " | ".join(f"c={c}" for c in clients)
        + " | added p50, ms | CPU µs, c=32 | RSS MB | failed |",
        "|---|" + "---|" * (len(clients) + 4),
    ]
    for c in contenders:
        cells = [spread(c.found[f"plain {k} rps"], ",.0f") for k in clients]
        cells += [
            added(c, "plain 1 p50"),
            spread(c.found["plain 32 cpu"], ",.0f"),
            spread(c.found["rss"], ".0f"),
            str(c.failed),
        ]
        lines.append(f"| {c.name} | " + " | ".join(cells) + " |")
    lines += [
        "\n| 67 events | "
        + " | ".join(f"c={c}" for c in clients)
        + " | first event, ms | added, ms | CPU µs, c=32 |",
        "|---|" + "---|" * (len(clients) + 3),
    ]
    for c in contenders:
        if not c.streams:
            continue
        cells = [spread(c.found[f"stream {k} rps"], ",.0f") for k in clients]
        cells += [spread(c.found["ttft"]), added(c, "ttft"), spread(c.found["stream 32 cpu"], ",.0f")]
        lines.append(f"| {c.name} | " + " | ".join(cells) + " |")

    def ratio(c: Contender, what: str) -> str:
        return f"{mid(walras, what) / mid(c, what):.2g}×" if mid(c, what) else "more than can be told of"

    ratios = [
        f"{ratio(c, 'plain 32 rps')} {c.name}"
        + (f" (streams {ratio(c, 'stream 32 rps')})" if c.streams else "")
        for c in contenders
        if c not in (mock, walras)
    ]
    cpu = mid(walras, "plain 32 cpu") / mid(bare, "plain 32 cpu")
    lines.append(
        f"\nRequests per second of Walras at c=32: {', '.join(ratios)}. Asked for are 0.5× the pass-through, 50× LiteLLM, at "
        "most 0.6 ms added at c=1, 1 ms to the first event and 150 MB. CPU by request is "
        f"{cpu:.2g}× the pass-through's. Clearing prices is a process of its own, of {mid(walras, 'helpers'):.0f} MB more."
        + (" Portkey answered streams with status 500 on this release of Node." if "Portkey" in by else "")
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litellm", type=Path, help="virtual environment that holds LiteLLM")
    parser.add_argument("--portkey", type=Path, help="folder where npm has put Portkey")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each run of wrk")
    parser.add_argument(
        "--memory", type=int, default=0, help="requests after which memory is looked at again"
    )
    parser.add_argument("--write", action="store_true", help="put the table on the page of benchmarks")
    options = parser.parse_args()
    clients = [1, 32, 256]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.sched_setaffinity(0, {int(LOAD_CORE)})
        contenders = start(stack, Path(folder), options.litellm, options.portkey)
        measure(contenders, options.rounds, options.seconds, clients)
        text = report(contenders, clients, options.rounds)
        if options.memory:
            text += "\n\n" + grown(next(c for c in contenders if c.name == "Walras"), options.memory)
    print(text)
    if options.write:
        write_section("gateway", text)


if __name__ == "__main__":
    main()
