"""Requests that have not been answered yet, as JSON Lines: what `walras route` is asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walras.errors import RecordError, nearest

KNOWN = (
    "request_id",
    "prompt",
    "messages",
    "class",
    "tenant",
    "value_usd",
    "cached_tokens",
    "facts",
    "embedding",
    "certainty",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. Everything but its text may be left out."""

    request_id: str
    prompt: str
    task_class: str | None = None
    tenant: str | None = None
    value_usd: float | None = None
    cached_tokens: Mapping[str, float] | None = None
    """Tokens of the prompt that each named model holds in its prefix cache."""
    facts: Mapping[str, str] | None = None
    embedding: tuple[float, ...] | None = None
    """A vector of the prompt, of the same making as those in the log."""
    certainty: float | None = None
    """How sure a first look was, 0 to 1, of the same making as in the log."""


def read_asks(path: Path) -> list[Asked]:
    """Requests of a JSON Lines file: `prompt` (or OpenAI-style `messages`) and, where known, the other keys.

    Raises:
        RecordError: names the file, the line and the key.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror}", path=path) from error
    asks = [_ask(path, row, line) for row, line in enumerate(lines, start=1) if line.strip()]
    if not asks:
        raise RecordError("has no requests", path=path, hint='one JSON object a line: {"prompt": "…"}')
    return asks


def _ask(path: Path, row: int, line: bytes) -> Asked:
    def fault(problem: str, key: str | None = None, hint: str | None = None) -> RecordError:
        return RecordError(problem, path=path, row=row, field=key, hint=hint)

    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise fault("is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise fault(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise fault("is not a JSON object", hint='{"prompt": "…"}')
    unknown = next((key for key in record if key not in KNOWN), None)
    if unknown is not None:
        raise fault("is not known", unknown, f"{nearest(unknown, KNOWN)}; anything else goes into facts")
    for key in ("prompt", "class", "tenant"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise fault(f"is {record[key]!r:.40}, expected text", key)
    prompt = record.get("prompt")
    if prompt is None:
        if "messages" not in record:
            raise fault("no prompt and no messages", "prompt")
        prompt = _said(record["messages"], fault)
    return Asked(
        request_id=_name(record.get("request_id"), row, fault),
        prompt=prompt,
        task_class=record.get("class"),
        tenant=record.get("tenant"),
        value_usd=_amount(record.get("value_usd"), "value_usd", fault),
        cached_tokens=_amounts(record.get("cached_tokens"), fault),
        facts=_facts(record.get("facts"), fault),
        embedding=_vector(record.get("embedding"), fault),
        certainty=_share(record.get("certainty"), "certainty", fault),
    )


def _name(value: Any, row: int, fault: Any) -> str:
    """The request's own name, or its row: draws hang on it, and it is printed."""
    if value is None:
        return str(row)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise fault(f"is {value!r:.40}, expected text or a whole number", "request_id")
    name = str(value)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise fault(f"is {name!a:.40}, which is half a character", "request_id")
    return name


def _said(messages: Any, fault: Any) -> str:
    """All the text of OpenAI-style messages."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise fault("is not a list of messages", "messages")
    said = []
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        said += [
            part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
    return "\n".join(said)


def _amount(value: Any, key: str, fault: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= sys.float_info.max:
        raise fault(f"is {value!r:.40}, expected a number ≥ 0", key)
    return float(value)


def _share(value: Any, key: str, fault: Any) -> float | None:
    share = _amount(value, key, fault)
    if share is not None and share > 1:
        raise fault(f"is {value!r:.40}, expected a number from 0 to 1", key)
    return share


def _amounts(value: Any, fault: Any) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise fault("is not an object of model: tokens", "cached_tokens")
    return {model: _amount(tokens, f"cached_tokens.{model}", fault) or 0.0 for model, tokens in value.items()}


def _vector(value: Any, fault: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [None]
    most = sys.float_info.max
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= most for x in numbers):
        raise fault("is not a list of numbers", "embedding")
    return tuple(map(float, numbers))


def _facts(value: Any, fault: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise fault("is not an object of name: text", "facts")
    wrong = next((name for name, item in value.items() if isinstance(item, list | dict)), None)
    if wrong is not None:
        raise fault(f"is {value[wrong]!r:.40}, expected text", f"facts.{wrong}")
    # true is "true", as in a log that is read.
    known = {name: item for name, item in value.items() if item is not None}
    return {name: item if isinstance(item, str) else json.dumps(item) for name, item in known.items()}
