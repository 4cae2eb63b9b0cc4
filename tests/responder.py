"""A real HTTP server on loopback whose answers are fixed bytes or a script."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httptools

Script = Callable[["Peer", bytes], Awaitable[None]]


class Peer(asyncio.Protocol):
    """One connection of the responder: parses requests and runs the script for each."""

    def __init__(self, server: Responder) -> None:
        self.server, self.body, self.target, self.headers = server, b"", b"", dict[bytes, bytes]()
        self.lost = asyncio.get_running_loop().create_future()
        self.socket: Any = None
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: Any) -> None:
        self.socket = transport
        self.server.peers.append(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.headers = {}

    def on_url(self, url: bytes) -> None:
        self.target = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        body, self.body = self.body, b""
        if isinstance(self.server.script, bytes):
            self.socket.write(self.server.script)
        else:
            task = asyncio.ensure_future(self.server.script(self, body))
            self.server.tasks.add(task)
            task.add_done_callback(self.server.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


class Responder:
    """An HTTP server that answers with fixed bytes or by a script."""

    def __init__(self, script: bytes | Script) -> None:
        self.script, self.peers, self.tasks = script, list[Peer](), set[Any]()
        self.url = ""


@asynccontextmanager
async def serve(script: bytes | Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[Responder]:
    responder = Responder(script)
    server = await asyncio.get_running_loop().create_server(
        lambda: Peer(responder), "127.0.0.1", 0, ssl=tls, backlog=512
    )
    host = "localhost" if tls else "127.0.0.1"
    responder.url = f"http{'s' * bool(tls)}://{host}:{server.sockets[0].getsockname()[1]}/v1/x"
    try:
        yield responder
    finally:
        server.close()
        for task in list(responder.tasks):
            task.cancel()
        for peer in responder.peers:
            peer.socket.abort()
        await server.wait_closed()
        await asyncio.sleep(0.01)
