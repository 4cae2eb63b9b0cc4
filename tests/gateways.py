"""A running service: `walras serve` in a process of its own, with simulated providers, on a free port."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walras.gateway.keys import KeyStore
from walras.ledger.store import LEDGER

WALRAS = str(Path(sys.executable).with_name("walras"))
START_S = 60.0
"""Most seconds until the service says that it is ready: a busy machine must not fail a test."""


@dataclass(slots=True)
class Service:
    """`url` has no path; `key` has scope admin; `log` holds what the process wrote to stderr."""

    url: str
    key: str
    data: Path
    log: Path
    process: subprocess.Popen[str]

    def command(self) -> list[str]:
        """What `walras serve` became: it starts the same service again, twice as fast."""
        return Path(f"/proc/{self.process.pid}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]

    def stop(self, seconds: float = 45.0) -> int:
        """Ask it to end (SIGTERM), wait for calls under way, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._wait(seconds)

    def kill(self) -> int:
        """kill -9: it writes nothing more."""
        if self.process.poll() is None:
            self.process.kill()
        return self._wait(10.0)

    def make_key(self, tenant: str, **options: Any) -> str:
        """The secret of a new key, made while the service runs; options are those of `KeyStore.create`."""
        with KeyStore(self.data / "keys.sqlite") as store:
            return store.create(tenant, now_ns=time.time_ns(), **options).secret

    def _wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10.0)
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()


def start(
    folder: Path,
    settings_toml: str | None = None,
    key: str = "",
    ledger: str | None = None,
    command: list[str] | None = None,
) -> Service:
    """Start it on the state in `folder`/data, which may be there already; then give the `key` it was told first.

    Args:
        command: of an earlier start; settings go unread.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, log = folder / "data", folder / "serve.log"
    command = command or [WALRAS, "serve", "--data", str(data), "--port", "0", "--ready-json"]
    if settings_toml is not None:
        settings = folder / "economy.toml"
        settings.write_text(settings_toml, encoding="utf-8")
        command = [*command, "--settings", str(settings)]
    with log.open("a", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | ({} if ledger is None else {LEDGER: ledger}),
        )
    service = Service("", key, data, log, process)
    line = _first_line(process)
    if not line:
        code = service.kill()
        raise RuntimeError(
            f"walras serve was not ready (exit code {code}): {log.read_text(encoding='utf-8')}"
        )
    ready = json.loads(line)
    service.url, service.key = ready["url"], ready["key"] or key
    return service


def _first_line(process: subprocess.Popen[str]) -> str:
    """What it prints first; "" if it ends, or says nothing in time."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ends = time.monotonic() + START_S
        return process.stdout.readline() if selector.select(max(0.0, ends - time.monotonic())) else ""


@contextmanager
def running(
    folder: Path,
    settings_toml: str | None = None,
    key: str = "",
    ledger: str | None = None,
    command: list[str] | None = None,
) -> Iterator[Service]:
    """A service for the length of a block; it is stopped at the end if it still runs.

    Args:
        folder: where state (`data`), settings and log go; the same folder again goes on with its state.
        settings_toml: the text of economy.toml; none means simulated providers.
        key: the key of an earlier start on the same state, because a secret is told once.
        ledger: the URL of another ledger than the file in the folder.
        command: as for `start`.
    """
    service = start(folder, settings_toml, key, ledger, command)
    try:
        yield service
    finally:
        service.stop()
