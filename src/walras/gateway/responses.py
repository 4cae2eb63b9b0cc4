"""OpenAI's /v1/responses as a client's API over chat models.

Nothing is stored: a request must bring its whole input. Only functions can be tools. Reasoning is counted, not shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from walras.gateway.wire import Call, Json, Piece, RequestError, Stamp, Usage, sse, to_json

_STORED = ("previous_response_id", "conversation", "prompt", "background")
_SAME = (
    "temperature",
    "top_p",
    "stream",
    "parallel_tool_calls",
    "user",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
_SHOWN: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""Fields of a request that its response repeats, with their defaults."""


def usage_table(usage: Usage) -> Json:
    """Usage as /v1/responses shows it."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {
            "cached_tokens": usage.cached_input,
            "cache_write_tokens": usage.cache_write,
        },
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def neutral(call: Call) -> Json:
    """A client's request in the form of chat completions.

    Raises:
        RequestError: something that needs stored state, or more than chat models can do.
    """
    for name in _STORED:
        if call.field(name):
            raise RequestError(
                f"'{name}' needs responses that were stored; send the whole input instead", param=name
            )
    chat: Json = {"messages": []}
    if call.field("instructions"):
        chat["messages"].append({"role": "system", "content": call.field("instructions")})
    given = call.field("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    for at, item in enumerate(items):
        _item(item, f"input[{at}]", chat["messages"])
    chat |= {name: call.field(name) for name in _SAME if call.field(name) is not None}
    if call.max_tokens is not None:
        chat["max_completion_tokens"] = call.max_tokens
    text, effort = call.field("text") or {}, (call.field("reasoning") or {}).get("effort")
    shape = text.get("format") or {}
    if shape.get("type") == "json_schema":
        schema = {name: value for name, value in shape.items() if name != "type"}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif shape.get("type") == "json_object":
        chat["response_format"] = shape
    if text.get("verbosity"):
        chat["verbosity"] = text["verbosity"]
    if effort:
        chat["reasoning_effort"] = effort
    return chat | _tools(call.field("tools") or [], call.field("tool_choice"))


def _tools(tools: list[Json], choice: Any) -> Json:
    if not tools:
        return {}
    found: Json = {"tools": []}
    for tool in tools:
        if tool.get("type") != "function":
            raise RequestError(
                f"tools of type {tool.get('type')!r} are not offered; use functions", param="tools"
            )
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        found["tools"].append({"type": "function", "function": function})
    if isinstance(choice, dict):
        found["tool_choice"] = _choice(choice)
    elif choice is not None:
        found["tool_choice"] = choice
    return found


def _choice(choice: Json) -> Json:
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice["name"]}}
    if choice.get("type") == "allowed_tools":
        tools = [_choice(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": tools}}
    raise RequestError(f"a tool_choice of type {choice.get('type')!r} is not offered", param="tool_choice")


def _item(item: Json, where: str, messages: list[Json]) -> None:
    """Adds one input item to the chat messages; calls of tools join the assistant message before them."""
    kind = item.get("type") or "message"
    if kind == "message":
        role, content = item["role"], item["content"]
        if not isinstance(content, str):
            content = [_part(part, where) for part in content]
        if role == "assistant" and not isinstance(content, str):
            content = "".join(part["text"] for part in content if part["type"] == "text")
        messages.append({"role": role, "content": content})
    elif kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        called = {"id": item["call_id"], "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(called)
    elif kind == "function_call_output":
        output = item["output"]
        if not isinstance(output, str):
            output = [_part(part, where) for part in output]
            if any(part["type"] != "text" for part in output):
                raise RequestError(f"{where}: results of tools may hold text only", param=where)
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    elif kind != "reasoning":  # another model's thoughts mean nothing to this one
        raise RequestError(f"{where} is a {kind!r}, which is not offered", param=where)


def _part(part: Json, where: str) -> Json:
    match part["type"]:
        case "input_text" | "output_text":
            return {"type": "text", "text": part["text"]}
        case "refusal":
            return {"type": "text", "text": part["refusal"]}
        case "input_image" if part.get("image_url"):
            image = {"url": part["image_url"]}
            return {
                "type": "image_url",
                "image_url": image | ({"detail": part["detail"]} if part.get("detail") else {}),
            }
        case "input_file" if part.get("file_data"):
            return {
                "type": "file",
                "file": {"filename": part.get("filename") or "file", "file_data": part["file_data"]},
            }
        case other:
            raise RequestError(
                f"{where} holds a part {other!r} without its data, or not offered", param=where
            )


_NULL = msgspec.Raw(b"null")


class Writer:
    """Pieces to response.* events, numbered; an item ends when the next begins."""

    def __init__(self, call: Call, stamp: Stamp) -> None:
        self._call, self._stamp = call, stamp
        self._sequence = 0
        self._output: list[Json] = []
        self._open: Json | None = None
        """The item under way: the last of the output."""
        self._calls: dict[int, int] = {}
        self._finish, self._usage = "stop", Usage()

    def write(self, piece: Piece) -> bytes:
        """What the client gets for one piece."""
        match piece.kind:
            case "text" | "refusal":
                return self._text(piece.text, piece.kind)
            case "tool":
                at = len(self._output)
                self._calls[piece.index] = at
                item = {"type": "function_call", "id": f"fc_{self._stamp.id}_{at}", "call_id": piece.id}
                return self._begin_item(
                    {**item, "name": piece.name, "arguments": "", "status": "in_progress"}
                )
            case "args":
                at = self._calls[piece.index]
                self._output[at]["arguments"] += piece.text
                where = {"item_id": self._output[at]["id"], "output_index": at}
                return self._event("response.function_call_arguments.delta", **where, delta=piece.text)
            case "finish":
                self._finish = piece.text
            case "usage":
                self._usage = piece.usage or self._usage
            case "error":
                return self.error(piece.text, piece.name, None)
        return b""

    def end(self) -> bytes:
        """The last events."""
        out = self._begin() + self._end_item()
        done = self.response(ended=True)
        return out + self._event(f"response.{done['status']}", response=done)

    def error(self, message: str, kind: str, code: str | None) -> bytes:
        """An error inside the stream, which ends it."""
        return self._event("error", code=code or kind, message=message, param=None)

    def response(self, *, ended: bool = False) -> Json:
        """The response as far as it has come."""
        asked = {name: raw for name in _SHOWN if (raw := self._call.fields.get(name, _NULL)) != _NULL}
        cut = (
            {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._finish)
            if ended
            else None
        )
        return {
            "id": f"resp_{self._stamp.id}",
            "object": "response",
            "created_at": self._stamp.created,
            "status": ("incomplete" if cut else "completed") if ended else "in_progress",
            "error": None,
            "incomplete_details": {"reason": cut} if cut else None,
            "model": self._stamp.model,
            "output": list(self._output),
            "previous_response_id": None,
            "store": False,
            **_SHOWN,
            **asked,
            "usage": usage_table(self._usage) if ended else None,
        }

    def _event(self, name: str, **fields: Any) -> bytes:
        self._sequence += 1
        return sse({"type": name, "sequence_number": self._sequence - 1, **fields}, name)

    def _begin(self) -> bytes:
        if self._sequence:
            return b""
        response = self.response()
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _begin_item(self, item: Json) -> bytes:
        out = self._begin() + self._end_item()
        self._open = item
        self._output.append(item)
        return out + self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _text(self, text: str, kind: str) -> bytes:
        """More of a message; text and refusal are parts of their own."""
        out = b""
        if self._open is None or self._open["type"] != "message":
            item = {"type": "message", "id": f"msg_{self._stamp.id}_{len(self._output)}", "role": "assistant"}
            out += self._begin_item({**item, "status": "in_progress", "content": []})
        assert self._open is not None
        parts, name = self._open["content"], "output_text" if kind == "text" else "refusal"
        if not parts or parts[-1]["type"] != name:
            out += self._end_part()
            fresh: Json = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
            parts.append(fresh if kind == "text" else {"type": "refusal", "refusal": ""})
            out += self._event("response.content_part.added", **self._at(), part=parts[-1])
        parts[-1][kind] += text
        extra: Json = {"logprobs": []} if kind == "text" else {}
        return out + self._event(f"response.{name}.delta", **self._at(), delta=text, **extra)

    def _at(self) -> Json:
        assert self._open is not None
        content = len(self._open["content"]) - 1
        return {"item_id": self._open["id"], "output_index": len(self._output) - 1, "content_index": content}

    def _end_part(self) -> bytes:
        assert self._open is not None
        if not self._open["content"]:
            return b""
        part = self._open["content"][-1]
        name = part["type"]
        whole: Json = (
            {"refusal": part["refusal"]} if name == "refusal" else {"text": part["text"], "logprobs": []}
        )
        out = self._event(f"response.{name}.done", **self._at(), **whole)
        return out + self._event("response.content_part.done", **self._at(), part=part)

    def _end_item(self) -> bytes:
        item = self._open
        if item is None:
            return b""
        where = {"item_id": item["id"], "output_index": len(self._output) - 1}
        if item["type"] == "message":
            out = self._end_part()
        else:
            out = self._event("response.function_call_arguments.done", **where, arguments=item["arguments"])
        item["status"], self._open = "completed", None
        return out + self._event("response.output_item.done", output_index=where["output_index"], item=item)


def body(pieces: Iterable[Piece], call: Call, stamp: Stamp) -> bytes:
    """An answer as a whole response."""
    writer = Writer(call, stamp)
    for piece in pieces:
        writer.write(piece)
    writer.end()
    return to_json(writer.response(ended=True))
