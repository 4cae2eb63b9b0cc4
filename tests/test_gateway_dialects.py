"""Dialects: documented requests and event sequences as goldens, round trips, bytes cut anywhere, hostile input."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walras.gateway import chat, messages
from walras.gateway.dialects import (
    Spoken,
    Stream,
    error_body,
    error_type,
    neutral,
    prompt_text,
    read_call,
    read_error,
    translate_reply,
    write_call,
)
from walras.gateway.wire import Call, Dialect, Piece, ReplyError, RequestError, SseParser, Stamp, Usage

STAMP = Stamp("0", 1_700_000_000, "some-model")
Json = dict[str, Any]


def call_of(dialect: Dialect, body: Json) -> Call:
    return read_call(dialect, json.dumps(body).encode())


def put(dialect: Dialect, body: Json, spoken: Spoken, max_tokens: int | None = None) -> Json:
    """What a provider is sent."""
    found: Json = json.loads(write_call(call_of(dialect, body), spoken, "theirs", max_tokens))
    return found


def stream_of(events: list[tuple[str, Json | str]]) -> bytes:
    """An event stream; the name is left out where empty."""
    out = ""
    for name, data in events:
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        out += (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
    return out.encode()


def events_in(stream: bytes) -> list[tuple[str, Any]]:
    parsed = SseParser().feed(stream)
    return [(e.name, e.data.decode() if e.data == b"[DONE]" else json.loads(e.data)) for e in parsed]


def told(stream: Stream, data: bytes, size: int = 1 << 20) -> bytes:
    out = b"".join(stream.feed(data[i : i + size]) for i in range(0, len(data), size))
    return out + stream.close()


ASK: Json = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
ASK_USAGE: Json = ASK | {"stream_options": {"include_usage": True}}
ASK_MESSAGES: Json = ASK | {"max_tokens": 100}
ASK_RESPONSES: Json = {"model": "auto", "stream": True, "input": "hi"}

# https://platform.claude.com/docs/en/build-with-claude/streaming, "Streaming request with tool use", shortened.
ANTHROPIC_STREAM = stream_of(
    [
        ("message_start", {"type": "message_start", "message": {
            "id": "msg_014p7gG3wDgGV9EUtLvnow3U", "type": "message", "role": "assistant", "model": "claude-opus-4-7",
            "stop_sequence": None, "stop_reason": None, "content": [],
            "usage": {"input_tokens": 472, "cache_read_input_tokens": 30, "output_tokens": 2}}}),
        ("content_block_start", {"type": "content_block_start", "index": 0,
                                 "content_block": {"type": "thinking", "thinking": "", "signature": ""}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 0,
                                 "delta": {"type": "thinking_delta", "thinking": "Hm."}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 0,
                                 "delta": {"type": "signature_delta", "signature": "EqQB"}}),
        ("content_block_stop", {"type": "content_block_stop", "index": 0}),
        ("content_block_start", {"type": "content_block_start", "index": 1,
                                 "content_block": {"type": "text", "text": ""}}),
        ("ping", {"type": "ping"}),
        ("content_block_delta", {"type": "content_block_delta", "index": 1,
                                 "delta": {"type": "text_delta", "text": "Okay"}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 1,
                                 "delta": {"type": "text_delta", "text": ", let's see:"}}),
        ("content_block_stop", {"type": "content_block_stop", "index": 1}),
        ("content_block_start", {"type": "content_block_start", "index": 2, "content_block": {
            "type": "tool_use", "id": "toolu_01T1x1fJ34qAmk2tNTrN7Up6", "name": "get_weather", "input": {}}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 2,
                                 "delta": {"type": "input_json_delta", "partial_json": ""}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 2,
                                 "delta": {"type": "input_json_delta", "partial_json": '{"location":'}}),
        ("content_block_delta", {"type": "content_block_delta", "index": 2,
                                 "delta": {"type": "input_json_delta", "partial_json": ' "Paris"}'}}),
        ("content_block_stop", {"type": "content_block_stop", "index": 2}),
        ("content_block_start", {"type": "content_block_start", "index": 3, "content_block": {
            "type": "tool_use", "id": "toolu_02", "name": "now", "input": {}}}),
        ("content_block_stop", {"type": "content_block_stop", "index": 3}),
        ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
                           "usage": {"output_tokens": 89, "output_tokens_details": {"thinking_tokens": 20}}}),
        ("message_stop", {"type": "message_stop"}),
    ]
)  # fmt: skip
ANTHROPIC_USAGE = Usage(input=472, cached_input=30, output=69, reasoning=20)


def chunk(delta: Json, finish: str | None = None, **extra: Any) -> tuple[str, Json]:
    return "", {
        "id": "chatcmpl-123", "object": "chat.completion.chunk", "created": 1694268190, "model": "gpt-4o-mini",
        "system_fingerprint": "fp_44709d6fcb", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **extra,
    }  # fmt: skip


def calling(index: int, **fields: Any) -> Json:
    return {"tool_calls": [{"index": index, **fields}]}


CHAT_USAGE_TABLE = {
    "prompt_tokens": 50, "completion_tokens": 30, "total_tokens": 80,
    "prompt_tokens_details": {"cached_tokens": 40}, "completion_tokens_details": {"reasoning_tokens": 10},
}  # fmt: skip
CHAT_USAGE = Usage(input=10, cached_input=40, output=20, reasoning=10)
USAGE_CHUNK: tuple[str, Json] = ("", chunk({})[1] | {"choices": [], "usage": CHAT_USAGE_TABLE})
# https://platform.openai.com/docs/api-reference/chat-streaming, with a tool call and usage.
CHAT_EVENTS: list[tuple[str, Json | str]] = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Let "}),
    chunk({"content": "me see"}),
    chunk(calling(0, id="call_1", type="function", function={"name": "get_weather", "arguments": ""})),
    chunk(calling(0, function={"arguments": '{"location":'})),
    chunk(calling(0, function={"arguments": '"Paris"}'})),
    chunk(calling(1, id="call_2", type="function", function={"name": "now", "arguments": "{}"})),
    chunk({}, "tool_calls"),
    USAGE_CHUNK,
    ("", "[DONE]"),
]
CHAT_STREAM = stream_of(CHAT_EVENTS)


# Server-sent events.


@st.composite
def cuts(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream in the line endings and oddities the standard allows, and the same bytes in pieces."""
    lines = st.sampled_from(
        [
            "data: {}",
            "data:x",
            "data",
            "event: a",
            "event:b",
            ": comment",
            "id: 1",
            "",
            "",
            "data:  two",
            "retry: 3",
        ]
    )
    ends = st.sampled_from(["\n", "\r\n", "\r"])
    text = "".join(line + end for line, end in draw(st.lists(st.tuples(lines, ends), max_size=20)))
    data = (draw(st.sampled_from(["", "\ufeff"])) + text + draw(st.sampled_from(["", "data: é"]))).encode()
    at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=10)))
    return data, [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def lines_by_the_standard(data: bytes) -> list[tuple[str, bytes]]:
    """The slow obvious road: whole text, line by line, an event at each blank one (data may be absent)."""
    events, name, values, seen = list[tuple[str, bytes]](), "", list[bytes](), False
    for line in data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        if not line:
            if seen:
                events.append((name, b"\n".join(values)))
            name, values, seen = "", [], False
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            values.append(value)
        elif field == b"event":
            name = value.decode()
        seen = True
    return [*events, (name, b"\n".join(values))] if seen else events


@given(cuts())
def test_events_do_not_depend_on_where_bytes_are_cut(case: tuple[bytes, list[bytes]]) -> None:
    data, pieces = case
    whole, cut = SseParser(), SseParser()
    expected = whole.feed(data) + whole.close()
    found = [event for piece in pieces for event in cut.feed(piece)] + cut.close()
    assert found == expected
    assert b"".join(event.raw for event in found) == data
    named = [(e.name, e.data) for e in found if e.name or e.data]
    assert named == [e for e in lines_by_the_standard(data) if e[0] or e[1]]


def test_an_event_without_end_is_refused() -> None:
    parser = SseParser(max_event=1000)
    for _ in range(10):
        parser.feed(b"data: " + b"x" * 90)
    with pytest.raises(ReplyError):
        parser.feed(b"y" * 100)


# Pass-through.


def test_a_request_passes_through_with_what_is_not_known() -> None:
    odd = {"vendor_extension": {"a": [1.50, "é"]}, "messages": [{"role": "user", "content": "hi", "x": 1}]}
    body = b'{"model":"auto","vendor_extension":{"a":[1.50, "\xc3\xa9"]},"messages":[{"role":"user","content":"hi","x":1}]}'
    sent = write_call(read_call("chat", body), "chat", "theirs")
    assert json.loads(sent) == {"model": "theirs", **odd}
    assert b'{"a":[1.50, "\xc3\xa9"]}' in sent  # not even formatted anew
    assert put("messages", ASK_MESSAGES | {"top_k": 3}, "messages") == ASK_MESSAGES | {
        "top_k": 3,
        "model": "theirs",
    }


def test_a_stream_is_asked_for_usage_and_tokens_are_capped() -> None:
    ask = ASK | {"stream_options": {"include_obfuscation": False}}
    assert put("chat", ask, "chat")["stream_options"] == {"include_obfuscation": False, "include_usage": True}
    assert "stream_options" not in put("chat", ask | {"stream": False, "stream_options": None}, "messages", 5)
    for given_caps, cap, sent in (
        ({}, None, {}),
        ({}, 70, {"max_completion_tokens": 70}),
        ({"max_tokens": 50}, 70, {"max_tokens": 50}),
        ({"max_tokens": 50}, 30, {"max_tokens": 30}),
        ({"max_completion_tokens": 90}, 70, {"max_completion_tokens": 70}),
    ):
        body = put("chat", ASK | given_caps, "chat", cap)
        assert {k: v for k, v in body.items() if k.startswith("max_")} == sent
    assert put("messages", ASK_MESSAGES, "messages", 30)["max_tokens"] == 30
    assert (
        put("responses", ASK_RESPONSES | {"max_output_tokens": 9}, "chat", 30)["max_completion_tokens"] == 9
    )


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_stream_of_the_same_dialect_keeps_its_bytes(size: int) -> None:
    with_comment = b": keep-alive\r\n\r\n" + CHAT_STREAM
    stream = Stream(call_of("chat", ASK_USAGE), "chat", STAMP)
    assert told(stream, with_comment, size) == with_comment
    assert (stream.usage, stream.finish, stream.finished) == (CHAT_USAGE, "tool_calls", True)
    assert stream.characters == len('Let me see{"location":"Paris"}{}')

    stream = Stream(call_of("messages", ASK_MESSAGES), "messages", STAMP)
    assert told(stream, ANTHROPIC_STREAM, size) == ANTHROPIC_STREAM
    assert (stream.usage, stream.finish, stream.finished) == (ANTHROPIC_USAGE, "tool_calls", True)


def test_the_chunk_of_usage_is_kept_from_a_client_that_did_not_ask() -> None:
    stream = Stream(call_of("chat", ASK), "chat", STAMP)
    assert told(stream, CHAT_STREAM) == stream_of([e for e in CHAT_EVENTS if e is not USAGE_CHUNK])
    assert stream.usage == CHAT_USAGE
    # Usage that comes with the last choice is no chunk of its own.
    events: list[tuple[str, Json | str]] = [
        chunk({"content": "x"}, "stop", usage=CHAT_USAGE_TABLE),
        ("", "[DONE]"),
    ]
    stream = Stream(call_of("chat", ASK), "chat", STAMP)
    assert told(stream, stream_of(events)) == stream_of(events)
    assert stream.usage == CHAT_USAGE


@pytest.mark.parametrize("ask", [("chat", ASK), ("messages", ASK_MESSAGES), ("responses", ASK_RESPONSES)])
def test_only_what_the_provider_ended_is_finished(ask: tuple[Dialect, Json]) -> None:
    call = call_of(*ask)
    spoken_streams: list[tuple[Spoken, bytes]] = [("chat", CHAT_STREAM), ("messages", ANTHROPIC_STREAM)]
    for spoken, whole in spoken_streams:
        stream = Stream(call, spoken, STAMP)
        told(stream, whole[: len(whole) // 2])
        assert not stream.finished
        stream = Stream(call, spoken, STAMP)
        assert b"late" not in told(stream, whole + b'data: {"late":1}\n\n')
        assert stream.finished


def test_a_provider_that_forgets_done_has_it_added() -> None:
    events: list[tuple[str, Json | str]] = [chunk({"content": "x"}), chunk({}, "stop")]
    stream = Stream(call_of("chat", ASK), "chat", STAMP)
    assert told(stream, stream_of(events)) == stream_of([*events, ("", "[DONE]")])
    assert stream.finished
    stream = Stream(call_of("chat", ASK), "chat", STAMP)
    assert told(stream, stream_of([*events, ("", "[DONE]")])[:-2]).endswith(b"data: [DONE]\n\n")
    stream = Stream(call_of("messages", ASK_MESSAGES), "chat", STAMP)
    assert events_in(told(stream, stream_of(events)))[-1] == ("message_stop", {"type": "message_stop"})


# Streams between dialects.


def plain(delta: Json, finish: str | None = None, **extra: Any) -> tuple[str, Json]:
    return "", {
        "id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "some-model",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **extra,
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_messages_told_as_chat(size: int) -> None:
    first = {
        "id": "toolu_01T1x1fJ34qAmk2tNTrN7Up6",
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    second = {"id": "toolu_02", "type": "function", "function": {"name": "now", "arguments": ""}}
    expected = [
        plain({"role": "assistant", "content": ""}),
        plain({"reasoning_content": "Hm."}),
        plain({"content": "Okay"}),
        plain({"content": ", let's see:"}),
        plain(calling(0, **first)),
        plain(calling(0, function={"arguments": '{"location":'})),
        plain(calling(0, function={"arguments": ' "Paris"}'})),
        plain(calling(1, **second)),
        plain(calling(1, function={"arguments": "{}"})),
        plain({}, "tool_calls"),
    ]
    stream = Stream(call_of("chat", ASK), "messages", STAMP)
    assert events_in(told(stream, ANTHROPIC_STREAM, size)) == [*expected, ("", "[DONE]")]
    assert stream.usage == ANTHROPIC_USAGE

    with_usage = events_in(told(Stream(call_of("chat", ASK_USAGE), "messages", STAMP), ANTHROPIC_STREAM))
    assert [e for _, e in with_usage[:-2]] == [e | {"usage": None} for _, e in expected]
    assert with_usage[-2][1]["choices"] == []
    assert with_usage[-2][1]["usage"] == {
        "prompt_tokens": 502, "completion_tokens": 89, "total_tokens": 591,
        "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_chat_told_as_messages(size: int) -> None:
    zero = {
        "input_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 0,
    }
    used = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 40,
        "output_tokens": 30,
    }

    def block(index: int, kind: str, **fields: Any) -> tuple[str, Json]:
        return f"content_block_{kind}", {"type": f"content_block_{kind}", "index": index, **fields}

    def tool(key: str, name: str) -> Json:
        return {"type": "tool_use", "id": key, "name": name, "input": {}}

    expected = [
        ("message_start", {"type": "message_start", "message": {
            "id": "msg_0", "type": "message", "role": "assistant", "model": "some-model", "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": zero}}),
        block(0, "start", content_block={"type": "text", "text": ""}),
        block(0, "delta", delta={"type": "text_delta", "text": "Let "}),
        block(0, "delta", delta={"type": "text_delta", "text": "me see"}),
        block(0, "stop"),
        block(1, "start", content_block=tool("call_1", "get_weather")),
        block(1, "delta", delta={"type": "input_json_delta", "partial_json": '{"location":'}),
        block(1, "delta", delta={"type": "input_json_delta", "partial_json": '"Paris"}'}),
        block(1, "stop"),
        block(2, "start", content_block=tool("call_2", "now")),
        block(2, "delta", delta={"type": "input_json_delta", "partial_json": "{}"}),
        block(2, "stop"),
        ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
                           "usage": used}),
        ("message_stop", {"type": "message_stop"}),
    ]  # fmt: skip
    stream = Stream(call_of("messages", ASK_MESSAGES), "chat", STAMP)
    assert events_in(told(stream, CHAT_STREAM, size)) == expected
    assert (stream.usage, stream.finished) == (CHAT_USAGE, True)


def test_chat_told_as_responses() -> None:
    """The sequence of https://platform.openai.com/docs/api-reference/responses-streaming."""
    stream = Stream(call_of("responses", ASK_RESPONSES | {"temperature": 0.5}), "chat", STAMP)
    events = events_in(told(stream, CHAT_STREAM))
    assert [e["sequence_number"] for _, e in events] == list(range(len(events)))
    assert all(name == event["type"] for name, event in events)
    bare = [{k: v for k, v in e.items() if k not in ("sequence_number", "response")} for _, e in events]
    text = {"type": "output_text", "annotations": [], "logprobs": [], "text": "Let me see"}
    message = {
        "type": "message",
        "id": "msg_0_0",
        "role": "assistant",
        "status": "completed",
        "content": [text],
    }
    item = {"item_id": "msg_0_0", "output_index": 0}
    part = item | {"content_index": 0}

    def called(at: int, status: str, arguments: str) -> Json:
        name = ("", "get_weather", "now")[at]
        return {"type": "function_call", "id": f"fc_0_{at}", "call_id": f"call_{at}", "name": name,
                "arguments": arguments, "status": status}  # fmt: skip

    def arguments(at: int, kind: str, **fields: Any) -> Json:
        return {
            "type": f"response.function_call_arguments.{kind}",
            "item_id": f"fc_0_{at}",
            "output_index": at,
        } | fields

    paris = '{"location":"Paris"}'
    assert bare == [
        {"type": "response.created"},
        {"type": "response.in_progress"},
        {"type": "response.output_item.added", "output_index": 0,
         "item": message | {"status": "in_progress", "content": []}},
        {"type": "response.content_part.added", "part": text | {"text": ""}} | part,
        {"type": "response.output_text.delta", "delta": "Let ", "logprobs": []} | part,
        {"type": "response.output_text.delta", "delta": "me see", "logprobs": []} | part,
        {"type": "response.output_text.done", "text": "Let me see", "logprobs": []} | part,
        {"type": "response.content_part.done", "part": text} | part,
        {"type": "response.output_item.done", "output_index": 0, "item": message},
        {"type": "response.output_item.added", "output_index": 1, "item": called(1, "in_progress", "")},
        arguments(1, "delta", delta='{"location":'),
        arguments(1, "delta", delta='"Paris"}'),
        arguments(1, "done", arguments=paris),
        {"type": "response.output_item.done", "output_index": 1, "item": called(1, "completed", paris)},
        {"type": "response.output_item.added", "output_index": 2, "item": called(2, "in_progress", "")},
        arguments(2, "delta", delta="{}"),
        arguments(2, "done", arguments="{}"),
        {"type": "response.output_item.done", "output_index": 2, "item": called(2, "completed", "{}")},
        {"type": "response.completed"},
    ]  # fmt: skip
    first, last = events[0][1]["response"], events[-1][1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert (last["status"], last["id"], last["temperature"], last["top_p"]) == (
        "completed",
        "resp_0",
        0.5,
        1.0,
    )
    assert last["output"] == [message, called(1, "completed", paris), called(2, "completed", "{}")]
    assert last["usage"] == {
        "input_tokens": 50, "input_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 0},
        "output_tokens": 30, "output_tokens_details": {"reasoning_tokens": 10}, "total_tokens": 80,
    }  # fmt: skip


def test_a_response_cut_short_says_why() -> None:
    events: list[tuple[str, Json | str]] = [chunk({"refusal": "No."}), chunk({}, "length"), ("", "[DONE]")]
    told_events = events_in(
        told(Stream(call_of("responses", ASK_RESPONSES), "chat", STAMP), stream_of(events))
    )
    names = [name for name, _ in told_events]
    assert names[3:6] == ["response.content_part.added", "response.refusal.delta", "response.refusal.done"]
    last = told_events[-1]
    assert last[0] == "response.incomplete"
    assert last[1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last[1]["response"]["output"][0]["content"] == [{"type": "refusal", "refusal": "No."}]


PIECES = st.lists(
    st.one_of(
        st.builds(Piece, st.just("text"), st.text(min_size=1)),
        st.tuples(st.text(min_size=1), st.lists(st.sampled_from(['{"a":', ' "é"', "}"]), min_size=1)),
    ),
    max_size=8,
)


@given(
    PIECES,
    st.sampled_from(["stop", "length", "tool_calls", "content_filter"]),
    st.builds(Usage, *[st.integers(0, 10**9)] * 5),
    st.integers(1, 40),
)
def test_what_is_written_in_a_dialect_is_read_back(drawn: Any, finish: str, usage: Usage, size: int) -> None:
    """Each writer against its reader, as a stream cut anywhere; reasoning is not told apart in messages."""
    pieces: list[Piece] = []
    for at, piece in enumerate(drawn):
        if isinstance(piece, Piece):
            pieces.append(piece)
            continue
        index = sum(p.kind == "tool" for p in pieces)
        pieces.append(Piece("tool", index=index, id=f"call_{at}", name=piece[0]))
        pieces += [Piece("args", text, index) for text in piece[1]]
    pieces += [Piece("usage", usage=usage), Piece("finish", finish)]
    roads: list[tuple[Any, Any, Call]] = [
        (chat.Writer, chat.Reader(), call_of("chat", ASK_USAGE)),
        (messages.Writer, messages.Reader(), call_of("messages", ASK_MESSAGES)),
    ]
    for writer_of, reader, call in roads:
        writer = writer_of(call, STAMP)
        data = b"".join(writer.write(piece) for piece in pieces) + writer.end()
        parser, found = SseParser(), list[Piece]()
        for start in range(0, len(data), size):
            for event in parser.feed(data[start : start + size]):
                found += reader.read(event)
        assert reader.finished
        kept = usage
        if call.dialect == "messages":
            kept = Usage(usage.input, usage.cached_input, usage.cache_write, usage.completion, 0)
        order = sorted(found[-2:], key=lambda p: p.kind, reverse=True)
        assert found[:-2] + order == [*pieces[:-2], Piece("usage", usage=kept), Piece("finish", finish)]


# Whole answers.


def message_answer(**fields: Any) -> bytes:
    return json.dumps(
        {
            "id": "msg_x", "type": "message", "role": "assistant", "model": "claude", "stop_reason": "tool_use",
            "stop_sequence": None, "usage": {"input_tokens": 7, "output_tokens": 9},
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "Here: "},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"location": "Paris"}},
            ],
        } | fields
    ).encode()  # fmt: skip


def chat_answer(message: Json, finish: str = "stop", **fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return json.dumps({"id": "c", "object": "chat.completion", "choices": [choice], **fields}).encode()


def test_a_whole_message_as_chat() -> None:
    reply = translate_reply(call_of("chat", ASK), "messages", message_answer(), STAMP)
    read = json.loads(reply.body)
    assert read["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "tool_calls", "message": {
        "role": "assistant", "content": "Here: ", "refusal": None, "reasoning_content": "Hm.",
        "tool_calls": [{"id": "t1", "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"location":"Paris"}'}}]}}]  # fmt: skip
    assert (read["object"], read["id"], read["model"]) == ("chat.completion", "chatcmpl-0", "some-model")
    assert reply.usage == Usage(input=7, output=9)
    assert reply.finish == "tool_calls"
    assert reply.characters == len('Hm.Here: {"location":"Paris"}')


def test_a_whole_chat_as_message_and_response() -> None:
    function = {"name": "get_weather", "arguments": '{"location": "Paris"}'}
    said = {"content": "Here: ", "tool_calls": [{"id": "t1", "type": "function", "function": function}]}
    body = chat_answer(said, "tool_calls", usage=CHAT_USAGE_TABLE)
    reply = translate_reply(call_of("messages", ASK_MESSAGES), "chat", body, STAMP)
    assert json.loads(reply.body) == {
        "id": "msg_0", "type": "message", "role": "assistant", "model": "some-model", "stop_reason": "tool_use",
        "stop_sequence": None,
        "content": [{"type": "text", "text": "Here: "},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"location": "Paris"}}],
        "usage": {"input_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 40,
                  "output_tokens": 30},
    }  # fmt: skip
    reply = translate_reply(call_of("responses", ASK_RESPONSES), "chat", body, STAMP)
    read = json.loads(reply.body)
    assert [item["type"] for item in read["output"]] == ["message", "function_call"]
    assert read["output"][1]["arguments"] == '{"location": "Paris"}'
    assert (read["status"], read["usage"]["total_tokens"]) == ("completed", 80)
    same = translate_reply(call_of("chat", ASK), "chat", body, STAMP)
    assert same.body is body


def test_a_response_from_a_provider_that_speaks_messages() -> None:
    call = call_of("responses", ASK_RESPONSES | {"instructions": "Be brief."})
    assert json.loads(write_call(call, "messages", "claude", 64)) == {
        "model": "claude", "max_tokens": 64, "stream": True, "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    }  # fmt: skip
    stream = Stream(call, "messages", STAMP)
    last = events_in(told(stream, ANTHROPIC_STREAM))[-1][1]["response"]
    assert [item["type"] for item in last["output"]] == ["message", "function_call", "function_call"]
    assert last["output"][1]["arguments"] == '{"location": "Paris"}'
    assert last["instructions"] == "Be brief."


def test_embeddings_pass_through() -> None:
    call = call_of("embeddings", {"model": "auto", "input": ["a", "b"], "encoding_format": "base64"})
    assert json.loads(write_call(call, "chat", "theirs"))["encoding_format"] == "base64"
    assert prompt_text(call) == "a\nb"
    body = b'{"object":"list","data":[{"embedding":"AAAA"}],"usage":{"prompt_tokens":2,"total_tokens":2}}'
    reply = translate_reply(call, "chat", body, STAMP)
    assert (reply.body, reply.usage) == (body, Usage(input=2))
    with pytest.raises(RequestError):
        write_call(call, "messages", "theirs")


# Requests between dialects.

TOOL_CHAT = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather.",
        "parameters": {"type": "object"},
        "strict": True,
    },
}
TOOL_MESSAGES = {
    "name": "get_weather",
    "description": "Weather.",
    "input_schema": {"type": "object"},
    "strict": True,
}
PNG = "data:image/png;base64,iVBORw0="


def test_a_chat_request_put_to_messages() -> None:
    body = {
        "model": "auto",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "Look"},
                {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://host/a.jpg"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "a", "arguments": '{"x": 1}'}},
                {"id": "t2", "type": "function", "function": {"name": "b", "arguments": ""}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "one"},
            {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": "Go on"},
        ],
        "tools": [TOOL_CHAT, {"type": "function", "function": {"name": "b"}}],
        "tool_choice": {"type": "function", "function": {"name": "b"}}, "parallel_tool_calls": False,
        "stop": "END", "temperature": 1.7, "top_p": 0.9, "user": "u1", "reasoning_effort": "minimal",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "seed": 3,
    }  # fmt: skip
    assert put("chat", body, "messages", 100) == {
        "model": "theirs", "max_tokens": 100, "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "Look"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0="}},
                {"type": "image", "source": {"type": "url", "url": "https://host/a.jpg"}},
                {"type": "document",
                 "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}]},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "t1", "name": "a", "input": {"x": 1}},
                {"type": "tool_use", "id": "t2", "name": "b", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "one"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "two"}]},
                {"type": "text", "text": "Go on"}]},
        ],
        "tools": [TOOL_MESSAGES, {"name": "b", "input_schema": {"type": "object", "properties": {}}}],
        "tool_choice": {"type": "tool", "name": "b", "disable_parallel_tool_use": True},
        "stop_sequences": ["END"], "temperature": 1, "top_p": 0.9, "metadata": {"user_id": "u1"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "sent"),
    [
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        ({}, None),
    ],
)
def test_choice_of_tools_in_messages(chosen: Json, sent: Json | None) -> None:
    assert put("chat", ASK | {"tools": [TOOL_CHAT]} | chosen, "messages", 9).get("tool_choice") == sent


