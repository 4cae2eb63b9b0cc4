"""What the service needs of HTTP on top of ASGI: a request with its body, an answer, errors in a client's own dialect."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from walras.errors import WalrasError
from walras.gateway.logs import event
from walras.gateway.wire import to_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
LEAVE = "walras.leave"
"""Where in the scope of a request stands what to call when its client leaves."""
BODY_S = 60.0
"""Most seconds for a request's body to come: a client that drips holds nothing for longer."""


class HttpError(WalrasError):
    """An answer that is not the one asked for. `headers` may say when to try again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.status, self.code, self.param, self.headers = status, code, param, headers
        super().__init__(message)


class Gone(WalrasError):
    """The client has hung up."""


@dataclass(slots=True)
class Request:
    """One HTTP request."""

    scope: Scope
    receive: Receive
    send: Send
    headers: dict[bytes, bytes] = field(init=False)
    started: bool = field(init=False, default=False)
    """An answer is on its way."""

    def __post_init__(self) -> None:
        self.headers = dict(self.scope["headers"])

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    def header(self, name: bytes) -> str | None:
        """A header as text; None where absent."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1")))

    async def body(self, most: int) -> bytes:
        """The whole body.

        Raises:
            HttpError: it is larger than `most` bytes, or too slow.
            Gone: the client hung up first.
        """
        said = self.headers.get(b"content-length")
        if said is not None and said.isdigit() and (len(said) > 18 or int(said) > most):
            raise _too_large(most)
        message = await self.receive()
        if not message.get("more_body") and message["type"] == "http.request":
            body: bytes = message.get("body", b"")
        else:
            body = await self._rest(message, most)
        if len(body) > most:
            raise _too_large(most)
        return body

    async def _rest(self, message: MutableMapping[str, Any], most: int) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    if message["type"] == "http.disconnect":
                        raise Gone("the client hung up")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise _too_large(most)
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
                    message = await self.receive()
        except TimeoutError as error:
            raise HttpError(408, f"the body took more than {BODY_S:g} s", code="request_timeout") from error

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        """Call this when the client hangs up before its answer is complete: `protocol` does, without a task that waits.
        None when that matters no more."""
        self.scope[LEAVE] = callback

    async def hung_up(self) -> None:
        """Return when the client has hung up."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        headers.append((b"content-length", str(len(body)).encode()))
        await self.start(status, headers)
        await self.write(body, more=False)

    async def json(self, data: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        await self.answer(status, to_json(data), [JSON, *headers])


def _too_large(most: int) -> HttpError:
    return HttpError(413, f"the body is larger than {most:,} bytes", code="request_too_large")


def log_bug(error: BaseException) -> None:
    """Where it happened; never what it said, which may hold a key or a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = " < ".join(f"{f.name} {f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames))
    event(logging.getLogger("walras.gateway"), logging.ERROR, f"{type(error).__name__} in {where}")
