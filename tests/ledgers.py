"""Ledgers for the tests: records that balance, a private PostgreSQL server, and a process to kill."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walras.ledger import Alternative, Entry, Hold, pack
from walras.ledger.writer import Durable

NOON = 1_700_000_000_000_000_000 // 86_400_000_000_000 * 86_400_000_000_000 + 43_200_000_000_000
"""Unix nanoseconds of a noon (UTC)."""


def hold(request_id: str, nano: int = 1_000, *, id: str = "0", at_ns: int = NOON, **known: Any) -> Hold:  # noqa: A002
    return Hold(
        id=id,
        request_id=request_id,
        at_ns=at_ns,
        amount_nano=nano,
        **{"key_id": "k1", "tenant": "acme"} | known,
    )


def entry(request_id: str, charged: int = 800, *, reserved: int = 1_000, **known: Any) -> Entry:
    """An answered request that breaks no identity."""
    usual: dict[str, Any] = {
        "at_ns": NOON,
        "tenant": "acme",
        "key_id": "k1",
        "status": "ok",
        "settled": "exact",
        "session": "s1",
        "task_class": "chat",
        "model_asked": "auto",
        "use": "small",
        "upstream": "u1",
        "http_status": 200,
        "value_usd": 0.3,
        "quality_expected": 0.7,
        "value_nano": 210_000_000,
        "compute_nano": charged,
        "latency_nano": 50,
        "risk_nano": 7,
        "alternatives": pack(
            [
                Alternative("small", 210_000_000, charged, 50, 7, 210_000_000 - charged - 57),
                Alternative("large", 9, 4, 2, 1, 2),
            ]
        ),
        "propensity": 0.9,
        "prices_version": "7",
        "input_tokens": 120,
        "cached_input_tokens": 20,
        "output_tokens": 30,
        "reasoning_tokens": 5,
        "seconds_to_first": 0.1,
        "seconds": 0.5,
        "own_delay_nano": 40,
    }
    return Entry(request_id=request_id, reserved_nano=reserved, charged_nano=charged, **usual | known)


# --- a server of its own ----------------------------------------------------------------------------------------------


def postgres_binaries() -> Path | None:
    """The folder of initdb and pg_ctl."""
    named = shutil.which("pg_config")
    told = (
        subprocess.run([named, "--bindir"], capture_output=True, text=True, check=False).stdout.strip()
        if named
        else ""
    )
    places = [Path(told), *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return next(
        (place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None
    )


@dataclass(frozen=True, slots=True)
class Cluster:
    """A private server that can be stopped and started again."""

    binaries: Path
    folder: Path
    port: int
    options: str
    user: dict[str, Any]

    @property
    def url(self) -> str:
        return f"postgresql://walras@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", self.options, "start")

    def stop(self) -> None:
        """As if it had crashed."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, tool: str, *options: str) -> None:
        command = [str(self.binaries / tool), "-D", str(self.folder / "cluster"), *options]
        done = subprocess.run(
            command,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            **self.user,
        )
        assert done.returncode == 0, done.stderr

    def make(self) -> None:
        self._run("initdb", "-U", "walras", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")


@contextmanager
def postgres_cluster(binaries: Path, fsync: str = "off") -> Iterator[Cluster]:
    """A server that runs, and ends with the block."""
    with tempfile.TemporaryDirectory(prefix="walras-pg-") as name:
        folder, user = Path(name), dict[str, Any]()
        if os.geteuid() == 0:  # which PostgreSQL refuses to be run by
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c shared_buffers=16MB -c fsync={fsync}"
        cluster = Cluster(binaries, folder, port, options, user)
        cluster.make()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()


@contextmanager
def postgres_server(binaries: Path, fsync: str = "off") -> Iterator[str]:
    """The URL of one."""
    with postgres_cluster(binaries, fsync) as cluster:
        yield cluster.url


# --- a process to kill ------------------------------------------------------------------------------------------------

_CHILD = """
import asyncio, sys
from itertools import count
from walras.ledger import open_store, recover
from ledgers import entry, hold

async def client(store, name):
    for i in count():
        await asyncio.sleep(0)  # what is in the journal is waited for by nobody
        held = store.hold(hold(f"{name}-{i}"))
        await store.written(held)
        print("H", f"{name}-{i}", flush=True)
        await store.written(store.close(entry(f"{name}-{i}")))
        print("E", f"{name}-{i}", flush=True)

async def main(store, life):
    await asyncio.gather(*(client(store, f"{life}-{c}") for c in range(8)))

store = open_store(sys.argv[1], durable=sys.argv[3])
recover(store)
print("READY", "-", flush=True)
asyncio.run(main(store, sys.argv[2]))
"""


def live_and_die(
    url: str, life: int, seconds: float, durable: Durable = "normal"
) -> tuple[set[str], set[str]]:
    """Run a writer, kill -9 it after `seconds` of writing; the ids whose hold, and whose entry, it said were durable."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", _CHILD, url, str(life), durable]
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"READY -\n"
        # The pipe is read while the child writes: a full pipe would stop it, and it would die idle.
        killer = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {child.pid}"])
        said = child.stdout.read().decode()
        killer.wait()
    assert child.returncode == -signal.SIGKILL
    whole = said[: said.rfind("\n") + 1].splitlines()
    pairs = [line.split(" ") for line in whole]
    return {name for kind, name in pairs if kind == "H"}, {name for kind, name in pairs if kind == "E"}