def test_allowed_tools_and_json_mode_in_messages() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    sent = put("chat", ASK | {"tools": [TOOL_CHAT, other], "tool_choice": choice}, "messages", 9)
    assert (sent["tools"], sent["tool_choice"]) == ([TOOL_MESSAGES], {"type": "any"})
    sent = put(
        "chat", ASK | {"response_format": {"type": "json_object"}, "reasoning_effort": "none"}, "messages", 9
    )
    assert "JSON" in sent["system"][0]["text"]
    assert sent["thinking"] == {"type": "disabled"}


def test_a_messages_request_put_to_chat() -> None:
    body = {
        "model": "auto", "max_tokens": 100, "stream": True,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
                   {"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "Look"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0="}},
                {"type": "image", "source": {"type": "url", "url": "https://host/a.jpg"}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "Calling"},
                {"type": "tool_use", "id": "t1", "name": "a", "input": {"x": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": [
                    {"type": "text", "text": "one"},
                    {"type": "image", "source": {"type": "url", "url": "https://host/b.jpg"}}]},
                {"type": "text", "text": "Go on"}]},
            {"role": "assistant", "content": "Sure"},
        ],
        "tools": [TOOL_MESSAGES], "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "stop_sequences": ["END"], "temperature": 0.7, "top_k": 5, "metadata": {"user_id": "u1"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    }  # fmt: skip
    assert put("messages", body, "chat") == {
        "model": "theirs", "max_completion_tokens": 100, "stream": True, "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Be brief.\n\nBe kind."},
            {"role": "user", "content": [
                {"type": "text", "text": "Look"},
                {"type": "image_url", "image_url": {"url": PNG}},
                {"type": "image_url", "image_url": {"url": "https://host/a.jpg"}}]},
            {"role": "assistant", "content": "Calling", "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "a", "arguments": '{"x":1}'}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "Error: one"},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "https://host/b.jpg"}},
                {"type": "text", "text": "Go on"}]},
            {"role": "assistant", "content": "Sure"},
        ],
        "tools": [TOOL_CHAT], "tool_choice": "required", "parallel_tool_calls": False,
        "stop": ["END"], "temperature": 0.7, "user": "u1", "reasoning_effort": "high",
        "response_format": {"type": "json_schema",
                            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True}},
    }  # fmt: skip


