"""OpenAI's /v1/chat/completions: read and written. Requests and answers pass through with every unknown field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from walras.gateway.wire import (
    Call,
    Json,
    Piece,
    ReplyError,
    SseEvent,
    Stamp,
    Usage,
    counts,
    from_json,
    sse,
    to_json,
)


def usage_of(table: object) -> Usage | None:
    """Usage from a `usage` object; None where there is none, or one that cannot be true.

    What `total_tokens` holds beyond prompt and completion is reasoning: some providers leave it out of
    `completion_tokens`.
    """
    if not isinstance(table, dict) or not isinstance(table.get("prompt_tokens"), int):
        return None
    try:
        prompt, completion, total = counts(table, "prompt_tokens", "completion_tokens", "total_tokens")
        cached, written = counts(table.get("prompt_tokens_details"), "cached_tokens", "cache_write_tokens")
        (reasoning,) = counts(table.get("completion_tokens_details"), "reasoning_tokens")
    except ValueError:
        return None
    return _split(prompt, completion, total, cached, written, reasoning)


def _split(
    prompt: int, completion: int, total: int, cached: int, written: int, reasoning: int
) -> Usage | None:
    beyond = max(0, total - prompt - completion)
    inside = 0 if beyond and beyond >= reasoning else reasoning
    if cached + written > prompt or inside > completion:
        return None
    return Usage(prompt - cached - written, cached, written, completion - inside, inside + beyond)


def usage_table(usage: Usage) -> Json:
    """Usage as chat completions show it."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_input,
            "cache_write_tokens": usage.cache_write,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def request(call: Call, neutral: Json | None, model: str, max_tokens: int | None) -> bytes:
    """The body for a provider that speaks chat completions; `neutral` where the client does not.

    A stream is always asked for its usage, and `max_tokens` caps each choice.
    """
    body: Json = {**(call.fields if neutral is None else neutral), "model": model}
    if call.stream:
        given = call.field("stream_options") if neutral is None else None
        body["stream_options"] = {**(given if isinstance(given, dict) else {}), "include_usage": True}
    if max_tokens is not None:
        names = [n for n in ("max_tokens", "max_completion_tokens") if n in body] or ["max_completion_tokens"]
        body |= dict.fromkeys(names, max_tokens)
    return to_json(body)


class _Said(msgspec.Struct):
    """A message or a delta."""

    content: Any = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    tool_calls: list[Json] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Said | None = None
    delta: _Said | None = None
    finish_reason: str | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


_decode = msgspec.json.Decoder(_Reply).decode


def _read(data: bytes) -> _Reply:
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReplyError("the provider's answer is not a chat completion") from error


def _pieces(choice: _Choice, said: _Said) -> Iterable[Piece]:
    for thought in (said.reasoning_content, said.reasoning):  # two names in use; never both
        if isinstance(thought, str) and thought:
            yield Piece("reasoning", thought)
            break
    content = said.content
    if isinstance(content, list):  # some providers answer in parts
        content = "".join(
            p.get("text") or "" for p in content if isinstance(p, dict) and p.get("type") == "text"
        )
    if isinstance(content, str) and content:
        yield Piece("text", content)
    if said.refusal:
        yield Piece("refusal", said.refusal)
    for position, called in enumerate(said.tool_calls or ()):
        function = called.get("function")
        function = function if isinstance(function, dict) else {}
        at = called.get("index")
        index = at if isinstance(at, int) else position
        if isinstance(function.get("name"), str) and function["name"]:
            yield Piece("tool", index=index, id=str(called.get("id") or ""), name=function["name"])
        if isinstance(function.get("arguments"), str) and function["arguments"]:
            yield Piece("args", function["arguments"], index)
    if choice.finish_reason:
        yield Piece("finish", choice.finish_reason)


Whole = Annotated[int, msgspec.Meta(ge=0)]


class _Prompted(msgspec.Struct):
    cached_tokens: Whole | None = None
    cache_write_tokens: Whole | None = None


class _Completed(msgspec.Struct):
    reasoning_tokens: Whole | None = None


class _Counted(msgspec.Struct):
    prompt_tokens: Whole
    completion_tokens: Whole
    total_tokens: Whole | None = None
    prompt_tokens_details: _Prompted | None = None
    completion_tokens_details: _Completed | None = None


class _Ended(msgspec.Struct):
    message: dict[str, msgspec.Raw]
    finish_reason: str | None = None


class _Whole(msgspec.Struct):
    choices: Annotated[list[_Ended], msgspec.Meta(min_length=1)]
    usage: _Counted


_decode_whole = msgspec.json.Decoder(_Whole).decode


