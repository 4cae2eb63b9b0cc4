"""Traces of requests, as they are: Mooncake, Azure, coding-agent sessions, and users' own logs, told by their columns.

Parquet, CSV and JSON Lines. Rows keep their order, so an error's row is the file's (1 = first record).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
TENANT = ("tenant", "tenant_id", "team")
WORTH = {
    "value": ("value", "value_usd"),
    "delay_price": ("delay_price", "delay_price_usd_per_s"),
    "expected_output": ("expected_output", "expected_output_tokens"),
}
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


def read_trace(
    path: Path,
    *,
    model: str | None = None,
    session_every_s: float = 60.0,
    scheduled: bool = False,
    needed: Sequence[str] = (),
) -> Trace:
    """The requests of a trace or of a log of records.

    Args:
        model: of a log with rows for several models, the one whose rows are meant; left out, those marked `chosen`, or all.
        session_every_s: seconds between the starts of sessions, in a trace of sessions: it says how long an agent thought
            after each answer, not when its session began.
        scheduled: whether to read also, where the file has them, whose requests they are, what answers and seconds are worth, and how
            long answers are expected to be.
        needed: which of those columns of `Requests` must be there.

    Raises:
        RecordError: names file, row and column: arrivals that are negative or go back, requests without tokens, an id
            that occurs twice, block ids out of prefix order, no rows, no such columns.
    """
    names = columns_of(path)
    for key in needed:
        _one_of(path, names, TENANT if key == "tenant" else WORTH[key])
    if all(name in names for name in SESSIONS):
        return _sessions(path, session_every_s)
    file = _File(path, _rows_of(path, names, model))
    columns = {
        "input_tokens": _one_of(path, names, INPUT),
        "output_tokens": _one_of(path, names, OUTPUT),
        "arrival_s": _one_of(path, names, (*ARRIVAL, *CLOCK)),
    }
    with suppress(
        RecordError
    ):  # a clock may hold dates; whatever else is wrong is told below, column by column
        file.load(tuple(columns.values()))
    found: dict[str, Any] = {key: file.whole(columns[key]) for key in ("input_tokens", "output_tokens")}
    found["arrival_s"] = file.arrivals(columns["arrival_s"])
    if label := next((name for name in NAMES if name in names), None):
        columns["names"] = label
        found["names"] = np.asarray(file.text(label))
    rows = file.numbers_of(len(found["arrival_s"]))
    if scheduled:
        for key, known in (("tenant", TENANT), *WORTH.items()):
            if any(name in names for name in known):
                columns[key] = _one_of(path, names, known)
                found[key] = file.codes(columns[key]) if key == "tenant" else file.numbers(columns[key])
    if PREFIXES not in names:
        return _checked(found, 0, path, columns, rows)
    columns |= {"prefix_ids": PREFIXES, "prefix_offsets": PREFIXES}
    found["prefix_offsets"], found["prefix_ids"] = file.lists(PREFIXES)
    block = _block_tokens(file, found["input_tokens"], np.diff(found["prefix_offsets"]))
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


@dataclass(frozen=True, slots=True)
class _File:
    """A file's columns, of the rows that are meant; errors name the row of the file."""

    path: Path
    rows: IntArray | None = None
    """From 1; None: all."""
    loaded: dict[str, FloatArray] = field(default_factory=dict)

    def numbers_of(self, count: int) -> IntArray:
        """(N,) the rows' numbers in the file."""
        return np.arange(1, count + 1) if self.rows is None else self.rows

    def wrong(self, bad: NDArray[np.bool_], name: str, problem: str, hint: str | None = None) -> None:
        """Raise for the first of the rows that are bad."""
        if bad.any():
            row = int(self.numbers_of(len(bad))[np.argmax(bad)])
            raise RecordError(problem, path=self.path, row=row, field=name, hint=hint)

    def load(self, names: Sequence[str]) -> None:
        """Read columns of numbers together: each reading of a text file parses all of it."""
        batches = [batch for _, batch in read_records(self.path, (), extra=names)]
        for name in names:
            parts = pa.chunked_array([batch.column(name) for batch in batches])
            column = np.asarray(parts.to_numpy(), dtype=np.float64)
            self.loaded[name] = column if self.rows is None else column[self.rows - 1]

    def maybe(self, name: str) -> FloatArray:
        """(N,) numbers ≥ 0, NaN where missing."""
        if name not in self.loaded:
            self.load((name,))
        return self.loaded[name]

    def numbers(self, name: str) -> FloatArray:
        """(N,) numbers ≥ 0, none missing."""
        column = self.maybe(name)
        self.wrong(np.isnan(column), name, "is missing")
        return column

    def whole(self, name: str) -> IntArray:
        """(N,) counts of tokens."""
        column = self.numbers(name)
        broken = column != np.floor(column)
        self.wrong(broken, name, f"is {column[np.argmax(broken)]:g}, expected a whole number of tokens")
        return column.astype(np.int64)

    def text(self, name: str) -> list[str | None]:
        """(N,) text, None where missing."""
        batches = read_records(self.path, (), facts=(name,))
        column = [value for _, batch in batches for value in batch.column(name).to_pylist()]
        return column if self.rows is None else [column[row - 1] for row in self.rows]

    def codes(self, name: str) -> IntArray:
        """(N,) texts as numbers, in the order in which they first occur."""
        texts = self.text(name)
        self.wrong(np.array([text is None for text in texts]), name, "is missing")
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return np.array([numbers[text] for text in texts], dtype=np.int64)

    def arrivals(self, name: str) -> FloatArray:
        """(N,) seconds; milliseconds and dates count from the first row."""
        if name not in CLOCK:
            return self.numbers(name)
        try:
            seconds = self.numbers(name) / 1000
        except RecordError as error:
            return self._dates(name, error)
        return np.asarray(seconds - seconds[0], dtype=np.float64)

    def _dates(self, name: str, no_number: RecordError) -> FloatArray:
        try:
            texts = self.text(name)
        except RecordError:  # JSON's numbers are no text
            raise no_number from None
        if not texts[0] or _is_number(texts[0]):
            raise no_number
        self.wrong(np.array([text is None for text in texts]), name, "is missing")
        try:
            stamps = _stamps(texts)
        except pa.ArrowInvalid:
            at = next(i for i, text in enumerate(texts) if not _is_date(text))
            bad = np.arange(len(texts)) == at
            self.wrong(bad, name, f"is {texts[at]!r}, expected a date", "as 2023-11-16 18:15:46.68")
            raise
        return np.asarray((stamps - stamps[0]) / np.timedelta64(1, "s"), dtype=np.float64)

    def lists(self, name: str) -> tuple[IntArray, IntArray]:
        """(N+1,) offsets and values of lists of whole numbers."""
        kind = pa.list_(pa.int64())
        try:
            if self.path.suffix.lower() in (".parquet", ".pq"):
                column = pa.parquet.read_table(self.path, columns=[name])[name].cast(kind)
            else:
                schema = pa.schema([(name, kind)])
                options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
                column = pa.json.read_json(self.path, parse_options=options)[name]
        except pa.ArrowException as error:
            row = _bad_list(self.path, name)
            raise RecordError(
                "is not a list of whole numbers", path=self.path, row=row, field=name
            ) from error
        lists: Any = column.combine_chunks()
        lists = lists if self.rows is None else lists.take(pa.array(self.rows - 1))
        if lists.null_count or lists.flatten().null_count:
            bad = np.array([one is None or None in one for one in lists.to_pylist()])
            self.wrong(bad, name, "is missing, or has a gap")
        offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(), dtype=np.int64)])
        return offsets, np.asarray(lists.flatten().to_numpy(), dtype=np.int64)