def test_a_responses_request_put_to_chat() -> None:
    body = {
        "model": "auto", "instructions": "Be brief.", "max_output_tokens": 100, "temperature": 0.7, "store": True,
        "input": [
            {"role": "user", "content": [
                {"type": "input_text", "text": "Look"},
                {"type": "input_image", "image_url": PNG, "detail": "low"},
                {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "Calling", "annotations": []}]},
            {"type": "function_call", "call_id": "t1", "name": "a", "arguments": '{"x":1}'},
            {"type": "function_call", "call_id": "t2", "name": "b", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t1", "output": "one"},
            {"type": "function_call_output", "call_id": "t2", "output": [{"type": "input_text", "text": "two"}]},
        ],
        "tools": [{"type": "function", **TOOL_CHAT["function"]}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
                 "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"}, "parallel_tool_calls": True,
    }  # fmt: skip
    function = {"type": "function", "function": {"name": "get_weather"}}
    assert put("responses", body, "chat") == {
        "model": "theirs", "max_completion_tokens": 100, "temperature": 0.7, "parallel_tool_calls": True,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "Look"},
                {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}}]},
            {"role": "assistant", "content": "Calling", "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "a", "arguments": '{"x":1}'}},
                {"id": "t2", "type": "function", "function": {"name": "b", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "one"},
            {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "two"}]},
        ],
        "tools": [TOOL_CHAT],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function]}},
        "response_format": {"type": "json_schema",
                            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}},
        "verbosity": "low", "reasoning_effort": "low",
    }  # fmt: skip


