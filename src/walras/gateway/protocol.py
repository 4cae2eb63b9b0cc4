"""Connections that hold nothing for long: uvicorn's HTTP, with limits on time and size that it does not set.

A sweep looks at all connections every few seconds, so that a request pays for no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from math import inf
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from walras.gateway.http import BODY_S, LEAVE, Scope

HEAD_S = 20.0
"""Most seconds from a connection's or request's first byte to the end of its head."""
HEAD_BYTES = 65_536
"""Most bytes of a head that has not ended."""
WRITE_S = 60.0
"""Most seconds for which a client may read nothing of an answer that waits for it."""
PIPELINED = 16
"""Most requests that wait behind the one being answered on a connection."""
SWEEP_S = 2.0
CONTINUE = b"HTTP/1.1 100"
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Protocol(HttpToolsProtocol):
    """One connection. `due` and `stuck` are the times by which it must have moved on."""

    due = inf
    stuck = inf
    _in_head = False
    _head_bytes = 0
    _running: RequestResponseCycle | None = None

    # uvicorn narrows the argument in the same way.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.due = self.loop.time() + HEAD_S

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        running = self._running  # not `cycle`, where requests were pipelined
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            leave = cast(Scope, running.scope).get(LEAVE)
            if leave is not None:
                leave()
        self._running = None
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(TOO_LARGE)
                self.transport.close()
        elif self.due == inf and _idle(self.cycle):
            self.due = self.loop.time() + HEAD_S  # bytes that begin no request

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self.due = self.loop.time() + HEAD_S

    def on_headers_complete(self) -> None:
        self._in_head = False
        self.due = self.loop.time() + BODY_S + SWEEP_S
        super().on_headers_complete()
        if len(self.pipeline) > PIPELINED:
            self.transport.abort()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.due = inf

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck = self.loop.time() + WRITE_S

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stuck = inf

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if cycle.scope["method"] != "HEAD":  # what it answers has no body to wait for
            cycle.transport = cast(asyncio.Transport, _Joined(self.transport))
        super()._start_asgi_task(cycle, app)


class _Joined:
    """What one answer is written to: its head goes out with the first bytes of its body, in one system call."""

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        """Empty once it has gone out."""

    def write(self, data: bytes) -> None:
        if self._head is None and not data.startswith(CONTINUE):
            self._head = data
        elif self._head:
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if self._head:
            self.write(b"")
        self._transport.close()


def _idle(cycle: RequestResponseCycle | None) -> bool:
    return cycle is None or cycle.response_complete


async def sweep(connections: Iterable[Any]) -> None:
    """End what has not moved on in time, for ever."""
    now = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(SWEEP_S)
        at = now()
        for connection in tuple(connections):
            if min(connection.due, connection.stuck) < at:
                connection.transport.abort()
