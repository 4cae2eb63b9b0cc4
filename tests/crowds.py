"""Many clients at once, an upstream for them, and what they were told in full: that must be in the ledger, whatever happens."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gateways import Service
from inprocess import parse, request
from responder import Peer, serve
from walras.ledger import Store, verify

SETTINGS = """
value = 1.0
[gateway]
reclear_s = 0.5
[upstreams.near]
kind = "openai"
base_url = "URL"
[models.small]
upstream = "near"
input_usd = 0.1
output_usd = 1.0
quality = 0.5
output_tokens = 20
seconds = 0.05
max_output_tokens = 400
"""
TOKEN_NANO = 1_000
STEP_NANO = 256 * TOKEN_NANO
"""What a stream reserves at a time."""


@asynccontextmanager
async def settings(piece_s: float = 0.001, seed: int = 0) -> AsyncIterator[str]:
    """economy.toml that names an upstream in this loop, with answers of all lengths."""
    rng = random.Random(seed)

    async def script(peer: Peer, body: bytes) -> None:
        asked = json.loads(body)
        tokens = min(1 + int(rng.lognormvariate(2.5, 0.8)), asked.get("max_tokens") or 400)
        usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
        about = {"id": "x", "created": 1, "model": "small"}
        if asked.get("stream"):
            await _stream(peer, about, tokens, usage, piece_s)
            return
        await asyncio.sleep(piece_s * tokens)
        message = {"role": "assistant", "content": "word " * tokens}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        data = json.dumps(about | {"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
        peer.socket.write(head + data)

    async with serve(script) as server:
        yield SETTINGS.replace("URL", server.url.removesuffix("/x"))


async def _stream(peer: Peer, about: Any, tokens: int, usage: Any, piece_s: float) -> None:
    def send(choices: list[Any], **more: Any) -> None:
        chunk = about | {"object": "chat.completion.chunk", "choices": choices} | more
        line = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        peer.socket.write(b"%x\r\n%s\r\n" % (len(line), line))

    peer.socket.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    for _ in range(tokens):
        if peer.lost.done():
            return
        send([{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
        await asyncio.sleep(piece_s)
    send([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    send([], usage=usage)
    peer.socket.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


@dataclass(slots=True)
class Crowd:
    """What clients were told."""

    acknowledged: set[str] = field(default_factory=set)
    """Requests whose answer came in full."""
    statuses: Counter[int] = field(default_factory=Counter)
    """0 where an answer broke off, or there was none."""

    async def calls(
        self, service: Service, key: str, ends: asyncio.Event, stream: bool | None = None
    ) -> None:
        """One client: call after call, plain and streamed in turn, until the service is gone or it is enough."""
        port, rng = int(urlsplit(service.url).port or 0), random.Random()
        while not ends.is_set():
            streamed = rng.random() < 0.5 if stream is None else stream
            body = {"model": "auto", "max_tokens": 400, "stream": streamed, "messages": MESSAGES}
            try:
                got = await _all(port, request("/v1/chat/completions", json.dumps(body).encode(), key))
            except ConnectionError:
                return
            status, request_id = _read(got, streamed)
            self.statuses[status] += 1
            if status == 200:
                self.acknowledged.add(request_id)
            else:
                await asyncio.sleep(0.02)


MESSAGES = [{"role": "user", "content": "hello there"}]


async def _all(port: int, sent: bytes) -> bytes:
    """Whatever comes until the connection ends, by whichever end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        with suppress(ConnectionError):
            writer.write(sent)
            while more := await reader.read(65536):
                got += more
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return got


def _read(got: bytes, streamed: bool) -> tuple[int, str]:
    """Status and id of an answer that is whole; status 0 of any other."""
    head, _, body = got.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return parse(head + b"\r\n\r\n").status if body else 0, ""
    headers = parse(head + b"\r\n\r\n").headers if b"chunked" not in head else _headers(head)
    if streamed:
        whole = body.endswith(b"\r\n0\r\n\r\n") and b"data: [DONE]" in body and b'"error"' not in body
    else:
        whole = len(body) == int(headers["content-length"])
    return (200 if whole else 0), headers["x-request-id"]


def _headers(head: bytes) -> dict[str, str]:
    pairs = [line.partition(": ") for line in head.decode("latin-1").split("\r\n")[1:]]
    return {name.lower(): value for name, _, value in pairs}


def audit(store: Store, acknowledged: set[str], *, running: bool = False) -> list[Any]:
    """The books balance, and whatever was acknowledged is there once; all entries."""
    found = verify(store, metering_step_nano=STEP_NANO)
    assert found.ok, found.violations
    entries = [row.entry for row in store.entries(None, 1_000_000)]
    assert running or found.open_nano == sum(hold.amount_nano for hold in store.open_holds())
    counts = Counter(e.request_id for e in entries)
    assert max(counts.values(), default=1) == 1
    good = {e.request_id for e in entries if e.status in ("ok", "cut")}
    assert acknowledged <= good, f"{len(acknowledged - good)} acknowledged requests are lost"
    return entries