TEXTS = st.text(min_size=1, max_size=20)
ARGUMENTS = st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> Json:
    """A messages request whose every part chat completions can say too."""
    turns: list[Json] = []
    for _ in range(draw(st.integers(1, 3))):
        content: list[Json] = [{"type": "text", "text": draw(TEXTS)}]
        if draw(st.booleans()):
            content.append({"type": "image", "source": {"type": "url", "url": "https://host/a.png"}})
        turns.append({"role": "user", "content": content})
        ids = [f"t{len(turns)}_{k}" for k in range(draw(st.integers(0, 2)))]
        used = [{"type": "tool_use", "id": i, "name": draw(TEXTS), "input": draw(ARGUMENTS)} for i in ids]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": draw(TEXTS)}, *used]})
        if ids:
            results = [{"type": "text", "text": draw(TEXTS)}]
            turns.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": i, "content": results} for i in ids]})  # fmt: skip
            turns.append({"role": "assistant", "content": [{"type": "text", "text": draw(TEXTS)}]})
    body: Json = {"model": "theirs", "max_tokens": draw(st.integers(1, 10**6)), "messages": turns}
    if draw(st.booleans()):
        body["system"] = [{"type": "text", "text": draw(TEXTS)}]
    if draw(st.booleans()):
        body |= {
            "tools": [TOOL_MESSAGES],
            "tool_choice": {"type": draw(st.sampled_from(["auto", "any", "none"]))},
        }
    if draw(st.booleans()):
        body["stop_sequences"] = draw(st.lists(TEXTS, min_size=1, max_size=2))
    return body


