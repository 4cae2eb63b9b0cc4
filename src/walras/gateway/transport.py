"""HTTP/1.1 to the model providers: one asyncio client, its connections and its errors.

    send → a connection from the pool, or a new one → head → body chunks → back to the pool

A connection carries one exchange at a time. Redirects are not followed and proxies not used: upstreams come from
settings alone. Errors name the origin and what happened, never a header or a body, so that they hold no secret:

    TransportError    base; `sent`: whether the provider may have got the request
     ├ Unreachable    no connection: name, address, TLS
     ├ TimedOut       `stage`: pool, connect, first byte, between bytes, total
     ├ Cut            the connection ended before the answer did
     ├ TooLarge       head or body over the limit
     └ Garbled        not HTTP
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from walras.errors import SettingsError, WalrasError

Stage = Literal["pool", "connect", "first byte", "between bytes", "total"]

HIGH_WATER = 256 * 1024
"""Bytes of body waiting for a slow consumer at which the socket is no longer read."""
STALE_S = 0.02
"""A reused connection that ends within this time, or two handshakes, was closed while idle: nobody saw the request."""
FRAMING = 8
"""Bytes on the wire for each byte of body, beyond the head, that are still framing: `1\\r\\nx\\r\\n` is 6."""


class TransportError(WalrasError):
    """The exchange failed below HTTP."""

    def __init__(self, origin: Origin, problem: str, *, sent: bool) -> None:
        self.origin, self.sent = origin, sent
        super().__init__(f"{origin}: {problem}")


class Unreachable(TransportError):
    """No connection could be made."""

    def __init__(self, origin: Origin, problem: str) -> None:
        super().__init__(origin, f"cannot be reached: {problem}", sent=False)


class TimedOut(TransportError):
    """A stage took longer than it may."""

    def __init__(self, origin: Origin, stage: Stage, seconds: float) -> None:
        self.stage = stage
        super().__init__(
            origin, f"timed out after {seconds:g} s ({stage})", sent=stage not in ("pool", "connect")
        )


class Cut(TransportError):
    """The connection ended early. `stale`: it had been closed while idle, and the request was not seen."""

    def __init__(self, origin: Origin, *, stale: bool = False) -> None:
        self.stale = stale
        super().__init__(origin, "closed the connection before the answer was complete", sent=not stale)


class TooLarge(TransportError):
    """The answer is larger than the limits allow."""

    def __init__(self, origin: Origin, part: Literal["head", "body"], limit: int) -> None:
        super().__init__(origin, f"sent a {part} of more than {limit:,} bytes", sent=True)


class Garbled(TransportError):
    """The answer is not HTTP/1.1."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin, "did not answer in HTTP/1.1", sent=True)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go: scheme, host and port."""

    tls: bool
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An origin with the request head that goes there each time, rendered once."""

    origin: Origin
    method: str
    target: str
    head: bytes = field(repr=False)
    """Request line and headers up to content-length: holds the key."""

    @classmethod
    def of(cls, method: str, url: str, headers: Iterable[tuple[str, str]] = ()) -> Endpoint:
        """An endpoint from an http or https URL and its constant headers.

        Raises:
            SettingsError: the URL has no host or another scheme, or a header could smuggle a line. Names no value.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise SettingsError("the port of an upstream's URL must be a number", key="base_url") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise SettingsError(
                "an upstream's URL must be http(s)://host[:port][/path], without user", key="base_url"
            )
        tls = parts.scheme == "https"
        origin = Origin(tls, parts.hostname, port or (443 if tls else 80))
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"{method} {target} HTTP/1.1", f"host: {parts.netloc}", "accept-encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers]
        for line in lines:
            if not (line.isprintable() and line.isascii()):
                name = line.partition(":")[0] if line.isascii() else "a header"
                raise SettingsError(f"{name.splitlines()[0]} may hold printable ASCII only")
        return cls(origin, method, target, "\r\n".join([*lines, "content-length: "]).encode("ascii"))


Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds each stage of an exchange may take."""

    connect: Seconds = 5.0
    """To a free place in the pool, and again to a connection with TLS."""
    first_byte: Seconds = 120.0
    """From the request to the complete head of the answer."""
    between_bytes: Seconds = 60.0
    """Of silence inside the body; time in which the consumer is slow does not count."""
    total: Seconds = 600.0
    """From the first step to the last byte of the body."""


DEFAULT_TIMEOUTS = Timeouts()


@dataclass(frozen=True, slots=True)
class Request:
    """What to send where."""

    endpoint: Endpoint
    body: bytes = field(default=b"", repr=False)
    timeouts: Timeouts = DEFAULT_TIMEOUTS
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Of this request alone, behind the endpoint's; one that would break a line is left out."""
    resend: bool = False
    """Whether it may be sent again, once, when a reused connection proves stale and nothing of an answer was read."""

    def render(self) -> bytes:
        """Head as it goes out."""
        lines = [
            f"{name}: {value}" for name, value in self.headers if value.isprintable() and value.isascii()
        ]
        extra = "".join(f"{line}\r\n" for line in lines)
        return self.endpoint.head + f"{len(self.body)}\r\n{extra}\r\n".encode("ascii")


