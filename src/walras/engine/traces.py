"""Traces of requests, as they are: Mooncake, Azure, coding-agent sessions, and users' own logs, told by their columns.

Parquet, CSV and JSON Lines. Rows keep their order, so an error's row is the file's (1 = first record).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray

from walras.engine.requests import Requests
from walras.engine.steps import FloatArray
from walras.errors import RecordError, nearest
from walras.records.read import columns_of, read_records

IntArray = NDArray[np.int64]

INPUT = (
    "input_tokens",
    "input_length",
    "prompt_tokens",
    "ContextTokens",
    "num_prefill_tokens",
    "prompt_size",
)
OUTPUT = (
    "output_tokens",
    "output_length",
    "completion_tokens",
    "GeneratedTokens",
    "num_decode_tokens",
    "token_size",
)
ARRIVAL = ("arrival_s", "time_s", "arrived_at", "arrival_timestamp")
CLOCK = ("timestamp", "TIMESTAMP")
"""Milliseconds where they are numbers, else dates."""
NAMES = ("request_id", "id")
PREFIXES = "hash_ids"
SESSIONS = ("session", "agent", "think_s", "run_start", "run_len")
SESSION_BLOCK, SESSION_CHUNK = 64, 512
"""Tokens that one block id of the coding-agent trace names, and of the chunks read: 50 M ids would fill memory."""
BLOCKS = tuple(1 << k for k in range(3, 14))
"""Tokens that one prefix id may name."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests read from a file."""

    requests: Requests
    prefix_tokens: int
    """Tokens that one prefix id names; 0: the trace names none."""
    path: Path
    columns: dict[str, str]
    """Column of `requests` → column of the file."""
    rows: IntArray
    """(N,) which row of the file each request is, from 1."""

    def in_file(self, error: RecordError) -> RecordError:
        """What is wrong with a request, said of the file's row and column."""
        return _in_file(error, self.path, self.columns, self.rows)


def read_trace(path: Path, *, model: str | None = None, session_every_s: float = 60.0) -> Trace:
    """The requests of a trace or of a log of records.

    Args:
        model: of a log with rows for several models, the one whose rows are meant; left out, those marked `chosen`, or all.
        session_every_s: seconds between the starts of sessions, in a trace of sessions: it says how long an agent thought
            after each answer, not when its session began.

    Raises:
        RecordError: names file, row and column: arrivals that are negative or go back, requests without tokens, an id
            that occurs twice, block ids out of prefix order, no rows, no such columns.
    """
    names = columns_of(path)
    if all(name in names for name in SESSIONS):
        return _sessions(path, session_every_s)
    columns = {
        "input_tokens": _one_of(path, names, INPUT),
        "output_tokens": _one_of(path, names, OUTPUT),
        "arrival_s": _one_of(path, names, (*ARRIVAL, *CLOCK)),
    }
    found: dict[str, Any] = {key: _whole(path, columns[key]) for key in ("input_tokens", "output_tokens")}
    found["arrival_s"] = _arrivals(path, columns["arrival_s"])
    label = next((name for name in NAMES if name in names), None)
    if label:
        columns["names"] = label
        found["names"] = np.asarray(_text(path, label))
    rows = np.arange(1, len(found["arrival_s"]) + 1)
    if keep := [_text(path, name) for name in ("model", "chosen") if name in names]:
        rows = _rows_of(
            path, dict(zip([n for n in ("model", "chosen") if n in names], keep, strict=True)), model
        )
        found = {key: column[rows - 1] for key, column in found.items()}
    if PREFIXES not in names:
        return _checked(found, 0, path, columns, rows)
    columns |= {"prefix_ids": PREFIXES, "prefix_offsets": PREFIXES}
    found["prefix_offsets"], found["prefix_ids"] = _lists(path, PREFIXES)
    block = _block_tokens(path, found["input_tokens"], np.diff(found["prefix_offsets"]))
    return _checked(found, block, path, columns, rows)


def _checked(
    found: dict[str, Any], prefix_tokens: int, path: Path, columns: dict[str, str], rows: IntArray
) -> Trace:
    try:
        return Trace(Requests(**found), prefix_tokens, path, columns, rows)
    except RecordError as error:
        raise _in_file(error, path, columns, rows) from error