@given(conversations())
def test_messages_to_chat_and_back_is_the_same_request(body: Json) -> None:
    through = put("messages", body, "chat")
    assert put("chat", through, "messages", 10**7) == body
    texts = prompt_text(call_of("messages", body))
    assert all(
        block["text"] in texts for turn in body["messages"] for block in turn["content"] if "text" in block
    )


# Usage.


@pytest.mark.parametrize(
    ("table", "usage"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}, Usage(5, 0, 0, 3, 0)),
        ({"prompt_tokens": 5}, Usage(5, 0, 0, 0, 0)),
        (CHAT_USAGE_TABLE | {"prompt_tokens_details": None}, Usage(50, 0, 0, 20, 10)),
        # reasoning that completion_tokens leaves out, named and unnamed
        ({"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 18,
          "completion_tokens_details": {"reasoning_tokens": 10}}, Usage(5, 0, 0, 3, 10)),
        ({"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 18}, Usage(5, 0, 0, 3, 10)),
        ({"prompt_tokens": 50, "completion_tokens": 3,
          "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 10}}, Usage(20, 20, 10, 3, 0)),
        ({"prompt_tokens": -5, "completion_tokens": 3}, None),
        ({"prompt_tokens": 5, "completion_tokens": 3.5}, None),
        ({"prompt_tokens": 5, "completion_tokens": True}, None),
        ({"prompt_tokens": 5, "completion_tokens": "3"}, None),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 6}}, None),
        ({"prompt_tokens": 5, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 4}}, None),
        (None, None),
        ("much", None),
        ({}, None),
    ],
)  # fmt: skip
def test_usage_of_chat_completions(table: Any, usage: Usage | None) -> None:
    assert chat.usage_of(table) == usage
    if usage is not None:
        assert chat.usage_of(chat.usage_table(usage)) == usage


