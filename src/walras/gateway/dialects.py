"""Between the dialects of the model APIs: a call read once, put to any provider, its answer told in the client's words.

Where client and provider speak alike, bytes pass through: unknown fields stay, events of a stream are not encoded anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import msgspec

from walras.gateway import chat, messages, responses
from walras.gateway.wire import (
    Call,
    Dialect,
    Json,
    Piece,
    ReplyError,
    RequestError,
    SseParser,
    Stamp,
    Usage,
    from_json,
    to_json,
)

Spoken = Literal["chat", "messages"]
"""What providers speak. Embeddings belong to chat."""

_CAPS = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "messages": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "embeddings": (),
}
_INPUT = {"chat": "messages", "messages": "messages", "responses": "input", "embeddings": "input"}
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_T = TypeVar("_T")


def read_call(dialect: Dialect, body: bytes) -> Call:
    """A client's request.

    Raises:
        RequestError: not JSON, or a field the gateway needs is missing or of the wrong kind.
    """
    try:
        fields = _fields(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("the body must be a JSON object") from error
    plain = Call(dialect, "", False, False, None, 1, fields)
    given = b"".join(bytes(memoryview(fields.get(_INPUT[dialect], b""))[:64]).split())
    kinds = (b"[",) if _INPUT[dialect] == "messages" else (b"[", b'"')
    if not given.startswith(kinds) or given in (b"[]", b'""'):
        raise RequestError(f"'{_INPUT[dialect]}' must be given, and not be empty", param=_INPUT[dialect])
    caps = [cap for name in _CAPS[dialect] if (cap := _whole(plain, name)) is not None]
    if dialect == "messages" and not caps:
        raise RequestError("'max_tokens' must be given", param="max_tokens")
    options = plain.field("stream_options")
    return Call(
        dialect,
        _of(str, plain, "model") or "",
        bool(_of(bool, plain, "stream")),
        bool(isinstance(options, dict) and options.get("include_usage")),
        min(caps) if caps else None,
        _whole(plain, "n") or 1,
        fields,
    )


def _of(kind: type[_T], call: Call, name: str) -> _T | None:
    value = call.field(name)
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"'{name}' must be a {kind.__name__}", param=name)
    return value


def _whole(call: Call, name: str) -> int | None:
    value = call.field(name)
    if value is not None and (type(value) is not int or value < 1):
        raise RequestError(f"'{name}' must be a whole number of at least 1", param=name)
    return value


def neutral(call: Call) -> Json:
    """The request in the form of chat completions, decoded.

    Raises:
        RequestError: it has parts chat completions have no place for, or not the shape its API documents.
    """
    if call.dialect == "chat":
        return {name: call.field(name) for name in call.fields}
    convert = {"messages": messages.neutral, "responses": responses.neutral}[call.dialect]
    return _shaped(lambda: convert(call))


def _shaped(convert: Callable[[], _T]) -> _T:
    try:
        return convert()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        missing = f": {error} is missing" if isinstance(error, KeyError) else ""
        raise RequestError(f"the request does not have the shape its API documents{missing}") from error


def write_call(call: Call, spoken: Spoken, model: str, max_tokens: int | None = None) -> bytes:
    """The body to send to a provider, for its own name of the model.

    `max_tokens` caps the output of each choice; the client's own cap, where lower, stays. A provider that speaks
    messages must be given one.

    Raises:
        RequestError: the provider's API has no place for what is asked.
    """
    caps = [cap for cap in (max_tokens, call.max_tokens) if cap is not None]
    cap = min(caps) if max_tokens is not None and caps else None
    if call.dialect == "embeddings":
        if spoken != "chat":
            raise RequestError("this provider has no embeddings")
        return to_json({**call.fields, "model": model})
    if spoken == "chat":
        return chat.request(call, None if call.dialect == "chat" else neutral(call), model, cap)
    if not caps:
        raise RequestError("this provider needs a cap on output tokens; give max_tokens", param="max_tokens")
    form = None if call.dialect == "messages" else neutral(call)
    return _shaped(lambda: messages.request(call, form, model, min(caps)))


def prompt_text(call: Call) -> str:
    """All text of the request's input, in order, without images: what estimators read.

    Raises:
        RequestError: as `neutral`.
    """
    if call.dialect == "embeddings":
        given = call.field("input")
        return given if isinstance(given, str) else "\n".join(text for text in given if isinstance(text, str))
    texts: list[str] = []
    for message in neutral(call).get("messages", ()):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)]
    return "\n".join(texts)


class Reply(msgspec.Struct, frozen=True):
    """A whole answer in the client's dialect."""

    body: bytes
    usage: Usage | None
    """None where the provider gave none, or one that cannot be true."""
    characters: int
    """Of all generated text, arguments of tools included, or more than these: what bounds the usage where it cannot be
    believed."""
    finish: str
    """Why generation ended, in the words of chat completions."""