def counted(body: bytes) -> tuple[Usage, str] | None:
    """Usage and reason to finish of a whole answer with the usual usage, whose pieces nobody asks for; None of any other."""
    try:
        read = _decode_whole(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    said = read.usage
    prompt, completed = (
        said.prompt_tokens_details or _Prompted(),
        said.completion_tokens_details or _Completed(),
    )
    usage = _split(
        said.prompt_tokens,
        said.completion_tokens,
        said.total_tokens or 0,
        prompt.cached_tokens or 0,
        prompt.cache_write_tokens or 0,
        completed.reasoning_tokens or 0,
    )
    finish = next((c.finish_reason for c in read.choices if c.finish_reason), "stop")
    return None if usage is None else (usage, finish)


def reply(body: bytes) -> list[list[Piece]]:
    """The pieces of each choice of a whole answer; usage, where given, behind those of the first.

    Raises:
        ReplyError: not a chat completion.
    """
    read = _read(body)
    if not read.choices or any(c.message is None for c in read.choices):
        raise ReplyError("the provider's answer has no message")
    found = [list(_pieces(c, c.message)) for c in read.choices if c.message is not None]
    usage = usage_of(read.usage)
    if usage is not None:
        found[0].append(Piece("usage", usage=usage))
    return found


def embeddings_usage(body: bytes) -> Usage | None:
    """Usage of an answer with embeddings.

    Raises:
        ReplyError: not such an answer.
    """
    read = from_json(body, "the provider's answer")
    if not isinstance(read, dict) or not isinstance(read.get("data"), list):
        raise ReplyError("the provider's answer has no embeddings")
    return usage_of(read.get("usage"))


class Reader:
    """Chunks of a stream to pieces. `finished`: the provider said that this is all."""

    block = None

    def __init__(self) -> None:
        self.finished = False
        self.only_usage = False
        """Whether the last event was the chunk of usage that comes without choices."""
        self._finish_seen = False

    def read(self, event: SseEvent) -> list[Piece]:
        """The pieces of one event, those of all choices together."""
        self.only_usage = False
        data = event.data
        if not data:
            return []
        if data == b"[DONE]":
            self.finished = True
            return []
        chunk = _read(data)
        if chunk.error:
            error = chunk.error if isinstance(chunk.error, dict) else {"message": chunk.error}
            return [Piece("error", str(error.get("message")), name=str(error.get("type") or "server_error"))]
        pieces: list[Piece] = []
        for choice in chunk.choices or ():
            pieces += _pieces(choice, choice.delta or _Said())
            self._finish_seen |= choice.finish_reason is not None
        usage = usage_of(chunk.usage)
        if usage is not None:
            pieces.append(Piece("usage", usage=usage))
            self.only_usage = not chunk.choices
        return pieces

    def close(self) -> None:
        """The stream ended. A reason to finish is as good as [DONE], which some providers forget."""
        self.finished |= self._finish_seen


def body(pieces: Iterable[Piece], stamp: Stamp) -> bytes:
    """An answer as a whole chat completion of one choice."""
    text, tools, usage, finish = "", dict[int, Json](), Usage(), "stop"
    message: Json = {"role": "assistant", "content": None, "refusal": None}
    for piece in pieces:
        match piece.kind:
            case "text":
                text += piece.text
                message["content"] = text
            case "reasoning":
                message["reasoning_content"] = message.get("reasoning_content", "") + piece.text
            case "refusal":
                message["refusal"] = (message["refusal"] or "") + piece.text
            case "tool":
                tools[piece.index] = _tool(piece)
            case "args":
                tools[piece.index]["function"]["arguments"] += piece.text
            case "finish":
                finish = piece.text
            case "usage":
                usage = piece.usage or usage
    if tools:
        message["tool_calls"] = list(tools.values())
    return to_json(
        {
            "id": f"chatcmpl-{stamp.id}",
            "object": "chat.completion",
            "created": stamp.created,
            "model": stamp.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
            "usage": usage_table(usage),
        }
    )


def _tool(piece: Piece) -> Json:
    return {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}


class Writer:
    """Pieces to chunks: a role first, `finish_reason` null until the last, usage only where asked for, then [DONE]."""

    def __init__(self, call: Call, stamp: Stamp) -> None:
        self._call, self._stamp = call, stamp
        self._finish = "stop"
        self._usage = Usage()
        self._begun = False

    def write(self, piece: Piece) -> bytes:
        """What the client gets for one piece."""
        match piece.kind:
            case "text":
                delta: Json = {"content": piece.text}
            case "reasoning":
                delta = {"reasoning_content": piece.text}
            case "refusal":
                delta = {"refusal": piece.text}
            case "tool":
                delta = {"tool_calls": [{"index": piece.index, **_tool(piece)}]}
            case "args":
                delta = {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
            case "finish":
                self._finish = piece.text
                return b""
            case "usage":
                self._usage = piece.usage or self._usage
                return b""
            case "error":
                return self.error(piece.text, piece.name, None)
        return self._begin() + self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])

    def resume(self, block: None) -> None:  # noqa: ARG002 (it has no blocks)
        """Go on where the provider's own events ended."""
        self._begun = True

    def end(self) -> bytes:
        """The last chunks."""
        out = self._begin() + self._chunk([{"index": 0, "delta": {}, "finish_reason": self._finish}])
        if self._call.include_usage:
            out += self._chunk([], usage_table(self._usage))
        return out + b"data: [DONE]\n\n"

    def error(self, message: str, kind: str, code: str | None) -> bytes:
        """An error inside the stream, which ends it."""
        return sse({"error": {"message": message, "type": kind, "param": None, "code": code}})

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> bytes:
        chunk: Json = {
            "id": f"chatcmpl-{self._stamp.id}",
            "object": "chat.completion.chunk",
            "created": self._stamp.created,
            "model": self._stamp.model,
            "choices": choices,
        }
        if self._call.include_usage:
            chunk["usage"] = usage
        return sse(chunk)