def _stamps(texts: list[str | None]) -> NDArray[np.datetime64]:
    stamps: NDArray[np.datetime64] = pc.cast(pa.array(texts, pa.string()), pa.timestamp("ns")).to_numpy(
        zero_copy_only=False
    )
    return stamps


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_date(text: str | None) -> bool:
    try:
        _stamps([text])
    except pa.ArrowInvalid:
        return False
    return True


def _rows_of(path: Path, names: Sequence[str], model: str | None) -> IntArray | None:
    """Rows of a log that are requests: those of one model, those marked as chosen, or (None) all."""
    if model is not None:
        if "model" not in names:
            raise RecordError("no column 'model'", path=path, hint="leave the model out")
        models = _File(path).text("model")
        marks = [name == model for name in models]
        if not any(marks):
            hint = nearest(model, sorted({name for name in models if name}))
            raise RecordError(f"no row of model '{model}'", path=path, field="model", hint=hint)
    elif "chosen" in names:
        marks = [(mark or "").lower() in ("true", "1") for mark in _File(path).text("chosen")]
        if not any(marks):
            raise RecordError("no row is chosen", path=path, field="chosen", hint="name a model")
    else:
        return None
    return np.asarray(np.flatnonzero(marks) + 1, dtype=np.int64)


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


def _block_tokens(file: _File, tokens: IntArray, ids: IntArray) -> int:
    """How many tokens one id names, by how many ids prompts have: whole blocks, with or without the last broken one."""
    wrong = [(ids < tokens // block) | (ids > -(-tokens // block)) for block in BLOCKS]
    best = int(np.argmin([one.sum() for one in wrong]))
    at = np.argmax(wrong[best])
    others = f"other rows have one for every {BLOCKS[best]}"
    file.wrong(wrong[best], PREFIXES, f"{ids[at]} ids for {tokens[at]} tokens, {others}")
    return BLOCKS[best]


def _sessions(path: Path, every_s: float) -> Trace:
    """Sessions as closed loops: a call follows the one before it of the same agent, after the time the agent thought.

    An agent's first call follows the call of its session just above it; a session's first arrives by itself. A call
    that generated nothing (an error, upstream) counts as one token.
    """
    columns = {"arrival_s": "think_s", "prefix_ids": "run_start", "prefix_offsets": "run_len"}
    file = _File(path)
    session, agent = (np.asarray(file.text(name), dtype=str) for name in ("session", "agent"))
    think_s = np.nan_to_num(file.maybe("think_s"), nan=0.0)
    after = np.full(len(session), -1, dtype=np.int64)
    latest: dict[tuple[str, str], int] = {}
    starts = 0
    for row, key in enumerate(zip(session.tolist(), agent.tolist(), strict=True)):
        after[row] = latest.get(key, latest.get((key[0], ""), -1))
        latest[key] = row
        if after[row] < 0:
            think_s[row] = starts * every_s
            starts += 1
    tokens = file.whole("input_tokens")
    offsets, ids = _chunks(file, session, tokens)
    found = {
        "arrival_s": think_s,
        "input_tokens": tokens,
        "output_tokens": np.maximum(1, file.whole("output_tokens")),
        "prefix_offsets": offsets,
        "prefix_ids": ids,
        "after": after,
    }
    return _checked(found, SESSION_CHUNK, path, columns, np.arange(1, len(tokens) + 1))


def _chunks(file: _File, session: NDArray[Any], tokens: IntArray) -> tuple[IntArray, IntArray]:
    """Offsets and prefix ids of whole chunks: the id of a chunk's last block, told apart by session."""
    run_offsets, starts = file.lists("run_start")
    length_offsets, lengths = file.lists("run_len")
    file.wrong(np.diff(run_offsets) != np.diff(length_offsets), "run_len", "is not as long as run_start")
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