@pytest.mark.parametrize(
    ("table", "usage"),
    [
        ({"input_tokens": 5, "output_tokens": 3}, Usage(5, 0, 0, 3, 0)),
        ({"input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 9, "output_tokens": 3,
          "output_tokens_details": {"thinking_tokens": 1}}, Usage(5, 7, 9, 2, 1)),
        ({"input_tokens": 5, "cache_read_input_tokens": None, "output_tokens": 3}, Usage(5, 0, 0, 3, 0)),
        ({"input_tokens": 5, "output_tokens": -3}, None),
        ({"input_tokens": 5, "output_tokens": 3, "output_tokens_details": {"thinking_tokens": 4}}, None),
        ({"output_tokens": 3}, None),
        (None, None),
    ],
)  # fmt: skip
def test_usage_of_messages(table: Any, usage: Usage | None) -> None:
    assert messages.usage_of(table) == usage


# Errors and hostile input.


@pytest.mark.parametrize(
    ("dialect", "body", "param"),
    [
        ("chat", [], None),
        ("chat", {"model": "m"}, "messages"),
        ("chat", ASK | {"messages": []}, "messages"),
        ("chat", ASK | {"messages": "hi"}, "messages"),
        ("chat", ASK | {"model": 3}, "model"),
        ("chat", ASK | {"stream": "yes"}, "stream"),
        ("chat", ASK | {"max_tokens": 0}, "max_tokens"),
        ("chat", ASK | {"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ("chat", ASK | {"n": True}, "n"),
        ("messages", ASK, "max_tokens"),
        ("responses", {"model": "m", "input": ""}, "input"),
        ("embeddings", {"model": "m", "input": {}}, "input"),
    ],
)
def test_what_the_gateway_needs_is_asked_for_by_name(dialect: Dialect, body: Any, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        read_call(dialect, json.dumps(body).encode())
    assert caught.value.param == param


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("dialect", "body", "spoken"),
    [
        ("chat", ASK | {"n": 2}, "messages"),
        ("chat", ASK | {"functions": [{"name": "f"}]}, "messages"),
        ("chat", ASK | {"messages": [{"role": "function", "content": "x"}]}, "messages"),
        ("chat", ASK | {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages"),
        ("chat", ASK | {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "messages"),
        ("chat", ASK | {"messages": [1]}, "messages"),
        ("chat", ASK | {"temperature": "hot"}, "messages"),
        ("chat", ASK | {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "t", "function": {"name": "f", "arguments": "{"}}]}]}, "messages"),
        ("messages", ASK_MESSAGES | {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "chat"),
        ("messages", ASK_MESSAGES | {"messages": [{"role": "user", "content": [{"type": "container_upload"}]}]}, "chat"),
        ("messages", ASK_MESSAGES | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "chat"),
        ("responses", ASK_RESPONSES | {"previous_response_id": "resp_1"}, "chat"),
        ("responses", ASK_RESPONSES | {"background": True}, "chat"),
        ("responses", ASK_RESPONSES | {"tools": [{"type": "web_search"}]}, "chat"),
        ("responses", ASK_RESPONSES | {"input": [{"type": "item_reference", "id": "x"}]}, "chat"),
        ("responses", ASK_RESPONSES | {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "chat"),
        ("responses", ASK_RESPONSES | {"input": [{"role": "user"}]}, "chat"),
    ],
)  # fmt: skip
def test_what_a_provider_cannot_do_is_refused_not_dropped(
    dialect: Dialect, body: Json, spoken: Spoken
) -> None:
    with pytest.raises(RequestError):
        put(dialect, body, spoken, 100)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(
        ["text", "tool_use", "message", "user", "assistant", "tool", "function", "delta", "image", "hi"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["type", "role", "content", "text", "messages", "input", "tools", "tool_calls", "function", "name", "id",
         "choices", "delta", "message", "usage", "index", "error", "content_block", "source", "tool_choice",
         "arguments", "finish_reason", "stop_reason"]), inner, max_size=6),
    max_leaves=12,
)  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(["tools", "tool_choice", "system", "text", "stop", "metadata", "n"]), JSONS
    ),
    JSONS,
)
def test_strange_requests_are_read_or_refused(fields: Json, content: Any) -> None:
    dialects: list[Dialect] = ["chat", "messages", "responses", "embeddings"]
    for dialect in dialects:
        body = {"max_tokens": 5, "messages": [content], "input": [content]} | fields
        for use in (
            neutral,
            prompt_text,
            lambda call: write_call(call, "messages", "m", 9),
            lambda c: write_call(c, "chat", "m"),
        ):
            try:
                call = call_of(dialect, body)
                if use is neutral and dialect == "embeddings":
                    continue
                use(call)
            except RequestError:
                pass