def _in_file(error: RecordError, path: Path, columns: dict[str, str], rows: IntArray) -> RecordError:
    """The error with the file's own names for row and column in place of those of `Requests`."""
    where = [f"row {error.row}"] * (error.row is not None) + [f"column '{error.field}'"] * (
        error.field is not None
    )
    problem = str(error).removeprefix(", ".join(where) + ": ").removesuffix(f" ({error.hint})")
    row = None if error.row is None else int(rows[error.row - 1])
    field = None if error.field is None else columns.get(error.field, error.field)
    return RecordError(problem, path=path, row=row, field=field, hint=error.hint)


def _one_of(path: Path, names: Sequence[str], known: Sequence[str]) -> str:
    """The first of the known columns that the file has."""
    for name in known:
        if name in names:
            return name
    raise RecordError(
        f"no column '{known[0]}', nor under the names " + ", ".join(known[1:]),
        path=path,
        hint=nearest(known[0], names),
    )


def _numbers(path: Path, name: str) -> FloatArray:
    """(N,) a column of numbers ≥ 0, none of them missing."""
    parts = [batch.column(name) for _, batch in read_records(path, (), extra=(name,))]
    column = pa.chunked_array(parts).to_numpy()
    missing = np.flatnonzero(np.isnan(column))
    if missing.size:
        raise RecordError("is missing", path=path, row=int(missing[0]) + 1, field=name)
    return np.asarray(column, dtype=np.float64)


def _whole(path: Path, name: str) -> IntArray:
    column = _numbers(path, name)
    broken = np.flatnonzero(column != np.floor(column))
    if broken.size:
        problem = f"is {column[broken[0]]:g}, expected a whole number of tokens"
        raise RecordError(problem, path=path, row=int(broken[0]) + 1, field=name)
    return column.astype(np.int64)


def _text(path: Path, name: str) -> list[str | None]:
    """A column as text, None where it is missing."""
    return [
        value
        for _, batch in read_records(path, (), facts=(name,))
        for value in batch.column(name).to_pylist()
    ]


def _arrivals(path: Path, name: str) -> FloatArray:
    """(N,) seconds. Milliseconds and dates count from the first row."""
    if name not in CLOCK:
        return _numbers(path, name)
    first = next(iter(read_records(path, (), facts=(name,))))[1].column(name)[0].as_py()
    try:
        float(first or "nan")
    except ValueError:
        return _dates(path, name)
    seconds = _numbers(path, name) / 1000
    return np.asarray(seconds - seconds[0], dtype=np.float64)


def _dates(path: Path, name: str) -> FloatArray:
    texts = _text(path, name)
    try:
        stamps = pc.cast(pa.array(texts, pa.string()), pa.timestamp("ns")).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        row = next(i for i, text in enumerate(texts) if not _is_date(text))
        raise RecordError(
            f"is {texts[row]!r}, expected a date",
            path=path,
            row=row + 1,
            field=name,
            hint="as 2023-11-16 18:15:46.68",
        ) from error
    missing = np.flatnonzero(np.isnat(stamps))
    if missing.size:
        raise RecordError("is missing", path=path, row=int(missing[0]) + 1, field=name)
    return np.asarray((stamps - stamps[0]) / np.timedelta64(1, "s"), dtype=np.float64)


def _is_date(text: str | None) -> bool:
    try:
        pc.cast(pa.array([text], pa.string()), pa.timestamp("ns"))
    except pa.ArrowInvalid:
        return False
    return True


def _rows_of(path: Path, log: dict[str, list[str | None]], model: str | None) -> IntArray:
    """Rows of a log that are requests: those of one model, those marked as chosen, or all."""
    if model is not None:
        marks = [name == model for name in log.get("model", [])]
        if not any(marks):
            hint = nearest(model, sorted({name for name in log.get("model", []) if name}))
            raise RecordError(f"no row of model '{model}'", path=path, field="model", hint=hint)
    elif "chosen" in log:
        marks = [(mark or "").lower() in ("true", "1") for mark in log["chosen"]]
        if not any(marks):
            raise RecordError("no row is chosen", path=path, field="chosen", hint="name a model")
    else:
        marks = [True] * len(log["model"])
    return np.asarray(np.flatnonzero(marks) + 1, dtype=np.int64)


def _lists(path: Path, name: str) -> tuple[IntArray, IntArray]:
    """Offsets and values of a column of lists of whole numbers."""
    kind = pa.list_(pa.int64())
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            column = pa.parquet.read_table(path, columns=[name])[name].cast(kind)
        else:
            options = pa.json.ParseOptions(
                explicit_schema=pa.schema([(name, kind)]), unexpected_field_behavior="ignore"
            )
            column = pa.json.read_json(path, parse_options=options)[name]
    except pa.ArrowException as error:
        row = _bad_list(path, name)
        raise RecordError("is not a list of whole numbers", path=path, row=row, field=name) from error
    lists: Any = column.combine_chunks()
    if lists.null_count or lists.flatten().null_count:
        row = next(i for i, one in enumerate(lists.to_pylist(), 1) if one is None or None in one)
        raise RecordError("is missing, or has a gap", path=path, row=row, field=name)
    lengths = lists.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return offsets, np.asarray(lists.flatten().to_numpy(), dtype=np.int64)


