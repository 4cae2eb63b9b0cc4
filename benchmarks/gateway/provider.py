"""A SIMULATED provider that keeps its own bill: streams of heavy-tailed length, failures, cuts, and every token it made.

It bills the prompt once it begins to answer and each token when it makes it, also those that nobody reads any more: what it
billed is what was spent, whatever a gateway believes.
"""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

MEDIAN, SIGMA = 60, 1.5
"""Of the lognormal number of output tokens."""
MOST_TOKENS = 2048
"""What clients ask for at most; longer answers end there."""
TOKEN_S = 0.015
FAIL, CUT = 0.10, 0.05
INPUT_NANO, OUTPUT_NANO = 1_000, 10_000
"""Nano-USD per token: 1 and 10 USD per million."""
WORDS = (
    " the",
    " of",
    " model",
    "ing",
    ",",
    " a",
    " price",
    " token",
    ".",
    " in",
    " it",
    " answers",
    " to",
    " long",
)
"""Four characters on average, as tokens of English have."""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SICK = b'{"error":{"message":"simulated failure","type":"server_error"}}'
FAILED = (
    b"HTTP/1.1 500 Oops\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(SICK) + SICK
)


def _frame(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    return _said(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


def _usage(prompt: int, made: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    return _said(choices=[], usage=usage)


def _said(**more: Any) -> bytes:
    stamp = {
        "id": "simulated",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "simulated",
    }
    return _frame(json.dumps(stamp | more))


TOKENS = tuple(_chunk({"content": word}) for word in WORDS)


def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():  # uvloop raises where asyncio says nothing
        writer.write(data)


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    if length := head.partition(b"content-length:")[2].split(b"\r\n")[0]:
        return await reader.readexactly(int(length))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


@dataclass(slots=True)
class Provider:
    """`billed` is nano-USD; `open` are streams under way."""

    seed: int
    billed: int = 0
    open: int = 0
    bills: dict[str, int] = field(default_factory=dict)
    """Nano-USD by what a prompt begins with, once its stream has ended."""
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, a request after the other."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if not await self._answer(json.loads(await _body(head, reader)), reader, writer):
                    break
        writer.transport.abort()

    async def _answer(
        self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection can be used again."""
        fails, cut, length = (
            self.rng.random() < FAIL,
            self.rng.random() < CUT,
            self.rng.lognormvariate(0, SIGMA),
        )
        if fails:
            _send(writer, FAILED)
            return True
        prompt = len(json.dumps(asked["messages"])) // 4
        wanted = max(round(MEDIAN * length), 1)
        whole = min(wanted, int(asked.get("max_tokens") or MOST_TOKENS))
        self.billed += prompt * INPUT_NANO
        self.open += 1
        tokens = round(self.rng.uniform(0, whole)) if cut else whole
        made = await self._stream(tokens, reader, writer)
        self.open -= 1
        name = str(asked["messages"][0]["content"]).partition(" ")[0]
        self.bills[name] = self.bills.get(name, 0) + prompt * INPUT_NANO + made * OUTPUT_NANO
        if cut or made < tokens:
            return False
        finish = _chunk({}, "stop" if whole == wanted else "length")
        _send(writer, finish + _usage(prompt, made) + _frame("[DONE]") + b"0\r\n\r\n")
        return True

    async def _stream(self, tokens: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        """Make so many, at the pace of a model, until the reader leaves; how many were made."""
        _send(writer, HEAD)
        made = 0
        while made < tokens and not (reader.at_eof() or writer.is_closing()):
            _send(writer, TOKENS[made % len(TOKENS)])
            made += 1
            self.billed += OUTPUT_NANO
            await asyncio.sleep(TOKEN_S)
        return made