@given(st.binary(max_size=40) | JSONS.map(lambda j: json.dumps(j).encode()))
def test_strange_answers_are_read_or_refused(data: bytes) -> None:
    asks: list[tuple[Dialect, Json]] = [
        ("chat", ASK),
        ("messages", ASK_MESSAGES),
        ("responses", ASK_RESPONSES),
    ]
    spokens: list[Spoken] = ["chat", "messages"]
    for ask in asks:
        for spoken in spokens:
            for attempt in (
                lambda call, s: translate_reply(call, s, data, STAMP),
                lambda call, s: told(Stream(call, s, STAMP), b"data: " + data.replace(b"\n", b"") + b"\n\n"),
            ):
                with contextlib.suppress(ReplyError):
                    attempt(call_of(*ask), spoken)
    read_error(data)


def test_deep_nesting_is_refused() -> None:
    deep = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(RequestError):
        prompt_text(read_call("chat", deep))
    with pytest.raises(ReplyError):
        translate_reply(call_of("chat", ASK), "chat", deep, STAMP)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b'{"choices": []}',
        b'{"choices": [{"index": 0}]}',
        b'{"choices": [{"message": {"content": "x", "tool_calls": 3}}]}',
        b"",
    ],
)
def test_an_answer_without_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(ReplyError):
        translate_reply(call_of("chat", ASK), "chat", body, STAMP)


