"""Anthropic's /v1/messages: read and written, as a provider and as a client.

Not carried over to other providers: thinking blocks (their signatures mean nothing elsewhere), `top_k`,
cache marks. Not carried over from chat completions: seeds, penalties, log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from walras.gateway.wire import (
    Call,
    Json,
    Piece,
    ReplyError,
    RequestError,
    SseEvent,
    Stamp,
    Usage,
    counts,
    from_json,
    sse,
    to_json,
)

_STOP = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_FINISH = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_CHOICE = {"auto": "auto", "none": "none", "required": "any"}
_EFFORT = {"minimal": "low"}
_JSON_ONLY = "Answer with one JSON object and nothing else."


def usage_of(table: object, before: Usage | None = None) -> Usage | None:
    """Usage from a `usage` object; counts of `message_delta` replace those of `before`, as they are cumulative.

    None where there is none, or one that cannot be true.
    """
    if not isinstance(table, dict):
        return before
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
    try:
        fresh, read, written, output = counts(table, *names)
        (thinking,) = counts(table.get("output_tokens_details"), "thinking_tokens")
    except ValueError:
        return None
    if thinking > output or (before is None and "input_tokens" not in table):
        return None
    if before is not None:
        fresh = fresh if table.get("input_tokens") is not None else before.input
        read = read if table.get("cache_read_input_tokens") is not None else before.cached_input
        written = written if table.get("cache_creation_input_tokens") is not None else before.cache_write
    return Usage(fresh, read, written, output - thinking, thinking)


def usage_table(usage: Usage) -> Json:
    """Usage as /v1/messages shows it."""
    return {
        "input_tokens": usage.input,
        "cache_creation_input_tokens": usage.cache_write,
        "cache_read_input_tokens": usage.cached_input,
        "output_tokens": usage.completion,
    }


# Requests: chat completions → messages.


def request(call: Call, neutral: Json | None, model: str, max_tokens: int) -> bytes:
    """The body for a provider that speaks /v1/messages; `neutral` is the chat form where the client does not.

    Raises:
        RequestError: something these models' API has no place for.
    """
    if neutral is None:
        return to_json({**call.fields, "model": model, "max_tokens": max_tokens})
    body: Json = {"model": model, "max_tokens": max_tokens, "messages": []}
    _options(neutral, body)
    system: list[Json] = []
    for at, message in enumerate(neutral["messages"]):
        where = f"messages[{at}]"
        role, blocks = message.get("role"), _blocks(message.get("content"), where)
        if role in ("system", "developer"):
            system += blocks
            continue
        if role == "assistant":
            if isinstance(message.get("refusal"), str):
                blocks.append({"type": "text", "text": message["refusal"]})
            blocks += [_tool_use(called, where) for called in message.get("tool_calls") or ()]
        elif role == "tool":
            blocks = [{"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": blocks}]
        elif role != "user":
            raise RequestError(f"{where} has the role {role!r}; use tools instead", param=where)
        side = "assistant" if role == "assistant" else "user"
        if body["messages"] and body["messages"][-1]["role"] == side:  # results of parallel calls go together
            body["messages"][-1]["content"] += blocks
        elif blocks:
            body["messages"].append({"role": side, "content": blocks})
    if (neutral.get("response_format") or {}).get("type") == "json_object":
        system.append({"type": "text", "text": _JSON_ONLY})
    if system:
        body["system"] = system
    return to_json(body)


def _options(chat: Json, body: Json) -> None:
    if (chat.get("n") or 1) != 1:
        raise RequestError("this model gives one choice a request; leave out 'n'", param="n")
    if chat.get("functions") or chat.get("audio"):
        raise RequestError(
            "'functions' and 'audio' have no place in this model's API; use 'tools'", param="functions"
        )
    stop = chat.get("stop")
    if stop:
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if chat.get("temperature") is not None:
        body["temperature"] = min(chat["temperature"], 1)
    for ours, theirs in (("top_p", "top_p"), ("stream", "stream")):
        if chat.get(ours) is not None:
            body[theirs] = chat[ours]
    if chat.get("user"):
        body["metadata"] = {"user_id": chat["user"]}
    effort = chat.get("reasoning_effort")
    output: Json = {}
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif effort:
        output["effort"] = _EFFORT.get(effort, effort)
    shape = chat.get("response_format") or {}
    if shape.get("type") == "json_schema":
        output["format"] = {"type": "json_schema", "schema": shape["json_schema"].get("schema") or {}}
    if output:
        body["output_config"] = output
    _tools(chat, body)


def _tools(chat: Json, body: Json) -> None:
    tools, choice = chat.get("tools") or [], chat.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice["allowed_tools"]
        names = {tool["function"]["name"] for tool in allowed["tools"]}
        tools = [tool for tool in tools if tool.get("function", {}).get("name") in names]
        choice = allowed.get("mode")
    if not tools:
        return
    body["tools"] = []
    for tool in tools:
        if tool.get("type") != "function":
            raise RequestError(
                f"tools of type {tool.get('type')!r} cannot be put to this model", param="tools"
            )
        function = tool["function"]
        new: Json = {
            "name": function["name"],
            "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
        }
        new |= {name: function[name] for name in ("description", "strict") if function.get(name) is not None}
        body["tools"].append(new)
    serial = chat.get("parallel_tool_calls") is False
    if choice is None and not serial:
        return
    if isinstance(choice, dict):
        body["tool_choice"] = {"type": "tool", "name": choice["function"]["name"]}
    else:
        body["tool_choice"] = {"type": _CHOICE.get(choice or "auto", "auto")}
    if serial and body["tool_choice"]["type"] != "none":
        body["tool_choice"]["disable_parallel_tool_use"] = True


def _blocks(content: Any, where: str) -> list[Json]:
    """Blocks of a message's content. Empty text has no block: the API refuses it."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    blocks: list[Json] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            blocks += [{"type": "text", "text": part["text"]}] if part["text"] else []
        elif kind == "refusal":
            blocks.append({"type": "text", "text": part["refusal"]})
        elif kind == "image_url":
            blocks.append({"type": "image", "source": _source(part["image_url"]["url"])})
        elif kind == "file" and part["file"].get("file_data"):
            blocks.append({"type": "document", "source": _source(part["file"]["file_data"])})
        else:
            raise RequestError(
                f"{where} holds a part of type {kind!r}, which this model cannot take", param=where
            )
    return blocks