class Response(Protocol):
    """An answer whose head has come; its body is read once, chunk by chunk."""

    @property
    def status(self) -> int:
        """HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers, names in lower case; repeated ones joined by ', '."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Body chunks as they come; raises `TransportError`."""

    async def aclose(self) -> None:
        """Ends the exchange; before the body's end, this closes the connection at once."""


class Transport(Protocol):
    """The one seam to the network."""

    async def send(self, request: Request) -> Response:
        """Sends a request and waits for the head of its answer; raises `TransportError`."""

    async def aclose(self) -> None:
        """Closes every connection."""


async def read_body(response: Response) -> bytes:
    """The whole body; the connection is closed or given back whatever happens."""
    try:
        return b"".join([chunk async for chunk in response])
    finally:
        await response.aclose()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a transport allows."""

    connections: int = 1024
    """Per origin, open at once; further requests wait for one."""
    idle: int = 256
    """Per origin, kept open without work."""
    idle_s: float = 20.0
    """How long; shorter than providers' own limits, so that they seldom close first."""
    head_bytes: int = 64 * 1024
    body_bytes: int = 64 * 1024 * 1024


class HttpTransport:
    """HTTP/1.1 over TCP and TLS with keep-alive. Certificates are always verified, by `tls` or the system's roots."""

    def __init__(self, limits: Limits | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.limits = limits or Limits()
        self._tls = tls or ssl.create_default_context()
        self._pools: dict[Origin, _Pool] = {}

    async def send(self, request: Request) -> Response:
        """Sends a request and waits for the head of its answer.

        Raises:
            TransportError: no complete head arrived. The connection is closed.
        """
        origin = request.endpoint.origin
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = _Pool(origin, self.limits, self._tls if origin.tls else None)
        started = asyncio.get_running_loop().time()
        connection = pool.take_idle() or await pool.open(request.timeouts)
        try:
            return await connection.exchange(request, started)
        except Cut as cut:
            if not (cut.stale and request.resend):
                raise
        connection = await pool.open(request.timeouts)
        return await connection.exchange(request, started)

    def connections(self) -> tuple[int, int]:
        """(open, of these idle), all origins together."""
        pools = self._pools.values()
        return sum(p.open_count for p in pools), sum(len(p.idle) for p in pools)

    async def aclose(self) -> None:
        """Closes every connection and waits until the sockets are gone."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))


class _Pool:
    """The connections to one origin. `open_count` includes those being made."""

    def __init__(self, origin: Origin, limits: Limits, tls: ssl.SSLContext | None) -> None:
        self.origin, self.limits, self._tls = origin, limits, tls
        self.open_count = 0
        self.idle: deque[_Connection] = deque()
        self.all: set[_Connection] = set()
        self._waiting: deque[asyncio.Future[_Connection | None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None

    def take_idle(self) -> _Connection | None:
        return self.idle.pop() if self.idle else None

    async def open(self, timeouts: Timeouts) -> _Connection:
        """A connection of one's own: a new one, or where the origin has all it may, the next that is given back."""
        while self.open_count >= self.limits.connections:
            given = await self._wait(timeouts.connect)
            if given is None:
                break
            if not given.closed:
                return given
        else:
            self.open_count += 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(timeouts.connect):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, loop),
                    self.origin.host,
                    self.origin.port,
                    ssl=self._tls,
                    server_hostname=self.origin.host if self._tls else None,
                )
        except TimeoutError as error:
            self._free()
            raise TimedOut(self.origin, "connect", timeouts.connect) from error
        except (OSError, UnicodeError) as error:
            self._free()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(self.origin, reason) from error
        except BaseException:
            self._free()
            raise
        if connection.closed:
            self._free()
            raise Unreachable(self.origin, "closed the connection at once")
        connection.handshake = loop.time() - began
        self.all.add(connection)
        return connection

    async def _wait(self, seconds: float) -> _Connection | None:
        """A connection somebody gave back, or None: leave to make one."""
        future: asyncio.Future[_Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            async with asyncio.timeout(seconds):
                return await future
        except BaseException as error:
            if future.done() and not future.cancelled():
                self._hand_on(future.result())
            if isinstance(error, TimeoutError):
                raise TimedOut(self.origin, "pool", seconds) from error
            raise

    def _hand_on(self, connection: _Connection | None) -> None:
        if connection is None:
            self._free()
        else:
            self.give_back(connection)

    def give_back(self, connection: _Connection) -> None:
        """Takes a connection without work: to the next in line, or to rest."""
        if connection.closed:  # the place it had has been freed
            return
        connection.reused = True
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(connection)
                return
        if len(self.idle) >= self.limits.idle:
            connection.abort()
            return
        loop = connection.loop
        connection.idle_since = loop.time()
        self.idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self.limits.idle_s, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        while self.idle:
            loop = self.idle[0].loop
            left = self.idle[0].idle_since + self.limits.idle_s - loop.time()
            if left > 0.001:
                self._sweeper = loop.call_later(left, self._sweep)
                return
            self.idle.popleft().abort()

    def lost(self, connection: _Connection) -> None:
        """A connection has gone; its place is free."""
        if connection in self.all:
            self.all.remove(connection)
            if connection in self.idle:
                self.idle.remove(connection)
            self._free()

    def _free(self) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
        self.open_count -= 1

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        gone = [connection.gone for connection in self.all]
        for connection in list(self.all):
            connection.abort()
        if gone:
            await asyncio.wait(gone)


class _Connection(asyncio.Protocol):
    """One socket and its parser; `answer` is the exchange under way."""

    def __init__(self, pool: _Pool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool, self.loop = pool, loop
        self.answer: _Answer | None = None
        self.reused = self.closed = False
        self.handshake = self.idle_since = 0.0
        self.gone: asyncio.Future[None] = loop.create_future()
        self._socket: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)  # uvloop's are of no such class

    async def exchange(self, request: Request, started: float) -> _Answer:
        """Sends and waits for the head."""
        answer = self.answer = _Answer(self, request, started)
        if self.closed:
            answer.fail(Cut(self.pool.origin, stale=True))
        else:
            head, body = request.render(), request.body
            if len(body) < 65536:
                self._socket.write(head + body)
            else:
                self._socket.writelines((head, body))
        await answer.head()
        return answer

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if answer is None:  # nobody asked
            self.abort()
            return
        answer.received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not answer.complete:  # else it is the begin of another, which `on_message_begin` has seen
                answer.fail(answer.problem or Garbled(self.pool.origin))
                return
        if answer.problem is not None:
            answer.fail(answer.problem)
        elif answer.complete:
            self._done(answer)
        else:
            answer.more()

    def _done(self, answer: _Answer) -> None:
        self.answer = None
        answer.unpause()
        if answer.reusable:
            self.pool.give_back(self)
        else:
            self.abort()
        answer.finish()

    # The parser calls these.
    def on_message_begin(self) -> None:
        answer = self.answer
        if answer is not None and answer.complete:  # a second answer nobody asked for
            answer.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        answer = self.answer
        if answer is not None and not answer.has_head:  # trailers are not used
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            before = answer.headers.get(key)
            answer.headers[key] = text if before is None else f"{before}, {text}"

    def on_headers_complete(self) -> None:
        answer = self.answer
        if answer is None or answer.complete:
            return
        answer.status = self._parser.get_status_code()
        if answer.status < 200:  # interim: the real head follows
            answer.headers.clear()
            return
        answer.head_done(self._parser.should_keep_alive())

    def on_body(self, data: bytes) -> None:
        answer = self.answer
        if answer is not None and not answer.complete:
            answer.add(data)

    def on_message_complete(self) -> None:
        answer = self.answer
        if answer is not None and answer.has_head:
            answer.complete = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        answer, self.answer = self.answer, None
        self.pool.lost(self)
        if answer is not None and not answer.complete:
            if exc is None and answer.has_head and answer.until_close:
                answer.finish()
            else:
                answer.fail(answer.cut())
        del self._parser  # it holds this connection
        if not self.gone.done():
            self.gone.set_result(None)

    def pause(self) -> None:
        self._socket.pause_reading()

    def resume(self) -> None:
        if not self.closed:
            self._socket.resume_reading()

    def abort(self) -> None:
        """Closes at once. The place in the pool is free from now on, not when the socket says so."""
        if not self.closed:
            self.closed = True
            self.answer = None
            self._socket.abort()
            self.pool.lost(self)


class _Answer:
    """A `Response`, filled by its connection and emptied by its reader."""

    __slots__ = (
        "_body",
        "_chunks",
        "_connection",
        "_error",
        "_first_at",
        "_heard",
        "_paused",
        "_request",
        "_sent",
        "_timer",
        "_timer_at",
        "_total_at",
        "_waiter",
        "_waiting_bytes",
        "complete",
        "has_head",
        "headers",
        "problem",
        "received",
        "reusable",
        "status",
        "until_close",
    )

    def __init__(self, connection: _Connection, request: Request, started: float) -> None:
        self._connection, self._request = connection, request
        self.status, self.headers = 0, dict[str, str]()
        self.has_head = self.complete = self.reusable = self.until_close = False
        self.received = self._body = self._waiting_bytes = 0
        self.problem: TransportError | None = None
        self._error: TransportError | None = None
        self._chunks: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._sent = self._heard = connection.loop.time()
        self._first_at = self._sent + request.timeouts.first_byte
        self._total_at = started + request.timeouts.total
        self._timer_at = min(self._first_at, self._total_at)
        self._timer: asyncio.TimerHandle | None = connection.loop.call_at(self._timer_at, self._due)

    async def head(self) -> None:
        while not self.has_head and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.complete:
                raise StopAsyncIteration
            await self._wait()
        # What came together is taken together: a step for each of many small events would cost more than they do.
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._waiting_bytes = 0
        self.unpause()
        return data

    async def aclose(self) -> None:
        self._abort()

    async def _wait(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self._abort()
            raise
        finally:
            self._waiter = None

    def _abort(self) -> None:
        if not self.complete and self._error is None:
            self.fail(Cut(self._connection.pool.origin))

    # What the connection tells.
    def head_done(self, keep_alive: bool) -> None:
        headers, limits = self.headers, self._connection.pool.limits
        length = headers.get("content-length", "")
        self.until_close = not length and "chunked" not in headers.get("transfer-encoding", "").lower()
        self.reusable = keep_alive
        if sum(map(len, headers)) + sum(map(len, headers.values())) > limits.head_bytes:
            self.problem = TooLarge(self._connection.pool.origin, "head", limits.head_bytes)
        elif length.isdigit() and int(length) > limits.body_bytes:
            self.problem = TooLarge(self._connection.pool.origin, "body", limits.body_bytes)
        self.has_head = True

    def add(self, data: bytes) -> None:
        self._body += len(data)
        self._waiting_bytes += len(data)
        self._chunks.append(data)
        limit = self._connection.pool.limits.body_bytes
        if self._body > limit:
            self.problem = TooLarge(self._connection.pool.origin, "body", limit)

    def more(self) -> None:
        """Some bytes came, and the answer goes on."""
        limit = self._connection.pool.limits.head_bytes
        if self.received - self._body > limit + FRAMING * self._body:
            self.fail(TooLarge(self._connection.pool.origin, "head", limit))
            return
        self._heard = self._connection.loop.time()
        if self.has_head:
            if self._waiting_bytes > HIGH_WATER and not self._paused:
                self._paused = True
                self._connection.pause()
            self._rearm()
            if self._chunks or self._waiter is not None:
                self._wake()

    def unpause(self) -> None:
        if self._paused:
            self._paused = False
            self._heard = self._connection.loop.time()
            self._rearm()
            self._connection.resume()

    def finish(self) -> None:
        self.complete = True
        self._stop_timer()
        self._wake()

    def fail(self, error: TransportError) -> None:
        self._error = error
        self._stop_timer()
        self._connection.abort()
        self._wake()

    def cut(self) -> Cut:
        """The error of a connection that went away under this exchange."""
        connection = self._connection
        within = max(STALE_S, 2 * connection.handshake)
        quick = connection.loop.time() - self._sent < within
        return Cut(connection.pool.origin, stale=connection.reused and not self.received and quick)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # One timer for all stages: it looks, when it goes off, how far the deadline has moved.
    def _deadline(self) -> tuple[float, Stage, float]:
        timeouts = self._request.timeouts
        total: tuple[float, Stage, float] = (self._total_at, "total", timeouts.total)
        if not self.has_head:
            return min(total, (self._first_at, "first byte", timeouts.first_byte))
        if self._paused:
            return total
        return min(total, (self._heard + timeouts.between_bytes, "between bytes", timeouts.between_bytes))

    def _rearm(self) -> None:
        """Sets the timer forward where a nearer deadline has come up; a later one waits for it to go off."""
        at = self._deadline()[0]
        if at < self._timer_at - 0.001:
            self._stop_timer()
            self._timer_at = at
            self._timer = self._connection.loop.call_at(at, self._due)

    def _due(self) -> None:
        at, stage, seconds = self._deadline()
        if at <= self._connection.loop.time() + 0.001:
            self.fail(TimedOut(self._connection.pool.origin, stage, seconds))
        else:
            self._timer_at = at
            self._timer = self._connection.loop.call_at(at, self._due)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