def test_an_error_inside_a_stream_is_told_in_the_clients_words() -> None:
    chat_error = b'data: {"error":{"message":"Too busy","type":"server_error"}}\n\n'
    anthropic_error = stream_of(
        [("error", {"type": "error", "error": {"type": "overloaded_error", "message": "Too busy"}})]
    )
    cases: list[tuple[Dialect, Json, Spoken, bytes]] = [
        ("chat", ASK, "messages", anthropic_error),
        ("messages", ASK_MESSAGES, "chat", chat_error),
        ("responses", ASK_RESPONSES, "messages", anthropic_error),
        ("chat", ASK, "chat", chat_error),
    ]
    for dialect, body, spoken, data in cases:
        stream = Stream(call_of(dialect, body), spoken, STAMP)
        ((name, event),) = events_in(told(stream, data))
        assert stream.error is not None
        assert stream.error.text == "Too busy"
        assert not stream.finished
        told_error = event if dialect == "responses" else event["error"]
        assert told_error["message"] == "Too busy"
        assert name == ("" if dialect == "chat" else "error")
    stream = Stream(call_of("responses", ASK_RESPONSES), "chat", STAMP)
    assert events_in(stream.fail("gone", "api_error", "upstream_cut"))[0][1] == {
        "type": "error", "sequence_number": 0, "code": "upstream_cut", "message": "gone", "param": None,
    }  # fmt: skip


def test_errors_have_the_shape_of_the_clients_api() -> None:
    assert json.loads(error_body("chat", 429, "Slow down", code="budget", param="model")) == {
        "error": {"message": "Slow down", "type": "rate_limit_error", "param": "model", "code": "budget"}
    }
    assert json.loads(error_body("messages", 529, "Busy")) == {
        "type": "error", "error": {"type": "overloaded_error", "message": "Busy"},
    }  # fmt: skip
    assert [error_type(s) for s in (400, 401, 404, 418, 500, 503)] == [
        "invalid_request_error", "authentication_error", "not_found_error", "invalid_request_error", "api_error",
        "api_error",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"error":{"message":"m","type":"t","code":"c","param":null}}', ("m", "t", "c")),
        (
            b'{"type":"error","error":{"type":"overloaded_error","message":"m"}}',
            ("m", "overloaded_error", ""),
        ),
        (b'{"error":"m"}', ("m", "", "")),
        (b'{"detail":"m"}', ("m", "", "")),
        (b'{"object":"error","message":"m","code":40}', ("m", "", "")),
        (b"<html>", ("", "", "")),
    ],
)
def test_errors_of_providers_are_understood(body: bytes, found: tuple[str, str, str]) -> None:
    error = read_error(body)
    assert (error.message, error.type, error.code) == found