def _source(url: str) -> Json:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    kind, _, data = url.removeprefix("data:").partition(",")
    return {"type": "base64", "media_type": kind.partition(";")[0], "data": data}


def _tool_use(called: Json, where: str) -> Json:
    function = called["function"]
    try:
        given = msgspec.json.decode(function.get("arguments") or "{}")
    except msgspec.DecodeError as error:
        raise RequestError(
            f"{where}: the arguments of {function['name']!r} are not JSON", param=where
        ) from error
    return {"type": "tool_use", "id": called["id"], "name": function["name"], "input": given}


# Requests: messages → chat completions.


def neutral(call: Call) -> Json:
    """A client's request in the form of chat completions.

    Raises:
        RequestError: something only Anthropic's own models can do.
    """
    chat: Json = {"messages": [], "max_completion_tokens": call.max_tokens}
    system = call.field("system")
    if system:
        chat["messages"].append({"role": "system", "content": _text(system, "system")})
    for at, message in enumerate(call.field("messages")):
        chat["messages"] += _messages(message, f"messages[{at}]")
    for ours, theirs in (("temperature", "temperature"), ("top_p", "top_p"), ("stream", "stream")):
        if call.field(ours) is not None:
            chat[theirs] = call.field(ours)
    if call.field("stop_sequences"):
        chat["stop"] = call.field("stop_sequences")
    user = (call.field("metadata") or {}).get("user_id")
    if user:
        chat["user"] = user
    output = call.field("output_config") or {}
    if output.get("effort"):
        chat["reasoning_effort"] = output["effort"]
    if output.get("format"):
        schema = {"name": "answer", "schema": output["format"]["schema"], "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chat | _functions(call.field("tools") or [], call.field("tool_choice") or {})


def _functions(tools: list[Json], choice: Json) -> Json:
    if not tools:
        return {}
    found: Json = {"tools": []}
    for tool in tools:
        if tool.get("type") not in (None, "custom"):
            raise RequestError(
                f"the tool {tool.get('type')!r} runs only at Anthropic's own models", param="tools"
            )
        function = {"name": tool["name"], "parameters": tool["input_schema"]}
        function |= {name: tool[name] for name in ("description", "strict") if name in tool}
        found["tools"].append({"type": "function", "function": function})
    kind = choice.get("type")
    if kind == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    elif kind:
        found["tool_choice"] = {"any": "required"}.get(kind, kind)
    if choice.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if any(block.get("type") != "text" for block in content):
        raise RequestError(f"{where} may hold text only for this model", param=where)
    return "\n\n".join(block["text"] for block in content)


def _messages(message: Json, where: str) -> list[Json]:
    """The chat messages one message becomes: the results of tools first, each its own."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if role == "system":
        return [{"role": "system", "content": _text(content, where)}]
    parts: list[Json] = []
    calls: list[Json] = []
    results: list[Json] = []
    for block in content or ():
        kind = block.get("type")
        if kind == "text":
            parts.append({"type": "text", "text": block["text"]})
        elif kind in ("image", "document"):
            parts.append(_part(kind, block["source"], where))
        elif kind == "tool_use":
            function = {"name": block["name"], "arguments": to_json(block["input"]).decode()}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "tool_result":
            inner = block.get("content") or ""
            inner = [{"type": "text", "text": inner}] if isinstance(inner, str) else inner
            text = "\n\n".join(b["text"] for b in inner if b.get("type") == "text")
            text = f"Error: {text}" if block.get("is_error") else text
            results.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
            # A tool message of chat completions holds text only: its images follow as the user's.
            parts += [_part("image", b["source"], where) for b in inner if b.get("type") == "image"]
        elif kind not in ("thinking", "redacted_thinking"):
            raise RequestError(
                f"{where} holds a block of type {kind!r}, which this model cannot take", param=where
            )
    if role == "assistant":
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        return [{"role": role, "content": text or None} | ({"tool_calls": calls} if calls else {})]
    return results + ([{"role": role, "content": parts}] if parts else [])


def _part(kind: str, source: Json, where: str) -> Json:
    if source["type"] == "base64":
        url = f"data:{source['media_type']};base64,{source['data']}"
    elif source["type"] == "url" and kind == "image":
        url = source["url"]
    else:
        raise RequestError(
            f"{where}: a {kind} from {source['type']!r} cannot be put to this model", param=where
        )
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "file", "file": {"filename": "document", "file_data": url}}


# Answers: messages → pieces.


def reply(body: bytes) -> list[Piece]:
    """The pieces of a whole answer.

    Raises:
        ReplyError: not a message.
    """
    read = from_json(body, "the provider's answer")
    if (
        not isinstance(read, dict)
        or read.get("type") != "message"
        or not isinstance(read.get("content"), list)
    ):
        raise ReplyError("the provider's answer is not a message")
    pieces: list[Piece] = []
    try:
        for index, block in enumerate(read["content"]):
            pieces += _started(block, index)
            if block["type"] == "tool_use" and not block.get("input"):
                pieces.append(Piece("args", "{}", index))
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise ReplyError("the provider's answer has a block that is not of its API") from error
    pieces.append(Piece("finish", _STOP.get(str(read.get("stop_reason")), "stop")))
    usage = usage_of(read.get("usage"))
    return pieces + ([Piece("usage", usage=usage)] if usage is not None else [])


def _started(block: Json, index: int) -> Iterable[Piece]:
    kind = block["type"]
    if kind == "text" and block["text"]:
        yield Piece("text", block["text"])
    elif kind == "thinking" and block["thinking"]:
        yield Piece("reasoning", block["thinking"])
    elif kind == "tool_use":
        yield Piece("tool", index=index, id=block["id"], name=block["name"])
        if block.get("input"):
            yield Piece("args", to_json(block["input"]).decode(), index)


class Reader:
    """Events of a stream to pieces. `finished`: the provider said that this is all."""

    only_usage = False

    def __init__(self) -> None:
        self.finished = False
        self.block: int | None = None
        """The block that has begun and not ended."""
        self._usage: Usage | None = None
        self._calls: dict[int, int] = {}
        self._silent: set[int] = set()

    def read(self, event: SseEvent) -> list[Piece]:
        """The pieces of one event."""
        if not event.data:
            return []
        said = from_json(event.data, "an event of the stream")
        try:
            return list(self._pieces(said))
        except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
            raise ReplyError("the provider sent an event that is not of its API") from error

    def _pieces(self, said: Json) -> Iterable[Piece]:
        match said["type"]:
            case "message_start":
                self._usage = usage_of(said["message"].get("usage"))
            case "content_block_start":
                index, block = said["index"], said["content_block"]
                self.block = index
                if block["type"] == "tool_use":
                    self._calls[index] = len(self._calls)
                    if not block.get("input"):
                        self._silent.add(index)
                yield from _started(block, self._calls.get(index, 0))
            case "content_block_delta":
                yield from self._delta(said["delta"], said["index"])
            case "content_block_stop":
                self.block = None
                if said["index"] in self._silent:
                    yield Piece("args", "{}", self._calls[said["index"]])
            case "message_delta":
                self._usage = usage_of(said.get("usage"), self._usage)
                if self._usage is not None:
                    yield Piece("usage", usage=self._usage)
                if said["delta"].get("stop_reason"):
                    yield Piece("finish", _STOP.get(said["delta"]["stop_reason"], "stop"))
            case "message_stop":
                self.finished = True
            case "error":
                yield Piece("error", str(said["error"]["message"]), name=str(said["error"]["type"]))

    def _delta(self, delta: Json, index: int) -> Iterable[Piece]:
        match delta["type"]:
            case "text_delta":
                yield Piece("text", delta["text"])
            case "thinking_delta":
                yield Piece("reasoning", delta["thinking"])
            case "input_json_delta" if delta["partial_json"]:
                self._silent.discard(index)
                yield Piece("args", delta["partial_json"], self._calls[index])

    def close(self) -> None:
        """The stream ended; without `message_stop` it was cut."""


# Answers: pieces → messages.


def body(pieces: Iterable[Piece], stamp: Stamp) -> bytes:
    """An answer as a whole message."""
    blocks: list[Json] = []
    calls: dict[int, tuple[Json, str]] = {}
    usage, stop = Usage(), "end_turn"
    for piece in pieces:
        match piece.kind:
            case "text" | "refusal":
                if not blocks or blocks[-1]["type"] != "text":
                    blocks.append({"type": "text", "text": ""})
                blocks[-1]["text"] += piece.text
            case "tool":
                blocks.append({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
                calls[piece.index] = (blocks[-1], "")
            case "args":
                block, before = calls[piece.index]
                calls[piece.index] = (block, before + piece.text)
            case "finish":
                stop = _FINISH.get(piece.text, "end_turn")
            case "usage":
                usage = piece.usage or usage
    for block, text in calls.values():
        block["input"] = from_json(text.encode(), "a tool call's arguments") if text else {}
    return to_json(_message(stamp, blocks, stop, usage))


def _message(stamp: Stamp, blocks: list[Json], stop: str | None, usage: Usage) -> Json:
    return {
        "id": f"msg_{stamp.id}",
        "type": "message",
        "role": "assistant",
        "model": stamp.model,
        "content": blocks,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": usage_table(usage),
    }


class Writer:
    """Pieces to events, message_start … message_stop. A block ends when the next begins."""

    def __init__(self, call: Call, stamp: Stamp) -> None:  # noqa: ARG002 (all writers are made alike)
        self._stamp = stamp
        self._stop, self._usage = "end_turn", Usage()
        self._begun = False
        self._block, self._kind = -1, ""
        self._calls: dict[int, int] = {}

    def write(self, piece: Piece) -> bytes:
        """What the client gets for one piece."""
        match piece.kind:
            case "text" | "refusal":
                out = self._open("text", {"type": "text", "text": ""}) if self._kind != "text" else b""
                return out + self._delta(self._block, {"type": "text_delta", "text": piece.text})
            case "tool":
                block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
                out = self._open("tool", block)
                self._calls[piece.index] = self._block
                return out
            case "args":
                delta = {"type": "input_json_delta", "partial_json": piece.text}
                return self._delta(self._calls[piece.index], delta)
            case "finish":
                self._stop = _FINISH.get(piece.text, "end_turn")
            case "usage":
                self._usage = piece.usage or self._usage
            case "error":
                return self.error(piece.text, piece.name, None)
        return b""

    def resume(self, block: int | None) -> None:
        """Go on where the provider's own events ended, inside `block`."""
        self._begun = True
        if block is not None:
            self._block, self._kind = block, "open"

    def end(self) -> bytes:
        """The last events."""
        delta = {"stop_reason": self._stop, "stop_sequence": None}
        out = self._begin() + self._close()
        out += self._event("message_delta", delta=delta, usage=usage_table(self._usage))
        return out + self._event("message_stop")

    def error(self, message: str, kind: str, code: str | None) -> bytes:  # noqa: ARG002 (it has no code)
        """An error inside the stream, which ends it."""
        return self._event("error", error={"type": kind, "message": message})

    def _event(self, name: str, **fields: Any) -> bytes:
        return sse({"type": name, **fields}, name)

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return self._event("message_start", message=_message(self._stamp, [], None, Usage()))

    def _open(self, kind: str, block: Json) -> bytes:
        out = self._begin() + self._close()
        self._block, self._kind = self._block + 1, kind
        return out + self._event("content_block_start", index=self._block, content_block=block)

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return self._event("content_block_stop", index=self._block)

    def _delta(self, index: int, delta: Json) -> bytes:
        return self._event("content_block_delta", index=index, delta=delta)
