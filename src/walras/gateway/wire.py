"""What all dialects of the model APIs share: a call, its usage, pieces of an answer, server-sent events.

    client's body → Call → (dialect's writer) → provider
    provider's body or events → Piece, Piece, … → (dialect's writer) → client

The neutral form of a request is the body of OpenAI's /v1/chat/completions as a dict; the neutral form of an answer is
a sequence of `Piece`s, whether it came whole or as a stream.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import msgspec

from walras.errors import WalrasError

Dialect = Literal["chat", "messages", "responses", "embeddings"]
"""OpenAI /v1/chat/completions, Anthropic /v1/messages, OpenAI /v1/responses, OpenAI /v1/embeddings."""
Json = dict[str, Any]

to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode


class RequestError(WalrasError):
    """The client's request cannot be read, or not be put to this provider. `param` is the field, where known."""

    def __init__(self, problem: str, *, param: str | None = None, code: str | None = None) -> None:
        self.param, self.code = param, code
        super().__init__(problem)


class ReplyError(WalrasError):
    """The provider's answer is not what its API documents."""


def from_json(data: bytes | msgspec.Raw, what: str) -> Any:
    """Decoded JSON of a provider.

    Raises:
        ReplyError: not JSON; the text is not repeated.
    """
    try:
        return _from_json(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReplyError(f"{what} is not JSON") from error


class Usage(msgspec.Struct, frozen=True):
    """Tokens by kind, each counted once: a call costs Σ tokens × price of the kind."""

    input: int = 0
    """Prompt tokens neither read from nor written to a cache."""
    cached_input: int = 0
    """Prompt tokens read from a cache."""
    cache_write: int = 0
    """Prompt tokens written to a cache."""
    output: int = 0
    """Tokens generated, without reasoning."""
    reasoning: int = 0
    """Tokens generated as reasoning, shown or not."""

    @property
    def prompt(self) -> int:
        """All input tokens."""
        return self.input + self.cached_input + self.cache_write

    @property
    def completion(self) -> int:
        """All output tokens."""
        return self.output + self.reasoning


def counts(table: object, *names: str) -> list[int]:
    """Token counts by name; absent ones are 0.

    Raises:
        ValueError: a count is not a whole number ≥ 0.
    """
    fields = table if isinstance(table, dict) else {}
    found = [fields.get(name) or 0 for name in names]
    if any(type(n) is not int or n < 0 for n in found):
        raise ValueError("not a count")
    return found


class Piece(msgspec.Struct, frozen=True):
    """A part of an answer, in the order it was generated."""

    kind: Literal["text", "reasoning", "refusal", "tool", "args", "finish", "usage", "error"]
    """tool: a call of a function begins (index, id, name); args: more of its arguments, as JSON text."""
    text: str = ""
    """Of finish: why, in the words of chat completions. Of error: the message."""
    index: int = 0
    """Which tool call."""
    id: str = ""
    name: str = ""
    """Of tool: the function. Of error: the provider's type of error."""
    usage: Usage | None = None


class Call(msgspec.Struct, frozen=True):
    """A client's request as far as the gateway reads it. `fields` are the top-level fields as sent."""

    dialect: Dialect
    model: str
    stream: bool
    include_usage: bool
    """Whether a chat client asked for the chunk with usage."""
    max_tokens: int | None
    """Most output tokens per choice the client allows."""
    choices: int
    fields: dict[str, msgspec.Raw] = {}

    def field(self, name: str) -> Any:
        """One field decoded; None where absent.

        Raises:
            RequestError: it is not JSON.
        """
        raw = self.fields.get(name)
        try:
            return None if raw is None else _from_json(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"'{name}' is not valid JSON", param=name) from error


class Stamp(msgspec.Struct, frozen=True):
    """What a translated answer carries that the provider's cannot give."""

    id: str
    """Without prefix; unique."""
    created: int
    """Seconds since 1970."""
    model: str


class SseEvent(NamedTuple):
    """One block of an event stream. Joined, the `raw` of all blocks are the stream."""

    raw: bytes
    name: str
    """Of the field `event`; empty where not given."""
    data: bytes
    """Its data lines joined by newlines; empty where the block is a comment."""


_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?=[^\n])){2}")
"""End of a block. A carriage return alone ends a line only once it is known that no newline follows."""


class SseParser:
    """Server-sent events from bytes cut anywhere (WHATWG HTML, section 9.2)."""

    def __init__(self, max_event: int = 8 * 1024 * 1024) -> None:
        self._left = bytearray()
        self._searched = 0
        self._max_event = max_event
        self._first = True

    def feed(self, data: bytes) -> list[SseEvent]:
        """The events that `data` completes.

        Raises:
            ReplyError: an event is longer than allowed.
        """
        left = self._left
        left += data
        events: list[SseEvent] = []
        start, seek = 0, self._searched
        simple = b"\r" not in left
        while True:
            if simple:
                end = left.find(b"\n\n", seek) + 2
                if end < 2:
                    break
            else:
                found = _BLANK_LINE.search(left, seek)
                if found is None:
                    break
                end = found.end()
            events.append(self._event(bytes(left[start:end])))
            start = seek = end
        del left[:start]
        self._searched = max(0, len(left) - 3)
        if len(left) > self._max_event:
            raise ReplyError(f"an event of the stream is longer than {self._max_event:,} bytes")
        return events

    def close(self) -> list[SseEvent]:
        """What is left when the stream ends: a last event whose blank line never came."""
        left = bytes(self._left)
        self._left.clear()
        return [self._event(left)] if left else []

    def _event(self, raw: bytes) -> SseEvent:
        text = raw
        if self._first:
            self._first = False
            text = raw.removeprefix(b"\xef\xbb\xbf")
        if text.startswith(b"data: ") and text.find(b"\n") == len(text) - 2 and b"\r" not in text:
            return SseEvent(raw, "", text[6:-2])
        name, data = "", []
        for line in text.splitlines():  # of bytes: only at \n, \r\n and \r
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value.decode("utf-8", "replace")
        return SseEvent(raw, name, b"\n".join(data))


def sse(payload: Json, name: str = "") -> bytes:
    """One event with a JSON payload."""
    head = b"event: " + name.encode() + b"\ndata: " if name else b"data: "
    return head + to_json(payload) + b"\n\n"
