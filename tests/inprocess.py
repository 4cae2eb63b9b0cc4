"""The service inside the test's own loop, on a real socket, over simulated providers; and a bare HTTP client that may misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from walras.gateway.calls import Calls
from walras.gateway.keys import NewKey
from walras.gateway.serve import Service, demo_economy, open_service, server_of
from walras.gateway.simulated import SimulatedTransport
from walras.ledger import Entry, nano, verify
from walras.settings import Economy


@dataclass(slots=True)
class Live:
    """A service that runs here; `key` has no budget of its own."""

    service: Service
    port: int
    key: str
    server: Any

    @property
    def calls(self) -> Calls:
        return self.service.gateway.calls

    def make_key(
        self, tenant: str = "acme", budget_usd: float | None = None, scope: Any = "tenant", **more: Any
    ) -> NewKey:
        budget = None if budget_usd is None else nano(budget_usd)
        now = self.service.gateway.board.clock()
        return self.service.keys.create(tenant, scope=scope, budget_nano=budget, now_ns=now, **more)

    async def ask(self, path: str, body: Any = None, key: str | None = None, **headers: str) -> Got:
        """One request on a connection of its own, read to its end."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return await raw(self.port, request(path, data, self.key if key is None else key, **headers))

    def entries(self) -> list[Entry]:
        return [row.entry for row in self.service.store.entries(None, 1_000_000)]

    def reserved(self) -> int:
        """Nano-USD that are set aside in the escrow for all calls together."""
        return self.calls.escrow.balance("global").open_nano

    def audit(self) -> list[Entry]:
        """No money is held, the ledger balances, and it agrees with the escrow; its entries."""
        entries, found = self.entries(), verify(self.service.store)
        assert found.ok, found.violations
        assert found.open_nano == 0
        assert self.service.store.open_holds() == []
        assert self.reserved() == 0
        assert all(e.compute_nano == e.charged_nano for e in entries)
        return entries


@dataclass(slots=True)
class Got:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request(path: str, body: bytes, key: str, method: str | None = None, **headers: str) -> bytes:
    """Bytes of a request that ends its connection."""
    lines = [f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1", "host: test", "connection: close"]
    lines += [f"authorization: Bearer {key}"] if key else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"content-length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def raw(port: int, sent: bytes, within_s: float = 90.0) -> Got:
    """Send bytes, read until the service closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(within_s):
            with suppress(ConnectionError):
                writer.write(sent)
                await writer.drain()
            return parse(await reader.read())
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def parse(got: bytes) -> Got:
    head, _, body = got.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines]
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if headers.get("transfer-encoding") == "chunked":
        body = _joined(body)
    return Got(int(first.split()[1]) if first else 0, headers, body)


def _joined(chunked: bytes) -> bytes:
    out = b""
    while chunked:
        size, _, chunked = chunked.partition(b"\r\n")
        length = int(size, 16)
        out, chunked = out + chunked[:length], chunked[length + 2 :]
        if not length:
            break
    return out


@asynccontextmanager
async def live(
    folder: Path, transport: SimulatedTransport | None = None, economy: Economy | None = None
) -> AsyncIterator[Live]:
    """Serve until the block ends, then stop as the service does."""
    simulated = transport or SimulatedTransport(time_scale=0.0)
    whole = demo_economy(economy or Economy())
    with patch("walras.gateway.serve.SimulatedTransport", lambda: simulated):
        service = open_service(whole, folder)
    server = server_of(service.gateway)
    server.config.port, server.config.host = 0, "127.0.0.1"
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    service.gateway.ready = True
    port = server.servers[0].sockets[0].getsockname()[1]
    made = service.keys.create("tester", scope="admin", now_ns=service.gateway.board.clock())
    try:
        yield Live(service, port, made.secret, server)
    finally:
        service.gateway.stopping.set()
        server.should_exit = True
        await running
        await service.stop()


CHAT = {"model": "simulated-small", "messages": [{"role": "user", "content": "hello there"}]}