def translate_reply(call: Call, spoken: Spoken, body: bytes, stamp: Stamp) -> Reply:
    """The client's view of a provider's whole answer.

    Raises:
        ReplyError: the answer is not of the provider's API.
    """
    if call.dialect == "embeddings":
        return Reply(body, chat.embeddings_usage(body), 0, "stop")
    if call.dialect == spoken == "chat" and (counted := chat.counted(body)) is not None:
        return Reply(body, counted[0], len(body), counted[1])
    choices = chat.reply(body) if spoken == "chat" else [messages.reply(body)]
    pieces = [piece for choice in choices for piece in choice]
    usage = next((p.usage for p in pieces if p.kind == "usage"), None)
    finish = next((p.text for p in pieces if p.kind == "finish"), "stop")
    if call.dialect != spoken:
        try:
            body = _body(call, choices[0], stamp)
        except KeyError as error:
            raise ReplyError("the provider gave arguments to a call of a tool it did not make") from error
    return Reply(body, usage, sum(map(_characters, pieces)), finish)


def _body(call: Call, pieces: list[Piece], stamp: Stamp) -> bytes:
    match call.dialect:
        case "messages":
            return messages.body(pieces, stamp)
        case "responses":
            return responses.body(pieces, call, stamp)
        case _:
            return chat.body(pieces, stamp)


def _characters(piece: Piece) -> int:
    return 0 if piece.kind in ("finish", "error") else len(piece.text)


_WRITERS: dict[str, Any] = {"chat": chat.Writer, "messages": messages.Writer, "responses": responses.Writer}


class Stream:
    """A provider's event stream told in the client's dialect, and metered on the way.

    Feed it bytes as they come and send on what it returns; after `error` is set or `finished`, the rest is ignored.
    """

    def __init__(self, call: Call, spoken: Spoken, stamp: Stamp) -> None:
        self.usage: Usage | None = None
        self.characters = 0
        """Generated text so far, arguments of tools included."""
        self.pieces = 0
        """Pieces of it so far: most providers send a token or a few in each."""
        self.finish: str | None = None
        self.finished = False
        """The answer is complete: the provider said so."""
        self.error: Piece | None = None
        """What the provider reported inside the stream."""
        self._parser = SseParser()
        self._reader: chat.Reader | messages.Reader = chat.Reader() if spoken == "chat" else messages.Reader()
        self._writer = _WRITERS[call.dialect](call, stamp)
        self._through = call.dialect == spoken
        self._drop_usage = spoken == "chat" and not call.include_usage

    def feed(self, data: bytes) -> bytes:
        """The client's bytes for some of the provider's.

        Raises:
            ReplyError: not the events its API documents.
        """
        return b"".join([self._event(event) for event in self._parser.feed(data)])

    def close(self) -> bytes:
        """The client's bytes when the provider's have ended; look at `finished` then."""
        out = b""
        for event in self._parser.close():  # without its blank line: the last one, or one cut short
            with contextlib.suppress(ReplyError):
                out += self._event(event) + b"\n\n"
        already = self._reader.finished
        self._reader.close()
        if self._reader.finished and not already and self.error is None:
            self.finished = True
            out += b"data: [DONE]\n\n" if self._through else self._writer.end()
        return out

    def cut(self, usage: Usage | None = None) -> bytes:
        """The last events of a stream that is ended here, as if the cap on its tokens had been reached."""
        self.finish = "length"
        if self._through:  # the client has had the provider's own events so far
            self._writer.resume(self._reader.block)
        said = Piece("usage", usage=usage), Piece("finish", "length")
        return b"".join(self._writer.write(piece) for piece in said) + bytes(self._writer.end())

    def fail(self, message: str, kind: str, code: str | None = None) -> bytes:
        """The event that tells the client of an error after the stream has begun."""
        told: bytes = self._writer.error(message, kind, code)
        return told

    def _event(self, event: Any) -> bytes:
        if self.finished or self.error is not None:
            return b""
        pieces = self._reader.read(event)
        out = event.raw if self._through else b""
        for piece in pieces:
            self._note(piece)
            if not self._through:
                out += self._told(piece)
        self.finished = self._reader.finished
        if self._through:
            return b"" if self._reader.only_usage and self._drop_usage else out
        return out + self._writer.end() if self.finished else out

    def _told(self, piece: Piece) -> bytes:
        try:
            told: bytes = self._writer.write(piece)
        except KeyError as error:
            raise ReplyError("the provider gave arguments to a call of a tool it did not make") from error
        return told

    def _note(self, piece: Piece) -> None:
        match piece.kind:
            case "usage":
                self.usage = piece.usage
            case "finish":
                self.finish = piece.text
            case "error":
                self.error = piece
            case _:
                self.pieces += 1
                self.characters += len(piece.text)


# Errors.

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_type(status: int) -> str:
    """The `type` both APIs give an error of this HTTP status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_body(
    dialect: Dialect, status: int, message: str, *, code: str | None = None, param: str | None = None
) -> bytes:
    """An error in the shape the client's API documents."""
    if dialect == "messages":
        return to_json({"type": "error", "error": {"type": error_type(status), "message": message}})
    return to_json({"error": {"message": message, "type": error_type(status), "param": param, "code": code}})


class ProviderError(msgspec.Struct, frozen=True):
    """What a provider's error body says."""

    message: str
    type: str
    code: str


def read_error(body: bytes) -> ProviderError:
    """The error in a provider's body; empty where it holds none. Any shape in use is understood."""
    try:
        read = from_json(body, "the error")
    except ReplyError:
        read = None
    found = read if isinstance(read, dict) else {}
    inner = found.get("error", found.get("detail", found))
    inner = inner if isinstance(inner, dict) else {"message": inner}
    texts = [inner.get(name) for name in ("message", "type", "code")]
    return ProviderError(*[text if isinstance(text, str) else "" for text in texts])
