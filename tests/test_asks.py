"""Requests to route, as JSON Lines: what is read, and that a fault names its file, its line and its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import write_jsonl
from walras.errors import RecordError
from walras.records.asks import KNOWN, Asked, read_asks


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asks") / "asks.jsonl"


def read(path: Path, *lines: str | bytes) -> list[Asked]:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return read_asks(path)


def test_everything_that_can_be_said(path: Path) -> None:
    row = {
        "request_id": "a", "prompt": "2 + 2?", "class": "sums", "tenant": "acme", "value_usd": 0.5,
        "cached_tokens": {"small": 12, "large": 0.0}, "facts": {"language": "es", "try": 2, "paid": True, "no": None},
        "embedding": [0.25, -1], "certainty": 1,
    }  # fmt: skip
    (one,) = read_asks(write_jsonl(path, [row]))
    assert one == Asked(
        request_id="a",
        prompt="2 + 2?",
        task_class="sums",
        tenant="acme",
        value_usd=0.5,
        cached_tokens={"small": 12.0, "large": 0.0},
        facts={"language": "es", "try": "2", "paid": "true"},
        embedding=(0.25, -1.0),
        certainty=1.0,
    )
    assert set(row) | {"messages"} == set(KNOWN)


def test_only_the_text_is_needed(path: Path) -> None:
    assert read(path, '{"prompt": ""}') == [Asked("1", "")]
    nulls = {key: None for key in KNOWN if key not in ("prompt", "messages")}
    assert read(path, json.dumps({"prompt": "x", **nulls})) == [Asked("1", "x")]


def test_a_request_without_a_name_has_its_line(path: Path) -> None:
    lines = (
        '{"prompt": "a"}',
        "",
        "  \r",
        '{"prompt": "b", "request_id": null}',
        '{"prompt": "c", "request_id": 7}\r',
    )
    assert [one.request_id for one in read(path, *lines)] == ["1", "4", "7"]


def test_a_name_may_occur_twice(path: Path) -> None:
    assert len(read(path, '{"prompt": "a", "request_id": "x"}', '{"prompt": "b", "request_id": "x"}')) == 2


def test_a_byte_order_mark_is_no_text(path: Path) -> None:
    assert read(path, b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}')[0].prompt == "é"


def test_messages_are_all_their_text(path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "See:"}, {"type": "image_url"}, {"text": 3}, "no"],
        },
        {"role": "user"},
    ]
    assert read(path, json.dumps({"messages": messages}))[0].prompt == "Be brief.\nSee:"
    assert read(path, '{"messages": []}')[0].prompt == ""
    assert read(path, json.dumps({"messages": messages, "prompt": "this"}))[0].prompt == "this"


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("nonsense", None, "is not JSON"),
        ('{"prompt": "cut', None, "is not JSON"),
        ("[" * 200_000, None, "is not JSON"),
        (b'{"prompt": "\xff"}', None, "is not UTF-8"),
        ('["a"]', None, "is not a JSON object"),
        ("null", None, "is not a JSON object"),
        ('{"promt": "a"}', "promt", "did you mean 'prompt'"),
        ('{"prompt": "a", "language": "es"}', "language", "facts"),
        ("{}", "prompt", "no prompt and no messages"),
        ('{"prompt": 3}', "prompt", "is 3, expected text"),
        ('{"prompt": "a", "class": ["b"]}', "class", "expected text"),
        ('{"prompt": "a", "tenant": 0}', "tenant", "is 0, expected text"),
        ('{"messages": null}', "messages", "is not a list of messages"),
        ('{"messages": {"role": "user"}}', "messages", "is not a list of messages"),
        ('{"messages": ["hello"]}', "messages", "is not a list of messages"),
        ('{"prompt": "a", "value_usd": -0.01}', "value_usd", "is -0.01, expected a number ≥ 0"),
        ('{"prompt": "a", "value_usd": "1"}', "value_usd", "is '1', expected a number"),
        ('{"prompt": "a", "value_usd": true}', "value_usd", "is True, expected a number"),
        ('{"prompt": "a", "value_usd": NaN}', "value_usd", "is nan, expected a number"),
        ('{"prompt": "a", "value_usd": 1e999}', "value_usd", "is inf, expected a number"),
        ('{"prompt": "a", "value_usd": 1' + "0" * 400 + "}", "value_usd", "expected a number"),
        ('{"prompt": "a", "value_usd": 1' + "0" * 5000 + "}", None, "is not JSON"),
        ('{"prompt": "a", "cached_tokens": 3}', "cached_tokens", "is not an object"),
        ('{"prompt": "a", "cached_tokens": {"m": -1}}', "cached_tokens.m", "is -1, expected a number ≥ 0"),
        ('{"prompt": "a", "facts": ["b"]}', "facts", "is not an object"),
        ('{"prompt": "a", "facts": {"b": {"c": 1}}}', "facts.b", "expected text"),
        ('{"prompt": "a", "request_id": ["b"]}', "request_id", "expected text or a whole number"),
        ('{"prompt": "a", "request_id": 1.5}', "request_id", "expected text or a whole number"),
        ('{"prompt": "a", "request_id": false}', "request_id", "expected text or a whole number"),
        ('{"prompt": "a", "request_id": "\\ud800"}', "request_id", "half a character"),
        ('{"prompt": "a", "certainty": 1.01}', "certainty", "is 1.01, expected a number from 0 to 1"),
        ('{"prompt": "a", "certainty": "high"}', "certainty", "expected a number"),
        ('{"prompt": "a", "embedding": "b"}', "embedding", "number"),
        ('{"prompt": "a", "embedding": [1, null]}', "embedding", "number"),
        ('{"prompt": "a", "embedding": [NaN]}', "embedding", "number"),
        ('{"prompt": "a", "embedding": [1' + "0" * 400 + "]}", "embedding", "number"),
    ],
)  # fmt: skip
def test_a_fault_names_file_line_and_key(path: Path, text: str | bytes, key: str | None, says: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(path, '{"prompt": "good"}', "", text, '{"prompt": "good"}')
    assert (caught.value.path, caught.value.row, caught.value.field) == (path, 3, key)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize("content", [b"", b"\n\n  \n\r\n"])
def test_no_requests(path: Path, content: bytes) -> None:
    with pytest.raises(RecordError, match="has no requests"):
        read(path, content)


def test_what_is_no_file(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(RecordError, match="cannot be read") as caught:
            read_asks(where)
        assert caught.value.path == where


def test_another_encoding_is_told(path: Path) -> None:
    with pytest.raises(RecordError, match="row 2: is not UTF-8 text"):
        read(path, '{"prompt": "a"}\n{"prompt": "b"}'.encode("utf-16"))


def test_half_characters_in_a_prompt_are_the_users_own(path: Path) -> None:
    """A client that cuts text at a UTF-16 unit sends them; a router must still answer."""
    assert read(path, '{"prompt": "a\\ud83d"}')[0].prompt == "a\ud83d"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def read_or_fault(path: Path, *lines: str | bytes) -> list[Asked] | RecordError:
    try:
        return read(path, *lines)
    except RecordError as error:
        return error


@given(st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=3), JSON, max_size=5))
def test_any_object_is_a_request_or_a_fault(path: Path, row: dict[str, Any]) -> None:
    got = read_or_fault(path, json.dumps(row))
    if isinstance(got, RecordError):
        assert got.row == 1
        return
    (one,) = got
    assert set(row) <= set(KNOWN)
    assert isinstance(one.prompt, str)
    assert one.value_usd is None or one.value_usd == row["value_usd"] >= 0
    assert one.request_id in ("1", str(row.get("request_id")))


@given(st.binary(max_size=60))
def test_any_bytes_are_requests_or_a_fault(path: Path, junk: bytes) -> None:
    got = read_or_fault(path, junk)
    assert got.path == path if isinstance(got, RecordError) else got