def _bad_list(path: Path, name: str) -> int | None:
    """The first row of a JSON Lines file whose column is no list of whole numbers; in other formats all are alike."""
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return None
    with path.open(encoding="utf-8") as file:
        for row, line in enumerate(file, 1):
            value = json.loads(line).get(name)
            if not isinstance(value, list) or not all(type(item) is int for item in value):
                return row
    return None


def _block_tokens(path: Path, tokens: IntArray, ids: IntArray) -> int:
    """How many tokens one id names, by how many ids prompts have: whole blocks, with or without the last broken one."""
    wrong = [(ids < tokens // block) | (ids > -(-tokens // block)) for block in BLOCKS]
    misses = [int(one.sum()) for one in wrong]
    best = int(np.argmin(misses))
    if misses[best]:
        row = int(np.flatnonzero(wrong[best])[0])
        raise RecordError(
            f"{ids[row]} ids for {tokens[row]} tokens, other rows have one for every {BLOCKS[best]}",
            path=path,
            row=row + 1,
            field=PREFIXES,
        )
    return BLOCKS[best]


def _sessions(path: Path, every_s: float) -> Trace:
    """Sessions as closed loops: a call follows the one before it of the same agent, after the time the agent thought.

    An agent's first call follows the call of its session just above it; a session's first arrives by itself. A call
    that generated nothing (an error, upstream) counts as one token.
    """
    columns = {"arrival_s": "think_s", "prefix_ids": "run_start", "prefix_offsets": "run_len"}
    session, agent = (np.asarray(_text(path, name), dtype=str) for name in ("session", "agent"))
    parts = [batch.column("think_s") for _, batch in read_records(path, (), extra=("think_s",))]
    think_s = np.nan_to_num(pa.chunked_array(parts).to_numpy(), nan=0.0)
    after = np.full(len(session), -1, dtype=np.int64)
    latest: dict[tuple[str, str], int] = {}
    starts = 0
    for row, key in enumerate(zip(session.tolist(), agent.tolist(), strict=True)):
        after[row] = latest.get(key, latest.get((key[0], ""), -1))
        latest[key] = row
        if after[row] < 0:
            think_s[row] = starts * every_s
            starts += 1
    tokens = _whole(path, "input_tokens")
    offsets, ids = _chunks(path, session, tokens)
    found = {
        "arrival_s": think_s,
        "input_tokens": tokens,
        "output_tokens": np.maximum(1, _whole(path, "output_tokens")),
        "prefix_offsets": offsets,
        "prefix_ids": ids,
        "after": after,
    }
    return _checked(found, SESSION_CHUNK, path, columns, np.arange(1, len(tokens) + 1))


def _chunks(path: Path, session: NDArray[Any], tokens: IntArray) -> tuple[IntArray, IntArray]:
    """Offsets and prefix ids of whole chunks: the id of a chunk's last block, told apart by session."""
    run_offsets, starts = _lists(path, "run_start")
    length_offsets, lengths = _lists(path, "run_len")
    uneven = np.flatnonzero(np.diff(run_offsets) != np.diff(length_offsets))
    if uneven.size:
        raise RecordError(
            "run_start and run_len differ in length", path=path, row=int(uneven[0]) + 1, field="run_len"
        )
    ends = np.concatenate([[0], np.cumsum(lengths)])
    blocks = ends[run_offsets[1:]] - ends[run_offsets[:-1]]
    per_chunk = SESSION_CHUNK // SESSION_BLOCK
    chunks = np.minimum(blocks // per_chunk, tokens // SESSION_CHUNK)
    offsets = np.concatenate([[0], np.cumsum(chunks)])
    row = np.repeat(np.arange(len(tokens)), chunks)
    place = ends[run_offsets[:-1]][row] + (np.arange(offsets[-1]) - offsets[:-1][row] + 1) * per_chunk - 1
    run = np.searchsorted(ends, place, side="right") - 1
    _, code = np.unique(session, return_inverse=True)
    ids = (code[row].astype(np.int64) << 32) + starts[run] + place - ends[run]
    return offsets, ids
