"""The clearing protocol between processes: one line of JSON a message, over a stream. [OP-6]

    tenant → operator   {"type": "join", "market": "gpu", "tenant": "search", "token": "…"}
    operator → tenant   {"type": "quote", "market": "gpu", "round": 1, "prices": {"decode_token": 2e-6}}
    tenant → operator   {"type": "answer", "market": "gpu", "tenant": "search", "round": 1, "amounts": {"decode_token": 5e6}}
    operator → tenant   {"type": "refusal", "tenant": "search", "round": 1, "reason": "…"}      where an answer does not count
    operator → tenant   {"type": "closed", "market": "gpu", "status": "cleared", "round": 12, "prices": {…}, "error": 3e-4}

A tenant speaks for itself only, and shows its token first. It may go and come back: the latest quote is sent again. The stream is not
encrypted: listen on the loopback, or behind something that encrypts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Callable, Mapping

import msgspec

from walras.errors import QuantityError, SettingsError
from walras.market.tenants.protocol import Answer, Cleared, Demand, Market, Quote, Refusal

LONGEST = 1 << 16
"""Bytes of a message."""
JOIN_S = 10.0


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Who speaks."""

    market: str
    tenant: str
    token: str


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """How it ended, or that it cannot go on."""

    market: str
    status: str
    round: int
    prices: dict[str, float]
    error: float
    """Largest relative excess demand."""


_from_tenant = msgspec.json.Decoder(Join | Answer)
_from_operator = msgspec.json.Decoder(Quote | Refusal | Closed)
_encode = msgspec.json.Encoder().encode


class Operator:
    """Serves one market until it has cleared.

    Args:
        tokens: of each tenant.
        round_s: seconds that a round waits for answers; it ends at once when all are there.
    """

    def __init__(self, market: Market, tokens: Mapping[str, str], *, round_s: float = 1.0) -> None:
        missing = sorted(set(market.conduct) - set(tokens))
        if missing:
            raise SettingsError(f"tenant '{missing[0]}' has no token", key="tokens")
        if not 0 < round_s < float("inf"):
            raise SettingsError(f"{round_s} seconds", key="round_s", hint="finite and above 0")
        self._market, self._tokens, self._round_s = market, tokens, round_s
        self._joined: dict[str, asyncio.StreamWriter] = {}
        self._heard = asyncio.Event()

    async def run(
        self, host: str = "127.0.0.1", port: int = 0, on_listening: Callable[[int], None] = lambda _: None
    ) -> Cleared:
        """Listen, clear, tell everybody, and return. Begins when the first tenant has joined."""
        server = await asyncio.start_server(self._serve, host, port, limit=LONGEST)
        async with server:
            on_listening(server.sockets[0].getsockname()[1])
            while not self._joined:
                await self._next_message(None)
            while self._market.status == "going on":
                await self._round()
            found = self._market.result()
            closed = Closed(self._market.name, found.status, found.rounds, found.prices, found.error)
            for writer in list(self._joined.values()):
                _send(writer, closed)
                writer.close()
            return found

    async def _round(self) -> None:
        """Quote to all, wait for answers until time is up, move."""
        for writer in list(self._joined.values()):
            _send(writer, self._market.quote)
        ends = asyncio.get_running_loop().time() + self._round_s
        while self._market.waiting_for:
            left = ends - asyncio.get_running_loop().time()
            if left <= 0 or not await self._next_message(left):
                break
        self._market.close_round()

    async def _next_message(self, seconds: float | None) -> bool:
        self._heard.clear()
        try:
            await asyncio.wait_for(self._heard.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: a tenant joins, then answers."""
        tenant = ""
        try:
            tenant = await self._admit(reader, writer)
            if tenant:
                await self._listen(tenant, reader, writer)
        except (OSError, ValueError, TimeoutError):
            pass  # gone, or a line without end: the market goes on without it
        finally:
            if self._joined.get(tenant) is writer:
                del self._joined[tenant]
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """The tenant, once it has shown its token; "" and a refusal otherwise."""
        message = _decode(await asyncio.wait_for(reader.readline(), JOIN_S))
        if not isinstance(message, Join) or message.market != self._market.name:
            _send(writer, Refusal("", 0, f"first a join to market '{self._market.name}'"))
            return ""
        known = self._tokens.get(message.tenant, "")
        if not known or not hmac.compare_digest(known.encode(), message.token.encode()):
            _send(writer, Refusal(message.tenant, 0, "no such tenant, or not its token"))
            return ""
        self._joined[message.tenant] = writer
        _send(writer, self._market.quote)
        self._heard.set()
        return message.tenant

    async def _listen(self, tenant: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            message = _decode(line)
            if not isinstance(message, Answer):
                refusal: Refusal | None = Refusal(
                    tenant, 0, "not an answer: see the schema of walras.market.tenants.wire"
                )
            elif message.tenant != tenant:
                refusal = Refusal(
                    tenant, message.round, f"you are '{tenant}' and cannot answer for '{message.tenant}'"
                )
            else:
                refusal = self._market.receive(message)
            if refusal is not None:
                _send(writer, refusal)
            self._heard.set()


def _decode(line: bytes) -> Join | Answer | None:
    """None where it is no message."""
    with contextlib.suppress(msgspec.DecodeError):
        message: Join | Answer = _from_tenant.decode(line)
        return message
    return None


def _send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    # Nobody waits for a tenant that does not read: what it has missed is worth nothing once prices have moved.
    if not writer.is_closing() and writer.transport.get_write_buffer_size() < LONGEST:
        writer.write(_encode(message) + b"\n")


async def take_part(host: str, port: int, who: Join, demand: Demand) -> Closed:
    """Answer the quotes of a market until it closes.

    Raises:
        QuantityError: the operator refuses the tenant or an answer, or goes away.
    """
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=LONGEST)
    except OSError as error:
        raise QuantityError(f"no market at {host}:{port}: {error.strerror or error}") from error
    try:
        writer.write(_encode(who) + b"\n")
        while line := await reader.readline():
            message = _from_operator.decode(line)
            if isinstance(message, Closed):
                return message
            if isinstance(message, Refusal):
                raise QuantityError(f"market '{who.market}' refuses: {message.reason}")
            amounts = dict(await asyncio.to_thread(demand, message.prices))
            writer.write(_encode(Answer(who.market, who.tenant, message.round, amounts)) + b"\n")
            await writer.drain()
    except (OSError, msgspec.DecodeError) as error:
        raise QuantityError(f"market '{who.market}' at {host}:{port} does not answer: {error}") from error
    finally:
        writer.close()
    raise QuantityError(f"market '{who.market}' at {host}:{port} went away before it closed")
